"""What was chosen, beside what there was to choose from: a table by class, and a picture of the first and the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qskd.datasets.order.chosen import ChosenImage
from qskd.datasets.samples import Category, Sample
from qskd.datasets.views import decode_image
from qskd.pictures.drawing import fitted
from qskd.pictures.panels import Panel, sheet
from qskd.pictures.plots import Picture, draw_boxes
from qskd.printable import one_line

SHOWN = 6  # images of either end
CLASSES = 20  # the most frequent ones, in a line each


def class_table(
    objects: Sequence[Mapping[int, int]], chosen: Sequence[int], names: Sequence[str], what: str
) -> list[str]:
    """objects: of each image, how many of each label. chosen: numbers of images. what: the objects' name."""

    def counted(numbers: Sequence[int]) -> np.ndarray:
        sums = np.zeros(len(names), np.int64)
        for number in numbers:
            for label, count in objects[number].items():
                sums[label] += count
        return sums

    everything, own = counted(range(len(objects))), counted(chosen)
    means = everything.sum() / max(1, len(objects)), own.sum() / max(1, len(chosen))
    lines = [f"{what} an image: {means[0]:.2f} of all, {means[1]:.2f} of the chosen"]
    width = max(map(len, names), default=0)
    order = np.argsort(-everything, kind="stable").tolist()
    for label in order[:CLASSES]:
        shares = [f"{100 * part[label] / max(1, part.sum()):5.1f} %" for part in (everything, own)]
        lines.append(
            f"  {one_line(names[label]):<{width}}  {everything[label]:>8} {shares[0]}  {own[label]:>8} {shares[1]}"
        )
    rest = order[CLASSES:]
    if rest:
        lines.append(f"  {len(rest)} more classes: {everything[rest].sum()} and {own[rest].sum()}")
    return lines


def ends_picture(
    heading: str, about: str, images: Sequence[ChosenImage], samples: Sequence[Sample], categories: Sequence[Category]
) -> Picture:
    """images, samples: the first `SHOWN` and the last, or all where there are no more."""
    names, labels = [one.name for one in categories], {one.id: label for label, one in enumerate(categories)}
    panels = []
    for number, (image, sample) in enumerate(zip(images, samples, strict=True)):
        picture, factor = fitted(np.asarray(decode_image(sample.encoded, sample.file_name)))
        kinds = [labels[category] for category in sample.category_ids.tolist()]
        drawn = draw_boxes(picture, sample.boxes_xyxy * factor, kinds, None, names, smallest_side=1)
        end = "first" if number < len(images) - SHOWN or number < SHOWN else "last"
        said = f"score {image.score:.3g}, weight {image.weight:.3g}"
        panels.append(Panel(f"{end}: {one_line(image.file_name)}", said, drawn))
    return sheet(heading, about, "", panels)


def ends(count: int) -> list[int]:
    """The places of the first and the last of so many."""
    return list(range(count)) if count <= 2 * SHOWN else [*range(SHOWN), *range(count - SHOWN, count)]
