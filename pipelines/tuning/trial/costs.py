"""What a student costs, measured: parameters, bytes at its bits, operations, and its latency beside the recipe's own student.

Trials are measured where they train, beside one another. A latency taken there is the machine's load as much as the model's;
so the recipe's student, timed once before the sweep began, is timed again in turn with each trial's, and the trial's latency
is the ratio of the two lower quartiles (what preempts either is left out) times that first figure.

Of few bits operations and latency are those of the same student in float: fake quantisation takes longer than float, and what a
runtime would take in whole numbers, only that runtime can tell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import quantiles
from typing import Any

import torch

from pipelines.cluster.devices import check_own_gpu, device_here
from qskd.config import Config
from qskd.config.recipe import build
from qskd.detectors import Detector, build_student
from qskd.detectors.cost import gflops, latency_ms, parameters
from qskd.quantization.size import megabytes

WARM_UP = 3
LEAST, MOST, BUDGET_S = 12, 50, 1.5  # timings of each side; the seconds they may take


def parameters_m(config: Config, labels: Sequence[str]) -> float:
    """Millions of parameters of the recipe's student, built. QskdError when it can't be."""
    return parameters(build_student(config.student, labels, config.seed)) / 1e6


def recipe_latency_ms(config: Config, labels: Sequence[str], device: torch.device) -> float:
    """Of one image, with one thread on a CPU."""
    call, _, _ = _call(config, labels, device)
    with _one_thread(device):
        return _quartile(_in_turn([call], device)[0])


def recipe_latency_there(tree: dict[str, Any], labels: Sequence[str]) -> float:
    """The same, for a task of Ray's on another node."""
    check_own_gpu()
    config = build(tree)
    return recipe_latency_ms(config, labels, device_here(config))


def costs(
    config: Config, labels: Sequence[str], device: torch.device, recipe: Config, recipe_ms: float
) -> dict[str, float]:
    """parameters_m, size_mb, gflops and latency_ms of the recipe's student, for one image at its own resolution."""
    own, student, inputs = _call(config, labels, device)
    reference, _, _ = _call(recipe, labels, device)
    with _one_thread(device):
        counted = gflops(student, *inputs)
        times = _in_turn([own, reference], device)
    return {
        "parameters_m": parameters(student) / 1e6,
        "size_mb": megabytes(build_student(config.student, labels, config.seed)),
        "gflops": counted,
        "latency_ms": recipe_ms * _quartile(times[0]) / _quartile(times[1]),
    }


def _quartile(times: Sequence[float]) -> float:
    return quantiles(times, n=4)[0]


def _call(
    config: Config, labels: Sequence[str], device: torch.device
) -> tuple[Callable[[], Any], Detector, tuple[torch.Tensor, torch.Tensor]]:
    in_float = config.student.model_copy(update={"quantization": None})
    student = build_student(in_float, labels, config.seed).eval().to(device)
    resize = config.student.resize
    height, width = resize.size, resize.usual_pixels // resize.size
    pixels = torch.zeros(1, 3, height, width, device=device)
    mask = torch.ones(1, height, width, dtype=torch.bool, device=device)

    def call() -> Any:
        with torch.inference_mode():
            return student.model(pixels, pixel_mask=mask)

    return call, student, (pixels, mask)


def _in_turn(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[list[float]]:
    """Milliseconds of each call, one of each in turn."""
    started = time.perf_counter()
    for _ in range(WARM_UP):
        for call in calls:
            call()
    round_s = (time.perf_counter() - started) / WARM_UP
    rounds = max(LEAST, min(MOST, int(BUDGET_S / max(round_s, 1e-6))))
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            times[index].append(latency_ms(calls[index], warmup=0, repeats=1, device=device)["median"])
    return times


class _one_thread:
    """On a CPU: what is timed does not depend on how many cores are free."""

    def __init__(self, device: torch.device) -> None:
        self.threads = torch.get_num_threads() if device.type == "cpu" else 0

    def __enter__(self) -> None:
        if self.threads:
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)
