"""GQS against the loops, and its properties."""

from __future__ import annotations

import pytest
import torch
from reference import make_targets, near, random_boxes, random_logits, slow_selection

from qskd.config import DetectionLossConfig
from qskd.distillation.qskd.query_selection import QuerySelection, rank_in_group, select_queries
from qskd.distillation.qskd.settings import QuerySelectionConfig
from qskd.losses.matching import assign
from qskd.structures import Targets

CONFIGS = {
    "default": QuerySelectionConfig(),
    "bands": QuerySelectionConfig(boundaries=(-0.2, 0.3, 0.6), band_weights=(0, 0.5, 0, 2), max_per_object=3),
    "relative": QuerySelectionConfig(boundaries=(0.6, 1), band_weights=(0, 1, 3), max_per_object=2, relative=True),
    "no limit": QuerySelectionConfig(boundaries=(0.1,), max_per_object=0, positive_weight=2.5),
    "everything": QuerySelectionConfig(boundaries=(), band_weights=(1.0,), max_per_object=0),
    "positives only": QuerySelectionConfig(band_weights=(0.0, 0.0)),
    "low band only": QuerySelectionConfig(boundaries=(0.4,), band_weights=(0.7, 0.0), max_per_object=4),
}
BATCHES = [([3, 0, 6, 1], 24), ([0, 0], 5), ([2], 1), ([5, 1], 3), ([1, 2, 1], 60)]


def match(boxes: torch.Tensor, targets: Targets) -> torch.Tensor:
    """[B, Q, 4] -> [B, M]"""
    logits = random_logits(1, *boxes.shape[:2], 5)
    return assign([(logits, boxes[None])], targets, DetectionLossConfig())[0][0]


def check(selection: QuerySelection, boxes: torch.Tensor, targets: Targets, config: QuerySelectionConfig) -> None:
    expected = slow_selection(boxes, targets, match(boxes, targets), config)
    for name, values in expected.items():
        actual = getattr(selection, name)
        torch.testing.assert_close(actual, torch.tensor(values).to(actual.dtype), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("counts", "queries"), BATCHES)
def test_equals_the_loops(counts: list[int], queries: int, name: str) -> None:
    targets = make_targets(counts, slots=max(counts) + 1)
    for seed in range(3):
        boxes = near(targets, queries, seed=seed)
        check(select_queries(boxes, targets, match(boxes, targets), CONFIGS[name]), boxes, targets, CONFIGS[name])


def test_a_shuffled_selection_says_the_same_of_other_queries_of_the_image() -> None:
    targets = make_targets([3, 0, 6, 1])
    boxes = near(targets, 24, seed=1)
    usual, shuffled = QuerySelectionConfig(boundaries=(0.1,)), QuerySelectionConfig(boundaries=(0.1,), shuffled=True)
    plain, mixed = (select_queries(boxes, targets, match(boxes, targets), config) for config in (usual, shuffled))
    again = select_queries(boxes, targets, match(boxes, targets), shuffled)
    assert shuffled.floor == -1
    for name, values in vars(plain).items():
        assert torch.equal(getattr(mixed, name).sort(-1).values, values.sort(-1).values), name
        assert torch.equal(getattr(mixed, name), getattr(again, name))
    moved = (mixed.weight > 0) & (plain.weight == 0)
    assert moved.any(-1)[[0, 2, 3]].all()
    assert not torch.equal(mixed.slot, plain.slot)
    other = select_queries(boxes + 1e-3, targets, match(boxes, targets), shuffled)
    assert not torch.equal(other.slot, mixed.slot)


def test_identical_boxes_go_to_the_first_object_and_the_lowest_queries_are_kept() -> None:
    targets = make_targets([2])
    targets.boxes_cxcywh[:] = torch.tensor([0.5, 0.5, 0.4, 0.4])
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.4]).expand(1, 6, 4)
    assignment = torch.tensor([[4, 1]])
    selection = select_queries(boxes, targets, assignment, QuerySelectionConfig(max_per_object=2))
    assert selection.object_of_query.tolist() == [[0, 1, 0, 0, 0, 0]]
    assert selection.weight.tolist() == [[1, 1, 1, 0, 1, 0]]


