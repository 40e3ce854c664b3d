"""An evaluation's own batch size and precision, and that its processes share the reading between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_inference import SQUARE, batch_of
from test_notice import SIZES
from tiny import FAMILIES, LABELS, recipe, shake, silent_student
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.feed.stream import local_stream
from pipelines.inspection.actors import CHOICE, DetectorActor, Job, parts_of
from pipelines.inspection.evaluate import evaluate
from pipelines.prepare import prepare
from pipelines.run.resolve import resolve
from pipelines.training.plan import make_plan
from pipelines.training.worker import Worker
from qskd.config import ResizeConfig
from qskd.config.recipe import load
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.datasets.shards import ROWS_PER_GROUP
from qskd.detectors import Preprocessing, save_detector
from qskd.evaluation.inference import predict_pairs
from qskd.evaluation.pairs import Pairs

IMAGES = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data: two shards, of 100 and 50 images, three row groups; model: a detector of its classes."""
    root = tmp_path_factory.mktemp("evaluation")
    annotations, images = make_shapes(ShapesConfig(images=IMAGES), root / "coco")
    prepare(annotations, images, str(root / "data"), rows_per_shard=100, quiet=True)
    made = silent_student(recipe().student, load_manifest(str(root / "data")).labels, 1)
    shake(made, 1)
    save_detector(made.eval(), root / "model", ResizeConfig(size=64))
    return root


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize(
    ("shard_rows", "batch_size"),
    [([512] * 9 + [392], 16), ([100, 50], 16), ([7] * 40, 16), ([512, 512], 100), ([3], 16), ([], 16), ([600], 1)],
)
def test_each_image_is_in_one_part_and_each_worker_has_one(
    shard_rows: Sequence[int], batch_size: int, workers: int
) -> None:
    parts, total = parts_of(shard_rows, batch_size, workers), sum(shard_rows)
    assert parts[0, 0] == 0
    assert parts[-1, 1] == total
    np.testing.assert_array_equal(parts[1:, 0], parts[:-1, 1])
    assert len(parts) >= min(workers, -(-total // max(batch_size, -(-total // workers) or 1)))
    starts = {
        start + at
        for start, rows in zip(np.cumsum([0, *shard_rows]), shard_rows, strict=False)
        for at in range(0, rows, ROWS_PER_GROUP)
    }
    if total > 2 * workers * max(ROWS_PER_GROUP, batch_size):  # enough to share it without reading anything twice
        assert set(parts[:, 0].tolist()) <= starts
        assert np.diff(parts).max() <= total / workers / 2  # at the end none waits long


@pytest.mark.parametrize("workers", [1, 3])
def test_several_processes_read_each_image_once_and_find_together_what_one_finds(workers: int, folder: Path) -> None:
    job = Job(str(folder / "model"), str(folder / "data"), Preprocessing(ResizeConfig(size=64)), {}, device="cpu")
    everything, read = list[dict[str, np.ndarray]](), 0
    parts = parts_of(load_manifest(job.data).shard_rows, job.batch_size, workers)
    for worker in range(workers):
        actor = DetectorActor(job)
        asked: list[int] = []
        reader = actor.loader._readers["val"]
        whole = reader.read

        def counted(shard: int, rows: Sequence[int], *more: Any, read: Any = whole, asked: list[int] = asked) -> Any:
            asked.append(len(rows))
            return read(shard, rows, *more)

        reader.read = counted  # type: ignore[method-assign]
        mine = parts[worker::workers]
        everything += list(actor({"first": mine[:, 0], "end": mine[:, 1]}))
        assert sum(asked) == np.diff(mine).sum()
        read += sum(asked)
    assert read == IMAGES
    together, alone = by_image(everything), by_image([DetectorActor(job).detect(np.arange(IMAGES))])
    assert together.keys() == alone.keys()
    assert len(alone) == IMAGES
    for image, scores in alone.items():
        np.testing.assert_allclose(together[image], scores, atol=1e-6)


def by_image(parts: Sequence[dict[str, np.ndarray]]) -> dict[int, np.ndarray]:
    """Scores, best first."""
    found: dict[int, np.ndarray] = {}
    for part in parts:
        for image in np.unique(part["image_ids"]).tolist():
            assert image not in found
            found[image] = part["scores"][(part["image_ids"] == image) & (part[CHOICE] == 0)]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_scores_and_boxes_are_near_and_none_is_half(family: str) -> None:
    detector = silent_student(recipe(FAMILIES[family]).student, LABELS, seed=3)
    shake(detector, 3)
    detector.eval()
    given = detector, batch_of(SQUARE), Preprocessing(SQUARE), range(3), [Pairs(100, False)], None, "cpu"
    (whole,), (rounded,) = predict_pairs(*given), predict_pairs(*given, "bfloat16")
    assert rounded.scores.dtype == rounded.boxes_xyxy.dtype == np.float32
    assert not np.array_equal(rounded.scores, whole.scores)
    np.testing.assert_allclose(np.sort(rounded.scores), np.sort(whole.scores), atol=0.03)


@pytest.fixture(scope="module")
def workers(folder: Path) -> dict[str, tuple[Worker, list[Any]]]:
    """A training's worker, and what it is given to evaluate, by what differs from the defaults."""

    def made(*fields: str) -> tuple[Worker, list[Any]]:
        paths = [f"data.train={folder}/data", f"data.val={folder}/data", f"output={folder}/runs"]
        plan = make_plan(resolve(load(None, [*SIZES, *paths, "training.batch_size=64", *fields]), "train"), "train")
        shares = [share for share in local_stream(plan.stream) if share.subset == "val" and share.epoch == 0]
        return Worker(plan.config, plan.stream, 1, 0), shares

    once = "training.epochs=1"
    return {
        "plain": made(once),
        "small": made(once, "compute.evaluation_batch_size=40"),
        "rounded": made(once, "compute.evaluation_precision=bfloat16"),
    }


def test_an_evaluations_own_batch_size_changes_how_many_are_run_at_once_and_no_result(
    workers: dict[str, tuple[Worker, list[Any]]],
) -> None:
    sizes = {name: [len(share.arrays["image_ids"]) for share in shares] for name, (_, shares) in workers.items()}
    assert sizes["plain"] == [64, 64, 22]
    assert sizes["small"] == [40, 40, 40, 30]
    one, other = (workers[name][0].evaluate(iter(workers[name][1])) for name in ("plain", "small"))
    assert one is not None
    assert other is not None
    assert other.metrics == pytest.approx(one.metrics, abs=1e-6)


def test_an_evaluation_in_training_runs_in_float32_unless_the_recipe_says_otherwise(
    workers: dict[str, tuple[Worker, list[Any]]],
) -> None:
    seen: dict[str, bool] = {}
    for name, (worker, shares) in workers.items():
        student = worker.training.student
        note = student.register_forward_pre_hook(
            lambda *_, name=name: seen.update({name: torch.is_autocast_enabled("cpu")})
        )
        assert worker.evaluate(iter(shares[:1])) is not None
        note.remove()
    assert seen == {"plain": False, "small": False, "rounded": True}


def test_qskd_evaluate_takes_the_precision_from_the_recipe_or_a_field(folder: Path) -> None:
    command = ["evaluate", str(folder / "model"), str(folder / "data"), "--workers", "0"]
    fields = ("compute.evaluation_precision=bfloat16", "compute.evaluation_batch_size=2")
    rounded, other = (CliRunner().invoke(app, [*command, "--set", field]) for field in fields)
    assert rounded.exit_code == 0, rounded.output
    by_hand = evaluate(str(folder / "model"), str(folder / "data"), workers=0, precision="bfloat16")
    assert by_hand.metrics != evaluate(str(folder / "model"), str(folder / "data"), workers=0).metrics
    assert f"AP {by_hand.metrics['AP']:.4f}" in rounded.stdout
    assert "has no effect on an evaluation" in str(other.exception)


@pytest.mark.parametrize("also", [[], ["--dry-run"]])
def test_a_backend_that_is_not_there_is_told_before_anything_is_evaluated(
    also: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DetectorActor, "detect", lambda *_: pytest.fail("evaluated"))
    command = ["evaluate", str(folder / "model"), str(folder / "data"), "--workers", "0", "--backend", "hotcocoa"]
    assert "the backend 'hotcocoa'" in str(CliRunner().invoke(app, [*command, *also]).exception)
