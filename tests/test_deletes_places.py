"""Files of others that stand where qskd would write by another spelling, a link or a store's name (`docs/deletes.md`)."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from strangers import NOTES, config, refused, tree

from pipelines.demo.quickstart import TEACHER
from pipelines.deployment.export import ExportOptions, export, foresee
from pipelines.inspection.kept import check_kept
from pipelines.inspection.predict import request
from pipelines.inspection.videos import check_video_target
from pipelines.run.folder import MARK, Folder
from pipelines.run.ownership import check_ours
from pipelines.run.places import check_places
from pipelines.run.tracked import open_for
from pipelines.tracking.store import check_database, tracking_uri
from qskd.datasets.coco import read_coco
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.datasets.shards import MANIFEST, write_shards
from qskd.deploy.model_card import read_card
from qskd.errors import QskdError
from qskd.storage.ownership import check_picture


@pytest.mark.parametrize(
    "spelling", ["{root}/r%75ns", "file://{root}/r%75ns", "local://{root}/runs", "dir::file://{root}/runs"]
)
def test_a_run_that_contains_its_teacher_is_refused_in_every_spelling_of_its_place(
    spelling: str, tmp_path: Path
) -> None:
    shutil.copytree(TEACHER, tmp_path / "runs" / "run" / "student")
    output = spelling.format(root=tmp_path)
    given = config(tmp_path, f"output={output}", f"teacher.path={tmp_path}/runs/run/student")
    if "://" not in spelling:  # a path is no URI: this folder is another one
        check_places(given, "distill")
        return
    refused(lambda: check_places(given, "distill"), "contains teacher.path", tmp_path)


def test_a_run_that_is_the_cards_baseline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    given = config(tmp_path, f"card.baseline={tmp_path}/runs/run")
    refused(lambda: check_places(given, "train"), "is card.baseline", tmp_path)


@pytest.mark.parametrize("kind", ["database", "empty", "text", "folder"])
def test_runs_are_not_kept_in_a_strangers_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photos.db"
    if kind == "database":
        with sqlite3.connect(path) as base:
            base.executescript("create table photos (x); create table tags (x)")
        base.close()
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"" if kind == "empty" else NOTES)
    given = config(tmp_path, f"tracking.uri=sqlite:///{path}")
    refused(lambda: open_for(Folder(given), given, "train"), "photos.db", tmp_path)


def test_mlflows_own_file_is_taken_again(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        base.executescript("create table experiments (x); create table runs (x)")
    base.close()
    check_database(tracking_uri(config(tmp_path)))
    check_database(f"sqlite:///{tmp_path}/new.db")
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("spelling", ["~/m", "file://{home}/m"])
def test_an_export_knows_its_models_own_folder_in_every_spelling(
    spelling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TEACHER, tmp_path / "m")
    model = spelling.format(home=tmp_path)
    refused(
        lambda: export(model, tmp_path / "m", ExportOptions(size=128, onnx=False, rounds=0)),
        "model's own folder",
        tmp_path,
    )


def test_what_a_model_says_of_itself_is_kept_by_an_export_from_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(TEACHER, tmp_path / "m")
    (tmp_path / "m" / "qskd.json").write_text('{"notes": "facts"}')
    export("~/m", tmp_path / "out", ExportOptions(onnx=False, rounds=0))
    assert json.loads((tmp_path / "out" / "qskd.json").read_text())["notes"] == "facts"


CARD = '{"card": {"name": "a", "family": "x", "classes": 3, "rows": [%s]%s}}'


@pytest.mark.parametrize(
    "said",
    [
        *("{", "[" * 100_000, '{"card": 5}', '{"card": [1]}', CARD % ("", ""), CARD % ("{}", "")),
        CARD % ('{"name": "u", "metrics": {}}', ', "kind": "zz"'),
        CARD % ('{"name": "u", "metrics": {}, "parameters": "u"}', ""),
    ],
)
def test_an_odd_card_counts_as_none(said: str, tmp_path: Path) -> None:
    (tmp_path / "qskd.json").write_text(said)
    assert read_card(tmp_path) is None
    assert read_card(tmp_path / "nowhere") is None


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_failing_prepare_leaves_the_shards_of_before_whatever_became_of_their_manifest(
    overwrite: bool, tmp_path: Path
) -> None:
    annotations, images = make_shapes(ShapesConfig(images=8), tmp_path / "shapes")
    shards = str(tmp_path / "shards")
    write_shards(read_coco(annotations, images), shards, rows_per_shard=4)
    manifest = tmp_path / "shards" / MANIFEST
    if overwrite:
        manifest.write_text(manifest.read_text()[:-30])
    else:
        manifest.rename(tmp_path / "shards" / "kept.bak")
    sorted(images.iterdir())[6].write_bytes(b"broken")  # in the second shard
    refused(
        lambda: write_shards(read_coco(annotations, images), shards, rows_per_shard=4, overwrite=overwrite),
        "image 7 .*not a readable image",
        tmp_path / "shards",
    )


def test_links_to_nothing_are_not_replaced(tmp_path: Path) -> None:
    annotations, images = make_shapes(ShapesConfig(images=2), tmp_path / "shapes")
    for name, run in {
        "annotations.json": lambda folder: make_shapes(ShapesConfig(images=1), folder),
        MANIFEST: lambda folder: write_shards(read_coco(annotations, images), str(folder)),
    }.items():
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).symlink_to("/unmounted/disk.json")
        with pytest.raises(QskdError):
            run(folder)
        assert os.readlink(folder / name) == "/unmounted/disk.json"


def test_a_run_does_not_write_through_links_into_a_strangers_folder(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(TEACHER, theirs)
    folder = Folder(config(tmp_path))
    folder.write(MARK, "{}")
    (Path(folder.root) / "student").symlink_to(theirs)
    refused(lambda: check_ours(folder), "student in it leads elsewhere", tmp_path)
    refused(lambda: folder.upload(TEACHER, "student"), "a link", tmp_path)
    (Path(folder.root) / "student").unlink()
    (Path(folder.root) / "student").mkdir()
    (Path(folder.root) / "student" / "config.json").symlink_to(theirs / "config.json")
    refused(lambda: folder.upload(TEACHER, "student"), "a link", tmp_path)


def test_a_run_can_not_lie_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_bytes(NOTES)
    given = config(tmp_path, f"output={tmp_path}/runs/deeper")
    refused(lambda: check_ours(Folder(given)), "is no folder", tmp_path)


@pytest.mark.parametrize("output", ["file:/tmp/runs", "s3:/bucket/runs", "a/" * 3000])
def test_a_place_that_is_neither_path_nor_uri_is_refused(output: str, tmp_path: Path) -> None:
    refused(lambda: Folder(config(tmp_path, f"output={output}")), "neither a path nor a URI|characters", tmp_path)


BOMB = "a0: &a0 {x: y}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(("config.yaml", text) for text in (BOMB, "a: !!bool zz", 'a: !!int ""', "a: !!timestamp zz")),
        *(("history.json", text) for text in ("[1]", "[" * 100_000)),
        ("data.json", '{"a":' * 50_000),
    ],
)
def test_a_strangers_records_are_read_within_bounds_and_refused(name: str, said: str, tmp_path: Path) -> None:
    given = config(tmp_path)
    place = tmp_path / "runs" / "run"
    place.mkdir(parents=True)
    (place / name).write_text(said)
    began = time.monotonic()
    refused(lambda: check_ours(Folder(given)), "qskd did not make", tmp_path)
    assert time.monotonic() - began < 10
    with pytest.raises(QskdError, match=name):
        Folder(given).read_record(name)
    assert tree(place).keys() == {name}


@pytest.mark.parametrize("kind", ["is a file", "lies below a file", "is a link to nothing"])
@pytest.mark.parametrize("verb", ["evaluate", "predict", "export", "a picture", "a video"])
def test_a_place_that_can_not_be_written_is_told_before_the_work(verb: str, kind: str, here: Path) -> None:
    (file := here / "file").write_bytes(NOTES)
    (link := here / "link").symlink_to(here / "nowhere")
    out = {"is a file": file, "lies below a file": file / "below" / "it", "is a link to nothing": link}[kind]
    asked: dict[str, Callable[[], object]] = {
        "evaluate": lambda: check_kept(out),
        "predict": lambda: request(str(here / "model"), [here / "photo.png"], out, pictures=False).targets(),
        "export": lambda: foresee(str(here / "model"), out / "new", ExportOptions(onnx=False)),
        "a picture": lambda: check_picture(out / "new.png", []),
        "a video": lambda: check_video_target(out / "new.mp4", here / "other.mp4"),
    }
    refused(asked[verb], "can't be written: Not a directory", here)
    check_kept(here / "new" / "folder")  # which is made when it is needed
    assert not (here / "new").exists()
