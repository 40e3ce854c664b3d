"""Nothing of the user's is deleted or replaced: in each destructive path's way stands a stranger's file, and is found afterwards,
byte for byte. docs/deletes.md has a row for each path; the last test holds that. Runs are in test_deletes_runs.py."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from strangers import NOTES, ROOT, SHAPES, config, refused, strangers, tree
from typer.testing import CliRunner

from benchmarks import work_folder
from benchmarks.chaos import world
from benchmarks.dataset_costs import PerImage
from benchmarks.dataset_costs import main as dataset_costs
from pipelines.caching.plan import clean, make_cache_plan
from pipelines.cli import app
from pipelines.health.services import check_storage
from pipelines.inspection.explain import targets as explain_targets
from pipelines.inspection.predict import read_image, targets, write_picture
from pipelines.prepare import prepare
from pipelines.run.folder import Folder
from pipelines.run.ownership import claim, enclosing_run
from pipelines.training import driver as distill
from pipelines.tuning.report.report import write_report
from qskd.config import Config
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.detectors import load_detector, replacing
from qskd.errors import QskdError
from qskd.storage import scratch
from qskd.storage.ownership import is_own_picture
from qskd.storage.scratch import scratch_folder
from qskd.teacher.manifest import CacheManifest, CacheSizes, save_cache_manifest


# --- the cache ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("field", ["data.train", "data.val", "teacher.path", "output/name"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_cache_in_what_a_verb_reads_is_refused_by_name_in_every_verb(field: str, below: str, here: Path) -> None:
    (here / "train/below").mkdir()
    paths = {"output/name": here / "runs/run", "teacher.path": here / "model"}
    path = paths.get(field, here / field.rpartition(".")[2])
    at = config(here, f"teacher.path={here}/model", f"teacher.cache.path={path}{below}")
    for kind in ("cache", "distill", "train"):
        error = refused(lambda kind=kind: distill.resolve(at, kind), field, here)  # type: ignore[misc]
        assert "--overwrite" not in error.remedy
        assert "--restart" not in error.remedy


def test_a_cache_does_not_replace_another_manifest(here: Path) -> None:
    for text in ((here / "train/manifest.json").read_text(), '{"name": "a web extension"}', "", "[]"):
        (here / "there").mkdir(exist_ok=True)
        (here / "there/manifest.json").write_text(text)
        at = config(here, f"teacher.cache.path={here}/there")
        for overwrite in (False, True):
            error = refused(lambda a=at, o=overwrite: make_cache_plan(a, o), "manifest.json", here)  # type: ignore[misc]
            assert "--overwrite" not in error.remedy
        refused(lambda: clean(str(here / "there"), everything=True), "manifest.json", here)


def test_cleaning_a_cache_deletes_what_its_manifest_lists_and_nothing_else(tmp_path: Path) -> None:
    manifest = CacheManifest({}, CacheSizes(1, 3, 2, (4,)), 4, ("shard-0",), {0: ((1, 1),)})
    theirs = (
        "notes.txt",
        "other.view-000.parquet",
        "shard-0.view-001.parquet",
        "shard-0.parquet",
        ".writing-book/draft.md",
    )
    for name in (*theirs, "shard-0.view-000.parquet", ".writing-manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(NOTES)
    save_cache_manifest(str(tmp_path), manifest)
    clean(str(tmp_path), everything=True)
    assert tree(tmp_path) == dict.fromkeys(sorted(theirs), NOTES)


def test_a_cache_whose_manifest_is_damaged_can_be_made_again(here: Path) -> None:
    manifest = CacheManifest({}, CacheSizes(1, 3, 2, (4,)), 4, ("shard-0",), {0: ((1, 1),)})
    save_cache_manifest(str(here / "cache"), manifest)
    whole = (here / "cache/manifest.json").read_text()
    (here / "cache/manifest.json").write_text(whole[: len(whole) // 2])
    at = config(here, f"teacher.cache.path={here}/cache")
    error = refused(lambda: make_cache_plan(at), "not a manifest", here)
    assert "deletes this cache's own files" in error.remedy
    assert make_cache_plan(at, overwrite=True).existing is None


# --- shards -------------------------------------------------------------------------------------------------------------
def test_prepare_does_not_replace_another_manifest(here: Path) -> None:
    for text in ('{"name": "a web extension"}', "", '{"format": "qskd-teacher-cache"}'):
        (here / "there").mkdir(exist_ok=True)
        (here / "there/manifest.json").write_text(text)
        for overwrite in (False, True):
            run = lambda o=overwrite: prepare(  # noqa: E731
                here / "coco/annotations.json", here / "coco/images", str(here / "there"), overwrite=o, quiet=True
            )
            error = refused(run, "manifest.json", here)
            assert "--overwrite" not in error.remedy


def test_a_dry_run_of_prepare_refuses_what_prepare_would(here: Path) -> None:
    source, images = here / "coco/annotations.json", here / "coco/images"
    prepare(source, images, str(here / "there"), quiet=True)
    other = here / "coco/other.json"
    other.write_text(source.read_text() + " ")
    words = ["prepare", str(other), str(images), str(here / "there"), "--dry-run"]
    found = CliRunner().invoke(app, words).exception
    assert isinstance(found, QskdError)
    assert "already holds shards of annotations.json" in str(found)
    assert CliRunner().invoke(app, [*words, "--overwrite"]).exit_code == 0


def test_prepare_replaces_shards_and_nothing_that_lies_among_them(here: Path) -> None:
    manifest = json.loads((here / "train/manifest.json").read_text())
    own = {shard["file"] for shard in manifest["shards"]}
    (here / "train/table.parquet").write_bytes(NOTES)
    (here / "train/notes.txt").write_bytes(NOTES)
    manifest["shards"][0]["file"] = "table.parquet"  # edited: names are no part of the fingerprint
    (here / "train/manifest.json").write_text(json.dumps(manifest))
    annotations, images = make_shapes(ShapesConfig(images=2, first_image=50), here / "other")
    with pytest.raises(QskdError, match="already holds shards") as told:
        prepare(annotations, images, str(here / "train"), quiet=True)
    assert "deletes those shards" in told.value.remedy
    prepare(annotations, images, str(here / "train"), overwrite=True, quiet=True)
    assert dict.fromkeys(("table.parquet", "notes.txt"), NOTES).items() <= tree(here / "train").items()
    assert load_manifest(str(here / "train")).num_images == 2
    assert own <= set(tree(here / "train"))  # the edited manifest did not name them


# --- detectors' folders -------------------------------------------------------------------------------------------------
def export(here: Path, out: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["export", str(here / "model"), "--out", str(out), "--no-onnx", *options])


@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--dry-run",)])
def test_an_export_does_not_write_into_a_strangers_folder(options: tuple[str, ...], here: Path) -> None:
    strangers(here / "repository")
    shutil.copytree(here / "model", here / "download")
    (here / "download/qskd.json").unlink()  # as it comes from the Hub
    (here / "file").write_bytes(NOTES)
    for name in ("repository", "download", "file"):
        before = tree(here)
        result = export(here, here / name, *options)
        assert isinstance(result.exception, QskdError)
        assert "nothing was written" in str(result.exception)
        assert tree(here) == before


def test_an_export_replaces_its_own_files_alone_and_by_option_alone(here: Path) -> None:
    out = here / "exported"
    assert export(here, out).exception is None
    before = tree(here)
    for options in ((), ("--dry-run",)):
        result = export(here, out, *options)  # its own of before
        assert "holds an earlier export: README.md, config.json" in str(result.exception)
        assert "--overwrite" in str(result.exception)
        assert tree(here) == before
    (out / "README.md").write_bytes(b"old")
    assert export(here, out, "--overwrite").exception is None
    assert tree(here) == before
    (out / "model.onnx").write_bytes(b"of an earlier export")
    (out / "config.json").write_bytes(b"old")
    (out / "notes.txt").write_bytes(NOTES)
    (out / ".git").mkdir()
    (out / ".git/HEAD").write_bytes(NOTES)
    before = tree(here)
    result = export(here, out)
    assert "--overwrite" in str(result.exception)
    assert "notes.txt" in str(result.exception)
    assert tree(here) == before
    assert export(here, out, "--overwrite").exception is None
    after = tree(out)
    assert after["notes.txt"] == after[".git/HEAD"] == NOTES
    assert "model.onnx" not in after
    load_detector(out)
    assert not list(here.glob(".exported.*"))


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_exported_files_have_the_rights_that_the_umask_gives(umask: int, rights: int, here: Path) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):  # into a new folder, and beside a file of another's
            assert export(here, here / "exported", "--overwrite").exception is None
            found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (here / "exported").iterdir()}
            assert "model.safetensors" in found
            assert {name: mode for name, mode in found.items() if mode != rights and name != "notes.txt"} == {}
            (here / "exported/notes.txt").write_bytes(NOTES)
            (here / "exported/notes.txt").chmod(0o640)
        assert stat.S_IMODE((here / "exported/notes.txt").stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_an_export_does_not_replace_a_runs_student(here: Path) -> None:
    folder = Folder(config(here))
    claim(folder, "train", "run")
    shutil.copytree(here / "model", here / "runs/run/student")
    before = tree(here)
    result = export(here, here / "runs/run/student")
    assert f"a folder of the run {here}/runs/run" in str(result.exception)
    assert tree(here) == before
    assert enclosing_run(here / "model") is None


def test_what_comes_while_a_detector_is_written_stays(here: Path) -> None:
    with pytest.raises(QskdError, match=r"late\.txt"), replacing(here / "model"):
        (here / "model/late.txt").write_bytes(NOTES)
    assert (here / "model/late.txt").read_bytes() == NOTES
    load_detector(here / "model")


# --- pictures -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["the same", "symbolic", "hard", "another's", "dangling"])
@pytest.mark.parametrize("verb", ["predict", "explain"])
def test_a_picture_replaces_neither_an_input_nor_a_strangers_file(kind: str, verb: str, here: Path) -> None:
    photo, out = here / "photo.png", here / "out.png"
    if kind == "the same":
        out = photo
    elif kind == "symbolic":
        out.symlink_to(photo)
    elif kind == "hard":
        os.link(photo, out)
    elif kind == "another's":
        Image.new("RGB", (8, 8)).save(out)
    else:
        out.symlink_to(here / "nowhere.png")
    words = "is there already" if kind in ("another's", "dangling") else "is an input"
    made_out = targets if verb == "predict" else lambda images, out: explain_targets([str(p) for p in images], out)
    refused(lambda: made_out([photo], out), words, here)
    command = [str(here / "model"), str(photo), "--out", str(out)]
    if verb == "predict":
        before = tree(here)
        assert words in str(CliRunner().invoke(app, ["predict", *command]).exception)
        assert tree(here) == before


def test_a_picture_of_ours_is_replaced_and_nothing_else_of_that_name(here: Path) -> None:
    photo, ours = here / "photo.png", here / "photo.boxes.png"
    for _ in range(2):  # the second takes the place of the first
        result = CliRunner().invoke(app, ["predict", str(here / "model"), str(photo)])
        assert result.exception is None
        assert is_own_picture(ours)
    refused(lambda: targets([photo, ours], None), "is an input", here)  # ours, and now something to look at
    os.link(ours, here / "kept.png")
    before = (here / "kept.png").read_bytes()
    write_picture(read_image(photo), ours, [photo])
    assert (here / "kept.png").read_bytes() == before
    for ending in ("jpg", "webp"):
        write_picture(read_image(photo), here / f"new.{ending}", [photo])
        assert is_own_picture(here / f"new.{ending}")
    assert not is_own_picture(photo)


@pytest.mark.parametrize("ending", ["gif", "bmp"])
def test_a_format_that_can_not_carry_the_mark_is_refused_the_first_time(ending: str, tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(QskdError, match="can't carry the mark"):
        write_picture(pixels, tmp_path / f"new.{ending}", [])
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        write_picture(pixels, tmp_path / "new.tiff", [])


def test_shapes_are_not_drawn_over_a_strangers_pictures(tmp_path: Path) -> None:
    photo = tmp_path / "images/000000000002.jpg"
    photo.parent.mkdir()
    photo.write_bytes(NOTES)
    error = refused(lambda: make_shapes(SHAPES, tmp_path), "000000000002.jpg", tmp_path)
    assert "nothing was written" in error.remedy
    photo.rename(tmp_path / "images/holiday.jpg")
    make_shapes(SHAPES, tmp_path)
    assert (tmp_path / "images/holiday.jpg").read_bytes() == NOTES
    whole = tree(tmp_path)
    (tmp_path / "annotations.json").unlink()  # as when it was killed
    (tmp_path / "images/000000000003.jpg").unlink()
    make_shapes(SHAPES, tmp_path)
    assert tree(tmp_path) == whole
    error = refused(lambda: make_shapes(ShapesConfig(images=2), tmp_path), "another dataset", tmp_path)
    assert "remove" not in error.remedy


def test_a_report_of_a_sweep_replaces_only_one(tmp_path: Path) -> None:
    for name in ("history.png", "index.html", "other.txt"):
        (tmp_path / name).write_bytes(NOTES)
    refused(lambda: write_report(tmp_path, [], Config(), "", "A sweep"), "history.png, index.html", tmp_path)
    (tmp_path / "history.png").unlink()
    (tmp_path / "index.html").unlink()
    for _ in range(2):
        write_report(tmp_path, [], Config(), "", "A sweep")
    assert (tmp_path / "other.txt").read_bytes() == NOTES


# --- temporary files, benchmarks ------------------------------------------------------------------------------------------
def test_scratch_folders_of_others_stay_whatever_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch._remove_orphans.cache_clear()
    for name in ("qskd-scratch-notes", "qskd-scratch-my-abcdefgh", "qskd-scratch-thesis.tex"):
        (tmp_path / name).mkdir(mode=0o755)
        (tmp_path / name / "notes.txt").write_bytes(NOTES)
    before = tree(tmp_path)
    with scratch_folder("mine"):
        pass
    assert tree(tmp_path) == before


def test_a_benchmark_works_in_no_strangers_folder_and_deletes_only_its_own(tmp_path: Path, capsys: Any) -> None:
    strangers(tmp_path / "theirs")

    def chaos() -> None:
        with world.world(tmp_path / "theirs"):
            pass

    refused(chaos, "letter.txt", tmp_path)
    refused(lambda: work_folder.claim(tmp_path / "theirs"), "letter.txt", tmp_path)
    work_folder.claim(tmp_path / "mine")
    for name in ("data/x", "notes.txt"):
        (tmp_path / "mine" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_bytes(NOTES)
    work_folder.discard(tmp_path / "mine", world.OWN)
    assert (tmp_path / "mine/notes.txt").read_bytes() == NOTES
    assert not (tmp_path / "mine/data").exists()
    assert "notes.txt" in capsys.readouterr().out
    (tmp_path / "mine/notes.txt").unlink()
    work_folder.discard(tmp_path / "mine", world.OWN)
    assert not (tmp_path / "mine").exists()


def test_a_benchmarks_record_replaces_only_one(tmp_path: Path) -> None:
    assert PerImage.__dataclass_fields__
    for text in (NOTES, b"{}", b"[]"):
        (tmp_path / "record.json").write_bytes(text)
        refused(lambda: dataset_costs(["--record", str(tmp_path / "record.json")]), "no record", tmp_path)


def test_the_doctors_probe_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    before = strangers(tmp_path)
    assert check_storage(str(tmp_path)).status == "ok"
    assert tree(tmp_path) == before


# --- the table --------------------------------------------------------------------------------------------------------
DELETING = {"rmtree", "delete_dir", "delete_dir_contents", "delete_file", "unlink", "rmdir", "removedirs", "replace", "rename",
            "renames", "move", "copy_files", "remove", "copyfile", "copy", "copytree"}  # fmt: skip
ANYWHERE = {"rmtree", "delete_dir", "delete_dir_contents", "delete_file", "unlink", "rmdir", "copy_files"}


def deleting_functions(root: Path) -> Iterator[str]:
    """module.function of every function (or method) with a call that deletes, renames or copies over."""
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)

        def visit(node: ast.AST, owner: str, module: str = module) -> Iterator[str]:
            for child in ast.iter_child_nodes(node):
                inner = owner
                if isinstance(child, ast.FunctionDef | ast.ClassDef) and not (
                    owner and isinstance(node, ast.FunctionDef)
                ):
                    inner = f"{owner}.{child.name}" if owner else child.name
                if isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
                    of = child.func.value
                    named = isinstance(of, ast.Name) and of.id in ("os", "shutil", "fs", "pafs", "filesystem")
                    if child.func.attr in ANYWHERE or (named and child.func.attr in DELETING):
                        yield f"{module}.{inner}"
                yield from visit(child, inner)

        yield from visit(ast.parse(path.read_text()), "")


def test_the_table_names_every_function_that_deletes_and_a_test_for_each() -> None:
    table = (ROOT / "docs/deletes.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    found = {
        name
        for part in ("qskd", "pipelines", "benchmarks", "search_spaces")
        for name in deleting_functions(ROOT / part)
    }
    assert len(found) > 20
    named = {word for row in rows for word in re.findall(r"`([\w.]+)`", row.split("|")[2])}
    assert sorted(name for name in found if ".".join(name.split(".")[-3:]) not in named) == []
    tests = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for row in rows:
        held = set(re.findall(r"`(test_\w+)`", row.split("|")[4]))
        assert held, row
        assert held <= tests, row


def test_every_promise_of_security_names_tests_that_there_are() -> None:
    rows = [line for line in (ROOT / "docs/security.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| promise", "| ---"))]
    assert len(rows) > 15
    there = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`|`(tests/\w+\.py)`", row.split("|")[3])
        assert named, row
        for function, file in named:
            assert function in there or (file and (ROOT / file).is_file()), row
