"""What the store asks of a method that packs tokens: a page format, and how pages are filled and read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from fivefold.errors import CodecError, NonFiniteError
from fivefold.kernels.packed_decode import Form, Reader
from fivefold.store.context import Context, Rope
from fivefold.store.layout import Field, PageLayout

FLOAT16_MAX = torch.finfo(torch.float16).max


def check_finite(keys: torch.Tensor, values: torch.Tensor, limit: float = FLOAT16_MAX) -> None:
    """Raise `NonFiniteError` if the largest magnitude of either is beyond `limit`, what float16 fields can hold."""
    for name, x in (("keys", keys), ("values", values)):
        peak = float(x.detach().abs().amax())
        if not peak <= limit:  # also when it is NaN
            raise beyond(name, peak)


def beyond(name: str, peak: float) -> NonFiniteError:
    """What is raised for numbers that no page can hold."""
    return NonFiniteError(
        f"{name} to be packed reach {peak}, beyond what the float16 numbers of a page can hold: use full() for this "
        "model, or look for the layer that overflows."
    )


def planar_fields(side: str, words: tuple[int, ...], scales: tuple[int, ...]) -> list[Field]:
    """Planar codes (see `kernels/planar`) of these shapes: `side`_words int16, `side`_scale and `side`_zero float16."""
    return [
        Field(f"{side}_words", words, torch.int16, "codes"),
        *(Field(f"{side}_{kind}", scales, torch.float16, "scales") for kind in ("scale", "zero")),
    ]


def planar_parts(side: str, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words, scale and zero point of one side of pages."""
    return fields[f"{side}_words"], fields[f"{side}_scale"], fields[f"{side}_zero"]


class Codec:
    """How a page holds tokens. Pages are filled by whole groups of `group` tokens, in order.

    One whose pages say something else of other rows (their heads, positions, or what it has learned of them) overrides
    `of`. Everybody asks that first, and all that encodes and reads pages of what it returns.

    Shapes: `keys, values [pages, token, head_dim]`; fields of pages `[pages, *shape]` (or `[rows, pages, *shape]`
    where a leading `rows` is said).
    """

    layout: PageLayout
    group: int
    form: Form | None = None
    """What its pages look like to the kernels that pack, unpack and pick KIVI's; None if they are others."""
    rope: Rope | None = None
    """The rotary embedding that it takes out of keys; positions must then go up by one."""

    @property
    def reader(self) -> Reader | None:
        """The kernel of a GPU that attends over its pages in a decoding step; None if there is none. Of one that packs
        heads together: over those of rows in which no head holds other tokens than another."""
        return self.form

    def reader_of(self, heads: tuple[int, ...]) -> Reader | None:
        """Of one that packs heads together: the same for the rows of these heads alone, which hold the same tokens and
        no other head of the layer does."""
        return self.reader

    @property
    def fingerprint(self) -> str:
        """What its pages were made with, besides their format: the hash of a profile. Pages can be read by a codec of
        the same layout and fingerprint only."""
        return ""

    @property
    def nbytes(self) -> int:
        """Bytes of tensors that it holds besides pages, and that go when the cache goes."""
        return 0

    def forget(self) -> None:
        """Let go of these tensors, which can be made again."""

    def compiled(self, device: torch.device) -> bool:
        """Whether `scores` and `output` are kernels in C++ there (`kernels/compiled.py`)."""
        return False

    def learn(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What it wants to remember of rows whose first tokens have come, `[rows, ...]` each.

        queries: `[rows, query_heads per kv head, token, head_dim]`; keys, values: `[rows, token, head_dim]`; inputs:
        what the layer was given (the residual stream), `[sequences, token, hidden_size]`: each sequence has as many
        rows, in succession.
        """
        return {}

    def introduced(self, first: Callable[[], tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        """`learn` of what `first` gives, which is not asked where there is nothing to be learned."""
        return {} if type(self).learn is Codec.learn else self.learn(*first())

    def of(self, context: Context) -> Codec:
        """The codec that works on the pages of these rows: itself if it is the same for all."""
        return self

    @property
    def contextual(self) -> bool:
        """Whether it must know whose pages it is given."""
        return type(self).of is not Codec.of

    @property
    def likeness(self) -> Hashable:
        """Of one that overrides `of`: codecs of several layers where this is the same, and the layout, can be
        `stacked`; None if those of this kind cannot."""
        return None

    def stacked(self, codecs: Sequence[Any]) -> Codec:
        """One codec that encodes rows of several layers in one call, whose context has as many `layers`: itself where
        they differ in their contexts alone. codecs: those of the layers, this being the first."""
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

        fields: of pages `[pages, *shape]`; pages, slots: int64 `[tokens]`, which of them and where in it. Asked where
        pages say the same whosever they are. The default decodes those that are named.
        """
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


def whole(codec: Codec, made: dict[str, torch.Tensor], own: bool = False) -> dict[str, torch.Tensor]:
    """What a codec has made of a page, if these are all fields of its layout and no others. own: those that a sharer
    keeps for itself, and what else there is goes. Raises `CodecError`: what is not written would be read as it is."""
    names = [part.name for part in codec.layout.fields if part.own or not own]
    said = f"{type(codec).__name__} ({codec.layout.name})"
    if lacking := [name for name in names if name not in made]:
        raise CodecError(
            f"{said} leaves out the field {lacking[0]!r} of its page: return it from encode, or take it out of the "
            "layout."
        )
    if not own and (more := [name for name in made if name not in names]):
        raise CodecError(
            f"{said} makes a field {more[0]!r}, which its page does not have: add a Field of that name to the layout."
        )
    return {name: made[name] for name in names}


Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values `[pages, token, head_dim]`."""


class PairCodec(Codec):
    """A codec of two adjacent layers: what a page holds is theirs in common, but for the fields marked `own`.

    The pages of both layers are filled together (`store/pairs.py`), so `encode` is never called. Everything that reads
    is as in `Codec`: the fields of a layer's page are the common ones and its own.
    """

    layers: tuple[int, int]
    """Which layers of the model they are."""
    known: int = 0
    """How many statistics of each row it wants to remember."""

    def measure(self, first: Pair, second: Pair) -> torch.Tensor:
        """Statistics of tokens that are about to be packed, float32 `[rows, known]`, at least 0. What is remembered of
        a row is the largest of each so far; 0 where nothing has been packed."""
        raise NotImplementedError

    def encode_pair(
        self, first: Pair, second: Pair, slot: int, opened: list[dict[str, torch.Tensor]] | None, known: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        """As `encode`: every field of the first layer's pages, and those that are the second one's own.

        opened: all fields of both layers' pages, if `slot > 0`. known: float32 `[pages, known]`, what is remembered of
        the rows of the pages, these very tokens included.
        """
        raise NotImplementedError
