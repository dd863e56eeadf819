"""RULER asked of models: one that knows all answers, one that knows none, the embedded one; scores and intervals."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import ruler_data
from fivefold.errors import InputError
from fivefold.evaluate import html, tables
from fivefold.evaluate.engine import EXACT, Plan, run
from fivefold.evaluate.intervals import lost_variance, mean_of_parts, share_interval
from fivefold.evaluate.ruler import KINDS
from fivefold.evaluate.score import answer, printable
from fivefold.evaluate.summary import exact_fails, summarise
from fivefold.evaluate.tasks import Question
from test_ruler import made, total

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_answer_may_have_lines_and_ends_where_the_model_ends_it() -> None:
    tokenizer = ruler_data.Words()
    assert printable(" \n7\x00 8\t9\n") == "7\n 8\n9"

    class Says:
        """Says token after token of what it was given, whatever it is asked."""

        device = torch.device("cpu")
        generation_config = type("Ends", (), {"eos_token_id": [9999, 7777]})

        def __init__(self, ids: list[int]) -> None:
            self.ids = ids

        def __call__(self, tokens: torch.Tensor, past_key_values: list[Any], logits_to_keep: int) -> Any:
            past_key_values.append(tokens.tolist())
            logits = torch.zeros(1, 1, 10_000)
            logits[0, 0, self.ids[len(past_key_values) - 1]] = 1.0
            return type("Out", (), {"logits": logits})

    ids = tokenizer(" They are 7,\n8 and 9.").input_ids
    asked = Question("", "7, 8, 5", ids=(1, 2), references=("7", "8", "5"), limit=len(ids) + 1)
    cache: list[Any] = []
    given = answer(Says([*ids, 7777]), tokenizer, cache, asked, "match_all")
    assert given.said == "They are 7,\n8 and 9." and given.score == pytest.approx(2 / 3) and given.right is False
    assert answer(Says([*ids, 7777]), tokenizer, cache, asked, "match_part").score == 1
    cut = dataclasses.replace(asked, limit=4)
    assert answer(Says(ids), tokenizer, cache, cut, "match_all").score == pytest.approx(1 / 3)
    assert cache == []


class Oracle(LlamaForCausalLM):
    """A small random model that knows what to say to the questions it was told of."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.saying: list[int] = []

    def forward(self, input_ids: Any = None, **more: Any) -> Any:
        out = super().forward(input_ids, **more)
        self.saying = list(self.answers.get(tuple(input_ids[0].tolist()), self.saying))
        if self.saying:
            out.logits[0, -1] = 0
            out.logits[0, -1, self.saying.pop(0)] = 100
        return out


def oracle() -> Oracle:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1300, initializer_range=0.1,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return Oracle(config).eval()


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """All kinds, with answers that are right in full."""
    model, tokenizer = oracle(), ruler_data.Words()
    tokenizer("\0")  # ends an answer
    model.generation_config.eos_token_id = [0]
    plan = Plan(("streaming(sink=0, recent=8)",), ("ruler",), (1300,), 1)
    for suite in plan.suites:
        sample = plan.task(suite).make(tokenizer, 1300, random.Random(f"0/{suite}/1300/0"))
        said = f" {sample.questions[0].answer}"
        model.answers[sample.questions[0].ids] = [*tokenizer(said).input_ids, 0]
    return run(model, tokenizer, plan, tmp_path_factory.mktemp("ruler") / "kept.jsonl")


def test_who_knows_all_answers_has_100(result: Any) -> None:
    assert [cell["score"] for cell in result["cells"]] == [1.0] * 26
    assert not any(cell["exact_fails"] for cell in result["cells"])
    assert [entry["recipe"] for entry in result["ruler"]] == [EXACT, "streaming(sink=0, recent=8)"]
    assert all(entry["score"] == 1 and 0.5 < entry["low"] < 1 == entry["high"] for entry in result["ruler"])
    assert all(cell["rows"][0]["parts"] for cell in result["cells"])
    assert json.loads(json.dumps(result, allow_nan=False))["plan"]["suites"] == [f"ruler:{name}" for name in KINDS]
    assert "planted facts" in result["suites"]["ruler:qa_1"]["line"]


def test_the_average_is_shown(result: Any) -> None:
    console = Console(width=80, file=io.StringIO())
    for part in tables.show(result):
        console.print(part)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    (line,) = [line for line in shown.splitlines() if line.startswith("RULER average ")]
    assert line.split()[2:] == ["100"] * 2 and "ruler:niah_multikey_3" in shown
    # Nine recipes side by side.
    crowd = [f"kivi(bits={bits})" for bits in range(7)]
    many = {
        name: [*result[name], *({**result[name][-1], "recipe": recipe} for recipe in crowd)]
        for name in ("ranking", "ruler")
    }
    console = Console(width=80, file=io.StringIO(), force_terminal=True)
    for part in tables.show(result | many):
        console.print(part, crop=False)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()).splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if line.startswith("RULER average")).split()[2:] == ["100"] * 9
    page = "".join(html._ruler(result))
    assert page.count("<td>100.0 <small>(") == 2 and "RULER average" in page
    some = {**result, "ruler": []}
    assert not "".join(html._ruler(some))


