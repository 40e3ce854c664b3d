"""QSKD as TPRD reads it: each layer's attention and mask, M^2, the image-wide pairing; one cache serves both readings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from reference import cheapest, make_targets, near, random_boxes, random_logits, sigmoid, slow_bce, slow_giou
from tiny import EASY_SELECTION, batch_of, make_training, random_teacher, recipe
from torch import Tensor

from qskd.checks import check_enough
from qskd.config import DetectionLossConfig
from qskd.config.recipe import build, to_tree
from qskd.detectors import to_pixels
from qskd.distillation.find import method_names
from qskd.distillation.qskd.agfd import AttentionGuidedFeatureDistillation, foreground_mask
from qskd.distillation.qskd.pairing import Side, pair_over_image
from qskd.distillation.qskd.query_selection import select_queries
from qskd.distillation.qskd.settings import FeatureDistillationConfig, QuerySelectionConfig
from qskd.distillation.qskd_tprd import Settings
from qskd.errors import QskdError
from qskd.losses.matching import assign
from qskd.structures import Targets, TeacherNeeds, TeacherRecord
from qskd.teacher.columns.table import ALWAYS, collate, columns_for, decode_batch, encode, row_from
from qskd.teacher.online import queries_above

LAYERS, QUERIES = 3, 10  # of tiny's teacher
ALL = TeacherNeeds(memory=True, attention=True, all_layers=True, attention_layers="all", attention_giou_floor=0.0)
COSTS = DetectionLossConfig()


@pytest.mark.parametrize("family", ["conditional", "refined", "detr", "d_fine"])
def test_each_layer_s_attention_is_numbered_from_the_last_layer_back(family: str) -> None:
    teacher = random_teacher(family)
    batch = batch_of(2, 1)
    pixels, mask = to_pixels(batch.images, batch.sizes, teacher.detector.mean, teacher.detector.std)
    with torch.no_grad():
        output = teacher.detector(pixels, mask)
    one = torch.arange(QUERIES).expand(2, -1)
    assert output.attend_each is not None
    every = output.attend_each(torch.arange(LAYERS * QUERIES).expand(2, -1))
    picked = torch.tensor([[23, -1, 4, 11], [0, 29, -1, -1]])
    some = output.attend_each(picked)
    for whole, last, mean, part in zip(every, output.attend(one), output.attend_mean(one), some, strict=True):
        layers = whole.unflatten(1, (LAYERS, QUERIES))
        torch.testing.assert_close(layers[:, 0], last)
        torch.testing.assert_close(layers.mean(1), mean)
        assert not torch.allclose(layers[:, 1], last)
        for image, row in np.ndindex(*picked.shape):
            query = int(picked[image, row])
            torch.testing.assert_close(part[image, row], whole[image, query] if query >= 0 else whole[0, 0] * 0)


def layered(targets: Targets, layers: int, queries: int, seed: int) -> TeacherRecord:
    boxes = torch.stack([near(targets, queries, seed=seed + layer, spread=0.1) for layer in range(layers)])
    return TeacherRecord(random_logits(layers, len(targets.counts), queries, 5, seed=seed), boxes)


def layer_of(record: TeacherRecord, layer: int) -> TeacherRecord:
    return replace(record, logits=record.logits[layer, None], boxes_cxcywh=record.boxes_cxcywh[layer, None])


def chosen(queries: Tensor) -> list[set[int]]:
    return [{query for query in row if query >= 0} for row in queries.tolist()]


def test_queries_of_every_layer_are_those_that_each_layer_alone_would_keep() -> None:
    targets = make_targets([3, 0, 1])
    record = layered(targets, 3, 12, seed=2)
    found = chosen(queries_above(record, targets, 0.4, COSTS, "all"))
    expected: list[set[int]] = [set(), set(), set()]
    for layer in range(3):
        for image, kept in enumerate(chosen(queries_above(layer_of(record, layer), targets, 0.4, COSTS))):
            expected[image] |= {query + (2 - layer) * 12 for query in kept}
    assert found == expected
    assert found[0]
    assert not found[1]


def random_attention(batch: int, known: Tensor, seed: int = 0) -> TeacherRecord:
    """Maps of two levels, of queries `known` [B, A]; the second image is padded."""
    g = torch.Generator().manual_seed(seed)
    valid = [torch.ones(batch, 4, 5, dtype=torch.bool), torch.ones(batch, 2, 3, dtype=torch.bool)]
    valid[0][1, 3:], valid[1][1, 1:] = False, False
    attention = tuple(torch.rand(*known.shape, *part.shape[1:], generator=g) ** 3 * part[:, None] for part in valid)
    memory = tuple(torch.randn(batch, 6, *part.shape[1:], generator=g) for part in valid)
    nothing = torch.zeros(1, batch, 1, 1), torch.zeros(1, batch, 1, 4)
    return TeacherRecord(*nothing, memory, tuple(valid), known, attention)


def selected(record: TeacherRecord, targets: Targets, config: QuerySelectionConfig) -> Any:
    (assignment,) = assign([(record.logits, record.boxes_cxcywh)], targets, COSTS)
    return select_queries(record.boxes_cxcywh, targets, assignment, config)


def test_each_layer_s_mask_is_of_its_own_selection_and_attention_and_the_loss_sums_over_layers() -> None:
    targets, settings = make_targets([3, 1, 0]), Settings()
    said = layered(targets, 3, 12, seed=3)
    known = queries_above(said, targets, settings.selection.floor, COSTS, "all")
    looks = random_attention(3, known)
    record = replace(looks, logits=said.logits, boxes_cxcywh=said.boxes_cxcywh)
    selection, confidence = selected(record, targets, settings.selection), record.logits.sigmoid().amax(-1)
    masks = foreground_mask(selection, record, confidence, settings.features)
    for layer in range(3):
        mine = known - (2 - layer) * 12
        mine = torch.where((mine >= 0) & (mine < 12), mine, -1)
        alone = foreground_mask(
            selection[layer], replace(record, attention_queries=mine), confidence[layer], settings.features
        )
        for level in range(2):
            torch.testing.assert_close(masks[level][:, layer], alone[level])
    # Only what the last layer kept counts for what reads the last layer alone.
    last = foreground_mask(selection[-1], record, confidence[-1], FeatureDistillationConfig(query_weight="giou"))
    assert all(torch.equal(whole[:, -1], part) for whole, part in zip(masks, last, strict=True))

    module = AttentionGuidedFeatureDistillation([6, 6], [6, 6], settings.features)
    student = [part + torch.randn(part.shape) for part in record.memory]
    term = module(student, record.memory_valid, record, masks)
    total = cells = 0.0
    for image in range(3):
        for level, valid in enumerate(record.memory_valid):
            for y, x in np.argwhere(valid[image].numpy()):
                apart = (student[level] - record.memory[level])[image, :, y, x].square().mean()
                total += float(sum(masks[level][image, layer, y, x] ** 2 for layer in range(3)) * apart)
                cells += 1
    assert term.total.item() == pytest.approx(total, rel=1e-4)
    assert term.count == cells

    divided = settings.features.model_copy(update={"mask_weighting": "normalised"})
    each = [
        AttentionGuidedFeatureDistillation([6, 6], [6, 6], divided)(
            student, record.memory_valid, record, [part[:, layer] for part in masks]
        )
        for layer in range(3)
    ]
    summed = AttentionGuidedFeatureDistillation([6, 6], [6, 6], divided)(student, record.memory_valid, record, masks)
    assert [float(one.count) for one in each] == [2, 2, 2]  # the third image has no objects
    assert summed.total.item() / summed.count.item() == pytest.approx(
        sum(one.total.item() / one.count.item() for one in each), rel=1e-4
    )


@pytest.mark.parametrize("counts", [[3, 0, 1], [0, 0, 0]])
def test_the_image_wide_pairing_keeps_positives_with_their_objects_and_is_the_cheapest_of_all_hard_negatives(
    counts: list[int],
) -> None:
    targets, config = make_targets(counts, slots=3), QuerySelectionConfig(boundaries=(-0.9,), max_per_object=0)
    mine, theirs = layered(targets, 2, 7, seed=5), layered(targets, 2, 9, seed=8)
    mine = replace(mine, boxes_cxcywh=random_boxes(2, 3, 7, seed=5))  # of other objects than the teacher's
    sides = [Side(one.logits, one.boxes_cxcywh, selected(one, targets, config)) for one in (mine, theirs)]
    partner = pair_over_image(sides[0], sides[1], 3, 10)
    crossed = 0
    for layer, image in np.ndindex(2, 3):
        own, other = (side.selection[layer] for side in sides)
        pairs = {q: t for q, t in enumerate(partner[layer, image].tolist()) if t >= 0}
        for q, t in pairs.items():
            assert own.is_positive[image, q] == other.is_positive[image, t]
            assert own.weight[image, q] > 0
            assert other.weight[image, t] > 0
            if own.is_positive[image, q]:
                assert own.object_of_query[image, q] == other.object_of_query[image, t]
            else:
                crossed += int(own.object_of_query[image, q] != other.object_of_query[image, t])
        assert int(own.is_positive[image].sum()) == sum(bool(own.is_positive[image, q]) for q in pairs)
        hard = [
            [q for q in range(part.weight.shape[1]) if part.weight[image, q] > 0 and not part.is_positive[image, q]]
            for part in (own, other)
        ]
        met = {q: t for q, t in pairs.items() if q in hard[0]}
        assert len(met) == len(set(met.values())) == min(map(len, hard))
        if met:
            costs = [[cost(sides, layer, image, q, t) for t in hard[1]] for q in hard[0]]
            paid = sum(cost(sides, layer, image, q, t) for q, t in met.items())
            assert paid == pytest.approx(cheapest(costs), rel=1e-4, abs=1e-4)
    assert crossed if sum(counts) else not (partner >= 0).any()


def cost(sides: list[Side], layer: int, image: int, q: int, t: int) -> float:
    """BCE + 5 L1 - 2 GIoU."""
    goals = [sigmoid(x) for x in sides[1].logits[layer, image, t].tolist()]
    a, b = sides[0].boxes_cxcywh[layer, image, q].tolist(), sides[1].boxes_cxcywh[layer, image, t].tolist()
    one, two = ([x - w / 2, y - h / 2, x + w / 2, y + h / 2] for x, y, w, h in (a, b))
    distance = sum(abs(x - y) for x, y in zip(a, b, strict=True))
    return slow_bce(sides[0].logits[layer, image, q].tolist(), goals) + 5 * distance - 2 * slow_giou(one, two)


def test_the_preset_is_qskd_with_tprd_s_settings_and_single_ones_can_be_set() -> None:
    assert {"qskd", "qskd-tprd"} <= set(method_names())
    config = build({"distillation": {"method": "qskd-tprd", "selection": {"positive_weight": 2.0}}})
    told: Any = config.distillation
    assert (told.selection.boundaries, told.selection.max_per_object, told.selection.positive_weight) == (
        (0.0,),
        0,
        2.0,
    )
    features, predictions = told.features, told.predictions
    assert (features.query_weight, features.attention_layers, features.mask_weighting) == ("giou", "all", "squared")
    assert (predictions.pairing, predictions.pair_weight, predictions.teacher_layers) == (
        "image",
        "uniform",
        "same_index",
    )
    assert build(to_tree(config)) == config
    usual: Any = build({}).distillation  # qskd is what it was
    assert (usual.selection.boundaries, usual.selection.max_per_object) == ((0.5,), 10)
    assert (usual.features.query_weight, usual.features.attention_layers) == ("confidence", "last")
    assert (usual.features.mask_weighting, usual.predictions.pairing) == ("normalised", "rank")


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ({}, "attention_giou_floor=0"),
        ({"attention_giou_floor": 0.0}, "teacher.cache.attention_layers=all teacher.cache.all_layers=true"),
        ({"attention_giou_floor": 0.0, "attention_layers": "all"}, "set all_layers: true"),
    ],
)
def test_a_cache_that_lacks_what_the_preset_reads_is_refused_with_what_adds_it(cache: Any, words: str) -> None:
    with pytest.raises(QskdError) as caught:
        check_enough(build({"distillation": {"method": "qskd-tprd"}, "teacher": {"cache": cache}}))
    assert words in str(caught.value)


def through_the_cache(record: TeacherRecord, needs: TeacherNeeds) -> TeacherRecord:
    """As a training reads it back."""
    sizes = random_teacher("conditional").sizes(all_layers=True)
    rows = []
    for number, row in enumerate(encode(record, range(len(record.logits[0])), "float32")):
        buffers = {name: getattr(row, name).tobytes() for name in ALWAYS}
        rows.append(row_from(number, buffers, sizes, "float32"))
    arrays = collate(rows, sizes, columns_for(needs))
    return decode_batch({name: torch.from_numpy(array) for name, array in arrays.items()})


def test_one_cache_with_every_layer_serves_both_readings_as_the_teacher_itself_does() -> None:
    enough = {"attention_giou_floor": -0.9, "attention_layers": "all", "all_layers": True}
    teacher, batch = random_teacher("conditional"), batch_of(2, 0)

    def choose(record: TeacherRecord) -> Tensor:
        return queries_above(record, batch.targets, -0.9, COSTS, "all")

    record = teacher(batch.teacher_images, batch.teacher_sizes, ALL, choose)
    assert record.attention_queries is not None
    assert record.attention_queries.max() >= 2 * QUERIES
    cached = through_the_cache(record, ALL)
    for name in ("qskd", "qskd-tprd"):
        tree = {"method": name, "selection": EASY_SELECTION}
        config = recipe(None, distillation=tree, teacher={"cache": enough})
        check_enough(config)
        training = make_training(config, teacher)
        training.module.eval()
        told = [
            training.module(batch.images, batch.sizes, batch.targets, each)
            for each in (training._ask_teacher(batch), cached)
        ]
        assert told[0]["agfd"].total > 0
        assert told[0]["lapd_l1"].count > 2
        for term, value in told[0].items():
            torch.testing.assert_close(told[1][term].total, value.total, rtol=1e-4, atol=1e-5)
            assert told[1][term].count == value.count
