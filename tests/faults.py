"""Failures in the middle of what a store does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store.codec import Codec
from fivefold.store.pages import PagePool

POOL = ("allocate", "retain", "write_fields", "write_tokens", "put", "copy")
BEFORE = ("allocate", "retain", "take_over", "commit")
"""What fails before it has done anything; all others have done their work by then."""


class Fault(Exception):
    """On purpose."""


class Faults:
    """Makes a call of any pool, or of a codec's `encode`, raise `Fault`: the one with number `at`, counted from 1; at
    None calls are only counted.

    also: more that may fail, (class or module, name) each. error: what is raised.
    """

    def __init__(
        self,
        at: int | None = None,
        *codecs: type[Codec],
        also: Sequence[tuple[Any, str]] = (),
        error: type[Fault] = Fault,
    ) -> None:
        encoders = [kind for kind in codecs or (KiviCodec,) if "encode" in vars(kind)]
        self.owners: list[tuple[Any, str]] = [
            (next(kind for kind in PagePool.__mro__ if name in vars(kind)), name) for name in POOL
        ]
        self.owners += [(kind, "encode") for kind in encoders]
        self.owners += also
        self.at, self.error, self.count, self.raised = at, error, 0, ""
        self.before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Faults:
        for owner, name in self.owners:
            self.before.append((owner, name, vars(owner).get(name)))
            setattr(owner, name, self._failing(getattr(owner, name), name))
        return self

    def __exit__(self, *_: object) -> None:
        while self.before:
            owner, name, own = self.before.pop()
            if own is None:  # it is inherited
                delattr(owner, name)
            else:
                setattr(owner, name, own)

    def _failing(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            mine = self.count == self.at
            if mine and name in BEFORE:
                self._fail(name)
            out = real(*args, **kwargs)
            if mine:
                self._fail(name)
            return out

        return call

    def _fail(self, name: str) -> None:
        self.raised = name
        raise self.error(f"{name}, call {self.at}")
