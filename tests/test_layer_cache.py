"""One layer's tiers: what is stored where, what is shared with whom, and what is taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from faults import Fault, Faults
from fivefold.errors import CacheFullError, CacheStateError, NonFiniteError
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.methods.bits.mikv import MiKV, TokenCodec
from fivefold.methods.tokens.d2o import D2O
from fivefold.methods.tokens.h2o import H2O
from fivefold.methods.tokens.random import RandomTokens
from fivefold.store import compact
from fivefold.store.bank import Bank
from fivefold.store.codec import Codec
from fivefold.store.group import RowGroup, _blocks
from fivefold.store.layer_cache import LayerCache
from fivefold.store.pages import PagePool
from fivefold.store.plan import Policy
from fivefold.store.rows import PAGE, Bounds, Extent
from fivefold.store.spec import LayerSpec, Pools
from fivefold.store.transaction import Transaction

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
DIM = 8
EXACT_PAGE = 2 * PAGE * DIM * 4


class SharedKeys(KiviCodec):
    """KIVI whose pages share the keys and keep the values for themselves."""

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits, 32, DIM, DIM)
        fields = (dataclasses.replace(f, own=f.name.startswith("value")) for f in self.layout.fields)
        self.layout = dataclasses.replace(self.layout, fields=tuple(fields))


def make(
    extents: list[Extent] | None = None,
    codec: Codec | None = None,
    residual: int = 32,
    pools: Pools | None = None,
    batch: int = 1,
    policy: Policy | None = None,
) -> LayerCache:
    extents = extents or [Extent()]
    spec = LayerSpec(0, 1, len(extents), len(extents), DIM, torch.float32, CPU)
    layer = LayerCache(spec, pools or Pools(), extents, codec, residual, policy)
    layer.start(batch)
    return layer


def kivi(bits: int = 2, group: int = 32) -> KiviCodec:
    return KiviCodec(bits, group, DIM, DIM)


def extend(layer: LayerCache, tokens: int | list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Append random tokens: one number for all sequences, or one for each (padded left). Returns them."""
    counts = np.full(layer.batch, tokens) if isinstance(tokens, int) else np.array(tokens)
    generator = torch.Generator().manual_seed(seed)
    chunk = int(counts.max())
    keys, values = torch.randn(2, layer.rows, chunk, DIM, generator=generator)
    attention = torch.rand(layer.rows, 1000, generator=generator)
    for group, count in layer.split_by(counts):
        if count:
            pick, observed = group.rows_tensor, None
            if group.held is not None:
                observed = attention[pick, : group.held.slots + count]
            layer.append(group, keys[pick, chunk - count :], values[pick, chunk - count :], observed=observed)
    return keys, values


def step(layer: LayerCache, steps: int = 1, seed: int = 0) -> None:
    """Append random tokens one by one, as in decoding."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        keys, values = torch.randn(2, layer.rows, 1, DIM, generator=generator)
        attention = torch.rand(layer.rows, 1, 1000, generator=generator)
        for group in sorted(layer.groups, key=lambda group: group.held is not None):
            layer.append(group, keys[group.rows_tensor], values[group.rows_tensor], advance=False)
            if group.held is not None:
                layer.observe(group, attention[group.rows_tensor, :, : group.held.slots])
            layer.append(group, None, None)


def exact(layer: LayerCache, group: RowGroup, name: str = "keys") -> torch.Tensor:
    """All filled slots of the exact tier: [rows, tokens, DIM]."""
    g = group.bounds
    filled = min(g.length, g.extent.pinned * PAGE) + max(0, g.length - g.exact_base)
    blocks = [group.read_exact(name, location) for _, _, location in group.exact_blocks()]
    return torch.cat([torch.empty(len(group.rows), 0, DIM), *blocks], 1)[:, :filled]


def packed(layer: LayerCache, group: RowGroup) -> list[torch.Tensor]:
    """Keys and values of the packed tier, decoded: [rows, tokens, DIM]."""
    g = group.bounds
    fields = group.packed_fields(0, group.packed.shape[1])
    decoded = group.codec(0, group.packed.shape[1]).decode({name: x.flatten(0, 1) for name, x in fields.items()})
    return [x.reshape(len(group.rows), -1, DIM)[:, : g.packed_stop - g.packed_base] for x in decoded]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of 8-bit codes."""
    return bool((a - b).abs().max() < 0.03)


