"""Kascade: which layers are anchors, whose picks a head reads, and what a step reads of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import fivefold
from fivefold.calibrate.profile import Profile, save_profile
from fivefold.calibrate.reading import chunks
from fivefold.calibrate.run import calibrate
from fivefold.errors import InputError, ProfileError, RecipeError
from fivefold.methods.bits.kivi import Kivi
from fivefold.methods.reads.anchors import Anchors, _Likeness, choose
from fivefold.methods.tokens.h2o import H2O
from fivefold.store import Extent, LayerSpec
from policies import CPU, Run
from test_calibrate import TEXT, Words

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden" / "anchors.safetensors"


def specs(layers: int, kv_heads: int, query_heads: int, dim: int = 8) -> list[LayerSpec]:
    return [LayerSpec(i, layers, kv_heads, query_heads, dim, torch.float32, CPU) for i in range(layers)]


def profile_of(similarity: torch.Tensor, folder: Path) -> str:
    save_profile(folder, Profile("anchors", "", {"top": 1}, {"similarity": similarity.float()}))
    return str(folder)


def mapped(heads: torch.Tensor, folder: Path) -> str:
    """A profile by which head h of layer j is most like head `heads[j, h]` of every layer."""
    layers, kv_heads = heads.shape
    similarity = torch.zeros(layers, kv_heads, layers, kv_heads)
    for j, h in itertools.product(range(layers), range(kv_heads)):
        similarity[:, heads[j, h], j, h] = 1.0
    return profile_of(similarity, folder)


# -- the official code ------------------------------------------------------------------------------------


def test_similarities_anchors_and_head_maps_are_the_official_ones(tmp_path: Path) -> None:
    data = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        top = int(file.metadata()["top"])
    weights = data["likeness.attention"]  # [text, layer, kv_head, query_head, query, token]
    layers, kv_heads = weights.shape[1:3]
    learner = _Likeness(list(range(layers)), kv_heads, top)
    for text in weights:
        for layer, each in enumerate(text):
            learner.see(layer, {"attention": each.flatten(0, 1)[None]})
    settings, tensors = learner.finish(lambda *_: None)
    similarity = tensors["similarity"]
    assert settings == {"top": top}
    assert torch.allclose(similarity.permute(0, 2, 3, 1), data["likeness.similarity"], atol=1e-5)
    folder, some = profile_of(similarity, tmp_path / "p"), specs(layers, kv_heads, 2 * kv_heads)
    for count in range(2, layers):
        method = Anchors(top=top, sink=0, recent=0, anchors=count, profile=folder)
        want = data[f"likeness.anchors.{count}"].tolist()
        assert list(method.layers(some)) == want
        nearest = method.nearest(some)
        assert set(nearest) == set(range(layers)) - set(want)
        for layer, ranks in nearest.items():
            assert [head[0] for head in ranks] == data[f"likeness.heads.{count}"][layer].tolist()


def test_a_step_reads_what_the_official_one_does(tmp_path: Path) -> None:
    """Layers that reuse, and the first. Other anchors attend on their picks alone there."""
    data = load_file(GOLDEN)
    q, k, v, heads = (data[f"step.{name}"] for name in ("q", "k", "v", "map"))
    method = Anchors(top=128, anchors=(0, 2, 4), sink=0, recent=0, profile=mapped(heads, tmp_path / "p"))
    run = Run(None, 3, 6, 8, layers=6, reads=method)
    run.take(torch.randn(6, 1, 6, 199, 8), k[..., :-1, :], v[..., :-1, :])
    outputs = run.take(q, k[..., -1:, :], v[..., -1:, :])
    for layer in (0, 1, 3, 5):
        assert torch.allclose(outputs[layer], data["step.out"][layer], atol=1e-5), layer
    assert not torch.allclose(outputs[2], data["step.out"][2], atol=1e-3)


# -- which layers -----------------------------------------------------------------------------------------


def test_anchors_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(3)
    for layers in (1, 2, 5, 8):
        for count in range(1, layers + 1):
            between = rng.random((layers, layers)).astype(np.float32)

            def worth(anchors: tuple[int, ...], between: np.ndarray = between) -> float:
                return sum(float(between[max(a for a in anchors if a <= j), j]) for j in range(len(between)))

            every = [(0, *rest) for rest in itertools.combinations(range(1, layers), count - 1)]
            assert worth(choose(between, count)) == pytest.approx(max(map(worth, every)))
            assert len(set(choose(between, count))) == count


def test_roles(tmp_path: Path) -> None:
    """Anchors that no layer reads from need not pick."""
    some = specs(6, 2, 4)
    assert Anchors(anchors=(1, 2, 4)).roles(some) == ["full", "full", "select", "sparse", "select", "sparse"]
    assert Anchors(anchors=(0, 5)).roles(some) == ["select", *["sparse"] * 4, "full"]
    everywhere = Anchors(anchors=40, profile=profile_of(torch.ones(6, 2, 6, 2), tmp_path / "p"))
    assert everywhere.roles(some) == ["full"] * 6 and everywhere.nearest(some) == {}


# -- what a step reads ------------------------------------------------------------------------------------


class Reference:
    """What each layer of a step would give, from whole attention matrices over the tokens that rows hold.

    Rows by layer: keys and values of every token, decoded where they are packed, its position, and whether it is read
    in any case.
    """

    def __init__(self, method: Anchors, heads: torch.Tensor, windows: tuple[int, ...] = ()) -> None:
        self.method, self.heads, self.windows = method, heads.tolist(), windows

    def rows(self, run: Run, layer: int, k: torch.Tensor, v: torch.Tensor) -> dict[int, tuple[torch.Tensor, ...]]:
        found = {}
        for group in run.session.stores[layer].groups:
            keys, values = group.dense()
            stop = int(group.bounds.packed_stop)
            for at, row in enumerate(group.rows.tolist()):
                sequence, head = divmod(row, k.shape[1])
                count = keys.shape[1] + 1
                held = torch.arange(count - 1) if group.held is None else group.held.positions[at].long()
                positions = torch.cat([held, torch.tensor([int(group.bounds.seen)])])
                always = torch.arange(count) >= (stop or count - 1)
                new = (x[sequence, head] for x in (k, v))
                all_of = (torch.cat([x[at], y]) for x, y in zip((keys, values), new))
                found[row] = (*all_of, positions, always)
        return found

    def step(self, run: Run, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[dict[int, torch.Tensor]]:
        """Outputs `[query_heads per kv head, dim]` by layer and row. Call it before the step is taken."""
        some = [store.spec for store in run.session.stores.values()]
        kv_heads, top, picks, outputs = k.shape[2], self.method.top, {}, []
        for layer, role in enumerate(self.method.roles(some)):
            out, picked = {}, {}
            for row, (keys, values, positions, always) in self.rows(run, layer, k[layer], v[layer]).items():
                sequence, head = divmod(row, kv_heads)
                if head in self.windows:
                    continue
                query = q[layer, sequence, :, 0].unflatten(0, (kv_heads, -1))[head]
                scores = query @ keys.T / keys.shape[1] ** 0.5
                ranked = sorted(range(kv_heads), key=lambda g: g != self.heads[layer][head])
                source = next((g for g in ranked if g not in self.windows), None)
                if role == "sparse" and top < len(positions):
                    read = {int(p) for p in picks[sequence * kv_heads + source]}
                    seen = torch.tensor([int(p) in read for p in positions]) | always
                    scores = scores.masked_fill(~seen, -torch.inf)
                weights = scores.softmax(-1)
                out[row] = weights @ values
                if role == "select":
                    received, last = weights.sum(0), int(positions.max())
                    fixed = (positions < self.method.sink) | (positions > last - self.method.recent)
                    order = received.masked_fill(fixed, torch.inf).argsort(descending=True)
                    picked[row] = positions[order[:top]]
            if role == "select":
                picks = picked
            outputs.append(out)
        return outputs


HEADS = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 1, 0], [0, 1, 2], [2, 2, 1]])
PACKED = {"codec": "kivi", "residual": 32}
CASES: dict[str, dict[str, Any]] = {
    "exact": {},
    "kivi": PACKED,
    "h2o": {"policy": H2O(keep=0.7)},
    "h2o-kivi": {"policy": H2O(keep=0.7), **PACKED},
    "window": {"windows": (1,)},
    "window-kivi": {"windows": (1,), **PACKED},
}


@pytest.mark.parametrize("lengths", [(130, 130), (130, 77)], ids=["even", "ragged"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_steps_against_whole_matrices(
    case: str, kernels: str, lengths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", kernels)
    settings = dict(CASES[case])
    windows = settings.pop("windows", ())
    if "codec" in settings:
        settings["codec"] = Kivi(bits=4, residual=32).codec(specs(5, 3, 6, 32)[0])
    if windows:
        settings["extents"] = [Extent(4, 24) if head in windows else Extent() for head in range(3)]
    method = Anchors(top=24, anchors=(0, 3), sink=2, recent=5, profile=mapped(HEADS, tmp_path / "p"))
    run = Run(settings.pop("policy", None), 3, 6, 32, layers=5, reads=method, **settings)
    generator = torch.Generator().manual_seed(7)
    longest, steps = max(lengths), 4
    q = 2 * torch.randn(5, 2, 6, longest + steps, 32, generator=generator)
    k, v = torch.randn(2, 5, 2, 3, longest + steps, 32, generator=generator)
    mask = torch.stack([torch.arange(longest + steps) >= longest - n for n in lengths])
    run.take(*(x[..., :longest, :] for x in (q, k, v)), mask=mask[:, :longest])
    reference, compared = Reference(method, HEADS, windows), 0
    for step in range(longest, longest + steps):
        new = [x[..., step : step + 1, :] for x in (q, k, v)]
        wanted = reference.step(run, *new)
        outputs = run.take(*new, mask=mask[:, : step + 1])
        for layer, rows in enumerate(wanted):
            for row, want in rows.items():
                sequence, head = divmod(row, 3)
                got = outputs[layer][sequence, 0].unflatten(0, (3, 2))[head]
                assert torch.allclose(got, want, atol=2e-3 if "codec" in settings else 1e-5), (step, layer, row)
                compared += 1
    assert compared == steps * 5 * 2 * (3 - len(windows))


def test_without_a_head_that_picked_all_is_read(tmp_path: Path) -> None:
    """Where all heads of an anchor have windows."""
    heads = [Extent(4, 24)] * 2
    method = Anchors(top=8, anchors=(0,), sink=0, recent=0, profile=mapped(torch.tensor([[0, 1]] * 2), tmp_path / "p"))
    runs = [Run(None, 2, 2, 16, layers=2, reads=reads) for reads in (method, None)]
    for run in runs:
        store = run.session.stores[0]
        run.session.stores[0] = type(store)(store.spec, run.pools, heads, None, 0, None)
    q, k, v = torch.randn(3, 2, 1, 2, 81, 16, generator=torch.Generator().manual_seed(2))
    out = []
    for run in runs:
        run.take(q[..., :80, :], k[..., :80, :], v[..., :80, :])
        out.append(run.take(q[..., 80:, :], k[..., 80:, :], v[..., 80:, :]))
    assert torch.equal(out[0][1], out[1][1])


def prompt(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, 131, (batch, length), generator=torch.Generator().manual_seed(5))


def generate(model: Any, ids: torch.Tensor, cache: Any, new: int = 24) -> torch.Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("extra", ["", " + kivi(bits=4, residual=32)", " + h2o(keep=0.5)"])
def test_reading_all_that_there_is_is_exact(extra: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt(200, 2)
    plain = generate(model, ids, fivefold.compress(model, extra.removeprefix(" + ") or "full()"))
    assert torch.equal(generate(model, ids, fivefold.compress(model, f"anchors(top=224, anchors=[0]){extra}")), plain)


@pytest.mark.parametrize("extra", ["", " + kivi(bits=4, residual=32)", " + snapkv(keep=0.6)"])
def test_forks_go_on_as_what_they_were_forked_from(extra: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny("llama", num_hidden_layers=4), prompt(150)
    cache = fivefold.compress(model, f"anchors(top=16, anchors=[0, 2], recent=4){extra}")
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        fork = cache.fork()
        model(ids[:, 5:8], past_key_values=fork)
        for token in ids[:, :6].split(1, 1):
            again = cache.fork()
            assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=again).logits)


def test_first_and_recent_tokens_are_always_read(tiny: Callable[..., Any]) -> None:
    """With every pick one of them, a layer reads what one with a window of that size would."""
    model, ids = tiny("llama", num_hidden_layers=2), prompt(180)
    # One token more than the picks: as long as `streaming` takes before it forgets.
    cache = fivefold.compress(model, "anchors(top=44, anchors=[0], sink=4, recent=40)")
    window = fivefold.compress(model, "duo(retrieval=[[0, 0], [0, 1]], sink=4, recent=40)")
    with torch.inference_mode():
        for one in (cache, window):
            one.session.begin()
            one.session.commit()
        for token in ids.split(1, 1):  # no chunk, in which the second layer would read more than its window
            got, want = (model(token, past_key_values=one).logits for one in (cache, window))
    assert torch.allclose(got, want, atol=1e-4)


# -- what it learns ---------------------------------------------------------------------------------------


def test_it_learns_how_alike_layers_are(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Against whole attention matrices and sets of tokens."""
    model = tiny("llama", num_hidden_layers=4)
    profile = calibrate(model, Words(), "anchors(top=20, recent=4, anchors=2)", tmp_path / "x", [TEXT], 384)
    similarity = profile.tensors["similarity"]
    assert similarity.shape == (4, 2, 4, 2) and profile.settings == {"top": 20} and profile.made["tokens"] == 384
    model.set_attn_implementation("eager")
    (work,) = chunks(Words(), [TEXT], 384, 0, 4096, 8192)
    with torch.inference_mode():
        eager = model(input_ids=work, use_cache=False, output_attentions=True).attentions
    weights = [w[0, :, -32:].view(2, 2, 32, 384).sum(1) for w in eager]
    for i, g, j, h in itertools.product(range(4), range(2), range(4), range(2)):
        if i > j:
            assert similarity[i, g, j, h] == 0
            continue
        shares = []
        for query in range(32):
            mass, most = weights[j][h, query], weights[j][h, query].topk(20).values.sum()
            shares.append(float(mass[weights[i][g, query].topk(20).indices].sum() / most))
        assert float(similarity[i, g, j, h]) == pytest.approx(min(shares), abs=1e-4)
    cache = fivefold.compress(model, f'anchors(top=20, recent=4, anchors=2, profile="{tmp_path / "x"}")')
    assert sorted(cache.session.reads.roles.values()).count("sparse") == 2
    with pytest.raises(ProfileError, match="was made for"):
        fivefold.compress(tiny(), f'anchors(profile="{tmp_path / "x"}")')
    with pytest.raises(InputError, match="would pick every token"):
        calibrate(model, Words(), "anchors(top=500)", tmp_path / "y", [TEXT], 384)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("anchors(anchors=0)", "give a number from 1 on"),
        ("anchors(anchors=[])", "name layers"),
        ("anchors(anchors=[0, -1])", "name layers"),
        ("anchors(anchors=[0, 9])", "names layer 9"),
        ("anchors(top=30)", "no room for 4 first and 32 recent"),
        ("tidal(top=30, recent=32)", "no room for 0 first and 32 recent"),
        ("anchors() + tidal()", "both fill the slot"),
        ("anchors(profile='nowhere')", "there is no profile"),
        ("anchors()", "anchors=.0, 1, 12."),
    ],
)
def test_what_is_refused(recipe: str, words: str, tiny: Callable[..., Any]) -> None:
    with pytest.raises((RecipeError, ProfileError), match=words):
        fivefold.compress(tiny(), recipe)


