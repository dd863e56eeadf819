"""RazorAttention: windows of the text, what leaves them, the compensation token, and which heads retrieve."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fivefold
from conftest import DEVICES, KERNELS, quick
from fivefold import Recipe
from fivefold.attention.decode import attend_step
from fivefold.attention.prefill import attend_chunk
from fivefold.calibrate.learner import Subject
from fivefold.calibrate.profile import Profile, config_hash, save_profile, signature
from fivefold.calibrate.reading import Reading
from fivefold.errors import CacheStateError, InputError, ProfileError, RecipeError
from fivefold.evaluate.tasks import holds, tasks
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.methods.heads.razor_attention import RazorAttention, attention_to_copies
from fivefold.models.graph import Step
from fivefold.models.huggingface import make_cache
from fivefold.store import Extent, LayerSpec
from fivefold.store.compensation import MEANS
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import PAGE, Bounds, Packing, upgraded
from fivefold.store.spec import Pools
from recipes import SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SMOLLM2 = "llama-l30-q9-kv3-d64-v49152"


def profile_of(model: Any, folder: Path, whole: list[tuple[int, int]]) -> str:
    """A profile in which these query heads have the highest scores, half of them for induction."""
    config = model.config
    shape = config.num_hidden_layers, config.num_attention_heads
    scores = {"echo": torch.zeros(shape), "induction": torch.zeros(shape)}
    for layer, head in whole:
        scores["induction"][layer, head] = 1
    settings = {"layers": list(range(shape[0]))}
    save_profile(folder, Profile("razor", signature(config), settings, scores, config_hash(config)))
    return str(folder)


# -- windows of the text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [None, Packing(32, 32, 128), Packing(64, 0, 64), Packing(128, 100, 128)], ids=str)
@pytest.mark.parametrize(
    "extent",
    [
        Extent(4, 100, share=0.0), Extent(0, 1, share=0.2), Extent(4, 64, share=0.2, compensate=True),
        Extent(40, 10, share=0.7), Extent(4, 1, share=1.0), Extent(33, 200, share=0.05, compensate=True),
    ],
    ids=str,
)  # fmt: skip
def test_windows_of_the_text(extent: Extent, packing: Packing | None) -> None:
    """Tokens leave a page at a time, in order, and none that the window of a text that long wants has left."""
    rng = random.Random(f"{extent} {packing}")
    left, bounds, moved = 0, Bounds.empty(extent), 0
    assert bounds.extent == extent and extent.recent is not None and extent.share is not None
    for _ in range(400):
        length, revocable = int(bounds.length), rng.choice((0, 0, 16))
        if rng.random() < 0.2 and length:
            tokens = rng.randint(0, min(length - 1, 80))
            new = bounds.cropped(tokens, packing)
            n = length - tokens
            wanted = n + 1 - max(extent.recent, int(extent.share * (n + 1) + 1e-9))
            assert (new is None) == (left > max(bounds.pinned, wanted) and n > bounds.pinned)
            bounds = new or bounds
            left = 0 if new is not None and (n <= bounds.pinned or left > max(0, wanted)) else left
        else:
            bounds = bounds.appended(rng.choice((1, 1, 1, 31, 32, 33, rng.randint(1, 300))))
            seen = [(bounds.span().first, bounds.first_seen)]
            old, bounds = bounds, bounds.advanced(packing, revocable)
            assert seen[0][1] == old.left == left
            n = int(bounds.length) - revocable + 1
            wanted = n - max(extent.recent, int(extent.share * n + 1e-9))
            moved += max(left, wanted // PAGE * PAGE) > left
            left = max(left, wanted // PAGE * PAGE)
            if not revocable:
                later = bounds.appended(max(0, int(min(bounds.idle(packing), 500)) - 1))
                assert later.advanced(packing) == later
        assert bounds.left == left
        assert bounds.compensated == (max(0, left - extent.sink) if extent.compensate else 0)
        held = set(range(int(bounds.pinned_tokens))) | set(range(int(bounds.exact_base), int(bounds.length)))
        held |= set(range(int(bounds.packed_base), int(bounds.packed_stop)))
        assert held >= {*range(left, int(bounds.length)), *range(min(extent.sink, int(bounds.length)))}
        page = PAGE if packing is None else packing.page
        pinned = extent.pinned * PAGE
        assert all(p > left - page for p in held if p >= pinned)  # pages of what has left are given back
    assert moved or extent.share == 1


def test_windows_of_the_text_cannot_be_cut() -> None:
    one = Extent(4, 100, share=0.2)
    assert one.intersect(Extent()) == one == Extent().intersect(one) == one.intersect(one)
    with pytest.raises(ValueError, match="cannot be cut"):
        one.intersect(Extent(4, 50))


def test_rows_saved_before_there_were_such_windows() -> None:
    bounds = Bounds.empty(Extent(4, 100)).appended(500).advanced(None)
    new = ("share", "compensates", "left")
    data = np.array([[x] for name, x in bounds._asdict().items() if name not in new])
    assert Bounds(*upgraded(data)[:, 0].tolist()) == bounds
    assert upgraded(upgraded(data)) is not None and len(upgraded(upgraded(data))) == len(bounds)


# -- the whole method against plain sums ------------------------------------------------------------------


class Row:
    """One head of one sequence, in plain PyTorch: all of its tokens, those that have left averaged."""

    def __init__(self, extent: Extent, codec: KiviCodec | None, residual: int, dim: int) -> None:
        self.extent, self.codec, self.residual = extent, codec, residual
        self.keys, self.values = torch.zeros(0, dim), torch.zeros(0, dim)
        self.left = 0
        self.exact = 0 if extent.recent is None else -(-extent.sink // PAGE) * PAGE
        self.gone: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """queries `[heads, tokens, head_dim]`, keys and values `[tokens, head_dim]` of the chunk."""
        there = torch.arange(len(self.keys))
        stays = (there >= self.left) | (there < self.extent.sink)
        all_keys, all_values = torch.cat([self.keys[stays], keys]), torch.cat([self.values[stays], values])
        scores = queries @ all_keys.T * scaling
        later = torch.ones(len(keys), len(keys), dtype=torch.bool).triu(1)
        scores[:, :, int(stays.sum()) :].masked_fill_(later, float("-inf"))
        weights = scores.double().exp()
        out, total = weights @ all_values.double(), weights.sum(-1)
        if self.extent.compensate and self.gone:
            mean = [torch.cat(x).double().mean(0) for x in zip(*self.gone)]
            weight = sum(len(x) for x, _ in self.gone) * (queries.double() @ mean[0] * scaling).exp()
            out, total = out + weight[..., None] * mean[1], total + weight
        return (out / total[..., None]).float()

    def take(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values = torch.cat([self.keys, keys]), torch.cat([self.values, values])
        n = len(self.keys) + 1
        if self.extent.recent is not None and self.extent.share is not None:
            window = max(self.extent.recent, int(self.extent.share * n + 1e-9))
            left = max(self.left, (n - window) // PAGE * PAGE)
            leaves = slice(max(self.left, self.extent.sink), max(left, self.extent.sink))
            if leaves.stop > leaves.start:
                self.gone.append((self.keys[leaves].clone(), self.values[leaves].clone()))
            self.left, self.exact = left, max(self.exact, left)
        if self.codec is not None:
            group = self.codec.group
            while len(self.keys) - self.residual - self.exact >= group:
                some = slice(self.exact, self.exact + group)
                fields = self.codec.encode(self.keys[None, some], self.values[None, some], 0, None)
                for mine, x in zip((self.keys, self.values), self.codec.decode(fields)):
                    mine[some] = x[0, :group]
                self.exact += group


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("packed", [None, 4, 2])
@pytest.mark.parametrize(
    "extent", [(4, 64, 0.0), (0, 40, 0.3), (40, 1, 0.5), (4, 96, 0.2)], ids=lambda x: "-".join(map(str, x))
)
def test_attention_is_that_of_plain_sums(
    extent: tuple[int, int, float], packed: int | None, compensate: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks, sequences of other lengths, many steps; what leaves, leaves the exact tier or the packed."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", kernels)
    torch.manual_seed(0)
    rng, dim, heads, batch, scaling = random.Random(f"{extent} {packed}"), 64, 2, 2, 0.2
    sink, least, share = extent
    residual = 32 if packed == 4 else 96
    codec = None if packed is None else KiviCodec(packed, 32, 32, dim)
    extents = [Extent(sink, least, share=share, compensate=compensate), Extent()]
    spec = LayerSpec(0, 1, heads, 2 * heads, dim, torch.float32, CPU)
    layer = LayerCache(spec, Pools(), extents, codec, residual if codec else 0)
    layer.start(batch)
    rows = [Row(extents[row % heads], codec, residual, dim) for row in range(batch * heads)]
    offset = torch.randn(batch * heads, 1, dim)
    left = []
    for number in range(100):
        counts = [rng.randint(2, 150) for _ in range(batch)] if number % 40 < 3 else [1] * batch
        most = max(counts)
        keys, values = (torch.randn(batch * heads, most, dim) + offset for _ in range(2))
        queries = torch.randn(batch * heads, 2, most, dim)
        for group, count in layer.split_by(np.array(counts)):
            pick, new = group.rows_tensor, slice(most - count, most)
            q, k, v = queries[pick][:, :, new], keys[pick, new], values[pick, new]
            if count == 1:
                layer.append(group, k, v, advance=False)
                found = attend_step(group, q[:, :, 0], scaling)[0][:, :, None]
                layer.append(group, None, None)
            else:
                found, _ = attend_chunk(group, q, k, v, scaling)
                layer.append(group, k, v)
            for row, mine in enumerate(group.rows.tolist()):
                wanted = rows[mine].attend(q[row], k[row], v[row], scaling)
                torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=2e-4, msg=f"step {number}, row {mine}")
                rows[mine].take(k[row], v[row])
        left.append([int(x) for x in layer.bounds.left])
        assert left[-1] == [row.left for row in rows]
    assert left[-1][0] > left[3][0] > 0, "tokens leave in the prompt and while generating"
    assert (MEANS[0] in layer.learned) == compensate


def test_equal_tokens_lose_nothing() -> None:
    """Where all that has left is the same key and value, attention is that over everything."""
    torch.manual_seed(0)
    dim, count = 64, 400
    spec = LayerSpec(0, 1, 1, 3, dim, torch.float32, CPU)
    layer = LayerCache(spec, Pools(), [Extent(4, 40, share=0.1, compensate=True)])
    layer.start(1)
    keys, values = torch.randn(1, count, dim), torch.randn(1, count, dim)
    keys[:, 4 : count - 40], values[:, 4 : count - 40] = keys[:, 4:5], values[:, 4:5]
    for first, last in ((0, 150), (150, 151), (151, count - 1)):
        (group,) = layer.groups
        layer.append(group, keys[:, first:last], values[:, first:last])
    (group,) = layer.groups
    layer.append(group, keys[:, -1:], values[:, -1:], advance=False)
    (group,) = layer.groups
    queries = torch.randn(1, 3, dim)
    found, _ = attend_step(group, queries, 0.3)
    wanted = torch.softmax(queries @ keys.transpose(1, 2) * 0.3, -1) @ values
    assert group.bounds.compensated > 200 and group.bounds.stored_tokens < 150
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


# -- in a model -------------------------------------------------------------------------------------------


def logits(model: Any, cache: Any, ids: torch.Tensor, chunks: list[int]) -> torch.Tensor:
    out, first = [], 0
    with torch.inference_mode():
        for count in chunks:
            out.append(model(ids[:, first : first + count], past_key_values=cache).logits)
            first += count
    return torch.cat(out, 1)


def test_below_the_least_nothing_happens(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    ids = torch.randint(1, 131, (1, 300), generator=torch.Generator().manual_seed(0))
    recipe = f'razor(profile="{profile_of(model, tmp_path / "p", [(0, 0)])}")'
    chunks = [200, 60, *[1] * 40]
    cache, full = fivefold.compress(model, recipe), fivefold.compress(model, "full()")
    assert torch.equal(logits(model, cache, ids, chunks), logits(model, full, ids, chunks))
    assert cache.report().kept_tokens == 1 and cache.report().statistics == 0


def test_a_whole_prompt_is_read_exactly(tiny: Any, tmp_path: Path) -> None:
    """It is compressed after it was read."""
    model = tiny(**SHAPE)
    ids = torch.randint(1, 131, (1, 301), generator=torch.Generator().manual_seed(0))
    recipe = f'razor(least=40, share=0.1, profile="{profile_of(model, tmp_path / "p", [(0, 0)])}")'
    cache, full = fivefold.compress(model, recipe), fivefold.compress(model, "full()")
    found, wanted = (logits(model, x, ids, [300, 1]) for x in (cache, full))
    torch.testing.assert_close(found[:, :300], wanted[:, :300])
    assert not torch.allclose(found[:, 300], wanted[:, 300], atol=1e-3)
    assert cache.report().kept_tokens < 0.5


@pytest.mark.parametrize("family", quick(["llama", "qwen3", "gpt_neox"], 1))
@pytest.mark.parametrize("codec", ["", " + kivi(bits=4, residual=32)"])
def test_kernels_and_the_reference_agree(
    tiny: Any, tmp_path: Path, family: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of all layers at once by kernels, and layer by layer in plain PyTorch."""
    model = tiny(family)
    ids = torch.randint(1, 131, (2, 260), generator=torch.Generator().manual_seed(1))
    recipe = f'razor(least=40, share=0.1, profile="{profile_of(model, tmp_path / "p", [(0, 0)])}")' + codec
    found = []
    for kernels in ("auto", "reference"):
        monkeypatch.setenv("FIVEFOLD_KERNELS", kernels)
        cache = fivefold.compress(model, recipe)
        found.append(logits(model, cache, ids, [150, *[1] * 110]))
        assert bool(cache.session.stepping) == (kernels == "auto")
    torch.testing.assert_close(found[0], found[1], atol=2e-3, rtol=2e-3)


