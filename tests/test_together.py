"""Measured together, every text, question and choice gives what it gives alone."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import fivefold
from conftest import quick
from fivefold import methods
from fivefold.errors import InputError
from fivefold.evaluate import engine, jsonl, keys
from fivefold.evaluate.engine import EXACT, FIDELITY, Plan, run
from fivefold.evaluate.score import Asked, answer, answers
from fivefold.evaluate.tasks import Question
from fivefold.evaluate.together import Room, grouped, rows_of, twin
from recipes import RECIPES, SHAPE, written
from test_tasks import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def short(monkeypatch):
    """Short texts behind a prefix, for tiny models."""
    monkeypatch.setattr(engine, "CONTINUATION", 40)
    monkeypatch.setattr(engine, "FREE", 4)


FIRST = ("kivi4",)
QUESTIONS = (
    Question("Who?", " Ann", (" Ann", " Bob", " Katherine", " Leo")),
    Question("Where is it?", " Rome", (" Rome", " Oslo", " Paris")),
    Question("What?", "no such word"),
    Question("Who?", "none", references=("none", "e"), limit=9),
    Question("Who?", " Bob", (" Ann", " Bob")),
)
KINDS = ("choices", "bits", "generate", "match_all", "choices")


def same(one, two):
    """Rows of both, without times; pages come in slabs, of which several texts take other numbers."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name == "questions":
            assert [{**q, "score": 0} for q in value] == [{**q, "score": 0} for q in two[name]]
            assert [q["score"] for q in value] == pytest.approx([q["score"] for q in two[name]], abs=1e-4)
        elif name in ("kl", "top1", "top5", "perplexity", "exact_perplexity"):
            assert value == pytest.approx(two[name], abs=1e-4, rel=1e-4), name
        elif name in ("layers", "bins"):
            for a, b in zip(value, two[name], strict=True):
                assert a == pytest.approx(b, abs=1e-4, rel=1e-3)
        elif name in ("bytes", "ratio"):
            # d2o leaves pages of a chunk free, which a cache of this size notices.
            assert value == pytest.approx(two[name], rel=0.25) or "d2o" in one["recipe"]
        elif name not in ("seconds", "prefill_s", "decode_ms"):
            assert value == two[name], name


@pytest.mark.parametrize("name", quick(sorted(RECIPES, key=lambda name: name not in FIRST), len(FIRST)))
def test_every_recipe_gives_together_what_it_gives_one_by_one(name, tiny, tokenizer, tmp_path, short):
    model = tiny(**SHAPE, vocab_size=257)
    plan = Plan((written(name, model),), (FIDELITY, "passkey", "multi_needle"), (900,), 3, everything=True)
    alone = run(model, tokenizer, plan, tmp_path / "alone.jsonl", batch=1)
    together = run(model, tokenizer, plan, tmp_path / "together.jsonl", batch=2)
    for one, two in zip(alone["cells"], together["cells"], strict=True):
        assert (one["recipe"], one["suite"]) == (two["recipe"], two["suite"])
        for left, right in zip(one["rows"], two["rows"], strict=True):
            same(left, right)
            assert (right["recipe"], right["suite"], right["context"]) == (one["recipe"], one["suite"], 900)
        assert [row["sample"] for row in two["rows"]] == [0, 1, 2]
    assert len({row["kl"] for row in together["cells"][1]["rows"]}) == 3 or name in ("full", "drop")


@pytest.mark.parametrize("exact", quick([True, False], 1))
def test_questions_of_any_kind_and_length_are_asked_together(exact, tiny, tokenizer):
    model = tiny(**SHAPE, vocab_size=257)
    prefix = torch.randint(0, 256, (3, 200), generator=torch.Generator().manual_seed(0))

    def read(rows):
        cache = DynamicCache(config=model.config) if exact else fivefold.compress(model, "kivi(bits=4, residual=32)")
        with torch.inference_mode():
            model(prefix[rows], past_key_values=cache)
        return cache

    asked = [Asked(row, question, kind) for row in (2, 0, 1) for question, kind in zip(QUESTIONS, KINDS)]
    cache = read([0, 1, 2])
    for most in (4, 99):
        found = answers(model, tokenizer, cache, asked, 3, most)
        for one, given in zip(asked, found, strict=True):
            alone = answer(model, tokenizer, read([one.row]), one.question, one.kind)
            assert given.said == alone.said and given.right == alone.right
            assert given.detail == pytest.approx(alone.detail, abs=1e-4)
            assert given.score == pytest.approx(alone.score, abs=1e-4)
    assert cache.get_seq_length() == 200
    if not exact:
        fivefold.restore(model)


def test_texts_of_any_length_are_read_in_batches_of_their_length(tiny, tokenizer, tmp_path):
    model = tiny(**SHAPE, vocab_size=257)
    lines = [
        {"context": "abc def " * (8 + length), "question": f"Which of {length}?", "answer": "b", "choices": ["a", "bc"]}
        | {"choices": ["a", "b", "cd"]}
        for length in (0, 3, 0, 3, 1)
    ]
    lines = [{**line, "context": f"{at} {line['context']}"} for at, line in enumerate(lines)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    plan = Plan(("full()", "kivi(bits=2, residual=0)"), (f"{jsonl.PREFIX}{file}",))
    alone = run(model, tokenizer, plan, tmp_path / "alone.jsonl", batch=1)
    together = run(model, tokenizer, plan, tmp_path / "together.jsonl", batch=8)
    for one, two in zip(alone["cells"], together["cells"], strict=True):
        assert len(one["rows"]) == 5
        for left, right in zip(one["rows"], two["rows"], strict=True):
            same(left, right)


def test_a_batch_that_was_broken_off_is_measured_again_and_others_are_not(tiny, tokenizer, tmp_path, short):
    model, store, told = tiny(**SHAPE, vocab_size=257), tmp_path / "kept.jsonl", []
    plan = Plan(("full()", "streaming(recent=32)"), (FIDELITY,), (512,), 3)

    def stop(done, total, what):
        told.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tokenizer, plan, store, stop, batch=2)
    assert told == [(0, 9), (2, 9), (4, 9)] and len(store.read_text().splitlines()) == 4
    told.clear()
    more = run(model, tokenizer, plan, store, lambda done, total, what: told.append((done, total)), batch=3)
    assert told == [(0, 5), (1, 5), (2, 5), (5, 5)]  # of the exact cache and of full() one text was left
    whole = run(model, tokenizer, plan, tmp_path / "whole.jsonl", batch=1)
    for one, two in zip(whole["cells"], more["cells"], strict=True):
        for left, right in zip(one["rows"], two["rows"], strict=True):
            same(left, right)


