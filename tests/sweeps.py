"""What the tests of sweeps on a real Ray share: data, a teacher, a cluster, a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_pipelines import SIZES, cluster, make_work

from pipelines.tuning.records import Records
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import load

__all__ = ("cluster", "config", "make_work", "rows_of", "work")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("tune"), 48, 12)


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
