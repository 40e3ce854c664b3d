"""Shards give back what was written, read no more than asked, and name what is damaged."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from qskd.datasets import samples
from qskd.datasets.coco import read_coco
from qskd.datasets.manifest import Manifest, load_manifest
from qskd.datasets.samples import SCHEMA, Category, Sample
from qskd.datasets.shards import ShardReader, read_annotations, verify, write_shards
from qskd.errors import QskdError

REAL = Path(__file__).parents[2] / "shared" / "coco-sample"
CATEGORIES = (Category(2, "dog"), Category(5, "cat", "animal"), Category(90, "kite"))


def sample(number: int, objects: int = 3) -> Sample:
    rng = np.random.default_rng(number)
    low = rng.uniform(0, 20, (objects, 2))
    return Sample(
        image_id=number * 7 - 5,
        file_name=f"é{number}.jpg",
        width=30 + number,
        height=40,
        encoded=rng.bytes(100 + number),
        boxes_xyxy=np.concatenate([low, low + rng.uniform(1, 9, (objects, 2))], axis=1).astype(np.float32),
        category_ids=rng.choice([2, 5, 90], objects),
        area=rng.uniform(1, 50, objects).astype(np.float32),
        iscrowd=rng.random(objects) < 0.3,
    )


@dataclass
class Source:
    items: list[Sample]
    categories: tuple[Category, ...] = CATEGORIES
    source: str = "made.json"
    source_sha256: str = "0" * 64
    problems: list[dict[str, str]] = field(default_factory=list)
    fails_at: int = -1

    def __len__(self) -> int:
        return len(self.items)

    def samples(self) -> Iterator[Sample]:
        for number, item in enumerate(self.items):
            if number == self.fails_at:
                raise QskdError("made.json: image 1", "broken")
            yield item
        self.problems.append({"where": "w", "found": "f", "dropped": "d"})


def source(count: int = 25) -> Source:
    return Source([sample(number, number % 4) for number in range(count)])


def assert_same(found: Sample, expected: Sample) -> None:
    for name in SCHEMA.names:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        if isinstance(getattr(expected, name), np.ndarray):
            assert getattr(found, name).dtype == getattr(expected, name).dtype
            assert getattr(found, name).shape == getattr(expected, name).shape


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_shards(source(), str(tmp_path / "shards"), rows_per_shard=10, rows_per_group=4)
    return str(tmp_path / "shards")


def test_samples_come_back_as_they_were_in_any_order(folder: str) -> None:
    reader, items = ShardReader(folder), source().items
    assert reader.manifest.shard_rows == (10, 10, 5)
    for shard, rows in ((0, [9, 0, 5, 5]), (1, list(range(10))), (2, [4])):
        for row, found in zip(rows, reader.read(shard, rows), strict=True):
            assert_same(found, items[shard * 10 + row])
    assert reader.read(0, []) == []


def test_the_manifest_counts_and_survives_json(folder: str) -> None:
    manifest, items = load_manifest(folder), source().items
    assert manifest.num_images == 25
    assert manifest.num_crowds == sum(int(item.iscrowd.sum()) for item in items)
    assert manifest.num_objects + manifest.num_crowds == sum(len(item.area) for item in items)
    assert manifest.category_index == {2: 0, 5: 1, 90: 2}
    assert manifest.labels == ("dog", "cat", "kite")
    assert manifest.problems == ({"where": "w", "found": "f", "dropped": "d"},)  # known only after the last sample
    assert Manifest.from_json(manifest.to_json(), "x") == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    for shard in manifest.shards:
        content = (Path(folder) / shard.file).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (shard.bytes, shard.sha256)
    assert sorted(os.listdir(folder)) == sorted(["manifest.json", *(shard.file for shard in manifest.shards)])


def test_a_manifest_keeps_as_many_problems_as_can_be_read_again_what_was_lost_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million boxes that were clipped made a manifest larger than any that is read."""
    monkeypatch.setattr(samples, "MOST_PROBLEMS", 4)
    clipped = [{"where": str(number), "found": "f", "dropped": "nothing; the box was clipped"} for number in range(5)]
    made = source()
    made.problems = [*clipped, {"where": "lost", "found": "f", "dropped": "the annotation"}]
    manifest = write_shards(made, str(tmp_path / "shards"))
    assert [each["where"] for each in manifest.problems[:-1]] == ["lost", "w", "0", "1"]
    assert manifest.problems[-1]["found"].startswith("3 more problems")
    assert load_manifest(str(tmp_path / "shards")) == manifest
    made.problems = clipped[:3]
    assert len(write_shards(made, str(tmp_path / "shards")).problems) == 4