def image(layer: LayerCache) -> dict[int, list[object]]:
    """Everything that each row of a layer holds and claims, for comparing before and after."""
    out: dict[int, list[object]] = {}
    for group in layer.groups:
        parts = [exact(layer, group), exact(layer, group, "values")]
        if group.packed.shape[1]:
            parts += packed(layer, group)
        claims: list[object] = [tuple(int(x) for x in group.bounds)]
        if group.held is not None:
            held = group.held
            parts += [held.positions, held.scores, *held.extra.values()]
            claims += [held.prompt, held.seen, held.share, held.final]
        for at, row in enumerate(group.rows.tolist()):
            assert row not in out
            out[row] = [*claims, *(x[at].tolist() for x in parts)]
    assert sorted(out) == list(range(layer.rows))
    for name, x in layer.learned.items():
        out |= {row: [*out[row], name, x[row].tolist()] for row in out}
    return dict(sorted(out.items()))


def ownership(layers: list[LayerCache]) -> list[object]:
    """How many hold each page that is held, and how many pages that is."""
    out: list[object] = []
    named: dict[PagePool, set[int]] = {pool: set() for pool in layers[0].pools}
    for layer in layers:
        for group in layer.groups:
            tables = [(layer.exact_pool, group.exact), *zip(layer.packed_pools, group.packed_tables)]
            for at, row in enumerate(group.rows.tolist()):
                for pool, table in tables:
                    out.append((layer.spec.layer, row, table[at].tolist(), pool.references(table[at]).tolist()))
                    named[pool].update(table[at].tolist())
    for pool, pages in named.items():
        out.append((pool.layout.name, len(pages)))
        assert pool.pages_in_use == len(pages), "pages that no table names are lost"
    return sorted(out, key=str)


# -- groups and tokens ------------------------------------------------------------------------------------


def test_heads_of_equal_extent_move_together() -> None:
    window = Extent(4, 64)
    layer = make([Extent(), window, Extent(), window], batch=2)
    assert [group.rows.tolist() for group in layer.groups] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [group.bounds.extent for group in layer.groups] == [Extent(), window]
    with pytest.raises(ValueError, match="1 extents for 2 kv heads"):
        LayerCache(LayerSpec(0, 1, 2, 2, DIM, torch.float32, CPU), Pools(), [Extent()])


def test_sequences_of_different_lengths_part_and_keep_their_tokens() -> None:
    layer = make([Extent(), Extent(0, 40)], batch=3)
    keys, _ = extend(layer, [100, 37, 100])
    assert layer.lengths().tolist() == [100, 37, 100]
    assert sorted(group.rows.tolist() for group in layer.groups) == [[0, 4], [1, 5], [2], [3]]
    for group in layer.groups:
        start = 0 if group.bounds.extent.recent is None else group.bounds.exact_base
        new = keys[group.rows_tensor][:, 100 - group.bounds.length + start :]
        assert torch.equal(exact(layer, group), new)


def test_decoding_one_token_at_a_time_stores_what_a_chunk_stores() -> None:
    extents = [Extent(), Extent(4, 50), Extent(40, 9)]
    stepped, whole = make(extents, kivi(8), batch=2), make(extents, kivi(8), batch=2)
    keys, values = torch.randn(2, 6, 200, DIM)
    for t in range(200):
        for group in stepped.groups:
            pick = group.rows_tensor
            stepped.append(group, keys[pick, t : t + 1], values[pick, t : t + 1], advance=False)
            stepped.append(group, None, None)
    for group in whole.groups:
        whole.append(group, keys[group.rows_tensor], values[group.rows_tensor])
    for a, b in zip(stepped.groups, whole.groups):
        # Windows slide page by page, so how much lies before what is seen may differ; where both hold, they
        # agree.
        assert a.bounds.length == b.bounds.length
        if a.bounds == b.bounds:
            assert torch.equal(exact(stepped, a), exact(whole, b))
            if a.packed.shape[1]:
                assert all(torch.equal(x, y) for x, y in zip(packed(stepped, a), packed(whole, b)))
    full = stepped.groups[0]
    assert full.bounds == whole.groups[0].bounds and full.bounds.packed_stop == 160
    assert torch.equal(exact(stepped, full), keys[full.rows_tensor, 160:])
    assert close(packed(stepped, full)[1], values[full.rows_tensor, :160])


def test_revocable_leaves_the_newest_tokens_alone() -> None:
    layer = make([Extent(), Extent(0, 32)], kivi(), residual=0)
    keys, values = torch.randn(2, 2, 128, DIM)
    for i, group in enumerate(layer.groups):
        layer.append(group, keys[i : i + 1], values[i : i + 1], revocable=64)
    assert [group.bounds.exact_base for group in layer.groups] == [64, 64]
    assert [group.bounds.packed_base for group in layer.groups] == [0, 32]
    layer.crop(60)
    for group in layer.groups:
        layer.append(group, None, None)
    assert [group.bounds.exact_base for group in layer.groups] == [64, 64]


