"""A detector as a folder to deploy: plain Hugging Face, ONNX beside it, and what was measured (`qskd export`). No Ray.

python -m pipelines.export runs/quickstart/qskd/student --out exported --images photos/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pipelines.deployment.variants import Asked, VariantOptions, add_variants
from pipelines.inspection.predict import read_image
from pipelines.inspection.sources import IMAGE_ENDINGS
from pipelines.run.ownership import enclosing_run
from qskd.config import ResizeConfig
from qskd.datasets.views import View, view_image
from qskd.deploy.card_evaluation import PICTURES
from qskd.deploy.export import (
    TOLERANCE,
    Exporter,
    Parity,
    check_parity,
    check_sure,
    detect_program,
    export_onnx,
    open_session,
    random_batches,
    require_parity,
    together,
)
from qskd.deploy.model_card import Card, Figures, OnnxFacts, is_hub_name, read_card, read_facts, write_card
from qskd.deploy.qdq import notice_of_onnx, tolerance_of
from qskd.deploy.runtimes import as_stored
from qskd.deploy.speed import Size, compare_speed, cost_of, onnx_runner, torch_runner
from qskd.deploy.variants import FLOAT32
from qskd.detectors import (
    FAMILIES,
    Detector,
    Preprocessing,
    check_saveable,
    load_detector,
    read_config,
    read_preprocessing,
    replacing,
    save_detector,
    to_pixels,
)
from qskd.detectors.cost import busy_note
from qskd.errors import QskdError
from qskd.printable import escaped, one_line
from qskd.quantization.parity import AMONG, require_some
from qskd.storage.ownership import check_replaceable, listed, same_file
from qskd.storage.places import fetched, place_of

MOST_IMAGES = 16  # of a folder
DYNAMIC_SIZES = (1, 2, 3, 5)  # batches that a graph of free batch is tried with
TIMING_LIMIT_S = 30.0


@dataclass(frozen=True)
class ExportOptions:
    """size: side of the images; None: what the checkpoint's own processor says. batch_size: images at a time of a graph
    of fixed batch. rounds: of timing, 0 = none. images: files, or folders of which the first sixteen images are taken.
    overwrite: replace an earlier export; what else is in its folder stays. variants: the files besides model.onnx."""

    size: int | None = None
    batch_size: int = 1
    dynamic_batch: bool = False
    exporter: Exporter = "torchscript"
    onnx: bool = True
    images: tuple[Path, ...] = ()
    tolerance: float = TOLERANCE
    rounds: int = 20
    threads: int = 1
    overwrite: bool = False
    variants: VariantOptions = field(default_factory=VariantOptions)

    @property
    def batch(self) -> int | None:
        return None if self.dynamic_batch else self.batch_size

    def check(self) -> None:
        """QskdError for options that would have no effect."""
        if self.dynamic_batch and self.batch_size != 1:
            found = f"{self.batch_size}, with --dynamic-batch, whose graph takes any number"
            raise QskdError("--batch-size", found, "one of them")
        of_graph = {
            "--dynamic-batch": self.dynamic_batch,
            "--batch-size": self.batch_size != 1,
            "--images": bool(self.images),
            f"--exporter {self.exporter}": self.exporter != "torchscript",
            "--tolerance": self.tolerance != TOLERANCE,
        }
        if not self.onnx and (named := [name for name, given in of_graph.items() if given]):
            raise QskdError("--no-onnx", f"given with {', '.join(named)}, for a graph", "one or the other")


def square(model: str, given: int | None) -> Preprocessing:
    """How the exported model sees images: squares. QskdError when the checkpoint pads instead and no size is given."""
    own = read_preprocessing(model)
    if given is None and own.resize.mode != "square":
        raise QskdError(
            model,
            f"images are resized to a shortest edge of {own.resize.size} pixels and padded",
            "one square size, which an exported graph takes",
            f"--size {own.resize.size}: images are then squeezed into squares, and AP may change (`qskd evaluate` on "
            "the exported folder tells)",
        )
    return Preprocessing(ResizeConfig(mode="square", size=given or own.resize.size), own.mean, own.std)


def image_files(given: Sequence[Path]) -> list[Path]:
    """Files as they are, the first images of folders in alphabetical order. QskdError for what is not there, or has none."""
    files: list[Path] = []
    for path in given:
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise QskdError(str(path), "no such file or folder", "an image, or a folder of images", "check the path")
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_ENDINGS)
        if not inside:
            raise QskdError(str(path), "no images", f"files that end in {', '.join(IMAGE_ENDINGS)}")
        files += inside[:MOST_IMAGES]
    return files


def check_images(given: Sequence[Path]) -> list[Path]:
    """The files, each of which can be read: QskdError before minutes are spent on the graph."""
    files = image_files(given)
    for file in files:
        read_image(file)
    return files


def real_batches(files: Sequence[Path], seen_as: Preprocessing, batch: int) -> list[tuple[str, Tensor]]:
    """Photographs as the model sees them, `batch` at a time; the last batch is filled up with its last image."""
    batches = []
    for start in range(0, len(files), batch):
        some = list(files[start : start + batch])
        some += [some[-1]] * (batch - len(some))
        pixels = np.stack([view_image(read_image(file), View.IDENTITY, seen_as.resize) for file in some])
        sizes = torch.full((batch, 2), seen_as.resize.size)
        values, _ = to_pixels(torch.from_numpy(pixels), sizes, seen_as.mean, seen_as.std)
        batches.append((some[0].name, values))
    return batches


def time_both(detector: Detector, session: object, size: Size, batch: int, options: ExportOptions) -> str:
    """PyTorch and onnxruntime in turn on the CPU, in a sentence."""
    torch.set_num_threads(options.threads)
    runners = {"PyTorch": torch_runner(detector, size, torch.device("cpu")), "onnxruntime": onnx_runner(session, size)}
    timed = compare_speed(runners, (batch,), options.rounds, limit_s=TIMING_LIMIT_S)
    (mine,), (theirs,) = timed.values()
    said = (
        f"PyTorch {mine.ms_per_image:.1f} ms/image, onnxruntime {theirs.ms_per_image:.1f} ms/image, which takes "
        f"{theirs.ratio:.2f} times as long (batch {batch}, {options.threads} thread(s), CPU, {mine.rounds} rounds in turn)."
    )
    return f"{said} {busy_note()}".rstrip()


def parity_table(found: Sequence[Parity], tolerance: float) -> Table:
    table = Table(title=f"largest difference, PyTorch to onnxruntime (allowed: {tolerance:g})")
    for column in ("input", "images", "probabilities", "boxes", "logits", "queries in another place"):
        table.add_column(column, justify="left" if column == "input" else "right")
    for parity in found:
        values = [f"{value:.1e}" for value in (parity.probabilities, parity.boxes, parity.logits)]
        table.add_row(Text(one_line(parity.name)), str(parity.batch), *values, str(parity.reordered or ""))
    return table


def foresee(model: str, out: Path, options: ExportOptions) -> str:
    """What `--dry-run` prints."""
    options.check()
    with fetched(model) as folder:
        check_out(model, out, options.overwrite)
        config = read_config(folder)
        check_saveable(config.model_type, model)
        seen_as, images = square(folder, options.size), check_images(options.images)
        options.variants.check(str(folder), options.onnx, options.exporter, seen_as)
        size = seen_as.resize.size
        FAMILIES[config.model_type].check_size(config, size, size)
    if not options.onnx:
        return f"{model} → {out}: a Hugging Face folder, images of {size} x {size} pixels"
    batch = "any batch" if options.dynamic_batch else f"batch {options.batch_size}"
    checked = f"noise{f' and {len(images)} image(s)' if images else ''}"
    return (
        f"{model} → {out}: a Hugging Face folder and ONNX ({options.exporter}), {batch}, images of {size} x {size} "
        f"pixels, checked with {checked}{_besides(options)}"
    )


def _besides(options: ExportOptions) -> str:
    """What `--dry-run` says of the other files."""
    asked, said = options.variants, ""
    if len(asked.made) > 1:
        said += f"; besides {', '.join(one.file for one in asked.made[1:])}"
    if asked.int8:
        said += f"; INT8 is calibrated on {', '.join(asked.calibration)}"
    return said + (f"; AP of each file on {asked.evaluate}" if asked.evaluate is not None else "")


def check_out(model: str, out: Path, overwrite: bool) -> None:
    """QskdError unless `out` may be written: another folder than the model's, new, empty or, with `overwrite`, made by qskd, and
    not one that a run keeps, whose student would be replaced."""
    own = place_of(model)
    if isinstance(own, Path) and own.is_dir() and same_file(out, own):
        raise QskdError("--out", f"{out}, the model's own folder", "another folder")
    check_replaceable(out, overwrite)
    run = enclosing_run(out)
    if run is not None and out.is_dir() and any(out.iterdir()):
        raise QskdError("--out", f"{out}, a folder of the run {run}", "a folder of its own", "choose another folder")
    if out.is_dir() and not overwrite and (names := sorted(path.name for path in out.iterdir())):
        raise QskdError(
            "--out",
            f"{out}, which holds an earlier export: {listed(names)}",
            "a new or an empty folder",
            "choose another folder; or `--overwrite`, which replaces qskd's own files there; nothing was written",
        )


def export(model: str, out: Path, options: ExportOptions, console: Console | None = None) -> Path:
    """Write the folder `out`, whole or not at all, of a Hub name, folder or URI; prints what it checks and measures. Raises
    QskdError."""
    options.check()
    check_out(model, out, options.overwrite)
    with fetched(model) as folder:
        return _export(folder, model, out, options, console or Console())


def _export(model: str, named: str, out: Path, options: ExportOptions, console: Console) -> Path:
    """model: a Hub name or a local folder; named: as the user named it."""
    check_saveable(read_config(model).model_type, named)
    seen_as = square(model, options.size)
    check_images(options.images)
    options.variants.check(model, options.onnx, options.exporter, seen_as)
    detector = load_detector(model)
    FAMILIES[detector.family].check_size(detector.model.config, seen_as.resize.size, seen_as.resize.size)
    with replacing(out, options.overwrite) as fresh:
        save_detector(detector, fresh, seen_as.resize, read_facts(model), seen_as.mean, seen_as.std)
        onnx = _add_onnx(detector, fresh, seen_as, options, console) if options.onnx else None
        found = None
        if options.variants.any:
            photographs = image_files(options.images)
            how = (seen_as, options.batch, photographs, options.rounds, options.threads, options.tolerance)
            found = add_variants(detector, fresh, Asked(named, options.variants, *how), console)
        card = replace(card_of(model, named, detector, seen_as, onnx), variants=found)
        if card.evaluation is not None:
            for name in PICTURES:
                if (Path(model) / name).is_file():
                    (fresh / name).write_bytes((Path(model) / name).read_bytes())
        write_card(fresh, card)
    told = f"→ {out}: {', '.join(sorted(file.name for file in out.iterdir()))}"
    console.print(escaped(told), markup=False, soft_wrap=True)
    return out


def card_of(model: str, named: str, detector: Detector, seen_as: Preprocessing, onnx: OnnxFacts | None) -> Card:
    """The card that the model came with, or a new one, with what this export found. AP that was measured at another size
    of the images is left out."""
    size = Size(seen_as.resize.size, seen_as.resize.size)
    cost, card = cost_of(detector, size), read_card(model)
    if card is None:
        path = named.partition("?")[0] if "://" in named else named  # a URI's query is no part of its name
        name = named if is_hub_name(named) else Path(path).resolve().name
        own = Figures("this model", {}, cost.parameters, cost.gflops, input=str(size))
        return Card(name, detector.family, len(detector.labels), (own,), onnx=onnx)
    rows = card.rows
    if read_preprocessing(model).resize != seen_as.resize:
        rows = (*rows[:-1], Figures("this model", {}, cost.parameters, cost.gflops, input=str(size)))
        card = replace(card, evaluation=None)
    return replace(card, rows=rows, onnx=onnx)


def _add_onnx(
    detector: Detector, folder: Path, seen_as: Preprocessing, options: ExportOptions, console: Console
) -> OnnxFacts:
    file, size, tolerance = folder / "model.onnx", seen_as.resize.size, tolerance_of(detector.model, options.tolerance)
    export_onnx(detector, file, size, options.batch, options.exporter)
    (folder / "detect.py").write_text(detect_program(), encoding="utf-8")
    session = open_session(file, options.threads)
    sizes = DYNAMIC_SIZES if options.dynamic_batch else (options.batch_size,) * 3
    batches = {"random": random_batches(size, sizes)}
    if options.images:
        batches["photographs"] = real_batches(image_files(options.images), seen_as, options.batch or 1)
    notice = notice_of_onnx(detector.model)
    chance = detector.chooses_queries and bool(notice)
    if chance:
        found = [check_sure(detector, session, name, those) for name, those in batches.items()]
    else:
        found = check_parity(detector, session, batches["random"])
        if options.images:
            found.append(together("photographs", check_parity(detector, session, batches["photographs"])))
    if notice:
        console.print(escaped(notice), markup=False, soft_wrap=True)
    console.print(parity_table(found, tolerance))
    if chance:
        compared = sum(parity.compared for parity in found)
        console.print(f"{AMONG}: {compared} queries; which others are chosen is chance", markup=False, soft_wrap=True)
        require_some(compared, sum(parity.batch for parity in found), detector.family)
    require_parity(found, detector.family, tolerance)
    said = ""
    if options.rounds:
        said = time_both(detector, session, Size(size, size), options.batch or 1, options)
        console.print(said, soft_wrap=True)
    worst = together("", found)
    differences = (worst.batch, worst.logits, worst.probabilities, worst.boxes)
    weights = as_stored(FLOAT32, folder).weights
    return OnnxFacts(options.batch, size, *differences, said, AMONG if chance else "", weights)
