"""Splits of one dataset are joined by name, and what the student is measured at is what pycocotools counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from strangers import config
from test_loader import Pictures
from tiny import STUDENT
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from pipelines.demo.quickstart import TEACHER
from pipelines.feed.stream import local_stream
from pipelines.inspection.subjects import Dataset, find_subject
from pipelines.prepare import prepare
from pipelines.reporting import report
from pipelines.reporting.cards import teacher_metrics
from pipelines.run.resolve import ResolvedConfig, resolve
from pipelines.training.plan import Plan, make_plan
from pipelines.training.worker import Worker
from qskd.datasets.manifest import load_manifest
from qskd.datasets.samples import Sample
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.datasets.shards import ShardReader, write_shards
from qskd.datasets.splits import evaluated, join_categories
from qskd.errors import QskdError

Document = dict[str, Any]


@dataclass(frozen=True)
class Coco:
    """train: prepared. document: of the same pictures, to be changed."""

    root: Path
    document: Document

    def val(self, change: Callable[[Document], None], name: str = "val") -> Path:
        """The JSON of a changed validation split, prepared beside it."""
        document: Document = json.loads(json.dumps(self.document))
        change(document)
        file = self.root / f"{name}.json"
        file.write_text(json.dumps(document))
        shutil.rmtree(self.root / name, ignore_errors=True)
        prepare(file, self.root / "coco" / "images", str(self.root / name), quiet=True)
        return file

    def resolved(self, *overrides: str, verb: str = "train") -> ResolvedConfig:
        start = [f"student={json.dumps(STUDENT)}"] if verb == "distill" else [f"student.init={TEACHER}"]
        return resolve(config(self.root, *start, *overrides), verb)

    def plan(self, *overrides: str) -> Plan:
        return make_plan(self.resolved(*overrides), "train")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Coco:
    root = tmp_path_factory.mktemp("splits")
    annotations, images = make_shapes(ShapesConfig(images=10), root / "coco")
    prepare(annotations, images, str(root / "train"), quiet=True)
    return Coco(root, json.loads(annotations.read_text()))


def renumbered(document: Document, numbers: dict[int, int]) -> None:
    for category in document["categories"]:
        category["id"] = numbers[category["id"]]
    for annotation in document["annotations"]:
        annotation["category_id"] = numbers[annotation["category_id"]]


def without(document: Document, name: str) -> None:
    """No such category, nor its objects."""
    (number,) = (one["id"] for one in document["categories"] if one["name"] == name)
    document["categories"] = [one for one in document["categories"] if one["id"] != number]
    document["annotations"] = [one for one in document["annotations"] if one["category_id"] != number]


def the_same(document: Document) -> None:
    pass


def other_order(document: Document) -> None:
    ids = sorted(one["id"] for one in document["categories"])
    renumbered(document, {number: 1000 - 7 * place for place, number in enumerate(ids)})


def everything(document: Document) -> None:
    """Other ids in another order, a class fewer, other spellings, a group's name that nobody has an object of."""
    other_order(document)
    without(document, "star")
    for category in document["categories"]:
        category["name"] = f" {category['name'].upper()}"
        category.pop("supercategory")
    document["categories"].insert(0, {"id": 3, "name": "shapes"})


def named(name: str) -> str:
    return name.strip().lower()


def counted_by_others(truth: COCO, images: Path, numbers: Mapping[str, int]) -> tuple[float, float]:
    """AP and AP50 of the quickstart's teacher by plain transformers and pycocotools. numbers: its label -> category id."""
    model, processor = AutoModelForObjectDetection.from_pretrained(TEACHER), AutoImageProcessor.from_pretrained(TEACHER)
    slots, ids = [model.config.label2id[label] for label in numbers], list(numbers.values())
    results = []
    for image in truth.imgs.values():
        picture = Image.open(images / image["file_name"]).convert("RGB")
        with torch.inference_mode():
            output = model(**processor(images=picture, return_tensors="pt"))
        best, places = output.logits[0][:, slots].sigmoid().flatten().topk(100)
        for score, place in zip(best.tolist(), places.tolist(), strict=True):
            query, column = divmod(place, len(slots))
            x, y, w, h = (output.pred_boxes[0, query] * torch.tensor([picture.width, picture.height] * 2)).tolist()
            box = [x - w / 2, y - h / 2, w, h]
            results.append({"image_id": image["id"], "category_id": ids[column], "bbox": box, "score": score})
    counted = COCOeval(truth, truth.loadRes(results), "bbox")
    for step in (counted.evaluate, counted.accumulate, counted.summarize):
        step()
    return float(counted.stats[0]), float(counted.stats[1])


@pytest.mark.parametrize("change", [the_same, other_order, everything])
def test_the_ap_of_joined_splits_equals_pycocotools_on_plain_transformers_outputs(
    coco: Coco, change: Callable[[Document], None]
) -> None:
    file = coco.val(change)
    plan = coco.plan()
    worker = Worker(plan.config, plan.stream, 1, 0, torch.device("cpu"))
    found = worker.evaluate(share for share in local_stream(plan.stream) if share.subset == "val" and share.epoch == 0)
    assert found is not None
    student = {label: slot for slot, label in enumerate(load_manifest(plan.config.data.train).labels)}
    truth = COCO(str(file))
    numbers = {named(one["name"]): one["id"] for one in truth.cats.values() if named(one["name"]) in student}
    ap, ap50 = counted_by_others(truth, coco.root / "coco" / "images", numbers)
    assert ap > 0.2
    assert found.metrics["AP"] == pytest.approx(ap, abs=1e-4)
    assert found.metrics["AP50"] == pytest.approx(ap50, abs=1e-4)
    # In the names and ids of the validation split.
    assert set(found.per_class) == {one["name"] for one in truth.cats.values()}


