"""What runs while a detector is evaluated: processes that hold it, each with parts of the images that it alone reads."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.cluster.devices import device_of
from pipelines.reporting.pulse import Pulse
from qskd.config import ViewConfig
from qskd.datasets.classes import NOBODY, Explicit, map_classes, model_side
from qskd.datasets.loader import BatchLoader
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import ROWS_PER_GROUP
from qskd.detectors import Preprocessing, load_detector, words_for
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import predict_pairs
from qskd.evaluation.pairs import Pairs, pairs_of_transformers
from qskd.storage.places import fetched

CHOICE = "choice"  # of pairs: the column that tells them apart
KEEP_BYTES = 2**28  # of encoded rows: the row groups that a batch comes from
PARTS_A_WORKER = 8  # so that at the end none waits long for another


@dataclass(frozen=True)
class Job:
    """What each process does. model, data: names, folders or URIs. device: as `compute.device` has it; precision: as
    `compute.evaluation_precision`. max_detections: kept of an image."""

    model: str
    data: str
    preprocessing: Preprocessing
    class_map: Explicit
    batch_size: int = 16
    threads: int = 1
    device: str = "auto"
    precision: str = "float32"
    max_detections: int = 100


def parts_of(shard_rows: Sequence[int], batch_size: int, workers: int) -> np.ndarray:
    """int64 [n, 2] of (first, end): images, counted through all shards, that one process reads. A part begins where rows that are
    stored together begin, so that nothing is read twice; of data that would give too few such parts, anywhere."""
    total = sum(shard_rows)
    starts = np.cumsum([0, *shard_rows])
    groups = [
        start + at for start, rows in zip(starts, shard_rows, strict=False) for at in range(0, rows, ROWS_PER_GROUP)
    ]
    least, cuts = max(batch_size, total // (PARTS_A_WORKER * workers)), [0]
    for group in groups:
        if group - cuts[-1] >= least:
            cuts.append(int(group))
    if len(cuts) < workers:
        cuts = list(range(0, max(total, 1), max(batch_size, -(-total // workers))))
    return np.stack([cuts, [*cuts[1:], total]], 1)


class DetectorActor:
    """Holds the detector and a loader; turns parts of the images into detections, batch by batch. subject: of `Pulse`."""

    def __init__(self, job: Job, subject: str = "") -> None:
        self.job, self.pulse, self.images = job, Pulse(subject, uuid.uuid4().hex), 0
        torch.set_num_threads(job.threads)
        manifest = load_manifest(job.data)
        self.starts = np.cumsum([0, *manifest.shard_rows])
        self.device = device_of(job.device)
        with fetched(job.model) as folder:
            words = words_for(manifest.labels, job.class_map)
            self.detector = load_detector(folder, words=words).to(self.device).eval()
        slots = map_classes(manifest.labels, self.detector.labels, job.class_map, model_side(job.model))
        known = [(slot, one.id) for slot, one in zip(slots, manifest.categories, strict=True) if slot != NOBODY]
        self.slots, self.category_ids = ([pair[side] for pair in known] for side in (0, 1))
        # Ours, and what transformers would keep, where that is something else.
        rule = pairs_of_transformers(self.detector.family, self.detector.num_queries, job.max_detections)
        self.choices = [Pairs(job.max_detections, False), *([rule] if rule else [])]
        self.loader = self.open()

    def open(self) -> BatchLoader:
        """A loader that has read nothing yet."""
        job, finish = self.job, self.device.type != "cuda"
        return BatchLoader(job.data, job.data, ViewConfig(), job.preprocessing.resize, None, KEEP_BYTES, finish=finish)

    def __call__(self, parts: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """parts: "first" and "end" of `parts_of`, int64 [n] each. Yields columns of `Detections` and CHOICE, for each batch."""
        for first, end in zip(parts["first"].tolist(), parts["end"].tolist(), strict=True):
            for at in range(first, end, self.job.batch_size):
                yield self.detect(np.arange(at, min(at + self.job.batch_size, end)))

    def detect(self, numbers: np.ndarray) -> dict[str, Any]:
        """numbers: int64 [n] of images, counted through all shards."""
        shards = np.searchsorted(self.starts, numbers, side="right") - 1
        rows = np.stack([shards, numbers - self.starts[shards], np.zeros_like(numbers)], 1).astype(np.int32)
        arrays = self.loader.load("val", rows)
        found = predict_pairs(
            *(self.detector, arrays, self.job.preprocessing, self.category_ids, self.choices, self.slots, self.device),
            precision=self.job.precision,
        )
        self.images += len(numbers)
        self.pulse.tell(images=self.images)
        choice = np.repeat(np.arange(len(found)), [len(part.scores) for part in found])
        return {**vars(Detections.concatenate(found)), CHOICE: choice}
