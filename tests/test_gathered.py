"""`qskd prepare SELECTION DESTINATION --also SHARDS`: images of shards gathered once more, exemplars with new ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from strangers import refused, tree
from typer.testing import CliRunner

import qskd
from pipelines.cli import app
from pipelines.prepare import prepare
from qskd.datasets.manifest import load_manifest
from qskd.datasets.order.chosen import load_selection
from qskd.datasets.samples import Sample
from qskd.datasets.shapes import EASY, ShapesConfig, make_shapes
from qskd.datasets.shards import ShardReader
from qskd.errors import QskdError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old: shards of 70 images with the first five classes; new: of 30 others with the last five, two of them the same, spelled
    otherwise. Category ids and image ids are those of the old ones."""
    root = tmp_path_factory.mktemp("gathered")
    for name, count, first, own in (("old", 70, 0, EASY[:5]), ("new", 30, 500, EASY[3:])):
        annotations, images = make_shapes(ShapesConfig(images=count, first_image=first), root / f"{name}-coco")
        tree = json.loads(annotations.read_text())
        names = {one["id"]: one["name"] for one in tree["categories"]}
        numbers = {each: number for number, each in enumerate(own, 1)}
        tree["categories"] = [{"id": n, "name": each.title() if name == "new" else each} for each, n in numbers.items()]
        tree["annotations"] = [
            {**one, "category_id": numbers[names[one["category_id"]]], "image_id": one["image_id"] - first}
            for one in tree["annotations"]
            if names[one["category_id"]] in own
        ]
        tree["images"] = [{**one, "id": one["id"] - first} for one in tree["images"]]
        annotations.write_text(json.dumps(tree))
        prepare(annotations, images, str(root / name), rows_per_shard=25, quiet=True)
    return root


def samples(folder: str | Path) -> list[Sample]:
    reader = ShardReader(str(folder))
    return [one for shard, rows in enumerate(reader.manifest.shard_rows) for one in reader.read(shard, range(rows))]


def test_exemplars_and_new_images_are_one_dataset_whose_classes_are_joined_by_name(root: Path, tmp_path: Path) -> None:
    qskd.select(root / "old", tmp_path / "few.json", 9, by="classes")
    words = ["prepare", str(tmp_path / "few.json"), str(tmp_path / "both"), "--also", str(root / "new")]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.output
    made, old, new = (load_manifest(str(folder)) for folder in (tmp_path / "both", root / "old", root / "new"))
    assert [(one.id, one.name) for one in made.categories][:5] == [(one.id, one.name) for one in old.categories]
    assert [one.name for one in made.categories][5:] == [name.title() for name in EASY[5:]]
    assert made.source == "few.json + new"

    chosen = {(image.shard, image.row) for image in load_selection(str(tmp_path / "few.json")).images}
    reader = ShardReader(str(root / "old"))
    expected = [(old, *reader.read(shard, [row])) for shard, row in sorted(chosen)]
    expected += [(new, one) for one in samples(root / "new")]
    found = samples(tmp_path / "both")
    assert len(found) == len(expected) == 39
    assert len({one.image_id for one in found}) == 39
    names = {one.id: one.name.lower() for one in made.categories}
    for mine, (manifest, theirs) in zip(found, expected, strict=True):
        its = {one.id: one.name.lower() for one in manifest.categories}
        assert mine.encoded == theirs.encoded
        np.testing.assert_array_equal(mine.boxes_xyxy, theirs.boxes_xyxy)
        assert [names[one] for one in mine.category_ids.tolist()] == [its[one] for one in theirs.category_ids.tolist()]
    again = prepare(tmp_path / "few.json", None, str(tmp_path / "again"), quiet=True, also=[str(root / "new")])
    assert again.fingerprint == made.fingerprint
    dry = CliRunner().invoke(app, [*words[:2], str(tmp_path / "dry"), "--also", str(root / "new"), "--dry-run"])
    assert "39 images, 8 categories" in dry.output


def test_a_selection_alone_makes_shards_of_its_images(root: Path, tmp_path: Path) -> None:
    qskd.select(root / "old", tmp_path / "few.json", 4, seed=3)
    made = qskd.prepare(tmp_path / "few.json", None, tmp_path / "part")
    assert made.images == 4
    assert made.classes == load_manifest(str(root / "old")).labels
    ids = {image.image_id for image in load_selection(str(tmp_path / "few.json")).images}
    assert {one.image_id for one in samples(tmp_path / "part")} == ids  # kept


