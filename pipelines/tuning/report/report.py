"""What a sweep leaves for people: a folder of pictures, tables and the winner's recipe, and a table on the terminal."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tuning.report import pictures as sweep_pictures
from pipelines.tuning.report import plots as sweep_plots
from pipelines.tuning.report.axes import LEAST_TRIALS
from pipelines.tuning.report.parallel import draw_parallel, plot_parallel
from pipelines.tuning.report.results import (
    RECIPE,
    SweepSummary,
    ap_text,
    best_row,
    bits_of,
    boundaries,
    cost_rows,
    ranked,
)
from pipelines.tuning.report.tables import (
    IN_FLOAT,
    counts_text,
    few_bits,
    html_table,
    terminal_table,
    trials_csv,
    trials_markdown,
)
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.errors import QskdError
from qskd.storage.ownership import listed

__all__ = ["best_row", "ranked", "terminal_table", "write_report"]

GENERATOR = '<meta name="generator" content="qskd">'  # in index.html: that a later report may replace this one
NO_AP = "There is no picture: no trial has an AP."


@dataclass(frozen=True)
class Picture:
    """One of the report's. draw: writes the PNG. plot: makes plotly's figure."""

    title: str
    caption: str
    draw: Callable[[SweepSummary, str, Path], None]
    plot: Callable[[SweepSummary], Any]


def _front(cost: str, title: str, better: str) -> Picture:
    return Picture(
        title,
        f"Trials on the front are beaten by none: no other is both as {better} and as good.",
        lambda sweep, title, path: sweep_pictures.draw_front(sweep, title, path, cost),
        lambda sweep: sweep_plots.plot_front(sweep, cost),
    )


PICTURES: dict[str, Picture] = {
    "parallel": Picture(
        "Parallel coordinates",
        "A line is a trial, an axis a parameter; after AP comes the most important, where that is known. Colour is AP. "
        '"none": the trial has no such parameter. Drag along an axis to choose trials, drag a name to move its axis.',
        draw_parallel,
        plot_parallel,
    ),
    "importance": Picture(
        "Importance of parameters",
        "fANOVA: the part of the variance of AP over the trials that a parameter explains by itself, all together 100 %. "
        "A trial without the parameter counts as the usual one; a stopped trial has the AP it had reached. Few trials of "
        "many parameters say little.",
        sweep_pictures.draw_importance,
        sweep_plots.plot_importance,
    ),
    "history": Picture(
        "Optimisation history",
        "The best AP of each trial, in the order in which trials were made, and the best so far.",
        sweep_pictures.draw_history,
        sweep_plots.plot_history,
    ),
    "curves": Picture(
        "Learning curves",
        "AP at every evaluation of all trials; lines that end early are of trials that were stopped.",
        sweep_pictures.draw_curves,
        sweep_plots.plot_curves,
    ),
    "front_latency": _front("latency_ms", "AP against latency", "fast"),
    "front_parameters": _front("parameters_m", "AP against parameters", "small"),
    "front_size": _front("size_mb", "AP against size at its bits", "small"),
    "boundary": Picture(
        "AP over GIoU boundaries",
        "Each trial's boundaries between groups of queries, joined by a line.",
        sweep_pictures.draw_boundary,
        sweep_plots.plot_boundary,
    ),
}


FRONTS = {
    "front_latency": ("latency", "latency_ms", "ms"),
    "front_parameters": ("size", "parameters_m", "M"),
    "front_size": ("number of bytes", "size_mb", "MB"),
}


def why_none(sweep: SweepSummary, name: str) -> str:
    """The sentence that stands in a picture's place; empty where it can be drawn."""
    scored = sweep.scored
    if not scored:
        return NO_AP
    if name in ("parallel", "importance") and not sweep.axes:
        few = (
            "only one trial has an AP" if len(scored) == 1 else "no parameter varies between the trials that have an AP"
        )
        return f"There is no picture: {few}."
    if name == "importance" and not sweep.importances:
        if len(scored) < LEAST_TRIALS:
            return f"There is no picture: it takes {LEAST_TRIALS} trials with an AP, and there are {len(scored)}."
        return "There is no picture: all trials have the same AP."
    if name == "front_size" and len({bits_of(row, sweep.recipe) for row in sweep.scored}) == 1:
        return "There is no picture: all trials have the same bits, and their size goes with their parameters."
    if name in FRONTS:
        what, cost, unit = FRONTS[name]
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
    NAME.html and NAME.png. What can't be drawn is left out, and index.html says why. Every HTML file stands alone. An earlier
    report is replaced; QskdError where files of these names are not of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_report(folder)
    sweep = SweepSummary(tuple(rows), recipe)
    texts = {"trials.csv": trials_csv(rows, recipe), "trials.md": trials_markdown(rows, recipe, title)}
    texts |= {"best.yaml": best_config_yaml} if best_config_yaml else {}
    sections, drawn = [], []
    for name, picture in PICTURES.items():
        missing = why_none(sweep, name)
        body = f"<p>{html.escape(missing)}</p>"
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier report
        (folder / f"{name}.html").unlink(missing_ok=True)
        if not missing:
            picture.draw(sweep, picture.title, folder / f"{name}.png")
            drawn.append(folder / f"{name}.png")
            plot = sweep_plots.fragment(picture.plot(sweep), name)
            caption = (
                f"{picture.caption} {IN_FLOAT}"
                if name == "front_latency" and few_bits(sweep.rows, sweep.recipe)
                else picture.caption
            )
            body = f'<p class="note">{html.escape(caption)}</p><div class="wide">{plot}</div>'
            texts[f"{name}.html"] = _page(f"{picture.title}: {title}", f"<h1>{picture.title}</h1>{body}", plotly=True)
        sections.append(f'<section id="of-{name}"><h2>{picture.title}</h2>{body}</section>')
    recipe_text = f"<h2>The best as a recipe</h2><pre>{html.escape(best_config_yaml)}</pre>" if best_config_yaml else ""
    body = f"<h1>{html.escape(title)}</h1>{_summary(sweep)}<h2>Trials</h2>{html_table(rows, recipe)}"
    body += f'<p class="note">{IN_FLOAT}</p>' if few_bits(rows, recipe) else ""
    body += ("".join(sections) if sweep.scored else f"<h2>Pictures</h2><p>{NO_AP}</p>") + recipe_text
    texts = {"index.html": _page(title, body, plotly=bool(drawn)), **texts}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [*(folder / name for name in texts), *drawn]