@pytest.mark.parametrize("own", [False, True])
def test_numbers_that_cannot_be_packed_change_nothing(own: bool) -> None:
    codec = SharedKeys(8) if own else kivi(8)
    layer = make([Extent(0, 150)], codec)
    extend(layer, 200)
    used = [pool.pages_in_use for pool in layer.pools]
    for number in (float("nan"), float("inf"), -float("inf"), 65520.0):
        for which in range(2):
            tokens = [torch.randn(1, 200, DIM), torch.randn(1, 200, DIM)]
            tokens[which][0, 100, 3] = number
            before = image(layer)
            (group,) = layer.groups
            with pytest.raises(NonFiniteError, match="float16"):
                layer.append(group, *tokens)
            assert image(layer) == before
            assert [pool.pages_in_use for pool in layer.pools] == used
    keys, _ = extend(layer, 200, seed=1)
    (group,) = layer.groups
    assert torch.equal(exact(layer, group), keys[:, group.bounds.exact_base - 200 :])
    assert close(packed(layer, group)[0][:, -100:], keys[:, -100 - exact(layer, group).shape[1] :][:, :100])


# -- sharing ----------------------------------------------------------------------------------------------


def test_a_fork_shares_every_page_until_either_writes() -> None:
    layer = make([Extent()], kivi(8))
    extend(layer, 140)
    used = layer.pools.budget.used
    twin = layer.fork()
    before = image(layer)
    assert image(twin) == before and layer.pools.budget.used == used
    (mine,), (other,) = layer.groups, twin.groups
    assert np.array_equal(mine.exact, other.exact) and np.array_equal(mine.packed, other.packed)

    extend(twin, 10, seed=1)
    assert image(layer) == before
    assert mine.exact[0, :-1].tolist() == other.exact[0, :1].tolist()[: mine.exact.shape[1] - 1]
    assert mine.exact[0, -1] != other.exact[0, -1]  # the open page was copied
    extend(layer, 100, seed=2)
    after = image(layer)
    twin.free()
    assert image(layer) == after
    layer.free()
    assert all(pool.pages_in_use == 0 for pool in layer.pools)


def test_a_fork_that_packs_into_a_shared_open_page_copies_it() -> None:
    layer = make([Extent()], kivi(2))
    extend(layer, 140)
    twin = layer.fork()
    before = image(layer)
    extend(twin, 64, seed=1)
    assert twin.groups[0].packed.shape == layer.groups[0].packed.shape == (1, 1)
    assert twin.groups[0].packed[0, 0] != layer.groups[0].packed[0, 0]
    assert image(layer) == before
    old = packed(layer, layer.groups[0])
    assert all(torch.equal(x[:, : y.shape[1]], y) for x, y in zip(packed(twin, twin.groups[0]), old))


def test_select_repeats_drops_and_reorders() -> None:
    layer = make([Extent(), Extent(0, 40)], kivi(8), batch=3)
    extend(layer, [200, 150, 90])
    before = {}
    for group in layer.groups:
        for i, row in enumerate(group.rows.tolist()):
            before[row] = (group.bounds, exact(layer, group)[i], exact(layer, group, "values")[i])
    in_use = layer.exact_pool.pages_in_use
    layer.select(np.array([2, 0, 2, 2]))
    assert layer.batch == 4 and layer.lengths().tolist() == [90, 200, 90, 90]
    assert layer.exact_pool.pages_in_use < in_use
    for group in layer.groups:
        for i, row in enumerate(group.rows.tolist()):
            sequence, head = divmod(row, 2)
            geometry, keys, values = before[[2, 0, 2, 2][sequence] * 2 + head]
            assert group.bounds == geometry
            assert torch.equal(exact(layer, group)[i], keys)
            assert torch.equal(exact(layer, group, "values")[i], values)
    keys, _ = extend(layer, 3, seed=5)  # sequences that were one now differ
    for group in layer.groups:
        assert torch.equal(exact(layer, group)[:, -3:], keys[group.rows_tensor])
    layer.select(np.array([], dtype=np.int64))
    assert layer.batch == 0 and all(pool.pages_in_use == 0 for pool in layer.pools)


