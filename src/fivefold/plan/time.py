"""How long a prompt, a decoding step and a change of sessions take: what is read over how fast, term by term.

The cost model of Y. Fu, "Challenges in Deploying Long-Context Transformers: A Theoretical Peak Performance Analysis"
(arXiv:2405.08944): a step reads all weights and all caches, a prompt is operations, a change of sessions is bytes over
the host's link. Added to it is what a real step has besides: the small operations, and the gaps between them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from fivefold.blocks import CHUNK_STEP, RECURRING_OPERATIONS, blocks, by_itself, halved
from fivefold.blocks import CUDNN_OPERATIONS as LARGE
from fivefold.blocks import KEY_NUMBERS as BLOCK
from fivefold.plan.machine import Machine
from fivefold.plan.shape import LayerShape, ModelShape

Bound = Literal["bandwidth", "compute", "launches", "link"]

RECENT = 128
"""The newest tokens that stay exact where the others are packed: `kivi`'s default."""
STORED = "what is stored"
"""What the names of those parts of a prompt end with that grow with what has been read before."""
WIDE = 128
"""Channels of the heads that `Machine.packed_row` is of."""
ITEM = {"float32": 4, "float64": 8, "float8_e4m3fn": 1, "int8": 1}
"""Bytes of a number of a dtype; of all others 2."""
NOT_PREDICTED = "not predicted: this recipe has no kernel here"


@dataclass(frozen=True)
class Read:
    """What a step reads of caches. kind: "exact" or "packed". bits: of a stored number, 16 (or 32) or 2, 3, 4, 8.
    nbytes: of all layers and sequences, scales too. launches: how many layers it is a part of. apart: of layers of
    their own, which hold nothing of the other kinds."""

    kind: Literal["exact", "packed"]
    bits: int
    nbytes: int
    launches: int
    apart: bool = False

    @property
    def pages(self) -> str:
        """Its key in `Machine.attention`."""
        return "exact" if self.kind == "exact" else str(self.bits)


@dataclass(frozen=True)
class Term:
    """A part of a time. formula: with the numbers put in. bound: what limits it."""

    name: str
    seconds: float
    formula: str
    bound: Bound


@dataclass(frozen=True)
class Estimate:
    """A time: the sum of its terms, in seconds."""

    terms: tuple[Term, ...]

    @property
    def seconds(self) -> float:
        return _sum(self.terms)

    @property
    def bound(self) -> Bound:
        """What limits most of it."""
        sums: dict[Bound, float] = {}
        for term in self.terms:
            sums[term.bound] = sums.get(term.bound, 0.0) + term.seconds
        return max(sums, key=sums.__getitem__) if sums else "launches"

    def explain(self) -> str:
        """One line a term."""
        lines = [f"{term.name}: {term.formula} = {_seconds(term.seconds)} ({term.bound})" for term in self.terms]
        return "\n".join([*lines, f"in all {_seconds(self.seconds)}, bound by {self.bound}"])


def itemsize(model: ModelShape) -> int:
    """Bytes of a number of the model's activations, and of an exact cache."""
    return ITEM.get(model.dtype, 2)


def attending(model: ModelShape) -> list[LayerShape]:
    """Layers that attend to a cache, their own or another one's. What a latent one computes is not known here."""
    return [layer for layer in model.layers if layer.kind in ("full", "sliding", "shared", "latent")]


