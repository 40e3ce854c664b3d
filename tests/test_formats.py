"""YOLO, Pascal VOC and COCO's outlines, as people have them: boxes against numbers worked by hand, and what is said of the rest."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.cli import main
from qskd.datasets.coco import CocoDataset, read_coco
from qskd.datasets.formats.opening import open_dataset
from qskd.datasets.samples import Sample
from qskd.datasets.shards import ShardReader, load_manifest
from qskd.datasets.views import decode_image
from qskd.errors import QskdError


def picture(path: Path, width: int = 40, height: int = 20, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def by_name(dataset: CocoDataset) -> dict[str, Sample]:
    return {Path(sample.file_name).name: sample for sample in dataset.samples()}


def names(dataset: CocoDataset) -> dict[int, str]:
    return {category.id: category.name for category in dataset.categories}


# -- YOLO


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """A dataset as ultralytics lays one out: 40 x 20 pixels a picture."""
    root = tmp_path / "set"
    for name in ("a.png", "b.jpg", "empty.png", "bare.png"):
        picture(root / "images" / "train" / name)
    picture(root / "images" / "val" / "v.png")
    write(root / "labels" / "train" / "a.txt", "0 0.5 0.5 0.25 0.5\n2 0.25 0.75 0.5 0.5\n")
    write(root / "labels" / "train" / "b.txt", "1 0.1 0.2 0.5 0.2 0.4 0.9\n1 0.25 0.1 0.5 0.3 0.4 0.8 0.2 0.6\n")
    write(root / "labels" / "train" / "empty.txt", "")
    write(root / "labels" / "val" / "v.txt", "1 0.5 0.5 1 1\n")
    return write(root / "data.yaml", "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog, 'no']\n")


def test_of_two_folders_that_a_split_may_mean_neither_is_guessed(yolo: Path) -> None:
    """A Roboflow export in a folder of another one: its ../train/images are the other's, and its own."""
    write(yolo, "train: ../train/images\nnames: [cat, dog, x]\n")
    inner, outer = (folder / "train" / "images" / "p.png" for folder in (yolo.parent, yolo.parent.parent))
    for number, place in enumerate((inner, outer)):
        picture(place)
        write(place.parents[1] / "labels" / "p.txt", f"{number} 0.5 0.5 0.25 0.5\n")
    with pytest.raises(QskdError, match="there are") as caught:
        open_dataset(yolo, None)
    assert "qskd prepare" in caught.value.remedy
    for number, folder in enumerate((yolo.parent, yolo.parent.parent)):
        (sample,) = open_dataset(yolo, folder).samples()
        assert sample.category_ids.tolist() == [number]
    outer.unlink()
    outer.parent.rmdir()
    assert len(open_dataset(yolo, None)) == 1


def test_yolos_boxes_are_those_worked_by_hand_and_pictures_without_labels_have_no_objects(yolo: Path) -> None:
    dataset = open_dataset(yolo, None, split="train")
    samples = by_name(dataset)
    assert list(samples) == ["a.png", "b.jpg", "bare.png", "empty.png"]
    assert names(dataset) == {0: "cat", 1: "dog", 2: "no"}
    # 40 x 20: a centre at (20, 10), 10 x 10; then a centre at (10, 15), 20 x 10.
    np.testing.assert_allclose(samples["a.png"].boxes_xyxy, [[15, 5, 25, 15], [0, 10, 20, 20]], atol=1e-5)
    np.testing.assert_allclose(samples["a.png"].area, [100, 200], rtol=1e-6)
    assert samples["a.png"].category_ids.tolist() == [0, 2]
    # A triangle's outline and a turned box's corners: least and greatest x and y.
    np.testing.assert_allclose(samples["b.jpg"].boxes_xyxy, [[4, 4, 20, 18], [8, 2, 20, 16]], atol=1e-5)
    assert [len(samples[name].area) for name in ("bare.png", "empty.png")] == [0, 0]
    assert samples["a.png"].encoded == (yolo.parent / "images" / "train" / "a.png").read_bytes()
    assert dataset.problems == []


