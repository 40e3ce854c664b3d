"""What a worker says of itself between two reports: its step, loss and speed, or what it is doing instead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from pipelines.reporting.pulse import Pulse

T = TypeVar("T")
RECENT_STEPS = 20


class Pace:
    """subject: of `Pulse`; empty: nothing is said, as of the workers beside the first. batch_size: of all workers."""

    def __init__(self, subject: str, batch_size: int) -> None:
        self.pulse, self.batch_size = Pulse(subject, "worker"), batch_size
        self.recent_s: deque[float] = deque(maxlen=RECENT_STEPS)  # what each step took, waiting for its batch included
        self.evaluations_s: list[float] = []
        self.facts: dict[str, Any] = {}

    def doing(self, what: str) -> None:
        """Of no step: building the student, writing a checkpoint."""
        self.pulse.tell(**self.facts, doing=what)

    def step(self, step: int, loss: Tensor, seconds: float) -> None:
        """After each step. The first is not measured: it waited for the readers to start."""
        if self.facts:
            self.recent_s.append(seconds)
        self.facts = {"step": step, "loss": loss.detach()}
        if self.recent_s:
            step_s = max(sum(self.recent_s) / len(self.recent_s), 1e-9)
            self.facts |= {"step_s": step_s, "images_per_s": self.batch_size / step_s}
        if self.evaluations_s:
            self.facts["evaluation_s"] = sum(self.evaluations_s) / len(self.evaluations_s)
        self.pulse.tell(**self.facts)

    def evaluating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """The batches of an evaluation, counted and timed on their way."""
        started = time.perf_counter()
        for done, batch in enumerate(batches):
            self.doing(f"evaluating {done / max(count, 1):.0%}")
            yield batch
        self.doing("evaluating: computing AP")
        self.evaluations_s.append(time.perf_counter() - started)
