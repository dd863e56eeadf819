"""A method learns from a model, by reading (`reading.py`) or by work of its own, and a profile is made of it.

A run can be broken off and goes on where it stopped: after a step the work's sums are kept in one file, which is
replaced in one move. Finished runs leave a profile and nothing else. Nothing in a profile depends on time or place, so
that the same text, seed and software on the same machine give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import fivefold
from fivefold.calibrate.learner import Progress, Subject, Work
from fivefold.calibrate.profile import Profile, config_hash, read_profile, save_profile, signature
from fivefold.calibrate.reading import Reading, default_texts
from fivefold.errors import FivefoldError, ProfileError, RecipeError
from fivefold.methods import Method, registered
from fivefold.recipe import Recipe

TOKENS = 65_536
_PARTIAL = "calibration.partial.safetensors"
# Keeping the sums takes at most this part of a run's time.
_SHARE = 0.1


class Stopped(FivefoldError):
    """The run was asked to stop; what it had learned is kept."""


def learning(recipe: Recipe) -> Method:
    """The method of a recipe that learns from the model. Raises `RecipeError` unless there is exactly one."""
    able = [method for method in recipe.methods if method.learns()]
    if len(able) == 1:
        return able[0]
    if able:
        raise RecipeError(f"{' and '.join(m.name for m in able)} both learn from the model: calibrate one at a time.")
    names = [name for name, cls in registered().items() if cls.learns()]
    hint = f"use one with {' or '.join(names)}" if names else "no method that is installed does"
    raise RecipeError(f"nothing in the recipe {str(recipe)!r} learns from the model: {hint}.")


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
    `stop` is asked between two steps.

    Raises `RecipeError`, `InputError`, `UnsupportedModelError`, `NonFiniteError`, `ProfileError` (the folder holds
    something else, or cannot be written), and `Stopped`.
    """
    from fivefold.models.huggingface import make_cache  # late, since it imports transformers

    parsed = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    method = learning(parsed)
    specs = [store.spec for store in make_cache(model, Recipe()).session.stores.values()]
    subject = Subject(model, tokenizer, specs, default_texts() if texts is None else texts, tokens, seed)
    work = method.work(subject) or Reading(method.learner(specs), method.captures, subject)
    try:
        return _run(work, method, subject, out, progress, stop)
    finally:
        work.close()


def _run(
    work: Work, method: Method, subject: Subject, out: Path, progress: Progress, stop: Callable[[], bool]
) -> Profile:
    made = {
        "recipe": str(method),
        "fivefold": fivefold.__version__,
        "text_sha256": hashlib.sha256("\0".join(subject.texts).encode()).hexdigest(),
        "tokens": work.tokens,
        "seed": subject.seed,
    }
    name, key = signature(subject.model.config), config_hash(subject.model.config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfileError(
            f"cannot write the profile to {out} ({error.strerror or error}): give a folder that can be written."
        ) from None
    found = _finished(out)
    if found is not None:
        if (found.method, found.model, found.config, found.made) == (method.name, name, key, made):
            return found
        raise ProfileError(f"{out} holds another profile (of {found.method} for {found.model}): give another folder.")
    run = json.dumps({"method": method.name, "model": name, "config": key, **made}, sort_keys=True)
    partial = out / _PARTIAL
    done = _resume(partial, run, work)
    cost, saved = 0.0, time.perf_counter()
    while done < work.total:
        if stop():
            _keep(partial, run, done, work)
            raise Stopped(f"stopped after {done} of {work.total} steps; what was learned is kept in {out}.")
        progress(done, work.total, work.what)
        work.step(done)
        done += 1
        begin = time.perf_counter()
        if begin - saved >= cost / _SHARE or done == work.total:
            _keep(partial, run, done, work)
            saved = time.perf_counter()
            cost = saved - begin
    settings, tensors = work.finish(progress)
    profile = Profile(method.name, name, settings, tensors, key, made)
    save_profile(out, profile)
    partial.unlink(missing_ok=True)
    return profile


def _finished(out: Path) -> Profile | None:
    """The profile in a folder, None if there is none."""
    return read_profile(out, str(out)) if (out / "profile.json").is_file() else None


def _resume(partial: Path, run: str, work: Work) -> int:
    """How many steps are done already; the work is given what it had learned from them."""
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
    work.sums = sums
    return done


def _differs(kept: str, run: str) -> str:
    """The first thing in which two runs differ, in words."""
    try:
        one, two = json.loads(kept), json.loads(run)
        return next(f"{name}={one.get(name)!r}, not {two[name]!r}" for name in two if one.get(name) != two[name])
    except (ValueError, AttributeError, StopIteration):
        return "of another version"


def _keep(partial: Path, run: str, done: int, work: Work) -> None:
    temporary = partial.with_name(f".{partial.name}.{os.getpid()}")
    try:
        sums = {name: tensor.contiguous() for name, tensor in work.sums.items()}
        save_file(sums, temporary, metadata={"run": run, "done": str(done)})
        temporary.replace(partial)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ProfileError(f"cannot keep what was learned in {partial.parent}: {reason}.") from None
    finally:
        temporary.unlink(missing_ok=True)
