"""Softmax attention as a union: each tier is attended on its own, and log-sum-exp merges them."""

from fivefold.attention.decode import attend_step
from fivefold.attention.observe import observe_chunk
from fivefold.attention.prefill import attend_chunk

__all__ = ["attend_chunk", "attend_step", "observe_chunk"]
