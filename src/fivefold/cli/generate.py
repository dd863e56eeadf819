"""`fivefold generate`: continue a prompt with a compressed cache."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fivefold.cli.app import ModelOption, SeedOption
from fivefold.cli.files import read_text
from fivefold.cli.models import load_model, require_embedded
from fivefold.cli.terminal import err, facts_table, progress_bars, stop_request
from fivefold.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


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
    cap = None if max_bytes is None else _parse_bytes(max_bytes)
    text = _prompt_text(prompt_file, prompt)
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r} is not possible: use one of {', '.join(DTYPES)}.")
    if not math.isfinite(temperature):
        raise InputError(f"--temperature {temperature} is not possible: use a number from 0 on.")
    require_embedded(model)
    with err.status("Loading the model"):
        from fivefold.api import compress
        from fivefold.recipe import Recipe

        parsed = Recipe.parse(recipe)
        network, tokenizer = load_model(model, dtype, device)
        ids = _encode(tokenizer, text, chat).to(network.device)
        cache = compress(network, parsed, cap)
    longest = getattr(network.config, "max_position_embeddings", None)
    if longest and ids.shape[1] + max_new_tokens > longest:
        err.print(
            f"Note: {ids.shape[1]:,} tokens of prompt and {max_new_tokens:,} new ones are more than the "
            f"{longest:,} this model was made for."
        )
    pick = _sampler(temperature, seed, network.device)
    with stop_request() as stopped:
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


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def _cache_report(cache: Any, speed: list[tuple[str, int, float]]) -> Table:
    report = cache.report()
    table = facts_table()
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
        messages = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(text, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise InputError("the prompt has no tokens: write something.")
    return encoded["input_ids"]


def _prompt_text(file: str | None, prompt: str | None) -> str:
    if file is None and prompt is None:
        raise InputError("there is no prompt: give --prompt-file or --prompt.")
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


def _parse_bytes(text: str) -> int:
    """A number of bytes: 1000000, 512M, 1.5GiB."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise InputError(f"--max-bytes {text!r} is no size: write a number of bytes, or 512M, or 2G.")
    return int(float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper()))
