"""Softmax attention as a union: each tier is attended on its own, and log-sum-exp merges them."""

from fivefold.attention.decode import attend_picked, attend_step, pick
from fivefold.attention.observe import attend_observed
from fivefold.attention.prefill import attend_chunk

__all__ = ["attend_chunk", "attend_observed", "attend_picked", "attend_step", "pick"]
