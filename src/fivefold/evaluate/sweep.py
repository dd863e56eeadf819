"""Sweeps: many recipes from one text, and the recipes that no other one beats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from fivefold.errors import InputError, RecipeError
from fivefold.recipe import Recipe

MOST = 500
_CLOSING = {"(": ")", "[": "]", "{": "}"}


def expand(text: str) -> list[str]:
    """Every text that `text` stands for, as a shell's braces: `kivi(bits={2,4})` is `kivi(bits=2)`, `kivi(bits=4)`.

    Braces hold parts between commas, may be nested, and several multiply. Commas within parentheses, brackets and
    quotes are part of a part. Raises `RecipeError` for braces that do not match, an empty part, or too many recipes.
    """
    open_at, depth, quote = -1, 0, ""
    for at, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "{":
            open_at, depth = (at, 1) if depth == 0 else (open_at, depth + 1)
        elif letter == "}":
            depth -= 1
            if depth < 0:
                raise RecipeError(f"the recipe {text!r} closes a brace that was not opened: write {{2,4,8}}.")
            if depth == 0:
                parts = [one for part in _split(text[open_at + 1 : at], text) for one in expand(part)]
                rest = expand(text[at + 1 :])
                if len(parts) * len(rest) > MOST:
                    raise RecipeError(
                        f"the recipe {text!r} stands for more than {MOST} recipes: use fewer values in its braces."
                    )
                return [text[:open_at] + one + two for one, two in product(parts, rest)]
    if depth:
        raise RecipeError(f"the recipe {text!r} opens a brace and does not close it: write {{2,4,8}}.")
    return [text]


def _split(inner: str, text: str) -> list[str]:
    parts, waiting, quote = [""], "", ""
    for letter in inner:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in _CLOSING:
            waiting += _CLOSING[letter]
        elif waiting and letter == waiting[-1]:
            waiting = waiting[:-1]
        elif letter == "," and not waiting:
            parts.append("")
            continue
        parts[-1] += letter
    stripped = [part.strip() for part in parts]
    if not all(stripped):
        raise RecipeError(f"the recipe {text!r} has an empty place in its braces: write {{2,4,8}}.")
    return stripped


def recipes(texts: Iterable[str], braces: bool = False) -> tuple[str, ...]:
    """The recipes in their own spelling, each once. Raises `RecipeError`, or `InputError` for too many."""
    out: dict[Recipe, str] = {}
    for text in texts:
        for one in expand(text) if braces else [text]:
            parsed = Recipe.parse(one)
            out.setdefault(parsed, str(parsed))
    if len(out) > MOST:
        raise InputError(f"these are {len(out)} recipes: at most {MOST} are run.")
    return tuple(out.values())


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (cost, quality) are on the Pareto front: no other costs no more and is no worse, and is
    better in one of both."""
    return [
        not any(
            other[0] <= cost and other[1] >= quality and (other[0] < cost or other[1] > quality) for other in points
        )
        for cost, quality in points
    ]
