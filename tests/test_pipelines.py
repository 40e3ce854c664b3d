"""End to end on a real Ray and a real MLflow store: train, distil, stop and go on, two workers, evaluate.

A run takes some 20 s of CPU time whatever it trains, for Ray's processes and their imports: tests share runs where they can,
and compare with a training in this process where the other side need not be Ray's.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from forked import processes_of_ray, server_name
from PIL import Image
from safetensors.torch import load_file

from pipelines.cluster.start import start_ray
from pipelines.feed.stream import local_stream
from pipelines.inspection.evaluate import evaluate
from pipelines.inspection.predict import predict
from pipelines.prepare import prepare
from pipelines.run.folder import Folder
from pipelines.run.history import read_history
from pipelines.run.ownership import check_ours
from pipelines.training import driver as distill
from pipelines.training.checkpoint_list import LIST, last_report, mend_list
from qskd.config import Config
from qskd.config.recipe import load, to_yaml
from qskd.datasets.batch import train_batch
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import build_student, save_detector
from qskd.errors import QskdError
from qskd.evaluation.shown import measured
from qskd.from_recipe import make_student, teacher_for_training
from qskd.training.step import Training

pytestmark = pytest.mark.slow
SIZES = [
    "student.backbone.embedding_size=8",
    "student.backbone.hidden_sizes=[8, 16]",
    "student.backbone.depths=[1, 1]",
    "student.width=32",
    "student.encoder_layers=1",
    "student.decoder_layers=2",
    "student.heads=4",
    "student.ffn_width=32",
    "student.queries=8",
    "student.resize.size=64",
    "student.dropout=0.0",
    "training.batch_size=16",
    "training.learning_rate=1e-3",
    "training.backbone_learning_rate_scale=1",
    "detection.dense_weight=1",
]


def make_work(root: Path, train_images: int, val_images: int) -> Path:
    """Shards of so many images, one shard of each broken into several, and a teacher of other sizes."""
    for name, images, first in (("train", train_images, 0), ("val", val_images, 1000)):
        annotations, folder = make_shapes(ShapesConfig(images=images, first_image=first), root / f"{name}-coco")
        prepare(annotations, folder, str(root / name), rows_per_shard=40, quiet=True)
    labels = load_manifest(str(root / "train")).labels
    teacher = load(None, [*SIZES, "student.queries=11", "student.width=64", "student.decoder_layers=3"]).student
    save_detector(build_student(teacher, labels[::-1], seed=7).eval(), root / "teacher", teacher.resize)
    return root


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_work(tmp_path_factory.mktemp("pipelines"), 96, 24)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Of one file: a Ray that idles until the last test's end takes as much as starting another. Its workers are forked."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSKD_FORK_SERVER", server_name())  # Ray's processes keep it: they start the workers
        start_ray()
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def config(work: Path, name: str, *overrides: str) -> Config:
    fixed = [
        f"name={name}",
        f"output={work}/runs",
        f"data.train={work}/train",
        f"data.val={work}/val",
        f"teacher.path={work}/teacher",
        f"tracking.uri=sqlite:///{work}/mlflow.db",
        "training.epochs=2",
    ]
    return load(None, [*SIZES, *fixed, *overrides])


def weights(student: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(f"{student}/model.safetensors")
    return tensors


def without_ray(config: Config, steps: int | None = None) -> list[dict[str, float]]:
    """Each step's terms in a training of this process, from the plan of the run; of the first `steps`."""
    plan = distill.make_plan(distill.resolve(config, "distill"), "distill")
    labels = plan.train.labels
    student, teacher = make_student(plan.config, labels), teacher_for_training(plan.config, labels, torch.device("cpu"))
    training = Training(plan.config, student, teacher, plan.stream.schedule.total_steps, torch.device("cpu"))
    shares = (share for share in local_stream(plan.stream) if share.subset == "train")
    found = [training.train_step(train_batch(share.arrays)) for share in itertools.islice(shares, steps)]
    training.check_finite()
    return [{f"loss/{name}": value.item() for name, value in values.items()} for values in found]


