"""The tables of students with few bits: bits down, teachings across."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from benchmarks.evidence.interval import Interval, Scores, paired
from benchmarks.evidence.plan import BITS, FEW_BITS, TAUGHT

Found = Mapping[tuple[str, str, str], Scores]  # (student, variant, budget) -> seed -> value


def float_row(taught: str) -> str:
    """The float student that one of few bits is compared with: that of the same teaching. Q-DETR's terms were not given to one."""
    return "none" if taught in ("none", "after_none") else "qskd"


def tables(ap: Found, ap50: Found, before: Found, student: str, budget: str) -> str:
    """As Markdown; empty where no student of few bits was trained. before: AP of the very students that were quantised after it."""
    bits = [short for short in BITS if any((student, f"{short}_{name}", budget) in ap for name in TAUGHT)]
    names = [name for name in TAUGHT if any((student, f"{short}_{name}", budget) in ap for short in bits)]
    if not bits:
        return ""

    def row(found: Found, variant: str) -> Scores:
        return found.get((student, variant, budget), {})

    def grid(cell: Callable[[str, str], str], above: Callable[[str], str] | None = None) -> str:
        lines = [["", *(TAUGHT[name].title for name in names)], ["---"] * (len(names) + 1)]
        if above:
            lines.append(["float", *map(above, names)])
        lines += [[BITS[short], *(cell(short, name) for name in names)] for short in bits]
        return "\n".join("|" + "".join(f" {each} |" if each else " |" for each in line) for line in lines)

    def scores(found: Found) -> str:
        def cell(short: str, name: str) -> str:
            values = list(row(found, f"{short}_{name}").values())
            return f"{Interval.of(values).show(100)} ({len(values)})" if values else ""

        return grid(cell, lambda name: Interval.of(list(row(found, float_row(name)).values())).show(100))

    def lost(short: str, name: str) -> str:
        mine = f"{short}_{name}"
        values = paired(row(before, mine) or row(ap, float_row(name)), row(ap, mine))
        return Interval.of(values).show(100) if values else ""

    def won_back(short: str, name: str) -> str:
        whole, base, mine = row(ap, "none"), row(ap, f"{short}_none"), row(ap, f"{short}_{name}")
        gap = Interval.of(paired(whole, base))
        if name == "none" or not gap.mean > (
            0.01 if math.isnan(gap.half) else gap.half
        ):  # nothing is lost that could be told
            return ""
        seeds = sorted(whole.keys() & base.keys() & mine.keys())
        # Of the mean loss: one seed's may be next to nothing.
        shares = [(mine[seed] - base[seed]) / gap.mean for seed in seeds]
        return f"{Interval.of(shares).show(100, 0)} %" if shares else ""

    return "\n\n".join(
        [
            f"AP (seeds):\n\n{scores(ap)}",
            f"AP50 (seeds):\n\n{scores(ap50)}",
            f"AP lost against the float student of the same teaching (Q-DETR's: of QSKD), paired by seed:\n\n{grid(lost)}",
            "AP above the student of as many bits without a teacher, as a share of what that one lost against float without a "
            f"teacher:\n\n{grid(won_back)}",
        ]
    )


def is_one(variant: str) -> bool:
    """Whether a row belongs in these tables."""
    return variant in FEW_BITS
