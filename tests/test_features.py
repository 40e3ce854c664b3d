"""AGFD against the loops: mask, resampling between grids, pairing of levels, loss; and that nothing waits for a device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from reference import make_targets, near, random_boxes, random_logits, slow_resample
from torch import Tensor

from qskd.config import DetectionLossConfig, ResizeConfig
from qskd.detectors import Preprocessing
from qskd.distillation.method import Facts, Lesson
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation, foreground_mask
from qskd.distillation.qskd.method import QSKD
from qskd.distillation.qskd.query_selection import QuerySelection, select_queries
from qskd.distillation.qskd.settings import FeatureDistillationConfig, QuerySelectionConfig, Settings
from qskd.distillation.shared.maps import pair_levels, resample
from qskd.errors import QskdError
from qskd.losses.detection_loss import combine, detection_terms, detection_weights
from qskd.losses.matching import assign
from qskd.structures import DetectorOutput, LossTerm, Targets, TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.online import OnlineTeacher
from qskd.training.module import StepModule

Size = tuple[int, int]


def rectangles(extents: list[Size], grid: Size) -> Tensor:
    """[B, H, W] bool, True in each image's rectangle at the top left."""
    valid = torch.zeros(len(extents), *grid, dtype=torch.bool)
    for image, (height, width) in enumerate(extents):
        valid[image, :height, :width] = True
    return valid


def random_maps(batch: int, width: int, grids: list[Size], seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, width, *grid, generator=g) for grid in grids)


def make_record(
    targets: Targets, grids: list[Size], extents: list[list[Size]], queries: int = 20, known: int = 15, width: int = 6
) -> TeacherRecord:
    """Attention of `known` random queries (some -1), zero on padding, summing to 1 over all maps."""
    batch, g = len(targets.counts), torch.Generator().manual_seed(3)
    valid = tuple(rectangles(extent, grid) for extent, grid in zip(extents, grids, strict=True))
    raw = [torch.rand(batch, known, *grid, generator=g) ** 4 * v[:, None] for grid, v in zip(grids, valid, strict=True)]
    whole = torch.stack([part.flatten(2).sum(2) for part in raw]).sum(0)
    attention = tuple(part / whole[..., None, None] for part in raw)
    asked = torch.stack([torch.randperm(queries, generator=g)[:known] for _ in range(batch)])
    asked[:, -2:] = -1
    return TeacherRecord(
        random_logits(1, batch, queries, 5, seed=4),
        near(targets, queries, seed=5)[None],
        random_maps(batch, width, grids, seed=6),
        valid,
        asked,
        attention,
    )


def selection_of(record: TeacherRecord, targets: Targets, **config: Any) -> QuerySelection:
    (assignment,) = assign([(record.logits, record.boxes_cxcywh)], targets, DetectionLossConfig())
    return select_queries(record.boxes_cxcywh[-1], targets, assignment[-1], QuerySelectionConfig(**config))


def slow_mask(
    selection: QuerySelection, record: TeacherRecord, confidence: Tensor, config: FeatureDistillationConfig, image: int
) -> list[Tensor]:
    assert record.attention_queries is not None
    masks = [torch.zeros(valid.shape[1:]) for valid in record.memory_valid]
    for row, query in enumerate(record.attention_queries[image].tolist()):
        if query < 0:
            continue
        c, u = float(confidence[image, query]), float(selection.giou[image, query])
        kind, gamma = config.query_weight, config.quality_gamma
        quality = c**gamma * max(0.0, u) ** (1 - gamma)
        w = {"confidence": c, "quality": quality, "uniform": 1.0, "giou": 1 + u}[kind]
        for level, mask in enumerate(masks):
            mask += float(selection.weight[image, query]) * w * record.attention[level][image, row]
    top = max(float(m.max()) for m in masks)
    if top == 0:
        return masks
    return [(m / top).clamp(min=config.background) * v[image] for m, v in zip(masks, record.memory_valid, strict=True)]


