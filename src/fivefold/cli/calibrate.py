"""`fivefold calibrate`: what a method must know about a model, learned from text and kept as a profile."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from fivefold.cli.app import DeviceOption, DtypeOption, ModelOption, SeedOption
from fivefold.cli.files import read_text
from fivefold.cli.generating import check_dtype
from fivefold.cli.models import fetch_if_missing, load_model
from fivefold.cli.terminal import err, out, stop_request, work_bar


def calibrate(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="RECIPE", help="Holds the method that learns from the model.")
    ],
    folder: Annotated[
        str, typer.Option("--out", "-o", metavar="DIR", help="Where the profile goes, and unfinished work until then.")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", "-t", metavar="FILE", help="UTF-8 text to read; repeat it for more. By default Python's own."
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", "-n", min=1, metavar="N", help="Tokens to read; 65536 if not given.")
    ] = None,
    model: ModelOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
) -> None:
    """Learn what a recipe's method must know about a model, and keep it as a profile.

    A run that is broken off goes on where it stopped.
    """
    check_dtype(dtype)
    with err.status("Preparing"):
        from fivefold.calibrate import run as work
        from fivefold.recipe import Recipe

        parsed = Recipe.parse(recipe)
        method = work.learning(parsed)
        texts = None if text is None else [read_text(file, "the text file") for file in text]
    fetch_if_missing(model)
    with err.status("Loading the model"):
        network, tokenizer = load_model(model, dtype, device)
    start = time.perf_counter()
    try:
        with stop_request() as stopped, work_bar() as progress:
            profile = work.calibrate(
                network, tokenizer, parsed, Path(folder), texts, tokens or work.TOKENS, seed, progress, stopped
            )
    except work.Stopped:
        err.print(f"What was learned is kept in {folder}: the same command goes on from there.", soft_wrap=True)
        raise KeyboardInterrupt from None
    made = profile.made["tokens"]
    if method.captures and made < (tokens or work.TOKENS):
        err.print(f"Note: the text has {made:,} tokens of the {tokens or work.TOKENS:,} that were asked for.")
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    out.print(
        f"{method.name} learned from {made:,} tokens in {time.perf_counter() - start:.0f} s; its profile "
        f"({size / 1e6:.2f} MB) is in",
        soft_wrap=True,
    )
    out.print(folder, soft_wrap=True)
    for share, found in profile.settings.get("recipes", {}).items():
        taken = found["bytes"] / profile.settings["exact_bytes"]
        out.print(f"\nbytes={share}: {taken:.3f} of the exact cache's, KL {found['kl']:.4f} nats, by the recipe")
        out.print(found["recipe"], soft_wrap=True, markup=False, highlight=False)
