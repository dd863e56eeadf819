"""DuoAttention's trained gates: gradients, loss and schedule against plain references, runs, and what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import families
import fivefold
from conftest import FAMILIES, VOCAB
from fivefold.calibrate.gates import BETAS, RATE, Gates, Passkeys, distillation, price, rate
from fivefold.calibrate.learner import Subject
from fivefold.calibrate.profile import Profile, load_profile
from fivefold.calibrate.run import Stopped, calibrate
from fivefold.cli.app import app
from fivefold.errors import InputError, RecipeError, UnsupportedModelError
from fivefold.models.gated import frozen, gated, last_hidden_states
from fivefold.models.huggingface import make_cache
from fivefold.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class Letters:
    """A tokenizer whose tokens are a few characters long, so that short texts hold passkeys."""

    bos_token_id = eos_token_id = None

    def __init__(self, vocabulary: int = VOCAB) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, **_: Any) -> Any:
        parts = [text[i : i + 6] for i in range(0, len(text), 6)]
        ids = [sum(ord(c) * 31**n for n, c in enumerate(part)) % self.vocabulary for part in parts]
        return type("Encoding", (), {"input_ids": ids})


TEXT = "\n".join(f"Line {i} of a text that says nothing of vaults and does so at some length." for i in range(90))


def subject(model: Any, tokens: int = 768, seed: int = 0) -> Subject:
    specs = [store.spec for store in make_cache(model, Recipe()).session.stores.values()]
    return Subject(model, Letters(model.config.get_text_config().vocab_size), specs, [TEXT], tokens, seed)


def state(model: torch.nn.Module) -> Any:
    """What calibration might leave behind."""
    return (
        [(name, weight.requires_grad, weight.grad) for name, weight in model.named_parameters()],
        [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks), "forward" in vars(m)) for m in model.modules()],
        model.config.to_dict(),
        model.config._attn_implementation,
    )


# -- gradients --------------------------------------------------------------------------------------------


def by_hand(model: Any, ids: torch.Tensor, gates: torch.Tensor, sink: int, recent: int) -> torch.Tensor:
    """The last hidden state of a Llama whose heads are mixed by gates `[layer, kv_head]`, one head at a time."""
    config, tokens = model.config, ids.shape[1]
    dim, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    at = torch.arange(tokens)
    angles = at[:, None] / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def turn(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[:, dim // 2 :], x[:, : dim // 2]), -1) * sin

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    causal = at[None] <= at[:, None]
    window = causal & ((at[None] < sink) | (at[None] > at[:, None] - recent))
    x = model.model.embed_tokens.weight[ids[0]]
    for layer, share in zip(model.model.layers, gates):
        y, own = norm(x, layer.input_layernorm.weight), layer.self_attn
        heads = []
        for head in range(config.num_attention_heads):
            kv = head // groups
            q = turn(y @ own.q_proj.weight[head * dim : (head + 1) * dim].T)
            k = turn(y @ own.k_proj.weight[kv * dim : (kv + 1) * dim].T)
            v = y @ own.v_proj.weight[kv * dim : (kv + 1) * dim].T
            scores = q @ k.T / dim**0.5
            full, near = (scores.masked_fill(~seen, -math.inf).softmax(-1) @ v for seen in (causal, window))
            heads.append(share[kv] * full + (1 - share[kv]) * near)
        x = x + torch.cat(heads, -1) @ own.o_proj.weight.T
        y = norm(x, layer.post_attention_layernorm.weight)
        gate = torch.nn.functional.silu(y @ layer.mlp.gate_proj.weight.T)
        x = x + (gate * (y @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
    return norm(x, model.model.norm.weight)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_attention_written_by_hand(
    tiny: Callable[..., Any], implementation: str, recompute: bool
) -> None:
    model = tiny("llama", num_hidden_layers=2)
    model.set_attn_implementation(implementation)
    ids = torch.randint(0, VOCAB, (1, 53), generator=torch.Generator().manual_seed(0))
    gates = torch.tensor([[0.9, 0.3], [0.6, 0.0]])
    found, wanted = gates.clone().requires_grad_(), gates.double().requires_grad_()
    with frozen(model), torch.no_grad():
        teacher = last_hidden_states(model, ids)[:, 20:]
    with frozen(model), gated(model, dict(enumerate(found)), 3, 8, recompute):
        loss = distillation(teacher, last_hidden_states(model, ids)[:, 20:])
        loss.backward()
    twin = model
    hidden = by_hand(twin, ids, wanted.float(), 3, 8)
    plain = (by_hand(twin, ids, torch.ones(2, 2), 3, 8) - hidden)[20:].square().sum() / (33 * hidden.shape[1])
    (gradient,) = torch.autograd.grad(plain, wanted)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-4) and plain.item() > 1e-4
    assert (found.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max()
    assert gradient.abs().min() > 1e-3 * gradient.abs().max()  # all of them say something, those of layer 0 too


def golden() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "golden" / "duo_gates.json").read_text())


def test_one_layer_is_that_of_the_official_code(tiny: Callable[..., Any]) -> None:
    """Its two-way forward with equal inputs, its mask, distillation, regularisation and schedule."""
    known = golden()
    shape = known["shape"]
    config: Any = tiny("llama").config.__class__(
        hidden_size=shape["hidden"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"], num_hidden_layers=1, vocab_size=VOCAB, intermediate_size=8,
    )  # fmt: skip
    model = tiny("llama").__class__(config).eval()
    layer: Any = model.model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    for name in "qkvo":
        weight = getattr(layer, f"{name}_proj").weight.data
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    x = torch.randn(1, shape["tokens"], shape["hidden"], generator=generator)
    turned = model.model.rotary_emb(x, torch.arange(shape["tokens"])[None])
    outputs = []
    for gates in (torch.ones(2), torch.tensor(known["gates"])):
        with torch.no_grad(), gated(model, {0: gates}, shape["sink"], shape["recent"]):
            outputs.append(layer(x, position_embeddings=turned, attention_mask=None)[0])
    teacher, mixed = outputs
    for found, wanted in ((teacher, known["teacher"]), (mixed, known["mixed"])):
        assert (found[0, -1] - torch.tensor(wanted)).abs().max() <= 1e-4
    assert float(distillation(teacher[:, 14:], mixed[:, 14:])) == pytest.approx(known["distillation"], rel=1e-5)
    assert sum(known["gates"]) / 2 == pytest.approx(known["l1"])
    assert [rate(n, 23) / RATE for n in range(23)] == pytest.approx(known["schedule"])
    from fivefold.models.gated import _window

    seen = _window(shape["tokens"], torch.device("cpu"), shape["sink"], shape["recent"])[0, 0]
    assert ["".join("01"[int(b)] for b in row) for row in seen] == known["mask"]


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_every_family(tiny: Callable[..., Any], family: str) -> None:
    """Open gates are the model as it is, closed ones a model with window attention (`duo` without retrieval heads), and
    every gate matters."""
    model = tiny(family)
    before = state(model)
    ids = torch.randint(0, VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    layers = [spec.layer for spec in subject(model).specs]
    heads = subject(model).specs[0].kv_heads
    with torch.no_grad():
        plain = last_hidden_states(model, ids)
        with gated(model, {layer: torch.ones(heads) for layer in layers}, 2, 10):
            assert (last_hidden_states(model, ids) - plain).abs().max() <= 1e-4 * plain.abs().max()
        with gated(model, {layer: torch.zeros(heads) for layer in layers}, 2, 10):
            closed = model(ids, use_cache=False).logits
        cache = fivefold.compress(model, "duo(retrieval=[], sink=2, recent=10)")
        near = model(ids, past_key_values=cache).logits
        fivefold.restore(model)
    assert (closed - near).abs().max() <= 1e-4 * near.abs().max()
    gates = torch.full((len(layers), heads), 0.5, requires_grad=True)
    with frozen(model), gated(model, dict(zip(layers, gates)), 2, 10):
        distillation(plain, last_hidden_states(model, ids)).backward()
    assert gates.grad is not None and bool((gates.grad != 0).all())
    assert state(model) == before


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "llama4_text", "qwen3_next", "gpt2", "opt", "cohere2"])
def test_gates_of_families_with_attention_of_their_own(family: str) -> None:
    """Soft caps, attention sinks, chunks, linear layers, learned positions: eager attention has them all."""
    model = families.build(family)
    model.set_attn_implementation("eager")
    work = Gates(subject(model), 0.5, 4, 16)
    ids = torch.randint(0, VOCAB, (1, 96), generator=torch.Generator().manual_seed(0))
    loss, gradient = work.gradient(ids, 50)
    assert loss > 0 and bool((gradient != 0).all()) and gradient.shape == work.sums["gates"].shape
    work.sums["gates"].fill_(1)
    assert work.gradient(ids, 50)[0] <= 1e-9


def test_bfloat16_models_have_gates_in_float32(tiny: Callable[..., Any]) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    work = Gates(subject(model), 0.5, 4, 16)
    work.step(0)
    assert work.sums["gates"].dtype == torch.float32 and bool((work.sums["first"] != 0).all())
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())


# -- texts ------------------------------------------------------------------------------------------------


def test_texts_have_passkeys_and_questions_for_all_of_them() -> None:
    source = Passkeys(Characters(), [TEXT], 4000)
    ids, start = source.make(random.Random("0 3"))
    assert ids.shape == (1, 4000) and ids.dtype == torch.int64
    text = "".join(map(chr, ids[0].tolist()))
    context, questions = text[:start], text[start:]
    found = [part.split("\n")[0] for part in context.split("passkey to the vault: ")[1:]]
    asked = [part.split("\n")[0] for part in questions.split("Passkey: ")[1:]]
    assert found == asked and len(set(found)) == len(found) >= 2 and questions.startswith("Based on")
    assert all(len(passkey.split()) == 32 for passkey in found)
    assert torch.equal(source.make(random.Random("0 3"))[0], ids)
    assert not torch.equal(source.make(random.Random("0 4"))[0], ids)
    with pytest.raises(InputError, match=r"^texts of 200 tokens have no room for a passkey: learn from more"):
        Passkeys(Characters(), [TEXT], 200).make(random.Random(0))
    for texts in ([], [""], ["", ""]):
        with pytest.raises(InputError, match=r"^there is no text to learn from"):
            Passkeys(Characters(), texts, 4000).make(random.Random(0))


class Characters:
    """A tokenizer of characters."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": [ord(c) for c in text]})


