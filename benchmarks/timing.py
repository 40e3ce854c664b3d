"""What the benchmarks share: two sides measured in turn, medians, a table with the goal beside each ratio.

A machine's speed drifts, and others work on it. So the sides take turns, each round gives one ratio of its own, and the
median over rounds is reported: a slow minute then hits both sides, or one round.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar

import numpy as np
import torch

from qskd.detectors.cost import Side as Side
from qskd.detectors.cost import alternate as alternate
from qskd.detectors.cost import seconds as seconds

T = TypeVar("T")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0..1) of the values don't exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass(frozen=True)
class Ratio:
    """One comparison: a ratio for each round, both sides measured in it, and what is wanted of their median.

    figures: the two sides in words, for the table. at_least, at_most: the goal, if there is one.
    """

    name: str
    rounds: tuple[float, ...]
    figures: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def value(self) -> float:
        return statistics.median(self.rounds)

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def verdict(self) -> str:
        missed = (self.at_least is not None and self.value < self.at_least) or (
            self.at_most is not None and self.value > self.at_most
        )
        return "" if not self.goal else "missed" if missed else "met"


@dataclass(frozen=True)
class Difference:
    """The largest difference of what both sides computed, and the largest there may be."""

    name: str
    value: float
    allowed: float

    @property
    def fits(self) -> bool:
        return self.value <= self.allowed  # NaN does not


@dataclass
class Report:
    """What a benchmark found. A missed goal is told and no error (machines differ); a difference is an error."""

    title: str
    facts: list[str] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    figures: list[tuple[str, str]] = field(default_factory=list)  # further measurements, without a ratio
    differences: list[Difference] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return int(not all(difference.fits for difference in self.differences))

    def ratio(self, name: str) -> Ratio:
        return next(ratio for ratio in self.ratios if ratio.name == name)

    def print(self) -> None:
        print(self.title)
        for fact in self.facts:
            print(f"  {fact}")
        rows = [
            [r.name, r.figures, f"{r.value:.3f}", f"{min(r.rounds):.3f} to {max(r.rounds):.3f}", r.goal, r.verdict]
            for r in self.ratios
        ]
        print_table(["", "medians", "ratio", "rounds", "goal", ""], rows)
        if self.figures:
            print_table(["", "measured"], [list(row) for row in self.figures])
        if self.differences:
            rows = [[d.name, f"{d.value:.2g}", f"{d.allowed:.2g}", "" if d.fits else "WRONG"] for d in self.differences]
            print_table(["largest difference of", "found", "allowed", ""], rows)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, without those that are empty throughout."""
    lines = [list(head), *map(list, rows)]
    shown = [column for column in range(len(head)) if any(line[column] for line in lines)]
    widths = {column: max(len(line[column]) for line in lines) for column in shown}
    print()
    for number, line in enumerate(lines):
        print("  ".join(line[column].ljust(widths[column]) for column in shown).rstrip())
        if number == 0:
            print("  ".join("-" * widths[column] for column in shown))


def ratios(top: Sequence[float], bottom: Sequence[float]) -> tuple[float, ...]:
    """Round by round."""
    return tuple(a / b for a, b in zip(top, bottom, strict=True))


def speeds_ratio(name: str, mine: Sequence[float], theirs: Sequence[float], at_least: float | None = None) -> Ratio:
    """Of images/s, round by round."""
    figures = f"{statistics.median(mine):.0f} to {statistics.median(theirs):.0f} images/s"
    return Ratio(name, ratios(mine, theirs), figures, at_least)


def milliseconds(taken: Sequence[float]) -> str:
    """The median of some seconds, in words."""
    return f"{1000 * statistics.median(taken):.1f} ms"


def p50_p99(taken: Sequence[float]) -> str:
    """Of some seconds, in words."""
    return f"{1000 * percentile(taken, 0.5):.1f} / {1000 * percentile(taken, 0.99):.1f} ms"


def checksum(arrays: Mapping[str, Any]) -> int:
    """Of all arrays (or CPU tensors). Reads every byte: memory mapped from another process costs nothing before that."""
    value = 0
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).data, value)
    return value


def machine(*packages: str) -> str:
    """Cores, threads and versions, on one line."""
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", *packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return f"{platform.machine()}, {os.cpu_count()} cores, torch threads {torch.get_num_threads()}, " + ", ".join(found)


def load_note() -> str:
    """How busy the machine was: the load average of the last minute counts this program too."""
    return f"load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""


@dataclass(frozen=True)
class Pass:
    """A stream seen once: when each batch arrived, in seconds from the start, the wait for it, what came of it."""

    arrivals: list[float]
    waits: list[float]
    results: list[Any]

    def speed(self, batch: int, first: int) -> float:
        """Images/s, `batch` a batch, after the arrival of batch number `first`."""
        return batch * (len(self.arrivals) - 1 - first) / (self.arrivals[-1] - self.arrivals[first])


def watch(start: Callable[[], Iterable[T]], consume: Callable[[T], Any], step_seconds: float = 0.0) -> Pass:
    """Start a stream and consume it. step_seconds: a training step on a device after each batch; the CPU idles."""
    seen = Pass([], [], [])
    started = asked = time.perf_counter()
    for batch in start():
        now = time.perf_counter()
        seen.arrivals.append(now - started)
        seen.waits.append(now - asked)
        seen.results.append(consume(batch))
        time.sleep(step_seconds)
        asked = time.perf_counter()
    return seen


class StorePeak:
    """The most bytes of Ray's object store in use while this is open, asked for 20 times a second; needs no dashboard."""

    def __enter__(self) -> StorePeak:
        self.bytes, self._done = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def _ask(self) -> None:
        import ray

        total = ray.cluster_resources()["object_store_memory"]
        while not self._done.wait(0.05):
            # The name is missing when nothing at all is free.
            self.bytes = max(self.bytes, total - ray.available_resources().get("object_store_memory", 0.0))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
