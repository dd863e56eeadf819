"""A plan: every recipe's bytes, users and times on a machine, which of them no other beats, and which to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fivefold.errors import FivefoldError, InputError
from fivefold.plan import memory, time
from fivefold.plan.quality import Quality
from fivefold.plan.read import known_names
from fivefold.plan.room import Place, cache_bytes, cache_report, longest_context, most_users
from fivefold.plan.target import Target
from fivefold.recipe import Recipe

GRID = (
    "full()", "kivi(bits=8)", "kivi(bits=4)", "kivi(bits=3)", "kivi(bits=2)", "duo(keep=0.5)",
    "duo(keep=0.5) + kivi(bits=4)", "duo(keep=0.5) + kivi(bits=2)", "duo(keep=0.25) + kivi(bits=4)",
    "duo(keep=0.25) + kivi(bits=2)", "streaming(sink=64, recent=1024)", "snapkv(keep=0.2)",
    "snapkv(keep=0.2) + kivi(bits=4)", "rotatekv(bits=4)", "rotatekv(bits=2)", "gear(bits=2)", "mikv()",
    "cskv(keep=0.2)",
)  # fmt: skip
"""What is compared if nothing is asked for: every kind of method, and a few of its settings."""
CURVE = (4096, 8192, 16384, 32768, 65536, 131072, 262144, 524288, 1048576)
LONGEST = 1 << 20
"""The longest text that is asked about where a model does not say how long its texts may be."""
GPUS = (1, 2, 4, 8)


@dataclass
class Row:
    """What a plan says of one recipe. Bytes are those of all GPUs, times are seconds; None is unknown or impossible.

    nbytes: of one user's cache at the context, parts: by what they hold (`Report`), ratio: of the exact cache. users:
    the most that fit at the context, longest: the longest context for the users asked for. step: a decoding step of
    these (of one if none were asked for), crowded: of as many as fit, tokens_s: of all of these. first: until the first
    token, switch: one session out and another one in. meets: whether it is what the target asks for, and why_not.
    """

    recipe: Recipe
    nbytes: int
    parts: dict[str, int]
    ratio: float
    users: int
    longest: int
    step: time.Estimate | None
    crowded: time.Estimate | None
    first: time.Estimate | None
    switch: time.Estimate
    quality: Quality | None = None
    notes: list[str] = field(default_factory=list)
    on_front: bool = False
    meets: bool | None = None
    why_not: list[str] = field(default_factory=list)
    by_context: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokens_s(self) -> float | None:
        return None if self.crowded is None else time.tokens_a_second(self.crowded, self.users)

    def as_dict(self) -> dict[str, Any]:
        step = self.step
        return {
            "recipe": str(self.recipe),
            "bytes": self.nbytes,
            "parts": self.parts,
            "ratio": self.ratio,
            "users": self.users,
            "longest": self.longest,
            "step_ms": None if step is None else 1000 * step.seconds,
            "step_ms_most": None if self.crowded is None else 1000 * self.crowded.seconds,
            "tokens_s": self.tokens_s,
            "first_s": None if self.first is None else self.first.seconds,
            "switch_s": self.switch.seconds,
            "bound": "capacity" if not self.users else step.bound if step is not None else None,
            "quality": None if self.quality is None else self.quality.as_dict(),
            "notes": self.notes,
            "on_front": self.on_front,
            "meets": self.meets,
            "why_not": self.why_not,
            "terms": [] if step is None else [vars(term) for term in step.terms],
            "first_terms": [] if self.first is None else [vars(term) for term in self.first.terms],
            "switch_terms": [vars(term) for term in self.switch.terms],
            "by_context": self.by_context,
        }


@dataclass(frozen=True)
class Asked:
    """What a plan is asked for. users None: as many as fit."""

    context: int
    users: int | None = None
    target: Target | None = None
    curves: bool = False


def step_of(recipe: Recipe, place: Place, context: int, users: int) -> tuple[time.Estimate | None, str | None]:
    """A decoding step of so many users, or why none is predicted."""
    shape, size, few = place.loaded, place.dtype.itemsize, min(users, 2)
    own = {spec.layer for spec in memory.specs_of(shape, place.dtype, place.sliding)}
    if not own:
        return None, "no layer of this model has a cache that a recipe compresses"
    if size > 2:
        return None, "its times are not predicted: products in float32 were not measured"
    why, found = _reads(recipe, place, context, few)
    if why is not None:
        return None, f"its steps are not predicted: {why}"
    reads = [replace(read, nbytes=round(read.nbytes * users / few)) for read in found]
    others = [layer for index, layer in enumerate(shape.layers) if index not in own and layer.kv_heads]
    if others:
        tokens = [context if layer.window is None else min(context, layer.window) for layer in others]
        numbers = sum(2 * layer.kv_heads * layer.head_dim * count for layer, count in zip(others, tokens))
        reads.append(time.Read("exact", 8 * size, numbers * size * users, len(others), apart=True))
    runs = memory.running(recipe, shape, place.dtype, place.sliding)
    return time.step(runs, place.machine, users, reads, gpus=place.gpus), None


@lru_cache(maxsize=1024)
def _reads(recipe: Recipe, place: Place, context: int, users: int) -> tuple[str | None, tuple[time.Read, ...]]:
    """Why a step is not all kernels (None if it is), and what it reads."""
    cache = memory.rehearse(recipe, place.shape, context, users, dtype=place.dtype, sliding=place.sliding)
    return cache.why_no_kernel(), cache.reads()


def first_of(recipe: Recipe, place: Place, context: int) -> time.Estimate | None:
    """Reading a prompt of `context` tokens, a chunk at a time. None where no kernels pack it, or attention does what
    was not measured."""
    shape = place.loaded
    if shape.why_not is not None or any(layer.cap or layer.kind == "latent" for layer in shape.layers):
        return None
    if recipe.chooser is not None or recipe.get("reads") is not None or place.dtype.itemsize > 2:
        return None
    packed, bits = 0.0, None
    if recipe.packer is not None:
        forms = [read for read in _reads(recipe, place, context, 1)[1] if read.kind == "packed"]
        if any(read.bits == 16 for read in forms) or len(forms) > 1:
            return None
        if forms:
            packed, bits = forms[0].nbytes / context, forms[0].bits
    reach, split = memory.reach_of(recipe, shape, context, place.dtype)
    given: dict[str, Any] = {"packed": packed, "bits": bits, "reach": reach, "split": split}
    runs = memory.running(recipe, shape, place.dtype, place.sliding)
    return time.prefill(runs, place.machine, context, chunk=place.chunk, gpus=place.gpus, **given)


def row_of(recipe: Recipe, place: Place, asked: Asked, quality: Mapping[Recipe, Quality] | None = None) -> Row:
    """What there is to say of one recipe. Raises `RecipeError` where it does not fit the model."""
    context, wanted = asked.context, asked.users or 1
    report = cache_report(recipe, place, context, 1)
    users = most_users(recipe, place, context)
    longest = longest_context(recipe, place, wanted, place.shape.context or LONGEST)
    step, why = step_of(recipe, place, context, wanted)
    crowded = step_of(recipe, place, context, users)[0] if users and step is not None else None
    notes = memory.assumptions(recipe, place.shape)
    if notes:
        notes[-1] += " Its bytes are planned as if it had."
    if why is not None:
        notes.append(f"{why[0].upper()}{why[1:]}.")
    if recipe.get("tokens") is not None and getattr(recipe.get("tokens"), "together", False):
        notes.append("Its layers share a budget by what a text makes of them; here each has an even share.")
    parts = {
        name: value
        for name, value in report.as_dict().items()
        if isinstance(value, int) and name not in ("tokens", "process", "exact_equivalent", "total")
    }
    row = Row(
        recipe, report.total, parts, report.ratio, users, longest, step if users else None, crowded,
        first_of(recipe, place, context),
        time.switch(place.machine, report.total * place.share, packed=recipe.packer is not None),
        None if quality is None else quality.get(recipe), notes,
    )  # fmt: skip
    if row.quality is None and recipe == Recipe():
        row.quality = Quality(0.0, 0.0, 0.0, context, None, "full() is exact")
    if asked.curves:
        row.by_context = [
            _point(recipe, place, tokens) for tokens in CURVE if tokens <= max(context, place.shape.context or LONGEST)
        ]
    return row


def _point(recipe: Recipe, place: Place, context: int) -> dict[str, Any]:
    step = step_of(recipe, place, context, 1)[0]
    users = most_users(recipe, place, context)
    return {
        "context": context,
        "users": users,
        "bytes": cache_bytes(recipe, place, context, 1),
        "step_ms": None if step is None or not users else 1000 * step.seconds,
    }


def rows(
    recipes: Iterable[Recipe],
    place: Place,
    asked: Asked,
    quality: Mapping[Recipe, Quality] | None = None,
    skip: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """A row for each recipe, the front marked, and whether it meets the target. skip: leave out, and tell of, recipes
    that do not fit the model; else that is an error."""
    out = []
    for recipe in recipes:
        try:
            out.append(row_of(recipe, place, asked, quality))
        except FivefoldError as error:
            if not skip:
                raise
            told(f"{recipe} is left out: {error}")
    if not out:
        raise InputError("no recipe fits this model: look at what --recipe says of each.")
    _mark(out)
    if asked.target is not None:
        for row in out:
            row.why_not = list(_lacks(row, asked.target))
            row.meets = not row.why_not
    return out


def _mark(rows: Sequence[Row]) -> None:
    """The Pareto front of users against measured quality; recipes of unknown quality are on none."""
    known = [row for row in rows if row.quality is not None and row.users]
    for row in known:
        assert row.quality is not None
        row.on_front = not any(
            other.quality.kl <= row.quality.kl and other.users >= row.users
            and (other.quality.kl < row.quality.kl or other.users > row.users)
            for other in known if other.quality is not None
        )  # fmt: skip


def _lacks(row: Row, target: Target) -> Iterable[str]:
    """What a recipe lacks of a target, in a few words each."""
    if target.users is not None and row.users < target.users:
        yield f"room for {row.users}, not {target.users:g}"
    if target.ms is not None:
        if row.step is None:
            yield "its step is not predicted" if row.users else "nobody fits"
        elif 1000 * row.step.seconds > target.ms:
            yield f"a step takes {1000 * row.step.seconds:.3g} ms, not {target.ms:g}"
    if target.tokens_s is not None and (row.tokens_s is None or row.tokens_s < target.tokens_s):
        yield "its step is not predicted" if row.tokens_s is None else f"{row.tokens_s:,.0f} tokens a second"
    if target.first_s is not None:
        if row.first is None:
            yield "its time to the first token is not predicted"
        elif row.first.seconds > target.first_s:
            yield f"{row.first.seconds:.3g} s to the first token"
    if target.kl is not None and (row.quality is None or (row.quality.high or row.quality.kl) > target.kl):
        yield "its quality is not known" if row.quality is None else f"KL {row.quality.kl:.3g}"


def choose(rows: Sequence[Row], asked: Asked) -> Row | None:
    """The recipe to take: of those that meet the target (or, without one, that hold the users asked for), the one that
    costs least quality; what is not known to cost how much comes after all that is. Of equals the one with more users.
    None if nothing does."""

    def fits(row: Row) -> bool:
        return row.users >= (asked.users or 1) and row.meets is not False

    able = [row for row in rows if fits(row)]
    known = [row for row in able if row.quality is not None]
    if known:
        return min(known, key=lambda row: (row.quality.kl, -row.users))  # type: ignore[union-attr]
    if not able:
        return None
    # Nothing is known of quality: what keeps most of the exact cache, full() first of all.
    return max(able, key=lambda row: (row.ratio, row.users))


def gpus_for(recipe: Recipe, place: Place, context: int, users: int) -> tuple[int, int] | None:
    """(GPUs that share a model, how many such) that hold so many users with the fewest GPUs; None if none can."""
    found = []
    for gpus in GPUS:
        most = most_users(recipe, replace(place, gpus=gpus), context)
        if most:
            found.append((gpus * -(-users // most), gpus, -(-users // most)))
    return None if not found else min(found)[1:]


def advice(rows: Sequence[Row], place: Place, asked: Asked) -> tuple[Row | None, str]:
    """The recipe to take, and a sentence or two that say why, or what comes nearest and what would do."""
    chosen, users = choose(rows, asked), asked.users
    whom = f"{users} users" if users and users > 1 else "one user"
    if chosen is not None:
        if chosen.quality is not None:
            cost = "which is exact" if chosen.recipe == Recipe() else f"KL {chosen.quality.kl:.3g} nats"
            why = f"of the recipes whose quality is known and that fit, it costs least ({cost})"
        else:
            why = "it keeps most of those that fit; what it costs in quality is not known: see --quality and --probe"
        said = f"Take {chosen.recipe}: {why}. There is room for {chosen.users:,} of {asked.context:,} tokens"
        said += f" ({whom} asked for)." if users else "."
        if chosen.quality is not None and any(row.quality is None for row in rows):
            said += " What the others cost in quality is not known: --quality or --probe says it."
        return chosen, said
    if place.room <= 0:
        need = next((gpus for gpus in GPUS if replace(place, gpus=gpus).room > 0), None)
        more = f"share it over {need} of them (--gpus {need})" if need else "take a larger GPU, or a smaller model"
        return None, (
            f"Nothing fits: the weights take {place.weights / 2**30:.1f} GiB on each GPU, and one {place.machine.name} "
            f"has {place.machine.usable / 2**30:.1f}: {more}."
        )
    nearest = max(rows, key=lambda row: (row.users, -len(row.why_not)))
    if asked.target is not None and any(row.users >= (users or 1) for row in rows):
        able = [row for row in rows if row.users >= (users or 1)]
        nearest = min(able, key=lambda row: (len(row.why_not), -row.users))
        return None, f"No recipe meets the target. The nearest is {nearest.recipe}: {'; '.join(nearest.why_not)}."
    wanted = users or 1
    enough, would = gpus_for(nearest.recipe, place, asked.context, wanted), ""
    if enough is not None:
        each, times = enough
        would = f" {each * times} GPUs would do" + (f": {times} times {each}." if times > 1 else ".")
    return None, (
        f"No recipe holds {whom} of {asked.context:,} tokens here. The nearest is {nearest.recipe}, with "
        f"room for {nearest.users:,}, or {nearest.longest:,} tokens for {whom}.{would}"
    )


def run_lines(row: Row, place: Place, asked: Asked, model: str) -> dict[str, str | None]:
    """How to run a recipe: in Python, on the command line, and in vLLM where it can. On several GPUs there is nothing
    to say: Fivefold does not share heads out itself."""
    if place.gpus > 1:
        return {"python": None, "generate": None, "vllm": None}
    if model in known_names():
        model = "MODEL"  # a shape alone; whose weights, the user knows
    elif Path(model).is_file():
        model = str(Path(model).parent)
    quoted = str(row.recipe).replace('"', "'")
    more = (", sliding=True" if place.sliding else "") + (", cuda_graph=True" if row.step is not None else "")
    python = (
        "import fivefold\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{model}", dtype="{place.loaded.dtype}", device_map="cuda")\n'
        f'cache = fivefold.compress(model, "{quoted}"{more})\n'
        "model.generate(**inputs, past_key_values=cache)"
    )
    generate = f'fivefold generate --model {model} --recipe "{quoted}" --prompts prompts.jsonl --out answers.jsonl'
    if asked.users and asked.users > 1:
        generate += f" --max-batch {asked.users}"
    # A plug-in that brings recipes to vLLM does not exist yet.
    vllm = f"vllm serve {model} --max-model-len {asked.context}" if row.recipe == Recipe() else None
    return {"python": python, "generate": None if place.sliding else generate, "vllm": vllm}
