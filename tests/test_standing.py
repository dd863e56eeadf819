"""The bounds of many rows against plain arrays of them, and the numbers that stand for them."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from fivefold.store.rows import FIELDS, FIXED, Bounds
from fivefold.store.standing import LENGTH, Standing


def plain(standing: Standing) -> np.ndarray:
    return np.stack(standing.bounds)


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_bounds_are_those_of_plain_arrays_and_a_version_is_always_the_same(layers: int, seed: int) -> None:
    draw, random_numbers = random.Random(seed), np.random.default_rng(seed)
    each = draw.randint(1, 4)
    rows = layers * each
    wanted = np.tile(random_numbers.integers(0, 3, (FIELDS, each)), layers)
    standing = Standing(layers, rows, list(wanted.copy()))
    seen, undo = {standing.version: wanted}, list[Callable[[], None]]()
    before, told, grew, folded = wanted, standing.bounds, 0, 0

    def numbers(count: int) -> dict[int, np.ndarray]:
        fields = draw.sample(range(FIXED, FIELDS), draw.randint(1, FIELDS - FIXED))
        return {number: random_numbers.integers(0, 3, count) for number in fields}

    for _ in range(300):
        was, kind = standing.version, draw.randrange(8)
        if kind < 2:
            standing.grow()
            wanted = wanted.copy()
            wanted[LENGTH] += 1
            assert standing.grown == was
        elif kind < 6:
            one = np.sort(random_numbers.permutation(each)[: draw.randint(1, each)])
            everywhere = kind == 2
            some = (np.arange(layers)[:, None] * each + one).reshape(-1) if everywhere else one
            if kind == 3:
                some = np.sort(random_numbers.permutation(rows)[: draw.randint(1, rows)])
            elif kind == 4:
                some = draw.choice([standing.every, np.arange(rows)])
            values = numbers(len(one) if everywhere else len(some))
            if kind == 4:  # layers become alike, and nobody says so
                values = {
                    number: np.tile(random_numbers.integers(0, 3, each), layers) for number in range(FIXED, FIELDS)
                }
            if kind == 5:
                values = {number: int(x[0]) for number, x in values.items()}
            wanted = wanted.copy()
            for number, x in values.items():
                wanted[number, some] = np.tile(x, layers) if everywhere else x
            standing.put(some, values)
            assert standing.version != was and standing.grown != was
        elif kind == 6:
            undo, before = [standing.snapshot()], wanted
        elif undo:
            undo.pop()()
            wanted = before
        if draw.random() < 0.7:
            of_layers = np.stack(standing.of_layers())
            alike = (wanted.reshape(FIELDS, layers, -1) == wanted.reshape(FIELDS, layers, -1)[:, :1]).all()
            assert of_layers.shape == (FIELDS, 1 if alike else layers, each)
            assert (of_layers == wanted.reshape(FIELDS, layers, -1)).all() and standing.same == alike
            assert standing.level == (wanted == wanted[:, :1]).all()
            folded += bool(alike)
        if draw.random() < 0.5:
            assert (plain(standing) == wanted).all()
            assert (np.broadcast_to(standing.full, (layers, each)).reshape(-1) == Bounds(*wanted).full).all()
        some = random_numbers.integers(0, rows, (3, 1))
        assert (np.stack(standing.at(some)) == wanted[:, some]).all()
        row = draw.randrange(rows)
        assert standing.one(row) == Bounds(*wanted[:, row].tolist())
        assert (np.stack(standing.layer(row // each)) == wanted[:, row // each * each :][:, :each]).all()
        # Whoever has seen a version knows what stands there, and what one more token makes of it.
        assert (seen.setdefault(standing.version, wanted) == wanted).all()
        if standing.grown:
            assert (seen[standing.grown] + (np.arange(FIELDS) == LENGTH)[:, None] == wanted).all()
            grew += 1
        told = standing.bounds if draw.random() < 0.2 else told
    assert grew > 20 and folded > 20
    with pytest.raises(ValueError, match="read-only"):
        told.length[:] = 0


def test_rows_of_several_come_one_after_the_other() -> None:
    """Of each layer; those that all layers share stay one layer's."""
    numbers = np.arange(FIELDS * 3).reshape(FIELDS, 3)
    for differ in (False, True):
        parts = []
        for number, which in ((0, [2, 0]), (100, [1, 1, 2])):
            fields = np.stack([numbers + number, numbers + number + differ], 1).reshape(FIELDS, -1)
            one = Standing(2, 6, list(fields))
            assert one.same != differ
            parts.append((one, np.array(which)))
        wanted = np.concatenate([plain(one).reshape(FIELDS, 2, 3)[:, :, which] for one, which in parts], 2)
        source = np.concatenate(
            [number * 6 + layer * 3 + which for layer in range(2) for number, (_, which) in enumerate(parts)]
        )
        made = Standing.gathered(parts, source)
        assert (plain(made) == wanted.reshape(FIELDS, -1)).all()
        assert made.same != differ and len({one.version for one, _ in parts} | {made.version}) == 3
