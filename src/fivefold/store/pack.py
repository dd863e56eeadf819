"""The one packer: tokens of exact pages, and of a chunk that has just come, into pages of a codec.

Rows of all layers that are due are packed together, whatever their lengths: by a kernel that finds the pages by their
addresses where there is one, else by the codec, those together whose groups stand at the same place of a page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.device import sent
from fivefold.kernels.pack import cpu
from fivefold.store.chunk import Part, each
from fivefold.store.codec import Codec, beyond, whole
from fivefold.store.group import KV, RowGroup, Stacked
from fivefold.store.held import Held
from fivefold.store.interfaces import Tables
from fivefold.store.rows import PAGE, Bounds, Packing

Chunk = tuple[torch.Tensor, torch.Tensor]
# Numbers that are packed at a time, which bounds the memory it takes.
_NUMBERS = {"cpu": 1 << 21}
_NUMBERS_GPU = 1 << 25
LARGEST = torch.finfo(torch.float16).max


@dataclass
class Due:
    """Rows that have `count` tokens each to be packed, from position `start [rows]` on.

    column, slot: where in the packed tier the first of them goes; stored: how many of them lie in exact pages, the
    others being the first ones of the chunk.
    """

    rows: np.ndarray
    bounds: Bounds
    start: np.ndarray
    column: np.ndarray
    slot: int
    count: int
    stored: int

    def part(self, which: np.ndarray, keys: np.ndarray) -> Due:
        """Some of the rows, whose slot, count and stored (`keys`) are the same."""
        slot, count, stored = (int(x) for x in keys[:3, which[0]])
        return replace(self.some(which), slot=slot, count=count, stored=stored)

    def some(self, which: np.ndarray) -> Due:
        """Some of the rows."""
        part = self.bounds.at(which), self.start[which], self.column[which]
        return Due(self.rows[which], *part, self.slot, self.count, self.stored)


class Way(NamedTuple):
    """What brings the packed tier of rows from bounds to bounds, arrays `[rows]`: pages that are given up at the front,
    columns that there were, columns to be added behind them, and the tokens to be packed: how many from which position
    on, and the column and slot of the first, as it is before anything is given up."""

    gone: Any
    columns: Any
    fresh: Any
    start: Any
    count: Any
    column: Any
    slot: Any

    @classmethod
    def between(cls, old: Bounds, new: Bounds, packing: Packing) -> Way:
        gone, columns = old.packed_gone(new, packing), old.packed_pages(packing)
        start = np.where(gone < columns, old.packed_stop, new.packed_base)
        count = np.maximum(0, new.packed_stop - start)
        fresh = new.packed_pages(packing) - (columns - gone)
        column, slot = new.packed_place(start, packing)
        return cls(gone, columns, fresh, start, count, gone + column, slot)


@lru_cache(maxsize=16)
def _way(old: Bounds, new: Bounds, packing: Packing, rows: int) -> Way:
    """`Way.between` of rows that all have these bounds; not to be written to."""
    out = np.array(Way.between(old.repeated(1), new.repeated(1), packing)).repeat(rows, 1)
    out.flags.writeable = False
    return Way(*out)


def pack(
    bank: Tables,
    rows: np.ndarray,
    old: Bounds,
    new: Bounds,
    parts: Sequence[Part] = (),
) -> None:
    """Bring the packed tier of rows from bounds `old` to `new`: encode the groups that are due, and give up the pages
    that slid out of a window.

    parts: the tokens behind `old.length`, all rows then standing alike.
    """
    tier, packing, change = bank.packed, bank.packing, bank.change
    assert tier is not None and packing is not None and change is not None
    chunks = [part.pair for part in parts if part.pair is not None]
    alike = len(chunks) > 0  # as in every layer of a chunk
    way = _way(*(Bounds(*(int(x[0]) for x in one)) for one in (old, new)), packing, len(rows)) if alike else None
    gone, columns, fresh, start, count, column, slot = way or Way.between(old, new, packing)
    for wanted in distinct(fresh):
        if wanted > 0:
            some = fresh == wanted
            tier.widen(change, rows[some], columns[some], wanted)
    stored = np.clip(old.length - start, 0, count)
    some = count > 0
    if some.any():
        keys, due = np.stack([slot, count, stored]), Due(rows, old, start, column, 0, 0, 0)
        if not some.all():
            keys, due = keys[:, some], due.some(some)
        if not _by_kernel(bank, due, keys, chunks):
            for which, part in each(parts):
                _encode(bank, due.part(which, keys), part.group, part.pair, part.held)
            for which in () if parts else _alike(bank, due, keys):
                for some, group in _groups(bank, due.part(which, keys)):
                    _encode(bank, some, group)
    tier.drop(change, rows, 0, gone, columns + np.maximum(0, fresh))


def distinct(numbers: np.ndarray) -> list[int]:
    """The different ones, in order."""
    if not len(numbers):
        return []
    first = int(numbers[0])
    return [first] if (numbers == first).all() else np.unique(numbers).tolist()


def _alike(bank: Tables, due: Due, keys: np.ndarray) -> list[np.ndarray]:
    """Rows that one call of a codec can encode, but for what it must know of each layer."""
    layers, codec = due.rows // bank.rows, bank.layers[0].codec
    assert codec is not None
    codecs = np.array([layer.encoder for layer in bank.layers])[layers]
    return _same(np.stack([codecs, *keys, *(due.bounds if codec.contextual else ())]))


def _groups(bank: Tables, due: Due) -> Iterator[tuple[Due, RowGroup]]:
    """Rows that are alike, split into those that one call encodes: where a codec must know whose they are, the same
    rows of layers whose codecs can be stacked, as many as `_NUMBERS` allows."""
    first, bounds = bank.layers[int(due.rows[0]) // bank.rows], Bounds(*(x[0] for x in due.bounds))
    assert first.codec is not None
    if not first.codec.contextual:
        yield due, RowGroup(first, due.rows - first.base, bounds)
        return
    layers, local = np.divmod(due.rows, bank.rows)
    kinds: dict[Any, list[np.ndarray]] = {}
    for index in np.unique(layers).tolist():
        codec, where = bank.layers[index].codec, np.flatnonzero(layers == index)
        alone = codec is None or codec.likeness is None
        kinds.setdefault((index if alone else codec.likeness, local[where].tobytes()), []).append(where)
    for some in kinds.values():
        step = layers_at_once(bank, due.count * len(some[0]))
        for start in range(0, len(some), step):
            each_of, which = some[start : start + step], np.concatenate(some[start : start + step])
            of = [bank.layers[int(layers[where[0]])] for where in each_of]
            rows = local[each_of[0]]
            yield due.some(which), RowGroup(of[0], rows, bounds) if len(of) == 1 else Stacked(of, rows, bounds)


def _by_kernel(bank: Tables, due: Due, keys: np.ndarray, chunks: Sequence[Chunk]) -> bool:
    """A launch for all pages that get as many tokens, from where these lie, in exact pages and the chunk, which is in
    pieces, some rows each; False where it does not run: codecs and numbers that it does not take. keys: slot, count and
    stored of each row, as in `Due`."""
    assert bank.packed is not None and bank.packing is not None and bank.change is not None
    first, (slot, count, stored) = bank.layers[0], keys
    assert first.codec is not None
    form, choice = first.codec.form, choose(bank.device)
    if form is None or len(bank.packed.pools) > 1 or bank.exact.pool.layout.holds or bank.device.type == "meta":
        return False
    chunks = [(k.contiguous(), v.contiguous()) for k, v in chunks]
    pieces = [x for chunk in chunks for x in chunk]
    if any(x.dtype != first.spec.dtype or x.device != bank.device or x.data_ptr() % 16 for x in pieces):
        return False  # addresses are in units of 16 bytes
    if choice.path == "cpp" and cpu.supports(form, first.spec.dtype):
        pack_exact = cpu.pack_exact
    elif choice.triton and form.head_dim in (64, 128, 256):
        from fivefold.kernels.pack import triton

        pack_exact = triton.pack_exact
    else:
        return False
    opened = slot > 0
    bank.packed.unshare(bank.change, due.rows[opened], due.column[opened])
    if chunks:
        _complete(bank, due, int(stored[0]), int(count[0]), chunks)
    work, stands = _work(bank, due, keys, chunks)
    whose = np.concatenate([rows for some in work.values() for _, _, rows in some])
    came = len(chunks) > 0  # `look` waits until the change is committed, and must not hold the chunk until then

    def look(found: list[float]) -> None:
        largest = max(found)
        if largest <= LARGEST:
            _remember(bank, whose, found)
            return
        for rows, pages in () if came else stands:  # the codec says what is wrong
            for layer in np.unique(rows // bank.rows).tolist():
                codec, mine = bank.layers[layer].codec, pages[rows // bank.rows == layer]
                assert codec is not None
                codec.check(*(bank.exact.pool.read(name, mine.reshape(-1)) for name in KV))
        raise beyond("keys or values", largest)

    with nullcontext() if came else _aside(bank, due, count):
        pairs = (np.concatenate(x) for some in work.values() for x in list(zip(*some))[:2])
        tensors = sent(bank.device, *pairs)
        peaks = [pack_exact(form, *pair, first.spec.dtype) for pair in zip(tensors[::2], tensors[1::2])]
        bank.change.check(torch.cat(peaks) if len(peaks) > 1 else peaks[0], look, last=came)
    return True


def _aside(bank: Tables, due: Due, count: np.ndarray) -> AbstractContextManager[None]:
    """Where `count` stored tokens of each row are packed: beside a step that a device is at work on, which reads what
    stands before them in their pages, and that stays as it is; unless it brings one of them, or pages were copied."""
    assert bank.packed is not None and bank.change is not None
    beside = bank.change.beside
    if beside is None or bank.packed.shared or (due.start + count >= due.bounds.length).any():
        return nullcontext()
    return beside.running()


def _complete(bank: Tables, due: Due, stored: int, count: int, chunks: Sequence[Chunk]) -> None:
    """Where a plane of tokens begins in an exact page and ends in the chunk, copy the rest of it into the page, whose
    slots behind the stored tokens are nobody's."""
    slot = stored % PAGE
    if not slot or stored >= count:
        return
    column = due.bounds.exact_column(due.start) + stored // PAGE
    assert bank.change is not None
    bank.exact.unshare(bank.change, due.rows, column)
    pages = bank.exact.table[due.rows, column]
    tokens = {name: [x[:, : PAGE - slot] for x in some] for name, some in zip(KV, zip(*chunks))}
    bank.exact.pool.write_fields(pages, tokens, slice(slot, PAGE))


