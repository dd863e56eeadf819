"""Which way the steps of a cache go, and why: for `report()`, and for a warning where a fast one is lost.

A layer's step is one call of a kernel for all rows, calls of kernels for the rows that stand alike, or plain PyTorch.
Nothing here decides that: `attention/fused.py` does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from fivefold.attention.fused import why_not
from fivefold.attention.observe import why_weighed
from fivefold.engine.picks import Reads
from fivefold.errors import CacheStateError, SlowPathWarning
from fivefold.kernels.choice import choose, runs_cpp
from fivefold.kernels.packed_decode import cuda
from fivefold.store.layer_cache import LayerCache

_NAMES = {"cpp": "C++ kernels", "triton": "Triton kernels", "cuda": "CUDA C++ kernels", "reference": "plain PyTorch"}


class Steps(Protocol):
    """What is asked of a `Session`. told: what has been said of this cache, and of all that are made of it."""

    stores: dict[int, LayerCache]
    reads: Reads
    told: set[str]

    def why_not_fused(self) -> dict[int, str | None]: ...


class Way(NamedTuple):
    """How a layer decodes; why, in a few words, where there is a faster way; lost: whether that is worth a warning."""

    how: str
    why: str | None = None
    lost: bool = False


def way_of(session: Steps, store: LayerCache, whole: str | None) -> Way:
    """whole: why its step is not one call of a kernel, None if it is (see `Session.why_not_fused`)."""
    spec, choice = store.spec, choose(store.spec.device)
    form, heads = None if store.codec is None else store.codec.form, spec.query_heads // spec.kv_heads
    reader = None if store.codec is None else store.codec.reader
    name, better = _NAMES[choice.path], reader is not None and cuda.supports(reader, heads)
    if choice.path == "cuda" and not better:
        name = _NAMES["triton"]  # what is not packed, and what CUDA C++ is not written for
    if whole is None:
        less = choice.path == "triton" and better  # than this GPU can
        return Way(name, choice.why if less else None, less and not choice.asked)
    why, policy = why_not(store, spec.device, heads), store.policy
    if why is not None and form is not None and why_not(store, spec.device, heads, large=True) is None:
        return Way(f"{_NAMES['triton']}, token by token,", why, True)
    # On a CPU what no kernel is written for is not much slower; on a GPU it is.
    lost = spec.device.type != "cpu" or (why is not None and (choice.path == "reference" or form is not None))
    if why is None:
        # Where they have to give the attention that each token gets, too.
        watched = policy is not None and policy.counts_steps and any(store.head_chosen)
        if policy is not None and store.known:
            watched = any(policy.watching(held) for held in store.known)
        select = session.reads.roles.get(spec.layer) == "select" and not runs_cpp(spec.device)
        if not (watched or select):
            return Way(f"{name}, group by group,", whole)
    around = store.codec is not None and store.codec.compiled(spec.device)
    lost = lost and not (choice.path == "reference" and choice.asked)
    return Way("plain PyTorch" + " around C++ kernels" * around, why or whole, lost)


def ways(session: Steps) -> dict[Way, int]:
    """Each way, and of how many layers it is, in the order of the layers."""
    found: dict[Way, int] = {}
    for index, whole in session.why_not_fused().items():
        way = way_of(session, session.stores[index], whole)
        found[way] = found.get(way, 0) + 1
    return found


def describe(session: Steps, graph: str = "") -> str:
    """In a plain sentence. graph: whether steps are a CUDA graph, where they could be."""
    try:
        found = ways(session)
    except CacheStateError as error:  # kernels were asked for that are not here
        return str(error)
    said = [f"{way.how} in {_share(session, n)}" + (f" ({way.why})" if way.why else "") for way, n in found.items()]
    said[-1] += f", {graph}" if graph else ""
    said += [f"prompts are {how} in {_share(session, n)} ({why})" for (how, why, _), n in prompts(session).items()]
    return "; ".join(said)


def prompts(session: Steps) -> dict[Way, int]:
    """The slower ways in which prompts are read where kernels run, and of how many layers each is."""
    found: dict[Way, int] = {}
    for store in session.stores.values():
        if choose(store.spec.device).triton:
            why, mine = why_weighed(store), list[Way]()
            if why is not None:
                mine.append(Way("weighed in plain PyTorch", why, True))
            windows = any(extent.recent is not None and extent.share is None for extent in store.extents)
            if windows and store.spec.dtype is torch.float32:  # as somebody has asked for
                mine.append(Way("read block by block under windows", "FlashAttention takes no float32"))
            for way in mine:
                found[way] = found.get(way, 0) + 1
    return found


def warn(session: Steps, whys: Mapping[int, str | None], stacklevel: int = 2) -> None:
    """Say, once for each reason, which layers decode in a slower way than this machine could give. whys: what
    `why_not_fused` says just now."""
    if session.told.issuperset(why for why in whys.values() if why is not None):
        return  # most of the time
    if any(store.spec.device.type == "meta" for store in session.stores.values()):
        return  # a cache that is planned, not made
    for way, count in ways(session).items():
        if way.lost:
            tell(session, f"{_share(session, count)} decode by {way.how}: {way.why}", stacklevel + 1)
    for way, count in prompts(session).items():
        if way.lost:
            tell(session, f"prompts are {way.how} in {_share(session, count)}: {way.why}", stacklevel + 1)
    session.told.update(why for why in whys.values() if why is not None)


def tell(session: Steps, said: str, stacklevel: int = 2) -> None:
    """A `SlowPathWarning`, once for a cache and all that are made of it; other numbers in it make it no other."""
    key = "".join(letter for letter in said if not letter.isdigit())
    if key not in session.told:
        session.told.add(key)
        warnings.warn(f"{said}.", SlowPathWarning, stacklevel=stacklevel + 1)


def _share(session: Steps, count: int) -> str:
    layers = len(session.stores)
    return f"{count} of {layers} layer" + "s" * (layers > 1)
