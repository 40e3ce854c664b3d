"""`qskd explain` finds the image, its objects, the run's student and its teacher by itself; a run's report shows the same."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import random_teacher, silent_student
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.inspection.explain import AFTER, BEFORE, Source, read_source, write_explanations
from pipelines.prepare import prepare
from pipelines.reporting.report import write_report
from pipelines.tracking.tracker import Tracker
from qskd.config import Config
from qskd.config.recipe import load, to_yaml
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import save_detector
from qskd.errors import QskdError

SIZES = [
    "student.backbone={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}",
    *("student.width=32", "student.encoder_layers=1", "student.decoder_layers=2", "student.heads=4"),
    *("student.ffn_width=32", "student.queries=6", "student.resize.size=64"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny: what a finished run leaves, but for the training; its data, its teacher, and another student."""
    root = tmp_path_factory.mktemp("explain")
    for split, first in (("train", 0), ("val", 100)):
        annotations, images = make_shapes(ShapesConfig(images=6, first_image=first), root / f"{split}-coco")
        prepare(annotations, images, str(root / split), quiet=True)
    labels = load_manifest(str(root / "val")).labels
    teacher = random_teacher("refined", labels, ("N/A", *labels[::-1])).detector
    config = load(None, [*SIZES, "name=tiny", *paths(root)])
    save_detector(teacher, root / "teacher", config.student.resize)
    for name, seed in (("tiny", 1), ("other", 2)):
        folder = root / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(to_yaml(config))
        save_detector(silent_student(config.student, labels, seed).eval(), folder / "student", config.student.resize)
    (root / "recipe.yaml").write_text(to_yaml(config))
    return root


def paths(root: Path) -> list[str]:
    data = [f"data.{split}={root}/{split}" for split in ("train", "val")]
    return [*data, f"output={root}/runs", f"teacher.path={root}/teacher", f"tracking.uri=sqlite:///{root}/mlflow.db"]


def boxes_in_json(root: Path, split: str, image_id: int) -> np.ndarray:
    document = json.loads((root / f"{split}-coco" / "annotations.json").read_text())
    boxes = [entry["bbox"] for entry in document["annotations"] if entry["image_id"] == image_id]
    return np.array([[x, y, x + w, y + h] for x, y, w, h in boxes], float)


def test_a_run_and_its_recipe_find_the_same_student_and_an_image_by_id_name_or_file(work: Path) -> None:
    source = read_source(str(work / "runs/tiny"))
    assert source == read_source(str(work / "recipe.yaml"))
    assert source.student == str(work / "runs/tiny/student")
    dataset = json.loads((work / "val-coco/annotations.json").read_text())
    image = dataset["images"][2]
    file = work / "elsewhere" / image["file_name"]
    file.parent.mkdir(parents=True)
    shutil.copy(work / "val-coco/images" / image["file_name"], file)
    expected = boxes_in_json(work, "val", image["id"])
    assert len(expected)
    shown = [
        write_explanations(source, [name], out=work / "a.png")[0][1]
        for name in (str(image["id"]), image["file_name"], str(file))
    ]
    for one in shown:
        assert not one.stand_ins
        assert one.name == f"{image['file_name']} (image {image['id']} of data.val)"
        np.testing.assert_allclose(one.objects.boxes_xyxy, expected, atol=1e-3)
        assert list(one.students) == [BEFORE, AFTER]
        assert one.seen[0].kept is not None
        assert one.seen[0].kept.positives == len(expected)


def test_the_command_writes_a_picture_and_says_what_is_in_it(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    arguments = ["explain", "runs/tiny", "101", "3", "--before", "runs/other/student", "--view", "0"]
    said = CliRunner().invoke(app, arguments)
    assert said.exit_code == 0, said.output
    assert "image 101 of data.val): view 0" in said.output
    assert "image 3 of data.train): view 0" in said.output
    assert "before: other: " in said.output
    assert "hard negative queries" in said.output
    for name in ("101", "3"):
        assert Image.open(work / f"{name}.explained.png").size[0] > 1000
    dry = CliRunner().invoke(app, ["explain", "runs/tiny", "5", "--dry-run"])
    assert "5 → 5.explained.png" in dry.output
    assert not (work / "5.explained.png").exists()


def test_a_plain_picture_is_told_from_an_annotated_one(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, picture = read_source(str(work / "runs/tiny")), work / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 80, 3)).astype(np.uint8)).save(picture)
    with caplog.at_level(logging.WARNING):
        ((path, shown),) = write_explanations(source, [str(picture)])
    assert path == work / "photo.explained.png"
    assert shown.stand_ins
    assert "Nobody annotated" in caplog.text
    with pytest.raises(QskdError, match="--view"):
        write_explanations(source, [str(picture)], view=0)
    namesake = work / "other-pictures" / "000000000101.jpg"
    namesake.parent.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(namesake)
    with caplog.at_level(logging.WARNING):
        ((_, shown),) = write_explanations(source, [str(namesake)])
    assert shown.stand_ins
    assert "another picture" in caplog.text


