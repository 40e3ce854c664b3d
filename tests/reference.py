"""Slow loops that are obviously right, for the vectorised code to be compared with, and random inputs for both."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from math import exp, log, log1p
from typing import Any

import torch
from torch import Tensor

from qskd.distillation.qskd.settings import PredictionDistillationConfig, QuerySelectionConfig
from qskd.structures import Targets

Box = Sequence[float]


# ---- random inputs


def random_boxes(*shape: int, seed: int = 0) -> Tensor:
    """[..., 4] cxcywh in 0..1, large enough to overlap often."""
    g = torch.Generator().manual_seed(seed)
    centre, size = torch.rand(*shape, 2, generator=g) * 0.6 + 0.2, torch.rand(*shape, 2, generator=g) * 0.38 + 0.02
    return torch.cat([centre, size], dim=-1)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_targets(counts: Sequence[int], classes: int = 5, seed: int = 0, slots: int | None = None) -> Targets:
    """Random objects, `counts` an image, padded to the largest count or to `slots`."""
    slots = max(counts, default=0) if slots is None else slots
    valid = torch.arange(slots)[None] < torch.tensor(counts)[:, None]
    labels = torch.randint(classes, (len(counts), slots), generator=torch.Generator().manual_seed(seed + 1))
    boxes = random_boxes(len(counts), slots, seed=seed + 2) * valid[..., None]
    return Targets(boxes, labels * valid, valid, tuple(range(len(counts))), tuple(counts))


def transformers_labels(targets: Targets) -> list[dict[str, Tensor]]:
    counts = enumerate(targets.counts)
    return [{"class_labels": targets.labels[i, :n], "boxes": targets.boxes_cxcywh[i, :n]} for i, n in counts]


def near(targets: Targets, queries: int, seed: int = 0, spread: float = 0.05) -> Tensor:
    """[B, Q, 4] boxes, most of them a jittered copy of one of the image's objects: many hard negatives."""
    boxes = random_boxes(len(targets.counts), queries, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    for image, count in enumerate(targets.counts):
        for query in range(queries):
            if count and query % 4:
                jitter = torch.randn(4, generator=g) * spread * torch.tensor([1.0, 1.0, 0.5, 0.5])
                boxes[image, query] = (targets.boxes_cxcywh[image, query % count] + jitter).clamp(0.02, 0.98)
    return boxes


# ---- boxes


def corners(box: Box) -> tuple[float, float, float, float]:
    x, y, w, h = (float(v) for v in box)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def slow_iou(a: Box, b: Box) -> float:
    """xyxy boxes."""
    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - inner
    return inner / union if union > 0 else 0.0


def slow_giou(a: Box, b: Box) -> float:
    """xyxy boxes: IoU minus the share of the smallest enclosing box that neither covers."""
    inner = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - inner
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    return slow_iou(a, b) - ((hull - union) / hull if hull > 0 else 0.0)


def giou_table(boxes_cxcywh: Tensor, objects_cxcywh: Tensor) -> list[list[float]]:
    return [[slow_giou(corners(a), corners(b)) for b in objects_cxcywh.tolist()] for a in boxes_cxcywh.float().tolist()]


# ---- GQS


def slow_selection(boxes: Tensor, targets: Targets, assignment: Tensor, config: QuerySelectionConfig) -> dict[str, Any]:
    """equations.md 1.3 GQS for boxes [B, Q, 4], assignment [B, M]: the fields of QuerySelection as nested lists."""
    result: dict[str, Any] = {name: [] for name in ("object_of_query", "giou", "is_positive", "band", "weight")}
    for image, count in enumerate(targets.counts):
        queries = range(boxes.shape[1])
        if count == 0:
            empty = {"object_of_query": -1, "giou": -1.0, "is_positive": False, "band": 0, "weight": 0.0}
            for name, value in empty.items():
                result[name].append([value for _ in queries])
            continue
        table = giou_table(boxes[image], targets.boxes_cxcywh[image, :count])
        owner = {int(q): j for j, q in enumerate(assignment[image, :count].tolist()) if q >= 0}
        group = [owner.get(q, table[q].index(max(table[q]))) for q in queries]
        best = [max(table[q][j] for q in queries) for j in range(count)]
        band, weight = [], []
        for q in queries:
            scale = best[group[q]] if config.relative else 1.0
            reached = sum(table[q][group[q]] >= boundary * scale for boundary in config.boundaries)
            dead = config.relative and scale <= 0
            band.append(0 if dead else reached)
            weight.append(0.0 if dead else config.band_weights[reached])
        for j in range(count):
            hard = [q for q in queries if group[q] == j and q not in owner and weight[q] > 0]
            hard = [q for _, q in sorted((-table[q][j], q) for q in hard)]  # ties: the lower index
            for q in hard[config.max_per_object :] if config.max_per_object else []:
                weight[q] = 0.0
        for q in owner:
            weight[q] = config.positive_weight
        result["object_of_query"].append(group)
        result["giou"].append([table[q][group[q]] for q in queries])
        result["is_positive"].append([q in owner for q in queries])
        result["band"].append(band)
        result["weight"].append(weight)
    return result


# ---- LAPD


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


def slow_bce(logits: Sequence[float], goals: Sequence[float], gamma: float = 0.0) -> float:
    """Binary cross-entropy with soft targets, each class's times |goal - probability|^gamma."""
    return sum(
        (max(x, 0) - x * t + log1p(exp(-abs(x)))) * abs(t - sigmoid(x)) ** gamma
        for x, t in zip(logits, goals, strict=True)
    )


def slow_pairs(student: dict[str, Any], teacher: dict[str, Any], image: int, objects: int) -> list[tuple[int, int]]:
    """(student query, teacher query): positive with positive, then hard negatives by rank, inside each group."""
    pairs: list[tuple[int, int]] = []
    for j in range(objects):
        sides = []
        for side in (student, teacher):
            members = [
                q for q, own in enumerate(side["object_of_query"][image]) if own == j and side["weight"][image][q] > 0
            ]
            positive = [q for q in members if side["is_positive"][image][q]]
            hard = [q for _, q in sorted((-side["giou"][image][q], q) for q in members if q not in positive)]
            sides.append((positive, hard))
        pairs += zip(sides[0][0], sides[1][0], strict=False)
        pairs += zip(sides[0][1], sides[1][1], strict=False)
    return pairs


def slow_terms(
    pairs: list[tuple[int, int]],
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    weights: Sequence[float],
    config: PredictionDistillationConfig,
) -> dict[str, float]:
    """Sums over one image's pairs; each network is (logits [Q, K], boxes_cxcywh [Q, 4]), the weights are the teacher's."""
    sums = {"lapd_class": 0.0, "lapd_l1": 0.0, "lapd_giou": 0.0, "weights": 0.0}
    for s, t in pairs:
        goals = [sigmoid(x) for x in teacher[0][t].tolist()]
        a, b = student[1][s].tolist(), teacher[1][t].tolist()
        w = weights[t] * (max(goals) if config.pair_weight == "confidence" else 1.0)
        sums["weights"] += w
        most = sorted(goals, reverse=True)[: config.kept_classes or len(goals)]
        kept = [place for place, goal in enumerate(goals) if goal >= most[-1] or goal >= 0.05]
        own = student[0][s].tolist()
        sums["lapd_class"] += w * slow_bce([own[k] for k in kept], [goals[k] for k in kept], config.class_gamma)
        sums["lapd_l1"] += w * sum(abs(x - y) for x, y in zip(a, b, strict=True))
        sums["lapd_giou"] += w * (1 - slow_giou(corners(a), corners(b)))
    return sums


def cheapest(cost: list[list[float]]) -> float:
    """The least total cost of a one-to-one assignment, by trying all: for tiny tables only."""
    rows, columns = len(cost), len(cost[0])
    if rows > columns:
        return cheapest([list(column) for column in zip(*cost, strict=True)])
    return min(sum(cost[r][c] for r, c in enumerate(chosen)) for chosen in permutations(range(columns), rows))


# ---- AGFD


def slow_resample(map_: Tensor, source: tuple[int, int], target: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """One image's map [C, H, W] with a valid region `source` (h, w) -> [C, *grid] whose valid region is `target`.

    Bilinear between cell centres, never across the valid region's border; only cells inside `target` are filled.
    """
    result = torch.zeros(map_.shape[0], *grid)
    for y in range(target[0]):
        for x in range(target[1]):
            v = min(max((y + 0.5) / target[0] * source[0] - 0.5, 0), source[0] - 1)
            u = min(max((x + 0.5) / target[1] * source[1] - 0.5, 0), source[1] - 1)
            y0, x0 = int(v), int(u)
            y1, x1 = min(y0 + 1, source[0] - 1), min(x0 + 1, source[1] - 1)
            fy, fx = v - y0, u - x0
            top = map_[:, y0, x0] * (1 - fx) + map_[:, y0, x1] * fx
            bottom = map_[:, y1, x0] * (1 - fx) + map_[:, y1, x1] * fx
            result[:, y, x] = top * (1 - fy) + bottom * fy
    return result


def entropy(p: float) -> float:
    """BCE of a probability with itself."""
    return -(p * log(p) + (1 - p) * log(1 - p))
