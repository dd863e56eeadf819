"""The methods, one per file, in one package per slot. Importing this package registers them all.

A method from elsewhere registers itself when its module is imported; an installed package can be found without
an import by declaring its module under the entry point group `fivefold.methods`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from fivefold.errors import RecipeError
from fivefold.methods.method import SLOTS, Method, PairMethod, ReadPolicy, Slot, channels_of, param
from fivefold.methods.policy import DemotingPolicy, RecentPolicy, TokenPolicy, floor_param, keep_param
from fivefold.store.codec import FLOAT16_MAX, Codec, check_finite

__all__ = [
    "FLOAT16_MAX",
    "SLOTS",
    "Codec",
    "DemotingPolicy",
    "Method",
    "PairMethod",
    "ReadPolicy",
    "RecentPolicy",
    "Slot",
    "TokenPolicy",
    "channels_of",
    "check_finite",
    "find",
    "floor_param",
    "keep_param",
    "param",
    "register",
    "registered",
]

_methods: dict[str, type[Method]] = {}
_discovered = False
M = TypeVar("M", bound=type[Method])


def register(*, slot: Slot, name: str, paper: str) -> Callable[[M], M]:
    """Class decorator: makes a method known under `name` in `slot`. `paper` is its citation in a line."""
    if slot not in SLOTS:
        raise ValueError(f"unknown slot {slot!r}: use one of {', '.join(SLOTS)}")

    def add(cls: M) -> M:
        if "__dataclass_fields__" not in vars(cls):
            raise TypeError(f"{cls.__name__} is no dataclass: write @dataclass(frozen=True) below @register(...).")
        taken = _methods.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the method name {name!r} is taken by {taken.__module__}")
        cls.name, cls.slot, cls.paper = name, slot, paper
        _methods[name] = cls
        return cls

    return add


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True
    for slot in SLOTS:
        package = importlib.import_module(f"{__name__}.{slot}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group="fivefold.methods"):
        entry.load()


def registered() -> dict[str, type[Method]]:
    """Every known method by name, in the order of the slots."""
    _discover()
    return dict(sorted(_methods.items(), key=lambda item: (SLOTS.index(item[1].slot), item[0])))


def find(name: str) -> type[Method]:
    """The method called `name`. Raises `RecipeError` with the nearest name if there is none."""
    methods = registered()
    if name not in methods:
        near = difflib.get_close_matches(name.lower(), [*methods, "full"], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known are full, {', '.join(methods)}."
        raise RecipeError(f"there is no method {name!r}: {hint}")
    return methods[name]
