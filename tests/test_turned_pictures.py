"""Pictures that EXIF turns: their boxes are where the objects are, whatever size the JSON has; files spelt otherwise."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_decoding import STORED, WIDE, png16, with_exif
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.inspection.predict import read_image
from pipelines.inspection.subjects import subject_of_sample
from pipelines.prepare import describe, prepare
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.coco import CocoDataset, read_coco
from qskd.datasets.formats.opening import open_dataset
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import MANIFEST, Manifest
from qskd.datasets.pictures import files
from qskd.datasets.pictures.facts import Exif, PictureCounts
from qskd.datasets.shards import ShardReader
from qskd.datasets.views import View, decode_image
from qskd.errors import QskdError

ENDING = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tif"}
BOX_XYXY = (8, 16, 24, 32)


def scene(width: int, height: int) -> np.ndarray:
    """Black, with a white object in `BOX_XYXY`: the upright picture."""
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = BOX_XYXY
    pixels[top:bottom, left:right] = 255
    return pixels


def box_of_white(picture: np.ndarray) -> tuple[int, ...]:
    white = picture[..., 0] > 127
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def stored_box(width: int, height: int, orientation: int) -> tuple[int, ...]:
    """Where the object is in the stored pixels."""
    return box_of_white(STORED[orientation](scene(width, height)))


def dataset_of(
    folder: Path, size: tuple[int, int], orientation: int, drawn: str, kind: str = "JPEG", sized: str = ""
) -> tuple[Path, Path]:
    """One picture of an upright size. drawn: what the box refers to; sized: what the JSON's size is of, if not the same."""
    (folder / "images").mkdir(parents=True)
    name = f"photo.{ENDING[kind]}"
    (folder / "images" / name).write_bytes(with_exif(scene(*size), kind, orientation))
    stored = size[::-1] if orientation >= 5 else size
    width, height = stored if (sized or drawn) == "stored" else size
    left, top, right, bottom = BOX_XYXY if drawn == "upright" else stored_box(*size, orientation)
    document = {
        "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [left, top, right - left, bottom - top]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return folder / "a.json", folder / "images"


def check_box_is_on_the_object(dataset: CocoDataset) -> PictureCounts:
    (sample,) = dataset.samples()
    assert tuple(sample.boxes_xyxy[0]) == BOX_XYXY
    picture = decode_image(sample.encoded, "x")
    assert picture.size == (sample.width, sample.height)
    assert box_of_white(np.asarray(picture)) == BOX_XYXY
    assert sample.picture is not None
    return PictureCounts.of([sample.picture])


SIZES = {"wide": (64, 40), "tall": (40, 64), "square": (48, 48)}


@pytest.mark.parametrize("kind", ENDING)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", SIZES)
def test_boxes_drawn_on_the_upright_picture_are_on_their_objects(
    tmp_path: Path, shape: str, orientation: int, kind: str
) -> None:
    files = dataset_of(tmp_path, SIZES[shape], orientation, "upright", kind)
    counts = check_box_is_on_the_object(read_coco(*files))
    turned = int(orientation != 1)
    tells = shape != "square" and orientation >= 5
    assert counts == PictureCounts(turned=turned, undecided=turned and int(not tells))


@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_of_a_json_with_the_stored_size_are_turned_with_the_picture(tmp_path: Path, orientation: int) -> None:
    files = dataset_of(tmp_path, (64, 40), orientation, "stored")
    assert check_box_is_on_the_object(read_coco(*files)) == PictureCounts(turned=1, boxes_turned=1)


@pytest.mark.parametrize("drawn", ["upright", "stored"])
@pytest.mark.parametrize("sized", ["upright", "stored"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", SIZES)
def test_the_option_goes_before_the_jsons_size(
    tmp_path: Path, shape: str, orientation: int, sized: str, drawn: Exif
) -> None:
    files = dataset_of(tmp_path, SIZES[shape], orientation, drawn, sized=sized)
    counts = check_box_is_on_the_object(read_coco(*files, exif=drawn))
    turned = int(orientation != 1)
    assert counts == PictureCounts(turned=turned, boxes_turned=turned * (drawn == "stored"))


def test_a_box_that_only_the_upright_picture_has_room_for_is_told_of_the_option(tmp_path: Path) -> None:
    annotations, images = dataset_of(tmp_path, (64, 20), 6, "upright", sized="stored")
    document = json.loads(annotations.read_text())
    document["annotations"][0]["bbox"] = [30, 2, 10, 10]  # the stored picture is 20 pixels wide
    annotations.write_text(json.dumps(document))
    with pytest.raises(QskdError, match="outside its image") as raised:
        read_coco(annotations, images)
    assert "--exif upright" in raised.value.expected
    (sample,) = read_coco(annotations, images, exif="upright").samples()
    assert sample.boxes_xyxy.tolist() == [[30, 2, 40, 12]]


def test_every_program_sees_a_turned_picture_and_its_box_alike(tmp_path: Path) -> None:
    annotations, images = dataset_of(tmp_path, (64, 40), 6, "stored", "PNG")
    manifest = prepare(annotations, images, str(tmp_path / "shards"), quiet=True)
    resize = ResizeConfig(mode="shortest_edge", size=40, longest=64)
    batch = BatchLoader(str(tmp_path / "shards"), str(tmp_path / "shards"), ViewConfig(), resize).load(
        "val", np.array([[0, 0, 0]])
    )
    (sample,) = ShardReader(str(tmp_path / "shards")).read(0, [0])
    subject = subject_of_sample(sample, "x", manifest.category_index, View.IDENTITY)
    described = subject_of_sample(
        read_coco(annotations, images).sample_of(images / "photo.png"), "x", {1: 0}, View.IDENTITY
    )
    for picture in (batch["images"][0], read_image(images / "photo.png"), subject.image, described.image):
        np.testing.assert_array_equal(picture, scene(64, 40))
    assert batch["original_sizes"].tolist() == [[40, 64]]
    x, y, width, height = (batch["boxes_cxcywh"][0, 0] * [64, 40, 64, 40]).tolist()
    assert (x - width / 2, y - height / 2, x + width / 2, y + height / 2) == pytest.approx(BOX_XYXY)
    for boxes in (subject.boxes_xyxy, described.boxes_xyxy):
        assert tuple(boxes[0]) == BOX_XYXY


def several(folder: Path, *pictures: tuple[tuple[int, int], int, str]) -> tuple[Path, Path]:
    """A dataset of pictures, of each its upright size, its orientation, and what its box and size refer to."""
    (folder / "images").mkdir()
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number, (size, orientation, drawn) in enumerate(pictures, 1):
        part = folder / str(number)
        one = json.loads(dataset_of(part, size, orientation, drawn, "PNG")[0].read_text())
        (part / "images" / "photo.png").rename(folder / "images" / f"{number}.png")
        document["images"].append(one["images"][0] | {"id": number, "file_name": f"{number}.png"})
        document["annotations"].append(one["annotations"][0] | {"id": number, "image_id": number})
    (folder / "a.json").write_text(json.dumps(document))
    return folder / "a.json", folder / "images"


SQUARE, WIDE_SCENE = (48, 48), (64, 40)


@pytest.mark.parametrize("drawn", ["upright", "stored"])
def test_turned_pictures_whose_size_cant_tell_are_read_like_those_whose_size_does(tmp_path: Path, drawn: str) -> None:
    files = several(
        tmp_path, (SQUARE, 6, drawn), (WIDE_SCENE, 3, drawn), (WIDE_SCENE, 1, "upright"), (WIDE_SCENE, 8, drawn)
    )
    dataset = read_coco(*files)
    for _ in range(2):  # twice the same
        samples = list(dataset.samples())
        assert [tuple(sample.boxes_xyxy[0]) for sample in samples] == [BOX_XYXY] * 4
        counts = PictureCounts.of([sample.picture for sample in samples if sample.picture])
        assert counts == PictureCounts(turned=3, boxes_turned=3 * (drawn == "stored"))
        assert dataset.findings == []
    assert tuple(read_coco(*files).sample_of(files[1] / "2.png").boxes_xyxy[0]) == BOX_XYXY


def test_turned_pictures_of_which_nothing_tells_are_a_finding(tmp_path: Path) -> None:
    dataset = read_coco(
        *several(tmp_path, (SQUARE, 6, "upright"), (WIDE_SCENE, 3, "upright"), (WIDE_SCENE, 1, "upright"))
    )
    assert [tuple(sample.boxes_xyxy[0]) for sample in dataset.samples()] == [BOX_XYXY] * 3
    (finding,) = dataset.findings
    assert (finding.name, finding.count) == ("exif-undecided", 2)
    assert finding.examples == ("image 1 (1.png)", "image 2 (2.png)")


def test_sizes_that_contradict_each_other_are_a_finding_and_decide_for_no_other_picture(tmp_path: Path) -> None:
    files = several(tmp_path, (WIDE_SCENE, 6, "upright"), (WIDE_SCENE, 8, "stored"), (SQUARE, 6, "upright"))
    dataset = read_coco(*files)
    assert [tuple(sample.boxes_xyxy[0]) for sample in dataset.samples()] == [BOX_XYXY] * 3
    assert {finding.name: finding.count for finding in dataset.findings} == {
        "exif-undecided": 1,
        "exif-mixed-readings": 2,
    }
    with pytest.raises(QskdError, match="exif-mixed-readings: of the turned pictures"):
        prepare(*files, str(tmp_path / "shards"), quiet=True, strict=True, accept=["exif-undecided"])
    told = read_coco(*files, exif="upright")
    list(told.samples())
    assert told.findings == []


def test_a_size_that_was_taken_from_the_file_tells_nothing_of_other_pictures(tmp_path: Path) -> None:
    for number, (size, orientation) in enumerate({WIDE_SCENE: 6, SQUARE: 3}.items()):
        (tmp_path / f"{number}.png").write_bytes(with_exif(scene(*size), "PNG", orientation))
        (tmp_path / f"{number}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("train: .\nnames: [thing]\n")
    dataset = open_dataset(tmp_path / "data.yaml", None)
    list(dataset.samples())
    assert [(finding.name, finding.examples) for finding in dataset.findings] == [
        ("exif-undecided", ("image 1 (1.png)",))
    ]


def test_pictures_inside_a_table_are_read_like_the_others_of_it(tmp_path: Path) -> None:
    annotations, images = several(tmp_path, (SQUARE, 6, "stored"), (SQUARE, 1, "upright"), (WIDE_SCENE, 8, "stored"))
    document = json.loads(annotations.read_text())
    rows = [
        {
            "image": {"bytes": (images / image["file_name"]).read_bytes(), "path": image["file_name"]},
            "width": image["width"],
            "height": image["height"],
            "objects": {"bbox": [box["bbox"]], "category": ["thing"]},
        }
        for image, box in zip(document["images"], document["annotations"], strict=True)
    ]
    (tmp_path / "table").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table" / "train.parquet")
    dataset = open_dataset(tmp_path / "table", None, box_format="xywh")
    assert [tuple(sample.boxes_xyxy[0]) for sample in dataset.samples()] == [BOX_XYXY] * 3
    assert dataset.findings == []


def test_a_missing_picture_tells_nothing_of_the_others(tmp_path: Path) -> None:
    files = several(tmp_path, (SQUARE, 6, "stored"), (WIDE_SCENE, 6, "upright"), (WIDE_SCENE, 8, "stored"))
    (files[1] / "2.png").unlink()
    assert tuple(next(read_coco(*files).samples()).boxes_xyxy[0]) == BOX_XYXY


def test_turned_and_deep_pictures_are_counted_in_the_manifest_and_told(tmp_path: Path) -> None:
    annotations, images = dataset_of(tmp_path, (48, 48), 3, "upright")
    document = json.loads(annotations.read_text())
    for number, (name, pixels) in enumerate({"deep.png": WIDE * 257, "dim.png": WIDE * 16}.items(), 2):
        (images / name).write_bytes(png16(pixels))
        document["images"].append({"id": number, "file_name": name.upper(), "width": 24, "height": 16})
    annotations.write_text(json.dumps(document))
    destination = str(tmp_path / "shards")
    manifest = prepare(annotations, images, destination, quiet=True)
    assert manifest.picture_counts == PictureCounts(turned=1, undecided=1, deep=2, dim=1, respelt=2)
    assert Manifest.from_json((tmp_path / "shards" / MANIFEST).read_text(), "x") == manifest
    said = CliRunner().invoke(app, ["prepare", str(annotations), str(images), destination]).output
    assert said.strip().endswith(describe(manifest, destination).strip())  # after what it was doing
    for line in (
        "1 picture is stored turned (EXIF) and seen upright",
        "of 1, sizes can't tell",
        "--exif stored",
        "2 pictures are of more than 8 bits a channel",
        "1 of them use a small part of their range",
        "2 pictures are found under another spelling",
    ):
        assert line in said
    forced = CliRunner().invoke(app, ["prepare", str(annotations), str(images), destination, "--exif", "stored"])
    assert "of 1, boxes were read against the stored pixels" in forced.output


def test_a_dataset_without_such_pictures_says_nothing_of_them(tmp_path: Path) -> None:
    annotations, images = dataset_of(tmp_path, (48, 48), 1, "upright")
    manifest = prepare(annotations, images, str(tmp_path / "shards"), quiet=True)
    assert manifest.picture_counts == PictureCounts()
    assert PictureCounts().lines() == []


def _of_an_earlier_qskd(shards: Path, manifest: Manifest) -> None:
    old = json.loads(replace(manifest, picture_counts=None).to_json())
    del old["picture_counts"]
    (shards / MANIFEST).write_text(json.dumps(old))


def test_shards_of_before_are_read_unless_a_picture_in_them_was_seen_otherwise(tmp_path: Path) -> None:
    for orientation in (1, 3):
        annotations, images = dataset_of(tmp_path / str(orientation), (48, 48), orientation, "upright")
        shards = tmp_path / str(orientation) / "shards"
        manifest = prepare(annotations, images, str(shards), quiet=True)
        _of_an_earlier_qskd(shards, manifest)
        reader = ShardReader(str(shards))
        assert (reader.manifest.fingerprint == manifest.fingerprint) == (orientation == 1)  # a cache of it stays good
        if orientation == 1:
            assert len(reader.read(0, [0])) == 1
        else:
            with pytest.raises(QskdError, match=r"image 1 \(photo.jpg\): the picture is turned by EXIF"):
                reader.read(0, [0])


# --- names ----------------------------------------------------------------------------------------------------------------
def named(folder: Path, in_json: str, *files: str) -> CocoDataset:
    for file in files:
        path = folder / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(file), 0, 0)).save(path, "PNG")
    document: dict[str, Any] = {
        "images": [{"id": 1, "file_name": in_json, "width": 8, "height": 8}],
        "annotations": [],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (folder / "a.json").write_text(json.dumps(document))
    return read_coco(folder / "a.json", folder / "images")


CAFE = "café.png"
ALIKE = {
    "composed and decomposed": (unicodedata.normalize("NFC", CAFE), unicodedata.normalize("NFD", CAFE)),
    "decomposed and composed": (unicodedata.normalize("NFD", CAFE), unicodedata.normalize("NFC", CAFE)),
    "another case": ("Photo.JPG", "photo.jpg"),
    "another case of a folder": ("Train/Photo.png", "train/photo.PNG"),
    "both": (unicodedata.normalize("NFC", "Ä/É.png"), unicodedata.normalize("NFD", "ä/é.PNG")),
    "Windows' slashes": ("train\\photo.png", "train/photo.png"),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_a_file_that_is_spelt_otherwise_is_found_and_counted(tmp_path: Path, kind: str) -> None:
    in_json, there = ALIKE[kind]
    (sample,) = named(tmp_path, in_json, there, "other.png").samples()
    assert sample.encoded == (tmp_path / "images" / there).read_bytes()
    assert sample.file_name == in_json
    assert sample.picture is not None
    assert sample.picture.respelt


def test_a_file_of_the_very_name_goes_before_those_spelt_alike(tmp_path: Path) -> None:
    (sample,) = named(tmp_path, "photo.png", "PHOTO.png", "photo.png").samples()
    assert sample.encoded == (tmp_path / "images/photo.png").read_bytes()
    assert sample.picture is not None
    assert not sample.picture.respelt


@pytest.mark.parametrize(
    ("in_json", "there", "said"),
    [
        ("photo.png", ["PHOTO.png", "Photo.PNG"], "2 files are spelt alike: PHOTO.png, Photo.PNG"),
        ("photo.jpg", ["photo.png"], "the nearest there is photo.png"),
        ("IMG_00123.png", ["IMG_0123.png", "IMG_7777.png"], "the nearest there is IMG_0123.png"),
        ("train/photo.png", ["photo.png"], "photo.png is in the image folder itself"),
        ("a/deep/photo.jpeg", ["a/Deep/photo.png"], "the nearest there is a/Deep/photo.png"),
    ],
)
def test_a_missing_file_is_told_with_what_is_near(tmp_path: Path, in_json: str, there: list[str], said: str) -> None:
    with pytest.raises(QskdError, match="no such file; ") as raised:
        list(named(tmp_path, in_json, *there).samples())
    assert said in raised.value.found


def test_a_missing_file_that_nothing_resembles_is_told_alone(tmp_path: Path) -> None:
    with pytest.raises(QskdError) as raised:
        list(named(tmp_path, "photo.png", "x/y.png").samples())
    assert raised.value.found == "no such file"


@pytest.mark.parametrize("in_json", ["..\\secret.png", "OUT/secret.png"])
def test_another_spelling_does_not_lead_out_of_the_image_folder(tmp_path: Path, in_json: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "out").symlink_to(tmp_path)
    with pytest.raises(QskdError):
        list(named(tmp_path, in_json, "other.png").samples())


def test_a_picture_that_is_given_is_found_in_the_json_however_it_is_spelt(tmp_path: Path) -> None:
    dataset = named(
        tmp_path, "Train/" + unicodedata.normalize("NFC", CAFE), "train/" + unicodedata.normalize("NFD", CAFE)
    )
    picture = next((tmp_path / "images" / "train").iterdir())
    assert dataset.sample_of(picture).image_id == 1


def test_a_missing_picture_is_compared_with_few_names_of_a_large_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a download broken off ten thousand are missing: each took 0.16 s, with 5,000 names to compare it with."""
    names = [f"{number:06d}.jpg" for number in range(0, 4000, 2)]
    for name in [*names, "Photo_of_a_dog.png"]:
        (tmp_path / name).touch()
    compared = list[int]()
    real = files.difflib.get_close_matches

    def counted(word: str, others: list[str], *rest: Any) -> list[str]:
        compared.append(len(others))
        return real(word, others, *rest)

    monkeypatch.setattr(files.difflib, "get_close_matches", counted)
    folder = files.PictureFolder(tmp_path.resolve())

    def said(name: str) -> str:
        with pytest.raises(QskdError) as caught:
            folder.read(folder.locate(name, "here"), "here", name, "")
        return caught.value.found

    assert said("001001.jpg").startswith("no such file; the nearest there is 00")
    assert said("photo_of_a_dgo.png") == "no such file; the nearest there is Photo_of_a_dog.png"
    assert said("002000.png") == "no such file; the nearest there is 002000.jpg"
    assert said("elsewhere.jpg") == "no such file"
    assert len(compared) == 3
    assert max(compared) <= 50