def test_prepare_takes_a_data_yaml_and_says_which_splits_there_are(
    yolo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", str(yolo), str(tmp_path / "shards")])
    said = capsys.readouterr().err
    assert "splits train, val" in said
    assert "--split val" in said
    with pytest.raises(SystemExit) as ended:
        main(["prepare", str(yolo), str(tmp_path / "shards"), "--split", "train"])
    assert ended.value.code == 0
    assert "4 images, 4 objects (0 crowds), 3 categories" in " ".join(capsys.readouterr().out.split())
    manifest = load_manifest(str(tmp_path / "shards"))
    assert manifest.source == "data.yaml (train)"
    stored = ShardReader(str(tmp_path / "shards")).read(0, [0])[0]
    np.testing.assert_allclose(stored.boxes_xyxy, [[15, 5, 25, 15], [0, 10, 20, 20]], atol=1e-5)


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "names by number": lambda root: write(root / "data.yaml", "train: images/train\nnames: {0: cat, 1: dog, 2: x}\n"),
    "list of folders": lambda root: write(root / "d.yml", "train: [images/train]\nnc: 3\nnames: [cat, dog, x]\n"),
    "number of classes alone": lambda root: write(root / "data.yaml", "train: images/train\nnc: 3\n"),
    "path of another machine": lambda root: write(
        root / "data.yaml", "path: ../datasets/set\ntrain: images/train\nnames: [cat, dog, x]\n"
    ),
    "Roboflow's ../": lambda root: write(root / "data.yaml", "train: ../images/train\nnames: [cat, dog, x]\n"),
    "Windows": lambda root: write(root / "data.yaml", "train: .\\images\\train\nnames: [cat, dog, x]\n"),
    "absolute": lambda root: write(
        root.parent / "away" / "data.yaml", f"path: {root}\ntrain: images/train\nnames: [cat, dog, x]\n"
    ),
    "list in a file": lambda root: write(
        write(root / "t.txt", "./images/train/a.png\nimages/train/b.jpg\n\n").parent / "data.yaml",
        "train: t.txt\nnames: [cat, dog, x]\n",
    ),
    "absolute list": lambda root: write(
        write(root / "t.txt", f"{root}/images/train/a.png\n{root}/images/train/b.jpg").parent / "data.yaml",
        "train: t.txt\nnames: [cat, dog, x]\n",
    ),
    "the folder": lambda root: root,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_yolos_pictures_and_labels_are_found_in_every_layout(yolo: Path, layout: str) -> None:
    dataset = open_dataset(LAYOUTS[layout](yolo.parent), None, split="train")
    samples = by_name(dataset)
    np.testing.assert_allclose(samples["a.png"].boxes_xyxy, [[15, 5, 25, 15], [0, 10, 20, 20]], atol=1e-5)
    assert samples["b.jpg"].category_ids.tolist() == [1, 1]


def test_yolos_labels_may_lie_beside_the_pictures_and_the_folder_may_be_given(yolo: Path, tmp_path: Path) -> None:
    picture(tmp_path / "flat" / "a.png")
    write(tmp_path / "flat" / "a.txt", "0 0.5 0.5 0.25 0.5\n")
    elsewhere = write(tmp_path / "conf" / "x.yaml", "path: /nowhere\ntrain: flat\nnames: cat\n")
    with pytest.raises(QskdError, match="no such folder or file") as caught:
        open_dataset(elsewhere, None)
    assert f"qskd prepare {elsewhere} FOLDER" in caught.value.remedy
    (sample,) = open_dataset(elsewhere, tmp_path).samples()
    np.testing.assert_allclose(sample.boxes_xyxy, [[15, 5, 25, 15]], atol=1e-5)


def late_exif(path: Path, tags: Image.Exif) -> None:
    """A PNG whose EXIF comes behind its pixels."""
    kind, said = b"eXIf", tags.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(said)) + kind + said + struct.pack(">I", zlib.crc32(kind + said))
    encoded = path.read_bytes()
    path.write_bytes(encoded[:-12] + chunk + encoded[-12:])


