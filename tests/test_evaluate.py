"""The evaluation engine: exact where it must be, deterministic, resumable, honest about its uncertainty."""

import json
import math
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fivefold.errors import InputError, RecipeError
from fivefold.evaluate.engine import EXACT, Plan, Results, run, suite_lines
from fivefold.evaluate.intervals import bootstrap, wilson


@pytest.fixture(scope="module")
def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bare)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PLAN = Plan(("full()", "kivi(bits=2)", "streaming(sink=0, recent=8)"), ("fidelity", "passkey"), (900,), samples=2)


def figures(result):
    """A result without its times."""
    text = json.loads(json.dumps(result))
    for cell in text["cells"]:
        cell.pop("seconds")
        for row in cell["rows"]:
            row.pop("seconds")
    return text


@pytest.fixture(scope="module")
def result(model, tokenizer, tmp_path_factory):
    return run(model, tokenizer, PLAN, tmp_path_factory.mktemp("eval") / "kept.jsonl")


def test_full_is_the_exact_cache_and_worse_recipes_are_ranked_below(result):
    cells = {(cell["recipe"], cell["suite"]): cell for cell in result["cells"]}
    for recipe in (EXACT, "full()"):
        fidelity = cells[recipe, "fidelity"]
        assert fidelity["kl"] < 1e-4 and fidelity["top1"] == fidelity["top5"] == 1.0
        assert fidelity["diverges"] == 32
        assert fidelity["perplexity"] == pytest.approx(fidelity["exact_perplexity"], rel=1e-4)
    said = [[q["said"] for row in cells[r, "passkey"]["rows"] for q in row["questions"]] for r in (EXACT, "full()")]
    assert said[0] == said[1]
    kl = [cells[recipe, "fidelity"]["kl"] for recipe in ("full()", "kivi(bits=2)", "streaming(sink=0, recent=8)")]
    assert kl[0] < kl[1] < kl[2]
    assert cells["kivi(bits=2)", "fidelity"]["ratio"] < cells["full()", "fidelity"]["ratio"]
    assert len(cells["full()", "fidelity"]["rows"][0]["bins"]) == 4


def test_same_seed_same_file_another_seed_other_samples(model, tokenizer, tmp_path, result):
    again = run(model, tokenizer, PLAN, tmp_path / "again.jsonl")
    assert figures(again) == figures(result)
    other = run(model, tokenizer, Plan(("full()",), ("passkey",), (900,), 1, seed=1), tmp_path / "other.jsonl")
    asked = [q["answer"] for cell in other["cells"] for row in cell["rows"] for q in row["questions"]]
    before = [q["answer"] for cell in result["cells"] for row in cell["rows"] for q in row.get("questions", [])]
    assert not set(asked) & set(before)


def test_a_run_that_was_broken_off_goes_on_without_repeating(model, tokenizer, tmp_path, result):
    store, seen = tmp_path / "kept.jsonl", []

    def stop_after_five(done, total, what):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, PLAN, store, stop_after_five)
    with store.open("a") as file:
        file.write('{"key": "torn by a kill')
    finished = len(Results(store).rows)
    assert finished == 5
    whole = run(model, tokenizer, PLAN, store, lambda done, total, what: seen.append(total))
    assert set(seen) == {16 - finished}
    assert figures(whole) == figures(result)
    seen.clear()
    run(model, tokenizer, PLAN, store, lambda done, total, what: seen.append(total))
    assert set(seen) == {0}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"suites": ("pass_key",)}, InputError),
        ({"contexts": (100_000,)}, InputError),
        ({"contexts": (0,)}, InputError),
        ({"contexts": (20,)}, InputError),
        ({"samples": 0}, InputError),
        ({"recipes": ("kivy()",)}, RecipeError),
    ],
)
def test_bad_plans_get_one_sentence(model, tokenizer, tmp_path, change, error):
    settings = {"recipes": ("full()",), "suites": ("passkey",), "contexts": (900,), "samples": 1, **change}
    with pytest.raises(error) as caught:
        run(model, tokenizer, Plan(**settings), tmp_path / "kept.jsonl")
    assert len(str(caught.value).splitlines()) == 1


def test_a_store_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot keep results"):
        Results(tmp_path)


def test_every_suite_has_a_line():
    lines = suite_lines()
    assert len(lines) == 11 and all(lines.values())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("trials", [10, 40])
def test_wilson_intervals_cover(share, trials):
    pick = random.Random(1)
    covered = 0
    for _ in range(2000):
        low, high = wilson(sum(pick.random() < share for _ in range(trials)), trials)
        covered += low <= share <= high
    assert 0.92 <= covered / 2000 <= 0.99


def test_bootstrap_intervals_cover():
    pick = random.Random(2)
    covered = 0
    for _ in range(200):
        groups = [[pick.gauss(center, 1) for _ in range(3)] for center in (pick.gauss(0.7, 1) for _ in range(30))]
        low, high = bootstrap(groups, rounds=400, seed=3)
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(math.isnan(bound) for bound in bootstrap([]))
