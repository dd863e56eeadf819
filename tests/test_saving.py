"""Caches at rest: what is offloaded or saved comes back as it was, to the bit, or is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conversations import text
from fivefold.errors import CacheFullError, CacheStateError, FivefoldError, SavedCacheError
from fivefold.models.cache import FivefoldCache
from learned import learn
from recipes import RECIPES, SHAPE, written

pytestmark = [pytest.mark.usefixtures("one_thread")]

STEPS = text(120, 2, seed=5)


@torch.inference_mode()
def talked(model: Any, recipe: str, tokens: int = 200, steps: int = 45, **settings: Any) -> FivefoldCache:
    """A cache of two sequences that have been read and written."""
    cache = fivefold.compress(model, recipe, **settings)
    model(text(tokens, 2), past_key_values=cache)
    go_on(model, [cache], 0, steps)
    return cache


@torch.inference_mode()
def go_on(model: Any, caches: list[FivefoldCache], first: int, last: int) -> None:
    """Steps that must be the same for all caches, bit for bit."""
    for at in range(first, last):
        found = [model(STEPS[:, at : at + 1], past_key_values=cache).logits for cache in caches]
        assert all(torch.equal(logits, found[0]) for logits in found), f"step {at}"


def used(cache: FivefoldCache) -> int:
    """Bytes that a report has, free pages and those of other forks left out."""
    report = cache.report()
    return report.total - report.free - report.forks


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("name", RECIPES)
def test_what_comes_back_is_what_there_was(tiny: Any, tmp_path: Path, name: str) -> None:
    model = tiny(**SHAPE)
    cache = talked(model, written(name, model))
    other, report = cache.fork(), cache.report()
    cache.save(tmp_path)
    loaded = fivefold.load_cache(model, tmp_path)
    cache.offload()
    assert cache.offloaded and cache.batch == 2 and cache.get_seq_length() == 245
    cache.restore()
    kept = ("exact", "codes", "scales", "other", "slack", "kept_tokens", "bits", "tokens")
    for one in (loaded, cache):
        assert [getattr(one.report(), part) for part in kept] == [getattr(report, part) for part in kept]
    go_on(model, [other, cache, loaded], 45, 80)
    for one in (cache, other, loaded):
        one.free()
    assert cache.session.pools.budget.used == loaded.session.pools.budget.used == 0


@pytest.mark.parametrize("name", ["full", "kivi-residual", "snapkv"])
def test_layers_with_a_sliding_window_come_back_too(tiny: Any, tmp_path: Path, name: str) -> None:
    model = tiny("gemma3_text", sliding_window=64)
    cache = talked(model, RECIPES[name])
    other = cache.fork()
    cache.save(tmp_path)
    cache.offload()
    assert cache.report().sliding < 100
    cache.restore()
    go_on(model, [other, cache, fivefold.load_cache(model, tmp_path)], 45, 60)


@pytest.mark.parametrize("name", ["full", "kivi2", "h2o+kivi", "gear", "rotatekv"])
def test_the_files_are_as_large_as_the_report_says(tiny: Any, tmp_path: Path, name: str) -> None:
    model = tiny(**SHAPE)
    cache = talked(model, written(name, model), tokens=3000)
    cache.save(tmp_path)
    assert size(tmp_path) <= 1.02 * used(cache)
    assert size(tmp_path) >= 0.95 * (used(cache) - cache.report().learned)


def test_what_beams_share_is_saved_once(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    cache = fivefold.compress(model, "kivi(bits=2)")
    with torch.inference_mode():
        model(text(2000), past_key_values=cache)
    cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(8)
    cache.save(tmp_path / "eight")
    assert size(tmp_path / "eight") < 1.1 * size(tmp_path / "one")
    loaded = fivefold.load_cache(model, tmp_path / "eight")
    assert used(loaded) < 1.2 * used(cache)
    with torch.inference_mode():
        for _ in range(3):
            logits = [model(text(1, 8), past_key_values=one).logits for one in (cache, loaded)]
            assert torch.equal(*logits)


def test_a_joined_cache_comes_back(tiny: Any, tmp_path: Path) -> None:
    """Sequences of different lengths, each with its own positions."""
    model = tiny(**SHAPE)
    cache = fivefold.compress(model, RECIPES["kivi-residual"])
    with torch.inference_mode():
        for tokens in (90, 40):
            new = cache.new()
            model(text(tokens), past_key_values=new)
            cache.join(new)
    cache.save(tmp_path)
    go_on(model, [cache, fivefold.load_cache(model, tmp_path)], 0, 30)


def test_an_offloaded_cache_holds_no_pages_and_takes_none(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    cache = talked(model, "kivi()")
    before, pools = used(cache), cache.session.pools
    other = cache.fork()
    other.free()
    cache.offload()
    cache.offload()
    assert pools.budget.used == 0 and abs(cache.report().host - before) < 0.05 * before
    empty = cache.new()
    for call in (
        lambda: model(STEPS[:, :1], past_key_values=cache),
        lambda: cache.crop(-1),
        lambda: cache.take([0]),
        lambda: empty.join(cache),
        lambda: cache.join(empty),
        lambda: cache.reorder_cache(torch.tensor([1, 0])),
    ):
        with pytest.raises(CacheStateError, match=r"call restore\(\) first"), torch.inference_mode():
            call()
    fork = cache.fork()
    cache.save(tmp_path)
    for one in (cache, fork):
        one.restore()
    go_on(model, [cache, fork, fivefold.load_cache(model, tmp_path)], 45, 60)


def test_it_comes_back_only_where_there_is_room(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    cache = talked(model, "full()", max_bytes=2_000_000)
    cache.save(tmp_path)
    with pytest.raises(CacheFullError):
        fivefold.load_cache(model, tmp_path, max_bytes=100_000)
    cache.offload()
    hog = cache.new()
    with torch.inference_mode():
        model(text(800), past_key_values=hog)
    with pytest.raises(CacheFullError):
        cache.restore()
    assert cache.offloaded and cache.batch == 2
    hog.free()
    cache.restore()
    go_on(model, [cache, fivefold.load_cache(model, tmp_path)], 45, 50)


# -- what is refused --------------------------------------------------------------------------------------


def _tensors(folder: Path) -> Path:
    (path,) = folder.glob("tensors-*.safetensors")
    return path


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "cache.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "there is no saved cache"),
    "no tensors": (lambda folder: _tensors(folder).unlink(), "cut short"),
    "cut short": (lambda folder: os.truncate(_tensors(folder), 1000), "cut short"),
    "a bit in the header": (lambda folder: _flip(_tensors(folder), 20), "does not match its hash"),
    "a bit in a page": (lambda folder: _flip(_tensors(folder), -100), "does not match its hash"),
    "no JSON": (lambda folder: (folder / "cache.json").write_text("{"), "cannot be read"),
    "other JSON": (lambda folder: (folder / "cache.json").write_text("[1]"), "cannot be read"),
    "binary JSON": (lambda folder: (folder / "cache.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "an edit": (lambda folder: _edit(folder, recipe="kivi(bits=8)"), "does not match its hash"),
    "newer": (lambda folder: _edit(folder, format=99), "newer Fivefold"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_refused(tiny: Any, tmp_path: Path, damage: str) -> None:
    model = tiny(**SHAPE)
    talked(model, "kivi()", steps=1).save(tmp_path)
    spoil, match = DAMAGE[damage]
    spoil(tmp_path)
    with pytest.raises(SavedCacheError, match=match) as caught:
        fivefold.load_cache(model, tmp_path)
    assert str(caught.value).count("\n") == 0


def test_what_belongs_to_another_model_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    talked(model, "kivi()", steps=1).save(tmp_path)
    for other, match in {
        tiny(**SHAPE, seed=1): "other weights",
        tiny(**SHAPE, num_attention_heads=2): "and this one is",
        tiny(**SHAPE, intermediate_size=128): "another configuration",
        tiny(**SHAPE, dtype=torch.bfloat16): "other weights|dtype",
    }.items():
        with pytest.raises(SavedCacheError, match=match):
            fivefold.load_cache(other, tmp_path)


def test_another_profile_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    folder = tmp_path / "profile"
    learn(model, "rotatekv(bits=4)", folder, chunks=2)
    talked(model, f'rotatekv(bits=4, profile="{folder}")', steps=1).save(tmp_path / "saved")
    learn(model, "rotatekv(bits=4)", folder, chunks=3)
    with pytest.raises(SavedCacheError, match="same recipe, profile"):
        fivefold.load_cache(model, tmp_path / "saved")


def test_what_cannot_be_saved(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    with pytest.raises(CacheStateError, match="nothing to save"):
        fivefold.compress(model, "full()").save(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SavedCacheError, match="cannot save"):
        talked(model, "full()", steps=1).save(tmp_path / "file")


# -- whatever happens while it is saved -------------------------------------------------------------------

_CALLS = ("replace", "unlink", "write_text", "mkdir", "stat")


def _die_at(call: int) -> int:
    """From now on, this process ends at a call of the file system; how many calls there were until it did."""
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                os._exit(9)
            return real(*args, **kwargs)

        return wrapper

    for name in _CALLS:
        setattr(Path, name, dying(getattr(Path, name)))
    os.fsync = dying(os.fsync)
    return count


@pytest.mark.parametrize("call", range(1, 16))
def test_a_process_that_is_killed_leaves_the_old_one_readable(tiny: Any, tmp_path: Path, call: int) -> None:
    model = tiny(**SHAPE)
    old = talked(model, "kivi()", steps=10)
    old.save(tmp_path)
    new = old.fork()
    go_on(model, [new], 10, 20)
    child = os.fork()
    if child == 0:
        _die_at(call)
        try:
            new.save(tmp_path)
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    loaded = fivefold.load_cache(model, tmp_path)
    if code == 0:
        assert call > 8, "it never died"
    go_on(model, [loaded, old if loaded.get_seq_length() == 210 else new], 20, 25)
    new.save(tmp_path)
    go_on(model, [fivefold.load_cache(model, tmp_path)], 20, 21)
    assert len(list(tmp_path.glob("tensors-*"))) == 1


def test_errors_of_the_disk_are_one_sentence(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(**SHAPE)
    cache = talked(model, "kivi()", steps=10)
    cache.save(tmp_path)
    go_on(model, [cache], 10, 12)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FivefoldError, match="No space left on device"):
        cache.save(tmp_path)
    monkeypatch.undo()
    assert fivefold.load_cache(model, tmp_path).get_seq_length() == 210
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_cache_reads_a_folder_of_its_own_kind_only(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    cache = talked(model, "kivi()", steps=3)
    cache.save(tmp_path)
    with pytest.raises(CacheStateError, match="use a new one"):
        cache.load(tmp_path)
    with pytest.raises(SavedCacheError, match="this cache has full"):
        fivefold.compress(model, "full()").load(tmp_path)
    new = cache.new()
    new.load(tmp_path)
    go_on(model, [cache, new], 3, 10)
    cache.join(new)
    assert cache.batch == 4
