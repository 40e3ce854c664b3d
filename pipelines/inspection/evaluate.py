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

from pipelines.cluster.devices import device_of
from pipelines.cluster.room import check_gpus, say_if_on_cpus
from pipelines.cluster.start import quiet_ray_data, start_ray
from pipelines.reporting.board import Row, progress
from pipelines.reporting.pulse import Pulse
from pipelines.reporting.watch import CountWatch
from pipelines.reporting.words import duration_text
from qskd.checks import check_shards
from qskd.config import ResizeConfig, ViewConfig
from qskd.config.recipe import parse_override
from qskd.datasets.classes import NOBODY, Explicit, map_classes, model_side
from qskd.datasets.findings.splits import beyond_reach
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.detectors import Preprocessing, load_detector, read_preprocessing
from qskd.errors import QskdError
from qskd.evaluation.average_precision import evaluate_coco
from qskd.evaluation.details import Evaluation, evaluate_in_detail
from qskd.evaluation.detections import Backend, Detections, GroundTruth
from qskd.evaluation.inference import predict_pairs
from qskd.evaluation.pairs import Pairs, pairs_of_transformers
from qskd.from_recipe import ground_truth
from qskd.printable import one_line
from qskd.storage.places import fetched

log = logging.getLogger("qskd")
CHOICE = "choice"  # of pairs: the column that tells them apart
COUNT = ("teacher.resize", "teacher.class_map", "compute.device")  # the fields of a recipe that an evaluation reads


class DetectorActor:
    """Holds the detector and a loader; turns row ranges into detections."""

    def __init__(
        self,
        model: str,
        data: str,
        preprocessing: Preprocessing,
        class_map: Explicit,
        threads: int,
        device: str = "auto",
        max_detections: int = 100,
        subject: str = "",
    ) -> None:
        self.pulse, self.images = Pulse(subject, uuid.uuid4().hex), 0
        torch.set_num_threads(threads)
        manifest = load_manifest(data)
        self.device = device_of(device)
        with fetched(model) as folder:
            self.detector = load_detector(folder).to(self.device).eval()
        slots = map_classes(manifest.labels, self.detector.labels, class_map, model_side(model))
        known = [(slot, one.id) for slot, one in zip(slots, manifest.categories, strict=True) if slot != NOBODY]
        self.slots, self.category_ids = ([pair[side] for pair in known] for side in (0, 1))
        self.preprocessing = preprocessing
        # Ours, and what transformers would keep, where that is something else.
        rule = pairs_of_transformers(self.detector.family, self.detector.num_queries, max_detections)
        self.choices = [Pairs(max_detections, False), *([rule] if rule else [])]
        self.loader = BatchLoader(data, data, ViewConfig(), preprocessing.resize, None, keep_bytes=0)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = np.stack([batch["shard"], batch["row"], np.zeros_like(batch["row"])], 1).astype(np.int32)
        arrays = self.loader.load("val", rows)
        found = predict_pairs(
            *(self.detector, arrays, self.preprocessing, self.category_ids, self.choices, self.slots, self.device)
        )
        self.images += len(rows)
        self.pulse.tell(images=self.images)
        choice = np.repeat(np.arange(len(found)), [len(part.scores) for part in found])
        return {**vars(Detections.concatenate(found)), CHOICE: choice}


