"""What MLflow's users expect of a run: its data, its source, a description, figures, and a student that MLflow itself loads."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import STUDENT, recipe

import pipelines.cluster.start  # noqa: F401  (sets Ray's environment before anything imports Ray)
from pipelines.reporting.choice import choose
from pipelines.reporting.meter import Meter
from pipelines.reporting.progress import TrackingCallback
from pipelines.run.best import Best
from pipelines.run.folder import Folder
from pipelines.run.history import read_history
from pipelines.run.ownership import claim
from pipelines.run.resolve import resolve
from pipelines.tracking.about import (
    NOTE,
    command_note,
    dataset_inputs,
    figure_metrics,
    result_note,
    source_tags,
)
from pipelines.tracking.curves import tell_result
from pipelines.tracking.model import log_student
from pipelines.tracking.student_pyfunc import picture
from pipelines.tracking.tracker import Tracker
from pipelines.training.checkpoints import write_checkpoint
from pipelines.training.driver import finish
from pipelines.training.plan import make_plan
from qskd.config import Config, StudentConfig
from qskd.config.recipe import build
from qskd.datasets.manifest import load_manifest
from qskd.deploy.model_card import Figures
from qskd.evaluation.average_precision import METRICS, CocoResult
from qskd.from_recipe import make_student
from qskd.training.step import Training


def config_at(root: Path, *more: str) -> Config:
    named = ["name=it", f"output={root}/runs", f"tracking.uri=sqlite:///{root}/mlflow.db", "tracking.experiment=e"]
    return recipe(None, *named, *more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def tracker(root: Path) -> Tracker:
    return Tracker.open(config_at(root), "train", tags={NOTE: command_note()})


def run_of(tracker: Tracker) -> Any:
    return mlflow.MlflowClient(tracker.uri).get_run(tracker.run_id)


def test_a_run_names_its_user_its_program_git_s_commit_and_the_command(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tags = run_of(tracker).data.tags
    assert tags["mlflow.user"]
    assert tags["mlflow.source.name"] == "qskd train"
    assert tags["mlflow.source.type"] == "LOCAL"
    assert tags[NOTE].startswith("```\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (
        [*git, "init", "-q", "-b", "mine"],
        [*git, "commit", "-q", "--allow-empty", "-m", "a"],
        [*git, "remote", "add", "origin", "https://me:secret@host/repository.git"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    found = source_tags("distill")
    assert len(found["mlflow.source.git.commit"]) == 40
    assert found["mlflow.source.git.branch"] == "mine"
    assert "host/repository.git" in found["mlflow.source.git.repoURL"]
    assert "secret" not in json.dumps(found)


def test_an_experiment_that_qskd_makes_is_one_of_trainings_and_another_s_stays_as_it_is(
    tracker: Tracker, root: Path
) -> None:
    client = mlflow.MlflowClient(tracker.uri)
    tags = client.get_experiment_by_name("e").tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.experiment.primaryMetric.name"] == "best/AP"
    view = json.loads(tags["mlflow.sharedViewState.qskd"])
    assert view["selectedColumns"][0] == "metrics.`best/AP`"
    assert f"experiments/{client.get_experiment_by_name('e').experiment_id}/runs?viewStateShareKey=qskd" in tags[NOTE]
    theirs = client.create_experiment("theirs", tags={"mlflow.experimentKind": "genai_development"})
    Tracker.open(config_at(root, "tracking.experiment=theirs"), "train")
    assert client.get_experiment(theirs).tags["mlflow.experimentKind"] == "genai_development"


def test_its_data_are_inputs_with_name_digest_and_source(tracker: Tracker, tiny_folders: Path) -> None:
    manifest = load_manifest(str(tiny_folders / "train"))
    data = {"training": (str(tiny_folders / "train"), manifest), "validation": ("s3://bucket/shards/val", manifest)}
    for _ in range(2):  # a run that goes on says it again
        tracker.inputs(dataset_inputs(data))
    assert not tracker.complained
    inputs = run_of(tracker).inputs.dataset_inputs
    found = {each.tags[0].value: each.dataset for each in inputs}
    assert len(inputs) == 2
    assert found["training"].name == "train"
    assert found["validation"].name == "val"
    assert manifest.fingerprint.startswith(found["training"].digest)
    assert json.loads(found["validation"].source)["uri"] == "s3://bucket/shards/val"
    assert json.loads(found["training"].profile)["images"] == manifest.num_images


def test_the_best_evaluation_and_its_step_are_metrics_also_after_a_worse_one(root: Path) -> None:
    config = config_at(root, "name=best")
    tracker, folder = Tracker.open(config, "train"), Folder(config)
    callback = TrackingCallback(tracker, folder)
    for step, ap in ((10, 0.2), (20, 0.4), (30, 0.3)):
        rows = [(step, {"loss/total": 1.0, "learning_rate": 1e-3 / step})]
        callback.write({"step": step, "epoch": step // 10, "rows": rows, "evaluation": {"AP": ap, "AP75": -1.0}})
    tell_result(tracker, folder, 30, figure_metrics(Figures("this model", {}, 2_000_000, 0.5, None)))
    metrics = run_of(tracker).data.metrics
    assert metrics["val/AP"] == 0.3
    assert metrics["best/AP"] == 0.4
    assert metrics["best/step"] == 20
    assert metrics["learning_rate"] == pytest.approx(1e-3 / 30)
    assert metrics["cost/parameters_m"] == 2.0
    assert metrics["cost/gflops"] == 0.5
    assert "cost/latency_ms" not in metrics
    chosen = choose(config, Best(30, {"AP": 0.3}), None, read_history(folder), 30)
    note = result_note("the command", "runs/it/student", {"AP": 0.3}, None, chosen.text)
    assert "AP 0.300" in note
    assert "0.400, after step 20" in note
    assert "the command" in note


def test_a_row_of_a_training_says_its_learning_rate() -> None:
    meter = Meter()
    for step, rate in ((1, 0.5), (2, 0.25)):
        meter.add(step, {"total": torch.tensor(1.0)}, 4, 0.0, learning_rate=rate)
    assert [row["learning_rate"] for _, row in meter.flush()] == [0.25]


@pytest.fixture(scope="module")
def logged(tracker: Tracker, tiny_folders: Path) -> Tracker:
    log_student(tracker, tiny_folders / "model")
    assert not tracker.complained
    return tracker


def test_a_picture_in_base64_that_no_file_could_be_called_is_a_picture() -> None:
    flat = io.BytesIO()
    Image.new("RGB", (16, 16)).save(flat, "BMP")  # no slash in a thousand letters
    assert picture(base64.b64encode(flat.getvalue()).decode()).size == (16, 16)
    with pytest.raises(ValueError, match="neither a file here nor base64"):
        picture("no such file.png")


def test_mlflow_itself_loads_the_student_without_qskd_and_its_weights_are_there_once(
    logged: Tracker, tiny_folders: Path, root: Path
) -> None:
    photo = tiny_folders / "photo.png"
    encoded = base64.b64encode(photo.read_bytes()).decode()
    code = """if True:
        import json, sys, mlflow, pandas
        uri, model, photo, encoded, grey, deep = sys.argv[1:]
        mlflow.set_tracking_uri(uri)
        student = mlflow.pyfunc.load_model(model)
        one = student.predict(pandas.DataFrame({"image": [photo, encoded]}), params={"threshold": 0.0})
        assert list(student.predict([photo])[0]) == ["scores", "labels", "boxes"]
        shallow, deeper = student.predict([grey, deep], params={"threshold": 0.0})
        assert shallow == deeper, "16 bits are seen otherwise than 8"
        assert not any(name.split(".")[0] in ("qskd", "pipelines") for name in sys.modules), "qskd was needed"
        print("said", json.dumps(one))
    """
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64), np.uint8)
    Image.fromarray(pixels).save(root / "grey.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(root / "deep.png")
    arguments = [
        logged.uri,
        f"runs:/{logged.run_id}/student",
        str(photo),
        encoded,
        *(str(root / f"{n}.png") for n in ("grey", "deep")),
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent / "quick"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=root, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.partition("said ")[2])
    first, second = said
    assert first == second
    assert first["scores"] == sorted(first["scores"], reverse=True)
    assert len(first["boxes"]) == len(first["labels"]) > 0
    assert any(side != round(side) for box in first["boxes"] for side in box)  # not cut to whole pixels
    weights = list((root / "mlartifacts").rglob("*.safetensors"))
    assert len(weights) == 1
    history = json.loads(run_of(logged).data.tags["mlflow.log-model.history"])
    assert [each["artifact_path"] for each in history] == ["student"]


def test_a_registered_student_is_loaded_by_its_alias_and_by_plain_transformers(logged: Tracker) -> None:
    from transformers import AutoModelForObjectDetection

    assert logged.register("student", "it", "best") == "1"
    mlflow.set_tracking_uri(logged.uri)
    folder = mlflow.artifacts.download_artifacts("models:/it@best")
    assert AutoModelForObjectDetection.from_pretrained(folder).config.num_labels == 3
    assert mlflow.models.get_model_info("models:/it@best").flavors["python_function"]


class Checkpoint:
    """What Ray Train gives of a checkpoint on this disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, str(folder)

    @contextlib.contextmanager
    def as_directory(self) -> Iterator[str]:
        yield str(self.folder)


