"""Token policies against numbers from their authors' code (see tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fivefold.engine.layer import attend
from fivefold.methods.reads.tidal import Tidal
from fivefold.methods.tokens.d2o import D2O
from fivefold.methods.tokens.elastic import ElasticCache
from fivefold.methods.tokens.h2o import H2O
from fivefold.methods.tokens.keyformer import Keyformer
from fivefold.methods.tokens.snapkv import SnapKV
from fivefold.store import Held
from policies import Run

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def held(scores: torch.Tensor, positions: torch.Tensor | None = None, **settings: object) -> Held:
    """Rows with these scores, of one sequence."""
    rows, slots = scores.shape
    where = torch.arange(slots).expand(rows, -1) if positions is None else positions
    seen = int(where.max()) + 1
    return Held(0, rows, torch.arange(rows), where.int(), scores, **{"seen": seen, "prompt": seen, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(("sequence", "prompt"), [("s0", 48), ("s1", 41)])
def test_h2o(sequence: str, prompt: int) -> None:
    data = golden("h2o")
    heavy, recent = int(data["heavy"]), int(data["recent"])
    q, k, v = (data[f"{sequence}.{x}"][None, None] for x in "qkv")
    policy = H2O(keep=(heavy + recent) / prompt, recent=(recent + 0.5) / (heavy + recent))
    run = Run(policy, 4, 4, 16)
    for step in range(9):
        new = slice(0, prompt) if step == 0 else slice(prompt + step - 1, prompt + step)
        run.take(q[..., new, :], k[..., new, :], v[..., new, :])
        want = data[f"{sequence}.{step}.kept"]
        assert list(run.kept().values()) == want.tolist()
        (group,) = run.session.stores[0].groups
        assert group.held is not None
        scores = group.held.scores.gather(1, group.held.positions.argsort(1))
        assert torch.allclose(scores, data[f"{sequence}.{step}.score"], atol=1e-4)


@pytest.mark.parametrize("name", ["avg5", "avg7", "max7"])
def test_snapkv_per_query_head(name: str) -> None:
    """The authors' code repeats keys for every query head: so do we here."""
    data = golden("snapkv")
    window, capacity, kernel = data[f"{name}.settings"].tolist()
    q, k, v = (x if x.shape[1] == 4 else x.repeat_interleave(2, 1) for x in (data["q"], data["k"], data["v"]))
    policy = SnapKV(keep=capacity / 64, window=window, kernel=kernel, pooling="max" if name == "max7" else "mean")
    run = Run(policy, 4, 4, 16)
    run.take(q[None], k[None], v[None])
    want = data[f"{name}.kept"].flatten(0, 1).sort(-1).values
    got = torch.tensor(list(run.kept().values()))
    if name != "max7":
        assert torch.equal(got, want)
        return
    # Pooled maxima are often equal: then which one is taken is arbitrary, and only the scores must agree.
    score = data[f"{name}.score"].flatten(0, 1)
    for kept in (got, want):
        assert (kept[:, -window:] == torch.arange(64 - window, 64)).all()
    chosen = [score.gather(1, kept[:, :-window].long()).sort(-1).values for kept in (got, want)]
    assert torch.allclose(*chosen, atol=1e-5)


@pytest.mark.parametrize("name", ["snapkv", "snapkv_wide"])
def test_snapkv_per_kv_head_as_in_kvpress(name: str) -> None:
    data = golden("kvpress")
    _, window, kernel = data[f"{name}.settings"].tolist()
    want = data[f"{name}.kept"].flatten(0, 1).sort(-1).values
    policy = SnapKV(keep=want.shape[1] / 64, window=int(window), kernel=int(kernel))
    run = Run(policy, 2, 4, 16)
    run.take(data["q"][None], data["k"][None], data["v"][None])
    assert torch.equal(torch.tensor(list(run.kept().values())), want)


