"""The evaluation engine: exact where it must be, deterministic, resumable, honest about its uncertainty."""

import copy
import json
import math
import random
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fivefold
from conftest import FAMILIES
from fivefold import methods
from fivefold.errors import FivefoldError, InputError, RecipeError
from fivefold.evaluate import jsonl, layers
from fivefold.evaluate.engine import EXACT, FIDELITY, Plan, Results, run, suite_lines
from fivefold.evaluate.intervals import mean_interval, share_interval, wilson
from fivefold.evaluate.summary import summarise
from fivefold.evaluate.sweep import MOST, expand, front, recipes
from fivefold.evaluate.tasks import tasks
from fivefold.methods import Codec, Method, param, register
from fivefold.store import Field, PageLayout

pytestmark = pytest.mark.usefixtures("one_thread")


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
        num_key_value_heads=1, head_dim=32, max_position_embeddings=8192, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


PLAN = Plan(
    ("full()", "kivi(bits=2)", "streaming(sink=0, recent=8)"), ("fidelity", "passkey"), (900,), 2, everything=True
)
TIMES = {"seconds", "prefill_s", "decode_ms", "time_front"}


def figures(result):
    """A result without its times."""
    if isinstance(result, dict):
        return {name: figures(value) for name, value in result.items() if name not in TIMES}
    return [figures(value) for value in result] if isinstance(result, list | tuple) else result


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
    bins = cells["kivi(bits=2)", "fidelity"]["bins"]
    assert len(bins) == 4 and all({"kl", "top1", "top5", "perplexity"} <= set(part) for part in bins)
    assert sum(part["kl"] for part in bins) / 4 == pytest.approx(kl[1], rel=1e-4)
    ranked = [entry["recipe"] for entry in result["ranking"]]
    assert ranked == [EXACT, "full()", "kivi(bits=2)", "streaming(sink=0, recent=8)"]
    assert [(entry["low"], entry["high"]) for entry in result["ranking"][:2]] == [(1.0, 1.0)] * 2
    assert json.loads(json.dumps(result, allow_nan=False)) == json.loads(json.dumps(result))


@pytest.mark.slow
def test_full_equals_plain_transformers_on_every_task(model, tokenizer, tmp_path):
    plan = Plan(("full()",), tuple(tasks()), (4000,), 1, everything=True)
    cells = run(model, tokenizer, plan, tmp_path / "kept.jsonl")["cells"]
    assert len(cells) == 20
    for exact, full in zip(cells[::2], cells[1::2]):
        assert (exact["recipe"], full["recipe"], exact["suite"]) == (EXACT, "full()", full["suite"])
        for one, two in zip(exact["rows"][0]["questions"], full["rows"][0]["questions"]):
            assert one["said"] == two["said"] and one["score"] == pytest.approx(two["score"], abs=1e-3)


def test_recipes_are_spared_what_the_exact_cache_cannot_do(model, tokenizer, tmp_path):
    told = []
    plan = Plan(("full()", "kivi()"), ("passkey",), (900,), 2)
    result = run(model, tokenizer, plan, tmp_path / "kept.jsonl", lambda done, total, what: told.append((done, total)))
    assert [cell["recipe"] for cell in result["cells"]] == [EXACT] and result["cells"][0]["exact_fails"]
    assert told == [(0, 6), (1, 6), (2, 2)]
    assert [entry["quality"] for entry in result["ranking"]] == [None] * 3


@dataclass(frozen=True)
class Noisy(Method):
    """A broken codec: float16, with noise added."""

    noise: float = param(0.3, "standard deviation, of the number's size")

    @property
    def exact_tokens(self):
        return 32

    def codec(self, spec):
        return NoisyCodec(spec.head_dim, self.noise)


class NoisyCodec(Codec):
    group = 32

    def __init__(self, head_dim, noise):
        self.noise = noise
        fields = [Field(name, (32, head_dim), torch.float16, "codes") for name in ("noisy_keys", "noisy_values")]
        self.layout = PageLayout("noisy", 32, tuple(fields))

    def encode(self, keys, values, slot, opened):
        dice = torch.Generator().manual_seed(0)
        parts = {"noisy_keys": keys, "noisy_values": values}
        return {
            name: (x + self.noise * x.std() * torch.randn(x.shape, generator=dice)).half() for name, x in parts.items()
        }

    def decode(self, fields):
        return fields["noisy_keys"].float(), fields["noisy_values"].float()


