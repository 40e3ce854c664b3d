"""CPU time an image from encoded bytes to pixels, in this process: all of it on the reader, or resized where the model runs.

python -m benchmarks.pixels [--device cuda]

Sides, each over the same batches of COCO-sized photographs, shorter side 64, 320, 640 and 800 px:
- decode: the bytes become a picture, and nothing else;
- finished: decode, Pillow's resize, and padding: what a reader of a CPU worker does, and what a bare loop would;
- raw: decode, and the bytes put side by side for shipping: what a reader of a GPU worker does;
- resize: `make_pixels` of what was shipped raw, on the device.

The rule that they found: on a CPU readers finish (torch's gathers cost many times Pillow's loops), for a GPU they ship raw.
Both give the same pixels, which is compared.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.loader import Pictures
from benchmarks.timing import Difference, Ratio, Report
from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.pictures.cuts import Cuts, placed, planned
from qskd.datasets.pictures.resample import make_pixels
from qskd.datasets.samples import Sample
from qskd.datasets.views import decode_image, make_view

SIZES = (64, 320, 640, 800)
BATCH = 8
RAW_GOAL = 0.8  # of bare decoding's images/s


@dataclass(frozen=True)
class Batch:
    """Encoded pictures, and the size they shall have."""

    samples: Sequence[Sample]
    resize: ResizeConfig

    def decode(self) -> None:
        for sample in self.samples:
            decode_image(sample.encoded, sample.file_name)

    def ship(self, finish: bool) -> tuple[np.ndarray, Cuts]:
        plans = [
            planned((one.height, one.width), make_view(ViewConfig(), one.image_id, 0), [self.resize], finish)
            for one in self.samples
        ]
        (cuts,), at = placed(plans), 0
        flat = np.empty(sum(plan.nbytes for plan in plans), np.uint8)
        for plan, sample in zip(plans, self.samples, strict=True):
            plan.fill(sample.encoded, sample.file_name, flat[at : at + plan.nbytes])
            at += plan.nbytes
        return flat, cuts

    def finished(self) -> Tensor:
        flat, cuts = self.ship(finish=True)
        return make_pixels(torch.from_numpy(flat), cuts)[0]


def cpu_seconds(side: Callable[[], Any]) -> float:
    started = time.process_time()
    side()
    return time.process_time() - started


def resize_seconds(flat: Tensor, cuts: Cuts) -> float:
    """Of `make_pixels` on the device that the bytes are on: CPU time on a CPU, else time until it is done."""
    if flat.device.type == "cpu":
        return cpu_seconds(partial(make_pixels, flat, cuts))
    return timing.seconds(lambda: make_pixels(flat, cuts), flat.device)


def measured(
    size: int, samples: Sequence[Sample], rounds: int, device: str
) -> tuple[list[Ratio], int, tuple[str, str]]:
    """Of one size: the ratios, how many values differ, and the milliseconds."""
    resize = ResizeConfig(mode="shortest_edge", size=size)
    batches = [Batch(samples[at : at + BATCH], resize) for at in range(0, len(samples), BATCH)]
    taken: dict[str, list[float]] = {"decode": [], "finished": [], "raw": [], "resize": []}
    differing = 0
    for number in range(rounds):
        spent = dict.fromkeys(taken, 0.0)
        for batch in batches:
            sides: dict[str, Callable[[], Any]] = {
                "decode": batch.decode,
                "finished": batch.finished,
                "raw": partial(batch.ship, finish=False),
            }
            for name in sorted(sides, reverse=number % 2 == 1):
                spent[name] += cpu_seconds(sides[name])
            flat, cuts = batch.ship(finish=False)
            shipped = torch.from_numpy(flat).to(device)
            spent["resize"] += resize_seconds(shipped, cuts)
            if number == 0:
                differing += int((make_pixels(shipped, cuts)[0].cpu() != batch.finished()).sum())
        for name, seconds in spent.items():
            taken[name].append(seconds / len(samples))
    speeds = {name: [1 / seconds for seconds in each] for name, each in taken.items()}
    added = [f - d for f, d in zip(taken["finished"], taken["decode"], strict=True)]  # Pillow's resize and padding
    kind = torch.device(device).type
    found = [
        timing.speeds_ratio(
            f"{size} px: reader that ships raw / bare decoding", speeds["raw"], speeds["decode"], RAW_GOAL
        ),
        timing.speeds_ratio(f"{size} px: reader that finishes / bare decoding", speeds["finished"], speeds["decode"]),
        Ratio(f"{size} px: seconds of resize on {kind} / of Pillow's", timing.ratios(taken["resize"], added)),
    ]
    words = ", ".join(f"{name} {timing.milliseconds(each)}" for name, each in taken.items())
    return found, differing, (f"{size} px, an image", words)


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pixels", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="all sides are measured so many times")
    parser.add_argument("--device", default="cpu", help="where `resize` runs")
    parser.add_argument("--synthetic", action="store_true", help="made-up pictures even if there are photographs")
    parser.add_argument("--quick", action="store_true", help="one batch of synthetic pictures, one round, two sizes")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    images, rounds, sizes = (BATCH, 1, SIZES[:2]) if given.quick else (given.images, given.rounds, SIZES)
    pictures = Pictures(images, given.synthetic or given.quick)
    samples = list(pictures.samples())
    report = Report("Pixels: CPU time an image, on the reader and where the model runs")
    differing = 0
    for size in sizes:
        ratios, wrong, words = measured(size, samples, rounds, given.device)
        report.ratios += ratios
        report.figures.append(words)
        differing += wrong
    report.differences = [Difference("values: made on the device against Pillow's", differing, 0)]
    report.facts = [
        timing.machine("pillow", "numpy") + f", {timing.load_note()}",
        f"{images} images of {pictures.source}, batches of {BATCH}, flips; resize on {given.device}",
    ]
    report.print()
    return report


if __name__ == "__main__":
    sys.exit(main().exit_code)
