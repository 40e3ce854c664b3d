"""An AP that could not be measured is said to be so: wherever scores are shown, there is no -1."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.demo.quickstart import TEACHER, Row, show
from pipelines.inspection.actors import DetectorActor, Job
from pipelines.inspection.evaluate import evaluate
from pipelines.inspection.tables import class_table
from pipelines.prepare import prepare
from pipelines.reporting.report import log_curves
from pipelines.reporting.watch import progress_line
from pipelines.training.driver import RunResult
from pipelines.tuning.report.report import PICTURES, why_none
from pipelines.tuning.report.results import SweepSummary
from pipelines.tuning.report.tables import html_table, terminal_table, trials_csv
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.deploy.model_card import Card, Figures, render
from qskd.detectors import read_preprocessing
from qskd.evaluation.average_precision import METRICS
from qskd.evaluation.details import Evaluation, Plain, evaluate_in_detail
from qskd.evaluation.detections import Detections
from qskd.evaluation.shown import score_text, scores_text
from qskd.from_recipe import ground_truth

NOTHING = dict.fromkeys(METRICS, -1.0)
SMALL_ONLY = NOTHING | {"AP": 0.25, "AP50": 0.5, "AP75": 0.2, "APs": 0.25}
MINUS_ONE = re.compile(r"-1(\.0*)?(?![\d.])|-100\.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """some, none: shards of the same four images, with their objects and without."""
    root = tmp_path_factory.mktemp("unmeasured")
    annotations, images = make_shapes(ShapesConfig(images=4), root / "coco")
    prepare(annotations, images, str(root / "some"), quiet=True)
    (root / "none.json").write_text(json.dumps(json.loads(annotations.read_text()) | {"annotations": []}))
    prepare(root / "none.json", images, str(root / "none"), quiet=True)
    return root


@pytest.mark.parametrize(
    ("score", "text"), [(-1.0, "not measured"), (float("nan"), "not measured"), (None, "not measured"), (0.0, "0.000")]
)
def test_a_score_is_a_number_or_said_not_to_be_measured(score: float | None, text: str) -> None:
    assert score_text(score) == text


@pytest.mark.parametrize("split", ["some", "none"])
def test_evaluate_says_what_could_not_be_measured(split: str, data: Path) -> None:
    words = ["evaluate", str(TEACHER), str(data / split), "--workers", "0", "--per-class"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    assert "not measured" in said.stdout  # no object of four is large
    assert not MINUS_ONE.search(said.stdout)
    assert ("AP not measured" in said.stdout) == (split == "none")


def test_evaluate_keeps_and_counts_as_many_detections_as_it_is_told(data: Path) -> None:
    preprocessing = read_preprocessing(TEACHER)
    for most in (11, 200):  # 30 queries of 8 classes are 240 pairs
        actor = DetectorActor(
            Job(str(TEACHER), str(data / "some"), preprocessing, {}, device="cpu", max_detections=most)
        )
        # Beside what transformers would keep, where that is fewer.
        assert (actor.detect(np.arange(4))["choice"] == 0).sum() == 4 * most
    many = evaluate(str(TEACHER), str(data / "some"), workers=0, max_detections=200)
    words = ["evaluate", str(TEACHER), str(data / "some"), "--workers", "0", "--max-detections", "200"]
    assert f"AR200 {many.metrics['AR100']:.4f}" in CliRunner().invoke(app, words).stdout


def test_progress_and_the_end_of_a_training_have_no_minus_one() -> None:
    line = progress_line("run", {"step": 5, "evaluation": NOTHING}, 10)
    assert line == "run  step  5/10  AP not measured  AP50 not measured"
    assert scores_text(SMALL_ONLY, ("AP", "APl")) == "AP 0.250  APl not measured"


@pytest.mark.parametrize("metrics", [NOTHING, SMALL_ONLY], ids=["nothing", "small"])
def test_a_model_card_has_no_minus_one(metrics: dict[str, float]) -> None:
    rows = (Figures("teacher", metrics), Figures("no teacher", metrics), Figures("this model", metrics))
    text = render(Card("small", "detr", 3, rows, "distill", recipe="name: small"))
    assert not MINUS_ONE.search(text), text
    assert "| this model | not measured | not measured" in text or metrics is SMALL_ONLY
    assert ("value: 0.25" in text) == (metrics is SMALL_ONLY)  # of the front matter, which the Hub reads


def test_the_quickstarts_table_has_no_minus_one() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show([Row("teacher", NOTHING, 1.0, 1.0, 1.0)], console)
    said = console.export_text()
    assert said.count("not measured") == 3
    assert not MINUS_ONE.search(said)


def test_a_sweeps_tables_and_pictures_have_no_minus_one(tmp_path: Path) -> None:
    rows = [
        TrialRow(0, "finished", curve=((1.0, 0.2), (2.0, 0.25)), metrics=SMALL_ONLY, parameters_m=1.0),
        TrialRow(1, "finished", curve=((1.0, -1.0),), metrics=NOTHING),
        TrialRow(2, "failed", curve=((1.0, -1.0),), metrics=NOTHING, reason="lost"),
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal_table(rows, "qskd distill best.yaml", Config()))
    for text in (console.export_text(), html_table(rows, Config()), trials_csv(rows, Config())):
        assert not MINUS_ONE.search(text), text
    sweep, seen = SweepSummary(tuple(rows), Config()), 0
    for name, picture in PICTURES.items():
        if not why_none(sweep, name):
            picture.draw(sweep, picture.title, tmp_path / f"{name}.png")
            for trace in picture.plot(sweep).data:
                seen += 1
                assert all(y is None or y >= 0 for y in trace.y if not isinstance(y, str)), name
                assert not MINUS_ONE.search(str(trace.text)), name
    assert seen


def test_curves_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    class Kept:
        """Takes what a tracker is given."""

        def __init__(self) -> None:
            self.pictures: list[str] = []

        def picture(self, name: str, path: Path) -> None:
            self.pictures.append(name)

        def series(self, metric: str) -> list[tuple[int, float]]:
            return []

    def drawn(*evaluations: dict[str, float]) -> list[str]:
        history: list[dict[str, Any]] = [{"step": n, "evaluation": found} for n, found in enumerate(evaluations)]
        kept = Kept()
        log_curves(history, kept, tmp_path)  # type: ignore[arg-type]
        return kept.pictures

    assert drawn(NOTHING, NOTHING) == []
    assert drawn(NOTHING, SMALL_ONLY) == ["pictures/ap.png"]


def test_an_evaluations_file_and_the_values_of_functions_have_no_minus_one(data: Path) -> None:
    found = evaluate_in_detail(ground_truth(str(data / "some")), Detections.empty())
    found = replace(found, metrics={**NOTHING, "AP": 0.25}, plain=Plain("the 9 best pairs", dict(NOTHING)))
    text = found.to_json()
    assert not MINUS_ONE.search(text)
    assert json.loads(text)["metrics"]["AP50"] is None
    assert Evaluation.from_json(text, "x") == found
    assert found.ap == 0.25
    assert replace(found, metrics=NOTHING).ap is None
    assert RunResult("f", "s", NOTHING, "r", 1.0).ap is None


@pytest.mark.parametrize("width", [40, 50, 70, 120])
def test_a_class_table_fits_its_terminal_and_keeps_class_and_ap(data: Path, width: int) -> None:
    found = evaluate_in_detail(ground_truth(str(data / "some")), Detections.empty())
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(class_table(found, width=width))
    lines = console.export_text().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "class" in lines[2]
    assert " AP " in lines[2]
    assert ("at score" in lines[2]) == (width >= 120)
    assert any("0.000" in line for line in lines[4:])
