"""RULER: the official prompts and scores, prompts of any length, and what the engine makes of them."""

from __future__ import annotations

import dataclasses
import hashlib
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
from fivefold.evaluate import html, ruler, tables
from fivefold.evaluate.engine import EXACT, Plan, run
from fivefold.evaluate.intervals import lost_variance, mean_of_parts, share_interval
from fivefold.evaluate.ruler import KINDS, Data, expand, facts, words
from fivefold.evaluate.ruler.base import SLACK, Draw, Prompt, encode, largest
from fivefold.evaluate.ruler.counts import frequencies
from fivefold.evaluate.ruler.data import sentences
from fivefold.evaluate.ruler.niah import DEPTHS, NOISE, Niah
from fivefold.evaluate.score import answer, matched, printable
from fivefold.evaluate.summary import exact_fails, summarise
from fivefold.evaluate.tasks import Question
from test_tasks import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("ruler.json").read_text())
CHAT = (
    "{{ '<|begin|>' }}{% for one in messages %}<|{{ one['role'] }}|>\n{{ one['content'] | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}{% if enable_thinking %}<think>{% endif %}"
)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """RULER's own files, small."""
    return Data.of(str(ruler_data.write(tmp_path_factory.mktemp("ruler"))))


def made(name: str, tokenizer: Any, context: int, seed: int = 0) -> Any:
    return KINDS[name].make(tokenizer, context, random.Random(seed))


def total(sample: Any, name: str) -> int:
    return len(sample.prefix) + len(sample.questions[0].ids) + KINDS[name].generate


# --- against the official scripts -------------------------------------------------------------------------


def test_the_kinds_are_those_of_the_configuration() -> None:
    assert list(KINDS) == list(GOLDEN["kinds"])
    for name, task in KINDS.items():
        golden = GOLDEN["kinds"][name]
        assert task.generate == golden["tokens_to_generate"]
        assert f"string_{task.kind}" == golden["metric"]
    assert {task.kind for name, task in KINDS.items() if name.startswith("qa")} == {"match_part"}


@pytest.mark.parametrize("name", list(KINDS))
def test_prompts_and_answers_are_the_official_ones(name: str, official: Data) -> None:
    task: Any = ruler.kind(f"ruler:{name}", official)
    for golden in GOLDEN["kinds"][name]["runs"]:
        draw, size, longest = Draw(golden["seed"]), golden["size"], golden["longest"]
        if name.startswith("qa"):
            prompt = task.about_number(draw, 0, size)
        else:
            prompt = task.compose(draw, size, longest, lambda text: len(ruler_data.tokens(text)))
        assert prompt.begun == golden["answer_prefix"]
        assert list(prompt.references) == golden["outputs"]
        assert hashlib.sha256((prompt.text + prompt.question).encode()).hexdigest() == golden["input"]
        whole = prompt.text + prompt.question + prompt.begun
        # In fwe the official script counts the last size that it tried.
        if name != "fwe":
            assert len(ruler_data.tokens(whole)) + task.generate == golden["length"]


@pytest.mark.parametrize("name", list(KINDS))
def test_prompts_are_as_long_as_the_official_ones(name: str, official: Data) -> None:
    task = ruler.kind(f"ruler:{name}", official)
    for golden in GOLDEN["kinds"][name]["runs"]:
        sample = task.make(ruler_data.Words(), golden["longest"], Fixed(golden["seed"]))
        assert golden["length"] - golden["longest"] // SLACK <= total(sample, name) <= golden["longest"]
        assert list(sample.questions[0].references) == golden["outputs"]


class Fixed(random.Random):
    """Makes every sample from one seed."""

    def __new__(cls, value: int) -> Fixed:
        return super().__new__(cls)

    def __init__(self, value: int) -> None:
        super().__init__(0)
        self.value = value

    def getrandbits(self, bits: int) -> int:
        return self.value


@pytest.mark.parametrize("golden", GOLDEN["scores"], ids=lambda golden: golden["said"][:12])
def test_scores_are_the_official_ones(golden: dict[str, Any]) -> None:
    references = tuple(golden["references"])
    for part, name in ((False, "string_match_all"), (True, "string_match_part")):
        assert round(100 * matched(golden["said"], references, part), 2) == golden[name]


