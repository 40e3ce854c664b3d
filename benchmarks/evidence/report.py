"""Records -> tables (Markdown) and the figure. Intervals are 95 %, Student's t over seeds; differences are paired by seed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence import few_bits
from benchmarks.evidence.cells import RECORDS
from benchmarks.evidence.interval import Interval, Scores, paired
from benchmarks.evidence.plan import BUDGETS, STUDENTS, VARIANTS

# What rows are compared with: untaught, and QSKD. Of students whose rows have fresh flips, those with them.
PAIRS = (("none", "qskd"), ("none_flips", "qskd_flips"))


def read_records() -> list[dict[str, Any]]:
    """All records of the table, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((RECORDS / "report").glob("*.json"))]


def scores(
    records: Sequence[Mapping[str, Any]], metric: str = "AP", of: str = "metrics"
) -> dict[tuple[str, str, str], Scores]:
    """(student, variant, budget) -> seed -> value. of: "float_metrics", what a student had before it was quantised; of the others
    nothing."""
    found: dict[tuple[str, str, str], Scores] = {}
    for record in records:
        student, variant, budget, seed = record["cell"].split("-")[:4]
        if of in record:
            found.setdefault((student, variant, budget), {})[int(seed.removeprefix("seed"))] = record[of][metric]
    return found


def shares(a: Scores, base: Scores, teacher: float) -> list[float]:
    """Share of the gap between student without teacher and teacher that is closed, seed by seed."""
    return [(a[seed] - base[seed]) / (teacher - base[seed]) for seed in sorted(a.keys() & base.keys())]


def budgets_of(records: Sequence[Mapping[str, Any]], student: str) -> list[str]:
    """The budgets at which there is an untaught student to compare with."""
    found = scores(records)
    return [budget for budget in BUDGETS if compared_with(found, student, budget)[0]]


def compared_with(found: Mapping[tuple[str, str, str], Scores], student: str, budget: str) -> tuple[str, str]:
    """The names of the untaught and of QSKD's row that a student's others are compared with; empty where there is none."""
    return next((pair for pair in PAIRS if (student, pair[0], budget) in found), ("", ""))


def table(records: Sequence[Mapping[str, Any]], student: str, budget: str, teacher: float) -> str:
    """One student's rows at one budget, as Markdown."""
    ap, ap50 = scores(records), scores(records, "AP50")
    untaught, taught = compared_with(ap, student, budget)
    base, ours = ap[student, untaught, budget], ap.get((student, taught, budget), {})
    lines = [
        "| variant | seeds | AP | AP50 | against no teacher | gap closed | QSKD ahead by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, variant in VARIANTS.items():
        mine = ap.get((student, name, budget))
        if not mine or few_bits.is_one(name):
            continue
        cells = [
            variant.title,
            str(len(mine)),
            Interval.of(list(mine.values())).show(100),
            Interval.of(list(ap50[student, name, budget].values())).show(100),
            "" if name == untaught else Interval.of(paired(mine, base)).show(100, sign="+"),
            "" if name == untaught else Interval.of(shares(mine, base, teacher)).show(100, 0) + " %",
            "" if name == taught or not ours else Interval.of(paired(ours, mine)).show(100, sign="+"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(records: Sequence[Mapping[str, Any]], student: str, teacher: float, path: Path) -> None:
    """AP of each variant with its interval; dots are seeds. A panel a budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ap = scores(records)
    budgets = budgets_of(records, student)
    names = [name for name in VARIANTS if any((student, name, b) in ap for b in budgets) and not few_bits.is_one(name)]
    drawing = Figure(figsize=(4.6 * len(budgets) + 2.6, 0.36 * len(names) + 1.3), dpi=150, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, budget in zip(panels, budgets, strict=True):
        for row, name in enumerate(names):
            values = list(ap.get((student, name, budget), {}).values())
            if not values:
                continue
            both, at = Interval.of(values), -row
            colour = "#d55e00" if name == compared_with(ap, student, budget)[1] else "#0072b2"
            panel.plot([100 * v for v in values], [at] * len(values), "o", color=colour, alpha=0.3, ms=4, mew=0)
            alone = math.isnan(both.half)  # one seed: hollow, so that it doesn't look as sure as a short interval
            half, fill = (0.0, "white") if alone else (100 * both.half, colour)
            panel.errorbar(100 * both.mean, at, xerr=half, fmt="o", color=colour, mfc=fill, ms=5, capsize=3, lw=1.6)
        base = 100 * statistics.fmean(ap[student, compared_with(ap, student, budget)[0], budget].values())
        panel.axvline(base, color="0.6", lw=1, ls=":")
        panel.axvline(100 * teacher, color="0.3", lw=1, ls="--")
        panel.text(100 * teacher, 0.55, "teacher ", ha="right", va="bottom", fontsize=8, color="0.3")
        panel.set_title(f"{budget} budget: {BUDGETS[budget]} steps", loc="left", fontweight="bold", fontsize=10)
        panel.set_xlabel("AP on the test split")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
    panels[0].set_yticks([-row for row in range(len(names))], [VARIANTS[name].title for name in names], fontsize=8)
    drawing.savefig(path)


def markdown(records: Sequence[Mapping[str, Any]], teachers: Mapping[str, float]) -> str:
    """Every student's tables. teachers: AP by name."""
    parts = []
    for name, student in STUDENTS.items():
        budgets = budgets_of(records, name)
        if budgets:
            parts.append(f"### {student.title}\n\nIts teacher: AP {100 * teachers[student.teacher]:.1f}.")
        parts += [
            f"{BUDGETS[budget]:,} steps:\n\n{table(records, name, budget, teachers[student.teacher])}"
            for budget in budgets
        ]
        found = scores(records), scores(records, "AP50"), scores(records, of="float_metrics")
        parts += [
            f"#### Few bits\n\n{BUDGETS[budget]:,} steps. {few}"
            for budget in budgets
            if (few := few_bits.tables(*found, name, budget))
        ]
    return "\n\n".join(parts) + "\n"


def between_marks(document: str, text: str) -> str:
    """The document with `text` in place of what stands between its marks. ValueError without marks."""
    begin, end = "<!-- benchmarks.evidence -->", "<!-- end of benchmarks.evidence -->"
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"no {begin} ... {end}")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def published(root: Path, records: Sequence[Mapping[str, Any]], teachers: Mapping[str, float]) -> dict[Path, str]:
    """What docs/evidence.md is to say, by file."""
    path = root / "docs" / "evidence.md"
    return {path: between_marks(path.read_text(), markdown(records, teachers))}
