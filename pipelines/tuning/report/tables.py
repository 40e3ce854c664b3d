"""A sweep's trials as tables: on the terminal, in HTML, Markdown and CSV. Best first."""

from __future__ import annotations

import csv
import html
import io
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.tuning.report.results import (
    RECIPE,
    ap_text,
    best_row,
    bits_of,
    differences_text,
    epochs_text,
    field_names,
    has_ap,
    ranked,
)
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import flatten, to_tree
from qskd.evaluation.shown import measured

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType


TERMINAL_TRIALS, TERMINAL_DIFFERENCES = 8, 6
NARROW, NEEDLESS = 110, {"AP50", "epochs", "size"}  # left out where the terminal has fewer columns than that
COLUMNS = ("trial", "state", "AP", "AP50", "epochs", "parameters", "size", "latency")


IN_FLOAT = "Latency is the student's in float, whatever its bits: what fewer save, only a runtime that computes with them can tell."


def few_bits(rows: Sequence[TrialRow], recipe: Config) -> bool:
    """Whether some trial's student has fewer bits than float: its latency needs a word."""
    return any(bits_of(row, recipe) for row in rows)


def counts_text(rows: Sequence[TrialRow]) -> str:
    """How many trials there are in each state."""
    states = Counter(row.state for row in rows)
    said = {
        "finished": "finished",
        "stopped": "stopped early",
        "failed": "failed",
        "running": "running",
        "waiting": "waiting",
    }
    parts = [f"{states[state]} {words}" for state, words in said.items() if states[state]]  # type: ignore[index]
    return f"{len(rows)} trial{'s' if len(rows) != 1 else ''}" + (f": {', '.join(parts)}." if parts else ".")


def _cells(row: TrialRow) -> list[str]:
    """Of COLUMNS, to read."""
    ap50 = row.metrics.get("AP50", -1.0)
    return [
        str(row.number),
        "stopped early" if row.state == "stopped" else row.state,
        ap_text(row.best_ap) if row.best_ap >= 0 else "–",
        ap_text(ap50) if ap50 >= 0 else "–",
        epochs_text(row.epochs),
        f"{row.parameters_m:.2f} M" if row.parameters_m is not None else "–",
        f"{row.size_mb:.3g} MB" if row.size_mb is not None else "–",
        f"{row.latency_ms:.1f} ms" if row.latency_ms is not None else "–",
    ]


def _said(row: TrialRow, own: Mapping[str, Any], names: Mapping[str, str]) -> str:
    reason = [f"failed: {' '.join(row.reason.split()) or 'no reason given'}"] if row.state == "failed" else []
    return "; ".join([*reason, *differences_text(row, own, names)])


def html_table(rows: Sequence[TrialRow], recipe: Config) -> str:
    names, best, own = field_names(rows), best_row(rows), flatten(to_tree(recipe))
    head = "".join(f"<th{_right(name)}>{name}</th>" for name in COLUMNS) + "<th>differs from the recipe</th>"
    lines = []
    for row in ranked(rows):
        kind = "best" if row is best else "recipe" if row.number == RECIPE else row.state
        cells = "".join(f"<td{_right(n)}>{html.escape(c)}</td>" for n, c in zip(COLUMNS, _cells(row), strict=True))
        lines.append(f'<tr class="{kind}">{cells}<td>{html.escape(_said(row, own, names))}</td></tr>')
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _right(column: str) -> str:
    return "" if column == "state" else ' class="n"'


def trials_markdown(rows: Sequence[TrialRow], recipe: Config, title: str) -> str:
    """All trials, best first."""
    names, own = field_names(rows), flatten(to_tree(recipe))

    def cell(text: str) -> str:
        return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")

    lines = [f"# {cell(title)}", "", counts_text(rows), ""]
    lines.append("| " + " | ".join([*COLUMNS, "differs from the recipe"]) + " |")
    lines.append("|" + "|".join("---" if name == "state" else "---:" for name in COLUMNS) + "|---|")
    lines += ["| " + " | ".join(map(cell, [*_cells(row), _said(row, own, names)])) + " |" for row in ranked(rows)]
    lines += ["", IN_FLOAT] if few_bits(rows, recipe) else []
    return "\n".join(lines) + "\n"


