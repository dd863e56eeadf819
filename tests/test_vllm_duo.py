"""`duo` with `kivi` in the vLLM plug-in, without vLLM: which heads, which blocks, and a layer of streaming heads on a
CPU, over blocks that are handed out as `windows.py` does it. What needs vLLM is in scripts/vllm_release.py."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from conftest import quick
from fivefold.errors import ProfileError, UnsupportedModelError
from fivefold.kernels.choice import choose
from fivefold.kernels.pack import pack_reference
from fivefold.kernels.packed_decode import Form, decode_page
from fivefold.recipe import Recipe
from fivefold.serving.vllm.options import Facts, Options
from fivefold.serving.vllm.streaming import StreamingCpuPath, StreamingPages, StreamingTables, split
from fivefold.serving.vllm.tables import NULL, Place, Prefill, Step
from fivefold.store.rows import Bounds, Extent, Packing

F32, BF16 = torch.float32, torch.bfloat16
EVEN = "duo(retrieval=[[0, 0], [1, 2]]) + kivi(bits=4)"
FACTS = Facts("a-model", 64, 6, 3, F32, layers=2)
SMOLLM2 = "duo-llama-l30-q9-kv3-d64-v49152"


# -- which heads --------------------------------------------------------------------------------------------------


def test_which_heads_are_retrieval_heads() -> None:
    options = Options.parse(EVEN)
    options.check(FACTS)
    assert options.retrieval(FACTS) == [(0,), (2,)] and options.duo.recent == 256


def test_even_takes_the_best_heads_of_each_layer() -> None:
    from fivefold.calibrate.profile import load_profile
    from fivefold.store import LayerSpec

    model = SMOLLM2.removeprefix("duo-")
    spec = LayerSpec(0, 30, 3, 9, 64, F32, torch.device("cpu"), model)
    scores = load_profile(SMOLLM2, "duo", model).tensors["scores"]
    for keep, count in ((0.34, 1), (0.5, 2), (1, 3), (0, 0)):
        method = Recipe.parse(f"duo(keep={keep}, even=True)").methods[0]
        heads = method.retrieval_heads(spec)
        for layer in range(30):
            mine = [head for at, head in heads if at == layer]
            others = [head for head in range(3) if head not in mine]
            assert len(mine) == count and all(scores[layer, a] >= scores[layer, b] for a in mine for b in others)
    uneven = Recipe.parse("duo(keep=0.34)").methods[0].retrieval_heads(spec)
    assert len({sum(at == layer for at, _ in uneven) for layer in range(30)}) > 1


@pytest.mark.parametrize(
    ("recipe", "changed", "said"),
    [
        (EVEN, {"cpu": False, "dtype": BF16}, "duo is served on a CPU only; leave duo out"),
        (EVEN, {"tensor": 2}, "heads are not split; leave --tensor-parallel-size 2 out"),
        (EVEN, {"transfers": True}, "a KV connector would bring the tokens of retrieval heads alone"),
        (EVEN, {"layers": 3}, "its layers have 0 to 1 retrieval heads among 3 KV heads"),
        ("duo(retrieval=[]) + kivi()", {}, "0 retrieval heads among 3 KV heads, and that is all or nothing; name as"),
        ("duo(retrieval=[[0, 0]]) + kivi()", {"kv_heads": 1, "layers": 1}, "one KV head, and duo would have to cut"),
    ],
)
def test_models_that_are_refused(recipe: str, changed: dict, said: str) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        Options.parse(recipe).check(replace(FACTS, **changed))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_profiles_that_are_refused() -> None:
    """Where layers have unequal numbers, the remedy that is named works."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        hidden_size=576,
    )  # fmt: skip
    facts = replace(FACTS, layers=30, query_heads=9, config=config)
    for recipe, said in (
        ("duo() + kivi()", "write duo(keep=0.5, even=True), which takes as many in each layer"),
        ("duo(keep=0.1, even=True) + kivi()", "write duo(keep=0.5, even=True), or another share that leaves 1 to 2"),
    ):
        recipe = recipe.replace("duo(", f'duo(retrieval="{SMOLLM2}", ').replace(", )", ")")
        with pytest.raises(UnsupportedModelError) as error:
            Options.parse(recipe).check(facts)
        assert said in str(error.value)
    remedy = Options.parse(f'duo(retrieval="{SMOLLM2}", keep=0.5, even=True) + kivi()')
    remedy.check(facts)
    assert {len(heads) for heads in remedy.retrieval(facts)} == {2}
    with pytest.raises(ProfileError, match="knows no retrieval heads of this model"):
        Options.parse("duo() + kivi()").check(replace(facts, layers=2, config=LlamaConfig(num_hidden_layers=2)))


