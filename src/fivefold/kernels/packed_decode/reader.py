"""What a codec says of the kernel that reads its packed pages in a decoding step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch


class Reader:
    """A kernel for pages of one kind, and what tables must hold for it. `Form` is that of KIVI's planar pages.

    Readers are compared, and kept, by value; those that have tensors (`constants`) by identity.
    """

    head_dim: int
    fields: ClassVar[tuple[str, ...]]
    """The fields of a page whose addresses it wants, in this order; of a record the first alone."""
    unit: ClassVar[int] = 16
    """Addresses are counted in so many bytes."""
    learned: tuple[str, ...] = ()
    """Which of the tensors that a codec remembers of its rows (`Codec.learn`) it reads."""
    constants: tuple[torch.Tensor, ...] = ()
    """Tensors of the codec's own that it reads. They must stay where they are as long as somebody holds the reader."""
    positional: ClassVar[bool] = False
    """Whether it wants to know positions: column 7 of the spans then has that of the first packed slot, as the model
    counts them, and slots count on from there."""
    whole: ClassVar[bool] = False
    """Whether `attend` merges: the part of a row's (or a team's) first program is all, the others are not set."""
    scores: ClassVar[bool] = False
    """Whether `attend` leaves scores where it is asked to."""
    hurries: ClassVar[bool] = False
    """Whether the first kernel of `attend` can be launched before the kernel in front of it is done."""
    team: int = 1
    """So many rows in succession are read together: they see the same slots, and the work lists name the first."""

    @property
    def together(self) -> int:
        """Pages of so many rows in succession are read to attend on one of them: they must hold the same tokens."""
        return self.team

    resident: float = 4
    """Programs that fit on a processor at a time; less than one where `attend` divides their shares."""
    share: int = 1
    """Pages that are worth a program where programs are many."""
    limit: float = 30000.0
    """Keys and values up to this absolute value can be attended on."""

    @property
    def tokens(self) -> int:
        """Tokens of a page."""
        raise NotImplementedError

    def lacks(self, heads: int) -> str | None:
        """Why it cannot read such pages for so many query heads a row, in a few words; None if it can."""
        return None

    @property
    def kernel(self) -> Callable[..., None]:
        """What `attend` calls, with the reader before its own arguments; scores only if they are asked for."""
        raise NotImplementedError

    def attend(
        self,
        packed: Packed,
        queries: torch.Tensor,
        scale: float,
        spans: torch.Tensor,
        starts: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scores: torch.Tensor | None = None,
        early: bool = False,
    ) -> None:
        """Leave a part of each program in out, float32 `[programs, team * query_heads, head_dim]`, and lse, to the base
        2, float32 `[programs, team * query_heads]`: of the rows that a program is for, one after the other.

        queries: contiguous `[rows, query_heads, head_dim]`; scale: what scores are multiplied with before a power of 2;
        spans: int32 `[rows, SPAN]`; starts: int32 `[rows + 1]`, the work list (see `schedule.starts_of`). scores:
        float32 `[rows, query_heads, columns * tokens]`, which gets those of the packed slots that are seen, to the base
        2; what stands elsewhere is anything. early: launch the first kernel before the kernel in front of it is done,
        where the reader `hurries`: it may read all but the queries then, and each of its programs waits.

        No kernel lets what comes behind `attend` begin before all that is in front of it is done. So that may read
        queries at once; it waits before it writes or ends.
        """
        more = () if scores is None else (scores,)
        named = {"early": True} if early and self.hurries else {}
        self.kernel(self, packed, queries, scale, spans, starts, out, lse, *more, **named)


@dataclass(frozen=True)
class Packed:
    """Packed pages: what reads them, and table int64 `[rows, columns]` of their addresses in units of `form.unit`
    bytes, `[rows, columns, fields]` where it wants those of several fields. learned: tensors `[rows, ...]` that it
    reads besides (`Reader.learned`). base: what is added to every address, so that layers may have a table in common;
    for a `Form`. order: int64 `[rows]`, whose queries each row attends by, where they stand otherwise; for readers that
    are called for sets of rows (`Divided`)."""

    table: torch.Tensor
    form: Reader
    learned: tuple[torch.Tensor, ...] = ()
    base: int = 0
    order: torch.Tensor | None = None


@dataclass(frozen=True)
class Divided:
    """Packed pages of rows whose heads are packed together, but hold different tokens: a call of a reader for each set
    of heads that hold the same ones. Rows stand set by set, and in a set as in the layer.

    sets: the pages of each set's rows, and its work list int32 `[rows of the set + 1]`, for so many programs at most.
    order: int64 `[rows]`, which row of the layer stands at each place; spans: int32 `[rows, SPAN]`, place by place.
    parts: int32 `[rows, 4]`, for each row of the layer: the first and one behind the last program that leave parts of
    it, and where, in lines of `head_dim` numbers: those of program 0, and how many lie between two programs'.
    """

    sets: tuple[tuple[Packed, torch.Tensor, int], ...]
    order: torch.Tensor
    spans: torch.Tensor
    parts: torch.Tensor
