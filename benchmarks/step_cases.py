"""The two sizes at which `benchmarks.step` measures: a student's recipe, and batches with a teacher's outputs encoded as the
cache has them.

quickstart: the student of `qskd quickstart`, its real teacher's outputs on rendered shapes. r18: Conditional DETR with
ResNet-18 at 320 px on 4:3 pictures of noise, objects as many as COCO's; the teacher is made up, of the sizes that
ResNet-50 at 800 px gives: what a step costs depends on sizes and hardly on values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.detection_loss import Sizes, make_case, object_counts
from pipelines.demo.quickstart import TRAIN
from qskd.config import Config
from qskd.config.recipe import load
from qskd.datasets.shapes import CATEGORY_IDS, render
from qskd.detectors import build_student
from qskd.from_recipe import make_teacher
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import TeacherRow, collate, columns_for, encode
from qskd.teacher.making import CacheMaker
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.memory.directions import flat_directions
from qskd.teacher.online import queries_above
from qskd.training.step import Training

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# Less of a student, for a run of seconds.
QUICK = (
    "student.backbone.embedding_size=8", "student.backbone.hidden_sizes=[8,8,16,16]",
    "student.encoder_layers=1", "student.decoder_layers=2", "student.width=64", "student.ffn_width=64",
)  # fmt: skip
Arrays = dict[str, Any]  # the loader's arrays


@dataclass(frozen=True)
class Case:
    """One size. batches: the loader's arrays with the teacher's, as the loader gives them with a cache."""

    name: str
    config: Config
    labels: tuple[str, ...]
    sizes: CacheSizes
    batches: list[Arrays]

    def batches_of(self, kind: str) -> list[Arrays]:
        if kind == "qskd":
            return self.batches
        return [{k: v for k, v in batch.items() if not k.startswith("teacher_")} for batch in self.batches]

    def training(self, kind: str) -> Training:
        """A student in training, "plain" or "qskd": the same weights in both."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a frozen norm on random weights: it costs what it costs
            student = build_student(self.config.student, self.labels, seed=0)
        cached = CachedTeacher(self.sizes, flat_directions(self.sizes.channels))  # of the true ones' cost
        return Training(self.config, student, cached if kind == "qskd" else None, 1000, CPU)

    @property
    def facts(self) -> list[str]:
        counts = np.concatenate([batch["counts"] for batch in self.batches])
        known = np.concatenate([(batch["teacher_attention_queries"] >= 0).sum(1) for batch in self.batches])
        _, height, width, _ = self.batches[0]["images"].shape
        memory = " + ".join("x".join(map(str, batch.shape[1:])) for batch in _memory(self.batches[0]))
        return [
            f"{self.name}: {len(self.batches)} batches of {len(self.batches[0]['images'])} images of {height} x {width}, "
            f"{counts.mean():.1f} objects an image (most {counts.max()}); the teacher's: {self.sizes.queries} queries, "
            f"{self.sizes.classes} classes, memory {memory}, attention of {known.mean():.0f} queries an image"
        ]


def _memory(batch: Arrays) -> list[np.ndarray]:
    return [batch[f"teacher_memory_{level}"] for level in range(9) if f"teacher_memory_{level}" in batch]


def _with_teacher(arrays: Arrays, rows: Sequence[TeacherRow], sizes: CacheSizes) -> Arrays:
    return arrays | collate(rows, sizes, columns_for(TeacherNeeds(memory=True, attention=True)))


def quickstart(batch: int, batches: int) -> Case:
    """The quickstart's student and, as its cache job asks it, its teacher."""
    assets = ROOT / "pipelines" / "assets"
    config = load(assets / "quickstart.yaml", [f"teacher.path={assets / 'shapes_teacher'}"])
    shapes = TRAIN.model_copy(update={"images": batch * batches})
    teacher = make_teacher(config, shapes.class_names)
    assert teacher is not None
    sizes, maker = teacher.sizes(all_layers=False), CacheMaker(config, teacher, CPU)
    made = []
    for start in range(0, shapes.images, batch):
        pictures, objects = zip(*(render(shapes, start + index) for index in range(batch)), strict=True)
        arrays = _arrays(np.stack(pictures), [len(found) for found in objects], start)
        for image, found in enumerate(objects):
            for slot, entry in enumerate(found):
                left, top, width, height = entry["bbox"]
                arrays["boxes_cxcywh"][image, slot] = [left + width / 2, top + height / 2, width, height]
                arrays["labels"][image, slot] = CATEGORY_IDS.index(entry["category_id"])
        arrays["boxes_cxcywh"] /= shapes.size
        made.append(_with_teacher(arrays, maker.rows(arrays), sizes))
    return Case("quickstart", config, shapes.class_names, sizes, made)


def r18(batch: int, batches: int, edge: int = 320, overrides: Sequence[str] = ()) -> Case:
    """Conditional DETR with ResNet-18, and a made-up teacher. edge: the pictures' shorter one, in pixels."""
    recipe = ROOT / "configs" / "coco_conditional_r18.yaml"
    config = load(recipe, ["student.backbone.init=", *overrides])  # random weights cost the same
    made, queries, classes = [], 300, 80
    sizes = CacheSizes(1, queries, classes, (256,))
    counts = object_counts(batch * batches)
    for number in range(batches):
        share = counts[number * batch : (number + 1) * batch]
        random = np.random.default_rng(number)
        pixels = random.integers(0, 256, (batch, edge, edge * 4 // 3, 3), np.uint8)
        case = make_case(share, Sizes(1, batch, queries, classes), number)
        arrays = _arrays(pixels, share, number * batch)
        arrays |= {"boxes_cxcywh": case.targets.boxes_cxcywh.numpy(), "labels": case.targets.labels.numpy()}
        # About 40 queries an image lie on its objects; the boxes of the rest are anywhere.
        generator = torch.Generator().manual_seed(number)
        boxes = torch.rand(1, batch, queries, 4, generator=generator) * torch.tensor([1.0, 1.0, 0.3, 0.3])
        for image, count in enumerate(share):
            for query in range(max(40, count) if count else 0):
                target = case.targets.boxes_cxcywh[image, query % count]
                noise = torch.randn(4, generator=generator) * 0.06 * target[2:].repeat(2)
                boxes[0, image, query] = (target + noise).clamp(0.005, 0.995)
        record = TeacherRecord(
            case.logits,
            boxes,
            (torch.randn(batch, 256, 25, 34, generator=generator),),
            (torch.ones(batch, 25, 34, dtype=torch.bool),),
        )
        chosen = queries_above(record, case.targets, config.teacher.cache.attention_giou_floor, config.detection)
        looks = (4 * torch.randn(*chosen.shape, 25 * 34, generator=generator)).softmax(-1) * (chosen >= 0)[..., None]
        record = replace(record, attention_queries=chosen, attention=(looks.unflatten(-1, (25, 34)),))
        rows = encode(record, arrays["image_ids"].tolist(), config.teacher.cache.precision)
        made.append(_with_teacher(arrays, rows, sizes))
    return Case("r18", config, tuple(f"class {index}" for index in range(classes)), sizes, made)


def _arrays(pixels: np.ndarray, counts: Sequence[int], first_id: int) -> Arrays:
    slots = max(counts)
    return {
        "images": pixels,
        "sizes": np.tile(np.array(pixels.shape[1:3], np.int32), (len(pixels), 1)),
        "boxes_cxcywh": np.zeros((len(pixels), slots, 4), np.float32),
        "labels": np.zeros((len(pixels), slots), np.int64),
        "counts": np.array(counts, np.int32),
        "image_ids": np.arange(first_id, first_id + len(pixels)),
    }
