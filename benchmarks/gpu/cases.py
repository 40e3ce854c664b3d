"""The sizes at which `benchmarks.gpu` measures: a student's recipe, a teacher with random weights of a published one's shape, and
batches on noise with as many objects as COCO's.

What a step costs depends on sizes and hardly on values. Values matter in one place: how many queries lie on objects. So the
teacher's boxes are made up as a trained one's lie; its memory and attention are its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from benchmarks.detection_loss import Sizes, make_case, object_counts
from qskd.config import Config, ResizeConfig, StudentConfig
from qskd.config.recipe import apply_overrides, build
from qskd.datasets.batch import train_batch
from qskd.detectors import Detector, Preprocessing, build_student
from qskd.structures import TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import collate, columns_for, encode
from qskd.teacher.identity import cached_needs
from qskd.teacher.memory.directions import flat_directions
from qskd.teacher.online import OnlineTeacher, queries_above
from qskd.training.step import Training

Arrays = dict[str, Any]  # the loader's
KINDS = ("plain", "cached", "online")

_BASIC = {"layer_type": "basic", "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
_BOTTLENECK = _BASIC | {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048], "depths": [3, 4, 6, 3]}
_TINY = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
_SHAPES: Mapping[str, dict[str, Any]] = {
    "conditional_detr": {
        "family": "conditional_detr", "feature_levels": 1, "width": 256, "heads": 8, "ffn_width": 2048,
        "encoder_layers": 6, "decoder_layers": 6, "queries": 300, "backbone_norm": "frozen",
    },
    "rt_detr": {
        "family": "rt_detr", "feature_levels": 3, "width": 256, "heads": 8, "ffn_width": 1024,
        "encoder_layers": 1, "decoder_layers": 3, "queries": 300, "backbone_norm": "frozen",
    },
}  # fmt: skip
_LESS = {"width": 64, "heads": 4, "ffn_width": 64, "encoder_layers": 1, "decoder_layers": 2, "queries": 30}
FAMILIES = tuple(_SHAPES)


def _resize(family: str, edge: int) -> dict[str, Any]:
    return {"mode": "square" if family == "rt_detr" else "shortest_edge", "size": edge, "longest": max(edge, 1333)}


def _pixels(resize: ResizeConfig) -> tuple[int, int]:
    """Height and width that a 4:3 photograph gets."""
    return (resize.size, resize.size) if resize.mode == "square" else (resize.size, resize.size * 4 // 3)


def _built(config: StudentConfig, classes: int, seed: int) -> Detector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a frozen norm on random weights: it costs what it costs
        return build_student(config, [f"class {index}" for index in range(classes)], seed)


def recipe(family: str, edge: int, toy: bool = False, overrides: Sequence[str] = ()) -> Config:
    """The student: a published family's with ResNet-18. edge: the pictures' shorter one, in pixels."""
    sizes = {**_SHAPES[family], **(_LESS if toy else {}), "backbone": {**_BASIC, **(_TINY if toy else {})}}
    tree = {"student": {**sizes, "resize": _resize(family, edge)}}
    return build(apply_overrides(tree, [*overrides, "training.learning_rate=1e-5"]))


@dataclass(frozen=True)
class Case:
    """One family at one size, on one device. batch: the most images a step has."""

    family: str
    edge: int
    batch: int
    device: torch.device
    toy: bool = False
    classes: int = 80
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.family} R18, {self.edge} px"

    @cached_property
    def config(self) -> Config:
        return recipe(self.family, self.edge, self.toy, self.overrides)

    @cached_property
    def teacher(self) -> OnlineTeacher:
        """With ResNet-50 and six decoder layers, at its own resolution: 800 px, RT-DETR's 640."""
        family = self.family
        edge = 96 if self.toy else 640 if family == "rt_detr" else 800
        sizes = {**_SHAPES[family], "backbone": _BOTTLENECK, "decoder_layers": 6, "resize": _resize(family, edge)}
        if self.toy:
            sizes |= {**_LESS, "backbone": {**_BOTTLENECK, **_TINY}}
        config = StudentConfig.model_validate(sizes)
        detector = _built(config, self.classes, seed=1)
        teacher = OnlineTeacher(detector, tuple(range(self.classes)), Preprocessing(config.resize))
        teacher.directions = flat_directions(teacher.facts.channels)  # of the true ones' cost
        return teacher.to(self.device)

    def student(self) -> Detector:
        return _built(self.config.student, self.classes, seed=0)

    def training(self, kind: str, *overrides: str) -> Training:
        """A student in training: the same weights whichever the kind and the device."""
        config = recipe(self.family, self.edge, self.toy, (*self.overrides, *overrides)) if overrides else self.config
        teachers = {
            "plain": lambda: None,
            "online": lambda: self.teacher,
            "cached": lambda: CachedTeacher(self.teacher.sizes(all_layers=False), self.teacher.directions),
        }
        return Training(config, self.student(), teachers[kind](), 1000, self.device)

    @cached_property
    def arrays(self) -> Arrays:
        """The loader's arrays of `batch` images: at the student's resolution, at the teacher's, and the teacher's record."""
        counts, random = object_counts(self.batch, seed=3), np.random.default_rng(0)
        made = make_case(counts, Sizes(1, self.batch, self.teacher.detector.num_queries, self.classes), 0)
        arrays = {
            "boxes_cxcywh": made.targets.boxes_cxcywh.numpy(),
            "labels": made.targets.labels.numpy(),
            "counts": np.array(counts, np.int32),
            "image_ids": np.arange(self.batch),
        }
        for prefix, resize in (("", self.config.student.resize), ("teacher_", self.teacher.resize)):
            height, width = _pixels(resize)
            arrays[f"{prefix}images"] = random.integers(0, 256, (self.batch, height, width, 3), np.uint8)
            arrays[f"{prefix}sizes"] = np.tile(np.array([height, width], np.int32), (self.batch, 1))
        return arrays | self._said(arrays, made.logits)

    def _said(self, arrays: Arrays, logits: torch.Tensor) -> Arrays:
        """The cached columns. The teacher runs on four images at a time: this is no measurement."""
        rows = []
        for start in range(0, self.batch, 4):
            part = slice(start, start + 4)
            batch = train_batch({name: array[part] for name, array in arrays.items()}, self.device)
            boxes = _boxes_near(batch.targets.boxes_cxcywh.cpu(), batch.targets.counts, logits.shape[2], start)
            said = TeacherRecord(logits[:, part].to(self.device), boxes.to(self.device))
            floor, costs = self.config.teacher.cache.attention_giou_floor, self.config.detection
            chosen = queries_above(said, batch.targets, floor, costs)
            with torch.inference_mode():
                own = self.teacher(
                    batch.teacher_images, batch.teacher_sizes, cached_needs(self.config), lambda _, c=chosen: c
                )
            record = replace(own, logits=said.logits, boxes_cxcywh=said.boxes_cxcywh)
            rows += encode(record, arrays["image_ids"][part].tolist(), self.config.teacher.cache.precision)
        return collate(rows, self.teacher.sizes(all_layers=False), columns_for(cached_needs(self.config)))

    def arrays_of(self, kind: str, batch: int) -> Arrays:
        """What a step of this kind gets of the loader."""
        pixels = ("teacher_images", "teacher_sizes")
        named = [name for name in self.arrays if not name.startswith("teacher_")]
        named += {
            "plain": (),
            "online": pixels,
            "cached": [name for name in self.arrays if name.startswith("teacher_") and name not in pixels],
        }[kind]
        cut = {name: self.arrays[name][:batch] for name in named}
        most = max(int(cut["counts"].max()), 1)  # the padding of the images that are there
        return cut | {"boxes_cxcywh": cut["boxes_cxcywh"][:, :most], "labels": cut["labels"][:, :most]}


def _boxes_near(objects: torch.Tensor, counts: Sequence[int], queries: int, seed: int) -> torch.Tensor:
    """[1, B, queries, 4] cxcywh: about 40 queries an image lie on its objects; the boxes of the rest are anywhere."""
    random = torch.Generator().manual_seed(seed)
    boxes = torch.rand(1, len(counts), queries, 4, generator=random) * torch.tensor([1.0, 1.0, 0.3, 0.3])
    for image, count in enumerate(counts):
        for query in range(min(max(40, count), queries) if count else 0):
            target = objects[image, query % count]
            noise = torch.randn(4, generator=random) * 0.06 * target[2:].repeat(2)
            boxes[0, image, query] = target + noise
    return boxes.clamp(0.005, 0.995)
