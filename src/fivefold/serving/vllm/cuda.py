"""A layer on a GPU. A step of one token a request is three launches, which a CUDA graph holds: the token is written
(and its group packed, if it is full now), Fivefold's decoding kernels attend, and the parts are merged. A chunk of a
prompt attends by FlashAttention: to itself as it is, and to what was there before, decoded a piece at a time.

Nothing waits for the device. How large packed numbers are comes back when it comes (`CudaPath.watch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fivefold.errors import CacheStateError, NonFiniteError
from fivefold.kernels import paged_pack
from fivefold.kernels.choice import choose
from fivefold.kernels.device import coming
from fivefold.kernels.packed_decode import schedule
from fivefold.kernels.paged_pack import Blocks, Place
from fivefold.serving.vllm.options import PAGE, Pages
from fivefold.serving.vllm.tables import Tables

PIECE = 8192
"""Tokens before a chunk that are decoded at a time."""
EVERY = 64
"""Steps after which the largest packed number is asked for again."""


class CudaTables(Tables):
    """`Tables` filled by one kernel, with the work lists of the decoding kernels: `starts`, for `programs` programs.

    query_heads: that share a KV head.
    """

    def __init__(
        self, pages: Pages, kv_heads: int, requests: int, tokens: int, device: torch.device, query_heads: int
    ) -> None:
        super().__init__(pages, kv_heads, requests, tokens, device)
        self.query_heads = query_heads
        self.programs = (1, 0)
        self.starts = torch.zeros((2, requests * kv_heads + 1), dtype=torch.int32, device=device)

    def programs_for(self, requests: int) -> tuple[int, int]:
        """Depends on nothing else, so that a graph finds as many as it was captured with."""
        from fivefold.kernels.packed_decode.triton import programs_for

        form, dtype = self.pages.form, self.pages.dtype
        return programs_for(requests * self.kv_heads, self.device, form, self.query_heads, dtype)[:2]

    def fill(
        self,
        packed: Place,
        exact: Place,
        packed_blocks: torch.Tensor,
        exact_blocks: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
    ) -> None:
        from fivefold.kernels.paged_pack import triton as kernel

        self.programs = self.programs_for(len(lengths))
        out = paged_pack.Tables(self.packed, self.exact, self.spans, self.starts)
        kernel.tables(
            self.pages.form, packed, packed_blocks, exact, exact_blocks, self.kv_heads, self.pages.dtype, lengths,
            self.pages.residual, self.programs, longest, out, self.requests,
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Prompts that begin here, one behind the other: tokens first..last of the batch. ends: int32 `[prompts + 1]`."""

    first: int
    last: int
    ends: torch.Tensor
    longest: int


@dataclass(frozen=True)
class Plan:
    """What the layers of a step do for its prefills. pages: int32 `[n, 5]`, to be packed (see `paged_pack`); more: the
    requests that go on with a prompt, and for each the ends of its queries and of every piece of its keys."""

    runs: list[Run]
    more: list[tuple[Any, torch.Tensor, list[torch.Tensor]]]
    pages: torch.Tensor


