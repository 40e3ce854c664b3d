"""Whether a file of detections is of the images that it is to teach on: by their ids, their sizes, and where its boxes lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qskd.config import Config
from qskd.datasets.shards import ShardReader
from qskd.errors import QskdError
from qskd.teacher.told.results import Results, is_results, read_results

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

FEW = 0.5  # of the ids, on both sides: below it the file is of another dataset
NOTICED = 0.1  # of a box's area, outside of its image: a detector's own inaccuracy is less
MUCH = 0.25  # of a box's area; where most boxes lose it, they are not in the pixels of these images
OTHERWISE_FROM = 10  # boxes: fewer fit another format by chance
_BOX = "bbox: left, top, width and height, in pixels of the image as it is stored, upright"

# What `left, top, width, height` may hold instead: left, top, right, bottom of a box so read.
_READINGS: Mapping[str, Callable[[Floats, Floats], tuple[NDArray[Any], NDArray[Any]]]] = {
    "left, top, right, bottom": lambda first, second: (first, second),
    "centre x, centre y, width, height": lambda first, second: (first - second / 2, first + second / 2),
}


def fit_notices(config: Config) -> list[str]:
    """What there is to say of a file of detections beside `data.train`; QskdError where it is plainly of other images, or in other
    coordinates. [] of other teachers. Of the shards it reads ids and sizes alone, no pixels."""
    path, uri = config.teacher.path, config.data.train
    if not is_results(path) or not uri:
        return []
    reader, results = ShardReader(uri), read_results(path)
    parts = [reader.dimensions(shard) for shard in range(len(reader.manifest.shards))]
    ids, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(ids)
    ids, sizes = ids[order], sizes[order, ::-1]
    found = _of_ids(results, ids, uri)
    if results.categories is None:
        _check_categories(results, ids, [one.id for one in reader.manifest.categories])
    return found + _of_boxes(results, ids, sizes)


def of_other_images(path: str, image_id: int, found: str) -> QskdError:
    return QskdError(
        path,
        f"image {image_id}: {found}",
        "detections of the very images of data.train, by their ids",
        "run the detector on the images that the shards were made of, with their ids",
    )


def of_other_classes(path: str, image_id: int, category_id: int, known: Sequence[int]) -> QskdError:
    found, expected = f"image {image_id}: category_id {category_id}", f"the dataset's ids: {list(known)[:20]}"
    return QskdError(path, found, expected, "give the ids that the detector's classes have there")


def _of_ids(results: Results, ids: Ids, uri: str) -> list[str]:
    """ids: the dataset's, ascending."""
    listed = np.array(sorted(results.sizes or ()), np.int64)
    named = np.union1d(results.image_ids, listed)
    strange, missing = np.setdiff1d(named, ids), np.setdiff1d(ids, named)
    both = len(named) - len(strange)
    said = f"image ids in it that {uri} does not have: {len(strange)} of {len(named)}{_first(strange)}"
    left = f"images of {uri} without an entry: {len(missing)} of {len(ids)}{_first(missing)}"
    if len(named) and both < FEW * min(len(named), len(ids)):
        raise QskdError(
            results.path,
            f"{said}; {left}",
            "detections of the images of data.train, by their ids",
            "give the ids that the images have in the dataset's JSON (`qskd predict --annotations` does); a file may have "
            "further images, but not those alone",
        )
    for by in (1, -1) if len(strange) else ():
        if np.isin(named + by, ids).all():
            raise QskdError(
                results.path,
                f"image ids that are {'one less' if by == 1 else 'one more'} than those of {uri}: {said}; with {by:+d} all are",
                "the ids that the images have in the dataset's JSON",
                f"add {by:+d} to each image_id; or, if the others are right, take out the entries of images that it does not have",
            )
    if len(strange):
        return [
            f"{results.path}: {said}, not used; {left}. Are the ids those of the dataset's JSON? A shifted number gives "
            "every image another image's boxes"
        ]
    if len(missing):
        return [f"{results.path}: {left}, taken for images in which nothing was found"]
    return []


def _check_categories(results: Results, ids: Ids, known: Sequence[int]) -> None:
    """Of a file without names: each of its ids, in the dataset's images, is one of the dataset's."""
    wrong = np.isin(results.image_ids, ids) & ~np.isin(results.category_ids, np.asarray(known, np.int64))
    if wrong.any():
        first = int(wrong.argmax())
        raise of_other_classes(results.path, int(results.image_ids[first]), int(results.category_ids[first]), known)


