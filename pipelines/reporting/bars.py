"""The board as a terminal shows it, by rich: a line a row, the bar as long as the words leave room."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipelines.reporting.words import Shown, fitting_text
from qskd.printable import one_line

LEAST_BAR, LONGEST_BAR = 8, 40  # columns
A_SECOND = 4


class OwnConsole(Console):
    """It never hides the cursor: a second Ctrl-C ends a program where it stands, and the terminal stays without."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Long lines are left to the terminal: a path that is broken up can't be copied."""
        super().print(*objects, **{"soft_wrap": True, **how})

    def show_cursor(self, show: bool = True) -> bool:
        return False


class Bars:
    """What is drawn anew a few times a second."""

    def __init__(self, rows: Callable[[], Sequence[Shown]]) -> None:
        self.rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows, width = self.rows(), options.max_width
        names = [one_line(row.name, max(8, width // 4)) for row in rows]
        bar = max(LEAST_BAR, min(LONGEST_BAR, width // 5))
        room = width - max(map(len, names), default=0) - bar - 4
        texts = [fitting_text(row, room) for row in rows]
        table = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        for row, name, text in zip(rows, names, texts, strict=True):
            drawn = ProgressBar(row.total, row.done, width=bar) if row.total else Text(" " * bar)
            table.add_row(Text(name), drawn, Text(text))
        yield table


def open_bars(rows: Callable[[], Sequence[Shown]]) -> Live:
    """Begin to draw on standard output. What is printed to a terminal meanwhile appears above."""
    live = Live(
        Bars(rows),
        console=OwnConsole(highlight=False),
        refresh_per_second=A_SECOND,
        transient=True,
        redirect_stderr=sys.stderr.isatty(),  # else it goes to a file, and stays on its way
    )
    live.start(refresh=True)
    return live