# -- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("heads", [(1, 1), (1, 7), (7, 1), (3, 5), (4, 4)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_blocks_of_both_kinds_of_heads(bits: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """All fit into as many bytes as retrieval heads' packed pages fill, which are as few as that allows."""
    whole, windows = split(Options.parse(f"kivi(bits={bits})").pages(128, dtype), *heads, 64, 256)
    size, (retrieval, streaming) = retrieval_bytes(whole, heads), heads
    held = [
        retrieval * whole.exact_together * whole.exact_bytes,
        streaming * windows.together * windows.form.nbytes,
        streaming * windows.exact_together * windows.exact_bytes,
    ]
    assert min(whole.exact_together, windows.together, windows.exact_together) >= 1 and max(held) <= size
    most = max(retrieval * whole.exact_bytes, streaming * max(whole.exact_bytes, whole.form.nbytes))
    assert size - retrieval * whole.form.nbytes < most


def retrieval_bytes(whole, heads: tuple[int, int]) -> int:
    return heads[0] * whole.block_bytes


@pytest.mark.parametrize(("tokens", "least"), [(8192, 0.91), (32768, 0.96)])
@pytest.mark.parametrize("bits", [2, 4])
def test_capacity_in_theory(bits: int, tokens: int, least: float) -> None:
    """Half of the heads as retrieval heads: blocks against those of `kivi` alone, as the byte formula has it."""
    alone = Options.parse(f"kivi(bits={bits})").pages(128, BF16)
    whole, windows = split(alone, 4, 4, 64, 256)
    kivi, both = 8 * alone.bytes_of(tokens), 4 * (whole.bytes_of(tokens) + windows.bytes_of(tokens))
    blocks = alone.blocks_of(tokens) * 8 * alone.block_bytes
    mine = (whole.blocks_of(tokens) + windows.blocks_of(tokens)) * 4 * whole.block_bytes
    assert kivi / both > 1.7 and blocks / mine > least * kivi / both


@pytest.mark.parametrize("sink", [0, 4, 64])
@pytest.mark.parametrize(("recent", "residual"), [(256, 128), (256, 0), (100, 70), (40, 128), (20, 0), (129, 128)])
def test_what_is_held_is_what_a_session_holds(sink: int, recent: int, residual: int) -> None:
    """Token by token: what is seen packed and what exactly, by the store's own arithmetic."""
    random.seed(sink + recent)
    pages = windows_of(f"kivi(bits=4, residual={residual})", sink, recent)
    packing = Packing(32, residual, pages.form.tokens)
    for _ in range(20):
        bounds, known = Bounds.empty(Extent(sink, recent)), 0
        while known < 900:
            new = random.choice((1, 1, 1, 5, 31, 96, 400))
            span, length = bounds.appended(1).span(), known + 1  # the newest token, over what is held
            base, first = int(bounds.packed_base), int(span.packed_first)
            packed = range(base + first, base + int(span.packed_stop))
            mine = range(pages.packed_from(known), pages.packed(known))
            assert list(packed) == list(mine) or (not packed and not mine), (known, packed, mine)
            at = bounds.appended(1).exact_positions(int(bounds.appended(1).exact_pages))[: int(span.stop)].tolist()
            exact = {at[i] for i in range(len(at)) if i < span.sinks or i >= span.first}
            held = {*range(min(length, pages.pinned)), *range(pages.exact_from(known), length)}
            seen = {p for p in held if p < sink or p > known - recent}
            assert exact == seen, (known, exact ^ seen)
            bounds, known = bounds.appended(new).advanced(packing), known + new


def windows_of(text: str, sink: int, recent: int, dim: int = 64, dtype: torch.dtype = F32) -> StreamingPages:
    return split(Options.parse(text).pages(dim, dtype), 1, 2, sink, recent)[1]


# -- a layer on a CPU ---------------------------------------------------------------------------------------------


