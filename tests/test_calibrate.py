"""Calibration: what is captured, how a run is kept and resumed, and which profiles are refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from typer.testing import CliRunner

import fivefold
from conftest import FAMILIES, VOCAB
from fivefold.calibrate import Capture, Learner, Profile, config_hash, load_profile, save_profile, signature
from fivefold.calibrate.learner import CAPTURES
from fivefold.calibrate.reading import chunks, default_texts
from fivefold.calibrate.run import Stopped, calibrate
from fivefold.cli.app import app
from fivefold.errors import InputError, NonFiniteError, ProfileError, RecipeError
from fivefold.methods import Method, param
from fivefold.models.capture import capturing
from fivefold.models.rotary import rotate
from fivefold.recipe import Recipe
from fivefold.store import LayerSpec

pytestmark = pytest.mark.usefixtures("one_thread")


class Second(Learner):
    """Second moments of keys and of inputs; in a second pass, how far keys lie from the mean of the first."""

    passes = 2

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        keys = captured["keys"][0].double()
        if self.number == 0:
            self.add(f"keys.{layer}", keys.sum(1))
            self.add(f"inputs.{layer}", captured["inputs"][0].double().T @ captured["inputs"][0].double())
            self.add("count", torch.tensor(float(keys.shape[1] * (layer == 0))))
        else:
            self.add(f"spread.{layer}", (keys - self.sums[f"mean.{layer}"][:, None]).square().sum((0, 1)))

    def next_pass(self) -> None:
        for name in [name for name in self.sums if name.startswith("keys.")]:
            self.sums[name.replace("keys", "mean")] = self.sums.pop(name) / self.sums["count"]

    def finish(self, progress: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        return {"seen": int(self.sums["count"])}, {name: x.float() for name, x in self.sums.items()}


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A method `moments()` that learns, for one test."""
    from fivefold import methods

    methods.registered()
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))

    @methods.register(slot="bits", name="moments", paper="none")
    @dataclass(frozen=True)
    class Moments(Method):
        """A method for tests."""

        captures: ClassVar[tuple[Capture, ...]] = ("keys", "inputs")
        power: int = param(2, "nothing")

        def learner(self, specs: Sequence[LayerSpec]) -> Learner:
            return Second()

    yield


class Words:
    """A tokenizer of bytes below the vocabulary of the tiny models."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": [byte % VOCAB for byte in text.encode()]})


TEXT = " ".join(f"What is learned from text {i} is the same, wherever one stops on the way." for i in range(90))


# -- what is captured -------------------------------------------------------------------------------------


def projected(model: Any, layer: int, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Queries, keys and values before RoPE, by the module's own projections."""
    from fivefold.models.huggingface import attention_modules

    module: Any = attention_modules(model)[layer]
    config = model.config
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", heads)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if config.model_type == "gpt_neox":
        fused = module.query_key_value(inputs).unflatten(-1, (heads, 3 * dim)).transpose(1, 2)
        parts = fused.chunk(3, -1)
    elif config.model_type == "phi3":
        fused = module.qkv_proj(inputs).split([heads * dim, kv * dim, kv * dim], -1)
        parts = [x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in fused]
    else:
        made = (getattr(module, f"{x}_proj")(inputs) for x in "qkv")
        parts = [x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in made]
        if hasattr(module, "q_norm"):
            parts[:2] = [module.q_norm(parts[0]), module.k_norm(parts[1])]
    return dict(zip(("queries", "keys", "values"), parts))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_is_what_the_projections_make(tiny: Callable[..., Any], family: str) -> None:
    model = tiny(family)
    ids = torch.randint(0, VOCAB, (2, 37), generator=torch.Generator().manual_seed(0))
    seen: dict[int, dict[Capture, torch.Tensor]] = {}
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        with capturing(model, CAPTURES, seen.__setitem__):
            hooked = model(input_ids=ids, use_cache=False).logits
        assert torch.allclose(hooked, plain, atol=1e-5)
        assert sorted(seen) == list(range(model.config.num_hidden_layers))
        for layer, captured in seen.items():
            for name, wanted in projected(model, layer, captured["inputs"]).items():
                found = captured[name]  # type: ignore[index]
                assert found.dtype == torch.float32 and found.shape == wanted.shape, (layer, name)
                assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (layer, name)
        # Turned again, keys are what a cache of the model holds.
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache)
        embed = getattr(model, "gpt_neox", None) or model.model
        at = torch.arange(37)[None].expand(2, -1)
        for layer, captured in seen.items():
            kinds = (model.config.layer_types[layer],) if family == "gemma3_text" else ()
            cos, sin = embed.rotary_emb(captured["inputs"], at, *kinds)
            turned = rotate(captured["keys"], cos, sin)
            held = cache.layers[layer].keys
            assert (turned - held).abs().max() <= 1e-5 * held.abs().max()
        # The weights of the newest queries are those of the eager attention.
        model.set_attn_implementation("eager")
        eager = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        for layer, captured in seen.items():
            if family != "gemma3_text" or layer % 2:  # its even layers have a window
                assert captured["attention"].shape == (2, *eager[layer].shape[1:2], 32, 37)
                assert (captured["attention"] - eager[layer][:, :, -32:]).abs().max() <= 5e-5