def test_who_knows_nothing_has_0_and_recipes_run_all_the_same(tmp_path: Path) -> None:
    plan = Plan(("full()",), ("ruler:vt", "ruler:niah_single_2"), (1300,), 2)
    store = tmp_path / "kept.jsonl"
    result = run(oracle(), ruler_data.Words(), plan, store)
    assert [(cell["score"], cell["exact_fails"]) for cell in result["cells"]] == [(0.0, True)] * 4
    assert result["ruler"] == [] and len(store.read_text().splitlines()) == 8
    seen: list[int] = []
    again = run(oracle(), ruler_data.Words(), plan, store, lambda done, total, what: seen.append(total))
    assert set(seen) == {0} and again["cells"] == result["cells"]
    rows = [row["questions"][0] for cell in result["cells"][:2] for row in cell["rows"]]
    assert rows[0]["said"] == rows[2]["said"] and rows[0]["answer"] != rows[1]["answer"]  # full() is exact


def test_a_context_holds_question_and_answer_but_no_more_than_the_model_takes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1301 tokens is too long here: use at most 1300"):
        run(oracle(), ruler_data.Words(), Plan(("full()",), ("ruler:vt",), (1301,), 1), tmp_path / "a")
    with pytest.raises(InputError, match="use at most 788"):  # room for what follows the contexts of other suites
        run(oracle(), ruler_data.Words(), Plan(("full()",), ("ruler:vt", "passkey"), (1300,), 1), tmp_path / "b")
    with pytest.raises(InputError, match="too short for RULER's cwe"):
        run(oracle(), ruler_data.Words(), Plan(("full()",), ("ruler:cwe",), (300,), 1), tmp_path / "c")


# --- intervals ---------------------------------------------------------------------------------------------


def row(*scores: float, parts: bool = True) -> dict[str, Any]:
    figures = {"ratio": 1, "bytes": 1, "prefill_s": 1, "seconds": 1}
    return figures | {"questions": [{"score": score, "chance": 0.0} for score in scores], "parts": parts}


def test_answers_right_in_part_have_intervals_even_if_all_are_alike() -> None:
    scores = {EXACT: [row(0.25), row(0.25)], "kivi()": [row(0.25), row(0.0)]}
    found = {(1024, f"ruler:{name}"): scores for name in KINDS}
    summed = summarise(found, ("kivi()",))
    for cell in summed["cells"]:
        assert cell["low"] < cell["score"] < cell["high"] - 0.2
    exact, other = summed["ruler"]
    assert (exact["score"], other["score"]) == (0.25, 0.125) and exact["low"] < 0.25 < exact["high"] < 0.5
    entry = next(entry for entry in summed["ranking"] if entry["recipe"] == "kivi()")
    assert entry["quality"] == pytest.approx(0.5) and entry["low"] < 0.5 < entry["high"]
    assert not exact_fails([row(0.25)]) and exact_fails([row(0.0)])
    missing = dict(list(found.items())[:12])
    assert summarise(missing, ("kivi()",))["ruler"] == []


def test_intervals_of_shares_hold_for_answers_right_in_part() -> None:
    pick = random.Random(0)
    for chances in ([0.2, 0.2, 0.2, 0.4], [0.0, 0.9]):
        covered = 0
        for _ in range(1000):
            groups = [[sum(pick.random() < pick.choice(chances) for _ in range(4)) / 4] for _ in range(12)]
            low, high = share_interval(groups)
            covered += low <= sum(chances) / len(chances) <= high
        assert covered >= 940
    assert lost_variance([[1.0, 0.0]] * 8, [[1.0, 1.0]] * 8) == lost_variance([[0.0, 1.0]] * 8, [[1.0, 1.0]] * 8)
    assert lost_variance([[0.5]] * 8, [[0.25]] * 8) < lost_variance([[1.0]] * 8, [[0.5]] * 8)


def test_intervals_of_means_of_parts_cover() -> None:
    pick, covered = random.Random(1), 0
    truth = [pick.random() for _ in range(13)]
    for _ in range(1000):
        parts = []
        for share in truth:
            groups = [[float(pick.random() < share)] for _ in range(10)]
            parts.append((sum(group[0] for group in groups) / 10, *share_interval(groups)))
        mean, low, high = mean_of_parts(parts)
        assert low <= mean <= high
        covered += low <= sum(truth) / 13 <= high
    assert 0.93 <= covered / 1000 <= 0.99


# --- with the embedded model -------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_embedded_model_finds_a_needle_and_a_forgetful_cache_does_not(tmp_path: Path) -> None:
    from fivefold.models import embedded

    embedded.fetch()
    model, tokenizer = embedded.load()
    for name in KINDS:
        sample = made(name, tokenizer, 1024)
        assert 930 < total(sample, name) <= 1024
        assert tokenizer.decode(sample.prefix).startswith("<|im_start|>system\n")
        begun = tokenizer.decode(sample.questions[0].ids).split("<|im_end|>\n<|im_start|>assistant\n")[1]
        assert sample.questions[0].text.endswith(begun)
    forgetful = "streaming(sink=0, recent=8)"
    result = run(model, tokenizer, Plan(("full()", forgetful), ("ruler:niah_single_1",), (512,), 1), tmp_path / "kept")
    assert [cell["score"] for cell in result["cells"]] == [1.0, 1.0, 0.0]
    said = [[row["questions"][0]["said"] for row in cell["rows"]] for cell in result["cells"]]
    assert said[0] == said[1]
