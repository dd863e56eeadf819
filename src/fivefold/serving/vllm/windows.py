"""Blocks of `duo`'s streaming heads inside vLLM: companions of a layer, as `exact.py` has them. One holds what a window
reads packed, the other one sinks, for good, and what a window reads exactly (`streaming.StreamingPages`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from fivefold.serving.vllm.exact import ExactManager, ExactSpec
from fivefold.serving.vllm.options import PAGE
from fivefold.serving.vllm.streaming import StreamingPages

__all__ = ["PackedWindowSpec", "WindowSpec"]


@dataclass(frozen=True, kw_only=True)
class WindowSpec(ExactSpec):
    """Pages of 32 exact tokens: sinks and a window."""

    pages: StreamingPages

    @classmethod
    def of(cls, pages: StreamingPages, kv_heads: int) -> WindowSpec:  # type: ignore[override]
        size, tokens, nbytes = cls._page(pages)
        return cls(
            block_size=size, num_kv_heads=kv_heads, head_size=pages.form.head_dim, dtype=torch.int8,
            sliding_window=pages.recent, tokens_per_state=tokens, state_content_bytes=nbytes, group=PAGE,
            residual=pages.residual, pages=pages,
        )  # fmt: skip

    @staticmethod
    def _page(pages: StreamingPages) -> tuple[int, int, int]:
        """Tokens of a block, and tokens and bytes of a page."""
        return PAGE * pages.exact_together, PAGE, pages.exact_bytes

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return self.pages.exact_blocks(max_model_len)


@dataclass(frozen=True, kw_only=True)
class PackedWindowSpec(WindowSpec):
    """Packed pages of a window."""

    @property
    def kind(self) -> str:
        return "packed"

    @staticmethod
    def _page(pages: StreamingPages) -> tuple[int, int, int]:
        return pages.block, pages.form.tokens, pages.form.nbytes

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return self.pages.packed_blocks(max_model_len)


class WindowManager(ExactManager):
    """`ExactManager` of a window and sinks."""

    def __init__(self, kv_cache_spec: WindowSpec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self.pages = kv_cache_spec.pages
        self.sinks = -(-self.pages.pinned // self.block_size)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.pages.exact_from(num_computed_tokens)


class PackedWindowManager(WindowManager):
    """The same of what is packed, which gets a block when it is."""

    def __init__(self, kv_cache_spec: PackedWindowSpec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self.sinks = 0

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.pages.packed_from(num_computed_tokens)

    def reach(self, num_tokens: int) -> int:
        return self.pages.packed(num_tokens)


KVCacheSpecRegistry.register(WindowSpec, WindowManager)
KVCacheSpecRegistry.register(PackedWindowSpec, PackedWindowManager)
