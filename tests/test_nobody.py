"""`class_map: {NAME: null}`: the teacher says nothing of a class, and the student learns it from its objects alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pycocotools.coco import COCO
from reference import make_targets
from strangers import config
from test_predictions import CLASSES, network, only_predictions, run
from test_splits import counted_by_others
from test_teacher import pixels
from tiny import FAMILIES, LABELS, batch_of, make_training, random_teacher, recipe, silent_student, trained_weights

from pipelines.demo.quickstart import TEACHER
from pipelines.inspection.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from qskd.checks import check_classes
from qskd.config import DetectionLossConfig
from qskd.config.recipe import build, to_tree
from qskd.datasets.classes import NOBODY
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import inherit
from qskd.distillation.qskd.query_selection import select_queries
from qskd.distillation.qskd.settings import PredictionDistillationConfig
from qskd.errors import QskdError
from qskd.evaluation.agreement import agreement
from qskd.losses.matching import assign
from qskd.structures import SILENT_LOGIT, TeacherNeeds
from qskd.teacher.columns.table import collate, columns_for, decode_batch, encode
from qskd.teacher.identity import cache_identity
from qskd.teacher.online import OnlineTeacher

SLOTS = (3, NOBODY, 1)  # of LABELS in TEACHER_LABELS: nobody for "dog"
PAIRINGS = get_args(PredictionDistillationConfig.model_fields["pairing"].annotation)


def half_deaf() -> tuple[OnlineTeacher, OnlineTeacher]:
    """A teacher, and the same one to whom "dog" is not mapped."""
    whole = random_teacher()
    return whole, OnlineTeacher(whole.detector, SLOTS, whole.preprocessing)


def test_of_such_a_class_the_record_is_silent_and_of_the_others_as_ever_from_the_cache_too() -> None:
    whole, teacher = half_deaf()
    needs = TeacherNeeds(memory=True, attention=True, attention_giou_floor=-1.0)
    record, usual = teacher(*pixels(), needs), whole(*pixels(), needs)
    assert record.silent.tolist() == [False, True, False]
    assert not usual.silent.any()
    assert torch.equal(record.logits[..., [0, 2]], usual.logits[..., [0, 2]])
    assert record.logits[..., 1].sigmoid().max() == 0
    for precision in ("int8", "float16", "float32"):
        arrays = collate(encode(record, [1, 2], precision), teacher.sizes(False), columns_for(needs))
        kept = decode_batch({name: torch.from_numpy(value) for name, value in arrays.items()})
        assert kept.silent.tolist() == [False, True, False]
    assert torch.full((1, 1, 1), SILENT_LOGIT, dtype=torch.bfloat16) <= SILENT_LOGIT / 2  # as autocast has it


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_lapd_is_what_it_would_be_without_the_class_and_gives_it_no_gradient(pairing: Any, gamma: float) -> None:
    targets = make_targets([3, 0, 2], classes=CLASSES - 1)
    student, teacher = network(targets, 2, 8, seed=1), network(targets, 1, 8, seed=5)
    settings = only_predictions(pairing=pairing, class_gamma=gamma, student_layers="all")
    fewer = [(logits[..., :-1].contiguous(), boxes) for logits, boxes in (student, teacher)]
    expected = run(settings, targets, *fewer)
    teacher[0][..., -1] = SILENT_LOGIT
    student[0].requires_grad_(True)
    found = run(settings, targets, student, teacher)
    assert found["lapd_class"].total > 0
    for name, term in expected.items():
        torch.testing.assert_close(found[name].total, term.total, msg=name)
        assert found[name].count == term.count
    found["lapd_class"].total.backward()
    gradient = student[0].grad
    assert gradient is not None
    assert gradient[..., :-1].abs().max() > 0
    assert gradient[..., -1].abs().max() == 0


@pytest.mark.parametrize("pairing", [each for each in PAIRINGS if each != "global"])
def test_what_the_teacher_takes_an_object_of_the_class_for_is_not_learnt(pairing: Any) -> None:
    """An object of a class that the teacher does not know is something else to it, or nothing: neither is true."""
    given = make_targets([4, 2], classes=CLASSES - 1)
    labels = given.labels.clone()
    labels[0, 1::2] = CLASSES - 1
    labels[1] = CLASSES - 1
    targets = replace(given, labels=labels)
    student, teacher = network(targets, 2, 16, seed=1), network(targets, 1, 16, seed=5)
    teacher[0][..., -1] = SILENT_LOGIT
    settings = only_predictions(pairing=pairing, student_layers="all")
    (assignment,) = assign([teacher], targets, DetectionLossConfig())
    group = select_queries(teacher[1], targets, assignment, settings.selection).object_of_query
    strange = (labels == CLASSES - 1).expand(1, -1, -1).gather(-1, group.clamp(min=0))
    assert strange.any()
    assert not strange[0, 0].all()
    found = run(settings, targets, student, teacher)
    for queries, same in ((strange, True), (~strange, False)):
        moved = teacher[0] + 0.05 * queries.unsqueeze(-1)
        (again,) = assign([(moved, teacher[1])], targets, DetectionLossConfig())
        assert torch.equal(again, assignment)
        other = run(settings, targets, student, (moved, teacher[1]))
        assert torch.equal(found["lapd_class"].total, other["lapd_class"].total) == same
    alone = make_targets([2], classes=1)  # nothing but such objects: nothing is taught
    alone = replace(alone, labels=alone.labels + CLASSES - 1)
    mine, theirs = network(alone, 1, 16, seed=1), network(alone, 1, 16, seed=5)
    theirs[0][..., -1] = SILENT_LOGIT
    assert all(term.total == 0 and term.count == 0 for term in run(settings, alone, mine, theirs).values())


@pytest.mark.parametrize("pairing", ["rank", "hungarian", "image"])
def test_the_student_s_queries_at_an_object_of_the_class_learn_nothing_of_the_teacher(pairing: Any) -> None:
    """With pairings over the image too: a partner at another object would draw them away from their own."""
    given = make_targets([4, 2], classes=CLASSES - 1)
    labels = given.labels.clone()
    labels[:, 1::2] = CLASSES - 1
    targets = replace(given, labels=labels)
    student, teacher = network(targets, 2, 24, seed=1), network(targets, 1, 90, seed=5)
    teacher[0][..., -1] = SILENT_LOGIT
    for part in student:
        part.requires_grad_(True)
    settings = only_predictions(pairing=pairing, student_layers="all")
    sum(term.total for term in run(settings, targets, student, teacher).values()).backward()  # type: ignore[union-attr]
    (assignment,) = assign([student], targets, DetectionLossConfig())
    chosen = select_queries(student[1], targets, assignment, settings.selection)
    strange = (labels == CLASSES - 1).expand(2, -1, -1).gather(-1, chosen.object_of_query.clamp(min=0))
    assert ((chosen.slot > 0) & strange).any()
    for part in student:
        assert part.grad is not None
        assert part.grad.any()
        assert not part.grad[strange].any()


def test_a_student_that_inherits_keeps_its_own_row_for_the_class() -> None:
    student = silent_student(recipe(FAMILIES["refined"]).student, LABELS, 0)
    teacher = silent_student(recipe(FAMILIES["refined"]).student, [f"{i}" for i in range(7)], 1)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    done = inherit(student, teacher, SLOTS)
    after, theirs = student.model.state_dict(), teacher.model.state_dict()
    heads = [name for name in after if "class_embed" in name]
    assert heads
    assert {name.rpartition(".")[0] for name in heads} <= set(done.copied)
    for name in heads:
        assert torch.equal(after[name][[0, 2]], theirs[name][[3, 1]]), name
        assert torch.equal(after[name][1], before[name][1]), name


def test_agreement_is_of_the_classes_that_both_know() -> None:
    whole, teacher = half_deaf()
    student = silent_student(recipe().student, LABELS, 0).eval()
    batches = [batch_of(2, 3)]
    found, usual = (agreement(student, one, batches, recipe().detection)["matched_kl"] for one in (teacher, whole))
    assert 0 < found < 100
    assert found != usual


@pytest.fixture(scope="module")
def roboflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with the parent that Roboflow adds: id 0, of which there is no object."""
    root = tmp_path_factory.mktemp("nobody")
    annotations, images = make_shapes(ShapesConfig(images=6), root / "coco")
    document = json.loads(annotations.read_text())
    document["categories"].insert(0, {"id": 0, "name": "shapes", "supercategory": "none"})
    annotations.write_text(json.dumps(document))
    for split in ("train", "val"):
        prepare(annotations, images, str(root / split), quiet=True)
    return root


