"""Generating for many requests at once: continuous batching over one compressed cache."""

from fivefold.engine.prefix import PrefixStatistics, PrefixStore
from fivefold.generation.batch import Handle
from fivefold.generation.many import generate_many
from fivefold.generation.request import Cancel, Request, Result
from fivefold.generation.scheduler import Event, Scheduler

__all__ = [
    "Cancel", "Event", "Handle", "PrefixStatistics", "PrefixStore", "Request", "Result", "Scheduler", "generate_many",
]  # fmt: skip