@pytest.mark.parametrize(("sequence", "prompt"), [("s0", 48), ("s1", 41)])
def test_keyformer_scores_and_first_choice(sequence: str, prompt: int) -> None:
    """Later choices of the authors' code never differ from the first (see `Keyformer`)."""
    data = golden("keyformer")
    recent, top = data[f"{sequence}.budget"].tolist()
    q, k = data[f"{sequence}.q"], data[f"{sequence}.k"]
    logits = q[:, :prompt] @ k[:, :prompt].transpose(1, 2) / 4 + data[f"{sequence}.0.noise"]
    logits.masked_fill_(torch.ones(prompt, prompt, dtype=torch.bool).triu(1), -1e30)
    scores = Keyformer.added((logits - logits.amax(-1, keepdim=True)).exp(), 1.0)
    assert torch.allclose(scores, data[f"{sequence}.0.score_all"], atol=1e-4)
    policy = Keyformer(keep=0.6, recent=(recent + 0.5) / (recent + top))
    kept = policy.priority(held(scores), recent + top).topk(recent + top).indices.sort(-1).values
    assert torch.equal(kept[:, :top].int(), data[f"{sequence}.0.next"][:, :top])
    assert (kept[:, top:] == torch.arange(prompt - recent, prompt)).all()
    before = data[f"{sequence}.0.score"]
    for step in range(1, 9):
        tau = float(data[f"{sequence}.{step}.tau"])
        assert tau == pytest.approx(Keyformer(steps=8).temperature(step))
        logits = data[f"{sequence}.{step}.logits"]
        alive = logits > -1e30
        noisy = torch.where(alive, logits + data[f"{sequence}.{step}.noise"], float("-inf"))
        weights = Keyformer.added((noisy - noisy.amax(-1, keepdim=True)).exp()[:, None], tau)
        score = weights + torch.nn.functional.pad(before, (0, weights.shape[1] - before.shape[1]))
        assert torch.allclose(score, data[f"{sequence}.{step}.score_all"], atol=1e-4)
        before = data[f"{sequence}.{step}.score"]


def test_d2o_merges_and_threshold() -> None:
    """On one head, where the official decision for a slot of all heads is one for a token."""
    data = golden("d2o")
    heavy, recent, alpha, beta = data["settings"].tolist()
    policy = D2O(keep=heavy + recent, recent=recent / (heavy + recent), alpha=alpha, beta=beta)
    k, v = data["twin.k"].view(1, -1, 16), data["twin.v"].view(1, -1, 16)
    q = data["twin.q"].view(1, -1, 16)
    steps = 8
    prompt = k.shape[1] - steps
    keys, values, positions = k[:, :prompt], v[:, :prompt], torch.arange(prompt)[None]
    logits = (q[:, :prompt] @ keys.transpose(1, 2) / 4).masked_fill(
        torch.ones(prompt, prompt, dtype=torch.bool).triu(1), float("-inf")
    )
    scores, extra = logits.softmax(-1).sum(1), {}
    merged = 0
    for step in range(1, steps + 1):
        at = prompt + step - 1
        keys, values = torch.cat([keys, k[:, at : at + 1]], 1), torch.cat([values, v[:, at : at + 1]], 1)
        positions = torch.cat([positions, torch.tensor([[at]])], 1)
        weights = (q[:, at : at + 1] @ keys.transpose(1, 2) / 4).softmax(-1)[:, 0]
        scores = weights + torch.nn.functional.pad(scores, (0, 1))
        now = held(scores, positions, extra=extra)
        want = data[f"twin.{step}.kept"].view(-1)
        budget = len(want)
        exact = D2O(keep=0.5, recent=int((prompt + 1) * recent) / budget + 1e-6)
        kept = exact.priority(now, budget).topk(budget).indices.sort(-1).values
        assert positions.gather(1, kept)[0].tolist() == want.tolist()
        before = keys.gather(1, kept[:, :, None].expand(-1, -1, 16))
        keys, values, extra = policy.merge(now, keys, values, kept)
        merged += not torch.equal(before, keys)
        assert torch.allclose(keys[0], data[f"twin.{step}.keys"].view(-1, 16), atol=1e-5)
        assert torch.allclose(values[0], data[f"twin.{step}.values"].view(-1, 16), atol=1e-5)
        assert float(extra["threshold"]) == pytest.approx(float(data[f"twin.{step}.threshold"]), abs=1e-5)
        scores, positions = scores.gather(1, kept), positions.gather(1, kept)
    assert merged > 1


