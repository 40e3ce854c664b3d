"""The detection loss of every family, all decoder layers in one pass, on a matching made elsewhere.

Equal on one worker to transformers' `DeformableDetrForObjectDetectionLoss` (focal), `RTDetrForObjectDetectionLoss`
(varifocal; with `qskd.losses.denoising`), `Deimv2Loss` (matchability; likewise), `LwDetrForObjectDetectionLoss`
(iou_aware; with `qskd.training.query_groups`) and `ForObjectDetectionLoss` (softmax). Unlike it, sums and counts stay apart, so
that counts can be averaged over workers, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou, iou
from qskd.config import DetectionLossConfig
from qskd.errors import QskdError
from qskd.losses.pairs import Pairs, own_pairs
from qskd.losses.unsure import left_out
from qskd.structures import Classification, LossTerm, Targets

PARTS = ("class", "l1", "giou")
VARIFOCAL_ALPHA = 0.75  # of RT-DETR, RT-DETRv2 and D-FINE in transformers (focal_loss_alpha); gamma is 2
MATCHABILITY_GAMMA = 1.5  # of DEIM and DEIMv2 (configs/base/deimv2.yml); focal_loss_gamma in transformers, there 2
IOU_AWARE_ALPHA = 0.25  # of LW-DETR in transformers (focal_alpha); gamma is 2
IOU_AWARE_FLOOR = 0.01  # a labelled entry's target is at least this
NO_OBJECT_WEIGHT = 0.1  # of DETR (Carion et al., ECCV 2020); transformers' eos_coefficient


def term_names(supervised: int, early: int = 0) -> list[tuple[str, str, str]]:
    """Names of the class, L1 and GIoU terms of the `early` predictions and of the `supervised` decoder layers: the last
    layer's are without a number, the others' numbered from 0."""
    last: tuple[str, str, str] = PARTS
    suffixes = [*(f"early_{number}" for number in range(early)), *(str(layer) for layer in range(supervised - 1))]
    return [*((f"class_{suffix}", f"l1_{suffix}", f"giou_{suffix}") for suffix in suffixes), last]


def detection_weights(num_layers: int, config: DetectionLossConfig, early: int = 0) -> dict[str, float]:
    """The weight of every term that `detection_terms` gives for a decoder of `num_layers` layers."""
    values = (config.class_weight, config.l1_weight, config.giou_weight)
    names = term_names(num_layers if config.auxiliary else 1, early)
    return {name: value for row in names for name, value in zip(row, values, strict=True)}


def unlabelled_focal(logits: Tensor) -> Tensor:
    """Focal loss, gamma 2, of a logit whose target is 0, without alpha. The same of -logit is that of a target of 1."""
    return logits.sigmoid() ** 2 * F.softplus(logits)


def _sum_of(values: Tensor, unmatched: Tensor) -> Tensor:
    """[L, B, M] -> [L], of the matched ones."""
    return values.masked_fill(unmatched, 0.0).flatten(1).sum(1)


def _summed(background: Tensor, unknown: Tensor | None) -> Tensor:
    """[L, B, Q, K] of all queries as if unlabelled -> [L]. unknown: [L, B, Q], the queries that are left out."""
    if unknown is not None:
        background = background.masked_fill(unknown.unsqueeze(-1), 0.0)
    return background.flatten(1).sum(1)


def _focal(scores: Tensor, own: Tensor, unmatched: Tensor, alpha: float, unknown: Tensor | None) -> Tensor:
    """Sigmoid focal loss (Lin et al., ICCV 2017), gamma 2, over all queries and classes: [L]."""
    # Every entry as if unlabelled, then the few labelled ones put right: a third of the passes over [L, B, Q, K].
    correction = alpha * unlabelled_focal(-own) - (1 - alpha) * unlabelled_focal(own)
    class_sum = (1 - alpha) * _summed(unlabelled_focal(scores), unknown)
    return class_sum + _sum_of(correction, unmatched)


def _varifocal(scores: Tensor, own: Tensor, unmatched: Tensor, quality: Tensor, unknown: Tensor | None) -> Tensor:
    """Varifocal loss (Zhang et al., CVPR 2021) as RT-DETR has it, over all queries and classes: [L].

    A labelled entry's target and weight are the box's IoU q; any other's weight is alpha * p^2. Weights have no gradient.
    """

    def unlabelled(logits: Tensor) -> Tensor:
        return VARIFOCAL_ALPHA * logits.detach().sigmoid() ** 2 * F.softplus(logits)

    correction = quality * (F.softplus(own) - quality * own) - unlabelled(own)
    return _summed(unlabelled(scores), unknown) + _sum_of(correction, unmatched)


def _matchability(scores: Tensor, own: Tensor, unmatched: Tensor, overlap: Tensor, unknown: Tensor | None) -> Tensor:
    """DEIM's matchability-aware loss (Huang et al., CVPR 2025), over all queries and classes: [L].

    A labelled entry's target is IoU^gamma, with weight 1; any other is pushed down by p^gamma. Neither has a gradient.
    """

    def unlabelled(logits: Tensor) -> Tensor:
        return logits.detach().sigmoid() ** MATCHABILITY_GAMMA * F.softplus(logits)

    goal = overlap**MATCHABILITY_GAMMA
    correction = F.softplus(own) - goal * own - unlabelled(own)
    return _summed(unlabelled(scores), unknown) + _sum_of(correction, unmatched)


def _iou_aware(scores: Tensor, own: Tensor, unmatched: Tensor, overlap: Tensor, unknown: Tensor | None) -> Tensor:
    """LW-DETR's IoU-aware cross-entropy (Chen et al., 2024; Cai et al., Align-DETR, 2023), over all queries and classes: [L].

    A labelled entry's target is t = p^alpha * IoU^(1 - alpha), without gradient; any other is pushed down by p^2.
    """
    goal = own.detach().sigmoid() ** IOU_AWARE_ALPHA * overlap ** (1 - IOU_AWARE_ALPHA)
    goal = goal.clamp(min=IOU_AWARE_FLOOR)
    labelled = goal * F.softplus(-own) + (1 - goal) * F.softplus(own)
    correction = labelled - unlabelled_focal(own)
    return _summed(unlabelled_focal(scores), unknown) + _sum_of(correction, unmatched)


_BY_OVERLAP = {"varifocal": _varifocal, "matchability": _matchability, "iou_aware": _iou_aware}


def _cross_entropy(
    own: Tensor, matched: Tensor, query: Tensor, no_object: Tensor, unknown: Tensor | None
) -> tuple[Tensor, Tensor]:
    """DETR's cross-entropy: [L] sums of weight * -log p, and [L] sums of weights to divide by.

    own: the logit of the object's class, whose sigmoid is its probability in the softmax. no_object [L, B, Q]: log p_none.
    """
    spare = torch.zeros(*no_object.shape[:-1], no_object.shape[-1] + 1, dtype=torch.bool, device=own.device)
    taken = spare.scatter(-1, torch.where(matched, query, no_object.shape[-1]), True)[..., :-1]
    counted = taken if unknown is None else taken | unknown
    empty = torch.where(counted, 0.0, -no_object).flatten(1).sum(1)
    objects = torch.where(matched, F.softplus(-own), 0.0).flatten(1).sum(1)
    weight = taken.flatten(1).sum(1) + NO_OBJECT_WEIGHT * (~counted).flatten(1).sum(1)
    return objects + NO_OBJECT_WEIGHT * empty, weight


def _box_sums(boxes_cxcywh: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[L, B, Q, 4] -> the pairs' boxes and objects, x0 y0 x1 y1, and the sums [L] of L1 and 1 - GIoU."""
    mine = boxes_cxcywh.gather(2, pairs.query.unsqueeze(-1).expand(-1, -1, -1, 4))  # [L, B, P, 4]
    mine_xyxy, theirs_xyxy = cxcywh_to_xyxy(mine), cxcywh_to_xyxy(pairs.objects_cxcywh)
    distance = (mine - pairs.objects_cxcywh).abs().sum(-1)
    apart = 1 - giou(mine_xyxy, theirs_xyxy)
    return mine_xyxy, theirs_xyxy, _sum_of(distance, ~pairs.matched), _sum_of(apart, ~pairs.matched)


