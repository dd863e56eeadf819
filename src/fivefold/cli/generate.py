"""`fivefold generate`: continue a prompt, or a file of them, with a compressed cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fivefold.cli.app import (
    ChunkOption,
    DeviceOption,
    DtypeOption,
    MaxBytesOption,
    ModelOption,
    SeedOption,
    TemperatureOption,
)
from fivefold.cli.files import read_text
from fivefold.cli.generating import cache_report, check_options, encode, end_tokens, longest
from fivefold.cli.models import load_model, require_embedded
from fivefold.cli.prompts import Options, generate_all
from fivefold.cli.terminal import err, progress_bars, stop_request
from fivefold.errors import InputError
from fivefold.sizes import parse_bytes

if TYPE_CHECKING:
    import torch

MANY = "Many prompts"


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
    max_bytes: MaxBytesOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the model's chat template; by default if it has one."),
    ] = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    chunk: ChunkOption = 1024,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            rich_help_panel=MANY,
            help='A JSON object a line: "prompt" or "messages", and "id", "max_new_tokens", "temperature", "top_k", '
            '"top_p", "repetition_penalty", "seed", "stop" if it wants its own. - is stdin.',
        ),
    ] = None,
    out_file: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="FILE", rich_help_panel=MANY, help="A line for each, as they finish; resumable."
        ),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", rich_help_panel=MANY, help="Write so many at a time; 32 if not given."),
    ] = None,
    share_prefixes: Annotated[
        bool | None,
        typer.Option(
            "--share-prefixes/--no-share-prefixes",
            rich_help_panel=MANY,
            help="Read once how several prompts begin. Not by default.",
        ),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", rich_help_panel=MANY, help="Forget what --out holds, and begin anew.")
    ] = False,
) -> None:
    """Continue a prompt, or a file of prompts, with a compressed cache, and report what it holds."""
    cap = parse_bytes(max_bytes, "--max-bytes")
    check_options(dtype, temperature)
    if prompts_file is not None:
        if prompt is not None or prompt_file is not None:
            raise InputError("--prompts goes without --prompt and --prompt-file: write those into its file.")
        if out_file is None:
            raise InputError("--prompts needs a file for what is written: give --out FILE.")
        defaults = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        sharing = bool(share_prefixes)
        options = Options(
            recipe, model, dtype, device, cap, chat, defaults, seed, chunk, max_batch or 32, sharing, restart
        )
        generate_all(prompts_file, out_file, options)
        return
    for name, given in (
        ("--out", out_file), ("--max-batch", max_batch), ("--share-prefixes", share_prefixes), ("--restart", restart)
    ):  # fmt: skip
        if given not in (None, False):
            raise InputError(f"{name} is for many prompts: give them with --prompts FILE, or drop it.")
    _generate_one(
        _prompt_text(prompt_file, prompt), recipe, model, max_new_tokens, cap, dtype, device, chat, temperature, seed,
        chunk,
    )  # fmt: skip


def _generate_one(
    text: str,
    recipe: str,
    model: str | None,
    max_new_tokens: int,
    cap: int | None,
    dtype: str,
    device: str,
    chat: bool | None,
    temperature: float,
    seed: int,
    chunk: int,
) -> None:
    require_embedded(model)
    with err.status("Loading the model"):
        import torch

        from fivefold.api import compress
        from fivefold.recipe import Recipe

        parsed = Recipe.parse(recipe)
        network, tokenizer = load_model(model, dtype, device)
        ids = torch.tensor([encode(tokenizer, text, chat)], dtype=torch.int64, device=network.device)
        if not ids.numel():
            raise InputError("the prompt has no tokens: write something.")
        cache = compress(network, parsed, cap)
    positions = longest(network)
    if positions and ids.shape[1] + max_new_tokens > positions:
        err.print(
            f"Note: {ids.shape[1]:,} tokens of prompt and {max_new_tokens:,} new ones are more than the "
            f"{positions:,} this model was made for."
        )
    pick = _sampler(temperature, seed, network.device)
    with stop_request() as stopped:
        speed = _stream(network, tokenizer, cache, ids, pick, max_new_tokens, chunk, stopped)
        err.print()
        err.print(cache_report(cache, speed), crop=False)
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

    ends = end_tokens(model, tokenizer)
    total = ids.shape[1]
    chunk = min(chunk, total)
    start = time.perf_counter()
    done = 0
    with torch.inference_mode():
        with progress_bars() as bars:
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


def _prompt_text(file: str | None, prompt: str | None) -> str:
    if file is None and prompt is None:
        raise InputError("there is no prompt: give --prompt-file, --prompt, or many with --prompts.")
    parts = [] if file is None else [read_text(file)]
    if prompt is not None:
        try:
            prompt.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no text
            raise InputError("the text of --prompt is not UTF-8: convert it.") from None
        if not prompt.strip():
            raise InputError("the text of --prompt is empty: write something.")
        parts.append(prompt)
    return "\n\n".join(parts)