def test_shared_own_pages_are_copied_when_an_append_writes_to_them() -> None:
    def build() -> list[LayerCache]:
        pools = Pools()
        layer = make(codec=SharedKeys(), pools=pools)
        extend(layer, 160, seed=2)
        return [layer, layer.fork()]

    layer, twin = build()
    before = image(twin)
    with Allocations() as taken:
        extend(layer, 32, seed=3)
    assert [taken.pages[pool] for pool in (layer.exact_pool, *layer.packed_pools)] == [1, 1, 1]
    assert image(twin) == before
    check_to_the_byte(build, lambda layer: extend(layer, 32, seed=3))


# -- the cap ----------------------------------------------------------------------------------------------


class Allocations:
    """Counts the pages that are allocated, by pool."""

    def __init__(self) -> None:
        self.pages: dict[PagePool, int] = {}
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Allocations:
        real = PagePool.allocate

        def allocate(pool: PagePool, count: int, step: bool = False) -> np.ndarray:
            pages = real(pool, count, step)
            if count:
                self.pages[pool] = self.pages.get(pool, 0) + count
            return pages

        self.patch.setattr(PagePool, "allocate", allocate)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def check_to_the_byte(build: Callable[[], list[LayerCache]], act: Callable[[LayerCache], object]) -> int:
    """A change of the first of some layers goes through under a cap that leaves what it allocates, and one byte less
    is refused and changes nothing. Returns how many bytes that is."""
    layers = build()
    with Allocations() as taken:
        act(layers[0])
    wanted, names = [image(layer) for layer in layers], {pool.layout: n for pool, n in taken.pages.items()}
    for short in (0, 1):
        layers = build()
        budget = layers[0].pools.budget
        budget.trim()
        pools = list(layers[0].pools)
        missing = sum(max(0, names.get(p.layout, 0) - p.free_pages) * p.layout.nbytes for p in pools)
        if short and not missing:
            break
        budget.limit = budget.used + missing - short
        before = [image(layer) for layer in layers], ownership(layers)
        if short:
            with pytest.raises(CacheFullError, match="nothing was stored"):
                act(layers[0])
            assert ([image(layer) for layer in layers], ownership(layers)) == before
            budget.limit += 1
        act(layers[0])
        assert [image(layer) for layer in layers] == wanted
        assert budget.used <= budget.limit
    return missing


def test_pages_of_sinks_are_apart_from_those_of_a_window() -> None:
    """Those that slide out leave whole slabs, and nothing has to move."""
    layer = make([Extent(32, 64)] * 2, batch=40)
    for tokens in (200, 300):
        extend(layer, tokens)
        layer.exact_pool.trim()
        assert layer.exact_pool.free_pages == 0 and not compact.due(layer.pools)


