"""A method learns from a model: text in chunks, captured layer by layer, and a profile in the end.

A run can be broken off and goes on where it stopped: after a chunk the learner's sums are kept in one file, which is
replaced in one move. Finished runs leave a profile and nothing else. Nothing in a profile depends on time or place, so
that the same text, seed and software on the same machine give the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import fivefold
from fivefold.calibrate.learner import Capture, Learner, Progress
from fivefold.calibrate.profile import Profile, config_hash, read_profile, save_profile, signature
from fivefold.errors import FivefoldError, InputError, NonFiniteError, ProfileError, RecipeError
from fivefold.methods import Method, registered
from fivefold.recipe import Recipe

TOKENS = 65_536
LENGTH = 2_048
"""Tokens of a chunk; each is read from position 0 on."""
_SHORTEST = 64
_PARTIAL = "calibration.partial.safetensors"
# Keeping the sums takes at most this part of a run's time.
_SHARE = 0.1
# Modules of the standard library whose text is read by default: long ones, with much prose in them, and none that
# the stress tasks quote.
_MODULES = (
    "_pydatetime", "_pydecimal", "email.message", "enum", "http.cookiejar", "imaplib", "logging", "mailbox", "optparse",
    "pdb", "pickletools", "platform", "plistlib", "smtplib", "socket", "ssl", "subprocess", "tarfile",
    "threading", "turtle", "typing", "unittest.case", "unittest.mock", "urllib.request", "xml.dom.minidom", "zipfile",
)  # fmt: skip


class Stopped(FivefoldError):
    """The run was asked to stop; what it had learned is kept."""


def default_texts() -> list[str]:
    """Prose and code that every Python carries: the last two fifths of its language reference (pieces of fidelity
    begin in its first half), and modules of its standard library.

    What keys and values look like depends on the text only a little: channels that are large are large everywhere. For
    a model that does something else, give text of its own.
    """
    from fivefold.evaluate.demo import document

    prose = document()
    texts = [prose[prose.index("\n", 3 * len(prose) // 5) :]]
    for name in _MODULES:
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            continue
        if found is not None and found.origin is not None and Path(found.origin).suffix == ".py":
            texts.append(Path(found.origin).read_text(encoding="utf-8"))
    return texts


def learning(recipe: Recipe) -> Method:
    """The method of a recipe that learns from the model. Raises `RecipeError` unless there is exactly one."""
    able = [method for method in recipe.methods if method.captures]
    if len(able) == 1:
        return able[0]
    if able:
        raise RecipeError(f"{' and '.join(m.name for m in able)} both learn from the model: calibrate one at a time.")
    names = [name for name, cls in registered().items() if cls.captures]
    hint = f"use one with {' or '.join(names)}" if names else "no method that is installed does"
    raise RecipeError(f"nothing in the recipe {str(recipe)!r} learns from the model: {hint}.")


def chunks(tokenizer: Any, texts: Sequence[str], tokens: int, seed: int, longest: int | None) -> list[torch.Tensor]:
    """Pieces of the texts, int64 `[1, at most LENGTH]` each, drawn without replacement: `tokens` in all, or fewer if
    the texts have fewer. The tokens that the tokenizer begins a text with begin each of them."""
    prefix = tokenizer("").input_ids
    if tokenizer.eos_token_id in prefix and tokenizer.eos_token_id != tokenizer.bos_token_id:
        prefix = prefix[: prefix.index(tokenizer.eos_token_id)]
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
    length = min(LENGTH, tokens, longest or LENGTH) - len(prefix)
    if min(length, len(ids)) < _SHORTEST:
        raise InputError(
            f"{min(max(length, 0), len(ids))} tokens of text are too few to learn from: use at least "
            f"{_SHORTEST + len(prefix)}."
        )
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    if len(pieces) > 1 and len(pieces[-1]) < length:
        del pieces[-1]
    generator = torch.Generator().manual_seed(seed)
    out, left = [], tokens
    for number in torch.randperm(len(pieces), generator=generator).tolist():
        piece = (prefix + pieces[number])[:left]
        if len(piece) <= len(prefix):
            break
        out.append(torch.tensor([piece]))
        left -= len(piece)
    return out


def calibrate(
    model: Any,
    tokenizer: Any,
    recipe: str | Recipe,
    out: Path,
    texts: Sequence[str] | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
    stop: Callable[[], bool] = lambda: False,
) -> Profile:
    """Let the one method of `recipe` that learns from a model do so, and keep what it learned in the folder `out`.

    model: a decoder-only model of transformers; it is as it was afterwards. texts: what it reads (`default_texts`).
    A run that finds its own unfinished work in `out` goes on with it, and one that finds its own profile returns that.
    `stop` is asked between two chunks.

    Raises `RecipeError`, `InputError`, `UnsupportedModelError`, `NonFiniteError`, `ProfileError` (the folder holds
    something else, or cannot be written), and `Stopped`.
    """
    # Late, since it imports transformers.
    from fivefold.models.capture import capturing
    from fivefold.models.huggingface import make_cache

    parsed = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    method = learning(parsed)
    specs = [store.spec for store in make_cache(model, Recipe()).session.stores.values()]
    learner = method.learner(specs)
    texts = default_texts() if texts is None else texts
    config: Any = model.config
    pieces = chunks(tokenizer, texts, tokens, seed, getattr(config, "max_position_embeddings", None))
    made = {
        "recipe": str(method),
        "fivefold": fivefold.__version__,
        "text_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "tokens": sum(piece.shape[1] for piece in pieces),
        "seed": seed,
    }
    name, key = signature(config), config_hash(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfileError(f"cannot write the profile to {out}: {error.strerror or error}.") from None
    found = _finished(out)
    if found is not None:
        if (found.method, found.model, found.config, found.made) == (method.name, name, key, made):
            return found
        raise ProfileError(f"{out} holds another profile (of {found.method} for {found.model}): give another folder.")
    run = json.dumps({"method": method.name, "model": name, "config": key, **made}, sort_keys=True)
    partial = out / _PARTIAL
    done = _resume(partial, run, learner)
    total = learner.passes * len(pieces)
    layers = {spec.layer for spec in specs}

    def see(layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        if layer not in layers:
            return
        for what, tensor in captured.items():
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"the {what} of layer {layer} hold infinities or NaN: load the model in float32 or bfloat16."
                )
        learner.see(layer, captured)

    cost, saved = 0.0, time.perf_counter()
    with torch.inference_mode(), capturing(model, method.captures, see):
        while done < total:
            if stop():
                _keep(partial, run, done, learner)
                raise Stopped(f"stopped after {done} of {total} chunks; what was learned is kept in {out}.")
            progress(done, total, "Reading")
            learner.number, index = divmod(done, len(pieces))
            model(input_ids=pieces[index].to(model.device), use_cache=False, logits_to_keep=1)
            done += 1
            if done % len(pieces) == 0 and done < total:
                learner.next_pass()
            begin = time.perf_counter()
            if begin - saved >= cost / _SHARE or done == total:
                _keep(partial, run, done, learner)
                saved = time.perf_counter()
                cost = saved - begin
    settings, tensors = learner.finish(progress)
    profile = Profile(method.name, name, settings, tensors, key, made)
    save_profile(out, profile)
    partial.unlink(missing_ok=True)
    return profile


def _finished(out: Path) -> Profile | None:
    """The profile in a folder, None if there is none."""
    return read_profile(out, str(out)) if (out / "profile.json").is_file() else None


def _resume(partial: Path, run: str, learner: Learner) -> int:
    """How many chunks are done already; the learner is given what it had learned from them."""
    if not partial.is_file():
        return 0
    try:
        with safe_open(partial, "pt") as file:
            header = file.metadata() or {}
            sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        kept, done = header["run"], int(header["done"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ProfileError(f"{partial} cannot be read ({type(error).__name__}): delete it to begin anew.") from None
    if kept != run:
        raise ProfileError(
            f"{partial} is the unfinished work of another calibration ({_differs(kept, run)}): finish that, delete the "
            "file, or give another folder."
        )
    learner.sums = sums
    return done


def _differs(kept: str, run: str) -> str:
    """The first thing in which two runs differ, in words."""
    try:
        one, two = json.loads(kept), json.loads(run)
        return next(f"{name}={one.get(name)!r}, not {two[name]!r}" for name in two if one.get(name) != two[name])
    except (ValueError, AttributeError, StopIteration):
        return "of another version"


def _keep(partial: Path, run: str, done: int, learner: Learner) -> None:
    temporary = partial.with_name(f".{partial.name}.{os.getpid()}")
    try:
        sums = {name: tensor.contiguous() for name, tensor in learner.sums.items()}
        save_file(sums, temporary, metadata={"run": run, "done": str(done)})
        temporary.replace(partial)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProfileError(f"cannot keep what was learned in {partial.parent}: {reason}.") from None
    finally:
        temporary.unlink(missing_ok=True)
