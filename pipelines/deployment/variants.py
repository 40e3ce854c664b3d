"""The other files of an export, INT8, float16 and OpenVINO's: made, and measured beside float32."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.deployment.calibration import Calibration, FileImages, images_to_calibrate, labelled_images
from pipelines.reporting.board import progress
from qskd.checkpoints.files import checkpoint_file
from qskd.checkpoints.weights import check_path
from qskd.datasets.manifest import check_labelled, load_manifest
from qskd.deploy.export import TOLERANCE, Exporter, check_parity, check_sure, random_batches, require_parity
from qskd.deploy.qdq import is_quantised, tolerance_of
from qskd.deploy.reduced import quantize_int8, to_float16
from qskd.deploy.runtimes import Run, need_openvino, open_variant, runnable, session_of_openvino, to_openvino
from qskd.deploy.side_by_side import Measured, Pictures, side_by_side
from qskd.deploy.speed import Timing, compare_speed, run_runner
from qskd.deploy.variants import (
    FIGURES,
    FLOAT16,
    FLOAT32,
    GAPS,
    INT8,
    OPENVINO_BFLOAT16,
    OPENVINO_FLOAT32,
    OPENVINO_INT8,
    Variant,
    VariantFacts,
    VariantsFound,
    figures,
    gaps,
)
from qskd.detectors import Detector, Preprocessing
from qskd.detectors.cost import busy_note
from qskd.errors import QskdError
from qskd.quantization.files import FILE
from qskd.redaction import redacted_uri, without_home
from qskd.storage.places import relation_of
from qskd.storage.scratch import scratch_folder

log = logging.getLogger("qskd")
TIMING_LIMIT_S = 30.0
FEW_IMAGES = 16  # to calibrate with
NOISE = 8  # images, where there are no others to compare on


@dataclass(frozen=True)
class VariantOptions:
    """int8, float16, openvino: which files there are besides model.onnx. calibration: a shard folder, or image files and folders,
    that INT8 is calibrated with. evaluate: labelled shards that AP of every file is measured on."""

    int8: bool = False
    float16: bool = False
    openvino: bool = False
    calibration: tuple[str, ...] = ()
    evaluate: str | None = None

    @property
    def any(self) -> bool:
        return self.int8 or self.float16 or self.openvino or self.evaluate is not None

    @property
    def made(self) -> tuple[Variant, ...]:
        """The files, model.onnx first."""
        found = [FLOAT32]
        found += [INT8] if self.int8 else []
        found += [FLOAT16] if self.float16 else []
        found += [OPENVINO_FLOAT32] if self.openvino else []
        found += [OPENVINO_INT8] if self.openvino and self.int8 else []
        return tuple(found)

    def check(self, model: str, onnx: bool, exporter: Exporter, seen_as: Preprocessing) -> None:
        """Complain before anything is loaded. model: a Hub name or a local folder."""
        if self.any and not onnx:
            raise QskdError(
                "--no-onnx", "INT8, float16, OpenVINO or AP, which are made of the graph", "one or the other"
            )
        if (self.int8 or self.float16 or self.openvino) and exporter != "torchscript":
            raise QskdError(
                f"--exporter {exporter}",
                "INT8, float16 or OpenVINO, for which nodes must have the names of their modules",
                "torchscript",
                "leave --exporter away",
            )
        if (self.int8 or self.float16) and checkpoint_file(check_path(model), FILE):
            raise QskdError(
                "--int8, --float16",
                "a student that was trained with few bits, whose graph has its own steps (docs/quantization.md)",
                "a float student: these would round what is rounded already",
                "export it without them: model.onnx is its own INT8, and so is OpenVINO's (--openvino)",
            )
        if self.int8:
            images_to_calibrate(self.calibration, seen_as)
        if self.openvino:
            need_openvino()
        if self.evaluate is not None:
            check_labelled(self.evaluate, load_manifest(self.evaluate))


@dataclass(frozen=True)
class Asked:
    """What `add_variants` needs to know of the export. model: as the user named it. batch: of the graph, None for any number."""

    model: str
    options: VariantOptions
    seen_as: Preprocessing
    batch: int | None = 1
    images: Sequence[Path] = ()
    rounds: int = 20
    threads: int = 1
    tolerance: float = TOLERANCE  # of a student with few bits; a float one is held to the exporter's own


def add_variants(detector: Detector, folder: Path, asked: Asked, console: Console) -> VariantsFound:
    """Write the files beside `folder`/model.onnx, print what was found, and return it. Raises QskdError."""
    options, size = asked.options, asked.seen_as.resize.size
    notes: list[str] = []
    if options.evaluate is not None:  # complain of its classes before minutes are spent on calibration
        labelled_images(options.evaluate, asked.model, detector, asked.seen_as)
    calibration = None
    if options.int8:
        images = images_to_calibrate(options.calibration, asked.seen_as)
        calibration = Calibration(images, asked.batch or 1)
        console.print(f"calibrating INT8 on {calibration.count} images", markup=False)
        notes.append(quantize_int8(detector, folder / FLOAT32.file, folder / INT8.file, calibration).text)
        notes.append(f"It is calibrated on {calibration.count} images of {_named(options.calibration)}.")
        if calibration.count < FEW_IMAGES:
            log.warning(
                "INT8 is calibrated on %d images: some tens say better what ranges there are", calibration.count
            )
        if options.evaluate is not None and any(
            relation_of(options.evaluate, one) == "is" for one in options.calibration
        ):
            said_twice = "INT8 is calibrated on the images that AP is measured on: its AP may be better than on others"
            notes.append(f"{said_twice}.")
            log.warning(said_twice)
    if options.float16:
        to_float16(detector, folder / FLOAT32.file, folder / FLOAT16.file)
    variants = list(options.made)
    if options.openvino:
        _add_openvino(detector, folder, asked)
        variants.insert(variants.index(OPENVINO_FLOAT32) + 1, OPENVINO_BFLOAT16)
    variants = runnable(variants, folder)
    runs = {variant.name: open_variant(variant, folder, asked.threads) for variant in variants}
    measured, said = _measure(detector, runs, asked, calibration, console)
    timed: Mapping[str, list[Timing]] = {}
    notes.append(said)
    if asked.rounds:
        timed, told = time_variants(runs, size, asked.batch or 1, asked.rounds, asked.threads)
        notes.append(told)
    found = VariantsFound(tuple(_facts(one, folder, measured, timed) for one in variants), tuple(notes))
    show_variants(found, console)
    return found


def _add_openvino(detector: Detector, folder: Path, asked: Asked) -> None:
    """The conversion is checked at full precision, against PyTorch, before there are fewer bits."""
    session = session_of_openvino(folder / FLOAT32.file, asked.threads)
    noise = random_batches(asked.seen_as.resize.size, (asked.batch or 1,) * 3)
    where, tolerance, few_bits = f"{detector.family} in OpenVINO", TOLERANCE, is_quantised(detector.model)
    if few_bits:
        tolerance = tolerance_of(detector.model, asked.tolerance)
    if few_bits and detector.chooses_queries:
        noise += [("photographs", pixels) for pixels in _photographs(asked)]
        require_parity([check_sure(detector, session, "images", noise)], where, tolerance)
    else:
        require_parity(check_parity(detector, session, noise), where, tolerance)
    if few_bits:  # as it is: halves of its steps would be other steps
        to_openvino(folder / FLOAT32.file, folder / OPENVINO_FLOAT32.file)
        return
    with scratch_folder("openvino") as scratch:
        half = folder / FLOAT16.file
        if not asked.options.float16:
            half = scratch / FLOAT16.file
            to_float16(detector, folder / FLOAT32.file, half)
        to_openvino(half, folder / OPENVINO_FLOAT32.file)
    if asked.options.int8:
        to_openvino(folder / INT8.file, folder / OPENVINO_INT8.file)


def _photographs(asked: Asked) -> Iterator[torch.Tensor]:
    """Each image of `asked.images` as the graph takes it, as often as it takes images."""
    images = FileImages(asked.images, asked.seen_as)
    for number in range(len(images)):
        yield torch.from_numpy(np.repeat(images.load([number]).pixels, asked.batch or 1, 0))


def _facts(
    variant: Variant, folder: Path, measured: Mapping[str, Measured], timed: Mapping[str, list[Timing]]
) -> VariantFacts:
    found, times = measured[variant.name], timed.get(variant.name)
    ms, ratio = (times[0].ms_per_image, times[0].ratio) if times else (None, None)
    return VariantFacts(variant, variant.bytes_in(folder), found.differences, found.metrics, ms, ratio)


def _measure(
    detector: Detector, runs: Mapping[str, Run], asked: Asked, calibration: Calibration | None, console: Console
) -> tuple[dict[str, Measured], str]:
    """And on which images, in a sentence."""
    pictures: Iterable[Pictures]
    if asked.options.evaluate is not None:
        return evaluate_runs(detector, runs, asked.options.evaluate, asked.model, asked.seen_as, asked.batch, console)
    if calibration is not None:
        pictures, total, where = calibration.pictures(), calibration.count, "the images of the calibration"
    elif asked.images:
        some = FileImages(asked.images, asked.seen_as)
        pictures, total = (some.load([number]) for number in range(len(some))), len(some)
        where = "the photographs"
    else:
        noise = random_batches(asked.seen_as.resize.size, (1,) * NOISE)
        pictures, total, where = (Pictures(pixels.numpy()) for _, pixels in noise), NOISE, "noise"
    found = side_by_side(detector, runs, pictures, asked.batch or 1)
    first = next(iter(runs))
    return found, f"Differences to {first} are over {where}, {total}. AP was not measured (--evaluate)."


def evaluate_runs(
    detector: Detector,
    runs: Mapping[str, Run],
    data: str,
    model: str,
    seen_as: Preprocessing,
    batch: int | None,
    console: Console,
) -> tuple[dict[str, Measured], str]:
    """AP of each on labelled shards, and on which, in a sentence."""
    images, truth = labelled_images(data, model, detector, seen_as)
    with progress("AP", len(images), quiet=console.file is not sys.stdout) as row:
        found = side_by_side(detector, runs, _counted(images.all(), row.at), batch or 1, truth)
    return found, f"AP and differences to {next(iter(runs))} are over the {len(images)} images of {_named([data])}."


def _counted(pictures: Iterable[Pictures], at: Callable[[int], object]) -> Iterator[Pictures]:
    done = 0
    for some in pictures:
        yield some
        done += len(some.pixels)
        at(done)


def _named(given: Sequence[str]) -> str:
    """As a public card may name places: without what comes before the working folder or the home, or a password."""
    return without_home(", ".join(map(redacted_uri, given)))


def time_variants(
    runs: Mapping[str, Run], size: int, batch: int, rounds: int, threads: int
) -> tuple[dict[str, list[Timing]], str]:
    """In turn, so that ratios hold; and how, in a sentence."""
    timed = compare_speed(
        {name: run_runner(run, size) for name, run in runs.items()}, (batch,), rounds, limit_s=TIMING_LIMIT_S
    )
    (first,) = timed[next(iter(runs))]
    said = (
        f"Milliseconds are of batch {batch}, {threads} thread(s), CPU, {first.rounds} rounds in turn; ratio: of the time to "
        f"{next(iter(runs))}'s in the same round."
    )
    return timed, f"{said} {busy_note()}".rstrip()


def show_variants(found: VariantsFound, console: Console) -> None:
    """Two tables, which fit a terminal of 80 columns, and the notes."""
    tables: list[tuple[str, Sequence[str], Callable[[VariantFacts], list[str]]]] = []
    tables.append(("the same detector in each file", FIGURES, figures))
    if len(found.facts) > 1:
        tables.append((f"largest and mean differences to {found.facts[0].variant.name}", GAPS, gaps))
    for title, head, row in tables:
        table = Table(title=title)
        for number, column in enumerate(head):
            table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
        for one in found.facts:
            table.add_row(*map(Text, row(one)))
        console.print(table)
    for note in found.notes:
        console.print(note, markup=False, soft_wrap=True)
