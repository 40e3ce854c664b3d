"""Whose query learns which object's box: the union of all layers' matchings against transformers' own, and a slow loop."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from reference import make_targets
from torch import Tensor
from transformers import Deimv2Config
from transformers.loss.loss_deimv2 import Deimv2Loss

from qskd.errors import QskdError
from qskd.losses.pairs import own_pairs, united_pairs

QUERIES, LAYERS = 7, 5


def drawn(counts: list[int], seed: int = 0) -> Tensor:
    """A one-to-one assignment a layer; few queries, so that layers often agree."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.full((LAYERS, len(counts), max(counts, default=0)), -1)
    for layer in range(LAYERS):
        for image, count in enumerate(counts):
            taken = min(count, QUERIES)
            which = torch.randperm(count, generator=generator)[
                :taken
            ]  # objects without a query, where there are too many
            found[layer, image, which] = torch.randperm(QUERIES, generator=generator)[:taken]
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("counts", [[3, 0, 5], [1, 1], [9, 2], [0, 0]])
def test_a_query_has_the_object_that_most_layers_give_it(counts: list[int], seed: int) -> None:
    targets, assignment = make_targets(counts, 5), drawn(counts, seed)
    pairs = united_pairs(assignment, targets, QUERIES)
    expected = 0
    for image, count in enumerate(counts):
        for query in range(QUERIES):
            votes = Counter(
                slot for layer in range(LAYERS) for slot in range(count) if assignment[layer, image, slot] == query
            )
            assert bool(pairs.matched[0, image, query]) == bool(votes)
            if votes:
                first = min(votes, key=lambda slot: (-votes[slot], slot))
                assert torch.equal(pairs.objects_cxcywh[image, query], targets.boxes_cxcywh[image, first])
                expected += 1
    assert pairs.count == expected
    assert torch.equal(pairs.query[-1], torch.arange(QUERIES).expand(len(counts), -1))
    assert pairs.matched.shape == (LAYERS, len(counts), QUERIES)
    assert len(pairs.after(2).query) == LAYERS - 2


@pytest.mark.parametrize("seed", range(4))
def test_the_union_is_transformers_own(seed: int) -> None:
    counts = [3, 5, 1]
    targets, assignment = make_targets(counts, 5), drawn(counts, seed)

    def indices(layer: int) -> list[tuple[Tensor, Tensor]]:
        return [
            (assignment[layer, image, :count], torch.arange(count)) for image, count in enumerate(counts)
        ]  # queries, objects

    loss = Deimv2Loss(Deimv2Config(num_labels=5))
    theirs = loss._get_dense_o2o_indices(indices(LAYERS - 1), [indices(layer) for layer in range(LAYERS - 1)])
    pairs = united_pairs(assignment, targets, QUERIES)
    for image, (queries, objects) in enumerate(theirs):
        assert pairs.matched[0, image].nonzero()[:, 0].tolist() == sorted(queries.tolist())
        for query, slot in zip(queries.tolist(), objects.tolist(), strict=True):
            votes = (assignment[:, image] == query).sum(0)
            assert votes[slot] == votes.max()
            if (votes == votes.max()).sum() == 1:  # its order of equal ones is not said
                assert torch.equal(pairs.objects_cxcywh[image, query], targets.boxes_cxcywh[image, slot])


def test_uniting_layers_of_which_one_learns_is_refused() -> None:
    with pytest.raises(QskdError, match="unites the matches of all layers: set auxiliary: true"):
        tiny.recipe(None, "detection.united_matches=true", "detection.auxiliary=false")


def test_own_pairs_are_the_assignment_and_count_all_objects() -> None:
    targets, assignment = make_targets([9, 2], 5), drawn([9, 2])
    pairs = own_pairs(assignment, targets)
    assert pairs.count == 11
    assert torch.equal(pairs.matched, assignment >= 0)
    assert torch.equal(pairs.query[pairs.matched], assignment[assignment >= 0])


@pytest.mark.parametrize("united", [True, False])
def test_the_field_decides_and_classes_keep_the_layers_own_matches(united: bool) -> None:
    own = {"family": "d_fine", "feature_levels": 2, "queries": 30}
    options = "detection.denoising_queries=0", f"detection.united_matches={united}".lower()
    training, other = (tiny.make_training(tiny.recipe(own, *options[:count]), None) for count in (2, 1))
    for each in (training, other):  # a fresh one's layers agree
        for seed in range(9):
            tiny.shake(each.module.student, seed)
    batch = tiny.batch_of(5, 3)
    mine, theirs = training.train_step(batch), other.train_step(batch)
    assert torch.equal(mine["class"], theirs["class"])
    assert torch.equal(mine["l1"], theirs["l1"]) is not united
    for name in ("fgl", "ddf_matched"):
        assert torch.isfinite(mine[name])
        assert torch.equal(mine[name], theirs[name]) is not united
