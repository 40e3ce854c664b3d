"""Few images whose objects are distributed over the classes as those of all images are: exemplars of a dataset.

CL-DETR's rule (arXiv 2304.03110): image after image, each time the one that makes sum_c p_D(c) log p_E(c) largest, where p_D is the
distribution of all objects and p_E that of the chosen images'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Objects that each class is thought to have before any is chosen: log 0 would make all first images equally bad.
BEGUN = 0.01


def likeness(everything: NDArray[Any], chosen: NDArray[Any]) -> float:
    """Objects of each class [K] -> sum_c p_D(c) log p_E(c), over the classes that there are. At most minus p_D's entropy."""
    there = everything > 0
    goal, own = everything[there] / everything.sum(), (chosen[there] + BEGUN) / (chosen[there] + BEGUN).sum()
    return float((goal * np.log(own)).sum())


def choose_alike(objects: Sequence[Mapping[int, int]], budget: int) -> tuple[list[int], list[float]]:
    """objects: of each image, how many of each class. Numbers of images in the order in which they are chosen, and `likeness` after
    each; of equals the first. Images without objects come last."""
    entries = [
        (number, label, count) for number, image in enumerate(objects) for label, count in image.items() if count
    ]
    table = np.array(entries, np.int64).reshape(-1, 3)
    image, label, count = table[:, 0], table[:, 1], table[:, 2].astype(np.float64)
    classes, place = np.unique(label, return_inverse=True)
    everything = np.bincount(place, count, len(classes))
    goal = everything / max(1.0, everything.sum())
    sizes = np.bincount(image, count, len(objects))
    chosen, scores = list[int](), list[float]()
    own, left = np.zeros(len(classes)), sizes > 0
    for _ in range(min(budget, int((sizes > 0).sum()))):
        # Each image's change of the sum: its own classes rise, and all fall with the total.
        rise = goal[place] * np.log1p(count / (own[place] + BEGUN))
        gain = np.bincount(image, rise, len(objects)) - np.log(own.sum() + BEGUN * len(classes) + sizes)
        best = int(np.where(left, gain, -np.inf).argmax())
        left[best] = False
        mine = image == best
        own[place[mine]] += count[mine]
        chosen.append(best)
        scores.append(likeness(everything, own))
    rest = np.flatnonzero(sizes == 0)[: budget - len(chosen)].tolist()
    return chosen + rest, scores + [scores[-1] if scores else 0.0] * len(rest)
