"""Names of categories that differ in nothing that a reader sees, and objects that are there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qskd.datasets.classes import normalised
from qskd.datasets.findings.finding import Finding, Tally
from qskd.datasets.samples import Category, Sample
from qskd.printable import shown_value


def alike_categories(categories: Sequence[Category]) -> list[Finding]:
    """Categories that one name of a teacher or student fits: the later verbs refuse to choose between them."""
    groups: dict[str, list[Category]] = {}
    for category in categories:
        groups.setdefault(normalised(category.name), []).append(category)
    tally = Tally()
    for group in groups.values():
        if len(group) > 1:
            tally.add(" and ".join(f"{category.id} {shown_value(category.name)}" for category in group))
    return tally.finding(
        "categories-alike",
        "{count} name(s) are those of several categories, but for case, spaces, hyphens or the form of letters",
        "Each becomes a class of its own, and a label of a teacher or another split fits them all: later verbs refuse that.",
        "give the annotations of each such group one category id, and take the other categories out",
    )


class RepeatedObjects:
    """Counts objects whose box and class another one of their image has."""

    def __init__(self) -> None:
        self._tally = Tally()

    def add(self, sample: Sample, where: str) -> None:
        """where: the image, for messages."""
        keys = list(
            zip(
                map(tuple, sample.boxes_xyxy.tolist()),
                sample.category_ids.tolist(),
                sample.iscrowd.tolist(),
                strict=True,
            )
        )
        if len(set(keys)) == len(keys):
            return
        for (box, category_id, _), count in Counter(keys).items():
            corners = ", ".join(f"{value:g}" for value in box)
            self._tally.add(f"{where}: category {category_id} at [{corners}] {count} times", count - 1)

    def absorb(self, later: RepeatedObjects) -> None:
        """Add what another counted in images that come after these."""
        self._tally.absorb(later._tally)

    def findings(self) -> list[Finding]:
        return self._tally.finding(
            "repeated-objects",
            "{count} object(s) have the same box and category as another one of their image",
            "Each counts: all but one of them are missed by a detector that finds the object once.",
            "take them out; were the annotations of two exports joined?",
        )
