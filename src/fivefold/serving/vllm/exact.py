"""The exact tokens of a layer: a companion layer, whose blocks vLLM allocates and frees beside the packed ones.

It holds the residual and the group that is not complete: a window. vLLM's own sliding window would give blocks to every
token of a chunk, of which a window is left when it has been computed; `ExactManager` gives none to the others (their
places in the table are the null block, into which their keys and values go to be forgotten), and none to what a prefix
hit brought, which is read packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from fivefold.serving.vllm.options import PAGE, Pages


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Pages of 32 exact tokens, a state each: `[32, head_dim]` keys, then values. group, residual: of the recipe."""

    group: int
    residual: int

    @classmethod
    def of(cls, pages: Pages, kv_heads: int) -> ExactSpec:
        # int8: with dtypes of two kinds vLLM would zero new blocks.
        return cls(
            block_size=PAGE * pages.exact_together, num_kv_heads=kv_heads, head_size=pages.form.head_dim,
            dtype=torch.int8, sliding_window=pages.window, tokens_per_state=PAGE,
            state_content_bytes=pages.exact_bytes, group=pages.form.group, residual=pages.residual,
        )  # fmt: skip

    @property
    def kind(self) -> str:
        """Of `backend.Shared.offer`."""
        return "exact"

    @property
    def prefix_cacheable(self) -> bool:
        return False

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Those of a window, however large chunks are: what begins in the window ends with it, and what a step no
        longer reads, the next one's tokens go to."""
        blocks = -(-min(self.sliding_window, max_model_len) // self.block_size)
        return blocks + (self.block_size > PAGE)  # larger ones may begin before the window does

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        blocks = self.max_admission_blocks_per_request(0, vllm_config.model_config.max_model_len)
        return blocks * self.page_size_bytes


class ExactManager(SlidingWindowManager):
    """Blocks for what the next step reads exactly, and no others.

    New tokens take over blocks that are not needed any more, also while steps before are still under way: a device does
    one step after the other. A chunk takes those that it reads itself, too, since it reads before it writes
    (`Path.forward`); a decoding step, which writes first, only those that it does not read.
    """

    sinks: int = 0
    """So many blocks of a request are for good."""

    def __init__(self, kv_cache_spec: ExactSpec, **settings: Any) -> None:
        super().__init__(kv_cache_spec, **settings)
        self.spec = kv_cache_spec
        self._tokens: dict[str, int] = {}
        """Of each request, when blocks were last allocated."""
        self._live: dict[str, list[int]] = {}
        """Places of its table that have blocks."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens that are read packed by whatever comes behind so many."""
        spec = self.spec
        return max(0, num_computed_tokens - spec.residual) // spec.group * spec.group

    def reach(self, num_tokens: int) -> int:
        """Of so many tokens, how many may have a block."""
        return num_tokens

    def _spare(self, request: str, num_tokens: int, known: int) -> list[int]:
        """Places of blocks that the tokens behind `known` can take over, up to `num_tokens`."""
        keep = self.get_num_skipped_tokens(num_tokens if num_tokens - known > 1 else known) // self.block_size
        return [place for place in self._live.get(request, ()) if self.sinks <= place < keep]

    def _wanted(self, first: int, num_tokens: int) -> tuple[int, list[int]]:
        """How many places a table has then, and which, from the `first` on, get blocks."""
        size = self.block_size
        keep, last = self.get_num_skipped_tokens(num_tokens) // size, -(-self.reach(num_tokens) // size)
        return last, [*range(first, min(self.sinks, last)), *range(max(first, self.sinks, keep), last)]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        **settings: Any,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ())) or total_computed_tokens // self.block_size
        known = self._tokens.get(request_id, total_computed_tokens)
        _, wanted = self._wanted(held, num_tokens)
        return max(0, len(wanted) - len(self._spare(request_id, num_tokens, known)))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        tokens = num_local_computed_tokens + num_external_computed_tokens
        self._tokens[request_id] = tokens
        self.num_cached_block[request_id] = 0
        self.req_to_blocks[request_id].extend([self._null_block] * (tokens // self.block_size))

    def allocate_external_computed_blocks(self, *args: Any, **settings: Any) -> None:
        pass

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        blocks, live = self.req_to_blocks[request_id], self._live.setdefault(request_id, [])
        known = self._tokens.get(request_id, 0)
        self._tokens[request_id] = max(known, num_tokens)
        first = len(blocks)
        last, wanted = self._wanted(first, num_tokens)
        if last <= first:
            return []
        spare = self._spare(request_id, num_tokens, known)[: len(wanted)]
        taken = []
        for place in spare:
            taken.append(blocks[place])
            blocks[place] = self._null_block
        taken += self.block_pool.get_new_blocks(len(wanted) - len(taken))
        blocks.extend([self._null_block] * (last - first))
        for place, block in zip(wanted, taken, strict=True):
            blocks[place] = block
        self._live[request_id] = [place for place in live if place not in spare] + wanted
        return blocks[first:]

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, *args: Any, **settings: Any
    ) -> None:
        live = self._live.get(request_id)
        if not live:
            return
        keep = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        gone = [place for place in live if self.sinks <= place < keep]
        if gone:
            blocks = self.req_to_blocks[request_id]
            self.block_pool.free_blocks([blocks[place] for place in reversed(gone)])
            for place in gone:
                blocks[place] = self._null_block
            self._live[request_id] = [place for place in live if place not in gone]

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._tokens.pop(request_id, None)
        self._live.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, *args: Any, **settings: Any) -> None:
        pass

    @classmethod
    def find_longest_cache_hit(cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any,
                               **settings: Any) -> Any:  # fmt: skip
        return tuple([] for _ in kv_cache_group_ids), 0


# Here, where whoever unpickles a spec comes by: with tensor parallel vLLM's scheduler is in a process that builds no
# layer, and would take a sliding window's manager. vLLM's registry fills itself only while it is empty.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(ExactSpec, ExactManager)


class ExactBackend(AttentionBackend):
    """Of the companion layers, which hold pages and attend to nothing. Its builder is the packed layers' own."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("a companion layer attends to nothing")

    @staticmethod
    def get_builder_cls() -> Any:
        from fivefold.serving.vllm.backend import Builder

        return Builder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]


class Exact(torch.nn.Module, AttentionLayerBase):
    """The companion of a layer. `shared` is what all layers of a model have in common (`backend.Shared`)."""

    def __init__(self, shared: Any, spec: ExactSpec) -> None:
        super().__init__()
        self.shared, self.spec = shared, spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> Any:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> ExactSpec:
        return self.spec
