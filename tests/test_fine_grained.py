"""D-FINE's FGL and DDF against transformers' own, layer by layer, and against slow loops of the published equations."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import pytest
import torch
from reference import corners, make_targets, near, random_boxes, random_logits, slow_iou, transformers_labels
from torch import Tensor
from transformers import DFineConfig
from transformers.loss.loss_d_fine import DFineLoss
from transformers.models.d_fine.modeling_d_fine import weighting_function

from qskd.config import DetectionLossConfig
from qskd.losses.fine_grained import fine_grained_terms, fine_grained_weights
from qskd.losses.matching import assign
from qskd.losses.pairs import own_pairs
from qskd.structures import LossTerm, SideDistributions, Targets

LAYERS, QUERIES, CLASSES = 3, 8, 5
CONFIG = DetectionLossConfig()
HF = DFineConfig(num_labels=CLASSES)
BINS = HF.max_num_bins + 1
COUNTS = [[3, 0, 5], [1], [12, 2], [0, 0]]


class Case:
    """Random predictions of a decoder for random objects, and whose query is whose in each layer."""

    def __init__(self, counts: list[int], near_boxes: bool = True) -> None:
        batch = len(counts)
        self.targets = make_targets(counts, CLASSES)
        self.logits = random_logits(LAYERS, batch, QUERIES, CLASSES)
        self.boxes = torch.stack([near(self.targets, QUERIES, seed=layer) for layer in range(LAYERS)])
        self.leaves = [random_logits(batch, QUERIES, 4 * BINS, seed=9 + i).requires_grad_() for i in range(LAYERS)]
        about = near(self.targets, QUERIES, seed=7) if near_boxes else random_boxes(batch, QUERIES, seed=7) * 0.2
        values = weighting_function(HF.max_num_bins, torch.tensor([HF.up]), torch.tensor([HF.reg_scale]))
        self.sides = SideDistributions(tuple(self.leaves), about, values, torch.tensor([HF.reg_scale]))
        (self.assignment,) = assign([(self.logits, self.boxes)], self.targets, CONFIG, ["varifocal"])

    def terms(self, config: DetectionLossConfig = CONFIG) -> dict[str, LossTerm]:
        return fine_grained_terms(self.sides, self.logits, self.boxes, own_pairs(self.assignment, self.targets), config)


def value(terms: dict[str, LossTerm], *names: str) -> Tensor:
    return sum((terms[name].total / terms[name].own_count.clamp(min=1) for name in names), torch.zeros(()))


@pytest.mark.parametrize("counts", COUNTS)
def test_each_layer_equals_transformers_given_its_own_boxes_values_and_gradients(counts: list[int]) -> None:
    """FGL of all layers, the last too; DDF of the others."""
    ours, other = Case(counts), Case(counts)
    loss = DFineLoss(HF)
    fgl, ddf = torch.zeros(()), torch.zeros(())
    for layer in range(LAYERS):
        indices = []
        for row in other.assignment[layer]:
            has = (row >= 0).nonzero()[:, 0]
            indices.append((row[has], has))
        outputs = {
            "logits": other.logits[layer],
            "pred_boxes": other.boxes[layer],
            "pred_corners": other.leaves[layer],
            "ref_points": other.sides.about_cxcywh,
            "teacher_corners": other.leaves[-1],
            "teacher_logits": other.logits[-1].clone(),
        }
        said = loss.loss_local(outputs, transformers_labels(other.targets), indices, max(sum(counts), 1))
        fgl, ddf = fgl + said["loss_fgl"], ddf + said["loss_ddf"]
    terms = ours.terms()
    torch.testing.assert_close(value(terms, "fgl"), fgl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value(terms, "ddf_matched", "ddf_others"), ddf, rtol=1e-4, atol=1e-6)
    weights = fine_grained_weights(CONFIG)
    assert weights == {"fgl": HF.weight_loss_fgl, "ddf_matched": HF.weight_loss_ddf, "ddf_others": HF.weight_loss_ddf}
    sum((weight * value(terms, name) for name, weight in weights.items()), torch.zeros(())).backward()
    (HF.weight_loss_fgl * fgl + HF.weight_loss_ddf * ddf).backward()
    for mine, theirs in zip(ours.leaves, other.leaves, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-7)


def softmax(numbers: list[float]) -> list[float]:
    top = max(numbers)
    parts = [exp(number - top) for number in numbers]
    return [part / sum(parts) for part in parts]


def slow_fgl(case: Case) -> float:
    """Over all layers: IoU * (share of the left bin * CE(left) + share of the right * CE(right))."""
    values, scale, total = case.sides.values.tolist(), HF.reg_scale, 0.0
    for layer in range(LAYERS):
        for image, count in enumerate(case.targets.counts):
            for slot in range(count):
                query = int(case.assignment[layer, image, slot])
                if query < 0:
                    continue
                wanted = corners(case.targets.boxes_cxcywh[image, slot].tolist())
                overlap = slow_iou(corners(case.boxes[layer, image, query].tolist()), wanted)
                x, y, w, h = case.sides.about_cxcywh[image, query].tolist()
                away = ((x - wanted[0]) / w, (y - wanted[1]) / h, (wanted[2] - x) / w, (wanted[3] - y) / h)
                likely = case.leaves[layer][image, query].detach().view(4, BINS).tolist()
                for side in range(4):
                    place, chance = scale * away[side] - scale / 2, softmax(likely[side])
                    if place <= values[0] or place >= values[-1]:
                        total -= overlap * log(chance[0 if place <= values[0] else -1])
                        continue
                    left = max(bin_ for bin_ in range(BINS - 1) if values[bin_] <= place)
                    right_share = (place - values[left]) / (values[left + 1] - values[left])
                    total -= overlap * ((1 - right_share) * log(chance[left]) + right_share * log(chance[left + 1]))
    return total


def slow_ddf(case: Case) -> float:
    """The mean over matched and that over unmatched sides, weighted by the roots of their numbers; T = 5."""
    total, last = 0.0, case.leaves[-1].detach().view(-1, QUERIES, 4, BINS) / 5
    for layer in range(LAYERS - 1):
        found, others = [], []
        for image, count in enumerate(case.targets.counts):
            owner = {int(case.assignment[layer, image, slot]): slot for slot in range(count)}
            for query in range(QUERIES):
                weight = float(case.logits[-1, image, query].sigmoid().max())
                if query in owner:
                    wanted = corners(case.targets.boxes_cxcywh[image, owner[query]].tolist())
                    weight = slow_iou(corners(case.boxes[layer, image, query].tolist()), wanted)
                for side in range(4):
                    goal = softmax(last[image, query, side].tolist())
                    guess = softmax((case.leaves[layer].detach()[image, query].view(4, BINS)[side] / 5).tolist())
                    apart = sum(g * log(g / p) for g, p in zip(goal, guess, strict=True))
                    (found if query in owner else others).append(25 * weight * apart)
        roots = len(found) ** 0.5, len(others) ** 0.5
        means = [sum(part) / len(part) if part else 0.0 for part in (found, others)]
        total += (roots[0] * means[0] + roots[1] * means[1]) / sum(roots)
    return total


@pytest.mark.parametrize("near_boxes", [True, False])  # far ones have sides beyond the last bin
def test_both_equal_a_slow_loop_of_the_published_equations(near_boxes: bool) -> None:
    case = Case([2, 0, 4], near_boxes)
    terms = case.terms()
    assert terms["fgl"].total.item() == pytest.approx(slow_fgl(case), rel=1e-4)
    assert terms["fgl"].count == 6
    assert value(terms, "ddf_matched", "ddf_others").item() == pytest.approx(slow_ddf(case), rel=1e-4)


def test_sums_and_counts_of_two_shares_are_those_of_the_whole() -> None:
    whole = Case([2, 0, 4, 1])

    def share(images: slice) -> dict[str, LossTerm]:
        case = Case([2, 0, 4, 1])
        own = case.targets
        case.targets = Targets(
            own.boxes_cxcywh[images], own.labels[images], own.valid[images], own.image_ids[images], own.counts[images]
        )
        case.logits, case.boxes, case.assignment = (
            part[:, images] for part in (case.logits, case.boxes, case.assignment)
        )
        logits = tuple(layer[images] for layer in case.leaves)
        case.sides = replace(case.sides, logits=logits, about_cxcywh=case.sides.about_cxcywh[images])
        return case.terms()

    parts = [share(slice(0, 1)), share(slice(1, 4))]
    for name, term in whole.terms().items():
        torch.testing.assert_close(parts[0][name].total + parts[1][name].total, term.total)
        assert parts[0][name].count + parts[1][name].count == term.count
        if term.rest is not None:
            assert parts[0][name].rest + parts[1][name].rest == term.rest  # type: ignore[operator]


def test_without_auxiliary_losses_the_last_layer_alone_has_its_distributions_taught() -> None:
    case, config = Case([2, 0, 4]), DetectionLossConfig(auxiliary=False)
    terms = case.terms(config)
    assert terms.keys() == fine_grained_weights(config).keys() == {"fgl"}
    terms["fgl"].total.backward()
    assert [leaf.grad is not None for leaf in case.leaves] == [False, False, True]