# -- training ---------------------------------------------------------------------------------------------


def test_steps_are_those_of_adam_at_the_price(tiny: Callable[..., Any]) -> None:
    """Against torch's AdamW on gradients of distillation and `lambda * mean |gate|`."""
    work = Gates(subject(tiny("llama"), 768 * 12), 0.4, 4, 16)
    gates = work.sums["gates"].clone().requires_grad_()
    optimiser = torch.optim.AdamW([gates], RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: rate(n, work.total) / RATE)
    generator = torch.Generator().manual_seed(0)
    slope, worth = torch.randn(3, 2, generator=generator), torch.zeros(3, 2)
    for number in range(work.total):
        gradient = slope * 1e-3 + 1e-4 * torch.randn(3, 2, generator=generator)
        worth = BETAS[0] * worth - (1 - BETAS[0]) * gradient
        ordered = sorted((worth / (1 - BETAS[0] ** (number + 1))).flatten().tolist(), reverse=True)
        weight = 6 * max(0.0, (ordered[1] + ordered[2]) / 2)  # 0.4 of 6 gates are 2
        loss = (gates * gradient).sum() + weight * gates.mean()  # |gate| is gate
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        gates.data.clamp_(0, 1)
        work.update(gradient, number)
        assert torch.allclose(work.sums["gates"], gates.detach(), atol=1e-6), number


