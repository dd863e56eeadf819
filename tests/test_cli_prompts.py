"""`fivefold generate --prompts`: what each request gets, what is kept whatever happens, and what is refused."""

from __future__ import annotations

import fcntl
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from fivefold.models import embedded
from test_cli import Process, refused, run, save

TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}{{ m['content'] }} w4 {% endfor %}"
    "{% if add_generation_prompt %}w2{% endif %}"
)
WIDE = {"initializer_range": 0.3}  # attention that looks at something, so that every token counts

Entry = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"), **WIDE)


def words(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(300)}" for _ in range(count))


def write(file: Path, entries: Sequence[Entry | str]) -> Path:
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in entries))
    return file


def rows(file: Path) -> dict[Any, Entry]:
    """Results by id, or line."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    names = [row.get("id", row.get("line")) for row in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found))


def without_times(file: Path) -> dict[Any, Entry]:
    return {name: {k: x for k, x in row.items() if "seconds" not in k} for name, row in rows(file).items()}


def said(folder: Path, text: str, count: int) -> list[str]:
    """The words that transformers itself writes after a text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    cache = DynamicCache(config=model.config)
    out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return [tokenizer.decode([token]) for token in out[0, ids.shape[1] :].tolist()]


ENTRIES: list[Entry] = [
    {"prompt": words(40, 1)},
    {"prompt": words(150, 2), "id": "b", "max_new_tokens": 30},
    {"prompt": words(3, 3), "max_new_tokens": 1},
    {"prompt": words(90, 4), "id": 7},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "in.jsonl", ENTRIES)
    return tmp_path


def generate(tiny: Path, folder: Path, *more: str | Path, recipe: str = "full()", n: int = 12) -> Any:
    files = ["--prompts", folder / "in.jsonl", "--out", folder / "out.jsonl"]
    return run("generate", "-m", tiny, "-r", recipe, "-n", n, *files, *more)


# -- what each request gets -------------------------------------------------------------------------------


def test_each_line_gets_what_it_gets_alone(tiny: Path, folder: Path):
    result = generate(tiny, folder, "--max-batch", "2")
    assert result.exit_code == 0 and result.stdout == "", result.output
    found = rows(folder / "out.jsonl")
    assert set(found) == {1, "b", 3, 7}
    for name, entry, number in zip((1, "b", 3, 7), ENTRIES, (12, 30, 1, 12)):
        row = found[name]
        assert row["text"].split() == said(tiny, entry["prompt"], number)
        assert (row["tokens"], row["finish_reason"]) == (number, "length")
        assert row["prompt_tokens"] == len(entry["prompt"].split())
        assert 0 < row["seconds_to_first_token"] <= row["seconds"]
        assert (row["recipe"], row["model"]) == ("full()", str(tiny))
        assert ("id" in row) != ("line" in row)
    for word in ("4 of 4 done", "283 read, 55 written", "tokens/s", "at its peak"):
        assert word in result.stderr
    assert "prefixes" not in result.stderr and "preemptions" not in result.stderr


def test_packed_sequences_are_those_alone_and_smaller(tiny: Path, folder: Path):
    write(folder / "in.jsonl", [{"prompt": words(700, seed)} for seed in range(3)])
    result = generate(tiny, folder, recipe="kivi(bits=2)")
    together = [row["text"] for _, row in sorted(rows(folder / "out.jsonl").items())]
    ratio = float(result.stderr.split(" at its peak, ")[1].split("x of")[0])
    assert ratio < 0.6, result.stderr
    for seed, text in enumerate(together):
        alone = folder / str(seed)
        alone.mkdir()
        write(alone / "in.jsonl", [{"prompt": words(700, seed)}])
        generate(tiny, alone, recipe="kivi(bits=2)")
        assert rows(alone / "out.jsonl")[1]["text"] == text