def test_the_words_are_the_official_ones() -> None:
    assert len(words.keys()) == GOLDEN["pairs"]["many"]
    assert {at: words.keys()[int(at)] for at in GOLDEN["pairs"]["at"]} == GOLDEN["pairs"]["at"]


def test_pairs_are_in_the_order_of_the_sorted_list() -> None:
    first = ["old", "old-fashioned", "odd", "old", "older", "o", "zesty", "b c", "old-fashioned-ish"]
    second = ["fashioned", "cat", "fashioned-cat", "Zoo", "cat", "a b"]
    wanted = sorted({f"{one}-{two}" for one in first for two in second})
    pairs = words.Pairs(first, second)
    assert list(pairs) == wanted and len(pairs) == len(wanted) < len(first) * len(second)
    with pytest.raises(IndexError):
        pairs[len(wanted)]


# --- prompts ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ruler_data.Words()


@pytest.mark.parametrize("name", list(KINDS))
def test_lengths_are_kept_and_the_seed_decides_all(name: str, tokenizer: Any) -> None:
    for context in (1500, 4096):
        sample = made(name, tokenizer, context)
        # Not all of it can be used: a line more, a document more would be too much.
        assert context * 0.93 < total(sample, name) <= context
        (question,) = sample.questions
        assert question.limit == KINDS[name].generate and question.references and question.answer
        assert tokenizer.decode(question.ids) == question.text
        random.seed(context)
        assert sample == made(name, tokenizer, context)
        other = made(name, tokenizer, context, seed=1)
        assert other.prefix != sample.prefix and other.questions != sample.questions


