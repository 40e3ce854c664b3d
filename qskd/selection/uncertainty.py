"""Images of which the teacher says much and is in two minds about it, balanced over the classes that it sees there.

The selection of Explicit and Implicit Knowledge Distillation via Unlabeled Data (arXiv 2302.08771), of which only the abstract
was at hand, in a form for detection that is ours (docs/select.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

CONFIDENT = 0.3  # score of a query that counts


def class_masses(logits: NDArray[np.floating]) -> dict[int, float]:
    """logits [Q, K] of one image, sigmoid's -> by class, the sum of p * (1 + H / log K) over the queries whose most likely class it
    is, with a probability p of at least `CONFIDENT`. H: the entropy of a query's probabilities over their sum."""
    probabilities = expit(logits.astype(np.float64))
    best = probabilities.max(-1)
    kept = best >= CONFIDENT
    probabilities, best = probabilities[kept], best[kept]
    shares = probabilities / probabilities.sum(-1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(-1)
    worth = best * (1 + entropy / np.log(max(2, logits.shape[-1])))
    found: dict[int, float] = {}
    for label, value in zip(probabilities.argmax(-1).tolist(), worth.tolist(), strict=True):
        found[label] = found.get(label, 0.0) + value
    return found


def choose_balanced(masses: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    """Numbers of images, in the order in which they are chosen: each time the class of which least is chosen yet, and of the images
    that are left the one with most of it. Images without any class come last, in their order."""
    waiting: dict[int, list[int]] = {}
    for number, image in enumerate(masses):
        for label in image:
            waiting.setdefault(label, []).append(number)
    for label, numbers in waiting.items():  # the best is at the end
        numbers.sort(key=lambda number: (masses[number][label], -number))
    taken = dict.fromkeys(sorted(waiting), 0.0)
    chosen: dict[int, None] = {}
    while len(chosen) < budget and taken:
        label = min(taken, key=lambda one: taken[one])
        numbers = waiting[label]
        while numbers and numbers[-1] in chosen:
            numbers.pop()
        if not numbers:
            del taken[label]
            continue
        number = numbers.pop()
        chosen[number] = None
        for other, mass in masses[number].items():
            if other in taken:
                taken[other] += mass
    rest = (number for number, image in enumerate(masses) if not image)
    return [*chosen, *rest][:budget]