XMP = b"""<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>
<rdf:Description rdf:about='' xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("way", ["exif.jpg", "late.png", "xmp.jpg", "xmp.webp"])
def test_a_picture_is_turned_for_its_boxes_where_it_is_turned_for_its_pixels(way: str, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    said = {"exif": {"exif": tags}, "xmp": {"xmp": XMP}, "late": {}}[way.partition(".")[0]]
    path = picture(tmp_path / "images" / way, **said)
    if "late" in way:
        late_exif(path, tags)
    write(tmp_path / "labels" / f"{path.stem}.txt", "0 0.25 0.5 0.5 0.25\n")
    (sample,) = open_dataset(write(tmp_path / "data.yaml", "train: images\nnames: [a]\n"), None).samples()
    assert decode_image(sample.encoded, way).size == (sample.width, sample.height) == (20, 40)
    np.testing.assert_allclose(sample.boxes_xyxy, [[0, 15, 10, 25]], atol=1e-5)


def test_boxes_of_a_turned_picture_refer_to_what_a_person_sees_unless_told(tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6  # the stored 40 x 20 pixels are seen as 20 x 40
    picture(tmp_path / "images" / "a.jpg", exif=tags)
    write(tmp_path / "labels" / "a.txt", "0 0.25 0.5 0.5 0.25\n")
    source = write(tmp_path / "data.yaml", "train: images\nnames: [a]\n")
    (sample,) = open_dataset(source, None).samples()
    assert (sample.width, sample.height) == (20, 40)
    np.testing.assert_allclose(sample.boxes_xyxy, [[0, 15, 10, 25]], atol=1e-5)
    # On the stored pixels 0..20 x 7.5..12.5, which a quarter turn to the right takes to 20-12.5..20-7.5 x 0..20.
    (sample,) = open_dataset(source, None, exif="stored").samples()
    np.testing.assert_allclose(sample.boxes_xyxy, [[7.5, 0, 12.5, 20]], atol=1e-5)


def test_pictures_of_one_name_in_several_folders_keep_their_own_labels(tmp_path: Path) -> None:
    for folder, box in (("one", "0 0.5 0.5 0.25 0.5"), ("two", "1 0.25 0.75 0.5 0.5")):
        picture(tmp_path / folder / "images" / "a.png")
        write(tmp_path / folder / "labels" / "a.txt", box)
    source = write(tmp_path / "data.yaml", "train: [one/images, two/images]\nnames: [a, b]\n")
    first, second = open_dataset(source, None).samples()
    assert (first.file_name, second.file_name) == ("one/images/a.png", "two/images/a.png")
    np.testing.assert_allclose(first.boxes_xyxy, [[15, 5, 25, 15]], atol=1e-5)
    np.testing.assert_allclose(second.boxes_xyxy, [[0, 10, 20, 20]], atol=1e-5)
    assert (first.category_ids.tolist(), second.category_ids.tolist()) == ([0], [1])


def test_a_dataset_in_another_place_is_the_same_source_and_another_label_another(yolo: Path, tmp_path: Path) -> None:
    before = open_dataset(yolo, None, split="train").source_sha256
    moved = yolo.parent.rename(tmp_path / "moved")
    assert open_dataset(moved / "data.yaml", None, split="train").source_sha256 == before
    assert open_dataset(moved / "data.yaml", None, split="val").source_sha256 != before
    write(moved / "labels" / "train" / "a.txt", "0 0.5 0.5 0.25 0.4\n")
    assert open_dataset(moved / "data.yaml", None, split="train").source_sha256 != before


def test_yolos_label_files_without_a_picture_are_told_of(yolo: Path) -> None:
    write(yolo.parent / "labels" / "train" / "lost.txt", "0 0.5 0.5 0.25 0.5")
    write(yolo.parent / "labels" / "train" / "classes.txt", "cat")
    (problem,) = open_dataset(yolo, None, split="train").problems
    assert problem["where"] == str(yolo.parent / "labels" / "train")
    assert problem["found"].startswith("1 label files without a picture")
    assert "lost.txt" in problem["found"]


def test_a_data_yaml_with_the_folder_of_its_pictures_is_that_folder_or_told(yolo: Path, tmp_path: Path) -> None:
    """As COCO's images are given."""
    assert len(open_dataset(yolo, yolo.parent / "images" / "train", split="train")) == 4
    with pytest.raises(QskdError, match="no such folder or file"):
        open_dataset(yolo, yolo.parent / "images" / "val", split="train")
    picture(tmp_path / "other" / "images" / "x.png")
    yolo.write_text(f"path: {tmp_path / 'other'}\ntrain: images/train\nnames: [a, b, c]\n")
    with pytest.raises(QskdError, match="no such folder or file"):  # not the folder of that name beside the data.yaml
        open_dataset(yolo, None)