def test_a_broken_codec_is_ranked_below(model, tokenizer, tmp_path, monkeypatch):
    methods.registered()
    monkeypatch.setattr(methods, "_methods", dict(methods._methods))
    register(slot="bits", name="noisy", paper="none")(Noisy)
    plan = Plan(("noisy(noise=0.0)", "noisy()", "noisy(noise=1.5)", "kivi(bits=8)"), (FIDELITY,), (900,), 2)
    ranking = run(model, tokenizer, plan, tmp_path / "kept.jsonl")["ranking"]
    order = [entry["recipe"] for entry in ranking]
    assert order.index("noisy(noise=1.5)") > order.index("noisy()") > order.index("kivi(bits=8)")
    assert order.index("noisy()") > order.index("noisy(noise=0.0)")
    kl = {entry["recipe"]: entry["kl"] for entry in ranking}
    assert kl["noisy(noise=0.0)"] < 1e-4 < kl["noisy()"] < kl["noisy(noise=1.5)"]


def test_same_seed_same_file_another_seed_other_samples(model, tokenizer, tmp_path, result):
    again = run(model, tokenizer, PLAN, tmp_path / "again.jsonl")
    assert figures(again) == figures(result)
    other = run(
        model, tokenizer, Plan(("full()",), ("passkey",), (900,), 1, seed=1, everything=True), tmp_path / "other.jsonl"
    )
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
        ({"recipes": ()}, InputError),
        ({"suites": ()}, InputError),
        ({"suites": ("jsonl:/nowhere/at/all.jsonl",)}, InputError),
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


def test_a_file_of_something_else_is_no_store(tmp_path):
    mine, torn = tmp_path / "notes.txt", tmp_path / "torn.jsonl"
    mine.write_text("What I have written.\n")
    with pytest.raises(InputError, match="holds something else"):
        Results(mine)
    assert mine.read_text() == "What I have written.\n"
    torn.write_text('{"ke')  # by a kill in the very first row
    Results(torn).add("key", {"score": 1})
    assert Results(torn).rows == {"key": {"score": 1}}


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


def clustered(pick, share, correlation, texts, questions):
    """Right and wrong answers whose correlation within a text is what is said: each text has a share of its own."""
    groups = []
    for _ in range(texts):
        own = share
        if correlation:
            scale = 1 / correlation - 1
            own = pick.betavariate(share * scale, (1 - share) * scale)
        groups.append([float(pick.random() < own) for _ in range(questions)])
    return groups


@pytest.mark.parametrize("correlation", [0.0, 0.15, 0.3])
@pytest.mark.parametrize("texts", [2, 3, 8])
@pytest.mark.parametrize("share", [0.5, 0.85])
def test_intervals_of_shares_cover_for_questions_about_few_texts(share, texts, correlation):
    pick = random.Random(2)
    rounds = 2000
    covered = 0
    for _ in range(rounds):
        low, high = share_interval(clustered(pick, share, correlation, texts, 4))
        covered += low <= share <= high
    assert covered / rounds >= 0.92


@pytest.mark.parametrize("texts", [2, 3, 10])
def test_intervals_of_means_cover_for_few_texts(texts):
    pick = random.Random(3)
    rounds = 2000
    covered = 0
    for _ in range(rounds):
        low, high = mean_interval([[pick.gauss(0.7, 0.1)] for _ in range(texts)])
        covered += low <= 0.7 <= high
    assert 0.935 <= covered / rounds <= 0.965
    assert wilson(0, 0) == share_interval([]) == (0.0, 1.0)
    assert mean_interval([[1.0]]) == mean_interval([]) == (None, None)


def rows(groups, chance=0.25):
    return [
        {
            "questions": [{"score": s, "chance": chance} for s in group],
            "ratio": 1,
            "bytes": 1,
            "prefill_s": 1,
            "seconds": 1,
        }
        for group in groups
    ]


