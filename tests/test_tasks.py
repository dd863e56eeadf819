"""The stress tasks and their scorers."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

import fivefold
from fivefold.errors import InputError
from fivefold.evaluate.score import answer, bits, generate, likelihoods, twin
from fivefold.evaluate.tasks import Question, fill, holds, settings, tasks
from fivefold.evaluate.tasks import text as words
from fivefold.evaluate.tasks.base import CLEAR

NAMES = (
    "api_cloze", "biography", "context_prior", "graph", "laundry_list", "multi_needle", "multi_passkey", "passkey",
    "system_prompt", "two_hop",
)  # fmt: skip
# A token a byte: a task needs several times the tokens that it needs with a real vocabulary.
CONTEXTS = (4000, 6001)


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: at for at, symbol in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    vocabulary["<end>"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def samples(name: str, tokenizer: Any, count: int, context: int = CONTEXTS[0]) -> list[Any]:
    return [tasks()[name]().make(tokenizer, context, random.Random(seed)) for seed in range(count)]


def spots(text: str, word: str) -> list[int]:
    return [match.start() for match in re.finditer(rf"(?<!\w){re.escape(word.strip())}(?!\w)", text)]


# --- the tasks --------------------------------------------------------------------------------------------


def test_all_ten_are_known() -> None:
    assert tuple(tasks()) == NAMES
    for cls in tasks().values():
        assert cls.line and cls.source and "\n" not in cls.line
        assert settings(cls())


@pytest.mark.parametrize("name", NAMES)
def test_prefix_is_exactly_the_context_and_the_seed_decides_all(name: str, tokenizer: Any) -> None:
    cls = tasks()[name]
    for context in CONTEXTS:
        made = cls().make(tokenizer, context, random.Random(3))
        assert len(made.prefix) == context
        assert made == cls().make(tokenizer, context, random.Random(3))
        other = cls().make(tokenizer, context, random.Random(4))
        assert other.prefix != made.prefix and other.questions != made.questions
        assert 1 <= len(made.questions) <= 6
    # Nothing but the given random numbers decides.
    random.seed(1)
    first = cls().make(tokenizer, CONTEXTS[0], random.Random(5))
    random.seed(2)
    assert first == cls().make(tokenizer, CONTEXTS[0], random.Random(5))


def keys(choice: str) -> list[str]:
    """The words of a choice that were planted: several where a choice is a sentence."""
    found = [word for word in re.findall(r"\w+", choice) if word in words.PEOPLE + words.CITIES]
    return list(dict.fromkeys(found)) or [choice.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_answers_stand_in_the_prefix_far_from_its_end_and_not_in_the_question(name: str, tokenizer: Any) -> None:
    # How often each planted word of an answer stands in the text.
    often = {"passkey": [2], "multi_passkey": [2], "two_hop": [2, 1], "graph": [2, 1]}.get(name, [1])
    for made in samples(name, tokenizer, 6):
        text = tokenizer.decode(made.prefix)
        # A token is a byte here, and the filler is ASCII or longer.
        last = tokenizer.decode(made.prefix[-CLEAR:])
        for question in made.questions:
            # Every choice's words stand in the text equally often: being in it gives nothing away.
            for choice in question.choices or (question.answer,):
                assert [len(spots(text, key)) for key in keys(choice)] == often
                assert not any(spots(question.text, key) or spots(last, key) for key in keys(choice))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("passkey", "multi_passkey")])
def test_choices_are_different_hold_the_answer_once_and_are_balanced(name: str, tokenizer: Any) -> None:
    at, order, total = Counter[int](), Counter[int](), 0
    made = samples(name, tokenizer, 60)
    for sample in made:
        text = tokenizer.decode(sample.prefix)
        for question in sample.questions:
            assert question.choices.count(question.answer) == 1
            assert len(set(question.choices)) == len(question.choices) >= 2
            # Tokenised behind the question, none has a space of its own where another has none.
            assert len({choice.startswith(" ") for choice in question.choices}) == 1
            assert not (question.text[-1].isspace() and question.answer[0].isspace())
            at[question.choices.index(question.answer)] += 1
            place = {keys(choice)[-1]: spots(text, keys(choice)[-1])[0] for choice in question.choices}
            order[sorted(place.values()).index(place[keys(question.answer)[-1]])] += 1
            total += 1
    # Neither the place among the choices nor that in the text tells the right one: within five standard deviations.
    for counter, n in ((at, len(made[0].questions[0].choices)), (order, len(place))):
        slack = 5 * math.sqrt(total * (1 / n) * (1 - 1 / n))
        assert all(abs(counter[place] - total / n) <= slack for place in range(n)), counter


@pytest.mark.parametrize("name", NAMES)
def test_too_short_a_context_is_one_sentence(name: str, tokenizer: Any) -> None:
    for context in (1, 64):
        with pytest.raises(InputError, match=rf"^a context of {context} tokens is too short .*\.$") as caught:
            tasks()[name]().make(tokenizer, context, random.Random(0))
        assert "\n" not in str(caught.value)
        # The least it asks for is enough.
    least = int(re.search(r"at least (\d+)\.", str(caught.value))[1])  # type: ignore[index]
    assert len(tasks()[name]().make(tokenizer, least, random.Random(0)).prefix) == least


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("multi_passkey", {"keys": 0}),
        ("multi_needle", {"rivals": 99}),
        ("laundry_list", {"items": 3, "rivals": 3}),
        ("two_hop", {"chains": 1}),
        ("graph", {"paths": 99}),
        ("context_prior", {"countries": 1}),
        ("system_prompt", {"rules": 99}),
        ("biography", {"asked": 99}),
        ("api_cloze", {"functions": 1}),
    ],
)
def test_sizes_that_cannot_be_are_refused(name: str, sizes: dict[str, int], tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"^\w+=.*\.$"):
        tasks()[name](**sizes).make(tokenizer, 4000, random.Random(0))


@pytest.mark.parametrize(
    ("name", "sizes", "questions", "choices"),
    [
        ("multi_passkey", {"keys": 9}, 9, 0),
        ("multi_needle", {"rivals": 5}, 3, 6),
        ("laundry_list", {"items": 12, "asked": 6, "rivals": 5}, 6, 6),
        ("two_hop", {"chains": 5}, 5, 25),
        ("graph", {"paths": 3, "edges": 3}, 3, 27),
        ("context_prior", {"countries": 8}, 8, 8),
        ("system_prompt", {"rules": 8}, 8, 8),
        ("biography", {"people": 6, "asked": 9}, 9, 6),
        ("api_cloze", {"functions": 6}, 6, 6),
    ],
)
def test_sizes_are_kept(name: str, sizes: dict[str, int], questions: int, choices: int, tokenizer: Any) -> None:
    instance = tasks()[name](**sizes)
    made = instance.make(tokenizer, 8000, random.Random(0))
    assert len(made.prefix) == 8000
    assert settings(instance).items() >= sizes.items()
    assert len(made.questions) == questions
    assert {len(question.choices) for question in made.questions} == {choices}
    assert instance.chance(made.questions[0]) == (1 / choices if instance.kind == "choices" else 0)


def test_the_context_speaks_against_the_prior(tokenizer: Any) -> None:
    from fivefold.evaluate.tasks.context_prior import _CAPITALS

    for made in samples("context_prior", tokenizer, 20):
        for question in made.questions:
            country = next(name for name in _CAPITALS if name in question.text)
            assert question.answer.strip() != _CAPITALS[country]
            assert f" {_CAPITALS[country]}" in question.choices


def test_graph_and_two_hop_answers_follow_from_the_text(tokenizer: Any) -> None:
    for made in samples("graph", tokenizer, 10):
        text = tokenizer.decode(made.prefix)
        roads = dict(re.findall(r"road leads from (\w+) to (\w+)\.", text))
        for question in made.questions:
            here = next(city for city in words.CITIES if spots(question.text, city))
            way = []
            while here in roads:
                here = roads[here]
                way.append(here)
            assert keys(question.answer) == way
    for made in samples("two_hop", tokenizer, 10):
        text = tokenizer.decode(made.prefix)
        friend = dict(re.findall(r"best friend of (\w+) is (\w+)\.", text))
        home = dict(re.findall(r"(\w+) lives in the city of (\w+)\.", text))
        for question in made.questions:
            one = next(name for name in words.PEOPLE if spots(question.text, name))
            assert keys(question.answer) == [friend[one], home[friend[one]]]


def test_api_names_are_real_and_dealt_at_random(tokenizer: Any) -> None:
    from fivefold.evaluate.tasks.api_cloze import _functions

    real = {function.summary: function.name for function in _functions()}
    assert len(real) > 50
    own = total = 0
    for made in samples("api_cloze", tokenizer, 60):
        text = tokenizer.decode(made.prefix)
        for question in made.questions:
            summary = question.text.split("# ")[1].split("\n")[0]
            assert f"# {summary}\ndef{question.answer}(" in text
            own += real[summary] == question.answer.strip()
            total += 1
    assert abs(own - total / 4) < 5 * math.sqrt(total * 3 / 16)  # its own name no more often than any other


def test_no_planted_word_is_in_the_filler() -> None:
    from fivefold.evaluate.tasks import biography, context_prior

    planted = [*words.PEOPLE, *words.CITIES, *words.GOODS, *words.COLOURS, *biography._SUBJECTS]
    planted += [*biography._EMPLOYERS, *context_prior._CAPITALS.values()]
    text = words.passage(random.Random(0))
    known = set(re.findall(r"\w+", text.lower()))
    assert not [word for word in planted if word.lower() in known]


def test_fill_orders_pieces_and_leaves_the_end_clear(tokenizer: Any) -> None:
    pieces = [(1.0, "<late>"), (0.0, "<first>"), (0.0, "<second>"), (0.5, "<middle>")]
    text = tokenizer.decode(fill(tokenizer, 300, pieces, "x" * 99))
    assert text.startswith("<first><second>") and len(text) == 300
    assert text.index("<second>") < text.index("<middle>") < text.index("<late>")
    assert text.endswith("<late>" + "x" * CLEAR)
    assert tokenizer.decode(fill(tokenizer, 200, pieces[:1], "x", last="LAST", clear=3)).endswith("<late>LAST")
    assert tokenizer.decode(fill(tokenizer, 200, pieces[:1], "")).strip() == "<late>"
    assert len(fill(tokenizer, 7, [], "x")) == 7


# --- the scorers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "given", "right"),
    [
        ("12345", "12345", True),
        (" 12345.", "12345", True),
        ("The number is 12345, of course", "12345", True),
        ("\n\n 12345", "12345", True),
        ("MARLOW!", "Marlow", True),
        ("marlow", " Marlow ", True),
        ("a.b*", "a.b*", True),
        ("what (x) is", "(x)", True),
        ("112345", "12345", False),
        ("123456", "12345", False),
        ("a12345", "12345", False),
        ("12 345", "12345", False),
        ("Marlowe", "Marlow", False),
        ("no idea\n12345", "12345", False),
        ("", "12345", False),
        ("  \n \n", "12345", False),
        ("axb", "a.b", False),
        ("anything at all", ".*", False),
        ("54321", "12345", False),
    ],
)
def test_holds(said: str, given: str, right: bool) -> None:
    assert holds(said, given) is right


def test_bits_are_bounded_and_zero_for_a_guess() -> None:
    assert bits([-3.0] * 8, 2) == pytest.approx(0)
    assert bits([0.0, -1000.0, -1000.0, -1000.0], 0) == pytest.approx(2)
    assert bits([-1000.0, -2000.0], 0) == pytest.approx(1)  # no underflow
    assert bits([0.0, -1.0], 1) < 0  # surely wrong is worse than a guess
    pick = random.Random(0)
    for _ in range(200):
        logs = [pick.uniform(-50, 0) for _ in range(pick.randrange(2, 9))]
        got = [bits(logs, at) for at in range(len(logs))]
        assert all(math.isfinite(value) and value <= math.log2(len(logs)) for value in got)
        # They are log-probabilities of the whole: 2^bits / n sums to one.
        assert sum(2**value / len(logs) for value in got) == pytest.approx(1)


class Counts:
    """A stand-in model: the next token is the one after the last in the alphabet, by far; it records its calls."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.fed: list[list[int]] = []

    def __call__(self, tokens: torch.Tensor, past_key_values: Any, logits_to_keep: int = 0) -> Any:
        from types import SimpleNamespace

        past_key_values.append(tokens[0].tolist())
        self.fed.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], self.vocabulary)
        for at, token in enumerate(tokens[0].tolist()):
            logits[0, at, (token + 1) % self.vocabulary] = 5.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_answers_of_a_known_model(tokenizer: Any) -> None:
    model, cache = Counts(len(tokenizer)), [[1, 2, 3]]
    got = answer(model, tokenizer, cache, Question("ab", "cd", ("cd", "ce", "xd", "x")), "choices")
    assert (got.score, got.right, got.said) == (1.0, True, "cd")
    assert got.detail["cd"] > got.detail["ce"] > got.detail["xd"]
    wrong = answer(model, tokenizer, cache, Question("ab", "ce", ("cd", "ce")), "choices")
    assert (wrong.score, wrong.right, wrong.said) == (0.0, False, "cd")
    some = answer(model, tokenizer, cache, Question("ab", "c", ("c", "x", "y", "z")), "bits")
    assert some.right is None and 1.9 < some.score <= 2.0
    assert cache == [[1, 2, 3]]  # untouched
    said = answer(model, tokenizer, cache, Question("ab", "cdef"), "generate")
    assert said.said.startswith("cdef") and said.right is False and said.score == 0.0  # "cdefghi..." is another word
    assert generate(model, tokenizer, cache, "ab", limit=4) == "cdef"
    assert cache == [[1, 2, 3]]


