"""lm-evaluation-harness over our cache: its own evaluator, on tasks whose data is in a local file."""

import json
import math
import random

import pytest
import torch

import fivefold
from fivefold.errors import RecipeError

lm_eval = pytest.importorskip("lm_eval")
from fivefold.evaluate.lm_eval import FivefoldLM  # noqa: E402
from test_tasks import byte_tokenizer  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(300)]
WORDS = ["amber", "birch", "cobalt", "dune", "ember", "fjord"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tiny, tokenizer):
    made = tiny("llama", vocab_size=len(tokenizer))
    made.generation_config.eos_token_id = None
    return made


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A file of questions, and the harness's data sets kept where the test is."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pick = random.Random(0)
    lines = []
    for _ in range(6):
        choices = pick.sample(WORDS, 3)
        right = pick.randrange(3)
        text = f"{' '.join(pick.choices(WORDS, k=40))}. The word is {choices[right]}. {'x ' * 60}"
        lines.append({"text": text, "choices": choices, "right": right, "answer": choices[right]})
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file, lines


def task(file, name, **settings):
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{text}}The word is",
        **settings,
    }


CHOICES = {
    "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}],
}  # fmt: skip
WRITTEN = {
    "output_type": "generate_until", "doc_to_target": "answer", "metric_list": [{"metric": "exact_match"}],
    "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
}  # fmt: skip
ROLLING = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
    "metric_list": [{"metric": "bits_per_byte"}],
}  # fmt: skip


def evaluate(lm, *tasks):
    return lm_eval.simple_evaluate(lm, tasks=list(tasks), bootstrap_iters=0, verbosity="ERROR")


def logs_of(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


@pytest.mark.slow
def test_full_gives_what_the_model_says(model, tokenizer, data):
    file, lines = data
    lm = FivefoldLM(model, tokenizer)
    result = evaluate(
        lm, task(file, "choices", **CHOICES), task(file, "written", **WRITTEN), task(file, "rolling", **ROLLING)
    )
    assert (
        result["results"]["choices"]["sample_len"] == len(lines)
        if "sample_len" in result["results"]["choices"]
        else True
    )
    right, bits, size = 0, 0.0, 0
    fivefold.restore(model)
    for line, sample in zip(lines, result["samples"]["choices"]):
        prompt = tokenizer(f"{line['text']}The word is").input_ids
        wanted = []
        for choice in line["choices"]:
            whole = prompt + tokenizer(f" {choice}").input_ids
            logs = logs_of(model, whole)
            wanted.append(sum(float(logs[at - 1, whole[at]]) for at in range(len(prompt), len(whole))))
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(wanted, abs=1e-3)
        right += wanted.index(max(wanted)) == line["right"]
    assert result["results"]["choices"]["acc,none"] == pytest.approx(right / len(lines))
    for line, sample in zip(lines, result["samples"]["written"]):
        prompt = tokenizer(f"{line['text']}The word is", return_tensors="pt").input_ids
        said = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        text = tokenizer.decode(said[0, prompt.shape[1] :], skip_special_tokens=True).split(".")[0]
        assert sample["resps"][0][0] == text
    for line in lines:
        tokens = [tokenizer.eos_token_id, *tokenizer(line["text"]).input_ids]
        logs = logs_of(model, tokens)
        bits -= sum(float(logs[at - 1, tokens[at]]) for at in range(1, len(tokens))) / math.log(2)
        size += len(line["text"].encode())
    assert result["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-4)


@pytest.mark.slow
def test_a_recipe_changes_what_is_read(model, tokenizer, data):
    file, lines = data
    exact = evaluate(FivefoldLM(model, tokenizer), task(file, "choices", **CHOICES))
    lost = evaluate(FivefoldLM(model, tokenizer, "streaming(sink=0, recent=8)"), task(file, "choices", **CHOICES))
    for one, two, line in zip(exact["samples"]["choices"], lost["samples"]["choices"], lines):
        # With eight tokens left, the answers are those of a prompt of little more than eight tokens.
        assert [r[0][0] for r in one["resps"]] != pytest.approx([r[0][0] for r in two["resps"]], abs=1e-2), line
    assert lost["config"]["recipe"] == "streaming(sink=0, recent=8)"


@pytest.mark.slow
def test_long_texts_lose_their_beginning(model, tokenizer, data):
    file, lines = data
    lm = FivefoldLM(model, tokenizer, max_length=100)
    kinds = {"choices": CHOICES, "written": WRITTEN, "rolling": ROLLING}
    result = evaluate(lm, *(task(file, name, **kind) for name, kind in kinds.items()))
    fivefold.restore(model)
    for line, sample in zip(lines, result["samples"]["choices"]):
        continuation = tokenizer(f" {line['choices'][0]}").input_ids
        prompt = tokenizer(f"{line['text']}The word is").input_ids[-(100 - len(continuation) + 1) :]
        logs = logs_of(model, prompt + continuation)
        wanted = sum(float(logs[len(prompt) + at - 1, token]) for at, token in enumerate(continuation))
        assert sample["resps"][0][0][0] == pytest.approx(wanted, abs=1e-3)
    # Every token of a text is scored once, whatever the window.
    text = lines[0]["text"]
    tokens = tokenizer(text).input_ids
    assert len(tokens) > 200
    windows = [tokens[:100], tokens[100:200], tokens[200:]]
    logs = logs_of(model, [tokenizer.eos_token_id, *windows[0][:-1]])
    first = sum(float(logs[at, token]) for at, token in enumerate(windows[0]))
    lm = FivefoldLM(model, tokenizer, max_length=100, stride=7)
    assert next(lm._windows(tokens)) == pytest.approx(first, rel=1e-4)
    assert len(list(lm._windows(tokens))) == math.ceil(len(tokens) / 100)


def test_a_recipe_that_does_not_fit_is_refused_at_once(model, tokenizer):
    with pytest.raises(RecipeError):
        FivefoldLM(model, tokenizer, "kivy()")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.release
def test_the_embedded_model_finds_words_and_a_forgetful_cache_does_not(data):
    from fivefold.models import embedded

    embedded.fetch()
    model, tokenizer = embedded.load()
    file, _ = data
    scores = {}
    for recipe in ("full()", "streaming(sink=0, recent=8)"):
        result = evaluate(FivefoldLM(model, tokenizer, recipe), task(file, "choices", **CHOICES))
        scores[recipe] = result["results"]["choices"]["acc,none"]
    fivefold.restore(model)
    assert scores["full()"] == 1.0
    assert scores["streaming(sink=0, recent=8)"] <= 0.7


def test_continuations_of_a_prompt_are_scored_together(model, tokenizer):
    prompt = tokenizer("Some text that is long enough to be packed, " * 4).input_ids
    texts = [" one", " two", " three", " four", " five and more"]
    requests = [(("p", text), prompt, tokenizer(text).input_ids) for text in texts]
    requests += [(("", text), [tokenizer.eos_token_id], tokenizer(text).input_ids) for text in texts[:2]]
    alone, together = (
        FivefoldLM(model, tokenizer, "kivi(bits=2, residual=0)", batch=batch)._loglikelihood_tokens(requests, True)
        for batch in (1, 8)
    )
    assert [log for log, _ in together] == pytest.approx([log for log, _ in alone], abs=1e-4)
    assert [best for _, best in together] == [best for _, best in alone] and len(together) == 7
