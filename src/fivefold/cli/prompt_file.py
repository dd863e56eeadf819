"""The file of `--prompts`: a JSON object a line. What is wrong with a line is said before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from fivefold.cli.files import read_text
from fivefold.errors import InputError

SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
_KEYS = ("prompt", "messages", "id", *SETTINGS, "stop")


@dataclass(frozen=True)
class Line:
    """A prompt and how it is to be continued.

    where: file and number, for messages. name: ("id", its id), or ("line", its number). prompt: a text, or messages.
    settings: those of `fivefold.Request`, a seed among them. stop_ids, stop_texts: what ends it, besides the model's
    own tokens. key: changes with everything that its tokens depend on, but for the recipe and the model.
    """

    where: str
    name: tuple[str, str | int]
    prompt: str | list[dict[str, str]]
    settings: dict[str, Any]
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...]
    key: str


def read(file: str, defaults: dict[str, Any], seed: int, run: dict[str, Any]) -> list[Line]:
    """The lines of a file, or of stdin if it is '-'.

    defaults: settings of lines that have none of their own. seed: what those of lines without one depend on. run: what
    is the same for all lines and part of their keys. Raises `InputError` with the number of the first bad line.
    """
    from fivefold.generation.request import Request

    Request((0,), **defaults)
    lines: list[Line] = []
    seen: dict[tuple[str, str | int], str] = {}
    text = read_text(file, "the file of prompts")
    for number, raw in enumerate(text.split("\n"), 1):
        if not raw.strip():
            continue
        where = f"{file if file != '-' else 'stdin'}:{number}"
        try:
            entry = _entry(raw)
            name = ("line", number) if entry.get("id") is None else ("id", entry["id"])
            settings = {**defaults, **{key: entry[key] for key in SETTINGS if entry.get(key) is not None}}
            settings.setdefault("seed", _seed(seed, name))
            ids, texts = _stop(entry.get("stop"))
            Request((0,), stop=ids, **settings)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if name in seen:
            raise InputError(f"{where}: the id {name[1]!r} is that of {seen[name]} too: give each line one of its own.")
        seen[name] = where
        prompt = entry.get("prompt") or entry["messages"]
        # Where nothing is drawn, a seed changes nothing.
        hangs_on = {key: value for key, value in settings.items() if key != "seed" or settings["temperature"] > 0}
        parts = json.dumps([prompt, hangs_on, ids, texts, run], sort_keys=True)
        key = hashlib.sha256(parts.encode()).hexdigest()[:16]
        lines.append(Line(where, name, prompt, settings, ids, texts, key))
    return lines


def _entry(raw: str) -> dict[str, Any]:
    try:
        entry: Any = json.loads(raw)
    except RecursionError:
        raise InputError("this is nested too deeply: write one flat JSON object a line.") from None
    except ValueError as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"this is no JSON ({why}): write one object a line.") from None
    if not isinstance(entry, dict):
        raise InputError('this is no JSON object: write {"prompt": "..."}.')
    for key in entry:
        if key not in _KEYS:
            raise InputError(f"the key {key!r} is unknown: use {', '.join(_KEYS)}.")
    prompt, messages, name = entry.get("prompt"), entry.get("messages"), entry.get("id")
    if prompt is not None and messages is not None:
        raise InputError("there are both 'prompt' and 'messages': give one of them.")
    if messages is not None:
        _check_messages(messages)
    elif prompt is None:
        raise InputError("there is no prompt: give 'prompt', a text, or 'messages'.")
    else:
        _check_text("'prompt'", prompt)
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise InputError(f"'id' is {_short(name)}: give a text or a whole number.")
    if isinstance(name, str):
        _check_text("'id'", name)
    return entry


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError(f"'messages' is {_short(messages)}: give a list of {{role, content}}.")
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InputError(f"message {place} is {_short(message)}: give an object of 'role' and 'content'.")
        _check_text(f"the role of message {place}", message["role"])
        _check_text(f"the content of message {place}", message["content"], empty=True)


def _check_text(what: str, value: Any, empty: bool = False) -> None:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise InputError(f"{what} is {_short(value)}: give a text{'' if empty else ' that is not empty'}.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} holds half of a surrogate pair: give a text in Unicode.") from None


def _stop(given: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(token ids, texts) that end a request."""
    listed = [] if given is None else given if isinstance(given, list) else [given]
    for one in listed:
        if isinstance(one, bool) or not isinstance(one, int | str) or one == "":
            raise InputError(f"'stop' holds {_short(one)}: give texts that are not empty, or token ids.")
        if isinstance(one, str):
            _check_text("a text of 'stop'", one, empty=True)
    return tuple(x for x in listed if isinstance(x, int)), tuple(x for x in listed if isinstance(x, str))


def _seed(seed: int, name: tuple[str, str | int]) -> int:
    """A seed of its own for each request, which stays the same wherever its line stands."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
