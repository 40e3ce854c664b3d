"""What a cache's teacher makes of its views, on a few images: of crops against whole images, of derived flips against real ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.caching.actors import decode
from pipelines.caching.plan import CachePlan, make_cache_plan
from pipelines.cluster.devices import device_here
from pipelines.run.resolve import resolve
from qskd.config import Config, ViewConfig
from qskd.datasets.batch import train_batch
from qskd.datasets.shards import ShardReader
from qskd.datasets.views import make_view
from qskd.distillation.method import teacher_needs
from qskd.errors import QskdError
from qskd.from_recipe import make_teacher
from qskd.teacher.columns.table import ALWAYS, collate, decode_batch, mirrored
from qskd.teacher.identity import cache_sources, teacher_preprocessing
from qskd.teacher.making import CacheMaker
from qskd.teacher.online import OnlineTeacher
from qskd.teacher.positives import Agreement, mirrored_arrays, positives

log = logging.getLogger("qskd")

IMAGES, SECONDS, BATCH = 32, 10.0, 8  # at most so many images, and no further batch after so long
# A crop cuts objects, which costs any teacher some IoU; the package's, of 64 pixels, loses half of it with sides down to 0.5.
CROP_MARGIN = 0.1
# Derived and real positives differ by 0.01 to 0.02 for the package's teacher (docs/cache.md).
PREDICTIONS_MARGIN = 0.05
# The package's teacher has 0.51 (0.42 to 0.55 on few images), which a training forgives; of more nothing is known.
MEMORY_MARGIN = 0.7
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
    try:
        return _crops(plan, teacher)
    except QskdError:
        return None


def _crops(plan: CachePlan, teacher: OnlineTeacher) -> Crops | None:
    config, views = plan.config, plan.config.data.views
    if not views.crop_probability or views.crop_min_scale == 1:
        return None
    cropped = [
        (shard, row, view)
        for shard, row, image_id in _some_images(plan, 2 * IMAGES)
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


def verify_derived(config: Config, count: int) -> dict[str, float]:
    """Ask the teacher about views of `count` images, and about their mirror images; compare what it says of these with what is
    derived from the first, through the cache's own columns and precision. `Agreement.summary`; no cache need be there."""
    plan = make_cache_plan(cache_sources(resolve(config, "cache"))[0])
    config = plan.config
    teacher = make_teacher(config, plan.data.labels)
    assert teacher is not None
    torch.set_num_threads(config.compute.threads_per_worker or torch.get_num_threads())
    device, resize = device_here(config), teacher_preprocessing(config).resize
    maker, sizes = CacheMaker(config, teacher, device), teacher.sizes(config.teacher.cache.all_layers)
    columns, found = ("image_id", *ALWAYS), Agreement(config.detection)
    chosen = np.array([(shard, row, 0) for shard, row, _ in _some_images(plan, count)], np.int32)
    for rows in np.split(chosen, range(BATCH, len(chosen), BATCH)):
        (arrays,) = decode((config.data.train, config.data.views, resize, True), [rows])
        tensors = collate([mirrored(row, sizes, columns) for row in maker.rows(arrays)], sizes, columns)
        derived = decode_batch({name: torch.from_numpy(value).to(device) for name, value in tensors.items()})
        turned = mirrored_arrays(arrays)
        found.add(derived, maker.ask(turned), train_batch(turned, device).targets)
    return found.summary()


def allowed(config: Config, found: Mapping[str, float]) -> str:
    """What the agreement allows, as a sentence. QskdError where it does not allow what the recipe asks for."""
    if not found.get("objects"):
        raise QskdError(
            "--verify-derived",
            "no object of a class that the teacher knows",
            "some",
            "try more images: --verify-derived N",
        )
    gaps = {name: found[f"{name}_derived"] - found[f"{name}_real"] for name in ("iou", "confidence")}
    apart = [f"{name} {gap:+.3f}" for name, gap in gaps.items() if abs(gap) > PREDICTIONS_MARGIN]
    memory = found.get("memory_unexplained", 0.0)
    needs = teacher_needs(config.distillation)
    if apart:
        said = f"derived positives differ from real ones by {', '.join(apart)} (allowed: {PREDICTIONS_MARGIN:g})"
        remedy = "data.views.derived=none, with data.views.count for more views"
        if config.data.views.derived != "none":
            raise QskdError(
                "data.views.derived", said, "a teacher that sees a mirrored image as it sees the image", remedy
            )
        return f"not allowed: {said}. Keep {remedy}"
    if memory > MEMORY_MARGIN and needs is not None and needs.memory:
        said = f"derived memory leaves {memory:.2f} of the real one's variance in objects unexplained (allowed: {MEMORY_MARGIN:g})"
        remedy = "data.views.derived=flip with distillation.features.weight=0: predictions alone"
        if config.data.views.derived != "none":
            raise QskdError("distillation.features.weight", said, "0 with derived flips", f"set {remedy}")
        return f"allowed in part: {said}. Set {remedy}"
    return "allowed: data.views.derived=flip"


def _some_images(plan: CachePlan, count: int) -> Iterator[tuple[int, int, int]]:
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
