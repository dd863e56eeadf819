"""`fivefold bench`: attention kernels, decoding steps, prompts and capacity, timed on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fivefold.cli.app import JsonFileOption, RecipesOption
from fivefold.cli.files import writable, write_json, write_results
from fivefold.cli.models import silence
from fivefold.cli.terminal import out, progress_bars
from fivefold.errors import InputError
from fivefold.sizes import parse_bytes
from fivefold.tables import Facts, Table

if TYPE_CHECKING:
    import torch

bench = typer.Typer(help="Time attention kernels, prompts and decoding steps on this machine.", no_args_is_help=True)

SizeOption = Annotated[
    list[str] | None,
    typer.Option("--size", "-s", metavar="CONTEXT[xBATCH]", help="Tokens, and sequences; repeat it for more."),
]
ShapeOption = Annotated[
    str | None,
    typer.Option("--shape", metavar="SHAPE", help="llama-3-8b, llama-3.2-1b, small; default: what fits here."),
]


@bench.command(name="kernels")
def bench_kernels(size: SizeOption = None, recipe: RecipesOption = None, json_file: JsonFileOption = None) -> None:
    """One step's attention of one layer (8 kv heads x 4, head_dim 128) against SDPA in bf16, in the same run."""
    from fivefold.benchmark import kernels, machine

    device = machine.device()
    sizes = _sizes(size) or kernels.SIZES[device.type]
    target = None if json_file is None else writable(json_file)
    recipes = _recipes_of_one_head_kind(recipe or list(kernels.RECIPES))
    copy = machine.copy_rate(device)
    rows = _measured(sizes, None, lambda context, batch: kernels.measure(device, context, batch, recipes))
    for row in rows:
        row["of_copy"] = row["rate"] / copy
    cells = [
        [
            f"{row['context']:,}", str(row["batch"]), row["kernel"], row["path"], f"{row['ms']:.4f}",
            f"{row['gain']:.2f}" if row["gain"] else "", f"{row['bytes'] / 2**20:,.1f}",
            f"{row['rate'] / 1e12:.3f}", f"{row['of_copy']:.0%}",
        ]
        for row in rows
    ]  # fmt: skip
    title = f"{machine.name()}, copy {copy / 1e12:.2f} TB/s"
    _print_table(title, "context, batch, kernel, path", "ms, x SDPA, MiB, TB/s, of copy", cells)
    write_results(target, json_file, {**machine.stamp(), "copy_rate": copy, "rows": rows})


@bench.command(name="decode")
def bench_decode(
    size: SizeOption = None,
    recipe: RecipesOption = None,
    shape: ShapeOption = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps to time.")] = 40,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Other caches too: StaticCache compiled, QuantizedCache (HQQ, quanto), kvpress."),
    ] = False,
    json_file: JsonFileOption = None,
) -> None:
    """Whole decoding steps of a model of random weights against transformers' DynamicCache."""
    from fivefold.benchmark import decode, machine
    from fivefold.benchmark.peers import PEERS
    from fivefold.recipe import Recipe

    device = machine.device()
    shape = _shape(shape, device)
    sizes = _sizes(size) or (((8192, 1), (32768, 1), (131072, 1)) if device.type == "cuda" else ((4096, 1),))
    target = None if json_file is None else writable(json_file)
    recipes = [str(Recipe.parse(text)) for text in recipe or decode.RECIPES]
    others = PEERS if peers else ()
    silence()
    rows = _measured(
        sizes,
        len(decode.names(device, recipes)) + len(others),
        lambda context, batch: decode.measure(shape, device, context, batch, recipes, steps, others),
        lambda rows: None if target is None else write_json(target, {**machine.stamp(), "rows": rows}),
    )
    lines = []
    for row in rows:
        cells = [f"{row['context']:,}", str(row["batch"]), row["recipe"], "yes" if row["graph"] else ""]
        if peers:
            cells.insert(3, row["version"])
        if "error" in row:
            cells.append(row["error"])
        else:
            gain = f"{row['gain']:.2f}" if row["gain"] else ""
            cells += [f"{row['ms']:.2f}", f"{row['mean_ms']:.2f}", gain]
            cells += [f"{row['tokens_s']:.1f}", f"{row['cache_bytes'] / 2**20:,.1f}"]
        lines.append(cells)
    # Where a group is packed every 32nd step, the mean has it and the median does not.
    title = f"{shape} on {machine.name()}: medians and means of {steps} steps, after {decode.WARM_UP} or more"
    words = "context, batch, cache, version, graph" if peers else "context, batch, cache, graph"
    _print_table(title, words, "ms/step, mean, x DynamicCache, tokens/s, cache MiB", lines)
    ways = Facts()
    for name, way in dict.fromkeys((row["recipe"], row["decoding"]) for row in rows if row.get("decoding")):
        ways.add_row(Text(name), Text(way))
    out.print(ways, crop=False)
    write_results(target, json_file, {**machine.stamp(), "rows": rows})


