"""Images without labels in a distillation: what is learned from them, what is not, and in which order they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strangers import refused
from test_loader import Pictures
from test_unlabeled_shards import draw, shards
from tiny import FAMILIES, LABELS, TEACHER_LABELS, arrays, make_training, random_teacher, recipe, trained_weights

from benchmarks.local_cache import make_cache
from pipelines.caching.domains import Look, look
from pipelines.caching.plan import make_cache_plan, make_cache_plans
from pipelines.feed.stream import local_stream
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from qskd.boxes import xyxy_to_cxcywh
from qskd.config import Config
from qskd.config.recipe import apply_overrides, build
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.datasets.order.schedule import Batch, Schedule, training_batches
from qskd.datasets.shards import write_shards
from qskd.datasets.unlabeled.joined import source_manifest
from qskd.detectors import save_detector
from qskd.from_recipe import make_student, make_teacher, teacher_for_training
from qskd.losses.detection_loss import detection_terms
from qskd.losses.unsure import left_out
from qskd.structures import Targets, TeacherRecord
from qskd.teacher.identity import cache_identity, cache_sources, teacher_preprocessing
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.pseudo import with_pseudo_objects
from qskd.training.step import Training

NAMES = ("three", "eight", "nine")  # of `Pictures`


def nobody_s(counts: Sequence[int], labelled: Sequence[bool]) -> TrainBatch:
    """A batch in which some images are without labels; those have no objects."""
    return train_batch(_raw(counts, labelled))


def _raw(counts: Sequence[int], labelled: Sequence[bool]) -> dict[str, Any]:
    counts = [count if known else 0 for count, known in zip(counts, labelled, strict=True)]
    return {**arrays(counts), "labelled": np.array(labelled)}


def said(*images: Sequence[tuple[float, int, tuple[float, float, float, float]]]) -> TeacherRecord:
    """A record of one layer: of each image, (score, class, left, top, right, bottom) of each query."""
    logits = torch.full((1, len(images), len(images[0]), 3), -9.0)
    boxes = torch.zeros(1, len(images), len(images[0]), 4)
    for image, queries in enumerate(images):
        for query, (score, label, box) in enumerate(queries):
            logits[0, image, query, label] = torch.tensor(score).logit()
            boxes[0, image, query] = xyxy_to_cxcywh(torch.tensor(box))
    return TeacherRecord(logits, boxes)


def loud_teacher(labels: Sequence[str] = LABELS, slots: Sequence[str] = TEACHER_LABELS) -> OnlineTeacher:
    """A random one that is sure of some of what it says, and not of all."""
    teacher = random_teacher("conditional", labels, slots)
    with torch.no_grad():
        for name, parameter in teacher.detector.named_parameters():
            if "class" in name and name.endswith("bias"):
                parameter.add_(4.5)
    return teacher


A, B, C = (0.1, 0.1, 0.3, 0.3), (0.5, 0.5, 0.9, 0.9), (0.1, 0.6, 0.3, 0.8)


# --- pseudo-objects ------------------------------------------------------------------------------------------------------
def test_pseudo_objects_are_what_the_teacher_is_sure_of_and_labels_stay_as_they_are() -> None:
    batch = nobody_s([2, 0], [True, False])
    record = said([(0.9, 0, A), (0.9, 1, B), (0.9, 2, C)], [(0.3, 0, A), (0.8, 1, B), (0.05, 2, C)])
    found = with_pseudo_objects(batch.targets, record, 0.5)
    assert found.counts == (2, 1)
    assert torch.equal(found.boxes_cxcywh[0], batch.targets.boxes_cxcywh[0])
    assert torch.equal(found.labels[0], batch.targets.labels[0])
    assert found.labels[1, 0] == 1
    torch.testing.assert_close(found.boxes_cxcywh[1, 0], xyxy_to_cxcywh(torch.tensor(B)))
    assert found.valid.tolist() == [[True, True], [True, False]]
    assert found.unsure is not None
    assert found.unsure_xyxy is not None
    assert found.unsure.tolist() == [[False], [True]]  # 0.3; what has 0.05 is not seen
    torch.testing.assert_close(found.unsure_xyxy[1, 0], torch.tensor(A))
    assert with_pseudo_objects(batch.targets, record, 0.25).counts == (2, 2)


def test_an_unsure_copy_of_a_pseudo_object_is_background_for_all_queries_but_one() -> None:
    shifted = (0.5, 0.5, 0.9, 0.88)
    found = with_pseudo_objects(nobody_s([0], [False]).targets, said([(0.8, 1, B), (0.3, 2, shifted)]), 0.5)
    assert found.unsure is not None
    assert not found.unsure.any()


def objects_of(record: TeacherRecord) -> Targets:
    return with_pseudo_objects(nobody_s([0], [False]).targets, record, 0.5)


def test_no_query_that_shows_what_the_teacher_half_sees_is_taught_to_be_background() -> None:
    """Queries: on the pseudo-object, on what is half seen, near that, and far from all."""
    targets = objects_of(said([(0.8, 1, B), (0.3, 0, A)]))
    near = (0.12, 0.1, 0.31, 0.3)
    boxes = xyxy_to_cxcywh(torch.tensor([[[B, A, near, C]]]))
    assignment = torch.tensor([[[0]]])
    assert left_out(boxes, assignment, targets).tolist() == [[[False, True, True, False]]]  # type: ignore[union-attr]
    config = recipe().detection
    for kind in ("focal", "varifocal", "softmax"):
        logits = torch.zeros(1, 1, 4, 3, requires_grad=True)
        none = torch.full((1, 1, 4), -1.0, requires_grad=True)
        terms = detection_terms(logits, boxes, targets, assignment, config, kind, 0, none)  # type: ignore[arg-type]
        terms["class"].total.backward()  # type: ignore[no-untyped-call]
        taught = [
            each.abs().sum(-1) if each.dim() == 4 else each.abs()
            for each in (logits.grad, none.grad)
            if each is not None
        ]
        pushed = (sum(taught)[0, 0] > 0).tolist()  # type: ignore[index]
        assert pushed == [True, False, False, True], kind


def test_who_would_be_matched_with_what_is_half_seen_is_left_out_though_it_overlaps_little() -> None:
    targets = objects_of(said([(0.8, 1, B), (0.3, 0, A)]))
    little = (0.25, 0.25, 0.45, 0.45)
    boxes = xyxy_to_cxcywh(torch.tensor([[[B, little, C]]]))
    assert left_out(boxes, torch.tensor([[[0]]]), targets).tolist() == [[[False, True, False]]]  # type: ignore[union-attr]


# --- a step --------------------------------------------------------------------------------------------------------------
def test_labelled_images_alone_train_as_they_did() -> None:
    """A batch that says that all is labelled, and one that says nothing."""
    weights = []
    for more in ({}, {"labelled": np.array([True, True])}):
        training = make_training(recipe(FAMILIES["refined"]), random_teacher("conditional"))
        training.train_step(train_batch({**arrays([2, 1]), **more}))
        weights.append(trained_weights(training))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("student", ["refined", "conditional", "detr", "rt_detr", "d_fine"])
def test_students_of_all_kinds_learn_from_what_the_teacher_sees(student: str) -> None:
    own = FAMILIES.get(student, {"family": student, "feature_levels": 2 if student in ("rt_detr", "d_fine") else 1})
    config = recipe(own, "detection.dense_weight=1.0")
    training = make_training(config, loud_teacher())
    before = trained_weights(training)
    values = training.train_step(nobody_s([0, 0], [False, False]))
    training.check_finite()
    assert values["l1"] > 0
    assert values["lapd_class"] > 0
    assert any(not torch.equal(before[name], now) for name, now in trained_weights(training).items())


@pytest.mark.parametrize(("decays", "also"), [((1.0, 0.0), False), ((0.5, 0.5), False), ((0.8, 0.6), True)])
def test_what_images_without_labels_teach_fades_by_a_field_of_its_own(decays: tuple[float, float], also: bool) -> None:
    """Against each image's terms by itself, weighted by hand."""
    steps, at = 10, 8
    more = {"also": {"mimic": {"decay": 0.0, "decay_unlabeled": 1.0}}} if also else {}
    fades = {"decay": decays[0], "decay_unlabeled": decays[1], **more}
    config = recipe(FAMILIES["refined"], "student.backbone_norm=frozen", distillation=fades)
    training = make_training(config, loud_teacher(), total_steps=steps)
    training.step, both = at, nobody_s([2, 0], [True, False])
    total, _ = training._forward(both, 1)
    learning = [each for each in training.student.parameters() if each.requires_grad]
    found = torch.autograd.grad(total, learning, allow_unused=True)

    def faded(decay: float) -> float:
        return min(1.0, (steps - at) / (decay * steps)) if decay else 1.0

    module, slow = training.module, torch.zeros(())
    assert module.method is not None
    alone = []
    for image in (0, 1):
        part = train_batch({name: each[image : image + 1] for name, each in _raw([2, 0], [True, False]).items()})
        record = training._ask_teacher(part)
        targets = training._objects(part, record)
        alone.append(module(part.images, part.sizes, targets, record, None, None, part.least))
    for name, weight in module.weights.items():
        own = (0.0, 1.0) if name.startswith("mimic") else decays
        factors = [faded(decay) if name in module.method.weights else 1.0 for decay in own]
        count = sum(float(terms[name].count) for terms in alone)
        slow = slow + sum(
            weight * factor * terms[name].total / max(count, terms[name].floor)
            for factor, terms in zip(factors, alone, strict=True)
        )
    expected = torch.autograd.grad(slow, learning, allow_unused=True)
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    assert len(pairs) > 20
    largest = max(float(other.abs().max()) for _, other in pairs)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * largest)


