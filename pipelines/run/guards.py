"""Who may write to a run's folder: one program at a time, the same run, the same data."""

from __future__ import annotations

import fcntl
import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pipelines.run.folder import MARK, RECIPE, TRIAL, Folder
from qskd.config import Config
from qskd.config.distillation import NONE
from qskd.config.recipe import defaults_like, flatten, replace_fields, to_tree
from qskd.errors import QskdError, writing
from qskd.storage.stores import is_local

log = logging.getLogger("qskd")
C = TypeVar("C", bound=Config)
# What may differ between a run and its continuation: where, how fast and what is said of it, not what is done.
FREE_TO_CHANGE = ("compute.", "tracking.", "card.", "output")
# Fields whose null stands for the family's own value, or the method's, and what a run did that was begun before they, or those
# values, were there.
BEGUN_BEFORE = {
    "data.views.derived": "none",
    "student.dropout": 0.0,
    "student.frozen_stages": 0,
    "training.sampling_learning_rate_scale": 1.0,
    "training.undecayed": "nothing",
    "detection.denoising_queries": 0,
    "detection.fgl_weight": 0.0,
    "detection.ddf_weight": 0.0,
    "detection.query_groups": 1,
    "training.backbone_layer_decay": 1.0,
    "student.quantization.rest_from": 0.0,
    "distillation.features.whitening": 0.0,
}
DATA = "data.json"  # fingerprints of the shards that a run was begun on


def check_no_trial(folder: Folder) -> None:
    """QskdError where a trial of a sweep is: another program there would train on in it, or replace its student. The
    configuration that a trial's MLflow run has names that folder."""
    if not folder.exists(TRIAL):
        return
    remedy = "choose another folder: --set name=... --set output=..."
    if folder.exists(RECIPE):
        remedy = f"its recipe as a run of its own is {folder.where(RECIPE)}; or {remedy}"
    raise QskdError(folder.path, "holds a trial of a sweep", "a folder of its own", remedy)


@contextmanager
def alone_on(folder: Folder) -> Iterator[None]:
    """One driver at a time: two would delete each other's checkpoints and mix their records. QskdError when another, on a
    machine that shares this file system, is at work; object stores have no locks, and the system lets a dead driver's go."""
    if not is_local(folder.filesystem):
        yield
        return
    path = Path(folder.root)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.with_name(f".{path.name}.lock").open("a")  # beside it: --restart deletes the folder
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, end it, or choose another name: --set name=..."
            raise QskdError(folder.path, "another program works on it now", "one at a time", remedy) from None
        except OSError:
            log.warning("%s: its file system has no locks; see that no other program works on it", folder.path)
        yield


def _what_counts(tree: dict[str, Any]) -> dict[str, Any]:
    """Without the settings of a distillation that does not happen: runs of before have them in their records."""
    section = tree.get("distillation")
    none = isinstance(section, dict) and section.get("method") == NONE
    return {**tree, "distillation": {"method": NONE}} if none else tree


def _recorded(folder: Folder) -> dict[str, Any]:
    """A run's configuration as a tree."""
    remedy = f"rm {folder.where('config.yaml')}: then the recipe at hand is taken for this run's, and not compared"
    tree: dict[str, Any] = folder.read_record("config.yaml", remedy=remedy)
    return tree


def as_begun(folder: Folder, config: C) -> C:
    """The configuration of a run that goes on: where the recipe leaves a value open (null), the run keeps what it was begun with.
    So one of before these fields trains on with the views, the dropout, the layers and the parameter groups of then."""
    if not folder.exists("config.yaml"):
        return config
    before, now = flatten(_recorded(folder)), flatten(to_tree(config))
    kept = {name: before.get(name, old) for name, old in BEGUN_BEFORE.items() if now.get(name, "") is None}
    kept = {name: value for name, value in kept.items() if value is not None}
    if not kept:
        return config
    said = ", ".join(f"{name} {value}" for name, value in kept.items())
    log.warning("%s goes on with what it was begun with, where the recipe says nothing: %s", folder.path, said)
    return replace_fields(config, kept, folder.where("config.yaml"))


def check_same_run(folder: Folder, config: Config) -> None:
    """Refuse to continue a run with another configuration, naming the fields that differ."""
    if not folder.exists("config.yaml"):
        return
    trees = _recorded(folder), to_tree(config), defaults_like(config)
    before, now, usual = (flatten(_what_counts(tree)) for tree in trees)
    # A field that the qskd which began the run did not have yet did what its default does now, or what is known of then.
    before = {key: BEGUN_BEFORE.get(key, value) for key, value in usual.items() if key in now} | before
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise QskdError(
            folder.path,
            f"holds a run with another configuration: {'; '.join(changed)}",
            "the same configuration, to go on with it",
            "choose another name (--set name=...), or add --restart, which deletes that run: its records, checkpoints and student",
        )


def check_same_data(folder: Folder, data: Mapping[str, str]) -> None:
    """Refuse to continue a run on other data than it was begun on. data: fingerprint by field, of `Manifest`."""
    if not folder.exists(DATA):
        folder.write_record(DATA, json.dumps(dict(data), indent=1))
        return
    remedy = f"if the shards are the same as then: rm {folder.where(DATA)}, and they are taken for the run's"
    before = folder.read_record(DATA, remedy=remedy)
    changed = [name for name, fingerprint in data.items() if before.get(name) != fingerprint]
    if changed:
        raise QskdError(
            folder.path,
            f"was begun on other data: {' and '.join(changed)} changed since (the shards were made anew)",
            "the same images and annotations, to go on with it",
            "choose another name (--set name=...), or add --restart, which deletes that run: its records, checkpoints and student",
        )


def check_is_the_drivers(folder: Folder) -> None:
    """For a worker, which may be on another node: QskdError where its folder is not the one that the driver has marked."""
    if not (folder.exists(MARK) or folder.exists(TRIAL)):
        error = QskdError(
            folder.path,
            f"on {socket.gethostname()} the driver's folder is not there",
            "a folder that all nodes see",
            "--set output=s3://BUCKET/runs, or a path on a disk that all nodes share",
        )
        error.of_machine = True  # another node may see it
        raise error
