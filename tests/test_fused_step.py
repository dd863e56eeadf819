"""Whole decoding steps in fused kernels: the same as by the model's own code, and never where that does something else.

On a CPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fivefold
import unlike
from conftest import DEVICES, KERNELS, quick
from families import build
from fivefold.attention.picks import Picked
from fivefold.attention.tables import DeviceTables
from fivefold.engine.session import Session
from fivefold.models import fused, graph
from unlike import ONE, TWO

step = pytest.importorskip("fivefold.kernels.step.triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = 131


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> torch.device:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    return torch.device(request.param)


def ids(rows: int, tokens: int, device, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


def stepped(model, recipe: str, rows: int, device, count: int = 1, **given):
    """Logits of the last step of a cache with a graph, those of the model's own code, and the cache."""
    caches = [fivefold.compress(model, recipe, cuda_graph=graphed) for graphed in (True, False)]
    with torch.inference_mode():
        for cache in caches:
            model(ids(rows, 40, device), past_key_values=cache)
        for number in range(count):
            token = ids(rows, 1, device, 1 + number)
            found, wanted = (model(token, past_key_values=cache).logits for cache in caches)
    assert caches[0].step.failed is None and caches[0].step.replays == count
    return found, wanted, caches[0]


@pytest.mark.parametrize("family", quick(["qwen3", "qwen2", "llama", "mistral"], 1))
def test_families(device, family: str) -> None:
    """With biases of queries, keys and values (qwen2), and norms of their heads (qwen3)."""
    model = build(family, **ONE).to(device)
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.data.normal_(1, 0.3, generator=torch.Generator(weight.device).manual_seed(len(name)))
    found, wanted, cache = stepped(model, "full()", 1, device)
    assert cache.step.own is None
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize("columns", [16, 1])
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_batches(device, family: str, columns: int, monkeypatch) -> None:
    """By kernels, and by torch's products where there are many tokens."""
    monkeypatch.setattr(step, "COLUMNS", columns)
    model = build(family, **ONE).to(device)
    for rows in (2,) if device.type == "cpu" else (2, 7, 16, 40):
        found, wanted, cache = stepped(model, "full()", rows, device)
        assert cache.step.own is None and found.shape == (rows, 1, VOCAB)
        assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.slow
def test_exact_pages_of_eight_bits(device) -> None:
    """A token is rounded on its way into its page by a kernel of its own."""
    model = build("llama", **ONE).to(device)
    found, wanted, cache = stepped(model, "mikv(high=8, floor=0)", 1, device)
    assert cache.step.own is None
    assert (found - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16])
def test_half_precision(device, dtype) -> None:
    model = build("llama", **ONE).to(device, dtype)
    if device.type == "cpu":  # the interpreter cuts off what bfloat16 does not hold
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(graph.verified.__globals__["BOUNDS"], torch.bfloat16, 0.1)
            found, wanted, cache = stepped(model, "full()", 1, device)
    else:
        found, wanted, cache = stepped(model, "full()", 1, device)
    assert cache.step.own is None
    assert (found.float() - wanted.float()).norm() < (0.1 if device.type == "cpu" else 0.03) * wanted.float().norm()


@pytest.mark.parametrize("make", quick(unlike.ALL, 3))
def test_other_models_run_their_own_code(device, make) -> None:
    """Known by their parts, by what others have changed, or by what comes out; and a step says which."""
    model, why = make(device)
    found, wanted, cache = stepped(model, "full()", 1, device)
    assert why in cache.step.own
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.slow
def test_weights_that_change(device) -> None:
    """Numbers in place are read anew; weights elsewhere make a new step."""
    model = build("llama", **ONE).to(device)
    _, before, cache = stepped(model, "full()", 1, device)
    twin = copy.deepcopy(model)
    for weight in twin.parameters():
        weight.data *= 1.1
    for name, weight in model.named_parameters():
        if "mlp" in name:
            weight.data = dict(twin.named_parameters())[name].data
        else:
            weight.data *= 1.1
    token = ids(1, 1, device, 1)
    with torch.inference_mode():
        cache.crop(-1)
        plain = cache.fork()
        plain.step = None
        wanted = model(token, past_key_values=plain).logits
        found = model(token, past_key_values=cache).logits
    assert cache.step.own is None
    assert (found - wanted).norm() < 1e-3 * wanted.norm() and not torch.allclose(found, before, 1e-2)


def test_layers_whose_attention_is_left_out(device) -> None:
    model = build("llama", **TWO).to(device)
    found, wanted, cache = stepped(model, "drop(layers=[1])", 1, device)
    assert cache.step.own is None
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_what_is_picked_by_a_rounding_is_no_reason(device, monkeypatch) -> None:
    """A layer that reads what another one picked is held to the model's own code over the same tokens."""
    model = build("llama", **TWO).to(device)
    apart, put = fused._apart, Picked.put

    def compared(*given):
        with monkeypatch.context() as patch:  # the least of the tokens instead of the most
            patch.setattr(Picked, "put", lambda self, layer, received, spans: put(self, layer, -received, spans))
            return apart(*given)

    monkeypatch.setattr(fused, "_apart", compared)
    found, wanted, cache = stepped(model, "tidal(top=8, full_layers=0, select_layers=[0])", 1, device)
    assert cache.step.own is None
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.model
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=4)"])
def test_the_embedded_model_says_the_same(recipe: str, monkeypatch) -> None:
    """Greedy tokens by fused kernels and by the model's own code, in float32."""
    from fivefold.models import embedded

    embedded.fetch()
    model, tokenizer = embedded.load()
    model = model.to("cuda", torch.float32)
    prompt = tokenizer("The sea was calm, and the harbour master told me: " * 20, return_tensors="pt").to("cuda")
    said = []
    for own in (False, True):
        if own:
            monkeypatch.setattr(graph, "verified", lambda *given: "not here")
        cache = fivefold.compress(model, recipe, cuda_graph=True)
        said.append(model.generate(**prompt, past_key_values=cache, max_new_tokens=96, do_sample=False))
        assert cache.step.own == ("not here" if own else None) and cache.step.replays > 60
    assert torch.equal(*said)


