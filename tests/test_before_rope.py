"""cskv, kv_heads and rotatekv: what they do with keys before RoPE and heads together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conftest import VOCAB, quick
from fivefold.errors import NonFiniteError, ProfileError, RecipeError
from fivefold.evaluate.demo import make_task
from fivefold.methods.channels.cskv import attended
from fivefold.models import embedded
from fivefold.store import Context, Rope
from fivefold.store.rows import PAGE
from learned import learn

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ["cskv(keep=0.3)", "cskv(keep=0.3, bits=4)", "cskv(keep=0.3, bits=8, value_keep=0.4)", "rotatekv(bits=2)",
           "rotatekv(bits=3)", "rotatekv(bits=4, head_group=1)", "kv_heads(keep=0.3)",
           "kv_heads(keep=0.5, group=1)", "kv_heads(bits=4)"]  # fmt: skip
NEARLY = ["cskv(keep=1.0)", "rotatekv(bits=4)", "kv_heads(keep=1.0)", "kv_heads(keep=1.0, group=1)"]


@pytest.fixture
def learned(tiny: Any, tmp_path: Path) -> Any:
    """`learned(recipe, family)`: a tiny model and the recipe with a profile of it."""

    def make(recipe: str, family: str = "llama", rest: str = "", **changes: Any) -> tuple[Any, str]:
        model = tiny(family, **changes)
        folder = learn(model, recipe, tmp_path / f"{recipe.split('(')[0]}-{family}")
        return model, f'{recipe[:-1]}, profile="{folder}"){rest}'

    return make


def prompt(batch: int, tokens: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any, cache: Any, chunks: list[torch.Tensor], **settings: Any) -> torch.Tensor:
    return torch.cat([model(chunk, past_key_values=cache, **settings).logits for chunk in chunks], 1)


def filled(codec: Any, context: Context, tokens: int, slot: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random keys and values `[rows, tokens, head_dim]` for pages of these rows."""
    torch.manual_seed(len(context.heads) + tokens)
    keys, values = torch.randn(2, context.rows, tokens, codec.spec.head_dim)
    keys[..., 5] += 8
    return keys, values