def test_supercategories_are_no_difference_and_equal_splits_are_evaluated_as_ever(coco: Coco) -> None:
    def no_groups(document: Document) -> None:
        for category in document["categories"]:
            category["supercategory"] = f"group of {category['name']}"

    coco.val(no_groups)
    plan = coco.plan()
    assert plan.classes == ()
    assert evaluated(plan.train, plan.val) == (None, tuple(one.id for one in plan.train.categories))


def test_what_differs_between_joined_splits_is_told_with_the_first_difference_and_both_files(coco: Coco) -> None:
    coco.val(everything)
    plan = coco.plan()
    told = "\n".join(plan.classes)
    first = plan.train.categories[0]
    its = next(one for one in plan.val.categories if named(one.name) == first.name)
    assert f"id {first.id} {first.name} of annotations.json is id {its.id} {its.name.strip()} of val.json" in told
    assert "no category for [star]: AP is over the other 7 classes" in told
    assert "no object of them: [id 3 shapes]" in told
    assert told in "\n".join(plan.notices)
    assert plan.classes[0] in plan.describe()


def test_an_image_is_shown_in_the_training_s_classes_whichever_split_it_is_of(
    coco: Coco, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco.val(everything)
    resolved = coco.resolved(verb="distill")
    train, val = (load_manifest(path) for path in (resolved.data.train, resolved.data.val))
    dataset = Dataset(resolved)
    assert dataset.labels == train.labels
    monkeypatch.setattr(report, "SAMPLES", 1)
    ((number, shown),) = report.explanations(resolved, val, Path(TEACHER))[0].items()
    subject = find_subject(str(number), resolved, dataset, None, None)
    assert subject.labels is not None
    names = {one["id"]: one["name"] for one in coco.document["categories"]}
    own = [names[one["category_id"]] for one in coco.document["annotations"] if one["image_id"] == number]
    expected = sorted(name for name in own if name != "star")
    assert expected
    assert sorted(train.labels[label] for label in subject.labels) == expected
    assert sorted(shown.labels[label] for label in shown.objects.category_ids) == expected


def test_a_class_map_in_the_training_s_names_serves_the_teacher_s_ap_on_the_other_split(coco: Coco) -> None:
    coco.val(everything)
    asked = ["card.evaluate_teacher=true", "compute.workers=1", "teacher.class_map={star: octagon, circle: circle}"]
    resolved = coco.resolved(*asked, verb="distill")
    found = teacher_metrics(resolved.model_copy(update={"compute": resolved.compute.model_copy(update={"workers": 0})}))
    assert found["AP"] > 0.2


def refusal(coco: Coco, change: Callable[[Document], None]) -> QskdError:
    coco.val(change)
    with pytest.raises(QskdError) as caught:
        coco.plan()
    assert "teacher" not in str(caught.value)  # there is none
    return caught.value


def test_objects_of_a_class_that_is_not_trained_are_refused_with_the_first_difference(coco: Coco) -> None:
    def zebra(document: Document) -> None:
        document["categories"].append({"id": 99, "name": "zebra"})
        for annotation in document["annotations"][:3]:
            annotation["category_id"] = 99

    error = refusal(coco, zebra)
    assert error.where == str(coco.root / "val")
    assert "id 99 zebra with 3 object(s)" in error.found
    assert "First difference: id 99 zebra in" in error.found
    assert "val.json" in error.found
    assert "annotations.json" in error.found


def test_splits_of_two_datasets_and_names_that_read_alike_are_refused(coco: Coco) -> None:
    def other(document: Document) -> None:
        document["annotations"] = []
        for category in document["categories"]:
            category["name"] += "s of another kind"

    def twice(document: Document) -> None:
        document["categories"].append({"id": 500, "name": "Circle"})

    assert "no class of" in refusal(coco, other).found
    error = refusal(coco, twice)
    assert "circle and id 500 Circle both read like" in error.found


def test_two_classes_that_differ_in_case_alone_are_joined_as_they_are_written(coco: Coco) -> None:
    def both(document: Document) -> None:
        document["categories"].append({"id": 500, "name": "Circle"})

    def both_in_another_order(document: Document) -> None:
        both(document)
        other_order(document)

    coco.val(both, "one")
    coco.val(both_in_another_order, "two")
    one, two = (load_manifest(str(coco.root / name)) for name in ("one", "two"))
    slots = join_categories(one, two)
    assert [one.labels[slot] for slot in slots] == [category.name for category in two.categories]


def test_the_pictures_of_a_run_are_of_the_first_images_with_objects_wherever_these_are(tmp_path: Path) -> None:
    class Backgrounds(Pictures):
        def samples(self) -> Iterator[Sample]:
            for number, sample in enumerate(super().samples()):
                none = slice(0, len(sample.category_ids) if number >= 37 else 0)
                yield replace(
                    sample,
                    boxes_xyxy=sample.boxes_xyxy[none],
                    category_ids=sample.category_ids[none],
                    area=sample.area[none],
                    iscrowd=sample.iscrowd[none],
                )

    write_shards(Backgrounds(48), str(tmp_path / "val"), rows_per_shard=8, rows_per_group=3)
    found = report.first_with_objects(ShardReader(str(tmp_path / "val")))
    assert [sample.image_id for sample in found] == [137, 138, 139, 141]  # every fourth has none
    assert all(len(sample.encoded) for sample in found)
