"""The app: how it starts, how an error and Ctrl-C end every command, and the options that commands share."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from rich.text import Text
from typer.core import TyperGroup

import fivefold
from fivefold.cli.terminal import err, out
from fivefold.errors import FivefoldError

INTERRUPTED = 130

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="A folder or a hub name; the embedded model if not given."),
]
SeedOption = Annotated[int, typer.Option(min=0, metavar="S", help="A number that everything random depends on.")]
RecipesOption = Annotated[
    list[str] | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="One to measure; repeat it for more.")
]
JsonFileOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Also write all results into this file.")
]
MaxBytesOption = Annotated[
    str | None, typer.Option(metavar="SIZE", help="A hard cap on the cache: bytes, or 512M, 2G (MiB, GiB).")
]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16; auto is what the model is stored in."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
]
TemperatureOption = Annotated[
    float, typer.Option(min=0, metavar="T", help="0 takes the most likely token, 1 samples as it is.")
]
ChunkOption = Annotated[int, typer.Option(min=1, metavar="N", help="Read a prompt so many tokens at a time.")]
PrintJsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _Commands(TyperGroup):
    """All commands, with what they have in common: how an error and Ctrl-C end them."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        warnings.simplefilter("ignore")
        try:
            return super().invoke(ctx)
        except FivefoldError as error:
            sentence = str(error)
        except KeyboardInterrupt:
            err.print("Interrupted.")
            raise typer.Exit(INTERRUPTED) from None
        except RuntimeError as error:
            # torch has a type for it on a GPU, and only a text on a CPU.
            if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
                raise
            sentence = "the device ran out of memory: use a smaller recipe or --chunk, or cap it with --max-bytes."
        # One line whatever the error quotes: no line breaks, no terminal codes.
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in sentence)
        err.print(Text.assemble(("Error: ", "bold red"), line), soft_wrap=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character shows a question mark, not a traceback.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"fivefold {fivefold.__version__}")
        raise typer.Exit


@app.callback()
def _fivefold(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A smaller KV cache for transformers: layers, heads, tokens, channels and bits."""
