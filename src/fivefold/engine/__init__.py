"""One cache at work: all of its layers and sequences, a forward at a time. Nothing here knows transformers."""

from fivefold.engine.session import Companions, Session

__all__ = ["Companions", "Session"]
