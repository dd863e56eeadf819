"""What every layer's bits and every head's window cost, measured; and a byte budget shared out by that."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fivefold.calibrate.learner import Progress, Subject, Work
from fivefold.calibrate.shares import Option, share_out
from fivefold.engine.build import build
from fivefold.engine.session import Session
from fivefold.errors import FivefoldError, InputError, RecipeError
from fivefold.evaluate.divergence import kl
from fivefold.methods import find
from fivefold.recipe import Recipe
from fivefold.report import measure
from fivefold.store.context import Rope
from fivefold.store.spec import LayerSpec, Pools

TAIL = 32
"""Tokens that are judged behind a prompt: as many of what follows it, and of a quotation from it."""
FOLLOWING = 96
"""Tokens of what follows a prompt that whole recipes are judged on."""
CHUNK = 32
"""So many of them are fed at a time: what came before is packed by then, as in decoding."""
WEIGHTS = (1.0, 0.3, 0.1, 3.0)
"""How much windows count beside bits in the first recipes of the second pass."""
SPREAD = 0.5
"""Of the logarithms of factors that costs are multiplied by in the others."""


@dataclass(frozen=True)
class Level:
    """How a layer's pages may be packed: bits, and numbers that share a scale."""

    bits: int
    group: int


LEVELS = {
    "rotatekv": (Level(2, 64), Level(3, 64), Level(4, 64)),
    "kivi": (Level(2, 32), Level(4, 64), Level(8, 64)),
}
"""From the fewest bytes to the most; a layer may stay exact (level -1), too, which costs nothing but bytes."""


@dataclass(frozen=True)
class Prompt:
    """A text that a model has read exactly. ids: int64 `[1, length]`; tail: `[1, 2 * TAIL]`; keys, values, by layer:
    `[kv_head, length, head_dim]`; inputs: `[1, length, hidden]`; logs: float32 `[2 * TAIL, vocabulary]`, what the
    model says in the tail."""

    ids: torch.Tensor
    tail: torch.Tensor
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    inputs: dict[int, torch.Tensor]
    logs: torch.Tensor
    cache: Any = None
    """The exact cache that read it."""
    blocks: dict[int, Any] = field(default_factory=dict)
    """What the layers' modules put out in the tail, by layer, as they put it out."""