# What a line of a label file is; what the message must hold.
BAD_LINES = {
    "3 0.5 0.5 0.2 0.2": ["class 3", "3 classes", "0 to 2"],
    "-1 0.5 0.5 0.2 0.2": ["class -1"],
    "0.5 0.5 0.5 0.2 0.2": ["class 0.5"],
    "0 0.5 0.5 0.2": ["4 numbers"],
    "0 0.5 0.5 0.2 0.2 0.9": ["confidence"],
    "0 20 10 10 10": ["20 is not relative", "pixels"],
    "0 0.5 nan 0.2 0.2": ["nan"],
    "cat 0.5 0.5 0.2 0.2": ["not all numbers", "cat"],
    "0 0.5 0.5 0 0.2": ["no area"],
    "0 0.1 0.1 0.1 0.5 0.1 0.3": ["no area"],
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_bad_line_of_yolos_stops_with_its_file_and_line_or_is_skipped_and_recorded(yolo: Path, line: str) -> None:
    label = write(yolo.parent / "labels" / "train" / "a.txt", f"0 0.5 0.5 0.25 0.5\n\n{line}\n")
    with pytest.raises(QskdError) as caught:
        open_dataset(yolo, None, split="train")
    assert caught.value.where == f"{label}: line 3"
    for word in BAD_LINES[line]:
        assert word in caught.value.found
    assert "--on-error skip" in caught.value.remedy
    dataset = open_dataset(yolo, None, "skip", split="train")
    assert len(by_name(dataset)["a.png"].area) == 1
    assert [problem["where"] for problem in dataset.problems] == [f"{label}: line 3"]


def test_what_yolo_repeats_counts_once_and_a_poses_points_are_no_outline(yolo: Path) -> None:
    write(yolo.parent / "labels" / "train" / "a.txt", "0 0.5 0.5 0.25 0.5 0.1 0.1 2\n0 0.5 0.5 0.25 0.5 0.1 0.1 2\n")
    write(yolo.parent / "labels" / "train" / "b.txt", "")
    yolo.write_text(yolo.read_text().replace("images/train", "[images/train, images]") + "kpt_shape: [1, 3]\n")
    dataset = open_dataset(yolo, None, split="train")
    np.testing.assert_allclose(by_name(dataset)["a.png"].boxes_xyxy, [[15, 5, 25, 15]], atol=1e-5)
    found = [problem["found"] for problem in dataset.problems]
    assert found.count("the picture is listed twice") == 4
    assert "the same object as in line 1" in found


YAMLS = {
    "names: [no, yes]\ntrain: images/train": ["False", "quotes"],
    "names: [a, a]\ntrain: images/train": ["'a'", "twice"],
    "nc: 4\nnames: [a, b]\ntrain: images/train": ["nc", "4", "2"],
    "data: {train: x}\nstudent: {}": ["no `names`", "student"],
    "names: [a]\nval: ''": ["no `train`"],
    "names: [a]\ntrain: https://example.org/x.zip": ["URL"],
    "names: [a]\ntrain: 5": ["no `train`"],
    "names: [a, b, c]\ntrain: none\ndownload: x": ["none", "download"],
    "names: !!python/object:os.system [a]\ntrain: images/train": ["YAML"],
    "names: [a, b, c]\ntrain: labels/train": ["no picture", ".jpg"],
}


@pytest.mark.parametrize("text", YAMLS)
def test_a_data_yaml_that_can_not_be_meant_is_told_with_what_to_write(yolo: Path, text: str) -> None:
    yolo.write_text(text)
    with pytest.raises(QskdError) as caught:
        open_dataset(yolo, None)
    for word in YAMLS[text]:
        assert word in str(caught.value)


def test_a_yolo_split_without_any_label_file_is_an_error_not_a_set_of_empty_pictures(yolo: Path) -> None:
    (yolo.parent / "labels").rename(yolo.parent / "label")
    with pytest.raises(QskdError, match="none of the 4 pictures") as caught:
        open_dataset(yolo, None, split="train")
    assert str(yolo.parent / "labels" / "train" / "a.txt") in caught.value.expected


def test_a_list_of_yolos_names_no_picture_outside(yolo: Path, tmp_path: Path) -> None:
    picture(tmp_path / "private.png")
    for name in ("../private.png", str(tmp_path / "private.png")):
        write(yolo.parent / "t.txt", f"{name}\n")
        yolo.write_text("train: t.txt\nnames: [a]\n")
        with pytest.raises(QskdError, match="leaves the dataset"):
            open_dataset(yolo, None, "skip")
    (yolo.parent / "images" / "train" / "link.png").symlink_to(tmp_path / "private.png")
    yolo.write_text("train: images/train\nnames: [a, b, c]\n")
    with pytest.raises(QskdError, match="is a link to"):
        open_dataset(yolo, None, "skip")


def test_a_broken_picture_of_yolos_is_named_or_skipped(yolo: Path) -> None:
    broken = write(yolo.parent / "images" / "train" / "a.png", "no picture")
    phone = write(yolo.parent / "images" / "train" / "phone.heic", "not read here")
    with pytest.raises(QskdError) as caught:
        open_dataset(yolo, None, split="train")
    assert caught.value.where == str(broken)
    dataset = open_dataset(yolo, None, "skip", split="train")
    assert list(by_name(dataset)) == ["b.jpg", "bare.png", "empty.png"]
    assert [problem["where"] for problem in dataset.problems] == [str(broken), str(phone)]


# -- Pascal VOC


def voc_xml(name: str, objects: str, size: str = "<width>40</width><height>20</height><depth>3</depth>") -> str:
    return f"<annotation><filename>{name}</filename><size>{size}</size>{objects}</annotation>"


def voc_object(name: str, box: tuple[float, float, float, float], more: str = "") -> str:
    sides = "".join(f"<{side}>{at}</{side}>" for side, at in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><bndbox>{sides}</bndbox>{more}</object>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for name in ("000001", "000002", "000003"):
        picture(root / "JPEGImages" / f"{name}.jpg")
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    two = voc_object("dog", (1, 1, 40, 20), part) + voc_object("cat", (11, 6, 20, 15), "<difficult>1</difficult>")
    write(root / "Annotations" / "000001.xml", voc_xml("000001.jpg", two))
    write(root / "Annotations" / "000002.xml", voc_xml("000002.jpg", ""))
    write(root / "Annotations" / "000003.xml", voc_xml("other.jpg", voc_object("aeroplane", (1, 1, 2, 2)), ""))
    write(root / "ImageSets" / "Main" / "train.txt", "000001\n000002\n")
    write(root / "ImageSets" / "Main" / "val.txt", "000003\n")
    write(root / "ImageSets" / "Main" / "dog_train.txt", "000001  1\n000002 -1\n")
    return root


def test_vocs_boxes_count_from_one_and_classes_are_the_same_for_every_split(voc: Path) -> None:
    train, val = (open_dataset(voc.parent, None, split=split) for split in ("train", "val"))
    assert names(train) == names(val) == {0: "aeroplane", 1: "cat", 2: "dog"}
    samples = by_name(train)
    # Pixels 1 to 40 are all of the picture; pixels 11 to 20 are ten.
    np.testing.assert_array_equal(samples["000001.jpg"].boxes_xyxy, [[0, 0, 40, 20], [10, 5, 20, 15]])
    assert samples["000001.jpg"].category_ids.tolist() == [2, 1]
    assert samples["000001.jpg"].iscrowd.tolist() == [False, True]  # difficult: neither learned nor counted
    assert len(samples["000002.jpg"].area) == 0
    np.testing.assert_array_equal(by_name(val)["000003.jpg"].boxes_xyxy, [[0, 0, 2, 2]])
    assert train.source == "VOC2007 (train)"
    with pytest.raises(QskdError, match="splits train, val"):
        open_dataset(voc, None)
    assert len(open_dataset(voc / "Annotations", None)) == 3


def test_a_voc_list_of_names_with_spaces_is_a_split_and_no_classes_list(voc: Path) -> None:
    """Taken for a class's, it was passed over, and all pictures were read in its place."""
    for number in (1, 2, 3):
        (voc / "JPEGImages" / f"00000{number}.jpg").rename(voc / "JPEGImages" / f"IMG {number}.jpg")
        (voc / "Annotations" / f"00000{number}.xml").rename(voc / "Annotations" / f"IMG {number}.xml")
    lists = voc / "ImageSets" / "Main"
    write(lists / "train.txt", "IMG 1\nIMG 2\n")
    write(lists / "val.txt", '"IMG 3"\n')  # as CVAT writes it
    write(lists / "dog_train.txt", "IMG 1  1\nIMG 2 -1\n")
    assert by_name(open_dataset(voc, None, split="train")).keys() == {"IMG 1.jpg", "IMG 2.jpg"}
    assert by_name(open_dataset(voc, None, split="val")).keys() == {"IMG 3.jpg"}
    with pytest.raises(QskdError, match="splits train, val"):
        open_dataset(voc, None)


def test_a_zero_in_a_voc_folder_shows_that_its_boxes_count_from_zero(voc: Path) -> None:
    write(voc / "Annotations" / "000003.xml", voc_xml("000003.jpg", voc_object("cat", (0, 3, 10.5, 20))))
    np.testing.assert_array_equal(
        by_name(open_dataset(voc, None, split="val"))["000003.jpg"].boxes_xyxy, [[0, 3, 10.5, 20]]
    )
    first = by_name(open_dataset(voc, None, split="train"))["000001.jpg"]
    np.testing.assert_array_equal(first.boxes_xyxy, [[1, 1, 40, 20], [11, 6, 20, 15]])


def test_xml_beside_its_pictures_and_a_file_of_classes_give_the_order(tmp_path: Path) -> None:
    for split, name in (("train", "dog"), ("valid", "cat")):
        picture(tmp_path / "export" / split / "a.b.png")
        picture(tmp_path / "export" / split / "unlabelled.png")
        write(tmp_path / "export" / split / "a.b.xml", voc_xml("x", voc_object(name, (1, 1, 4, 4))))
    for split, index in (("train", 1), ("val", 0)):
        dataset = open_dataset(tmp_path / "export", None, split=split)
        assert names(dataset) == {0: "cat", 1: "dog"}
        assert by_name(dataset)["a.b.png"].category_ids.tolist() == [index]
    classes = write(tmp_path / "names.txt", "dog\nhorse\ncat\n")
    dataset = open_dataset(tmp_path / "export" / "train", None, classes=classes)
    assert names(dataset) == {0: "dog", 1: "horse", 2: "cat"}
    assert by_name(dataset)["a.b.png"].category_ids.tolist() == [0]
    assert [each["found"] for each in dataset.problems] == ["1 pictures without an XML file, the first unlabelled"]
    short = write(tmp_path / "short.yaml", "names: [cat]\n")
    with pytest.raises(QskdError, match="class 'dog'"):
        open_dataset(tmp_path / "export" / "train", None, classes=short)


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><annotation>&c;</annotation>'
FILE = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><annotation><filename>&b;</filename></annotation>'
BAD_XML = {
    "cut": ("<annotation><object>", ["not XML"]),
    "entities that grow": (BOMB, ["not XML", "EntitiesForbidden"]),
    "an entity that is a file": (FILE, ["not XML", "EntitiesForbidden"]),
    "another document": ("<html/>", ["html"]),
    "too large": ("<annotation>" + " " * 2**22 + "</annotation>", ["bytes"]),
    "another size": (voc_xml("", "", "<width>30</width><height>20</height>"), ["30 x 20", "40 x 20"]),
    "object without a name": (voc_xml("", "<object/>"), ["object 1", "no `name`"]),
    "a turned box": (voc_xml("", "<object><name>cat</name><robndbox/></object>"), ["no `bndbox`", "robndbox"]),
    "no number": (voc_xml("", voc_object("cat", (1, 1, 5, 5)).replace("5", "x", 1)), ["xmax", "x"]),
    "turned corners": (voc_xml("", voc_object("cat", (9, 9, 2, 2))), ["no area"]),
    "outside": (voc_xml("", voc_object("cat", (50, 1, 60, 5))), ["outside"]),
}


@pytest.mark.parametrize("kind", BAD_XML)
def test_bad_xml_stops_with_its_file_or_is_skipped_and_recorded(voc: Path, kind: str) -> None:
    text, words = BAD_XML[kind]
    path = write(voc / "Annotations" / "000002.xml", text)
    with pytest.raises(QskdError) as caught:
        open_dataset(voc, None, split="train")
    assert caught.value.where.startswith(str(path))
    for word in words:
        assert word in str(caught.value)
    dataset = open_dataset(voc, None, "skip", split="train")
    assert sum(len(sample.area) for sample in dataset.samples()) == 2
    assert len(dataset.problems) == 1


# -- COCO's outlines

RLE_CASES: dict[str, tuple[Any, list[float]]] = {
    "one polygon": ([[4, 6, 10, 6, 10.5, 12]], [4, 6, 10.5, 12]),
    "polygons": ([[4, 6, 10, 6, 10, 12], [20, 1, 22, 1, 22, 3]], [4, 1, 22, 12]),
    "a flat polygon": ([4, 6, 10, 6, 10, 12], [4, 6, 10, 12]),
    # Column by column, 20 pixels each: 65 empty ones end in row 5 of column 3; three in each of two columns are set.
    "counts": ({"size": [20, 40], "counts": [65, 3, 17, 3, 712]}, [3, 5, 5, 8]),
}


def outlined(folder: Path, segmentation: Any, **more: Any) -> Path:
    picture(folder / "images" / "a.png")
    entry = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": segmentation, **more}
    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}],
        "annotations": [entry],
        "categories": [{"id": 1, "name": "x"}],
    }
    return write(folder / "a.json", json.dumps(document))


