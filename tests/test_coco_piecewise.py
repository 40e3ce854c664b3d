"""A COCO file read piece by piece, and annotations looked at many at once, say what the whole file and one by one would."""

from __future__ import annotations

import dataclasses
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qskd.datasets import coco
from qskd.datasets.coco import CocoDataset, read_coco
from qskd.datasets.formats import coco_json
from qskd.datasets.formats.coco_json import CocoFile, Irregular
from qskd.datasets.formats.columns import Ids, PlainBlock
from qskd.errors import QskdError

CATEGORIES = [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}]
ODD: list[dict[str, Any]] = [
    {"bbox": [0, 0, 5]}, {"bbox": [1, 2, -3, 4]}, {"bbox": [-0.0, 0, 5, 5]}, {"bbox": [-3, 2, 9, 9]}, {"bbox": [90, 2, 9, 9]},
    {"bbox": [True, 2, 9, 9]}, {"bbox": ["1", 2, 9, 9]}, {"bbox": [float("nan"), 2, 9, 9]}, {"bbox": [1e308, 2, 1e308, 9]},
    {"bbox": None, "segmentation": [[1, 1, 9, 1, 9, 9]]}, {"bbox": [2, 2, 10**30, 3]}, {"bbox": [38.5, 2, 2.9, 9]},
    {"area": -1}, {"area": None}, {"area": "x"}, {"area": 1e39}, {"area": float("inf")}, {"iscrowd": 2}, {"iscrowd": True},
    {"iscrowd": 1.0}, {"iscrowd": "1"}, {"category_id": 3}, {"category_id": "5"}, {"image_id": 99}, {"image_id": 4.0}, {"id": 7},
    {"id": "a"}, {"id": 2**70}, {"id": True}, {"ignore": 1}, {"difficult": 0}, {"bbox_mode": 0}, {"attributes": {"rotation": 3}},
    {"iscrowd": None}, {"bbox": [0, 0, 40, 30], "note": [{"a": 1}, {"b": "}, {"}]},
]  # fmt: skip


def document(seed: int, odd: float) -> dict[str, Any]:
    rng = random.Random(seed)
    images = [{"id": key, "file_name": f"{key}.png", "width": 40, "height": 30} for key in range(8)]
    entries: list[Any] = []
    for number in range(700):
        box = [rng.choice([rng.uniform(0, 20), rng.randrange(20)]) for _ in range(2)] + [
            rng.uniform(1, 19),
            rng.uniform(1, 10),
        ]
        entry = {"id": number, "image_id": rng.randrange(8), "category_id": rng.choice([2, 5]), "bbox": box}
        entry |= rng.choice([{}, {"area": 3.5, "iscrowd": rng.randrange(2)}, {"area": 12}])
        entries.append(entry | rng.choice(ODD) if rng.random() < odd else entry)
    entries += [3, None, [], {}] if odd > 0.5 else []
    return {"images": images, "annotations": entries, "categories": CATEGORIES}


def told(path: Path, on_error: Any) -> tuple[Any, ...]:
    """All that reading says."""
    try:
        found = read_coco(path, path.parent, on_error)
    except QskdError as error:
        return (str(error),)
    samples = [
        [value.tobytes() if isinstance(value, np.ndarray) else value for value in dataclasses.astuple(sample)]
        for sample in found.outline()
    ]
    return samples, found.problems, found.findings, found.categories, found.listed_objects, found.source_sha256