class Sharing(Work):
    """First pass: a step is one text with one change in it (a layer's bits, or a head's window), everything else exact.
    Second pass: a step is one recipe on all texts.

    sums: `bits` float64 [layer, level] and `windows` float64 [layer, kv_head], KL in nats summed over texts; for each
    budget i `best.i` float64 [2] (KL, bytes) with its choice `choice.i` int64 [layer, 1 + kv_heads] (level, where
    windows are) and `scale.i` float64 [layer, level + kv_heads], what costs were multiplied by.
    """

    what = "Measuring"

    def __init__(self, method: Any, subject: Subject) -> None:
        super().__init__()
        self.method, self.subject, self.model = method, subject, subject.model
        self.specs = [replace(spec, rope=None) for spec in subject.specs]
        self.codec, self.given = self._codec()
        self.levels = LEVELS[self.codec]
        self.heads = [spec.kv_heads for spec in self.specs]
        self.texts = self._texts()
        """Of each text, prompt `[1, length]` and tail `[1, FOLLOWING + TAIL]`, the quotation last."""
        self.tokens = sum(ids.shape[1] + tail.shape[1] for ids, tail in self.texts)
        self.items = [(layer, level) for layer in range(len(self.specs)) for level in range(len(self.levels))]
        self.items += [(layer, ~head) for layer, count in enumerate(self.heads) for head in range(count)]
        self.single = len(self.texts) * len(self.items)
        self.total = self.single + len(method.shares) * method.tries
        most = max(self.heads)
        self.sums = {
            "bits": torch.zeros(len(self.specs), len(self.levels), dtype=torch.float64),
            "windows": torch.zeros(len(self.specs), most, dtype=torch.float64),
        }
        for i in range(len(method.shares)):
            self.sums[f"best.{i}"] = torch.tensor([float("inf"), 0.0], dtype=torch.float64)
            self.sums[f"choice.{i}"] = torch.zeros(len(self.specs), 1 + most, dtype=torch.int64)
            self.sums[f"scale.{i}"] = torch.ones(len(self.specs), len(self.levels) + most, dtype=torch.float64)
        self.blocks = self._blocks()
        self._prompt: tuple[int, Prompt] | None = None
        self._exact: list[torch.Tensor] = []
        self._sizes: dict[Any, int] = {}
        self.equivalent = 0

    def _codec(self) -> tuple[str, dict[str, Any]]:
        """The codec of all bits, and what it is given beside them: rotatekv where it knows the model, else kivi."""
        from fivefold.models.huggingface import make_cache  # late, since it imports transformers

        given = {} if self.method.rotation is None else {"profile": self.method.rotation}
        try:
            stores = make_cache(self.model, Recipe((find("rotatekv")(**given),))).session.stores
        except FivefoldError:
            if self.method.rotation is not None:
                raise
            return "kivi", {}
        self.specs = [stores[spec.layer].spec for spec in self.specs]
        return "rotatekv", given

    def _blocks(self) -> dict[int, Any]:
        """The modules of the layers, by layer."""
        from fivefold.models.specs import attention_modules  # late, since it imports transformers

        names = {module: name for name, module in self.model.named_modules()}
        found = attention_modules(self.model).items()
        return {index: self.model.get_submodule(names[module].rpartition(".")[0]) for index, module in found}

    def _texts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The prompts and their tails, drawn by the seed: stretches that do not overlap."""
        method, pick = self.method, random.Random(self.subject.seed)
        longest = getattr(self.model.config, "max_position_embeddings", None) or method.length + FOLLOWING + TAIL
        length = min(method.length, longest - FOLLOWING - TAIL)
        out = []
        for piece in self._pieces(length, pick) if length >= 2 * TAIL else []:
            start = pick.randrange(length // 2)
            tail = piece[length:] + piece[start : start + TAIL]
            out.append((torch.tensor([piece[:length]]), torch.tensor([tail])))
        if len(out) < method.texts:
            raise InputError(
                f"{method.texts} pieces of {length} tokens are more than the text or the model (of {longest} tokens) "
                "has: give more text, or budget(length=..., texts=...) that are smaller."
            )
        return out

    def _pieces(self, length: int, pick: random.Random) -> list[list[int]]:
        """As many stretches of the text as are wanted, `length + FOLLOWING` tokens each, or fewer if it has not as
        many. Only they are tokenised, where there is text enough."""
        texts, tokenizer, wanted = self.subject.texts, self.subject.tokenizer, self.method.texts
        wide = 8 * (length + TAIL)  # characters, more than that of tokens in nearly any text
        length += FOLLOWING
        places = [(text, start) for text in texts for start in range(0, len(text) - wide + 1, wide)]
        if len(places) >= wanted:
            chosen = [text[start : start + wide] for text, start in pick.sample(places, wanted)]
            found = [tokenizer(text, add_special_tokens=False).input_ids[:length] for text in chosen]
            if all(len(ids) == length for ids in found):
                return found
        ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
        parts = range(0, len(ids) - length + 1, length)
        return [ids[start : start + length] for start in pick.sample(parts, min(wanted, len(parts)))]

    # -- steps --------------------------------------------------------------------------------------------

    def step(self, number: int) -> None:
        with torch.inference_mode():
            if number < self.single:
                text, item = divmod(number, len(self.items))
                layer, part = self.items[item]
                self._one(text, layer, part)
            else:
                self._whole(*divmod(number - self.single, self.method.tries))

    def _one(self, text: int, layer: int, part: int) -> None:
        """What one change costs on a text. part: a level, or ~head for a window."""
        level = [-1] * len(self.specs)
        windows: list[tuple[int, int]] = []
        if part >= 0:
            level[layer] = part
        else:
            windows.append((layer, ~part))
        prompt = self._read(text)
        first = self.specs[layer].layer
        cache = self._fed(self.recipe(level, windows), prompt, first)
        # The layers before it say what they said to the exact cache.
        with ExitStack() as stack:
            for index, block in self.blocks.items():
                if index < first:
                    stack.callback(vars(block).pop, "forward")
                    vars(block)["forward"] = _saying(prompt.blocks[index])
            loss = lost(prompt.logs, self._said(cache, prompt.tail))
        name, place = ("bits", part) if part >= 0 else ("windows", ~part)
        self.sums[name][layer, place] += loss

    def _whole(self, budget: int, attempt: int) -> None:
        """Propose a recipe for a budget, measure it, and keep it if it is the best so far."""
        scale = self._proposal(budget, attempt)
        choice = self._share(self.method.shares[budget], scale)
        best, known = self.sums[f"best.{budget}"], self.sums[f"choice.{budget}"]
        if bool(torch.isfinite(best[0])) and torch.equal(choice, known):
            return
        recipe, self._prompt = self.recipe(*_taken(choice, self.heads)), None
        if not self._exact:
            self._exact = [self._logs("full()", *text) for text in self.texts]
        losses = [
            lost(exact, self._logs(str(recipe), *text)) for exact, text in zip(self._exact, self.texts, strict=True)
        ]
        loss = sum(losses) / len(losses)
        if loss < float(best[0]):
            self.sums[f"best.{budget}"] = torch.tensor([loss, self.size(recipe)], dtype=torch.float64)
            self.sums[f"choice.{budget}"], self.sums[f"scale.{budget}"] = choice, scale

    def _proposal(self, budget: int, attempt: int) -> torch.Tensor:
        """What costs are multiplied by in a try."""
        levels = len(self.levels)
        if attempt < len(WEIGHTS):
            scale = torch.ones_like(self.sums[f"scale.{budget}"])
            scale[:, levels:] = WEIGHTS[attempt]
            return scale
        generator = torch.Generator().manual_seed(self.subject.seed * 1_000_003 + budget * 1_009 + attempt)
        known = self.sums[f"scale.{budget}"]
        # A layer's levels have one factor, since more bits never cost more; each head has its own, and all of them one.
        noise = torch.randn(known.shape, generator=generator, dtype=torch.float64)
        noise[:, :levels] = noise[:, :1]
        noise[:, levels:] += torch.randn(1, generator=generator, dtype=torch.float64)
        return known * (SPREAD * noise).exp()

    # -- recipes ------------------------------------------------------------------------------------------

    def recipe(self, level: Sequence[int], windows: Sequence[tuple[int, int]]) -> Recipe:
        """The recipe with these levels by layer (-1: exact) and windows in these heads (layer, kv_head), both counted
        among the layers that are compressed."""
        count, methods = self.specs[0].layers, []
        if windows:
            methods.append(find("duo")(**self._heads(windows)))
        if any(one >= 0 for one in level):
            methods.append(find(self.codec)(**self._bits(level, count)))
        return Recipe(tuple(methods))

    def _heads(self, windows: Sequence[tuple[int, int]]) -> dict[str, Any]:
        short = set(windows)
        whole = [
            [spec.layer, head]
            for index, spec in enumerate(self.specs)
            for head in range(spec.kv_heads)
            if (index, head) not in short
        ]
        return {"retrieval": whole, "sink": self.method.sink, "recent": self.method.recent}

    def _bits(self, level: Sequence[int], count: int) -> dict[str, Any]:
        bits, group = [16] * count, [32] * count
        for spec, one in zip(self.specs, level, strict=True):
            if one >= 0:
                bits[spec.layer], group[spec.layer] = self.levels[one].bits, self.levels[one].group
        used = {one for one, number in zip(group, bits, strict=True) if number != 16}
        shared = used.pop() if len(used) == 1 else group  # one number says it where all are the same
        return {"bits": bits, "group": shared, "residual": 0, **self.given}

    def written(self, choice: torch.Tensor) -> list[list[Any]]:
        """The methods of a choice, each its name and its parameters."""
        level, windows = _taken(choice, self.heads)
        bits = [self.codec, self._bits(level, self.specs[0].layers)]
        return [["duo", self._heads(windows)], bits] if windows else [bits]

    # -- sharing out --------------------------------------------------------------------------------------

    def _share(self, share: float, scale: torch.Tensor) -> torch.Tensor:
        """The choice of least cost within a budget, to the byte that a cache would report."""
        bits = self.sums["bits"] * scale[:, : len(self.levels)]
        windows = self.sums["windows"] * scale[:, len(self.levels) :]
        items, order = [], []
        for layer, heads in enumerate(self.heads):
            cheapest = windows[layer, :heads].argsort(stable=True).tolist()
            order.append(cheapest)
            options: list[Option] = []
            for level in (*range(len(self.levels)), -1):
                for short in range(heads + 1):
                    cost = 0.0 if level < 0 else float(bits[layer, level]) * (heads - short) / heads
                    cost += float(windows[layer, cheapest[:short]].sum())
                    options.append((self._layer_size(layer, level, short), cost))
            items.append(options)
        limit = int(share * self._equivalent())
        room = limit
        for _ in range(8):
            picks = share_out(items, room)
            if picks is None:
                break
            choice = torch.zeros(len(self.specs), 1 + max(self.heads), dtype=torch.int64)
            for layer, pick in enumerate(picks):
                level, short = divmod(pick, self.heads[layer] + 1)
                choice[layer, 0] = level if level < len(self.levels) else -1
                choice[layer, [1 + head for head in order[layer][:short]]] = 1
            takes = self.size(self.recipe(*_taken(choice, self.heads)))
            if takes <= limit:
                return choice
            room -= takes - limit  # tables that layers share, and what is free in common slabs
        smallest = sum(min(takes for takes, _ in options) for options in items)
        least = 1.02 * smallest / self._equivalent()
        raise RecipeError(
            f"budget(bytes={share!r}) is {limit:,} bytes at {self.method.context} tokens, and the least that layers "
            f"take is about {smallest:,}: use a share of at least {least:.2f}, or a longer context."
        )

    def _layer_size(self, layer: int, level: int, short: int) -> int:
        spec = self.specs[layer]
        kind = (level, short, spec.kv_heads, spec.head_dim, spec.dtype)
        if kind not in self._sizes:
            levels = [level] * len(self.specs)
            recipe = self.recipe(levels, [(i, head) for i, n in enumerate(self.heads) for head in range(min(short, n))])
            alone = [one for one in self.specs if (one.kv_heads, one.head_dim) == (spec.kv_heads, spec.head_dim)]
            self._sizes[kind] = self._reported(recipe, alone)[0] // len(alone)
        return self._sizes[kind]

    def _equivalent(self) -> int:
        """Bytes of the exact cache."""
        if not self.equivalent:
            self.equivalent = self._reported(Recipe(), self.specs)[1]
        return self.equivalent

    def size(self, recipe: Recipe) -> int:
        """Bytes of a cache of a recipe that has read `context` tokens, as it reports them."""
        return self._reported(recipe, self.specs)[0]

    def _reported(self, recipe: Recipe, specs: Sequence[LayerSpec]) -> tuple[int, int]:
        """Bytes of such a cache and of the exact one: the store at work on the meta device, as `fivefold plan` does."""
        nowhere = torch.device("meta")
        blank = []
        for one in specs:
            rope = None if one.rope is None else Rope(torch.ones(one.rope.pairs), one.head_dim)
            blank.append(replace(one, device=nowhere, rope=rope))
        session = build(recipe, blank, Pools())
        prompt: dict[int, torch.Tensor] = {
            one.layer: torch.empty(one.kv_heads, self.method.context, one.head_dim, dtype=one.dtype, device=nowhere)
            for one in blank
        }
        inputs = torch.empty(1, self.method.context, 1, dtype=specs[0].dtype, device=nowhere)
        nothing = torch.empty(0)
        feed(session, Prompt(nothing, nothing, prompt, prompt, dict.fromkeys(prompt, inputs), nothing))
        session.tidy()
        report = measure(session, str(recipe))
        return report.total, report.exact_equivalent

    # -- measuring ----------------------------------------------------------------------------------------

    def _cache(self, recipe: Recipe | str) -> Any:
        from fivefold.api import compress

        return compress(self.model, recipe)

    def _read(self, text: int) -> Prompt:
        """A text as the exact cache has it; the last one is kept."""
        if self._prompt is None or self._prompt[0] != text:
            self._prompt = None
            ids, tail = self.texts[text]
            tail = torch.cat([tail[:, :TAIL], tail[:, -TAIL:]], 1)
            cache = self._cache("full()")
            out = self.model(
                ids.to(self.model.device), past_key_values=cache, output_hidden_states=True, logits_to_keep=1
            )
            kv = {index: store.groups[0].dense() for index, store in cache.session.stores.items()}
            inputs = {index: out.hidden_states[index] for index in kv} if self.codec == "rotatekv" else {}
            keys, values = ({index: pair[which] for index, pair in kv.items()} for which in (0, 1))
            blocks: dict[int, Any] = {}
            with ExitStack() as stack:
                for index, block in self.blocks.items():
                    handle = block.register_forward_hook(lambda _, given, said, at=index: blocks.update({at: said}))
                    stack.callback(handle.remove)
                logs = self._said(cache.fork(), tail)
            self._prompt = text, Prompt(ids, tail, keys, values, inputs, logs, cache, blocks)
        return self._prompt[1]

    def _fed(self, recipe: Recipe, prompt: Prompt, first: int) -> Any:
        """A cache of the layers from `first` on that holds a prompt as the recipe says, though it was read exactly."""
        from fivefold.models.cache import FivefoldCache  # late, since it imports transformers

        base = prompt.cache.session
        ropes = {spec.layer: spec.rope for spec in self.specs}
        specs = [replace(store.spec, rope=ropes[index]) for index, store in base.stores.items() if index >= first]
        companions = None if base.companions is None else base.companions.fork()
        session = build(recipe, specs, Pools(), companions, base.sources, base.entry)
        feed(session, prompt)
        cache = FivefoldCache(recipe, session, prompt.cache.model, len(prompt.cache.layers))
        cache.of = prompt.cache.of
        return cache

    def _logs(self, recipe: str, ids: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
        """What the model says in the tail with a cache that has read the prompt itself."""
        cache = self._cache(recipe)
        self.model(ids.to(self.model.device), past_key_values=cache, logits_to_keep=1)
        return torch.cat([self._said(cache, part) for part in tail.split(CHUNK, 1)])

    def _said(self, cache: Any, tail: torch.Tensor) -> torch.Tensor:
        out = self.model(tail.to(self.model.device), past_key_values=cache)
        return out.logits[0].float().log_softmax(-1)

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        recipes = {}
        for i, share in enumerate(self.method.shares):
            loss, takes = self.sums[f"best.{i}"].tolist()
            written = self.written(self.sums[f"choice.{i}"])
            text = " + ".join(str(find(name)(**given)) for name, given in written)
            recipes[repr(share)] = {"methods": written, "recipe": text, "kl": loss, "bytes": int(takes)}
        settings = {
            "recipes": recipes,
            "context": self.method.context,
            "length": self.texts[0][0].shape[1],
            "exact_bytes": self._equivalent(),
            "dtype": str(self.specs[0].dtype).removeprefix("torch."),
            "layers": [spec.layer for spec in self.specs],
            "codec": self.codec,
            "levels": [[one.bits, one.group] for one in self.levels],
        }
        texts = len(self.texts)
        return settings, {name: (self.sums[name] / texts).float() for name in ("bits", "windows")}

    def close(self) -> None:
        from fivefold.api import restore

        restore(self.model)


def _taken(choice: torch.Tensor, heads: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Levels by layer, and the heads with windows, of a choice."""
    windows = [(layer, head) for layer, count in enumerate(heads) for head in range(count) if choice[layer, 1 + head]]
    return choice[:, 0].tolist(), windows


def _saying(out: Any) -> Callable[..., Any]:
    """A module's forward that always says the same."""
    return lambda *args, **kwargs: out


def lost(exact: torch.Tensor, logs: torch.Tensor) -> float:
    """Mean over tokens of what a recipe loses: see `kl`."""
    return float(kl(exact, logs).double().mean())


def feed(session: Session, prompt: Prompt) -> None:
    """Let an empty session hold a prompt that was read exactly, as if it had come in one chunk."""
    tokens = next(iter(prompt.keys.values())).shape[1]
    with session.atomic():
        session.admit(1, tokens, None, None)
        for index, store in session.stores.items():
            if not store.batch:
                store.start(1)
            keys, values = prompt.keys[index], prompt.values[index]
            for group in store.groups:
                rows = group.rows_tensor.to(keys.device)
                k, v = (keys, values) if len(rows) == len(keys) else (keys[rows], values[rows])
                if store.codec is not None:
                    offsets = session.offsets[group.rows // store.spec.kv_heads]
                    store.learn(group, offsets, lambda: (k, k, v, prompt.inputs[index]))  # noqa: B023
                store.append(group, k, v)
