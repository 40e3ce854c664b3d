"""`qskd label --onto`: an old detector's labels joined to the ground truth of new classes, by CL-DETR's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from strangers import NOTES, refused

import qskd
from pipelines.demo.quickstart import TEACHER, VAL
from pipelines.labelling import job
from pipelines.labelling.onto import BEST, OVERLAP, LabelledPictures, join_classes
from pipelines.prepare import prepare
from qskd.datasets.classes import Side
from qskd.datasets.samples import Category
from qskd.datasets.shapes import EASY, TWINS, make_shapes
from qskd.detectors import load_detector, read_preprocessing
from qskd.errors import QskdError
from qskd.evaluation.inference import predict_image

IMAGES = 24
FIRST_ID = 1  # of the new classes: the old detector's own ids are taken


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images, and new.json: the same with objects of the twins alone, whose ids are 1, 2, ... "circle" is listed, without any."""
    root = tmp_path_factory.mktemp("onto")
    annotations, _ = make_shapes(VAL.model_copy(update={"images": IMAGES}), root)
    tree = json.loads(annotations.read_text())
    names = {one["id"]: one["name"] for one in tree["categories"]}
    numbers = {name: number for number, name in enumerate((*TWINS, "Circle"), FIRST_ID)}
    tree["categories"] = [{"id": number, "name": name} for name, number in numbers.items()]
    tree["annotations"] = [
        {**one, "category_id": numbers[names[one["category_id"]]]}
        for one in tree["annotations"]
        if names[one["category_id"]] in TWINS
    ]
    (root / "new.json").write_text(json.dumps(tree))
    return root


