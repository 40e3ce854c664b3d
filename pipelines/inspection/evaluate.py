"""COCO AP of any detector on a shard folder (`qskd evaluate`), as a Ray Data job.

python -m pipelines.evaluate runs/quickstart/qskd/student runs/quickstart/data/val
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from pipelines.cluster.room import check_gpus, say_if_on_cpus
from pipelines.cluster.start import quiet_ray_data, start_ray
from pipelines.inspection.actors import CHOICE, DetectorActor, Job, parts_of
from pipelines.reporting.board import Row, progress
from pipelines.reporting.watch import CountWatch
from pipelines.reporting.words import duration_text
from pipelines.run.places import for_workers
from qskd.checks import check_shards
from qskd.config import ResizeConfig
from qskd.config.recipe import parse_override
from qskd.datasets.classes import Explicit, map_classes, model_side
from qskd.datasets.findings.splits import beyond_reach
from qskd.datasets.manifest import Manifest, check_labelled, load_manifest
from qskd.detectors import load_detector, read_preprocessing, words_for
from qskd.errors import QskdError
from qskd.evaluation.average_precision import choose_backend, evaluate_coco
from qskd.evaluation.details import Evaluation, evaluate_in_detail
from qskd.evaluation.detections import Backend, Detections, GroundTruth
from qskd.evaluation.pairs import pairs_of_transformers
from qskd.from_recipe import ground_truth
from qskd.printable import one_line
from qskd.quantization.model import notice_of
from qskd.storage.places import fetched

log = logging.getLogger("qskd")
# The fields of a recipe that an evaluation reads.
COUNT = ("teacher.resize", "teacher.class_map", "compute.device", "compute.evaluation_precision")


def check_overrides(overrides: Sequence[str]) -> None:
    """QskdError for a field that is set for this evaluation and would not change it. A recipe's file may hold anything."""
    for text in overrides:
        name = ".".join(parse_override(text)[0])
        if not any(name == field or name.startswith(f"{field}.") for field in COUNT):
            raise QskdError(
                f"--set {text}",
                f"{name} has no effect on an evaluation",
                f"{COUNT[0]} and {COUNT[1]}, for a detector with another input size or other names, {COUNT[2]} or {COUNT[3]}",
                "leave it out; batch size, processes and threads are options: `qskd evaluate --help`",
            )


def evaluate(
    model: str,
    data: str,
    resize: ResizeConfig | None = None,
    class_map: Explicit | None = None,
    batch_size: int = 16,
    workers: int = 1,
    threads: int = 1,
    backend: Backend | Literal["auto"] = "auto",
    device: str = "auto",
    max_detections: int = 100,
    precision: str = "float32",
    tell_nobody: bool = True,
) -> Evaluation:
    """COCO AP of a Hub name, folder or URI, and all else that `Evaluation` says. resize: None takes the checkpoint's own.

    workers: the most detector actors, over the whole cluster; 0 does it all in this process, without Ray. device: of each,
    as `compute.device` has it; precision: as `compute.evaluation_precision`. max_detections: of an image; so many are kept and
    counted. A metric is -1 where the data has no object to measure it on. tell_nobody: whether it is warned of
    classes that are left to nobody, whose objects count as missed.
    """
    choose_backend(backend)  # not after hours
    manifest = load_manifest(data)
    check_labelled(data, manifest)
    if not manifest.num_objects:
        log.warning("%s has no objects: nothing can be measured on it", data)
    check_shards(data, manifest)
    with fetched(model) as folder:
        words = words_for(manifest.labels, class_map)
        preprocessing, detector = read_preprocessing(folder, resize), load_detector(folder, words=words)
        map_classes(
            manifest.labels, detector.labels, class_map or {}, model_side(model)
        )  # complain before anything starts
        rule = pairs_of_transformers(detector.family, detector.num_queries, max_detections)
        for notice in beyond_reach(data, manifest, detector.num_queries, max_detections):
            log.warning(notice)
        if notice := notice_of(detector.model):
            log.warning("%s: %s", one_line(model), notice)
        del detector
    places = for_workers(model), for_workers(data)
    job = Job(*places, preprocessing, class_map or {}, batch_size, threads, device, precision, max_detections)
    with progress("evaluate", manifest.num_images) as row:
        found = _on_cluster(job, manifest, workers, row) if workers else _here(job, manifest, row)
        row.at(manifest.num_images, doing="computing AP")
        ours, plain = (_chosen(found, choice) for choice in (0, 1))
        truth = ground_truth(data)
        if tell_nobody:
            _say_what_is_left_to_nobody(class_map or {}, manifest, truth)
        result = evaluate_coco(truth, ours, backend, max_detections)
        return evaluate_in_detail(truth, ours, result, plain if rule else None, rule, max_detections)