@pytest.mark.parametrize("sequence", ["s0", "s1"])
def test_d2o_budgets_of_layers(sequence: str) -> None:
    data = golden("d2o")
    heavy, recent = data["settings"][:2].tolist()
    policy = D2O(keep=heavy + recent)
    q, k = data[f"{sequence}.q"], data[f"{sequence}.k"]
    prompt = q.shape[2] - 5
    statistics = []
    for layer in range(5):
        logits = q[layer, :, :prompt] @ k[layer, :, :prompt].transpose(1, 2) / 8**0.5
        logits.masked_fill_(torch.ones(prompt, prompt, dtype=torch.bool).triu(1), float("-inf"))
        statistic = policy.statistic(held(logits.softmax(-1).sum(1)))
        assert float(statistic.mean()) == pytest.approx(float(data[f"{sequence}.layer{layer}.variance"]), abs=1e-4)
        statistics.append(statistic.mean()[None])
    shares = policy.shares(torch.stack(statistics))[:, 0]
    assert float(shares.mean()) == pytest.approx(1)
    for layer in range(5):
        ratios = data[f"{sequence}.layer{layer}.ratios"].sum()
        assert float(shares[layer] * policy.keep) == pytest.approx(float(ratios), abs=1e-4)


@pytest.mark.parametrize(("sequence", "prompt"), [("s0", 64), ("s1", 57)])
def test_elastic(sequence: str, prompt: int) -> None:
    """Against the official code with its mistakes put right."""
    data = golden("elastic")
    q, k, v = (data[f"{sequence}.{x}"][:, None] for x in "qkv")
    run = Run(ElasticCache(keep=0.5), 2, 4, 16, layers=2)
    for step in range(9):
        new = slice(0, prompt) if step == 0 else slice(prompt + step - 1, prompt + step)
        query = q if step == 0 else torch.randn(2, 1, 4, 1, 16)
        run.take(query, k[..., new, :], v[..., new, :])
        for layer in range(2):
            want = data[f"{sequence}.fixed.{step}.kept"][layer].tolist()
            assert list(run.kept(layer).values()) == [want, want], (step, layer)
            if step in (0, 8):
                for head, (keys, values) in run.tokens(layer).items():
                    assert torch.allclose(keys, data[f"{sequence}.fixed.{step}.keys"][layer, head], atol=1e-5)
                    assert torch.allclose(values, data[f"{sequence}.fixed.{step}.values"][layer, head], atol=1e-5)


def test_tidal_picks_and_outputs() -> None:
    """Per query head, as upstream: each has its own copy of the keys. Where upstream did not pick the newest token,
    which is always read here, outputs differ."""
    data = golden("tidal")
    top, *selecting = data["settings"].tolist()
    q, k, v = data["q"], *(data[x].repeat_interleave(2, 2) for x in "kv")
    steps = q.shape[3]
    prompt = k.shape[3] - steps
    method = Tidal(top=top, full_layers=selecting[0], select_layers=tuple(selecting))
    run = Run(None, 4, 4, 16, layers=6, reads=method)
    run.take(torch.randn(6, 2, 4, prompt, 16), k[..., :prompt, :], v[..., :prompt, :])
    compared = 0
    for step in range(steps):
        new = slice(prompt + step, prompt + step + 1)
        picked = None
        for layer in range(6):
            run.session.arrive(layer)
            out = attend(
                run.session,
                layer,
                q[layer, :, :, step : step + 1],
                k[layer, :, :, new],
                v[layer, :, :, new],
                None,
                0.25,
            )[:, 0]
            if layer in selecting:
                picked = data[f"{step}.{layer}.picked"]
                (group,) = run.session.stores[layer].groups
                picks = run.session.picks.of(group)
                assert picks is not None
                got = picks.view(2, 4, top)
                assert torch.equal(got.sort(-1).values.int(), picked.sort(-1).values)
            same = torch.ones(2, 4, dtype=torch.bool)
            if layer > selecting[0] and layer not in selecting:
                assert picked is not None
                same = (picked == prompt + step).any(-1)
                compared += int(same.sum())
            assert torch.allclose(out[same], data[f"{step}.{layer}.output"][same], atol=1e-5)
            run.session.done(layer)
    assert compared > 10