@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize(
    ("heads", "alone"), [((0, 1), False), ((1,), True), ((0, 1, 0, 1), False), ((0, 1, 0, 1), True)], ids=str
)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_attending_in_compressed_form_is_attending_to_what_is_decoded(
    learned: Any, recipe: str, heads: tuple[int, ...], alone: bool, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", kernels)
    model, recipe = learned(recipe)
    codec = fivefold.compress(model, recipe).session.stores[1].codec
    page = codec.layout.tokens
    together = 1 if alone else len(set(heads))
    positions = torch.arange(7, 7 + 2 * page)[None]
    if alone and len(heads) > 1:
        positions = positions + torch.arange(len(heads))[:, None] * 3
    whole = Context(heads, together, positions)
    keys, values = filled(codec, whole, 2 * page)
    inputs = torch.randn(len(heads) // together, 2 * page, 64)
    inputs[:, 3] *= 50
    inputs[:, page - 1] *= 40
    learned_rows = codec.learn(keys[:, None], keys, values, inputs)
    whole = Context(heads, together, positions, learned_rows)

    def encode(start: int, stop: int, slot: int, opened: Any) -> dict[str, torch.Tensor]:
        part = Context(heads, together, positions[:, start:stop], learned_rows)
        pages = max(1, (stop - start) // page)
        shape = (len(heads) * pages, -1, keys.shape[2])
        chunk = keys[:, start:stop].reshape(shape), values[:, start:stop].reshape(shape)
        return codec.of(part).encode(*chunk, slot, opened)

    at_once = encode(0, 2 * page, 0, None)
    fields = {name: x.unflatten(0, (len(heads), 2)) for name, x in at_once.items()}
    assert {name: tuple(x.shape[1:]) for name, x in at_once.items()} == {f.name: f.shape for f in codec.layout.fields}
    assert all(at_once[f.name].dtype == f.dtype for f in codec.layout.fields)
    # Group by group, the rest of the page being stale.
    opened = None
    for slot in range(0, page, PAGE):
        opened = encode(slot, slot + PAGE, slot, opened)
    for name, x in opened.items():
        first = fields[name][:, 0]
        assert torch.equal(x, first) or (x.float() - first.float()).abs().max() <= 1e-2 * first.abs().max()
    got_keys, got_values = codec.of(whole).decode(at_once)
    rows = (len(heads), 2 * page, -1)
    got_keys, got_values = got_keys.reshape(rows), got_values.reshape(rows)
    queries, weights = torch.randn(len(heads), 3, keys.shape[2]), torch.rand(len(heads), 3, 2 * page)
    kept = weights.clone()
    scores, output = codec.of(whole).scores(queries, fields), codec.of(whole).output(weights, fields)
    assert torch.equal(weights, kept)
    for got, expected in ((scores, queries @ got_keys.transpose(1, 2)), (output, weights @ got_values)):
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    if recipe.startswith("rotatekv"):
        for slot in (3, page - 1):
            assert torch.equal(got_keys[:, slot], keys[:, slot]) and torch.equal(got_values[:, slot], values[:, slot])
        worst = (got_values - values).abs().max()
        assert 0.05 < worst < {2: 3.0, 3: 1.2, 4: 0.6}[codec.method.bits]


RESTS = ["",
         " + duo(retrieval=[[0, 1], [1, 0], [2, 0], [2, 1]], sink=16, recent=100)",
         " + streaming(sink=8, recent=160)",
         " + snapkv(keep=0.5, window=8)", " + h2o(keep=0.6)", " + tidal(top=64)",
         " + anchors(top=240, anchors=[0])"]  # fmt: skip


@pytest.mark.parametrize("recipe", NEARLY)
@pytest.mark.parametrize("rest", quick(RESTS, 2))
def test_combinations_stay_near_what_they_pack(learned: Any, recipe: str, rest: str) -> None:
    model, whole = learned(recipe, rest=rest, initializer_range=0.1)
    ids = prompt(3, 270)
    mask = torch.ones_like(ids)
    mask[0, :70] = mask[1, :33] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False,
                "return_dict_in_generate": True, "output_logits": True}  # fmt: skip
    base = rest.removeprefix(" + ") or "full()"
    exact = model.generate(ids, past_key_values=fivefold.compress(model, base), **settings)
    cache = fivefold.compress(model, whole)
    packed = model.generate(ids, past_key_values=cache, **settings)
    assert cache.report().codes > 0
    first, other = packed.logits[1], exact.logits[1]
    if torch.equal(packed.sequences[:, 270], exact.sequences[:, 270]):
        assert (first - other).abs().max() < (0.4 if "rotatekv" in recipe else 0.05) * other.abs().max()


@pytest.mark.parametrize("recipe", METHODS)
def test_forks_crops_and_beams(learned: Any, recipe: str) -> None:
    model, recipe = learned(recipe)
    ids, cache = prompt(2, 300), fivefold.compress(model, recipe)
    logits(model, cache, [ids])
    fork, twin = cache.fork(), cache.fork()
    new = prompt(2, 54, 9)
    expected = logits(model, fork, [new[:, :40], *new[:, 40:].split(1, 1)])
    assert torch.equal(logits(model, cache, [new[:, :40], *new[:, 40:].split(1, 1)]), expected)
    twin.reorder_cache(torch.tensor([1, 0]))
    swapped = logits(model, twin, [new[[1, 0], :40], *new[[1, 0], 40:].split(1, 1)])
    assert (swapped[[1, 0]] - expected).abs().max() < 1e-3 * expected.abs().max()
    cache.crop(-154)  # into packed tokens
    assert cache.get_seq_length() == 200
    logits(model, cache, [new[:, :40], *new[:, 40:].split(1, 1)])
    for c in (fork, twin, cache):
        c.free()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("recipe", NEARLY)
def test_other_families(learned: Any, family: str, recipe: str) -> None:
    model, recipe = learned(recipe, family)
    ids = prompt(1, 200)
    exact = logits(model, fivefold.compress(model, "full()"), [ids[:, :180], ids[:, 180:]])
    packed = logits(model, fivefold.compress(model, recipe), [ids[:, :180], ids[:, 180:]])
    assert torch.equal(packed[:, :180], exact[:, :180])
    apart = (packed - exact).norm() / exact.norm()
    assert apart < (0.3 if "rotatekv" in recipe else 0.02)


def test_what_they_refuse(tiny: Any, learned: Any) -> None:
    model = tiny("llama")
    for name in ("cskv", "rotatekv", "kv_heads"):
        with pytest.raises(ProfileError, match=rf"{name}\(\) has learned nothing of this model"):
            fivefold.compress(model, f"{name}()")
    with pytest.raises(RecipeError, match="both say what a page holds"):
        fivefold.compress(model, "cskv() + kivi()")
    dynamic = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    for name in ("cskv", "rotatekv", "kv_heads"):
        with pytest.raises(RecipeError, match=r"\(dynamic\) changes with the length"):
            fivefold.compress(dynamic, f"{name}()")
    model, recipe = learned("cskv(keep=0.2)")
    with pytest.raises(ProfileError, match=r"holds 52 directions and .* needs 128"):
        fivefold.compress(model, recipe.replace("0.2", "1.0"))
    for recipe in METHODS[2:4]:
        model, recipe = learned(recipe)
        codec = fivefold.compress(model, recipe).session.stores[0].codec
        bad = torch.zeros(2, 4, 64)
        bad[1, 2, 3] = float("nan")
        with pytest.raises(NonFiniteError, match="values to be packed reach nan"):
            codec.check(torch.zeros(2, 4, 64), bad)


def held(cache: Any) -> tuple[int, int, int]:
    """Bytes in packed pages, those pages' tokens, and rows, of all layers."""
    nbytes = tokens = rows = 0
    for store in cache.session.stores.values():
        for group in store.groups:
            nbytes += group.packed.size * store.packed_pools[0].layout.nbytes
            tokens += group.packed.size * store.packed_pools[0].layout.tokens
            rows += len(group.rows)
    return nbytes, tokens, rows


@pytest.mark.parametrize(
    ("recipe", "per_token", "a_page"),
    [
        ("cskv(keep=0.2)", 4 * 13, 0),
        ("cskv(keep=0.2, bits=4)", 2 * 13 * (2 / 4 + 4 / 32), 0),
        ("cskv(keep=0.2, bits=8, value_keep=0.3)", (13 + 19) * (2 / 2 + 4 / 32), 0),
        ("kv_heads(keep=0.5)", 4 * 2 * 32, 0),
        ("kv_heads(keep=0.25, group=1)", 4 * 2 * 16, 0),
        ("kv_heads(keep=0.5, bits=4)", 2 * 32 * (2 / 4 + 4 / 32), 0),
        ("rotatekv(bits=2)", 2 * 64 * 16 / (8 * 8) + 8 * 64 / 32, 8),
        ("rotatekv(bits=3, sinks=0)", 2 * 64 * 16 / (8 * 5) + 8 * 64 / 32, 0),
        ("rotatekv(bits=4, group=64, sinks=2)", 2 * 64 * 16 / (8 * 4) + 8 * 64 / 64, 4),
    ],
)
def test_bytes_are_those_of_the_docstrings(learned: Any, recipe: str, per_token: float, a_page: int) -> None:
    model, whole = learned(recipe)
    cache = fivefold.compress(model, whole)
    logits(model, cache, [prompt(2, 700)])
    nbytes, tokens, rows = held(cache)
    pages = tokens // cache.session.stores[0].codec.layout.tokens
    assert nbytes == round(per_token * tokens) + a_page * pages
    sinks = a_page // 2
    assert cache.report().statistics == (2 * 64 * 4 * sinks) * rows
    report = cache.report()
    packed = report.codes + report.scales + report.other
    assert 0.99 < packed / (per_token * sum(
        len(c.rows) * c.bounds.packed_stop for s in cache.session.stores.values() for c in s.groups
    )) < 1.03  # fmt: skip


def test_ratios_at_eight_thousand_tokens(tiny: Any, learned: Any) -> None:
    changes = {"dtype": torch.bfloat16, "max_position_embeddings": 8192, "num_hidden_layers": 1}
    ratios = {}
    for recipe in ("cskv(keep=0.2)", "cskv(keep=0.2, bits=4)", "rotatekv(bits=2)"):
        model, whole = learned(recipe, **changes)
        for name in [whole] if "cskv" in recipe else [whole, "kivi(bits=2)"]:
            cache = fivefold.compress(model, name)
            with torch.no_grad():
                for chunk in prompt(1, 8192).split(2048, 1):
                    model(chunk, past_key_values=cache, logits_to_keep=1)
            report = cache.report()
            if "cskv" in name:
                # Beside the tokens: two heads' 128 channels to 26 features and back, for keys and values.
                assert report.learned == 4 * 128 * 26 * 4
                ratios[recipe] = (report.total - report.learned) / report.exact_equivalent
            else:
                ratios[recipe if name == whole else name] = report.ratio
    assert ratios["cskv(keep=0.2)"] <= 0.22
    assert ratios["cskv(keep=0.2, bits=4)"] <= 0.08
    assert ratios["rotatekv(bits=2)"] <= ratios["kivi(bits=2)"]


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_embedded_model_out_of_the_box() -> None:
    """With the profiles that ship: rotated 2 bits are nearer to exact than KIVI's, in fewer bytes; low rank answers."""
    embedded.fetch()
    model, tokenizer = embedded.load()
    task = make_task(tokenizer, 1024)
    kl, ratio = {}, {}
    with torch.inference_mode():
        exact = logits(model, fivefold.compress(model, "full()"), [task.prefix, task.continuation])[0, 1024:]
        logs = exact.log_softmax(-1)
        for recipe in (
            "kivi(bits=2)",
            "rotatekv(bits=2)",
            "cskv(keep=0.2)",
            "cskv(keep=0.4)",
            "cskv(keep=0.4, bits=4)",
        ):
            cache = fivefold.compress(model, recipe)
            logits(model, cache, [task.prefix])
            ratio[recipe] = cache.report().ratio
            packed = logits(model, cache, list(task.continuation.split(32, 1)))[0].log_softmax(-1)
            kl[recipe] = float((logs.exp() * (logs - packed)).sum(-1).mean())
    assert kl["rotatekv(bits=2)"] < kl["kivi(bits=2)"], kl
    assert ratio["rotatekv(bits=2)"] < ratio["kivi(bits=2)"], ratio
    assert kl["cskv(keep=0.4)"] < kl["cskv(keep=0.2)"] < 1.0, kl
    assert kl["cskv(keep=0.4, bits=4)"] < 2 * kl["cskv(keep=0.4)"], kl
    fivefold.restore(model)


def test_what_attention_makes_of_values() -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(4, 20, 8), torch.randn(2, 20, 8), torch.randn(2, 20, 8)
    rope = Rope(1 / 100 ** (torch.arange(0, 8, 2) / 8), 8)
    expected = torch.zeros(16, 16)
    for head in range(4):
        for token in (7, 15):
            scores = torch.empty(token + 1)
            for other in range(token + 1):
                turn = rope.phases(torch.tensor([[token - other]]))[0]
                turned = rope.rotate(rope.pair(queries[head, token]), turn[0])
                scores[other] = turned @ rope.pair(keys[head // 2, other]) / 8**0.5
            summed = scores.softmax(0) @ values[:, : token + 1].transpose(0, 1).flatten(1)
            expected += torch.outer(summed, summed)
    assert (attended(queries, keys, values, rope) - expected).abs().max() < 1e-4 * expected.abs().max()
