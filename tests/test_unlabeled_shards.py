"""`qskd prepare --unlabeled`: pictures without labels as shards, whose manifest says so to every reader."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from strangers import refused
from test_loader import Pictures
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.inspection.evaluate import evaluate
from pipelines.inspection.sources import files_of
from pipelines.prepare import prepare
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.shards import ShardReader, read_annotations, write_shards
from qskd.datasets.unlabeled.known import pictures_in
from qskd.errors import QskdError
from qskd.storage.ownership import save_picture


def draw(folder: Path, count: int, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def shards(source: Path, destination: Path, **options: object) -> Manifest:
    return prepare(source, None, str(destination), quiet=True, unlabeled=True, **options)  # type: ignore[arg-type]


def test_pictures_without_labels_are_said_to_be_so_by_their_manifest_and_by_each_sample(tmp_path: Path) -> None:
    draw(tmp_path / "pool/below", 3)
    made = shards(tmp_path / "pool", tmp_path / "shards")
    assert (made.num_images, made.num_objects, made.categories, made.findings) == (3, 0, (), ())
    read = load_manifest(str(tmp_path / "shards"))
    assert not read.labelled
    samples = ShardReader(str(tmp_path / "shards")).read(0, [2, 0])
    assert [(one.labelled, one.file_name, one.width, one.height) for one in samples] == [
        (False, "below/2.png", 32, 24),
        (False, "below/0.png", 32, 24),
    ]


def test_what_qskd_drew_beside_the_pictures_is_none_of_them(tmp_path: Path) -> None:
    pool = draw(tmp_path / "pool", 1)
    for name in ("0.boxes.png", "0.explained.png"):
        save_picture(Image.new("RGB", (9, 9)), pool / name)
    Image.new("RGB", (9, 9)).save(pool / "theirs.boxes.png")
    assert shards(pool, tmp_path / "shards").num_images == 2
    assert [one.file_name for one in ShardReader(str(tmp_path / "shards")).read(0, [0, 1])] == [
        "0.png",
        "theirs.boxes.png",
    ]
    assert files_of([pool]) == [pool / "0.png", pool / "theirs.boxes.png"]


def test_what_is_in_them_is_not_taken_for_nothing(tmp_path: Path) -> None:
    shards(draw(tmp_path / "pool", 2), tmp_path / "shards")
    uri = str(tmp_path / "shards")
    for read in (lambda: read_annotations(uri), lambda: evaluate("nowhere", uri)):
        with pytest.raises(QskdError, match="2 images without labels") as caught:
            read()
        assert "qskd label" in caught.value.remedy


def test_an_edited_manifest_can_not_have_objects_without_labels_or_no_classes_with_them(tmp_path: Path) -> None:
    made = shards(draw(tmp_path / "pool", 2), tmp_path / "shards").to_json()
    for change in (
        made.replace('"num_objects": 0', '"num_objects": 1'),
        made.replace('"labelled": false', '"labelled": true'),
    ):
        assert change != made
        with pytest.raises(QskdError, match="not a manifest"):
            Manifest.from_json(change, "there")


def test_a_list_of_files_is_read_and_leaves_its_folder_for_no_line(tmp_path: Path) -> None:
    pool = draw(tmp_path / "pool", 3)
    listing = tmp_path / "list.txt"
    listing.write_text(f"pool/2.png\n\n{pool}/0.png\n")
    assert shards(listing, tmp_path / "shards").num_images == 2
    names = [one.file_name for one in ShardReader(str(tmp_path / "shards")).read(0, [0, 1])]
    assert names == ["pool/2.png", "pool/0.png"]
    listing.write_text("../elsewhere.png\n")
    for on_error in ("stop", "skip"):
        with pytest.raises(QskdError, match="leaves the image folder"):
            shards(listing, tmp_path / "other", on_error=on_error)


def test_broken_and_repeated_pictures_are_named_and_left_out_by_choice_alone(tmp_path: Path) -> None:
    pool = draw(tmp_path / "pool", 4)
    (pool / "x_broken.png").write_bytes(b"no picture")
    (pool / "y_cut.png").write_bytes((pool / "1.png").read_bytes()[:-600])
    shutil.copy(pool / "2.png", pool / "z_twice.png")
    with pytest.raises(QskdError, match=r"x_broken\.png"):
        shards(pool, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    made = shards(pool, tmp_path / "shards", on_error="skip")
    assert made.num_images == 4
    said = {Path(problem["where"]).name: problem["found"] for problem in made.problems}
    assert sorted(said) == ["x_broken.png", "y_cut.png", "z_twice.png"]
    assert said["z_twice.png"] == "the same picture as 2.png, byte for byte"


@pytest.mark.parametrize("remembered", [True, False])
def test_pictures_of_other_shards_are_refused_or_left_out(
    remembered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """remembered: by the manifest; of many pictures it has a part only, and they are read."""
    if not remembered:
        monkeypatch.setattr("qskd.datasets.findings.splits.MOST_KEPT", 1)
    shards(draw(tmp_path / "val", 3), tmp_path / "shards")
    assert len(pictures_in([str(tmp_path / "shards")])) == 3
    pool = draw(tmp_path / "pool", 2, seed=1)
    shutil.copy(tmp_path / "val/1.png", pool / "seen.png")
    with pytest.raises(QskdError, match=r"seen\.png: the same picture as image 2 of"):
        shards(pool, tmp_path / "new", not_in=[str(tmp_path / "shards")])
    made = shards(pool, tmp_path / "new", not_in=[str(tmp_path / "shards")], on_error="skip")
    assert (made.num_images, len(made.problems)) == (2, 1)


def test_shards_with_a_picture_twice_are_known_by_their_manifest_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else every picture of such shards is read, which may be all of a store's."""
    samples = list(Pictures(3).samples())
    twice = Pictures(4)
    twice.samples = lambda: iter([*samples, replace(samples[1], image_id=7)])  # type: ignore[method-assign]
    write_shards(twice, str(tmp_path / "shards"))
    monkeypatch.setattr("qskd.datasets.unlabeled.known._read", lambda reader: pytest.fail("pictures are read"))
    assert len(pictures_in([str(tmp_path / "shards")])) == 3


def test_other_shards_are_not_replaced_without_being_asked(tmp_path: Path) -> None:
    pool = draw(tmp_path / "pool", 2)
    made = shards(pool, tmp_path / "shards")
    assert shards(pool, tmp_path / "shards") == made  # the same pictures
    draw(pool, 2, seed=9)
    refused(lambda: shards(pool, tmp_path / "shards"), "already holds shards", tmp_path)
    assert shards(pool, tmp_path / "shards", overwrite=True).fingerprint != made.fingerprint


def test_options_of_labels_are_refused_by_name(tmp_path: Path) -> None:
    pool, out = draw(tmp_path / "pool", 1), str(tmp_path / "out")
    for option in (["--split", "val"], ["--leave-out", "cat"], ["--exif", "stored"], ["--box-format", "xywh"]):
        found = CliRunner().invoke(app, ["prepare", "--unlabeled", str(pool), out, *option])
        assert isinstance(found.exception, QskdError), option
        assert found.exception.where == option[0]
