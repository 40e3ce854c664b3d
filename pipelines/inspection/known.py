"""An evaluation told by what an old detector knew: old classes, new ones, and what was forgotten (`qskd evaluate --known-by`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from pipelines.inspection.evaluate import evaluate
from qskd.datasets.classes import NOBODY, known_classes, listing, model_side
from qskd.datasets.manifest import load_manifest
from qskd.detectors import labels_of, read_config
from qskd.errors import QskdError
from qskd.evaluation.details import Evaluation
from qskd.evaluation.forgetting import Forgetting, forgetting
from qskd.evaluation.shown import score_text
from qskd.printable import one_line
from qskd.storage.places import fetched

MOST_FORGOTTEN = 5  # classes that are named


def classes_known_by(old: str, data: str) -> dict[str, str | None]:
    """A class map of the data for the old detector: null for each class that it has no label for. QskdError where it knows none, or
    all, for nothing would be told apart."""
    labels = load_manifest(data).labels
    with fetched(old) as folder:
        theirs = labels_of(read_config(folder))
    slots = known_classes(labels, theirs, {}, model_side(old))
    found = dict(zip(labels, slots, strict=True))
    known = sum(slot != NOBODY for slot in slots)
    if known in (0, len(labels)):
        said = f"knows {'every' if known else 'no'} class of {data}: {listing(theirs)}"
        expected = "a detector that knows some of its classes, by name, and not the others"
        remedy = "name the detector of before the new classes"
        raise QskdError(f"--known-by {old}", said, expected, remedy)
    return {name: None for name, slot in found.items() if slot == NOBODY}


def with_forgetting(now: Evaluation, old: str, data: str, options: Mapping[str, Any]) -> Evaluation:
    """The evaluation, and what of the old classes is forgotten: the old detector is evaluated on the same images. options: of
    `evaluate`, but for the class map, which is by name, and resize, which is the old checkpoint's own."""
    strange = classes_known_by(old, data)
    before = evaluate(old, data, class_map=strange, tell_nobody=False, **options)
    known = [name for name in load_manifest(data).labels if name not in strange]
    return replace(now, forgetting=forgetting(now, before, known, old))


def forgetting_table(told: Forgetting) -> Table:
    """A row for old, new and all classes."""
    table = Table(title=f"Old classes: those that {one_line(told.known_by)} knows")
    for column in ("classes", "number", "objects", "AP", "AP50", "the old detector's AP"):
        table.add_column(column, justify="left" if column == "classes" else "right")
    for name, group in (("old", told.old), ("new", told.new), ("all", told.all)):
        figures = [_text(each) for each in (group.ap, group.ap50)]
        before = _text(told.before) if name == "old" else ""
        table.add_row(name, str(group.classes), str(group.objects), *figures, before)
    return table


def _text(value: float | None) -> str:
    return "–" if value is None else score_text(value)


def forgetting_lines(told: Forgetting) -> Sequence[str]:
    """In words."""
    lost, before, after = told.forgotten, told.before, told.old.ap
    if lost is None or before is None or after is None:
        return ["forgotten: not known, for there is no object of an old class"]
    lines = [f"forgotten: {100 * lost:.1f} points of AP of the old classes ({100 * before:.1f} → {100 * after:.1f})"]
    worst = [one for one in told.classes if one.after < one.before][:MOST_FORGOTTEN]
    if worst:
        each = (f"{one_line(one.name)} {100 * one.before:.1f} → {100 * one.after:.1f}" for one in worst)
        lines.append(f"most: {', '.join(each)}")
    return lines