def check_overrides(overrides: Sequence[str]) -> None:
    """QskdError for a field that is set for this evaluation and would not change it. A recipe's file may hold anything."""
    for text in overrides:
        name = ".".join(parse_override(text)[0])
        if not any(name == field or name.startswith(f"{field}.") for field in COUNT):
            raise QskdError(
                f"--set {text}",
                f"{name} has no effect on an evaluation",
                f"{COUNT[0]} and {COUNT[1]}, for a detector with another input size or other names, or {COUNT[2]}",
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
) -> Evaluation:
    """COCO AP of a Hub name, folder or URI, and all else that `Evaluation` says. resize: None takes the checkpoint's own.

    workers: the most detector actors, over the whole cluster; 0 does it all in this process, without Ray. device: of each,
    as `compute.device` has it. max_detections: of an image; so many are kept and counted. A metric is -1 where the data has
    no object to measure it on.
    """
    manifest = load_manifest(data)
    if not manifest.num_objects:
        log.warning("%s has no objects: nothing can be measured on it", data)
    check_shards(data, manifest)
    with fetched(model) as folder:
        preprocessing, detector = read_preprocessing(folder, resize), load_detector(folder)
        map_classes(
            manifest.labels, detector.labels, class_map or {}, model_side(model)
        )  # complain before anything starts
        rule = pairs_of_transformers(detector.family, detector.num_queries, max_detections)
        for notice in beyond_reach(data, manifest, detector.num_queries, max_detections):
            log.warning(notice)
        del detector
    arguments = (model, data, preprocessing, class_map or {}, threads, device, max_detections)
    places = _places(manifest)
    with progress("evaluate", len(places)) as row:
        if workers:
            found = _on_cluster(arguments, places, batch_size, workers, device, row)
        else:
            found = _here(arguments, places, batch_size, device, row)
        row.at(len(places), doing="computing AP")
        ours, plain = (_chosen(found, choice) for choice in (0, 1))
        truth = ground_truth(data)
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
) -> str:
    """What `--dry-run` prints: what is evaluated, and how long it will take, from two batches tried in this process."""
    manifest = load_manifest(data)
    check_shards(data, manifest)
    with fetched(model) as folder:
        preprocessing = read_preprocessing(folder, resize)
    said = f"{model} on {manifest.num_images} images of {data}, resized: {preprocessing.resize}, {workers} process(es)"
    if "://" in data:
        return f"{said}\ntime: not known: the images are in a store, and not on this machine"
    before = torch.get_num_threads()
    try:
        actor = DetectorActor(model, data, preprocessing, class_map or {}, threads, device)
        chunk = _places(manifest)[:batch_size]
        for _ in range(2):  # the first wakes it up
            started = time.perf_counter()
            actor({"shard": chunk[:, 0], "row": chunk[:, 1]})
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


def _places(manifest: Manifest) -> np.ndarray:
    """(shard, row) of each image."""
    return np.array([(s, r) for s, count in enumerate(manifest.shard_rows) for r in range(count)]).reshape(-1, 2)


def _here(
    arguments: tuple[Any, ...], places: np.ndarray, batch_size: int, device: str, row: Row
) -> list[dict[str, np.ndarray]]:
    if device == "cuda" and not torch.cuda.is_available():
        raise QskdError("compute.device", "cuda, and there is no GPU here", "cpu, auto, or a machine with one")
    actor, found = DetectorActor(*arguments), []
    for chunk in np.split(places, range(batch_size, len(places), batch_size)):
        found.append(actor({"shard": chunk[:, 0], "row": chunk[:, 1]}))
        row.at(actor.images)
    return found


def _on_cluster(
    arguments: tuple[Any, ...], places: np.ndarray, batch_size: int, workers: int, device: str, row: Row
) -> list[dict[str, Any]]:
    row.stage("starting Ray")
    start_ray()
    import ray

    quiet_ray_data()
    say_if_on_cpus(device)
    there = bool(ray.cluster_resources().get("GPU"))
    if device == "cuda":
        check_gpus(1)
    row.stage("loading the detector")
    subject = f"evaluation-{uuid.uuid4().hex}"
    rows = [{"shard": shard, "row": row} for shard, row in places.tolist()]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows) // batch_size, 8 * workers)))
    detections = dataset.map_batches(
        DetectorActor,
        fn_constructor_args=(*arguments, subject),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_gpus=1 if device == "cuda" or (device == "auto" and there) else 0,
        num_cpus=1,
    )
    with CountWatch(row, subject, len(places)):
        return list(detections.iter_batches(batch_size=None))
