"""`fivefold chat`: what it answers, what it reads again and what not, and that nothing that was said is lost."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizerFast

import fivefold
from fivefold.models import embedded
from test_cli import refused, run, save
from test_cli_prompts import TEMPLATE, WIDE, words

FORGETFUL = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' or loop.last else 'w0' }}")
"""Answers are left out of it, as reasoning often is."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"), TEMPLATE, **WIDE)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("forgetful"), FORGETFUL, **WIDE)


class Said:
    """What came of a chat. answers: a line each; told: what stderr says; turns: tokens held, read, written."""

    def __init__(self, result: Any) -> None:
        assert result.exit_code == 0, (result.output, result.exception)
        self.answers = result.stdout.splitlines()
        self.told = result.stderr
        found = re.findall(r"([\d,]+) tokens in .*; read ([\d,]+).* wrote ([\d,]+) in", result.stderr)
        self.turns = [tuple(int(number.replace(",", "")) for number in one) for one in found]


def chat(
    model: Path, *lines: str, more: tuple[str | Path, ...] = (), recipe: str | None = "full()", n: int = 12
) -> Said:
    given = ["-r", recipe] if recipe else []
    return Said(run("chat", "-m", model, *given, "-n", n, *more, stdin="".join(f"{x}\n" for x in lines).encode()))


