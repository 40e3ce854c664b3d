"""The dense head: which cell belongs to which object, finite without any, and able to learn where objects are."""

from __future__ import annotations

import pytest
import torch
from reference import make_targets
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.losses.dense_head import CENTRAL_PART, DENSE_WEIGHTS, DenseHead, cell_centres, cells_of_objects
from qskd.losses.detection_loss import combine
from qskd.structures import LossTerm, Targets


def region(height: int, width: int, *real: tuple[int, int]) -> Tensor:
    """[B, H, W] bool: each image's real rows and columns."""
    valid = torch.zeros(len(real), height, width, dtype=torch.bool)
    for image, (rows, columns) in enumerate(real):
        valid[image, :rows, :columns] = True
    return valid


def owners(valid: Tensor, targets: Targets) -> Tensor:
    """As the head asks: [B, H, W]."""
    size = 1.0 / torch.stack([valid.any(1).sum(1), valid.any(2).sum(1)], -1)
    return cells_of_objects(cell_centres(valid), size, targets).unflatten(1, valid.shape[1:])


def slow_owner(valid: Tensor, targets: Targets, image: int, row: int, column: int) -> int:
    rows, columns = int(valid[image, :, 0].sum()), int(valid[image, 0].sum())
    x, y = (column + 0.5) / columns, (row + 0.5) / rows
    best, smallest = -1, float("inf")
    for j in range(targets.counts[image]):
        cx, cy, w, h = targets.boxes_cxcywh[image, j].tolist()
        central = abs(x - cx) <= w * CENTRAL_PART / 2 and abs(y - cy) <= h * CENTRAL_PART / 2
        across = abs(x - cx) <= max(w * CENTRAL_PART, 1 / columns) / 2
        down = abs(y - cy) <= max(h * CENTRAL_PART, 1 / rows) / 2
        if (central or (across and down)) and w * h < smallest:
            best, smallest = j, w * h
    return best


def boxes_as_targets(*boxes: tuple[float, float, float, float]) -> Targets:
    count = len(boxes)
    labels = torch.arange(count)[None] % 3
    return Targets(torch.tensor([boxes]), labels, torch.ones(1, count, dtype=torch.bool), (1,), (count,))


@pytest.mark.parametrize("seed", range(4))
def test_cells_belong_to_objects_as_a_slow_loop_says(seed: int) -> None:
    valid = region(9, 12, (9, 12), (5, 12), (9, 4), (3, 7))
    targets = make_targets([6, 0, 3, 1], seed=seed, slots=8)
    found = owners(valid, targets)
    for image, row, column in valid.nonzero().tolist():
        assert found[image, row, column] == slow_owner(valid, targets, image, row, column), (image, row, column)
    assert (found[1] == -1).all()
    assert len(found.unique()) > 4  # the case is no empty one


def test_of_several_objects_a_cell_belongs_to_the_smallest() -> None:
    valid = region(16, 16, (16, 16))
    found = owners(valid, boxes_as_targets((0.5, 0.5, 0.9, 0.9), (0.5, 0.5, 0.3, 0.3), (0.5, 0.5, 0.6, 0.6)))[0]
    assert found[8, [8, 10, 11, 13]].tolist() == [1, 2, 0, -1]


def test_of_equal_objects_a_cell_belongs_to_the_first() -> None:
    found = owners(region(8, 8, (8, 8)), boxes_as_targets((0.5, 0.5, 0.5, 0.25), (0.5, 0.5, 0.25, 0.5)))[0]
    assert found[4, 4] == 0


@pytest.mark.parametrize("centre", [(0.01, 0.99), (0.5, 0.5), (0.33, 0.71)])
def test_an_object_smaller_than_a_cell_still_has_one(centre: tuple[float, float]) -> None:
    found = owners(region(4, 6, (4, 6)), boxes_as_targets((*centre, 1e-4, 1e-4)))[0]
    assert 1 <= (found == 0).sum() <= 4  # more than one only where it lies on the border between cells
    assert found[min(int(centre[1] * 4), 3), min(int(centre[0] * 6), 5)] == 0


