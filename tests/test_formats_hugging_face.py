"""Hugging Face datasets on a disk, laid out as `datasets` 2 to 5 write them, give the boxes and classes worked by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qskd.datasets.coco import CocoDataset
from qskd.datasets.formats.opening import open_dataset
from qskd.datasets.formats.rows import Rows
from qskd.errors import QskdError

NAMES = ["cat", "dog", "bird"]
LABEL = {"names": NAMES, "_type": "ClassLabel"}
BOX = {"feature": {"dtype": "float32", "_type": "Value"}, "length": 4, "_type": "Sequence"}
FEATURES: dict[str, Any] = {  # of `objects`, as versions write it
    "Sequence of a mapping": {"feature": {"bbox": BOX, "category": LABEL}, "_type": "Sequence"},
    "mapping of Lists": {
        "bbox": {"feature": BOX, "_type": "List"},
        "category": {"feature": LABEL, "_type": "List"},
    },
    "list of a mapping": [{"bbox": BOX, "category": LABEL}],
}
# Left, top, width, height in a picture of 40 x 20 pixels; as corners.
OBJECTS = {"bbox": [[1.0, 2.0, 10.0, 5.0], [30.0, 4.0, 10.0, 16.0]], "category": [0, 2]}
CORNERS = [[1, 2, 11, 7], [30, 4, 40, 20]]


def encoded(number: int = 0, width: int = 40, height: int = 20) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image(number: int = 0) -> dict[str, Any]:
    return {"bytes": encoded(number), "path": None}


def table(rows: list[dict[str, Any]], objects: Any = None) -> pa.Table:
    features = {"image": {"_type": "Image"}, **({"objects": objects} if objects else {})}
    noted = json.dumps({"info": {"features": features}}) if objects else "{}"
    return pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": noted})


def parquet(path: Path, rows: list[dict[str, Any]], objects: Any = FEATURES["mapping of Lists"]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows, objects), path)
    return path


def saved(folder: Path, rows: list[dict[str, Any]], **state: Any) -> Path:
    """As `Dataset.save_to_disk`: a stream of Arrow, dataset_info.json and state.json."""
    folder.mkdir(parents=True)
    written = table(rows, FEATURES["Sequence of a mapping"])
    with pa.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), written.schema) as stream:
        stream.write_table(written)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def image_folder(folder: Path, lines: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    for number, line in enumerate(lines):
        (folder / Path(line["file_name"]).name).write_bytes(encoded(number))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def said(source: Path, **options: Any) -> str:
    with pytest.raises(QskdError) as caught:
        list(open_dataset(source, None, **options).samples())
    return str(caught.value)


def names(dataset: CocoDataset) -> list[str]:
    assert [category.id for category in dataset.categories] == list(range(len(dataset.categories)))
    return [category.name for category in dataset.categories]


LISTED = [{"bbox": box, "category": index} for box, index in zip(OBJECTS["bbox"], OBJECTS["category"], strict=True)]
ROWS = [{"image": image(0), "objects": OBJECTS}, {"image": image(1), "objects": {"bbox": [], "category": []}}]
LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "Parquet, version 2": lambda to: parquet(to / "a.parquet", ROWS, FEATURES["Sequence of a mapping"]),
    "Parquet, version 4": lambda to: parquet(to / "a.parquet", ROWS),
    "a list of objects": lambda to: parquet(
        to / "a.parquet",
        [{"image": image(0), "objects": LISTED}, {"image": image(1), "objects": []}],
        FEATURES["list of a mapping"],
    ),
    "a folder of the Hub": lambda to: parquet(to / "data" / "validation-00000-of-00001.parquet", ROWS).parents[1],
    "a folder a split": lambda to: parquet(to / "validation" / "0000.parquet", ROWS).parents[1],
    "save_to_disk": lambda to: saved(to / "saved", ROWS),
    "sizes in columns": lambda to: parquet(to / "a.parquet", [{**row, "width": 40, "height": 20} for row in ROWS]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_boxes_and_classes_of_each_layout_are_those_worked_by_hand(tmp_path: Path, layout: str) -> None:
    dataset = open_dataset(LAYOUTS[layout](tmp_path), None)
    for _ in range(2):  # and again: rows are read in order, from the beginning
        first, second = dataset.samples()
        np.testing.assert_array_equal(first.boxes_xyxy, CORNERS)
        assert first.category_ids.tolist() == [0, 2]
        assert first.area.tolist() == [50, 160]
        assert (first.encoded, second.encoded) == (encoded(0), encoded(1))
        assert len(second.area) == 0
    assert names(dataset) == NAMES


def test_a_dictionary_of_splits_is_asked_for_one_and_knows_the_other_spellings(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        saved(tmp_path / "set" / split, ROWS if split == "train" else ROWS[:1])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert "splits train, validation" in said(tmp_path / "set")
    assert len(open_dataset(tmp_path / "set", None, split="val")) == 1
    assert open_dataset(tmp_path / "set", None, split="train").source == "set (train)"
    assert "--split: test" in said(tmp_path / "set", split="test")
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["../set/train"]}')
    assert "names of folders" in said(tmp_path / "set", split="../set/train")


def test_an_image_folder_has_names_from_its_words_over_all_splits_or_from_a_file(tmp_path: Path) -> None:
    root = tmp_path / "words"
    image_folder(root / "train", [{"file_name": "a.png", "objects": {"bbox": [[1, 2, 10, 5]], "category": ["dog"]}}])
    image_folder(root / "test", [{"file_name": "b.png", "objects": [{"bbox": [0, 0, 40, 20], "label": "cat"}]}])
    dataset = open_dataset(root, None, split="train")
    (sample,) = dataset.samples()
    assert names(dataset) == ["cat", "dog"]
    assert sample.category_ids.tolist() == [1]
    np.testing.assert_array_equal(sample.boxes_xyxy, [[1, 2, 11, 7]])
    assert (sample.file_name, sample.encoded) == ("a.png", encoded(0))

    numbers = image_folder(
        tmp_path / "n", [{"file_name": "a.png", "objects": {"bbox": [[1, 2, 10, 5]], "categories": [1]}}]
    )
    assert "--classes names.txt" in said(numbers)
    (tmp_path / "names.txt").write_text("bird\ndog\n")
    dataset = open_dataset(numbers, None, classes=tmp_path / "names.txt")
    assert names(dataset) == ["bird", "dog"]
    assert next(dataset.samples()).category_ids.tolist() == [1]


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_late_row_is_read_without_the_pictures_before_it(kind: str, tmp_path: Path) -> None:
    """A helper of `prepare` asks for 64 rows here and 64 there: an Arrow file in one piece was read from its start each time."""
    pictures = [{"bytes": bytes([number]) * 2**18, "path": None} for number in range(40)]
    whole, path = pa.table({"image": pictures}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(whole, path, compression="NONE", use_dictionary=False)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole, max_chunksize=10)

    def read_so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    rows, before = Rows([path]), read_so_far()
    where, row = next(rows.read(["image"], f"{path}: row 39"))
    assert (where, row["image"]["bytes"][:1]) == (f"{path}: row 39", bytes([39]))
    assert read_so_far() - before < 2**20


HAND: dict[str, list[list[float]]] = {  # the same two boxes, in a picture of 40 x 20
    "xywh": OBJECTS["bbox"],
    "xyxy": CORNERS,
    "cxcywh": [[6, 4.5, 10, 5], [35, 12, 10, 16]],
    "xywh-relative": [[0.025, 0.1, 0.25, 0.25], [0.75, 0.2, 0.25, 0.8]],
    "xyxy-relative": [[0.025, 0.1, 0.275, 0.35], [0.75, 0.2, 1, 1]],
    "cxcywh-relative": [[0.15, 0.225, 0.25, 0.25], [0.875, 0.6, 0.25, 0.8]],
}


@pytest.mark.parametrize("box_format", HAND)
def test_boxes_in_other_formats_are_read_when_told_and_never_taken_for_cocos(tmp_path: Path, box_format: str) -> None:
    # The second one's in pixels, whatever the boxes are in: nothing of a picture is more than 1 of it.
    areas = [0.05 if "relative" in box_format else 40.0, 120.0]
    rows = [{"image": image(), "objects": {"bbox": HAND[box_format], "category": [0, 2], "area": areas}}]
    source = parquet(tmp_path / "a.parquet", rows)
    (sample,) = open_dataset(source, None, box_format=box_format).samples()
    np.testing.assert_allclose(sample.boxes_xyxy, CORNERS, atol=1e-4)
    np.testing.assert_allclose(sample.area, [40, 120], atol=1e-4)
    if box_format == "xyxy":
        assert "--box-format xyxy" in said(source)
    if "relative" in box_format:
        assert "within 0..1" in said(source)


def row(**changes: Any) -> dict[str, Any]:
    return {"image": image(), "objects": OBJECTS, **changes}


BAD_ROWS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no picture": (row(image={"bytes": None, "path": "a.png"}), ["row 1", "no bytes of a picture"]),
    "no image file": (row(image={"bytes": b"abc", "path": None}), ["row 1", "not a readable image"]),
    "classes too few": (row(objects={"bbox": OBJECTS["bbox"], "category": [0]}), ["row 1", "2 boxes and 1 classes"]),
    "box of three": (row(objects={"bbox": [[1.0, 2.0, 3.0]], "category": [0]}), ["row 1, object 0", "four"]),
    "box with NaN": (row(objects={"bbox": [[1.0, 2.0, 3.0, float("nan")]], "category": [0]}), ["row 1, object 0"]),
    "box outside": (row(objects={"bbox": [[50.0, 2.0, 3.0, 1.0]], "category": [0]}), ["row 1, object 0", "outside"]),
    "class out of range": (row(objects={"bbox": [[1.0, 2.0, 3.0, 1.0]], "category": [3]}), ["object 0", "class 3"]),
    "class missing": (row(objects={"bbox": [[1.0, 2.0, 3.0, 1.0]], "category": [None]}), ["object 0", "class None"]),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_stops_with_its_file_and_row_or_is_skipped_and_recorded(tmp_path: Path, kind: str) -> None:
    bad, words = BAD_ROWS[kind]
    source = parquet(tmp_path / "a.parquet", [row(), bad, row(image=image(2))])
    for word in (str(source), "--on-error skip", *words):
        assert word in said(source)
    dataset = open_dataset(source, None, "skip")
    samples = list(dataset.samples())
    assert (samples[0].encoded, samples[-1].encoded) == (encoded(0), encoded(2))
    assert [len(sample.area) for sample in (samples[0], samples[-1])] == [2, 2]
    assert sum(len(sample.area) for sample in samples) == 4
    assert len(dataset.problems) == 1


def test_pictures_stay_with_their_rows_over_batches_files_and_skipped_rows(tmp_path: Path) -> None:
    rows = [{"image_id": 100 + at, "image": image(at), "objects": OBJECTS} for at in range(40)]
    for at in (0, 17, 33):
        rows[at]["image"] = {"bytes": b"broken", "path": None}
    rows[20]["image_id"] = 119
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:25])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[25:])
    dataset = open_dataset(tmp_path, None, "skip")
    found = {sample.image_id: sample.encoded for sample in dataset.samples()}
    assert found == {100 + at: encoded(at) for at in range(40) if at not in (0, 17, 20, 33)}
    places = [problem["where"].rpartition("/")[2] for problem in dataset.problems]
    assert "train-00000-of-00002.parquet: row 20" in places
    assert "train-00001-of-00002.parquet: row 8" in places


def test_what_can_not_be_read_as_one_dataset_is_told(tmp_path: Path) -> None:
    whole = parquet(tmp_path / "whole.parquet", ROWS).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "can't be read" in said(tmp_path / "cut.parquet")
    assert "no `objects`; columns there: image" in said(parquet(tmp_path / "n.parquet", [{"image": image()}], None))
    assert "no image; columns there: objects" in said(parquet(tmp_path / "o.parquet", [{"objects": OBJECTS}], None))
    assert "--classes" in said(parquet(tmp_path / "p.parquet", ROWS, None))
    for config in ("first", "second"):
        parquet(tmp_path / "configs" / config / "train-00000-of-00001.parquet", ROWS)
    assert f"give one of them, for example {tmp_path / 'configs' / 'first'}" in said(tmp_path / "configs")
    parquet(tmp_path / "mixed" / "train-00000-of-00002.parquet", ROWS)
    parquet(tmp_path / "mixed" / "train-00001-of-00002.parquet", [{"image": image()}], None)
    assert "no column objects, which other files" in said(tmp_path / "mixed")
    assert "flatten_indices" in said(saved(tmp_path / "shuffled", ROWS, _indices_data_files=[{"filename": "i.arrow"}]))
    saved(tmp_path / "away", ROWS, _data_files=[{"filename": "../saved/data.arrow"}])
    assert "names of .arrow files" in said(tmp_path / "away")
    assert "--box-format: yolo" in said(tmp_path / "whole.parquet", box_format="yolo")


def test_a_metadata_file_names_no_picture_outside_even_when_skipping(tmp_path: Path) -> None:
    (tmp_path / "private.png").write_bytes(encoded())
    for name in ("../private.png", str(tmp_path / "private.png")):
        folder = image_folder(tmp_path / f"set{len(name)}", [{"file_name": "a.png", "objects": None}])
        line = {"file_name": name, "objects": {"bbox": [[1, 2, 10, 5]], "category": ["dog"]}}
        (folder / "metadata.jsonl").write_text(json.dumps(line))
        assert "leaves the image folder" in said(folder, on_error="skip")


def test_the_pictures_of_several_splits_in_one_metadata_file_are_not_taken_for_one_split(tmp_path: Path) -> None:
    line = {"objects": {"bbox": [[1, 2, 10, 5]], "category": ["dog"]}}
    folder = image_folder(tmp_path / "set", [{"file_name": "a.png", **line}])
    for name in ("train", "test", "left"):
        image_folder(folder / name, [{"file_name": "a.png", **line}])
        (folder / name / "metadata.jsonl").unlink()

    def listed(*names: str) -> None:
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": name, **line}) for name in names))

    listed("train/a.png", "test/a.png")
    assert "of the splits test, train" in said(folder, on_error="skip")
    for names in (["train/a.png"], ["a.png", "train/a.png"], ["left/a.png", "train/a.png"]):
        listed(*names)
        assert len(list(open_dataset(folder, None).samples())) == len(names)
