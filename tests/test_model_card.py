"""Model cards: front matter the Hub can read, every fact that is known, and a plain word where there is none."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from pipelines.demo.quickstart import TEACHER
from pipelines.deployment.export import ExportOptions, export
from pipelines.prepare import prepare
from pipelines.reporting.cards import baseline_metrics, card_of_run, complete, recipe_of
from qskd.config import Config, ResizeConfig, TrackingConfig
from qskd.config.recipe import build, changes, load
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.deploy.model_card import Card, Figures, OnnxFacts, front_matter, is_hub_name, read_card, render, write_card
from qskd.detectors import load_detector, save_detector

torch.set_num_threads(1)

METRICS = {"AP": 0.3314, "AP50": 0.51, "AP75": 0.373, "APs": -1.0}
CARD = Card(
    name="small: a student",  # a colon, which YAML must be told of
    family="conditional_detr",
    classes=80,
    rows=(
        Figures(
            "teacher, `owner/large`", {"AP": 0.604, "AP50": 0.811, "AP75": 0.718}, 43_000_000, 91.5, 312.0, "800 x 1200"
        ),
        Figures("the same student, no teacher"),
        Figures("this model", METRICS, 1_230_000, 0.5, 12.34, "320 x 320"),
    ),
    kind="distill",
    recipe="name: small\n",
    data="COCO 2017",
    data_licence="CC BY 4.0 (annotations)",
    train_images=100,
    val_images=50,
    teacher="owner/large",
    teacher_licence="apache-2.0",
    licence="apache-2.0",
    timing="Latency: as timed.",
    onnx=OnnxFacts(None, 320, 11, 1e-5, 2e-6, 3e-7, "onnxruntime 5 ms/image."),
)


def table_row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    said: dict[str, Any] = metadata_load(tmp_path / "README.md") or {}
    assert said["library_name"] == "transformers"
    assert said["pipeline_tag"] == "object-detection"
    assert (said["license"], said["base_model"]) == ("apache-2.0", "owner/large")
    assert {"qskd", "knowledge-distillation", "conditional-detr"} <= set(said["tags"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "small: a student"
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == {"mAP": 0.3314, "mAP50": 0.51, "mAP75": 0.373}
    assert card.data.eval_results[0].dataset_name == "COCO 2017"


def test_every_fact_is_in_the_text() -> None:
    text = render(CARD)
    table = text[text.index("| | AP |") :].split("\n\n")[0].splitlines()
    assert len(table) == 2 + len(CARD.rows)
    assert {line.count("|") for line in table} == {9}  # a header for each cell
    assert table_row(text, "this model") == ["0.331", "0.510", "0.373", "1.23 M", "320 x 320", "0.5", "12.3"]
    assert table_row(text, "teacher, `owner/large`") == [
        "0.604",
        "0.811",
        "0.718",
        "43.00 M",
        "800 x 1200",
        "91.5",
        "312.0",
    ]
    assert table_row(text, "data") == ["COCO 2017, 100 training images", "CC BY 4.0 (annotations)"]
    for part in (
        "`qskd distill recipe.yaml`",
        "name: small",
        "arXiv:2409.06443",
        "is a reconstruction",
        "Latency: as timed.",
        "[any number, 3, 320, 320]",
        "class probabilities 2.0e-06, boxes 3.0e-07",
        "onnxruntime 5 ms/image.",
    ):
        assert part in text


def test_what_is_not_known_is_said_to_be_not_known() -> None:
    bare = Card("mine", "detr", 3, (Figures("this model"),))
    text = render(bare)
    nothing = [*["not measured"] * 4, "not stated", *["not measured"] * 2]
    assert table_row(text, "this model") == nothing
    assert table_row(text, "data") == ["not stated", "not stated"]
    assert "| this model | | not stated |" in text
    assert "Latency was not measured" in text
    assert "not known to qskd, which only exported it" in text
    assert "ONNX" not in text
    assert "QSKD" not in text  # whose method it was made with, no one knows
    said = yaml.safe_load(front_matter(bare).strip("-\n"))
    assert "license" not in said
    assert "model-index" not in said
    untaught = render(replace(CARD, kind="train"))
    assert "knowledge-distillation" not in front_matter(replace(CARD, kind="train"))
    assert "trained without a teacher" in untaught
    assert "| teacher |" not in untaught
    assert table_row(render(CARD), "the same student, no teacher") == nothing


@pytest.mark.parametrize(
    ("name", "hub"),
    [("owner/model", True), ("a/b/c", False), ("/a/b", False), ("./b", False), ("model", False), ("s3://a/b", False)],
)
def test_only_names_of_the_hub_are_given_as_base_model(name: str, hub: bool) -> None:
    assert is_hub_name(name) == hub
    assert ("base_model" in front_matter(replace(CARD, teacher=name))) == hub


def test_facts_survive_the_folder_and_leave_others_alone(tmp_path: Path) -> None:
    (tmp_path / "qskd.json").write_text('{"other": 1}')
    write_card(tmp_path, CARD)
    assert read_card(tmp_path) == CARD
    facts = json.loads((tmp_path / "qskd.json").read_text())
    assert facts["other"] == 1
    facts["card"]["of_a_later_qskd"] = 2
    (tmp_path / "qskd.json").write_text(json.dumps(facts))
    assert read_card(tmp_path) == CARD
    (tmp_path / "qskd.json").write_text("[]")
    assert read_card(tmp_path) is None
    assert read_card(tmp_path / "nowhere") is None


def test_the_recipe_told_is_the_shortest_that_builds_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    config = build(
        {
            "data": {"train": f"{tmp_path}/shards/train"},
            "training": {"epochs": 3},
            "teacher": {"resize": {"size": 64}, "class_map": {"cat": "feline"}},
            "distillation": {"selection": {"boundaries": [0.3, 0.6], "band_weights": [0, 0.5, 1]}},
        }
    )
    assert build(changes(config)) == config
    assert changes(Config()) == {}
    told = recipe_of(config.model_copy(update={"tracking": TrackingConfig(uri="http://user:secret@host")}))
    assert "secret" not in told
    assert str(tmp_path) not in told
    again = build(yaml.safe_load(told))
    assert again.data.train == "shards/train"
    assert again.training.epochs == 3
    assert "batch_size" not in told  # a default


@pytest.mark.parametrize(
    ("cwd", "home", "path", "told"),
    [
        ("/data", "/root", "/data/shards", "shards"),
        ("/data", "/root", "/mnt/data/shards", "/mnt/data/shards"),
        ("/data", "/root", "s3://bucket/data/shards", "s3://bucket/data/shards"),
        ("/data", "/root", "file:///data/shards", "file://shards"),
        ("/", "/", "s3://bucket/shards", "s3://bucket/shards"),
        ("/data", "/root", "/root/shards", "~/shards"),
    ],
)
def test_the_recipe_told_names_the_paths_that_there_are(
    cwd: str, home: str, path: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "cwd", lambda: Path(cwd))
    monkeypatch.setattr(Path, "home", lambda: Path(home))
    assert yaml.safe_load(recipe_of(load(None, [f"data.train={path}"]))) == {"data": {"train": told}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a finished run has: a student's folder, manifests, metrics; the quickstart's teacher plays both roles."""
    root = tmp_path_factory.mktemp("card")
    annotations, images = make_shapes(ShapesConfig(images=12), root / "coco")
    prepare(annotations, images, str(root / "shards"), quiet=True)
    save_detector(load_detector(TEACHER), root / "student", ResizeConfig(size=64))
    (root / "baseline").mkdir()
    (root / "baseline" / "result.json").write_text(json.dumps({"metrics": {"AP": 0.2}}))
    card = {"data": "shapes", "licence": "apache-2.0", "baseline": str(root / "baseline")}
    config = build(
        {
            "name": "tiny",
            "data": {"train": str(root / "shards"), "val": str(root / "shards")},
            "student": {"resize": {"size": 64}},
            "teacher": {"path": str(TEACHER)},
            "card": card,
        }
    )
    manifest = load_manifest(str(root / "shards"))
    return {"root": root, "config": config, "manifest": manifest}


