"""`qskd label`: a teacher's detections as COCO JSON, by parts that outlive a killed job, and read back by `qskd prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from strangers import NOTES, refused
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER, VAL
from pipelines.inspection.evaluate import evaluate
from pipelines.labelling import actors, job
from pipelines.labelling.parts import parts_folder
from pipelines.prepare import prepare
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import make_shapes
from qskd.datasets.shards import read_annotations
from qskd.detectors import load_detector
from qskd.errors import QskdError

IMAGES = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images: of the package's teacher's own kind; val: the same as labelled shards."""
    root = tmp_path_factory.mktemp("label")
    annotations, images = make_shapes(VAL.model_copy(update={"images": IMAGES}), root)
    prepare(annotations, images, str(root / "val"), quiet=True)
    return root


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "PART", 15)


def request(root: Path, out: Path, **changes: Any) -> job.Request:
    asked = {"threshold": 0.4, "workers": 0, **changes}
    return job.Request(str(TEACHER), asked.pop("images", root / "images"), out, str(root / "val"), **asked)


def test_labels_are_the_datasets_own_and_prepare_reads_them_back(root: Path, tmp_path: Path) -> None:
    done = job.run(request(root, tmp_path / "labels.json"), quiet=True)
    said = json.loads((tmp_path / "labels.json").read_text())
    assert {one["id"]: one["name"] for one in said["categories"]} == {
        one.id: one.name for one in load_manifest(str(root / "val")).categories
    }
    assert all(one["score"] >= 0.4 for one in said["annotations"])
    assert len(said["images"]) == done.images == IMAGES
    assert not parts_folder(tmp_path / "labels.json").exists()

    made = prepare(tmp_path / "labels.json", root / "images", str(tmp_path / "shards"), quiet=True)
    assert made.problems == ()
    assert made.num_objects == len(said["annotations"]) == sum(done.objects.values())
    # The teacher finds most of what is there, in the classes that it has in the dataset.
    truth, read = read_annotations(str(root / "val")), read_annotations(str(tmp_path / "shards"))
    assert 0.6 < made.num_objects / len(truth["category_ids"]) < 1.4
    counts = [np.bincount(each["category_ids"], minlength=30) for each in (truth, read)]
    assert np.corrcoef(counts)[0, 1] > 0.7


