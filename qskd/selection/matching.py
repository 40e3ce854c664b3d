"""Few images that teach what all of them do: weights above 0, such that their gradients add up to the mean of all.

Orthogonal matching pursuit with non-negative least squares, as GradMatch has it (Killamsetty et al., ICML 2021). Importance-Aware
Adaptive Dataset Distillation (arXiv 2401.15863) weighs network parameters; these weights are of images (docs/select.md).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

# Images are matched in parts of a seeded shuffle, each choosing so many at most: the cost then grows with their number and not with
# its cube, and a part's images stay fewer than a gradient's numbers, beyond which any mean is matched exactly.
CHOSEN_OF_A_PART = 64
# Of the sum of the squared weights, over the mean squared length of a gradient: keeps few images from carrying all.
RIDGE = 0.1
# Of the squared difference of the weights' sum from 1, over the same. A batch is a mean, whatever the weights: that of few long
# gradients, of weights that sum to less, would be too long.
WHOLE = 10.0

Gradients = NDArray[np.floating]


def pursue(gradients: Gradients, budget: int) -> NDArray[np.float64]:
    """gradients [n, D] -> weights [n], at most `budget` of them above 0, that make

        |G^T w - mean|^2 + m (RIDGE |w|^2 + WHOLE (sum w - 1)^2),   m the mean of |g|^2

    small: the image whose gradient goes best with what is left joins, then all that have joined are weighed anew. Fewer than
    `budget` where no other would help; an image without a gradient never does."""
    values = np.asarray(gradients, np.float64)
    length = float((values**2).sum(1).mean())
    weights, ridge = np.zeros(len(values)), RIDGE * length
    if not length:
        return weights
    idle = np.flatnonzero(~values.any(1))
    values = np.concatenate([values, np.full((len(values), 1), np.sqrt(WHOLE * length))], 1)
    goal = values.mean(0)
    chosen = list[int]()
    for _ in range(4 * budget):
        if len(chosen) >= budget:
            break
        gain = values @ (goal - weights @ values)
        gain[chosen] = gain[idle] = -np.inf
        best = int(gain.argmax())
        if gain[best] <= 1e-12 * ridge:
            break
        chosen.append(best)
        known = values[chosen].T
        system = np.concatenate([known, np.sqrt(ridge) * np.eye(len(chosen))])
        found, _ = nnls(system, np.concatenate([goal, np.zeros(len(chosen))]))
        weights[:] = 0
        weights[chosen] = found
        chosen = [number for number, weight in zip(chosen, found.tolist(), strict=True) if weight > 0]
    return weights


def match(gradients: Gradients, budget: int, seed: int) -> NDArray[np.float64]:
    """gradients [n, D] -> weights [n], at most `budget` above 0; each part's sum to its share of the images."""
    count = len(gradients)
    parts = min(count, -(-budget // CHOSEN_OF_A_PART))
    order = shuffled(count, seed)
    weights = np.zeros(count)
    for part in range(parts):
        first, stop = count * part // parts, count * (part + 1) // parts
        own = np.sort(order[first:stop])
        found = pursue(gradients[own], budget * (part + 1) // parts - budget * part // parts)
        if found.sum() > 0:
            weights[own] = found * (len(own) / count / found.sum())
    return weights


def shuffled(count: int, seed: int) -> NDArray[np.int64]:
    """A seeded permutation of 0..count-1, by NumPy's raw bits, which stay the same between its releases."""
    digest = hashlib.blake2b(repr(("select", seed)).encode(), digest_size=16).digest()
    return np.argsort(np.random.PCG64(int.from_bytes(digest, "little")).random_raw(count), kind="stable")


def mismatch(gradients: Gradients, weights: NDArray[np.floating]) -> float:
    """|weighted mean - mean of all| / |mean of all|. weights: [n], scaled to a sum of 1."""
    goal, there = gradients.mean(0, dtype=np.float64), np.flatnonzero(weights)  # no copy of all of them
    own = np.asarray(weights, np.float64)[there] @ gradients[there] / weights.sum()
    return float(np.linalg.norm(own - goal) / max(float(np.linalg.norm(goal)), 1e-300))
