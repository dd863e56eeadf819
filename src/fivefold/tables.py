"""Tables for a terminal and for a pipe: no number is ever cut, and no recipe inside a word.

Where the output is no terminal every row is one line, as long as it must be. On a terminal what is too wide wraps:
headings at spaces, recipes at " + ", other texts at spaces; numbers never. Print a table with `crop=False`, so that one
that is wider than even that allows is not cut either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

Cell = str | Text


class Table:
    """Rows under headings. A column whose name starts with ">" holds numbers: to the right, and never wrapped.

    columns: the names; with `headings=False` they are not shown.
    """

    def __init__(self, *columns: str, title: str = "", headings: bool = True) -> None:
        self.names = [name.removeprefix(">") for name in columns]
        self.numbers = [name.startswith(">") for name in columns]
        self.title = title
        self.headings = headings
        self.rows: list[list[Text]] = []

    def add_row(self, *cells: Cell) -> None:
        """A row; in one that has fewer cells than there are columns, the last cell takes all that is left."""
        self.rows.append([cell if isinstance(cell, Text) else Text(cell) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        limit = options.max_width if options.is_terminal else None
        widths, gap = self._layout(limit)
        lines = []
        if self.title:
            lines += [Text(line, "bold") for line in wrap(self.title, limit)] + [Text()]
        if self.headings:
            lines += self._lines([Text(name, "bold") for name in self.names], widths, gap, limit, heading=True)
            lines.append(Text(("-" if options.ascii_only else "─") * (sum(widths) + gap * (len(widths) - 1)), "dim"))
        for row in self.rows:
            lines += self._lines(row, widths, gap, limit)
        for line in lines:
            line.rstrip()
            line.no_wrap, line.overflow = True, "ignore"
            yield line

    def _layout(self, limit: int | None) -> tuple[list[int], int]:
        """The width of each column and the spaces between two, within `limit` cells if that can be."""
        columns = range(len(self.names))
        plain = [[row[i].plain for row in self.rows if i < len(row) and not self._spans(row, i)] for i in columns]
        names = self.names if self.headings else [""] * len(self.names)
        whole = [max(map(cell_len, [names[i], *plain[i]])) for i in columns]
        if limit is None or sum(whole) + 2 * (len(whole) - 1) <= limit:
            return whole, 2

        def least(i: int, pieces: Sequence[str]) -> int:
            return max(map(cell_len, [*names[i].split(), *pieces, ""]))

        widest = [least(i, plain[i]) for i in columns]
        in_parts = [least(i, [part for text in plain[i] for part in parts(text)]) for i in columns]
        in_words = [least(i, [word for text in plain[i] for word in text.split()]) for i in columns]
        for gap, narrowest in ((2, in_parts), (1, in_parts), (1, in_words)):
            wanted = limit - gap * (len(widest) - 1)
            floor = [widest[i] if self.numbers[i] else narrowest[i] for i in columns]
            widths = _shrunk(widest, floor, sum(widest) - wanted)
            if sum(widths) <= wanted:
                break
        return widths, gap

    def _spans(self, row: Sequence[Text], column: int) -> bool:
        return column == len(row) - 1 < len(self.names) - 1

    def _lines(
        self, row: Sequence[Text], widths: Sequence[int], gap: int, limit: int | None, heading: bool = False
    ) -> list[Text]:
        """A row's lines: headings stand at the bottom, the rest at the top."""
        cells = []
        for i, cell in enumerate(row):
            width: int | None = widths[i]
            if self._spans(row, i):
                width = None if limit is None else max(widths[i], limit - sum(widths[:i]) - gap * i)
            cells.append((wrap(cell.plain, width), widths[i], self.numbers[i], cell.style))
        height = max((len(lines) for lines, *_ in cells), default=0)
        made = [Text() for _ in range(height)]
        for i, (lines, width, right, style) in enumerate(cells):
            missing = [""] * (height - len(lines))
            for line, text in zip(made, missing + lines if heading else lines + missing, strict=True):
                space = " " * max(0, width - cell_len(text))
                line.append(" " * gap * bool(i) + space * right)
                line.append(text, style)
                line.append(space * (not right))
        return made


class Facts(Table):
    """Two columns without headings: a name, and what there is to say of it."""

    def __init__(self) -> None:
        super().__init__("name", "value", headings=False)

    def add_row(self, *cells: Cell) -> None:
        name, *rest = cells
        super().add_row(Text(name, "bold") if isinstance(name, str) else name, *rest)


def parts(text: str) -> list[str]:
    """A text at its spaces, but not between parentheses; a plus stays with what comes after it."""
    made: list[str] = []
    depth = 0
    for word in text.split():
        if made and (depth > 0 or made[-1] == "+"):
            made[-1] += f" {word}"
        else:
            made.append(word)
        depth = max(0, depth + word.count("(") - word.count(")"))
    return made


def wrap(text: str, width: int | None) -> list[str]:
    """Lines of at most `width` cells: broken at `parts`, where that is not enough at spaces, never within a word."""
    if width is None or cell_len(text) <= width:
        return [text]
    lines: list[str] = []
    for part in parts(text):
        for piece in [part] if cell_len(part) <= width else re.findall(r"(?:\+ )?\S+", part):
            if lines and cell_len(lines[-1]) + 1 + cell_len(piece) <= width:
                lines[-1] += f" {piece}"
            else:
                lines.append(piece)
    return lines or [""]


def _shrunk(widths: Sequence[int], floor: Sequence[int], excess: int) -> list[int]:
    """Narrower columns, the widest first, none below its floor, until `excess` is gone or nothing more can go."""
    made = list(widths)
    for _ in range(excess):
        wide = [i for i in range(len(made)) if made[i] > floor[i]]
        if not wide:
            break
        made[max(wide, key=made.__getitem__)] -= 1
    return made
