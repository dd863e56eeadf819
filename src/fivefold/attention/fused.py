"""A decoding step by the kernels of `kernels/packed_decode`: every tier of a cohort in one go.

What the kernels need to know lies on the device: tables of page addresses, kept by the cohort until its pages change,
and the spans of slots that are seen, made once per step for all layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fivefold.errors import CacheStateError
from fivefold.kernels.choice import choose
from fivefold.store.layer_cache import Cohort, LayerCache
from fivefold.store.tiers import PAGE, Geometry


def attend_fused(layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float) -> torch.Tensor | None:
    """`attend_step` by kernels; None where they do not run (see `why_not`)."""
    if why_not(layer, queries.device, queries.shape[1]) is not None:
        return None
    kernel = kernels()
    packed = _packed(layer, cohort, queries.device)
    exact = kernel.Exact(_exact_table(layer, cohort, queries.device), layer.spec.dtype)
    page = layer.packing.page if layer.packing else kernel.TILE
    rows, heads, _ = queries.shape
    programs = kernel.programs_for(rows, queries.device, packed and packed.form, heads)
    span, starts = _spans(cohort.geometry, rows, queries.device, page, programs)
    return kernel.decode(queries.contiguous(), scaling, span, packed, exact, starts=starts, programs=programs)[0]


def attend_picked_fused(
    layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float, slots: torch.Tensor
) -> torch.Tensor | None:
    """Attention over what `slots [rows, n]` name alone, negative ones left out: packed slots, beside the whole exact
    tier, if anything is packed, else exact ones. None where the kernels do not run."""
    if why_not(layer, queries.device, queries.shape[1]) is not None:
        return None
    packed = _packed(layer, cohort, queries.device)
    exact = kernels().Exact(_exact_table(layer, cohort, queries.device), layer.spec.dtype)
    geometry = None if packed is None else cohort.geometry
    span, starts = _picked_spans(geometry, slots.shape[1], len(cohort.rows), queries.device)
    picks = slots.to(torch.int32).contiguous()
    return kernels().decode(queries.contiguous(), scaling, span, packed, exact, starts=starts, picks=picks)[0]


def unpack_fused(
    layer: LayerCache, cohort: Cohort, first: int, last: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of packed columns first..last, `[rows, tokens, head_dim]`; None where the kernel does not run."""
    device, codec = layer.spec.device, layer.codec
    if not choose(device).triton or codec is None or codec.form is None or layer.own_pool is not None:
        return None
    if kernels().supports(codec.form, 1, layer.spec.head_dim) is not None:
        return None
    from fivefold.kernels.pack import triton as kernel

    return kernel.unpack_pages(codec.form, _packed(layer, cohort, device).table[:, first:last], dtype)


def why_not(layer: LayerCache, device: torch.device, heads: int) -> str | None:
    """Why the kernels do not decode this layer, in a few words; None if they do.

    Raises `CacheStateError` if they were asked for and this machine cannot run them.
    """
    choice = choose(device)
    if not choice.possible:
        raise CacheStateError(
            f"the kernels that were asked for cannot run: {choice.why}; set FIVEFOLD_KERNELS=auto, or unset it."
        )
    if not choice.triton:
        return choice.why
    kernel, codec = kernels(), layer.codec
    if codec is not None:
        if codec.form is None or layer.own_pool is not None:
            return "no kernel reads this codec's pages"
        if codec.peak > kernel.LIMIT:
            return f"keys or values reach {codec.peak:.0f}, more than the kernels' {kernel.LIMIT:.0f}"
    return kernel.supports(None if codec is None else codec.form, heads, layer.spec.head_dim)


def kernels() -> ModuleType:
    """The kernels' module, which needs Triton."""
    from fivefold.kernels.packed_decode import triton as kernel

    return kernel