def expected(folder: Path, *lines: str, count: int = 12, system: str | None = None) -> list[str]:
    """What transformers itself answers, reading the whole conversation in each turn."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
        cache = DynamicCache(config=model.config)
        out = model.generate(ids, past_key_values=cache, do_sample=False, max_new_tokens=count, pad_token_id=0)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


ONE, TWO, THREE = words(40, 1), words(9, 2), words(70, 3)


# -- turns ------------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_whole_conversation(tiny: Path):
    said = chat(tiny, ONE, TWO, "", THREE)
    assert said.answers == expected(tiny, ONE, TWO, THREE) and len(set(said.answers)) == 3
    # Each turn reads the message, three words of the template, and the last word of the answer before, with its w4.
    assert said.turns == [(43 + 11, 43, 12), (54 + 14 + 11, 14, 12), (79 + 75 + 11, 75, 12)]
    assert "> " not in said.told and "> " not in " ".join(said.answers)


def test_the_system_s_text_comes_first(tiny: Path):
    said = chat(tiny, ONE, TWO, more=("--system", "w77"))
    assert said.answers == expected(tiny, ONE, TWO, system="w77") != expected(tiny, ONE, TWO)


@pytest.mark.parametrize("recipe", ["kivi(bits=2)", "streaming(sink=4, recent=32)", "h2o(keep=0.5)"])
def test_a_conversation_is_one_long_text(tiny: Path, recipe: str):
    """Compressed, the answers are those of one cache that reads and writes the same tokens."""
    said = chat(tiny, *(words(90, seed) for seed in range(4)), recipe=recipe, n=30)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    cache = fivefold.compress(model, recipe)
    pending: list[int] = []
    for seed, answer in enumerate(said.answers):
        pending += tokenizer(f"{'w4 ' if seed else ''}w1 {words(90, seed)} w4 w2").input_ids
        written = []
        with torch.inference_mode():
            while len(written) < 30:
                ids = torch.tensor([pending])
                written.append(int(model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()))
                pending = written[-1:]
        assert tokenizer.decode(written, skip_special_tokens=True) == answer, seed
    ratio = float(said.told.split("x of the exact cache")[-2].split()[-1])
    assert ratio < 1


def test_sampling_hangs_on_the_seed_and_the_turn(tiny: Path, tmp_path: Path):
    draw = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--repetition-penalty", "1.1")
    first = chat(tiny, ONE, ONE, more=(*draw, "--seed", "3"))
    assert chat(tiny, ONE, ONE, more=(*draw, "--seed", "3")).answers == first.answers
    assert chat(tiny, ONE, ONE, more=(*draw, "--seed", "4")).answers[0] != first.answers[0]
    session = ("--session", tmp_path / "talk", *draw, "--seed", "3")
    assert [*chat(tiny, ONE, more=session).answers, *chat(tiny, ONE, more=session).answers] == first.answers


def test_a_template_that_changes_earlier_turns(forgetful: Path):
    """Where tokens can be taken back they are; else all is read once, and then gone on from before the last answer."""
    lines = [words(60, 1), words(60, 2), words(60, 3)]
    want = expected(forgetful, *lines)
    said = chat(forgetful, *lines)
    assert said.answers == want
    # An answer of 12 words becomes one: it is taken back, but for the place that it began at.
    assert [read for _, read, _ in said.turns] == [63, 65, 65]
    assert said.told.count("(12 of them anew") == 0 and said.told.count("anew: the chat template changed") == 2
    # A window cannot take 60 tokens back. What it answers is what it does after reading the same at once, and then on.
    window = chat(forgetful, *lines, recipe="streaming(sink=4, recent=32)", n=60)
    assert [read for _, read, _ in window.turns] == [63, 63 + 2 + 63, 65]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(forgetful), AutoTokenizer.from_pretrained(forgetful)
    first, *others = [f"w1 {line} w4 w2" for line in lines]
    cache = fivefold.compress(model, "streaming(sink=4, recent=32)")
    with torch.inference_mode():
        for text, answer in zip((f"{first} w0 w4 {others[0]}", f"w0 w4 {others[1]}"), window.answers[1:]):
            token = model(torch.tensor([tokenizer(text).input_ids]), past_key_values=cache).logits[0, -1].argmax()
            fork = cache.fork()
            for word in answer.split():
                assert tokenizer.decode([int(token)]) == word
                token = model(token[None, None], past_key_values=fork).logits[0, -1].argmax()


def letters(folder: Path) -> Path:
    """A model that writes letters, with a tokenizer that would write pairs of them, and a template of letters."""
    save(folder, **WIDE)
    names = [
        chr(97 + i % 26) * (1 + i // 26) if i < 26 else f"{chr(97 + (i - 26) // 26)}{chr(97 + i % 26)}"
        for i in range(300)
    ]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(["?", ".", *names]))}
    merges = [(a, b) for a, b in (tuple(name) for name in vocabulary if len(name) == 2)]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="?"))
    made.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")
    template = (
        "{% for m in messages %}{{ '.' + m['content'] + '.' if m['role'] == 'user' else m['content'] }}{% endfor %}"
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    return folder


def test_an_answer_in_other_tokens_than_the_tokenizer_s_is_not_read_again(tmp_path: Path):
    model = letters(tmp_path / "letters")
    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = ("hello", "world", "again")
    said = chat(model, *lines, n=20)
    assert any(len(tokenizer(answer).input_ids) < 20 for answer in said.answers)
    tokens = [len(tokenizer(f".{line}.").input_ids) for line in lines]
    # The message, and the last letters of the answer before.
    assert [read for _, read, _ in said.turns] == [tokens[0], tokens[1] + 1, tokens[2] + 1]
    assert "anew" not in said.told


# -- commands ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=2)", "streaming(sink=4, recent=32)", "h2o(keep=0.5)"])
def test_undo_leaves_no_trace(tiny: Path, recipe: str):
    ask = functools.partial(chat, tiny, recipe=recipe, n=30)
    plain = ask(words(90, 1), words(90, 2), words(50, 4))
    undone = ask(words(90, 1), words(90, 2), words(90, 3), "/undo", words(50, 4))
    assert undone.answers[:2] == plain.answers[:2] and undone.answers[3:] == plain.answers[2:]
    assert undone.turns[-1] == plain.turns[-1]
    assert "The last turn is forgotten; 246 tokens are held." in undone.told


def test_undo_again_and_reset(tiny: Path):
    plain = chat(tiny, ONE, TWO, THREE)
    said = chat(tiny, ONE, "w5", "w6", "/undo", "/undo", TWO, "/undo", "/undo", "/undo", ONE, "/reset", ONE, TWO, THREE)
    assert said.answers[3:] == [plain.answers[1], plain.answers[0], *plain.answers]
    assert said.told.count("there is no turn to undo") == 1 and "All turns are forgotten." in said.told
    # What a window has given up is read again with the next message.
    window = functools.partial(chat, tiny, recipe="streaming(sink=4, recent=32)", n=30)
    said = window(THREE, THREE, "w5", "/undo", "/undo", TWO)
    assert said.answers[-1] == window(THREE, TWO).answers[-1]
    assert said.turns[-1][1] > 100


def test_what_commands_say(tiny: Path, tmp_path: Path):
    said = chat(
        tiny, "/help", "/save " + str(tmp_path / "x"), ONE, "/report", "/nothing", "/undo 2", " /help", "/quit", TWO
    )
    assert len(said.answers) == 2  # to ONE, and to " /help", which is a message
    for name in ("/help", "/report", "/undo", "/reset", "/save FOLDER", "/quit"):
        assert f"\n{name} " in f"\n{said.told}"
    assert "nothing to save yet" in said.told and not (tmp_path / "x").exists()
    assert "no command '/nothing'" in said.told and "no command '/undo 2'" in said.told
    assert "recipe         full()" in said.told and "bits a number  32.00" in said.told


def test_save_makes_a_session(tiny: Path, tmp_path: Path):
    kept, plain = tmp_path / "kept", chat(tiny, ONE, TWO, THREE, recipe="kivi(bits=2)")
    said = chat(tiny, ONE, TWO, f"/save {kept}", "w5", f"/save {kept}", recipe="kivi(bits=2)")
    assert f"fivefold chat --session {kept}" in said.told and "holds a conversation already" in said.told
    resumed = chat(tiny, THREE, more=("--session", kept), recipe=None)
    assert resumed.told.startswith("resumed: 2 turns, ") and resumed.answers == plain.answers[2:]


# -- what does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=2)", "h2o(keep=0.5)"])
def test_a_turn_that_does_not_fit_leaves_the_conversation_as_it_was(tiny: Path, recipe: str):
    plain = chat(tiny, ONE, TWO, recipe=recipe)
    said = chat(tiny, ONE, words(20_000), TWO, recipe=recipe, more=("--max-bytes", "500K"))
    assert said.answers == plain.answers and said.turns == plain.turns
    assert said.told.count("does not fit under --max-bytes and is forgotten") == 1


def test_a_conversation_that_is_too_long_for_the_model(tmp_path: Path):
    model = save(tmp_path / "short", TEMPLATE, max_position_embeddings=70, **WIDE)
    said = chat(model, ONE, words(20), "w7", "w8")
    # The second message does not fit; the third does, and leaves room for ten words; the fourth does not.
    assert said.turns == [(54, 43, 12), (69, 6, 10)]
    for tokens in (79, 75):
        assert f"the conversation has {tokens} tokens, and the model was made for 70" in said.told
    want = expected(model, ONE, "w7")
    assert said.answers[0] == want[0] and want[1].startswith(said.answers[1]) and len(said.answers) == 2


# -- sessions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=2)", "streaming(sink=4, recent=32)", "h2o(keep=0.5)"])
def test_a_session_goes_on_where_it_was(tiny: Path, tmp_path: Path, recipe: str):
    lines = [words(90, seed) for seed in range(4)]
    whole = chat(tiny, *lines, recipe=recipe, n=30)
    session = ("--session", tmp_path / "talk")
    parts = [chat(tiny, line, recipe=recipe, n=30, more=session) for line in lines]
    assert [answer for part in parts for answer in part.answers] == whole.answers
    assert [turn for part in parts for turn in part.turns] == whole.turns
    assert "resumed" not in parts[0].told
    for number, part in enumerate(parts[1:], 1):
        turns = "1 turn," if number == 1 else f"{number} turns,"
        assert part.told.startswith(f"resumed: {turns} {parts[number - 1].turns[0][0]:,} tokens, ")
    assert "(reading it again would take about" in parts[1].told
    held = json.loads((tmp_path / "talk" / "conversation.json").read_text())
    assert [one["content"] for one in held["messages"][1::2]] == whole.answers
    assert not list(tmp_path.glob("**/*.pkl")) and not list(tmp_path.glob("**/*.pt"))


def test_an_estimate_needs_a_measurement(tiny: Path, tmp_path: Path):
    session = ("--session", tmp_path / "talk")
    chat(tiny, "w1", "w2", "w3", n=30, more=session)  # 4 tokens were read at a time, and 100 are held
    assert "would take" not in chat(tiny, more=session).told


def test_undo_and_reset_are_kept(tiny: Path, tmp_path: Path):
    session = ("--session", tmp_path / "talk", "--system", "w9")
    plain = chat(tiny, ONE, THREE, more=("--system", "w9"))
    chat(tiny, ONE, TWO, "/undo", more=session)
    assert chat(tiny, THREE, more=session).answers == plain.answers[1:]
    chat(tiny, "/undo", "/undo", ONE, more=session)
    assert chat(tiny, THREE, more=session).answers == plain.answers[1:]
    chat(tiny, "/reset", more=session)
    said = chat(tiny, ONE, more=session)
    assert "resumed" not in said.told and said.answers == plain.answers[:1]


def test_what_does_not_fit_a_session_is_refused(tiny: Path, tmp_path: Path):
    talk = tmp_path / "talk"
    chat(tiny, ONE, more=("--session", talk))
    before = {path: path.read_bytes() for path in talk.glob("**/*") if path.is_file()}
    other = save(tmp_path / "other", TEMPLATE, seed=1)

    def no(*args: str | Path, words: tuple[str, ...]) -> None:
        refused(run("chat", "--session", talk, *args, stdin=b"w1\n"), *words)

    no("-r", "kivi(bits=2)", words=("full()", "kivi(bits=2)", "leave --recipe out"))
    no("-m", other, words=(str(tiny), str(other), "--model", "another --session"))
    no("--dtype", "bfloat16", words=("float32", "bfloat16", "--dtype float32"))
    no("--system", "w5", words=("leave --system out",))
    no("--max-bytes", "1K", words=("bytes",))
    with FileLock(talk / ".lock"):
        no(words=("another chat",))
    assert before == {path: path.read_bytes() for path in talk.glob("**/*") if path.is_file()}
    assert chat(tiny, more=("--session", talk), recipe=None).told.startswith("resumed: 1 turn")


def test_a_model_that_was_changed_in_its_folder_is_refused(tmp_path: Path):
    model, talk = save(tmp_path / "model", TEMPLATE), tmp_path / "talk"
    chat(model, ONE, more=("--session", talk))
    save(model, TEMPLATE, seed=1)
    refused(run("chat", "--session", talk, stdin=b"w1\n"), "other weights")


def test_damaged_foreign_and_newer_sessions_are_refused(tiny: Path, tmp_path: Path):
    talk = tmp_path / "talk"
    chat(tiny, ONE, more=("--session", talk))
    cache = talk / "cache" / "cache.json"
    tensors = next((talk / "cache").glob("*.safetensors"))
    good, bits = cache.read_bytes(), tensors.read_bytes()

    def no(*words: str) -> None:
        refused(run("chat", "--session", talk, stdin=b"w1\n"), *words)

    for bad in (b"", b"{", good[:-20], good.replace(b'"role"', b'"rule"', 1)):
        cache.write_bytes(bad)
        no("damaged")
    cache.write_bytes(good)
    for torn in (bits[:-1], bits[:-1] + bytes([bits[-1] ^ 1])):
        tensors.write_bytes(torn)
        no("damaged")
    tensors.write_bytes(bits)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    for note, words_ in ((None, "no conversation"), ({"chat": 99}, "newer"), ({"chat": 1}, "no conversation")):
        made = fivefold.compress(model, "full()")
        with torch.inference_mode():
            model(torch.tensor([[5, 6]]), past_key_values=made)
        made.save(talk / "cache", note)
        no(words_)
    save_file({"a": torch.zeros(1)}, tmp_path / "file")
    refused(run("chat", "-r", "full()", "-m", tiny, "--session", tmp_path / "file", stdin=b""), "not a folder")


def test_bad_options(tiny: Path, tmp_path: Path):
    def no(*args: str | Path) -> str:
        return refused(run("chat", *args, stdin=b"w1\n"))

    assert "--recipe" in no("-m", tiny) and "--recipe" in no("-m", tiny, "--session", tmp_path / "none")
    assert not (tmp_path / "none" / "cache").exists()
    assert "kivy" in no("-m", tiny, "-r", "kivy()")
    assert "chat template" in no("-m", save(tmp_path / "plain"), "-r", "full()")
    assert "--system" in no("-m", tiny, "-r", "full()", "--system", " ")
    assert "temperature" in no("-m", tiny, "-r", "full()", "--temperature", "1e-9")
    assert "repetition_penalty" in no("-m", tiny, "-r", "full()", "--repetition-penalty", "0")
    assert run("chat", "-m", tiny, "-r", "full()", "-n", "3", "--chunk", str(10**20), stdin=b"w1\n").exit_code == 0
    result = run("chat", "-m", tiny, "-r", "full()", "-n", "3", stdin=b"\xff\nw1\n")
    assert result.exit_code == 0 and "not UTF-8" in result.stderr and len(result.stdout.splitlines()) == 1


# -- processes --------------------------------------------------------------------------------------------


class Talk:
    """A chat in a process of its own, fed line by line."""

    def __init__(self, *args: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fivefold", "chat", *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "COLUMNS": "200"},
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.said = {"stdout": b"", "stderr": b""}

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert time.monotonic() < deadline and self.process.poll() is None, self.said
            self.look(0.02)

    def look(self, timeout: float) -> bool:
        streams = {self.process.stdout: "stdout", self.process.stderr: "stderr"}
        found = False
        for stream in select.select(list(streams), [], [], timeout)[0]:
            part = os.read(stream.fileno(), 65536)
            self.said[streams[stream]] += part
            found = found or bool(part)
        return found

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)
        while self.look(0):
            pass

    @property
    def out(self) -> str:
        return self.said["stdout"].decode()

    @property
    def told(self) -> str:
        return self.said["stderr"].decode()


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_chat(tiny: Path, tmp_path: Path):
    talk = Talk("-m", tiny, "-r", "kivi(bits=2)", "-n", "50000", "--session", tmp_path / "talk")
    talk.write(ONE)
    talk.wait(lambda: len(talk.out.split()) > 20)
    talk.process.send_signal(signal.SIGINT)
    talk.wait(lambda: "wrote" in talk.told)
    first = talk.out
    assert first.endswith("\n") and len(first.split()) > 20
    talk.wait(lambda: (tmp_path / "talk" / "conversation.json").exists())
    talk.process.send_signal(signal.SIGINT)  # with no answer under way
    talk.wait(lambda: "Ctrl-D or /quit ends." in talk.told)
    talk.write(TWO)
    talk.wait(lambda: len(talk.out.split()) > len(first.split()) + 20)
    talk.process.send_signal(signal.SIGINT)
    talk.wait(lambda: talk.told.count("wrote") == 2)
    talk.end()
    assert talk.process.returncode == 0 and "Traceback" not in talk.told
    answers = talk.out.splitlines()
    held = json.loads((tmp_path / "talk" / "conversation.json").read_text())["messages"]
    assert [one["content"] for one in held] == [ONE, answers[0], TWO, answers[1]]
    # What was said until then is what the next answer goes on from.
    count = len(answers[0].split())
    again = chat(tiny, ONE, recipe="kivi(bits=2)", n=count, more=("--session", tmp_path / "other"))
    assert again.answers == answers[:1]
    again = chat(tiny, TWO, recipe=None, n=len(answers[1].split()), more=("--session", tmp_path / "other"))
    assert again.answers == answers[1:]


@pytest.mark.slow
def test_ctrl_c_while_a_message_is_read_forgets_it(tiny: Path):
    talk = Talk("-m", tiny, "-r", "full()", "-n", "12", "--chunk", "1")
    talk.write(ONE)
    talk.wait(lambda: "wrote" in talk.told)
    talk.write(words(20000))
    time.sleep(0.5)
    assert "\n" not in talk.out.removesuffix("\n")
    talk.process.send_signal(signal.SIGINT)
    talk.wait(lambda: "not read to its end" in talk.told)
    talk.write(TWO)
    talk.wait(lambda: talk.told.count("wrote") == 2)
    talk.end()
    assert talk.out.splitlines() == expected(tiny, ONE, TWO)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_turn_at_once(tmp_path: Path):
    """In the middle of a forward that takes its time."""
    model = save(tmp_path / "deep", TEMPLATE, num_hidden_layers=12, **WIDE)
    talk = Talk("-m", model, "-r", "kivi(bits=2)", "-n", "12", "--chunk", "100000")
    talk.write(ONE)
    talk.wait(lambda: "wrote" in talk.told)
    talk.write(words(20_000))
    time.sleep(0.5)
    for _ in range(100):
        if "forgotten" in talk.told:
            break
        talk.process.send_signal(signal.SIGINT)  # some fall into the same layer, and count as one
        talk.look(0.3)
    assert "interrupted: this turn is forgotten." in talk.told
    talk.write(TWO)
    talk.wait(lambda: talk.told.count("wrote") == 2)
    talk.end()
    assert talk.out.splitlines() == chat(model, ONE, TWO, recipe="kivi(bits=2)").answers


@pytest.mark.slow
@pytest.mark.release
def test_a_killed_chat_loses_the_turn_at_most(tiny: Path, tmp_path: Path):
    session = ("--session", tmp_path / "talk")
    command = ["-m", tiny, "-r", "kivi(bits=2)", "-n", "800", *session]
    talk = Talk(*command)
    talk.write(ONE)
    talk.wait(lambda: "wrote 800" in talk.told)
    first = talk.out
    talk.write(TWO)
    talk.wait(lambda: len(talk.out) > len(first) + 300)
    talk.process.kill()
    talk.end()
    assert talk.process.returncode == -signal.SIGKILL
    whole = chat(tiny, ONE, TWO, recipe="kivi(bits=2)", n=800)
    resumed = chat(tiny, TWO, recipe="kivi(bits=2)", n=800, more=session)
    assert resumed.told.startswith("resumed: 1 turn, 842 tokens, ")
    assert [first.removesuffix("\n"), *resumed.answers] == whole.answers


def _newer(file: Path, than: int) -> bool:
    return file.exists() and file.stat().st_mtime_ns > than


@pytest.mark.slow
def test_whenever_it_is_killed_a_session_can_be_resumed(tiny: Path, tmp_path: Path):
    """Short turns one after another, so that much of the time goes into saving."""
    talk, rng, lines = tmp_path / "talk", random.Random(0), [f"w{number}" for number in range(100)]
    whole: list[str] = []
    held = talk / "conversation.json"
    for _ in range(3):
        before = held.stat().st_mtime_ns if held.exists() else 0
        process = Talk("-m", tiny, "-r", "kivi(bits=2)", "-n", "2", "--session", talk)
        for line in lines:
            process.write(line)
        process.wait(functools.partial(_newer, held, before))
        time.sleep(rng.random() * 0.2)
        process.process.kill()
        process.end()
        said = chat(tiny, "/report", recipe=None, more=("--session", talk))
        turns = int(said.told.split("resumed: ")[1].split()[0])
        note = json.loads((talk / "cache" / "cache.json").read_text())["note"]
        assert len(note["messages"]) == 2 * turns
        assert [one["content"] for one in note["messages"]][: len(whole)] == whole
        assert len(note["messages"]) > len(whole)
        whole = [one["content"] for one in note["messages"]]


def _own_terminal() -> None:
    """In the child: its stdin is the terminal that it gets Ctrl-C from."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("everything", [True, False], ids=["all", "stdout-in-a-file"])