def test_a_tie_is_not_right(tokenizer: Any) -> None:
    got = answer(Counts(len(tokenizer)), tokenizer, [], Question("ab", "x", ("x", "y")), "choices")
    assert got.detail["x"] == got.detail["y"] and not got.right


def test_all_choices_are_scored_from_one_boundary_even_where_tokens_merge() -> None:
    # "b" + "c" is one token: "ab" followed by "cd" is a, bc, d, and by "xd" a, b, x, d.
    tokenizer = byte_tokenizer(merges=(("b", "c"),))
    assert len(tokenizer("abcd").input_ids) == 3
    model = Counts(len(tokenizer))
    cache: list[Any] = []
    logs = likelihoods(model, tokenizer, cache, "ab", ("cd", "xd"))
    assert model.fed[0] == tokenizer("a").input_ids  # the shared part ends before the merged token
    assert [len(part) for part in model.fed[1:]] == [1, 2]
    assert all(math.isfinite(log) for log in logs)


@pytest.mark.parametrize(
    "question",
    [
        Question("ab", "c", ("x", "y")),
        Question("ab", "c", ("c", "c")),
        Question("ab", "c", ()),
        Question("ab", "", ("", "c")),
        Question("", "c", ("c", "d")),
    ],
)
def test_questions_that_cannot_be_asked(question: Question, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"\.$"):
        answer(Counts(len(tokenizer)), tokenizer, [], question, "choices")


def test_likelihoods_are_those_of_one_pass(tiny: Any) -> None:
    """Of a random model with every kind of cache: the sum over a choice's tokens in one pass over everything."""
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer))
    prefix = tokenizer("some text that comes first. ", return_tensors="pt").input_ids
    choices = (" one", " seven", " x")
    with torch.inference_mode():
        wanted = []
        for choice in choices:
            whole = tokenizer("some text that comes first. It is" + choice, return_tensors="pt").input_ids
            logs = model(whole).logits[0].float().log_softmax(-1)
            start = prefix.shape[1] + len("It is")
            wanted.append(sum(float(logs[at - 1, whole[0, at]]) for at in range(start, whole.shape[1])))
        for kind in ("DynamicCache", "full()"):
            cache = DynamicCache(config=model.config) if kind == "DynamicCache" else fivefold.compress(model, kind)
            model(prefix, past_key_values=cache)
            assert likelihoods(model, tokenizer, cache, "It is", choices) == pytest.approx(wanted, abs=1e-3)
            assert cache.get_seq_length() == prefix.shape[1]
            assert twin(cache).get_seq_length() == prefix.shape[1]