@pytest.mark.parametrize("texts", [2, 4])
@pytest.mark.parametrize("keeps", [0.5, 0.95])
def test_the_intervals_of_quality_cover(texts, keeps):
    """A recipe that keeps `keeps` of the exact cache's right answers, and guesses where it has lost them."""
    pick = random.Random(4)
    able, suites, rounds, covered = 0.9, 5, 400, 0
    truth = ((keeps * able + (1 - keeps) * 0.25) - 0.25) / (able - 0.25)
    for _ in range(rounds):
        found = {}
        for suite in range(suites):
            exact = clustered(pick, able, 0.0, texts, 4)
            other = [[s if pick.random() < keeps else float(pick.random() < 0.25) for s in group] for group in exact]
            found[1024, f"task{suite}"] = {EXACT: rows(exact), "kivi()": rows(other)}
        entry = next(e for e in summarise(found, ("kivi()",))["ranking"] if e["recipe"] == "kivi()")
        covered += entry["low"] is not None and entry["low"] <= truth <= entry["high"]
    assert covered / rounds >= 0.93


# -- layers -----------------------------------------------------------------------------------------------


def test_the_layer_that_broke_is_found(model, tokenizer):
    """Only layer 1 of this cache forgets: its own error tells, and what comes behind it carries it on."""
    deep = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, initializer_range=0.1,
        )
    ).eval()  # fmt: skip
    text = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    prefix, chunk = text[:, :268], text[:, 268:]
    with torch.inference_mode():
        caches = {}
        for recipe in ("full()", "duo(retrieval=[[0, 0], [2, 0], [3, 0]], sink=0, recent=8)"):
            caches[recipe] = fivefold.compress(deep, recipe)
            deep(prefix, past_key_values=caches[recipe])
        full, lost = caches.values()
        hooks = [len(module._forward_hooks) for module in deep.modules()]
        exact = layers.trace(deep, full.fork(), chunk)
        own, carried = layers.trace(deep, lost.fork(), chunk, exact.entering), layers.trace(deep, lost.fork(), chunk)
        found = layers.errors(exact, own, carried)
        own_errors = [layer["own"] for layer in found]
        assert own_errors.index(max(own_errors)) == 1 and own_errors[0] < 1e-5 < 0.05 < own_errors[1]
        assert found[0]["carried"] < 1e-5 and all(layer["carried"] > 1e-3 for layer in found[1:])
        lens = layers.lens(deep, exact, carried)
        logs = [deep(chunk, past_key_values=cache.fork()).logits[0].log_softmax(-1) for cache in (full, lost)]
        assert lens[0] < 1e-6 < lens[1]
        # Behind the last layer the lens sees what the model says.
        assert lens[-1] == pytest.approx(float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()), rel=1e-3)
    assert hooks == [len(module._forward_hooks) for module in deep.modules()]


def test_fidelity_has_layers_and_the_lens_if_asked_for(model, tokenizer, tmp_path):
    plan = Plan(("full()", "kivi(bits=2)"), (FIDELITY,), (900,), 1, lens=True)
    exact, full, packed = run(model, tokenizer, plan, tmp_path / "kept.jsonl")["cells"]
    for cell in (exact, full):
        assert all(max(layer.values()) < 1e-4 for layer in cell["layers"])
    assert len(packed["layers"]) == 2
    assert all(layer["own"] > 1e-3 and layer["carried"] > 1e-3 and layer["lens"] > 0 for layer in packed["layers"])
    again = run(model, tokenizer, Plan(("full()",), (FIDELITY,), (900,), 1), tmp_path / "kept.jsonl")
    assert "lens" not in again["cells"][0]["layers"][0]


