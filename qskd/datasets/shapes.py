"""The built-in synthetic dataset in COCO format: shapes on textured backgrounds, with a dial for each difficulty.

Image i depends only on the configuration and i, so any prefix or part of a dataset is the same wherever it is made.
Defaults are easy: 64 px, 1 to 5 objects from 12 px.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pyarrow.fs import LocalFileSystem
from pydantic import Field, model_validator

from qskd.config import Fraction, Positive, Section
from qskd.datasets.views import Pixels
from qskd.errors import QskdError, writing
from qskd.storage.files import UNFINISHED, publish_bytes
from qskd.untrusted import parse_large_json

EASY = ("circle", "square", "triangle", "star", "plus", "ring", "diamond", "hexagon")
# Each is a near twin of an easy class, so that telling classes apart needs fine detail.
TWINS = ("ellipse", "rectangle", "right triangle", "four-point star", "tee", "broken ring", "kite", "octagon")
CATEGORY_IDS = (1, 2, 3, 5, 7, 8, 10, 11, 13, 14, 16, 17, 19, 20, 23, 25)  # with gaps, like COCO's
_SUPERSAMPLE = 3
_HIDDEN = 0.3  # an object of which less than this is visible is left out, picture and annotation
_JPEG_QUALITY = 92


class ShapesConfig(Section):
    """What to draw. Give training and validation different `first_image` (or seeds), or one contains the other."""

    images: Positive = 12_000
    first_image: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    size: Annotated[int, Field(ge=32, le=8192)] = 64  # pixels, square
    min_objects: Annotated[int, Field(ge=0)] = 1
    max_objects: Annotated[int, Field(ge=0, le=200)] = 5
    min_object: Annotated[float, Field(ge=8)] = 12.0  # diameter in pixels
    max_object: Annotated[float, Field(ge=8)] = 30.0
    classes: Literal["easy", "hard"] = "easy"  # hard: 16 classes in 8 pairs of twins
    crowding: Fraction = 0.0  # chance that an object is put beside one already there
    occlusion: Fraction = 0.3  # how much of the smaller of two boxes may be shared
    clutter: Fraction = 0.3  # lines and blobs that are no objects
    noise: Fraction = 0.25  # 1: a standard deviation of 40 grey levels

    @model_validator(mode="after")
    def _drawable(self) -> ShapesConfig:
        if self.min_objects > self.max_objects or self.min_object > self.max_object:
            raise ValueError("min_objects and min_object must not exceed max_objects and max_object")
        if self.max_object > self.size - 4:
            raise ValueError(f"max_object {self.max_object} does not fit into {self.size} px with a margin of 2")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        return EASY if self.classes == "easy" else EASY + TWINS


def _polar(radii: list[float], start: float = 0.0) -> NDArray[np.float64]:
    angles = start + np.arange(len(radii)) * (2 * math.pi / len(radii))
    return np.stack([np.array(radii) * np.cos(angles), np.array(radii) * np.sin(angles)], axis=1)


def _arc(inner: float, outer: float, span: float) -> NDArray[np.float64]:
    angles = np.linspace(0, span, 40)
    edge = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([edge * outer, edge[::-1] * inner])


_ARM = np.array([(0.95, -0.32), (0.95, 0.32), (0.32, 0.32)])
_TURN = np.array([(0.0, 1.0), (-1.0, 0.0)])
_TEE = [(-0.9, -0.8), (0.9, -0.8), (0.9, -0.25), (0.3, -0.25), (0.3, 0.95), (-0.3, 0.95), (-0.3, -0.25), (-0.9, -0.25)]
# Unit outlines: the farthest point is about 1 from the centre.
_OUTLINES: dict[str, NDArray[np.float64]] = {
    "circle": _polar([1.0] * 40) * 0.92,
    "square": _polar([1.0] * 4),
    "triangle": _polar([1.0] * 3),
    "star": _polar([1.0, 0.4] * 5),
    "plus": np.concatenate([_ARM, _ARM @ _TURN, _ARM @ _TURN @ _TURN, _ARM @ _TURN @ _TURN @ _TURN]),
    "ring": _arc(0.5, 0.95, 2 * math.pi),
    "diamond": _polar([1.0, 0.4] * 2),
    "hexagon": _polar([1.0] * 6),
    "ellipse": _polar([1.0] * 40) * [1.0, 0.68],
    "rectangle": np.array([(0.86, 0.5), (-0.86, 0.5), (-0.86, -0.5), (0.86, -0.5)]),
    "right triangle": np.array([(-0.62, -0.62), (0.9, -0.62), (-0.62, 0.9)]),
    "four-point star": _polar([1.0, 0.4] * 4),
    "tee": np.array(_TEE),
    "broken ring": _arc(0.5, 0.95, 1.6 * math.pi),
    "kite": np.array([(1.0, 0.0), (-0.25, 0.52), (-0.75, 0.0), (-0.25, -0.52)]),
    "octagon": _polar([1.0] * 8),
}
# No farther than 1, or a shape could leave the picture.
_OUTLINES = {name: points / max(1.0, np.linalg.norm(points, axis=1).max()) for name, points in _OUTLINES.items()}


@dataclass(frozen=True, eq=False)
class _Shape:
    label: int
    colour: tuple[int, ...]
    mask: Image.Image  # supersampled, 0 or 255, whole pixels in size
    corner: tuple[int, int]  # of the mask, in pixels


def _colour(rng: np.random.Generator, background: Any) -> tuple[int, ...]:
    """A colour that stands out from the background's."""
    while True:
        colour = tuple(rng.bytes(3))
        if sum(abs(a - b) for a, b in zip(colour, background, strict=True)) > 160:
            return colour


