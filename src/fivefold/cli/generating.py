"""What the commands that write text have in common: checked options, a prompt's tokens, and what a cache holds."""

from __future__ import annotations

import math
from typing import Any

from rich.text import Text

from fivefold.errors import InputError, first_line
from fivefold.tables import Facts

DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r} is not possible: use one of {', '.join(DTYPES)}.")


def check_options(dtype: str, temperature: float) -> None:
    check_dtype(dtype)
    if not math.isfinite(temperature):
        raise InputError(f"--temperature {temperature} is not possible: use a number from 0 on.")


def has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def in_template(tokenizer: Any, messages: list[dict[str, str]], answering: bool = True) -> str:
    """Messages as the text that the model reads; `answering`: an answer is to follow."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # whatever a template raises
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the model's chat template refuses these messages, of {roles if len(roles) < 80 else roles[:80] + '...'} "
            f"({first_line(error)}): give what it takes."
        ) from None


def encode(tokenizer: Any, prompt: str | list[dict[str, str]], chat: bool | None) -> list[int]:
    """Token ids of a text, in the chat template if `chat`, or if there is one; of messages always in the template."""
    if chat and not has_template(tokenizer):
        raise InputError("this model's tokenizer has no chat template: drop --chat.")
    if isinstance(prompt, str) and (chat is False or not has_template(tokenizer)):
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    # The template writes the tokens that begin a text itself.
    return tokenizer(in_template(tokenizer, messages), add_special_tokens=False)["input_ids"]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in [*listed, tokenizer.eos_token_id] if token is not None}


def longest(model: Any) -> int | None:
    """How many positions a model was made for."""
    return getattr(model.config, "max_position_embeddings", None)


def cache_report(cache: Any, speed: list[tuple[str, int, float]]) -> Facts:
    """What a cache holds. speed: (what, tokens, seconds) of reading and of writing."""
    report = cache.report()
    table = Facts()
    table.add_row("recipe", Text(report.recipe))
    exact = f"{report.exact_equivalent / 2**20:.2f} MiB"
    table.add_row("cache", f"{report.total / 2**20:.2f} MiB, {report.ratio:.3f}x of the exact cache ({exact})")
    table.add_row("tokens", f"{report.tokens:,}, {report.kept_tokens:.1%} of them kept (layers, heads, tokens)")
    table.add_row("bits a number", f"{report.bits:.2f} (channels, bits)")
    kinds = ("exact", "codes", "scales", "other", "statistics", "sliding", "slack", "free", "forks", "tables")
    held = [f"{kind} {getattr(report, kind):,}" for kind in kinds if getattr(report, kind)]
    table.add_row("bytes", ", ".join(held) or "none")
    table.add_row("decoding", Text(report.decoding))
    for what, tokens, seconds in speed:
        rate = f", {tokens / seconds:,.1f} tokens/s" if tokens else ""
        table.add_row(what, f"{tokens:,} tokens in {seconds:.1f} s{rate}")
    return table