def test_prepare_clears_away_what_a_killed_one_left_and_nothing_of_others(tmp_path: Path) -> None:
    folders = {}
    for name in ("shard-3", "manifest", "draft.md"):
        folders[name] = Path(tempfile.mkdtemp(prefix=".writing-", dir=tmp_path))
        (folders[name] / name).write_bytes(b"half")
    write_shards(source(), str(tmp_path))
    assert [folder.exists() for folder in folders.values()] == [False, False, True]
    assert (folders["draft.md"] / "draft.md").read_bytes() == b"half"


def test_the_fingerprint_names_the_content(folder: str, tmp_path: Path) -> None:
    first = load_manifest(folder).fingerprint
    assert write_shards(source(), str(tmp_path / "b"), 10, 4).fingerprint == first
    assert write_shards(source(24), str(tmp_path / "c"), 10, 4).fingerprint != first
    renamed = replace(source(), categories=(Category(2, "wolf"), *CATEGORIES[1:]))
    assert write_shards(renamed, str(tmp_path / "d"), 10, 4).fingerprint != first


def test_image_bytes_are_stored_plain(folder: str) -> None:
    metadata = pq.ParquetFile(Path(folder) / load_manifest(folder).shards[0].file).metadata
    assert metadata.num_row_groups == 3
    columns = [metadata.row_group(0).column(number) for number in range(metadata.num_columns)]
    column = next(column for column in columns if column.path_in_schema == "encoded")
    assert column.compression == "UNCOMPRESSED"
    assert not any("DICT" in encoding for encoding in column.encodings)


def test_unread_columns_are_empty_and_cost_nothing(tmp_path: Path) -> None:
    items = [replace(sample(n), encoded=bytes(200_000)) for n in range(20)]
    write_shards(Source(items), str(tmp_path))
    reader = ShardReader(str(tmp_path))

    class Counted:
        """A file that counts the bytes asked of it."""

        def __init__(self, path: Path) -> None:
            self.file, self.bytes, self.closed = path.open("rb"), 0, False

        def read(self, size: int = -1) -> bytes:
            block = self.file.read(size)
            self.bytes += len(block)
            return block

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

    counted = Counted(tmp_path / reader.manifest.shards[0].file)
    reader._files._open[0] = pq.ParquetFile(counted)
    found = reader.read(0, [3], ["boxes_xyxy", "image_id"])[0]
    assert counted.bytes < 100_000
    np.testing.assert_array_equal(found.boxes_xyxy, items[3].boxes_xyxy)
    assert (found.image_id, found.encoded, found.width, found.area.shape) == (items[3].image_id, b"", 0, (0,))


def test_annotations_are_those_of_all_samples(folder: str) -> None:
    items, arrays = source().items, read_annotations(folder)
    assert arrays["image_ids"].tolist() == [item.image_id for item in items]
    assert arrays["widths"].tolist() == [item.width for item in items]
    assert arrays["heights"].tolist() == [item.height for item in items]
    assert arrays["object_image_ids"].tolist() == [item.image_id for item in items for _ in item.area]
    for name in ("boxes_xyxy", "category_ids", "area", "iscrowd"):
        np.testing.assert_array_equal(arrays[name], np.concatenate([getattr(item, name) for item in items]))


def test_rows_read_together_are_those_stored_together(folder: str) -> None:
    reader = ShardReader(folder)
    assert [reader.group_rows(0, row) for row in (0, 3, 4, 9)] == [range(4), range(4), range(4, 8), range(8, 10)]
    assert reader.group_rows(2, 4) == range(4, 5)


