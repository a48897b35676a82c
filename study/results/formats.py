"""Numbers and tables as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from study.results.contrasts import Estimate, Wins

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NOTHING = ""


@dataclass
class Table:
    """A table.

    Attributes:
        title: Its title.
        header: Names of the columns.
        rows: Cells, as plain text.
        notes: Sentences that follow it.
        strong: Cells in bold, by row and column.
        text: Columns of text; the others are numbers.
    """

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    strong: set[tuple[int, int]] = field(default_factory=set)
    text: frozenset[int] = frozenset({0})

    def markdown(self) -> str:
        """Return it as Markdown, without its title."""
        rule = "".join("---|" if x in self.text else "---:|" for x in range(len(self.header)))
        lines = [f"| {' | '.join(self.header)} |", f"|{rule}"]
        for y, row in enumerate(self.rows):
            cells = [f"**{cell}**" if (y, x) in self.strong and cell else cell for x, cell in enumerate(row)]
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        return "\n\n".join([*(["\n".join(lines)] if self.rows else []), *self.notes])

    def rich(self) -> RichTable:
        """Return it for the console."""
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=self.title, caption=" ".join(self.notes) or None, show_header=bool(self.rows))
        for place, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if place in self.text else "right", overflow="fold")
        for y, row in enumerate(self.rows):
            cells = [
                f"[bold]{escape(cell)}[/bold]" if (y, x) in self.strong else escape(cell) for x, cell in enumerate(row)
            ]
            table.add_row(*cells)
        return table


def number(value: float) -> str:
    """Write a score."""
    return f"{round(value, 6):.1f}"  # the same where sums differ in their last bits


def signed(value: float) -> str:
    """Write a difference, with a true minus."""
    text = f"{round(value, 6):+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def interval(found: Estimate | None, *, difference: bool = True) -> str:
    """Write an estimate and its interval; nothing where there is none."""
    if found is None:
        return NOTHING
    write = signed if difference else number
    return f"{write(found.value)} [{write(found.low)},\u00a0{write(found.high)}]"


def counted(found: Wins | None) -> str:
    """Write wins of all tasks."""
    return NOTHING if found is None else f"{found.won}/{found.won + found.lost + found.tied}"


def p_value(p: float | None) -> str:
    """Write a p-value."""
    return NOTHING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def plural(count: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def seeds_of(counts: set[int]) -> str:
    """Write how many seeds the rows of a table have."""
    if not counts:
        return "no seeds"
    return plural(max(counts), "seed") if len(counts) == 1 else f"{min(counts)} to {plural(max(counts), 'seed')}"
