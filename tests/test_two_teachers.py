"""Two teachers of unlike kinds at work: features of each under its own attention, and one that says boxes alone, and not of
every image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from reference import corners, sigmoid, slow_giou, slow_resample, slow_selection
from scipy.optimize import linear_sum_assignment
from test_onnx_teacher import WORDS, said, small
from test_several_teachers import FIRST, NEEDS, OTHER, SECOND, of_classes, share, terms_of
from tiny import (
    FAMILIES,
    LABELS,
    SIZE,
    TEACHER,
    TEACHER_LABELS,
    make_training,
    random_teacher,
    recipe,
    shake,
    silent_student,
)
from torch import Tensor, nn

from qskd.config import StudentConfig
from qskd.datasets.batch import TrainBatch
from qskd.datasets.classes import NOBODY
from qskd.detectors import Preprocessing, load_detector, to_pixels
from qskd.distillation.qskd.seen import ask_teacher
from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.structures import Targets, TeacherNeeds, TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import collate, columns_for, encode
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.several.together import TeachersTogether

ALONE = "distillation.features.weight=0"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnlineTeacher, OnlineTeacher]:
    """A DETR that knows cats and dogs, and an ONNX file that says at most four boxes, one an owl's; of a black picture none."""
    detr = random_teacher("conditional", seed=3)
    file = small(said(tmp_path_factory.mktemp("boxes"), WORDS | {"classes": {"1": "cow", "2": "ape", "4": "owl"}}))
    boxes = load_detector(file)
    slots = tuple(boxes.labels.index(name) if name == "owl" else -1 for name in LABELS)
    return (
        OnlineTeacher(detr.detector, FIRST, detr.preprocessing),
        OnlineTeacher(boxes, slots, replace(detr.preprocessing, mean=(0, 0, 0), std=(1, 1, 1))),
    )


def blackened(batch: TrainBatch, image: int) -> TrainBatch:
    images, theirs = batch.images.clone(), batch.teacher_images.clone()
    images[image] = theirs[image] = 0
    return replace(batch, images=images, teacher_images=theirs)


# ---- features, against loops over teachers, images, queries and cells


def of_maps(maps: int, slots: tuple[int, ...], seed: int) -> OnlineTeacher:
    """One map: a Conditional DETR; more: a Deformable DETR. Each normalises in its own way."""
    own = FAMILIES["conditional"] if maps == 1 else {**FAMILIES["refined"], "feature_levels": maps}
    config = StudentConfig.model_validate({**TEACHER, **own})
    detector = silent_student(config, [f"{name} {slot}" for slot, name in enumerate(TEACHER_LABELS)], seed)
    shake(detector, seed)
    seen_as = Preprocessing(config.resize, **(OTHER if maps > 1 else {}))  # type: ignore[arg-type]
    return OnlineTeacher(detector, slots, seen_as)


def own_objects(targets: Targets, slots: Sequence[int]) -> Targets:
    """The objects of a teacher's classes, as if there were no others."""
    kept = [
        [n for n in range(count) if slots[int(labels[n])] != NOBODY]
        for count, labels in zip(targets.counts, targets.labels, strict=True)
    ]
    counts = tuple(len(each) for each in kept)
    boxes, labels = torch.zeros(len(counts), max(counts), 4), torch.zeros(len(counts), max(counts), dtype=torch.int64)
    for image, places in enumerate(kept):
        boxes[image, : len(places)] = targets.boxes_cxcywh[image, places]
        labels[image, : len(places)] = targets.labels[image, places]
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    return Targets(boxes, labels, valid, targets.image_ids, counts)


def slow_match(record: TeacherRecord, targets: Targets) -> Tensor:
    """[B, M], by the costs of Deformable DETR, pair by pair."""
    found = torch.full(targets.valid.shape, -1)
    for image, count in enumerate(targets.counts):
        cost = torch.zeros(count, record.logits.shape[2], dtype=torch.float64)
        for n in range(count):
            object_ = targets.boxes_cxcywh[image, n].tolist()
            for query in range(record.logits.shape[2]):
                p = sigmoid(float(record.logits[-1, image, query, int(targets.labels[image, n])]))
                box = record.boxes_cxcywh[-1, image, query].tolist()
                positive = -0.25 * (1 - p) ** 2 * float(torch.tensor(p + 1e-8).log())
                negative = -0.75 * p**2 * float(torch.tensor(1 - p + 1e-8).log())
                apart = sum(abs(a - b) for a, b in zip(box, object_, strict=True))
                overlap = slow_giou(corners(box), corners(object_))
                cost[n, query] = 2 * (positive - negative) + 5 * apart - 2 * overlap
        rows, queries = linear_sum_assignment(cost.numpy())
        found[image, rows] = torch.from_numpy(queries)
    return found