def _check_report(folder: Path) -> None:
    names = {"index.html", "trials.csv", "trials.md", "best.yaml"}
    names |= {f"{name}.{ending}" for name in PICTURES for ending in ("png", "html")}
    there, index = sorted(names & {path.name for path in folder.iterdir()}), folder / "index.html"
    if there and not (index.is_file() and GENERATOR in index.read_text(encoding="utf-8", errors="replace")[:400]):
        found = f"holds {listed(there)}, and no report of a sweep"
        raise QskdError(
            str(folder), found, "a new folder, or an earlier report's", "choose another; it was left as it is"
        )


_STYLE = """
body { font-family: system-ui, sans-serif; color: #212121; background: white; max-width: 1250px; margin: 24px auto;
  padding: 0 20px; line-height: 1.45; }
h1 { font-size: 24px; } h2 { font-size: 19px; margin: 34px 0 6px; } .note { color: #5a5a5a; margin: 0 0 8px; max-width: 900px; }
.wide { overflow-x: auto; } .table { overflow: auto; max-height: 560px; border: 1px solid #ddd; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th { position: sticky; top: 0; background: #f4f4f4; text-align: left; }
th, td { padding: 5px 10px; border-bottom: 1px solid #eee; vertical-align: top; }
td:last-child { min-width: 440px; }
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
    head = f'<meta charset="utf-8">{GENERATOR}<title>{html.escape(title)}</title><style>{_STYLE}</style>{script}'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def _summary(sweep: SweepSummary) -> str:
    sentences = [counts_text(sweep.rows)]
    best, own = sweep.best, next((row for row in sweep.scored if row.number == RECIPE), None)
    if best is not None and best is own:
        sentences.append(f"The best is the recipe itself, with an AP of {ap_text(best.best_ap)}.")
    elif best is not None:
        size = f" and {best.parameters_m:.2f} M parameters" if best.parameters_m is not None else ""
        said = f"The best is trial {best.number}, with an AP of {ap_text(best.best_ap)}{size}"
        if own is not None:
            theirs = f" and {own.parameters_m:.2f} M" if own.parameters_m is not None else ""
            said += f"; the recipe has {ap_text(own.best_ap)}{theirs}"
        sentences.append(said + ".")
    return f"<p>{html.escape(' '.join(sentences))}</p>"