@pytest.mark.parametrize("recipe", ["full()", pytest.param("h2o(keep=0.6)", marks=pytest.mark.slow)])
def test_steps_that_are_taken_before_they_are_begun(device, recipe: str, monkeypatch) -> None:
    """What a step needs is known from the one before, but where a page is new: it is launched, then begun. A step that
    fails behind that leaves nothing."""
    model, early = build("llama", **ONE).to(device), []
    monkeypatch.setattr(DeviceTables, "send_ahead", counting(DeviceTables.send_ahead, early))
    caches = [fivefold.compress(model, recipe, cuda_graph=graph) for graph in (True, False)]
    with torch.inference_mode():
        for cache in caches:
            model(ids(1, 40, device), past_key_values=cache)
        for number in range(6):
            token = ids(1, 1, device, number)
            if number in (3, 4):
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(Session, "admit" if number == 3 else "advance", interrupted)
                    model(ids(1, 1, device, 99), past_key_values=caches[0])
                assert caches[0].get_seq_length() == 40 + number
            found, wanted = (model(token, past_key_values=cache).logits for cache in caches)
            assert (found - wanted).norm() < 1e-3 * wanted.norm()
        assert caches[0].step.own is None and len(early) > 3
        taken = len(early)
        fork = caches[0].fork()  # whose pages must not be written to
        found, wanted = (model(token, past_key_values=cache).logits for cache in caches)
        assert (found - wanted).norm() < 1e-3 * wanted.norm() and len(early) == taken
        fork.free()
        weight = next(model.parameters())
        old, weight.data = weight.data, weight.data * 1.5  # what the step would read is there still
        for _ in range(2):
            found, wanted = (model(token, past_key_values=cache).logits for cache in caches)
            assert (found - wanted).norm() < 1e-3 * wanted.norm()
        weight.data = old


@pytest.mark.parametrize("recipe", ["full()", pytest.param("kivi(bits=4)", marks=pytest.mark.slow)])
@pytest.mark.parametrize("joined", [False, True], ids=["", "joined"])
def test_pages_of_a_step_are_there_before_it_is_begun(device, recipe: str, joined: bool, monkeypatch) -> None:
    """Sequences of different lengths, with a mask or each from a cache of its own, come to the end of a page at
    different steps; all steps but the first are launched, then begun. What was taken and is not used goes back."""
    model, early = build("llama", **ONE).to(device), []
    monkeypatch.setattr(DeviceTables, "send_ahead", counting(DeviceTables.send_ahead, early))
    mask = torch.ones(2, 62, dtype=torch.long, device=device)
    mask[1, :5] = 0
    caches = [fivefold.compress(model, recipe, cuda_graph=graph) for graph in (True, False)]

    def stepped(one: int, number: int) -> torch.Tensor:
        given = {} if joined else {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -1:] - 1}
        return model(ids(2, 1, device, number), past_key_values=caches[one], **given).logits

    with torch.inference_mode():
        for cache in caches:
            if joined:
                other = cache.new()
                model(ids(1, 62, device), past_key_values=cache)
                model(ids(1, 57, device, 1), past_key_values=other)
                cache.join(other)
            else:
                model(ids(2, 62, device), attention_mask=mask, past_key_values=cache)
        pool = caches[0].session.stores[0].exact_pool
        monkeypatch.setattr(pool, "trim", lambda: None)
        pool._grow(64)  # only what is free is taken ahead
        for number in range(8):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            (bank,) = caches[0].session.banks
            assert (bank.ahead is not None) == (number in (2, 7))
            pages = bank.ahead.pages if bank.ahead else ()
            if number == 2:
                with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(Session, "admit" if joined else "advance", interrupted)
                    stepped(0, 99)
            elif number == 7:
                assert len(early) == 6 and len(pages) == bank.heads and caches[0].report().forks == 0
                if joined:
                    caches[0].fork().free()
                else:
                    mask[0, -1] = 0  # it has no token in this step, which is launched before anybody looks
            found, wanted = stepped(0, number), stepped(1, number)
            assert (found - wanted).norm() < 1e-3 * wanted.norm()
            if len(pages):
                assert bank.ahead is None
        assert caches[0].step.own is None and caches[0].lengths().tolist() == caches[1].lengths().tolist()
        assert caches[0].step.replays == 9  # none is taken again
    assert pool.pages_in_use == len(bank.exact.held(bank.bounds.exact_pages))
    caches[0].free()
    assert pool.pages_in_use == 0


def test_generate_has_its_steps_launched_early(device, monkeypatch) -> None:
    """It gives a mask and positions, which are looked at once the step is under way."""
    model, early, said = build("llama", **ONE).to(device), [], []
    mask = torch.ones(2, 40, dtype=torch.long, device=device)
    mask[1, :9] = 0
    for steps in (early, []):
        with monkeypatch.context() as patch:
            patch.setattr(DeviceTables, "send_ahead", counting(DeviceTables.send_ahead, steps))
            cache = fivefold.compress(model, "full()", cuda_graph=steps is early)
            given = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
            said.append(model.generate(ids(2, 40, device), past_key_values=cache, **given))
    # Of nine steps the first is captured, and another one wants a page where none is free.
    assert torch.equal(*said) and len(early) == 7 and cache.step is None


def counting(real, calls: list):
    def call(*args):
        calls.append(args)
        return real(*args)

    return call


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt
