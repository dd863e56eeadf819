"""`fivefold demo`: a few recipes side by side on this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.padding import Padding
from rich.text import Text

from fivefold.cli.app import DeviceOption, DtypeOption, JsonFileOption, ModelOption, RecipesOption, SeedOption
from fivefold.cli.files import writable, write_results
from fivefold.cli.generating import check_dtype
from fivefold.cli.models import fetch_if_missing, load_model
from fivefold.cli.terminal import err, out, progress_bars
from fivefold.tables import Facts, Table

_LEGEND = (
    "of exact, x: compared with the first row, transformers' exact cache, in this run (below 1: less memory, "
    "less time). KL: nats from the exact next-token distribution. top-1: how often the most likely token is "
    "the same."
)
_DOING = {"prefill": "reading the text", "decode": "continuing it", "answers": "answering"}


def demo(
    recipe: RecipesOption = None,
    context: Annotated[
        int | None,
        typer.Option("--context", "-c", min=1, metavar="N", help="Tokens to read; 4096 if not given."),
    ] = None,
    json_file: JsonFileOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Compare recipes on one machine: memory, speed, fidelity, and facts found in a long text."""
    check_dtype(dtype)
    target = None if json_file is None else writable(json_file)
    with err.status("Preparing"):
        from fivefold.evaluate import demo as work
        from fivefold.models import embedded
        from fivefold.recipe import Recipe

        texts = list(recipe or work.DEFAULT_RECIPES)
        parsed = [Recipe.parse(text) for text in texts]
    fetch_if_missing(model)
    with err.status("Loading the model"):
        network, tokenizer = load_model(model, dtype, device)
        from fivefold.models.huggingface import make_cache

        for one in parsed:  # what does not fit the model is known before the long work
            make_cache(network, one)
    finished: list[dict[str, Any]] = []
    try:
        with _bars(finished, len(texts) + 1) as progress:
            result = work.run(
                network,
                tokenizer,
                texts,
                context=work.DEFAULT_CONTEXT if context is None else context,
                seed=seed,
                progress=progress,
                on_run=finished.append,
            )
    except KeyboardInterrupt:
        if finished:
            out.print(_table(finished), crop=False)
        raise
    result["model"] = model or embedded.MODEL_NAME
    rows = [result["baseline"], *result["runs"]]
    out.print(
        f"{result['model']} in {result['dtype']}, {result['context_tokens']:,} tokens of Python's language "
        f"reference with {len(result['questions'])} facts planted in it\n"
    )
    out.print(_table(rows), crop=False)
    out.print()
    out.print(_decoding(rows), crop=False)
    out.print(Padding(Text(_LEGEND, style="dim"), (1, 0, 0, 0)))
    out.print(_facts(result["questions"], rows), crop=False)
    write_results(target, json_file, result)


@contextlib.contextmanager
def _bars(finished: list[dict[str, Any]], total: int) -> Iterator[Callable[[str, str, int, int], None]]:
    """Shows the rows so far and a bar below them, on a terminal; yields the progress callback."""
    bars = progress_bars()
    bar = bars.add_task("Starting", total=None, amount="")

    def progress(recipe: str, stage: str, done: int, of: int) -> None:
        bars.update(
            bar,
            description=f"{recipe}: {_DOING.get(stage, stage)}",
            completed=done,
            total=None if stage == "prefill" else of,  # prefill is one forward: nothing to count
            amount=f"{len(finished) + 1} of {total}",
        )

    def show() -> Group:
        return Group(_table(finished), bars)

    if not err.is_terminal:
        yield progress
        return
    # Slow enough not to disturb the measured times.
    with Live(get_renderable=show, console=err, transient=True, refresh_per_second=4):
        yield progress


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table(
        "recipe", ">cache MiB", ">of exact", ">prefill s", ">x", ">decode ms", ">x", ">KL", ">top-1", ">facts right"
    )
    for run in runs:
        first = runs[0]
        table.add_row(
            Text(run["recipe"], "bold"),
            f"{run['cache_bytes'] / 2**20:.1f}",
            f"{run['ratio']:.3f}",
            f"{run['prefill_s']:.2f}",
            f"{run['prefill_s'] / first['prefill_s']:.2f}",
            f"{run['decode_ms_per_token']:.1f}",
            f"{run['decode_ms_per_token'] / first['decode_ms_per_token']:.2f}",
            # Rounding leaves -0.0, and this does not.
            f"{round(run['kl'], 4) + 0.0:.4f}",
            f"{run['agreement']:.0%}",
            f"{run['answers_right']}/{len(run['answers'])}",
        )
    return table


def _decoding(runs: list[dict[str, Any]]) -> Facts:
    """Which way each recipe's decoding steps went."""
    table = Facts()
    for run in runs:
        if run["decoding"]:
            table.add_row(Text(run["recipe"]), Text(run["decoding"]))
    return table


def _facts(questions: list[dict[str, str]], runs: list[dict[str, Any]]) -> Group:
    """Each question with the planted fact, and every recipe's answer below it."""
    parts: list[Any] = []
    for number, question in enumerate(questions):
        asked = question["question"].splitlines()[0]
        parts.append(Text.assemble(("\n" + asked, "bold"), f"  planted: {question['answer']}"))
        table = Table("", "recipe", "answer", headings=False)
        for run in runs:
            right = run["right"][number]
            mark = Text("  right", style="green") if right else Text("  wrong", style="bold red")
            table.add_row(mark, Text(run["recipe"]), Text(run["answers"][number] or "(nothing)"))
        parts.append(table)
    return Group(*parts)
