"""A dataset once its annotations are read: its images one after the other, each with its picture looked at.

Samples are upright. Where EXIF turns a picture, its boxes are read against the upright picture unless the listed size, or where
that can't tell those of the other turned pictures, is that of the stored pixels (`Exif`); then they are turned with it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Set
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from qskd.datasets.findings.turned_pictures import TurnedPictures, drawn_on
from qskd.datasets.formats.coco_fields import some
from qskd.datasets.formats.columns import ListedImage, ObjectColumns
from qskd.datasets.pictures.facts import Exif, PictureFacts
from qskd.datasets.pictures.files import folded
from qskd.datasets.pictures.reader import Examined, Part, PictureReader, Pictures, PicturesInFolder
from qskd.datasets.samples import Problem, Sample
from qskd.datasets.views import check_image
from qskd.errors import QskdError
from qskd.printable import one_line

OnError = Literal["stop", "skip"]


class ListedDataset(ABC):
    """Who reads the annotations fills `_images` and `_columns`, and checks them then; pictures are checked as `samples()` or
    `took()` reaches them."""

    _measured: Set[int] = frozenset()  # ids of images whose size is not the dataset's word, but was taken from the file

    def __init__(self, path: Path, root: Path, on_error: OnError, exif: Exif) -> None:
        self._path, self._root, self._on_error, self._exif = path, root, on_error, exif
        self._images: dict[int, ListedImage] = {}
        self._columns = ObjectColumns()
        self._problems, self._picture_problems = list[Problem](), list[Problem]()
        self._turned = TurnedPictures()

    def __len__(self) -> int:
        """Images the JSON lists; `samples()` yields fewer when broken pictures are skipped."""
        return len(self._images)

    @property
    def problems(self) -> list[Problem]:
        """What was wrong and what was dropped for it; pictures' problems are known once `samples()` has passed them."""
        return self._problems + self._picture_problems

    @abstractmethod
    def _image_where(self, image_id: Any, file_name: Any) -> str:
        """An image's name, for messages."""

    def samples(self) -> Iterator[Sample]:
        """Images in the JSON's order, one file read at a time. Raises QskdError at a broken picture unless skipping."""
        self._begin_pictures()
        reader = self.picture_reader
        for image in self._images.values():
            where, place = self.picture_where(image.id), self._picture_place(image)
            located = reader.pictures.locate(image.file_name, place, where)
            try:
                sample = reader.sample(self._columns.sample(image), located, where, lambda: self.others_say)
            except QskdError as error:
                if self._on_error == "stop":
                    raise
                self._drop_picture(image, error)
                continue
            if sample.picture:
                self._note_turned(image, sample.picture)
            yield sample

    def parts(self, images: int) -> Iterator[Part]:
        """What `samples` goes through, as so many images at a time that other processes can make samples of (`picture_reader`);
        what they find comes back by `took`, in this order."""
        self._begin_pictures()
        left = iter(self._images.values())
        while own := list(itertools.islice(left, images)):
            first = own[0].position
            objects = self._columns.cut(first, first + len(own))
            yield Part(own, objects, [self._picture_place(image) for image in own])

    def took(self, part: Part, examined: Examined) -> None:
        """Keep what was found in a part. Raises QskdError at what `samples` would."""
        for number, (row, error) in enumerate(examined.broken, 1):
            image = part.images[row]
            error = QskdError(self.picture_where(image.id), error.found, error.expected, error.remedy)
            if examined.fatal and number == len(examined.broken):
                raise error
            self._drop_picture(image, error)
        for row, facts in examined.turned:
            self._note_turned(part.images[row], facts)

    @functools.cached_property
    def picture_reader(self) -> PictureReader:
        """Makes samples of `parts`."""
        return PictureReader(self._picture_source(), self._exif, self._on_error == "skip")

    def picture_where(self, image_id: int) -> str:
        """An image's name, for messages."""
        return self._image_where(image_id, self._images[image_id].file_name)

    def outline(self) -> Iterator[Sample]:
        """The images as the JSON lists them, without their pictures: `encoded` is empty."""
        return (self._columns.sample(image) for image in self._images.values())

    def sample_of(self, picture: Path) -> Sample:
        """The picture as the JSON describes it: the image whose file_name is how the picture's path ends. QskdError when
        there is none, or more than one."""
        parts = PurePosixPath(picture.absolute().as_posix()).parts
        names = [(image, PurePosixPath(image.file_name).parts) for image in self._images.values()]
        found = [image for image, name in names if name == parts[-len(name) :]]
        if not found:
            found = [image for image, name in names if folded("/".join(name)) == folded("/".join(parts[-len(name) :]))]
        if len(found) != 1:
            listed = some([f"{image.id} ({one_line(image.file_name)})" for image in found]) or "no such image"
            raise QskdError(str(self._path), f"{listed} for {picture}", "one image whose file_name ends its path")
        where, located = self.picture_where(found[0].id), self._picture_place(found[0]) or picture
        return self.picture_reader.sample(self._columns.sample(found[0]), located, where, lambda: self.others_say)

    # -- pictures

    def _picture_source(self) -> Pictures:
        return PicturesInFolder(self._root)

    def _picture_place(self, image: ListedImage) -> str:
        """Where `_picture_source` finds it, if not by its file name alone."""
        return ""

    def _begin_pictures(self) -> None:
        self._picture_problems, self._turned = [], TurnedPictures()

    def _drop_picture(self, image: ListedImage, error: QskdError) -> None:
        dropped = f"the image and its {self._columns.count(image.position)} annotations"
        self._picture_problems.append({"where": error.where, "found": error.found, "dropped": dropped})

    def _note_turned(self, image: ListedImage, facts: PictureFacts) -> None:
        if facts.undecided or image.id not in self._measured:
            self._turned.add(f"image {image.id} ({image.file_name})", facts)

    @functools.cached_property
    def others_say(self) -> Exif:
        """What boxes refer to in all turned pictures whose size tells; auto where none does, or they contradict each other. Asked
        for at the first picture that needs it, because it reads the others' headers; the same for all."""
        images = [image for image in self._images.values() if image.id not in self._measured]
        return drawn_on(((i.width, i.height), functools.partial(self._glimpse, i)) for i in images) or "auto"

    def _glimpse(self, image: ListedImage) -> bytes:
        """A picture's bytes; none where there is no such file, which is told when its turn comes."""
        pictures, where = self.picture_reader.pictures, self.picture_where(image.id)
        located = pictures.locate(image.file_name, self._picture_place(image), where)
        if isinstance(located, Path) and not os.path.isfile(located):
            return b""
        return pictures.read(located, image.file_name, where)

    def _take_sizes(self, exif: Exif) -> None:
        """Boxes were drawn on the upright, or on the stored picture, whatever the JSON's sizes say: take its size instead."""
        pictures = self.picture_reader.pictures
        for image in self._images.values():
            where = self.picture_where(image.id)
            located = pictures.locate(image.file_name, self._picture_place(image), where)
            with contextlib.suppress(QskdError):  # told when its turn comes
                seen = check_image(pictures.read(located, image.file_name, where), where)
                if (image.width, image.height) in (seen.upright, seen.stored):
                    image.width, image.height = seen.upright if exif == "upright" else seen.stored