@pytest.mark.parametrize("kind", RLE_CASES)
@pytest.mark.parametrize("without", [{}, {"bbox": None}, {"bbox": []}], ids=["absent", "null", "empty"])
def test_an_outline_without_a_bbox_gives_its_box(tmp_path: Path, kind: str, without: dict[str, Any]) -> None:
    segmentation, box_xyxy = RLE_CASES[kind]
    (sample,) = read_coco(outlined(tmp_path, segmentation, **without), tmp_path / "images").samples()
    np.testing.assert_array_equal(sample.boxes_xyxy, np.array([box_xyxy], np.float32))


def test_a_compressed_rle_gives_its_box_and_a_given_bbox_stays(tmp_path: Path) -> None:
    mask = pytest.importorskip("pycocotools.mask")
    pixels = np.zeros((20, 40), np.uint8, order="F")
    pixels[5:8, 3:5] = 1
    rle = mask.encode(pixels)
    segmentation = {"size": [20, 40], "counts": rle["counts"].decode()}
    (sample,) = read_coco(outlined(tmp_path, segmentation), tmp_path / "images").samples()
    np.testing.assert_array_equal(sample.boxes_xyxy, [[3, 5, 5, 8]])
    (sample,) = read_coco(outlined(tmp_path, segmentation, bbox=[1, 2, 3, 4]), tmp_path / "images").samples()
    np.testing.assert_array_equal(sample.boxes_xyxy, [[1, 2, 4, 6]])


