"""What a cache's teacher makes of its cropped views, on a few images, against whole ones; and which images are looked at."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.caching.actors import decode
from pipelines.caching.plan import CachePlan
from pipelines.cluster.devices import device_here
from qskd.config import ViewConfig
from qskd.datasets.batch import train_batch
from qskd.datasets.shards import ShardReader
from qskd.datasets.views import make_view
from qskd.errors import QskdError
from qskd.teacher.identity import teacher_preprocessing
from qskd.teacher.making import CacheMaker
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.positives import positives
from qskd.teacher.told.teacher import ToldTeacher

log = logging.getLogger("qskd")

IMAGES, SECONDS, BATCH = 32, 10.0, 8  # at most so many images, and no further batch after so long
# A crop cuts objects, which costs any teacher some IoU; the package's, of 64 pixels, loses half of it with sides down to 0.5.
CROP_MARGIN = 0.1
WHOLE = ViewConfig(flip_probability=0.0, crop_probability=0.0)


@dataclass(frozen=True)
class Crops:
    """Means over the objects of `images` images, seen as the cache's cropped views and whole."""

    images: int
    iou: float
    confidence: float
    whole_iou: float
    whole_confidence: float

    @property
    def ruined(self) -> bool:
        return self.iou < self.whole_iou - CROP_MARGIN

    def describe(self, views: ViewConfig) -> str:
        said = (
            f"the teacher's positives on {self.images} cropped views: mean IoU {self.iou:.2f}, confidence {self.confidence:.2f}; "
            f"on the same images whole {self.whole_iou:.2f} and {self.whole_confidence:.2f}"
        )
        if not self.ruined:
            return said
        return (
            f"{said}: it has not learnt to see such crops, and would teach the student its mistakes. Raise "
            f"data.views.crop_min_scale ({views.crop_min_scale:g}), or set data.views.crop_probability=0"
        )


def look_at_crops(plan: CachePlan, teacher: OnlineTeacher) -> Crops | None:
    """Ask the teacher about some images, each as its first cropped view and whole; None where no view is cropped, or one of the
    images can't be read: a look stops no job, which names what is broken when it comes to it."""
    if isinstance(teacher, ToldTeacher):  # cut and mirrored boxes are what they are
        return None
    try:
        return _crops(plan, teacher)
    except QskdError:
        return None


def _crops(plan: CachePlan, teacher: OnlineTeacher) -> Crops | None:
    config, views = plan.config, plan.config.data.views
    if not views.crop_probability or views.crop_min_scale == 1 or views.derived_taken == "flip_and_crop":
        return None
    cropped = [
        (shard, row, view)
        for shard, row, image_id in some_images(plan, 2 * IMAGES)
        for view in [next((v for v in range(views.count) if not make_view(views, image_id, v).is_whole), -1)]
        if view >= 0
    ][:IMAGES]
    device, started, images = device_here(config), time.perf_counter(), 0
    maker, resize = CacheMaker(config, teacher, device), teacher_preprocessing(config).resize
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(cropped), BATCH):
        rows = np.array(cropped[start : start + BATCH], np.int32)
        seen = {"crop": (views, rows), "whole": (WHOLE, rows * np.array([1, 1, 0], np.int32))}
        for name, (policy, wanted) in seen.items():
            (arrays,) = decode((config.data.train, policy, resize, device.type != "cuda"), [wanted])
            each = positives(maker.ask(arrays), train_batch(arrays, device).targets, config.detection)
            found.setdefault(f"{name} iou", []).append(each.ious)
            found.setdefault(f"{name} confidence", []).append(each.confidences)
        images += len(rows)
        if time.perf_counter() - started > SECONDS:
            break
    means = {name: float(torch.cat(values).mean()) for name, values in found.items() if torch.cat(values).numel()}
    if len(means) < 4:  # no objects in them
        return None
    return Crops(images, means["crop iou"], means["crop confidence"], means["whole iou"], means["whole confidence"])


def some_images(plan: CachePlan, count: int) -> Iterator[tuple[int, int, int]]:
    """(shard, row, image id) of images drawn at random, always the same ones, in the shards' order."""
    total = plan.data.num_images
    chosen: NDArray[np.int64] = np.random.default_rng(0).choice(total, min(count, total), replace=False)
    starts, ids, reader = (
        np.cumsum([0, *plan.data.shard_rows]),
        dict[int, list[int]](),
        ShardReader(plan.config.data.train),
    )
    for number in sorted(chosen.tolist()):
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        if shard not in ids:
            ids = {shard: reader.read_table(shard, ["image_id"]).column("image_id").to_pylist()}
        row = number - int(starts[shard])
        yield shard, row, ids[shard][row]
