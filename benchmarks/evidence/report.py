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
from benchmarks.evidence.plan import BUDGETS, STUDENTS
from benchmarks.evidence.variants import METHODS, VARIANTS

# What rows are compared with: untaught, and the default or, where that was not run, QSKD without whitening. Of students whose
# rows have fresh flips, those with them.
PAIRS = (("none", ("whitened", "qskd")), ("none_flips", ("qskd_flips_whitened", "qskd_flips")))


def read_records() -> list[dict[str, Any]]:
    """All records of the table, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((RECORDS / "report").glob("*.json"))]


def scores(
    records: Sequence[Mapping[str, Any]], metric: str = "AP", of: str = "metrics"
) -> dict[tuple[str, str, str], Scores]:
    """(student, variant, budget) -> seed -> value. of: "float_metrics", what a student had before it was quantised; of the others
    nothing, nor of records from before the metric was measured."""
    found: dict[tuple[str, str, str], Scores] = {}
    for record in records:
        student, variant, budget, seed = record["cell"].split("-")[:4]
        if metric in record.get(of, {}):
            found.setdefault((student, variant, budget), {})[int(seed.removeprefix("seed"))] = record[of][metric]
    return found


def shares(a: Scores, base: Scores, teacher: float) -> list[float]:
    """Share of the gap between student without teacher and teacher that is closed, seed by seed; none where one of those without a
    teacher is as good as it."""
    if any(teacher <= base[seed] for seed in a.keys() & base.keys()):
        return []
    return [(a[seed] - base[seed]) / (teacher - base[seed]) for seed in sorted(a.keys() & base.keys())]


def budgets_of(records: Sequence[Mapping[str, Any]], student: str) -> list[str]:
    """The budgets at which there is an untaught student to compare with."""
    found = scores(records)
    return [budget for budget in BUDGETS if compared_with(found, student, budget)[0]]


def compared_with(found: Mapping[tuple[str, str, str], Scores], student: str, budget: str) -> tuple[str, str]:
    """The names of the untaught and of the taught row that a student's others are compared with; empty where there is none."""
    for untaught, taught in PAIRS:
        if (student, untaught, budget) in found:
            return untaught, next((name for name in taught if (student, name, budget) in found), "")
    return "", ""


def table(
    records: Sequence[Mapping[str, Any]],
    student: str,
    names: Sequence[str],
    budgets: Sequence[str],
    teacher: float,
    metric: str = "AP",
) -> str:
    """A student's rows of these names, three columns a budget, as Markdown. teacher: its AP."""
    found = scores(records, metric)
    pairs = {budget: compared_with(found, student, budget) for budget in budgets}
    head = ["variant"]
    for budget in budgets:
        ahead = "default ahead by" if "whitened" in pairs[budget][1] else "QSKD ahead by"
        gained = "over no teacher (of the gap)" if metric == "AP" else "over no teacher"
        head += [f"{BUDGETS[budget]:,} steps: {metric} (seeds)", gained, ahead]
    lines = [head, ["---"] * len(head)]
    for name in names:
        if any((student, name, budget) in found for budget in budgets):
            title, is_default = (
                VARIANTS[name].title,
                "whitened" in name and any(name == pair[1] for pair in pairs.values()),
            )
            lines.append([f"**{title}**" if is_default else title])
            for budget in budgets:
                mine = found.get((student, name, budget), {})
                base, ours = (found.get((student, each, budget), {}) for each in pairs[budget])
                share = shares(mine, base, teacher) if metric == "AP" and mine is not base else []
                lines[-1] += _cells(mine, base, ours, share) if mine else [""] * 3
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def _cells(mine: Scores, base: Scores, ours: Scores, share: Sequence[float]) -> list[str]:
    of_gap = f" ({100 * statistics.fmean(share):.0f} %)" if share else ""
    return [
        f"{Interval.of(list(mine.values())).show(100)} ({len(mine)})",
        "" if mine is base else Interval.of(paired(mine, base)).show(100, sign="+") + of_gap,
        "" if mine is ours or not ours else Interval.of(paired(ours, mine)).show(100, sign="+"),
    ]