COUNTS = [3, 0, 5]
GRIDS, EXTENTS = [(8, 10), (4, 5)], [[(8, 10), (6, 10), (8, 5)], [(4, 5), (3, 5), (4, 3)]]


@pytest.mark.parametrize("background", [0.0, 0.2])
@pytest.mark.parametrize("query_weight", ["confidence", "quality", "uniform", "giou"])
def test_mask_equals_the_loops(query_weight: Any, background: float) -> None:
    targets = make_targets(COUNTS)
    record = make_record(targets, GRIDS, EXTENTS)
    selection = selection_of(record, targets, boundaries=(0.2, 0.6), band_weights=(0, 0.5, 1))
    confidence = record.logits[-1].sigmoid().amax(-1)
    config = FeatureDistillationConfig(background=background, query_weight=query_weight, quality_gamma=0.3)
    masks = foreground_mask(selection, record, confidence, config)
    for image in range(3):
        for level, expected in enumerate(slow_mask(selection, record, confidence, config, image)):
            torch.testing.assert_close(masks[level][image], expected)
    assert all((part[1] == 0).all() for part in masks)


def test_mask_without_attention_says_what_to_do() -> None:
    targets = make_targets([1])
    record = make_record(targets, GRIDS[:1], [[(8, 10)]])
    selection = selection_of(record, targets)
    with pytest.raises(QskdError, match="background"):
        foreground_mask(selection, replace(record, attention=()), torch.ones(1, 20), FeatureDistillationConfig())


@pytest.mark.parametrize(
    ("grid", "extents", "onto", "onto_extents"),
    [
        ((8, 8), [(8, 8), (6, 8), (8, 3)], (8, 8), [(8, 8), (6, 8), (8, 3)]),
        ((8, 8), [(8, 8), (8, 6), (8, 3)], (8, 8), [(8, 8), (6, 8), (8, 3)]),
        ((9, 12), [(9, 12), (7, 12), (9, 5)], (5, 7), [(5, 7), (4, 6), (5, 3)]),
        ((4, 5), [(4, 5), (3, 5), (1, 1)], (9, 8), [(9, 8), (2, 8), (9, 3)]),
    ],
)
def test_resampling_equals_the_loops(grid: Size, extents: list[Size], onto: Size, onto_extents: list[Size]) -> None:
    (maps,) = random_maps(3, 2, [grid])
    valid, onto_valid = rectangles(extents, grid), rectangles(onto_extents, onto)
    maps = torch.where(valid[:, None], maps, 1e3)  # what is in the padding must never be seen
    moved = resample(maps, valid, onto_valid)
    for image in range(3):
        expected = slow_resample(maps[image], extents[image], onto_extents[image], onto)
        torch.testing.assert_close(moved[image] * onto_valid[image], expected, rtol=1e-4, atol=2e-3)
        if grid == onto and extents[image] == onto_extents[image]:
            assert torch.equal(moved[image], maps[image])


def test_resampling_to_a_far_coarser_grid_keeps_a_narrow_peak() -> None:
    for place in range(16):
        peak = torch.zeros(1, 1, 16, 16)
        peak[0, 0, place, (place * 7) % 16] = 1
        moved = resample(peak, torch.ones(1, 16, 16, dtype=torch.bool), torch.ones(1, 4, 4, dtype=torch.bool))
        assert moved.sum().item() == pytest.approx(1 / 16)


def test_levels_pair_in_order_or_by_size() -> None:
    assert pair_levels([1600, 400], [400, 100]) == [(0, 0), (1, 1)]
    assert pair_levels([400], [6400, 1600, 399, 100]) == [(0, 2)]
    assert pair_levels([6400, 1600, 400], [572]) == [(2, 0)]
    assert pair_levels([400, 361], [1600, 400, 25]) == [(0, 1), (1, 0)]