@bench.command(name="prefill")
def bench_prefill(
    size: SizeOption = None,
    recipe: RecipesOption = None,
    shape: ShapeOption = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens fed at a time; the whole prompt if not given.")
    ] = None,
    json_file: JsonFileOption = None,
) -> None:
    """Reading a prompt with a model of random weights against transformers' DynamicCache."""
    from fivefold.benchmark import machine, prefill
    from fivefold.recipe import Recipe

    device = machine.device()
    shape = _shape(shape, device)
    sizes = _sizes(size) or (((32768, 1),) if device.type == "cuda" else ((4096, 1),))
    target = None if json_file is None else writable(json_file)
    recipes = [str(Recipe.parse(text)) for text in recipe or prefill.RECIPES]
    silence()
    rows = _measured(
        sizes,
        1 + len(recipes),
        lambda context, batch: prefill.measure(shape, device, context, batch, recipes, chunk),
    )
    lines = []
    for row in rows:
        cells = [f"{row['context']:,}", str(row["batch"]), row["recipe"]]
        if "error" in row:
            cells.append(row["error"])
        else:
            peak = f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else ""
            cells += [f"{row['seconds']:.2f}", f"{row['times']:.2f}" if row["times"] else ""]
            cells += [f"{row['cache_bytes'] / 2**20:,.1f}", peak]
        lines.append(cells)
    title = f"{shape} on {machine.name()}"
    _print_table(title, "context, batch, cache", "seconds, x DynamicCache, cache MiB, peak MiB", lines)
    write_results(target, json_file, {**machine.stamp(), "rows": rows})


