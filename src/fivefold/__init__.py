"""Fivefold: a KV cache that is smaller along all five of its axes: layers, heads, tokens, channels, bits."""

from fivefold.api import compress, restore
from fivefold.errors import FivefoldError
from fivefold.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["FivefoldError", "Recipe", "__version__", "compress", "restore"]
