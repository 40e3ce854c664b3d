"""COCO AP of any detector on a shard folder (`qskd evaluate`), as a Ray Data job.

python -m pipelines.evaluate runs/quickstart/qskd/student runs/quickstart/data/val
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from pipelines.cluster.devices import device_of
from pipelines.cluster.room import check_gpus, say_if_on_cpus
from pipelines.cluster.start import quiet_ray_data, start_ray
from qskd.config import ResizeConfig, ViewConfig
from qskd.config.recipe import parse_override
from qskd.datasets.classes import NOBODY, Explicit, map_classes, model_side
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import load_manifest
from qskd.detectors import Preprocessing, load_detector, read_preprocessing
from qskd.errors import QskdError
from qskd.evaluation.average_precision import CocoResult, evaluate_coco
from qskd.evaluation.detections import Backend, Detections
from qskd.evaluation.inference import predict_batch
from qskd.from_recipe import ground_truth
from qskd.printable import one_line
from qskd.storage.files import fetched

log = logging.getLogger("qskd")
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
    ) -> None:
        torch.set_num_threads(threads)
        manifest = load_manifest(data)
        self.device = device_of(device)
        with fetched(model) as folder:
            self.detector = load_detector(folder).to(self.device).eval()
        slots = map_classes(manifest.labels, self.detector.labels, class_map, model_side(model))
        known = [(slot, one.id) for slot, one in zip(slots, manifest.categories, strict=True) if slot != NOBODY]
        self.slots, self.category_ids = ([pair[side] for pair in known] for side in (0, 1))
        self.preprocessing = preprocessing
        self.loader = BatchLoader(data, data, ViewConfig(), preprocessing.resize, None, keep_bytes=0)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = np.stack([batch["shard"], batch["row"], np.zeros_like(batch["row"])], 1).astype(np.int32)
        arrays = self.loader.load("val", rows)
        found = predict_batch(self.detector, arrays, self.preprocessing, self.category_ids, self.slots, self.device)
        return dict(vars(found))


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
) -> CocoResult:
    """COCO AP of a Hub name, folder or URI. resize: None takes the checkpoint's own.

    workers: the most detector actors, over the whole cluster; 0 does it all in this process, without Ray. device: of each,
    as `compute.device` has it.
    """
    manifest = load_manifest(data)
    with fetched(model) as folder:
        preprocessing = read_preprocessing(folder, resize)
        if workers:  # complain before anything starts
            map_classes(manifest.labels, load_detector(folder).labels, class_map or {}, model_side(model))
    arguments = (model, data, preprocessing, class_map or {}, threads, device)
    places = np.array([(s, r) for s, count in enumerate(manifest.shard_rows) for r in range(count)]).reshape(-1, 2)
    if workers:
        found = _on_cluster(arguments, places, batch_size, workers, device)
    else:
        if device == "cuda" and not torch.cuda.is_available():
            raise QskdError("compute.device", "cuda, and there is no GPU here", "cpu, auto, or a machine with one")
        actor = DetectorActor(*arguments)
        chunks = np.split(places, range(batch_size, len(places), batch_size))
        found = [actor({"shard": chunk[:, 0], "row": chunk[:, 1]}) for chunk in chunks]
    parts = [Detections(**{name: np.asarray(values) for name, values in part.items()}) for part in found]
    truth = ground_truth(data)
    for name in (name for name, label in (class_map or {}).items() if label is None):
        (number,) = (category.id for category in manifest.categories if category.name == name)
        if count := int((truth.category_ids == number).sum()):
            log.warning("%s is left to nobody: its %d object(s) count as missed", one_line(name), count)
    return evaluate_coco(truth, Detections.concatenate([Detections.empty(), *parts]), backend=backend)


def _on_cluster(
    arguments: tuple[Any, ...], places: np.ndarray, batch_size: int, workers: int, device: str
) -> list[dict[str, Any]]:
    start_ray()
    import ray

    quiet_ray_data()
    say_if_on_cpus(device)
    there = bool(ray.cluster_resources().get("GPU"))
    if device == "cuda":
        check_gpus(1)
    rows = [{"shard": shard, "row": row} for shard, row in places.tolist()]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, min(len(rows) // batch_size, 8 * workers)))
    detections = dataset.map_batches(
        DetectorActor,
        fn_constructor_args=arguments,
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
        num_gpus=1 if device == "cuda" or (device == "auto" and there) else 0,
        num_cpus=1,
    )
    return list(detections.iter_batches(batch_size=None))
