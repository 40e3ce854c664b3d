"""Shards, caches, run folders and the doctor on a real S3 server; a store that fails is tried again, then named."""

from __future__ import annotations

import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("moto", reason="moto (the S3 server of these tests) is not installed: pip install -e '.[dev]'")
pytest.importorskip("flask", reason="flask, which moto's server needs, is not installed")

from object_store import ObjectStore
from tiny import recipe, silent_student
from typer.testing import CliRunner

from pipelines.caching.plan import clean
from pipelines.cli import app
from pipelines.health.services import check_storage
from pipelines.inspection.evaluate import evaluate
from pipelines.run.best import Best, keep_best, read_best
from pipelines.run.folder import Folder
from pipelines.run.ownership import claim, delete_run
from qskd.config import Config
from qskd.datasets.coco import read_coco
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shapes import ShapesConfig, make_shapes
from qskd.datasets.shards import ShardReader, read_annotations, verify, write_shards
from qskd.detectors import save_detector
from qskd.errors import QskdError
from qskd.storage import files
from qskd.storage.files import publish_bytes
from qskd.storage.places import open_folder
from qskd.storage.stores import PATIENCE
from qskd.teacher.cache import TeacherCacheReader, finished_file, write_rows
from qskd.teacher.columns.table import ARRAYS, TeacherRow
from qskd.teacher.manifest import CacheManifest, CacheSizes, load_cache_manifest, save_cache_manifest


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("coco")
    return read_coco(*make_shapes(ShapesConfig(images=12), root))


def row(image_id: int) -> TeacherRow:
    rng = np.random.default_rng(image_id)
    return TeacherRow(
        image_id=image_id,
        logits=rng.normal(size=(1, 3, 2)).astype("<f2"),
        boxes_cxcywh=rng.uniform(size=(1, 3, 4)).astype("<f4"),
        memory_shapes=np.array([[2, 3]], "<i4"),
        memory=rng.integers(-9, 9, (4, 2, 3)).astype("|i1"),
        memory_scale=np.ones(4, "<f4"),
        attention_queries=np.array([0, 2], "<i4"),
        attention=rng.integers(0, 9, (2, 6)).astype("|u1"),
        attention_scale=np.ones(2, "<f4"),
    )


def test_the_best_student_of_a_run_is_kept_on_a_store(store: Any) -> None:
    folder = Folder(Config(name="it", output=store.uri))
    for step, ap in ((1, 0.2), (2, 0.4), (3, 0.3)):
        for name in ("config.json", "model.safetensors"):
            folder.write(f"train/checkpoint_{step}/student/{name}", f"of step {step}")
        report = {"step": step, "evaluation": {"AP": ap}}
        keep_best(folder, report, folder.filesystem, f"{folder.root}/train/checkpoint_{step}")
    assert read_best(folder) == Best(2, {"AP": 0.4})
    assert store.objects()["it/best/model.safetensors"] == b"of step 2"
    claim(folder, "train", "it")
    folder.write_record("config.yaml", "name: it")
    for step in (1, 2, 3):  # Ray's own list would name them
        folder.write(f"train/checkpoint_{step}/state.json", "{}")
    delete_run(folder)
    assert store.objects() == {}