def step(
    model: ModelShape,
    machine: Machine,
    batch: int,
    reads: Sequence[Read],
    *,
    gpus: int = 1,
    fused: bool = True,
    own: bool = False,
) -> Estimate | None:
    """One decoding step of `batch` sequences as a CUDA graph, the weights and heads split over `gpus` GPUs.

    own: the model's own code runs, although it is of a kind that has fused kernels. None (say `NOT_PREDICTED`) if its
    attention is not by our kernels (`fused=False`).
    """
    if not fused:
        return None
    whole = not own and model.fused and gpus == 1
    few = whole and machine.fuses(batch)
    each, width = (machine.fused_small(batch), 0.0) if few else (machine.layer, machine.pointwise)
    if not whole and machine.own_layer is not None and machine.own_pointwise is not None:
        each, width = machine.own_layer, machine.own_pointwise
    terms = [_weights(model, machine, batch, gpus, few), *_attention(model, machine, reads, gpus)]
    layers, packing = len(model.layers), max((read.launches for read in reads if read.kind == "packed"), default=0)
    moved = layers * batch * width * model.hidden * itemsize(model)
    said = f"{layers} layers x {_seconds(each)}"
    said += f" + {_bytes(moved)} moved / {_rate(machine.bandwidth)}" if moved else ""
    small = layers * each + moved / machine.bandwidth
    terms.append(Term("launches in fused kernels" if few else "small operations", small, said, "launches"))
    if packing:
        wide = max(layer.kv_heads * layer.head_dim for layer in model.layers) / WIDE
        heads = batch * model.share(gpus) * wide
        each = machine.packed_layer + heads * machine.packed_row
        said = f"{packing} layers x ({_seconds(machine.packed_layer)} + {heads:,.4g} heads of {WIDE} channels x "
        said += f"{_seconds(machine.packed_row)})"
        terms.append(Term("packing", packing * each, said, "launches"))
    logits = batch * model.vocabulary / gpus
    said = f"{_seconds(machine.step)} + {logits:,.0f} logits x {machine.word * 1e12:.3g} ps"
    terms.append(Term("host and logits", machine.step + logits * machine.word, said, "launches"))
    if gpus > 1:
        terms.append(_all_reduce(model, machine, batch, gpus, 1))
    busy, host = _sum(terms), machine.waits(layers)
    if host > busy:
        said = f"the host's part, {_seconds(host)}, less all that"
        terms.append(Term("waiting for the host", host - busy, said, "launches"))
    return Estimate(tuple(terms))


def _weights(model: ModelShape, machine: Machine, batch: int, gpus: int, fused: bool) -> Term:
    """All weights of a step, read or multiplied, whichever takes longer. fused: by our kernels."""
    nbytes = model.read(batch) / gpus
    rate, operations = machine.streams(batch, fused), 2 * model.multiplied * batch / gpus
    reading, computing = nbytes / rate, operations / machine.products
    if reading >= computing:
        return Term("weights", reading, f"{_bytes(nbytes)} / {_rate(rate)}", "bandwidth")
    said = f"2 x {model.multiplied / gpus:.4g} weights x {batch} tokens / {machine.products / 1e12:.0f} TFLOP/s"
    return Term("weights", computing, said, "compute")


def _attention(model: ModelShape, machine: Machine, reads: Sequence[Read], gpus: int) -> Iterator[Term]:
    """One kernel reads what a layer holds, of all kinds, each at the rate that it would have were it all of it."""
    share, dim = model.share(gpus), min((layer.head_dim for layer in attending(model)), default=WIDE)
    common = share * sum(read.nbytes / read.launches for read in reads if not read.apart)
    for read in reads:
        nbytes = read.nbytes * share
        layer = nbytes / read.launches if read.apart else common
        name = "exact" if read.kind == "exact" else f"{read.bits} bits"
        seconds, said = 0.0, _bytes(nbytes)
        if nbytes:
            seconds = nbytes / layer * machine.attends(read.pages, dim, layer)
            said += f" / ({nbytes / seconds / machine.bandwidth:.2f} of {_rate(machine.bandwidth)},"
            said += f" {_bytes(layer)} a layer)"
        yield Term(f"attention, {name}", seconds, said, "bandwidth")


