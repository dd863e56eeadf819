"""Generating for many requests at once: continuous batching over one compressed cache."""

from fivefold.engine.prefix import PrefixStatistics, PrefixStore
from fivefold.generation.batch import Event, Handle
from fivefold.generation.conversations import Conversations
from fivefold.generation.many import generate_many
from fivefold.generation.request import Cancel, Request, Result
from fivefold.generation.scheduler import Scheduler

__all__ = [
    "Cancel", "Conversations", "Event", "Handle", "PrefixStatistics", "PrefixStore", "Request", "Result", "Scheduler",
    "generate_many",
]  # fmt: skip
