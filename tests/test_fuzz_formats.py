"""No data.yaml, label file, XML, metadata or Arrow file ends in anything but samples or a QskdError (see test_fuzz.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from odd import COCO, NAMES, NUMBERS, RAW, bounded, ends_well, every, mutated, picture_folder, with_depth

from qskd.datasets.coco import read_coco
from qskd.datasets.formats.opening import open_dataset

MODES = st.sampled_from(["stop", "skip"])
YAML: dict[str, Any] = {
    "path": ".",
    "train": ["images", "t.txt"],
    "val": "images",
    "names": {0: "cat", 1: "dog"},
    "nc": 2,
    "kpt_shape": [1, 2],
}
OBJECTS = {"bbox": [[1.0, 2.0, 3.0, 2.0]], "category": ["cat"], "area": [6.0], "iscrowd": [0]}
LINES: list[dict[str, Any]] = [
    {"file_name": "a.png", "image_id": 3, "width": 8, "height": 6, "objects": OBJECTS},
    {"file_name": "b.png", "objects": [{"bbox": [0, 0, 8, 6], "category": 0}]},
]
XML = """<annotation><filename>a.png</filename><size><width>8</width><height>6</height></size><object><name>cat</name>
<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>6</ymax></bndbox></object></annotation>"""
PIECES = (
    "<",
    ">",
    "&a;",
    "]]>",
    "<!--",
    "<?x?>",
    "<object>",
    "</object>",
    "<!DOCTYPE a>",
    "9" * 400,
    "nan",
    "-1e309",
    "\0",
    "é",
)
WORDS = st.one_of(
    st.sampled_from(["0", "1", "-1", "0.5", "nan", "inf", "1e400", "0x1", "", "\ud800", "９"]), st.text(max_size=4)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("formats") / "images")


def read(source: Path, mode: Any, **options: Any) -> None:
    ends_well(lambda: list(open_dataset(source, None, mode, **options).samples()))


@bounded
@given(tree=mutated(YAML), mode=MODES)
def test_data_yaml(folder: Path, tree: Any, mode: str) -> None:
    path = folder.parent / "data.yaml"
    path.write_text(with_depth(yaml.safe_dump(tree, allow_unicode=True)), errors="replace")
    (folder.parent / "t.txt").write_text("images/a.png\n./images/b.png\n")
    (folder / "a.txt").write_text("0 0.5 0.5 1 1 0.5 0.5\n")
    read(path, mode, split="train")


@bounded
@every(example(raw=raw, mode="skip") for raw in RAW)
@given(
    raw=st.binary(max_size=40)
    | st.lists(st.lists(WORDS, max_size=9).map(" ".join), max_size=4).map(
        lambda lines: "\n".join(lines).encode(errors="surrogatepass")
    ),
    mode=MODES,
)
def test_label_files_and_lists(folder: Path, raw: bytes, mode: str) -> None:
    (folder / "a.txt").write_bytes(raw)
    (folder.parent / "t.txt").write_bytes(b"images/a.png\n" + raw)
    path = folder.parent / "labels.yaml"
    path.write_text("names: [cat, dog]\ntrain: images\nval: t.txt\n")
    for split in ("train", "val"):
        read(path, mode, split=split)


@bounded
@given(at=st.integers(0, len(XML)), length=st.integers(0, 30), piece=st.sampled_from([*PIECES, *NAMES]), mode=MODES)
def test_xml(folder: Path, at: int, length: int, piece: str, mode: str) -> None:
    (folder / "a.xml").write_text(XML[:at] + piece + XML[at + length :], errors="replace")
    ends_well(lambda: list(open_dataset(folder, folder, mode).samples()))


@bounded
@given(lines=mutated(LINES), mode=MODES)
def test_metadata(tmp_path_factory: pytest.TempPathFactory, folder: Path, lines: Any, mode: str) -> None:
    place = folder.parent / "metadata"
    if not place.is_dir():
        picture_folder(place)
    text = "\n".join(json.dumps(line) for line in lines)
    (place / "metadata.jsonl").write_text(text.replace('"@deep@"', "[" * 3000 + "]" * 3000))
    read(place, mode)


@bounded
@given(value=mutated({"segmentation": [[1, 1, 5, 1, 5, 5]]}) | mutated({"segmentation": {"size": [6, 8], "counts": [8, 2, 38]}})
       | st.fixed_dictionaries({"segmentation": st.fixed_dictionaries({
           "size": st.lists(st.sampled_from([6, 8, *NUMBERS[:13]]), min_size=2, max_size=2), "counts": st.text(max_size=9)})}),
       mode=MODES)  # fmt: skip
def test_outlines(folder: Path, value: Any, mode: str) -> None:
    document = json.loads(json.dumps(COCO))
    del document["annotations"][0]["bbox"]
    document["annotations"][0] |= value if isinstance(value, dict) else {}
    path = folder.parent / "outlines.json"
    path.write_text(with_depth(json.dumps(document)))
    ends_well(lambda: list(read_coco(path, folder, mode).samples()))


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, bytes]:
    """The same three rows as Parquet and as `save_to_disk` writes Arrow."""
    rows = [{"image": {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}, "objects": OBJECTS}] * 3
    table = pa.Table.from_pylist(rows)
    found = {}
    for kind in ("parquet", "arrow"):
        path = folder.parent / kind / f"data.{kind}"
        path.parent.mkdir()
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
            (path.parent / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        assert len(open_dataset(path.parent, None)) == 3
        found[kind] = path.read_bytes()
    return found


@bounded
@given(kind=st.sampled_from(["parquet", "arrow"]), place=st.floats(0, 1), value=st.integers(0, 255), cut=st.booleans())
def test_tables(folder: Path, tables: dict[str, bytes], kind: str, place: float, value: int, cut: bool) -> None:
    raw = bytearray(tables[kind])
    raw[int(place * (len(raw) - 1))] = value
    path = folder.parent / kind / f"data.{kind}"
    path.write_bytes(raw[: int(place * len(raw))] if cut else raw)
    read(path.parent, "skip")