@contextlib.contextmanager
def killing(part: str, when: Callable[[], object]) -> Iterator[list[int]]:
    """Kills this test's own processes of Ray whose title has `part`, once `when` says so; yields the ids of the killed."""
    victims: list[int] = []
    left = threading.Event()

    def kill() -> None:
        while not when():
            if left.wait(0.05):
                return
        while not victims and not left.wait(0.01):  # a process has its title only some time after it has begun
            for process in processes_of_ray():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if any(part in word for word in process.cmdline()):
                        process.kill()
                        victims.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    yield victims
    left.set()
    killer.join(5)


def in_stretches(monkeypatch: pytest.MonkeyPatch, ranges: int) -> None:
    """Runs of this test take several executions of Ray Data, of so many ranges of steps each."""
    whole = distill.make_plan

    def plan(config: Config, kind: str) -> distill.Plan:
        made = whole(config, kind)
        return replace(made, stream=replace(made.stream, stretch_ranges=ranges))

    monkeypatch.setattr(distill, "make_plan", plan)


# Long enough to be stopped on the way.
LONGER = [
    "training.epochs=6",
    "training.checkpoint_every_steps=2",
    "training.evaluate_every_epochs=3",
    "student.dropout=0.1",
    "training.ema_decay=0.9",
]
STEPS = range(2, 37, 2)  # of its checkpoints, each of which is a report


