"""What a method is, and what it may ask of the engine.

A method is a frozen dataclass registered with `@register`. Methods of the slots *heads* and *tokens* say what each
KV head holds (`extents`); methods of the slots *bits* and *channels* bring a `Codec` (`codec`). The engine hands
them a `LayerSpec` and, later, tensors; they never see the model.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch

from fivefold.calibrate.learner import Capture, Learner, Subject, Work
from fivefold.calibrate.profile import Profile, load_profile
from fivefold.errors import ProfileError, RecipeError
from fivefold.store.codec import Codec, PairCodec
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec

Slot = Literal["layers", "heads", "tokens", "channels", "bits", "reads"]
SLOTS: tuple[Slot, ...] = ("layers", "heads", "tokens", "channels", "bits", "reads")
LARGEST = 2**31 - 1
"""The largest number in a recipe: positions are int32."""


def param(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    by_layer: bool = False,
    exact: Any = None,
) -> Any:
    """A parameter of a method: its default, one line of help, and what values are legal (bounds included).

    by_layer: whether a recipe may also give a list, one value for each layer of the model; the field is declared with
    the type of one value, and what the engine works with (`Method.of_layer`) has that. exact: a value that such a list
    may have besides, for a layer that the method leaves alone.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "by_layer": by_layer, "exact": exact}
    return dataclasses.field(default=default, metadata=metadata)