def test_the_price_parts_what_is_kept_from_the_rest() -> None:
    worth = torch.tensor([0.1, 0.5, -0.2, 0.4])
    assert price(worth, 0.5) == pytest.approx(0.25) and price(worth, 0.25) == pytest.approx(0.45)
    assert price(worth, 0.99) == 0.0 and price(worth, 0.001) == pytest.approx(0.45)
    assert price(-worth, 0.5) == 0.0 and price(worth[:1], 0.5) == 0.0


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(model: Any, out: Path, recipe: str = "duo(keep=0.4)", **options: Any) -> Profile:
    return calibrate(model, Letters(), recipe, out, **{"texts": [TEXT], "tokens": 768 * 3, **options})


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=2)
    before = state(model)
    whole = run(model, tmp_path / "whole")
    for stop in (1, 1):
        asked = iter(range(stop + 1))
        with pytest.raises(Stopped):
            run(model, tmp_path / "parts", stop=lambda stop=stop, asked=asked: next(asked) == stop)
        assert [path.name for path in (tmp_path / "parts").iterdir()] == ["calibration.partial.safetensors"]
    run(model, tmp_path / "parts")
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    other = run(model, tmp_path / "other", seed=1)
    assert not torch.equal(other.tensors["scores"], whole.tensors["scores"])
    assert state(model) == before
    assert whole.made["tokens"] == 768 * 3 and whole.settings["kind"] == "gates"
    assert whole.settings["steps"] == 3 and whole.settings["length"] == 384
    for name in ("scores", "gates"):
        assert whole.tensors[name].shape == (2, 2) and whole.tensors[name].dtype == torch.float32
        assert bool(((whole.tensors[name] >= 0) & (whole.tensors[name] <= 1 + (name == "scores"))).all())
    # It is a profile as any other.
    recipe = Recipe.parse(f'duo(keep=0.5, retrieval="{tmp_path / "whole"}")')
    specs = subject(model).specs
    heads = recipe.methods[0].retrieval_heads(specs[0])  # type: ignore[attr-defined]
    best = whole.tensors["scores"].flatten().argsort(descending=True, stable=True)[:2].tolist()
    assert heads == {divmod(i, 2) for i in best}


