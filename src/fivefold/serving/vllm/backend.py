"""The attention backend that vLLM calls: its blocks are Fivefold's packed pages (see `options.Pages`).

`Impl` is a layer, `Builder` makes the metadata of a step (`tables.Step`), once for all layers, and a `Path` computes:
`cpu.py` on a CPU, `cuda.py` on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from fivefold.errors import RecipeError, UnsupportedModelError
from fivefold.serving.vllm import codecs_for, facts_of
from fivefold.serving.vllm.exact import Exact, ExactSpec
from fivefold.serving.vllm.options import NO_RECIPE, RECIPE, Options, Pages, recipe_text
from fivefold.serving.vllm.rotated_cpu import RotatedPath
from fivefold.serving.vllm.streaming import StreamingCpuPath, StreamingPages, StreamingTables, split
from fivefold.serving.vllm.tables import Place, Prefill, Step, Tables
from fivefold.serving.vllm.windows import PackedWindowSpec, WindowSpec


def options_of(vllm_config: Any) -> Options:
    """The recipe that vLLM was started with. Raises `RecipeError` if there is none."""
    text = recipe_text(vllm_config.additional_config, os.environ.get(RECIPE))
    if text is None:
        raise RecipeError(NO_RECIPE)
    return Options.parse(text)


_served: dict[int, tuple[Pages, int]] = {}
"""Pages and KV heads of packed layers by head_dim, of the model that was built last: `customize_spec` is told neither
the layer nor a configuration."""


class Path(Protocol):
    """What computes a layer."""

    def prepare(self, step: Step) -> None:
        """Before the layers of a step, outside of a graph."""
        ...

    def forward(
        self, shared: Shared, impl: Impl | Part, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        packed: torch.Tensor, exact: torch.Tensor, step: Step, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Store the new tokens and attend.

        query, output: `[tokens, heads, head_dim]`; key, value: `[tokens, kv_heads, head_dim]`; packed, exact: int8
        `[blocks, kv_heads, pages, bytes]`, the layer's blocks. The exact pages of earlier tokens are read before those
        of a prefill's are written: they may be the same.
        """
        ...


@dataclass
class Shared:
    """What the layers of a model have in common. Both groups' builders `offer` a step's block table; `step` is the last
    one. Streaming heads (`duo`) have one of their own."""

    pages: Pages
    kv_heads: int
    tables: Tables | None = None
    packed_place: Place | None = None
    exact_place: Place | None = None
    path: Path | None = None
    step: Step | None = None
    _offers: dict[str, tuple[Any, Step]] = field(default_factory=dict)

    def start(self, vllm_config: Any, device: torch.device) -> None:
        """Make tables and choose the path. May be called again."""
        if self.tables is not None:
            return
        requests, tokens = vllm_config.scheduler_config.max_num_seqs, vllm_config.model_config.max_model_len
        if device.type == "cpu":
            from fivefold.serving.vllm.cpu import CpuPath

            if isinstance(self.pages, StreamingPages):
                self.tables = StreamingTables(self.pages, self.kv_heads, requests, tokens, device)
                self.path = StreamingCpuPath(self.pages)
                return
            self.tables = Tables(self.pages, self.kv_heads, requests, tokens, device)
            codecs = codecs_for(options_of(vllm_config), vllm_config)
            self.path = CpuPath(self.pages) if codecs is None else RotatedPath(self.pages, codecs)
        else:
            from fivefold.serving.vllm.cuda import CudaPath, CudaTables

            model = vllm_config.model_config
            shared_by = model.get_num_attention_heads(vllm_config.parallel_config) // self.kv_heads
            self.tables = CudaTables(self.pages, self.kv_heads, requests, tokens, device, shared_by)
            self.path = CudaPath(self.pages, device)

    def offer(self, kind: str, metadata: Any, layers: dict[str, Any], name: str) -> Step:
        """A group's part of a step; the step is complete when both have come."""
        if kind == "packed":
            self.packed_place = Place.of(layers[name].kv_cache)
        if kind == "exact":
            self.exact_place = Place.of(layers[name].kv_cache)
        other = self._offers.pop("exact" if kind == "packed" else "packed", None)
        if other is None:
            assert self.tables is not None
            table = metadata.block_table_tensor
            step = Step(self.tables, 0, 0, 0, False, [], table, table, metadata.slot_mapping)
            self._offers[kind] = metadata, step
            return step
        packed, exact = (metadata, other[0]) if kind == "packed" else (other[0], metadata)
        self._fill(other[1], packed, exact)
        return other[1]

    def _fill(self, step: Step, packed: Any, exact: Any) -> None:
        assert self.tables is not None and self.packed_place is not None and self.exact_place is not None
        step.packed_blocks, step.exact_blocks = packed.block_table_tensor, exact.block_table_tensor
        step.exact_slots, step.tokens = exact.slot_mapping, packed.num_actual_tokens
        count = packed.num_reqs
        starts = packed.query_start_loc_cpu[: count + 1].tolist()
        new = [last - first for first, last in pairwise(starts)]
        step.decodes = decodes = next((i for i, n in enumerate(new) if n > 1), count)
        if decodes < count or packed.seq_lens.device.type == "cpu":
            lengths = _lengths(packed)
        else:
            lengths = [packed.max_seq_len] * count  # a graph's step: nothing waits for the host
        step.longest = max(lengths[:decodes], default=0)
        step.completes = packed.seq_lens.device.type != "cpu" or any(map(self.pages.completes, lengths[:decodes]))
        step.prefills = [
            Prefill(i, starts[i], starts[i + 1], lengths[i] - new[i]) for i in range(decodes, count) if new[i]
        ]
        if decodes:
            self.tables.fill(
                self.packed_place, self.exact_place, step.packed_blocks[:decodes], step.exact_blocks[:decodes],
                packed.seq_lens[:decodes], step.longest,
            )  # fmt: skip
        step.lengths = packed.seq_lens
        assert self.path is not None
        self.step = step
        self.path.prepare(step)