@pytest.mark.parametrize("name", list(KINDS))
def test_answers_stand_in_the_text_and_not_in_the_question(name: str, tokenizer: Any) -> None:
    for seed in range(3):
        sample = made(name, tokenizer, 2000, seed)
        text, (question,) = tokenizer.decode(sample.prefix), sample.questions
        for reference in question.references:
            assert reference in text and reference.lower() not in question.text.lower()
        assert len(set(question.references)) == len(question.references)
        assert KINDS[name].chance(question) == 0
        # Said in full it is right; in a half of it half is found.
        kept = question.references[: len(question.references) // 2]
        part = KINDS[name].kind == "match_part"
        assert matched(f"They are {question.answer.upper()}.", question.references, part) == 1
        assert matched(" and ".join(kept), question.references, part) == len(kept) / len(question.references)


def test_needles_stand_at_their_depths(tokenizer: Any) -> None:
    places = {"niah_single_1": [], "niah_single_2": [], "niah_multikey_2": []}
    for name, depths in places.items():
        for seed in range(40):
            sample = made(name, tokenizer, 1500, seed)
            text, value = tokenizer.decode(sample.prefix), sample.questions[0].references[0]
            assert text.count(value) == 1
            depths.append(text.index(value) / len(text))
    for depths in places.values():
        assert min(depths) < 0.25 and max(depths) > 0.8 and 0.35 < sum(depths) / 40 < 0.65


def test_an_essay_is_cut_at_sentences_and_a_needle_is_one_of_them() -> None:
    assert sentences(" One. Two?  Three 3.5 e!\nFour") == ["One.", "Two?", "Three 3.5 e!", "Four"]
    task = KINDS["niah_multivalue"]
    for seed in range(10):
        prompt = task.compose(Draw(seed), 900, 4096, len)
        lines = sentences(prompt.text.split("\n", 1)[1])
        needles = [at for at, line in enumerate(lines) if line.startswith("One of the special magic numbers for ")]
        assert len(needles) == 4
        without = len(lines) - 4
        # Python's reference has few sentences of its own that end within a needle's place.
        allowed = {int(without * depth / 100) for depth in DEPTHS}
        assert {at - before for before, at in enumerate(needles)} <= allowed


def test_noise_lines_and_needles_of_a_kind() -> None:
    text = KINDS["niah_single_1"].compose(Draw(1), 30, 4096, len).text
    assert text.count(NOISE) == 30 and text.count("One of the special magic numbers for") == 1
    prompt = KINDS["niah_multikey_3"].compose(Draw(1), 30, 4096, len)
    found = re.findall(r"numbers|uuids for ([0-9a-f-]{36}) is: ([0-9a-f-]{36})\.", prompt.text)
    assert len(found) == 31 and [value for key, value in found if key in prompt.question] == list(prompt.references)
    prompt = KINDS["niah_multiquery"].compose(Draw(1), 300, 4096, len)
    given = dict(re.findall(r"numbers for (\S+) is: (\d{7})\.", prompt.text))
    asked = re.split(r", and |, ", re.search(r"numbers for (.*) mentioned", prompt.question)[1])  # type: ignore[index]
    assert [given[key] for key in asked] == list(prompt.references) and len(asked) == 4


def test_a_chain_leads_from_the_value_to_every_answer() -> None:
    count = lambda text: len(ruler_data.tokens(text))  # noqa: E731
    for seed in range(5):
        prompt = KINDS["vt"].compose(Draw(seed), 20, 4096, count)
        example, text = prompt.text.split("\n\n\n" if "\n\n\n" in prompt.text else "\n\nMemorize")
        value = re.search(r"the value (\d+)", prompt.question)[1]  # type: ignore[index]
        (start,) = re.findall(rf"VAR (\w+) = {value}\n", text)
        steps = {one: two for two, one in re.findall(r"VAR (\w+) = VAR (\w+) ", text)}
        way = [start]
        while way[-1] in steps:
            way.append(steps[way[-1]])
        assert way == list(prompt.references) and len(way) == 5 and all(len(name) == 5 for name in way)
        # The example has a value and names of its own, and is solved.
        assert value not in example and "they are: " in example
        assert not set(way) & set(re.findall(r"\w+", example))


def test_common_words_are_the_most_common() -> None:
    for context, often, seldom in ((2000, 6, 1), (4096, 30, 3)):
        prompt = KINDS["cwe"].compose(Draw(3), 40, context, len)
        example, text = prompt.text.split("\nBelow is")
        listed = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", text.split("\n", 1)[1])
        many = {word: listed.count(word) for word in listed}
        assert sorted(many.values()) == [seldom] * 30 + [often] * 10
        assert {word for word, times in many.items() if times == often} == set(prompt.references)
        assert "Answer: The top 10 words" in example


def test_more_words_than_there_are() -> None:
    many = len(words.vocabulary()) + 1
    prompt = KINDS["cwe"].compose(Draw(3), many, 200_000, len)
    assert not set(prompt.references) & set(words.vocabulary())
    assert all(word.startswith(tuple(f"{one}-" for one in words.words_of("adjective"))) for word in prompt.references)


def test_coded_words_are_spread_by_zipfs_law() -> None:
    assert frequencies(6, 1000) == [607, 151, 67, 37, 24, 16]
    for size in range(KINDS["fwe"].smallest(), 3000):
        _, second, third, fourth, fifth = frequencies(5, size)
        assert second > third > fourth > fifth
    prompt = KINDS["fwe"].compose(Draw(0), 500, 4096, len)
    coded = prompt.text.rsplit("coded words. ", 1)[1].split(" ")
    order = sorted(set(coded), key=coded.count, reverse=True)
    assert order[0] == "..." and order[1:4] == list(prompt.references)
    assert coded.count("...") == frequencies(80, 500)[0]


@pytest.mark.parametrize("made_up", [facts.single, facts.bridges])
def test_planted_answers_are_in_one_document_alone(made_up: Any) -> None:
    library = made_up()
    assert len(set(library.documents)) == len(library.documents) >= 1000
    assert len({asked.question for asked in library.asked}) == len(library.asked)
    everything = "\n\n".join(library.documents).lower()
    for asked in library.asked:
        answer_ = asked.answers[0].lower()
        assert everything.count(answer_) == sum(library.documents[at].lower().count(answer_) for at in asked.needs) > 0
        assert not set(asked.near) & set(asked.needs)


def test_two_documents_are_needed_for_a_bridge() -> None:
    library = facts.bridges()
    for asked in library.asked:
        first, second = (library.documents[at] for at in asked.needs)
        named = first.split("\n")[0], re.search(r"write (The \S+ \S+),", first)[1]  # type: ignore[index]
        assert any(name in asked.question for name in named)  # the first document is found by the question,
        town = second.split("\n")[0]
        assert town in first and town not in asked.question  # the second only by the first
        assert asked.answers[0] in second and asked.answers[0] not in first


def test_questions_of_the_official_files_are_asked_in_order(official: Data) -> None:
    plan = [ruler.kind("ruler:qa_1", official, number) for number in (0, 1, 2, 112)]
    texts = [task.make(ruler_data.Words(), 900, random.Random(0)).questions[0] for task in plan]
    assert [re.search(r"Question (\S+)\?", text.text)[1] for text in texts] == ["0-0-0", "0-0-2", "0-1-0", "0-0-0"]  # type: ignore[index]
    assert texts[0].references == ("answer 0-0-0", "also 0")


def test_the_official_texts_are_used_and_known_by_what_they_say(official: Data, tmp_path: Path) -> None:
    for name in KINDS:
        own, theirs = ruler.kind(f"ruler:{name}", Data()), ruler.kind(f"ruler:{name}", official)
        text = theirs.make(ruler_data.Words(), 1500, random.Random(0))
        used = name in ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
        differs = used or name in ("qa_1", "qa_2")
        assert differs == (own.about() != theirs.about())
        assert ("place of" in own.about()) == differs and "place of" not in theirs.about()
        assert (ruler.settings(own) != ruler.settings(theirs)) == (differs or name == "cwe")
        assert (text == own.make(ruler_data.Words(), 1500, random.Random(0))) == (not differs)
    changed = ruler_data.write(tmp_path / "changed")
    (changed / "squad.json").write_text(json.dumps(ruler_data.squad() | {"version": 2}))
    task = ruler.kind("ruler:qa_1", Data.of(str(changed)))
    assert ruler.settings(task) != ruler.settings(ruler.kind("ruler:qa_1", official))


# --- length, chat templates, where the question begins -----------------------------------------------------


@pytest.mark.parametrize("bend", [1.0, 0.9, 1.2])
def test_the_largest_size_is_found_in_few_steps(bend: float) -> None:
    seen: list[int] = []

    def length(size: int) -> int:
        seen.append(size)
        return 100 + round(7.3 * size**bend)

    for limit in (300, 1000, 4096, 131_072):
        seen.clear()
        size = largest(length, 1, limit)
        assert limit - limit // SLACK - 7.3 * bend * size ** (bend - 1) - 2 <= 100 + 7.3 * size**bend <= limit + 1
        assert len(seen) <= 16 and largest(length, 1, 50) == 1


@pytest.mark.parametrize("name", list(KINDS))
def test_too_short_a_context_names_the_least(name: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=rf"^a context of 100 tokens is too short for RULER's {name}: .*\.$") as caught:
        made(name, tokenizer, 100)
    least = int(re.search(r"at least (\d+)\.", str(caught.value))[1])  # type: ignore[index]
    assert total(made(name, tokenizer, least), name) <= least
    with pytest.raises(InputError, match="too short"):
        made(name, tokenizer, least - 1)


def test_a_chat_template_is_used_and_the_answer_begins_behind_it() -> None:
    tokenizer = byte_tokenizer(merges=(("?", "<"), ("n", "e")))
    prompt = Prompt("Once upon a time.\nWhat? Once.", "\nWhat?", " It is", ("once",))
    ids, at = encode(tokenizer, prompt)
    assert tokenizer.decode(ids[:at]) == prompt.text and tokenizer.decode(ids[at:]) == "\nWhat? It is"
    tokenizer.chat_template = CHAT
    ids, at = encode(tokenizer, prompt)
    assert tokenizer.decode(ids[:at]) == "<|begin|><|user|>\nOnce upon a time.\nWhat? Once."
    assert tokenizer.decode(ids[at:]) == "\nWhat?<end>\n<|assistant|>\n It is"
    assert ids == tokenizer(tokenizer.decode(ids)).input_ids  # tokens merge as in one text
    sample = KINDS["niah_multikey_2"].make(tokenizer, 3000, random.Random(0))
    assert 2800 < total(sample, "niah_multikey_2") <= 3000
    assert tokenizer.decode(sample.questions[0].ids).endswith(sample.questions[0].text.split("?")[1])


def test_a_token_across_the_border_belongs_to_the_question() -> None:
    tokenizer = byte_tokenizer(merges=((".", "Ċ"),))  # a full stop and a line break are one token
    prompt = Prompt("One is 7.", "\nWhat?", " It", ("7",))
    ids, at = encode(tokenizer, prompt)
    assert tokenizer.decode(ids[:at]) == "One is 7" and tokenizer.decode(ids[at:]) == ".\nWhat? It"


def test_a_plain_text_begins_as_the_tokenizer_has_it() -> None:
    class Marked(ruler_data.Words):
        eos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> Any:
            self.known or self.known.update({"<s>": 0, "</s>": 1})
            found = super().__call__(text)
            if add_special_tokens:
                found.input_ids = [0, *found.input_ids, 1]
            return found

    ids, at = encode(Marked(), Prompt("One two.", "\nWhat?", " It", ("one",)))
    assert ids[0] == 0 and 1 not in ids and at == 4


def test_suites() -> None:
    every = tuple(f"ruler:{name}" for name in KINDS)
    assert expand(["ruler"]) == every and len(every) == 13
    others = (one for one in every if one != "ruler:vt")
    assert expand(["passkey", "ruler:vt", "ruler"]) == ("passkey", "ruler:vt", *others)
    assert Plan(suites=("ruler", "passkey")).suites == (*every, "passkey")
    assert set(ruler.lines()) == {"ruler", *every} and all(ruler.lines().values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"suites": ("ruler:niah",)}, "RULER has no kind 'niah': use ruler:{niah_single_1,"),
        ({"suites": ("rulers",)}, "there is no suite 'rulers'"),
        ({"ruler_data": "/nowhere"}, "'/nowhere' holds none of RULER's files"),
    ],
)
def test_bad_plans_get_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        Plan(**{"suites": ("ruler",), **change})
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).endswith(".")