def figure(records: Sequence[Mapping[str, Any]], student: str, teacher: float, path: Path) -> None:
    """AP of each variant with its interval, best first; dots are seeds. A panel a budget; a teacher far off is told in words."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ap = scores(records)
    budgets = budgets_of(records, student)
    names = [name for name in VARIANTS if any((student, name, b) in ap for b in budgets) and not few_bits.is_one(name)]

    def place(name: str) -> tuple[int, float]:  # by the first budget at which it was run
        at, first = next((at, b) for at, b in enumerate(budgets) if (student, name, b) in ap)
        return at, -statistics.fmean(ap[student, name, first].values())

    names.sort(key=place)
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
        shown = [100 * value for name in names for value in ap.get((student, name, budget), {}).values()]
        if 100 * teacher < max(shown) + (max(shown) - min(shown)) / 2:
            panel.axvline(100 * teacher, color="0.3", lw=1, ls="--")
        panel.set_title(f"teacher {100 * teacher:.1f}", loc="right", fontsize=8, color="0.3")
        panel.set_title(f"{budget} budget: {BUDGETS[budget]} steps", loc="left", fontweight="bold", fontsize=10)
        panel.set_xlabel("AP on the test split")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="x", color="0.92")
        panel.set_axisbelow(True)
    panels[0].set_yticks([-row for row in range(len(names))], [VARIANTS[name].title for name in names], fontsize=8)
    drawing.savefig(path)


def markdown(records: Sequence[Mapping[str, Any]], teachers: Mapping[str, float]) -> str:
    """Every student's tables, other methods' in one of their own. teachers: AP by name."""
    parts, ap = [], scores(records)
    for name, student in STUDENTS.items():
        budgets = budgets_of(records, name)
        if not budgets:
            continue
        parts.append(f"### {student.title}\n\nIts teacher: AP {100 * teachers[student.teacher]:.1f}.")
        run = [each for each in VARIANTS if not few_bits.is_one(each) and any((name, each, b) in ap for b in budgets)]
        methods = [each for each in run if each in METHODS]
        told = {budget for budget in budgets if any((name, each, budget) in ap for each in methods)}
        rows = [each for each in run if each not in methods]
        parts += [table(records, name, rows, budgets, teachers[student.teacher], metric) for metric in student.metrics]
        if methods:
            rows = [*(each for each in run if each in ("none", "qskd", "whitened")), *methods]
            rest = table(
                records, name, rows, [budget for budget in budgets if budget in told], teachers[student.teacher]
            )
            parts.append(f"Other methods:\n\n{rest}")
    return "\n\n".join(parts) + "\n"


def few_bits_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """The tables of students with few bits."""
    found = scores(records), scores(records, "AP50"), scores(records, of="float_metrics")
    return "\n\n".join(
        f"{BUDGETS[budget]:,} steps. {few}"
        for name in STUDENTS
        for budget in budgets_of(records, name)
        if (few := few_bits.tables(*found, name, budget))
    )


def whole(records: Sequence[Mapping[str, Any]], teachers: Mapping[str, float]) -> str:
    """All tables, as records/table.md has them."""
    return f"{markdown(records, teachers)}\n### Few bits\n\n{few_bits_markdown(records)}\n"


def between_marks(document: str, text: str) -> str:
    """The document with `text` in place of what stands between its marks. ValueError without marks."""
    begin, end = "<!-- benchmarks.evidence -->", "<!-- end of benchmarks.evidence -->"
    before, found, rest = document.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"no {begin} ... {end}")
    return f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}"


def published(root: Path, records: Sequence[Mapping[str, Any]], teachers: Mapping[str, float]) -> dict[Path, str]:
    """What docs/evidence.md and docs/quantization.md are to say, by file."""
    said = {"evidence.md": markdown(records, teachers), "quantization.md": few_bits_markdown(records)}
    return {
        root / "docs" / name: between_marks((root / "docs" / name).read_text(), text) for name, text in said.items()
    }