def slow_features(
    record: TeacherRecord,
    targets: Targets,
    rule: QuerySelectionConfig,
    background: float,
    student: tuple[Sequence[Tensor], Sequence[Tensor]],
    pairs: Sequence[tuple[int, int]],
    projectors: nn.ModuleDict,
) -> tuple[float, int]:
    """Of one teacher: the sum over images of the masked mean error, and how many images have a mask."""
    selection = slow_selection(record.boxes_cxcywh[-1], targets, slow_match(record, targets), rule)
    total, images = 0.0, 0
    for image, count in enumerate(targets.counts):
        masks = [torch.zeros(valid.shape[1:]) for valid in record.memory_valid]
        for query in range(record.logits.shape[2] if count else 0):
            weight = selection["weight"][image][query] * sigmoid(float(record.logits[-1, image, query].max()))
            for mask, attention in zip(masks, record.attention, strict=True):
                mask += weight * attention[image, query]
        top = max(float(mask.max()) for mask in masks)
        if top == 0:
            continue
        above = below = 0.0
        for own, other in pairs:
            shade = (masks[other] / top).clamp(min=background) * record.memory_valid[other][image]
            mine, valid = student[0][own][image], student[1][own][image]
            source, extent = (
                (int(each[:, 0].sum()), int(each[0].sum())) for each in (record.memory_valid[other][image], valid)
            )
            goal = slow_resample(record.memory[other][image], source, extent, tuple(valid.shape))  # type: ignore[arg-type]
            shade = slow_resample(shade[None], source, extent, tuple(valid.shape))[0]  # type: ignore[arg-type]
            weight_, bias = (each.detach() for each in projectors[str(own)].parameters())
            for y in range(extent[0]):
                for x in range(extent[1]):
                    shown = weight_[:, :, 0, 0] @ mine[:, y, x] + bias
                    above += float(shade[y, x]) * float((shown - goal[:, y, x]).square().mean())
                    below += float(shade[y, x])
        total, images = total + above / below, images + 1
    return total, images


@pytest.mark.parametrize(
    ("maps", "pairs"), [((1, 3), ([(1, 0)], [(0, 0), (1, 1)])), ((2, 1), ([(0, 0), (1, 1)], [(1, 0)]))]
)
def test_each_teacher_s_features_are_learnt_under_the_attention_of_its_own_queries(
    maps: tuple[int, int], pairs: tuple[list[tuple[int, int]], list[tuple[int, int]]]
) -> None:
    """Images of both, of one alone, of none; the second is padded; the teachers' are of twice the size."""
    members = [of_maps(number, slots, seed) for number, slots, seed in zip(maps, (FIRST, SECOND), (3, 4), strict=True)]
    batch = of_classes([[0, 2, 1, 2], [2, 1], [1], []], side=2 * SIZE)
    sizes, theirs = batch.sizes.clone(), batch.teacher_sizes.clone()
    sizes[1], theirs[1] = torch.tensor([48, 32]), torch.tensor([96, 64])
    batch = replace(batch, sizes=sizes, teacher_sizes=theirs)
    config = recipe(
        FAMILIES["refined"], "distillation.features.background=0.2", "distillation.features.query_weight=confidence"
    )
    training = make_training(config, TeachersTogether(members))
    module, method = training.module.eval(), training.module.method
    assert method is not None
    for part in (*method.features.projectors.values(), *method.further_features[0].projectors.values()):  # type: ignore[union-attr, index]
        nn.init.normal_(part.weight)
    record = training._ask_teacher(batch)
    terms = module(batch.images, batch.sizes, batch.targets, record)
    with torch.no_grad():
        output = training.student(*to_pixels(batch.images, batch.sizes, training.student.mean, training.student.std))
    total, images = 0.0, 0
    for member, slots, met, features in zip(
        members,
        (FIRST, SECOND),
        pairs,
        (method.features, method.further_features[0]),
        strict=True,  # type: ignore[index]
    ):
        alone = member.record(batch, NEEDS)
        mine, seen = slow_features(
            alone,
            own_objects(batch.targets, slots),
            config.distillation.selection,
            0.2,
            (output.memory, output.memory_valid),
            met,
            features.projectors,
        )
        assert mine > 0
        total, images = total + mine, images + seen
    assert images == 5
    assert float(terms["agfd"].count) == images
    assert terms["agfd"].total.item() == pytest.approx(total, rel=1e-4)


