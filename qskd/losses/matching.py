"""Bipartite assignment of queries to objects: the costs on the device, one copy to the host, one copy back.

transformers matches layer by layer and computes the cost of every query with every object of the whole batch. Here only
an image's own queries meet its own objects, and all layers of all networks wait for the host once a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.config import DetectionLossConfig
from qskd.structures import Classification, OnItsWay, Targets

# logits [L, B, Q, K], boxes_cxcywh [L, B, Q, 4]; of several teachers also [Q, K] bool, which queries know nothing of a class
Prediction = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
_STRANGE = 1e6  # above every cost: an object comes to a query that knows nothing of its class where no other is left


def packed_positions(counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and slots [N] int64 of a batch's N objects, in order. Known on the host: copied without waiting."""
    image = np.repeat(np.arange(len(counts)), counts)
    slot = np.concatenate([np.arange(count) for count in counts]) if len(image) else image
    both = torch.from_numpy(np.stack([image, slot]).astype(np.int64)).to(device, non_blocking=True)
    return both[0], both[1]


def positions_of(targets: Targets) -> tuple[Tensor, Tensor]:
    """Image and slot [N] int64 of each object, on the targets' device."""
    return targets.packed or packed_positions(targets.counts, targets.valid.device)


def matching_costs(
    logits: Tensor,
    boxes_cxcywh: Tensor,
    targets: Targets,
    image: Tensor,
    slot: Tensor,
    config: DetectionLossConfig,
    classification: Classification = "focal",
) -> Tensor:
    """Cost of every object with every query of its own image: [L, B, Q, K], [L, B, Q, 4] -> [L, N, Q] float32.

    Focal class cost (gamma 2), L1 and -GIoU, each with its weight from `config`: the cost of transformers'
    `DeformableDetrHungarianMatcher`, of its `RTDetrHungarianMatcher` and `LwDetrHungarianMatcher`. With "softmax" the class
    cost is -probability, as in its `HungarianMatcher` (DETR). NaN and infinity become the largest float, so that such a pair is
    chosen last.
    """
    labels, objects = targets.labels[image, slot], targets.boxes_cxcywh[image, slot].float().unsqueeze(1)
    probability = logits.detach()[:, image, :, labels].float().transpose(0, 1).sigmoid()  # indexing puts N first
    boxes = boxes_cxcywh.detach()[:, image].float()
    # Losses with an alpha of their own leave the matching its usual one.
    alpha = 0.25 if classification in ("varifocal", "matchability", "iou_aware") else config.focal_alpha
    if classification == "softmax":
        by_class = -probability
    else:
        rest = 1 - probability
        negative = (1 - alpha) * probability**2 * (rest + 1e-8).log()
        positive = alpha * rest**2 * (probability + 1e-8).log()
        by_class = negative - positive
    # One box side at a time: a reduction over a last axis of 4 costs more than the three passes.
    left, top, right, bottom = (boxes - objects).abs().unbind(-1)
    distance = left + top + right + bottom
    overlap = giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(objects))
    cost: Tensor = config.class_cost * by_class + config.l1_cost * distance - config.giou_cost * overlap
    worst = torch.finfo(torch.float32).max
    return torch.nan_to_num(cost, nan=worst, posinf=worst, neginf=worst)


def all_costs(
    predictions: Sequence[Prediction],
    targets: Targets,
    config: DetectionLossConfig,
    classifications: Sequence[Classification],
) -> tuple[list[tuple[int, ...]], Tensor]:
    """The costs of all networks, one after the other, flat, and the sizes [L, N, Q] of each."""
    image, slot = positions_of(targets)
    costs = []
    for prediction, kind in zip(predictions, classifications, strict=True):
        logits, boxes_cxcywh, *strange = prediction
        cost = matching_costs(logits, boxes_cxcywh, targets, image, slot, config, kind)
        for deaf in strange:
            cost = cost.masked_fill(deaf[:, targets.labels[image, slot]].T, _STRANGE)
        costs.append(cost)
    return [tuple(cost.shape) for cost in costs], torch.cat([cost.flatten() for cost in costs])


def assign(
    predictions: Sequence[Prediction],
    targets: Targets,
    config: DetectionLossConfig,
    classifications: Sequence[Classification] = (),
) -> list[Tensor]:
    """Give each object the query that costs least in a one-to-one assignment, for each layer of each network. What the device
    can do before the answer is there is given to it between `begin_assigning` and the call of what that returns.

    predictions: (logits [L, B, Q, K], boxes_cxcywh [L, B, Q, 4]) of each network; L and Q may differ between them. Of several
    teachers in one (`qskd.distillation.shared.apart.prediction`) also which queries know nothing of which class.
    classifications: which class cost (`matching_costs`) the first networks have; "focal" for those it does not name.
    Returns for each network the query indices [L, B, M] int64 on the predictions' device; -1 in the padding, and for
    the objects left over when an image has more objects than queries.

    Equal to transformers' `DeformableDetrHungarianMatcher` at its alpha of 0.25. The costs' way to the host is the only point at
    which a training step waits for what the device has just been given: they depend on it, and are solved on the host.
    """
    return begin_assigning(predictions, targets, config, classifications)()


@torch.no_grad()
def begin_assigning(
    predictions: Sequence[Prediction],
    targets: Targets,
    config: DetectionLossConfig,
    classifications: Sequence[Classification] = (),
    costs_of: Callable[..., tuple[list[tuple[int, ...]], Tensor]] = all_costs,
) -> Callable[[], list[Tensor]]:
    """`assign` in two: the costs begin their way to the host; the function that is returned waits for them and gives the result.
    costs_of: `all_costs`, or what computes the same."""
    device, slots = targets.boxes_cxcywh.device, targets.valid.shape[1]
    shapes = [(len(each[0]), len(targets.counts), slots) for each in predictions]
    if not sum(targets.counts):
        return lambda: [torch.full(shape, -1, dtype=torch.int64, device=device) for shape in shapes]
    kinds = [*classifications, *["focal"] * (len(predictions) - len(classifications))]
    sizes, flat = costs_of(predictions, targets, config, kinds)
    coming = OnItsWay(flat)

    def finish() -> list[Tensor]:
        back = torch.from_numpy(_solved(coming.read().numpy(), sizes, shapes, targets.counts))
        back = (back.pin_memory() if device.type == "cuda" else back).to(device, non_blocking=True)
        parts = back.split([int(np.prod(shape)) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    return finish


def _solved(
    host: NDArray[np.float32],
    sizes: Sequence[tuple[int, ...]],
    shapes: Sequence[tuple[int, int, int]],
    counts: Sequence[int],
) -> NDArray[np.int64]:
    """The costs of all networks, one after the other, each of its size [L, N, Q] -> the queries chosen, as flat, each of its
    shape [L, B, M]."""
    chosen = np.full(sum(int(np.prod(shape)) for shape in shapes), -1, dtype=np.int64)
    read = write = 0
    for size, shape in zip(sizes, shapes, strict=True):
        tables = host[read : read + int(np.prod(size))].reshape(size)
        result = chosen[write : write + int(np.prod(shape))].reshape(shape)  # a view: written in place
        for layer, table in enumerate(tables):
            start = 0
            for index, count in enumerate(counts):
                if count:
                    # Transposed as transformers has it, so that ties between equal costs fall alike.
                    query, taken = linear_sum_assignment(table[start : start + count].T)
                    result[layer, index, taken] = query
                    start += count
        read, write = read + tables.size, write + result.size
    return chosen
