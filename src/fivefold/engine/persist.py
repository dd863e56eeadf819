"""Sequences at rest: all that a session holds, as tensors in host memory and as files, and back again.

Pages are copied as they are, each once however many rows share it, so that what comes back is the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fivefold.engine.session import Session
from fivefold.errors import CacheStateError, InputError, SavedCacheError, first_line
from fivefold.interrupts import uninterrupted
from fivefold.store.bank import ROWS, Bank
from fivefold.store.held import Held
from fivefold.store.layer_cache import LayerCache
from fivefold.store.pages import PagePool
from fivefold.store.rows import upgraded
from fivefold.store.spec import DTYPES
from fivefold.store.standing import Standing
from fivefold.store.tier import EMPTY, Tier
from fivefold.store.transaction import Transaction

FORMAT = 1
_ASKED = ("query_heads", "cap")
"""What attention has said about a layer that its pages do not show."""
_DTYPES = {str(dtype): dtype for dtype in DTYPES}
FILE, _TENSORS = "cache.json", "tensors-"
# Bytes that are copied at a time, which bounds what a device needs for it.
_PIECE = 1 << 26
_HELD = ("places", "positions", "scores")
_COUNTS = ("prompt", "seen", "share", "final")


@dataclass(frozen=True)
class State:
    """What a session holds. facts: plain values, as JSON can hold them; tensors: in host memory."""

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def batch(self) -> int:
        return len(self.facts["lengths"])

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors.values())


@uninterrupted
def offload(session: Session) -> None:
    """Bring all that a session holds to host memory, and give its pages back. Nothing if that has been done."""
    if session.state is None and session.batch:
        state = collect(session)
        session.release(state)
        session.length = state.facts["length"]
        if session.companions is not None:
            session.companions.reset()


@uninterrupted
def restore(session: Session) -> None:
    """Undo `offload`. Raises `CacheFullError` where the pages do not fit now; the cache is still offloaded then."""
    state = session.state
    if state is None:
        return
    session.state, session.length = None, 0
    try:
        install(session, state)
    except BaseException:
        session.state, session.length = state, state.facts["length"]
        raise


def collect(session: Session) -> State:
    """All that a session holds, in host memory."""
    if session.state is not None:
        return session.state
    if session.recording:
        raise CacheStateError("a cache cannot be put away while tokens may be taken back: end assisted decoding first.")
    session.tidy()
    tensors: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {
        "length": session.length, "ragged": session.ragged, "lengths": session.lengths().tolist(), "held": {},
        "layers": {str(index): kind(store) for index, store in session.stores.items()}, "beside": {},
        "asked": {str(i): {name: getattr(s.spec, name) for name in _ASKED} for i, s in session.stores.items()},
    }  # fmt: skip
    for bank in session.banks:
        _collect_rows(bank, f"rows.{bank.layers[0].spec.layer}", tensors)
    for index, store in session.stores.items():
        facts["held"][str(index)] = counts = []
        for number, held in enumerate(store.held):
            counts.append({name: getattr(held, name) for name in _COUNTS})
            known = {name: getattr(held, name) for name in _HELD} | {f"extra.{k}": x for k, x in held.extra.items()}
            tensors.update({f"held.{index}.{number}.{name}": _host(x) for name, x in known.items()})
        tensors.update({f"learned.{index}.{name}": _host(x) for name, x in store.learned.items()})
    if session.companions is not None:
        facts["beside"], beside = session.companions.state()
        tensors.update({f"beside.{name}": _host(x) for name, x in beside.items()})
    for device in session.devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return State(facts, tensors)


@uninterrupted
def install(session: Session, state: State) -> None:
    """Let an empty session hold this. Raises `CacheFullError` and `SavedCacheError`, and is empty then."""
    if session.batch:
        raise CacheStateError("a cache that holds sequences cannot be overwritten: use a new one.")
    facts, tensors = state.facts, state.tensors
    with session.atomic():
        change = session.change
        assert change is not None
        for index, known in facts["layers"].items():
            if int(index) in session.stores and (dtype := _DTYPES.get(known["dtype"])):  # what a first chunk says
                delivered = {"kv_heads": known["kv_heads"], "head_dim": known["head_dim"], "dtype": dtype}
                session.respec(int(index), {**facts.get("asked", {}).get(index, {}), **delivered})
        found = {str(index): kind(store) for index, store in session.stores.items()}
        if found != facts["layers"]:
            index = next(i for i in {**found, **facts["layers"]} if found.get(i) != facts["layers"].get(i))
            raise SavedCacheError(
                f"layer {index} has the pages {found.get(index)} here, and what was saved has "
                f"{facts['layers'].get(index)}: use the same recipe, profile and dtype."
            )
        if not session.united:
            session.unite(change)
        for bank in session.banks:
            _install_rows(bank, f"rows.{bank.layers[0].spec.layer}", tensors, len(facts["lengths"]), change)
        for index, store in session.stores.items():
            device = store.spec.device
            store.held = [
                _held(store, {k: x for k, x in tensors.items() if k.startswith(f"held.{index}.{number}.")}, counts)
                for number, counts in enumerate(facts["held"][str(index)])
            ]
            mark = f"learned.{index}."
            store.learned = {k[len(mark) :]: x.to(device) for k, x in tensors.items() if k.startswith(mark)}
            store.regroup()
        if session.companions is not None:
            mark = "beside."
            beside = {k[len(mark) :]: x for k, x in tensors.items() if k.startswith(mark)}
            session.companions.install(facts["beside"], beside, session.devices[0])
        session.length, session.ragged = facts["length"], facts["ragged"]


def kind(store: LayerCache) -> dict[str, Any]:
    """What a layer's pages look like, and what they were made with: equal where they can be read."""
    spec, codec = store.spec, store.codec
    extents = [
        [e.sink, e.recent, e.late_sink, e.late_recent, *(() if e.share is None else (e.share, e.compensate))]
        for e in store.extents
    ]
    return {
        "kv_heads": spec.kv_heads, "head_dim": spec.head_dim, "dtype": str(spec.dtype), "residual": store.residual,
        "exact": _layout(store.exact_pool), "packed": [_layout(pool) for pool in store.packed_pools],
        "extents": extents, "codec": "" if codec is None else f"{type(codec).__name__} {codec.fingerprint}".strip(),
        "policy": "" if store.policy is None else str(store.policy),
    }  # fmt: skip