def _of_boxes(results: Results, ids: Ids, sizes: Ids) -> list[str]:
    """ids: int64 [I], ascending. sizes: (width, height) of each, int64 [I, 2]."""
    path = results.path
    for image_id, size in zip(ids.tolist(), sizes.tolist(), strict=True) if results.sizes else ():
        listed = (results.sizes or {}).get(image_id, tuple(size))
        if listed != tuple(size):
            raise of_other_images(
                path, image_id, f"{listed[0]} x {listed[1]} pixels there, {size[0]} x {size[1]} in the dataset"
            )
    if 2 * results.flat > results.flat + len(results.image_ids):
        raise _in_other_coordinates(results, f"{_flat(results)}, most of them")
    used = np.isin(results.image_ids, ids)
    image_ids, corners = results.image_ids[used], results.boxes_xyxy[used]
    rows = np.searchsorted(ids, image_ids)
    limits = sizes[rows].astype(np.float32)
    first, second = corners[:, :2], corners[:, 2:] - corners[:, :2]
    relative = np.asarray((np.concatenate([np.abs(first), second], 1) <= 1 + 1e-3).all(1) & (limits > 2).all(1))
    if 2 * relative.sum() > len(relative):
        said = f"{relative.sum()} of {len(relative)} boxes with no number above 1{_at(image_ids, relative)}: shares of the image"
        raise _in_other_coordinates(results, said)
    inside = _inside(corners, limits)
    cut, much = np.asarray(inside < 1 - NOTICED), np.asarray(inside < 1 - MUCH)
    said = _outside(image_ids, cut, NOTICED)
    if len(cut) >= OTHERWISE_FROM and cut.mean() > NOTICED:
        for name, read in _READINGS.items():
            low, high = read(first, second)
            slack = 1 + limits / 50
            if ((low >= -slack) & (high <= limits + slack) & (high >= low)).all(1).mean() >= 0.98:
                raise _in_other_coordinates(results, f"{said}; read as {name} they lie inside")
    if 2 * much.sum() > len(much):
        raise _in_other_coordinates(results, _outside(image_ids, much, MUCH))
    some, within = (np.bincount(rows, each, len(ids)) for each in (None, inside > 0))
    if (outside := (some > 0) & (within == 0)).any():
        place = int(outside.argmax())
        width, height = sizes[place].tolist()
        many = f"; so of {outside.sum()} images" if outside.sum() > 1 else ""
        raise of_other_images(path, int(ids[place]), f"no box within its {width} x {height} pixels{many}")
    notices = []
    if cut.any():
        gone = int((inside == 0).sum())
        notices.append(f"{path}: {said}: they are cut to it, and {gone} wholly outside left out")
    if relative.any():
        notices.append(
            f"{path}: {relative.sum()} of {len(relative)} boxes have no number above 1{_at(image_ids, relative)}: are they pixels?"
        )
    if results.flat:
        notices.append(f"{path}: {_flat(results)}: they are left out")
    return notices


def _inside(corners: Floats, limits: Floats) -> Floats:
    """The share of each box's area that lies in its image. corners: xyxy [N, 4], limits: (width, height) [N, 2], pixels."""
    kept = np.clip(corners[:, 2:], 0, limits) - np.clip(corners[:, :2], 0, limits)
    sides = np.maximum(corners[:, 2:] - corners[:, :2], 1e-6)  # a side may be lost in float32
    share: Floats = (kept / sides).prod(1)
    return share


def _in_other_coordinates(results: Results, found: str) -> QskdError:
    return QskdError(
        results.path, found, _BOX, "write the boxes so: COCO's results have them in pixels, as width and height"
    )


def _outside(image_ids: Ids, where: Flags, share: float) -> str:
    counts = f"{where.sum()} of {len(where)} boxes"
    return f"{counts} lie by more than {share:.0%} of their area outside of their image{_at(image_ids, where)}"


def _flat(results: Results) -> str:
    total = results.flat + len(results.image_ids)
    return f"{results.flat} of {total} boxes have no width or height above 0"


def _at(image_ids: Ids, where: Flags) -> str:
    return _first(np.unique(image_ids[where]), "image ")


def _first(numbers: Ids, what: str = "") -> str:
    return f" (the first: {what}{numbers[0]})" if len(numbers) else ""