BAD_OUTLINES: list[Any] = [
    *(
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6, 7]],
        [["1", 2, 3, 4, 5, 6]],
        [[1, 2, 3, 4, 5, float("nan")]],
        [[10**400] * 6],
    ),
    *("text", [[]], [[1, 1, 1, 1, 1, 1]], [{}], {"size": [0, 40], "counts": "a"}, {"size": [20, 40], "counts": [1]}),
    *({"size": [40, 20], "counts": [800]}, {"size": [20, 40], "counts": [-1, 801]}, {"size": [20, 40], "counts": "é"}),
    *({"counts": "PQ"}, {"size": [20, 40]}, {"size": [20, 40], "counts": [800]}, {"size": [20, 40], "counts": "~~~"}),
]


@pytest.mark.parametrize("segmentation", BAD_OUTLINES, ids=range(len(BAD_OUTLINES)))
def test_an_outline_that_gives_no_box_is_named_or_skipped(tmp_path: Path, segmentation: Any) -> None:
    path = outlined(tmp_path, segmentation)
    with pytest.raises(QskdError) as caught:
        read_coco(path, tmp_path / "images")
    assert "annotation 1" in caught.value.where
    dataset = read_coco(path, tmp_path / "images", "skip")
    assert [len(sample.area) for sample in dataset.samples()] == [0]
    assert len(dataset.problems) == 1