def test_the_peak_is_that_of_the_cache(tiny: Path, folder: Path):
    """Of `full()` with one sequence at a time: the longest one, in whole pages, and what the exact cache takes."""
    result = generate(tiny, folder, "--max-batch", "1")
    exact = 2 * 2 * 32 * 4 * (150 + 30)  # two layers of keys and values, one head of 32 numbers in float32
    assert f"{exact / 2**20:.2f} MiB" in result.stderr
    assert 1 <= float(result.stderr.split(" at its peak, ")[1].split("x of")[0]) < 1.6


def test_messages_go_into_the_chat_template(tmp_path: Path):
    model = save(tmp_path / "chat", TEMPLATE, **WIDE)
    talk = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w8"}, {"role": "user", "content": ""}]
    write(tmp_path / "in.jsonl", [{"messages": talk}, {"prompt": "w9"}])
    assert generate(model, tmp_path).exit_code == 0
    found = rows(tmp_path / "out.jsonl")
    assert found[1]["text"].split() == said(model, "w1 w9 w4 w2 w8 w4 w1 w4 w2", 12)
    assert found[2]["text"].split() == said(model, "w1 w9 w4 w2", 12)
    write(tmp_path / "in.jsonl", [{"prompt": "w9"}])
    assert generate(model, tmp_path, "--no-chat", "--restart").exit_code == 0
    assert rows(tmp_path / "out.jsonl")[1]["text"].split() == said(model, "w9", 12)


def test_settings_of_a_line_come_before_those_of_the_command(tiny: Path, folder: Path):
    prompt = words(30)
    entries = [
        {"prompt": prompt}, {"prompt": prompt}, {"prompt": prompt, "seed": 5}, {"prompt": prompt, "seed": 5, "id": "x"},
        {"prompt": prompt, "temperature": 0}, {"prompt": prompt, "top_k": 1}, {"prompt": prompt, "top_p": 1e-9},
        {"prompt": prompt, "temperature": 0, "repetition_penalty": 100},
    ]  # fmt: skip
    write(folder / "in.jsonl", entries)
    assert generate(tiny, folder, "--temperature", "1.5").exit_code == 0
    first = rows(folder / "out.jsonl")
    texts = [first[name]["text"] for name in (1, 2, 3, "x", 5, 6, 7, 8)]
    greedy = " ".join(said(tiny, prompt, 12))
    assert texts[2] == texts[3] and texts[4] == texts[5] == texts[6] == greedy
    assert len(set(texts)) == 5
    penalised = texts[7].split()
    assert len(set(penalised)) == 12 and not set(penalised) & set(prompt.split())
    generate(tiny, folder, "--temperature", "1.5", "--restart")
    assert {name: row["text"] for name, row in rows(folder / "out.jsonl").items()} == {
        name: row["text"] for name, row in first.items()
    }
    generate(tiny, folder, "--temperature", "1.5", "--restart", "--seed", "1")
    again = rows(folder / "out.jsonl")
    assert again[1]["text"] != first[1]["text"] and again[3]["text"] == first[3]["text"]


def test_what_ends_a_request(tiny: Path, tmp_path: Path):
    prompt = words(40, 1)
    full = said(tiny, prompt, 12)
    assert len(set(full)) > 6
    place = next(i for i in range(4, 12) if full[i] not in full[:i] and full[i - 1] not in full[: i - 1])
    word, before = full[place], full[:place]
    number = int(word[1:]) + 2
    entries = [
        {"prompt": prompt, "stop": stop}
        for stop in (word, [word], number, [number, "nothing"], f"{full[place - 1]} {word}", ["w999", "x"], [])
    ]
    write(tmp_path / "in.jsonl", entries)
    assert generate(tiny, tmp_path).exit_code == 0
    found = rows(tmp_path / "out.jsonl")
    for line in (1, 2, 3, 4):
        assert found[line]["text"].split() == before, entries[line - 1]
    assert found[5]["text"].split() == before[:-1]
    for line in (1, 2, 3, 4, 5):
        assert found[line]["finish_reason"] == "stop" and found[line]["tokens"] == place + 1
    for line in (6, 7):
        assert found[line]["text"].split() == full and found[line]["finish_reason"] == "length"
    # The model's own end is one whatever else is given, and is not in the text.
    model = save(tmp_path / "ends", end=number, **WIDE)
    entries = [{"prompt": prompt}, {"prompt": prompt, "stop": ["w999"]}, {"prompt": prompt, "stop": 0}]
    write(tmp_path / "in.jsonl", entries)
    generate(model, tmp_path, "--restart")
    for row in rows(tmp_path / "out.jsonl").values():
        assert row["text"].split() == before and row["finish_reason"] == "stop" and row["tokens"] == place + 1


