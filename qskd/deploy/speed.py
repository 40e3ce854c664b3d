"""What detectors cost side by side: parameters, operations, milliseconds and memory, measured so that ratios hold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from qskd.config import ONNX, ResizeConfig
from qskd.deploy.export import INPUT, OUTPUTS, Predicting
from qskd.detectors import FAMILIES, Detector
from qskd.detectors.cost import Side, alternate, gflops, parameters
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.precision import autocast

WARM_UP = 3


@dataclass(frozen=True)
class Size:
    """height, width: of a model's input in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width}"


def usual_size(resize: ResizeConfig) -> Size:
    """Of a model's input for a landscape photograph whose longer side is 1.5 times the shorter."""
    return Size(resize.size, resize.usual_pixels // resize.size)


@dataclass(frozen=True)
class Cost:
    """What does not depend on the machine. gflops: of one image; a multiply-add is 2 (`qskd.detectors.cost.gflops`)."""

    parameters: int
    gflops: float


def cost_of(detector: Detector, size: Size) -> Cost:
    """Counts on the device that the detector is on. Raises QskdError for a size that the family can't take."""
    if detector.family == ONNX:
        found = "an ONNX file, whose operations are not counted, and which PyTorch does not time"
        raise QskdError(detector.family, found, "a checkpoint of transformers")
    find_family(detector.family, "checkpoint").check_size(detector.model.config, size.height, size.width)
    device = next(detector.parameters()).device
    model = detector.model if detector.family in FAMILIES else _AsAsked(detector)
    return Cost(parameters(detector), gflops(model, torch.zeros(1, 3, size.height, size.width, device=device)))


class _AsAsked(nn.Module):
    """A detector of a kind that can only teach: what it runs of an image, with whatever it was asked."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, pixel_values: torch.Tensor) -> object:
        mask = torch.ones_like(pixel_values[:, 0], dtype=torch.bool)
        return self.detector(pixel_values, mask, with_attention=False).logits


@dataclass(frozen=True)
class Timing:
    """One model at one batch size. ms: median milliseconds of a whole batch. ratio: of its time to the first model's, the
    median over the rounds in which both were timed; 1 for the first."""

    batch: int
    ms: float
    ratio: float
    rounds: int

    @property
    def ms_per_image(self) -> float:
        return self.ms / self.batch

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.batch / self.ms


Runner = Callable[[int], Side]  # batch size -> a call that runs that many images; its input is made before


def torch_runner(detector: Detector, size: Size, device: torch.device, precision: str = "float32") -> Runner:
    """transformers' own forward pass, as a user runs a saved detector; the input is on the device already."""
    detector = detector.eval().to(device)
    model = Predicting(detector.model) if detector.family in FAMILIES else _AsAsked(detector)

    def runner(batch: int) -> Side:
        pixels = torch.zeros(batch, 3, size.height, size.width, device=device)

        def call() -> object:
            with torch.inference_mode(), autocast(precision, device):
                return model(pixels)

        return call

    return runner


def onnx_runner(session: Any, size: Size) -> Runner:
    """onnxruntime, from numpy arrays to numpy arrays."""

    def runner(batch: int) -> Side:
        pixels = torch.zeros(batch, 3, size.height, size.width).numpy()
        return lambda: session.run(list(OUTPUTS), {INPUT: pixels})

    return runner


def run_runner(run: Callable[[np.ndarray], object], size: int) -> Runner:
    """Any runtime's (`qskd.deploy.runtimes`), from numpy arrays to numpy arrays. size: side of the square images."""

    def runner(batch: int) -> Side:
        pixels = np.zeros((batch, 3, size, size), np.float32)
        return lambda: run(pixels)

    return runner


def compare_speed(
    runners: Mapping[str, Runner],
    batches: Sequence[int],
    rounds: int,
    device: torch.device | str = "cpu",
    limit_s: float = 30.0,
) -> dict[str, list[Timing]]:
    """Time all runners in turn, batch size by batch size. limit_s: of timing, for each batch size (three rounds at least)."""
    found: dict[str, list[Timing]] = {name: [] for name in runners}
    for batch in batches:
        sides = {name: runner(batch) for name, runner in runners.items()}
        taken = alternate(sides, rounds, WARM_UP, device, limit_s)
        first = taken[next(iter(taken))]
        for name, seconds in taken.items():
            ratio = statistics.median(mine / theirs for mine, theirs in zip(seconds, first, strict=True))
            found[name].append(Timing(batch, 1e3 * statistics.median(seconds), ratio, len(seconds)))
    return found