def _mask(outline: NDArray[np.float64]) -> tuple[Image.Image, tuple[int, int]]:
    """The filled outline (pixels), supersampled, and the whole-pixel corner its picture starts at."""
    (left, top), (right, bottom) = outline.min(axis=0).tolist(), outline.max(axis=0).tolist()
    corner = math.floor(left), math.floor(top)
    size = math.ceil(right) + 1 - corner[0], math.ceil(bottom) + 1 - corner[1]
    mask = Image.new("L", (size[0] * _SUPERSAMPLE, size[1] * _SUPERSAMPLE))
    ImageDraw.Draw(mask).polygon(((outline - corner) * _SUPERSAMPLE).ravel().tolist(), fill=255)
    return mask, corner


def _enlarged(texture: NDArray[np.float64], side: int) -> Image.Image:
    return Image.fromarray(np.clip(texture, 0, 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)


def _background(rng: np.random.Generator, config: ShapesConfig) -> Image.Image:
    """A smooth texture of two scales, crossed by the clutter's lines."""
    cells = config.size // 4
    coarse = _enlarged(rng.uniform(40, 215, 3) + rng.normal(0, 28, (4, 4, 3)), cells)
    canvas = _enlarged(np.asarray(coarse) + rng.normal(0, 9, (cells, cells, 3)), config.size)
    lines = int(rng.poisson(config.clutter * 10 * config.size / 64))
    if not lines:
        return canvas
    canvas = canvas.resize(
        (config.size * 2,) * 2, Image.Resampling.NEAREST
    )  # halved again below: lines are antialiased
    draw = ImageDraw.Draw(canvas)
    for x, y, turn, length, red, green, blue, width in rng.random((lines, 8)).tolist():
        start, angle, reach = (x * canvas.width, y * canvas.height), 2 * math.pi * turn, 16 + 64 * length
        end = (start[0] + reach * math.cos(angle), start[1] + reach * math.sin(angle))
        draw.line([start, end], fill=(int(256 * red), int(256 * green), int(256 * blue)), width=1 + int(3 * width))
    return canvas.reduce(2)


def _place(
    rng: np.random.Generator, config: ShapesConfig, placed: list[tuple[float, float, float]], diameter: float
) -> tuple[float, float] | None:
    """A centre whose square of side `diameter` shares with no other more than `occlusion` of the smaller of the two.

    placed: (x, y, diameter) of those already there. None when twenty tries find no such place.
    """
    low, high = diameter / 2 + 1, config.size - diameter / 2 - 1
    for u, v, choice, beside in rng.random((20, 4)).tolist():
        x, y = low + (high - low) * u, low + (high - low) * v
        if placed and beside < config.crowding:
            other_x, other_y, other_diameter = placed[int(choice * len(placed))]
            reach, angle = (other_diameter + diameter) / 2 * (0.6 + 0.5 * u), 2 * math.pi * v
            x = min(max(other_x + reach * math.cos(angle), low), high)
            y = min(max(other_y + reach * math.sin(angle), low), high)
        for other_x, other_y, other_diameter in placed:
            reach, smaller = (other_diameter + diameter) / 2, min(other_diameter, diameter)
            width, height = reach - abs(other_x - x), reach - abs(other_y - y)
            if width > 0 and height > 0 and min(width, smaller) * min(height, smaller) > config.occlusion * smaller**2:
                break
        else:
            return x, y
    return None


def render(config: ShapesConfig, index: int) -> tuple[Pixels, list[dict[str, Any]]]:
    """Image number `index`: pixels uint8 [size, size, 3], and its objects as COCO annotations without ids.

    Boxes are tight round the outline as drawn if nothing covered it; area is that of the outline, in square pixels.
    """
    digest = hashlib.blake2b(f"qskd shapes {config.seed} {index}".encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    canvas = _background(rng, config)
    shapes: list[_Shape] = []  # topmost first
    placed: list[tuple[float, float, float]] = []
    covered = np.zeros((config.size * _SUPERSAMPLE,) * 2, np.bool_)
    for _ in range(int(rng.integers(config.min_objects, config.max_objects + 1))):
        diameter = math.exp(rng.uniform(math.log(config.min_object), math.log(config.max_object)))
        label, turn = int(rng.integers(len(config.class_names))), rng.uniform(0, 2 * math.pi)
        centre = _place(rng, config, placed, diameter)
        if centre is None:
            continue
        colour = _colour(rng, canvas.getpixel((int(centre[0]), int(centre[1]))))
        cos, sin = math.cos(turn), math.sin(turn)
        outline = _OUTLINES[config.class_names[label]] @ np.array([[cos, sin], [-sin, cos]]) * (diameter / 2) + centre
        mask, corner = _mask(outline)
        filled = np.asarray(mask) > 0
        left, top = corner[0] * _SUPERSAMPLE, corner[1] * _SUPERSAMPLE
        above = covered[top : top + mask.height, left : left + mask.width]
        if np.count_nonzero(filled & ~above) >= _HIDDEN * np.count_nonzero(filled):
            above |= filled
            placed.append((*centre, diameter))
            shapes.append(_Shape(label, colour, mask, corner))
    objects = []
    for shape in reversed(shapes):
        canvas.paste(shape.colour, shape.corner, shape.mask.reduce(_SUPERSAMPLE))
        left, top, right, bottom = shape.mask.getbbox() or (0, 0, 0, 0)
        x, y = shape.corner[0] + left / _SUPERSAMPLE, shape.corner[1] + top / _SUPERSAMPLE
        bbox = [round(v, 2) for v in (x, y, (right - left) / _SUPERSAMPLE, (bottom - top) / _SUPERSAMPLE)]
        area = round(shape.mask.histogram()[255] / _SUPERSAMPLE**2, 2)
        objects.append({"category_id": CATEGORY_IDS[shape.label], "bbox": bbox, "area": area, "iscrowd": 0})
    pixels = np.asarray(canvas)
    if config.noise:
        # The sum of two uniform bytes (standard deviation 104.5) is near enough to a normal, and costs a tenth of one.
        bytes_ = np.frombuffer(rng.bytes(2 * pixels.size), np.uint8).astype(np.int16).reshape(2, *pixels.shape)
        noise = ((bytes_[0] + bytes_[1] - 255) * np.int16(config.noise * 40 / 104.5 * 256)) >> 8
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    return pixels, objects


def make_shapes(config: ShapesConfig, folder: str | Path) -> tuple[Path, Path]:
    """Write the JPEG files and the COCO JSON into `folder`; returns (annotations, images folder).

    The JSON is written last and holds the configuration: a folder already made with the same one is left as it is. Pictures
    of one that was not finished are gone on with. Raises QskdError, before anything is written, when the folder holds other
    annotations, or other files by the pictures' names.
    """
    folder = Path(folder)
    annotations, images = folder / "annotations.json", folder / "images"
    recipe = {"made by": "qskd.datasets.shapes", "config": config.model_dump(mode="json")}
    if os.path.lexists(annotations):
        if _recipe_of(annotations) == recipe:
            return annotations, images
        raise QskdError(
            str(annotations),
            "another dataset",
            "a folder of its own",
            "choose another folder; this one is left as it is",
        )
    with writing(folder):
        _write(config, recipe, annotations, images)
    return annotations, images


def _write(config: ShapesConfig, recipe: dict[str, Any], annotations: Path, images: Path) -> None:
    there = _drawn_before(config, images)
    images.mkdir(parents=True, exist_ok=True)
    unfinished = images / f"{UNFINISHED}{uuid.uuid4().hex}"
    entries: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for index in range(config.first_image, config.first_image + config.images):
        file_name = _file_name(index)
        if index in there:
            found = there[index]
        else:
            encoded, found = _encoded(config, index)
            unfinished.write_bytes(encoded)
            os.replace(unfinished, images / file_name)
        entries.append({"id": index + 1, "file_name": file_name, "width": config.size, "height": config.size})
        objects += [{"id": len(objects) + n, "image_id": index + 1} | entry for n, entry in enumerate(found, 1)]
    categories = [
        {"id": key, "name": name, "supercategory": "shape"}
        for key, name in zip(CATEGORY_IDS, config.class_names, strict=False)
    ]
    document = {"info": recipe, "images": entries, "annotations": objects, "categories": categories}
    publish_bytes(json.dumps(document).encode(), LocalFileSystem(), str(annotations))


def _file_name(index: int) -> str:
    return f"{index + 1:012d}.jpg"


def _encoded(config: ShapesConfig, index: int) -> tuple[bytes, list[dict[str, Any]]]:
    """The bytes of the JPEG file, and its objects."""
    pixels, found = render(config, index)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue(), found


def _drawn_before(config: ShapesConfig, images: Path) -> dict[int, list[dict[str, Any]]]:
    """The objects of the pictures that are there already, by the image's number. QskdError for a file that has the name of
    a picture and other bytes: someone else's. (A picture appears whole: none of ours is half written.)"""
    there = {}
    for index in range(config.first_image, config.first_image + config.images):
        path = images / _file_name(index)
        if not os.path.lexists(path):
            continue
        encoded, there[index] = _encoded(config, index)
        if not path.is_file() or path.read_bytes() != encoded:
            found = "is there already, and qskd did not draw it from this configuration"
            remedy = "choose another folder; this file was left as it is, and nothing was written"
            raise QskdError(str(path), found, "no file of that name", remedy)
    return there


def _recipe_of(annotations: Path) -> Any:
    try:
        return parse_large_json(annotations.read_bytes(), str(annotations))["info"]
    except (OSError, QskdError, KeyError, TypeError):
        return None