def test_the_model_is_as_it_was_whatever_happens(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    try:
        before = state(model)
        for recompute in (2048, 1):
            monkeypatch.setattr("fivefold.calibrate.gates.RECOMPUTE", recompute)
            work = Gates(subject(model), 0.5, 4, 16)
            with torch.inference_mode():
                work.step(0)
            assert state(model) == before
            layer = model.model.layers[2]
            failing = layer.mlp.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                work.step(1)
            failing.remove()
            work.close()
            assert state(model) == before
    finally:
        model.eval().requires_grad_(True)


def test_layers_that_are_not_compressed_have_no_gates(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Gemma-3's sliding layers; `keep` is then a share of the heads of the others."""
    model = tiny("gemma3_text")
    profile = run(model, tmp_path, "duo(keep=0.5)", tokens=768 * 2)
    scores = profile.tensors["scores"]
    assert scores[::2].eq(-1).all() and scores[1::2].ge(0).all()
    method: Any = Recipe.parse(f'duo(keep=0.5, retrieval="{tmp_path}")').methods[0]
    assert method.retrieval_heads(subject(model).specs[0]) == {(int(scores[:, 0].argmax()), 0)}


def test_longer_texts_and_windows_for_more_tokens(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")

    def sizes(tokens: int, sink: int = 64, recent: int = 256) -> tuple[int, ...]:
        work = Gates(subject(model, tokens), 0.5, sink, recent)
        assert work.tokens == 2 * work.total * work.length >= tokens
        return work.length, work.total, work.sink, work.recent

    assert sizes(65_536) == (384, 86, 19, 77)
    assert sizes(65_536, 4, 32) == (384, 86, 4, 32)
    assert sizes(65_536, 0, 500) == (384, 86, 0, 96)
    assert sizes(700) == (384, 1, 19, 77)
    assert sizes(16 * 65_536) == (1536, 342, 64, 256)
    assert sizes(1_000 * 65_536)[0] == 4096  # what the model reads at most


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe, told",
    [
        (
            "duo(retrieval=[[0, 1]])",
            r"^duo\(retrieval=\[\[0, 1\]\]\) names its retrieval heads and has nothing to learn",
        ),
        ('duo(retrieval="x")', r'^duo\(retrieval="x"\) names its retrieval heads'),
        ("duo(keep=0)", r"^duo\(keep=0.0\) tells no head from another: calibrate with a keep between 0 and 1"),
        ("duo(keep=1)", r"^duo\(keep=1.0\) tells no head from another"),
    ],
)
def test_recipes_with_nothing_to_learn(tiny: Callable[..., Any], tmp_path: Path, recipe: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        run(tiny("llama"), tmp_path / "x", recipe)
    assert not (tmp_path / "x").exists()


def test_attention_without_a_mask_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match=r"^gates cannot be trained with the attention 'flex_attention'"):
        run(model, tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"^layers of this gemma3n_text model share keys and values"):
        run(families.build("gemma3n_text"), tmp_path)


def test_the_command(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fivefold.cli.calibrate.load_model", lambda *_: (tiny("llama"), Letters()))
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT)
    command = ["calibrate", "-m", "x", "-r", "duo(keep=0.4)", "-o", str(out), "-t", str(text), "-n"]
    result = CliRunner().invoke(app, [*command, "1536"])
    assert result.exit_code == 0 and "duo learned from 1,536 tokens" in result.output and "Note" not in result.output
    assert load_profile(str(out), "duo", subject(tiny("llama")).specs[0].model).settings["steps"] == 2


# -- the embedded model -----------------------------------------------------------------------------------

SHAPE = "llama-l30-q9-kv3-d64-v49152"


def test_the_profile_that_ships_agrees_with_scores_made_without_training() -> None:
    gates, scores = (load_profile(f"{name}-{SHAPE}", "duo", SHAPE) for name in ("duo-gates", "duo"))
    assert gates.settings["kind"] == "gates" and gates.made["recipe"] == "duo(keep=0.15)"
    assert "kind" not in scores.settings and "echo + induction" in scores.settings["score"]
    best = [set(x.tensors["scores"].flatten().argsort(descending=True)[:27].tolist()) for x in (gates, scores)]
    assert len(best[0] & best[1]) >= 20
    assert len(gates.tensors["scores"].unique()) == 90  # no two heads tie
