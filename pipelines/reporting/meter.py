"""What a worker measures of itself: loss terms, speed, waiting, memory; rows for MLflow, gauges for Ray's own metrics."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

LOG_EVERY_STEPS = 20
# Ray's metrics (Prometheus, the dashboard), tagged with run and rank: name -> (the row's entry, what it is).
GAUGES = {
    "qskd_step_seconds": ("speed/step_s", "mean seconds of a training step, waiting for its batch included"),
    "qskd_images_per_second": ("speed/images_per_s", "images of all workers in a second of training"),
    "qskd_loader_wait_seconds": ("speed/loader_wait_s", "mean seconds that a step waited for its batch"),
    "qskd_loader_memory_hit_share": ("speed/loader_hit_share", "rows that readers had in memory, of those asked for"),
    "qskd_memory_mib": ("memory/peak_rss_mib", "the most memory that the worker's process has had"),
    "qskd_gpu_memory_mib": ("memory/peak_gpu_mib", "the most memory that the worker's tensors have had on its GPU"),
}
Row = tuple[int, dict[str, float]]


class Meter:
    """Term values and throughput, averaged over a few steps at a time; tensors stay on the device until then."""

    def __init__(self, gauges: Gauges | None = None) -> None:
        self.gauges = gauges
        self.rows: list[Row] = []
        self._begin()

    def _begin(self) -> None:
        self.pending: list[dict[str, Tensor]] = []
        self.step, self.images, self.waited_s, self.started = 0, 0, 0.0, time.perf_counter()
        self.asked = self.unheld = 0
        self.learning_rate: float | None = None

    def add(
        self,
        step: int,
        values: dict[str, Tensor],
        images: int,
        waited_s: float,
        loader_rows: np.ndarray | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """One step. images: of all workers. loader_rows: `pipelines.feed.stream.LOADER_ROWS` of the batch. learning_rate: of
        all but the backbone."""
        self.step = step
        self.pending.append(values)
        self.learning_rate = learning_rate
        self.images += images
        self.waited_s += waited_s
        if loader_rows is not None:
            self.asked += int(loader_rows[0])
            self.unheld += int(loader_rows[1])
        if len(self.pending) == LOG_EVERY_STEPS:
            self._close_row()

    def _close_row(self) -> None:
        names, steps = list(self.pending[0]), len(self.pending)
        means = torch.stack([torch.stack([v[name].float() for name in names]) for v in self.pending]).mean(0).tolist()
        spent_s = max(time.perf_counter() - self.started, 1e-9)
        row = {f"loss/{name}": value for name, value in zip(names, means, strict=True)}
        row |= {"speed/images_per_s": self.images / spent_s, "speed/loader_wait_share": self.waited_s / spent_s}
        row |= {"speed/step_s": spent_s / steps, "speed/loader_wait_s": self.waited_s / steps}
        if self.asked:
            row["speed/loader_hit_share"] = 1 - self.unheld / self.asked
        if self.learning_rate is not None:
            row["learning_rate"] = self.learning_rate
        row |= peak_memory_mib()
        self.rows.append((self.step, row))
        if self.gauges is not None:
            self.gauges.show(row)
        self._begin()

    def flush(self) -> list[Row]:
        """The rows since the last flush, (step, means): each worker's own share of every term."""
        self.pause()
        rows, self.rows = self.rows, []
        return rows

    def pause(self) -> None:
        """What comes now is not training: close the row, so that images/s does not count it."""
        if self.pending:
            self._close_row()

    def resume(self) -> None:
        self.started = time.perf_counter()


def peak_memory_mib() -> dict[str, float]:
    """The most that this process has had so far: resident, and on its GPU where it has one. Empty where it can't be known."""
    found = {}
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["memory/peak_rss_mib"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
    except ImportError:  # Windows
        pass
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["memory/peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return found


class Gauges:
    """The same numbers as metrics of Ray, for its dashboard and Prometheus."""

    def __init__(self, run: str, rank: int) -> None:
        from ray.util.metrics import Gauge

        self.tags = {"run": run, "rank": str(rank)}
        self.gauges: dict[str, tuple[str, Any]] = {
            name: (entry, Gauge(name, description=meaning, tag_keys=("run", "rank")))
            for name, (entry, meaning) in GAUGES.items()
        }

    def show(self, row: dict[str, float]) -> None:
        for entry, gauge in self.gauges.values():
            if entry in row:
                gauge.set(row[entry], tags=self.tags)
