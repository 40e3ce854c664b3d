"""What is there after a run, and how it differs from what an undisturbed one leaves."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from benchmarks.chaos.cluster import Cluster, marked, title
from qskd.config import Config
from qskd.datasets.manifest import MANIFEST
from qskd.storage.files import read_bytes
from qskd.storage.places import open_folder
from qskd.teacher.manifest import load_cache_manifest

PATIENCE_S = 30.0  # for processes that are about to go
LOST_CLUSTER_PATIENCE_S = 120.0  # a raylet looks for its lost GCS for a minute
# Detached actors of Ray Data's, one a cluster, which stay while it does.
OF_RAY = tuple(
    f"ray::{name}"
    for name in ("IDLE", "_StatsActor", "_AutoscalingCoordinatorActor", "_UsageCollectionActor", "ActorLocationTracker")
)
METRICS = {"distill": ("loss/total", "val/AP"), "tune": ("loss/total", "val/AP")}


@dataclass(frozen=True)
class Left:
    """What a run left behind. content: name -> sha256 of what must be the same to the last bit. files: names of all
    files, numbered or dated ones made alike, with how many there are. mlflow: see `runs_of`."""

    content: dict[str, str]
    files: dict[str, int]
    mlflow: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"content": self.content, "files": self.files, "mlflow": self.mlflow}


def names_below(uri: str) -> list[str]:
    """Every file of a folder, relative to it."""
    filesystem, root = open_folder(uri)
    found = filesystem.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    return sorted(info.path[len(root) :].lstrip("/") for info in found if info.type == pafs.FileType.File)


def whole_files(uri: str) -> dict[str, tuple[int, Any]]:
    """The finished files of a cache, with what changes when one is written again."""
    filesystem, root = open_folder(uri)
    found = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
    return {info.base_name: (info.size, info.mtime_ns) for info in found if info.base_name.endswith(".parquet")}


def folder_of(verb: str, config: Config) -> str:
    return config.teacher.cache.path if verb == "cache" else f"{config.output}/{config.name}"


def look(verb: str, config: Config) -> Left:
    """At a run that has ended."""
    uri = folder_of(verb, config)
    filesystem, root = open_folder(uri)
    names = names_below(uri)
    if verb == "cache":
        kept = [name for name in names if name.endswith(".parquet") or name == MANIFEST]
    else:
        kept = [name for name in names if re.fullmatch(r"(trials/\d+/)?student/model\.safetensors", name)]
    content = {name: _digest(name, read_bytes(filesystem, f"{root}/{name}")) for name in kept}
    if verb == "tune":
        content |= {name: outcome(read_bytes(filesystem, f"{root}/{name}")) for name in names if "/trial.json" in name}
    mlflow = {} if verb == "cache" else runs_of(config, verb)
    # A file of rows a report: a notice of a node that goes away makes a report more.
    names = [name for name in names if not re.search(r"(^|/)rows/\d+\.json$", name)]
    return Left(content, dict(sorted(Counter(map(alike, names)).items())), mlflow)


def outcome(trial: bytes) -> str:
    """Of a sweep's row, what may not depend on when anything was killed."""
    row = json.loads(trial)
    same = ("number", "state", "parameters", "overrides", "curve", "metrics", "reason")
    return hashlib.sha256(json.dumps({name: row[name] for name in same}, sort_keys=True).encode()).hexdigest()


def alike(name: str) -> str:
    """Without the times in names."""
    return re.sub(r"checkpoint_\d{4}-[\d_.-]+\d", "checkpoint_TIME", name)


def runs_of(config: Config, verb: str) -> dict[str, Any]:
    """The MLflow runs of a name: ids and states of those at the top, the same of trials by number, and for each run the
    steps at which its metrics were written."""
    import mlflow

    client = mlflow.MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        return {"top": [], "trials": {}, "steps": {}}
    top = client.search_runs([experiment.experiment_id], f"tags.`qskd.name` = '{config.name}'", max_results=100)
    found: dict[str, Any] = {"top": [[run.info.run_id, run.info.status] for run in top], "trials": {}, "steps": {}}
    runs = {"": top[0].info.run_id} if top and verb == "distill" else {}
    for parent in top:
        below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        for run in client.search_runs([experiment.experiment_id], below, max_results=1000):
            number = run.data.tags["qskd.trial"]
            found["trials"].setdefault(number, []).append([run.info.run_id, run.info.status])
            runs[number] = run.info.run_id
    for number, run_id in sorted(runs.items()):
        for metric in METRICS[verb]:
            found["steps"][f"{number} {metric}".strip()] = sorted(
                entry.step for entry in client.get_metric_history(run_id, metric)
            )
    return found


def _digest(name: str, content: bytes) -> str:
    """A cache's manifest says what the recipe called teacher and data, which is another address where they are in a store."""
    if name == "manifest.json":
        content = json.dumps({key: value for key, value in json.loads(content).items() if key != "made_with"}).encode()
    return hashlib.sha256(content).hexdigest()