@pytest.mark.slow
def test_in_a_terminal(tiny: Path, tmp_path: Path, everything: bool):
    """A sign that asks for input, Ctrl-C and Ctrl-D as keys; answers alone go to stdout."""
    screen, theirs = pty.openpty()
    file = tmp_path / "answers"
    with file.open("wb") as answers:
        process = subprocess.Popen(
            [sys.executable, "-m", "fivefold", "chat", "-m", str(tiny), "-r", "full()", "-n", "12"],
            stdin=theirs, stdout=theirs if everything else answers, stderr=theirs, preexec_fn=_own_terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "1000"},
        )  # fmt: skip
    os.close(theirs)
    seen = b""

    def wait(word: bytes, count: int = 1) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while seen.count(word) < count:
            assert time.monotonic() < deadline and process.poll() is None, seen
            if select.select([screen], [], [], 0.1)[0]:
                seen += os.read(screen, 65536)

    wait(b"> ")
    assert b"/help lists the commands" in seen
    time.sleep(0.5)  # readline looks at signals only where it waits, just after it has shown its sign
    os.write(screen, b"w1 w2\x03")  # a line that is given up
    wait(b"Ctrl-D or /quit ends.")
    wait(b"> ", 2)
    os.write(screen, ONE.encode() + b"\n")
    wait(b"wrote")
    wait(b"> ", 3)
    os.write(screen, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(screen)
    [answer] = expected(tiny, ONE)
    assert (answer.encode() in seen) == everything
    assert file.read_text().splitlines() == ([] if everything else [answer])


# -- with the embedded model ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.model
def test_a_chat_with_the_embedded_model(tmp_path: Path):
    embedded.fetch()
    session = ["--session", tmp_path / "talk"]
    first = run("chat", "-r", "kivi(bits=4)", "-n", "40", *session, stdin=b"What is the capital of France?\n")
    assert first.exit_code == 0 and "Paris" in first.stdout, first.output
    second = run("chat", "-n", "40", *session, stdin=b"And of Italy?\n")  # means nothing without the first
    assert "Rome" in second.stdout and second.stderr.startswith("resumed: 1 turn"), second.output
    assert "read 15 in" in second.stderr and "anew" not in second.stderr
