"""Matching and detection loss against transformers' own for Conditional and Deformable DETR: time and values.

python -m benchmarks.detection_loss

Both get the same logits, boxes and objects in the form they want, made beforehand, and match, compute all terms of all
decoder layers and their weighted sum. transformers' loss also computes its cardinality error (a logged number); that is
what its users run, so it is left in.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from transformers.loss.loss_deformable_detr import DeformableDetrForObjectDetectionLoss

from benchmarks.timing import Difference, Ratio, Report, alternate, load_note, machine, milliseconds, ratios
from qskd.config import DetectionLossConfig
from qskd.losses.detection_loss import combine, detection_terms, detection_weights
from qskd.losses.matching import assign
from qskd.structures import Targets

GOAL = 0.5
MEAN_OBJECTS = 7.3  # of COCO's training images
ROUNDING = 1e-4  # relative; sums over 384,000 entries in two orders
Value = tuple[Tensor, dict[str, Tensor]]  # the loss, and every term before its weight, by transformers' name


@dataclass(frozen=True)
class Sizes:
    layers: int = 6
    batch: int = 16
    queries: int = 300
    classes: int = 80
    batches: int = 8


@dataclass(frozen=True)
class Case:
    """One batch. logits [L, B, Q, K], boxes [L, B, Q, 4] cxcywh; its objects for us and for transformers."""

    logits: Tensor
    boxes: Tensor
    targets: Targets
    labels: list[dict[str, Tensor]]

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.logits.clone().requires_grad_(), self.boxes.clone().requires_grad_()


def object_counts(images: int, seed: int = 0) -> list[int]:
    """Objects in each of so many images, spread like COCO's: most have few, some none, the fullest of 128 has over 60.

    Quantiles of a lognormal distribution of mean 7.3, so that every seed has the same counts in another order.
    """
    random = np.random.default_rng(seed)
    normal = np.quantile(random.standard_normal(200_000), (np.arange(images) + 0.5) / images)
    counts = np.exp(normal)
    counts = np.round(counts * MEAN_OBJECTS / counts.mean()).astype(int)
    return random.permutation(counts).tolist()


def make_case(counts: Sequence[int], sizes: Sizes, seed: int) -> Case:
    """A half-trained detector's predictions: for each object a few queries near it, with raised logits of its class;
    the other queries anywhere. Later layers are nearer."""
    random = torch.Generator().manual_seed(seed)
    slots = max(counts)
    valid = torch.arange(slots) < torch.tensor(counts)[:, None]
    side = torch.exp(torch.empty(len(counts), slots, 2).uniform_(math.log(0.03), math.log(0.7), generator=random))
    centre = side / 2 + (1 - side) * torch.rand(len(counts), slots, 2, generator=random)
    objects = torch.where(valid.unsqueeze(-1), torch.cat([centre, side], -1), 0.0)
    classes = torch.randint(sizes.classes, (len(counts), slots), generator=random) * valid
    targets = Targets(objects, classes, valid, tuple(range(len(counts))), tuple(counts))

    shape = (sizes.layers, len(counts), sizes.queries)
    logits = torch.randn(*shape, sizes.classes, generator=random) - 4.6  # the start of a focal-loss head: p = 0.01
    places = torch.rand(*shape, 4, generator=random) * torch.tensor([1.0, 1.0, 0.5, 0.5]) + 0.01
    for image, count in enumerate(counts):
        for query in range(min(4 * count, sizes.queries)):
            slot = query % count
            spread = torch.linspace(0.3, 0.05, sizes.layers).unsqueeze(-1)
            noise = torch.randn(sizes.layers, 4, generator=random) * spread * objects[image, slot, 2:].repeat(2)
            places[:, image, query] = objects[image, slot] + noise
            logits[:, image, query, classes[image, slot]] += 3
    boxes = places.clamp(0.005, 0.995)
    labels = [
        {"boxes": objects[image, :count], "class_labels": classes[image, :count]} for image, count in enumerate(counts)
    ]
    return Case(logits, boxes, targets, labels)


def make_cases(sizes: Sizes) -> list[Case]:
    counts = object_counts(sizes.batches * sizes.batch)
    parts = [counts[at : at + sizes.batch] for at in range(0, len(counts), sizes.batch)]
    return [make_case(part, sizes, seed) for seed, part in enumerate(parts)]


def our_loss(case: Case, logits: Tensor, boxes: Tensor, config: DetectionLossConfig) -> Value:
    (assignment,) = assign([(logits, boxes)], case.targets, config)
    terms = detection_terms(logits, boxes, case.targets, assignment, config)
    renamed = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
    values = {}
    for name, term in terms.items():
        kind, _, layer = name.partition("_")
        values[renamed[kind] + (f"_{layer}" if layer else "")] = term.total.detach() / term.count
    return combine(terms, detection_weights(len(logits), config)), values


def our_step(case: Case, logits: Tensor, boxes: Tensor, config: DetectionLossConfig) -> Tensor:
    """As in training: the terms are combined and nothing else."""
    (assignment,) = assign([(logits, boxes)], case.targets, config)
    return combine(
        detection_terms(logits, boxes, case.targets, assignment, config), detection_weights(len(logits), config)
    )


def transformers_loss(
    labels: list[dict[str, Tensor]], logits: Tensor, boxes: Tensor, config: DetectionLossConfig
) -> Value:
    """transformers' own loss and its terms, with this project's settings. labels: as transformers takes them."""
    settings = SimpleNamespace(
        class_cost=config.class_cost,
        bbox_cost=config.l1_cost,
        giou_cost=config.giou_cost,
        num_labels=logits.shape[-1],
        focal_alpha=config.focal_alpha,
        auxiliary_loss=config.auxiliary,
        bbox_loss_coefficient=config.l1_weight,
        giou_loss_coefficient=config.giou_weight,
        decoder_layers=len(logits),
    )
    given = (logits[-1], labels, "cpu", boxes[-1], settings, logits, boxes)
    loss, terms, _ = DeformableDetrForObjectDetectionLoss(*given)
    return loss, terms


def their_loss(case: Case, logits: Tensor, boxes: Tensor, config: DetectionLossConfig) -> Value:
    return transformers_loss(case.labels, logits, boxes, config)


def their_step(case: Case, logits: Tensor, boxes: Tensor, config: DetectionLossConfig) -> Tensor:
    return their_loss(case, logits, boxes, config)[0]


def largest_differences(cases: Sequence[Case], config: DetectionLossConfig) -> list[Difference]:
    """Of the loss and of every term, relative; of the gradients, relative to the largest gradient."""
    values, gradients = [0.0], [0.0]
    for case in cases:
        mine, theirs = case.leaves(), case.leaves()
        (loss, terms), (expected, their_terms) = our_loss(case, *mine, config), their_loss(case, *theirs, config)
        pairs = [(loss, expected), *((value, their_terms[name]) for name, value in terms.items())]
        values += [(abs(a - b) / b.abs().clamp(min=1e-6)).item() for a, b in pairs]
        loss.backward()
        expected.backward()
        for a, b in zip(mine, theirs, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            gradients.append(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item())
    return [
        Difference("loss and its terms (relative)", _largest(values), ROUNDING),
        Difference("gradients (relative to the largest)", _largest(gradients), ROUNDING),
    ]


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with so many threads; as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def over_all(
    step: Callable[[Case, Tensor, Tensor], Tensor], cases: Sequence[Case], backward: bool
) -> Callable[[], None]:
    """One pass over the batches. The leaves are made beforehand; their gradients start anew."""
    leaves = [case.leaves() for case in cases]

    def run() -> None:
        for case, (logits, boxes) in zip(cases, leaves, strict=True):
            logits.grad = boxes.grad = None
            loss = step(case, logits, boxes)
            if backward:
                loss.backward()

    return run


def compare(cases: Sequence[Case], rounds: int, thread_counts: Sequence[int]) -> list[Ratio]:
    config = DetectionLossConfig()
    found = []
    for count in thread_counts:
        for backward in (False, True):
            sides = {
                "qskd": over_all(partial(our_step, config=config), cases, backward),
                "transformers": over_all(partial(their_step, config=config), cases, backward),
            }
            with threads(count):
                taken = alternate(sides, rounds)
            each = {name: [value / len(cases) for value in values] for name, values in taken.items()}
            name = f"{'forward + backward' if backward else 'forward'}, {count} thread{'s' if count > 1 else ''}"
            figures = f"{milliseconds(each['qskd'])} to transformers' {milliseconds(each['transformers'])}"
            found.append(Ratio(name, ratios(taken["qskd"], taken["transformers"]), figures, at_most=GOAL))
    return found


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detection_loss", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="both sides are measured so many times")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--quick", action="store_true", help="one small batch, two rounds, one thread: seconds")
    given = parser.parse_args(arguments)
    sizes = Sizes(batches=1, batch=4) if given.quick else Sizes()
    cases = make_cases(sizes)
    counts = [count for case in cases for count in case.targets.counts]
    report = Report("Matching and detection loss of a batch, qskd / transformers (time; lower is better)")
    report.ratios = compare(cases, 2 if given.quick else given.rounds, [1] if given.quick else given.threads)
    report.differences = largest_differences(cases, DetectionLossConfig())
    report.facts = [
        machine("transformers", "scipy", "numpy") + f", {load_note()}",
        f"{sizes.layers} decoder layers, batch {sizes.batch}, {sizes.queries} queries, {sizes.classes} classes, float32;"
        f" {len(cases)} batches a round",
        f"objects an image: mean {np.mean(counts):.1f}, median {np.median(counts):.0f}, most {max(counts)}, "
        f"{counts.count(0)} images without",
    ]
    report.print()
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