def test_a_selection_that_is_read_from_another_folder_than_it_was_made_in_says_so(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    qskd.select("old", tmp_path / "few.json", 4)
    assert prepare(tmp_path / "few.json", None, str(tmp_path / "part"), quiet=True).num_images == 4
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QskdError, match=r"chosen from old; .*no such file") as caught:
        prepare(tmp_path / "few.json", None, str(tmp_path / "other"), quiet=True)
    assert "run this where old is that folder" in caught.value.remedy


def test_a_picture_that_both_have_stops_or_the_later_is_left_out(root: Path, tmp_path: Path) -> None:
    qskd.select(root / "old", tmp_path / "few.json", 4)
    words = (tmp_path / "few.json", None, tmp_path / "both")
    with pytest.raises(QskdError, match=r"the same picture as .*few\.json: image .*byte for byte"):
        qskd.prepare(*words, also=[root / "old"])
    made = qskd.prepare(*words, also=[root / "old"], on_error="skip")
    assert made.images == 70
    assert len(made.problems) == 4


def test_what_is_no_labelled_shards_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "note.json").write_text("{}")
    old = root / "old"
    for source, also, said in (
        (old, tmp_path / "note.json", "neither shards nor a selection"),
        (root / "old-coco/annotations.json", old, "neither shards nor a selection"),
    ):
        refused(lambda s=source, a=also: qskd.prepare(s, None, tmp_path / "out", also=[a]), said, tmp_path)  # type: ignore[misc]
    refused(lambda: qskd.prepare(old, tmp_path, tmp_path / "out", also=[root / "new"]), "no such thing", tmp_path)
    pool = prepare(root / "new-coco/images", None, str(tmp_path / "pool"), quiet=True, unlabeled=True)
    assert not pool.labelled
    refused(lambda: qskd.prepare(old, None, tmp_path / "out", also=[tmp_path / "pool"]), "without labels", tmp_path)
    qskd.select(old, tmp_path / "few.json", 4)
    text = (tmp_path / "few.json").read_text()
    (tmp_path / "few.json").write_text(text.replace(load_manifest(str(old)).fingerprint, "0" * 64))
    refused(lambda: qskd.prepare(tmp_path / "few.json", None, tmp_path / "out"), "fingerprint is another", tmp_path)


@pytest.mark.parametrize("spelling", ["is", "link", "uri", "inside", "around"])
@pytest.mark.parametrize("kind", ["source", "also", "selection", "also a selection", "left out of", "not in"])
def test_shards_that_are_read_are_not_written_to_under_whatever_name(
    kind: str, spelling: str, root: Path, tmp_path: Path
) -> None:
    old = tmp_path / "data/old"
    shutil.copytree(root / "old", old)
    few, pictures = tmp_path / "few.json", root / "new-coco/images"
    qskd.select(old, few, 4)
    (tmp_path / "link").symlink_to(old)
    told = {"is": "is", "link": "is", "uri": "is", "inside": "lies in", "around": "contains"}[spelling]
    places = {"is": old, "link": tmp_path / "link", "uri": f"file://{tmp_path}/data/%6fld", "inside": old / "new"}
    out = str(places.get(spelling, tmp_path / "data"))
    words = {
        "source": [str(old), out, "--also", str(root / "new")],
        "also": [str(root / "new"), out, "--also", str(old)],
        "selection": [str(few), out],
        "also a selection": [str(root / "new"), out, "--also", str(few)],
        "left out of": [str(few), out, "--leave-out", EASY[0]],
        "not in": ["--unlabeled", str(pictures), out, "--not-in", str(old)],
    }[kind]
    for options in (["--overwrite"], ["--overwrite", "--dry-run"]):
        before = tree(tmp_path)
        said = CliRunner().invoke(app, ["prepare", *words, *options])
        assert f"{told} the folder {old}, whose shards are read" in str(said.exception)
        assert tree(tmp_path) == before


def test_shards_of_a_store_that_are_read_are_not_written_to(root: Path) -> None:
    folder = "memory://gathered/old"
    prepare(root / "old-coco/annotations.json", root / "old-coco/images", folder, quiet=True)
    before = load_manifest(folder).fingerprint
    for out in ("memory://gathered/old/", "memory://gathered/%6fld", "memory://gathered", f"{folder}/deeper"):
        with pytest.raises(QskdError, match=f"{folder}, whose shards are read"):
            prepare(root / "new", None, out, also=[folder], overwrite=True, quiet=True)
    assert load_manifest(folder).fingerprint == before
    made = prepare(root / "new", None, f"{folder}-and-new", also=[folder], quiet=True)  # beside it
    assert made.num_images == 100
