"""GEAR: its parts, attention on them, the numbers of the official code, bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import fivefold
from conftest import quick
from fivefold.errors import NonFiniteError, RecipeError
from fivefold.kernels.choice import choose
from fivefold.kernels.gear import add_scores, extra_output, reference
from fivefold.methods.bits.gear import Gear, GearCodec, low_rank, start
from fivefold.methods.method import Codec
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec, Pools

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: list[dict[str, Any]] = [
    {}, {"bits": 4}, {"base": "kcvt"}, {"bits": 4, "group": 32, "rank": 2}, {"rank": 0}, {"sparsity": 0.0},
    {"rank": 0, "sparsity": 0.0}, {"sparsity": 0.2, "group": 128}, {"sparsity": 0.012},
]  # fmt: skip


def spec(head_dim: int = 64) -> LayerSpec:
    return LayerSpec(0, 1, 2, 4, head_dim, torch.float32, torch.device("cpu"))


def pages(codec: GearCodec, count: int, head_dim: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with outlier channels and offsets, values with single outliers."""
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn((2, count, codec.layout.tokens, head_dim), generator=g)
    keys[..., [3, head_dim // 2, head_dim - 1]] *= 20
    keys += torch.randn(head_dim, generator=g)
    values[torch.rand(values.shape, generator=g) < 0.01] *= 15
    return keys, values


# -- what it is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS)
def test_the_parts_are_those_of_the_definition(options: dict[str, Any]) -> None:
    """Outliers exact, and the rest the base plus the projection of its error, in plain numpy."""
    codec = Gear(**options).codec(spec())
    keys, values = pages(codec, 2)
    fields = codec.encode(keys, values, 0, None)
    assert {name: (tuple(x.shape[1:]), x.dtype) for name, x in fields.items()} == {
        f.name: (f.shape, f.dtype) for f in codec.layout.fields
    }
    for x, found, count, axis, quantised in zip(
        (keys, values),
        codec.decode(fields),
        (codec.key_outliers, codec.value_outliers),
        (0, 1),
        codec.base.decode(fields),
    ):
        for page in range(2):
            whole, made, base = (y[page].double().numpy() for y in (x, found, quantised))
            order = np.argsort(whole, axis=axis, kind="stable")
            ends = np.zeros(whole.shape, dtype=bool)
            n = whole.shape[axis]
            both = [order.take(range(count), axis), order.take(range(n - count, n), axis)]
            np.put_along_axis(ends, np.concatenate(both, axis), True, axis)
            error = np.where(ends, 0, whole - base)
            # The low-rank part is a projection of the error onto its left factor.
            low = np.zeros_like(error)
            if codec.rank:
                side = ("key", "value")[axis]
                left = fields[f"{side}_left"][page].double().numpy() / 16
                assert np.abs(left.T @ left - np.eye(codec.rank)).max() < 2e-3
                low = left @ left.T @ error
                best = (np.linalg.svd(error, compute_uv=False)[codec.rank :] ** 2).sum()
                assert best <= ((error - low) ** 2).sum() <= 1.25 * best + 0.02 * (error**2).sum()
            assert np.abs(made - (np.where(ends, whole, base) + low)).max() <= 2e-3 * max(1, np.abs(whole).max())


def test_each_part_lowers_the_error() -> None:
    def error(**options: Any) -> list[float]:
        codec = Gear(bits=2, **options).codec(spec())
        given = pages(codec, 4)
        made = codec.decode(codec.encode(*given, 0, None))
        return [float((a - b).square().mean()) for a, b in zip(made, given)]

    plain, low, out, both = error(rank=0, sparsity=0), error(sparsity=0), error(rank=0), error()
    for p, one, two, b in zip(plain, low, out, both):
        assert b < one < p and b < two < p
    assert both[0] < 0.1 * plain[0]  # keys with outlier channels


def test_power_iteration_finds_what_is_there() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 128, 4) @ torch.randn(3, 4, 64)
    left, right = low_rank(x, start(64, 4))
    assert torch.allclose(left @ right.transpose(1, 2), x, atol=1e-4)
    assert torch.equal(start(64, 4), start(64, 4)) and start(64, 4).shape == (64, 4)
    for extreme in (torch.zeros(1, 128, 64), torch.full((1, 128, 64), 2e4), torch.full((1, 128, 64), 1e-30)):
        left, right = low_rank(extreme, start(64, 4))
        assert left.isfinite().all() and right.isfinite().all()


# -- encode, decode, attend -------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "bits": st.sampled_from([2, 4]), "rank": st.integers(0, 6), "base": st.sampled_from(["kivi", "kcvt"]),
            "sparsity": st.sampled_from([0.0, 0.004, 0.02, 0.1]), "group": st.sampled_from([32, 64, 128]),
        }
    ),
    head_dim=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    queries=st.integers(1, 5),
    scale=st.sampled_from([1e-6, 1.0, 200.0]),
    constant=st.booleans(),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_attention_on_the_parts_equals_attention_on_decoded_pages(
    options: dict[str, Any],
    head_dim: int,
    rows: int,
    columns: int,
    queries: int,
    scale: float,
    constant: bool,
    seed: int,
) -> None:
    codec = Gear(**options).codec(spec(head_dim))
    keys, values = (x * scale for x in pages(codec, rows * columns, head_dim, seed))
    if constant:
        keys[:, :, :4], values[:, :40] = 0.5, -3.0
    fields = codec.encode(keys, values, 0, None)
    decoded = codec.decode(fields)
    for made, x in zip(decoded, (keys, values)):
        assert made.dtype == torch.float32 and made.isfinite().all()
        assert (made - x).abs().max() <= 1.5 * (x.amax() - x.amin())
    g = torch.Generator().manual_seed(seed)
    some = {name: x.unflatten(0, (rows, columns)) for name, x in fields.items()}
    # Pages of a pool do not lie close together.
    spread = {name: torch.stack([x, torch.zeros_like(x)], 2)[:, :, 0] for name, x in some.items()}
    q = torch.randn((rows, queries, head_dim), generator=g)
    weights = torch.rand((rows, queries, columns * codec.layout.tokens), generator=g).softmax(-1)
    for part in (some, spread):
        for found, wanted in (
            (codec.scores(q, part), Codec.scores(codec, q, part)),
            (codec.output(weights, part), Codec.output(codec, weights, part)),
        ):
            assert found.dtype == torch.float32 and found.shape == wanted.shape
            assert (found - wanted).abs().max() <= 2e-5 * max(1e-3, wanted.abs().max().item()) * head_dim**0.5
    tokens = codec.layout.tokens
    at = torch.randint(0, rows * columns * tokens, (40,), generator=g)
    for one, whole in zip(codec.take(fields, at // tokens, at % tokens), decoded):
        assert (one - whole[at // tokens, at % tokens]).abs().max() <= 1e-5 * max(1e-6, whole.abs().max().item())


def test_attention_never_builds_the_low_rank_product(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = Gear().codec(spec())
    fields = {name: x[None] for name, x in codec.encode(*pages(codec, 4), 0, None).items()}
    monkeypatch.setattr(GearCodec, "decode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    largest = 0
    real = torch.matmul

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        out = real(a, b)
        largest = max(largest, out.numel())
        return out

    monkeypatch.setattr(torch, "matmul", watched)
    codec.scores(torch.randn(1, 3, 64), fields)
    codec.output(torch.rand(1, 3, 1024), fields)
    assert 0 < largest <= 3 * 1024  # a number for each query and token, and not one for each channel too


@pytest.mark.skipif(choose(torch.device("cpu")).path != "cpp", reason="no C++ compiler")
@pytest.mark.parametrize("options", [{}, {"bits": 4, "rank": 2}, {"rank": 0}, {"sparsity": 0.0}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_the_kernel_is_the_reference(options: dict[str, Any], head_dim: int) -> None:
    """Of pages that lie apart, in rows that lie apart, with weights of queries that lie apart."""
    codec = Gear(**options).codec(spec(head_dim))
    made = codec.encode(*pages(codec, 6, head_dim), 0, None)
    fields = {name: x.unflatten(0, (2, 3)).repeat_interleave(2, 1)[:, ::2] for name, x in made.items()}
    queries, tokens = torch.randn(2, 3, head_dim), 3 * codec.layout.tokens
    weights = torch.rand(2, 3, tokens + 7)[:, :, :tokens]
    extras = codec._extras("key", fields), codec._extras("value", fields)
    scores = torch.randn(2, 3, tokens)
    wanted = scores.clone()
    reference.add_scores(wanted, queries, extras[0])
    add_scores(scores, queries, extras[0])
    assert (scores - wanted).abs().max() < 1e-5 * wanted.abs().max()
    wanted = reference.extra_output(weights, extras[1], head_dim)
    assert (extra_output(weights, extras[1], head_dim) - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 33000.0, -65519.0])
@pytest.mark.parametrize("which", [0, 1])
def test_what_float16_cannot_hold_is_refused(number: float, which: int) -> None:
    codec = Gear().codec(spec())
    given = pages(codec, 1)
    given[which][0, 100, 7] = number
    with pytest.raises(NonFiniteError, match=r"to be packed reach"):
        codec.encode(*given, 0, None)
    # What was refused leaves no trace.
    given[which][0, 100, 7] = 32000.0
    given[1 - which][:, ::2] = -32000.0
    for x, made in zip(given, codec.decode(codec.encode(*given, 0, None))):
        assert made.isfinite().all() and (made - x).abs().max() < 22000


# -- the official code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_official_code_up_to_rounding(bits: int) -> None:
    """The official functions keep scales in float32 and round the sum to float16; ours are stored in float16, so that
    numbers in the middle between two codes may fall to the other side (see `test_kivi.py`)."""
    golden = load_file(Path(__file__).parent / "golden" / "gear.safetensors")
    codec = Gear(bits=bits).codec(spec())
    assert torch.equal(start(64, 4), golden[f"b{bits}.start"])
    keys, values = (golden[f"b{bits}.{side}"].float() for side in "kv")
    fields = codec.encode(keys, values, 0, None)
    found = codec.decode(fields)
    for side, name, x, made, base in zip("kv", ("key", "value"), (keys, values), found, codec.base.decode(fields)):
        golden_part = {n: golden[f"b{bits}.{side}.{n}"].float() for n in ("quantised", "left", "right")}
        # The outliers are the same ones, and as exact.
        official, step = golden_part["quantised"], fields[f"{name}_scale"].float()
        if side == "k":
            step = step.repeat_interleave(64, 1)
        else:
            step = step.transpose(2, 3).flatten(1, 2).repeat_interleave(64, 2)
        outliers = torch.zeros_like(x, dtype=torch.bool)
        along = outliers.transpose(1, 2) if side == "k" else outliers
        along.scatter_(2, fields[f"{name}_places"].long(), True)
        exact = torch.zeros_like(x)
        (exact.transpose(1, 2) if side == "k" else exact).scatter_(
            2, fields[f"{name}_places"].long(), fields[f"{name}_outliers"].float()
        )
        assert torch.equal(official[outliers], x[outliers])
        assert torch.allclose((base + exact)[outliers], x[outliers], rtol=1e-3, atol=1e-3)
        # Everything else has the same code, or lies in the middle of two.
        drift = (2**bits - 1) * 2**-11 * step + x.abs() * 2**-11
        off = (base - official).abs()[~outliers]
        assert (off > drift[~outliers]).float().mean() <= {2: 7e-4, 4: 2e-3}[bits]
        assert (off <= (step + drift)[~outliers]).all()
        # The low-rank part of the same error is the same, as far as float32 goes: the power iteration takes rounding to
        # the fifth power of singular values, so processors differ by up to 4e-4 of it. A loop more or less is 9e-3.
        error = x - golden_part["quantised"]
        left, right = low_rank(error, start(64, 4))
        product = golden_part["left"] @ golden_part["right"].transpose(1, 2)
        assert (left @ right.transpose(1, 2) - product).norm() <= 2e-3 * product.norm()
        # All of it together: apart by the few numbers with another code, each by a step, and as near to what was given.
        whole_official = golden_part["quantised"] + product
        assert (made - whole_official).norm() <= 0.16 * (whole_official - x).norm()
        assert (made - whole_official).abs().median() <= 0.04 * (whole_official - x).abs().median()
        assert (made - x).norm() <= 1.002 * (whole_official - x).norm()


# -- bytes and settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("options", SETTINGS)
def test_bytes_are_those_of_the_formula(options: dict[str, Any], head_dim: int) -> None:
    gear = Gear(**options)
    codec = gear.codec(spec(head_dim))
    tokens, group = {2: 256, 4: 128}[gear.bits], gear.group
    assert codec.layout.tokens == codec.group == tokens
    n_k, n_v = round(tokens * gear.sparsity / 2), round(head_dim * gear.sparsity / 2)
    scales = (
        4 * head_dim / tokens + 4 if gear.base == "kcvt" else 4 * head_dim / group + 4 * head_dim / min(group, head_dim)
    )
    each = {
        "codes": gear.bits * head_dim / 4,
        "scales": scales,
        "low rank": 4 * gear.rank * (1 + head_dim / tokens),
        "outliers": 6 * (n_k * head_dim / tokens + n_v),
    }
    assert codec.layout.bytes_by_kind() == {kind: tokens * size for kind, size in each.items() if size}
    layer = LayerCache(spec(head_dim), Pools(), [Extent()] * 2, codec, residual=0)
    layer.start(1)
    (group,) = layer.groups
    layer.append(group, *torch.randn(2, 2, 2 * tokens + 32, head_dim))
    assert layer.packed_pools[0].allocated_bytes == 2 * 2 * tokens * sum(each.values())
    assert layer.exact_pool.allocated_bytes == 2 * 32 * 2 * 4 * head_dim


def test_the_overhead_is_that_of_the_paper() -> None:
    """Over its base (KIVI, group 64, 2 bits), of a head_dim of 128 in float16: factors of rank 4 take 3.1% of a token,
    2% of outliers 4% with places of two bytes (table 1: 27.6% in all)."""

    def share(**options: Any) -> float:
        codec = Gear(bits=2, **options).codec(spec(128))
        return codec.layout.nbytes / codec.layout.tokens / (2 * 128 * 2)

    whole, base = share(), share(rank=0, sparsity=0)
    assert base == pytest.approx(0.15625) and share(sparsity=0) - base <= 0.048
    assert share(rank=0) - base <= 0.04 and whole <= 0.276


def test_settings_that_do_not_fit_are_refused() -> None:
    for bad in ({"bits": 3}, {"rank": -1}, {"sparsity": 0.6}, {"base": "flexgen"}, {"group": 16}, {"residual": -1}):
        with pytest.raises(RecipeError):
            Gear(**bad)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="multiple of 8"):
        Gear().codec(spec(100))
    assert Gear(base="kcvt").codec(spec(96)).layout.tokens == 256
    with pytest.raises(RecipeError, match="is more than the model's head_dim of 16"):
        Gear(rank=32).codec(spec(16))
    with pytest.raises(RecipeError, match="head_dim of 512"):
        Gear().codec(spec(512))


# -- in a model, with other methods -----------------------------------------------------------------------


def read(model: Any, recipe: str, tokens: int = 700, steps: int = 40, chunk: int = 350) -> Any:
    """A cache after a prompt in pieces and some steps."""
    ids = torch.randint(0, 131, (1, tokens), generator=torch.Generator().manual_seed(1))
    cache = fivefold.compress(model, recipe)
    with torch.inference_mode():
        for piece in ids.split(chunk, 1):
            logits = model(piece, past_key_values=cache).logits
        for _ in range(steps):
            logits = model(logits[:, -1:].argmax(-1), past_key_values=cache).logits
    assert logits.isfinite().all()
    return cache


PACKED = {"gear(bits=2)": (0, 256), "gear(bits=4, rank=2)": (0, 128), "kivi(key_bits=4, value_bits=2)": (128, 32),
          "kivi(bits=3, group=64)": (128, 64)}  # fmt: skip


@pytest.mark.parametrize("bits", PACKED)
@pytest.mark.parametrize(
    "other", ["", "streaming(sink=4, recent=200)", "duo(keep=0.5, retrieval=[[0, 0], [2, 1]], recent=300)"]
)
def test_with_windows_and_head_lists_in_the_bytes_that_the_parts_predict(
    tiny: Callable[..., Any], bits: str, other: str
) -> None:
    model = tiny()
    cache = read(model, f"{other} + {bits}" if other else bits)
    report, length = cache.report(), 740
    residual, group = PACKED[bits]
    per_token = page = 0.0
    exact = packed = 0
    for store in cache.session.stores.values():
        page = store.packing.page
        per_token = store.codec.layout.nbytes / page
        for head, extent in enumerate(store.extents):
            whole = extent.recent is None
            assert whole == (other == "" or (other.startswith("duo") and (store.spec.layer, head) in ((0, 0), (2, 1))))
            if whole:
                stop = (length - residual) // group * group
                exact, packed = exact + length - stop, packed + stop
            else:
                pinned = -(-extent.sink // 32) * 32
                # A window of whole pages, and no more waits in the exact tier than the residual and a group.
                held = next(c.bounds for c in store.groups if head in c.rows)
                assert extent.recent <= held.length - held.first_held < extent.recent + 32 + page
                assert held.length - held.exact_base < residual + group + 32
                exact += pinned + held.length - held.exact_base
                packed += held.packed_stop - held.packed_base
    assert report.exact == exact * 2 * 64 * 4
    stored = report.codes + report.scales + report.other
    assert stored == pytest.approx(packed * per_token, abs=3 * 6 * 8)
    # What is not filled is no more than a page of each tier and head; pools grow by a sixteenth.
    assert report.slack <= 6 * (page * per_token + 32 * 2 * 64 * 4)
    assert report.total == report.exact + stored + report.slack + report.free + report.tables
    assert report.tokens == length


@pytest.mark.parametrize("recipe", quick([
    "h2o(keep=0.6) + gear()", "snapkv(keep=0.7) + gear(bits=4)", "d2o(keep=0.8) + gear(bits=4)",
    "tidal(top=64) + gear()", "anchors(top=64, anchors=[0]) + gear(bits=4)",
    "tidal(top=64) + kivi(key_bits=4, value_bits=2)", "h2o(keep=0.6) + kivi(key_bits=2, value_bits=8)",
    "duo(keep=0.5, retrieval=[[0, 0]], recent=64) + h2o(keep=0.5) + gear(bits=4)",
], 3))  # fmt: skip
def test_with_methods_of_other_slots(tiny: Callable[..., Any], recipe: str) -> None:
    cache = read(tiny(), recipe, steps=150)
    report = cache.report()
    assert report.codes > 0 and report.total < report.exact_equivalent
    fork = cache.fork()
    cache.free()
    assert fork.report().codes == report.codes


@pytest.mark.slow
def test_what_is_generated_is_compressed_a_page_at_a_time(tiny: Callable[..., Any]) -> None:
    """A long generation: the low-rank part grows by a page's factors for each page and by nothing else."""
    model = tiny()
    cache = read(model, "gear(bits=4, rank=2)", tokens=100, steps=1)
    token, seen = torch.tensor([[1]]), []
    store = cache.session.stores[0]
    with torch.inference_mode():
        for _ in range(500):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            seen.append((store.groups[0].bounds.length, store.groups[0].bounds.packed_stop, cache.report().other))
    factors = store.codec.layout.bytes_by_kind()
    page = factors["low rank"] + factors["outliers"]
    for length, packed, other in seen:
        assert packed == length // 128 * 128 and other == 3 * 2 * (packed // 128) * page
    assert seen[-1][0] == 601 and seen[-1][1] == 512


def test_taking_tokens_back_from_a_page(tiny: Callable[..., Any]) -> None:
    model = tiny()
    cache = read(model, "gear(bits=4)", tokens=300, steps=0)
    before = cache.session.stores[0].groups[0].dense()
    cache.crop(-100)
    after = cache.session.stores[0].groups[0].dense()
    assert all(torch.equal(a, b[:, :200]) for a, b in zip(after, before))
    assert cache.session.stores[0].groups[0].bounds.packed_stop == 128


@pytest.mark.model
@pytest.mark.slow
def test_nearer_to_the_exact_model_than_its_base() -> None:
    from fivefold.evaluate.demo import make_task
    from fivefold.evaluate.fidelity import continued
    from fivefold.models import embedded

    embedded.fetch()
    model, tokenizer = embedded.load()
    task = make_task(tokenizer, 1024)
    logs = {}
    with torch.inference_mode():
        for recipe in ("full()", "kivi(bits=2, group=64, residual=0)", "gear(bits=2)"):
            cache = fivefold.compress(model, recipe)
            model(task.prefix, past_key_values=cache, logits_to_keep=1)
            logs[recipe] = continued(model, cache, task.continuation)
    fivefold.restore(model)
    exact, *others = logs.values()
    base, gear = (float((exact.exp() * (exact - x)).sum(-1).mean()) for x in others)
    assert gear < 0.75 * base