def detection_terms(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    targets: Targets,
    assignment: Tensor,
    config: DetectionLossConfig,
    classification: Classification = "focal",
    early: int = 0,
    no_object: Tensor | None = None,
    united: Pairs | None = None,
) -> dict[str, LossTerm]:
    """The class term that `classification` names over all queries and classes, L1 and 1 - GIoU over matched boxes.

    logits: [E + L, B, Q, K]; boxes_cxcywh: [E + L, B, Q, 4] in 0..1; assignment: [E + L, B, M] query of each object, -1 =
    none; the first E = `early` of them are predictions before the decoder's layers. "focal" has alpha of `config`;
    "softmax" needs `no_object` [L, B, Q] and E = 0. united: the pairs of all layers together
    (`qskd.losses.pairs`), which the box terms then have, and count; it needs `config.auxiliary`.
    Returns the terms "class", "l1", "giou" of the last layer, "class_early_0", ... and, when `config.auxiliary`, "class_0",
    ... of the other layers; each counts the batch's boxes, softmax's class terms their weights. Without any object the box
    terms are 0, finite, and still attached to the graph. Of images without labels, queries that show what the teacher half sees
    are left out of the class terms (`qskd.losses.unsure`).
    """
    if not config.auxiliary:
        kept = [*range(early), len(logits) - 1]
        logits, boxes_cxcywh, assignment = logits[kept], boxes_cxcywh[kept], assignment[kept]
        no_object = None if no_object is None else no_object[kept]
    layers, _, _, classes = logits.shape
    scores, boxes = logits.float(), boxes_cxcywh.float()
    matched, query = (assignment >= 0) & targets.valid, assignment.clamp(min=0)
    unmatched = ~matched

    pairs = own_pairs(assignment, targets)
    mine_xyxy, theirs_xyxy, l1_sum, giou_sum = _box_sums(boxes, pairs)
    count = box_count = pairs.count
    by_object = 1.0
    if united is not None:
        (_, _, l1_sum, giou_sum), box_count = _box_sums(boxes, united), united.count
        by_object = 0.0

    unknown = left_out(boxes, assignment, targets)
    own = scores.flatten(2).gather(2, query * classes + targets.labels)  # [L, B, M] logit of the object's class
    class_counts, class_floor, class_by_object = [count] * layers, 1.0, 1.0
    if classification == "softmax":
        if no_object is None:
            raise ValueError("cross-entropy needs the log-probability of no object")
        class_sum, weight = _cross_entropy(own, matched, query, no_object.float(), unknown)
        class_counts, class_floor, class_by_object = list(weight.unbind()), NO_OBJECT_WEIGHT, 0.0
    elif classification in _BY_OVERLAP:
        class_sum = _BY_OVERLAP[classification](scores, own, unmatched, iou(mine_xyxy.detach(), theirs_xyxy), unknown)
    else:
        class_sum = _focal(scores, own, unmatched, config.focal_alpha, unknown)

    terms: dict[str, LossTerm] = {}
    sums = zip(class_sum.unbind(), class_counts, l1_sum.unbind(), giou_sum.unbind(), strict=True)
    for names, (by_class, class_count, l1, by_giou) in zip(term_names(layers - early, early), sums, strict=True):
        terms[names[0]] = LossTerm(by_class, class_count, class_floor, objects=class_by_object)
        terms[names[1]] = LossTerm(l1, box_count, objects=by_object)
        terms[names[2]] = LossTerm(by_giou, box_count, objects=by_object)
    return terms


