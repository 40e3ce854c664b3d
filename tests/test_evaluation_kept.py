"""What an evaluation leaves: files in a folder, a section of the model card, ids in a student's config.json."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from strangers import NOTES, refused
from test_evaluation import tricky
from test_model_card import CARD
from test_notice import SIZES
from tiny import LABELS, recipe, silent_student
from transformers import AutoConfig, AutoModelForObjectDetection
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.feed.stream import local_stream
from pipelines.inspection.evaluate import evaluate
from pipelines.inspection.kept import EVALUATION, PICTURES, TABLE, check_kept, keep
from pipelines.inspection.tables import class_table, metrics_line, plain_line, remarks
from pipelines.prepare import prepare
from pipelines.run.ownership import OWN
from pipelines.training import driver
from pipelines.training.checkpoints import write_checkpoint
from pipelines.training.worker import Worker
from qskd.config import ResizeConfig
from qskd.config.recipe import load
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.deploy import card_evaluation
from qskd.deploy.card_evaluation import picture_name
from qskd.deploy.model_card import read_card, render, write_card
from qskd.detectors import load_detector, read_config, save_detector
from qskd.errors import QskdError
from qskd.evaluation.details import Confusion, Evaluation, Plain, evaluate_in_detail
from qskd.evaluation.detections import Detections
from qskd.pictures.evaluated import classes_picture, matrix_of, pictures_of, shown_classes
from qskd.storage.ownership import STUDENT_FILE

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def said() -> Evaluation:
    return evaluate_in_detail(*tricky(0))


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> tuple[Worker, driver.Plan]:
    """A training's worker after its last step, with a DETR, whose own post-processing keeps other pairs."""
    root = tmp_path_factory.mktemp("details")
    annotations, images = make_shapes(ShapesConfig(images=8), root / "coco")
    prepare(annotations, images, str(root / "data"), quiet=True)
    paths = [f"data.train={root}/data", f"data.val={root}/data", f"output={root}/runs"]
    config = load(None, [*SIZES, *paths, "student.family=detr", "training.batch_size=4", "training.epochs=1"])
    plan = driver.make_plan(driver.resolve(config, "train"), "train")
    made = Worker(plan.config, plan.stream, 1, 0)
    made.training.step = plan.stream.schedule.total_steps
    return made, plan


def test_a_trainings_last_evaluation_says_what_evaluate_says_of_its_student(
    worker: tuple[Worker, driver.Plan], tmp_path: Path
) -> None:
    made, plan = worker
    write_checkpoint(tmp_path, made.training, plan.config, _result(made, plan))
    again = evaluate(str(tmp_path / "student"), plan.config.data.val, workers=0)
    assert made.details is not None
    assert made.details.plain is not None
    assert made.details.plain.rule == "the best class of each of 8 queries"
    assert again.metrics == pytest.approx(made.details.metrics, abs=1e-6)
    assert [(one.id, one.objects) for one in again.classes] == [(one.id, one.objects) for one in made.details.classes]
    assert again.plain is not None
    assert again.plain.metrics == pytest.approx(made.details.plain.metrics, abs=1e-6)
    assert (made.details.images, sum(one.objects for one in again.classes)) == (8, plan.val.num_objects)


def test_a_student_keeps_the_datasets_category_ids_and_plain_transformers_loads_it(
    worker: tuple[Worker, driver.Plan], tmp_path: Path
) -> None:
    made, plan = worker
    write_checkpoint(tmp_path, made.training, plan.config, _result(made, plan))
    ids = [category.id for category in plan.train.categories]
    assert ids != list(range(len(ids)))  # not what slots are called
    assert json.loads((tmp_path / "student/config.json").read_text())["dataset_category_ids"] == ids
    assert AutoConfig.from_pretrained(tmp_path / "student").dataset_category_ids == ids
    AutoModelForObjectDetection.from_pretrained(tmp_path / "student")
    loaded = load_detector(tmp_path / "student")
    assert loaded.category_ids == tuple(ids)
    save_detector(loaded, tmp_path / "again", ResizeConfig(size=64))
    assert load_detector(tmp_path / "again").category_ids == tuple(ids)


def _result(made: Worker, plan: driver.Plan) -> Any:
    return made.evaluate(iter([share for share in local_stream(plan.stream) if share.subset == "val"]))


def test_category_ids_that_can_not_be_are_refused_by_name(tmp_path: Path) -> None:
    save_detector(silent_student(recipe().student, LABELS, 1), tmp_path / "model", ResizeConfig(size=64))
    assert load_detector(tmp_path / "model").category_ids is None
    file = tmp_path / "model/config.json"
    for ids in ([1, 2], [1, 2, 2], [1, 2, "3"], {"0": 1}, [1, 2, 2**70], "1"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"dataset_category_ids": ids}))
        with pytest.raises(QskdError, match="dataset_category_ids") as told:
            read_config(tmp_path / "model")
        assert "each of the 3 classes" in told.value.expected


