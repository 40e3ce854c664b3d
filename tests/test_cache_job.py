"""The cache job on a real Ray: complete, continued after a kill to the same bytes, read by a training."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
from forked import command_of, processes_of_ray
from test_pipelines import SIZES, cluster, killing, without_ray, work  # noqa: F401  (fixtures)
from test_unlabeled_shards import draw

from pipelines.caching import driver as cache_teacher
from pipelines.caching.actors import TeacherActor
from pipelines.caching.driver import foresee, run
from pipelines.caching.plan import CachePlan
from pipelines.caching.verify import complain, verify
from pipelines.cluster.room import actors_that_fit
from pipelines.prepare import prepare
from pipelines.run.folder import MARK, Folder
from pipelines.run.guards import check_is_the_drivers
from pipelines.training import driver as distill
from qskd.config import Config
from qskd.config.recipe import load, to_tree, to_yaml
from qskd.errors import QskdError
from qskd.teacher.cache import TeacherCacheReader
from qskd.teacher.manifest import load_cache_manifest, save_cache_manifest

pytestmark = pytest.mark.slow


def config(work: Path, name: str, *overrides: str) -> Config:  # noqa: F811
    fixed = [
        f"name={name}",
        f"output={work}/runs",
        f"data.train={work}/train",
        f"data.val={work}/val",
        "data.views.count=2",
        "data.views.crop_probability=0.5",
        f"teacher.path={work}/teacher",
        f"teacher.cache.path={work}/cache",
        "teacher.cache.attention_giou_floor=-0.5",
        f"tracking.uri=sqlite:///{work}/mlflow.db",
        "training.epochs=2",
    ]
    return load(None, [*SIZES, *fixed, *overrides])


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.is_file()
    }


@pytest.fixture(scope="module")
def cached(work: Path, cluster: str) -> dict[str, str]:  # noqa: F811
    """A cache that nothing disturbed, by file."""
    result = run(config(work, "whole"))
    assert (result.images, result.total) == (192, 192)
    return digests(work / "cache")


def test_the_job_leaves_a_file_for_each_shard_and_view_and_nothing_else(
    work: Path,  # noqa: F811
    cached: dict[str, str],
) -> None:
    files = [name for name in cached if name not in ("manifest.json", "directions.view-000.parquet")]
    assert len(files) == 6 == len(cached) - 2
    assert all(re.fullmatch(r"shard-0000[012]-[0-9a-f]{8}\.view-00[01]\.parquet", name) for name in files)
    reader = TeacherCacheReader(str(work / "cache"))
    assert sorted(reader.manifest.views) == [0, 1]
    assert [len(reader.read(shard, 1, range(rows))) for shard, rows in enumerate((40, 40, 16))] == [40, 40, 16]
    assert reader.manifest.num_bytes == sum((work / "cache" / name).stat().st_size for name in files)


def test_the_teacher_says_the_same_again(work: Path, cached: dict[str, str]) -> None:  # noqa: F811
    errors = verify(config(work, "verify"), 16)
    assert errors["boxes_cxcywh"] == 0
    assert 0 < errors["memory_relative"] < 0.51 / 127
    assert errors["attention_queries_missing"] == 0
    complain(config(work, "verify"), errors)
    with pytest.raises(QskdError, match=r"the teacher does not say again: boxes_cxcywh 0\.1"):
        complain(config(work, "verify"), errors | {"boxes_cxcywh": 0.1})


def test_a_finished_cache_is_not_computed_again(
    work: Path,  # noqa: F811
    cached: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (work / "cache").iterdir()}
    assert run(config(work, "again")).images == 0
    assert {path: path.stat().st_mtime_ns for path in (work / "cache").iterdir()} == before
    assert "nothing is missing" in foresee(config(work, "again"))


@pytest.mark.parametrize(
    ("there", "wanted", "each", "expected"),
    [(64, 8, 1, (8, 1)), (8, 8, 1, (7, 1)), (8, 4, 3, (2, 3)), (2, 1, 4, (1, 1)), (1, 3, 2, (1, 1)), (0, 8, 2, (8, 2))],
)
def test_of_all_cpus_at_least_one_stays_free_of_actors(
    there: int, wanted: int, each: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(there)})
    assert actors_that_fit(wanted, each) == expected


def test_a_job_that_ray_gives_up_on_is_begun_again_with_what_is_missing(
    work: Path,  # noqa: F811
    cached: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import ray

    folder, compute = tmp_path / "cache", cache_teacher._compute
    written: dict[Path, int] = {}
    gone = ray.exceptions.ActorUnschedulableError("a helper of Ray Data's went with its node")

    def lose_the_rest_once(plan: CachePlan, *rest: Any) -> tuple[float, float]:
        if written:
            return compute(plan, *rest)
        for path in sorted((work / "cache").glob("*.view-000.parquet"))[:2]:  # as good as computed: the same bytes
            shutil.copy(path, folder)
        written.update({path: path.stat().st_mtime_ns for path in folder.glob("*.parquet")})
        raise gone

    monkeypatch.setattr(cache_teacher, "_compute", lose_the_rest_once)
    run(config(work, "given-up", f"teacher.cache.path={folder}"))
    assert len(written) == 2
    assert "begun again with what is missing" in caplog.text
    assert digests(folder) == cached
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize("kind", ["of Ray's", "of the code"])
def test_a_job_that_fails_again_and_again_ends_with_the_reason(
    kind: str,
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    error = (
        ray.exceptions.ActorUnschedulableError("gone")
        if kind == "of Ray's"
        else ray.exceptions.RayTaskError("decode", "", ValueError("gone"))
    )
    tries = []

    def fail(*_: Any) -> None:
        tries.append(kind)
        raise error

    monkeypatch.setattr(cache_teacher, "_compute", fail)
    with pytest.raises(ray.exceptions.RayError):
        run(config(work, "failing", f"teacher.cache.path={tmp_path / 'cache'}", "compute.max_failures=2"))
    assert len(tries) == (3 if kind == "of Ray's" else 1)


def kill_on_the_way(recipe: Path, folder: Path, cluster: str) -> dict[str, int]:  # noqa: F811
    """Begin the job, kill an actor of it after its first file, and the job after the next; what is left, with its times."""

    def files() -> set[Path]:
        return set(folder.glob("*.parquet"))

    with killing("TeacherActor", files) as victims:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cache_teacher", str(recipe)],
            env=os.environ | {"RAY_ADDRESS": cluster},
            start_new_session=True,
        )
        deadline = time.monotonic() + 400  # a busy machine takes minutes to start
        before: set[Path] = set()
        while not (victims and files() - before) and process.poll() is None and time.monotonic() < deadline:
            if not victims:
                before = files()
            time.sleep(0.02)
    assert victims
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=400)
    return {path.name: path.stat().st_mtime_ns for path in files()}


def test_a_killed_job_one_of_whose_actors_died_goes_on_to_the_same_bytes(
    work: Path,  # noqa: F811
    cluster: str,  # noqa: F811
    cached: dict[str, str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "cache"
    killed = config(work, "killed", f"teacher.cache.path={folder}")
    (tmp_path / "killed.yaml").write_text(to_yaml(killed))
    kept = kill_on_the_way(tmp_path / "killed.yaml", folder, cluster)
    if len(kept) == 6:  # on a busy machine this process may come to look when all is done
        shutil.rmtree(folder)
        kept = kill_on_the_way(tmp_path / "killed.yaml", folder, cluster)
    assert 0 < len(kept) < 6
    result = run(killed)
    assert 0 < result.images < result.total
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert digests(folder) == cached


def test_training_from_the_cache_equals_training_with_the_teacher(
    work: Path,  # noqa: F811
    cached: dict[str, str],
) -> None:
    floor = "distillation.selection.boundaries=[0.3]"
    # Nobody knows ahead in which directions an online teacher's memory varies.
    alike = (floor, "distillation.features.whitening=0")
    # What Ray Data brings of a cache is looked at in test_ray_job: here it is the numbers, which a run's own cost would hide.
    from_cache, online = (without_ray(config(work, "equal", *alike, *more)) for more in ((), ("teacher.cache.path=",)))
    assert len(from_cache) == len(online) == 12
    for epoch in (slice(0, 6), slice(6, 12)):
        mine, theirs = from_cache[epoch], online[epoch]
        assert "loss/agfd" in mine[0]
        for name in theirs[0]:
            mean, expected = (float(np.mean([values[name] for values in steps])) for steps in (mine, theirs))
            assert mean == pytest.approx(expected, rel=0.02, abs=1e-3), name


def test_a_recipe_that_the_cache_does_not_fit_is_refused_before_anything_starts(
    work: Path,  # noqa: F811
    cached: dict[str, str],
    tmp_path: Path,
) -> None:
    for override, said in (
        ("data.views.seed=3", r"data\.views\.seed is 0 in the cache, 3 in the recipe"),
        ("data.views.count=3", r"no view 2\n"),
        ("distillation.selection.boundaries=[-0.7]", r"down to GIoU -0\.7\n"),
        (f"teacher.cache.path={tmp_path}/none", "no cache of teacher outputs"),
    ):
        with pytest.raises(QskdError, match=said):
            distill.run(config(work, "refused", override), "distill")
    assert digests(work / "cache") == cached


def test_another_cache_is_replaced_when_asked_and_views_are_added_without_computing_the_old_ones(
    work: Path,  # noqa: F811
    cluster: str,  # noqa: F811
    cached: dict[str, str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(work / "cache", folder)
    other = load_cache_manifest(str(folder))
    assert other is not None
    save_cache_manifest(str(folder), replace(other, identity={**other.identity, "data.views.seed": 3}))
    (folder / "notes.txt").write_text("mine")
    one, two = (config(work, "x", f"teacher.cache.path={folder}", f"data.views.count={n}") for n in (1, 2))
    with pytest.raises(QskdError, match=r"data\.views\.seed is 3 in the cache, 0 in the recipe"):
        run(one)
    assert run(one, overwrite=True).images == 96
    assert not list(folder.glob("*.view-001.parquet"))
    assert re.search(r"192 in all, 96 there already[\s\S]*about .* ms and", foresee(two))
    assert run(two).images == 96
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert digests(folder) == cached


def test_actors_that_want_every_cpu_leave_one_for_decoding_and_a_broken_picture_stops_the_job_with_its_name(
    work: Path,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    import ray

    everything = int(ray.cluster_resources()["CPU"])
    greedy = [f"compute.threads_per_worker={everything}", f"teacher.cache.path={tmp_path / 'cache'}"]
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (work / "train").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    victim = sorted(broken.glob("*.parquet"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    victim.write_bytes(bytes(data))
    with pytest.raises(QskdError, match=victim.name):
        run(config(work, "broken", f"data.train={broken}", *greedy))  # one that leaves none would wait for ever
    assert list((tmp_path / "cache").glob("*.parquet"))  # of the shard before it
    assert not list((tmp_path / "cache").glob(f"{victim.stem}*"))
    manifest = load_cache_manifest(str(tmp_path / "cache"))
    assert manifest is not None
    assert not manifest.views


def test_memory_along_few_directions_is_kept_in_one_basis_however_often_the_job_is_begun(
    work: Path,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(draw(tmp_path / "pool", 5), None, str(tmp_path / "free"), quiet=True, unlabeled=True)
    small = config(
        work,
        "small",
        *(f"teacher.cache.path={tmp_path / 'cache'}", "teacher.cache.memory_share=0.9", "data.views.count=1"),
        *(f"data.unlabeled=[{tmp_path / 'free'}]", "teacher.cache.attention_giou_floor=-1.0"),
    )
    assert "kB an image" in foresee(small)
    run(small)
    assert "that hold 0.9 of its variance: " in capsys.readouterr().out
    (free,) = (tmp_path / "cache").glob("unlabeled-*")
    whole, others = digests(tmp_path / "cache"), digests(free)
    manifests = [load_cache_manifest(str(folder)) for folder in (tmp_path / "cache", free)]
    assert all(each is not None and each.sizes.kept and each.sizes.kept < each.sizes.channels for each in manifests)
    assert len({each.identity["computed.memory_basis"] for each in manifests if each is not None}) == 1
    complain(small, verify(small, 8))
    sorted((tmp_path / "cache").glob("shard*.parquet"))[1].unlink()
    shutil.rmtree(free)
    run(small)
    assert (digests(tmp_path / "cache"), digests(free)) == (whole, others)
    (tmp_path / "cache" / "basis.view-000.parquet").unlink()
    with pytest.raises(QskdError, match=r"basis\.view-000\.parquet: not there"):
        distill.run(small, "distill")
    run(small, overwrite=True)
    assert (digests(tmp_path / "cache"), digests(free)) == (whole, others)
    whole_plan = (
        distill.make_plan
    )  # trained from without Ray, with rows shared as by Ray's readers, who bring the same arrays

    def shared(config: Config, kind: str) -> distill.Plan:
        made = whole_plan(config, kind)
        return replace(made, stream=replace(made.stream, share_rows=True))

    monkeypatch.setattr(distill, "make_plan", shared)
    assert all(step["loss/agfd"] > 0 for step in without_ray(small, 7))


def test_images_that_come_first_in_the_recipe_later_are_cached_in_the_basis_that_is_there(
    work: Path,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    for name, count in (("old", 4), ("new", 5)):
        prepare(draw(tmp_path / f"{name}-pool", count), None, str(tmp_path / name), quiet=True, unlabeled=True)

    def bare(*folders: str) -> Config:
        fields = (f"teacher.cache.path={tmp_path / 'cache'}", "teacher.cache.memory_share=0.9", "data.views.count=1")
        free = ",".join(str(tmp_path / folder) for folder in folders)
        floor = "teacher.cache.attention_giou_floor=-1.0"
        return config(work, "bare", *fields, "data.train=", f"data.unlabeled=[{free}]", floor)

    assert run(bare("old")).images == 4
    (old,) = (tmp_path / "cache").iterdir()
    before = digests(old)
    assert run(bare("new", "old")).images == 5
    assert digests(old) == before
    manifests = [load_cache_manifest(str(folder)) for folder in (tmp_path / "cache").iterdir()]
    assert len({each.identity["computed.memory_basis"] for each in manifests if each is not None}) == 1 < len(manifests)


@pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")
def test_a_worker_of_the_tests_ray_is_forked_and_has_what_ray_started_it_with(cluster: str) -> None:  # noqa: F811
    import ray

    def look() -> tuple[int, list[str], dict[str, str], str]:
        return os.getppid(), sys.argv, dict(os.environ), os.getcwd()

    asked = ray.remote(look).options(runtime_env={"env_vars": {"RAY_ONE_OF_ITS_OWN": "1"}})
    parent, words, environment, folder = ray.get(asked.remote())
    assert any("fork_server.py" in word for word in psutil.Process(parent).cmdline())
    (started,) = [process for process in processes_of_ray() if command_of(process)[1:] == words]  # it waits
    given = started.environ()
    given.pop("PYTHONBREAKPOINT", None)  # of the driver; Ray gives its workers another
    assert given.items() <= environment.items()
    assert (environment["RAY_ONE_OF_ITS_OWN"], folder) == ("1", started.cwd())


@pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")
def test_forked_workers_draw_ids_of_their_own(cluster: str) -> None:  # noqa: F811
    """Else one's objects are another's: Ray knows them by ids that a process draws."""
    import ray

    @ray.remote(num_cpus=0)
    class Drawing:
        def ids(self) -> tuple[int, list[str]]:
            drawn = [ray.UniqueID.from_random().hex()]
            thread = threading.Thread(target=lambda: drawn.append(ray.UniqueID.from_random().hex()))
            thread.start()
            thread.join()
            return os.getppid(), drawn

    found = ray.get([each.ids.remote() for each in [Drawing.remote() for _ in range(2)]])
    parents = {parent for parent, _ in found}
    assert len(parents) == 1
    assert any("fork_server.py" in word for word in psutil.Process(parents.pop()).cmdline())
    assert len({each for _, drawn in found for each in drawn}) == 4


def test_an_actor_whose_node_has_another_folder_says_so_before_it_computes(
    work: Path,  # noqa: F811
    cluster: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Else its files would lie on its own disk, and the driver would enter them as finished."""
    asked = config(work, "elsewhere", f"teacher.cache.path={tmp_path}/never-begun")
    actor = TeacherActor(to_tree(asked), "of the driver's cache", 4)
    (answer,) = actor(pa.table({"shard": [0], "view": [0]}))
    with pytest.raises(QskdError, match=r"never-begun: on .* the cache that the driver has begun is not there"):
        raise QskdError.from_json(answer["failure"][0].as_py())
    assert not (tmp_path / "never-begun").exists()


def test_an_actor_whose_node_has_another_teacher_of_that_name_says_so(
    work: Path,  # noqa: F811
    cached: dict[str, str],
    tmp_path: Path,
) -> None:
    asked = config(work, "own", f"teacher.cache.path={tmp_path}/cache")
    begun = load_cache_manifest(f"{work}/cache")
    assert begun is not None
    (name,) = (
        key for key in begun.identity if key.startswith("teacher.") and "weights" in key and key.endswith("sha256")
    )
    of_another = replace(begun, identity={**begun.identity, name: "0" * 64})
    save_cache_manifest(f"{tmp_path}/cache", of_another)
    (answer,) = TeacherActor(to_tree(asked), of_another.fingerprint, 4)(pa.table({"shard": [0], "view": [0]}))
    assert name in str(QskdError.from_json(answer["failure"][0].as_py()))


def test_a_worker_whose_node_has_another_folder_says_so_before_it_trains(work: Path) -> None:  # noqa: F811
    folder = Folder(config(work, "nowhere"))
    with pytest.raises(QskdError, match="the driver's folder is not there"):
        check_is_the_drivers(folder)
    folder.write(MARK, "{}")
    check_is_the_drivers(folder)