# ---- a teacher of boxes alone beside a DETR


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_box_that_a_teacher_does_not_give_teaches_nothing_beside_another_teacher(
    pair: tuple[OnlineTeacher, OnlineTeacher], order: tuple[int, int]
) -> None:
    together = TeachersTogether([pair[each] for each in order])
    batch = of_classes([[2, 2, 2, 2, 2, 2], [2]])
    record = together.record(batch, TeacherNeeds())
    assert record.absent is not None
    given = pair[1].record(batch, TeacherNeeds()).absent
    assert given is not None
    assert given.any()
    assert not given.all()
    assert record.absent.sum() == given.sum()
    for pairing in ("rank", "hungarian", "image"):
        fields = (ALONE, f"distillation.predictions.pairing={pairing}", "distillation.predictions.pair_weight=uniform")
        alone, found = (terms_of(each, batch, None, (), *fields) for each in (pair[1], together))
        assert alone["lapd_l1"][0] > 0
        for name, (total, count) in alone.items():
            torch.testing.assert_close(found[name][0], total, msg=name)
            torch.testing.assert_close(found[name][1], count, msg=name)
    sizes, needs = together.sizes(all_layers=False), TeacherNeeds(memory=True, attention=True)
    rows = encode(together.record(batch, needs), list(batch.targets.image_ids), "float32")
    columns = columns_for(TeacherNeeds())
    cached = {name: torch.from_numpy(each) for name, each in collate(rows, sizes, columns).items()}
    again = CachedTeacher(sizes).record(replace(batch, cached=cached), TeacherNeeds())
    assert again.absent is not None
    assert torch.equal(again.absent, record.absent)


def test_a_box_that_is_not_there_is_not_shown_as_kept(pair: tuple[OnlineTeacher, OnlineTeacher]) -> None:
    """By `qskd explain`: of the teacher alone, and beside another."""
    batch, config = of_classes([[2, 2]]), recipe(FAMILIES["refined"], ALONE)
    for teacher in (pair[1], TeachersTogether(pair)):
        ask = partial(teacher, batch.teacher_images, batch.teacher_sizes)
        record, selection, _ = ask_teacher(
            lambda needs, choose, ask=ask: ask(needs, choose),
            TeacherNeeds(),
            batch.targets,
            config.distillation,  # type: ignore[arg-type]
            config.detection,
        )
        assert record.absent is not None
        assert (selection.weight[record.absent[-1]] == 0).all()
        assert (selection.weight > 0).sum() == 2


def test_where_a_teacher_sees_nothing_in_a_worker_s_whole_share_the_other_teaches_as_ever(
    pair: tuple[OnlineTeacher, OnlineTeacher],
) -> None:
    together = TeachersTogether(pair)
    for seed in range(4):
        whole = blackened(of_classes([[0, 2, 2, 1, 2, 2], [2, 0]], seed), 0)
        shares = [share(whole, slice(0, 1)), share(whole, slice(1, 2))]
        nothing = pair[1].record(shares[0], TeacherNeeds()).absent
        assert nothing is not None
        assert nothing.all()
        found, *parts = (terms_of(together, each, None, (), ALONE) for each in (whole, *shares))
        for name, (total, count) in found.items():
            torch.testing.assert_close(total, sum(each[name][0] for each in parts), msg=name)
            torch.testing.assert_close(count, sum(each[name][1] for each in parts), msg=name)
