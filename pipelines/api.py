"""The verbs as functions, for programs: the same names and options, values instead of prints. `import qskd` has them.

They raise QskdError where the command line prints one. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pipelines.command import local_path
from pipelines.functions.recipes import Fields, Folder, Recipe, as_the_command, configuration, unless
from pipelines.functions.unlabeled import label as label
from pipelines.functions.unlabeled import select as select
from qskd.errors import QskdError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from pipelines.caching.driver import CacheResult
    from pipelines.training.driver import RunResult
    from pipelines.tuning.finish import SweepResult
    from qskd.datasets.findings.finding import Finding
    from qskd.datasets.manifest import Manifest
    from qskd.deploy.variants import VariantFacts
    from qskd.evaluation.details import Evaluation

    Picture: TypeAlias = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prepared:
    """folder: of the shards. classes: names, by label. problems: what was left out, as manifest.json has it. findings: what looks
    wrong, though it can be read. manifest: all that is known of them."""

    folder: str
    images: int
    objects: int
    classes: tuple[str, ...]
    problems: tuple[Any, ...]
    findings: tuple[Finding, ...]
    manifest: Manifest


@dataclass(frozen=True, eq=False)
class Prediction:
    """N objects found in one image, best first. image: as it was given. boxes_xyxy: [N, 4] float32, pixels of the upright image.
    scores: [N] float32. labels: N class names. label_ids: [N] int64, slots of the detector's classes."""

    image: Any
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    labels: tuple[str, ...]
    label_ids: np.ndarray


@dataclass(frozen=True)
class Exported:
    """folder: plain Hugging Face. onnx: the graph beside it, None without. largest_difference: between PyTorch and the graph, of
    class probabilities and boxes (of the image); None without a graph. latency: a sentence, empty where it was not measured.
    variants: of each file, where others or AP were asked for."""

    folder: str
    onnx: str | None
    largest_difference: float | None
    latency: str
    variants: tuple[VariantFacts, ...] = ()


@as_the_command("prepare")
def prepare(
    annotations: Folder,
    images: Folder | None,
    destination: Folder,
    *,
    split: str | None = None,
    classes: Folder | None = None,
    box_format: str | None = None,
    rows_per_shard: int = 512,
    on_error: Literal["stop", "skip"] = "stop",
    exif: Literal["auto", "upright", "stored"] = "auto",
    overwrite: bool = False,
    strict: bool = False,
    accept: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    unlabeled: bool = False,
    not_in: Sequence[Folder] = (),
    also: Sequence[Folder] = (),
) -> Prepared:
    """Turn COCO JSON and a folder of images into Parquet shards, or YOLO's data.yaml, a folder with Pascal VOC or a Hugging Face
    dataset (images: None); with `unlabeled` a folder of pictures, or a text file that lists some. Or a selection
    of labelled shards, and what is in `also`. destination: a path or a URI.
    Options as of `qskd prepare --help`."""
    from pipelines.prepare import prepare as program

    folder = os.fspath(destination)
    manifest = program(
        local_path(annotations),
        None if images is None else local_path(images),
        folder,
        rows_per_shard=rows_per_shard,
        on_error=on_error,
        overwrite=overwrite,
        quiet=True,
        strict=strict,
        accept=accept,
        leave_out=leave_out,
        exif=exif,
        split=split,
        classes=None if classes is None else local_path(classes),
        box_format=box_format,
        unlabeled=unlabeled,
        not_in=[os.fspath(folder) for folder in not_in],
        also=[os.fspath(source) for source in also],
    )
    told = tuple(manifest.problems), tuple(manifest.findings)
    return Prepared(folder, manifest.num_images, manifest.num_objects, manifest.labels, *told, manifest)


@as_the_command("cache", "cache_teacher")
def cache(
    recipe: Recipe = None,
    *,
    set: Fields = (),
    methods: Sequence[Folder] = (),
    overwrite: bool = False,
    verbose: bool = False,
) -> CacheResult:
    """Run the teacher once over the data and keep its outputs. verbose: progress on standard output."""
    from pipelines.caching.driver import run

    config = configuration(recipe, set, methods)
    with unless(verbose):
        return run(config, overwrite, quiet=not verbose)


@as_the_command("train")
def train(
    recipe: Recipe = None,
    *,
    set: Fields = (),
    methods: Sequence[Folder] = (),
    restart: bool = False,
    verbose: bool = False,
) -> RunResult:
    """Train a detector without a teacher; the same call again goes on where it was stopped. verbose: progress on standard
    output."""
    return _trained("train", recipe, set, methods, restart, verbose)


@as_the_command("distill")
def distill(
    recipe: Recipe = None,
    *,
    set: Fields = (),
    methods: Sequence[Folder] = (),
    restart: bool = False,
    verbose: bool = False,
) -> RunResult:
    """Distil a student from a teacher; the same call again goes on where it was stopped. verbose: progress on standard
    output."""
    return _trained("distill", recipe, set, methods, restart, verbose)


def _trained(
    verb: str, recipe: Recipe, set: Fields, methods: Sequence[Folder], restart: bool, verbose: bool
) -> RunResult:
    from pipelines.training.driver import run

    config = configuration(recipe, set, methods)
    with unless(verbose):
        return run(config, verb, restart)