def test_shards_on_a_store_are_those_on_a_disk(store: Any, dataset: Any, tmp_path: Path) -> None:
    here = write_shards(dataset, str(tmp_path / "shards"), rows_per_shard=5)
    there = write_shards(dataset, f"{store.uri}/data/shards", rows_per_shard=5)
    assert here.fingerprint == there.fingerprint == verify(f"{store.uri}/data/shards").fingerprint
    on_disk = {f"data/shards/{path.name}": path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    assert store.objects() == on_disk
    remote, local = ShardReader(f"{store.uri}/data/shards"), ShardReader(str(tmp_path / "shards"))
    for shard, rows in ((0, [4, 0]), (2, [1])):
        for ours, theirs in zip(remote.read(shard, rows), local.read(shard, rows), strict=True):
            assert (ours.image_id, ours.encoded) == (theirs.image_id, theirs.encoded)
    for name, values in read_annotations(f"{store.uri}/data/shards").items():
        np.testing.assert_array_equal(values, read_annotations(str(tmp_path / "shards"))[name])


def test_a_cache_on_a_store_is_that_on_a_disk(store: Any, tmp_path: Path) -> None:
    rows = [row(number) for number in range(7)]
    for uri in (f"{store.uri}/cache", str(tmp_path / "cache")):
        manifest = CacheManifest({"teacher.cache.precision": "int8"}, CacheSizes(1, 3, 2, (4,)), 4, ("shard-0",), {})
        assert load_cache_manifest(uri) is None
        _, size = write_rows(uri, "shard-0.view-000.parquet", rows, manifest.fingerprint)
        assert finished_file(uri, "shard-0.view-000.parquet", 7, manifest.fingerprint) == size
        assert finished_file(uri, "shard-0.view-000.parquet", 7, "another") is None
        assert finished_file(uri, "shard-0.view-001.parquet", 7, manifest.fingerprint) is None
        save_cache_manifest(uri, manifest)
        save_cache_manifest(uri, manifest.with_view(0, ((7, size),)))
        found = TeacherCacheReader(uri).read(0, 0, [6, 2])
        assert [entry.image_id for entry in found] == [6, 2]
        for name in ARRAYS:
            np.testing.assert_array_equal(
                getattr(found[1], name),
                getattr(rows[2], name).reshape(-1) if name == "memory" else getattr(rows[2], name),
            )
    here = {f"cache/{path.name}": path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert store.objects() == here
    clean(f"{store.uri}/cache", everything=True)
    clean(f"{store.uri}/nothing")
    assert store.objects() == {}


def test_a_runs_folder_works_on_a_store(store: Any, tmp_path: Path) -> None:
    folder = Folder(Config(name="one", output=f"{store.uri}/runs"))
    assert not folder.exists()
    assert not folder.exists("config.yaml")
    folder.write("config.yaml", "first")
    folder.write("config.yaml", "second")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(b"weights")
    folder.upload(tmp_path / "student", "student")
    assert store.objects() == {"runs/one/config.yaml": b"second", "runs/one/student/model.safetensors": b"weights"}
    assert folder.exists()
    assert folder.read("config.yaml") == "second"
    folder.delete("config.yaml")
    folder.delete("config.yaml")
    assert not folder.exists("config.yaml")
    claim(folder, "train", "one")
    folder.write("student/notes.txt", "a stranger's")
    with pytest.raises(QskdError, match=r"student/notes\.txt"):
        delete_run(folder)
    assert store.objects()["runs/one/student/notes.txt"] == b"a stranger's"
    assert len(store.objects()) == 3
    folder.delete("student/notes.txt")
    delete_run(folder)
    assert store.objects() == {}


def test_who_may_write_below_one_folder_alone_can_and_no_object_stands_for_a_folder(
    store: Any, dataset: Any, tmp_path: Path
) -> None:
    inside, bucket = f"{store.uri}/team/qskd", store.uri.removeprefix("s3://")

    def outside(request: str) -> bool:
        method, path = request.split(" ", 1)
        return method in ("PUT", "POST", "DELETE") and not path.startswith(f"/{bucket}/team/qskd/")

    store.fail(1000, status=403, matches=outside)
    del store.asked[:]
    write_shards(dataset, f"{inside}/shards")
    write_rows(f"{inside}/cache", "a.parquet", [row(0)], "f")
    folder = Folder(Config(name="one", output=f"{inside}/runs"))
    folder.write("records/a.json", "{}")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(b"weights")
    folder.upload(tmp_path / "student", "student")
    assert not [request for request in store.asked if request.endswith("/")]
    # Ray makes a run's folders itself, after qskd's first file.
    ray_s = folder.for_ray()
    ray_s["storage_filesystem"].create_dir(f"{ray_s['storage_path']}/one/train/checkpoint_1")
    pickle.loads(pickle.dumps(ray_s["storage_filesystem"])).create_dir(f"{folder.root}/train/checkpoint_2")
    assert store.failed() == []
    assert folder.exists("train/checkpoint_2")
    folder.delete("records/a.json")
    assert len(ShardReader(f"{inside}/shards").read(0, range(12))) == 12


def test_a_student_on_a_store_is_evaluated_as_on_a_disk(store: Any, dataset: Any, tmp_path: Path) -> None:
    write_shards(dataset, f"{store.uri}/val")
    labels = load_manifest(f"{store.uri}/val").labels
    config = recipe().student
    save_detector(silent_student(config, labels, 0), tmp_path / "student", config.resize)
    Folder(Config(name="one", output=store.uri)).upload(tmp_path / "student", "student")
    there = evaluate(f"{store.uri}/one/student", f"{store.uri}/val", workers=0)
    assert there == evaluate(str(tmp_path / "student"), f"{store.uri}/val", workers=0)
    asked = ["evaluate", f"{store.uri}/one/student", f"{store.uri}/val", "--dry-run"]
    foreseen = CliRunner().invoke(app, asked, catch_exceptions=False).output
    assert foreseen.startswith(
        f"{store.uri}/one/student on 12 images of {store.uri}/val, resized: mode='square' size=64"
    )
    with pytest.raises(QskdError, match=r"nothing: can't be read"):
        evaluate(f"{store.uri}/nothing", f"{store.uri}/val", workers=0)


def test_a_store_that_fails_now_and_then_is_tried_again(store: Any, dataset: Any) -> None:
    uri = f"{store.uri}/shards"
    for method in ("HEAD", "GET", "PUT", "POST"):
        store.fail(1, matches=lambda request, method=method: request.startswith(method))
        write_shards(dataset, uri)
        assert len(ShardReader(uri).read(0, range(12))) == 12
        assert len(store.failed()) == 1


def test_an_outage_longer_than_pyarrows_own_tries_is_waited_out_and_said(
    store: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PATIENCE, "60")
    uri = f"{store.uri}/shards"
    write_shards(dataset, uri)
    store.fail(36)  # pyarrow's client asks five times a second, for six seconds
    with caplog.at_level(logging.WARNING, "qskd"):
        assert ShardReader(uri).manifest.num_images == 12
    assert len(store.failed()) == 36
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert f"{uri}/manifest.json" in said[0]
    assert "trying again for up to 60 s" in said[0]
    assert "answered at try 2" in said[1]


def test_a_store_that_keeps_failing_is_named_after_the_limit(
    store: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{store.uri}/shards"
    manifest = write_shards(dataset, uri)
    reader = ShardReader(uri)
    name = manifest.shards[0].file
    write_rows(uri, "a.parquet", [row(0)], "f")
    monkeypatch.setenv(PATIENCE, "0")
    asked = {
        name: lambda: reader.read(0, [0]),
        "a.parquet": lambda: finished_file(uri, "a.parquet", 1, "f"),  # silence must not pass for absence
    }
    store.fail(1000)
    with ThreadPoolExecutor(2) as pool:
        answers = {where: pool.submit(request) for where, request in asked.items()}
    for where, answer in answers.items():
        with pytest.raises(QskdError, match=r"the store failed \d+ time.*(503|SLOW_DOWN)") as caught:
            answer.result()
        assert caught.value.where == f"{uri}/{where}"
        assert PATIENCE in caught.value.remedy


def test_a_refusal_is_not_tried_again(store: Any) -> None:
    publish_bytes(b"secret", *open_folder(f"{store.uri}/file"))
    store.fail(1000, status=403)
    with pytest.raises(OSError, match="ACCESS_DENIED"):
        files.read_bytes(*open_folder(f"{store.uri}/file"))
    assert len(store.failed()) == 1
    with pytest.raises(QskdError, match=r"can.t be read.*ACCESS_DENIED"):
        ShardReader(store.uri)
    store.fail(0)
    with pytest.raises(QskdError, match="no such file"):
        ShardReader(f"{store.uri}/nothing")
    with pytest.raises(OSError, match=r"(?i)bucket"):
        publish_bytes(b"", *open_folder("s3://no-such-bucket-here/file"))


def test_the_doctor_tries_a_store(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_storage(f"{store.uri}/runs").status == "ok"
    assert store.objects() == {}
    missing = check_storage("s3://no-such-bucket-here/runs")
    assert missing.status == "problem"
    assert "no-such-bucket-here" in missing.found
    monkeypatch.setenv(PATIENCE, "0")
    store.fail(1000, status=403)
    assert "ACCESS_DENIED" in check_storage(f"{store.uri}/runs").found


def test_the_address_may_be_in_the_uri_but_no_password(server: ObjectStore, store: Any) -> None:
    host = server.url.removeprefix("http://").replace(":", "%3A")
    uri = f"{store.uri}/a?endpoint_override={host}&scheme=http&region=us-east-1"
    folder = Folder(Config(name="run", output=uri))
    folder.write("file", "text")
    assert folder.where("file") == f"{store.uri}/a/run/file?{uri.partition('?')[2]}"
    assert store.objects() == {"a/run/file": b"text"}
    with pytest.raises(QskdError, match="a URI with a password") as caught:
        open_folder("s3://key:hunter2@bucket/a")
    assert "hunter2" not in str(caught.value)
    assert check_storage("s3://key:hunter2@bucket/a").status == "problem"
    assert "hunter2" not in check_storage("s3://key:hunter2@bucket/a").found
