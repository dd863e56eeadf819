"""MiniCache against its equations in plain torch, its bytes, and what it refuses."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conftest import build
from fivefold.calibrate.profile import Profile, config_hash, load_profile, save_profile, signature
from fivefold.engine import recording
from fivefold.engine.layer import attend
from fivefold.errors import CacheFullError, RecipeError
from fivefold.methods.layers.minicache import MiniCache, MiniCacheCodec, merged
from fivefold.recipe import Recipe, describe
from fivefold.store.spec import LayerSpec, Pools

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
T, GAMMA, PAGE = 0.6, 0.05, 128


def spec_of(layer: int, layers: int = 2, kv_heads: int = 2, dim: int = 64, dtype: Any = torch.float32) -> LayerSpec:
    return LayerSpec(layer, layers, kv_heads, 2 * kv_heads, dim, dtype, CPU)


def session_of(recipe: str, layers: int = 2, **changes: Any) -> Any:
    from fivefold.engine.build import build as make

    return make(Recipe.parse(recipe), [spec_of(layer, layers, **changes) for layer in range(layers)], Pools())


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(session: Any) -> list[torch.Tensor]:
    """Keys and values of all layers, as they are read."""
    groups = [group for store in session.stores.values() for group in store.groups]
    return [group.dense_part(side) for group in groups for side in (0, 1)]


# -- the paper's equations in plain torch, float64 ---------------------------------------------------------


def reference_merge(x: torch.Tensor, y: torch.Tensor, t: float = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations 2 and 3 for `[tokens, dim]`: both layers' restored vectors, and the distances."""
    x, y = x.double(), y.double()
    u, v = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    omega = torch.arccos((u * v).sum(1))
    e = (torch.sin((1 - t) * omega) / torch.sin(omega))[:, None] * u
    e = e + (torch.sin(t * omega) / torch.sin(omega))[:, None] * v
    return e * x.norm(dim=1, keepdim=True), e * y.norm(dim=1, keepdim=True), omega / math.pi


