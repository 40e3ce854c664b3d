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
from qskd.datasets.pictures.facts import Seen, stored_boxes, turned_boxes
from qskd.datasets.samples import Category
from qskd.datasets.shapes import EASY, TWINS, make_shapes
from qskd.datasets.shards import ShardReader
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
    asked = {"images": root / "images", "threshold": 0.0, "workers": 0, "onto": root / "new.json", **changes}
    job.run(job.Request(str(TEACHER), out=out, **asked), quiet=True)
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
    assert both["annotations"][: len(kept)] == kept  # with the first's scores
    assert {names[one["category_id"]] for one in both["annotations"][len(kept) :]} <= set(EASY[:4])
    assert both["info"]["joined_to_info"]["fingerprint"] == said["info"]["fingerprint"]
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


def test_all_that_the_datasets_json_says_stays_as_it_is(root: Path, tmp_path: Path) -> None:
    tree = json.loads((root / "new.json").read_text())
    tree |= {
        "info": {"description": "twins", "teacher": "Ms Frizzle", "version": 1.5},
        "licenses": [{"id": 3, "name": "CC"}],
        "out": {"custom": None},
    }
    for number, one in enumerate(reversed(tree["annotations"])):
        left, top, width, height = one["bbox"]
        outline = [left, top, left + width, top, left + width / 3, top + height]
        one |= {
            "id": 3 * number + 2,
            "segmentation": [outline],
            "keypoints": [1, 2, 2],
            "num_keypoints": 1,
            "mine": "ü",
        }
    del tree["annotations"][0]["bbox"]  # read from its outline
    tree["annotations"][1] |= {"score": 0.25, "bbox": [float(one) + 1e-7 for one in tree["annotations"][1]["bbox"]]}
    tree["annotations"].sort(key=lambda one: one["id"])
    tree["images"] = [{**one, "license": 3, "coco_url": f"x/{one['id']}"} for one in reversed(tree["images"])]
    tree["categories"] = [
        {**one, "supercategory": "a  b", "skeleton": [[1, 2]]} for one in reversed(tree["categories"])
    ]
    (tmp_path / "rich.json").write_text(json.dumps(tree))
    asked = job.Request(
        str(TEACHER), root / "images", tmp_path / "out.json", onto=tmp_path / "rich.json", threshold=0.3, workers=0
    )
    told = job.run(asked, quiet=True)
    said = json.loads(asked.out.read_text())
    count = len(tree["annotations"])
    assert said["annotations"][:count] == tree["annotations"]
    assert said["categories"][: len(tree["categories"])] == tree["categories"]
    assert {key: said[key] for key in ("images", "licenses", "out")} == {
        key: tree[key] for key in ("images", "licenses", "out")
    }
    assert said["info"]["teacher"] == str(TEACHER)
    assert said["info"].items() >= {"description": "twins", "version": 1.5}.items()
    assert said["info"]["joined_to_info"] == {"teacher": "Ms Frizzle"}
    added = said["annotations"][count:]
    assert len({one["id"] for one in said["annotations"]}) == count + len(added)
    assert (told.own, sum(told.objects.values())) == (count, len(added))
    assert job.run(asked, quiet=True) == told  # finished already
    assert prepare(asked.out, root / "images", str(tmp_path / "shards"), quiet=True).num_objects == count + len(added)


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
def test_a_turned_pictures_labels_join_boxes_that_are_on_its_stored_pixels(orientation: int) -> None:
    """Such a picture's entries stay as they are, so that the labels must be where `qskd prepare` reads those."""
    seen = Seen(60, 40, orientation, False, "")
    box_xyxy = np.array([[3, 5, 20, 9]], np.float32)
    on_stored = stored_boxes(box_xyxy, seen.upright, orientation)
    np.testing.assert_array_equal(turned_boxes(on_stored, seen.stored, orientation), box_xyxy)


def test_a_picture_that_is_stored_turned_gets_the_labels_of_the_upright_one(root: Path, tmp_path: Path) -> None:
    tree = json.loads((root / "new.json").read_text())
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[274] = 6
    for one in tree["images"]:
        upright = Image.open(root / "images" / one["file_name"]).convert("RGB").crop((0, 0, 64, 48))
        one |= {"file_name": f"{one['id']}.png", "width": 48, "height": 64}
        upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "images" / one["file_name"], exif=exif)
    tree["annotations"] = [{**one, "bbox": [1, 2, 3, 4], "area": 12} for one in tree["annotations"][:1]]
    (tmp_path / "stored.json").write_text(json.dumps(tree))
    said = labels(root, tmp_path / "out.json", onto=tmp_path / "stored.json", threshold=0.3, images=tmp_path / "images")
    assert said["images"] == tree["images"]
    assert said["annotations"][0] == tree["annotations"][0]
    asked = job.Request(str(TEACHER), tmp_path / "images", tmp_path / "plain.json", threshold=0.3, workers=0)
    job.run(asked, quiet=True)
    plain = json.loads(asked.out.read_text())  # of the upright pictures
    names = {one["id"]: one["file_name"] for one in plain["images"]}
    expected = {(names[one["image_id"]], one["score"]): one["bbox"] for one in plain["annotations"]}
    prepare(tmp_path / "out.json", tmp_path / "images", str(tmp_path / "shards"), quiet=True)
    reader, seen = ShardReader(str(tmp_path / "shards")), 0
    for sample in reader.read(0, range(reader.manifest.num_images)):
        scores = [one.get("score") for one in said["annotations"] if one["image_id"] == sample.image_id]
        for score, (left, top, right, bottom) in zip(scores, sample.boxes_xyxy.tolist(), strict=True):
            if score is not None:
                bbox = expected[sample.file_name, score]
                assert [left, top, right - left, bottom - top] == pytest.approx(bbox, abs=0.01)
                seen += 1
    assert seen > 10


def test_what_is_left_out_of_the_datasets_json_is_not_joined(root: Path, tmp_path: Path) -> None:
    tree = json.loads((root / "new.json").read_text())
    one, two, three = tree["annotations"][:3]
    one["bbox"] = [1, 2, -3, 4]
    two["area"] = -5.0
    three |= {"image_id": 10**6}
    (tmp_path / "broken.json").write_text(json.dumps(tree))
    said = labels(root, tmp_path / "out.json", onto=tmp_path / "broken.json", threshold=0.5, on_error="skip")
    ids = {one["id"]: one for one in tree["annotations"]}
    own = [each for each in said["annotations"] if "score" not in each]
    assert own == [{key: value for key, value in two.items() if key != "area"}, *tree["annotations"][3:]]
    assert not {each["id"] for each in said["annotations"] if "score" in each} & (ids.keys() - {one["id"], three["id"]})
    assert len(said["info"]["left_out"]) == 3
    assert prepare(tmp_path / "out.json", root / "images", str(tmp_path / "shards"), quiet=True).problems == ()
