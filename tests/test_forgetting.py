"""`qskd evaluate --known-by`: AP of the classes that an old detector knows, of the others, and how much was forgotten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import qskd
from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER, VAL
from pipelines.prepare import prepare
from qskd.config import StudentConfig
from qskd.datasets.shapes import EASY, TWINS, make_shapes
from qskd.detectors import build_student, read_preprocessing, save_detector
from qskd.evaluation.average_precision import evaluate_coco
from qskd.evaluation.details import Evaluation, evaluate_in_detail
from qskd.evaluation.detections import Detections, GroundTruth
from qskd.evaluation.forgetting import forgetting


def scene(seed: int) -> tuple[GroundTruth, Detections]:
    """30 images with objects of four categories, the last of which has none, and shaken detections of them."""
    rng = np.random.default_rng(seed)
    images, count = np.arange(1, 31), 120
    centre, size = rng.uniform(20, 80, (count, 2)), rng.uniform(8, 30, (count, 2))
    boxes, of, ids = (
        np.concatenate([centre - size, centre + size], 1),
        rng.choice(images, count),
        rng.integers(1, 4, count),
    )
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    side = np.full(30, 100, np.int32)
    names = [(1, "a"), (2, "b"), (3, "c"), (4, "d")]
    truth = GroundTruth(images, side, side, of, boxes, ids, area, np.zeros(count, bool), names)
    said = np.where(rng.random(count) < 0.8, ids, rng.integers(1, 4, count))
    found = boxes + rng.normal(0, 2 + seed, boxes.shape)
    return truth, Detections(of, found.astype(np.float32), rng.random(count).astype(np.float32), said)


def test_ap_of_some_classes_is_that_of_a_dataset_which_has_these_alone() -> None:
    truth, found = scene(1)
    _, worse = scene(2)
    told = forgetting(evaluate_in_detail(truth, worse), evaluate_in_detail(truth, found), {"a", "c", "d"}, "old")

    def alone(detections: Detections, ids: tuple[int, ...]) -> dict[str, float]:
        mine, theirs = np.isin(truth.category_ids, ids), np.isin(detections.category_ids, ids)
        columns = (truth.object_image_ids, truth.boxes_xyxy, truth.category_ids, truth.area, truth.iscrowd)
        part = GroundTruth(
            *(truth.image_ids, truth.heights, truth.widths, *(column[mine] for column in columns)),
            [pair for pair in truth.categories if pair[0] in ids],
        )
        return evaluate_coco(part, Detections(*(column[theirs] for column in vars(detections).values()))).metrics

    for group, ids in ((told.old, (1, 3, 4)), (told.new, (2,)), (told.all, (1, 2, 3, 4))):
        assert group.ap == pytest.approx(alone(worse, ids)["AP"])
        assert group.ap50 == pytest.approx(alone(worse, ids)["AP50"])
        assert group.classes == len(ids)
        assert group.objects == int(np.isin(truth.category_ids, ids).sum())
    assert told.before == pytest.approx(alone(found, (1, 3, 4))["AP"])
    assert told.forgotten == pytest.approx(alone(found, (1, 3, 4))["AP"] - alone(worse, (1, 3, 4))["AP"])
    assert [one.name for one in told.classes] == sorted("ac", key=lambda name: _change(told.classes, name))


def _change(classes: object, name: str) -> float:
    return next(one.after - one.before for one in classes if one.name == name)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """val: shards of 16 classes. old: the package's teacher with its eight easy classes alone. new: the whole teacher, which has
    forgotten the circle."""
    root = tmp_path_factory.mktemp("forgetting")
    annotations, images = make_shapes(VAL.model_copy(update={"images": 40}), root)
    prepare(annotations, images, str(root / "val"), quiet=True)
    resize = read_preprocessing(TEACHER).resize
    for name, classes in (("old", EASY), ("new", EASY + TWINS)):
        detector = build_student(StudentConfig(init=str(TEACHER), resize=resize), classes, 0).eval()
        if name == "new":
            with torch.no_grad():
                for part in {id(head): head for head in detector.model.class_embed}.values():
                    part.bias[EASY.index("circle")] = -20.0
        save_detector(detector, root / name, resize)
    return root


def test_what_was_forgotten_is_said_in_a_table_in_words_and_in_json(root: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(
        app,
        [
            "evaluate",
            str(root / "new"),
            str(root / "val"),
            f"--known-by={root / 'old'}",
            "--workers=0",
            f"--out={tmp_path / 'report'}",
        ],
        env={"COLUMNS": "120"},
    )
    assert said.exit_code == 0, said.output
    kept = Evaluation.from_json((tmp_path / "report/evaluation.json").read_text(), "evaluation.json")
    told = kept.forgetting
    assert told is not None
    assert (told.old.classes, told.new.classes, told.all.ap) == (8, 8, pytest.approx(kept.metrics["AP"]))
    assert told.classes[0].name == "circle"
    assert told.classes[0].before > 0.2 > told.classes[0].after
    assert told.forgotten is not None
    assert told.forgotten > 0.02
    assert f"forgotten: {100 * told.forgotten:.1f} points of AP of the old classes" in said.output
    assert "most: circle" in said.output
    assert "left to nobody" not in said.output
    again = qskd.evaluate(root / "new", root / "val", known_by=root / "old")
    assert again.forgetting is not None
    assert again.forgetting.forgotten == pytest.approx(told.forgotten)
    # An evaluation of before there was such a thing is read as one without it.
    tree = json.loads((tmp_path / "report/evaluation.json").read_text())
    del tree["forgetting"]
    assert Evaluation.from_json(json.dumps(tree), "evaluation.json").forgetting is None


def test_an_old_detector_that_knows_all_classes_or_none_is_refused_before_anything_runs(root: Path) -> None:
    with pytest.raises(qskd.QskdError, match="knows every class"):
        qskd.evaluate(root / "new", root / "val", known_by=TEACHER)