def test_a_distilled_students_card_has_teacher_baseline_and_itself(finished: dict[str, Any]) -> None:
    root, config, manifest = finished["root"], finished["config"], finished["manifest"]
    card = card_of_run(config, "distill", manifest, manifest, root / "student", METRICS)
    teacher, baseline, own = card.rows
    assert (own.name, own.metrics) == ("this model", METRICS)
    assert own.parameters == teacher.parameters == sum(p.numel() for p in load_detector(TEACHER).parameters())
    assert teacher.metrics == {}  # the recipe does not ask for it
    assert baseline.metrics == {"AP": 0.2}
    assert own.ms is not None
    assert own.ms > 0
    assert (card.train_images, card.licence) == (12, "apache-2.0")
    text = render(card)
    assert table_row(text, "the same student, no teacher")[:2] == ["0.200", "not measured"]
    assert re.search(r"PyTorch on cpu, \d thread", text)
    write_card(root / "student", card)
    complete(root / "student", {"AP": 0.6}, {"AP": 0.4})
    later = read_card(root / "student")
    assert later is not None
    assert [row.metrics.get("AP") for row in later.rows] == [0.6, 0.4, 0.3314]
    untaught = card_of_run(config, "train", manifest, manifest, root / "student", METRICS)
    assert [row.name for row in untaught.rows] == ["this model"]


def test_an_export_keeps_the_facts_but_for_ap_at_another_size(finished: dict[str, Any], tmp_path: Path) -> None:
    student = finished["root"] / "student"
    write_card(student, CARD)
    same = export(str(student), tmp_path / "same", ExportOptions(onnx=False))
    assert read_card(same) == replace(CARD, onnx=None)
    other = read_card(export(str(student), tmp_path / "other", ExportOptions(onnx=False, size=96)))
    assert other is not None
    assert other.rows[:-1] == CARD.rows[:-1]
    assert (other.rows[-1].input, other.rows[-1].metrics) == ("96 x 96", {})
    unknown = read_card(export(str(TEACHER), tmp_path / "unknown", ExportOptions(onnx=False)))
    assert unknown is not None
    assert (unknown.name, unknown.kind, unknown.licence) == ("shapes_teacher", "", "")


def test_a_baseline_that_is_none_is_told_and_not_measured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert baseline_metrics(str(tmp_path / "nowhere")) == {}
    assert "is no finished run" in caplog.text
