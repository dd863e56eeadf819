"""What the engine tells codecs about rows: a codec that stores keys as they were before the rotary embedding, mixed
over all heads of the layer, must lose nothing, whatever happens to the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fivefold
from conftest import FAMILIES, VOCAB
from fivefold.errors import CacheStateError
from fivefold.methods import Codec, Method
from fivefold.models.specs import attention_modules, rope_of
from fivefold.recipe import Recipe
from fivefold.store import Context, Field, LayerSpec, PageLayout, Rope

pytestmark = pytest.mark.usefixtures("one_thread")


class MixedCodec(Codec):
    """Keys unturned by position, then mixed by an orthogonal matrix over the heads that are packed together."""

    group = 32

    def __init__(self, spec: LayerSpec) -> None:
        assert spec.rope is not None
        self.rope, self.dim, self.context = spec.rope, spec.head_dim, None
        shape = (64, spec.head_dim)
        fields = (Field("keys", shape, torch.float32, "codes"), Field("values", shape, torch.float32, "codes"),
                  Field("positions", (64,), torch.int64, "other"))  # fmt: skip
        self.layout = PageLayout("mixed", 64, fields)
        self.seen: list[tuple[Any, ...]] = []

    def learn(self, queries: Any, keys: Any, values: Any, inputs: Any) -> dict[str, torch.Tensor]:
        sequences = inputs.shape[0]
        assert keys.shape[0] % sequences == 0 and queries.shape[2] == keys.shape[1] == inputs.shape[1]
        return {"first": keys[:, 0].clone()}

    def of(self, context: Context) -> MixedCodec:
        twin = MixedCodec.__new__(MixedCodec)
        twin.__dict__ = {**self.__dict__, "context": context}
        return twin

    def mix(self, keys: torch.Tensor, back: bool) -> torch.Tensor:
        """keys `[rows * pages, tokens, dim]`, mixed over the rows that are together."""
        assert self.context is not None
        rows, together = self.context.rows, self.context.together
        heads = self.context.heads[:together]
        if together > 1:
            assert self.context.heads == heads * (rows // together)
        n = together * self.dim
        basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(hash(heads))))[0]
        x = keys.reshape(rows // together, together, -1, self.dim).transpose(1, 2).flatten(2)
        x = x @ (basis.T if back else basis)
        return x.unflatten(2, (together, -1)).transpose(1, 2).reshape(keys.shape)

    def turned(self, keys: torch.Tensor, back: bool) -> torch.Tensor:
        assert self.context is not None
        phases = self.rope.phases(self.context.positions)
        x = keys.float()[..., self.rope.order].reshape(self.context.rows, -1, self.dim)
        x = self.rope.rotate(x, phases if back else phases.conj())
        return x[..., self.rope.back].reshape(keys.shape)

    def encode(self, keys: Any, values: Any, slot: int, opened: Any) -> dict[str, torch.Tensor]:
        assert self.context is not None
        assert torch.isfinite(self.context.learned["first"]).all()
        assert self.context.learned["first"].shape[0] == self.context.rows
        pages, tokens = keys.shape[:2]
        unturned = self.turned(keys, False)
        where = self.context.positions.expand(self.context.rows, -1).reshape(pages, tokens)
        self.seen.append((self.context.heads, where.reshape(self.context.rows, -1),
                          unturned.reshape(self.context.rows, -1, self.dim)))  # fmt: skip
        new = {"keys": self.mix(unturned, False), "values": values.float(), "positions": where}
        out = {}
        for part in self.layout.fields:
            fill = torch.zeros((pages, *part.shape), dtype=part.dtype) if opened is None else opened[part.name].clone()
            fill[:, slot : slot + tokens] = new[part.name]
            out[part.name] = fill
        return out

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.context is not None
        return self.turned(self.mix(fields["keys"], True), True), fields["values"]


class PlainCodec(Codec):
    """The same pages, holding keys as they come."""

    group = 32

    def __init__(self, spec: LayerSpec) -> None:
        self.layout = PageLayout("plain", 64, MixedCodec(spec).layout.fields[:2])

    def encode(self, keys: Any, values: Any, slot: int, opened: Any) -> dict[str, torch.Tensor]:
        out = {}
        for part, new in zip(self.layout.fields, (keys, values)):
            fill = torch.zeros((len(keys), *part.shape)) if opened is None else opened[part.name].clone()
            fill[:, slot : slot + keys.shape[1]] = new
            out[part.name] = fill
        return out

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["keys"], fields["values"]


CODECS: list[MixedCodec] = []


@dataclass(frozen=True)
class Mixed(Method):
    name, slot, paper = "mixed", "bits", ""

    def codec(self, spec: LayerSpec) -> MixedCodec:
        CODECS.append(MixedCodec(spec))
        return CODECS[-1]


@dataclass(frozen=True)
class Plain(Method):
    name, slot, paper = "plain", "bits", ""

    def codec(self, spec: LayerSpec) -> PlainCodec:
        return PlainCodec(spec)


def compress(model: Any, rest: str = "full()", method: Method | None = None) -> Any:
    CODECS.clear()
    return fivefold.compress(model, Recipe((method or Mixed(), *Recipe.parse(rest).methods)))


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    CODECS.clear()


def prompt(batch: int, tokens: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, cache: Any, chunks: list[torch.Tensor], **settings: Any) -> torch.Tensor:
    return torch.cat([model(chunk, past_key_values=cache, **settings).logits for chunk in chunks], 1)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() < 2e-3 * b.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_before_rope_are_those_of_the_model(tiny: Any, family: str) -> None:
    model, ids = tiny(family), prompt(2, 200)
    exact = logits(model, fivefold.compress(model, "full()"), [ids[:, :150], *ids[:, 150:].split(1, 1)])
    cache = compress(model)
    modules, made = attention_modules(model), {}
    index = max(i for i, store in cache.session.stores.items())
    # What enters the rotary embedding, as the model makes it.
    name = {"gpt_neox": "query_key_value", "phi3": "qkv_proj", "qwen3": "k_norm", "gemma3_text": "k_norm"}
    layer = getattr(modules[index], name.get(family, "k_proj"))
    hook = layer.register_forward_hook(lambda m, a, out: made.setdefault("keys", out) is None or None)
    packed = logits(model, cache, [ids[:, :150], *ids[:, 150:].split(1, 1)])
    hook.remove()
    same(packed, exact)
    spec = cache.session.stores[index].spec
    keys = made["keys"].detach()
    if family == "gpt_neox":
        keys = keys.view(2, 150, spec.kv_heads, 3, spec.head_dim)[:, :, :, 1]
    elif family == "phi3":
        start = spec.query_heads * spec.head_dim
        keys = keys[..., start : start + spec.kv_heads * spec.head_dim]
    elif keys.ndim == 4 and keys.shape[1] == spec.kv_heads and keys.shape[2] == 150:
        keys = keys.transpose(1, 2)
    keys = keys.reshape(2, 150, spec.kv_heads, -1).transpose(1, 2).reshape(2 * spec.kv_heads, 150, -1)
    codec = CODECS[list(cache.session.stores).index(index)]
    heads, positions, first = codec.seen[0]
    assert heads == tuple(range(spec.kv_heads)) * 2 and torch.equal(positions[0], torch.arange(first.shape[1]))
    assert (first - keys[:, : first.shape[1]]).abs().max() < 1e-4 * keys.abs().max()


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear", "factor": 3.0}, {"rope_type": "yarn", "factor": 4.0},
     {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 128}],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_scaled_rotary_embeddings(tiny: Any, rope: dict[str, Any]) -> None:
    model, ids = tiny("llama", rope_parameters={"rope_theta": 10000.0, **rope}), prompt(1, 300)
    exact = logits(model, fivefold.compress(model, "full()"), [ids])
    cache = compress(model)
    hidden = model.model.embed_tokens(ids)
    same(logits(model, cache, [ids]), exact)
    _, _, unturned = CODECS[0].seen[0]
    layer = model.model.layers[0]
    keys = layer.self_attn.k_proj(layer.input_layernorm(hidden)).view(1, 300, 2, 64).transpose(1, 2)[0]
    factor = model.model.rotary_emb.attention_scaling
    assert (unturned - factor * keys[:, : unturned.shape[1]]).abs().max() < 1e-4 * keys.abs().max()


def test_dynamic_rotary_embeddings_are_refused(tiny: Any) -> None:
    model = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    rope, why = rope_of(model, 0, model.model.layers[0].self_attn, 64)
    assert rope is None and "(dynamic)" in why


def test_turning_is_undone() -> None:
    rope = Rope(1.0 / 10000 ** (torch.arange(0, 48, 2) / 48), 64)
    positions = torch.tensor([[0, 1, 77, 4095, 131071, 1 << 20]])
    x = torch.randn(3, 6, 64)[..., rope.order]
    phases = rope.phases(positions)
    turned = rope.rotate(x, phases)
    assert torch.equal(turned[:, 0], x[:, 0]) and (turned[:, 1:, :48] - x[:, 1:, :48]).abs().amax(-1).min() > 0.1
    assert torch.equal(turned[..., 48:], x[..., 48:])
    assert (rope.rotate(turned, phases.conj()) - x).abs().max() < 1e-5
    assert torch.equal(x[..., rope.back][..., rope.order], x)


RECIPES = [
    "duo(retrieval=[[0, 1], [1, 0], [2, 0], [2, 1]], sink=16, recent=100)", "streaming(sink=8, recent=160)",
    "snapkv(keep=0.5, window=8)", "h2o(keep=0.6)", "d2o(keep=0.6)", "tidal(top=1000)",
]  # fmt: skip


@pytest.mark.parametrize("rest", RECIPES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.slow
def test_with_every_kind_of_method(tiny: Any, rest: str, padded: bool) -> None:
    model = tiny("llama", initializer_range=0.1)
    ids = prompt(3, 260)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :70] = mask[1, :33] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 50, "do_sample": False, "return_dict_in_generate": True,
                "output_logits": True}  # fmt: skip
    exact = model.generate(ids, past_key_values=compress(model, rest, Plain()), **settings)
    cache = compress(model, rest)
    packed = model.generate(ids, past_key_values=cache, **settings)
    assert cache.report().codes > 0
    assert torch.equal(packed.sequences, exact.sequences)
    same(torch.stack(packed.logits), torch.stack(exact.logits))


@pytest.mark.parametrize("given", [False, True])
def test_positions_are_those_of_the_model(tiny: Any, given: bool) -> None:
    """Without position_ids a plain forward counts padding too: keys are unturned by what the model really used."""
    model, ids = tiny("llama"), prompt(2, 200)
    mask = torch.ones_like(ids)
    mask[0, :90] = 0
    settings: dict[str, Any] = {"attention_mask": mask}
    if given:
        settings["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    exact = logits(model, fivefold.compress(model, "full()"), [ids], **settings)
    cache = compress(model)
    same(logits(model, cache, [ids], **settings)[:, 90:], exact[:, 90:])
    starts = {int(where[row, 0]) for _, where, _ in CODECS[0].seen for row in range(len(where))}
    assert starts == ({0, 64} if given else {0, 90, 154})


def test_positions_that_jump_are_refused(tiny: Any) -> None:
    model, ids = tiny("llama"), prompt(1, 40)
    cache = compress(model)
    logits(model, cache, [ids], position_ids=torch.arange(100, 140)[None])
    for wrong in (139, 141):
        with pytest.raises(CacheStateError, match=rf"position {wrong} was given where 140 is next"):
            logits(model, cache, [ids[:, :1]], position_ids=torch.tensor([[wrong]]))
    logits(model, cache, [ids[:, :1]], position_ids=torch.tensor([[140]]))
    assert cache.get_seq_length() == 41


def test_forks_beams_crops_and_picked_tokens(tiny: Any) -> None:
    model, ids = tiny("llama"), prompt(2, 200)
    exact, cache = fivefold.compress(model, "full()"), compress(model)
    for c in (exact, cache):
        logits(model, c, [ids])
    fork = cache.fork()
    for c in (exact, cache):
        c.reorder_cache(torch.tensor([1, 1]))
        c.crop(-77)
        c.batch_select_indices(torch.tensor([0]))
    new = prompt(1, 90, 9)
    expected = logits(model, exact, [new[:, :80], *new[:, 80:].split(1, 1)])
    same(logits(model, cache, [new[:, :80], *new[:, 80:].split(1, 1)]), expected)
    store = fork.session.stores[1]
    group = store.groups[0]
    slots = torch.tensor([[0, 5, 63, 64, 191], [1, 2, 3, 4, 5], [9, 8, 7, 6, 100], [190, 0, 0, 1, 2]])
    taken, dense = group.tokens(slots), group.dense()
    for got, whole in zip(taken, dense):
        same(got, whole.gather(1, slots[:, :, None].expand(-1, -1, 64)))
    assert cache.report().statistics == 3 * 2 * 64 * 4  # what was learned, of every layer and head