def test_which_maps_meet_is_the_same_in_every_batch_however_its_images_are_shaped() -> None:
    """A student of squares (640) and a teacher that keeps shapes (800 / 1333): by a batch's own sizes, maps met now one and
    now another, and a projector learnt towards both."""
    three = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
    config = tiny.recipe({"family": "rt_detr", "feature_levels": 3, "backbone": three, "resize": {"size": 640}})
    levels = {"family": "deformable_detr", "feature_levels": 4, "backbone": three}
    teacher = tiny.silent_student(tiny.recipe(levels).student, tiny.LABELS, 0)
    seen_as = Preprocessing(ResizeConfig(mode="shortest_edge", size=800, longest=1333))
    online = OnlineTeacher(teacher, (0, 1, 2), seen_as)
    assert teacher.memory_strides == (8, 16, 32, 64)
    for known in (online, CachedTeacher(online.sizes(all_layers=False))):
        method = StepModule(config, tiny.silent_student(config.student, tiny.LABELS, 0), known).method
        assert method is not None
        assert method.features is not None
        assert method.features.pairs == ((0, 1), (1, 2), (2, 3))
    silent = replace(online.sizes(all_layers=False), cells=())  # a cache of before this was asked
    with pytest.raises(QskdError, match="make the cache of teacher outputs anew"):
        StepModule(config, tiny.silent_student(config.student, tiny.LABELS, 0), CachedTeacher(silent))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize(
    ("grids", "extents"),
    [
        (GRIDS, EXTENTS),
        ([(5, 6), (3, 3)], [[(5, 6), (4, 6), (5, 3)], [(3, 3), (2, 3), (3, 2)]]),
        ([(4, 5)], [[(4, 5), (3, 5), (4, 3)]]),
    ],
)
def test_loss_equals_the_loops(grids: list[Size], extents: list[list[Size]], uniform: bool) -> None:
    targets = make_targets(COUNTS)
    record = make_record(targets, GRIDS, EXTENTS)
    config = FeatureDistillationConfig(background=float(uniform))
    mask = foreground_mask(selection_of(record, targets), record, record.logits[-1].sigmoid().amax(-1), config)
    torch.manual_seed(0)
    pairs = pair_levels([h * w for h, w in grids], [h * w for h, w in GRIDS])
    module = AttentionGuidedFeatureDistillation([4] * len(grids), [6, 6], config, pairs)
    student = random_maps(3, 4, grids, seed=9)
    valid = [rectangles(extent, grid) for extent, grid in zip(extents, grids, strict=True)]
    term = module(student, valid, record, None if uniform else mask)

    expected, images = 0.0, 0
    for image in range(3):
        above = below = 0.0
        for level, teacher_level in pairs:
            source, target, grid = EXTENTS[teacher_level][image], extents[level][image], grids[level]
            goal = slow_resample(record.memory[teacher_level][image], source, target, grid)
            shade = slow_resample(mask[teacher_level][image][None], source, target, grid)[0]
            weight, bias = (item.detach() for item in module.projectors[str(level)].parameters())
            for y in range(target[0]):
                for x in range(target[1]):
                    m = 1.0 if uniform else float(shade[y, x])
                    shown = weight[:, :, 0, 0] @ student[level][image, :, y, x] + bias
                    above += m * float((shown - goal[:, y, x]).square().mean())
                    below += m
        if below > 0:
            expected, images = expected + above / below, images + 1
    assert images == (3 if uniform else 2)
    assert term.count == images
    assert term.total.item() == pytest.approx(expected, rel=1e-4)


def test_loss_and_gradient_are_zero_where_student_and_teacher_agree() -> None:
    targets = make_targets(COUNTS)
    record = make_record(targets, GRIDS, EXTENTS)
    mask = foreground_mask(selection_of(record, targets), record, torch.ones(3, 20), FeatureDistillationConfig())
    module = AttentionGuidedFeatureDistillation([6, 6], [6, 6], FeatureDistillationConfig())
    memory = [part.clone().requires_grad_() for part in record.memory]
    term = module(memory, record.memory_valid, record, mask)
    assert term.total == 0
    term.total.backward()
    assert all(part.grad is not None and not part.grad.any() for part in memory)