def test_coco_json_describes_a_file(work: Path) -> None:
    source, document = read_source(str(work / "recipe.yaml"), ["data.train=", "data.val="]), work / "val-coco"
    image = json.loads((document / "annotations.json").read_text())["images"][1]
    file = document / "images" / image["file_name"]
    ((_, shown),) = write_explanations(source, [str(file)], document / "annotations.json", out=work / "b.png")
    np.testing.assert_allclose(shown.objects.boxes_xyxy, boxes_in_json(work, "val", image["id"]), atol=1e-3)
    assert shown.labels == load_manifest(str(work / "val")).labels
    with pytest.raises(QskdError, match="no such image"):
        write_explanations(source, [str(work / "teacher/config.json")], document / "annotations.json")


def test_an_image_of_data_unlabeled_is_found_by_name_and_by_file_and_told_to_be_so(work: Path) -> None:
    make_shapes(ShapesConfig(images=4, first_image=500), work / "pool-coco")
    prepare(work / "pool-coco/images", None, str(work / "pool"), quiet=True, unlabeled=True)
    picture = sorted((work / "pool-coco/images").iterdir())[1]
    fields = [f"data.unlabeled=[{work}/pool]"]
    source = read_source(str(work / "recipe.yaml"), fields)
    for image in (str(picture), picture.name):
        ((_, shown),) = write_explanations(source, [image], out=work / "u.png")
        assert shown.name == f"{picture.name} (image 2 of data.unlabeled[0])"
        assert shown.unlabeled
    alone = read_source(str(work / "recipe.yaml"), [*fields, "data.train=", f"data.val={work}/val"])
    ((_, shown),) = write_explanations(alone, [picture.name], out=work / "u.png")
    assert shown.labels == load_manifest(str(work / "val")).labels


def test_what_cannot_be_found_is_told(work: Path) -> None:
    source = read_source(str(work / "runs/tiny"))
    with pytest.raises(QskdError, match=r"99999: neither a file nor an image[^\n]*\n[^\n]*101 \("):
        write_explanations(source, ["99999"])
    with pytest.raises(QskdError, match="2 images for one output file"):
        write_explanations(source, ["1", "2"], out=work / "c.png")
    with pytest.raises(QskdError, match=r"no config\.yaml"):
        read_source(str(work / "teacher"))
    with pytest.raises(QskdError, match="can't be written"):
        write_explanations(source, ["101"], out=work / "picture.nonsense")


def test_without_data_teacher_or_trained_student_there_is_still_a_picture(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = next((work / "val-coco/images").iterdir())
    moved = load(work / "recipe.yaml", [f"data.val={work}/gone", "data.train="])
    with caplog.at_level(logging.WARNING):
        ((_, shown),) = write_explanations(Source(moved, ""), [str(file)], out=work / "d.png")
    assert "data.val is left out" in caplog.text
    assert "no trained student" in caplog.text
    assert shown.stand_ins
    assert list(shown.students) == [BEFORE]
    gone = load(work / "recipe.yaml", [f"student.backbone.init={work}/gone"])
    ((_, shown),) = write_explanations(Source(gone, str(work / "runs/tiny/student")), ["101"], out=work / "d.png")
    assert list(shown.students) == [AFTER]
    assert "the student before training is left out" in caplog.text
    untaught = load(work / "recipe.yaml", ["distillation.method=none", "teacher.path="])
    ((_, alone),) = write_explanations(Source(untaught, str(work / "runs/tiny/student")), ["101"], out=work / "e.png")
    assert alone.teacher is None
    assert len(alone.objects.scores)


class TestReport:
    """On a real MLflow store."""

    @pytest.fixture(scope="class")
    def manifest(self, work: Path) -> Manifest:
        return load_manifest(str(work / "val"))

    def log(self, config: Config, manifest: Manifest, work: Path) -> dict[str, int]:
        """Artifacts' bytes by path, of a report on a new run."""
        tracker = Tracker.open(config, "distill")
        losses = {
            step: {"loss/total": 5.0 / step, "loss/agfd": 1.0 / step, "loss/class_0": 1.0} for step in (20, 40, 60)
        }
        tracker.metrics(losses.items())
        evaluation = {"AP": 0.1, "AP50": 0.2, "AP75": 0.1}
        history = [{"step": 60, "epoch": 1, "evaluation": evaluation, "training": losses[60]}]
        write_report(config, manifest, history, work / "runs/tiny/student", tracker)
        import mlflow

        client = mlflow.MlflowClient(tracker.uri)
        folders = ("student", "pictures", "pictures/explained")
        return {a.path: a.file_size for f in folders for a in client.list_artifacts(tracker.run_id, f)}

    def test_a_report_holds_pictures_and_curves_and_no_failure_of_theirs_loses_the_student(
        self, work: Path, manifest: Manifest, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = load(work / "recipe.yaml")
        found = self.log(config, manifest, work)
        wanted = [f"pictures/{name}.png" for name in ("samples", "ap", "loss")]
        wanted += [f"pictures/explained/{image_id}.png" for image_id in (101, 102, 103, 104)]
        assert set(found) >= {*wanted, "student/model.safetensors"}
        assert all(found[name] > 5000 for name in wanted)
        assert not caplog.records
        broken = config.model_copy(update={"teacher": config.teacher.model_copy(update={"path": f"{work}/nowhere"})})
        with caplog.at_level(logging.WARNING):
            found = self.log(broken, manifest, work)
        assert set(found) >= {"student/model.safetensors", "pictures/loss.png"}
        assert "pictures/samples.png" not in found
        assert "no pictures in MLflow" in caplog.text