def test_pages_in_use_are_those_of_the_bounds() -> None:
    for extents in ([Extent()], [Extent(), Extent(4, 100)], [Extent(40, 70)]):
        layer = make(extents, kivi(8), batch=2)
        extend(layer, [90, 30])
        for step, tokens in enumerate(([50, 50], [1, 1], [300, 2], [0, 1], [64, 0], [7, 7])):
            extend(layer, tokens, seed=step)
            bounds = layer.bounds
            exact_pages = -(-np.minimum(bounds.length, bounds.pinned) // PAGE)
            exact_pages += -(-np.maximum(0, bounds.length - bounds.exact_base) // PAGE)
            assert layer.exact_pool.pages_in_use == exact_pages.sum()
            assert layer.packed_pools[0].pages_in_use == (-(-(bounds.packed_stop - bounds.packed_base) // 64)).sum()


def test_pages_that_somebody_else_holds_stay_when_they_are_given_back() -> None:
    layer = make([Extent(0, 64)], batch=2)
    extend(layer, [200, 200])
    used, pages = layer.exact_pool.pages_in_use, layer.groups[0].exact.copy()
    assert pages.shape == (2, 3) and used == 6
    twin = layer.fork()
    before = image(twin)
    extend(layer, [65, 0])  # takes two pages and gives two back, and the open one is copied
    assert layer.exact_pool.pages_in_use == used + 3
    assert layer.exact_pool.references(pages).tolist() == [[1, 1, 1], [2, 2, 2]]
    extend(layer, [0, 65])
    assert layer.exact_pool.pages_in_use == used + 6
    extend(layer, [65, 65])  # nobody else holds what this gives back
    assert layer.exact_pool.pages_in_use == used + 6
    assert image(twin) == before
    twin.free()
    assert layer.exact_pool.pages_in_use == used


def test_an_append_fits_to_the_byte_and_one_byte_less_is_refused() -> None:
    def build() -> list[LayerCache]:
        layer = make([Extent(), Extent(4, 100)], kivi(), batch=2)
        extend(layer, 160)
        return [layer.fork(), layer]

    needs = [
        check_to_the_byte(build, lambda layer, tokens=tokens: extend_whole(layer, tokens))  # type: ignore[misc]
        for tokens in (1, 2, 33, 500)
    ]
    assert needs[0] >= 4 * EXACT_PAGE  # the open pages of four rows are copied
    assert sorted(needs) == needs


def extend_whole(layer: LayerCache, tokens: int | list[int]) -> None:
    """`extend`, all groups as one change."""
    with layer.bank.atomic():
        extend(layer, tokens, seed=1)


# -- failures ---------------------------------------------------------------------------------------------


def h2o() -> list[LayerCache]:
    layer = make([Extent(), Extent(0, 40)], batch=2, policy=H2O(keep=0.5))
    extend(layer, [100, 100])
    return [layer]


def h2o_full() -> list[LayerCache]:
    """Of rows whose budget just fills its pages: the newest token comes into a page of its own, and that goes again."""
    layer = make([Extent(), Extent(), Extent(0, 40)], batch=2, policy=H2O(keep=0.5))
    extend(layer, [128, 128])
    step(layer, 2)
    return [layer]


def h2o_forked() -> list[LayerCache]:
    (layer,) = h2o()
    step(layer, 2)
    return [layer, layer.fork()]


def h2o_packed() -> list[LayerCache]:
    layer = make([Extent(), Extent(0, 40)], kivi(8), batch=2, policy=H2O(keep=0.5))
    extend(layer, [300, 300])
    step(layer, 20)
    return [layer]


def d2o() -> list[LayerCache]:
    layer = make([Extent(), Extent()], batch=2, policy=D2O(keep=0.5))
    extend(layer, [100, 100])
    layer.after_layers({0: 1.0, 1: 0.8})
    return [layer]


def mikv() -> list[LayerCache]:
    layer = make([Extent(), Extent(0, 70)], TokenCodec(4, DIM, DIM), 0, batch=2, policy=MiKV(balance=False))
    extend(layer, [200, 150])
    return [layer]


def plain() -> list[LayerCache]:
    layer = make([Extent(), Extent(4, 100)], kivi(8), batch=2)
    extend(layer, [160, 90])
    return [layer]


def forked() -> list[LayerCache]:
    (layer,) = plain()
    return [layer, layer.fork()]


def alike() -> list[LayerCache]:
    pools, out = Pools(), []
    for seed in range(2):
        layer = make([Extent(), Extent(0, 150)], SharedKeys(8), pools=pools, batch=2)
        extend(layer, [300, 200], seed)
        out.append(layer)
    return out


def entangled() -> list[LayerCache]:
    layer, other = alike()
    other.free()
    return [layer, layer.fork()]


def sparse() -> list[LayerCache]:
    """Of the slabs much is free, but none wholly; some pages have two owners."""
    pools, layers = Pools(), []
    for seed in range(3):
        layer = make([Extent(), Extent(0, 150)], SharedKeys(8), pools=pools, batch=4)
        extend(layer, 500, seed)
        layer.select(np.array([1]))
        layers.append(layer)
    twin = layers[2].fork()
    extend(twin, 40)
    return [*layers, twin]


def compact_all(layer: LayerCache) -> None:
    with layer.bank.atomic():
        for pool in compact.due(layer.pools):
            compact.compact([layer.bank], pool)


def united() -> list[LayerCache]:
    """Two layers of one bank, of rows that are about to pack, and a fork."""
    layers = alike()
    for layer in layers:
        step(layer, 10)
    Bank.united(layers, None)
    twin = layers[0].bank.fork()
    step_united(layers[0], 8)
    return [*layers, *twin.layers]


def step_united(layer: LayerCache, steps: int = 1) -> None:
    """As a session does it: a slot is opened in all rows, written to, and what is due moves, all at once."""
    bank, rows = layer.bank, layer.bank.rows_of()
    with bank.atomic():
        for number in range(steps):
            bank.open(rows)
            newest = bank.at(rows)
            pages = bank.exact.table[rows, newest.exact_pages - 1]
            x = torch.randn(2, len(rows), DIM, generator=torch.Generator().manual_seed(number))
            for name, part in zip(("keys", "values"), x):
                bank.exact.pool.write_tokens(name, pages, (newest.exact_tokens - 1) % PAGE, part)
            bank.advance(rows)


def unite(layer: LayerCache, layers: list[LayerCache]) -> None:
    """Common tables, and a step in them, as one change."""
    change = Transaction()
    banks = [one.bank for one in layers]
    try:
        for bank in banks:
            bank.begin(change)
        bank = Bank.united(layers, change)
        extend(layer, [40, 40])
        bank.advance(bank.rows_of())
        change.verify()
    except BaseException:
        change.rollback()
        for bank in banks:
            bank.change = None
        raise
    for one in (*banks, bank):
        one.change = None
    change.commit()


CHANGES: dict[str, tuple[Callable[[], list[LayerCache]], Callable[[list[LayerCache]], object], int]] = {
    # How many points there are at least at which it can fail.
    "chunk": (plain, lambda layers: extend_whole(layers[0], 150), 15),
    "chunk of some": (plain, lambda layers: extend_whole(layers[0], [70, 0]), 8),
    "chunk after a fork": (forked, lambda layers: extend_whole(layers[0], 150), 20),
    "step": (plain, lambda layers: step_whole(layers[0]), 2),
    "step after a fork": (forked, lambda layers: step_whole(layers[1]), 6),
    "steps": (forked, lambda layers: step_whole(layers[1], 40), 100),
    "start": (lambda: [freed()], lambda layers: layers[0].start(3), 0),
    "crop": (plain, lambda layers: layers[0].crop(5), 0),
    "crop into packed groups": (lambda: [full()], lambda layers: layers[0].crop(90), 3),
    "crop everything": (plain, lambda layers: layers[0].crop(500), 0),
    "select": (forked, lambda layers: layers[0].select(np.array([1, 1, 0])), 2),
    "fork": (plain, lambda layers: layers.append(layers[0].fork()), 2),
    "free": (forked, lambda layers: layers[0].free(), 0),
    "pages move": (sparse, lambda layers: compact_all(layers[0]), 6),
    "chunk of shared": (entangled, lambda layers: extend_whole(layers[1], 90), 20),
    "common step": (united, lambda layers: step_united(layers[0], 8), 25),
    "common tables": (alike, lambda layers: unite(layers[0], layers), 10),
    "h2o chunk": (h2o, lambda layers: extend_whole(layers[0], 60), 6),
    "h2o ragged chunk": (h2o, lambda layers: extend_whole(layers[0], [60, 0]), 6),
    "h2o step": (h2o, lambda layers: step_whole(layers[0]), 2),
    "h2o step at the end of a page": (h2o_full, lambda layers: step_whole(layers[0]), 3),
    "h2o step after a fork": (h2o_forked, lambda layers: step_whole(layers[1]), 6),
    "h2o packed steps": (h2o_packed, lambda layers: step_whole(layers[0], 30), 60),
    "h2o packed chunk": (h2o_packed, lambda layers: extend_whole(layers[0], 100), 8),
    "d2o chunk": (d2o, lambda layers: d2o_chunk(layers[0]), 6),
    "d2o step": (d2o, lambda layers: step_whole(layers[0]), 1),
    "mikv chunk": (mikv, lambda layers: extend_whole(layers[0], 100), 12),
    "mikv steps": (mikv, lambda layers: step_whole(layers[0], 40), 60),
}


def freed() -> LayerCache:
    (layer,) = plain()
    layer.free()
    return layer


def full() -> LayerCache:
    layer = make([Extent(), Extent()], kivi(8, 64), batch=2)
    extend(layer, 256)
    return layer


def step_whole(layer: LayerCache, steps: int = 1) -> None:
    with layer.bank.atomic():
        step(layer, steps, seed=6)


def d2o_chunk(layer: LayerCache) -> None:
    with layer.bank.atomic():
        extend(layer, [60, 60], seed=2)
        layer.after_layers({0: 0.7, 1: 1.1})


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.slow
def test_a_failure_at_any_point_changes_nothing(name: str) -> None:
    build, act, least = CHANGES[name]
    whole = build()
    assert all(image(layer) for layer in whole if layer.batch)  # nothing waits to be written
    with Faults(None, KiviCodec, TokenCodec) as counting:
        act(whole)
    wanted = [image(layer) for layer in whole]
    assert counting.count >= least
    # Every point, or where there are many those that are spread over them.
    points = np.linspace(1, counting.count, min(counting.count, 40)).astype(int).tolist()
    for at in points:
        layers = build()
        before = [image(layer) for layer in layers], ownership(layers)
        with Faults(at, KiviCodec, TokenCodec), pytest.raises(Fault):
            act(layers)
        assert ([image(layer) for layer in layers], ownership(layers)) == before, at
        act(layers)  # as if nothing had been
        assert [image(layer) for layer in layers] == wanted, at
        for layer in layers:
            layer.free()
        assert all(pool.pages_in_use == 0 for pool in layers[0].pools)


def test_pages_that_moved_leave_whole_slabs_behind() -> None:
    layers = sparse()
    pools = layers[0].pools
    pools.budget.trim()
    before, used = [image(layer) for layer in layers], pools.budget.used
    in_use = [pool.pages_in_use for pool in pools]
    for layer in layers:
        compact_all(layer)
    pools.budget.trim()
    assert [image(layer) for layer in layers] == before
    assert [pool.pages_in_use for pool in pools] == in_use and pools.budget.used < used


def test_a_budget_that_fills_its_pages_takes_no_more_with_every_step() -> None:
    """Whether the tokens that go are the newest ones or not."""
    (layer,) = h2o_full()
    used, newest = layer.exact_pool.pages_in_use, 0
    for seed in range(70):
        step(layer, seed=seed)
        (group,) = [group for group in layer.groups if group.held is not None]
        assert group.bounds.length == group.held.slots == 64
        ownership([layer])
        newest += int((group.held.positions.amax(1) == group.held.seen - 1).all())
    bounds = layer.bounds
    assert layer.exact_pool.pages_in_use == int(bounds.exact_pages.sum()) <= used + 2
    assert newest == 70  # H2O holds the newest
    (layer,) = [make([Extent()], batch=2, policy=RandomTokens(keep=0.5))]
    extend(layer, 128)
    image(layer)
    for seed in range(70):
        before = image(layer)
        step(layer, seed=seed)
        assert layer.exact_pool.pages_in_use == 4
        ownership([layer])
        for row, (old, new) in enumerate(zip(before.values(), image(layer).values())):
            check_stays(layer, row, old, new)


def check_stays(layer: LayerCache, row: int, old: list[Any], new: list[Any]) -> None:
    """The tokens of a row that are still held are those that they were, wherever they stand."""
    was, now = (dict(zip(x[POSITIONS], zip(x[KEYS], x[KEYS + 1]))) for x in (old, new))
    newest = layer.groups[0].held.seen - 1  # type: ignore[union-attr]
    assert len(now) == 64 and set(now) - set(was) <= {newest}
    assert all(now[position] == was[position] for position in set(now) & set(was))


KEYS, POSITIONS = 5, 7
"""Where these stand in the image of a row of exact tokens that a policy has chosen."""


@pytest.mark.parametrize("build", [h2o_forked, d2o, h2o])
def test_tokens_that_take_the_places_of_others_are_written_again_after_a_failure(
    build: Callable[[], list[LayerCache]],
) -> None:
    """Nobody has looked at them yet, and the first one who does comes upon the failure."""
    wanted = build()[-1]
    step(wanted, 3)
    points = 0
    for at in range(1, 20):
        layers = build()
        step(layers[-1], 3)
        before = [image(layer) for layer in layers[:-1]]
        assert layers[-1].bank.pending
        try:
            with Faults(at):
                assert layers[-1].groups
        except Fault:
            points += 1
            assert layers[-1].bank.pending
        assert image(layers[-1]) == image(wanted)
        assert [image(layer) for layer in layers[:-1]] == before
        assert not layers[-1].bank.pending
    assert points >= 2


# -- taking back ------------------------------------------------------------------------------------------


def test_crop_takes_the_newest_tokens_back() -> None:
    layer = make([Extent()], batch=2)
    keys, _ = extend(layer, [100, 40])
    layer.crop(50)
    assert layer.lengths().tolist() == [50, 0]
    more, _ = extend(layer, 5, seed=1)
    for group in layer.groups:
        (row,) = group.rows.tolist()
        kept = keys[row : row + 1, :50] if row == 0 else keys[:1, :0]
        assert torch.equal(exact(layer, group), torch.cat([kept, more[row : row + 1]], 1))
    layer.crop(10**6)
    assert layer.lengths().tolist() == [0, 0] and layer.exact_pool.pages_in_use == 0


@pytest.mark.parametrize("count", [1, 32, 33, 40, 72, 73, 100, 170, 199, 200])
def test_crop_into_packed_groups(count: int) -> None:
    layer = make([Extent()], kivi(8))
    keys, _ = extend(layer, 200)
    (group,) = layer.groups
    was = packed(layer, group)
    twin = layer.fork()
    before = image(twin)
    layer.crop(count)
    (group,) = layer.groups
    left = 200 - count
    assert group.bounds.length == left
    stop = group.bounds.packed_stop
    assert stop == min(160, left // 32 * 32)
    if stop:
        assert all(torch.equal(x, y[:, :stop]) for x, y in zip(packed(layer, group), was))
    if left > stop:
        wanted = keys[:, stop:left] if left > 160 else was[0][:, stop:left]
        assert torch.equal(exact(layer, group), wanted)
    assert image(twin) == before
    new, _ = extend(layer, 90, seed=1)
    (group,) = layer.groups
    assert torch.equal(exact(layer, group)[:, -32:], new[:, -32:])
    assert image(twin) == before


def test_crop_of_a_window() -> None:
    layer = make([Extent(), Extent(4, 64)])
    keys, _ = extend(layer, 300)
    before = image(layer)
    layer.check_crop(13)
    assert image(layer) == before
    with pytest.raises(CacheStateError, match="cannot take back 100 tokens: heads with a window of 64 tokens"):
        layer.crop(100)
    with pytest.raises(CacheStateError):
        layer.check_crop(100)
    assert image(layer) == before
    layer.crop(300 - 20)  # all that is left is in the sinks' page
    for group in layer.groups:
        assert torch.equal(exact(layer, group), keys[group.rows_tensor, :20])
    new, _ = extend(layer, 100, seed=1)
    window = layer.groups[1]
    assert torch.equal(exact(layer, window)[:, :32], torch.cat([keys[1:, :20], new[1:, :12]], 1))


def test_crop_that_does_not_fit_under_the_cap_changes_nothing() -> None:
    layer = make([Extent(), Extent(0, 300)], kivi(8, 64), residual=0, batch=2)
    extend(layer, 256)
    assert all(group.exact.shape[1] == 0 for group in layer.groups)
    budget = layer.pools.budget
    budget.trim()
    before = image(layer)
    budget.limit = budget.used + 7 * EXACT_PAGE
    with pytest.raises(CacheFullError):
        layer.crop(10)  # 54 tokens of each row come back to the exact tier: 8 pages
    assert image(layer) == before
    budget.limit += EXACT_PAGE
    layer.crop(10)
    assert layer.lengths().tolist() == [246, 246]


def test_start_again_after_free() -> None:
    layer = make([Extent()], kivi())
    extend(layer, 300)
    layer.free()
    assert layer.batch == 0 and layer.lengths().tolist() == []
    layer.start(2)
    keys, _ = extend(layer, 20)
    assert torch.equal(exact(layer, layer.groups[0]), keys)


# -- blocks -----------------------------------------------------------------------------------------------


def test_blocks_cover_a_table_in_order() -> None:
    rng = np.random.default_rng(0)
    assert _blocks(np.empty((3, 0), np.int64), 4) == []
    for _ in range(300):
        rows, columns = rng.integers(1, 4), rng.integers(1, 60)
        jumps = rng.random(columns) < rng.choice([0.02, 0.3, 0.9])
        ids = np.arange(columns) + 100 * np.cumsum(jumps) + 10_000 * np.arange(rows)[:, None]
        longest = int(rng.integers(1, 70))
        blocks = _blocks(ids, longest)
        assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])] and blocks[-1][1] == columns
        assert all(0 < last - first <= longest for first, last in blocks)
        runs = np.split(np.arange(columns), np.flatnonzero(jumps[1:]) + 1)
        for run in runs:
            if 8 <= len(run) <= longest:
                assert (run[0], run[-1] + 1) in blocks


@pytest.mark.parametrize("scattered", [False, True])
def test_blocks_read_what_the_tables_name(scattered: bool) -> None:
    layer = make([Extent()], kivi(), batch=2)
    if scattered:
        for i in range(60):
            extend(layer, [15, 10] if i % 3 else [3, 14], seed=i)
    else:
        extend(layer, 900)
    for group in layer.groups:
        table = layer.exact_pool.read("keys", group.exact.reshape(-1)).reshape(len(group.rows), -1, DIM)
        assert torch.equal(exact(layer, group), table[:, : exact(layer, group).shape[1]])
        whole = group.packed_fields(0, group.packed.shape[1])
        blocks = [group.read_packed(where) for _, _, where in group.packed_blocks(4096)]
        for name, x in whole.items():
            assert torch.equal(torch.cat([block[name] for block in blocks], 1), x)


def test_table_bytes() -> None:
    layer = make([Extent()], kivi(), batch=2)
    extend(layer, 300)  # 8 groups packed, in a page; 12 + 32 tokens exact, in two
    rows, columns = 2, 4  # tables have room to grow
    assert layer.bank.exact.table.shape == layer.bank.packed.table.shape == (rows, columns)
    assert layer.bank.nbytes == rows * (8 * (len(Bounds._fields) + 2 * columns + 2) + 4 + 1)
