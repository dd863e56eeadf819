"""What a machine can do: measured on it, or, where it is not at hand, taken from its data sheet."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from fivefold.errors import InputError
from fivefold.paths import cache_dir

SHIPPED = Path(__file__).with_name("machines.json")
KINDS = ("exact", "2", "3", "4", "8")
"""Kinds of pages: exact ones, and packed ones by the bits of a number."""
NARROW = 64
"""Heads of so many channels and fewer are read less fast."""


@dataclass(frozen=True)
class Machine:
    """A GPU, alone or with others of its kind behind `link`. Rates are bytes or operations a second; times are seconds.

    memory: all of its bytes; usable: those that the driver's context leaves. bandwidth: of a large copy, what is read
    and what is written. products: operations of large products in bfloat16. streaming: bytes of weights that a product
    with so many rows reads, by rows. attention: what a layer's attention takes in a decoding step, by kind of page:
    `[bytes, seconds]` of some caches, the smallest first; "4 64", where it was measured, of narrow heads.
    prompt: operations of a prompt's attention, "causal" over itself and "past" over what is stored, "small" and "large"
    (see `time.LARGE`), by head_dim ("causal large 128": see `prompt_key`). pack, unpack: quantising a prompt and
    reading it back for its next chunk, by bits, as a share of bandwidth.

    step: of a step as a graph, the host's part and what does not grow; word: what each logit of each sequence adds.
    layer: the small operations and the gaps of a layer, and the beginning of its attention; packed_layer: what a layer
    that packs adds; packed_row: what each of its KV heads, of 128 channels, of each sequence adds. pointwise: the work
    between a layer's products, which grows with the tokens: in how many copies of the hidden vector, at `bandwidth`,
    it is done; of a step, and (prompt_pointwise) of a prompt.

    fused: `streaming` of our fused kernels, which take the steps of so many sequences at most of models of a Llama's
    kind; empty where that was not measured. fused_layer: `layer` of such a step of one sequence, and fused_several of
    more (None: the same); `layer` and `pointwise` are then of steps of more sequences, own_layer and own_pointwise of
    other models' steps, which run the model's own code.

    host_chunk: what the host takes for a chunk of a prompt, by kind: "exact", "packed", or "split" where it packs and
    its heads are of two kinds. Of each, `[[begin, layer], [begin, layer]]`: to begin and end a prompt's first chunk,
    while a GPU waits, and to launch each of its layers; the same of a chunk that follows. This and prompt_pointwise are
    of prompts with fused kernels (`models/chunks.py`); own_prompt_pointwise and own_host_chunk of those that a model's
    own code reads, where that was measured.
    host_step: the least that a step takes, however little a GPU has to do: "step", and "layer" for each layer; empty
    where it was not measured.

    to_host, from_host: what `cache.offload()` and `restore()` reach; put_start, bring_start: what they take besides, of
    an "exact" cache or one with "packed" pages.
    pinned_to, pinned_from: the same of a plain copy. link: all-reduce between GPUs; link_start: what each one takes.

    date, source: of these numbers. measured: whether they were measured on such a machine.
    """

    name: str
    memory: int
    usable: int
    bandwidth: float
    products: float
    streaming: Mapping[str, float]
    attention: Mapping[str, Sequence[Sequence[float]]]
    prompt: Mapping[str, float]
    pack: Mapping[str, float]
    unpack: Mapping[str, float]
    pointwise: float
    prompt_pointwise: float
    step: float
    word: float
    layer: float
    packed_layer: float
    packed_row: float
    host_chunk: Mapping[str, Sequence[Sequence[float]]]
    to_host: float
    from_host: float
    put_start: Mapping[str, float]
    bring_start: Mapping[str, float]
    pinned_to: float
    pinned_from: float
    link: float
    link_start: float
    date: str
    source: str
    measured: bool = False
    aliases: tuple[str, ...] = field(default=())
    fused: Mapping[str, float] = field(default_factory=dict)
    fused_layer: float = 0.0
    fused_several: float | None = None
    own_layer: float | None = None
    own_pointwise: float | None = None
    own_prompt_pointwise: float | None = None
    own_host_chunk: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    host_step: Mapping[str, float] = field(default_factory=dict)

    def __hash__(self) -> int:  # equal machines have equal names
        return hash((self.name, self.date, self.source))

    def streams(self, rows: int, fused: bool = False) -> float:
        """Bytes of weights a second that products with so many rows read: between measured ones, by the logarithm.
        fused: by our kernels."""
        known = sorted((int(count), rate) for count, rate in (self.fused if fused else self.streaming).items())
        if rows <= known[0][0]:
            return known[0][1]
        for (low, slow), (high, fast) in pairwise(known):
            if rows <= high:
                share = math.log(rows / low) / math.log(high / low)
                return slow + share * (fast - slow)
        return known[-1][1]

    def fused_small(self, rows: int) -> float:
        """The small operations of a layer in fused kernels, of so many sequences."""
        return self.fused_layer if rows == 1 or self.fused_several is None else self.fused_several

    def fuses(self, rows: int) -> bool:
        """Whether our fused kernels take a step of so many sequences."""
        return any(rows <= int(count) for count in self.fused)

    @property
    def by_own_code(self) -> Machine:
        """The same for prompts that are read by a model's own code."""
        if self.own_prompt_pointwise is None or not self.own_host_chunk:
            return self
        return replace(self, prompt_pointwise=self.own_prompt_pointwise, host_chunk=self.own_host_chunk)

    def attends(self, pages: str, head_dim: int, nbytes: float) -> float:
        """Seconds of a step's attention over so many bytes of such pages in a layer: between caches that were measured,
        in proportion to the bytes of a larger one, and no less than that of a smaller one."""
        points = self.attention.get(self.attention_key(pages, head_dim), self.attention[pages])
        most, seconds = points[-1]
        if nbytes >= most or len(points) == 1:
            return seconds * nbytes / most
        few, many = next(pair for pair in pairwise(points) if nbytes < pair[1][0])
        between = few[1] + (nbytes - few[0]) / (many[0] - few[0]) * (many[1] - few[1])
        return max(between, few[1] * nbytes / few[0]) if nbytes < few[0] else between

    def waits(self, layers: int) -> float:
        """The least that a step takes, in seconds, since the host has its part in it."""
        return self.host_step.get("step", 0.0) + layers * self.host_step.get("layer", 0.0)

    @staticmethod
    def host_key(packed: bool, split: bool) -> str:
        """The key in `host_chunk` and its like of prompts that are packed, with heads of two kinds."""
        return "exact" if not packed else "split" if split else "packed"

    @staticmethod
    def attention_key(pages: str, head_dim: int) -> str:
        """The key in `attention` of such pages."""
        return f"{pages} {NARROW}" if head_dim <= NARROW else pages

    @staticmethod
    def prompt_key(kind: str, large: bool, head_dim: int) -> str:
        """The key in `prompt` of an attention: heads of 64 channels and fewer reach less."""
        return f"{kind} {'large' if large else 'small'} {NARROW if head_dim <= NARROW else 128}"

    def as_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return {**asdict(self), "aliases": list(self.aliases)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Machine:
        """Undo `as_dict`. Raises `InputError` where a field is missing or is no number."""
        if not isinstance(found, Mapping):
            raise InputError("these are no constants of a machine: measure them anew with --measure.")
        names = {one.name for one in fields(cls)}
        wanted = {one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING}
        missing = sorted(wanted - found.keys())
        if missing:
            raise InputError(f"a machine's constants lack {', '.join(missing)}: measure them anew with --measure.")
        known = {name: found[name] for name in names & found.keys()}
        for name in ("memory", "usable", "bandwidth", "products"):
            if not isinstance(known[name], int | float) or not known[name] > 0:
                raise InputError(f"a machine's {name} is {known[name]!r}: measure its constants anew with --measure.")
        if not all(isinstance(points, list) and points for points in known["attention"].values()):
            raise InputError("these constants are of an earlier version: measure them anew with --measure.")
        return cls(**{**known, "aliases": tuple(known.get("aliases", ()))})


@cache
def shipped() -> tuple[Machine, ...]:
    """All machines that come with Fivefold; those of a data sheet have the H100's efficiencies."""
    known = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return tuple(Machine.from_dict(_whole(one, known)) for one in known["machines"])


def _whole(one: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A data sheet's `memory`, `bandwidth` and `products` (peaks) with the shares of its peaks that another machine,
    `like`, reaches, and with that one's times."""
    if "like" not in one:
        return dict(one)
    like = next(other for other in known["machines"] if other["name"] == one["like"])
    peak = known["peaks"][one["like"]]
    memory = one["bandwidth"] / peak["bandwidth"]
    compute = one["products"] / peak["products"]
    host = one["host_link"] / peak["host_link"]
    out = {**like, **{key: value for key, value in one.items() if key not in ("like", "host_link")}}
    out["usable"] = one["memory"] - (like["memory"] - like["usable"])
    out["bandwidth"] = like["bandwidth"] * memory
    for name in ("streaming", "fused"):
        out[name] = {rows: rate * memory for rows, rate in like.get(name, {}).items()}
    out["attention"] = {
        kind: [[nbytes, seconds / memory] for nbytes, seconds in points] for kind, points in like["attention"].items()
    }
    out["products"] = like["products"] * compute
    for name in ("word", "packed_row"):  # the device's work; the others are of the host, or of launches
        out[name] = like[name] / memory
    out["prompt"] = {name: rate * compute for name, rate in like["prompt"].items()}
    for name in ("to_host", "from_host", "pinned_to", "pinned_from"):
        out[name] = like[name] * host
    out["measured"] = False
    out["source"] = f"{one['source']}; efficiencies and times as measured on an {one['like']}"
    return out


def _plain(name: str) -> str:
    """A name as it is compared: lower case, without makers and punctuation."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).split()
    dropped = {"nvidia", "amd", "geforce", "tesla", "instinct", "gpu", "tensor", "core", "graphics"}
    return "".join(word for word in words if word not in dropped)


def find_machine(name: str) -> Machine:
    """A machine by its name, or a part of it ("h100", "RTX 4090", "NVIDIA A100-SXM4-80GB"). Raises `InputError`."""
    wanted = _plain(name)
    found = {label: one for one in reversed(shipped()) for label in (_plain(one.name), *map(_plain, one.aliases))}
    if wanted in found:
        return found[wanted]
    begun = list(dict.fromkeys(one.name for label, one in found.items() if wanted and label.startswith(wanted)))
    if len(begun) == 1:
        return found[_plain(begun[0])]
    near = difflib.get_close_matches(wanted, found, 3, 0.5)
    names = begun or list(dict.fromkeys(found[label].name for label in near))
    said = " or ".join(names) if names else "one of " + ", ".join(one.name for one in shipped())
    raise InputError(
        f"--gpu {name!r} is {'more than one' if begun else 'not known'}: write {said}, or measure the one at hand with "
        "fivefold plan --measure and write auto."
    )


def measured_file() -> Path:
    """Where `fivefold plan --measure` leaves what it found."""
    return cache_dir() / "plan" / "machine.json"


def read_machine(path: Path) -> Machine:
    """Constants from a file of `fivefold plan --measure`. Raises `InputError`."""
    try:
        return Machine.from_dict(json.loads(path.read_text(encoding="utf-8"))["machine"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no constants of a machine: run fivefold plan --measure anew.") from error


def here() -> Machine:
    """The GPU of this machine: as it was measured here, else as it is shipped. Raises `InputError`."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    path = measured_file()
    if path.is_file():
        own = read_machine(path)
        if name is None or own.name == name:
            return own
    if name is None:
        raise InputError("--gpu auto finds no GPU here: name one, for example --gpu h100.")
    try:
        return find_machine(name)
    except InputError as error:
        raise InputError(f"{name} has no constants yet: run fivefold plan --measure, or name another GPU.") from error
