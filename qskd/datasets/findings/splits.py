"""What two splits tell only together, and a split and a student: pictures in both, more objects than can be found."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.findings.finding import MOST_EXAMPLES
from qskd.datasets.findings.survey import COUNTED

if TYPE_CHECKING:
    from qskd.datasets.manifest import Manifest

MOST_KEPT = 2**17  # pictures: all of COCO's 118,000; as text in the manifest 2.8 MB
_ROW = np.dtype([("content", "<u8"), ("image_id", "<i8")])


def packed_pictures(contents: NDArray[np.uint64], image_ids: NDArray[np.int64]) -> str:
    """Hashes of pictures and their images' ids as text for a manifest: of more than MOST_KEPT those with the lowest hashes.
    Two sets keep the same part of the range of hashes, so that a picture in both is in both texts, or in neither where the
    larger set was cut."""
    kept = np.argsort(contents, kind="stable")[:MOST_KEPT]
    rows = np.empty(len(kept), _ROW)
    rows["content"], rows["image_id"] = contents[kept], image_ids[kept]
    return base64.b64encode(rows.tobytes()).decode()


def unpacked_pictures(text: str) -> Mapping[int, int]:
    """Hash -> image id. ValueError where the text is not one of `packed_pictures`."""
    rows = picture_rows(text)
    return dict(zip(rows["content"].tolist(), rows["image_id"].tolist(), strict=True))


def picture_rows(text: str) -> NDArray[np.void]:
    """The same as rows of `content` and `image_id`."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), _ROW)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"`pictures` can't be read: {error}") from None


def between(train: Manifest, val: Manifest, queries: int, from_checkpoint: bool = False) -> list[str]:
    """A sentence for each thing that a training on these two splits should know of. queries: the student's. from_checkpoint: it
    has them from there, and can't be given more. Of a manifest from before these things were kept, nothing is said."""
    said = []
    if not val.num_objects:
        said.append("data.val has no objects: AP can't be measured, and every checkpoint is as good as any other")
    if train.fingerprint == val.fingerprint:
        said.append("data.train and data.val are the same: AP is of what was trained on, not of new pictures")
    else:
        said += shared(train, val, "data.train", "train", "Prepare them from lists that have no picture in common")
    crowded = [
        f"data.{name} has images with up to {split.most_objects} objects (image {split.most_objects_in})"
        for name, split in (("train", train), ("val", val))
        if (split.most_objects or 0) > queries
    ]
    if crowded:
        most = max(train.most_objects or 0, val.most_objects or 0)
        whose, remedy = f"student.queries = {queries}", f"--set student.queries={most}"
        if from_checkpoint:
            whose, remedy = f"the {queries} queries of student.init", "Choose a checkpoint with more"
        said.append(
            f"{', '.join(crowded)}, and the student finds at most {whose} in each: the others are lost. "
            f"{remedy}, or cut the pictures into tiles"
        )
    if (val.most_objects or 0) > COUNTED:
        said.append(
            f"data.val has images with up to {val.most_objects} objects (image {val.most_objects_in}), and AP counts {COUNTED} "
            "detections of an image: `qskd evaluate --max-detections N` counts more"
        )
    return said


def shared(ours: Manifest, val: Manifest, field: str, name: str, remedy: str) -> list[str]:
    """A sentence where a folder that is trained on has pictures of the validation split. field, name: what it is called."""
    if not (ours.pictures and val.pictures):
        return []
    known = unpacked_pictures(ours.pictures)
    found = [
        (number, known[content]) for content, number in unpacked_pictures(val.pictures).items() if content in known
    ]
    if not found:
        return []
    first = sorted(found)[:MOST_EXAMPLES]
    pairs = ", ".join(f"image {of_val} of val is image {of_ours} of {name}" for of_val, of_ours in first)
    pairs += ", ..." if len(found) > len(first) else ""
    least = "at least " if max(ours.num_images, val.num_images) > MOST_KEPT else ""
    return [
        f"{field} and data.val share {least}{len(found)} of {val.num_images} validation pictures, byte for byte ({pairs}): AP "
        f"will be too good. {remedy}"
    ]


def beyond_reach(where: str, split: Manifest, queries: int, counted: int) -> list[str]:
    """The same of an evaluation of any detector. where: the split's folder; counted: detections of an image."""
    most, said = split.most_objects or 0, []
    crowded = f"{where} has images with up to {most} objects (image {split.most_objects_in})"
    if most > counted:
        said.append(f"{crowded}, of which {counted} can be found: --max-detections {most} counts all")
    if most > queries:
        said.append(f"{crowded}, and the detector has {queries} queries, each for one object: the others are missed")
    return said
