"""Chunks of a prompt with fused kernels between the products: the same as by the model's own code, and never where that
does something else.

On a CPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch

import fivefold
import unlike
from conftest import DEVICES, KERNELS, quick
from families import build
from fivefold.errors import CacheFullError
from fivefold.kernels.step import reference
from fivefold.kernels.step.reference import Norm, Turn
from fivefold.models import chunks
from fivefold.store.bank import Bank
from recipes import RECIPES, SHAPE, written
from unlike import ONE, TWO

kernels = pytest.importorskip("fivefold.kernels.step.chunk", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 131


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    monkeypatch.setattr(chunks, "DEVICES", {"cpu", "cuda"})
    return torch.device(request.param)


def ids(rows: int, tokens: int, device, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


def both(model, call, monkeypatch, recipe: str = "full()") -> tuple[list, list]:
    """What `call(cache)` returns with fused kernels, and by the model's own code."""
    outs = []
    for fused in (True, False):
        with monkeypatch.context() as patch, torch.inference_mode():
            if not fused:
                patch.setattr(chunks, "DEVICES", set())
            outs.append(call(fivefold.compress(model, recipe)))
            assert (why(model) is None) is fused
    return outs[0], outs[1]


def alike(found, wanted, bound: float = 1e-4) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and (x - y).norm() <= bound * y.norm()


def why(model) -> str | None:
    return model.forward.chunks.own


def conversation(model, rows: int, device):
    """Two chunks and a step; the second one with the logits of its last tokens alone."""

    def call(cache):
        first = model(ids(rows, 40, device), past_key_values=cache).logits
        second = model(input_ids=ids(rows, 33, device, 1), past_key_values=cache, logits_to_keep=2).logits
        return first, second, model(ids(rows, 1, device, 2), past_key_values=cache).logits

    return call


@pytest.mark.parametrize("family", quick(["qwen3", "qwen2", "llama", "mistral"], 1))
def test_families(device, family: str, monkeypatch) -> None:
    """With biases of queries, keys and values (qwen2), and norms of their heads (qwen3)."""
    model = build(family, **TWO).to(device)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.data.normal_(1, 0.3, generator=torch.Generator(weight.device).manual_seed(len(name)))
    found, wanted = both(model, conversation(model, 2, device), monkeypatch)
    alike(found, wanted)


def test_they_are_taken(device) -> None:
    """And found out about once: the second cache's are not tried again."""
    model, tried = build("llama", **TWO).to(device), []
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(chunks, "verified", lambda model, old=chunks.verified: tried.append(1) or old(model))
        for _ in range(2):
            model(ids(1, 5, device), past_key_values=fivefold.compress(model))
            assert why(model) is None
        assert len(tried) == 1
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
        model(ids(1, 5, device), past_key_values=fivefold.compress(model))
        assert len(tried) == 2


@pytest.mark.parametrize("name", quick(list(RECIPES), 3))
def test_recipes(device, name: str, tiny, monkeypatch) -> None:
    """Every method is given what it wants to know: positions, and the inputs of layers."""
    model = tiny(**SHAPE).to(device)
    found, wanted = both(model, conversation(model, 1, device), monkeypatch, written(name, model))
    alike(found, wanted, 2e-2)


def test_layers_are_stored_together_from_the_first_chunk_on(device, monkeypatch) -> None:
    model, moved = build("llama", **TWO).to(device), list[int]()
    move = Bank.move
    monkeypatch.setattr(Bank, "move", lambda bank, rows, *given: (moved.append(len(rows)), move(bank, rows, *given))[1])
    with torch.inference_mode():
        cache = fivefold.compress(model, "kivi(bits=4, residual=32)")
        for seed in range(2):
            model(ids(2, 70, device, seed), past_key_values=cache)
    assert moved == [cache.session.stores[0].bank.standing.rows] * 2
    cache.free()
    with torch.inference_mode():  # and it begins anew
        model(ids(1, 70, device), past_key_values=cache)
    assert moved[2:] == [moved[0] // 2] and cache.lengths().tolist() == [70]


def test_padding_and_positions(device, monkeypatch) -> None:
    model = build("llama", **ONE).to(device)
    mask = torch.ones(2, 20, dtype=torch.long, device=device)
    mask[1, :7] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def call(cache):
        given = {"attention_mask": mask, "position_ids": places, "past_key_values": cache}
        return (model(ids(2, 20, device), **given, logits_to_keep=1).logits,)

    alike(*both(model, call, monkeypatch))


@pytest.mark.parametrize("make", quick([unlike.asking, *unlike.ALL], 4))
def test_other_models_run_their_own_code(device, make, monkeypatch) -> None:
    model, said = make(device)
    with torch.inference_mode():
        cache = fivefold.compress(model)
        found = model(ids(1, 9, device), past_key_values=cache).logits
        assert said in why(model)
        wanted = model(ids(1, 9, device)).logits
    alike([found], [wanted])


def test_a_hook_that_comes_later_runs(device) -> None:
    model, seen = build("llama", **ONE).to(device), []
    with torch.inference_mode():
        model(ids(1, 9, device), past_key_values=fivefold.compress(model))
        assert why(model) is None
        model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
        model(ids(1, 9, device), past_key_values=fivefold.compress(model))
    assert seen == [1]


def test_a_chunk_that_is_refused_changes_nothing(device) -> None:
    model = build("llama", **TWO).to(device)
    with torch.inference_mode():
        cache, other = fivefold.compress(model, max_bytes="200kB"), fivefold.compress(model)
        for one in (cache, other):
            model(ids(1, 40, device), past_key_values=one)
        with pytest.raises(CacheFullError):
            model(ids(1, 70, device, 1), past_key_values=cache)
        assert cache.get_seq_length() == 40
        found, wanted = (model(ids(1, 5, device, 1), past_key_values=one).logits for one in (cache, other))
    assert torch.equal(found, wanted)


BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 if torch.cuda.is_available() else 5e-2}


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_kernels(device, dtype, normed: bool) -> None:
    """Of heads whose width is no power of two too."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def near(found, wanted) -> None:
        for x, y in zip(found, wanted, strict=True):
            assert x.shape == y.shape and x.is_contiguous()
            assert (x.float() - y.float()).norm() <= BOUNDS[dtype] * y.float().norm()

    for batch, tokens, dim in ((1, 70, 64), (3, 5, 96)):
        count, norms = batch * tokens, (Norm(some(dim), 1e-5), Norm(some(dim), 1e-6))
        turn = Turn(some(count, dim), some(count, dim), norms if normed else (None, None))
        q, k, v = (some(count, heads * dim) for heads in (4, 2, 2))
        near(kernels.spread(q, k, v, turn, batch), reference.spread(q, k, v, turn, batch))
    x, residual, norm = some(5, 72), some(5, 72), Norm(some(72), 1e-5)
    near(kernels.added_normed(x.clone(), residual, norm), reference.added_normed(x, residual, norm))