def test_files_of_another_form_are_named(tmp_path: Path) -> None:
    for text in ('{"data": [{}]}', "[1]", "{nonsense"):
        folder = tmp_path / str(len(text))
        folder.mkdir()
        (folder / "squad.json").write_text(text)
        with pytest.raises(InputError, match=r"squad.json' has not the form .*\.$"):
            Plan(suites=("ruler:qa_1",), ruler_data=str(folder))
        Plan(suites=("ruler:vt",), ruler_data=str(folder))  # not needed there


def test_without_the_package_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    words.words_of.cache_clear()
    words.digest.cache_clear()
    monkeypatch.setattr(words.resources, "files", missing)
    try:
        with pytest.raises(InputError, match=r"pip install 'fivefold\[ruler\]'\.$"):
            Plan(suites=("ruler",))
        Plan(suites=("ruler:vt", "ruler:fwe"))
    finally:
        words.words_of.cache_clear()
        words.digest.cache_clear()


# --- asked of a model --------------------------------------------------------------------------------------


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
    assert line.split()[2:] == ["100.0"] * 2 and "ruler:niah_multikey_3" in shown
    assert max(map(len, shown.splitlines())) <= 80
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


def test_settings_of_a_needle_can_be_changed(tokenizer: Any) -> None:
    task = Niah("harder", haystack="noise", keys=3, values=2, queries=2, key="uuids", value="words")
    (question,) = task.make(tokenizer, 1500, random.Random(0)).questions
    assert len(question.references) == 4 and "special magic words for" in question.text
    assert task.about() == "3 uuids are given 2 words each, among the same few sentences again and again; asked for all"


# --- with the embedded model -------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.timeout(900)
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