@pytest.mark.model
@pytest.mark.slow
def test_the_embedded_model_out_of_the_box() -> None:
    """At 2,048 tokens, of which an eighth is read: the whole table is `benchmarks/anchors.py`'s."""
    from fivefold.evaluate.demo import make_task
    from fivefold.models import embedded

    embedded.fetch()
    model, tokenizer = embedded.load()
    task = make_task(tokenizer, 2048, continuation=32)
    with torch.inference_mode():
        base = fivefold.compress(model, "full()")
        model(task.prefix, past_key_values=base, logits_to_keep=1)
        logs = {}
        for recipe in ("full()", "anchors(top=256)", "tidal(top=256)"):
            cache, kind = base.fork(), fivefold.compress(model, recipe)
            cache.session.reads = kind.session.reads
            steps = [model(token, past_key_values=cache).logits[0, -1] for token in task.continuation.split(1, 1)]
            logs[recipe] = torch.stack(steps).log_softmax(-1)
    roles = list(fivefold.compress(model, "anchors()").session.reads.roles.values())
    assert roles.count("sparse") == 21
    exact = logs.pop("full()")
    kl = {recipe: float((exact.exp() * (exact - x)).sum(-1).mean()) for recipe, x in logs.items()}
    assert kl["anchors(top=256)"] < min(0.03, kl["tidal(top=256)"] / 2)