def test_a_special_token_may_end_a_request(tiny: Path, tmp_path: Path):
    """It is in no text, so it is looked for among the tokens."""
    prompt = words(40, 1)
    full = said(tiny, prompt, 12)
    model = save(tmp_path / "model", **WIDE)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [full[5]]})
    tokenizer.save_pretrained(model)
    write(tmp_path / "in.jsonl", [{"prompt": prompt}, {"prompt": prompt, "stop": [full[5]]}])
    assert generate(model, tmp_path).exit_code == 0
    found = rows(tmp_path / "out.jsonl")
    place = full.index(full[5])
    assert found[1]["text"].split() == [word for word in full if word != full[5]]
    assert found[2]["text"].split() == full[:place] and found[2]["finish_reason"] == "stop"


def test_prefixes_are_shared(tiny: Path, folder: Path):
    begin = words(1100)
    write(folder / "in.jsonl", [{"prompt": f"{begin} {words(5, seed)}"} for seed in range(1, 4)])
    alone = generate(tiny, folder)
    assert "prompts begin alike: --share-prefixes" in alone.stderr and "prefixes  " not in alone.stderr
    before = rows(folder / "out.jsonl")
    assert {row["shared_tokens"] for row in before.values()} == {0}
    result = generate(tiny, folder, "--share-prefixes", "--restart")
    after = rows(folder / "out.jsonl")
    assert [after[line]["text"] for line in (1, 2, 3)] == [before[line]["text"] for line in (1, 2, 3)]
    assert [after[line]["shared_tokens"] for line in (1, 2, 3)] == [0, 1024, 1024]
    assert "2 of 3 prompts began with one, 2,048 tokens" in result.stderr
    assert "1,267 read" in result.stderr and "Note" not in result.stderr
    result = generate(tiny, folder, "--share-prefixes", "--restart", recipe="snapkv()")
    assert result.exit_code == 0 and "Note: snapkv() chooses" in result.stderr
    assert {row["shared_tokens"] for row in rows(folder / "out.jsonl").values()} == {0}


# -- going on ---------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_done(tiny: Path, folder: Path):
    generate(tiny, folder, "--temperature", "1")
    out = folder / "out.jsonl"
    whole, lines = without_times(out), out.read_text().splitlines(keepends=True)
    result = generate(tiny, folder, "--temperature", "1")
    assert result.exit_code == 0 and "All 4 results are in" in result.stderr
    for kept, torn in ((lines[:2], ""), (lines[1:3], lines[0][:-5]), ([], lines[3][:40]), (lines[:3], lines[3][:-1])):
        out.write_text("".join(kept) + torn)
        result = generate(tiny, folder, "--temperature", "1", "--max-batch", "1", "--max-bytes", "10M")
        assert result.exit_code == 0, result.stderr
        assert f"{4 - len(kept)} of 4 done" in result.stderr
        assert ("earlier" in result.stderr) == bool(kept)
        assert out.read_text().splitlines(keepends=True)[: len(kept)] == kept  # not done again: the same times
        assert without_times(out) == whole
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_lines_may_be_added_and_those_with_an_id_may_move(tiny: Path, folder: Path):
    generate(tiny, folder, "--temperature", "1")
    out = folder / "out.jsonl"
    before = out.read_text()
    write(folder / "in.jsonl", ["", *ENTRIES])
    refused(generate(tiny, folder, "--temperature", "1"), "for line ", "not asked for")
    entries = [ENTRIES[0], ENTRIES[3], ENTRIES[2], ENTRIES[1], {"prompt": words(5)}]
    write(folder / "in.jsonl", entries)
    result = generate(tiny, folder, "--temperature", "1")
    assert "1 of 5 done, 4 earlier" in result.stderr
    assert out.read_text().startswith(before) and set(rows(out)) == {1, "b", 3, 7, 5}


