"""RULER: the official prompts and scores, prompts of any length, and what they are made from."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

import ruler_data
from fivefold.errors import InputError
from fivefold.evaluate import ruler
from fivefold.evaluate.engine import Plan
from fivefold.evaluate.ruler import KINDS, Data, expand, facts, words
from fivefold.evaluate.ruler.base import SLACK, Draw, Prompt, encode, largest
from fivefold.evaluate.ruler.counts import frequencies
from fivefold.evaluate.ruler.data import sentences
from fivefold.evaluate.ruler.niah import DEPTHS, NOISE, Niah
from fivefold.evaluate.score import matched
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


def test_settings_of_a_needle_can_be_changed(tokenizer: Any) -> None:
    task = Niah("harder", haystack="noise", keys=3, values=2, queries=2, key="uuids", value="words")
    (question,) = task.make(tokenizer, 1500, random.Random(0)).questions
    assert len(question.references) == 4 and "special magic words for" in question.text
    assert task.about() == "3 uuids are given 2 words each, among the same few sentences again and again; asked for all"