@dataclass
class Request:
    keys: torch.Tensor
    values: torch.Tensor
    packed_blocks: list[int] = field(default_factory=list)
    exact_blocks: list[int] = field(default_factory=list)
    known: int = 0
    packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Groups of 32 tokens as they are once they have been packed."""

    def as_packed(self, form: Form, group: int) -> tuple[torch.Tensor, torch.Tensor]:
        if group not in self.packed:
            mine = slice(group, group + 32)
            fields = pack_reference(form, self.keys[:, mine], self.values[:, mine], 0, None)
            self.packed[group] = tuple(x[:, :32] for x in decode_page(form, fields, torch.float64))
        return self.packed[group]


def memory(blocks: int, heads: int, pages: int, size: int, padding: int) -> torch.Tensor:
    """Blocks as vLLM views them, a gap behind each; every byte says NaN."""
    raw = torch.full((blocks, heads * pages * size + padding), -1, dtype=torch.int8)
    return raw[:, : heads * pages * size].unflatten(1, (heads, pages, size))


class Engine:
    """Hands out blocks as `windows.py` does, only those that are needed, fills what is given back with NaN, and holds a
    layer's output against plain attention in float64."""

    def __init__(self, text: str, sink: int, recent: int, dtype: torch.dtype, dim: int = 64, heads: int = 2) -> None:
        self.pages, self.dtype, self.dim, self.heads = windows_of(text, sink, recent, dim, dtype), dtype, dim, heads
        self.packed = memory(60, heads, self.pages.together, self.pages.form.nbytes, 32)
        self.exact = memory(60, heads, self.pages.exact_together, self.pages.exact_bytes, 64)
        self.free = random.sample(range(1, 60), 59)
        self.tables = StreamingTables(self.pages, heads, 4, 1024, torch.device("cpu"))
        self.path = StreamingCpuPath(self.pages)
        self.impl = SimpleNamespace(scale=dim**-0.5, num_kv_heads=heads)

    def request(self) -> Request:
        made = torch.randn(2, self.heads, 1000, self.dim) + torch.randn(2, self.heads, 1, self.dim)
        return Request(*made.to(self.dtype))

    def _blocks(self, one: Request, new: int) -> None:
        """A chunk takes over the blocks of the window before it, a token those that it does not read."""
        pages, length = self.pages, one.known + new
        exact = 32 * pages.exact_together
        for table, memory, size, first, stop, sinks in (
            (one.packed_blocks, self.packed, pages.block, pages.packed_from, pages.packed(length), 0),
            (one.exact_blocks, self.exact, exact, pages.exact_from, length, -(-pages.pinned // exact)),
        ):
            # What the step before took over is no longer where it was.
            table[:] = [NULL if block in table[i + 1 :] else block for i, block in enumerate(table)]
            spare = [
                place for place, block in enumerate(table)
                if block != NULL and sinks <= place < first(length if new > 1 else one.known) // size
            ]  # fmt: skip
            keep = first(length) // size
            for place in range(len(table), -(-stop // size)):
                if sinks <= place < keep:
                    table.append(NULL)
                elif spare:
                    table.append(table[spare.pop(0)])
                else:
                    table.append(self.free.pop())
            for place in spare:
                if place < first(one.known) // size:  # nobody reads it any more
                    memory[table[place]] = -1
                    self.free.insert(0, table[place])
                    table[place] = NULL

    def step(self, news: list[tuple[Request, int]]) -> float:
        """New tokens of some requests, decoding ones first: the largest error of the output."""
        blocks = [torch.zeros((len(news), 40), dtype=torch.int32) for _ in range(2)]
        prefills, lengths, first, parts = [], [], 0, []
        for i, (one, new) in enumerate(news):
            self._blocks(one, new)
            for table, mine in zip(blocks, (one.packed_blocks, one.exact_blocks)):
                table[i, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            if new > 1 or prefills:
                prefills.append(Prefill(i, first, first + new, one.known))
            else:
                lengths.append(one.known + 1)
            parts.append([x[:, one.known : one.known + new].transpose(0, 1) for x in (one.keys, one.values)])
            first += new
        key, value = (torch.cat(x) for x in zip(*parts))
        query = (torch.randn(first, self.heads * 3, self.dim) * 2).to(self.dtype)
        decodes, longest = len(lengths), max(lengths, default=0)
        if lengths:
            at = [x[:decodes] for x in blocks]
            places = Place.of(self.packed), Place.of(self.exact)
            self.tables.fill(*places, *at, torch.tensor(lengths, dtype=torch.int32), longest)
        completes = any(map(self.pages.completes, lengths))
        step = Step(self.tables, first, decodes, longest, completes, prefills, *blocks, torch.zeros(first))
        output = torch.full_like(query, float("nan"))
        self.path.forward(None, self.impl, query, key, value, self.packed, self.exact, step, output)
        worst, at = 0.0, 0
        for one, new in news:
            wanted = self._wanted(one, new, query[at : at + new])
            error = float((output[at : at + new].double() - wanted).abs().max())
            worst = error if error != error else max(worst, error)
            at += new
            one.known += new
        return worst

    def _wanted(self, one: Request, new: int, query: torch.Tensor) -> torch.Tensor:
        """By `duo`'s and `kivi`'s words: a window and sinks; what is older than the residual in whole groups, sinks
        apart, is seen as it was packed."""
        known, length, form = one.known, one.known + new, self.pages.form
        keys, values = one.keys[:, :length].double(), one.values[:, :length].double()
        residual, sinks = self.pages.residual, -(-self.pages.sink // 32) * 32
        for group in range(sinks, max(0, known - residual) // 32 * 32 if self.pages.packs else 0, 32):
            keys[:, group : group + 32], values[:, group : group + 32] = one.as_packed(form, group)
        queries = query.double().transpose(0, 1).unflatten(0, (self.heads, 3))
        scores = queries @ keys[:, None].transpose(2, 3) * self.impl.scale
        q, k = torch.arange(known, length)[:, None], torch.arange(length)
        seen = (k <= q) & ((k < self.pages.sink) | (k > q - self.pages.recent))
        out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ values[:, None]
        return out.flatten(0, 1).transpose(0, 1)


LAYERS = [
    ("kivi(bits=4, residual=32)", 40, 200, F32),
    ("kivi(bits=2, residual=0)", 0, 100, BF16),
    ("kivi(bits=8, residual=64)", 4, 300, F32),
    ("kivi(bits=3, residual=128)", 64, 90, F32),
]
BOUND = {F32: 2e-5, BF16: 4e-2}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", quick(LAYERS, 2))
def test_a_layer_of_streaming_heads_against_plain_attention(shape: tuple, compiled: bool) -> None:
    """Prompts whole and in chunks, longer and shorter than sinks and windows, decoding beside them over the ends of
    groups, pages, blocks and windows."""
    if compiled and choose(torch.device("cpu")).path != "cpp":
        pytest.skip("no C++ compiler")
    random.seed(5), torch.manual_seed(5)
    engine, bound = Engine(*shape), BOUND[shape[3]]
    engine.path.compiled = compiled
    one, two, three = engine.request(), engine.request(), engine.request()
    assert engine.step([(one, 5), (two, 333)]) < bound
    for new in (96, 96, 7, 200):
        assert engine.step([(one, 1), (two, 1), (three, new)]) < bound
    for _ in range(110 if compiled else 40):
        assert engine.step([(one, 1), (two, 1), (three, 1)]) < bound
    assert engine.step([(one, 120), (two, 1), (three, 33)]) < bound
    for _ in range(70 if compiled else 33):
        assert engine.step([(one, 1), (two, 1), (three, 1)]) < bound
    assert max(one.known, two.known, three.known) > 500
    held = [sum(block != NULL for block in blocks) for blocks in (two.packed_blocks, two.exact_blocks)]
    most = engine.pages.packed_blocks(1000), engine.pages.exact_blocks(1000)
    assert held[0] <= most[0] and held[1] <= most[1]


def test_blocks_do_not_overlap() -> None:
    """What a window touches at most, against all windows there are."""
    for recent, residual, bits in ((256, 128, 4), (256, 0, 2), (100, 70, 8), (129, 128, 4), (131, 128, 3)):
        pages = windows_of(f"kivi(bits={bits}, residual={residual})", 64, recent)
        for size, most in ((pages.block, pages.packed_blocks(10**6)), (pages.form.tokens, pages.packed_columns(10**6))):
            touched = [
                len({p // size for p in range(pages.packed_from(known), pages.packed(known + 1))})
                for known in range(600, 1400)
            ]
            assert max(touched) <= max(1, most) and (not pages.packs or max(touched) == most)