class Method:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are made with `param`."""

    name: ClassVar[str]
    slot: ClassVar[Slot]
    paper: ClassVar[str]
    captures: ClassVar[tuple[Capture, ...]] = ()
    """What it learns from a model beforehand (`fivefold calibrate`); nothing if it has no use for a profile."""
    before_rope: ClassVar[bool] = True
    """Whether its codec may ask how keys are turned by position (`LayerSpec.rope`), which costs a look at the model."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for part in dataclasses.fields(self):  # type: ignore[arg-type]
            value, hint = getattr(self, part.name), hints[part.name]
            if part.metadata.get("by_layer") and isinstance(value, list | tuple):
                value = tuple(self._legal(part, hint, one, f" in layer {i}") for i, one in enumerate(value))
                if not value:
                    raise RecipeError(f"{self.name}({part.name}=[]) is empty: give one value for each layer.")
            else:
                value = self._legal(part, hint, value)
            object.__setattr__(self, part.name, value)
        lists = self.by_layer()
        if len({len(values) for values in lists.values()}) > 1:
            told = " and ".join(f"{len(values)} values of {name}" for name, values in lists.items())
            raise RecipeError(f"{self.name}() has {told}: give each one value for each layer of the model.")
        for values in dict.fromkeys(zip(*lists.values())):
            dataclasses.replace(self, **dict(zip(lists, self._within(lists, values))))  # type: ignore[type-var]
        if not lists:
            self.check()

    def _legal(self, part: dataclasses.Field[Any], hint: Any, value: Any, where: str = "") -> Any:
        """One value of a parameter as its declared type. Raises `RecipeError`. where: which of a list it is."""
        choices, low, high, exact = (part.metadata.get(key) for key in ("choices", "low", "high", "exact"))
        if where and exact is not None and value == exact:
            return exact
        value = _coerce(self.name, part.name, value, hint, where)
        if choices is not None and value not in choices:
            more = f", or {exact} for a layer that stays exact" if where and exact is not None else ""
            raise RecipeError(
                f"{self.name}({part.name}={value!r}){where} is not possible: use one of "
                f"{', '.join(map(str, choices))}{more}."
            )
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and abs(value) > LARGEST:
            raise RecipeError(f"{self.name}({part.name}={value!r}){where} is out of range: use at most {LARGEST}.")
        if number and ((low is not None and value < low) or (high is not None and value > high)):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise RecipeError(f"{self.name}({part.name}={value!r}){where} is out of range: use {bounds}.")
        return value

    def by_layer(self) -> dict[str, tuple[Any, ...]]:
        """The parameters that have a value for each layer, by name."""
        return {
            part.name: getattr(self, part.name)
            for part in dataclasses.fields(self)  # type: ignore[arg-type]
            if part.metadata.get("by_layer") and isinstance(getattr(self, part.name), tuple)
        }

    def _within(self, lists: dict[str, tuple[Any, ...]], values: Sequence[Any]) -> list[Any]:
        """Values of one layer; of one that stays exact, the default of what says so, which nobody asks for."""
        parts = {part.name: part for part in dataclasses.fields(self)}  # type: ignore[arg-type]
        return [
            parts[name].default if value is not None and value == parts[name].metadata["exact"] else value
            for name, value in zip(lists, values)
        ]

    def of_layer(self, spec: LayerSpec) -> tuple[Method, ...]:
        """What the method comes to in a layer: itself, with that layer's values where it has some by layer; nothing
        where it leaves the layer exact. Raises `RecipeError` if the model has another number of layers.

        What it then brings (`extents`, `codec`, `exact_tokens`, a policy) is asked of that alone.
        """
        lists = self.by_layer()
        if not lists:
            return (self,)
        name, values = next(iter(lists.items()))
        if len(values) != spec.layers:
            raise RecipeError(
                f"{self.name}({name}=...) has {len(values)} values and the model {spec.layers} layers: give one value "
                "for each layer, in the model's order, or one number for all."
            )
        mine = [values[spec.layer] for values in lists.values()]
        if self._within(lists, mine) != mine:
            return ()
        return (dataclasses.replace(self, **dict(zip(lists, mine))),)  # type: ignore[type-var]

    def check(self) -> None:
        """Raise `RecipeError` if the parameters do not fit together."""

    def excludes(self, other: Method) -> str | None:
        """One sentence saying why this method cannot be combined with `other`, or None if it can."""
        return None

    @property
    def by_step(self) -> bool:
        """Whether a decoding step does something else than a chunk, so that only steps show what it costs."""
        return False

    # -- what a method may bring --------------------------------------------------------------------------

    def extents(self, spec: LayerSpec) -> list[Extent] | None:
        """What each KV head of a layer holds (length `spec.kv_heads`); None if the method leaves that alone."""
        return None

    def absent(self, specs: Sequence[LayerSpec]) -> frozenset[int]:
        """The layers whose attention is left out altogether. specs: those that could be compressed."""
        return frozenset()

    def codec(self, spec: LayerSpec) -> Codec | None:
        """How old tokens of a layer are packed; None if the method leaves them exact."""
        return None

    @property
    def exact_tokens(self) -> int:
        """With a codec: how many of the most recent tokens always stay exact (the residual)."""
        return 0

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        """With `captures`: what takes them in and makes a profile. specs: the layers that are compressed."""
        raise NotImplementedError

    def work(self, subject: Subject) -> Work | None:
        """How it learns from a model if not by reading with `captures`: training, or measuring."""
        return None

    @classmethod
    def learns(cls) -> bool:
        """Whether it learns from a model."""
        return bool(cls.captures) or cls.work is not Method.work

    def profile_for(
        self, spec: LayerSpec, given: str | None, missing: str, blank: Callable[[], dict[str, Any]]
    ) -> Profile:
        """The profile in the folder `given`, or the one that ships for the model of a layer. Raises `ProfileError`,
        where none ships with the sentence `missing`.

        blank: settings, and tensors by name, of one that says nothing: for a cache that is only planned (its layers are
        on the meta device), whose bytes do not depend on what was learned.
        """
        try:
            return load_profile(given or f"{self.name}-{spec.model}", self.name, spec.model, spec.config)
        except ProfileError as error:
            if given:
                raise
            if spec.device.type == "meta":
                found = blank()
                tensors = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
                settings = {name: x for name, x in found.items() if name not in tensors}
                return Profile(self.name, spec.model, settings, tensors)
            raise ProfileError(missing) from error

    def __str__(self) -> str:
        """As in a recipe: the parameters that were written there, and those that differ from their default."""
        written = getattr(self, "_written", ())
        shown = [
            f"{part.name}={_show(getattr(self, part.name))}"
            for part in dataclasses.fields(self)  # type: ignore[arg-type]
            if part.name in written or getattr(self, part.name) != part.default
        ]
        return f"{self.name}({', '.join(shown)})"