def test_with_less_memory_than_thought_a_batch_is_halved(tiny, tokenizer, tmp_path, short, monkeypatch):
    model, sizes = tiny(**SHAPE, vocab_size=257), []
    prefilled = engine._Run._prefilled

    def full_at_two(self, recipe, prefixes):
        sizes.append(len(prefixes))
        if len(prefixes) > 2:
            raise torch.OutOfMemoryError("no more")
        return prefilled(self, recipe, prefixes)

    monkeypatch.setattr(engine._Run, "_prefilled", full_at_two)
    plan = Plan(("full()",), ("passkey",), (512,), 5, everything=True)
    cells = run(model, tokenizer, plan, tmp_path / "kept.jsonl", batch=5)["cells"]
    assert sizes[:4] == [5, 2, 2, 1] and [row["sample"] for row in cells[1]["rows"]] == list(range(5))
    monkeypatch.setattr(engine._Run, "_prefilled", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(torch.OutOfMemoryError):
        run(model, tokenizer, plan, tmp_path / "other.jsonl", batch=5)


def test_the_exact_cache_is_forked_without_a_copy_and_left_alone(tiny):
    model = tiny(**SHAPE, vocab_size=257)
    ids = torch.arange(120).reshape(2, 60)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        before = [layer.keys.clone() for layer in cache.layers]
        fork, rows = twin(cache), rows_of(cache, [1, 1, 0], 2)
        assert fork.layers[0].keys is cache.layers[0].keys
        model(ids[:, :1], past_key_values=fork)
        model(ids[[1, 1, 0], :1], past_key_values=rows)
    assert (fork.get_seq_length(), rows.get_seq_length(), cache.get_seq_length()) == (61, 61, 60)
    assert torch.equal(rows.layers[0].keys[0, :, :60], before[0][1])
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))


def test_rooms(tiny):
    model = tiny(**SHAPE)
    assert Room.of(model, 2048, None, 256) == Room.of(model, 2048, 1, 256) == Room(1, 1)
    assert Room.of(model, 2048, 4, 256).texts == 4 and Room(5, 40).halved == Room(2, 20)
    assert Room(1, 1).halved is None and Room(1, 8).halved == Room(1, 4)
    with pytest.raises(InputError, match="a batch of 0 texts"):
        Room.of(model, 2048, 0, 256)
    assert grouped([3, 4, 3, 3], 2) == [[0, 2], [3], [1]]


def test_a_key_names_kernels_profiles_and_sources_that_are_not_python(tiny, tokenizer, tmp_path, monkeypatch):
    model = tiny(**SHAPE, vocab_size=257)
    base = keys.environment(model, tokenizer)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    other = keys.environment(model, tokenizer)
    assert other["kernels"] == "reference" and keys.key(other, "full()", (), []) != keys.key(
        base | {"kernels": "cpp"}, "full()", (), []
    )
    recipe = fivefold.Recipe.parse(written("rotatekv", model))
    before = keys.code_of(recipe.methods[0])
    folder = tmp_path / "profile"
    folder.mkdir()
    (folder / "profile.json").write_text("{}")
    after = keys.code_of(fivefold.Recipe.parse(f'rotatekv(bits=4, profile="{folder}")').methods[0])
    assert len(before) == len(after) == 1 and before != after
    package = tmp_path / "package"
    for name in ("__init__.py", "kernels/one.cu", "page/page.css"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("one")
    monkeypatch.setattr(fivefold, "__file__", str(package / "__init__.py"))
    seen = []
    for changed in (None, "page/page.css", "kernels/one.cu"):
        if changed:
            (package / changed).write_text("two")
        keys.code_hash.cache_clear()
        seen.append(keys.code_hash())
    keys.code_hash.cache_clear()
    assert seen[0] == seen[1] != seen[2]


def test_rows_name_what_they_are_of(tiny, tokenizer, tmp_path):
    model, store = tiny(**SHAPE, vocab_size=257), tmp_path / "kept.jsonl"
    run(model, tokenizer, Plan(("full()",), ("passkey",), (512,), 2, everything=True), store, batch=2)
    rows = [json.loads(line)["row"] for line in store.read_text().splitlines()]
    assert [(row["recipe"], row["sample"]) for row in rows] == [(EXACT, 0), (EXACT, 1), ("full()", 0), ("full()", 1)]


def test_the_big_sweep_has_every_method():
    """A method that is added gets its row in docs/results.md."""
    sweep = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "sweep_all.py"))
    spelled = sweep["_spelled"](sweep["RECIPES"])
    there = {method.name for text in spelled for method in fivefold.Recipe.parse(text).methods}
    assert there == set(methods.registered()) and spelled[0] == sweep["BASE"]
