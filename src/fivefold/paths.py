"""Where Fivefold keeps what it fetched or compiled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$FIVEFOLD_CACHE``, else ``$XDG_CACHE_HOME/fivefold``, else ``~/.cache/fivefold`` (not created)."""
    own = os.environ.get("FIVEFOLD_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(xdg) if xdg and Path(xdg).is_absolute() else Path("~/.cache").expanduser()
    return base / "fivefold"