Job = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Pages that get as many planes of 32 tokens: where keys and values of these lie, int64 `[pages, planes, 2]`, where the
page lies and from which plane on it is filled, `[pages, 2]`, and whose it is, `[pages]`; in units of 16 bytes."""


def _work(
    bank: Tables, due: Due, keys: np.ndarray, chunks: Sequence[Chunk]
) -> tuple[dict[int, list[Job]], list[tuple[np.ndarray, np.ndarray]]]:
    """Pages to be filled, by how many planes each gets; and rows, with their exact pages that are read."""
    assert bank.packed is not None and bank.packing is not None
    (slot, count, stored), page = keys, bank.packing.page // PAGE
    exact, packed, field = bank.exact.pool, bank.packed.pool, bank.packed.pool.layout.fields[0].name
    work, stands = dict[int, list[Job]](), list[tuple[np.ndarray, np.ndarray]]()
    base, at = due.bounds.exact_column(due.start), slot // PAGE
    # Rows whose planes come from and go to pages in the same way.
    kinds = np.stack([count // PAGE, -(-stored // PAGE), np.minimum(count // PAGE, page - at)])
    for some in _same(kinds):
        planes, there, opened = kinds[:, some[0]].tolist()
        rows, sources = due.rows[some], np.empty((len(some), planes, 2), dtype=np.int64)
        pages = bank.exact.table[rows[:, None], base[some][:, None] + np.arange(there)]
        for side, name in enumerate(KV):
            sources[:, :there, side] = exact.addresses(name, pages)
        for side, pieces in enumerate(zip(*chunks) if there < planes else ()):
            _, tokens, dim = pieces[0].shape
            size = dim * pieces[0].element_size()
            begins = np.concatenate([x.data_ptr() + np.arange(len(x)) * (tokens * size) for x in pieces])[some]
            first = int(due.start[some[0]] - due.bounds.length[some[0]])
            sources[:, there:, side] = begins[:, None] + (first + np.arange(there, planes) * PAGE) * size
        sources >>= 4
        stands.append((rows, pages))
        whole = (planes - opened) // page
        begin, column = 0, due.column[some][:, None]
        for many, each_of in ((1, opened), (whole, page), (1, planes - opened - whole * page)):
            if many and each_of:
                mine = sources[:, begin : begin + many * each_of].reshape(-1, each_of, 2)
                places = np.zeros((len(some), many, 2), dtype=np.int64)
                places[..., 0] = (
                    packed.addresses(field, bank.packed.table[rows[:, None], column + np.arange(many)]) >> 4
                )
                if not begin:
                    places[:, 0, 1] = at[some]
                work.setdefault(each_of, []).append((mine, places.reshape(-1, 2), rows.repeat(many)))
                begin, column = begin + many * each_of, column + many
    return work, stands


def _same(keys: np.ndarray) -> list[np.ndarray]:
    """Which columns of `keys` are the same."""
    if (keys == keys[:, :1]).all():
        return [np.arange(keys.shape[1])]
    which = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
    return [np.flatnonzero(which == number) for number in range(int(which.max()) + 1)]


def note(bank: Tables, rows: np.ndarray, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Remember how large the numbers are that are packed for rows: see `Bank.note`."""
    assert bank.change is not None
    largest = torch.maximum(*(x.detach().abs().flatten(1).amax(1) for x in (keys, values)))
    bank.change.check(largest, partial(_remember, bank, rows))