def _table(addresses: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(addresses).to(device) >> 4


def _packed(layer: LayerCache, cohort: Cohort, device: torch.device) -> Any:
    """The packed pages of a cohort, if it has any."""
    if not cohort.packed.shape[1]:
        return None
    assert layer.codec is not None and layer.codec.form is not None and layer.packed_pool is not None
    if cohort.packed_table is None:
        first = layer.packed_pool.layout.fields[0].name
        cohort.packed_table = _table(layer.packed_pool.addresses(first, cohort.packed), device)
    return kernels().Packed(cohort.packed_table, layer.codec.form)


def _exact_table(layer: LayerCache, cohort: Cohort, device: torch.device) -> torch.Tensor:
    if cohort.exact_table is None:
        pair = [layer.exact_pool.addresses(name, cohort.exact) for name in ("keys", "values")]
        cohort.exact_table = _table(np.stack(pair, 2), device)
    return cohort.exact_table


@lru_cache(maxsize=16)
def _picked_spans(
    geometry: Geometry | None, count: int, rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """For picked slots of the packed tier, beside the exact tier of `geometry`, or if that is None of the exact one."""
    kernel = kernels()
    span = (0, 0, 0, 0, count)
    if geometry is not None:
        # Picks are shared out as pages of that many tokens would be.
        span = (0, count, *spans(geometry)[2:])
    return _work(
        [span] * rows, kernel.TILE if geometry is None else kernel.PICKS, device, kernel.programs_for(rows, device)
    )


def _work(
    seen: list[tuple[int, int, int, int, int]], page: int, device: torch.device, programs: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    kernel = kernels()
    span = np.zeros((len(seen), kernel.SPAN), dtype=np.int32)
    span[:, :5] = seen
    starts = kernel.starts_of(kernel.pages_of(span, page), programs)
    return torch.from_numpy(span).to(device), torch.from_numpy(starts).to(device)


@lru_cache(maxsize=16)
def _spans(
    geometry: Geometry, rows: int, device: torch.device, page: int, programs: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the newest token sees, for every row: int32 `[rows, SPAN]`, and the work lists (`starts_of`)."""
    return _work([spans(geometry)] * rows, page, device, programs)


def spans(geometry: Geometry) -> tuple[int, int, int, int, int]:
    """What the newest token sees: packed slots `[0, 1)`, and exact slots below `2` or from `3` on, below `4`."""
    length, recent, sink = geometry.length, geometry.extent.recent, geometry.extent.sink
    pinned = min(length, geometry.extent.pinned * PAGE)
    stop = pinned + max(0, length - geometry.exact_base)
    high = geometry.packed_stop - geometry.packed_base
    if recent is None or length <= recent:
        return 0, high, 0, 0, stop
    oldest = length - recent
    low = min(high, max(0, oldest - geometry.packed_base))
    start = oldest if oldest < pinned else pinned + max(0, oldest - geometry.exact_base)
    return low, high, sink, start, stop


def pack_due(layers: Iterable[LayerCache], horizon: int) -> None:
    """After a decoding step: pack the groups that are due in all layers by one launch, from exact pages as they lie.

    What it does not do (several groups of a row at once, codecs and numbers that the kernels do not take) is left for
    `LayerCache.append`.
    """
    due: dict[tuple, list[_Due]] = {}
    try:
        for layer in layers:
            if layer.packing is None or not choose(layer.spec.device).triton:
                continue
            for cohort in layer.cohorts:
                new = cohort.geometry.settled(layer.packing, horizon)
                if cohort.held is None and new.packed_stop > cohort.geometry.packed_stop:
                    one = _Due.of(layer, cohort, new)
                    if one is not None:
                        assert layer.codec is not None
                        due.setdefault((layer.codec.form, layer.spec.dtype, layer.spec.device), []).append(one)
        for (form, dtype, device), together in due.items():
            from fivefold.kernels.pack import triton as kernel

            sources = torch.from_numpy(np.concatenate([one.sources for one in together])).to(device)
            places = torch.from_numpy(np.concatenate([one.places for one in together])).to(device)
            peak = float(kernel.pack_exact(form, sources, places, dtype))
            for one in together:
                assert one.layer.codec is not None
                if peak <= LARGEST:
                    one.layer.codec.peak = max(one.layer.codec.peak, peak)
                    one.done = True
    finally:
        for one in (one for together in due.values() for one in together):
            one.finish()


LARGEST = torch.finfo(torch.float16).max


@dataclass
class _Due:
    """A group of every row of a cohort that is about to be packed.

    sources: addresses of its exact pages, int64 `[rows, planes, 2]`; places: of the packed page it goes into, and from
    what plane on, `[rows, 2]`. columns, gone: packed columns before, and those at the front that are given up.
    """

    layer: LayerCache
    cohort: Cohort
    new: Geometry
    columns: int
    gone: int
    sources: np.ndarray
    places: np.ndarray
    done: bool = False

    @classmethod
    def of(cls, layer: LayerCache, cohort: Cohort, new: Geometry) -> _Due | None:
        """With pages to pack into; None where this is not for the kernel."""
        packing, pool, old = layer.packing, layer.packed_pool, cohort.geometry
        assert packing is not None and pool is not None
        if why_not(layer, layer.spec.device, layer.spec.query_heads // layer.spec.kv_heads) is not None:
            return None
        columns, gone = cohort.packed.shape[1], layer._packed_columns(old, new)
        position = old.packed_stop if gone < columns else new.packed_base
        if new.packed_stop - position != packing.group or new.packed_stop > old.length:
            return None
        column, slot = divmod(position - new.packed_base, packing.page)
        first = old.pinned_pages + (position - old.exact_base) // PAGE
        exact = cohort.exact[:, first : first + packing.group // PAGE]
        sources = np.stack([layer.exact_pool.addresses(name, exact) for name in ("keys", "values")], 2)
        cohort.packed = layer._widen(pool, cohort.packed, new.packed_pages(packing) - (columns - gone))
        if slot and cohort.shared:
            cohort.packed[:, gone + column] = pool.unshare(cohort.packed[:, gone + column])
        cohort.touched_packed()
        where = pool.addresses(pool.layout.fields[0].name, cohort.packed[:, gone + column])
        places = np.stack([where >> 4, np.full_like(where, slot // 32)], 1)
        return cls(layer, cohort, new, columns, gone, sources >> 4, places)

    def finish(self) -> None:
        if not self.done:
            self.layer._drop_packed(self.cohort, slice(self.columns, None))
            return
        self.layer._drop_packed(self.cohort, slice(0, self.gone))
        self.layer._rewindow(self.cohort, self.cohort.geometry, self.new, None, None)
        self.cohort.geometry = self.new
