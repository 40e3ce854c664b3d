"""The command line: what is printed before anything runs, and how errors are told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from pyarrow.fs import LocalFileSystem
from typer.testing import CliRunner

from pipelines.cli import app, main
from pipelines.prepare import prepare
from pipelines.quickstart import BACKBONE, KINDS, RECIPE, TEACHER, recipe
from qskd.errors import told_without_traceback
from qskd.recipe import load
from qskd.shapes import ShapesConfig, make_shapes
from qskd.stores import patiently

VERBS = (
    *("prepare", "cache", "train", "distill", "tune", "evaluate", "predict", "explain", "export", "benchmark"),
    *("doctor", "shapes", "quickstart"),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    annotations, images = make_shapes(ShapesConfig(images=20), root / "coco")
    prepare(annotations, images, str(root / "shards"), quiet=True)
    return root / "shards"


class Said(NamedTuple):
    code: object
    stderr: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Said:
    """What the `qskd` command says and exits with, in this process: its imports take seconds."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return Said(caught.value.code, capsys.readouterr().err)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("shapes",)])
def test_every_verb_is_a_module_of_its_own(verb: str) -> None:
    name = "cache_teacher" if verb == "cache" else verb
    module = Path(__file__).parents[1] / "pipelines" / f"{name}.py"
    assert "__main__" in module.read_text()


def test_dry_run_prints_the_resolved_recipe_and_the_plan_and_starts_nothing(shards: Path, tmp_path: Path) -> None:
    overrides = ["--set", f"data.train={shards}", "--set", f"data.val={shards}", "--set", "training.epochs=3"]
    result = CliRunner().invoke(app, ["train", "--dry-run", "--set", f"output={tmp_path}", *overrides])
    assert result.exit_code == 0, result.output
    assert "epochs: 3" in result.output
    assert "3 steps = 3 epochs of 1 batches of 16" in result.output
    assert "method: none" in result.output  # `train` has no teacher, whatever the recipe says
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["distill"], ["data.train: empty", "qskd prepare"]),
        (["train", "--set", "training.epoch=3"], ["unknown field training.epoch", "did you mean epochs"]),
        (["distill", "nowhere.yaml"], ["nowhere.yaml: no such recipe"]),
        (["prepare", "none.json", "images", "out"], ["none.json"]),
        (["predict", "nowhere/model", "image.jpg"], ["nowhere/model"]),
        (["explain", "nowhere.yaml", "image.jpg"], ["nowhere.yaml: no such recipe"]),
    ],
)
def test_errors_are_told_without_a_traceback(
    arguments: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, stderr = run(capsys, *arguments)
    assert code == 1
    assert "Traceback" not in stderr
    assert all(part in stderr for part in said), stderr


def test_a_verb_s_module_is_the_command_in_a_process_of_its_own_too(tmp_path: Path) -> None:
    """`prepare` is the verb that imports no torch."""
    command = [sys.executable, "-m", "pipelines.prepare", "/nowhere.json", "/nowhere", str(tmp_path / "shards")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "/nowhere.json: can't be read" in result.stderr


def test_prepare_prints_the_map_from_category_ids_to_classes(tmp_path: Path) -> None:
    annotations, images = make_shapes(ShapesConfig(images=3), tmp_path / "coco")
    result = CliRunner().invoke(app, ["prepare", str(annotations), str(images), str(tmp_path / "shards")])
    assert result.exit_code == 0, result.output
    assert "5→3 star" in result.output  # ids have a gap: 1, 2, 3, 5
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["num_images"] == 3


def test_a_teacher_whose_classes_do_not_fit_is_refused_with_both_vocabularies(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((shards.parent / "coco" / "annotations.json").read_text())
    for category in document["categories"]:
        category["name"] = f"thing {category['id']}"
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps(document))
    prepare(renamed, shards.parent / "coco" / "images", str(tmp_path / "shards"), quiet=True)
    data = [f"data.{split}={tmp_path}/shards" for split in ("train", "val")]
    overrides = [
        part for item in (*data, f"teacher.path={TEACHER}", f"output={tmp_path}/runs") for part in ("--set", item)
    ]
    code, stderr = run(capsys, "distill", *overrides)
    assert code == 1
    assert "thing 1" in stderr
    assert "circle" in stderr
    assert "teacher.class_map" in stderr


def test_the_quickstarts_two_students_differ_in_nothing_but_the_teacher(tmp_path: Path) -> None:
    taught, untaught = (recipe(tmp_path, name).model_dump() for name in ("qskd", "baseline"))
    assert set(KINDS) == {"qskd", "baseline"}
    differing = {key for key in taught if taught[key] != untaught[key]}
    assert differing == {"name", "distillation", "student"}
    assert {key for key, value in taught["student"].items() if untaught["student"][key] != value} == {"inherit"}
    assert untaught["distillation"]["method"] == "none"


def test_the_quickstarts_assets_are_small_and_whole() -> None:
    assert (TEACHER / "model.safetensors").stat().st_size < 4 * 2**20
    assert (BACKBONE / "model.safetensors").stat().st_size < 2**18
    assert load(RECIPE).distillation.method == "qskd"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full")
@pytest.mark.parametrize("by", ["pyarrow", "python"])
def test_a_full_disk_is_told_with_the_name_of_the_file(by: str, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        if by == "pyarrow":
            with LocalFileSystem().open_output_stream("/dev/full") as stream:
                stream.write(b"x")
        else:
            Path("/dev/full").write_bytes(b"x")

    with pytest.raises(SystemExit) as caught, told_without_traceback():
        patiently("runs/mine/history.json", LocalFileSystem(), write)
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: runs/mine/history.json: No space left on device")
    assert "the same command goes on" in said