class ReadPolicy(Method):
    """A method that lets most layers read only some of the tokens in a decoding step. Nothing is given up."""

    top: int
    """How many tokens of each KV head are read."""
    sink: int = 0
    """How many of the first tokens are picked whatever their attention."""
    recent: int = 0
    """The same of the last tokens."""
    by_step = True

    def check(self) -> None:
        if self.sink + self.recent > self.top:
            raise RecipeError(
                f"{self.name}(top={self.top}) has no room for {self.sink} first and {self.recent} recent tokens: use a "
                "larger top, or a smaller sink and recent."
            )

    def within(self, parameter: str, layers: Sequence[int], specs: Sequence[LayerSpec]) -> tuple[int, ...]:
        """Layers that a parameter names, counted among `specs`. Raises `RecipeError` where there is no such layer."""
        for layer in layers:
            if layer >= len(specs):
                raise RecipeError(
                    f"{self.name}({parameter}=...) names layer {layer}, and the model has {len(specs)} with the whole "
                    "context, counted from 0."
                )
        return tuple(layers)

    def roles(self, specs: Sequence[LayerSpec]) -> list[Literal["full", "select", "sparse"]]:
        """What each of the layers that hold the whole context does: read everything, read everything and pick, or read
        what was picked last."""
        raise NotImplementedError

    def nearest(self, specs: Sequence[LayerSpec]) -> dict[int, list[list[int]]]:
        """By sparse layer, counted among `specs`: for each KV head, the heads of the layer that picked whose tokens it
        may read, the best first. A layer that is not named reads what the head of the same number picked."""
        return {}


class PairMethod(Method):
    """A method that lets two adjacent layers share what a page holds."""

    def layer_pairs(self, specs: Sequence[LayerSpec]) -> list[tuple[int, int]]:
        """Which layers of the model share pages, by index, each in one pair at most. specs: those that may."""
        raise NotImplementedError

    def pair_codec(self, spec: LayerSpec, layers: tuple[int, int], inner: Codec | None) -> PairCodec:
        """How one of two layers packs; inner: how it would without this method, None if it would not. What stays exact
        is the larger one of both methods' exact tokens."""
        raise NotImplementedError


def channels_of(method: Method, group: int, head_dim: int) -> int:
    """How many channels of a head share a scale where `group` were asked for: as many if they divide the head, else the
    largest part of `group` that does. Raises `RecipeError` if that is less than 8."""
    channels = head_dim if head_dim <= group else math.gcd(group, head_dim)
    if channels < min(8, head_dim):
        raise RecipeError(
            f"{method.name} cannot group the channels of heads of {head_dim}: a head_dim must be a multiple of 8."
        )
    return channels


def _show(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return repr(value)


def _coerce(method: str, name: str, value: Any, hint: Any, where: str = "") -> Any:
    """`value` as the parameter's declared type, or `RecipeError`. An int will do for a float, a list for a tuple."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list | tuple):
        value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
    for option in options:
        kind = typing.get_origin(option) or option
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if value != value or value in (float("inf"), float("-inf")):
                break
            return float(value)
        if isinstance(value, kind) and not (isinstance(value, bool) and kind is int):
            return value
    names = " or ".join("nothing" if o is type(None) else _type_name(o) for o in options)
    raise RecipeError(f"{method}({name}={value!r}){where} is not possible: {name} must be {names}.")


def _type_name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    known = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", tuple: "a list"}
    return known.get(kind, str(kind))