def test_two_shares_of_a_batch_sum_to_the_whole_batch() -> None:
    """So that several workers, which average counts before they divide, are one."""
    whole = {**arrays([2, 0, 1, 0]), "labelled": np.array([True, False, True, False])}
    frozen = recipe(FAMILIES["refined"], "detection.dense_weight=1.0", "student.backbone_norm=frozen")
    training = make_training(frozen, loud_teacher())
    training.module.eval()
    found: list[dict[str, torch.Tensor]] = []
    for shares in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        sums: dict[str, torch.Tensor] = {}
        for share in shares:
            batch = train_batch({name: value[share] for name, value in whole.items()})
            record = training._ask_teacher(batch)
            terms = training.module(batch.images, batch.sizes, training._objects(batch, record), record)
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + torch.stack([term.total.detach(), term.count])
        found.append(sums)
    assert found[0]["l1"][1] > 3  # pseudo-objects are counted
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-4, rtol=1e-4, msg=name)


# --- the order -----------------------------------------------------------------------------------------------------------
PLAN = Schedule((10, 7), (4,), 3, 6, 8, 5, 2, unlabeled_shard_rows=(9, 11, 4), unlabeled_in_batch=3)


def places(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.rows.tolist()]


def test_each_batch_has_its_share_and_each_pass_has_each_image_once_in_an_order_of_its_own() -> None:
    batches = [batch for epoch in range(PLAN.epochs) for batch in training_batches(PLAN, epoch)]
    assert len(batches) == 6 * (17 // 5)
    assert all((batch.rows[:, 0] >= 2).sum() == 3 and len(batch.rows) == 8 for batch in batches)
    free = [row for row in places(batches) if row[0] >= 2]
    passes = [free[start : start + 24] for start in range(0, len(free), 24)]
    everything = sorted((2 + shard, row) for shard, rows in enumerate((9, 11, 4)) for row in range(rows))
    assert sorted(row[:2] for row in passes[0]) == sorted(row[:2] for row in passes[1]) == everything
    assert [row[:2] for row in passes[0]] != [row[:2] for row in passes[1]]
    assert {row[2] for row in passes[0]} == {0}  # the view of the pass, not of the epoch
    assert {row[2] for row in passes[1]} == {1}


def test_labelled_images_come_in_the_order_in_which_they_come_alone() -> None:
    alone = replace(PLAN, batch_size=5, unlabeled_shard_rows=(), unlabeled_in_batch=0)
    for epoch in range(3):
        mixed = [row for row in places(list(training_batches(PLAN, epoch))) if row[0] < 2]
        assert mixed == places(list(training_batches(alone, epoch)))


def test_a_run_that_goes_on_anywhere_sees_what_an_undisturbed_one_does() -> None:
    for epoch in range(PLAN.epochs):
        whole = list(training_batches(PLAN, epoch))
        for first in range(len(whole)):
            assert places(list(training_batches(PLAN, epoch, first))) == places(whole[first:])


def test_workers_have_both_kinds_and_without_labels_an_epoch_is_a_pass_over_all() -> None:
    (first, *_) = training_batches(PLAN, 0)
    assert [(part[:, 0] >= 2).sum() for part in np.split(first.rows, 2)] == [2, 1] or [
        (part[:, 0] >= 2).sum() for part in np.split(first.rows, 2)
    ] == [1, 2]
    bare = replace(PLAN, train_shard_rows=(), unlabeled_in_batch=8)
    assert bare.steps_per_epoch == 3
    assert len({row[:2] for row in places(list(training_batches(bare, 0)))}) == 24


# --- from the recipe to the weights ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data, val: labelled shards. free: others without labels. teacher: a random one."""
    root = tmp_path_factory.mktemp("unlabeled")
    write_shards(Pictures(10), str(root / "data"), rows_per_shard=6)
    write_shards(Pictures(6), str(root / "val"), rows_per_shard=6)
    shards(draw(root / "pool", 9), root / "free", rows_per_shard=5)
    teacher = loud_teacher(NAMES, NAMES)
    save_detector(teacher.detector, root / "teacher", teacher.preprocessing.resize)
    return root


def config(work: Path, *overrides: str) -> Config:
    tree: dict[str, Any] = recipe(FAMILIES["refined"]).model_dump(mode="json", exclude_unset=True)
    tree["data"] = {
        "train": f"{work}/data",
        "val": f"{work}/val",
        "unlabeled": [f"{work}/free"],
    }
    tree |= {
        "teacher": {"path": f"{work}/teacher", "cache": {"attention_giou_floor": -1.0}},
        "output": f"{work}/runs",
        "name": "run",
    }
    tree["training"] = {"batch_size": 4, "epochs": 2}
    return build(apply_overrides(tree, overrides))


def cached(work: Path, folder: str, *overrides: str) -> Config:
    """The recipe with a cache of both kinds of images."""
    made = resolve(config(work, f"teacher.cache.path={work}/{folder}", *overrides), "distill")
    for source in cache_sources(made):
        if make_cache_plan(source).existing is None:
            data = source_manifest(source.data)
            teacher = make_teacher(source, data.labels)
            assert teacher is not None
            make_cache(source, teacher, teacher_preprocessing(source).resize, cache_identity(source, data))
    return made


def trained(given: Config, steps: int) -> Training:
    plan = make_plan(resolve(given, "distill"), "distill")
    training = Training(
        given,
        make_student(given, plan.train.labels),
        teacher_for_training(given, plan.train.labels, None),
        plan.stream.schedule.total_steps,
        torch.device("cpu"),
    )
    for share in (each for each in local_stream(plan.stream) if each.subset == "train"):
        if training.step < steps:
            training.train_step(train_batch(share.arrays))
    training.check_finite()
    return training


@pytest.mark.parametrize("fields", [(), ("data.train=",)])
def test_pictures_of_the_validation_split_among_those_without_labels_are_told(
    fields: tuple[str, ...], work: Path, tmp_path: Path
) -> None:
    pool = draw(tmp_path / "pool", 3, seed=5)
    (pool / "seen.png").write_bytes(list(Pictures(6).samples())[4].encoded)
    shards(pool, tmp_path / "more")
    given = config(work, f"data.unlabeled=[{work}/free, {tmp_path}/more]", *fields)
    (said,) = (one for one in make_plan(resolve(given, "distill"), "distill").notices if "data.unlabeled" in one)
    assert said.startswith(f"data.unlabeled: {tmp_path}/more and data.val share 1 of 6 validation pictures")
    assert f"image 104 of val is image 4 of it): AP will be too good. Prepare it with --not-in {work}/val" in said


@pytest.mark.parametrize("views", [(), ("data.views.derived=flip",)])
def test_from_the_cache_the_same_is_learnt_as_from_the_teacher_itself(views: tuple[str, ...], work: Path) -> None:
    exact = (
        "teacher.cache.precision=float32",
        "data.views.flip_probability=0.0",
        "distillation.features.whitening=0",
    )
    steps = 4
    known = trained(cached(work, f"cache{len(views)}", *exact, *views), steps)
    asked = trained(config(work, *exact, *views), steps)
    for name, weights in trained_weights(known).items():
        torch.testing.assert_close(weights, trained_weights(asked)[name], atol=2e-5, rtol=1e-4)


def test_without_any_label_the_classes_are_those_of_val_and_it_trains(work: Path) -> None:
    bare = cached(work, "cache-bare", "data.train=")
    plan = make_plan(resolve(bare, "distill"), "distill")
    assert plan.train.labels == NAMES
    assert (plan.train.num_images, plan.stream.schedule.unlabeled_in_batch) == (0, 4)
    assert "unlabelled: 9 images, 4 of each batch" in plan.describe()
    training = trained(bare, 2)
    assert training.step == 2


def test_images_that_come_later_leave_the_cache_of_the_others_as_it_is(work: Path) -> None:
    both = cached(work, "cache-later")
    alone = resolve(config(work, f"teacher.cache.path={work}/cache-later", "data.unlabeled=[]"), "distill")
    assert [plan.todo for plan in make_cache_plans(alone)] == [[]]
    assert [len(plan.units) for plan in make_cache_plans(both)] == [2, 2]
    other = resolve(config(work, f"teacher.cache.path={work}/cache-later", "data.unlabeled_score=0.3"), "distill")
    error = refused(lambda: make_cache_plans(other), r"unlabeled_score is 0\.5 in the cache, 0\.3 in the recipe", work)
    assert "unlabeled-" in error.where


def test_what_can_not_be_learnt_from_is_refused_before_anything_starts(work: Path) -> None:
    for overrides, verb, words in (
        ((), "train", "a training without a teacher"),
        (("teacher.class_map={eight: null}",), "distill", "nobody says where there is"),
        (("data.unlabeled_share=0.05",), "distill", "0 images"),
        ((f"data.unlabeled=[{work}/data]",), "distill", "labelled images, whose labels would be lost"),
        ((f"data.unlabeled=[{work}/free,{work}/free]",), "distill", "the same shards as"),
        ((f"data.train={work}/free", "data.unlabeled=[]"), "distill", "9 images without labels"),
        ((f"data.val={work}/free",), "distill", "9 images without labels"),
        ((f"teacher.cache.path={work}/free/cache",), "distill", r"lies in data\.unlabeled"),
    ):
        given = config(work, *overrides)
        refused(lambda g=given, v=verb: make_plan(resolve(g, v), v), words, work)  # type: ignore[misc]


def test_a_folder_of_another_kind_is_told_by_numbers(work: Path) -> None:
    labelled, free = cache_sources(cached(work, "cache-look"))
    looks = [look(each.teacher.cache.path, 0.5) for each in (labelled, free)]
    assert [each.images for each in looks] == [10, 9]
    assert looks[0].objects > 0
    assert not looks[0].is_far_from(looks[0])
    assert Look(9, 2.0, 0.6).is_far_from(Look(9, 4.0, 0.6))
    assert Look(9, 4.0, 0.4).is_far_from(Look(9, 4.0, 0.6))
