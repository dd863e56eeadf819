"""Numbers of bytes, as people write them."""

from __future__ import annotations

import re

from fivefold.errors import InputError


def parse_bytes(size: int | str | None, name: str = "max_bytes") -> int | None:
    """A number of bytes from 1 on: 1000000, "512M", "1.5GiB", "2GB" (K, M, G, T are powers of 1024). name: whose size
    it is, for `InputError`."""
    if size is None:
        return None
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,18}(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?|B)?", size.strip(), re.IGNORECASE | re.ASCII)
        if match is None:
            raise InputError(f"{name} {size!r} is no size: write a number of bytes, or 512M, or 2G.")
        number = float(match[1]) * 1024 ** " KMGT".index((match[2] or " ").upper())
    elif isinstance(size, bool) or not isinstance(size, int | float):
        raise InputError(f"{name}={size!r} is no size: give a number of bytes, or a text such as '2GB'.")
    else:
        number = size
    if not 1 <= number < float("inf"):
        raise InputError(f"{name}={size} leaves no room for a cache: give a positive number of bytes.")
    return int(number)