def test_row_groups_are_counted_once_for_a_file_that_is_open(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row that a loader asks for asks which rows are stored with it; a teacher's file has hundreds of groups."""
    reader = ShardReader(folder)
    reader.read(0, [0])
    reader.group_rows(0, 9)
    monkeypatch.setattr(reader._files, "file", lambda number: pytest.fail("the groups were counted again"))
    assert [reader.group_rows(0, row) for row in (0, 4, 9)] == [range(4), range(4, 8), range(8, 10)]
    monkeypatch.undo()
    monkeypatch.setattr(reader._files, "_MOST_OPEN", 1)
    reader.read(1, [0])  # which closes the first
    assert list(reader._files._starts) == [1]


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_shards(source(), str(tmp_path), 10, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (25, 25)


def test_another_source_is_refused_unless_told_and_then_nothing_is_left_of_it(folder: str) -> None:
    other = replace(source(12), source_sha256="1" * 64)
    before = sorted(os.listdir(folder))
    with pytest.raises(QskdError, match=r"already holds shards of made\.json[\s\S]*--overwrite"):
        write_shards(other, folder)
    assert sorted(os.listdir(folder)) == before
    manifest = write_shards(other, folder, overwrite=True)
    assert sorted(os.listdir(folder)) == sorted(["manifest.json", manifest.shards[0].file])
    assert verify(folder).num_images == 12


def test_a_failure_half_way_leaves_the_old_dataset_whole(folder: str, tmp_path: Path) -> None:
    before = sorted(os.listdir(folder))
    with pytest.raises(QskdError, match="broken"):
        write_shards(replace(source(40), fails_at=33), folder, 10, 4, overwrite=True)
    assert sorted(os.listdir(folder)) == before
    verify(folder)
    with pytest.raises(QskdError, match="broken"):
        write_shards(replace(source(40), fails_at=33), str(tmp_path / "new"), 10, 4)
    assert os.listdir(tmp_path / "new") == []


def test_a_source_without_a_usable_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QskdError, match="no usable image"):
        write_shards(Source([]), str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "bytes"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "can't be read"),
        (lambda path: path.write_bytes(b"\1" * 40 + path.read_bytes()[40:]), "can't be read"),
    ],
)
def test_a_damaged_shard_is_named_with_what_was_expected(folder: str, damage: object, found: str) -> None:
    shard = load_manifest(folder).shards[1]
    assert callable(damage)
    damage(Path(folder) / shard.file)
    reader = ShardReader(folder)
    reader.read(0, [0])
    with pytest.raises(QskdError) as caught:
        reader.read(1, [0])
    for word in (shard.file, found, "expected", "--overwrite"):
        assert word in str(caught.value)
    with pytest.raises(QskdError, match=shard.file):
        verify(folder)


def test_a_row_that_is_not_there_is_named(folder: str) -> None:
    with pytest.raises(QskdError, match="no row 10"):
        ShardReader(folder).read(0, [10])


def test_an_edited_or_foreign_manifest_is_refused(folder: str, tmp_path: Path) -> None:
    path = Path(folder) / "manifest.json"
    tree = json.loads(path.read_text())
    edits = {
        "fingerprint": tree | {"categories": tree["categories"][:2]},
        "plain file name": tree | {"shards": [tree["shards"][0] | {"file": "../x.parquet"}]},
        "qskd-shards 1": tree | {"version": 2},
        "no `format`": {"shards": []},
        "not a manifest": [1],
    }
    for word, edited in edits.items():
        path.write_text(json.dumps(edited))
        with pytest.raises(QskdError, match=word):
            load_manifest(folder)
    path.write_text("{")
    with pytest.raises(QskdError, match=r"manifest\.json: not a manifest"):
        load_manifest(folder)
    with pytest.raises(QskdError, match="no such file"):
        load_manifest(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("scheme", ["file://", "memory://"])
def test_uris_of_pyarrow_and_of_fsspec_work(scheme: str, tmp_path: Path) -> None:
    if scheme == "memory://":
        pytest.importorskip("fsspec")
    uri = f"{scheme}{tmp_path}/there"
    write_shards(source(), uri, 10, 4)
    verify(uri)
    assert_same(ShardReader(uri).read(1, [2])[0], source().items[12])
    manifest = write_shards(replace(source(5), source_sha256="1" * 64), uri, overwrite=True)
    assert verify(uri) == manifest


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(QskdError, match="nope://x"):
        load_manifest("nope://x")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the COCO sample is not at {REAL}")
def test_the_real_sample_survives_the_round_trip(tmp_path: Path) -> None:
    dataset = read_coco(REAL / "annotations" / "instances_val2017.json", REAL / "val2017")
    manifest = write_shards(dataset, str(tmp_path), rows_per_shard=40, rows_per_group=16)
    document = json.loads((REAL / "annotations" / "instances_val2017.json").read_text())
    crowds = sum(entry["iscrowd"] for entry in document["annotations"])
    counts = (manifest.num_images, manifest.num_objects, manifest.num_crowds)
    assert counts == (len(document["images"]), len(document["annotations"]) - crowds, crowds)
    reader, originals = ShardReader(str(tmp_path)), list(dataset.samples())
    found = [item for shard, rows in enumerate(manifest.shard_rows) for item in reader.read(shard, range(rows))]
    for one, other in zip(found, originals, strict=True):
        assert_same(one, other)
