"""What a method is, and what it may ask of the engine.

A method is a frozen dataclass registered with `@register`. Methods of the slots *heads* and *tokens* say what each
KV head holds (`extents`); methods of the slots *bits* and *channels* bring a `Codec` (`codec`). The engine hands
them a `LayerSpec` and, later, tensors; they never see the model.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from fivefold.calibrate.learner import Capture, Learner
from fivefold.errors import NonFiniteError, RecipeError
from fivefold.kernels.packed_decode import Form
from fivefold.store.context import Context
from fivefold.store.held import Held
from fivefold.store.layer_cache import LayerSpec
from fivefold.store.pages import PageLayout
from fivefold.store.tiers import Extent

Slot = Literal["layers", "heads", "tokens", "channels", "bits", "reads"]
SLOTS: tuple[Slot, ...] = ("layers", "heads", "tokens", "channels", "bits", "reads")


def param(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Any:
    """A parameter of a method: its default, one line of help, and what values are legal (bounds included)."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


class Method:
    """Base of all methods. Subclasses are frozen dataclasses whose fields are made with `param`."""

    name: ClassVar[str]
    slot: ClassVar[Slot]
    paper: ClassVar[str]
    captures: ClassVar[tuple[Capture, ...]] = ()
    """What it learns from a model beforehand (`fivefold calibrate`); nothing if it has no use for a profile."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for part in dataclasses.fields(self):  # type: ignore[arg-type]
            value = _coerce(self.name, part.name, getattr(self, part.name), hints[part.name])
            object.__setattr__(self, part.name, value)
            choices, low, high = (part.metadata.get(key) for key in ("choices", "low", "high"))
            if choices is not None and value not in choices:
                raise RecipeError(
                    f"{self.name}({part.name}={value!r}) is not possible: use one of {', '.join(map(str, choices))}."
                )
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and ((low is not None and value < low) or (high is not None and value > high)):
                bounds = f"at least {low}" if high is None else f"{low} to {high}"
                raise RecipeError(f"{self.name}({part.name}={value!r}) is out of range: use {bounds}.")
        self.check()

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

    def __str__(self) -> str:
        """As in a recipe: the parameters that were written there, and those that differ from their default."""
        written = getattr(self, "_written", ())
        shown = [
            f"{part.name}={_show(getattr(self, part.name))}"
            for part in dataclasses.fields(self)  # type: ignore[arg-type]
            if part.name in written or getattr(self, part.name) != part.default
        ]
        return f"{self.name}({', '.join(shown)})"


class TokenPolicy(Method):
    """A method that chooses which tokens a KV head holds by the attention that they receive.

    Each row (one KV head of one sequence) holds `budget` tokens of its own choice. What is not chosen is freed, or
    merged into what stays; positions remain those of the text. Shapes: `[rows, slots]`, a slot being the place of a
    token (see `fivefold.store.held.Held`).
    """

    keep: float

    observes: int | None = None
    """How many of a chunk's newest queries it must see: None is all, 0 none."""
    accumulates: bool = True
    """Whether a chunk's statistics are added to those of earlier chunks; else they take their place."""
    watches: bool = True
    """Whether decoding steps are observed too."""
    trims: bool = True
    """Whether the budget is kept while generating; else everything generated is held."""
    waits: bool = False
    """Whether tokens go only when all layers have seen the chunk, because their budgets hang together (`shares`)."""

    demotes: bool = False
    """Whether what is not chosen is packed instead of given up; it then brings the codec, too."""
    high: int = 16
    """With `demotes`: bits of what is not packed; 16 is as the model made it."""

    by_step = True

    @property
    def evicts(self) -> bool:
        """Whether anything ever goes."""
        return self.keep < 1

    @property
    def chooses(self) -> bool:
        """Whether its choice matters at all."""
        return self.evicts or self.demotes

    @property
    def commits(self) -> bool:
        """Whether tokens cannot be taken back: their attention has counted, or others went for them."""
        return self.chooses and (self.watches or self.trims)

    @property
    def sums(self) -> bool:
        """Whether all that it wants to know of a chunk is how much attention each token received."""
        return type(self).observe is TokenPolicy.observe

    def budget(self, held: Held) -> int:
        """How many tokens a row may hold. Here: `keep` of the prompt, while generating too."""
        return max(1, round(self.keep * held.share * held.prompt))

    def residual(self, extent: Extent) -> int:
        """With `demotes`: how many of the newest tokens of a head with a window are exact."""
        raise NotImplementedError

    def observe(self, weights: torch.Tensor, held: Held, first: int) -> torch.Tensor:
        """What the attention of some queries adds to the scores: float32 `[rows, slots]`.

        weights: float32 `[rows, query_heads per kv head, query, slots]`, after the softmax, 0 where a query does not
        see; may be overwritten. held: the rows without the queries' own tokens. first: the first query's position.
        """
        return weights.flatten(1, 2).sum(1)

    def priority(self, held: Held, budget: int) -> torch.Tensor:
        """`[rows, slots]`: the highest are held. Infinity: whatever happens. Here: the scores alone."""
        return held.scores

    def victims(self, held: Held, budget: int, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
        """While generating: `count` slots of each row to be given up, of those in the mask `among`: int64."""
        order = self.priority(held, budget)
        if among is not None:
            order = order.masked_fill(~among, float("inf"))
        if count == 1:
            return order.argmin(1, keepdim=True)
        return order.topk(count, 1, largest=False).indices

    def shares(self, statistics: torch.Tensor) -> torch.Tensor:
        """With `waits`: shares of an even budget, from `statistic` of every layer: `[layer, sequence]`, mean 1."""
        return torch.ones_like(statistics)

    def statistic(self, held: Held) -> torch.Tensor:
        """With `waits`: what `shares` wants to know of a layer, one number for each row, `[rows]`."""
        raise NotImplementedError

    merges: bool = False
    """Whether what goes when a chunk has come is merged into what stays."""
    merges_steps: bool = False
    """Whether what goes while generating is (see `merge_step`)."""

    def merge(
        self, held: Held, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What the tokens that stay become when the others go: keys and values `[rows, kept, head_dim]`, and `extra`.

        keys, values: float32 `[rows, slots, head_dim]`; kept: int64 `[rows, kept]`, by position.
        """
        raise NotImplementedError

    def merge_step(
        self, held: Held, keys: Sequence[torch.Tensor], goes: torch.Tensor, gone: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """`merge` for one token of each row, slot `goes [rows]`, whose key is `gone [rows, head_dim]`.

        keys: those of all slots, in pieces, `[rows, some slots, head_dim]` each.

        Returns the slot it goes into, int64 `[rows]`, the weights with which what stands there and what goes are then
        added up, float32 `[rows, 2]`, for keys and values alike, and `extra`. Must not write into its arguments.
        """
        raise NotImplementedError


class ReadPolicy(Method):
    """A method that lets most layers read only some of the tokens in a decoding step. Nothing is given up."""

    top: int
    """How many tokens of each KV head are read."""
    by_step = True

    def roles(self, specs: Sequence[LayerSpec]) -> list[Literal["full", "select", "sparse"]]:
        """What each of the layers that hold the whole context does: read everything, read everything and pick, or read
        what was picked last."""
        raise NotImplementedError


class Codec:
    """How a page holds tokens. Pages are filled by whole groups of `group` tokens, in order.

    Shapes: `keys, values [pages, token, head_dim]`; fields of pages `[pages, *shape]` (or `[rows, pages, *shape]`
    where a leading `rows` is said).
    """

    layout: PageLayout
    group: int
    form: Form | None = None
    """What its pages look like to the decoding kernels; None if those cannot read them."""
    peak: float = 0.0
    """The largest absolute number that was checked so far, for kernels with a narrower range than the pages."""
    compiled: bool = False
    """Whether its `scores` and `output` are kernels where C++ runs (`kernels/compiled.py`)."""
    contextual: bool = False
    """Whether it wants to know whose pages it is given (`learn`, `of`)."""
    positional: bool = False
    """If `contextual`: whether it looks at positions, which are then those that the model used; else they say
    nothing."""

    def learn(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """If `contextual`: what it wants to remember of rows whose first tokens have come, `[rows, ...]` each.

        queries: `[rows, query_heads per kv head, token, head_dim]`; keys, values: `[rows, token, head_dim]`; inputs:
        what the layer was given (the residual stream), `[sequences, token, hidden_size]`: each sequence has as many
        rows, in succession.
        """
        return {}

    def of(self, context: Context) -> Codec:
        """If `contextual`: the codec that works on the pages of these rows; all that follows is asked of it."""
        return self

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise `NonFiniteError` if these, of any shape, cannot be encoded. Asked before a chunk is stored at all."""

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """Every field of pages whose slots `slot .. slot + tokens` hold `keys` and `values`.

        `opened` are the fields of the same pages as they are now, given when `slot > 0`; what they hold from
        `slot` on is stale. Must not modify its arguments. Raises `NonFiniteError` on infinities and NaN.
        """
        raise NotImplementedError

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of whole pages, float32 `[pages, layout.tokens, head_dim]`; unfilled slots are anything
        finite."""
        raise NotImplementedError

    def take(
        self, fields: dict[str, torch.Tensor], pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of single tokens, float32 `[tokens, head_dim]`.

        fields: of pages `[pages, *shape]`; pages, slots: int64 `[tokens]`, which of them and where in it. The default
        decodes the pages.
        """
        if self.contextual:
            keys, values = self.decode(fields)
            return keys[pages, slots], values[pages, slots]
        which, place = pages.unique(return_inverse=True)
        keys, values = self.decode({name: field[which] for name, field in fields.items()})
        return keys[place, slots], values[place, slots]

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """Inner products of queries `[rows, query, head_dim]` with the keys of pages `[rows, pages, *shape]`.

        Returns float32 `[rows, query, pages * layout.tokens]`. The default decodes; a codec that can work on its
        codes does better, and is tested against this.
        """
        keys, _ = self._decode_rows(fields)
        return queries.float() @ keys.transpose(1, 2)

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """Values of pages `[rows, pages, *shape]`, weighted by `weights [rows, query, pages * layout.tokens]`.

        Returns float32 `[rows, query, head_dim]`.
        """
        _, values = self._decode_rows(fields)
        return weights @ values

    def _decode_rows(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = next(iter(fields.values())).shape[0]
        keys, values = self.decode({name: field.flatten(0, 1) for name, field in fields.items()})
        shape = (rows, -1, keys.shape[-1])
        return keys.reshape(shape), values.reshape(shape)


FLOAT16_MAX = torch.finfo(torch.float16).max


def check_finite(keys: torch.Tensor, values: torch.Tensor, limit: float = FLOAT16_MAX) -> float:
    """The largest magnitude of both. Raises `NonFiniteError` if it is beyond `limit`, what float16 fields can hold."""
    largest = 0.0
    for name, x in (("keys", keys), ("values", values)):
        peak = float(x.detach().abs().amax())
        if not peak <= limit:  # also when it is NaN
            raise NonFiniteError(
                f"{name} to be packed reach {peak}, beyond what the float16 numbers of a page can hold: use full() for "
                "this model, or look for the layer that overflows."
            )
        largest = max(largest, peak)
    return largest


def _show(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return repr(value)


def _coerce(method: str, name: str, value: Any, hint: Any) -> Any:
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
    raise RecipeError(f"{method}({name}={value!r}) is not possible: {name} must be {names}.")


def _type_name(hint: Any) -> str:
    kind = typing.get_origin(hint) or hint
    known = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", tuple: "a list"}
    return known.get(kind, str(kind))
