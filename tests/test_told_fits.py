"""A file of detections that is of other images, or in other coordinates, is found before anything starts, dry runs included."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_loader import Pictures
from test_told import COUNT, config_of, entries, named, objects_of, shards, write

from pipelines.caching.plan import make_cache_plans
from pipelines.run.resolve import resolve
from pipelines.tuning.driver import plan_without_cache
from qskd.errors import QskdError
from qskd.teacher.told.fits import fit_notices

__all__ = ["shards"]
SIZES = {one.image_id: (one.width, one.height) for one in Pictures(COUNT).samples()}


def everywhere() -> list[dict[str, Any]]:
    """Five boxes in each image, all over it and all inside."""
    found = []
    for image_id, size in SIZES.items():
        rng = np.random.default_rng(image_id)
        for _ in range(5):
            sides = rng.uniform(0.05, 0.5, 2) * size
            corner = rng.uniform(0, 1, 2) * (np.array(size) - sides)
            found.append({"image_id": image_id, "category_id": 3, "bbox": [*corner, *sides], "score": 0.5})
    return found


def changed(one: dict[str, Any], kind: str) -> dict[str, Any]:
    left, top, width, height = one["bbox"]
    wide, high = SIZES[one["image_id"]]
    boxes = {
        "relative": [left / wide, top / high, width / wide, height / high],
        "relative corners": [left / wide, top / high, (left + width) / wide, (top + height) / high],
        "corners": [left, top, left + width, top + height],
        "centre": [left + width / 2, top + height / 2, width, height],
        "larger": [3 * side for side in one["bbox"]],
        "negative": [left + width, top + height, -width, -height],
        "beyond": [left + 500, top, width, height],
        "over the edge": [wide - 4, top, 10, height],
    }
    return one | {"bbox": boxes[kind]}


def notices(shards: str, tmp_path: Path, said: Any) -> list[str]:
    return fit_notices(config_of(shards, write(tmp_path / "r.json", said)))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("relative", "110 of 110 boxes with no number above 1.*shares of the image"),
        ("relative corners", "110 of 110 boxes with no number above 1"),
        ("corners", "read as left, top, right, bottom they lie inside"),
        ("centre", "read as centre x, centre y, width, height they lie inside"),
        ("larger", "boxes lie by more than 25% of their area outside"),
        ("negative", "110 of 110 boxes have no width or height above 0"),
        ("beyond", "110 of 110 boxes lie by more than"),
    ],
)
def test_boxes_in_other_coordinates_are_refused(shards: str, tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(QskdError, match=rf"(?s){words}.*left, top, width and height, in pixels"):
        notices(shards, tmp_path, [changed(one, kind) for one in everywhere()])


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("beyond", "1 of 110 boxes lie by more than 10%.*first: image 103.*and 1 wholly outside"),
        ("over the edge", "1 of 110 boxes lie by more than 10%.*first: image 103.*and 0 wholly outside"),
        ("negative", "1 of 110 boxes have no width or height above 0"),
        ("relative", r"1 of 110 boxes have no number above 1 \(the first: image 103\)"),
    ],
)
def test_a_bad_box_among_good_ones_is_counted(shards: str, tmp_path: Path, kind: str, words: str) -> None:
    said = everywhere()
    assert notices(shards, tmp_path, said) == []
    said[15] = changed(said[15], kind)
    (notice,) = notices(shards, tmp_path, said)
    assert re.search(words, notice), notice


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        (1000, r"(?s)does not have: 22 of 22 \(the first: 1100.*without an entry: 22 of 22"),
        (15, r"does not have: 15 of 22"),
        (1, r"(?s)one more than.*does not have: 1 of 22 .*first: 122.*add -1"),
        (-1, r"(?s)one less than.*first: 99.*add \+1"),
    ],
)
@pytest.mark.parametrize("form", ["list", "named"])
def test_ids_of_other_images_are_refused(shards: str, tmp_path: Path, shift: int, words: str, form: str) -> None:
    said = [one | {"image_id": one["image_id"] + shift} for one in everywhere()]
    whole: Any = said
    if form == "named":
        whole = named(said)
        whole["images"] = [one | {"id": one["id"] + shift} for one in whole["images"]]
    with pytest.raises(QskdError, match=words):
        notices(shards, tmp_path, whole)


def test_an_image_id_that_is_wrong_is_counted_both_ways(shards: str, tmp_path: Path) -> None:
    said = [one | {"image_id": 7 if one["image_id"] == 110 else one["image_id"]} for one in everywhere()]
    (notice,) = notices(shards, tmp_path, said)
    assert "does not have: 1 of 22 (the first: 7)" in notice
    assert "without an entry: 1 of 22 (the first: 110)" in notice


def test_a_file_may_have_further_images_or_be_of_a_part(shards: str, tmp_path: Path) -> None:
    more = [one | {"image_id": one["image_id"] + 1000 * by} for one in everywhere() for by in range(8)]
    (notice,) = notices(shards, tmp_path, more)
    assert "does not have: 154 of 176 " in notice
    (notice,) = notices(shards, tmp_path, everywhere()[:25])
    assert "without an entry: 17 of 22 (the first: 105), taken for images in which nothing was found" in notice


def test_an_image_of_which_nothing_is_inside_is_refused(shards: str, tmp_path: Path) -> None:
    said = [changed(one, "beyond") if one["image_id"] == 104 else one for one in everywhere()]
    with pytest.raises(QskdError, match="image 104: no box within its"):
        notices(shards, tmp_path, said)
    other = named(everywhere())
    other["images"][5]["width"] = 7
    with pytest.raises(QskdError, match="image 105: 7 x"):
        notices(shards, tmp_path, other)
    with pytest.raises(QskdError, match="image 100: category_id 4"):
        notices(shards, tmp_path, [one | {"category_id": 4} for one in everywhere()])


def test_it_is_found_before_anything_starts(shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In `qskd cache`, its dry run, and the plan of a training whose cache is not there yet."""
    path = tmp_path / "r.json"
    config = resolve(config_of(shards, path, f"data.val={shards}", f"output={tmp_path}/runs"), "distill")
    write(path, [changed(one, "relative") for one in everywhere()])
    for plan in (make_cache_plans, plan_without_cache):
        with pytest.raises(QskdError, match="no number above 1"):
            plan(config)  # type: ignore[operator]
    write(path, entries(objects_of()))
    assert any("without an entry" in notice for notice in plan_without_cache(config).notices)
    make_cache_plans(config)
    assert "without an entry" in caplog.text