def _remember(bank: Tables, rows: np.ndarray, found: Sequence[float]) -> None:
    """The layers may be in another bank by now."""
    which, peak = rows // bank.rows, np.array(found, dtype=np.float32)
    if bank.layers[int(which[0])].bank is bank:
        bank.note(rows, peak)
        return
    for index in np.unique(which).tolist():
        layer, some = bank.layers[index], which == index
        layer.bank.note(layer.base + rows[some] % bank.rows, peak[some])


def _encode(bank: Tables, due: Due, group: RowGroup, chunk: Chunk | None = None, held: Held | None = None) -> None:
    """By the codec, a bounded part of the tokens at a time; the rest of an open page first. group: of the rows, where
    the codec must know whose they are."""
    assert bank.packed is not None and bank.packing is not None and bank.change is not None
    page = bank.packing.page
    if bank.device.type == "meta":  # there is nothing to write, and nothing to write it to
        group.codec_of(0, 1)  # what it makes for such rows stays
        return
    step = at_once(bank, len(due.rows))
    done = 0
    while done < due.count:
        column, slot = divmod(due.slot + done, page)
        size = min(due.count - done, page - slot if slot else step)
        keys, values = collect(bank, due, done, size, chunk)
        note(bank, due.rows, keys, values)
        whole = size // page * page if not slot else 0
        for first, last in ((0, whole), (whole, size)):
            if first == last:
                continue
            begin = int(due.start[0]) + done
            codec = group.codec_of(begin + first, begin + last, held)
            _write(bank, due, codec, column + first // page, slot, keys[:, first:last], values[:, first:last])
        done += size


def at_once(bank: Tables, rows: int) -> int:
    """How many tokens of so many rows are packed at a time, in whole pages."""
    assert bank.packing is not None
    return layers_at_once(bank, bank.packing.page * rows) * bank.packing.page


def layers_at_once(bank: Tables, tokens: int) -> int:
    """How many layers with so many tokens, of all rows together, are packed at a time."""
    numbers = _NUMBERS.get(bank.device.type, _NUMBERS_GPU)
    return max(1, numbers // (tokens * bank.layers[0].spec.head_dim))


def _write(
    bank: Tables, due: Due, codec: Codec, column: int, slot: int, keys: torch.Tensor, values: torch.Tensor
) -> None:
    """Encode tokens `[rows, tokens, head_dim]` into whole pages, or into one from `slot` on, and write them."""
    tier, packing = bank.packed, bank.packing
    assert tier is not None and packing is not None and bank.change is not None
    rows, tokens, dim = keys.shape
    columns, at = -(-(slot + tokens) // packing.page), due.column + column
    opened = None
    if slot:
        tier.unshare(bank.change, due.rows, at)
        opened = tier.open(bank.change, due.rows, at)
    shape = (rows * columns, -1, dim)
    fields = whole(codec, codec.encode(keys.reshape(shape), values.reshape(shape), slot, opened))
    tier.write(due.rows[:, None], at[:, None] + np.arange(columns), fields)


def collect(bank: Tables, due: Due, done: int, size: int, chunk: Chunk | None) -> Chunk:
    """Keys and values of `size` tokens of each row, the first `done` left out: `[rows, tokens, head_dim]`."""
    parts: list[Chunk] = []
    stored = min(size, due.stored - done)
    if stored > 0:
        # Packed tokens end where a page of the exact tier begins.
        at = due.bounds.exact_column(due.start + done)[:, None] + np.arange(-(-stored // PAGE))
        pages, pool = bank.exact.table[due.rows[:, None], at], bank.exact.pool
        shape = (len(pages), -1, bank.layers[0].spec.head_dim)
        place = pool.locate(pages.reshape(1, -1))
        keys, values = (pool.fetch(name, place)[0].reshape(shape) for name in KV)
        parts.append((keys[:, :stored], values[:, :stored]))
    if stored < size:
        assert chunk is not None
        first = int(due.start[0] + max(done, due.stored) - due.bounds.length[0])
        window = slice(first, first + size - max(0, stored))
        parts.append((chunk[0][:, window], chunk[1][:, window]))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1)
