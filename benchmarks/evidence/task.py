"""The task of the evidence: the quickstart's images, teacher and recipe, made once into a work folder and shared by all cells."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from benchmarks.local_cache import make_cache
from pipelines.distill import prepare_config
from pipelines.models import make_teacher
from pipelines.prepare import prepare
from pipelines.quickstart import BACKBONE, RECIPE, TEACHER, TEST, TRAIN, VAL
from qskd.cache_identity import cache_identity, teacher_preprocessing
from qskd.cache_manifest import load_cache_manifest
from qskd.config import Config
from qskd.manifest import load_manifest
from qskd.recipe import load
from qskd.shapes import make_shapes

SPLITS = {"train": TRAIN, "val": VAL, "test": TEST}


def base_overrides(work: Path, split: str) -> list[str]:
    """Where things are. Attention is cached of all queries, so that every variant can read one cache."""
    return [
        f"data.train={work}/train",
        f"data.val={work}/{split}",
        f"student.backbone.init={BACKBONE}",
        f"teacher.path={TEACHER}",
        f"teacher.cache.path={work}/train.teacher",
        "teacher.cache.attention_giou_floor=-1.0",
        "teacher.cache.all_layers=true",
        f"tracking.uri=sqlite:///{work}/mlflow.db",
        "tracking.experiment=evidence",
    ]


def make_config(work: Path, split: str, overrides: tuple[str, ...], kind: str) -> Config:
    """A cell's whole configuration: the quickstart's recipe, this folder, the cell's own fields."""
    return prepare_config(load(RECIPE, [*base_overrides(work, split), *overrides]), kind)


def make_task(work: Path) -> None:
    """Images, shards and the teacher's cache; what is there is kept."""
    for name, shapes in SPLITS.items():
        if not (work / name / "manifest.json").exists():
            annotations, images = make_shapes(shapes, work / f"{name}-coco")
            prepare(annotations, images, str(work / name), quiet=True)
    config = make_config(work, "val", (), "distill")
    if load_cache_manifest(config.teacher.cache.path) is None:
        torch.set_num_threads(1)
        manifest = load_manifest(config.data.train)
        teacher = make_teacher(config, manifest.labels)
        assert teacher is not None
        make_cache(config, teacher, teacher_preprocessing(config).resize, cache_identity(config, manifest))


@cache
def teacher_here(work: Path) -> tuple[Config, object]:
    """For evaluators: the teacher as the recipe has it."""
    config = make_config(work, "test", (), "distill")
    return config, make_teacher(config, load_manifest(config.data.train).labels)
