"""QSKD's panels of an explained image: the selected queries, coloured by GIoU band, and AGFD's mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.pictures.drawing import OBJECT, corners, counted, draw_mask, draw_objects, fitted, heat_colours, line_width
from qskd.pictures.panels import Key, Panel
from qskd.pictures.plots import PALETTE, Colour, Picture

if TYPE_CHECKING:
    from qskd.distillation.qskd.seen import KeptQueries, Mask
    from qskd.pictures.explain import Explanation

POSITIVE: Colour = PALETTE[1]  # sky blue: dark blue is lost on dark photos
# Hard negatives, from the lowest band that is kept to the highest: yellow to dark red, as heat.
_RAMP: tuple[Colour, ...] = ((250, 235, 80), (240, 160, 20), (213, 80, 0), (165, 15, 50))


def band_colours(rule: QuerySelectionConfig) -> dict[int, Colour]:
    """The colour of each band whose hard negatives are kept."""
    kept = [band for band, weight in enumerate(rule.band_weights) if weight > 0]
    places = np.linspace(0, len(_RAMP) - 1, len(kept)) if len(kept) != 1 else np.array([1.0])
    ramp = np.array(_RAMP, float)
    mixed = [[np.interp(place, range(len(_RAMP)), ramp[:, channel]) for channel in range(3)] for place in places]
    return {band: (round(r), round(g), round(b)) for band, (r, g, b) in zip(kept, mixed, strict=True)}


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
    line = line_width(canvas, len(kept))
    draw_objects(canvas, objects_xyxy, line)  # below: a positive often lies on its very object
    for query in sorted(kept, key=lambda query: (positive[query], bands[query])):
        left, top, right, bottom = corners(boxes[query], canvas)
        wide = line + 1 if positive[query] else line
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=wide + 2)
        colour = POSITIVE if positive[query] else colours[int(bands[query])]
        draw.rectangle((left, top, right, bottom), outline=colour, width=wide)
    return np.asarray(canvas)


def band_range(rule: QuerySelectionConfig, band: int) -> str:
    """What a band is, in words: "GIoU 0.5 or more", "GIoU 0.3 to 0.5"."""
    measure = "GIoU over the best's" if rule.relative else "GIoU"
    low = rule.boundaries[band - 1] if band else None
    high = rule.boundaries[band] if band < len(rule.boundaries) else None
    if low is None:
        return measure if high is None else f"{measure} below {high:g}"
    return f"{measure} {low:g} or more" if high is None else f"{measure} {low:g} to {high:g}"


def selection_panel(kept: KeptQueries, shown: Explanation) -> Panel:
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
    keys.append(Key(f"not drawn: {counted(kept.easy_negatives, 'easy negative')}", style="words"))
    if kept.beyond_limit:
        said = f"not drawn: {counted(kept.beyond_limit, 'hard negative')} beyond {rule.max_per_object} an object"
        keys.append(Key(said, style="words"))
    note = f"{kept.positives + hard} of {len(kept.weight)} queries are distilled"
    if not len(objects):
        note = f"none of {len(kept.weight)} queries: there is no object to select for"
    elif rule.shuffled:
        note += "; shuffled, the ablation's control: colours do not follow GIoU"
    return Panel("Teacher's selected queries", note, drawn, tuple(keys))


def mask_panel(mask: Mask, shown: Explanation) -> Panel:
    picture, factor = fitted(shown.image)
    density = mask.density(*mask.levels[0].shape)
    drawn = draw_mask(picture, density, shown.objects.boxes_xyxy * factor)
    if not density.max() > 0:
        return Panel("AGFD's mask", "empty: an image without objects adds nothing to the loss", drawn)
    note = f"{mask.share:.0%} of its mass in objects, which cover {mask.object_share:.0%}"
    maps = f", {len(mask.levels)} maps together" if len(mask.levels) > 1 else ""
    return Panel("AGFD's mask", note, drawn, (Key(f"0 to its largest value{maps}", heat_colours(), "heat"),))