def test_a_student_of_other_classes_does_not_keep_the_ids_of_those_it_began_from(tmp_path: Path) -> None:
    made = silent_student(recipe().student, LABELS, 1)
    made.category_ids = (7, 8, 9)
    save_detector(made, tmp_path / "model", ResizeConfig(size=64))
    other = recipe({"init": str(tmp_path / "model")}).student
    assert silent_student(other, ("cat", "horse"), 1).category_ids is None
    assert silent_student(other, LABELS, 1).category_ids == (7, 8, 9)


def test_an_evaluation_is_kept_and_replaces_nothing_but_one(said: Evaluation, tmp_path: Path) -> None:
    for _ in range(2):
        assert keep(said, tmp_path / "kept") == [EVALUATION, TABLE, *PICTURES]
    assert Evaluation.from_json((tmp_path / "kept" / EVALUATION).read_bytes(), "") == said
    rows = list(csv.DictReader((tmp_path / "kept" / TABLE).open()))
    assert [int(row["category_id"]) for row in rows] == [one.id for one in said.classes]
    assert rows[-1]["AP"] == ""  # no object: no number
    shared = [float(row["shared_recall"]) for row in rows if row["shared_recall"]]
    assert shared == [one.shared_recall for one in said.classes if one.objects]
    for name in PICTURES:
        assert np.asarray(Image.open(tmp_path / "kept" / name)).std() > 10
    for name in (EVALUATION, TABLE, *PICTURES):
        (tmp_path / name[:-4]).mkdir()
        (tmp_path / name[:-4] / name).write_bytes(NOTES)
        refused(lambda name=name: check_kept(tmp_path / name[:-4]), "is there already", tmp_path)  # type: ignore[misc]
        refused(lambda name=name: keep(said, tmp_path / name[:-4]), "is there already", tmp_path)  # type: ignore[misc]


def test_no_picture_of_an_earlier_evaluation_stays_beside_another(said: Evaluation, tmp_path: Path) -> None:
    """Of a detector that finds nothing there are no thresholds and no confusions."""
    keep(said, tmp_path)
    (tmp_path / "mine.png").write_bytes(NOTES)
    nothing = replace(said, best=None, thresholds=None, confusions=())
    assert keep(nothing, tmp_path) == [EVALUATION, TABLE, "precision_recall.png"]
    assert {file.name for file in tmp_path.iterdir()} == {EVALUATION, TABLE, "precision_recall.png", "mine.png"}


def test_a_restart_and_an_export_know_every_file_that_an_evaluation_leaves(said: Evaluation) -> None:
    files = (EVALUATION, TABLE, *pictures_of(said))
    assert [name for name in files if not OWN.fullmatch(f"evaluation/{name}")] == []
    beside_the_card = [picture_name(name) for name in pictures_of(said)]
    assert [name for name in beside_the_card if not STUDENT_FILE.fullmatch(name)] == []
    assert set(beside_the_card) == set(card_evaluation.PICTURES)


def test_the_matrix_tells_the_most_mistaken_classes_apart_and_loses_no_object(said: Evaluation) -> None:
    names, counts = matrix_of(said)
    assert names == [one.name for one in sorted(said.classes, key=lambda one: one.id)]
    objects = {one.name: one.objects for one in said.classes}
    assert counts[:-1].sum(1).tolist() == [objects[name] for name in names]
    assert counts.sum() == sum(pair.count for pair in said.confusions)
    few, merged = matrix_of(said, most=2)
    assert few[-1] == "2 other classes"
    assert merged.sum() == counts.sum()
    assert merged[-1, -1] == 0  # what is not there is not missed
    assert set(pictures_of(said)) == set(PICTURES)
    nothing = evaluate_in_detail(tricky(0)[0], Detections.empty())
    assert set(pictures_of(nothing)) == {"precision_recall.png"}


def with_classes(said: Evaluation, count: int, name: str = "class {}") -> Evaluation:
    """The same numbers of that many classes, the worst first, the later the more objects."""
    first = said.classes[0]
    classes = [replace(first, id=n, name=name.format(n), ap=n / count, objects=10 + n) for n in range(count - 1)]
    empty = replace(first, id=count, name="empty", objects=0, ap=None, ap50=None, best=None)
    pairs = (Confusion(0, 0, 5), Confusion(0, 1, 3), Confusion(0, None, 2))
    return replace(said, classes=(*classes, empty), confusions=pairs)