def _lengths(metadata: Any) -> list[int]:
    """Tokens of each request, new ones included, as the host knows them: exact for a prefill."""
    known = metadata.seq_lens if metadata.seq_lens.device.type == "cpu" else metadata.seq_lens_cpu_upper_bound
    return list(map(int, known.tolist()))


class Builder(AttentionMetadataBuilder):
    """Makes the metadata of a step, of packed layers or of their companions."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        self.kind = kv_cache_spec.kind if isinstance(kv_cache_spec, ExactSpec) else "packed"
        self.layers = vllm_config.compilation_config.static_forward_context
        layer = self.layers[layer_names[0]]
        self.shared: Shared = layer.shared if isinstance(layer, Exact) else layer.impl.exact.shared
        self.shared.start(vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Step:
        return self.shared.offer(self.kind, common_attn_metadata, self.layers, self.layer_names[0])


class KiviBackend(AttentionBackend):
    """Fivefold's `kivi` pages as vLLM's blocks."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> Any:
        return Impl

    @staticmethod
    def get_builder_cls() -> Any:
        return Builder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # a block is [heads, pages, bytes], as Fivefold's pages are of one head each

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if isinstance(spec, ExactSpec) or spec.state_content_bytes is not None:
            return spec
        if not isinstance(spec, FullAttentionSpec):
            raise UnsupportedModelError(
                f"layers of the kind {type(spec).__name__} are not served: serve it without a recipe."
            )
        pages, kv_heads = _served[spec.head_size]
        return replace(
            spec, num_kv_heads=kv_heads, block_size=pages.block, dtype=torch.int8, tokens_per_state=pages.form.tokens,
            state_content_bytes=pages.form.nbytes,
        )  # fmt: skip


class Part:
    """Some KV heads of a layer, and their query heads: what a `Path` takes as a layer."""

    def __init__(self, heads: Sequence[int], shared_by: int, scale: float) -> None:
        self.num_kv_heads, self.scale = len(heads), scale
        self.heads = torch.tensor(heads)
        self.queries = (self.heads[:, None] * shared_by + torch.arange(shared_by)).flatten()


class Impl(AttentionImpl):
    """A layer's attention. With `duo`, parts: its retrieval heads, and its streaming heads, which `exact`, and `packed`
    and `window`, belong to."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **settings: Any,
    ) -> None:
        config = get_current_vllm_config()
        options = options_of(config)
        what = {
            "ALiBi": alibi_slopes, "a sliding window": sliding_window, "capped scores": logits_soft_cap,
            "shared KV layers": kv_sharing_target_layer_name, **settings,
        }  # fmt: skip
        for name, value in what.items():
            if value:
                raise UnsupportedModelError(
                    f"{config.model_config.model} has {name}, which {options.recipe} does not serve inside vLLM: "
                    "serve it without a recipe."
                )
        if str(getattr(attn_type, "value", attn_type)) != "decoder":
            raise UnsupportedModelError(
                f"{config.model_config.model} has attention of the type {attn_type}, which {options.recipe} does not "
                "serve inside vLLM: serve it without a recipe."
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        layers = config.compilation_config.static_forward_context
        self.number = number = sum(name.startswith("fivefold.") and name.endswith(".exact") for name in layers)
        pages, kv_heads = options.pages(head_size, config.model_config.dtype), self.num_kv_heads
        self.parts: list[Part] = []
        if options.duo is not None:
            retrieval = options.retrieval(facts_of(config))[number]
            streaming = [head for head in range(kv_heads) if head not in retrieval]
            shared_by = num_heads // kv_heads
            self.parts = [Part(heads, shared_by, self.scale) for heads in (retrieval, streaming)]
            pages, windows = split(pages, len(retrieval), len(streaming), options.duo.sink, options.duo.recent)
            kv_heads = len(retrieval)

        def companion(name: str, pages: Pages, kv_heads: int, spec: type[ExactSpec], shared: Shared | None) -> Exact:
            """Of this layer; shared: with which of its companions."""
            if shared is None and number:
                shared = layers[f"fivefold.layers.0.{name}"].shared
            shared = shared or Shared(pages, kv_heads)
            if (shared.pages, shared.kv_heads) != (pages, kv_heads):
                raise UnsupportedModelError(
                    f"{config.model_config.model} has layers of different shapes, which {options.recipe} does not "
                    "serve inside vLLM: serve it without a recipe."
                )
            made = layers[f"fivefold.layers.{number}.{name}"] = Exact(shared, spec.of(pages, kv_heads))
            return made

        _served[head_size] = pages, kv_heads
        self.exact = companion("exact", pages, kv_heads, ExactSpec, None)
        if self.parts:
            self.window = companion("window", windows, len(streaming), WindowSpec, None)
            self.packed = companion("packed", windows, len(streaming), PackedWindowSpec, self.window.shared)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Step | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        shared = self.exact.shared
        out = output.view(-1, self.num_heads, self.head_size)
        if not self.parts:
            shared.path.forward(shared, self, query, key, value, kv_cache, self.exact.kv_cache, attn_metadata, out)
            return output
        caches = (kv_cache, self.exact.kv_cache), (self.packed.kv_cache, self.window.kv_cache)
        for part, of, mine in zip(self.parts, (shared, self.window.shared), caches):
            made = out[:, part.queries]
            new = query[:, part.queries], key[:, part.heads], value[:, part.heads]
            of.path.forward(of, part, *new, *mine, of.step, made)
            out[:, part.queries] = made
        return output
