"""Folders as workers find them, and those that may not be the same: what a verb writes, and may one day delete, apart from all
that it reads."""

from __future__ import annotations

import os

from pipelines.cluster.environment import in_a_job
from pipelines.run.folder import storage_path
from qskd.config import Config
from qskd.errors import QskdError
from qskd.redaction import redacted
from qskd.storage.places import relation_of
from qskd.storage.stores import join
from qskd.teacher.several.members import paths_of


def for_workers(path: str) -> str:
    """A path as processes of a cluster find it: whole, for their working folder is where their node was started. In a job it stays:
    they have a copy of this folder. So does what is no file here, as a Hub's name."""
    here = os.path.expanduser(path)
    return path if in_a_job() or "://" in path or not os.path.exists(here) else os.path.abspath(here)


def check_places(config: Config, verb: str) -> None:
    """QskdError where what a verb writes (OUTPUT/NAME; the cache) is, contains or lies in what it reads, and where OUTPUT/NAME
    is or contains the working folder or the home. Links are followed; URIs are compared as text."""
    init, backbone = config.student.init, config.student.backbone.init
    read = {"data.train": config.data.train, "data.val": config.data.val}
    read |= {f"data.unlabeled[{number}]": path for number, path in enumerate(config.data.unlabeled)}
    read |= {f"data.selection[{number}]": path for number, path in enumerate(config.data.selection)}
    models = {"student.init": init, "student.backbone.init": backbone}
    models |= paths_of(config)
    models["card.baseline"] = config.card.baseline
    read |= {field: path for field, path in models.items() if os.path.isdir(os.path.expanduser(path)) or "://" in path}
    run = join(storage_path(config), config.name)  # no store is asked
    if verb != "cache":
        for field, path in {**read, "teacher.cache.path": config.teacher.cache.path}.items():
            _check_apart("output/name", run, field, path, "--set name=... or --set output=...")
        for what, path in {"the working folder": os.getcwd(), "the home folder": os.path.expanduser("~")}.items():
            if "://" not in run and (relation := relation_of(run, path)) in ("is", "contains"):
                raise QskdError(
                    "output/name",
                    f"{run} {relation} {what}",
                    "a folder of its own",
                    "--set name=... or --set output=...",
                )
    if config.teacher.cache.path:
        for field, path in {**read, "output/name": run}.items():
            _check_apart(
                "teacher.cache.path", config.teacher.cache.path, field, path, "--set teacher.cache.path=ANOTHER"
            )


def _check_apart(field: str, path: str, other_field: str, other: str, remedy: str) -> None:
    if other and (relation := relation_of(path, other)):
        found = f"{redacted(path)} {relation} {other_field}"
        found += "" if relation == "is" else f" ({redacted(other)})"
        raise QskdError(
            field, found, "a folder of its own: what is written there, or deleted, is not to touch the other", remedy
        )