@pytest.mark.parametrize("count", [80, 1203])
def test_of_many_classes_the_picture_has_the_worst_and_the_most_frequent_and_keeps_its_size(
    said: Evaluation, count: int
) -> None:
    many = with_classes(said, count)
    worst, frequent = shown_classes(many)
    assert [one.id for one in worst] == list(range(20))
    assert [one.id for one in frequent] == list(range(count - 21, count - 1))
    assert classes_picture(many).shape[0] < 1300
    few, none = shown_classes(with_classes(said, 41))
    assert (len(few), none) == (40, [])  # the class without objects is left out


def test_a_class_whose_name_looks_like_a_formula_is_drawn_as_it_is(said: Evaluation) -> None:
    pictures = pictures_of(with_classes(said, 4, "$\\frac{{$ {}"))  # matplotlib's parser refuses it
    assert {"classes.png", "confusion.png"} <= set(pictures)


def test_of_many_classes_the_card_shows_the_worst_and_folds_the_others(said: Evaluation) -> None:
    text = render(replace(CARD, evaluation=with_classes(said, 1203)))
    shown, folded = text.split("<details><summary>")
    assert folded.startswith("the other 1163 of 1203 classes")
    assert len(re.findall(r"\| class \d+ \|", shown)) == 40
    assert len(re.findall(r"\| (class \d+|empty) \|", folded.split("</details>")[0])) == 1163
    assert "<details>" not in render(replace(CARD, evaluation=said))


def test_what_evaluate_prints_has_each_class_and_no_number_where_there_is_none(said: Evaluation) -> None:
    table = class_table(said)
    cells = {str(name): str(ap) for name, ap in zip(table.columns[0].cells, table.columns[4].cells, strict=True)}
    assert list(cells) == [one.name for one in said.classes]
    assert cells["no objects"] == "–"
    assert said.best is not None
    assert f"score {said.best.score:.3f}" in remarks(said)[0]
    assert "-1" not in metrics_line(said)
    fewer = replace(said, plain=Plain("the 9 best pairs", {**said.metrics, "AP": said.metrics["AP"] - 0.0123}))
    assert "the 9 best pairs: AP" in plain_line(fewer)
    assert "(-1.23 points)" in plain_line(fewer)
    many = replace(said, classes=said.classes * 10)
    assert class_table(many).row_count == 30
    assert "10 more" in str(class_table(many).caption)
    assert class_table(many, everything=True).row_count == 40


def test_the_card_has_the_classes_the_threshold_and_the_pictures_beside_it(said: Evaluation, tmp_path: Path) -> None:
    odd = replace(said.classes[0], name="a|b <img src=x> \n c")
    kept = replace(
        said, classes=(odd, *said.classes[1:]), plain=Plain("the 9 best pairs", said.metrics)
    ).without_curves()
    (tmp_path / "card-confusion.png").write_bytes(b"a picture")
    write_card(tmp_path, replace(CARD, evaluation=kept))
    text = (tmp_path / "README.md").read_text()
    section = text[text.index("## Classes") : text.index("## ONNX")]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(said.classes)
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}
    assert "<img" not in section
    assert "no objects" in rows[-1]
    assert "the 9 best pairs" in section
    assert "card-confusion.png" in section
    assert "card-thresholds.png" not in section  # which is not there
    assert read_card(tmp_path) == replace(CARD, evaluation=kept)
    assert "## Classes" not in render(CARD)
    # What others wrote into qskd.json may lack anything.
    strange = replace(kept, metrics={}, classes=(), plain=Plain("x\n# y", {}), confusions=(Confusion(404, 405, 3),))
    assert "# y" not in render(replace(CARD, evaluation=strange)).splitlines()


def test_evaluate_prints_the_table_and_keeps_it(tiny_folders: Path, tmp_path: Path) -> None:
    manifest = json.loads((tiny_folders / "val/manifest.json").read_text())
    names = [category["name"] for category in manifest["categories"]]
    made = silent_student(recipe({"family": "detr"}).student, names, 1)
    save_detector(made, tmp_path / "model", ResizeConfig(size=64))
    command = ["evaluate", str(tmp_path / "model"), str(tiny_folders / "val"), "--workers", "0"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert result.exception is None, result.output
    for part in (*names, "Classes, the worst first", "best threshold", "post-processing", "AP50"):
        assert part in result.output, part
    assert (tmp_path / "out" / EVALUATION).is_file()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / TABLE).write_bytes(NOTES)
    refused_early = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "theirs")])
    assert "is there already" in str(refused_early.exception)
