"""What a sweep leaves for people: a folder of pictures, tables and the winner's recipe, and a table on the terminal."""

from __future__ import annotations

import csv
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.sweep_axes import LEAST_TRIALS
from pipelines.sweep_results import (
    RECIPE,
    Sweep,
    best_row,
    boundaries,
    cost_rows,
    differences_text,
    epochs_text,
    field_names,
    has_ap,
    points,
    ranked,
)
from pipelines.sweep_trials import TrialRow
from qskd.config import Config
from qskd.recipe import flatten, to_tree

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["best_row", "ranked", "terminal_table", "write_report"]
TERMINAL_TRIALS, TERMINAL_DIFFERENCES = 8, 6


@dataclass(frozen=True)
class Picture:
    title: str
    caption: str


PICTURES: dict[str, Picture] = {
    "parallel": Picture(
        "Parallel coordinates",
        "A line is a trial, an axis a parameter: the most important first, where that is known, and AP last. Colour is AP. "
        '"none": the trial has no such parameter. On the page, drag along axes to choose trials, drag names to move axes.',
    ),
    "importance": Picture(
        "Importance of parameters",
        "fANOVA: the part of the variance of AP over the trials that a parameter explains by itself. A trial without the "
        "parameter counts as the usual one; a stopped trial has the AP it had reached. Few trials of many parameters say "
        "little.",
    ),
    "history": Picture(
        "Optimisation history",
        "The best AP of each trial, in the order in which trials were made, and the best so far.",
    ),
    "curves": Picture("Learning curves", "AP at every evaluation of all trials; those that end early were stopped."),
    "front_latency": Picture(
        "AP against latency", "Trials on the front are beaten by none: no other is both as fast and as good."
    ),
    "front_parameters": Picture(
        "AP against parameters", "Trials on the front are beaten by none: no other is both as small and as good."
    ),
    "boundary": Picture(
        "AP over GIoU boundaries",
        "Each trial's boundaries between groups of queries, joined by a line; what lies under the lowest is its own band.",
    ),
}


def why_none(sweep: Sweep, name: str) -> str:
    """The sentence that stands in a picture's place; empty where it can be drawn."""
    scored = sweep.scored
    if not scored:
        return "There is no picture: no trial has an AP."
    if name in ("parallel", "importance") and not sweep.axes:
        few = (
            "only one trial has an AP" if len(scored) == 1 else "no parameter varies between the trials that have an AP"
        )
        return f"There is no picture: {few}."
    if name == "importance" and not sweep.importances:
        if len(scored) < LEAST_TRIALS:
            return f"There is no picture: it takes {LEAST_TRIALS} trials with an AP, and there are {len(scored)}."
        return "There is no picture: all trials have the same AP."
    if name in ("front_latency", "front_parameters"):
        what, cost, unit = ("latency", "latency_ms", "ms") if name == "front_latency" else ("size", "parameters_m", "M")
        known = {getattr(row, cost) for row in cost_rows(sweep, cost)}
        if not known:
            return f"There is no picture: the {what} of no trial is known."
        if len(known) == 1:
            return f"There is no picture: all trials have the same {what}, {known.pop():.3g} {unit}."
    if name == "boundary":
        chosen = {tuple(boundaries(row, sweep.recipe)) for row in scored}
        if len(chosen) == 1:
            listed = ", ".join(f"{at:g}" for at in chosen.pop()) or "none"
            return f"There is no picture: the boundaries are the same in all trials ({listed})."
    return ""


# --- the folder -----------------------------------------------------------------------------------------------------
def write_report(
    folder: Path, rows: Sequence[TrialRow], recipe: Config, best_config_yaml: str, title: str
) -> list[Path]:
    """Write the sweep's report into a local folder, which is made; return the files written, index.html first.

    index.html, trials.csv, trials.md, best.yaml (`best_config_yaml` as it is; left out when empty), and of each picture
    NAME.html and NAME.png. What can't be drawn is left out, and index.html says why. Every HTML file stands alone.
    """
    from pipelines.sweep_pictures import DRAW
    from pipelines.sweep_plots import PLOT, fragment

    folder.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(tuple(rows), recipe)
    texts = {"trials.csv": trials_csv(rows, recipe), "trials.md": trials_markdown(rows, recipe, title)}
    texts |= {"best.yaml": best_config_yaml} if best_config_yaml else {}
    sections, drawn = [], []
    for name, picture in PICTURES.items():
        missing = why_none(sweep, name)
        body = f"<p>{html.escape(missing)}</p>"
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
        (folder / f"{name}.html").unlink(missing_ok=True)
        if not missing:
            DRAW[name](sweep, picture.title, folder / f"{name}.png")
            drawn.append(folder / f"{name}.png")
            plot = fragment(PLOT[name](sweep), name)
            body = f'<p class="note">{html.escape(picture.caption)}</p><div class="wide">{plot}</div>'
            texts[f"{name}.html"] = _page(f"{picture.title}: {title}", f"<h1>{picture.title}</h1>{body}", plotly=True)
        sections.append(f'<section id="of-{name}"><h2>{picture.title}</h2>{body}</section>')
    recipe_text = f"<h2>The best as a recipe</h2><pre>{html.escape(best_config_yaml)}</pre>" if best_config_yaml else ""
    body = f"<h1>{html.escape(title)}</h1>{_summary(sweep)}<h2>Trials</h2>{_table(rows, recipe)}"
    body += "".join(sections) + recipe_text
    texts = {"index.html": _page(title, body, plotly=bool(drawn)), **texts}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [*(folder / name for name in texts), *drawn]