def test_a_job_that_was_killed_goes_on_and_ends_as_an_undisturbed_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.json"
    job.run(request(root, whole), quiet=True)
    detect, calls = actors.LabelActor._detect, list[int]()

    def dying(self: actors.LabelActor, batch: Any, problems: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return detect(self, batch, problems)

    monkeypatch.setattr(actors.LabelActor, "_detect", dying)
    with pytest.raises(KeyboardInterrupt):
        job.run(request(root, tmp_path / "labels.json"), quiet=True)
    assert not (tmp_path / "labels.json").exists()
    calls.clear()
    job.run(request(root, tmp_path / "labels.json"), quiet=True)
    assert sum(calls) == IMAGES - 2 * job.PART  # two parts were whole
    assert (tmp_path / "labels.json").read_bytes() == whole.read_bytes()
    calls.clear()
    job.run(request(root, tmp_path / "labels.json"), quiet=True)
    assert not calls  # finished


def test_a_class_has_the_threshold_of_its_best_f1_where_it_has_objects_enough(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = evaluate(str(TEACHER), str(root / "val"), workers=0)
    fewest = sorted(one.objects for one in said.classes)[8]
    monkeypatch.setattr(job, "FEWEST", fewest)
    plan = job.make_plan(request(root, tmp_path / "labels.json", threshold=None))
    for one in said.classes:
        own = one.best is not None and one.objects >= fewest
        assert plan.thresholds[one.name] == (round(one.best.score, 4) if own and one.best else job.USUAL)
    assert len(set(plan.thresholds.values())) > 4
    few = [one.name for one in said.classes if one.objects < fewest]
    assert f"fewer than {fewest} objects in {root / 'val'}" in caplog.text
    assert all(name in caplog.text for name in few)


def test_thresholds_are_measured_once_and_kept_by_whoever_goes_on(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured with other batches or processes they are others in the last digits, and every part would be made anew."""
    monkeypatch.setattr(job, "FEWEST", 5)
    asked, detect, calls = (
        request(root, tmp_path / "labels.json", threshold=None),
        actors.LabelActor._detect,
        list[int](),
    )

    def dying(self: actors.LabelActor, batch: Any, problems: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(batch))
        return detect(self, batch, problems)

    monkeypatch.setattr(actors.LabelActor, "_detect", dying)
    with pytest.raises(KeyboardInterrupt):
        job.run(asked, quiet=True)
    monkeypatch.setattr(job, "evaluate", lambda *_, **__: pytest.fail("measured again"))
    calls.clear()
    done = job.run(asked, quiet=True)
    assert sum(calls) == IMAGES - 2 * job.PART
    assert len(set(done.thresholds.values())) > 4
    calls.clear()
    again = job.run(request(root, tmp_path / "labels.json", threshold=None, batch_size=3), quiet=True)
    assert (calls, again.thresholds) == ([], done.thresholds)
    assert not parts_folder(tmp_path / "labels.json").exists()
    monkeypatch.setattr(job, "FEWEST", 6)  # of another rule
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        job.make_plan(asked)


def test_files_of_others_are_never_replaced_and_other_labels_by_option_alone(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.json"
    out.write_bytes(NOTES)
    for overwrite in (False, True):
        again = request(root, out, overwrite=overwrite)
        refused(lambda a=again: job.run(a, quiet=True), "did not write it", tmp_path)  # type: ignore[misc]
    out.unlink()
    parts_folder(out).mkdir()
    (parts_folder(out) / "part-00001.json").write_bytes(NOTES)
    refused(lambda: job.run(request(root, out), quiet=True), "holds other things", tmp_path)
    (parts_folder(out) / "part-00001.json").unlink()
    job.run(request(root, out), quiet=True)
    refused(lambda: job.run(request(root, out, threshold=0.9), quiet=True), "labels of another run", tmp_path)
    before = out.read_bytes()
    job.run(request(root, out, threshold=0.9, overwrite=True), quiet=True)
    assert len(out.read_bytes()) < len(before)


def test_a_broken_picture_stops_the_job_or_is_left_out_and_named(root: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for number, path in enumerate(sorted((root / "images").iterdir())[:3]):
        (pool / path.name).write_bytes(path.read_bytes()[: 700 if number == 1 else None])
    broken = sorted(pool.iterdir())[1].name
    with pytest.raises(QskdError, match=broken):
        job.run(request(root, tmp_path / "labels.json", images=pool), quiet=True)
    done = job.run(request(root, tmp_path / "labels.json", images=pool, on_error="skip"), quiet=True)
    assert done.images == 2
    assert [Path(each["where"]).name for each in done.left_out] == [broken]


def test_what_was_labelled_before_a_broken_picture_is_kept_whatever_the_next_attempt_does(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only decoding finds a picture that is cut off: most of a job may be done by then."""
    pool, detect, calls = tmp_path / "pool", actors.LabelActor._detect, list[int]()
    pool.mkdir()
    paths = sorted((root / "images").iterdir())
    for path in paths:
        (pool / path.name).write_bytes(path.read_bytes()[: 700 if path == paths[-1] else None])

    def counting(self: actors.LabelActor, batch: Any, problems: Any) -> Any:
        calls.append(len(batch))
        return detect(self, batch, problems)

    monkeypatch.setattr(actors.LabelActor, "_detect", counting)
    out = tmp_path / "labels.json"
    with pytest.raises(QskdError, match=paths[-1].name) as caught:
        job.run(request(root, out, images=pool), quiet=True)
    assert "same command with `--on-error skip`" in caught.value.remedy
    calls.clear()
    done = job.run(request(root, out, images=pool, on_error="skip", batch_size=8), quiet=True)
    assert sum(calls) == IMAGES % job.PART  # the last part alone
    assert done.images == IMAGES - 1
    with pytest.raises(QskdError, match="labels of another run"):  # it lacks a picture that would stop this one
        job.run(request(root, out, images=pool), quiet=True)
    with pytest.raises(QskdError, match=paths[-1].name):
        job.run(request(root, out, images=pool, overwrite=True), quiet=True)


def test_an_image_has_as_many_labels_as_the_detector_has_queries(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's AP counts 100 detections of an image; an image of 150 objects has 150 labels."""
    monkeypatch.setattr(job, "DETECTIONS", 10)
    queries = load_detector(TEACHER).num_queries
    assert queries == 30
    job.run(request(root, tmp_path / "labels.json", threshold=0.0), quiet=True)
    said = json.loads((tmp_path / "labels.json").read_text())["annotations"]
    counts = np.unique([one["image_id"] for one in said], return_counts=True)[1]
    assert counts.max() == queries


def test_labels_of_pictures_that_were_renamed_are_others(root: Path, tmp_path: Path) -> None:
    pool, out = tmp_path / "pool", tmp_path / "labels.json"
    pool.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (pool / name).write_bytes(sorted((root / "images").iterdir())[name == "b.jpg"].read_bytes())
    job.run(request(root, out, images=pool), quiet=True)
    (pool / "b.jpg").rename(pool / "c.jpg")
    refused(lambda: job.run(request(root, out, images=pool), quiet=True), "labels of another run", tmp_path)


def test_a_job_that_was_killed_as_it_deleted_its_parts_leaves_none(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "delete_parts", lambda out: None)
        job.run(request(root, out), quiet=True)
    assert parts_folder(out).is_dir()
    job.run(request(root, out), quiet=True)
    assert not parts_folder(out).exists()


def test_a_dry_run_refuses_the_file_that_the_run_would(root: Path, tmp_path: Path) -> None:
    words = ["label", str(TEACHER), str(root / "images"), str(tmp_path / "labels.json"), "--workers", "0"]
    words += ["--threshold", "0.4"]
    assert CliRunner().invoke(app, words).exit_code == 0
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert (done.exit_code, "finished already" in done.output) == (0, True)
    other = CliRunner().invoke(app, [*words[:-1], "0.5", "--dry-run"])
    assert "labels of another run" in str(other.exception)
    (tmp_path / "labels.json").write_bytes(NOTES)
    stranger = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "did not write it" in str(stranger.exception)


def test_without_a_dataset_the_labels_are_the_teachers_and_the_plan_is_told(root: Path, tmp_path: Path) -> None:
    found = CliRunner().invoke(
        app, ["label", str(TEACHER), str(root / "images"), str(tmp_path / "labels.json"), "--workers", "0", "--dry-run"]
    )
    assert found.exit_code == 0, found.output
    assert f"{IMAGES} images" in found.output
    assert "circle 0.500" in found.output
    assert not (tmp_path / "labels.json").exists()
