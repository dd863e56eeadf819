"""Tables that all caches of the process share: few, bounded, and counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Table(dict[Any, Any]):
    """What was made, by what it was made from. It is counted as long as somebody holds it."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def again(self, key: Any, most: int, make: Callable[[], T]) -> T:
        """What was made under this key, or makes it; the `most` latest are kept."""
        found = self.get(key)
        if found is None:
            found = self[key] = make()
            for old in list(self)[:-most]:
                self.pop(old, None)
        return found


_tables: weakref.WeakSet[Table] = weakref.WeakSet()


def table() -> Table:
    """A table that is counted."""
    made = Table()
    _tables.add(made)
    return made


def shared(most: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function of hashable arguments that makes a tensor, a tuple of them, or what has `tensors` by name: the `most`
    latest are kept."""

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        made = table()

        @wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> T:
            return made.again((args, tuple(sorted(kwargs.items()))), most, lambda: make(*args, **kwargs))

        return get

    return decorate


def tensors() -> list[torch.Tensor]:
    """All of them, and what they were made from."""
    made = [part for one in list(_tables) for pair in list(one.items()) for part in pair]
    return [x for one in made for x in _tensors(one)]


def nbytes() -> int:
    """Bytes of all of them."""
    return sum({x.untyped_storage().data_ptr(): x.nbytes for x in tensors()}.values())


def _tensors(made: Any) -> list[torch.Tensor]:
    if isinstance(made, torch.Tensor):
        return [made]
    parts = made if isinstance(made, tuple) else getattr(made, "tensors", {}).values()
    return [x for x in parts if isinstance(x, torch.Tensor)]
