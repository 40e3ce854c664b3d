"""What the tests of sweeps on a real Ray share: data, a teacher, a cluster, a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_pipelines import SIZES, cluster

from pipelines.prepare import prepare
from pipelines.sweep_records import Records
from pipelines.sweep_trials import TrialRow
from qskd.config import Config
from qskd.detectors import build_student, save_detector
from qskd.manifest import load_manifest
from qskd.recipe import load
from qskd.shapes import ShapesConfig, make_shapes

__all__ = ("cluster", "config", "make_work", "rows_of", "work")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("tune"))


def make_work(root: Path) -> Path:
    """Shards of 48 + 12 images, a teacher of other sizes."""
    for name, images, first in (("train", 48, 0), ("val", 12, 1000)):
        annotations, folder = make_shapes(ShapesConfig(images=images, first_image=first), root / f"{name}-coco")
        prepare(annotations, folder, str(root / name), rows_per_shard=40, quiet=True)
    labels = load_manifest(str(root / "train")).labels
    teacher = load(None, [*SIZES, "student.queries=11", "student.width=64", "student.decoder_layers=3"]).student
    save_detector(build_student(teacher, labels[::-1], seed=7).eval(), root / "teacher", teacher.resize)
    return root


def config(work: Path, name: str, *overrides: str) -> Config:
    fixed = [
        *(f"name={name}", f"output={work}/runs", f"data.train={work}/train", f"data.val={work}/val"),
        *(f"teacher.path={work}/teacher", f"teacher.cache.path={work}/cache"),
        *("teacher.cache.attention_giou_floor=-1", "teacher.cache.batch_size=48"),
        *(f"tracking.uri=sqlite:///{work}/mlflow.db", "training.epochs=3", "compute.device=cpu"),
    ]
    return load(None, [*SIZES, *fixed, *overrides])


def rows_of(config: Config) -> list[TrialRow]:
    return Records(config).in_order()
