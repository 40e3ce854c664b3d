"""The detection loss of Conditional and Deformable DETR, all decoder layers in one pass, on a matching made elsewhere.

Equal to transformers' `DeformableDetrForObjectDetectionLoss` on one worker. Unlike it, sums and box counts stay apart,
so that the number of boxes can be averaged over workers, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.config import DetectionLossConfig
from qskd.errors import QskdError
from qskd.structures import LossTerm, Targets

_NAMES = ("class", "l1", "giou")


def term_names(num_layers: int, config: DetectionLossConfig) -> list[tuple[str, str, str]]:
    """Names of the class, L1 and GIoU terms of each supervised layer: the auxiliary layers' are numbered from 0, the last
    layer's are not."""
    last: tuple[str, str, str] = _NAMES
    auxiliary = range(num_layers - 1) if config.auxiliary else ()
    return [*((f"class_{layer}", f"l1_{layer}", f"giou_{layer}") for layer in auxiliary), last]


def detection_weights(num_layers: int, config: DetectionLossConfig) -> dict[str, float]:
    """The weight of every term that `detection_terms` gives for a decoder of `num_layers` layers."""
    values = (config.class_weight, config.l1_weight, config.giou_weight)
    return {name: value for names in term_names(num_layers, config) for name, value in zip(names, values, strict=True)}


def unlabelled_focal(logits: Tensor) -> Tensor:
    """Focal loss, gamma 2, of a logit whose target is 0, without alpha. The same of -logit is that of a target of 1."""
    return logits.sigmoid() ** 2 * F.softplus(logits)


def detection_terms(
    logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, assignment: Tensor, config: DetectionLossConfig
) -> dict[str, LossTerm]:
    """Sigmoid focal loss (alpha of `config`, gamma 2) over all queries and classes, L1 and 1 - GIoU over matched boxes.

    logits: [L, B, Q, K]; boxes_cxcywh: [L, B, Q, 4] in 0..1; assignment: [L, B, M] query of each object, -1 = none.
    Returns the terms "class", "l1", "giou" of the last layer and "class_0", ... of the others when `config.auxiliary`;
    each counts the batch's boxes. Without any object the box terms are 0, finite, and still attached to the graph.
    """
    if not config.auxiliary:
        logits, boxes_cxcywh, assignment = logits[-1:], boxes_cxcywh[-1:], assignment[-1:]
    layers, _, _, classes = logits.shape
    scores, boxes = logits.float(), boxes_cxcywh.float()
    matched, query = (assignment >= 0) & targets.valid, assignment.clamp(min=0)

    own = scores.flatten(2).gather(2, query * classes + targets.labels)  # [L, B, M] logit of the object's class
    alpha = config.focal_alpha
    # Every entry as if unlabelled, then the few labelled ones put right: a third of the passes over [L, B, Q, K].
    correction = alpha * unlabelled_focal(-own) - (1 - alpha) * unlabelled_focal(own)
    class_sum = (1 - alpha) * unlabelled_focal(scores).flatten(1).sum(1)
    class_sum = class_sum + torch.where(matched, correction, 0.0).flatten(1).sum(1)

    mine = boxes.gather(2, query.unsqueeze(-1).expand(-1, -1, -1, 4))  # [L, B, M, 4]
    theirs = targets.boxes_cxcywh.float()
    distance = (mine - theirs).abs().sum(-1)
    l1_sum = torch.where(matched, distance, 0.0).flatten(1).sum(1)
    overlap = giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs))
    giou_sum = torch.where(matched, 1 - overlap, 0.0).flatten(1).sum(1)

    count = targets.valid.sum().float()
    sums = zip(class_sum.unbind(), l1_sum.unbind(), giou_sum.unbind(), strict=True)
    names = term_names(layers, config)
    return {
        name: LossTerm(total, count)
        for row, totals in zip(names, sums, strict=True)
        for name, total in zip(row, totals, strict=True)
    }


def combine(
    terms: Mapping[str, LossTerm], weights: Mapping[str, float], mean_counts: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The scalar to minimise: sum over terms of weight * total / max(count, floor).

    mean_counts: the counts averaged over workers, by name; a term not in it uses its own count, which is right on one
    worker. A term without a weight is an error, so that none can be forgotten in silence.
    """
    missing = sorted(set(terms) - set(weights))
    if missing or not terms:
        raise QskdError(
            "loss",
            f"terms without a weight: {', '.join(missing)}" if missing else "no terms at all",
            "one weight a term",
        )
    totals = torch.stack([term.total for term in terms.values()])
    counts = torch.stack([(mean_counts or {}).get(name, term.count) for name, term in terms.items()])
    floors_and_weights = [[term.floor for term in terms.values()], [weights[name] for name in terms]]
    floors, factors = torch.tensor(floors_and_weights).to(totals.device, non_blocking=True)
    return (factors * totals / torch.maximum(counts, floors)).sum()
