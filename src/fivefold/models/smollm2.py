"""The embedded model under its name: `smollm2.load()`, `smollm2.fetch()` (see `fivefold.models.embedded`)."""

from fivefold.models.embedded import fetch, is_fetched, load

__all__ = ["fetch", "is_fetched", "load"]