@bench.command(name="capacity")
def bench_capacity(
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each sequence of the batch.")] = 32768,
    recipe: RecipesOption = None,
    most: Annotated[str, typer.Option(metavar="WHAT", help="batch, context, or both.")] = "both",
    goal: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Fill the last recipe with so many tokens and no more.")
    ] = None,
    shape: ShapeOption = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a cache may take, as 512M or 2G; by default all of a GPU.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps to time.")] = 20,
    json_file: JsonFileOption = None,
) -> None:
    """The largest batch and the longest context that really fit and decode, against transformers' DynamicCache."""
    import torch

    from fivefold.benchmark import capacity, decode, machine
    from fivefold.recipe import Recipe

    device = machine.device()
    shape = _shape(shape, device)
    room = parse_bytes(memory, "--memory")
    if most not in ("batch", "context", "both"):
        raise InputError(f"--most {most!r} is none of batch, context, both.")
    if device.type != "cuda":
        context = min(context, 2048)
    if goal is None and not recipe:
        goal = capacity.GOAL if device.type == "cuda" else 1 << 16
    target = None if json_file is None else writable(json_file)
    batches = [Recipe.parse(text) for text in recipe or capacity.BATCHES] if most != "context" else []
    longest = [Recipe.parse(text) for text in recipe or capacity.CONTEXTS] if most != "batch" else []
    rows: list[dict[str, Any]] = []
    head = {**machine.stamp(), "shape": shape}
    silence()
    with progress_bars() as bars:
        task = bars.add_task("model", total=len(batches) + len(longest) + 2, amount="")
        model = decode.build(shape, device)

        def record(what: str, name: str, measure: Callable[..., dict[str, Any]], *args: Any) -> None:
            bars.update(task, description=f"{what}: {name[:30]}")
            try:
                row = {"what": what, "recipe": name, **measure(model, *args)}
            except torch.OutOfMemoryError as error:
                row = {"what": what, "recipe": name, "error": str(error).split(". ")[0]}
            rows.append(row)
            if target is not None:  # what was measured is kept if the rest is broken off
                write_json(target, {**head, "rows": rows})
            bars.advance(task)

        if batches:
            record("batch", decode.BASELINE, capacity.largest_batch, None, context, steps, room)
        for one in batches:
            record("batch", str(one), capacity.largest_batch, one, context, steps, room)
        if longest:
            record("context", decode.BASELINE, capacity.longest_dynamic, steps, room)
        for one in longest:
            record(
                "context", str(one), capacity.longest_context, one, steps, goal if one is longest[-1] else None, room
            )
    lines = []
    for row in rows:
        first = next(other for other in rows if other["what"] == row["what"])
        if "error" in row:
            lines.append([row["what"], row["recipe"], row["error"]])
            continue
        measure = "tokens_s" if row["what"] == "batch" else "context"
        row["gain"] = row[measure] / first[measure] if first.get(measure) else None
        cells = [row["what"], row["recipe"], str(row["batch"]), f"{row['context']:,}"]
        cells += [f"{row['cache_bytes'] / 2**30:,.3f}", f"{row['ms']:.2f}", f"{row['tokens_s']:,.1f}"]
        lines.append([*cells, f"{row['gain']:.2f}" if row["gain"] else ""])
    title = f"{shape} on {machine.name()}"
    _print_table(title, "most, cache", "sequences, context, cache GiB, ms/step, tokens/s, x DynamicCache", lines)
    write_results(target, json_file, {**head, "rows": rows})


def _sizes(texts: list[str] | None) -> list[tuple[int, int]]:
    """CONTEXT or CONTEXTxBATCH, each at least 1. Raises `InputError`."""
    sizes = []
    for text in texts or []:
        match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,5}))?", text.strip())
        context, batch = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
        if not context or not batch:
            raise InputError(f"--size {text!r} is no size: write tokens, or tokens x sequences, as in 32768x4.")
        sizes.append((context, batch))
    return sizes


def _recipes_of_one_head_kind(texts: list[str]) -> list[str]:
    """Recipes that treat all heads of a layer alike, which a single layer stands for. Raises `InputError`."""
    from fivefold.recipe import Recipe

    for text in texts:
        if Recipe.parse(text).get("heads"):
            raise InputError(
                f"{text!r} treats heads differently, and `bench kernels` times one layer: use bench decode."
            )
    return [str(Recipe.parse(text)) for text in texts]


def _shape(name: str | None, device: torch.device) -> str:
    from fivefold.benchmark import decode

    name = name or ("llama-3-8b" if device.type == "cuda" else "small")
    if name not in decode.SHAPES:
        raise InputError(f"--shape {name!r} is none of {', '.join(decode.SHAPES)}.")
    return name


def _measured(
    sizes: Sequence[tuple[int, int]],
    each: int | None,
    measure: Callable[[int, int], Iterable[dict[str, Any]]],
    keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """The rows of `measure(context, batch)` for all sizes, `each` of them a size if that is known, under a bar. keep:
    is shown those so far, in case the rest is broken off."""
    rows = []
    with progress_bars() as bars:
        task = bars.add_task("", total=each and each * len(sizes), amount="")
        for context, batch in sizes:
            bars.update(task, description=f"{context} x {batch}")
            for row in measure(context, batch):
                rows.append(row)
                keep(rows)
                bars.advance(task)
    return rows


def _print_table(title: str, words: str, numbers: str, rows: list[list[str]]) -> None:
    """Print rows under headings, those of `words` and, to the right, of `numbers`."""
    table = Table(*words.split(", "), *(f">{name}" for name in numbers.split(", ")), title=title)
    for row in rows:
        table.add_row(*row)
    out.print(table, crop=False)