class Reference:
    """One KV head of one layer pair, token by token in lists: what was merged, and what waits."""

    def __init__(self, residual: int, gamma: float = GAMMA, t: float = T) -> None:
        self.residual, self.gamma, self.t = residual, gamma, t
        self.exact: list[list[torch.Tensor]] = [[], []]  # by side: [2 layers, dim] of each token
        self.packed: list[list[torch.Tensor]] = [[], []]
        self.low, self.high = [2.0, 2.0], [-1.0, -1.0]
        self.left: list[dict[int, int]] = [{}, {}]  # by side: places of a page that are taken

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """`[2 layers, tokens, dim]` each."""
        for side, x in enumerate((keys, values)):
            self.exact[side] += list(x.unbind(1))
        due = max(0, len(self.exact[0]) - self.residual) // 32 * 32
        if due:
            for side in range(2):
                group = torch.stack(self.exact[side][:due], 1)
                self.exact[side] = self.exact[side][due:]
                self.merge(side, group)

    def merge(self, side: int, group: torch.Tensor) -> None:
        one, two, distance = reference_merge(group[0], group[1], self.t)
        self.low[side] = min(self.low[side], float(distance.min()))
        self.high[side] = max(self.high[side], float(distance.max()))
        threshold = self.high[side] - self.gamma * (self.high[side] - self.low[side])
        first = len(self.packed[side])
        retained = set()
        for page in range(first // PAGE, (first + len(distance) - 1) // PAGE + 1):
            mine = [i for i in range(len(distance)) if (first + i) // PAGE == page and distance[i] > threshold]
            mine = sorted(mine, key=lambda i: -float(distance[i]))[: 2 - self.left[side].get(page, 0)]
            self.left[side][page] = self.left[side].get(page, 0) + len(mine)
            retained |= set(mine)
        for i in range(len(distance)):
            pair = group[:, i].double() if i in retained else torch.stack([one[i], two[i]])
            self.packed[side].append(pair)

    def all(self, side: int) -> torch.Tensor:
        """`[2 layers, tokens, dim]`."""
        return torch.stack([x.double() for x in self.packed[side] + self.exact[side]], 1)


def reference_attention(
    q: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor], own: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Causal attention of `[query_heads, tokens, dim]` over what is stored and the chunk, `[tokens, dim]` each."""
    keys, values = (torch.cat([a.double(), b.double()]) for a, b in zip(past, own))
    scores = q.double() @ keys.T * q.shape[-1] ** -0.5
    tokens = q.shape[1]
    later = torch.ones(tokens, len(keys), dtype=torch.bool).triu(len(keys) - tokens + 1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ values


def feed(
    session: Any, chunk: int, seed: int, alike: float = 0.0, rows: slice | list[int] = slice(None)
) -> dict[str, torch.Tensor]:
    """One forward of random tokens through all layers of a session, of some of 2 sequences; what went in and came out
    by layer."""
    session.begin()
    layers = len(session.stores)
    kv, q, dtype = (getattr(session.stores[0].spec, name) for name in ("kv_heads", "query_heads", "dtype"))
    x = noise(layers, 2, 2, kv, chunk, 64, seed=seed)  # layer, keys or values, batch
    if alike:
        x[1:] = alike * x[:1] + (1 - alike) * x[1:]
    x = x[:, :, rows].to(dtype)
    queries = noise(layers, 2, q, chunk, 64, seed=seed + 1)[:, rows].to(dtype)
    out = []
    for layer in range(layers):
        out.append(attend(session, layer, queries[layer], x[layer, 0], x[layer, 1], None, 64**-0.5))
    session.commit()
    return {"kv": x, "q": queries, "out": torch.stack(out)}


@pytest.mark.parametrize("alike", [0.0, 0.6])
@pytest.mark.parametrize("residual", [0, 32, 45])
def test_it_is_the_papers_equations(alike: float, residual: int) -> None:
    """Prompt, a chunk on top and steps: outputs of both layers are those of the plain reference."""
    session = session_of(f"minicache(start=0, residual={residual})")
    rows = [[Reference(residual) for _ in range(2)] for _ in range(2)]  # batch, KV head
    retained = 0
    for seed, chunk in enumerate([300, 75, *[1] * 70]):
        fed = feed(session, chunk, 10 * seed, alike)
        for b in range(2):
            for h in range(2):
                reference, new = rows[b][h], fed["kv"][:, :, b, h]
                held = [reference.all(side) if reference.exact[0] or reference.packed[0] else None for side in (0, 1)]
                for layer in range(2):
                    nothing = torch.zeros(0, 64)
                    past = tuple(nothing if x is None else x[layer] for x in held)
                    q = fed["q"][layer, b, 2 * h : 2 * h + 2]
                    expected = reference_attention(q, past, (new[layer, 0], new[layer, 1]))
                    got = fed["out"][layer, b, :, 2 * h : 2 * h + 2].transpose(0, 1)
                    assert (got - expected).abs().max() < 1e-5, (seed, layer)
                reference.take(new[:, 0], new[:, 1])
    for b in range(2):
        for h in range(2):
            retained += sum(sum(taken.values()) for taken in rows[b][h].left)
            for layer in range(2):
                store = session.stores[layer]
                (group,) = store.groups
                for side in range(2):
                    got = group.dense_part(side)[2 * b + h]
                    assert torch.allclose(got.double(), rows[b][h].all(side)[layer], atol=2e-5)
    assert retained > 0


@pytest.mark.parametrize("factor", [1.0, 0.01, 37.0, -2.0])
def test_layers_in_proportion_come_back(factor: float) -> None:
    """The second layer is a multiple of the first by a number for each token: nothing is lost. Where it is a negative
    one there is no arc, and the direction is the nearer layer's."""
    session = session_of("minicache(start=0, residual=0)")
    x = noise(2, 1, 2, 320, 64)  # keys or values, batch, head, tokens
    scale = factor * (0.5 + torch.rand(320, 1, generator=torch.Generator().manual_seed(5)))
    both = [x, scale * x]
    session.begin()
    for layer, (keys, values) in enumerate(both):
        attend(session, layer, noise(1, 4, 320, 64), keys, values, None, 0.125)
    session.commit()
    for layer, pair in enumerate(both):
        (group,) = session.stores[layer].groups
        assert group.bounds.packed_tokens == 320
        for side in range(2):
            got, want = group.dense_part(side), pair[side][0]
            relative = (got - want).norm(dim=-1) / want.norm(dim=-1)
            if factor > 0 or layer == 1:
                assert relative.max() < 1e-5
            else:  # turned round, but for the places for tokens that no arc joins
                turned = (relative - 2).abs() < 1e-4
                assert (turned | (relative < 1e-6)).all() and 0 < int((~turned).sum()) <= 2 * 3 * 2


def test_zeros_and_opposite_directions() -> None:
    x, y = noise(40, 64), noise(40, 64, seed=1)
    y[0], y[1] = -x[0], 0
    x[2] = 0
    x[3] = y[3] = 0
    y[4] = x[4] * (1 + 1e-7)
    direction, first, second, distance = merged(x, y, 0.6)
    assert direction.isfinite().all() and distance.isfinite().all()
    assert torch.allclose(direction[0] * second[0], y[0], atol=1e-5) and abs(float(distance[0]) - 1) < 1e-6
    assert torch.allclose(direction[1] * first[1], x[1], atol=1e-5) and second[1] == 0
    assert torch.allclose(direction[2] * second[2], y[2], atol=1e-5) and first[2] == 0
    assert (direction[3] * first[3] == 0).all()
    assert torch.allclose(direction[4] * first[4], x[4], atol=1e-6)
    assert torch.allclose(direction[5:].norm(dim=1), torch.ones(35), atol=1e-6)
    half = merged(x[:1], y[:1], 0.5)[0]
    assert torch.allclose(half.norm(dim=1), torch.ones(1), atol=1e-5)


def test_an_arc_is_turned_with_its_ends() -> None:
    """SLERP of rotated vectors is the rotated SLERP: keys may be merged behind RoPE."""
    turn = torch.linalg.qr(noise(64, 64).double())[0].float()
    x, y = noise(50, 64, seed=1), noise(50, 64, seed=2)
    assert torch.allclose(merged(x @ turn, y @ turn, 0.6)[0], merged(x, y, 0.6)[0] @ turn, atol=1e-5)


def test_more_tokens_than_places(tiny: Any) -> None:
    """gamma = 1 retains all that is farther than the nearest: of a page the two farthest, which come back exactly."""
    session = session_of("minicache(start=0, residual=0, gamma=1)")
    fed = feed(session, 160, 3)
    for layer in range(2):
        (group,) = session.stores[layer].groups
        fields = group.packed_fields(0, group.packed.shape[1])
        slots = fields["key_slots"]  # [rows, pages, places]
        assert slots.shape == (4, 2, 2) and (slots[:, 0] >= 0).all()
        distance = merged(fed["kv"][0, 0].flatten(0, 1), fed["kv"][1, 0].flatten(0, 1), T)[3]
        farthest = distance[:, :128].topk(2, 1).indices.sort(1).values
        assert torch.equal(slots[:, 0].long().sort(1).values, farthest)
        got, want = group.dense_part(0), fed["kv"][layer, 0].flatten(0, 1)
        at = farthest[:, :, None].expand(-1, -1, 64)
        assert torch.equal(got.gather(1, at), want.gather(1, at))
        away = (got - want).norm(dim=2) / want.norm(dim=2)
        assert int((away < 1e-3).sum()) == int((slots >= 0).sum())


# -- bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("packer", "inner"), [("", None), ("kivi(bits=4)", 1.25), ("kivi(bits=2)", 0.75)])
def test_bytes_are_as_the_docstring_says(dtype: Any, dim: int, packer: str, inner: float | None) -> None:
    recipe = Recipe.parse(f"minicache(start=0) + {packer}" if packer else "minicache(start=0)")
    spec = spec_of(0, dim=dim, dtype=dtype)
    base = None if recipe.packer is None else recipe.packer.codec(spec)
    codec = MiniCache(start=0).pair_codec(spec, (0, 1), base)
    shared, own = codec.layout.split()
    assert own is not None
    width, tokens = dtype.itemsize, codec.layout.tokens
    places, norm = -(-tokens // 64), 4 if dtype is torch.float32 else 2
    each = 2 * dim * width if inner is None else dim * inner
    formula = each / 2 + 2 * norm + 2 * places * dim * width / tokens + 4 * places / tokens / 2
    assert (shared.nbytes / 2 + own.nbytes) / tokens == formula
    if dim == 128 and width == 2:
        assert {None: 268 + 1 / 32, 1.25: 92 + 1 / 32}.get(inner, formula) == formula
    else:
        assert formula < 2 * dim * width


def test_memory_comes_back() -> None:
    """One page of directions for two layers: the pools hold what the formula says, and forks hold nothing more."""
    session = session_of("minicache(start=0, residual=0)", layers=4)
    feed(session, 1024, 0)
    session.tidy()
    shared, own = session.stores[0].packed_pools
    pages = 8 * 2 * 2 * 2  # of 128 tokens: batch, heads, pairs
    assert shared.pages_in_use == pages and own.pages_in_use == 2 * pages
    assert (session.stores[0].bank.packed.tables[0].reshape(4, 4, -1)[::2, :, :8] >= 0).all()
    tables = session.stores[0].bank.packed.tables
    assert (tables[0].reshape(4, 4, -1)[0, :, :8] == tables[0].reshape(4, 4, -1)[1, :, :8]).all()
    assert (shared.references(tables[0][:, :8]) == 2).all() and (own.references(tables[1][:, :8]) == 1).all()
    exact = session.stores[0].exact_pool
    assert exact.pages_in_use == 0 and exact.allocated_bytes == 0
    twin = session.fork()
    assert shared.pages_in_use == pages
    feed(twin, 32, 1)
    twin.free()
    session.free()
    assert all(pool.pages_in_use == 0 for pool in session.pools)


def test_compaction_moves_pages_that_two_layers_name() -> None:
    session = session_of("minicache(start=0, residual=0)")
    feed(session, 640, 0)
    feed(session, 64, 1)
    shared = session.stores[0].packed_pools[0]
    before = stored(session)
    twin = session.fork()
    session.select(torch.tensor([1]).numpy())
    twin.free()
    held = shared.total_pages
    session.sparse = True
    session.tidy()
    assert shared.total_pages < held
    after = stored(session)
    assert all(torch.equal(a[2:], b) for a, b in zip(before, after))
    table = session.stores[0].bank.packed.tables[0]
    assert (table[:2, :5] == table[2:, :5]).all()


# -- what a cache is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    session = session_of("minicache(start=0, residual=0, gamma=0)", dtype=dtype)
    kv = feed(session, 128, 0)["kv"]
    for layer in range(2):
        (group,) = session.stores[layer].groups
        for side in range(2):
            for row in range(4):
                x, y = kv[:, side].flatten(1, 2)[:, row]
                want = reference_merge(x, y)[layer]
                got = group.dense_part(side)[row].double()
                assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() < (
                    2**-7 if dtype is torch.bfloat16 else 2**-10
                )


@pytest.mark.parametrize(
    "packer", ["", " + kivi(bits=4, residual=32)", " + gear(bits=4)", " + kivi(bits=3, residual=0)"]
)
def test_single_tokens_and_windows(packer: str) -> None:
    """Tokens one by one are those that are decoded together, and a window has the last of them: its pages are given up
    by both layers."""
    recipe = f"minicache(start=0, gamma=0){packer}"
    whole, window = session_of(recipe), session_of(f"{recipe} + streaming(sink=0, recent=200)")
    for session in (whole, window):
        for seed, chunk in enumerate([180, *[40] * 12]):
            feed(session, chunk, seed)
    for a, b in zip(whole.stores.values(), window.stores.values()):
        (long,), (short,) = a.groups, b.groups
        stop = int(long.bounds.packed_stop)
        slots = torch.arange(0, stop, 7).expand(4, -1)
        dense = [long.dense_part(side) for side in (0, 1)]
        for got, want in zip(long.tokens(slots), dense):
            assert torch.allclose(got, want[:, ::7][:, : slots.shape[1]], atol=1e-5)
        if "gear" not in packer and "kivi" not in packer:  # those pack a token with others of its page
            for side in (0, 1):
                got = short.dense_part(side)
                assert torch.equal(got, dense[side][:, -got.shape[1] :])
        assert int(short.bounds.stored_tokens) < 200 + 32 + 256
    shared, own = window.stores[0].packed_pools
    assert 0 < own.pages_in_use == 2 * shared.pages_in_use
    window.free()
    assert shared.pages_in_use == own.pages_in_use == 0


@pytest.mark.parametrize("tokens", [1, 37, 100, 250])
def test_taking_back(tokens: int) -> None:
    """What is left is what was there, in both layers; what comes then is packed behind it."""
    session = session_of("minicache(start=0, residual=0)")
    feed(session, 300, 0)
    before = stored(session)
    recording.crop(session, tokens)
    assert all(torch.allclose(a[:, : 300 - tokens], b, atol=1e-6) for a, b in zip(before, stored(session)))
    before = stored(session)
    kv = feed(session, 80, 1)["kv"]
    for layer, store in session.stores.items():
        (group,) = store.groups
        left = (380 - tokens) % 32
        for side in (0, 1):
            new = group.dense_part(side)
            start = int(before[2 * layer + side].shape[1] // 32 * 32)
            assert torch.equal(new[:, :start], before[2 * layer + side][:, :start])
            assert torch.equal(new[:, -left:], kv[layer, side].flatten(0, 1)[:, -left:])
        assert group.bounds.packed_tokens == (380 - tokens) // 32 * 32
    table = session.stores[0].bank.packed.tables[0]
    columns = -(-int(group.bounds.packed_tokens) // 128)
    assert torch.equal(torch.from_numpy(table[:4, :columns]), torch.from_numpy(table[4:, :columns]))


def test_beams_part() -> None:
    """Sequences that were one share pages until they differ; each then holds what it holds alone."""
    session = session_of("minicache(start=0, residual=0)")
    feed(session, 200, 0)
    alone = []
    for row in (0, 1):
        twin = session.fork()
        twin.select(torch.tensor([1]).numpy())
        feed(twin, 90, 5, rows=[row])
        alone.append(stored(twin))
        twin.free()
    session.select(torch.tensor([1, 1]).numpy())
    feed(session, 90, 5)
    for number, x in enumerate(stored(session)):
        assert torch.equal(x, torch.cat([one[number] for one in alone]))
    session.free()
    assert all(pool.pages_in_use == 0 for pool in session.pools)


def test_the_planner_rehearses_pairs() -> None:
    """A cache is planned whole, and half of the directions are there: bytes of pages follow the formula."""
    from fivefold.plan.machine import find_machine
    from fivefold.plan.read import read_model
    from fivefold.plan.room import Place, cache_bytes, most_users

    place = Place(read_model("llama-3-8b"), find_machine("h100"))
    sizes = {
        recipe: cache_bytes(Recipe.parse(recipe), place, 8192, 2)
        for recipe in ("full()", "minicache()", "kivi(bits=4)", "minicache() + kivi(bits=4)")
    }
    full = sizes["full()"]
    assert sizes["minicache()"] / full == pytest.approx(
        0.5 + 0.5 * 268 / 512, abs=0.04
    )  # a pool may grow by a sixteenth
    assert sizes["minicache() + kivi(bits=4)"] / full == pytest.approx(0.5 * 160 / 512 + 0.5 * 92 / 512, abs=0.02)
    assert most_users(Recipe.parse("minicache() + kivi(bits=4)"), place, 8192) > most_users(
        Recipe.parse("kivi(bits=4)"), place, 8192
    )


def test_steps_of_pairs_say_why_no_kernel_runs(tiny: Any) -> None:
    model = tiny("llama", num_hidden_layers=4)
    cache = fivefold.compress(model, "minicache(start=2) + kivi(bits=4)")
    ids = torch.randint(1, 131, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    why = cache.session.why_not_fused()
    assert why[2] == why[3] and why[2] is not None
    assert why[0] == why[1] and (why[0] is None or why[0] != "no kernel reads this codec's pages")


# -- models -----------------------------------------------------------------------------------------------


def test_with_kivi_directions_are_packed(tiny: Any) -> None:
    """Eight bits of a direction are near all of it, and the scores of codes are those of what is decoded."""
    outs = {}
    for recipe in ("minicache(start=0, residual=0)", "minicache(start=0, residual=0) + kivi(bits=8, residual=0)"):
        session = session_of(recipe)
        fed = [feed(session, chunk, seed) for seed, chunk in enumerate([256, 40, 1, 1])]
        outs[recipe] = torch.cat([one["out"].flatten() for one in fed])
        for store in session.stores.values():
            (group,) = store.groups
            fields, codec = group.packed_fields(0, group.packed.shape[1]), group.codec(0, group.packed.shape[1])
            assert isinstance(codec, MiniCacheCodec)
            queries = noise(4, 2, 64, seed=9)
            weights = noise(4, 2, fields["key_norms"].shape[1] * codec.layout.tokens, seed=8).softmax(-1)
            plain = super(MiniCacheCodec, codec)
            assert torch.allclose(codec.scores(queries, fields), plain.scores(queries, fields), atol=1e-4)
            assert torch.allclose(codec.output(weights, fields), plain.output(weights, fields), atol=1e-5)
    one, two = outs.values()
    assert 0 < (one - two).abs().max() < 0.05


@pytest.mark.parametrize("recipe", ["minicache(start=0)", "minicache(start=0) + kivi(bits=4, residual=32)"])
def test_what_is_due_waits_for_the_second_layer(tiny: Any, recipe: str) -> None:
    """A forward that fails between the two layers leaves both as they were."""
    session = session_of(recipe)
    feed(session, 200, 0)
    before = stored(session)
    session.begin()
    attend(session, 0, noise(2, 4, 100, 64), noise(2, 2, 100, 64), noise(2, 2, 100, 64), None, 0.125)
    assert len(session.stores[0].waiting) == 1 and session.stores[0].groups[0].bounds.length == 200
    session.rollback()
    assert not session.stores[0].waiting
    after = stored(session)
    assert all(map(torch.equal, before, after))
    feed(session, 100, 1)
    assert {int(group.bounds.packed_stop) for store in session.stores.values() for group in store.groups} == {256}


def test_a_cap_refuses_and_changes_nothing() -> None:
    session = session_of("minicache(start=0, residual=0)")
    feed(session, 96, 0)
    before = stored(session)
    session.pools.budget.limit = session.pools.budget.used + session.charged + 1000
    with pytest.raises(CacheFullError):
        feed(session, 3000, 1)
    session.rollback()
    after = stored(session)
    assert all(map(torch.equal, before, after))


def test_reading_in_chunks_knows_what_has_come(tiny: Any) -> None:
    """Distances are those of all that has been packed so far."""
    session = session_of("minicache(start=0, residual=0)")
    seen = []
    for seed, chunk in enumerate([64, 64, 96]):
        kv = feed(session, chunk, seed)["kv"]
        seen.append(merged(kv[0, 0].flatten(0, 1), kv[1, 0].flatten(0, 1), T)[3])
        distance = torch.cat(seen, 1)
        known = session.stores[0].learned["known"]
        assert torch.allclose(known[:, 0], 1 - distance.amin(1)) and torch.allclose(known[:, 1], distance.amax(1))
    assert not session.stores[1].learned
    twin = session.fork()
    feed(twin, 32, 9)
    assert torch.equal(session.stores[0].learned["known"], known)


# -- which layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "layers", "pairs"),
    [
        ("minicache()", 30, [(i, i + 1) for i in range(15, 29, 2)]),
        ("minicache()", 32, [(i, i + 1) for i in range(16, 32, 2)]),
        ("minicache(start=0)", 5, [(0, 1), (2, 3)]),
        ("minicache(start=1)", 5, [(1, 2), (3, 4)]),
        ("minicache(start=0.25)", 8, [(2, 3), (4, 5), (6, 7)]),
        ("minicache(pairs=[[28, 29]])", 30, [(28, 29)]),
        ("minicache(pairs=[[3, 4], [0, 1]])", 8, [(3, 4), (0, 1)]),
    ],
)
def test_pairs(recipe: str, layers: int, pairs: list[tuple[int, int]]) -> None:
    (method,) = Recipe.parse(recipe).methods
    assert isinstance(method, MiniCache)
    assert method.layer_pairs([spec_of(layer, layers) for layer in range(layers)]) == pairs


def test_layers_between_that_are_not_compressed_have_no_partner() -> None:
    (method,) = Recipe.parse("minicache(start=0)").methods
    assert isinstance(method, MiniCache)
    assert method.layer_pairs([spec_of(i, 8) for i in (0, 1, 3, 4, 5, 7)]) == [(0, 1), (4, 5)]
    with pytest.raises(RecipeError, match="no two adjacent"):
        method.layer_pairs([spec_of(i, 8) for i in (1, 3, 5, 7)])


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("minicache(pairs=[[1, 3]])", "write pairs"),
        ("minicache(pairs=[[0, 1], [1, 2]])", "twice"),
        ("minicache(pairs=[3])", "write pairs"),
        ("minicache(t=1.5)", "out of range"),
        ("minicache() + h2o()", "chooses tokens in each layer alone"),
        ("minicache() + mikv()", "chooses tokens in each layer alone"),
        ("minicache() + cskv()", "before RoPE"),
        ("minicache() + rotatekv()", "before RoPE"),
        ("minicache() + kivi(unbias=True)", "unbias"),
    ],
)
def test_what_is_refused(recipe: str, why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        Recipe.parse(recipe)


def test_what_a_model_is_refused(tiny: Any) -> None:
    model = tiny("llama", num_hidden_layers=2)
    for recipe, why in (
        ("minicache()", "no two adjacent layers"),
        ("minicache(pairs=[[1, 2]])", r"names the layers \[1, 2\]"),
        ("minicache(start=0) + duo(retrieval=[[0, 1], [1, 0]])", "hold different tokens"),
    ):
        with pytest.raises(RecipeError, match=why):
            fivefold.compress(model, recipe)
    fivefold.compress(model, "minicache(start=0) + duo(retrieval=[[0, 1], [1, 1]])")


def test_every_method_is_combined_or_refused_in_a_sentence() -> None:
    (row,) = [row for row in describe() if row["name"] == "minicache"]
    refused = {one["method"] for one in row["excludes"]}
    assert {"h2o", "snapkv", "keyformer", "d2o", "elastic", "random", "mikv", "cskv", "rotatekv"} <= refused
    assert not {"kivi", "gear", "streaming", "duo", "tidal"} & refused


# -- what it knows of a model ------------------------------------------------------------------------------


def profile_at(folder: Path, model: Any, cosine: float, pairs: int) -> Path:
    settings = {"pairs": [[i, i + 1] for i in range(pairs)]}
    tensors = {f"{side}_cosine": torch.full((pairs,), cosine) for side in ("key", "value")}
    known = signature(model.config), settings, tensors, config_hash(model.config)
    save_profile(folder, Profile("minicache", *known))
    return folder


def test_a_warning_where_layers_are_not_alike(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=2)
    low, high = (profile_at(tmp_path / name, model, x, 1) for name, x in (("low", 0.1), ("high", 0.9)))
    with pytest.warns(UserWarning, match="not alike in this model: keys have a mean cosine of 0.10"):
        fivefold.compress(model, f'minicache(start=0, profile="{low}")')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fivefold.compress(model, f'minicache(start=0, profile="{high}")')
        fivefold.compress(model, "minicache(start=0)")  # nothing is known of this model


def test_calibration_measures_cosines(tiny: Any, tmp_path: Path) -> None:
    from learned import learn

    model = tiny("llama", num_hidden_layers=3)
    folder = learn(model, "minicache(start=0)", tmp_path / "profile", chunks=2)
    profile = load_profile(folder, "minicache", signature(model.config))
    assert profile.settings["pairs"] == [[0, 1], [1, 2]]
    for name in ("key_cosine", "value_cosine"):
        cosines = profile.tensors[name]
        assert cosines.shape == (2,) and (cosines.abs() < 1).all() and cosines.abs().max() > 1e-4


def test_a_model_whose_layers_are_alike() -> None:
    """Two layers with the same projections of the same input: the learner says 1, and merging costs next to nothing."""
    model = build("llama", num_hidden_layers=2)
    one, two = model.model.layers
    with torch.no_grad():
        for name in ("k_proj", "v_proj"):
            getattr(two.self_attn, name).weight.copy_(getattr(one.self_attn, name).weight)
        two.input_layernorm.weight.copy_(one.input_layernorm.weight)
        one.self_attn.o_proj.weight.mul_(0.002)
        one.mlp.down_proj.weight.mul_(0.002)
    ids = torch.randint(1, 131, (1, 300), generator=torch.Generator().manual_seed(0))
    exact = fivefold.compress(model, "full()")
    cache = fivefold.compress(model, "minicache(start=0)")
    with torch.no_grad():
        logits = []
        for one_cache in (exact, cache):
            model(ids[:, :200], past_key_values=one_cache)
            logits.append(model(ids[:, 200:], past_key_values=one_cache).logits.log_softmax(-1))
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert 0 <= kl < 0.02
    assert cache.report().total < 0.75 * exact.report().total


@pytest.mark.model
@pytest.mark.slow
def test_the_embedded_models_layers_are_not_alike() -> None:
    """What the shipped profile warns of is so: seven pairs cost more than a nat, the last one little."""
    from fivefold.evaluate.demo import make_task
    from fivefold.models import embedded

    model, tokenizer = embedded.load()
    task = make_task(tokenizer, 512, 0)
    with torch.inference_mode():
        logits = {}
        for recipe in ("full()", "minicache()", "minicache(pairs=[[28, 29]])"):
            if recipe == "full()":
                cache = fivefold.compress(model, recipe)
            else:
                with pytest.warns(UserWarning, match="not alike in this model"):
                    cache = fivefold.compress(model, recipe)
            model(task.prefix, past_key_values=cache, logits_to_keep=1)
            logits[recipe] = model(task.continuation, past_key_values=cache).logits[0].log_softmax(-1)
    exact = logits.pop("full()")
    kl = {recipe: float((exact.exp() * (exact - x)).sum(-1).mean()) for recipe, x in logits.items()}
    assert kl["minicache()"] > 0.5 and 0 < kl["minicache(pairs=[[28, 29]])"] < 0.1, kl
