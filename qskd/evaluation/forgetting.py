"""What a detector that learnt new classes still knows of the old ones: AP of old, new and all classes, and what was forgotten."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qskd.evaluation.details import ClassFigures, Evaluation


@dataclass(frozen=True)
class Group:
    """Some classes together. classes: how many; objects: of them. ap, ap50: means over those with objects, as COCO's are; None
    where there are none."""

    classes: int
    objects: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True)
class KeptClass:
    """An old class: the old detector's AP of it, and what is left of it."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Forgetting:
    """known_by: the old detector. old: the classes that it knows; new: the others; all: both. before: the old detector's own AP
    of the old classes, on the same images. classes: the old ones with objects, most forgotten first."""

    known_by: str
    old: Group
    new: Group
    all: Group
    before: float | None
    classes: tuple[KeptClass, ...]

    @property
    def forgotten(self) -> float | None:
        """AP of the old classes that was lost; below 0 where they were bettered."""
        return None if self.before is None or self.old.ap is None else self.before - self.old.ap


def forgetting(now: Evaluation, before: Evaluation, known: Collection[str], known_by: str) -> Forgetting:
    """now, before: the new and the old detector's evaluations on the same images. known: names of the dataset's classes that the
    old one knows."""
    was = {one.name: one for one in before.classes}
    kept = [
        KeptClass(one.name, was[one.name].ap or 0.0, one.ap)
        for one in now.classes
        if one.name in known and one.ap is not None
    ]
    return Forgetting(
        known_by,
        _group(one for one in now.classes if one.name in known),
        _group(one for one in now.classes if one.name not in known),
        _group(now.classes),
        _group(one for one in before.classes if one.name in known).ap,
        tuple(sorted(kept, key=lambda one: (one.after - one.before, one.name))),
    )


def mean_of(found: Evaluation, classes: Collection[str]) -> dict[str, float]:
    """AP and AP50 of some classes alone, means over those with objects; nothing where there are none."""
    group = _group(one for one in found.classes if one.name in classes)
    named = {"AP": group.ap, "AP50": group.ap50}
    return {name: value for name, value in named.items() if value is not None}


def _group(classes: Iterable[ClassFigures]) -> Group:
    own = list(classes)
    ap, ap50 = (_mean(values) for values in ([one.ap for one in own], [one.ap50 for one in own]))
    return Group(len(own), sum(one.objects for one in own), ap, ap50)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
