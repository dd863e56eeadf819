"""What a decoding step does besides attending: what tokens received, what is picked, which token goes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Noise(NamedTuple):
    """Keyformer's noise and temperature: what a query adds to the score of a key is its share of the sum over all keys
    of `(weight * table[place])**(1 / tau)`.

    table float32 `[draws]`, read from a place that depends on seed, layer, head and the query's position, one on for
    each position; tau goes from `first` to `last` over `steps` generated tokens.
    """

    table: torch.Tensor
    seed: int
    first: float
    last: float
    steps: int


PRIME = 1_000_003
"""What places of noise are made with."""
MODULUS, FACTOR, SEEDS = 2**31 - 1, 48_271, 15_485_863
"""Of the draws of `random`."""


def draws(positions: torch.Tensor, place: torch.Tensor | int, seed: int) -> torch.Tensor:
    """A number of its own for every place (layer and head) and position, float32, the shape of `positions`, by two
    steps of a multiplicative generator."""
    first = (positions + 1 + PRIME * place + SEEDS * seed) % MODULUS
    return ((first * FACTOR % MODULUS) ** 2 % MODULUS).float()
