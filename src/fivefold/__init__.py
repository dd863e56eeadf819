"""Fivefold: a KV cache that is smaller along all five of its axes: layers, heads, tokens, channels, bits.

`compress` gives a model's `generate` such a cache, a `fivefold.models.cache.FivefoldCache`; `generate_many` serves many
requests from one (`fivefold.generation` has the parts of it). What a cache holds is a `fivefold.report.Report`, what is
asked of it a `Recipe`, and whatever is refused one of `fivefold.errors`. A method of one's own is made with
`fivefold.methods`, of pages as `fivefold.store` has them; what it must learn from a model, with `fivefold.calibrate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fivefold.errors import FivefoldError, SlowPathWarning

if TYPE_CHECKING:
    from fivefold.api import compress, load_cache, restore
    from fivefold.engine.prefix import PrefixStore
    from fivefold.generation import Request, generate_many
    from fivefold.merging import convert
    from fivefold.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "FivefoldError", "PrefixStore", "Recipe", "Request", "SlowPathWarning", "__version__", "compress", "convert",
    "generate_many", "load_cache", "restore",
]  # fmt: skip

# These need torch, which takes seconds to import: it waits until one of them is asked for (PEP 562).
_HOMES = {
    "compress": "fivefold.api", "load_cache": "fivefold.api", "restore": "fivefold.api",
    "convert": "fivefold.merging", "Recipe": "fivefold.recipe",
    "PrefixStore": "fivefold.engine.prefix", "Request": "fivefold.generation", "generate_many": "fivefold.generation",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # What a user may want: the public names and the modules, not what this file imports.
    own = {name for name, value in globals().items() if getattr(value, "__name__", "") == f"{__name__}.{name}"}
    return sorted({*__all__, *own, *(name for name in globals() if name.startswith("__"))})
