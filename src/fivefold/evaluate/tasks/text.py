"""Filler that the tasks plant their facts in, and words for the facts.

No word listed here occurs in the filler, so that a planted word is found where it was planted and nowhere else.
"""

from __future__ import annotations

import random

from fivefold.evaluate.demo import document

PEOPLE = (
    "Alice", "Anna", "Benedict", "Clara", "Daniel", "Emma", "Frank", "George", "Helen", "Henry", "Julia", "Katherine",
    "Laura", "Leopold", "Martin", "Oscar", "Peter", "Robert", "Simon", "Thomas", "Victor", "Winston",
)  # fmt: skip
CITIES = (
    "Athens", "Atlanta", "Berlin", "Boston", "Cairo", "Chicago", "Dallas", "Denver", "Dublin", "Houston", "Lisbon",
    "London", "Madrid", "Miami", "Moscow", "Oslo", "Paris", "Portland", "Prague", "Rome", "Seattle", "Tokyo",
    "Vienna", "Warsaw",
)  # fmt: skip
GOODS = (
    "apples", "batteries", "bread", "butter", "candles", "carrots", "cheese", "coffee", "flour", "honey", "lemons",
    "milk", "mustard", "nails", "onions", "paint", "pepper", "rice", "rope", "soap", "sugar", "tea", "towels",
)  # fmt: skip
COLOURS = ("black", "brown", "golden", "green", "orange", "purple", "silver", "violet", "white", "yellow")


def passage(rng: random.Random) -> str:
    """Python's language reference from a random line on, at least half of it."""
    text = document()
    return text[text.index("\n", rng.randrange(len(text) // 2)) :]


def shuffled(rng: random.Random, words: list[str]) -> tuple[str, ...]:
    """The words in random order, each as a choice that begins a word."""
    return tuple(f" {word}" for word in rng.sample(words, len(words)))