def test_centres_are_relative_to_the_real_part() -> None:
    centres = cell_centres(region(4, 6, (4, 6), (2, 3))).unflatten(1, (4, 6))
    torch.testing.assert_close(centres[0, 0, 0], torch.tensor([1 / 12, 1 / 8]))
    torch.testing.assert_close(centres[1, 1, 2], torch.tensor([2.5 / 3, 1.5 / 2]))


def head_and_features(batch: int, channels: int = 16, size: int = 8) -> tuple[DenseHead, Tensor]:
    torch.manual_seed(0)
    return DenseHead(channels, 3), torch.randn(batch, channels, size, size)


def total(terms: dict[str, LossTerm]) -> Tensor:
    return combine(terms, DENSE_WEIGHTS)


@pytest.mark.parametrize(("counts", "slots"), [([0, 0], 0), ([0, 0], 3), ([0, 2], 2)])
def test_images_without_objects_give_finite_terms_and_gradients(counts: list[int], slots: int) -> None:
    head, features = head_and_features(2)
    features.requires_grad_()
    terms = head(features, region(8, 8, (8, 8), (5, 3)), make_targets(counts, classes=3, slots=slots))
    assert set(terms) == set(DENSE_WEIGHTS)
    total(terms).backward()
    assert all(torch.isfinite(term.total) for term in terms.values())
    for value in (features, *head.parameters()):
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()
    if not sum(counts):
        assert terms["dense_l1"].total == terms["dense_giou"].total == terms["dense_l1"].count == 0
        assert terms["dense_class"].total > 0  # background is learned from all images


def test_padding_of_images_and_of_targets_changes_nothing() -> None:
    head, features = head_and_features(2)
    targets, wide = make_targets([2, 1], classes=3), make_targets([2, 1], classes=3)
    wide = Targets(
        torch.nn.functional.pad(targets.boxes_cxcywh, (0, 0, 0, 4)),
        torch.nn.functional.pad(targets.labels, (0, 4)),
        torch.nn.functional.pad(targets.valid, (0, 4)),
        targets.image_ids,
        targets.counts,
    )
    tight = head(features, region(8, 8, (8, 8), (8, 8)), targets)
    padded = torch.full((2, 16, 11, 9), 5.0)
    padded[..., :8, :8] = features
    loose = head(padded, region(11, 9, (8, 8), (8, 8)), wide)
    assert tight["dense_l1"].count > 0
    for name, term in tight.items():
        torch.testing.assert_close(loose[name].total, term.total)
        assert loose[name].count == term.count


def test_the_count_is_that_of_owned_cells() -> None:
    head, features = head_and_features(2)
    valid, targets = region(8, 8, (8, 8), (4, 8)), make_targets([2, 1], classes=3)
    terms = head(features, valid, targets)
    assert terms["dense_class"].count == ((owners(valid, targets) >= 0) & valid).sum()


def test_it_learns_where_two_objects_are_and_what() -> None:
    targets = boxes_as_targets((0.3, 0.35, 0.3, 0.4), (0.75, 0.6, 0.25, 0.5))
    valid = region(8, 8, (8, 8))
    head, features = head_and_features(1, channels=64)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    first = total(head(features, valid, targets)).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = total(head(features, valid, targets))
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * first
    owner = owners(valid, targets).flatten(1)[0]
    scores = head.classes(features).flatten(2)[0].T.sigmoid()
    centres = cell_centres(valid)[0]
    raw = head.boxes(features).flatten(2)[0].T
    boxes = torch.cat([(torch.logit(centres) + raw[:, :2]).sigmoid(), (raw[:, 2:] - 1.4).sigmoid()], 1)
    for j in range(2):
        mine = owner == j
        assert (scores[mine].argmax(1) == targets.labels[0, j]).all()
        assert (scores[mine].amax(1) > 0.5).all()
        assert (iou(cxcywh_to_xyxy(boxes[mine]), cxcywh_to_xyxy(targets.boxes_cxcywh[0, j])) > 0.8).all()
    assert (scores[owner < 0] < 0.5).all()
