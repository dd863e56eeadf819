"""StreamingLLM: attention sinks and a recent window, on every head."""

from __future__ import annotations

from dataclasses import dataclass

from fivefold.methods import Method, param, register
from fivefold.store import Extent, LayerSpec


@register(
    slot="tokens",
    name="streaming",
    paper="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024 (arXiv:2309.17453)",
)
@dataclass(frozen=True)
class Streaming(Method):
    """Every head holds the first `sink` tokens and the last `recent` ones, itself included (section 3.2).

    A query at position p attends to keys k <= p with `k < sink` or `k > p - recent`. Everything else is freed, page
    by page. Positions stay those of the text; the paper instead renumbers the cached tokens, which changes what the
    model computes only once the text is longer than it was trained for.

    Bytes per head: (sink + recent) tokens, rounded up to pages of 32.
    """

    sink: int = param(4, "first tokens that are never dropped", low=0)
    recent: int = param(1020, "most recent tokens that are held", low=1)

    def extents(self, spec: LayerSpec) -> list[Extent]:
        return [Extent(self.sink, self.recent)] * spec.kv_heads
