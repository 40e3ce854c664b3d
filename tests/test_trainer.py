"""What Ray Train is given to run on its workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.run.folder import Folder, record_failure
from pipelines.training.trainer import make_trainer
from qskd.config import Config
from qskd.errors import QskdError


def test_workers_that_are_begun_again_after_a_failure_import_no_detector(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = Config(output=str(tmp_path))
    given: list[Any] = []
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})

    class Trainer:
        def __init__(self, train: Any, **settings: Any) -> None:
            given.append((train, settings))

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    stream: Any = None  # what trains with it is not imported
    make_trainer(config, stream, Folder(config), [])
    ((train, settings),) = given
    monkeypatch.setitem(sys.modules, "pipelines.training.worker", None)
    with pytest.raises(ImportError, match=r"pipelines\.training\.worker"):
        train(settings["train_loop_config"])
    record_failure(Folder(config), QskdError("a shard", "broken"))
    train(settings["train_loop_config"])
