"""What the distillation looks at, for people: kept queries coloured by band, AGFD's mask over the image, and a sheet of both
with the detections of teacher and students."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from qskd.config import QuerySelectionConfig
from qskd.evaluation.detections import Detections
from qskd.pictures.explain import STAND_IN_SCORE, Explanation, KeptQueries, Mask
from qskd.pictures.panels import Key, Panel, draw_dashed, sheet
from qskd.pictures.plots import PALETTE, Colour, Picture, class_colour, draw_boxes

SIDE = 512  # pixels of a panel's longer side
POSITIVE: Colour = PALETTE[1]  # sky blue: dark blue is lost on dark photos
OBJECT: Colour = (255, 255, 255)
# Hard negatives, from the lowest band that is kept to the highest: yellow to dark red, as heat.
_RAMP: tuple[Colour, ...] = ((250, 235, 80), (240, 160, 20), (213, 80, 0), (165, 15, 50))
_CLASSES_SHOWN = 8  # in a legend
_MANY = 40  # boxes, from which on their lines are thinner


def band_colours(rule: QuerySelectionConfig) -> dict[int, Colour]:
    """The colour of each band whose hard negatives are kept."""
    kept = [band for band, weight in enumerate(rule.band_weights) if weight > 0]
    places = np.linspace(0, len(_RAMP) - 1, len(kept)) if len(kept) != 1 else np.array([1.0])
    ramp = np.array(_RAMP, float)
    mixed = [[np.interp(place, range(len(_RAMP)), ramp[:, channel]) for channel in range(3)] for place in places]
    return {band: (round(r), round(g), round(b)) for band, (r, g, b) in zip(kept, mixed, strict=True)}


def fitted(image: npt.NDArray[Any], side: int = SIDE) -> tuple[Picture, float]:
    """uint8 [H, W, 3] -> its longer side `side` pixels long, and the factor. Small pictures keep their pixels as squares
    of whole size, and come out at most so large."""
    longer = max(image.shape[:2])
    if 2 * longer <= side:
        whole = side // longer
        return image.repeat(whole, axis=0).repeat(whole, axis=1), float(whole)
    factor = side / longer
    size = max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)), factor


def _corners(box: npt.NDArray[Any], canvas: Image.Image) -> tuple[float, float, float, float]:
    """Pillow takes the last pixel inside the box, and an inverted or empty box would be an error there; sides far outside
    are brought near, for dashes would be drawn all the way."""
    beyond = max(canvas.size) + 100
    left, top, right, bottom = np.nan_to_num(np.asarray(box, float)).clip(-beyond, 2 * beyond).tolist()
    return left, top, max(right - 1, left), max(bottom - 1, top)


def draw_selection(
    image: npt.NDArray[Any],
    objects_xyxy: npt.ArrayLike,
    queries_xyxy: npt.ArrayLike,
    is_positive: Sequence[bool] | npt.NDArray[Any],
    band: Sequence[int] | npt.NDArray[Any],
    weight: Sequence[float] | npt.NDArray[Any],
    colours: Mapping[int, Colour],
) -> Picture:
    """A copy of the image with its objects (white, dashed), the positives (blue) and the hard negatives (by band).

    image: uint8 [H, W, 3]; boxes in its pixels: objects [M, 4], queries [Q, 4]. weight [Q]: 0 = dropped, not drawn.
    colours: of each band (`band_colours`). Higher bands are drawn over lower ones, positives over all.
    """
    canvas = Image.fromarray(np.asarray(image))
    draw = ImageDraw.Draw(canvas)
    boxes = np.asarray(queries_xyxy, dtype=float).reshape(-1, 4)
    bands, positive = np.asarray(band, dtype=int), np.asarray(is_positive, dtype=bool)
    kept = np.flatnonzero(np.asarray(weight, dtype=float) > 0)
    line = _line_width(canvas, len(kept))
    _draw_objects(canvas, objects_xyxy, line)  # below: a positive often lies on its very object
    for query in sorted(kept, key=lambda query: (positive[query], bands[query])):
        left, top, right, bottom = _corners(boxes[query], canvas)
        wide = line + 1 if positive[query] else line
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=wide + 2)
        colour = POSITIVE if positive[query] else colours[int(bands[query])]
        draw.rectangle((left, top, right, bottom), outline=colour, width=wide)
    return np.asarray(canvas)


def _line_width(canvas: Image.Image, boxes: int) -> int:
    """In pixels; thinner where boxes are many."""
    return max(1, round(max(canvas.size) / 220) - (1 if boxes > _MANY else 0))


def _draw_objects(canvas: Image.Image, objects_xyxy: npt.ArrayLike, line: int) -> None:
    draw = ImageDraw.Draw(canvas)
    for box in np.asarray(objects_xyxy, dtype=float).reshape(-1, 4):
        draw_dashed(draw, _corners(box, canvas), OBJECT, line)


@lru_cache
def heat_colours() -> tuple[Colour, ...]:
    """256 colours from 0 to the largest value: dark violet to light yellow, as light as they are high."""
    from matplotlib import colormaps

    table = np.asarray(colormaps["inferno"](np.linspace(0.12, 0.97, 256)))[:, :3]
    return tuple((round(r), round(g), round(b)) for r, g, b in (table * 255).tolist())


def draw_mask(
    image: npt.NDArray[Any], mask: npt.NDArray[Any], objects_xyxy: Sequence[Any] | npt.NDArray[Any] = ()
) -> Picture:
    """The image in grey under the mask's heat (`heat_colours`), and its objects (white, dashed).

    image: uint8 [H, W, 3]; objects_xyxy [M, 4] in its pixels. mask: float [h, w] >= 0 over the whole image, any resolution;
    it is scaled by its maximum and smoothed between its cells' centres.
    """
    top = float(mask.max()) if mask.size else 0.0
    scaled = np.asarray(mask, np.float32) / top if top > 0 else np.zeros((1, 1), np.float32)
    size = image.shape[1], image.shape[0]
    smooth = np.asarray(Image.fromarray(scaled, mode="F").resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    heat = np.array(heat_colours(), np.float32)[(smooth * 255).round().astype(int)]
    grey = np.asarray(image, np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    opaque = (0.5 + 0.35 * smooth)[..., None]
    shown = 0.6 * grey[..., None] * (1 - opaque) + heat * opaque
    canvas = Image.fromarray(np.clip(shown, 0, 255).astype(np.uint8))
    _draw_objects(canvas, objects_xyxy, _line_width(canvas, 4 * len(objects_xyxy)))
    return np.asarray(canvas)


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count if count else 'no'} {one if count == 1 else many or one + 's'}"


def _class_keys(labels: npt.NDArray[Any], names: Sequence[str]) -> tuple[Key, ...]:
    counts = Counter(int(label) for label in labels).most_common()
    keys = [
        Key(f"{names[label]} ({count})" if count > 1 else names[label], (class_colour(label),))
        for label, count in counts[:_CLASSES_SHOWN]
    ]
    more = len(counts) - len(keys)
    return (*keys, *([Key(f"and {_counted(more, 'more class', 'more classes')}", style="words")] if more else []))


def _detections_panel(title: str, found: Detections, shown: Explanation) -> Panel:
    picture, factor = fitted(shown.image)
    drawn = draw_boxes(
        picture, found.boxes_xyxy * factor, found.category_ids, found.scores, shown.labels, smallest_side=1
    )
    note = f"{_counted(len(found.scores), 'box', 'boxes')} of score {shown.threshold:g} or more"
    return Panel(title, note, drawn, _class_keys(found.category_ids, shown.labels))


def _objects_panel(shown: Explanation) -> Panel:
    picture, factor = fitted(shown.image)
    objects = shown.objects
    canvas = Image.fromarray(picture)
    for crowd in shown.crowds_xyxy * factor:
        draw_dashed(ImageDraw.Draw(canvas), _corners(crowd, canvas), OBJECT, 2)
    boxes, labels = objects.boxes_xyxy * factor, objects.category_ids
    drawn = draw_boxes(np.asarray(canvas), boxes, labels, None, shown.labels, smallest_side=1)
    keys = _class_keys(labels, shown.labels)
    if len(shown.crowds_xyxy):
        keys += (Key(f"{_counted(len(shown.crowds_xyxy), 'crowd')}, no target", (OBJECT,), "dashed"),)
    if shown.stand_ins:
        said = f"{_counted(len(labels), 'box', 'boxes')} of the teacher's, score {STAND_IN_SCORE:g} or more"
        return Panel("Not annotated: stand-in objects", said, drawn, keys)
    return Panel("Ground truth", _counted(len(labels), "object"), drawn, keys)


def band_range(rule: QuerySelectionConfig, band: int) -> str:
    """What a band is, in words: "GIoU 0.5 or more", "GIoU 0.3 to 0.5"."""
    measure = "GIoU over the best's" if rule.relative else "GIoU"
    low = rule.boundaries[band - 1] if band else None
    high = rule.boundaries[band] if band < len(rule.boundaries) else None
    if low is None:
        return measure if high is None else f"{measure} below {high:g}"
    return f"{measure} {low:g} or more" if high is None else f"{measure} {low:g} to {high:g}"


def _selection_panel(kept: KeptQueries, shown: Explanation) -> Panel:
    picture, factor = fitted(shown.image)
    objects, rule, colours = shown.objects.boxes_xyxy * factor, kept.rule, band_colours(kept.rule)
    drawn = draw_selection(
        picture, objects, kept.boxes_xyxy * factor, kept.is_positive, kept.band, kept.weight, colours
    )
    hard = kept.hard_negatives()
    keys = [Key("object", (OBJECT,), "dashed")] if len(objects) else []
    matched = f"positive, matched with an object: {kept.positives}"
    keys.append(Key(matched if rule.positive_weight else f"{matched} (weight 0: not kept)", (POSITIVE,)))
    for band, colour in colours.items():
        weight = "" if rule.band_weights[band] == 1 else f", weight {rule.band_weights[band]:g}"
        said = f"hard negative, {band_range(rule, band)}{weight}: {kept.hard_negatives(band)}"
        keys.append(Key(said, (colour,)))
    keys.append(Key(f"not drawn: {_counted(kept.easy_negatives, 'easy negative')}", style="words"))
    if kept.beyond_limit:
        said = f"not drawn: {_counted(kept.beyond_limit, 'hard negative')} beyond {rule.max_per_object} an object"
        keys.append(Key(said, style="words"))
    note = f"{kept.positives + hard} of {len(kept.weight)} queries are distilled"
    if not len(objects):
        note = f"none of {len(kept.weight)} queries: there is no object to select for"
    elif rule.shuffled:
        note += "; shuffled, the ablation's control: colours do not follow GIoU"
    return Panel("Teacher's selected queries", note, drawn, tuple(keys))


def _mask_panel(mask: Mask, shown: Explanation) -> Panel:
    picture, factor = fitted(shown.image)
    density = mask.density(*mask.levels[0].shape)
    drawn = draw_mask(picture, density, shown.objects.boxes_xyxy * factor)
    if not density.max() > 0:
        return Panel("AGFD's mask", "empty: an image without objects adds nothing to the loss", drawn)
    note = f"{mask.share:.0%} of its mass in objects, which cover {mask.object_share:.0%}"
    maps = f", {len(mask.levels)} maps together" if len(mask.levels) > 1 else ""
    return Panel("AGFD's mask", note, drawn, (Key(f"0 to its largest value{maps}", heat_colours(), "heat"),))


def explanation_picture(shown: Explanation, about: str) -> Picture:
    """A sheet of panels: objects, teacher, its selected queries, the mask, each student. about: one line on whose they are.

    Without a teacher its panels are left out.
    """
    panels = [_objects_panel(shown)] if not shown.stand_ins or shown.teacher is not None else []
    if shown.teacher is not None and shown.kept is not None and shown.mask is not None:
        panels.append(_detections_panel("Teacher's detections", shown.teacher, shown))
        panels += [_selection_panel(shown.kept, shown), _mask_panel(shown.mask, shown)]
    panels += [_detections_panel(title, found, shown) for title, found in shown.students.items()]
    return sheet(shown.name, about, warning_of(shown), panels)


def warning_of(shown: Explanation) -> str:
    """What must be known before the picture is believed; empty when there is nothing."""
    if not shown.stand_ins or shown.teacher is None:
        return ""
    if not len(shown.objects.scores):
        return (
            f"Nobody annotated this image, and the teacher is sure of nothing in it (score {STAND_IN_SCORE:g}): there is no "
            "object to select queries for."
        )
    return (
        "Nobody annotated this image. The teacher's own detections stand in for its objects: selection and mask show what "
        "it would teach if it were right."
    )