def _all_reduce(model: ModelShape, machine: Machine, tokens: int, gpus: int, times: int) -> Term:
    """Two a layer, of the hidden vectors of so many tokens; `times` over."""
    count = 2 * len(model.layers) * times
    nbytes = tokens * model.hidden * itemsize(model)
    moved = 2 * (gpus - 1) / gpus * nbytes
    said = f"{count} x ({_seconds(machine.link_start)} + {_bytes(moved)} / {_rate(machine.link)})"
    return Term("all-reduce", count * (machine.link_start + moved / machine.link), said, "link")


def chunks(tokens: int, chunk: int | None) -> Iterator[int]:
    """The sizes of the forwards that read a prompt, all at once or `chunk` tokens at a time."""
    for first in range(0, tokens, chunk or tokens):
        yield min(chunk or tokens, tokens - first)


def prefill(
    model: ModelShape,
    machine: Machine,
    tokens: int,
    *,
    batch: int = 1,
    chunk: int | None = None,
    packed: float = 0.0,
    bits: int | None = None,
    reach: float = 1.0,
    split: bool = False,
    gpus: int = 1,
    fused: bool = True,
    own: bool = False,
) -> Estimate | None:
    """Reading a prompt of `tokens` tokens, all at once or `chunk` at a time, for each of `batch` sequences.

    packed: bytes that a token takes packed in all layers, `bits` a number; 0 if nothing is. reach: the share of the
    pairs of a query and a key before it that full layers compute, the mean of their heads: below 1 where heads see a
    window alone. split: whether heads of one layer differ in that, so that it attends, stores and packs twice. own: by
    the model's own code, although it is of a kind that has fused kernels. None (say `NOT_PREDICTED`) if the recipe has
    no kernels.
    """
    if not fused:
        return None
    if own or not model.fused or gpus > 1:
        machine = machine.by_own_code
    size = itemsize(model)
    sizes = list(chunks(tokens, chunk))
    # Logits are of the last token alone.
    output = model.vocabulary * model.hidden
    inner = max(0.0, model.multiplied - output)
    operations = 2 * (inner * tokens + output) * batch / gpus
    said = f"2 x {inner / gpus:.4g} weights x {tokens * batch:,} tokens / {machine.products / 1e12:.0f} TFLOP/s"
    device = [Term("products", operations / machine.products, said, "compute")]
    device += _prompt_attention(model, machine, sizes, batch, bits if packed else None, reach, gpus)
    moved = len(model.layers) * tokens * batch * machine.prompt_pointwise * model.hidden * size / gpus
    said = f"{_bytes(moved)} moved / {_rate(machine.bandwidth)}"
    device.append(Term("small operations", moved / machine.bandwidth, said, "bandwidth"))
    device += _stored(model, machine, sizes, batch, packed, bits, reach, gpus)
    if gpus > 1:
        device.append(_all_reduce(model, machine, tokens * batch // len(sizes), gpus, len(sizes)))
    return Estimate((*device, _launching(model, machine, sizes, bool(packed), split, device)))


def _sum(terms: Iterable[Term]) -> float:
    return sum(term.seconds for term in terms)


def _launching(
    model: ModelShape, machine: Machine, chunks: Sequence[int], packed: bool, split: bool, device: Sequence[Term]
) -> Term:
    """What a prompt takes beyond the device's work: the beginning and end of each chunk, for which the device waits;
    and what launching a chunk takes longer than the work of that chunk, which grows with what is stored; but for the
    work of its last layer, which nobody can begin before."""
    first, later = machine.host_chunk[machine.host_key(packed, split)]
    held = list(accumulate(chunks, initial=0))[:-1]
    growing = _sum(term for term in device if term.name.endswith(STORED))
    alike, share = (_sum(device) - growing) / sum(chunks), growing / (sum(held) or 1)
    layers, hosts = len(model.layers), [first, *[later] * (len(chunks) - 1)]
    work = [alike * chunk + share * before for chunk, before in zip(chunks, held)]
    longer = sum(begin + max(0.0, layers * each - one * (1 - 1 / layers)) for (begin, each), one in zip(hosts, work))
    said = f"{_seconds(first[0])} + {layers} layers x {_seconds(first[1])}"
    if len(chunks) > 1:
        said += f" + {len(chunks) - 1} chunks x ({_seconds(later[0])} + {layers} x {_seconds(later[1])})"
    return Term("launches", longer, f"{said}, less the device's work while layers are launched", "launches")


def _prompt_attention(
    model: ModelShape, machine: Machine, chunks: Sequence[int], batch: int, bits: int | None, reach: float, gpus: int
) -> Iterable[Term]:
    """Each chunk over itself and over what is stored; 4 operations a query head, channel and pair of tokens."""
    found: dict[str, float] = {}
    for layer, count in Counter(layer for layer in attending(model) if layer.query_heads).items():
        window, before = layer.window, 0
        # Heads that see a window alone are in calls of their own, which have next to nothing to do.
        rows = batch / gpus * (reach if window is None else 1.0)
        each, block = 4 * layer.query_heads * layer.head_dim * rows, _block(layer, rows)
        for chunk in chunks:
            alone, joined = _cut(each, chunk, before, block, bits) if window is None else ([], 0)
            if window is not None:
                held = min(before, window)
                seen = [min(block, held - first) for first in range(0, held, block)]
                alone = [(tokens, each * chunk * tokens >= LARGE) for tokens in seen]
            own = window is None and by_itself(each, chunk)
            parts = [("causal", own or (not joined and each * chunk * chunk >= 2 * LARGE), pairs(chunk, window))]
            parts += [("past", False, chunk * joined)] if joined else []
            parts += [("past", large, chunk * tokens) for tokens, large in alone]
            for kind, large, many in parts:
                key = machine.prompt_key(kind, large, layer.head_dim)
                found[key] = found.get(key, 0.0) + count * each * many
            before += chunk
    for key, operations in sorted(found.items()):
        said = f"{operations:.4g} operations / {machine.prompt[key] / 1e12:.0f} TFLOP/s"
        what = "the prompt itself" if key.startswith("causal") else "what is stored"
        yield Term(f"attention to {what}", operations / machine.prompt[key], said, "compute")


def _cut(each: float, chunk: int, held: int, block: int, bits: int | None) -> tuple[list[tuple[int, bool]], int]:
    """Blocks of what is stored that a chunk attends to by themselves, in tokens and whether by cuDNN; and how many
    tokens it attends to apart from these (`attention.prefill`). each: operations of a pair of tokens; bits: of what is
    packed, all but the newest tokens, in pages of as many tokens as 32 words of 16 bits hold; None where nothing is."""
    regular, page = chunk % CHUNK_STEP == 0, 1 if bits is None else 16 // bits * 32
    sizes = halved(block, page, lambda tokens: regular and each * chunk * tokens >= RECURRING_OPERATIONS)
    stop = held if bits is None else max(0, held - RECENT)
    alone, joined = list[tuple[int, bool]](), held - stop
    for first, last in blocks(-(-stop // page), stop // page, page, sizes, math.ceil(LARGE / (each * chunk or 1.0))):
        tokens = min(stop, last * page) - first * page
        large = each * chunk * tokens >= (RECURRING_OPERATIONS if regular and tokens in sizes else LARGE)
        if large or tokens in sizes or (bits is not None and tokens > 4 * chunk):
            alone.append((tokens, large))
        else:
            joined += tokens
    return alone, joined


def _block(layer: LayerShape, rows: float) -> int:
    """Tokens of what is stored that a chunk attends to at a time."""
    return max(1, round(BLOCK / (layer.kv_heads * layer.head_dim * rows or 1.0)))


def pairs(tokens: int, window: int | None) -> float:
    """Pairs of tokens of which one sees the other, at most `window` back."""
    if window is None or tokens <= window:
        return tokens * tokens / 2
    return window * window / 2 + (tokens - window) * window


def _stored(
    model: ModelShape,
    machine: Machine,
    chunks: Sequence[int],
    batch: int,
    packed: float,
    bits: int | None,
    reach: float,
    gpus: int,
) -> Iterator[Term]:
    """What storing a prompt takes, and having it back for the chunks that follow. `reach`: heads that see a window
    alone store next to nothing."""
    share, full = model.share(gpus) * reach, [layer for layer in model.layers if layer.kind == "full"]
    exact = share * sum(layer.numbers for layer in full) * itemsize(model)
    packed *= model.share(gpus)
    held = list(accumulate(chunks, initial=0))[:-1]
    back = batch * sum(held)
    if packed and bits is not None:
        for name, tokens, rates in (
            ("packing", batch * sum(chunks), machine.pack),
            ("unpacking what is stored", back, machine.unpack),
        ):
            nbytes, rate = tokens * (exact + packed), rates[str(bits)] * machine.bandwidth
            if nbytes:
                yield Term(name, nbytes / rate, f"{_bytes(nbytes)} / {_rate(rate)}", "bandwidth")
    moved = 0.0 if packed else 2 * back * exact  # they lie apart, and are copied together
    for layer, count in Counter(full).items():
        rows = batch * reach / gpus
        each, block = 4 * layer.query_heads * layer.head_dim * rows, _block(layer, rows)
        token = layer.numbers * itemsize(model) * batch * share
        for chunk, before in zip(chunks, held):
            alone, joined = _cut(each, chunk, before, block, bits if packed else None)
            own = joined and by_itself(each, chunk)
            moved += count * 2 * (joined + (0 if own else chunk)) * token if joined else 0.0
            numbers, several = chunk * rows * layer.query_heads * layer.head_dim, len(alone) + bool(own)
            moved += count * (several + 2) * itemsize(model) * numbers if several else 0.0
    if moved:
        said = f"{_bytes(moved)} moved / {_rate(machine.bandwidth)}"
        yield Term("merging with what is stored", moved / machine.bandwidth, said, "bandwidth")


def switch(machine: Machine, nbytes: float, *, packed: bool = False, gpus: int = 1, back: bool = True) -> Estimate:
    """A session's cache to host memory and, with `back`, another one's of the same size from there; each GPU has its
    share and its own link. packed: whether the caches have packed pages."""
    own, kind = nbytes / gpus, "packed" if packed else "exact"
    terms = [_moved("to the host", own, machine.to_host, machine.put_start[kind])]
    if back:
        terms.append(_moved("from the host", own, machine.from_host, machine.bring_start[kind]))
    return Estimate(tuple(terms))


def _moved(name: str, nbytes: float, rate: float, start: float) -> Term:
    return Term(name, start + nbytes / rate, f"{_seconds(start)} + {_bytes(nbytes)} / {_rate(rate)}", "link")


def first_token(read: Estimate | None, one: Estimate | None = None, waiting: float = 0.0) -> Estimate | None:
    """Until the first token is there: what it waits for, and its prompt, whose last position gives it. `one`: a step
    that has to end before, of those that are decoding."""
    if read is None:
        return None
    terms = list(read.terms)
    if one is not None:
        terms.insert(0, Term("a step under way", one.seconds, _seconds(one.seconds), one.bound))
    if waiting:
        terms.insert(0, Term("prompts before it", waiting, _seconds(waiting), read.bound))
    return Estimate(tuple(terms))


def tokens_a_second(one: Estimate, batch: int, replicas: int = 1) -> float:
    """Of all sequences, and of that many replicas that each hold `batch` of them."""
    return replicas * batch / one.seconds


def _seconds(x: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if abs(x) >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x * 1e6:.3g} µs"


def _bytes(x: float) -> str:
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if x >= scale:
            return f"{x / scale:.4g} {unit}"
    return f"{x:,.0f} bytes"


def _rate(x: float) -> str:
    return f"{_bytes(x)}/s"