def test_scaled_rope_is_undone(tiny: Callable[..., Any]) -> None:
    """YaRN scales cos and sin, so that turning back is not enough."""
    rope = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
    model = tiny("llama", rope_parameters=rope)
    seen: dict[int, dict[Capture, torch.Tensor]] = {}
    with torch.inference_mode(), capturing(model, ("keys", "inputs"), seen.__setitem__):
        model(input_ids=torch.arange(50)[None], use_cache=False)
        assert set(seen[1]) == {"keys", "inputs"}
        wanted = projected(model, 1, seen[1]["inputs"])["keys"]
    assert (seen[1]["keys"] - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_model_is_as_it_was(tiny: Callable[..., Any]) -> None:
    model = tiny()
    before = model.config._attn_implementation
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    with pytest.raises(ZeroDivisionError), capturing(model, CAPTURES, lambda layer, captured: None):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks


# -- runs -------------------------------------------------------------------------------------------------


def run(model: Any, out: Path, **options: Any) -> Profile:
    return calibrate(model, Words(), "moments()", out, **{"texts": [TEXT], "tokens": 700, **options})


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("moments")
def test_a_run_learns_what_the_whole_text_says(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fivefold.calibrate.reading.LENGTH", 128)
    model = tiny()
    profile = run(model, tmp_path / "a")
    pieces = chunks(Words(), [TEXT], 700, 0, 4096)
    assert [p.shape[1] for p in pieces] == [128] * 5 + [60] and profile.made["tokens"] == 700
    seen: list[tuple[int, dict[Capture, torch.Tensor]]] = []
    with torch.inference_mode(), capturing(model, ("keys", "inputs"), lambda *x: seen.append(x)):
        for piece in pieces:
            model(input_ids=piece, use_cache=False)
    for layer in range(3):
        keys = torch.cat([x["keys"][0].double() for i, x in seen if i == layer], 1)
        inputs = torch.cat([x["inputs"][0].double() for i, x in seen if i == layer])
        spread = (keys - keys.mean(1, keepdim=True)).square().sum((0, 1))
        for name, wanted in (("mean", keys.mean(1)), ("inputs", inputs.T @ inputs), ("spread", spread)):
            assert torch.allclose(profile.tensors[f"{name}.{layer}"].double(), wanted, rtol=1e-4, atol=1e-4)
    assert profile.settings == {"seen": 700} and sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "profile.json", "profile.safetensors",
    ]  # fmt: skip
    loaded = load_profile(str(tmp_path / "a"), "moments", signature(model.config), config_hash(model.config))
    assert loaded.settings == profile.settings and loaded.made == profile.made
    assert all(torch.equal(loaded.tensors[name], x) for name, x in profile.tensors.items())
    assert str(tmp_path) not in (tmp_path / "a" / "profile.json").read_text()


@pytest.mark.usefixtures("moments")
@pytest.mark.parametrize("stops", [(1,), (5, 7), (11,), (3, 6, 12)])
def test_a_run_that_is_stopped_goes_on_and_ends_the_same(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]
) -> None:
    """With 6 chunks and two passes: within a pass, between the two, at the end of the last."""
    monkeypatch.setattr("fivefold.calibrate.reading.LENGTH", 128)
    model = tiny()
    whole = run(model, tmp_path / "whole")
    reads = 0
    forward = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal reads
        reads += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    for stop in stops:
        if stop < 12:
            with pytest.raises(Stopped, match=f"^stopped after {stop} of 12 steps"):
                run(model, tmp_path / "parts", stop=lambda stop=stop: reads >= stop)
            assert [p.name for p in (tmp_path / "parts").iterdir()] == ["calibration.partial.safetensors"]
    parts = run(model, tmp_path / "parts")
    assert reads == 12  # none was read twice
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")
    assert parts.settings == whole.settings
    # A finished run is not run again; the folder of another one is left alone.
    run(model, tmp_path / "parts")
    assert reads == 12
    with pytest.raises(ProfileError, match="holds another profile"):
        run(model, tmp_path / "parts", seed=1)