def test_methods_that_act_in_steps_are_measured_in_steps(model, tokenizer, tmp_path):
    """In a chunk every token is read: `tidal` would look exact, and the window of `h2o` would grow."""
    plan = Plan(("tidal(top=16, select_layers=[0], full_layers=0)", "h2o(keep=0.2)"), (FIDELITY,), (900,), 1)
    _, sparse, chosen = run(model, tokenizer, plan, tmp_path / "kept.jsonl")["cells"]
    for cell in (sparse, chosen):
        assert cell["kl"] > 1e-5 and cell["top1"] <= 1
    assert max(layer["carried"] for layer in sparse["layers"]) > 1e-4


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layers_of_every_family(family, tiny):
    model = tiny(family)
    text = torch.randint(0, 100, (1, 80), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        traces = []
        for cache in (DynamicCache(config=model.config), fivefold.compress(model, "full()")):
            model(text[:, :64], past_key_values=cache)
            traces.append(layers.trace(model, copy.deepcopy(cache), text[:, 64:]))
            traces.append(layers.trace(model, cache, text[:, 64:], traces[0].entering, chunk=5))
        found = layers.errors(traces[0], traces[3], traces[2])
        assert len(found) == model.config.num_hidden_layers
        assert max(max(layer.values()) for layer in found) < 1e-3
        assert max(layers.lens(model, traces[0], traces[2])) < 1e-3


# -- one's own questions ----------------------------------------------------------------------------------

LINES = [
    {"context": "The sky is green today.", "question": "What colour is the sky?", "answer": "green"},
    {"context": "The sky is green today.", "question": "Which?", "answer": "green", "choices": ["red", "green"]},
    {"context": "Another text.", "question": "Which?", "answer": "b", "choices": ["a", "b", "c"]},
]


def write(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return f"{jsonl.PREFIX}{path}"


def test_own_questions_are_read_and_measured(model, tokenizer, tmp_path):
    suite = write(tmp_path / "mine.jsonl", LINES)
    records = jsonl.load(str(tmp_path / "mine.jsonl"))
    assert [(record.line, len(record.questions)) for record in records] == [(1, 2), (3, 1)]
    assert records[0].questions[0].text == "\n\nQuestion: What colour is the sky?\nAnswer:"
    store = tmp_path / "kept.jsonl"
    result = run(model, tokenizer, Plan(("full()",), (suite, "passkey"), (900,), 1, everything=True), store)
    cells = [cell for cell in result["cells"] if cell["suite"] == suite]
    assert [cell["context"] for cell in cells] == [0, 0]
    assert cells[0]["questions"] == 3 and cells[0]["chance"] == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert [q["said"] for row in cells[0]["rows"] for q in row["questions"]] == [
        q["said"] for row in cells[1]["rows"] for q in row["questions"]
    ]
    # What was measured is known by what it says, wherever it stands.
    seen = []
    renamed = write(tmp_path / "renamed.jsonl", [*LINES, {**LINES[2], "context": "New."}])
    run(model, tokenizer, Plan(("full()",), (renamed,)), store, lambda done, total, what: seen.append(total))
    assert set(seen) == {2}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ('{"context": "a", "question": "b", "answer": "c", "choice": []}', ["'choice'", "unknown"]),
        ('{"context": "a", "question": "b"}', ["'answer'", "missing"]),
        ('{"context": "", "question": "b", "answer": "c"}', ["'context'"]),
        ('{"context": "a", "question": 3, "answer": "c"}', ["'question'", "3"]),
        ('{"context": "a", "question": "b", "answer": "c", "choices": ["d", "e"]}', ["'choices'", "'c'"]),
        ('{"context": "a", "question": "b", "answer": "c", "choices": ["c", "c"]}', ["'choices'"]),
        ('{"context": "a", "question": "b", "answer": "c", "choices": ["c"]}', ["'choices'"]),
        ('{"context": "a", "question": "b", "answer": "c", "choices": "c"}', ["'choices'"]),
        ('{"context": "a\\ud800", "question": "b", "answer": "c"}', ["surrogate"]),
        ("[1, 2]", ["no JSON object"]),
        ("{nonsense", ["no JSON"]),
        ("[" * 200_000, ["nested"]),
        (b'{"context": "\xff"}', ["UTF-8"]),
    ],
)
def test_a_bad_line_is_named(bad, words, tmp_path):
    good = json.dumps(LINES[0]).encode()
    file = tmp_path / "mine.jsonl"
    file.write_bytes(good + b"\n\n" + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n" + good)
    with pytest.raises(InputError, match=r"^line 3 of ") as caught:
        Plan(suites=(f"{jsonl.PREFIX}{file}",))
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value)) < 400 and str(caught.value).endswith(".")


