"""Which outputs of a quantised detector that chooses its queries by score can be compared between two runtimes.

A score that was rounded is the same as many others, and between PyTorch and a runtime, whose sums differ in their last bits, some
go to the next level: other queries are chosen, some of them sure of what they see, and no two networks of 8 bits agree in all of
them. A wrong graph differs in nearly all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qskd.errors import QskdError

SURE = 0.1  # of a class: a query that says less is of no use to anyone, and which of them are chosen is chance
SHARE = 0.9  # of the sure ones; of trained students of 30 queries 2 % were others
AMONG = f"of the {SHARE:.0%} that differ least of all queries with a class above {SURE:g}"
Outputs = Sequence[np.ndarray]  # of one image: logits [Q, K], boxes [Q, 4], probabilities [Q, K]


def sure_differences(first: Outputs, second: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """Which query of `second` is each one's likeness [Q], and of those pairs that are sure the largest differences [N, 3]: of
    logits, boxes, probabilities."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    features = [np.nan_to_num(np.concatenate(values[1:], -1)) for values in (first, second)]
    most = [np.nan_to_num(values[2].max(-1), nan=1.0) for values in (first, second)]  # NaN is sure
    # The sure ones come first: a likeness is not given away for two that say nothing.
    order = np.asarray(linear_sum_assignment(cdist(*features, "chebyshev") * np.maximum.outer(*most))[1])
    each = np.stack([np.abs(a - b[order]).max(-1) for a, b in zip(first, second, strict=True)], -1)
    return order, each[np.maximum(most[0], most[1][order]) > SURE]


def least_different(each: np.ndarray) -> np.ndarray:
    """Of [N, 3], as `sure_differences` gives them, the `SHARE` whose boxes and probabilities differ least."""
    return each[np.argsort(each[:, 1:].max(1))[: math.ceil(SHARE * len(each))]]


def require_some(compared: int, images: int, where: str) -> None:
    """QskdError where no query was sure of anything: any graph would pass."""
    if not compared:
        raise QskdError(
            where,
            f"no query has a class above {SURE:g} on {images} image(s): nothing to compare by",
            "a student of 8 bits that chooses its queries, on pictures that it knows",
            "--images with photographs of the task; one that has learnt little: train it further, or --no-onnx",
        )