def combine(
    terms: Mapping[str, LossTerm], weights: Mapping[str, float], mean_counts: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The scalar to minimise: sum over terms of weight * total / max(count, floor).

    mean_counts: the counts averaged over workers, by name; a term not in it uses its own count, which is right on one
    worker. A term without a weight is an error, so that none can be forgotten in silence.
    """
    return combine_with_values(terms, weights, mean_counts)[0]


def combine_with_values(
    terms: Mapping[str, LossTerm], weights: Mapping[str, float], mean_counts: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `combine` gives, and each term's own value, without weight or gradient."""
    missing = sorted(set(terms) - set(weights))
    if missing or not terms:
        raise QskdError(
            "loss",
            f"terms without a weight: {', '.join(missing)}" if missing else "no terms at all",
            "one weight a term",
        )
    totals = torch.stack([term.total for term in terms.values()])
    counts = torch.stack([(mean_counts or {}).get(name, term.own_count) for name, term in terms.items()])
    floors_and_weights = [[term.floor for term in terms.values()], [weights[name] for name in terms]]
    floors, factors = torch.tensor(floors_and_weights).to(totals.device, non_blocking=True)
    divisors = torch.maximum(counts, floors)
    values = (totals.detach() / divisors).unbind()
    return (factors * totals / divisors).sum(), dict(zip(terms, values, strict=True))
