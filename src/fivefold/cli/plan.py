"""`fivefold plan`: what fits on a GPU, how fast, and at what quality, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fivefold.cli.app import JsonFileOption
from fivefold.cli.files import writable, write, write_results
from fivefold.cli.terminal import err, out, progress_bars, work_bar
from fivefold.errors import InputError
from fivefold.tables import Table

if TYPE_CHECKING:
    from fivefold.plan.advise import Asked, Row
    from fivefold.plan.quality import Quality
    from fivefold.plan.room import Place
    from fivefold.recipe import Recipe

_MODEL = (
    "name", "family", "parameters", "weight_bytes", "dtype", "context", "measured", "counted", "why_not",
)  # fmt: skip
PROBE = 1024, 2
"""Tokens of a text that --probe reads, and texts."""


def plan(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="A folder, a config.json, a hub name, or a known shape such as llama-3-8b."
        ),
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help="h100, a100, rtx 4090, ...; auto is the one here.")] = "auto",
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="GPUs that share the weights and heads.")] = 1,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe", "-r", metavar="RECIPE", help="One to plan with (braces are several); repeat it for more."
        ),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", "-c", min=1, max=1 << 22, metavar="N", help="Tokens of each user.")
    ] = 32768,
    users: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Users at a time; as many as fit if not given.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; the model's own if not given."),
    ] = None,
    sliding: Annotated[bool, typer.Option("--sliding", help="Compress layers with a sliding window too.")] = False,
    chunk: Annotated[int, typer.Option(min=1, metavar="N", help="A prompt is read so many tokens at a time.")] = 2048,
    target: Annotated[
        str | None,
        typer.Option(metavar="T", help="'ms=20,tokens_s=500,users=8,first_s=2,kl=0.1': any of these."),
    ] = None,
    quality: Annotated[
        str | None, typer.Option(metavar="FILE", help="What recipes cost, from fivefold eval or sweep --json.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Measure what they cost: loads the model, takes minutes.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show the equations with the numbers put in.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the constants of the GPU here, and keep them for auto.")
    ] = False,
    json_file: JsonFileOption = None,
    html_file: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", help="Also write a page to look at, one file for offline use."),
    ] = None,
) -> None:
    """Plan before anything is loaded: users, contexts, tokens a second and quality of recipes on a GPU.

    Only the model's configuration is read. Without --recipe a grid of them is compared.
    """
    targets = {name: writable(name) for name in (json_file, html_file) if name is not None}
    if measure:
        _measure()
        if model is None:
            return
    if model is None:
        raise InputError("no model is given: name one, for example fivefold plan llama-3-8b --gpu h100.")
    from fivefold.plan import advise, room
    from fivefold.plan.machine import find_machine, here
    from fivefold.plan.read import read_model
    from fivefold.plan.target import Target

    if html_file is not None:
        from fivefold.plan import html

        html.check()
    shape = read_model(model)
    machine = here() if gpu == "auto" else find_machine(gpu)
    asked_target = None if target is None else Target.parse(target)
    if asked_target is not None and asked_target.users is not None and users is None:
        users = math.ceil(asked_target.users)
    place = room.Place(shape, machine, gpus, room.dtype_of(shape, dtype), sliding, chunk)
    asked = advise.Asked(context, users, asked_target, curves=json_file is not None or html_file is not None)
    recipes = _recipes(recipe, place)
    if shape.context is not None and context > shape.context:
        err.print(f"Note: {model} is made for {shape.context:,} tokens; {context:,} are planned all the same.")
    known = _known(model, recipes, quality, probe, context)
    rows = _planned(recipes, place, asked, known, recipe is None)
    chosen, said = advise.advice(rows, place, asked)
    _show(rows, place, asked, chosen, said, known is not None)
    lines = None if chosen is None else advise.run_lines(chosen, place, asked, model)
    if lines is not None:
        for name in ("python", "generate", "vllm"):
            if lines[name] is not None:
                out.print(Text(f"\n{lines[name]}", "dim"), soft_wrap=True)
    if explain:
        _explain(rows)
    result = _result(rows, place, asked, chosen, said, lines)
    if json_file is not None:
        write_results(targets[json_file], json_file, result, allow_nan=False)
    if html_file is not None:
        from fivefold.plan import html

        write(targets[html_file], html.render(result))
        err.print(f"\nThe page is in {html_file}.", soft_wrap=True)


def _measure() -> None:
    import torch

    from fivefold.plan import measure as measuring

    if not torch.cuda.is_available():
        raise InputError("--measure finds no GPU here: run it where there is one, or name a GPU with --gpu.")
    try:
        with work_bar() as progress:
            machine, raw = measuring.measure(progress=lambda what: progress(0, 0, what))
    except torch.OutOfMemoryError:
        raise InputError(
            "--measure ran out of memory, of which it needs some 24 GB: name the GPU nearest to yours with --gpu."
        ) from None
    path = measuring.save(machine, raw)
    err.print(f"The constants of {machine.name} are in {path}: --gpu auto uses them.", soft_wrap=True)


def _recipes(given: list[str] | None, place: Place) -> list[Recipe]:
    from fivefold.evaluate.sweep import recipes as spelled
    from fivefold.plan.advise import GRID
    from fivefold.plan.memory import specs_of
    from fivefold.recipe import Recipe

    recipes = [Recipe.parse(text) for text in spelled(given or GRID, braces=True)]
    why, remedy = place.shape.why_not, "leave --recipe out"
    if why is None and not specs_of(place.shape, place.dtype, place.sliding):
        why, remedy = "no layer of it has a cache that grows", "give --sliding to compress what windows hold"
    if why is None:
        return recipes
    if any(one.methods for one in recipes) and given:
        raise InputError(f"{place.shape.name} can be planned with full() alone: {why}; {remedy}.")
    err.print(f"Note: only the exact cache is planned: {why}.", soft_wrap=True)
    return [Recipe()]


def _planned(
    recipes: Sequence[Recipe], place: Place, asked: Asked, known: dict[Recipe, Quality] | None, skip: bool
) -> list[Row]:
    from fivefold.plan import advise

    with progress_bars() as bars:
        task = bars.add_task("Planning", total=len(recipes), amount="")

        def each() -> Any:
            for recipe in recipes:
                yield recipe
                bars.advance(task)

        return advise.rows(each(), place, asked, known, skip, lambda line: err.print(f"Note: {line}", soft_wrap=True))


def _known(
    model: str, recipes: Sequence[Recipe], quality: str | None, probe: bool, context: int
) -> dict[Recipe, Quality] | None:
    """What recipes are known to cost; None if nobody knows."""
    from fivefold.plan import quality as qualities

    if quality is not None:
        found, about = qualities.read(quality, context)
        if about and Path(about).name.lower() != Path(model).name.lower():
            err.print(f"Note: {quality} is about {about}, and this plan about {model}.", soft_wrap=True)
        return found
    return _probed(model, recipes) if probe else None


def _probed(model: str, recipes: Sequence[Recipe]) -> dict[Recipe, Quality]:
    """Fidelity of the recipes on a text of ours, as `fivefold eval` measures and keeps it."""
    from fivefold.cli.models import load_model
    from fivefold.errors import FivefoldError
    from fivefold.evaluate import engine
    from fivefold.models import embedded
    from fivefold.models.huggingface import make_cache
    from fivefold.paths import cache_dir
    from fivefold.plan import quality as qualities

    own = model.lower() in (embedded.MODEL_NAME.lower(), "smollm2-135m")
    with err.status("Loading the model"):
        network, tokenizer = load_model(None if own else model, "auto", "auto")
        fitting = []
        for one in recipes:
            try:
                make_cache(network, one)
            except FivefoldError:
                continue
            fitting.append(str(one))
    tokens, samples = PROBE
    work = engine.Plan(recipes=tuple(fitting), suites=("fidelity",), contexts=(tokens,), samples=samples)
    with work_bar() as progress:
        result = engine.run(network, tokenizer, work, cache_dir() / "eval.jsonl", progress)
    return qualities.of_result(result, f"--probe, {samples} texts of {tokens:,} tokens", tokens)


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.2f}"


def _number(value: float | None, form: str = ",.3g") -> str:
    return "" if value is None else format(value, form)


def _show(rows: Sequence[Row], place: Place, asked: Asked, chosen: Row | None, said: str, known: bool) -> None:
    shape, machine = place.shape, place.machine
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(shape.kinds.items()))
    rough = "" if shape.counted else ", and only roughly: not all of its weights and states are known"
    size = f"{shape.parameters / 1e9:.3g}B parameters" + ("" if shape.measured else ", by its configuration") + rough
    over = f"{place.gpus} x {machine.name}" if place.gpus > 1 else machine.name
    out.print(Text.assemble((shape.name, "bold"), f": {len(shape.layers)} layers ({kinds}), {size}"), soft_wrap=True)
    out.print(
        f"{over}: {_gib(machine.usable)} GiB usable, {_gib(place.weights)} weights, {_gib(place.working)} working "
        f"memory, {_gib(max(0, place.room))} left for caches{' on each' if place.gpus > 1 else ''}",
        soft_wrap=True,
    )
    if not machine.measured:
        out.print(f"Times are from {machine.source} ({machine.date}).", soft_wrap=True)
    wanted = asked.users or 1
    table = Table(
        "recipe", ">GiB a user", ">of exact", ">users", ">longest", ">ms/step", ">ms, all", ">tokens/s", ">first s",
        ">swap ms", *(["KL", "front"] if known else []),
        title=f"{asked.context:,} tokens a user, {wanted} user{'s' if wanted > 1 else ''}",
    )  # fmt: skip
    for row in rows:
        crowded = None if row.crowded is None else 1000 * row.crowded.seconds
        cells = [
            str(row.recipe), _gib(row.nbytes), f"{row.ratio:.3f}", f"{row.users:,}", f"{row.longest:,}",
            _number(None if row.step is None else 1000 * row.step.seconds), _number(crowded),
            _number(row.tokens_s, ",.0f"), _number(None if row.first is None else row.first.seconds),
            _number(1000 * row.switch.seconds),
        ]  # fmt: skip
        if known:
            kl = row.quality
            interval = "" if kl is None or kl.low is None or kl.high is None else f" ({kl.low:.3g} to {kl.high:.3g})"
            cells += ["unknown" if kl is None else f"{kl.kl:.3g}{interval}", "yes" if row.on_front else ""]
        table.add_row(*(Text(cell, "bold" if row is chosen else "") for cell in cells))
    out.print(table, crop=False)
    notes: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            notes.setdefault(note, []).append(str(row.recipe))
    for note, recipes in notes.items():
        out.print(Text(f"{', '.join(recipes)}: {note}", "dim"), soft_wrap=True)
    out.print()
    out.print(Text(said, "bold"), soft_wrap=True)


def _explain(rows: Sequence[Row]) -> None:
    for row in rows:
        for name, estimate in (("a step", row.step), ("the first token", row.first), ("a switch", row.switch)):
            if estimate is not None:
                out.print(Text.assemble("\n", (f"{row.recipe}, {name}", "bold")), soft_wrap=True)
                out.print(estimate.explain(), soft_wrap=True, highlight=False)


def _result(
    rows: Sequence[Row], place: Place, asked: Asked, chosen: Row | None, said: str, lines: dict[str, str | None] | None
) -> dict[str, Any]:
    """All of it, for --json and --html."""
    shape, machine = place.shape, place.machine
    return {
        "model": {
            **{name: getattr(shape, name) for name in _MODEL},
            "layers": dict(shape.kinds),
        },
        "machine": machine.as_dict(),
        "gpus": place.gpus,
        "replicas": 1,
        "context": asked.context,
        "users": asked.users,
        "target": None if asked.target is None else asked.target.as_dict(),
        "memory": {
            "usable": machine.usable,
            "weights": place.weights,
            "working": place.working,
            "share": place.share,
        },
        "rows": [row.as_dict() for row in rows],
        "chosen": None if chosen is None else str(chosen.recipe),
        "said": said,
        "run": lines or {"python": None, "generate": None, "vllm": None},
        "settings": {"dtype": str(place.dtype).removeprefix("torch."), "sliding": place.sliding, "chunk": place.chunk},
    }
