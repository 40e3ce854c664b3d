"""COCO JSON to samples: the real sample agrees with pycocotools, and every complaint names where and what."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qskd.datasets.coco import CocoDataset, read_coco
from qskd.errors import QskdError

REAL = Path(__file__).parents[2] / "shared" / "coco-sample"
real_coco = pytest.mark.skipif(not REAL.is_dir(), reason=f"the COCO sample is not at {REAL}")

GOOD: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 9, "file_name": "sub/b.jpg", "width": 20, "height": 20},
        {"id": 3, "file_name": "c.png", "width": 10, "height": 12},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 10, 20], "area": 120.5, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0.5, 0, 39.5, 30], "iscrowd": 1},
        {"id": 3, "image_id": 9, "category_id": 5, "bbox": [5, 5, 3, 3], "area": 9},
    ],
    "categories": [{"id": 5, "name": "cat", "supercategory": "animal"}, {"id": 2, "name": "dog"}],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for entry in GOOD["images"]:
        pixels = rng.integers(0, 256, (entry["height"], entry["width"], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / entry["file_name"])
    return tmp_path


def read(folder: Path, document: Any, on_error: Any = "stop") -> CocoDataset:
    path = folder / "instances.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_coco(path, folder / "images", on_error)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    document = copy.deepcopy(GOOD)
    change(document)
    return document


@real_coco
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_the_real_sample_agrees_with_pycocotools_and_the_files(split: str) -> None:
    pycocotools = pytest.importorskip("pycocotools.coco")
    path = REAL / "annotations" / f"instances_{split}.json"
    reference = pycocotools.COCO(str(path))
    dataset = read_coco(path, REAL / split)
    samples = list(dataset.samples())
    assert dataset.problems == []
    assert [(c.id, c.name) for c in dataset.categories] == sorted((k, v["name"]) for k, v in reference.cats.items())
    assert len(dataset.categories) == 80
    assert {sample.image_id for sample in samples} == set(reference.getImgIds())
    assert any(len(sample.area) == 0 for sample in samples)
    assert any(sample.iscrowd.any() for sample in samples)
    for sample in samples:
        entries = reference.loadAnns(reference.getAnnIds(imgIds=[sample.image_id]))
        boxes_xywh = np.array([entry["bbox"] for entry in entries]).reshape(-1, 4)
        expected = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
        np.testing.assert_allclose(sample.boxes_xyxy, expected, atol=1.0)  # clipped by at most a pixel
        np.testing.assert_allclose(sample.area, [entry["area"] for entry in entries], rtol=1e-6)
        assert sample.category_ids.tolist() == [entry["category_id"] for entry in entries]
        assert sample.iscrowd.tolist() == [bool(entry["iscrowd"]) for entry in entries]
        assert sample.encoded == (REAL / split / sample.file_name).read_bytes()
        assert Image.open(io.BytesIO(sample.encoded)).size == (sample.width, sample.height)


def test_samples_hold_what_the_json_says(folder: Path) -> None:
    dataset = read(folder, GOOD)
    first, second, third = dataset.samples()
    assert [c.id for c in dataset.categories] == [2, 5]
    assert (first.image_id, first.file_name, first.width, first.height) == (7, "a.png", 40, 30)
    np.testing.assert_array_equal(first.boxes_xyxy, np.array([[1, 2, 11, 22], [0.5, 0, 40, 30]], np.float32))
    np.testing.assert_array_equal(first.area, np.array([120.5, 39.5 * 30], np.float32))  # no area given: the box's
    assert first.iscrowd.tolist() == [False, True]
    assert second.category_ids.tolist() == [5]
    assert third.boxes_xyxy.shape == (0, 4)
    assert [a.dtype for a in (third.boxes_xyxy, third.category_ids, third.area, third.iscrowd)] == [
        np.float32,
        np.int64,
        np.float32,
        np.bool_,
    ]
    assert len(dataset) == 3
    assert dataset.source == "instances.json"
    assert dataset.source_sha256 == hashlib.sha256((folder / "instances.json").read_bytes()).hexdigest()


def _set(group: str, index: int, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document[group][index].update(values)


def _drop(group: str, index: int, key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document[group][index].pop(key)


# What is changed; what the message must hold; images and objects left under skip.
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str], int, int]] = {
    "image id twice": (_set("images", 1, id=7), ["image 7", "sub/b.jpg", "a.png", "twice"], 1, 0),
    "image without width": (_drop("images", 0, "width"), ["image 7", "no `width`"], 2, 1),
    "image id is text": (_set("images", 1, id="9"), ["images[1]", "'9'"], 2, 2),
    "image of no size": (_set("images", 0, height=0), ["image 7", "40 x 0"], 2, 1),
    "file name of half a surrogate": (_set("images", 1, file_name="\ud800"), ["image 9"], 2, 2),
    "annotation id twice": (_set("annotations", 1, id=1), ["image 7", "annotation 1", "twice"], 3, 2),
    "annotation without bbox": (_drop("annotations", 2, "bbox"), ["annotation 3", "no `bbox`"], 3, 2),
    "annotation without id": (_drop("annotations", 2, "id"), ["annotation number 2", "no `id`"], 3, 2),
    "unknown image": (_set("annotations", 2, image_id=99), ["annotation 3", "unknown image_id 99"], 3, 2),
    "unknown category": (_set("annotations", 2, category_id=3), ["image 9", "annotation 3", "3", "2, 5"], 3, 2),
    "box with NaN": (_set("annotations", 0, bbox=[1, 2, float("nan"), 4]), ["annotation 1", "nan", "finite"], 3, 2),
    "box with infinity": (_set("annotations", 0, bbox=[1, 2, float("inf"), 4]), ["annotation 1", "finite"], 3, 2),
    "box of three": (_set("annotations", 0, bbox=[1, 2, 3]), ["annotation 1", "four"], 3, 2),
    "box of text": (_set("annotations", 0, bbox=["1", 2, 3, 4]), ["annotation 1", "four"], 3, 2),
    "box of no area": (_set("annotations", 0, bbox=[1, 2, 0, 4]), ["image 7", "annotation 1", "no area"], 3, 2),
    "box of negative height": (_set("annotations", 0, bbox=[1, 2, 5, -4]), ["annotation 1", "no area"], 3, 2),
    "box outside": (_set("annotations", 0, bbox=[41, 2, 5, 4]), ["annotation 1", "outside", "40 x 30"], 3, 2),
    "area is NaN": (_set("annotations", 0, area=float("nan")), ["annotation 1", "area nan"], 3, 3),
    "iscrowd is 2": (_set("annotations", 0, iscrowd=2), ["annotation 1", "iscrowd 2"], 3, 2),
    "file missing": (_set("images", 0, file_name="gone.png"), ["image 7", "gone.png", "no such file"], 2, 1),
    "file is a folder": (_set("images", 0, file_name="sub"), ["image 7", "no such file"], 2, 1),
    "other size than the picture": (_set("images", 0, width=30), ["image 7", "40 x 30", "30 x 30"], 2, 1),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_entries_stop_with_a_message_or_are_dropped_and_recorded(folder: Path, case: str) -> None:
    change, words, images, objects = BROKEN[case]
    with pytest.raises(QskdError) as caught:
        list(read(folder, changed(change)).samples())
    assert all(word in str(caught.value) for word in ["instances.json", "what to do", *words]), str(caught.value)
    dataset = read(folder, changed(change), "skip")
    samples = list(dataset.samples())
    assert (len(samples), sum(len(sample.area) for sample in samples)) == (images, objects)
    assert dataset.problems
    told = dataset.problems[0]
    assert set(told) == {"where", "found", "dropped"}
    assert any(word in told["where"] + told["found"] for word in words)
    assert all(np.isfinite(sample.area).all() for sample in samples)


def test_the_first_problem_says_how_many_more_there_are(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["bbox"] = [0, 0, 0, 0]
        document["annotations"][2]["category_id"] = 77

    with pytest.raises(QskdError, match=r"1 more such problems, the next at .*annotation 3"):
        read(folder, changed(change))


def test_a_repeated_identical_image_entry_loses_nothing_under_skip(folder: Path) -> None:
    document = changed(lambda d: d["images"].append(dict(d["images"][0])))
    with pytest.raises(QskdError, match="used twice"):
        read(folder, document)
    assert sum(len(sample.area) for sample in read(folder, document, "skip").samples()) == 3


@pytest.mark.parametrize(
    ("document", "word"),
    [
        ("{", "not JSON"),
        ("[1]", "a list at the top"),
        ("[" * 100_000, "not JSON"),
        ({"images": [], "annotations": []}, "`categories` is missing"),
        (changed(lambda d: d.update(annotations={})), "`annotations` is not a list"),
        (changed(lambda d: d.update(categories=[])), "no categories"),
        (changed(_set("categories", 0, id=2)), "id 2 is both 'cat' and 'dog'"),
        (changed(_set("categories", 0, name="dog")), "'dog' has two ids, 5 and 2"),
        (changed(_drop("categories", 0, "name")), "no `name`"),
    ],
)
def test_what_is_no_coco_file_stops_in_both_modes(folder: Path, document: Any, word: str) -> None:
    for on_error in ("stop", "skip"):
        with pytest.raises(QskdError) as caught:
            read(folder, document, on_error)
        assert word in str(caught.value)


def test_missing_json_and_missing_folder_are_named(folder: Path) -> None:
    with pytest.raises(QskdError, match=r"none\.json: can't be read"):
        read_coco(folder / "none.json", folder / "images")
    read(folder, GOOD)
    with pytest.raises(QskdError, match="nowhere: no such folder"):
        read_coco(folder / "instances.json", folder / "nowhere")


@pytest.mark.parametrize(
    "name", ["../secret.png", "sub/../../secret.png", "ABSOLUTE", "link.png", "linked/secret.png", "a\0b"]
)
def test_names_that_leave_the_image_folder_are_refused_even_when_skipping(folder: Path, name: str) -> None:
    secret = folder / "secret.png"
    Image.new("RGB", (40, 30)).save(secret)
    (folder / "images" / "link.png").symlink_to(secret)
    (folder / "images" / "linked").symlink_to(folder)
    name = str(secret) if name == "ABSOLUTE" else name
    for on_error in ("stop", "skip"):
        with pytest.raises(QskdError, match=r"image 7.*file_name"):
            list(read(folder, changed(_set("images", 0, file_name=name)), on_error).samples())


def test_a_pipe_in_the_image_folder_does_not_hang(folder: Path) -> None:
    os.mkfifo(folder / "images" / "pipe.png")
    with pytest.raises(QskdError, match="no such file"):
        list(read(folder, changed(_set("images", 0, file_name="pipe.png"))).samples())


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8])
def test_truncated_pictures_are_named(folder: Path, keep: float) -> None:
    picture = folder / "images" / "sub" / "b.jpg"
    picture.write_bytes(picture.read_bytes()[: int(picture.stat().st_size * keep)])
    with pytest.raises(QskdError, match=r"image 9 \(sub/b.jpg\)"):
        list(read(folder, GOOD).samples())
    dataset = read(folder, GOOD, "skip")
    assert [sample.image_id for sample in dataset.samples()] == [7, 3]
    assert len(dataset.problems) == 1
    list(dataset.samples())
    assert len(dataset.problems) == 1  # a second pass does not count it twice


def test_boxes_partly_outside_are_clipped_and_noted_beyond_a_pixel(folder: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["annotations"][0]["bbox"] = [-0.5, 2, 10, 28.9]
        document["annotations"][2]["bbox"] = [15, -4, 9, 10]

    dataset = read(folder, changed(change))
    samples = list(dataset.samples())
    np.testing.assert_allclose(samples[0].boxes_xyxy[0], [0, 2, 9.5, 30])
    np.testing.assert_allclose(samples[1].boxes_xyxy[0], [15, 0, 20, 6])
    assert [problem["where"].rpartition(" ")[2] for problem in dataset.problems] == ["3"]
    assert "4.0 px" in dataset.problems[0]["found"]


def test_a_size_that_is_neither_the_stored_nor_the_upright_one_is_told_with_both(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 41)).save(folder / "images" / "turned.jpg", exif=exif)
    with pytest.raises(QskdError, match=r"41 x 30 pixels \(30 x 41 before EXIF turns it\)"):
        list(read(folder, changed(_set("images", 0, file_name="turned.jpg"))).samples())
