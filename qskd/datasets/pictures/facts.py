"""What is told of a dataset's pictures: which were turned and how their boxes were read, which have more than 8 bits; and the
boxes of a turned picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from qskd.datasets.pictures.decoding import PictureError, is_deep, opened, orientation_of, says_orientation
from qskd.datasets.samples import Count, Sample
from qskd.errors import QskdError

# What boxes refer to where EXIF turns a picture. auto: what the JSON's size says; where it can't tell, what the sizes of the
# dataset's other turned pictures say if all agree, and else the upright picture.
Exif = Literal["auto", "upright", "stored"]
Size = tuple[int, int]  # width, height


class Seen(NamedTuple):
    """A picture. width, height: pixels, upright. orientation: EXIF's, 1 to 8. deep: more than 8 bits a
    channel. note: what a person should know of its range, or the empty string."""

    width: int
    height: int
    orientation: int
    deep: bool
    note: str

    @property
    def upright(self) -> Size:
        return self.width, self.height

    @property
    def stored(self) -> Size:
        """The size of the file's pixels before they are turned."""
        return (self.height, self.width) if self.orientation >= 5 else self.upright

    @property
    def size_tells_nothing(self) -> bool:
        """Whether it is turned, and has the same size before and after."""
        return self.orientation != 1 and self.stored == self.upright


@dataclass(frozen=True)
class PictureFacts:
    """Of one picture. turned: by EXIF. undecided: turned, and no size tells what its boxes refer to. boxes_turned: they were read
    against the stored pixels. deep: more than 8 bits a channel. dim: deep, and most of the range is unused. respelt: its file is
    spelt otherwise than in the JSON."""

    turned: bool = False
    undecided: bool = False
    boxes_turned: bool = False
    deep: bool = False
    dim: bool = False
    respelt: bool = False


@dataclass(frozen=True)
class PictureCounts:
    """How many of a dataset's pictures each of `PictureFacts` is true of."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    turned: Count = 0
    undecided: Count = 0
    boxes_turned: Count = 0
    deep: Count = 0
    dim: Count = 0
    respelt: Count = 0

    @staticmethod
    def of(pictures: Iterable[PictureFacts]) -> PictureCounts:
        names = [field.name for field in fields(PictureFacts)]
        counts = dict.fromkeys(names, 0)
        for picture in pictures:
            for name in names:
                counts[name] += getattr(picture, name)
        return PictureCounts(**counts)

    def __add__(self, other: PictureCounts) -> PictureCounts:
        return PictureCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def need_the_rule(self) -> bool:
        """Whether qskd of before the rule (`pictures.decoding`) saw some of them otherwise."""
        return bool(self.turned or self.deep)

    def lines(self) -> list[str]:
        """For `qskd prepare`: what is worth a word, one line each."""
        said = []
        if self.turned:
            said.append(f"{_pictures(self.turned)} stored turned (EXIF) and seen upright")
        if self.boxes_turned:
            said.append(
                f"  of {self.boxes_turned}, boxes were read against the stored pixels and turned with them; were they drawn on "
                "the upright picture, pass --exif upright"
            )
        if self.deep:
            said.append(f"{_pictures(self.deep)} of more than 8 bits a channel, scaled to 8")
        if self.dim:
            said.append(f"  {self.dim} of them use a small part of their range (docs/guide.md, How pictures are read)")
        if self.respelt:
            said.append(
                f"{_pictures(self.respelt)} found under another spelling (case, accents or slashes) than the JSON's"
            )
        return said


def _pictures(count: int) -> str:
    return "1 picture is" if count == 1 else f"{count} pictures are"


class PictureCounter:
    """Counts the pictures of samples that pass."""

    def __init__(self) -> None:
        self.counts = PictureCounts()

    def counted(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            self.add(sample)
            yield sample

    def add(self, sample: Sample) -> None:
        picture = sample.picture or look(sample.encoded)
        if picture != PictureFacts():  # which adds nothing, and nearly all are so
            self.counts += PictureCounts.of([picture])


def upright(listed: Sample, seen: Seen, exif: Exif, respelt: bool, where: str, remedy: str) -> Sample:
    """The sample as it is seen. listed: as its source lists it, with the size of the upright or of the stored picture (after
    `exif` other than auto, of that); QskdError with another one."""
    size = listed.width, listed.height
    if size not in (seen.upright, seen.stored):
        found = f"the picture is {seen.width} x {seen.height} pixels"
        if seen.stored != seen.upright:
            found += f" ({seen.stored[0]} x {seen.stored[1]} before EXIF turns it)"
        raise QskdError(where, found, f"{listed.width} x {listed.height}, as the JSON says", remedy)
    turned, alike = seen.orientation != 1, seen.stored == seen.upright
    facts = PictureFacts(
        turned=turned,
        undecided=turned and alike and exif == "auto",
        boxes_turned=turned and (exif == "stored" if alike else size == seen.stored),
        deep=seen.deep,
        dim=bool(seen.note),
        respelt=respelt,
    )
    boxes_xyxy = listed.boxes_xyxy
    if facts.boxes_turned:
        boxes_xyxy = turned_boxes(boxes_xyxy, seen.stored, seen.orientation)
    return replace(listed, width=seen.width, height=seen.height, boxes_xyxy=boxes_xyxy, picture=facts)


def look(encoded: bytes) -> PictureFacts:
    """What the header says, for pictures of a source that says nothing of them."""
    seen = seen_by_header(encoded)
    return PictureFacts(turned=seen.orientation != 1, deep=seen.deep) if seen else PictureFacts()


def seen_by_header(encoded: bytes) -> Seen | None:
    """The picture, without decoding it. None: it is broken, which is for the decoder to name."""
    try:
        picture = opened(encoded)
    except PictureError:
        return None
    deep = is_deep(picture)
    # Pillow decodes a whole PNG in search of EXIF, which may follow the pixels.
    none = picture.format == "PNG" and not says_orientation(encoded)
    width, height = picture.size
    orientation = 1 if none else orientation_of(picture)
    if orientation >= 5 and picture.format != "TIFF":  # whose size Pillow turns itself
        width, height = height, width
    return Seen(width, height, orientation, deep, "")


def fits_only_turned(bbox_xywh: list[float], size: Size) -> bool:
    """Whether a box of this many pixels lies in a picture of the size turned by a quarter, and not in one of the size itself."""
    x, y, w, h = bbox_xywh
    width, height = size
    turned = min(x, y, w, h) >= 0 and x + w <= height and y + h <= width
    return turned and not (x + w <= width and y + h <= height)


def turned_boxes(boxes_xyxy: NDArray[np.float32], stored: Size, orientation: int) -> NDArray[np.float32]:
    """Boxes [N, 4] on the stored pixels of a picture -> on the upright picture."""
    left, top, right, bottom = boxes_xyxy.astype(np.float64).T
    width, height = stored
    if orientation >= 5:
        left, top, right, bottom, width, height = top, left, bottom, right, height, width
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return np.stack([left, top, right, bottom], axis=1).astype(np.float32)


def stored_boxes(boxes_xyxy: NDArray[np.float32], upright: Size, orientation: int) -> NDArray[np.float32]:
    """Boxes [N, 4] on the upright picture -> on the stored pixels: as `turned_boxes` of the turn back."""
    return turned_boxes(boxes_xyxy, upright, {6: 8, 8: 6}.get(orientation, orientation))