def _layout(pool: PagePool) -> str:
    parts = [f"{part.name} {list(part.shape)} {part.dtype}" for part in pool.layout.fields]
    return f"{pool.layout.tokens} tokens of {', '.join(parts)}".replace("torch.", "")


def _host(x: torch.Tensor) -> torch.Tensor:
    # A copy of its own in any case: a view would keep more alive, and what it shows may change.
    return x.detach().to("cpu", copy=True).contiguous()


def _collect_rows(bank: Bank, name: str, out: dict[str, torch.Tensor]) -> None:
    out[f"{name}.data"] = torch.from_numpy(np.stack(bank.bounds))
    for array in ROWS:
        out[f"{name}.{array}"] = torch.from_numpy(getattr(bank, array).copy())
    for which, (tier, columns) in enumerate(bank.columns()):
        there = np.arange(int(columns.max(initial=0))) < columns[:, None]
        for i, (pool, table) in enumerate(zip(tier.pools, tier.tables)):
            pages, place = np.unique(table[:, : there.shape[1]][there], return_inverse=True)
            numbers = np.full(there.shape, EMPTY, dtype=np.int32)
            numbers[there] = place.reshape(-1)
            out[f"{name}.{which}.{i}.table"] = torch.from_numpy(numbers)
            for part in pool.layout.fields:
                pinned = pool.device.type == "cuda"
                whole = torch.empty((len(pages), *part.shape), dtype=part.dtype, pin_memory=pinned)
                step = max(1, _PIECE // part.nbytes)
                for first in range(0, len(pages), step):
                    piece = slice(first, first + step)
                    whole[piece].copy_(pool.read(part.name, pages[piece]), non_blocking=True)
                out[f"{name}.{which}.{i}.{part.name}"] = whole


def _install_rows(bank: Bank, name: str, tensors: dict[str, torch.Tensor], batch: int, change: Transaction) -> None:
    fields = upgraded(tensors[f"{name}.data"].numpy().copy())
    bank.standing = Standing(len(bank.layers), fields.shape[1], list(fields))
    bank.peak = np.zeros(fields.shape[1], dtype=np.float32)  # files of older versions do not know it
    for array in ROWS:
        if f"{name}.{array}" in tensors:
            setattr(bank, array, tensors[f"{name}.{array}"].numpy().copy())
    bank.batch, tiers = batch, []
    for which, old in enumerate((bank.exact, bank.packed)):
        if old is None:
            continue
        tier = Tier(old.pools, 0)
        for i, pool in enumerate(tier.pools):
            numbers = tensors[f"{name}.{which}.{i}.table"].numpy()
            there = numbers != EMPTY
            count = int(numbers.max(initial=EMPTY)) + 1
            pages = change.allocate(pool, count)
            tier.tables[i] = np.full(numbers.shape, EMPTY, dtype=np.int64)
            tier.tables[i][there] = pages[numbers[there]]
            # A page that several rows name has as many owners.
            more = np.repeat(pages, np.bincount(numbers[there], minlength=count) - 1)
            pool.retain(more)
            change.undo(partial(pool.release, more))
            tier.shared = tier.shared or len(more) > 0
            for part in pool.layout.fields:
                whole, step = tensors[f"{name}.{which}.{i}.{part.name}"], max(1, _PIECE // part.nbytes)
                for first in range(0, count, step):
                    piece = slice(first, first + step)
                    pool.write(part.name, pages[piece], whole[piece].to(pool.device, non_blocking=True))
        tiers.append(tier)
    bank.exact, bank.packed = tiers[0], tiers[1] if len(tiers) > 1 else None
    bank.mirror, bank.due = None, None


def _held(store: LayerCache, tensors: dict[str, torch.Tensor], counts: dict[str, Any]) -> Held:
    known = {key.split(".", 3)[3]: x.to(store.spec.device) for key, x in tensors.items()}
    extra = {key.removeprefix("extra."): x for key, x in known.items() if key.startswith("extra.")}
    places, positions, scores = (known[name] for name in _HELD)
    return Held(store.spec.layer, store.spec.kv_heads, places, positions, scores, extra, **counts)


# -- files ------------------------------------------------------------------------------------------------


def write(folder: Path, state: State, about: dict[str, Any]) -> None:
    """Write a state to a folder, `about` beside it. What the folder held is there until the new one is complete, and
    after that gone. Raises `SavedCacheError`."""
    try:
        json.dumps(about)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the note of a cache cannot be saved as JSON ({first_line(error)}): give plain values."
        ) from None
    temporary = folder / f".{_TENSORS}{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(state.tensors, temporary)
            digest = _digest(temporary)
            name = f"{_TENSORS}{digest[:16]}.safetensors"
            text = {
                "format": FORMAT, **about, "facts": state.facts, "tensors": name, "sha256": digest,
                "bytes": temporary.stat().st_size,
            }  # fmt: skip
            _sync(temporary)
            temporary.replace(folder / name)
            temporary.write_text(json.dumps({**text, "check": _check(text)}) + "\n", encoding="utf-8")
            _sync(temporary)
            temporary.replace(folder / FILE)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(folder)
        for old in folder.glob(f"{_TENSORS}*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise SavedCacheError(
            f"cannot save the cache to {folder} ({why}): give a folder that can be written."
        ) from None


def describe(folder: Path) -> dict[str, Any]:
    """What a saved cache says about itself. Raises `SavedCacheError` if there is none, or it is damaged or newer."""
    path = folder / FILE
    if not path.is_file():
        raise SavedCacheError(f"there is no saved cache in {folder}: give a folder that cache.save() has written.")
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        if text["format"] > FORMAT:
            raise SavedCacheError(
                f"the cache in {folder} was saved by a newer Fivefold (format {text['format']}): update Fivefold."
            )
        if text["check"] != _check(text):
            raise SavedCacheError(
                f"the cache in {folder} is damaged: {FILE} does not match its hash; read the text anew."
            )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SavedCacheError(
            f"the cache in {folder} is damaged: {FILE} cannot be read ({type(error).__name__}); read the text anew."
        ) from None
    return dict(text)


def read(folder: Path, text: dict[str, Any]) -> State:
    """The state in a folder, of which `describe` has said this. Raises `SavedCacheError` if it is damaged."""
    path = folder / text["tensors"]
    try:
        if not path.is_file() or path.stat().st_size != text["bytes"]:
            raise SavedCacheError(f"the cache in {folder} is damaged: {path.name} is cut short; read the text anew.")
        if _digest(path) != text["sha256"]:
            raise SavedCacheError(
                f"the cache in {folder} is damaged: {path.name} does not match its hash; read the text anew."
            )
        return State(text["facts"], load_file(path))
    except (OSError, SafetensorError) as error:
        raise SavedCacheError(f"the cache in {folder} cannot be read: {first_line(error)}.") from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(text: dict[str, Any]) -> str:
    """SHA-256 of a description without its own hash."""
    rest = {name: value for name, value in text.items() if name != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Make sure that a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
