"""What a distillation looks at, for people: a sheet with the objects, the detections of teacher and students, and between them
what each distillation method shows of itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from qskd.evaluation.detections import Detections
from qskd.pictures.drawing import OBJECT, corners, counted, fitted
from qskd.pictures.explain import Explanation
from qskd.pictures.fonts import shown_name
from qskd.pictures.panels import Key, Panel, draw_dashed, sheet
from qskd.pictures.plots import Picture, class_colour, draw_boxes

_CLASSES_SHOWN = 8  # in a legend


def _class_keys(labels: npt.NDArray[Any], names: Sequence[str]) -> tuple[Key, ...]:
    counts = Counter(int(label) for label in labels).most_common()
    names = [shown_name(name, label) for label, name in enumerate(names)]
    keys = [
        Key(f"{names[label]} ({count})" if count > 1 else names[label], (class_colour(label),))
        for label, count in counts[:_CLASSES_SHOWN]
    ]
    more = len(counts) - len(keys)
    return (*keys, *([Key(f"and {counted(more, 'more class', 'more classes')}", style="words")] if more else []))


def _detections_panel(title: str, found: Detections, shown: Explanation) -> Panel:
    picture, factor = fitted(shown.image)
    drawn = draw_boxes(
        picture, found.boxes_xyxy * factor, found.category_ids, found.scores, shown.labels, smallest_side=1
    )
    note = f"{counted(len(found.scores), 'box', 'boxes')} of score {shown.threshold:g} or more"
    return Panel(title, note, drawn, _class_keys(found.category_ids, shown.labels))


def _objects_panel(shown: Explanation) -> Panel:
    picture, factor = fitted(shown.image)
    objects = shown.objects
    canvas = Image.fromarray(picture)
    for crowd in shown.crowds_xyxy * factor:
        draw_dashed(ImageDraw.Draw(canvas), corners(crowd, canvas), OBJECT, 2)
    boxes, labels = objects.boxes_xyxy * factor, objects.category_ids
    drawn = draw_boxes(np.asarray(canvas), boxes, labels, None, shown.labels, smallest_side=1)
    keys = _class_keys(labels, shown.labels)
    if len(shown.crowds_xyxy):
        keys += (Key(f"{counted(len(shown.crowds_xyxy), 'crowd')}, no target", (OBJECT,), "dashed"),)
    if shown.stand_ins:
        said = f"{counted(len(labels), 'box', 'boxes')} of the teacher's, score {shown.stand_in_score:g} or more"
        title = "Without labels: pseudo-objects" if shown.unlabeled else "Not annotated: stand-in objects"
        return Panel(title, said, drawn, keys)
    return Panel("Ground truth", counted(len(labels), "object"), drawn, keys)


def _augmented_panel(shown: Explanation) -> Panel:
    """Two rows, each picture in the top left corner of its field: their sizes may differ."""
    high, wide = (max(picture.shape[axis] for picture in shown.augmented) for axis in (0, 1))
    columns, gap = 2, max(2, wide // 80)
    rows = -(-len(shown.augmented) // columns)
    canvas = np.full((rows * (high + gap) - gap, columns * (wide + gap) - gap, 3), 255, np.uint8)
    for number, picture in enumerate(shown.augmented):
        top, left = number // columns * (high + gap), number % columns * (wide + gap)
        canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    sizes = list(dict.fromkeys(f"{picture.shape[1]} x {picture.shape[0]}" for picture in shown.augmented))
    note = f"what {len(shown.augmented)} training steps may show: {', '.join(sizes)} pixels"
    return Panel("What the student sees", note, fitted(canvas)[0])


def explanation_picture(shown: Explanation, about: str) -> Picture:
    """A sheet of panels: objects, teacher, what the methods show, what the student is shown, each student.
    about: one line on whose they are.

    Without a teacher its panels are left out.
    """
    panels = [_objects_panel(shown)] if not shown.stand_ins or shown.teacher is not None else []
    if shown.teacher is not None:
        panels.append(_detections_panel("Teacher's detections", shown.teacher, shown))
        panels += [panel for seen in shown.seen for panel in seen.panels(shown)]
    panels += [_augmented_panel(shown)] if shown.augmented else []
    panels += [_detections_panel(title, found, shown) for title, found in shown.students.items()]
    return sheet(shown.name, about, warning_of(shown), panels)


def warning_of(shown: Explanation) -> str:
    """What must be known before the picture is believed; empty when there is nothing."""
    if not shown.stand_ins or shown.teacher is None:
        return ""
    if not len(shown.objects.scores):
        return (
            f"Nobody annotated this image, and the teacher is sure of nothing in it (score {shown.stand_in_score:g}): there is no "
            "object to select queries for."
        )
    if shown.unlabeled:
        return (
            "This image is of data.unlabeled. The teacher's own predictions are what the student is taught to find in it, right or "
            "wrong."
        )
    return (
        "Nobody annotated this image. The teacher's own detections stand in for its objects: what the method shows is what "
        "it would teach if it were right."
    )
