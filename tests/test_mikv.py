"""MiKV: what stays precise and what is packed, the balance of channels, bytes, and life in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fivefold
from conftest import quick
from fivefold.errors import CacheStateError, RecipeError
from fivefold.methods.bits.mikv import BalancedCodec, MiKV, TokenCodec
from fivefold.store import Context
from policies import Run

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, PAGES, DIM = 3, 2, 64


def tokens(count: int, *shape: int, outlier: float = 20.0) -> torch.Tensor:
    """`[*shape, count, DIM]`, one channel much larger than the others."""
    x = torch.randn(*shape, count, DIM)
    x[..., 5] *= outlier
    return x


def bound(bits: int, balance: bool, queries: torch.Tensor, keys: torch.Tensor) -> Any:
    codec = (BalancedCodec if balance else TokenCodec)(bits, 32, DIM)
    learned = codec.learn(queries, keys, keys, keys)
    return codec.of(Context(tuple(range(ROWS)), ROWS, torch.arange(keys.shape[1])[None], learned)) if balance else codec


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("balance", [True, False])
def test_attention_on_codes_is_attention_on_what_they_decode_to(bits: int, balance: bool) -> None:
    torch.manual_seed(bits)
    count = PAGES * TokenCodec(bits, 32, DIM).layout.tokens
    keys, values = tokens(count, ROWS), torch.randn(ROWS, count, DIM)
    codec = bound(bits, balance, torch.randn(ROWS, 4, count, DIM), keys)
    fields = codec.encode(keys.view(ROWS * PAGES, -1, DIM), values.view(ROWS * PAGES, -1, DIM), 0, None)
    assert {name: (x.shape[1:], x.dtype) for name, x in fields.items()} == {
        part.name: (part.shape, part.dtype) for part in codec.layout.fields
    }
    decoded = [x.view(ROWS, count, DIM) for x in codec.decode(fields)]
    for got, wanted in zip(decoded, (keys, values)):
        assert (got - wanted).norm() / wanted.norm() < 2 / (2**bits - 1)
    by_row = {name: x.view(ROWS, PAGES, *x.shape[1:]) for name, x in fields.items()}
    queries = torch.randn(ROWS, 5, DIM)
    assert torch.allclose(codec.scores(queries, by_row), queries @ decoded[0].transpose(1, 2), atol=1e-3)
    weights = torch.rand(ROWS, 5, count)
    assert torch.allclose(codec.output(weights, by_row), weights @ decoded[1], atol=1e-3)


@pytest.mark.parametrize("balance", [True, False])
def test_pages_that_fill_up_are_those_encoded_at_once(balance: bool) -> None:
    torch.manual_seed(0)
    keys, values = tokens(128, ROWS), torch.randn(ROWS, 128, DIM)
    codec = bound(4, balance, torch.randn(ROWS, 4, 128, DIM), keys)
    whole = codec.encode(keys, values, 0, None)
    parts = codec.encode(keys[:, :64], values[:, :64], 0, None)
    parts = codec.encode(keys[:, 64:], values[:, 64:], 64, parts)
    for name, field in whole.items():
        assert torch.equal(parts[name], field), name


def test_balance_lowers_the_error_of_scores() -> None:
    """Where keys have outlier channels that queries do not: scores of two bits come nearer."""
    torch.manual_seed(0)
    keys, queries = tokens(512, ROWS, outlier=20), torch.randn(ROWS, 4, 512, DIM)
    queries[..., 5] /= 20
    exact = queries[:, 0] @ keys.transpose(1, 2)
    error = {}
    for balance in (True, False):
        codec = bound(2, balance, queries, keys)
        fields = codec.encode(keys.reshape(ROWS * 2, 256, DIM), keys.reshape(ROWS * 2, 256, DIM), 0, None)
        by_row = {name: x.view(ROWS, 2, *x.shape[1:]) for name, x in fields.items()}
        error[balance] = float((codec.scores(queries[:, 0], by_row) - exact).norm() / exact.norm())
    assert error[True] < 0.7 * error[False]


def test_a_channel_without_numbers_is_left_alone() -> None:
    keys, queries = torch.randn(ROWS, 8, DIM), torch.randn(ROWS, 2, 8, DIM)
    keys[:, :, 3] = 0
    queries[:, :, :, 7] = 0
    learned = BalancedCodec(2, 32, DIM).learn(queries, keys, keys, keys)["balance"]
    assert learned.isfinite().all() and (learned[:, [3, 7]] == 1).all() and (learned > 0).all()


def tiers(run: Run) -> dict[int, tuple[set[int], set[int]]]:
    """Positions that each row holds packed, and precisely."""
    out = {}
    for group in run.session.stores[0].groups:
        stop = group.bounds.packed_stop
        for row, positions in zip(group.rows.tolist(), group.held.positions.tolist()):
            out[row] = set(positions[:stop]), set(positions[stop:])
    return out


@pytest.mark.parametrize("chunks", [[300], [170, 130], [300, *[1] * 100]], ids=str)
@pytest.mark.parametrize("high", [16, 8])
def test_the_important_tokens_are_precise_and_none_is_lost(chunks: list[int], high: int) -> None:
    """After the prompt exactly H2O's choice is precise (a whole attention matrix says so), up to a group; later on
    everything is still there, the newest are precise, and nothing comes back."""
    torch.manual_seed(1)
    method, kv_heads, group = MiKV(important=0.25, low=4, high=high), 2, 2
    total = sum(chunks)
    q = torch.randn(1, 1, kv_heads * group, total, 32)
    k, v = torch.randn(2, 1, 1, kv_heads, total, 32).unbind(0)
    codec = BalancedCodec(4, 32, 32)
    run = Run(method, kv_heads, kv_heads * group, 32, codec=codec)
    start, packed = 0, [set[int]() for _ in range(kv_heads)]
    for chunk in chunks:
        run.take(
            *(x[:, :, :, start : start + chunk] for x in (q, k, v)),
            positions=torch.arange(start, start + chunk)[None],
            inputs=torch.randn(1, chunk, 8),
        )
        start += chunk
        budget, found = round(0.25 * start), tiers(run)
        for row, (low, precise) in found.items():
            assert low | precise == set(range(start)) and not low & precise
            assert budget <= len(precise) < budget + 32
            assert set(range(start - budget // 2, start)) <= precise
            assert packed[row] <= low
            packed[row] = low
        if start == 300 and chunk == 300:
            weights = q[0, 0].unflatten(0, (kv_heads, group))[:, :, :300] @ k[0, 0, :, None, :300].transpose(2, 3)
            weights = weights * 32**-0.5 + torch.full((300, 300), float("-inf")).triu(1)
            scores = weights.softmax(-1).sum((1, 2))
            for row, (low, precise) in found.items():
                order = scores[row].clone()
                order[300 - budget // 2 :] = float("inf")
                best = set(order.topk(budget).indices.tolist())
                assert best <= precise
                # What is precise beyond the budget is the rest of a group.
                assert len(precise - best) == (300 - budget) % 32 and low == set(range(300)) - precise
    run.session.banks[0].flush()
    for one in run.session.stores[0].groups:  # what stands in a slot is the token that is said to
        stop, positions = int(one.bounds.packed_stop), one.held.positions.long()
        for x, mine in zip((k, v), one.dense()):
            far = (mine - x[0, 0, one.rows].gather(1, positions[..., None].expand_as(mine))).abs()
            assert far[:, stop:].max() < (1e-6 if high == 16 else 0.03) and far[:, :stop].max() < 0.5


def generate(model: Any, ids: torch.Tensor, cache: Any, new: int = 60, **settings: Any) -> torch.Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **settings)


def prompt(length: int = 300, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 131, (batch, length), generator=torch.Generator().manual_seed(5))


def test_everything_important_is_exact(tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt()
    exact = generate(model, ids, fivefold.compress(model, "full()"))
    assert torch.equal(generate(model, ids, fivefold.compress(model, "mikv(important=1.0)")), exact)


@pytest.mark.parametrize("high", [16, 8])
@pytest.mark.parametrize("low", [2, 3, 4])
def test_bytes_are_those_of_the_formula(tiny: Callable[..., Any], high: int, low: int) -> None:
    model, ids = tiny(), prompt(1000)
    cache = fivefold.compress(model, f"mikv(important=0.2, low={low}, high={high})")
    generate(model, ids, cache, 40)
    report, spec = cache.report(), cache.session.stores[0].spec
    d, rows = spec.head_dim, 0
    packed = precise = pages = exact_pages = 0
    for store in cache.session.stores.values():
        for group in store.groups:
            rows += len(group.rows)
            packed += len(group.rows) * group.bounds.packed_stop
            precise += len(group.rows) * (group.bounds.length - group.bounds.packed_stop)
            pages += group.packed.size
            exact_pages += group.exact.size
    assert packed + precise == rows * 1039 and 208 * rows <= precise < (208 + 32) * rows
    planes = {2: 8, 3: 5, 4: 4}[low]
    low_token = 2 * d * 16 / (8 * planes) + 8 * d / min(32, d)
    high_token = 2 * d * 4 if high == 16 else 2 * d + 8
    formula = packed * low_token + precise * high_token
    held = report.exact + report.codes + report.scales
    assert formula <= held + report.slack and abs(held - formula) <= 0.01 * formula
    whole = pages * planes * 32 * low_token + exact_pages * 32 * high_token
    assert report.exact + report.codes + report.scales + report.slack >= whole
    assert report.statistics >= 8 * 1039 * rows


COMBINED = [
    "mikv(low=4)",
    "mikv(high=8, low=3)",
    "streaming(sink=4, recent=120) + mikv(high=8)",
    "streaming(sink=4, recent=120) + mikv(balance=False)",
    "duo(retrieval=[[0, 1], [1, 0], [2, 1]], sink=4, recent=100) + mikv()",
    "mikv() + tidal(top=32, full_layers=0, select_layers=[0])",
    "mikv() + anchors(top=32, anchors=[0], recent=8)",
]


@pytest.mark.parametrize("recipe", quick(COMBINED, 3))
def test_combinations_generate_the_same_again_and_in_batches(recipe: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt(300, batch=2)
    cache = fivefold.compress(model, recipe)
    out = generate(model, ids, cache)
    assert out.shape == (2, 360) and cache.report().ratio < 0.75
    assert torch.equal(generate(model, ids, fivefold.compress(model, recipe)), out)
    # Alone, and behind padding, as in the batch.
    alone = generate(model, ids[1:], fivefold.compress(model, recipe))
    assert torch.equal(alone, out[1:])
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.int64), ids[:1, 7:]], 1)
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    with torch.inference_mode():
        both = fivefold.compress(model, recipe)
        batch = torch.cat([padded, ids[1:]])
        positions = torch.cat([(mask.cumsum(1) - 1).clamp(min=0), torch.arange(300)[None]])
        masks = torch.cat([mask, torch.ones_like(mask)])
        got = model(batch, attention_mask=masks, position_ids=positions, past_key_values=both).logits[:, -1]
        want = model(ids[:1, 7:], past_key_values=fivefold.compress(model, recipe)).logits[0, -1]
    assert torch.allclose(got[0], want, atol=1e-4)


def test_forks_and_beams(tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt()
    recipe = "mikv(high=8, low=4)"
    with torch.inference_mode():
        first = fivefold.compress(model, recipe)
        model(ids, past_key_values=first)
        second = first.fork()
        tails = [prompt(50), prompt(51)[:, 1:]]
        outs = []
        for tail, cache in zip(tails, (first, second)):
            outs.append([model(tail[:, i : i + 1], past_key_values=cache).logits for i in range(50)])
        for tail, out in zip(tails, outs):
            alone = fivefold.compress(model, recipe)
            model(ids, past_key_values=alone)
            for i in range(50):
                assert torch.allclose(model(tail[:, i : i + 1], past_key_values=alone).logits, out[i], atol=1e-4)
    beams = generate(model, ids, fivefold.compress(model, recipe), 12, num_beams=3)
    assert beams.shape == (1, 312)


def test_what_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny()
    with pytest.raises(RecipeError, match="both choose tokens by their attention"):
        fivefold.compress(model, "h2o() + mikv()")
    with pytest.raises(RecipeError, match="important"):
        fivefold.compress(model, "mikv(important=0)")
    cache = fivefold.compress(model, "mikv()")
    generate(model, prompt(), cache, 5)
    with pytest.raises(CacheStateError, match="cannot take back 2 tokens"):
        cache.crop(-2)
    with pytest.raises(CacheStateError, match="cannot take tokens back"):
        generate(model, prompt(), fivefold.compress(model, "mikv()"), 5, prompt_lookup_num_tokens=3)


def test_a_cap_that_is_reached_changes_nothing(tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt(900)
    with torch.inference_mode():
        needed = fivefold.compress(model, "mikv()")
        model(ids[:, :300], past_key_values=needed)
        limit = int(sum(pool.allocated_bytes for pool in needed.session.pools) * 1.3)
        cache = fivefold.compress(model, "mikv()", max_bytes=limit)
        model(ids[:, :300], past_key_values=cache)
        before = [c.held.positions.clone() for s in cache.session.stores.values() for c in s.groups]
        with pytest.raises(fivefold.errors.CacheFullError):
            model(ids[:, 300:], past_key_values=cache)
        after = [c.held.positions for s in cache.session.stores.values() for c in s.groups]
        assert all(torch.equal(a, b) for a, b in zip(before, after))
        model(ids[:, 300:301], past_key_values=cache)
