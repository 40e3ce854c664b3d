"""Scores as people read them. -1 stands for "could not be measured" in pycocotools' results and in ours: it is printed nowhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NOT_MEASURED = "not measured"


def is_measured(score: float | None) -> bool:
    """Whether it is a score: not None, not NaN, not the -1 of what had no object to be measured on."""
    return score is not None and score >= 0


def measured(metrics: Mapping[str, float]) -> dict[str, float]:
    """Only what was measured."""
    return {name: score for name, score in metrics.items() if is_measured(score)}


def score_text(score: float | None, digits: int = 3) -> str:
    """A score in 0..1, or that it was not measured."""
    return f"{score:.{digits}f}" if score is not None and is_measured(score) else NOT_MEASURED


def scores_text(metrics: Mapping[str, float], names: Sequence[str], digits: int = 3) -> str:
    """Scores by name on a line, "AP 0.123  AP50 0.456"."""
    return "  ".join(f"{name} {score_text(metrics.get(name), digits)}" for name in names)