def _say_what_is_left_to_nobody(class_map: Explicit, manifest: Manifest, truth: GroundTruth) -> None:
    for name in (name for name, label in class_map.items() if label is None):
        (number,) = (category.id for category in manifest.categories if category.name == name)
        if count := int((truth.category_ids == number).sum()):
            log.warning("%s is left to nobody: its %d object(s) count as missed", one_line(name), count)


def _chosen(found: Sequence[Mapping[str, Any]], choice: int) -> Detections:
    """Of what the detectors' batches gave, the detections of one choice of pairs."""
    parts = []
    for part in found:
        mine = np.asarray(part[CHOICE]) == choice
        parts.append(Detections(**{name: np.asarray(part[name])[mine] for name in part if name != CHOICE}))
    return Detections.concatenate([Detections.empty(), *parts])


def foresee(
    model: str,
    data: str,
    resize: ResizeConfig | None = None,
    class_map: Explicit | None = None,
    batch_size: int = 16,
    workers: int = 1,
    threads: int = 1,
    device: str = "auto",
    precision: str = "float32",
) -> str:
    """What `--dry-run` prints: what is evaluated, and how long it will take, from two batches tried in this process."""
    manifest = load_manifest(data)
    check_labelled(data, manifest)
    check_shards(data, manifest)
    with fetched(model) as folder:
        preprocessing = read_preprocessing(folder, resize)
    said = f"{model} on {manifest.num_images} images of {data}, resized: {preprocessing.resize}, {workers} process(es)"
    if "://" in data:
        return f"{said}\ntime: not known: the images are in a store, and not on this machine"
    before = torch.get_num_threads()
    try:
        actor = DetectorActor(Job(model, data, preprocessing, class_map or {}, batch_size, threads, device, precision))
        chunk = np.arange(min(batch_size, manifest.num_images))
        actor.detect(chunk)  # wakes it up
        actor.loader = actor.open()
        started = time.perf_counter()
        actor.detect(chunk)
        image_s = (time.perf_counter() - started) / len(chunk)
    except Exception as error:  # the rest stands all the same
        return (
            f"{said}\ntime: not known: it could not be tried here: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
    finally:
        torch.set_num_threads(before)
    total = duration_text(manifest.num_images * image_s / max(1, workers))
    tried = f"{1000 * image_s:.1f} ms an image, tried here on {actor.device} with {len(chunk)} images"
    return f"{said}\ntime: about {total}: {tried}, {max(1, workers)} process(es); starting and AP's own arithmetic come on top"


def _here(job: Job, manifest: Manifest, row: Row) -> list[dict[str, np.ndarray]]:
    if job.device == "cuda" and not torch.cuda.is_available():
        raise QskdError("compute.device", "cuda, and there is no GPU here", "cpu, auto, or a machine with one")
    actor, found = DetectorActor(job), []
    for part in actor({"first": np.array([0]), "end": np.array([manifest.num_images])}):
        found.append(part)
        row.at(actor.images)
    return found


def _on_cluster(job: Job, manifest: Manifest, workers: int, row: Row) -> list[dict[str, Any]]:
    row.stage("starting Ray")
    start_ray()
    import ray

    quiet_ray_data()
    say_if_on_cpus(job.device)
    there = bool(ray.cluster_resources().get("GPU"))
    if job.device == "cuda":
        check_gpus(1)
    row.stage("loading the detector")
    subject = f"evaluation-{uuid.uuid4().hex}"
    parts = [
        {"first": first, "end": end} for first, end in parts_of(manifest.shard_rows, job.batch_size, workers).tolist()
    ]
    detections = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
        DetectorActor,
        fn_constructor_args=(job, subject),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_gpus=1 if job.device == "cuda" or (job.device == "auto" and there) else 0,
        num_cpus=1,
    )
    with CountWatch(row, subject, manifest.num_images):
        return list(detections.iter_batches(batch_size=None))
