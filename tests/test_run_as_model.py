"""A run's folder, given where a model's is asked for, is its student's: everywhere, also at a URI."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from strangers import config
from tiny import recipe
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER
from pipelines.deployment.benchmark import BenchmarkOptions, benchmark
from pipelines.deployment.benchmark import foresee as foresee_benchmark
from pipelines.deployment.export import ExportOptions, export
from pipelines.inspection.evaluate import evaluate
from pipelines.inspection.explain import Source, write_explanations
from pipelines.inspection.predict import predict
from pipelines.run.folder import MARK, SWEEP
from pipelines.run.resolve import resolve
from qskd.checks import check_classes
from qskd.config.recipe import to_yaml
from qskd.datasets.manifest import load_manifest
from qskd.detectors import build_student, checkpoint_digests, labels_of, load_detector, read_config, read_preprocessing
from qskd.errors import QskdError
from qskd.storage.places import fetched


@pytest.fixture
def run(here: Path) -> Path:
    """The folder of a finished run, as much of it as counts here."""
    folder = here / "runs" / "small"
    shutil.copytree(TEACHER, folder / "student")
    (folder / MARK).write_text("{}")
    (folder / "config.yaml").write_text(to_yaml(recipe()))
    return folder


def test_every_verb_that_asks_for_a_model_takes_a_run(run: Path, here: Path) -> None:
    given, photo, small = str(run), here / "photo.png", BenchmarkOptions((1,), memory=False, rounds=1)
    expected = evaluate(f"{run}/student", str(here / "val"), workers=0)
    assert evaluate(given, str(here / "val"), workers=0) == expected
    assert evaluate(run.as_uri(), str(here / "val"), workers=0) == expected
    (_, theirs), (_, ours) = (
        predict(name, [photo], here / f"{place}.png", threshold=0.0)[0]
        for place, name in enumerate([f"{run}/student", given])
    )
    assert ours.scores.tolist() == theirs.scores.tolist()
    export(given, here / "exported", ExportOptions(onnx=False))
    assert (here / "exported" / "model.safetensors").is_file()
    (row,) = benchmark([given], small).rows
    assert row.name == "small"
    assert foresee_benchmark([f"{given}/"], small).startswith("small: ")
    ((_, shown),) = write_explanations(
        Source(config(here, "distillation.method=none", "teacher.path="), ""), [str(photo)], before=given
    )
    assert list(shown.students) == ["Before: small"]


def test_a_run_is_a_teacher_or_a_beginning_and_the_student_s_folder_is_what_is_recorded(run: Path, here: Path) -> None:
    labels = load_manifest(str(here / "train")).labels
    resolved = resolve(config(here, f"teacher.path={run}", f"student.init={run}/"), "distill")
    assert resolved.teacher.path == resolved.student.init == str(run / "student")
    for path in (str(run), str(run / "student")):
        written = resolved.teacher.model_copy(update={"path": path})
        check_classes(resolved.model_copy(update={"teacher": written}), load_manifest(str(here / "train")))
        assert load_detector(path).labels == labels_of(read_config(path)) == load_detector(TEACHER).labels
        assert checkpoint_digests(path) == checkpoint_digests(TEACHER)
        assert read_preprocessing(path) == read_preprocessing(TEACHER)
    assert build_student(resolved.student.model_copy(update={"init": str(run)}), labels, 0).labels == labels


def test_a_run_s_own_teacher_can_t_be_the_run_itself(run: Path, here: Path) -> None:
    with pytest.raises(QskdError, match=r"small contains teacher.path \(.*small/student\)"):
        resolve(config(here, f"teacher.path={run}", "name=small"), "distill")


@pytest.mark.parametrize("at", [str, Path.as_uri])
def test_what_a_run_without_a_student_and_a_sweep_lack_is_said(
    run: Path, here: Path, at: Callable[[Path], str]
) -> None:
    (run / "student" / "config.json").unlink()

    def said() -> str:
        with pytest.raises(QskdError) as caught:
            evaluate(at(run), str(here / "val"), workers=0)
        assert caught.value.where == at(run)
        return str(caught.value)

    assert "the folder of a run that has no student yet" in said()
    assert "goes on with it" in said()
    (run / SWEEP).write_text("{}")
    assert "the folder of a sweep, whose trials have a student each" in said()
    assert "trials/0000" in said()


def test_a_checkpoint_and_a_trial_are_folders_of_a_student_too(run: Path, here: Path) -> None:
    for name in ("trials/0003", "train/checkpoint_000002"):
        shutil.copytree(here / "model", run / name / "student")
        with fetched(str(run / name)) as folder:
            assert Path(folder) == run / name / "student"


def test_a_model_s_own_folder_wins_and_another_folder_is_refused_as_ever(run: Path, here: Path) -> None:
    shutil.copytree(here / "model", here / "model" / "student")
    with fetched(str(here / "model")) as folder:
        assert Path(folder) == here / "model"
    result = CliRunner().invoke(app, ["evaluate", str(here), str(here / "val"), "--dry-run"])
    assert isinstance(result.exception, QskdError)
    assert "no config.json" in str(result.exception)