def trials_csv(rows: Sequence[TrialRow], recipe: Config) -> str:
    """All trials, best first, in full precision: AP in 0..1; `parameters.` are the spaces' answers, `fields.` what the
    recipe's fields were in the trial, also where it left them as they are."""
    own = flatten(to_tree(recipe))
    parameters = list(dict.fromkeys(name for row in rows for name in row.parameters))
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    facts = (
        "number",
        "state",
        "best_ap",
        "epochs",
        "seconds",
        "parameters_m",
        "size_mb",
        "gflops",
        "latency_ms",
        "run_id",
        "reason",
    )
    fields = list(field_names(rows))
    head = [*facts, *(f"metrics.{name}" for name in metrics)]
    head += [*(f"parameters.{name}" for name in parameters), *(f"fields.{name}" for name in fields)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in ranked(rows):
        line: list[Any] = [getattr(row, name) if name != "best_ap" or row.best_ap >= 0 else None for name in facts]
        line += [measured(row.metrics).get(name) for name in metrics] + [
            row.parameters.get(name) for name in parameters
        ]
        writer.writerow(line + [flatten(row.overrides).get(name, own.get(name)) for name in fields])
    return text.getvalue()


def terminal_table(rows: Sequence[TrialRow], command: str, recipe: Config | None = None) -> RenderableType:
    """The best trials, always with the recipe's own among them, and the command that retrains the winner.

    recipe: where it is given, only fields that differ from it are named, otherwise all that a trial sets.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    names, best = field_names(rows), best_row(rows)
    own = flatten(to_tree(recipe)) if recipe is not None else {}
    shown = [row for row in ranked(rows) if has_ap(row)]
    shown = shown[:TERMINAL_TRIALS] + [row for row in shown[TERMINAL_TRIALS:] if row.number == RECIPE]

    def table(width: int) -> Table:
        chosen = [name for name in COLUMNS if width >= NARROW or name not in NEEDLESS]
        made = Table(box=None, pad_edge=False, header_style="bold")
        for name in chosen:
            made.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
        made.add_column("differs from the recipe", overflow="fold")
        for row in shown:
            words = differences_text(row, own, names)
            more = len(words) - TERMINAL_DIFFERENCES
            told = ", ".join(words[:TERMINAL_DIFFERENCES]) + (f", and {more} more" if more > 0 else "")
            style = "bold" if row is best else "yellow" if row.number == RECIPE else ""
            cells = dict(zip(COLUMNS, _cells(row), strict=True))
            made.add_row(*(Text(cells[name]) for name in chosen), Text(told), style=style)
        return made

    reasons = Counter(" ".join(row.reason.split()) or "no reason given" for row in rows if row.state == "failed")
    lines: list[RenderableType] = [Text(counts_text(rows))]
    lines += [Text(f"failed, {count} time{'s' if count > 1 else ''}: {why}") for why, count in reasons.most_common()]
    if recipe is not None and few_bits(rows, recipe):
        lines.append(Text(IN_FLOAT))
    if best is not None and command:
        lines.append(Text("\nThe winner at full length:"))
        lines.append(_Command(command))
    elif best is None:
        lines.append(Text("No trial has an AP: there is no winner."))
    return Group(_AsWide(table), *lines) if shown else Group(*lines)


class _AsWide:
    """What is made for the columns that the terminal has."""

    def __init__(self, make: Callable[[int], RenderableType]) -> None:
        self.make = make

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield self.make(options.max_width)


class _Command:
    """A command as wide as the terminal is, to be copied: a line that goes on ends in a backslash, as shells read it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        if len(self.command) + 2 <= options.max_width:
            yield Text(f"  {self.command}")
            return
        try:
            words = [shlex.quote(word) for word in shlex.split(self.command)]
        except ValueError:  # a quotation mark too few
            words = self.command.split()
        lines = [f"  {words[0]}"] if words else []
        for word in words[1:]:
            if len(lines[-1]) + len(word) + 3 <= options.max_width:
                lines[-1] += f" {word}"
            else:
                lines[-1] += " \\"
                lines.append(f"    {word}")
        yield Text("\n".join(lines), overflow="fold")