def test_gradients_reach_every_projector_and_the_student_inside_the_mask_only() -> None:
    targets = make_targets(COUNTS)
    record = make_record(targets, GRIDS[1:], EXTENTS[1:])  # one teacher map, two student maps
    record = replace(record, memory=tuple(part.requires_grad_() for part in record.memory))
    mask = foreground_mask(selection_of(record, targets), record, torch.ones(3, 20), FeatureDistillationConfig())
    module = AttentionGuidedFeatureDistillation([4, 4], [6], FeatureDistillationConfig(), [(1, 0)])
    student = [part.requires_grad_() for part in random_maps(3, 4, GRIDS, seed=9)]
    valid = [rectangles(extent, grid) for extent, grid in zip(EXTENTS, GRIDS, strict=True)]
    module(student, valid, record, mask).total.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    gradient = student[1].grad
    assert gradient is not None
    assert torch.equal(gradient.abs().sum(1) > 0, mask[0] > 0)
    assert record.memory[0].grad is None


def test_maps_that_do_not_fit_are_named() -> None:
    config = FeatureDistillationConfig()
    with pytest.raises(QskdError, match="1 student maps and 2 teacher maps of unknown sizes"):
        AttentionGuidedFeatureDistillation([4], [6, 8], config)
    module = AttentionGuidedFeatureDistillation([6], [6], config)
    empty = TeacherRecord(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 4))
    with pytest.raises(QskdError, match="0 teacher maps"):
        module([torch.zeros(1, 6, 2, 2)], [torch.ones(1, 2, 2, dtype=torch.bool)], empty, None)


def test_autocast_changes_no_more_than_the_projection() -> None:
    targets = make_targets(COUNTS)
    record = make_record(targets, GRIDS, EXTENTS)
    selection, confidence = selection_of(record, targets), torch.ones(3, 20)
    full = foreground_mask(selection, record, confidence, FeatureDistillationConfig())
    with torch.autocast("cpu", torch.bfloat16):
        half = foreground_mask(selection, record, confidence, FeatureDistillationConfig())
    assert all(torch.equal(a, b) for a, b in zip(full, half, strict=True))


def test_no_loss_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values: whatever asks for one (`.item()`, `bool`, `nonzero`) raises."""

    def attend(_: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError

    def step(make: Any) -> dict[str, LossTerm]:
        method = make(QSKD(Settings(), Facts((6,)), Facts((6,))))
        targets = make_targets([3, 0])
        memory, valid = random_maps(2, 6, [(4, 5)]), (rectangles([(4, 5), (3, 5)], (4, 5)),)
        student = DetectorOutput(
            make(random_logits(2, 2, 9, 5)), make(random_boxes(2, 2, 9)), tuple(map(make, memory)),
            tuple(map(make, valid)), (), make(torch.zeros(2, 9, 6)), attend, attend,
        )  # fmt: skip
        record = make_record(targets, [(4, 5)], [[(4, 5), (4, 3)]])
        fields = {name: tuple(map(make, getattr(record, name))) for name in ("memory", "memory_valid", "attention")}
        record = TeacherRecord(
            make(record.logits), make(record.boxes_cxcywh), attention_queries=make(record.attention_queries), **fields
        )
        assignment, teacher_assignment = make(torch.zeros(2, 2, 3).long()), make(torch.zeros(1, 2, 3).long())
        targets = replace(
            targets,
            boxes_cxcywh=make(targets.boxes_cxcywh),
            labels=make(targets.labels),
            valid=make(targets.valid),
        )
        config = DetectionLossConfig()
        terms = detection_terms(student.logits, student.boxes_cxcywh, targets, assignment, config)
        terms |= method(Lesson(student, record, targets, assignment, teacher_assignment))
        combine(terms, detection_weights(2, config) | method.weights)
        return terms

    assert len(step(lambda item: item)) == 10
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for meta
    assert len(step(lambda item: item.to("meta"))) == 10