def test_what_was_written_by_another_run_is_not_taken(tiny: Path, folder: Path):
    generate(tiny, folder)
    out, other = folder / "out.jsonl", save(folder / "other", seed=1)
    before = out.read_text()
    again = functools.partial(generate, tiny, folder)
    refused(again(recipe="kivi(bits=2)"), "the recipe full()", "kivi(bits=2)", "--restart", "another --out")
    refused(generate(other, folder), "the model", str(other), "--restart")
    refused(again(n=13), "in.jsonl:1", "changed", "--restart")
    refused(again("--temperature", "0.5"), "changed")
    refused(again("--no-chat"), "changed")
    write(folder / "in.jsonl", [*ENTRIES[:3], {**ENTRIES[3], "prompt": "w1"}])
    refused(again(), "in.jsonl:4", "changed")
    write(folder / "in.jsonl", ENTRIES[:3])
    refused(again(), "7", "not asked for")
    assert out.read_text() == before
    write(folder / "in.jsonl", ENTRIES)
    for foreign in ("my notes\n", '{"text": "mine"}\n', "[1]\n", '{"key": 1, "recipe": 1, "model": 1, "id": []}\n'):
        out.write_text(before + foreign)
        refused(again(), "line 5", "no result", "--restart")
        assert out.read_text() == before + foreign
    with out.open("a") as file:
        out.write_text("")
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(again(), "another run")
    out.write_text(before + "my notes\n")
    assert again("--restart", recipe="kivi(bits=2)").exit_code == 0
    assert {row["recipe"] for row in rows(out).values()} == {"kivi(bits=2)"}


def test_a_request_that_fails_does_not_keep_the_others(tiny: Path, folder: Path):
    """It has a line that says why, and the next run tries it again."""
    write(folder / "in.jsonl", [*ENTRIES, {"prompt": words(3000), "id": "long"}])
    result = generate(tiny, folder, "--max-bytes", "500K")
    out = folder / "out.jsonl"
    assert result.exit_code == 1, result.output
    assert '1 request has failed ("error" in' in result.stderr and "4 of 5 done, 1 failed" in result.stderr
    found = rows(out)
    assert "cap of 512,000 bytes is too small" in found["long"]["error"] and "text" not in found["long"]
    for name, entry, number in zip((1, "b", 3, 7), ENTRIES, (12, 30, 1, 12)):
        assert found[name]["text"].split() == said(tiny, entry["prompt"], number)
    result = generate(tiny, folder, "--max-bytes", "500K")
    assert result.exit_code == 1 and "0 of 5 done, 1 failed, 4 earlier" in result.stderr
    result = generate(tiny, folder)
    assert result.exit_code == 0 and "1 of 5 done, 4 earlier" in result.stderr
    assert rows(out)["long"]["text"].split() == said(tiny, words(3000), 12)


def test_messages_that_the_template_refuses_and_a_prompt_that_is_too_long(tmp_path: Path):
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    model = save(tmp_path / "chat", template, max_position_embeddings=64)
    bad = [{"role": "assistant", "content": "w1"}]
    write(tmp_path / "in.jsonl", [{"messages": bad}, {"prompt": words(60)}, {"prompt": "w1"}])
    result = generate(model, tmp_path)
    assert result.exit_code == 1 and "2 requests have failed" in result.stderr
    found = rows(tmp_path / "out.jsonl")
    assert "of assistant (user first)" in found[1]["error"]
    assert "63 tokens of prompt" in found[2]["error"] and found[3]["tokens"] == 12


def test_preempted_sequences_come_back_unchanged(tiny: Path, folder: Path):
    write(folder / "in.jsonl", [{"prompt": words(200, seed), "max_new_tokens": 120} for seed in range(4)])
    generate(tiny, folder)
    plain = rows(folder / "out.jsonl")
    result = generate(tiny, folder, "--restart", "--max-bytes", "600K")
    assert result.exit_code == 0, result.stderr
    assert "waited in host memory" in result.stderr
    assert {k: row["text"] for k, row in rows(folder / "out.jsonl").items()} == {
        k: row["text"] for k, row in plain.items()
    }