def labels(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    asked = {"threshold": 0.0, "workers": 0, "onto": root / "new.json", **changes}
    job.run(job.Request(str(TEACHER), root / "images", out, **asked), quiet=True)
    return dict(json.loads(out.read_text()))


def iou(a: list[float], b: list[float]) -> float:
    """Of left, top, width, height, by hand."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def test_the_datasets_objects_stay_and_the_ten_best_of_the_old_classes_join_where_they_overlap_none(
    root: Path, tmp_path: Path
) -> None:
    said, given = labels(root, tmp_path / "joined.json"), json.loads((root / "new.json").read_text())
    assert said["images"] == [{name: one[name] for name in said["images"][0]} for one in given["images"]]
    own = [one for one in said["annotations"] if "score" not in one]
    assert len(own) == len(given["annotations"])
    for mine, theirs in zip(own, given["annotations"], strict=True):
        assert (mine["image_id"], mine["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert mine["bbox"] == pytest.approx(theirs["bbox"], abs=0.002)

    detector, seen_as = load_detector(TEACHER).eval(), read_preprocessing(TEACHER)
    slots = [slot for slot, name in enumerate(detector.labels) if name in EASY]
    names = {one["id"]: one["name"] for one in said["categories"]}
    dropped = 0
    for image in given["images"]:
        pixels = np.asarray(Image.open(root / "images" / image["file_name"]).convert("RGB"))
        found = predict_image(detector, pixels, seen_as, slots)
        objects = [one["bbox"] for one in given["annotations"] if one["image_id"] == image["id"]]
        expected = []
        for box, score, place in zip(found.boxes_xyxy[:BEST], found.scores, found.category_ids, strict=False):
            left, top, right, bottom = np.clip(box.astype(float), 0, 64)
            bbox = [left, top, right - left, bottom - top]
            if all(iou(bbox, one) < OVERLAP for one in objects):
                expected.append((detector.labels[slots[place]], float(score), bbox))
        dropped += BEST - len(expected)
        mine = [one for one in said["annotations"] if one["image_id"] == image["id"] and "score" in one]
        assert [names[one["category_id"]].lower() for one in mine] == [name for name, _, _ in expected]
        for one, (_, score, bbox) in zip(mine, expected, strict=True):
            assert one["score"] == pytest.approx(score, abs=1e-4)
            assert one["bbox"] == pytest.approx(bbox, abs=0.01)
    assert dropped > IMAGES / 2  # twins look alike: the old classes are seen in many of their places

    made = prepare(tmp_path / "joined.json", root / "images", str(tmp_path / "shards"), quiet=True)
    assert made.problems == ()
    assert set(made.labels) == {*TWINS, *EASY, "Circle"} - {"circle"}


def test_categories_are_the_union_by_name_the_datasets_ids_stay_and_others_are_free(root: Path, tmp_path: Path) -> None:
    said = labels(root, tmp_path / "joined.json", threshold=0.3)
    found = {one["name"]: one["id"] for one in said["categories"]}
    assert {name: found[name] for name in TWINS} == {name: FIRST_ID + place for place, name in enumerate(TWINS)}
    assert len(set(found.values())) == len(found) == 16
    # A class that the dataset lists and has no object of is labelled under its id; one that it has objects of is not.
    scored = {one["category_id"] for one in said["annotations"] if "score" in one}
    assert found["Circle"] == FIRST_ID + len(TWINS)
    assert found["Circle"] in scored
    assert not scored & {found[name] for name in TWINS}


def test_a_second_detector_joins_its_classes_to_those_of_the_first(root: Path, tmp_path: Path) -> None:
    """The first knows half of the old classes, the second all of them: what the first has labelled stays the first's."""
    said = labels(root, tmp_path / "first.json", threshold=0.3)
    few = {one["id"] for one in said["categories"] if one["name"] in (*TWINS, *EASY[4:])}
    kept = [one for one in said["annotations"] if one["category_id"] in few]
    categories = [one for one in said["categories"] if one["id"] in few]
    (tmp_path / "half.json").write_text(json.dumps({**said, "annotations": kept, "categories": categories}))
    both = labels(root, tmp_path / "both.json", onto=tmp_path / "half.json", threshold=0.3)
    names = {one["id"]: one["name"] for one in both["categories"]}
    assert {names[one["category_id"]] for one in both["annotations"] if "score" in one} <= set(EASY[:4])
    assert [one["bbox"] for one in both["annotations"] if "score" not in one] == [one["bbox"] for one in kept]
    assert set(names.values()) == {*TWINS, *EASY}


def test_a_class_that_is_spelled_otherwise_is_named_by_the_map(root: Path) -> None:
    dataset = LabelledPictures(root / "new.json", root / "images", "stop")
    theirs = [Category(1, "oval"), Category(2, "square")]
    side = Side("model", "old")
    plain = join_classes(dataset, theirs, [5, 7], {}, side)
    assert [one.name for one in plain.named] == ["oval", "square"]
    mapped = join_classes(dataset, theirs, [5, 7], {"ellipse": "oval", "kite": None}, side)
    assert [one.name for one in mapped.named] == ["square"]
    assert mapped.left == ("ellipse",)
    assert mapped.named[0].id not in {one.id for one in dataset.categories}
    with pytest.raises(QskdError, match="objects of every class of the detector"):
        join_classes(dataset, theirs[:1], [5], {"ellipse": "oval"}, side)
    with pytest.raises(QskdError, match="no label ovall"):
        join_classes(dataset, theirs, [5, 7], {"ellipse": "ovall"}, side)


def test_other_ground_truth_is_other_labels_and_what_is_no_coco_json_is_refused(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined.json"
    labels(root, out)
    before = out.read_bytes()
    labels(root, out)  # finished already
    assert out.read_bytes() == before
    tree = json.loads((root / "new.json").read_text())
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps({**tree, "annotations": tree["annotations"][1:]}))
    refused(lambda: labels(root, out, onto=fewer), "labels of another run", tmp_path)
    refused(lambda: labels(root, out, onto=out, overwrite=True), "is the file of --onto", tmp_path)
    (tmp_path / "data.yaml").write_bytes(NOTES)
    refused(lambda: labels(root, tmp_path / "b.json", onto=tmp_path / "data.yaml"), "a .yaml file", tmp_path)


def test_the_function_says_how_many_objects_are_the_datasets(root: Path, tmp_path: Path) -> None:
    said = qskd.label(TEACHER, root / "images", tmp_path / "joined.json", onto=root / "new.json", threshold=0.5)
    assert said.own == len(json.loads((root / "new.json").read_text())["annotations"])
    assert sum(said.objects.values()) > IMAGES / 2
    assert f"beside {said.own} of the dataset" in said.lines()[0]