def test_a_finished_run_tells_its_result_its_figures_and_its_student(
    tiny_folders: Path, tmp_path: Path, tracker: Tracker, root: Path
) -> None:
    data = [f"data.{split}={tiny_folders / split}" for split in ("train", "val")]
    where = [
        f"output={tmp_path}/runs",
        f"tracking.uri=sqlite:///{root}/mlflow.db",
        "tracking.experiment=e",
        "name=done",
    ]
    plan = make_plan(resolve(recipe(None, *where, *data, "training.batch_size=2"), "train"), "train")
    folder, labels = Folder(plan.config), plan.train.labels
    claim(folder, "train", "done")
    own = Tracker.open(plan.config, "train")
    training = Training(plan.config, make_student(plan.config, labels), None, 4, torch.device("cpu"))
    found = CocoResult({**dict.fromkeys(METRICS, 0.25), "APl": -1.0}, {}, "pycocotools", np.zeros((10, 101, 0)))
    (tmp_path / "checkpoint").mkdir()
    write_checkpoint(tmp_path / "checkpoint", training, plan.config, found)
    rows = [(4, {"loss/total": 1.0, "speed/images_per_s": 2.0})]
    TrackingCallback(own, folder).write({"step": 4, "epoch": 0, "rows": rows, "evaluation": found.metrics})
    result = SimpleNamespace(error=None, checkpoint=Checkpoint(tmp_path / "checkpoint"))
    done = finish(plan, folder, own, result, 1.0)
    assert done.ap == 0.25
    run = run_of(own)
    assert run.data.metrics.keys() >= {"cost/parameters_m", "cost/gflops", "cost/latency_ms", "best/AP", "best/step"}
    assert "AP 0.250" in run.data.tags[NOTE]
    assert done.student in run.data.tags[NOTE]
    assert "mlflow.log-model.history" in run.data.tags
    files = {each.path for each in mlflow.MlflowClient(own.uri).list_artifacts(own.run_id, "student")}
    assert {"student/config.json", "student/model.safetensors", "student/MLmodel"} <= files
    assert not (Path(done.student) / "MLmodel").exists()  # the run's own folder stays plain


def test_of_a_student_that_starts_from_a_checkpoint_no_size_is_said_that_it_does_not_have(tiny_folders: Path) -> None:
    from pipelines.tracking.tracker import params_of
    from pipelines.training.notices import notices
    from qskd.detectors import build_student, save_detector

    hybrid = StudentConfig.model_validate({**STUDENT, "family": "rt_detr", "feature_levels": 2})
    save_detector(build_student(hybrid, ("a", "b"), 0).eval(), tiny_folders / "hybrid", hybrid.resize)
    config = build({"student": {"init": str(tiny_folders / "hybrid")}, "compute": {"workers": 2}})
    said = {name: value for name, value in params_of(config).items() if name.startswith("student.")}
    assert said == {"student.init": str(tiny_folders / "hybrid")}
    assert any("a rt_detr has batch normalisation" in notice for notice in notices(config, 1.0))
    assert "student.family" in params_of(build({}))
