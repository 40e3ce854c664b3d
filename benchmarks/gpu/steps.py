"""(b) and (f): the time of a training step, plain, taught from a cache, taught online; and what torch.compile does to it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.cases import FAMILIES, KINDS, Case
from benchmarks.gpu.measure import Cost, free_memory, measure, step_ms
from qskd.datasets.batch import train_batch
from qskd.detectors import to_pixels
from qskd.precision import autocast


@dataclass(frozen=True)
class Row:
    """One line of the table. bare_ms: forward and backward of the student alone, to a sum of its outputs, on pixels that are
    there: what no training can do without."""

    case: str
    kind: str
    batch: int
    cost: Cost
    bare_ms: float

    @property
    def images_per_s(self) -> float:
        return 1000 * self.batch / self.cost.step_ms

    def asdict(self) -> dict[str, Any]:
        return {
            "case": self.case, "kind": self.kind, "batch": self.batch, "bare_ms": self.bare_ms,
            "images_per_s": self.images_per_s, **self.cost.asdict(),
        }  # fmt: skip


def bare_ms(case: Case, batch: int, steps: int) -> float:
    student = case.student().to(case.device).train()
    given = train_batch(case.arrays_of("plain", batch), case.device)
    pixels, mask = to_pixels(given.images, given.sizes, student.mean, student.std)

    def step() -> None:
        with autocast("auto", case.device):
            said = student(pixels, mask, with_attention=False)
            total = said.logits.float().sum() + said.boxes_cxcywh.float().sum() + said.memory[0].float().sum()
        total.backward()
        student.zero_grad(set_to_none=True)

    found = step_ms(step, case.device, steps)
    free_memory(case.device)
    return found


def stepper(case: Case, kind: str, batch: int, *overrides: str) -> Callable[[], Any]:
    """A training step as a worker takes it: from the loader's arrays on the host."""
    training, arrays = case.training(kind, *overrides), case.arrays_of(kind, batch)
    return lambda: training.train_step(train_batch(arrays, case.device))


def rows(
    device: torch.device, edges: Sequence[int], batches: Sequence[int], steps: int, until: float, toy: bool
) -> Iterator[Row]:
    """All combinations, or those begun before `until` (time.monotonic)."""
    for edge, family in itertools.product(edges, FAMILIES):
        if time.monotonic() > until:
            return
        case = Case(family, edge, max(batches), device, toy)
        for batch in batches:
            if time.monotonic() > until:
                return
            bare = bare_ms(case, batch, steps)
            for kind in KINDS:
                yield Row(case.name, kind, batch, measure(stepper(case, kind, batch), device, steps), bare)
        del case
        free_memory(device)


SQUARE = "student.resize.mode=square"  # one size: the whole student is compiled


def compiled(
    device: torch.device, edge: int, batch: int, steps: int, toy: bool
) -> Iterator[tuple[str, float, float, float, float]]:
    """(case, step without torch.compile in ms, step with, seconds that the first step took, step with the student's CUDA graphs),
    from the cache."""
    for family in FAMILIES:
        case = Case(family, edge, batch, device, toy)
        plain = step_ms(stepper(case, "cached", batch), device, steps)
        step = stepper(case, "cached", batch, "compute.compile=true", SQUARE)
        started = time.perf_counter()
        step()
        first_s = time.perf_counter() - started
        with_it = step_ms(step, device, steps)
        yield case.name, plain, with_it, first_s, graphs_ms(case, batch, steps)
        del case, step
        free_memory(device)


def graphs_ms(case: Case, batch: int, steps: int) -> float:
    """Of a step whose student alone is compiled, into CUDA graphs; NaN without CUDA, and where torch refuses.

    `compute.compile` makes none: it is not shown that they are sound in a training, where gradients are kept from step to step and
    the number of denoising queries changes."""
    if case.device.type != "cuda":
        return math.nan
    training, arrays = case.training("cached", SQUARE), case.arrays_of("cached", batch)
    training.student.compile_training(mode="reduce-overhead")
    try:
        return step_ms(lambda: training.train_step(train_batch(arrays, case.device)), case.device, steps)
    except RuntimeError:
        return math.nan