# -- broken off -------------------------------------------------------------------------------------------


def many(folder: Path) -> list[str | Path]:
    write(folder / "in.jsonl", [{"prompt": words(20, seed), "max_new_tokens": 60 + seed} for seed in range(40)])
    return ["-r", "kivi(bits=4)", "--temperature", "1", "--prompts", folder / "in.jsonl", "--max-batch", "4"]


def some(out: Path, least: int = 3) -> Callable[[], bool]:
    return lambda: out.exists() and out.read_bytes().count(b"\n") >= least


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(tiny: Path, tmp_path: Path):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = ["generate", "-m", tiny, *many(tmp_path)]
    process = Process(*command, "--out", out)
    assert process.interrupt_when(some(out)) == ""
    process.check()
    seen = process.seen.decode()
    kept = out.read_text().splitlines()
    assert 3 <= len(kept) < 40 and set(rows(out)) <= set(range(1, 41))
    assert f"{len(kept)} of 40 results are in" in seen and "the same command goes on" in seen
    assert "of 40 requests, " in seen and "tokens/s, " in seen and "MiB of cache" in seen  # the bar
    assert run(*command, "--out", out).exit_code == 0
    assert out.read_text().splitlines()[: len(kept)] == kept
    assert run(*command, "--out", whole).exit_code == 0
    assert without_times(out) == without_times(whole)