def compare_content(expected: Left, found: Left) -> str:
    """ "" or in words how the results differ."""
    wrong = [f"no {name}" for name in sorted(expected.content.keys() - found.content.keys())]
    wrong += [
        f"{name} has other bytes" for name, sha in expected.content.items() if found.content.get(name, sha) != sha
    ]
    return "; ".join(wrong)


def compare_files(expected: Left, found: Left, scratch: Sequence[str]) -> str:
    """ "" or what lies about: in the run's folder, or in the folder for temporary files."""
    wrong = [
        f"{found.files.get(name, 0)} {name} instead of {expected.files.get(name, 0)}"
        for name in sorted(expected.files.keys() | found.files.keys())
        if expected.files.get(name, 0) != found.files.get(name, 0)
    ]
    return "; ".join([*wrong, *(f"temporary: {name}" for name in scratch)])


def check_once(config: Config, before: Mapping[str, Any]) -> str:
    """Whether a cache has each image and view exactly once, and kept the files that were whole when the fault came."""
    uri = config.teacher.cache.path
    manifest = load_cache_manifest(uri)
    if manifest is None:
        return "no manifest"
    filesystem, root = open_folder(uri)
    now = whole_files(uri)
    seen: Counter[tuple[str, int]] = Counter()
    for name in now:
        with filesystem.open_input_file(f"{root}/{name}") as stream:
            ids = pq.read_table(stream, columns=["image_id"])["image_id"].to_pylist()
        seen.update((name.rpartition(".view-")[2], image) for image in ids)
    said = sum(rows for files in manifest.views.values() for rows, _ in files)
    wrong = [f"image {image} of {view} {times} times" for (view, image), times in seen.items() if times != 1]
    if len(seen) != said:
        wrong.append(f"{len(seen)} images and views, {said} by the manifest")
    wrong += [
        f"{name} was there before the fault and was written again"
        for name, was in before.items()
        if now.get(name) != was
    ]
    return "; ".join(wrong)


def check_mlflow(expected: Left, found: Left, first_id: str, told_id: str) -> str:
    """first_id: the run that was there when the fault came ("" when there was none). told_id: that of the run's files."""
    mine, theirs, wrong = found.mlflow, expected.mlflow, []
    if len(mine["top"]) != 1 or mine["top"][0][1] != "FINISHED":
        wrong.append(f"runs {[status for _, status in mine['top']]} instead of one FINISHED")
    elif told_id != mine["top"][0][0] or first_id not in ("", told_id):
        wrong.append("another run id than before the fault")
    trials = {number: [status for _, status in runs] for number, runs in mine["trials"].items()}
    wanted = {number: [status for _, status in runs] for number, runs in theirs["trials"].items()}
    wrong += [
        f"trial {number}: runs {trials.get(number, [])} instead of {wanted.get(number, [])}"
        for number in sorted(trials.keys() | wanted.keys())
        if trials.get(number) != wanted.get(number)
    ]
    wrong += [
        f"{name} at steps {mine['steps'].get(name, [])} instead of {steps}"
        for name, steps in theirs["steps"].items()
        if mine["steps"].get(name, []) != steps
    ]
    return "; ".join(wrong)


def at_work(cluster: Cluster, own: set[int]) -> list[str]:
    """Titles of processes with something in them that were not there before. Idle ones are Ray's to keep."""
    return [
        name for process in cluster.workers() if process.pid not in own and not (name := title(process)).startswith(OF_RAY)
    ]  # fmt: skip


def wait_until_none(found: Callable[[], list[str]], patience_s: float) -> list[str]:
    """What is still found after that time."""
    deadline = time.monotonic() + patience_s
    while (left := found()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def check_processes(cluster: Cluster, own: set[int], lost: Sequence[Cluster]) -> str:
    """ "" or what still runs: of the run on the cluster, or of the clusters whose head was killed."""
    wrong = [f"still at work: {name}" for name in wait_until_none(lambda: at_work(cluster, own), PATIENCE_S)]
    for gone in lost:
        mark = str(gone.folder)
        left = wait_until_none(lambda mark=mark: [title(p)[:60] for p in marked(mark)], LOST_CLUSTER_PATIENCE_S)  # type: ignore[misc]
        wrong += [f"of the lost cluster: {name}" for name in left]
    return "; ".join(wrong)


def temporary(folder: Path, dashboard: bool) -> set[str]:
    """What lies in the folder for temporary files, but for the sockets of Ray's dashboard, which are the cluster's."""
    return {path.name for path in folder.iterdir() if not (dashboard and is_of_a_dashboard(path))}


def is_of_a_dashboard(path: Path) -> bool:
    """Its forkserver's folder. Nothing of qskd's makes one: none was ever found on a cluster without a dashboard."""
    return path.name.startswith("pymp-")