class CudaPath:
    """See `backend.Path`."""

    def __init__(self, pages: Pages, device: torch.device, attention: Any = None) -> None:
        """attention: what chunks of prompts attend with, in place of `Flash`."""
        choice = choose(device)
        if not choice.triton:
            raise CacheStateError(
                f"the plug-in needs Fivefold's kernels on a GPU, which do not run here: {choice.why}. Install Triton, "
                "and set FIVEFOLD_KERNELS=auto or unset it."
            )
        self.pages, self.device = pages, device
        self._attention = cache(attention or Flash)
        self.peak = torch.zeros(1, dtype=torch.int32, device=device)
        self._coming: Callable[[], list[float]] | None = None
        self._steps = 0
        self._warm = False

    def prepare(self, step: Any) -> None:
        """Before the layers of a step, and before a graph is replayed."""
        self._steps += 1
        if self._steps % EVERY == 0:
            self.watch()
        step.plan = self._plan(step) if step.prefills else None

    def watch(self) -> None:
        """Raise `NonFiniteError` if what was packed some steps ago is too large to be attended on packed."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        if self._coming is not None:
            (peak,) = self._coming()
            if not peak <= schedule.LIMIT:
                raise NonFiniteError(
                    f"keys or values reach {peak:g}, and a GPU's kernels attend on packed numbers up to "
                    f"{schedule.LIMIT:g}: serve the model without a recipe."
                )
        self._coming = coming(self.peak.view(torch.float32))

    def forward(
        self, shared: Any, impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        packed: torch.Tensor, exact: torch.Tensor, step: Any, output: torch.Tensor,
    ) -> None:  # fmt: skip
        from fivefold.kernels.paged_pack import triton as kernel

        places = Blocks(packed, step.packed_blocks), Blocks(exact, step.exact_blocks)
        if step.plan is not None:
            # All packing comes before any reading: a request may have hit a block that another one fills in this step.
            kernel.pack(self.pages.form, key, value, *places, step.plan.pages, self.peak)
        if step.decodes:
            at = slice(step.decodes)
            self.decode(query[at], key[at], value[at], output[at], *places, step, impl.scale)
        if step.plan is not None:
            self.prefill(query, key, value, output, *places, step, impl)

    def decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, packed: Blocks,
        exact: Blocks, step: Any, scale: float,
    ) -> None:  # fmt: skip
        """A token of each request."""
        from fivefold.kernels.packed_decode import triton as attention
        from fivefold.kernels.paged_pack import triton as kernel

        form, tables = self.pages.form, step.tables
        count, heads, dim = query.shape
        kv_heads = key.shape[1]
        rows = count * kv_heads
        kernel.step(form, key, value, packed, exact, step.lengths[:count], step.exact_slots[:count], self.peak)
        pages = schedule.Packed(tables.packed[:rows], form, base=packed.place.base)
        recent = schedule.Exact(tables.exact[:rows], self.pages.dtype, base=exact.place.base)
        shape = rows, heads // kv_heads, dim
        attention.decode(
            query.reshape(shape).contiguous(), scale, tables.spans[:rows], pages, recent, starts=tables.starts,
            programs=tables.programs, out=output.view(shape),
        )  # fmt: skip

    def prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, packed: Blocks,
        exact: Blocks, step: Any, impl: Any,
    ) -> None:  # fmt: skip
        """Chunks of prompts, whose groups are packed. What is there exactly is read before it is written over: it may
        be the same blocks."""
        from fivefold.kernels.paged_pack import triton as kernel

        if not self._warm:  # compiled while vLLM warms up, not behind the first long prompt
            self._warm, nothing = True, key.new_empty((2, PAGE, *key.shape[1:]))
            kernel.gather(self.pages.form, packed, exact, 0, 0, PAGE, PAGE, nothing[0], nothing[1])
        plan, attend = step.plan, self._attention(impl.scale, query.shape[2])
        for run in plan.runs:
            at = slice(run.first, run.last)
            sizes = run.ends, run.ends, run.longest, run.longest
            attend(query[at], key[at], value[at], *sizes, causal=True, out=output[at])
        for one, ends, pieces in plan.more:
            at = slice(one.first, one.last)
            self._behind(attend, query[at], key[at], value[at], output[at], packed, exact, one, ends, pieces)
        at = slice(step.prefills[0].first, step.prefills[-1].last)
        kernel.store(key[at], value[at], exact, step.exact_slots[at])

    def _behind(
        self, attend: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
        packed: Blocks, exact: Blocks, one: Any, ends: torch.Tensor, pieces: list[torch.Tensor],
    ) -> None:  # fmt: skip
        """A chunk behind `one.known` tokens: over pieces of those, and over the last of them and itself."""
        from fivefold.kernels.paged_pack import triton as kernel

        form, start = self.pages.form, self.pages.packed(one.known)
        new = len(query)
        both = key.new_empty((2, min(PIECE, one.known) + new, *key.shape[1:]))
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        for number, ends_of in enumerate(pieces):
            first, last = number * PIECE, min(one.known, (number + 1) * PIECE)
            count, final = last - first, number == len(pieces) - 1
            kernel.gather(form, packed, exact, one.number, first, last, start, both[0], both[1])
            if final:
                both[0, count : count + new], both[1, count : count + new] = key, value
                count += new
            sizes = ends, ends_of, new, count
            part = attend(query, both[0, :count], both[1, :count], *sizes, causal=final, lse=True)
            found = part if found is None else attend.merge(*found, *part)
        assert found is not None
        output.copy_(found[0])

    def _plan(self, step: Any) -> Plan:
        """One copy to the device, which nobody waits for."""
        tokens = self.pages.form.tokens
        numbers: list[int] = []
        parts: list[tuple[int, int]] = []

        def keep(values: list[int]) -> int:
            parts.append((len(numbers), len(numbers) + len(values)))
            numbers.extend(values)
            return len(parts) - 1

        runs: list[tuple[int, int, int, int]] = []
        more: list[tuple[Any, int, list[int]]] = []
        waiting: list[Any] = []

        def close() -> None:
            if waiting:
                first = waiting[0].first
                ends = keep([0, *(one.last - first for one in waiting)])
                runs.append((first, waiting[-1].last, ends, max(one.last - one.first for one in waiting)))
                waiting.clear()

        pages: list[int] = []
        for one in step.prefills:
            new = one.last - one.first
            length = one.known + new
            if one.known == 0:
                waiting.append(one)
            else:
                close()
                pieces = [min(PIECE, one.known - first) for first in range(0, one.known, PIECE)]
                pieces[-1] += new
                more.append((one, keep([0, new]), [keep([0, size]) for size in pieces]))
            for page in range(one.known // tokens, -(-(length // PAGE * PAGE) // tokens)):
                pages += [one.number, page, one.first, one.known, length]
        close()
        listed = keep(pages)
        host = torch.tensor(numbers, dtype=torch.int32)
        host = host.pin_memory() if self.device.type == "cuda" else host
        device = host.to(self.device, non_blocking=True)

        def sent(part: int) -> torch.Tensor:
            return device[slice(*parts[part])]

        return Plan(
            [Run(first, last, sent(ends), longest) for first, last, ends, longest in runs],
            [(one, sent(ends), [sent(piece) for piece in pieces]) for one, ends, pieces in more],
            sent(listed).view(-1, 5),
        )


class Flash:
    """vLLM's FlashAttention over tokens `[tokens, heads, head_dim]`."""

    def __init__(self, scale: float, head_dim: int) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        self.scale, self.function = scale, flash_attn_varlen_func
        version = get_flash_attn_version(head_size=head_dim)
        self.more = {} if version is None else {"fa_version": version}

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, key_ends: torch.Tensor,
        longest: int, key_longest: int, causal: bool, out: torch.Tensor | None = None, lse: bool = False,
    ) -> Any:  # fmt: skip
        return self.function(
            q=query, k=key, v=value, cu_seqlens_q=ends, cu_seqlens_k=key_ends, max_seqlen_q=longest,
            max_seqlen_k=key_longest, softmax_scale=self.scale, causal=causal, out=out, return_softmax_lse=lse,
            **self.more,
        )  # fmt: skip

    @staticmethod
    def merge(
        out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Two parts of the same queries; lse: `[heads, tokens]`."""
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        both, both_lse = torch.empty_like(out), torch.empty_like(lse)
        merge_attn_states(both, out, lse, other, other_lse, both_lse)
        return both, both_lse