def test_files_that_hold_nothing_or_too_much(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="no question"):
        Plan(suites=(write(tmp_path / "empty.jsonl", []),))
    long = write(tmp_path / "long.jsonl", [LINES[0], {**LINES[0], "context": "x" * 9000}])
    with pytest.raises(InputError, match=r"^line 2 of "):
        run(model, tokenizer, Plan(("full()",), (long,)), tmp_path / "kept.jsonl")


# -- sweeps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "many"),
    [
        ("kivi()", ["kivi()"]),
        ("kivi(bits={2,4, 8})", ["kivi(bits=2)", "kivi(bits=4)", "kivi(bits=8)"]),
        ("a(x={1,2})+b(y={3,4})", ["a(x=1)+b(y=3)", "a(x=1)+b(y=4)", "a(x=2)+b(y=3)", "a(x=2)+b(y=4)"]),
        ("{a(x={1,2}, y=3), b()}", ["a(x=1, y=3)", "a(x=2, y=3)", "b()"]),
        ("a(x={[1,2],[3]}, y='{,}')", ["a(x=[1,2], y='{,}')", "a(x=[3], y='{,}')"]),
        ("a(x={5})", ["a(x=5)"]),
    ],
)
def test_braces(text, many):
    assert expand(text) == many


@pytest.mark.parametrize("text", ["kivi(bits={2,4)", "kivi(bits=2})", "kivi(bits={2,,4})", "kivi(bits={})", "{" * 3000])
def test_bad_braces(text):
    with pytest.raises(RecipeError):
        expand(text)


def test_too_many_recipes():
    digits = "{" + ",".join(map(str, range(1, 31))) + "}"
    with pytest.raises(RecipeError, match=str(MOST)):
        expand(f"duo(sink={digits}, recent={digits})")
    with pytest.raises(FivefoldError, match=str(MOST)):
        recipes([f"streaming(sink={sink}, recent={digits})" for sink in range(20)], braces=True)


def test_equal_recipes_are_one():
    assert recipes(["kivi()", "kivi( bits=2 )", "kivi(bits={2,4})"], braces=True) == ("kivi()", "kivi(bits=4)")
    with pytest.raises(RecipeError):
        recipes(["kivi(bits={2,4})"])


def test_the_front_is_what_no_other_beats():
    pick = random.Random(0)
    points = [(pick.randrange(20), pick.randrange(20)) for _ in range(60)]
    on = front(points)
    for (cost, quality), kept in zip(points, on):
        beaten = any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
        assert kept is not beaten
    assert front([]) == [] and front([(1, 1), (1, 1)]) == [True, True]


# -- with the embedded model ------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_embedded_model_beats_chance_and_a_forgetful_cache_does_not(tmp_path):
    from fivefold.models import embedded

    embedded.fetch()
    forgetful = "streaming(sink=0, recent=8)"
    plan = Plan(("full()", forgetful), ("passkey", "api_cloze"), (1024,), 2)
    result = run(*embedded.load(), plan, tmp_path / "kept.jsonl")
    cells = {(cell["suite"], cell["recipe"]): cell for cell in result["cells"]}
    assert len(cells) == 6
    for suite in plan.suites:
        exact, full, lost = (cells[suite, recipe] for recipe in (EXACT, *plan.recipes))
        said = [[q["said"] for row in cell["rows"] for q in row["questions"]] for cell in (exact, full)]
        assert said[0] == said[1]
        assert exact["score"] >= exact["chance"] + 0.4, suite
        # At chance: as few right answers as guessing gives in all but one of a hundred tries.
        chance, total = lost["chance"], lost["questions"]
        right = round(lost["score"] * total)
        as_many = sum(math.comb(total, k) * chance**k * (1 - chance) ** (total - k) for k in range(right, total + 1))
        assert as_many > 0.01, (suite, right, total)
    entries = {entry["recipe"]: entry for entry in result["ranking"]}
    # The interval of the forgetful one is wide, and ends below the exact cache.
    assert entries["full()"]["quality"] == 1.0 and entries[forgetful]["high"] < 1.0