@pytest.mark.usefixtures("moments")
def test_a_run_that_is_broken_off_loses_a_chunk_at_most(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fivefold.calibrate.reading.LENGTH", 128)
    model = tiny()
    see, calls = Second.see, 0

    def broken(self: Learner, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 * 4 + 2:  # in the second layer of the fifth chunk
            raise KeyboardInterrupt
        see(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("fivefold.calibrate.run._SHARE", float("inf"))
    monkeypatch.setattr(Second, "see", broken)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "parts")
    run(model, tmp_path / "parts")
    assert calls == 3 * 4 + 2 + 3 * 8
    run(model, tmp_path / "whole")
    assert bytes_of(tmp_path / "parts") == bytes_of(tmp_path / "whole")


@pytest.mark.usefixtures("moments")
def test_another_run_is_not_mixed_in(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fivefold.calibrate.reading.LENGTH", 128)
    model, asked = tiny(), iter([False, False, True])
    with pytest.raises(Stopped):
        run(model, tmp_path, stop=lambda: next(asked))
    for change, told in (
        ({"seed": 3}, "seed=0, not 3"),
        ({"tokens": 600}, "tokens=700, not 600"),
        ({"texts": [TEXT + "x"]}, "text_sha256="),
    ):
        with pytest.raises(ProfileError, match=f"unfinished work of another calibration .{told}"):
            run(model, tmp_path, **change)
    with pytest.raises(ProfileError, match=r"unfinished work of another calibration .config="):
        run(tiny("llama", attention_bias=True), tmp_path)
    partial = tmp_path / "calibration.partial.safetensors"
    whole = partial.read_bytes()
    partial.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ProfileError, match="delete it to begin anew"):
        run(model, tmp_path)
    partial.write_bytes(whole)
    run(model, tmp_path)


@pytest.mark.usefixtures("moments")
def test_a_seed_chooses_the_pieces(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fivefold.calibrate.reading.LENGTH", 128)
    model = tiny()
    a, b, c = (run(model, tmp_path / str(n), seed=s).tensors["mean.0"] for n, s in enumerate((1, 1, 2)))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1")


def test_pieces_begin_as_the_tokenizer_begins() -> None:
    class Begins(Words):
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
            found = super().__call__(text)
            if add_special_tokens:
                found.input_ids = [1, *found.input_ids]
            return found

    pieces = chunks(Begins(), [TEXT], 300, 0, 100)
    assert [p.shape[1] for p in pieces] == [100] * 3 and all(p[0, 0] == 1 for p in pieces)
    assert len({tuple(p[0, 1:].tolist()) for p in pieces}) == 3
    # Fewer tokens than asked for, and too few.
    assert sum(p.shape[1] for p in chunks(Words(), ["a b " * 100], 5000, 0, 4096)) == 400
    with pytest.raises(InputError, match=r"^40 tokens of text are too few"):
        chunks(Words(), ["abcd" * 10], 5000, 0, 4096)
    with pytest.raises(InputError, match=r"^8 tokens of text are too few"):
        chunks(Words(), [TEXT], 8, 0, 4096)


def test_the_default_text_is_long_enough() -> None:
    from fivefold.calibrate.run import TOKENS

    assert sum(map(len, default_texts())) > 8 * TOKENS


@pytest.mark.usefixtures("moments")
def test_what_is_not_finite_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama", seed=5)
    weight = model.model.layers[1].self_attn.k_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3, 3] = float("inf")
        with pytest.raises(NonFiniteError, match=r"^the keys of layer 1 hold infinities or NaN"):
            run(model, tmp_path)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_recipes_that_learn_nothing(tiny: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^nothing in the recipe 'kivi\(\)' learns from the model: "):
        calibrate(tiny(), Words(), "kivi()", tmp_path)
    result = CliRunner().invoke(app, ["calibrate", "-r", "streaming()", "-o", str(tmp_path / "x")])
    assert (
        result.exit_code == 2
        and "use one with" in result.output
        and "tidal" in result.output
        and not (tmp_path / "x").exists()
    )


@pytest.mark.usefixtures("moments")
def test_the_command(tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fivefold.calibrate.reading.LENGTH", 128)
    monkeypatch.setattr("fivefold.cli.calibrate.load_model", lambda *_: (tiny(), Words()))
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT)
    command = ["calibrate", "-m", "x", "-r", "moments()", "-o", str(out), "-t", str(text)]
    see, calls = Second.see, 0

    def interrupted(self: Learner, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGINT)
        see(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Second, "see", interrupted)
    result = CliRunner().invoke(app, [*command, "-n", "700"])
    assert result.exit_code == 130 and "goes on from there" in result.output and calls == 6
    result = CliRunner().invoke(app, [*command, "-n", "700"])
    assert result.exit_code == 0 and str(out) in result.output and calls == 6 * 2 * 3
    assert bytes_of(out) == bytes_of(run_to(tiny(), tmp_path / "same"))
    for options, told in (
        ((*command, "-n", "600"), "holds another profile"),
        ((*command[:-2], "-t", str(tmp_path / "none")), "the text file"),
        ((*command[:6], str(text), *command[7:]), "cannot write the profile"),
    ):
        result = CliRunner().invoke(app, list(options))
        assert result.exit_code == 2 and told in result.output and result.output.count("\n") == 1, result.output
    result = CliRunner().invoke(app, [*command[:6], str(tmp_path / "all"), *command[7:]])
    assert (
        result.exit_code == 0 and f"Note: the text has {len(TEXT) // 128 * 128:,} tokens of the 65,536" in result.output
    )


def run_to(model: Any, out: Path) -> Path:
    run(model, out)
    return out


def test_tidal_learns_where_to_pick_again(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against whole attention matrices and sets of tokens."""
    monkeypatch.setattr("fivefold.calibrate.reading.LENGTH", 128)
    model = tiny("llama", num_hidden_layers=6)
    recipe = "tidal(top=20, full_layers=1)"
    profile = calibrate(model, Words(), recipe, tmp_path / "x", [TEXT], 384)
    recall = dict.fromkeys(range(2, 6), 0.0)
    model.set_attn_implementation("eager")
    for piece in chunks(Words(), [TEXT], 384, 0, 4096):
        with torch.inference_mode():
            eager = model(input_ids=piece, use_cache=False, output_attentions=True).attentions
        weights = [w[0, :, -32:].view(2, 2, 32, 128).mean(1) for w in eager]
        for again in recall:
            shares = []
            for layer in {*range(2, 6)} - {again}:
                source = weights[1 if layer < again else again]
                for head in range(2):
                    for query in range(32):
                        top = source[head, query].topk(20).indices.tolist()
                        shares.append(sum(float(weights[layer][head, query, t]) for t in top))
            recall[again] += sum(shares) / len(shares) / 3
    assert profile.tensors["recall"][2:].tolist() == pytest.approx(list(recall.values()), rel=1e-4)
    best = max(recall, key=recall.__getitem__)
    assert int(profile.tensors["layer"]) == best and profile.settings == {"top": 20, "full_layers": 1}
    cache = fivefold.compress(model, f'tidal(top=20, full_layers=1, select_layers="{tmp_path / "x"}")')
    assert [i for i, role in cache.session.reads.roles.items() if role == "select"] == sorted({1, best})
    with pytest.raises(ProfileError, match="there is no profile"):
        fivefold.compress(model, 'tidal(select_layers="nowhere")')
    with pytest.raises(ProfileError, match="was made for"):
        fivefold.compress(tiny(), f'tidal(select_layers="{tmp_path / "x"}")')
    with pytest.raises(RecipeError, match="leaves no layer to choose"):
        calibrate(tiny(), Words(), "tidal(full_layers=2)", tmp_path / "y", [TEXT], 384)


# -- profiles ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.int64)}
    save_profile(tmp_path, Profile("m", "llama-l1", {"x": 1}, tensors, "abc", {"seed": 0}))
    return tmp_path


def test_a_profile_comes_back(saved: Path) -> None:
    profile = load_profile(str(saved), "m", "llama-l1", "abc")
    assert (profile.settings, profile.made, profile.config) == ({"x": 1}, {"seed": 0}, "abc")
    assert torch.equal(profile.tensors["a"], torch.arange(6.0).view(2, 3))
    assert load_profile(str(saved), "m", "llama-l1").tensors["b"].tolist() == [1, 1]  # nothing to compare with


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "profile.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bad_profiles_are_refused_in_a_sentence(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    def cut(path: Path, share: float) -> None:
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)

    tensors, text = "profile.safetensors", "profile.json"
    cases: list[tuple[str, Callable[[Path], Any]]] = [
        ("tensors do not match", lambda f: cut(f / tensors, 0.6)),
        ("tensors do not match", lambda f: flip(f / tensors)),
        ("tensors do not match", lambda f: save_file({"a": torch.zeros(2, 3)}, f / tensors)),
        ("cannot be read", lambda f: cut(f / text, 0.5)),
        ("cannot be read", lambda f: (f / text).write_text("[]")),
        ("cannot be read", lambda f: (f / text).write_text("{}")),
        ("cannot be read", lambda f: (f / tensors).unlink()),
        ("there is no profile", lambda f: (f / text).unlink()),
        ("has format 99: update Fivefold", lambda f: edit(f, format=99)),
        ("has the old format 1", lambda f: edit(f, format=1, settings={"x": 2})),
        ("cannot be read", lambda f: edit(f, format="new")),
        ("cannot be read", lambda f: (f / text).write_text("[" * 100_000)),
        ("was changed", lambda f: edit(f, settings={"x": 2})),
        ("was changed", lambda f: edit(f, made={"seed": 9})),
        ("cannot be read", lambda f: edit(f, check=None, format=None)),
    ]
    for number, (told, damage) in enumerate(cases):
        folder = tmp_path_factory.mktemp("damaged") / str(number)
        shutil.copytree(saved, folder)
        damage(folder)
        with pytest.raises(ProfileError, match=told) as caught:
            load_profile(str(folder), "m", "llama-l1", "abc")
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    for method, model, config, told in (
        ("n", "llama-l1", "abc", "is for m, not for n"),
        ("m", "llama-l2", "abc", "was made for llama-l1, and this model is llama-l2"),
        ("m", "llama-l1", "xyz", "another"),
    ):
        with pytest.raises(ProfileError, match=told):
            load_profile(str(saved), method, model, config)


def test_a_profile_that_changes_on_disk_is_read_anew(saved: Path) -> None:
    load_profile(str(saved), "m", "llama-l1")
    save_profile(saved, Profile("m", "llama-l1", {"x": 3}, {"a": torch.zeros(1)}))
    for name in ("profile.json", "profile.safetensors"):
        os.utime(saved / name, (1, 1))  # clocks may be coarse
    assert load_profile(str(saved), "m", "llama-l1").settings == {"x": 3}
    assert load_file(saved / "profile.safetensors")["a"].shape == (1,)


def test_configurations_have_a_hash(tiny: Callable[..., Any]) -> None:
    one, two = tiny().config, tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}).config
    assert signature(one) == signature(two) and config_hash(one) != config_hash(two)
    assert config_hash(one) == config_hash(type(one).from_dict(one.to_dict()))


@pytest.mark.usefixtures("moments")
def test_only_compressed_layers_are_learned_from(tiny: Callable[..., Any], tmp_path: Path) -> None:
    assert Recipe.parse("moments()").methods[0].captures
    profile = run(tiny("gemma3_text"), tmp_path)
    assert {name.split(".")[1] for name in profile.tensors if "." in name} == {"1", "3"}