_STYLE = """
body { font-family: system-ui, sans-serif; color: #212121; background: white; max-width: 1250px; margin: 24px auto;
  padding: 0 20px; line-height: 1.45; }
h1 { font-size: 24px; } h2 { font-size: 19px; margin: 34px 0 6px; } .note { color: #5a5a5a; margin: 0 0 8px; max-width: 900px; }
.wide { overflow-x: auto; } .table { overflow: auto; max-height: 560px; border: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th { position: sticky; top: 0; background: #f4f4f4; text-align: left; }
th, td { padding: 5px 10px; border-bottom: 1px solid #eee; vertical-align: top; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.failed td { color: #8a8a8a; } tr.recipe td { background: #fdf1e8; } tr.best td { background: #e9f1fa; }
pre { background: #f7f7f7; border: 1px solid #ddd; padding: 12px; font-size: 12px; overflow: auto; max-height: 560px; }
"""


def _page(title: str, body: str, plotly: bool) -> str:
    """A whole HTML page; with plotly.js in it, for a viewer that shows one file finds none beside it."""
    script = ""
    if plotly:
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>{script}'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _summary(sweep: Sweep) -> str:
    sentences = [counts_text(sweep.rows)]
    best, own = sweep.best, next((row for row in sweep.scored if row.number == RECIPE), None)
    if best is not None and best is own:
        sentences.append(f"The best is the recipe itself, with an AP of {points(best.best_ap)}.")
    elif best is not None:
        size = f" and {best.parameters_m:.2f} M parameters" if best.parameters_m is not None else ""
        said = f"The best is trial {best.number}, with an AP of {points(best.best_ap)}{size}"
        if own is not None:
            theirs = f" and {own.parameters_m:.2f} M" if own.parameters_m is not None else ""
            said += f"; the recipe has {points(own.best_ap)}{theirs}"
        sentences.append(said + ".")
    return f"<p>{html.escape(' '.join(sentences))}</p>"


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


# --- tables ---------------------------------------------------------------------------------------------------------
COLUMNS = ("trial", "state", "AP", "AP50", "epochs", "parameters", "latency")


def _cells(row: TrialRow) -> list[str]:
    """Of COLUMNS, to read."""
    ap50 = row.metrics.get("AP50", -1.0)
    return [
        str(row.number),
        "stopped early" if row.state == "stopped" else row.state,
        points(row.best_ap) if row.best_ap >= 0 else "–",
        points(ap50) if ap50 >= 0 else "–",
        epochs_text(row.epochs),
        f"{row.parameters_m:.2f} M" if row.parameters_m is not None else "–",
        f"{row.latency_ms:.1f} ms" if row.latency_ms is not None else "–",
    ]


def _said(row: TrialRow, recipe: Config | None, names: dict[str, str]) -> str:
    reason = [f"failed: {' '.join(row.reason.split()) or 'no reason given'}"] if row.state == "failed" else []
    return "; ".join([*reason, *differences_text(row, recipe, names)])


def _table(rows: Sequence[TrialRow], recipe: Config) -> str:
    names, best = field_names(rows), best_row(rows)
    head = "".join(f"<th{_right(name)}>{name}</th>" for name in COLUMNS) + "<th>differs from the recipe</th>"
    lines = []
    for row in ranked(rows):
        kind = "best" if row is best else "recipe" if row.number == RECIPE else row.state
        cells = "".join(f"<td{_right(n)}>{html.escape(c)}</td>" for n, c in zip(COLUMNS, _cells(row), strict=True))
        lines.append(f'<tr class="{kind}">{cells}<td>{html.escape(_said(row, recipe, names))}</td></tr>')
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _right(column: str) -> str:
    return "" if column == "state" else ' class="n"'


def trials_markdown(rows: Sequence[TrialRow], recipe: Config, title: str) -> str:
    """All trials, best first."""
    names = field_names(rows)

    def cell(text: str) -> str:
        return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")

    lines = [f"# {cell(title)}", "", counts_text(rows), ""]
    lines.append("| " + " | ".join([*COLUMNS, "differs from the recipe"]) + " |")
    lines.append("|" + "|".join("---" if name == "state" else "---:" for name in COLUMNS) + "|---|")
    lines += ["| " + " | ".join(map(cell, [*_cells(row), _said(row, recipe, names)])) + " |" for row in ranked(rows)]
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
        line += [row.metrics.get(name) for name in metrics] + [row.parameters.get(name) for name in parameters]
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
    shown = [row for row in ranked(rows) if has_ap(row)]
    shown = shown[:TERMINAL_TRIALS] + [row for row in shown[TERMINAL_TRIALS:] if row.number == RECIPE]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
    table.add_column("differs from the recipe", overflow="fold")
    for row in shown:
        words = differences_text(row, recipe, names)
        more = len(words) - TERMINAL_DIFFERENCES
        told = ", ".join(words[:TERMINAL_DIFFERENCES]) + (f", and {more} more" if more > 0 else "")
        style = "bold" if row is best else "yellow" if row.number == RECIPE else ""
        table.add_row(*(Text(cell) for cell in _cells(row)), Text(told), style=style)
    reasons = Counter(" ".join(row.reason.split()) or "no reason given" for row in rows if row.state == "failed")
    lines = [Text(counts_text(rows))]
    lines += [Text(f"failed, {count} time{'s' if count > 1 else ''}: {why}") for why, count in reasons.most_common()]
    if best is not None and command:
        lines.append(Text("\nThe winner at full length:"))
        lines.append(Text(f"  {command}", no_wrap=True, overflow="ignore"))  # in one line, to be copied
    elif best is None:
        lines.append(Text("No trial has an AP: there is no winner."))
    return Group(table, *lines) if shown else Group(*lines)
