"""Parity of a quantised detector that chooses its queries by score.

A score that was rounded is the same as many others, and between PyTorch and a runtime, whose sums differ in their last bits, some
go to the next level: other queries are chosen, some of them sure of what they see, and no two networks of 8 bits agree in all of
them. A wrong graph differs in nearly all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from qskd.deploy.export import Parity, outputs_of_both, probabilities_of
from qskd.detectors import Detector
from qskd.errors import QskdError

SURE = 0.1  # of a class: a query that says less is of no use to anyone, and which of them are chosen is chance
SHARE = 0.9  # of the sure ones; of trained students of 30 queries 2 % were others
AMONG = f"of the {SHARE:.0%} that differ least of all queries with a class above {SURE:g}"


def check_sure(detector: Detector, session: Any, name: str, batches: Sequence[tuple[str, Tensor]]) -> Parity:
    """PyTorch against onnxruntime on batches of pixel_values [B, 3, S, S]: the largest differences of the `SHARE` of all sure
    queries that differ least. compared: how many of those there are; 0 leaves nothing to compare by."""
    rows, images, moved = [], 0, 0
    for _, pixels in batches:
        mine, theirs = outputs_of_both(detector, session, pixels)
        images += len(pixels)
        for first, second in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True):
            order, found = _differences(first, second, detector.family)
            moved += int((order != np.arange(len(order))).sum())
            rows.append(found)
    each = np.concatenate(rows)  # [N, 3]: logits, probabilities, boxes
    kept = each[np.argsort(each[:, 1:].max(1))[: math.ceil(SHARE * len(each))]]
    logits, probabilities, boxes = kept.max(0).tolist() if len(kept) else (0.0, 0.0, 0.0)
    return Parity(name, images, logits, probabilities, boxes, moved, len(kept))


def _differences(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], family: str
) -> tuple[np.ndarray, np.ndarray]:
    """first, second: logits [Q, K] and boxes [Q, 4] of one image. Each query's likeness, and [N, 3] of the sure ones."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    (logits, boxes), (other_logits, other_boxes) = first, second
    said, other_said = probabilities_of(logits, family), probabilities_of(other_logits, family)
    features = [np.nan_to_num(np.concatenate(pair, -1)) for pair in ((boxes, said), (other_boxes, other_said))]
    # The sure ones come first: a likeness is not given away for two that say nothing.
    weight = np.maximum.outer(np.nan_to_num(said.max(-1)), np.nan_to_num(other_said.max(-1)))
    order = np.asarray(linear_sum_assignment(cdist(*features, "chebyshev") * weight)[1])
    pairs = ((logits, other_logits), (said, other_said), (boxes, other_boxes))
    each = np.stack([np.abs(a - b[order]).max(-1) for a, b in pairs], -1)
    sure = ~(np.maximum(said.max(-1), other_said.max(-1)[order]) <= SURE)  # NaN is sure
    return order, each[sure]


def require_some(found: Sequence[Parity], where: str) -> None:
    """QskdError where no query was sure of anything: any graph would pass."""
    if not sum(parity.compared for parity in found):
        raise QskdError(
            where,
            f"no query has a class above {SURE:g} on {sum(parity.batch for parity in found)} image(s): nothing to compare by",
            "a student of 8 bits that chooses its queries, on pictures that it knows",
            "--images with photographs of the task; one that has learnt little: train it further, or --no-onnx",
        )
