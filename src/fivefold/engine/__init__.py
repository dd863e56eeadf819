"""One cache at work: all of its layers and sequences, a forward at a time. Nothing here knows transformers."""

from fivefold.engine.companions import Companions
from fivefold.engine.session import Session

__all__ = ["Companions", "Session"]
