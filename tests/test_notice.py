"""Asking whether a node goes away is a rendezvous of all workers: done where one can be given notice, and only there."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.cluster.room import may_be_preempted
from pipelines.prepare import prepare
from pipelines.run.folder import Folder
from pipelines.training import driver as distill
from pipelines.training.trainer import make_trainer
from pipelines.training.worker import NOTICE_EVERY_STEPS, Worker
from qskd.config import Config
from qskd.config.recipe import load
from qskd.datasets.shapes import ShapesConfig, make_shapes

SIZES = [
    "student.backbone={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}",
    *(f"student.{name}={value}" for name, value in {"width": 32, "encoder_layers": 1, "decoder_layers": 2}.items()),
    *("student.heads=4", "student.ffn_width=32", "student.queries=8", "student.resize.size=64"),
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Config:
    root = tmp_path_factory.mktemp("notice")
    annotations, images = make_shapes(ShapesConfig(images=8), root / "coco")
    prepare(annotations, images, str(root / "data"), quiet=True)
    paths = [f"data.train={root}/data", f"data.val={root}/data", f"output={root}/runs"]
    return load(None, [*SIZES, *paths, "training.batch_size=4"])


@pytest.mark.parametrize(("preemptible", "expected"), [(False, 0), (True, 3)])
def test_a_worker_asks_every_ten_steps_or_never(
    recipe: Config, monkeypatch: pytest.MonkeyPatch, preemptible: bool, expected: int
) -> None:
    import ray.train

    asked: list[int] = []
    plan = distill.make_plan(distill.resolve(recipe, "train"), "train")
    worker = Worker(plan.config, plan.stream, 1, 0, preemptible=preemptible)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked.append(worker.training.step))
    for worker.training.step in range(1, 3 * NOTICE_EVERY_STEPS + 1):
        assert not worker.given_notice()
    assert asked == [NOTICE_EVERY_STEPS * time for time in range(1, expected + 1)]


@pytest.mark.parametrize(
    ("overrides", "address", "expected"),
    [
        ([], "", False),
        (["compute.workers=4"], "", False),
        (["compute.workers=4", "compute.min_workers=1"], "", True),
        ([], "10.0.0.1:6379", True),
    ],
)
def test_workers_are_told_to_ask_when_elastic_or_on_a_cluster_of_others(
    recipe: Config, monkeypatch: pytest.MonkeyPatch, overrides: list[str], address: str, expected: bool
) -> None:
    for name in ("RAY_ADDRESS", "RAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    config = recipe.model_copy(update={"compute": load(None, overrides).compute})
    made: dict[str, Any] = {}
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})

    class Trainer:
        def __init__(self, _: Any, **settings: Any) -> None:
            made.update(settings)

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    plan = distill.make_plan(distill.resolve(config, "train"), "train")
    make_trainer(plan.config, plan.stream, Folder(config), [])
    assert made["train_loop_config"]["preemptible"] is expected
    assert may_be_preempted(config) is expected