# -- which format


def test_what_is_no_dataset_is_told_with_what_to_give(tmp_path: Path, yolo: Path, voc: Path) -> None:
    def said(source: Path, images: Path | None = None, **options: Any) -> str:
        with pytest.raises(QskdError) as caught:
            open_dataset(source, images, **options)
        return str(caught.value)

    assert "no such file or folder" in said(tmp_path / "none")
    assert "qskd prepare" in said(write(tmp_path / "a.json", "{}"))
    assert "IMAGES DESTINATION" in said(tmp_path / "a.json")
    assert "data.yaml" in said(yolo.parent / "labels" / "train")
    assert "data.yaml" in said(yolo.parent / "labels" / "train" / "a.txt")
    assert "folder with the XML" in said(voc / "Annotations" / "000001.xml")
    assert "--box-format xyxy" in said(yolo, split="train", box_format="xyxy")
    assert "--split" in said(tmp_path / "a.json", tmp_path, split="train")
    assert "--split: test" in said(yolo, split="test")
    write(yolo.parent / "a.xml", "<annotation/>")
    assert "several datasets" in said(yolo.parent)
    (tmp_path / "empty").mkdir()
    assert "no dataset that is known" in said(tmp_path / "empty")
    assert "that has the annotations" in said(yolo.parent / "images" / "train")
    write(tmp_path / "studio" / "notes.json", "{}")  # Label Studio's, beside YOLO's labels
    assert "name the JSON" in said(tmp_path / "studio")
    write(tmp_path / "studio" / "labels" / "a.txt", "")
    assert "write a data.yaml" in said(tmp_path / "studio")
    write(tmp_path / "shards" / "manifest.json", "{}")
    write(tmp_path / "shards" / "shard-00000-abcd.parquet", "")
    assert "shards that are made already" in said(tmp_path / "shards")


def test_roboflows_coco_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    document = json.loads(outlined(tmp_path, [[1, 1, 5, 1, 5, 5]]).read_text())
    picture(tmp_path / "train" / "a.png")
    write(tmp_path / "train" / "_annotations.coco.json", json.dumps(document))
    (sample,) = open_dataset(tmp_path / "train", None).samples()
    np.testing.assert_array_equal(sample.boxes_xyxy, [[1, 1, 5, 5]])
