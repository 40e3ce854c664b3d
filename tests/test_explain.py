"""What an explanation says is what the teacher, GQS and AGFD say of the very image, computed another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import LABELS, TEACHER_LABELS, random_teacher, recipe, silent_student

from qskd.boxes import cxcywh_to_xyxy
from qskd.config import Config, ResizeConfig, ViewConfig
from qskd.datasets.classes import map_classes
from qskd.datasets.views import View, make_view, view_image
from qskd.detectors import Preprocessing, to_pixels
from qskd.distillation.qskd.query_selection import select_queries
from qskd.distillation.qskd.seen import QSKDSeen, covered, make_mask
from qskd.losses.matching import assign
from qskd.pictures.explain import (
    STAND_IN_SCORE,
    DatasetDetector,
    Explanation,
    Subject,
    explain,
    stand_in_objects,
)
from qskd.pictures.explained import explanation_picture, warning_of
from qskd.structures import Targets, TeacherRecord
from qskd.teacher.online import OnlineTeacher

RULE = {"boundaries": [-0.5, 0.0, 0.2], "band_weights": [0.0, 0.3, 0.6, 1.0], "max_per_object": 3}
FAMILIES = ("conditional", "refined")  # dense attention; sampled, on two levels
OTHERS = ("detr", "dab-detr", "rt_detr", "rt_detr_v2", "d_fine")


def image(height: int = 90, width: int = 130, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def seen(said: Explanation) -> QSKDSeen:
    (found,) = said.seen
    assert isinstance(found, QSKDSeen)
    return found


def subject(view: View = View.IDENTITY, **changes: object) -> Subject:
    boxes = np.array([[10, 10, 60, 50], [50, 30, 120, 85], [0, 60, 40, 90]], np.float32)
    made = Subject("a", image(), boxes, np.array([0, 2, 1]), np.array([False, False, True]), view)
    return replace(made, **changes)  # type: ignore[arg-type]


def config(*overrides: str) -> Config:
    return recipe(None, *overrides, distillation={"selection": RULE})


def targets_of(boxes_cxcywh: torch.Tensor, labels: list[int]) -> Targets:
    count = len(labels)
    return Targets(boxes_cxcywh[None], torch.tensor([labels]), torch.ones(1, count, dtype=torch.bool), (0,), (count,))


@pytest.fixture(scope="module", params=FAMILIES)
def teacher(request: pytest.FixtureRequest) -> OnlineTeacher:
    return random_teacher(request.param)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_boxes_bands_and_mask_are_those_of_the_teachers_own_outputs(family: str) -> None:
    teacher = random_teacher(family)
    said = explain(subject(), config(), LABELS, teacher, {}, threshold=0.0)

    pixels = torch.from_numpy(view_image(image(), View.IDENTITY, teacher.preprocessing.resize).copy())[None]
    with torch.no_grad():
        output = teacher.detector(*to_pixels(pixels, torch.tensor([pixels.shape[1:3]]), *mean_std(teacher)))
        attention = output.attend(torch.arange(teacher.detector.num_queries)[None])
    logits = output.logits[-1:, :, :, [TEACHER_LABELS.index(name) for name in LABELS]]
    boxes = output.boxes_cxcywh[-1:]
    objects = torch.tensor([[35 / 130, 30 / 90, 50 / 130, 40 / 90], [85 / 130, 57.5 / 90, 70 / 130, 55 / 90]])
    targets = targets_of(objects, [0, 2])  # the third is a crowd
    (matched,) = assign([(logits, boxes)], targets, config().detection)
    selection = select_queries(boxes[0], targets, matched[0], config().distillation.selection)

    assert seen(said).kept is not None
    assert seen(said).mask is not None
    assert said.teacher is not None
    size = np.array([130, 90, 130, 90])
    np.testing.assert_allclose(seen(said).kept.boxes_xyxy, cxcywh_to_xyxy(boxes[0, 0]).numpy() * size, atol=1e-3)
    for name in ("is_positive", "band", "weight"):
        np.testing.assert_array_equal(getattr(seen(said).kept, name), getattr(selection, name)[0].numpy())
    assert seen(said).kept.positives == 2
    assert 0 < seen(said).kept.hard_negatives() == sum(seen(said).kept.hard_negatives(band) for band in range(4)) <= 6
    kept = seen(said).kept
    everything = kept.positives + kept.hard_negatives() + kept.easy_negatives + kept.beyond_limit
    assert everything == teacher.detector.num_queries

    weight = selection.weight[0] * logits[0, 0].sigmoid().amax(-1)
    raw = [(weight[:, None, None] * part[0]).sum(0) for part in attention]
    top = max(float(part.max()) for part in raw)
    masks = [(part / top).clamp(min=config().distillation.features.background).numpy() for part in raw]
    for mine, theirs in zip(seen(said).mask.levels, masks, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    inside, whole = 0.0, 0.0
    for level in masks:  # the share, by sampling each cell at 40 x 40 points
        high, wide = level.shape
        y, x = ((np.arange(40 * cells) + 0.5) / (40 * cells) for cells in (high, wide))
        within = np.zeros((40 * high, 40 * wide), bool)
        for left, top_, right, bottom in cxcywh_to_xyxy(objects).numpy():
            within |= np.outer((y >= top_) & (y <= bottom), (x >= left) & (x <= right))
        inside += float((level * within.reshape(high, 40, wide, 40).mean((1, 3))).sum())
        whole += float(level.sum())
    assert seen(said).mask.share == pytest.approx(inside / whole, abs=0.01)
    assert seen(said).mask.object_share == pytest.approx((50 * 40 + 70 * 55 - 10 * 20) / (90 * 130), abs=1e-5)
    density = seen(said).mask.density(900, 1300)
    drawn_inside = np.zeros((900, 1300), bool)
    for left, top_, right, bottom in (said.objects.boxes_xyxy * 10).round().astype(int):
        drawn_inside[top_:bottom, left:right] = True
    assert density[drawn_inside].sum() / density.sum() == pytest.approx(
        seen(said).mask.share, abs=0.01
    )  # what is drawn

    scores = logits[0, 0].sigmoid().numpy()
    assert len(said.teacher.scores) == scores.size
    assert (np.diff(said.teacher.scores) <= 0).all()
    query, label = np.unravel_index(scores.argmax(), scores.shape)
    assert said.teacher.category_ids[0] == label
    np.testing.assert_allclose(said.teacher.boxes_xyxy[0], seen(said).kept.boxes_xyxy[query], atol=1e-3)
    assert said.labels[label] == LABELS[label]
    assert len(said.crowds_xyxy) == 1


def mean_std(teacher: OnlineTeacher) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    return teacher.preprocessing.mean, teacher.preprocessing.std


def test_objects_are_where_they_are_in_mirrored_and_cropped_views_at_any_size() -> None:
    black, box = np.zeros((200, 320, 3), np.uint8), np.array([[96, 40, 208, 120]], np.float32)
    black[40:120, 96:208] = 255
    whole = Subject("a", black, box, np.array([0]), np.array([False]))
    policy = ViewConfig(count=8, crop_probability=0.7, crop_min_scale=0.6)
    views = [make_view(policy, 5, index) for index in range(8)] + [View((0.0, 0.0, 1.0, 1.0), True)]
    assert any(view.flip for view in views)
    assert any(not view.is_whole for view in views)
    for view in views:
        said = explain(replace(whole, view=view), config(), LABELS, None, {})
        (seen,) = said.objects.boxes_xyxy
        rows, columns = np.nonzero(said.image[..., 0] > 127)
        painted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(seen, painted, atol=1.01)


def test_detections_of_a_mirrored_view_are_those_of_the_mirrored_picture(teacher: OnlineTeacher) -> None:
    size = teacher.preprocessing.resize.size
    square, mirror = image(size, size), View((0.0, 0.0, 1.0, 1.0), True)  # of the teacher's size: nothing is resized
    labels = {"labels": np.array([0]), "iscrowd": np.array([False])}
    mirrored = Subject("a", square, np.array([[4, 8, 30, 40]], np.float32), **labels, view=mirror)
    box = np.array([[size - 30, 8, size - 4, 40]], np.float32)
    flat = Subject("a", np.ascontiguousarray(square[:, ::-1]), box, **labels)
    seer = DatasetDetector(silent_student(recipe().student, LABELS, 3).eval(), teacher.preprocessing, (0, 1, 2))
    one, two = (explain(each, config(), LABELS, teacher, {"student": seer}, 0.0) for each in (mirrored, flat))
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_allclose(one.objects.boxes_xyxy, two.objects.boxes_xyxy, atol=1e-4)
    assert one.teacher is not None
    assert two.teacher is not None
    for a, b in ((one.teacher, two.teacher), (one.students["student"], two.students["student"])):
        np.testing.assert_allclose(a.boxes_xyxy, b.boxes_xyxy, atol=1e-3)
    assert seen(one).mask is not None
    assert seen(two).mask is not None
    assert seen(one).mask.share == pytest.approx(seen(two).mask.share, abs=1e-5)


def test_a_picture_that_no_one_annotated_takes_the_teachers_confident_boxes() -> None:
    sure = random_teacher("conditional", seed=9)
    with torch.no_grad():
        for parameter in sure.detector.parameters():
            if parameter.shape == (len(TEACHER_LABELS),):  # the class head's bias
                parameter.add_(8.0)
    plain = subject(boxes_xyxy=None, labels=None, iscrowd=None)
    said = explain(plain, config(), LABELS, sure, {}, threshold=0.3)
    assert said.stand_ins
    assert 0 < len(said.objects.scores) <= sure.detector.num_queries
    assert seen(said).kept is not None
    assert seen(said).kept.positives == len(said.objects.scores)
    theirs = {tuple(np.round(box, 2)) for box in seen(said).kept.boxes_xyxy.tolist()}
    assert {tuple(np.round(box, 2)) for box in said.objects.boxes_xyxy.tolist()} <= theirs
    explanation_picture(said, "about")
    alone = explain(plain, config(), LABELS, None, {})
    assert alone.stand_ins
    assert not len(alone.objects.scores)


def test_an_image_without_labels_is_shown_with_the_pseudo_objects_that_a_training_step_takes() -> None:
    teacher = random_teacher("conditional", seed=9)
    with torch.no_grad():
        for parameter in teacher.detector.parameters():
            if parameter.shape == (len(TEACHER_LABELS),):
                parameter.add_(4.0)
    unknown = subject(boxes_xyxy=None, labels=None, iscrowd=None, unlabeled=True)
    everything = explain(unknown, config(), LABELS, teacher, {}, threshold=0.0).teacher
    assert everything is not None
    best: dict[tuple[float, ...], float] = {}
    for box, sure in zip(everything.boxes_xyxy.tolist(), everything.scores.tolist(), strict=True):
        best[tuple(box)] = max(best.get(tuple(box), 0.0), sure)
    score = sorted(best.values())[-3] - 1e-4
    assert 0.1 < score < 1
    said = explain(unknown, config(f"data.unlabeled_score={score}"), LABELS, teacher, {})
    assert (said.unlabeled, said.stand_in_score) == (True, score)
    assert len(said.objects.scores) == sum(sure >= score for sure in best.values()) >= 3
    assert "data.unlabeled" in warning_of(said)
    explanation_picture(said, "about")


def test_a_labelled_image_is_shown_with_what_completes_its_labels() -> None:
    teacher = random_teacher("conditional", seed=9)
    with torch.no_grad():
        for parameter in teacher.detector.parameters():
            if parameter.shape == (len(TEACHER_LABELS),):
                parameter.add_(4.0)
    fields = [("data.unlabeled_score=0.4", f"data.completed={word}") for word in ("false", "true")]
    plain, completed = (explain(subject(), config(*each), LABELS, teacher, {}) for each in fields)
    count = len(plain.objects.scores)
    assert count == 2
    assert len(completed.objects.scores) > count
    np.testing.assert_allclose(completed.objects.boxes_xyxy[:count], plain.objects.boxes_xyxy, atol=1e-3)
    np.testing.assert_array_equal(completed.objects.category_ids[:count], plain.objects.category_ids)


def test_stand_ins_are_sure_and_each_object_is_there_once() -> None:
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.31, 0.3, 0.2, 0.2], [0.7, 0.7, 0.2, 0.2], [0.5, 0.2, 0.1, 0.1]])
    scores = torch.tensor([[0.8, 0.1], [0.9, 0.2], [0.1, 0.6], [0.2, STAND_IN_SCORE - 0.01]])
    record = TeacherRecord(scores.logit()[None, None], boxes[None, None])
    chosen, labels = stand_in_objects(record)
    torch.testing.assert_close(chosen, boxes[[1, 2]])
    assert labels.tolist() == [0, 1]
    none, _ = stand_in_objects(TeacherRecord(scores.logit()[None, None] - 9, boxes[None, None]))
    assert none.shape == (0, 4)


def test_an_image_without_objects_has_no_selection_and_an_empty_mask(teacher: OnlineTeacher) -> None:
    none = np.zeros(0, bool)
    empty = subject(boxes_xyxy=np.zeros((0, 4), np.float32), labels=none.astype(np.int64), iscrowd=none)
    said = explain(empty, config(), LABELS, teacher, {})
    assert not said.stand_ins
    assert seen(said).kept is not None
    assert (seen(said).kept.positives, seen(said).kept.hard_negatives()) == (0, 0)
    assert seen(said).mask is not None
    assert np.isnan(seen(said).mask.share)
    assert all(not level.any() for level in seen(said).mask.levels)
    explanation_picture(said, "about")


def test_a_students_boxes_come_in_the_datasets_classes() -> None:
    names = ("owl", "cat", "dog")
    detector = silent_student(recipe().student, names, 3).eval()
    seer = DatasetDetector(detector, Preprocessing(ResizeConfig(size=64)), map_classes(LABELS, names, {}))
    own = DatasetDetector(detector, Preprocessing(ResizeConfig(size=64)), (0, 1, 2))
    said: Explanation = explain(subject(), config(), LABELS, None, {"mapped": seer, "own": own}, 0.0)
    mapped, plain = said.students["mapped"], said.students["own"]
    np.testing.assert_allclose(mapped.scores, plain.scores)
    assert [LABELS[label] for label in mapped.category_ids] == [names[label] for label in plain.category_ids]


def test_teacher_and_student_of_the_same_weights_show_the_same_boxes_however_many_reach_the_threshold() -> None:
    detector = silent_student(recipe(None, "student.queries=120").student, LABELS, 3).eval()
    seen_as = Preprocessing(ResizeConfig(size=64))
    teacher, student = OnlineTeacher(detector, (0, 1, 2), seen_as), DatasetDetector(detector, seen_as, (0, 1, 2))
    for threshold, shown in ((0.0, 100), (1e-6, 120)):
        said = explain(subject(), config(), LABELS, teacher, {"student": student}, threshold)
        assert said.teacher is not None
        assert len(said.teacher.scores) == len(said.students["student"].scores) == shown


@pytest.mark.parametrize("seed", range(3))
def test_a_cells_cover_is_what_many_points_in_it_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low = rng.uniform(-0.2, 0.8, (5, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.0, 0.6, (5, 2))], axis=1)
    found = covered(boxes, 4, 7)
    y, x = (np.arange(4 * 60) + 0.5) / 240, (np.arange(7 * 60) + 0.5) / 420
    within = np.zeros((240, 420), bool)
    for left, top, right, bottom in boxes:
        within |= np.outer((y >= top) & (y <= bottom), (x >= left) & (x <= right))
    np.testing.assert_allclose(found, within.reshape(4, 60, 7, 60).mean((1, 3)), atol=0.04)
    assert covered(np.zeros((0, 4)), 2, 3).tolist() == [[0.0] * 3] * 2
    flat = make_mask((np.ones((4, 7), np.float32), np.ones((2, 3), np.float32)), boxes)
    assert flat.share == pytest.approx(flat.object_share, abs=1e-6)  # a mask that is 1 everywhere


def test_what_training_shows_the_student_is_drawn_where_it_is_not_the_view_itself() -> None:
    plain, seen_by = config(), config("augmentation.preset=rtdetr", "augmentation.colour_probability=1")
    student = silent_student(plain.student, LABELS, 0).eval()
    students = {"Student": DatasetDetector(student, Preprocessing(plain.student.resize), (0, 1, 2))}
    said = explain(subject(), plain, LABELS, None, students)
    assert said.augmented == ()
    shown = explain(subject(), seen_by, LABELS, None, students)
    assert len(shown.augmented) == 4
    usual = view_image(image(), View.IDENTITY, plain.student.resize)
    for picture in shown.augmented:
        assert picture.shape != usual.shape or not np.array_equal(picture, usual)
    assert len({picture.shape for picture in shown.augmented}) > 1  # multi-scale
    # A panel more; all else is the same.
    one, more = (explanation_picture(each, "") for each in (said, shown))
    assert more.shape[1] > one.shape[1]
    np.testing.assert_array_equal(shown.students["Student"].boxes_xyxy, said.students["Student"].boxes_xyxy)
