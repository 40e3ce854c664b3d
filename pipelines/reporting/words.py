"""How far a piece of work is, in words: the line that is printed, and what of it fits beside a bar."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from qskd.evaluation.shown import score_text

# What is said of a number, in this order; what is named later goes first where there is no room.
NUMBERS = {
    "trials": ("{} trials", 1),
    "loss": ("loss {:7.3f}", 2),
    "images_per_s": ("{:6.1f} images/s", 4),
    "AP": ("AP {}", 1),
    "AP50": ("AP50 {}", 5),
    "best": ("best AP {}", 1),
}
KEPT, PLACE, FIRST_TO_GO = 0, 3, 6  # beside them: steps done of all, which the bar shows too


@dataclass
class Shown:
    """unit: what `done` and `total` count, "step" or "images". doing: a stage, or why no step is made now, since `since`."""

    name: str
    total: int
    unit: str
    done: int = 0
    numbers: dict[str, float | str] = field(default_factory=dict)
    doing: str = ""
    since: float = field(default_factory=time.monotonic)
    left_s: float | None = None


def duration_text(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def place_text(shown: Shown) -> str:
    """`step  31/750`, or `640/6000 images`."""
    if not shown.total:
        return f"{shown.done} {shown.unit}" if shown.done else ""
    place = f"{shown.done:>{len(str(shown.total))}}/{shown.total}"
    return f"step {place}" if shown.unit == "step" else f"{place} {shown.unit}"


def parts(shown: Shown) -> list[tuple[str, int]]:
    """What there is to say, and how soon each part may be left out: the larger number first."""
    found = [(place_text(shown), PLACE)]
    if shown.doing:
        found.append((shown.doing, KEPT))
    for name, (form, order) in NUMBERS.items():
        if name in shown.numbers:
            found.append((form.format(_said(name, shown.numbers[name])), order))
    if shown.left_s is not None and shown.done < shown.total:
        found.append((f"about {duration_text(shown.left_s)} left", KEPT))
    return [part for part in found if part[0]]


def _said(name: str, number: float | str) -> float | str:
    return score_text(number) if name in ("AP", "AP50") and not isinstance(number, str) else number


def line_text(shown: Shown) -> str:
    """A line for logs, in the form that all programs share: `qskd  step 310/750  loss   3.897   199.3 images/s  AP 0.231`."""
    return "  ".join([shown.name, *(text for text, _ in parts(shown))])


def fitting_text(shown: Shown, width: int) -> str:
    """As much of it as fits into so many columns, the name apart."""
    left = [(" ".join(text.split()).removeprefix("about "), order) for text, order in parts(shown)]
    elapsed = time.monotonic() - shown.since
    if shown.doing and elapsed >= 3:
        seconds = (f"({duration_text(elapsed)})", FIRST_TO_GO)
        left.insert(next(i for i, (text, _) in enumerate(left) if text == shown.doing) + 1, seconds)
    while left and len("  ".join(text for text, _ in left)) > width:
        worst = max(range(len(left)), key=lambda index: (left[index][1], index))
        if not left[worst][1]:
            break
        del left[worst]
    return "  ".join(text for text, _ in left)
