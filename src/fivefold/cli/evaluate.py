"""`fivefold eval` and `fivefold sweep`: where recipes break, and which no other one beats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from fivefold.cli.app import DeviceOption, DtypeOption, JsonFileOption, ModelOption, RecipesOption, SeedOption
from fivefold.cli.files import writable, write, write_results
from fivefold.cli.generating import check_dtype
from fivefold.cli.models import fetch_if_missing, load_model
from fivefold.cli.terminal import err, out, work_bar
from fivefold.errors import FivefoldError, InputError

SuiteOption = Annotated[
    str | None,
    typer.Option(
        "--suite", "-s", metavar="S,...", help="Suites (--list), ruler, or jsonl:FILE; all but those two if not given."
    ),
]
ContextOption = Annotated[
    str, typer.Option("--context", "-c", metavar="N,...", help="Tokens before the question, or a list of such.")
]
SamplesOption = Annotated[
    int, typer.Option("--samples", "-k", min=1, metavar="K", help="Texts per suite and context; a file is used whole.")
]
HtmlOption = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Also write a report to look at, one file for offline use.")
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="FILE", help="Where finished work is kept; in the user's cache if not given."),
]
RulerDataOption = Annotated[
    str | None,
    typer.Option(
        "--ruler-data", metavar="DIR", help="RULER's own essays, SQuAD and HotpotQA: its scripts/data/synthetic/json."
    ),
]
LensOption = Annotated[bool, typer.Option("--lens", help="Fidelity also compares what each layer says (logit lens).")]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch", min=1, metavar="N",
        help="Texts measured together: what fits on a GPU, 1 on a CPU if not given. Results are the same.",
    ),
]  # fmt: skip
AllOption = Annotated[
    bool, typer.Option("--all", help="Run recipes even on tasks that the exact cache does no better than chance.")
]


def evaluate(
    recipe: RecipesOption = None,
    suite: SuiteOption = None,
    context: ContextOption = "2048",
    samples: SamplesOption = 3,
    json_file: JsonFileOption = None,
    html_file: HtmlOption = None,
    store: StoreOption = None,
    list_suites: Annotated[bool, typer.Option("--list", help="Explain every suite in a line.")] = False,
    lens: LensOption = False,
    everything: AllOption = False,
    ruler_data: RulerDataOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    batch: BatchOption = None,
) -> None:
    """Find out where recipes break: fidelity on real text and stress tasks, against the exact cache.

    Finished work is kept: a run that was broken off goes on where it stopped.
    """
    if list_suites:
        from fivefold.evaluate import engine, jsonl, ruler

        for name, line in {**engine.suite_lines(), f"{jsonl.PREFIX}FILE": jsonl.LINE, **ruler.lines()}.items():
            out.print(Text.assemble((f"{name:<14} ", "bold"), line))
        return
    _measure(
        recipe, suite, context, samples, seed, (model, dtype, device), json_file, html_file, store, lens, everything,
        ruler_data, batch,
    )  # fmt: skip


def sweep(
    recipe: Annotated[
        list[str],
        typer.Option(
            "--recipe", "-r", metavar="RECIPES", help="With braces: 'kivi(bits={2,4,8})' are three; repeat it for more."
        ),
    ],
    suite: SuiteOption = None,
    context: ContextOption = "2048",
    samples: SamplesOption = 3,
    json_file: JsonFileOption = None,
    html_file: HtmlOption = None,
    store: StoreOption = None,
    lens: LensOption = False,
    everything: AllOption = False,
    ruler_data: RulerDataOption = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    batch: BatchOption = None,
) -> None:
    """Measure many recipes like eval does, and find those that no other one beats in bytes or in time."""
    _measure(
        recipe, suite, context, samples, seed, (model, dtype, device), json_file, html_file, store, lens, everything,
        ruler_data, batch, True,
    )  # fmt: skip


def _measure(
    recipe: list[str] | None,
    suite: str | None,
    context: str,
    samples: int,
    seed: int,
    loaded: tuple[str | None, str, str],
    json_file: str | None,
    html_file: str | None,
    store: str | None,
    lens: bool,
    everything: bool,
    ruler_data: str | None,
    batch: int | None,
    braces: bool = False,
) -> None:
    """What eval and sweep have in common: plan, run, show, write. loaded: the model, its dtype and device."""
    model, dtype, device = loaded
    check_dtype(dtype)
    targets = {name: writable(name) for name in (json_file, html_file) if name is not None}
    with err.status("Preparing"):
        from fivefold.evaluate import engine, html, tables
        from fivefold.evaluate.sweep import recipes as spelled
        from fivefold.models import embedded
        from fivefold.paths import cache_dir
        from fivefold.recipe import Recipe

        if html_file is not None:
            html.check()
        plan = engine.Plan(
            recipes=spelled(recipe or engine.DEFAULT_RECIPES, braces),
            suites=tuple(engine.suite_lines()) if suite is None else _names(suite),
            contexts=_numbers(context),
            samples=samples,
            seed=seed,
            lens=lens,
            everything=everything,
            ruler_data=ruler_data,
        )
    fetch_if_missing(model)
    with err.status("Loading the model"):
        network, tokenizer = load_model(model, dtype, device)
        from fivefold.models.huggingface import make_cache

        fitting = []
        for text in plan.recipes:  # what does not fit the model is known before the long work
            try:
                make_cache(network, Recipe.parse(text))
            except FivefoldError as error:
                if recipe:
                    raise
                err.print(f"Note: {text} is left out: {error}", soft_wrap=True)
            else:
                fitting.append(text)
        plan = dataclasses.replace(plan, recipes=tuple(fitting))
    kept = Path(store) if store is not None else cache_dir() / "eval.jsonl"
    try:
        with work_bar() as progress:
            result = engine.run(network, tokenizer, plan, kept, progress, batch)
    except KeyboardInterrupt:
        err.print(f"Finished work is kept in {kept}: the same command goes on from there.", soft_wrap=True)
        raise
    result["environment"]["model"] = model or embedded.MODEL_NAME
    for part in tables.show(result):
        out.print(part, crop=False)
    if json_file is not None:
        write_results(targets[json_file], json_file, result, allow_nan=False)
    if html_file is not None:
        write(targets[html_file], html.render(result))
        err.print(f"\nThe report is in {html_file}.", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--context {text!r} is no list of token counts: write for example 1024,2048.") from None