def test_a_positive_belongs_to_its_own_object_whatever_its_overlap() -> None:
    targets = make_targets([2])
    targets.boxes_cxcywh[0] = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.8, 0.8, 0.2, 0.2]])
    boxes = targets.boxes_cxcywh[:, [0, 0, 1]]
    selection = select_queries(boxes, targets, torch.tensor([[0, 1]]), QuerySelectionConfig())
    assert selection.object_of_query.tolist() == [[0, 1, 1]]
    assert selection.giou[0, 1] < 0
    assert selection.band.tolist() == [[1, 0, 1]]
    assert selection.weight.tolist() == [[1, 1, 1]]


def test_padding_is_never_a_group() -> None:
    targets = make_targets([1, 3])
    far = torch.tensor([0.01, 0.01, 0.005, 0.005]).expand(
        2, 4, 4
    )  # nearer to the zeros of the padding than to any object
    selection = select_queries(far, targets, torch.full((2, 3), -1), QuerySelectionConfig())
    assert (selection.object_of_query[0] == 0).all()


def test_relative_boundaries_keep_nothing_of_an_object_that_no_query_reaches() -> None:
    targets = make_targets([1])
    targets.boxes_cxcywh[0, 0] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    boxes = torch.tensor([[0.1, 0.1, 0.1, 0.1], [0.3, 0.3, 0.1, 0.1]])[None]
    config = QuerySelectionConfig(boundaries=(0.5,), band_weights=(1.0, 1.0), relative=True)
    selection = select_queries(boxes, targets, torch.tensor([[-1]]), config)
    assert selection.weight.sum() == 0
    selection = select_queries(boxes, targets, torch.tensor([[1]]), config)
    assert selection.weight.tolist() == [[0, 1]]


def test_relative_boundary_of_one_keeps_the_best_query() -> None:
    targets = make_targets([3, 2])
    boxes = near(targets, 20, seed=5)
    config = QuerySelectionConfig(boundaries=(1.0,), relative=True)
    weight = select_queries(boxes, targets, torch.full((2, 3), -1), config).weight
    assert weight.sum(1).tolist() == [3, 2]


def test_more_objects_than_queries_leaves_the_rest_without_positive() -> None:
    targets = make_targets([6])
    boxes = random_boxes(1, 2)
    selection = select_queries(boxes, targets, match(boxes, targets), QuerySelectionConfig())
    assert selection.is_positive.all()


def test_decoder_layers_are_selected_each_alone() -> None:
    targets = make_targets([3, 0, 2])
    boxes = torch.stack([near(targets, 15, seed=layer) for layer in range(4)])
    assignment = torch.stack([match(layer, targets) for layer in boxes])
    together = select_queries(boxes, targets, assignment, QuerySelectionConfig())
    for layer in range(4):
        alone = select_queries(boxes[layer], targets, assignment[layer], QuerySelectionConfig())
        for name, value in vars(alone).items():
            assert torch.equal(getattr(together, name)[layer], value), name


def test_half_precision_is_computed_in_float32() -> None:
    targets = make_targets([4, 2])
    boxes = near(targets, 30).bfloat16()
    half = select_queries(boxes, targets, match(boxes.float(), targets), QuerySelectionConfig())
    full = select_queries(boxes.float(), targets, match(boxes.float(), targets), QuerySelectionConfig())
    assert half.giou.dtype == half.weight.dtype == torch.float32
    assert all(torch.equal(value, getattr(full, name)) for name, value in vars(half).items())


def test_rank_in_group_is_the_place_by_score_with_ties_to_the_lower_index() -> None:
    group = torch.tensor([[0, 1, 0, 2, 0, 1], [1, 1, 1, 1, 1, 1]])
    score = torch.tensor([[0.1, 0.5, 0.9, 0.0, 0.1, 0.7], [0.3, 0.3, 0.4, 0.3, 0.2, 0.4]])
    assert rank_in_group(group, score, 2).tolist() == [[1, 1, 0, 0, 2, 0], [2, 3, 0, 4, 5, 1]]
