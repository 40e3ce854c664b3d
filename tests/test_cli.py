"""The command line: what is printed before anything runs, and how errors are told."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from pyarrow.fs import LocalFileSystem
from typer.testing import CliRunner

from pipelines.cli import app, main
from pipelines.demo.quickstart import BACKBONE, RECIPE, TEACHER, recipe
from pipelines.demo.quickstart import VERBS as STUDENTS
from pipelines.prepare import prepare
from qskd.config.recipe import load
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.errors import told_without_traceback
from qskd.storage.files import publish_bytes
from qskd.storage.places import open_folder
from qskd.storage.stores import patiently

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


def test_every_option_of_every_verb_is_on_a_page() -> None:
    root = Path(__file__).parents[1]
    pages = [page.read_text() for page in (root / "README.md", *(root / "docs").rglob("*.md"))]
    told = {option for page in pages for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", page)}
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(VERBS) < set(commands)
    untold = {
        (verb, parameter.opts[0])
        for verb, command in commands.items()
        for parameter in command.params
        if parameter.param_type_name == "option" and told.isdisjoint([*parameter.opts, *parameter.secondary_opts])
    }
    assert untold == set()


def test_help_says_that_a_space_from_a_file_is_code() -> None:
    result = CliRunner().invoke(app, ["tune", "--help"], env={"COLUMNS": "200"})
    assert "whose code is run" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("shapes",)])
def test_every_verb_is_a_module_of_its_own(verb: str) -> None:
    name = "cache_teacher" if verb == "cache" else verb
    module = Path(__file__).parents[1] / "pipelines" / f"{name}.py"
    assert "__main__" in module.read_text()


def test_dry_run_prints_the_resolved_recipe_and_the_plan_and_starts_nothing(shards: Path, tmp_path: Path) -> None:
    fields = (
        f"data.train={shards}",
        f"data.val={shards}",
        "training.epochs=3",
        "student.size=nano",
        "student.resize.size=64",
    )
    overrides = [word for field in fields for word in ("--set", field)]
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
        (["prepare", "s3://b/a.json", "images", "out"], ["s3://b/a.json: a URI", "aws s3 sync"]),
        (["prepare", "a.json", "s3://b/i", "out", "--dry-run"], ["s3://b/i: a URI", "a path on a local disk"]),
        (
            ["prepare", "a.json", "i", "out", "--accept", "same-pictures"],
            ["--accept same-pictures: has no effect without"],
        ),
        (["cache", "--verify", "4", "--verify-derived", "4"], ["--verify and --verify-derived: each asks"]),
        (["cache", "--verify", "4", "--overwrite"], ["--verify and --overwrite: each asks"]),
        (["cache", "--dry-run", "--overwrite"], ["teacher.cache.path: empty"]),
        (["predict", "nowhere/model", "image.jpg"], ["nowhere/model"]),
        (["predict", "model", "a.jpg", "--out", "s3://b/a.png"], ["s3://b/a.png: a URI", "aws s3 sync"]),
        (["export", "model", "--out", "s3://b/out"], ["s3://b/out: a URI"]),
        (["explain", "r.yaml", "a.jpg", "--annotations", "s3://b/a.json"], ["s3://b/a.json: a URI"]),
        (
            ["evaluate", "model", "shards", "--set", "data.val=x"],
            ["--set data.val=x: data.val has no effect", "teacher.resize and teacher.class_map"],
        ),
        (["evaluate", "model", "shards", "--set", "compute.workers=2"], ["compute.workers has no effect"]),
        (["evaluate", "model", "shards", "--set", "teacher.rezise.size=2"], ["unknown field", "did you mean resize"]),
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


@pytest.mark.parametrize(
    "arguments",
    [
        *([verb, "RECIPE", "--dry-run"] for verb in ("cache", "train", "distill", "tune")),
        ["evaluate", "model", "shards", "--recipe", "RECIPE"],
        ["explain", "RECIPE", "image.jpg"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_verb_reads_a_recipe_from_a_uri_and_names_it_as_it_was_given(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fsspec")
    uri = "memory://runs/sweep/best.yaml"
    publish_bytes(b"training: {epoch: 3}", *open_folder(uri))
    code, stderr = run(capsys, *(uri if word == "RECIPE" else word for word in arguments))
    assert code == 1
    assert stderr.startswith(f"error: {uri}: unknown field training.epoch (did you mean epochs?)")


def test_a_recipe_from_a_uri_is_the_local_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fsspec")
    publish_bytes(RECIPE.read_bytes(), *open_folder("memory://runs/quickstart.yaml"))
    assert load("memory://runs/quickstart.yaml", ["seed=5"]) == load(RECIPE, ["seed=5"])
    code, stderr = run(capsys, "train", "memory://runs/none.yaml")
    assert (code, stderr.splitlines()[0]) == (1, "error: memory://runs/none.yaml: no such recipe")


def test_a_verb_s_module_is_the_command_in_a_process_of_its_own_too(tmp_path: Path) -> None:
    """`prepare` is the verb that imports no torch."""
    command = [sys.executable, "-m", "pipelines.prepare", "/nowhere.json", "/nowhere", str(tmp_path / "shards")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "/nowhere.json: can't be read" in result.stderr


@pytest.mark.parametrize("verb", ["cache", "distill", "tune"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_teacher_left_out_is_asked_for_by_its_field(
    verb: str, dry: list[str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [f"data.train={shards}", f"data.val={shards}", f"output={tmp_path}"]
    fields += [f"teacher.cache.path={tmp_path}/cache"] if verb == "cache" else []
    spaces = ["--space", "loss_weights"] if verb == "tune" else []
    code, stderr = run(capsys, verb, *dry, *spaces, *(part for field in fields for part in ("--set", field)))
    assert code == 1
    assert stderr.startswith("error: teacher.path: empty\n  expected: a Hub name or folder of a detector\n")
    assert "--set teacher.path=" in stderr


def test_prepare_prints_the_map_from_category_ids_to_classes(tmp_path: Path) -> None:
    annotations, images = make_shapes(ShapesConfig(images=3), tmp_path / "coco")
    result = CliRunner().invoke(app, ["prepare", str(annotations), str(images), str(tmp_path / "shards")])
    assert result.exit_code == 0, result.output
    assert "5→3 star" in result.output  # ids have a gap: 1, 2, 3, 5
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["num_images"] == 3


@pytest.mark.parametrize(
    ("dry", "more"), [([], []), (["--dry-run"], []), (["--dry-run"], ["teacher.cache.path=nowhere"])]
)
def test_a_teacher_whose_classes_do_not_fit_is_refused_with_both_vocabularies(
    dry: list[str], more: list[str], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads((shards.parent / "coco" / "annotations.json").read_text())
    for category in document["categories"]:
        category["name"] = f"thing {category['id']}"
    renamed = tmp_path / "renamed.json"
    renamed.write_text(json.dumps(document))
    prepare(renamed, shards.parent / "coco" / "images", str(tmp_path / "shards"), quiet=True)
    data = [f"data.{split}={tmp_path}/shards" for split in ("train", "val")]
    fields = (*data, f"teacher.path={TEACHER}", f"output={tmp_path}/runs", *more)
    code, stderr = run(capsys, "distill", *dry, *(part for field in fields for part in ("--set", field)))
    assert code == 1
    assert "thing 1" in stderr
    assert "circle" in stderr
    assert "teacher.class_map" in stderr


def test_a_missing_cache_is_told_by_a_dry_run_with_the_rest_of_the_plan_and_refused_by_a_run(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [f"data.train={shards}", f"data.val={shards}", f"teacher.path={TEACHER}", f"output={tmp_path}"]
    fields += [f"teacher.cache.path={tmp_path}/cache", f"student.backbone.init={BACKBONE}", "card.data=two words"]
    words = [str(RECIPE), *(part for field in fields for part in ("--set", field))]
    planned = CliRunner().invoke(app, ["distill", *words, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert f"its outputs from {tmp_path}/cache, where no cache is yet" in planned.output
    assert f"To be made first: {shlex.join(['qskd', 'cache', *words])}" in planned.output
    assert "student.inherit: " in planned.output
    assert not list(tmp_path.iterdir())
    code, stderr = run(capsys, "distill", *words)
    assert code == 1
    assert stderr.startswith(f"error: {tmp_path}/cache: no cache of teacher outputs")


def test_an_evaluation_reads_the_fields_that_count_and_its_recipe_may_hold_others(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole.yaml").write_text("training: {epochs: 7}\nteacher: {class_map: {nothing: nothing}}\n")
    command = ["evaluate", str(TEACHER), str(shards), "--workers", "0", "--recipe", str(tmp_path / "whole.yaml")]
    code, stderr = run(capsys, *command)
    assert (code, "nothing" in stderr) == (1, True)  # the file's class map counts
    mended = [*command, "--set", "teacher.class_map={}", "--set", "teacher.resize.size=48"]
    if not torch.cuda.is_available():
        code, stderr = run(capsys, *mended, "--set", "compute.device=cuda")
        assert (code, stderr.splitlines()[0]) == (1, "error: compute.device: cuda, and there is no GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # moving to it would fail
    result = CliRunner().invoke(app, [*mended, "--set", "compute.device=cpu"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("AP ")


@pytest.mark.parametrize("field", ["teacher.path", "student.init", "student.backbone.init"])
@pytest.mark.parametrize("verb", ["distill", "cache", "tune"])
def test_a_checkpoint_at_a_uri_is_refused_by_its_field(
    verb: str, field: str, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [f"data.train={shards}", f"data.val={shards}", f"teacher.path={TEACHER}", f"{field}=s3://b/teacher"]
    code, stderr = run(capsys, verb, *(part for each in fields for part in ("--set", each)))
    assert code == 1
    assert stderr.startswith(f"error: {field}: s3://b/teacher, a URI\n  expected: a local folder or a Hub name\n")
    assert "aws s3 sync" in stderr


def test_the_quickstarts_two_students_differ_in_nothing_but_the_teacher(tmp_path: Path) -> None:
    taught, untaught = (recipe(tmp_path, name).model_dump() for name in ("qskd", "baseline"))
    assert set(STUDENTS) == {"qskd", "baseline"}
    differing = {key for key in taught if taught[key] != untaught[key]}
    assert differing == {"name", "distillation", "student"}
    assert {key for key, value in taught["student"].items() if untaught["student"][key] != value} == {"inherit"}
    assert untaught["distillation"]["method"] == "none"


@pytest.mark.parametrize("name", ["a #1", "a: b", "[x] {y}", "'a'", "ünï 🙂", "a%20b"])
def test_the_quickstart_takes_a_folder_whatever_its_name(name: str, tmp_path: Path) -> None:
    config = recipe(tmp_path / name, "qskd")
    assert (config.output, config.data.train) == (f"{tmp_path}/{name}", f"{tmp_path}/{name}/data/train")


def test_the_quickstarts_recipe_names_the_fields_that_distill_needs_with_it(shards: Path, tmp_path: Path) -> None:
    head = "".join(line for line in RECIPE.read_text().splitlines() if line.startswith("#"))
    fields = dict.fromkeys(re.findall(r"--set ([\w.]+)=\.\.\.", head), str(shards))
    assert "teacher.path" in fields
    words = [
        part
        for name, value in (fields | {"teacher.path": str(TEACHER)}).items()
        for part in ("--set", f"{name}={value}")
    ]
    result = CliRunner().invoke(app, ["distill", str(RECIPE), *words, "--set", f"output={tmp_path}", "--dry-run"])
    assert result.exit_code == 0, result.exception


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


def test_the_quickstart_runs_without_a_word_as_the_readme_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default is read as what is typed is."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["quickstart", "--dry-run"])
    assert result.exit_code == 0, result.exception
    assert str(tmp_path / "runs/quickstart/data") in result.output.replace("\n", "")
    assert list(tmp_path.iterdir()) == []