def test_a_recipe_with_a_parent_category_is_planned_cached_and_trained_once_it_is_left_to_nobody(
    roboflow: Path,
) -> None:
    refused = resolve(config(roboflow), "distill")
    with pytest.raises(QskdError, match=r"teacher has no label for 1 dataset class: \[shapes\]"):
        make_plan(refused, "distill")
    resolved = resolve(config(roboflow, "teacher.class_map={shapes: null}"), "distill")
    assert build(to_tree(resolved)).teacher.class_map == {"shapes": None}  # through YAML and back, as a run keeps it
    plan = make_plan(resolved, "distill")
    assert "teacher.class_map leaves to nobody: [shapes]" in "\n".join(plan.notices)
    check_classes(resolved, plan.train)
    assert cache_identity(resolved, plan.train)["teacher.class_slots"][0] == NOBODY


@pytest.mark.parametrize("nobody", ["shapes", "circle"])
def test_an_evaluation_equals_pycocotools_without_detections_of_the_class(
    roboflow: Path, nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    explicit = dict.fromkeys({"shapes", nobody})
    found = evaluate(str(TEACHER), str(roboflow / "val"), class_map=explicit, workers=0)
    truth = COCO(str(roboflow / "coco" / "annotations.json"))
    objects = [one for one in truth.anns.values() if truth.cats[one["category_id"]]["name"] == nobody]
    assert (f"{nobody} is left to nobody: its {len(objects)} object(s) count as missed" in caplog.text) == bool(objects)
    known = {one["name"]: one["id"] for one in truth.cats.values() if one["name"] not in explicit}
    ap, ap50 = counted_by_others(truth, roboflow / "coco" / "images", known)
    assert ap > 0.2
    assert found.metrics["AP"] == pytest.approx(ap, abs=1e-4)
    assert found.metrics["AP50"] == pytest.approx(ap50, abs=1e-4)
    assert found.per_class[nobody] == (0 if objects else -1)


def test_a_training_step_with_such_a_teacher_is_finite_and_its_class_is_learnt_from_objects() -> None:
    _, teacher = half_deaf()
    training = make_training(recipe(FAMILIES["refined"]), teacher)
    before = trained_weights(training)
    values = training.train_step(batch_of(2, 0, 3))
    assert "lapd_class" in {name.removeprefix("loss/") for name in values}
    assert all(bool(torch.isfinite(value)) for value in values.values())
    heads = [name for name in before if "class_embed" in name and name.endswith("weight")]
    after = trained_weights(training)
    assert heads
    assert all(not torch.equal(before[name][1], after[name][1]) for name in heads)  # the row of "dog"