@as_the_command("tune")
def tune(
    recipe: Recipe = None,
    *,
    set: Fields = (),
    methods: Sequence[Folder] = (),
    space: Sequence[str] = (),
    trials: int = 20,
    algorithm: Literal["tpe", "random", "pbt"] = "tpe",
    objective: Sequence[str] = ("AP",),
    asha: bool | None = None,
    grace_epochs: int = 0,
    trial_epochs: int = 0,
    at_most_parameters: str = "",
    at_once: int = 0,
    restart: bool = False,
    verbose: bool = False,
) -> SweepResult:
    """Search student architectures, GIoU boundaries and loss weights; options as of `qskd tune --help`. The same call again goes
    on where it was stopped. verbose: progress on standard output."""
    from pipelines.tuning import driver
    from pipelines.tuning.search.request import SearchRequest

    search = SearchRequest(tuple(space), trials, algorithm, tuple(objective), asha, grace_epochs)
    request = driver.TuneRequest(search, trial_epochs, at_most_parameters, at_once)
    config = configuration(recipe, set, methods)
    with unless(verbose):
        return driver.run(config, request, restart)


@as_the_command("evaluate")
def evaluate(
    model: Folder,
    data: Folder,
    *,
    recipe: Recipe = None,
    set: Fields = (),
    methods: Sequence[Folder] = (),
    batch_size: int = 16,
    workers: int = 0,
    threads: int = 1,
    backend: Literal["auto", "hotcoco", "faster_coco_eval", "pycocotools"] = "auto",
    max_detections: int = 100,
    known_by: Folder = "",
) -> Evaluation:
    """COCO AP of any detector on a folder of shards, by class too, and the best threshold. known_by: an old detector; what of its
    classes was forgotten is then in `forgetting`. recipe, set: their teacher.resize,
    teacher.class_map, compute.device and compute.evaluation_precision count. workers: 0 does it in this process; otherwise the most
    detector processes of Ray."""
    from pipelines.inspection.evaluate import evaluate as program
    from pipelines.inspection.known import classes_known_by, with_forgetting

    config, shards = configuration(recipe, set, methods), os.fspath(data)
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "threads": threads, "backend": backend}
    options |= {"device": config.compute.device, "max_detections": max_detections}
    options |= {"precision": config.compute.evaluation_precision}
    with unless(False):
        if known_by:
            classes_known_by(os.fspath(known_by), shards)
        found = program(os.fspath(model), shards, config.teacher.resize, config.teacher.class_map, **options)
        return with_forgetting(found, os.fspath(known_by), shards, options) if known_by else found


@as_the_command("predict")
def predict(
    model: Folder, images: Picture | Sequence[Picture], *, threshold: float = 0.5, classes: Sequence[str] = ()
) -> list[Prediction]:
    """What a detector finds in each image: files, Pillow's pictures (turned as their EXIF says, as files are), or RGB uint8 arrays
    [H, W, 3]; one image is a list of one. Writes nothing. threshold: lowest score. classes: what a detector that is asked in words
    is to look for."""
    import numpy as np
    from PIL import Image

    from pipelines.cluster.devices import device_of
    from pipelines.functions.pictures import pixels_of
    from qskd.detectors import check_classes, load_detector, read_preprocessing
    from qskd.evaluation.inference import predict_image
    from qskd.storage.places import fetched

    one = isinstance(images, str | os.PathLike | Image.Image | np.ndarray)
    several: Sequence[Any] = [images] if one else images  # type: ignore[assignment]
    with fetched(os.fspath(model)) as folder:
        check_classes(folder, classes)
        detector, preprocessing = load_detector(folder, words=classes).eval(), read_preprocessing(folder)
    detector.to(device_of("auto"))
    said = []
    for image in several:
        found = predict_image(detector, pixels_of(image), preprocessing, range(len(detector.labels)), threshold)
        names = tuple(detector.labels[label] for label in found.category_ids.tolist())
        said.append(Prediction(image, found.boxes_xyxy, found.scores, names, found.category_ids))
    return said


@as_the_command("export")
def export(
    model: Folder,
    out: Folder,
    *,
    size: int | None = None,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    images: Sequence[Folder] = (),
    onnx: bool = True,
    exporter: Literal["torchscript", "dynamo"] = "torchscript",
    int8: bool = False,
    float16: bool = False,
    openvino: bool = False,
    calibration: Folder | Sequence[Folder] = (),
    evaluate: Folder | None = None,
    tolerance: float = 1e-4,
    rounds: int = 20,
    threads: int = 1,
    overwrite: bool = False,
) -> Exported:
    """Write a detector as a folder to deploy: plain Hugging Face and ONNX, checked against PyTorch; options as of
    `qskd export --help`."""
    from rich.console import Console

    from pipelines.deployment import export as program
    from pipelines.deployment.variants import VariantOptions
    from qskd.deploy.model_card import read_card

    if not isinstance(calibration, str | os.PathLike | Sequence):
        raise QskdError(
            "qskd.export: calibration", repr(calibration), "a folder of shards or images, or several of images"
        )
    given = [calibration] if isinstance(calibration, str | os.PathLike) else list(calibration or images)
    shards = None if evaluate is None else os.fspath(evaluate)
    options = program.ExportOptions(
        size=size,
        batch_size=batch_size,
        dynamic_batch=dynamic_batch,
        exporter=exporter,
        onnx=onnx,
        images=tuple(local_path(image) for image in images),
        tolerance=tolerance,
        rounds=rounds,
        threads=threads,
        overwrite=overwrite,
        variants=VariantOptions(int8, float16, openvino, tuple(os.fspath(each) for each in given), shards),
    )
    with unless(False):
        folder = program.export(os.fspath(model), local_path(out), options, Console(file=io.StringIO()))
    card = read_card(folder)
    facts = card.onnx if card is not None and onnx else None
    if facts is None:
        return Exported(str(folder), None, None, "")
    found = card.variants.facts if card is not None and card.variants is not None else ()
    largest = max(facts.probabilities, facts.boxes)
    return Exported(str(folder), str(folder / "model.onnx"), largest, facts.latency, found)