def test_report_counts_the_means(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    ids = torch.randint(1, 131, (2, 300), generator=torch.Generator().manual_seed(0))
    recipe = f'razor(least=40, share=0.1, profile="{profile_of(model, tmp_path / "p", [(0, 0)])}")'
    cache = fivefold.compress(model, recipe)
    logits(model, cache, ids, [300])
    # Of two layers with two kv heads each, for two sequences: a mean key and a mean value.
    assert cache.report().statistics == 2 * 2 * 2 * (8 * 64)
    plain = fivefold.compress(model, recipe.replace("least", "compensate=False, least"))
    logits(model, plain, ids, [300])
    assert plain.report().statistics == 0 and plain.report().kept_tokens == cache.report().kept_tokens


def test_a_failed_forward_and_a_crop(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means come back to the bit; what has left cannot be shown again."""
    model = tiny(**SHAPE)
    ids = torch.randint(1, 131, (1, 600), generator=torch.Generator().manual_seed(0))
    recipe = f'razor(least=40, share=0.1, profile="{profile_of(model, tmp_path / "p", [(0, 0)])}")'
    cache = fivefold.compress(model, recipe)
    logits(model, cache, ids[:, :300], [300])
    stores = cache.session.stores.values()
    before = [{name: x.clone() for name, x in store.learned.items()} for store in stores]
    data = [np.stack(store.bounds) for store in stores]
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, cache, ids[:, 300:], [250])
    cache.session.rollback()
    monkeypatch.undo()
    for store, old, bounds in zip(cache.session.stores.values(), before, data):
        assert all(torch.equal(store.learned[name], x) for name, x in old.items()) and old
        assert np.array_equal(np.stack(store.bounds), bounds)
    with pytest.raises(CacheStateError, match="already given up"):
        cache.crop(150)
    twin = cache.fork()
    a, b = (logits(model, x, ids[:, 300:], [250, 1, 1]) for x in (cache, twin))
    assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_of_a_gpu(tiny: Any, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels run, and the compensation token is merged with what they return."""
    pytest.importorskip("triton", reason="needs Triton")
    model = copy.deepcopy(tiny(**SHAPE)).to(device)
    ids = torch.randint(1, 131, (1, 200), generator=torch.Generator().manual_seed(1)).to(device)
    recipe = f'razor(least=40, share=0.1, profile="{profile_of(model, tmp_path / "p", [(0, 0)])}")'
    found = []
    for kernels in (KERNELS, "reference"):
        monkeypatch.setenv("FIVEFOLD_KERNELS", kernels)
        cache = fivefold.compress(model, f"{recipe} + kivi(bits=4, residual=32)")
        found.append(logits(model, cache, ids[:, :153], [150, 1, 1, 1]))
        assert bool(cache.session.stepping) == (kernels != "reference")
        assert (Step.why_not(cache.session) is None) == (kernels != "reference")
    torch.testing.assert_close(found[0], found[1], atol=2e-2, rtol=2e-2)


def test_a_prompt_can_be_put_into_a_cache(tiny: Any, tmp_path: Path) -> None:
    """As `benchmarks/razor.py` does: what a whole cache holds of a prompt, compressed, is what reading it leaves."""
    model = tiny(**SHAPE)
    ids = torch.randint(1, 131, (1, 230), generator=torch.Generator().manual_seed(1))
    recipe = f'razor(least=40, share=0.1, profile="{profile_of(model, tmp_path / "p", [(0, 0)])}") + kivi(bits=4)'
    read, put, full = (fivefold.compress(model, x) for x in (recipe, recipe, "full()"))
    for cache in (read, full):
        logits(model, cache, ids, [200])

    def write(store: LayerCache) -> None:
        keys, values = full.session.stores[store.spec.layer].groups[0].dense()
        for group, _ in store.split_by(store.lengths() * 0 + 200):
            store.append(group, keys[group.rows_tensor], values[group.rows_tensor])

    put.session.put(1, 200, write)
    found, wanted = (logits(model, x, ids[:, 200:], [1] * 30) for x in (put, read))
    assert torch.equal(found, wanted)


def test_sliding_layers_stay_as_they_are(tiny: Any) -> None:
    spec = LayerSpec(0, 2, 2, 4, 64, torch.float32, CPU, window=24)
    assert RazorAttention().extents(spec) == [Extent()] * 2


@pytest.mark.parametrize(
    "other", quick(["kivi2", "h2o", "rotatekv", "tidal", "gear", "mikv", "cskv", "d2o", "mikv-high8"], 4)
)
def test_beside_other_methods(tiny: Any, tmp_path: Path, other: str) -> None:
    """The means are those of what heads held, as it was read from their pages, when it left."""
    model = tiny(**SHAPE)
    ids = torch.randint(1, 131, (2, 420), generator=torch.Generator().manual_seed(1))
    folder = profile_of(model, tmp_path / "p", [(0, 0), (1, 2)])
    cache = fivefold.compress(model, f'razor(least=70, share=0.1, profile="{folder}") + {written(other, model)}')
    stores = cache.session.stores
    logits(model, cache, ids, [150])
    before: list[Any] = []
    first, checked = 150, 0
    for count in (100, *[1] * 160):
        before = []
        for index, store in stores.items():
            for group in store.groups:
                if group.bounds.compensates:
                    means = [store.learned[name][group.rows_tensor] for name in MEANS]
                    before.append((index, group.rows, group.bounds, group.dense(), means))
        logits(model, cache, ids[:, first : first + count], [count])
        first += count
        for index, rows, bounds, (keys, values), means in before if count == 1 else ():
            stop = int(stores[index].bounds.left[rows[0]])
            if stop == bounds.left:
                continue
            positions = bounds.exact_positions(int(bounds.exact_pages))[: int(bounds.exact_tokens)]
            positions = np.concatenate([np.arange(bounds.packed_base, bounds.packed_stop), positions])
            leaves = torch.from_numpy((positions >= max(bounds.left, bounds.sink)) & (positions < stop))
            part = float(leaves.sum()) / (stop - bounds.sink)
            for name, old, x in zip(MEANS, means, (keys, values)):
                wanted = torch.lerp(old, x[:, leaves].mean(1), part)
                torch.testing.assert_close(stores[index].learned[name][rows], wanted, atol=1e-4, rtol=1e-4)
            checked += 1
    assert checked >= 4


# -- which heads retrieve ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt_neox"])
def test_scores_are_those_of_a_whole_matrix(tiny: Any, family: str) -> None:
    """The same sums in plain Python, over the attention matrix of the model itself."""
    model = tiny(family, max_position_embeddings=52)
    specs = [store.spec for store in make_cache(model, Recipe()).session.stores.values()]
    learner = RazorAttention().learner(specs)
    reading = Reading(learner, RazorAttention.captures, Subject(model, None, specs, [], 1 << 16, 3))
    try:
        assert reading.total == 1 and reading.pieces[0].shape == (1, 52)
        reading.step(0)
    finally:
        reading.close()
    settings, tensors = reading.finish(lambda done, total, what: None)
    assert settings["layers"] == [spec.layer for spec in specs] and settings["tokens"] == 13
    (ids,) = reading.pieces[0]
    assert len(set(ids[:13].tolist())) == 13 and ids.tolist() == ids[:13].tolist() * 4
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        found = model(ids[None], output_attentions=True, use_cache=False).attentions
    for layer, weights in enumerate(found):
        for head, matrix in enumerate(weights[0].tolist()):
            echo = induction = 0.0
            for query in range(13, 52):
                for earlier in range(query - 13, -1, -13):
                    echo += matrix[query][earlier] / 39
                    induction += matrix[query][earlier + 1] / 39
            assert tensors["echo"][layer, head] == pytest.approx(echo, abs=2e-5)
            assert tensors["induction"][layer, head] == pytest.approx(induction, abs=2e-5)


def test_fewer_tokens_may_be_read(tiny: Any) -> None:
    model = tiny(**SHAPE)
    learner = RazorAttention().learner([])
    for tokens, size in ((80, 20), (1 << 16, 1024)):
        (ids,) = learner.pieces(Subject(model, None, [], [], tokens, 0)) or ()
        assert ids.shape == (1, 4 * size)
    with pytest.raises(InputError, match="cannot hold 4 copies"):
        learner.pieces(Subject(model, None, [], [], 7, 0))


def test_scores_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(4, 80, 16), torch.randn(2, 80, 16)
    whole = attention_to_copies(queries, keys, 20)
    monkeypatch.setattr("fivefold.methods.heads.razor_attention._WEIGHTS", 1000)
    for x, y in zip(attention_to_copies(queries, keys, 20), whole):
        torch.testing.assert_close(x, y)


def test_the_rule(tmp_path: Path) -> None:
    """Shares of all query heads; a KV head is whole if one of its query heads retrieves."""
    spec = LayerSpec(1, 3, 2, 4, 64, torch.float32, CPU, model="tiny")
    induction, echo = torch.zeros(3, 4), torch.zeros(3, 4)
    induction[1, 3], induction[0, 0], echo[2, 1] = 0.9, 0.8, 0.7
    save_profile(tmp_path, Profile("razor", "tiny", {"layers": [0, 1, 2]}, {"echo": echo, "induction": induction}))
    razor = RazorAttention(induction=1 / 6, echo=1 / 12, profile=str(tmp_path))
    assert razor.retrieval_heads(spec) == {(1, 3), (0, 0), (2, 1)}
    other = Extent(4, 4000, share=0.2, compensate=True)
    assert razor.extents(spec) == [other, Extent()]
    nobody = RazorAttention(induction=0, echo=0, compensate=False, profile=str(tmp_path))
    assert nobody.extents(spec) == [Extent(4, 4000, share=0.2)] * 2


def test_the_rule_keeps_23_of_90_heads_of_smollm2() -> None:
    """From the profile that ships, whose first heads are those that another program found before."""
    kept, razor = 0, RazorAttention()
    for layer in range(30):
        spec = LayerSpec(layer, 30, 3, 9, 64, torch.float32, CPU, model=SMOLLM2)
        kept += sum(extent.recent is None for extent in razor.extents(spec))
    layers, echo, induction = razor.scores(spec)
    assert kept == 23 and layers == list(range(30))
    assert divmod(int(induction.argmax()), 9) == (18, 6)
    for scores, known in (
        (induction, {(18, 6), (17, 3), (18, 7), (23, 2)}),
        (echo, {(14, 3), (15, 6), (8, 0)}),
    ):
        first = scores.flatten().topk(4).indices.tolist()
        assert known <= {divmod(index, 9) for index in first}


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_heads_that_are_kept_find_the_passkey() -> None:
    """With windows of 100 tokens everywhere else; heads that the rule does not keep do not find it."""
    from fivefold.models import embedded

    embedded.fetch()
    model, tokenizer = embedded.load()
    sample = tasks()["passkey"]().make(tokenizer, 1024, random.Random(0))
    (question,) = sample.questions
    asked = tokenizer(question.text, add_special_tokens=False, return_tensors="pt").input_ids
    found = []
    for recipe in ("razor(least=100, share=0)", "razor(induction=0, echo=0, least=100, share=0)"):
        cache, said, token = fivefold.compress(model, recipe), [], asked
        with torch.inference_mode():
            model(torch.tensor([sample.prefix]), past_key_values=cache, logits_to_keep=1)
            for _ in range(8):
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                said.append(int(token))
        found.append(holds(tokenizer.decode(said), question.answer))
    assert found == [True, False]
    fivefold.restore(model)


# -- what it refuses --------------------------------------------------------------------------------------


def test_bad_parameters() -> None:
    for text in ("razor(share=1.5)", "razor(least=0)", "razor(sink=-1)", "razor(induction=2)"):
        with pytest.raises(RecipeError, match="out of range"):
            Recipe.parse(text)
    with pytest.raises(RecipeError, match="both give heads a window"):
        Recipe.parse("razor() + streaming()")
    with pytest.raises(RecipeError, match="both fill the slot"):
        Recipe.parse("razor() + duo()")
    spec = LayerSpec(0, 2, 2, 4, 64, torch.float32, CPU, model="unknown")
    with pytest.raises(ProfileError, match="fivefold calibrate"):
        RazorAttention().extents(spec)
