"""What a result depends on: the key that it is kept under, and the environment that is told beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.calibrate.profile import signature
from fivefold.evaluate.demo import document
from fivefold.kernels.choice import choose
from fivefold.methods import Method

_ONLY_SHOWS = (
    "cli/", "serve/", "page/", "evaluate/charts.py", "evaluate/html.py", "evaluate/lm_eval.py", "evaluate/tables.py",
    "plan/charts.py", "plan/html.py",
)  # fmt: skip


@cache
def code_hash() -> str:
    """Of all of the package's files (kernels and profiles too), but for what only shows results: an edited method is
    measured anew."""
    digest = hashlib.sha256()
    root = Path(fivefold.__file__).parent
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and "__pycache__" not in path.parts and not name.startswith(_ONLY_SHOWS):
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def code_of(method: Method) -> list[str]:
    """Hashes of what a method is and is not in its text: the file of another package that it is in, and the profiles
    that its parameters name (`code_hash` knows our own)."""
    found = []
    module = sys.modules[type(method).__module__]
    file = getattr(module, "__file__", None)
    if not module.__name__.startswith("fivefold.") and file is not None:
        found.append(_hash(Path(file).read_bytes()))
    for part in dataclasses.fields(method):  # type: ignore[arg-type]
        value = getattr(method, part.name)
        # The description holds the hash of the tensors.
        if isinstance(value, str) and (text := Path(value) / "profile.json").is_file():
            found.append(_hash(text.read_bytes()))
    return found


def environment(model: Any, tokenizer: Any) -> dict[str, str]:
    """What results, or their times, depend on beside the plan."""
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "signature": signature(model.config),
        "weights": _fingerprint(model, tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "kernels": choose(model.device).path,
        "machine": machine(model.device),
        "text": f"Python {platform.python_version()}'s language reference and library",
        "text_hash": _hash(document().encode()),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "fivefold": fivefold.__version__,
        "code": code_hash(),
    }


def machine(device: torch.device) -> str:
    """What the times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def key(environment: dict[str, str], recipe: str, methods: Sequence[Method], sample: list[Any]) -> str:
    """Of a result. sample: what makes the text that it was measured on."""
    parts = [environment, [recipe, *map(code_of, methods)], *sample]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """Changes with the weights (a part of each tensor is looked at) and with how text is cut into tokens."""
    digest, parts = hashlib.sha256(), []
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        parts.append(flat[:: max(1, flat.numel() // 64)].float())
    for device in dict.fromkeys(part.device for part in parts):
        digest.update(torch.cat([part for part in parts if part.device == device]).cpu().numpy().tobytes())
    ids = tokenizer(document()[:20_000], add_special_tokens=False).input_ids
    digest.update(json.dumps(ids).encode())
    return digest.hexdigest()[:16]
