"""A listed image and its picture -> a sample: what `qskd prepare` spends its time on, in this process or in a helper's.

A `PictureReader` is small and can be sent to another process; so can a `Part`, some consecutive images, and what was found in it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qskd.datasets.findings.survey import Survey
from qskd.datasets.formats.columns import ListedImage, ObjectColumns
from qskd.datasets.pictures.facts import Exif, PictureCounter, PictureFacts, upright
from qskd.datasets.pictures.files import PictureFolder
from qskd.datasets.samples import Sample, to_table
from qskd.datasets.views import check_image
from qskd.errors import QskdError
from qskd.printable import one_line

Stamp = tuple[int, int]  # when a picture's file was written last, in ns; its bytes
FIX = "correct the dataset, or pass `--on-error skip` to leave such entries out and list them in the manifest"


class Pictures(Protocol):
    """Where a dataset's pictures are. Can be sent to another process."""

    def locate(self, file_name: str, place: str, where: str) -> Any:
        """What `read` takes. A QskdError stops, also where broken pictures are skipped. place: of `Part.places`."""

    def read(self, located: Any, file_name: str, where: str) -> bytes: ...

    def changed_at(self, located: Any) -> int:
        """When the picture's file was written last, in ns; 0 where it has none of its own."""

    def read_again(self, located: Any, stamp: Stamp, into: NDArray[np.uint8]) -> bool:
        """Whether the picture is what it was when it had this stamp; its bytes are put into `into` then."""

    def is_respelt(self, file_name: str) -> bool:
        """Whether the picture that was located is spelt otherwise than `file_name`."""


class PicturesInFolder:
    """Pictures by their names in a folder. folder: as given, links in its path not yet followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = PictureFolder(folder.resolve())

    def locate(self, file_name: str, place: str, where: str) -> Path:
        return self._folder.locate(file_name, where)

    def read(self, located: Path, file_name: str, where: str) -> bytes:
        return self._folder.read(located, where, file_name, FIX)

    def changed_at(self, located: Path) -> int:
        try:
            return os.stat(located).st_mtime_ns
        except (OSError, ValueError):
            return 0  # no such file, which is for `read` to say

    def read_again(self, located: Path, stamp: Stamp, into: NDArray[np.uint8]) -> bool:
        try:
            with open(located, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                done = 0
                while done < len(into) and (some := file.readinto(memoryview(into.data)[done:])):
                    done += some
                return (status.st_mtime_ns, status.st_size) == stamp and done == len(into)
        except OSError:
            return False

    def is_respelt(self, file_name: str) -> bool:
        return file_name in self._folder.respelt


@dataclass(frozen=True)
class Part:
    """Consecutive images, as listed, and their objects. places: of each picture, where `Pictures` is asked for one. others_say:
    what boxes refer to in turned pictures whose size can't tell; None: not asked for yet."""

    images: Sequence[ListedImage]
    objects: ObjectColumns
    places: Sequence[str]
    others_say: Exif | None = None


@dataclass
class Examined:
    """What is in a part. table: the images that can be used, as samples are, `encoded` empty. located: where their pictures are,
    for `Pictures.read_again`; stamps: when these were written, and their bytes. broken: (row, what is wrong) of the others; the
    last stops everything if `fatal`. turned: (row, facts) of the pictures that EXIF turns. left_out: annotations left out, by
    category. undecided: nothing was found, because `others_say` is needed first."""

    located: list[Any] = field(default_factory=list)
    stamps: list[Stamp] = field(default_factory=list)
    broken: list[tuple[int, QskdError]] = field(default_factory=list)
    fatal: bool = False
    turned: list[tuple[int, PictureFacts]] = field(default_factory=list)
    left_out: dict[int, int] = field(default_factory=dict)
    survey: Survey = field(default_factory=Survey)
    counter: PictureCounter = field(default_factory=PictureCounter)
    table: pa.Table | None = None
    undecided: bool = False


class _OthersNeeded(Exception):
    """What other turned pictures say is not known here."""


def without_categories(sample: Sample, category_ids: Sequence[int]) -> tuple[Sample, list[int]]:
    """The sample without the annotations of these categories, and the category of each that is gone."""
    if not category_ids:
        return sample, []
    out = np.isin(sample.category_ids, category_ids)
    if not out.any():
        return sample, []
    names = ("boxes_xyxy", "category_ids", "area", "iscrowd")
    return replace(sample, **{name: getattr(sample, name)[~out] for name in names}), sample.category_ids[out].tolist()


@dataclass(frozen=True)
class PictureReader:
    """pictures: where they are. exif: what boxes refer to where a picture is turned. skip: whether broken ones are left out.
    leave_out: categories whose annotations are left out of parts."""

    pictures: Pictures
    exif: Exif
    skip: bool
    leave_out: tuple[int, ...] = ()

    def sample(self, listed: Sample, located: Any, where: str, others_say: Callable[[], Exif]) -> Sample:
        """The listed image as it is seen, with its picture's bytes. QskdError when the picture is broken."""
        encoded = self.pictures.read(located, listed.file_name, where)
        seen, exif = check_image(encoded, where), self.exif
        if exif == "auto" and seen.size_tells_nothing:
            exif = others_say()
        respelt = self.pictures.is_respelt(listed.file_name)
        return upright(replace(listed, encoded=encoded), seen, exif, respelt, where, FIX)

    def examine(self, part: Part) -> Examined:
        """Errors name no image (`where` is empty): the part's owner knows the name."""

        def others_say() -> Exif:
            if part.others_say is None:
                raise _OthersNeeded
            return part.others_say

        found, bare = Examined(), list[Sample]()
        try:
            for row, (image, place) in enumerate(zip(part.images, part.places, strict=True)):
                try:
                    found.fatal = True
                    located = self.pictures.locate(image.file_name, place, "")
                    found.fatal, changed_at = not self.skip, self.pictures.changed_at(located)
                    sample = self.sample(part.objects.sample(image), located, "", others_say)
                except QskdError as error:
                    found.broken.append((row, error))
                    if found.fatal:
                        break
                    continue
                sample, gone = without_categories(sample, self.leave_out)
                for category_id in gone:
                    found.left_out[category_id] = found.left_out.get(category_id, 0) + 1
                if sample.picture and sample.picture.turned:
                    found.turned.append((row, sample.picture))
                found.survey.add(sample)
                found.counter.add(sample)
                found.located.append(located)
                found.stamps.append((changed_at, len(sample.encoded)))
                bare.append(replace(sample, encoded=b""))
        except _OthersNeeded:
            return Examined(undecided=True)
        found.fatal = found.fatal and bool(found.broken)
        found.table = to_table(bare) if bare else None
        return found

    def encoded(self, names: Sequence[str], located: Sequence[Any], stamps: Sequence[Stamp]) -> pa.Array:
        """The pictures' bytes once more, of examined images. QskdError naming the first that is not what it was."""
        offsets = np.cumsum([0, *(size for _, size in stamps)])
        data = np.empty(offsets[-1], np.uint8)
        for name, where, stamp, start in zip(names, located, stamps, offsets.tolist(), strict=False):
            if not self.pictures.read_again(where, stamp, data[start : start + stamp[1]]):
                found, expected = (
                    "the picture was changed meanwhile",
                    "files that nobody changes while they are prepared",
                )
                raise QskdError(one_line(name), found, expected, "run the same command again")
        if offsets[-1] >= 2**31:  # more than offsets of 32 bits reach
            return pa.array([data[i:j].tobytes() for i, j in pairwise(offsets.tolist())], pa.binary())
        buffers = [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
        return pa.Array.from_buffers(pa.binary(), len(stamps), buffers)