@pytest.mark.parametrize("odd", [0.0, 0.02, 0.9])
def test_annotations_looked_at_together_give_what_one_by_one_gives(
    odd: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    for seed in range(4):
        path.write_text(json.dumps(document(seed, odd)))
        together = [told(path, way) for way in ("skip", "stop")]
        with monkeypatch.context() as patched:
            patched.setattr(coco, "PlainBlock", _never)
            assert together == [told(path, way) for way in ("skip", "stop")]
    assert len(together[0]) == 6


def _never(*_: object) -> PlainBlock:
    raise TypeError


@pytest.mark.parametrize("layout", ["plain", "tight", "indented", "annotations first", "with others"])
def test_a_file_read_in_pieces_gives_what_the_whole_gives(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, tree = tmp_path / "a.json", document(1, 0.05)
    if layout == "annotations first":
        tree = dict(reversed(tree.items()))
    elif layout == "with others":
        tree = {
            "info": {"images": [1, {"annotations": []}]},
            **tree,
            "licenses": [{"a": [1, {"b": 2}, {}]}],
            "n": 12.5e3,
        }
    ways: dict[str, dict[str, Any]] = {"tight": {"separators": (",", ":")}, "indented": {"indent": 1}}
    path.write_text(json.dumps(tree, **ways.get(layout, {}), ensure_ascii=False))
    with monkeypatch.context() as patched:
        patched.setattr(CocoDataset, "_read", CocoDataset._read_whole)
        whole = told(path, "skip")
    monkeypatch.setattr(CocoDataset, "_read_whole", lambda self: pytest.fail("the file was parsed as a whole"))
    for piece, window in ((2**22, 2**17), (1000, 300), (37, 20), (1, 2**17)):
        monkeypatch.setattr(coco_json, "_PIECE", piece)
        monkeypatch.setattr(coco_json, "_WINDOW", window)
        assert told(path, "skip") == whole


REST = '"annotations": [], "categories": []}'
ODD_FILES = {
    "cut short": '{"images": [{"id": 1}, {"i',
    "nothing": "",
    "a comma too many": '{"images": [{},], ' + REST,
    "a key twice": '{"images": [], "images": [], ' + REST,
    "a list that is none": '{"images": {}, ' + REST,
    "half a surrogate": '{"images": [{"file_name": "\\ud800"}]}',
    "more behind it": json.dumps(document(0, 0)) + "{}",
    "a long number": '{"images": [' + "1" * 5000 + "]}",
    "deep": '{"images": [' + "[" * 100_000,
    "no list": '{"images": []}',
    "a value alone": '{"images": [], "n": tru',
    "a list": "[]",
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_what_is_no_plain_coco_file_is_told_as_of_the_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(ODD_FILES[name])
    with pytest.raises((Irregular, ValueError)):
        [*(file := CocoFile(path)).images(), *file.annotations()]
    pieces = told(path, "stop")
    monkeypatch.setattr(CocoDataset, "_read", CocoDataset._read_whole)
    assert pieces == told(path, "stop")


def test_utf_16_and_a_byte_order_mark_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    said = []
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(json.dumps(document(0, 0)), encoding=encoding)
        said.append(told(path, "stop")[:5])
    assert said[0] == said[1] == said[2]


def test_of_a_large_file_little_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 MB of outlines. The file and its values as a whole are 32 MB."""
    Image.new("RGB", (40, 30)).save(tmp_path / "0.png")
    tree = document(0, 0)
    outline = [[float(number) / 7 for number in range(300)]]
    tree["annotations"] = [
        {
            "id": number,
            "image_id": number % 8,
            "category_id": 2,
            "bbox": [1, 1, 9, 9],
            "segmentation": outline,
            "area": 50.5,
        }
        for number in range(1500)
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree))
    monkeypatch.setattr(coco_json, "_PIECE", 2**18)
    assert path.stat().st_size > 7e6
    del tree
    tracemalloc.start()
    dataset = read_coco(path, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert dataset.listed_objects == 1500
    assert peak < 15e6, peak


def test_ids_know_what_is_there_whatever_the_numbers() -> None:
    rng = random.Random(0)
    numbers = [*range(-3000, 60_000), *(rng.randrange(-(2**63), 2**63) for _ in range(20_000)), -(2**63), 2**63 - 1]
    ids, known = Ids(), set[int]()
    for number in rng.choices(numbers, k=100_000):
        assert ids.add(number) == (number not in known)
        known.add(number)
    assert len(ids._pages) * 512 < 2e6


@pytest.mark.parametrize("style", ["written on Windows", "spaced"])
def test_where_ends_of_entries_are_not_seen_they_are_not_looked_for_at_each(
    style: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 128 thousand characters was looked through for every annotation: fifteen times as long."""
    tree = document(0, 0.0)
    text = (
        json.dumps(tree, indent=1).replace("\n", "\r\n")
        if style != "spaced"
        else json.dumps(tree, separators=(" , ", ": "))
    )
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    monkeypatch.setattr(coco_json, "_WINDOW", 2**12)
    several, asked = coco_json._several, list[int]()
    monkeypatch.setattr(coco_json, "_several", lambda text: asked.append(text.at) or several(text))  # type: ignore[func-returns-value]
    file = CocoFile(path)
    assert len(list(file.images())) == 8
    assert list(file.annotations()) == tree["annotations"]
    assert len(asked) <= 2 * (len(text) / 2**12 + 8)