Students = dict[int, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def undisturbed(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Students:
    """Of a training of this process, which nothing disturbs: at the step of each evaluation, the student that it would leave."""
    plan = distill.make_plan(distill.resolve(config(work, "undisturbed", *LONGER), "distill"), "distill")
    labels, found = plan.train.labels, {}
    student, teacher = make_student(plan.config, labels), teacher_for_training(plan.config, labels, torch.device("cpu"))
    training = Training(plan.config, student, teacher, plan.stream.schedule.total_steps, torch.device("cpu"))
    for share in local_stream(plan.stream):
        if share.subset == "train":
            training.train_step(train_batch(share.arrays))
        elif training.step not in found:
            folder = tmp_path_factory.mktemp("undisturbed")
            with training.evaluation_weights() as evaluated:
                save_detector(evaluated, folder, plan.config.student.resize)
            found[training.step] = weights(str(folder))
    assert [*found] == [18, 36]
    return found


def no_training_is_left() -> None:
    """Ray ends a killed driver's processes a moment later; until then they write."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        titles = []
        for process in processes_of_ray():
            with contextlib.suppress(psutil.NoSuchProcess):
                titles += process.cmdline()[:1]
        if not any("TrainController" in title or "RayTrainWorker" in title for title in titles):
            return
        time.sleep(0.05)
    raise AssertionError(titles)


RECORDS = ("config.yaml", "data.json", "mlflow.json", "history.json")


@pytest.fixture(scope="module")
def disturbed(work: Path, cluster: str) -> SimpleNamespace:
    """A run that much happens to, and that is whole in the end: its program gets Ctrl-C, its controller dies while Ray writes the
    list of checkpoints, its program is killed, files of it are cut, its worker dies. It is begun three times."""
    import mlflow

    same = config(work, "disturbed", *LONGER)
    recipe = work / "disturbed.yaml"
    recipe.write_text(to_yaml(same))
    command = [sys.executable, "-m", "pipelines.distill", str(recipe)]
    folder, reached, stops = Folder(same), [0], []
    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": cluster}, start_new_session=True)
        deadline = time.monotonic() + 400  # a busy machine takes minutes to start
        while process.poll() is None and time.monotonic() < deadline:
            if (read_history(folder) or [{"step": 0}])[-1]["step"] > reached[-1]:
                break
            time.sleep(0.05)
        os.killpg(process.pid, how)
        code = process.wait(100)
        no_training_is_left()
        reached.append(read_history(folder)[-1]["step"])
        run_id = json.loads(folder.read("mlflow.json"))["run_id"]
        stops.append((code, client.get_run(run_id).info.status, folder.exists("result.json")))
        if how == signal.SIGINT:
            # As if the controller had died while Ray wrote its list of checkpoints, and before the run heard of the last one.
            heard, listed = read_history(folder), last_report(folder)
            folder.write(LIST, folder.read(LIST)[:100])
            if listed and listed[0]["step"] == heard[-1]["step"]:  # else it did not hear of it, and has it yet to hear
                folder.write("history.json", json.dumps(heard[:-1]))
    mend_list(folder)  # it may have been killed within Ray's writing
    listed = last_report(folder)
    assert listed is not None
    for name in (*RECORDS, f"{listed[1]}/state.safetensors"):
        path = Path(folder.root, name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def goes_on() -> bool:
        latest = last_report(folder)
        only_the_last_is_left = reached[-1] >= STEPS[-2]  # after which there may be no worker to kill
        return latest is not None and (latest[0]["step"] > reached[-1] or only_the_last_is_left)

    warnings: list[str] = []
    keep = logging.Handler()
    keep.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("qskd").addHandler(keep)
    try:
        with pytest.MonkeyPatch.context() as patch, killing("RayTrainWorker", goes_on) as victims:
            in_stretches(patch, 3)  # nor does it change anything that the data comes in several executions
            result = distill.run(same, "distill")
    finally:
        logging.getLogger("qskd").removeHandler(keep)
    return SimpleNamespace(
        folder=folder, result=result, stops=stops, reached=reached, run_id=run_id, damaged=listed[1],
        warnings=warnings, victims=victims,
    )  # fmt: skip


def same_weights(students: Students, result: distill.RunResult) -> bool:
    expected, found = students[result.step], weights(result.student)
    return expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_run_leaves_a_student_metrics_and_a_whole_mlflow_run(work: Path, disturbed: SimpleNamespace) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    run = client.get_run(disturbed.result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["student.queries"] == "8"
    assert run.data.params["distillation.selection.boundaries"] == "[0.5]"
    for name in ("loss/total", "loss/agfd", "loss/lapd_class", "loss/dense_l1", "speed/images_per_s"):
        assert client.get_metric_history(disturbed.result.run_id, name), name
    assert [metric.step for metric in client.get_metric_history(disturbed.result.run_id, "val/AP50")] == [18, 36]
    folders = ("", "student", "pictures", "pictures/explained")
    listed = {a.path for folder in folders for a in client.list_artifacts(disturbed.result.run_id, folder)}
    assert listed >= {"config.yaml", "student/model.safetensors", "student/config.json", "student/README.md"}
    assert listed >= {f"pictures/{name}.png" for name in ("samples", "ap", "loss")}
    assert len([path for path in listed if path.startswith("pictures/explained/")]) == 4
    assert Path(disturbed.result.student, "model.safetensors").exists()
    assert 0 <= disturbed.result.metrics["AP"] <= 1
    check_ours(Folder(config(work, "disturbed", *LONGER)), restart=True)  # knows the name of every file that is left


def test_a_run_keeps_what_its_last_evaluation_says_in_its_folder_mlflow_and_card(
    work: Path, disturbed: SimpleNamespace
) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    pictures = ("precision_recall", "thresholds", "classes", "confusion")
    names = {"evaluation.json", "per_class.csv", *(f"{name}.png" for name in pictures)}
    assert {path.name for path in Path(disturbed.result.folder, "evaluation").iterdir()} == names
    assert {Path(a.path).name for a in client.list_artifacts(disturbed.result.run_id, "evaluation")} == names
    metrics = client.get_run(disturbed.result.run_id).data.metrics
    said = json.loads(Path(disturbed.result.folder, "evaluation/evaluation.json").read_text())
    assert measured(disturbed.result.metrics) == pytest.approx(
        {name: value for name, value in said["metrics"].items() if value is not None}, abs=1e-9
    )
    assert metrics["final/best_threshold"] == pytest.approx(said["best"]["score"])
    card = Path(disturbed.result.student, "README.md").read_text()
    for name in pictures:
        assert f"(card-{name}.png)" in card
        assert Path(disturbed.result.student, f"card-{name}.png").is_file()
    for one in said["classes"]:
        assert f"| {one['name']} | {one['id']} |" in card
    ids = [category.id for category in load_manifest(str(work / "train")).categories]
    assert json.loads(Path(disturbed.result.student, "config.json").read_text())["dataset_category_ids"] == ids


def test_evaluating_the_students_folder_gives_the_trainings_last_numbers(
    work: Path, disturbed: SimpleNamespace
) -> None:
    for workers in (0, 1):
        again = evaluate(disturbed.result.student, str(work / "val"), batch_size=7, workers=workers)
        assert again.metrics == pytest.approx(disturbed.result.metrics, abs=1e-6)


def test_the_same_command_again_trains_nothing(work: Path, disturbed: SimpleNamespace) -> None:
    again = distill.run(config(work, "disturbed", *LONGER), "distill")
    assert again == disturbed.result


def test_another_configuration_under_the_same_name_is_refused(work: Path, disturbed: SimpleNamespace) -> None:
    with pytest.raises(QskdError, match=r"training\.learning_rate was 0\.001, is 0\.5"):
        distill.run(config(work, "disturbed", *LONGER, "training.learning_rate=0.5"), "distill")


def test_a_killed_run_goes_on_to_the_same_weights(
    work: Path, undisturbed: Students, disturbed: SimpleNamespace
) -> None:
    import mlflow

    assert disturbed.stops == [(130, "KILLED", False), (-signal.SIGKILL, "RUNNING", False)]
    assert 0 < disturbed.reached[1] < disturbed.reached[2] < STEPS[-1]
    assert disturbed.result.run_id == disturbed.run_id
    assert [entry["step"] for entry in read_history(disturbed.folder)] == [*STEPS]
    client = mlflow.MlflowClient(f"sqlite:///{work}/mlflow.db")
    assert [metric.step for metric in client.get_metric_history(disturbed.run_id, "loss/total")] == [*STEPS]
    assert same_weights(undisturbed, disturbed.result)


def test_a_run_with_damaged_files_goes_on_from_an_older_checkpoint_to_the_same_weights(
    undisturbed: Students, disturbed: SimpleNamespace
) -> None:
    folder, told = disturbed.folder, "\n".join(disturbed.warnings)
    for name in RECORDS:
        assert f"{folder.where(name)} IS DAMAGED" in told
    assert f"A CHECKPOINT IS DAMAGED: {folder.where(f'{disturbed.damaged}/state.safetensors')} has " in told
    assert not folder.exists(disturbed.damaged)
    assert same_weights(undisturbed, disturbed.result)


def test_a_worker_that_dies_is_replaced_and_changes_nothing(undisturbed: Students, disturbed: SimpleNamespace) -> None:
    assert disturbed.victims
    assert same_weights(undisturbed, disturbed.result)


def test_a_damaged_shard_stops_the_run_with_its_name(work: Path, cluster: str, tmp_path: Path) -> None:
    manifest = load_manifest(str(work / "train"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (work / "train").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    victim = broken / manifest.shards[0].file
    data = bytearray(victim.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    victim.write_bytes(bytes(data))
    with pytest.raises(QskdError, match=victim.name):
        distill.run(config(work, "damaged", f"data.train={broken}", "compute.max_failures=3"), "train")


def test_an_unreachable_mlflow_server_is_named_before_training(work: Path) -> None:
    with pytest.raises(QskdError, match=r"MLflow at http://127\.0\.0\.1:9"):
        distill.run(config(work, "untracked", "tracking.uri=http://127.0.0.1:9"), "train")


def test_predict_draws_a_picture_of_each_image(work: Path, disturbed: SimpleNamespace, tmp_path: Path) -> None:
    image: Any = Image.fromarray(np.full((40, 60, 3), 128, np.uint8))
    image.save(tmp_path / "a.jpg")
    ((path, found),) = predict(disturbed.result.student, [tmp_path / "a.jpg"], threshold=0.0)
    assert path == tmp_path / "a.boxes.png"
    assert len(found.scores) > 0
    assert np.asarray(Image.open(path)).shape[0] >= 40