@pytest.mark.slow
def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    command = ["generate", "-m", tiny, *many(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fivefold", *map(str, command), "--out", str(out)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not some(out)():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    kept = out.read_text().splitlines()
    assert 3 <= len(kept) < 40
    assert run(*command, "--out", out).exit_code == 0
    assert run(*command, "--out", whole).exit_code == 0
    assert without_times(out) == without_times(whole) and len(rows(out)) == 40


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "no JSON"),
        ("w1 w2", "no JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('"w1"', "no JSON object"),
        ("{}", "no prompt"),
        ('{"prompt": null}', "no prompt"),
        ('{"prompt": " "}', "'prompt' is \" \""),
        ('{"prompt": 3}', "'prompt' is 3"),
        ('{"prompt": "w1 \\ud800"}', "surrogate"),
        ('{"prompt": "w1", "promt": "w2"}', "'promt' is unknown"),
        ('{"prompt": "w1", "messages": [{"role": "user", "content": "w1"}]}', "both"),
        ('{"messages": []}', "'messages' is []"),
        ('{"messages": "w1"}', "'messages' is"),
        ('{"messages": [{"role": "user"}]}', "message 1 is"),
        ('{"messages": [{"role": "user", "content": "w1"}, {"role": "", "content": "w1"}]}', "role of message 2"),
        ('{"messages": [{"role": "user", "content": ["w1"]}]}', "content of message 1"),
        ('{"prompt": "w1", "id": [1]}', "'id' is [1]"),
        ('{"prompt": "w1", "id": true}', "'id' is true"),
        ('{"prompt": "w1", "id": "a"}', "the id 'a'"),
        ('{"prompt": "w1", "max_new_tokens": 0}', "max_new_tokens=0"),
        ('{"prompt": "w1", "max_new_tokens": 1.5}', "max_new_tokens=1.5"),
        ('{"prompt": "w1", "temperature": -1}', "temperature=-1"),
        ('{"prompt": "w1", "temperature": NaN}', "temperature=nan"),
        ('{"prompt": "w1", "temperature": "hot"}', "temperature='hot'"),
        ('{"prompt": "w1", "top_k": 0}', "top_k=0"),
        ('{"prompt": "w1", "top_p": 1.1}', "top_p=1.1"),
        ('{"prompt": "w1", "repetition_penalty": 0}', "repetition_penalty=0"),
        ('{"prompt": "w1", "seed": -1}', "seed=-1"),
        ('{"prompt": "w1", "stop": [""]}', "'stop' holds \"\""),
        ('{"prompt": "w1", "stop": [1.5]}', "'stop' holds 1.5"),
        ('{"prompt": "w1", "stop": {"a": 1}}', "'stop' holds"),
    ],
)
def test_a_bad_line_is_refused_before_anything_is_loaded(line: str, sentence: str, tmp_path: Path):
    write(tmp_path / "in.jsonl", [{"prompt": "w1", "id": "a"}, "", line])
    said = refused(generate(tmp_path / "no-model", tmp_path), "in.jsonl:3: ", sentence)
    assert ":" in said.split("in.jsonl:3: ")[1]  # what is wrong, and what to do
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_files(tiny: Path, folder: Path):
    prompts, out = folder / "in.jsonl", folder / "out.jsonl"
    empty, binary, link = folder / "empty", folder / "binary", folder / "link"
    empty.write_text(" \n\n")
    binary.write_bytes(b'{"prompt": "\xff"}\n')
    link.symlink_to(prompts)

    def no(*args: str | Path) -> str:
        return refused(run("generate", "-m", tiny, "-r", "full()", *args))

    for target in (prompts, link):
        assert "prompts itself" in no("--prompts", prompts, "--out", target)
    assert "empty" in no("--prompts", empty, "--out", out)
    assert "not UTF-8" in no("--prompts", binary, "--out", out)
    assert "No such file" in no("--prompts", folder / "none", "--out", out)
    assert "Is a directory" in no("--prompts", folder, "--out", out)
    assert "cannot be written" in no("--prompts", prompts, "--out", "/nowhere/out.jsonl")
    assert "not a file" in no("--prompts", prompts, "--out", folder)
    assert "give --out" in no("--prompts", prompts)
    assert "--prompts goes without" in no("--prompts", prompts, "--out", out, "-p", "w1")
    for option in (["--out", out], ["--restart"], ["--share-prefixes"], ["--max-batch", "2"]):
        assert f"{option[0]} is for many" in no("-p", "w1", *option)
    assert "kivy" in refused(generate(tiny, folder, recipe="kivy()"))
    assert "temperature" in refused(generate(tiny, folder, "--temperature", "1e-9"))
    write(prompts, [ENTRIES[0], {"messages": [{"role": "user", "content": "w1"}]}])
    assert "in.jsonl:2" in refused(generate(tiny, folder), "no chat template")
    assert "--chat" in refused(generate(tiny, folder, "--chat"))
    assert not out.exists()


def test_prompts_from_stdin(tiny: Path, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    command = ["generate", "-m", tiny, "-r", "full()", "-n", "5", "--prompts", "-", "--out", out]
    result = run(*command, stdin=b'{"prompt": "w1 w2"}\r\n')
    assert result.exit_code == 0, result.stderr
    assert rows(out)[1]["text"].split() == said(tiny, "w1 w2", 5)
    refused(run(*command, stdin=b"{}\n"), "stdin:1: ")


# -- with the embedded model ------------------------------------------------------------------------------


@pytest.mark.model
@pytest.mark.slow
def test_prompts_with_the_embedded_model(tmp_path: Path):
    embedded.fetch()
    lands = ("France", "Italy", "Japan")
    entries = [{"id": land, "prompt": f"What is the capital of {land}?"} for land in lands]
    write(tmp_path / "in.jsonl", [*entries, {**entries[0], "stop": [" is"], "id": "cut"}])
    files = ["--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    result = run("generate", "-r", "kivi(bits=4)", "-n", "30", *files)
    assert result.exit_code == 0, result.stderr
    found = rows(tmp_path / "out.jsonl")
    for entry in entries:
        row = found[entry["id"]]
        alone = run("generate", "-r", "kivi(bits=4)", "-n", "30", "-p", entry["prompt"])
        assert row["text"] == alone.stdout.removesuffix("\n") and row["finish_reason"] == "stop"
    assert "Paris" in found["France"]["text"]
    assert found["cut"]["text"] == found["France"]["text"].split(" is")[0]
