"""Whose a run's folder is: OUTPUT/NAME is written to, and deleted by --restart, only where qskd made it and nothing else is in it.

The folder is looked through to its last file, not at its top level alone: a listing costs an object store one request for a
thousand files, as deleting does, and notes are as easily lost in NAME/student as beside it.
"""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pyarrow import fs

from pipelines.run.best import RECORD as BEST_RECORD
from pipelines.run.files import CHECKPOINT_FILE, HALF_WRITTEN, STUDENT, files_in
from pipelines.run.folder import COPIES, FAILURE, MARK, RECIPE, SWEEP, TRIAL, Folder
from pipelines.run.guards import DATA
from pipelines.run.history import NAME as HISTORY
from pipelines.run.tracked import RUN
from pipelines.tracking.curves import ROWS
from pipelines.training.checkpoint_list import COPY, LIST, TRAIN
from qskd import __version__
from qskd.errors import QskdError
from qskd.storage.files import UNFINISHED
from qskd.storage.models import BEST
from qskd.storage.ownership import STUDENT_FILE, listed, own_json
from qskd.storage.stores import is_local, patiently
from qskd.untrusted import parse_yaml

# --- what a run, a sweep and a trial leave: paths in the folder -----------------------------------------------------------
_TRAINING = (
    rf"{re.escape(LIST)}|{TRAIN}/\.validate_storage_marker|{TRAIN}/checkpoint_[^/]+/(?:{CHECKPOINT_FILE.pattern})"
)
_RECORDS = "|".join(map(re.escape, (HISTORY, RUN, FAILURE, COPY)))
_BEST = rf"{re.escape(BEST_RECORD)}|{BEST}/(?:{STUDENT_FILE.pattern})"
_TRIAL = rf"{re.escape(TRIAL)}|{re.escape(RECIPE)}|checkpoint\.json|checkpoints/\d{{9}}/(?:{CHECKPOINT_FILE.pattern})"
_EVALUATION = (
    r"evaluation/(?:evaluation\.json|per_class\.csv|precision_recall\.png|thresholds\.png|classes\.png|confusion\.png)"
)
_REPORT = r"report/(?:index\.html|trials\.csv|trials\.md|best\.yaml|[a-z_]+\.(?:png|html))"
OWN = re.compile(
    rf"{re.escape(MARK)}|config\.yaml|{re.escape(DATA)}|result\.json|inheritance\.txt|{_EVALUATION}|{_RECORDS}|{STUDENT}|{_BEST}|{_TRAINING}|"
    rf"{re.escape(SWEEP)}|refused\.json|best\.yaml|{_REPORT}|"
    rf"trials/\d{{4,}}/(?:{_RECORDS}|{STUDENT}|{_TRAINING}|{_TRIAL})|"
    rf"(?:trials/\d{{4,}}/)?(?:{COPIES}/[\w.]+\.(?:json|yaml)|{ROWS}/[\w-]+\.json)|"
    rf"(?:trials/\d{{4,}}/)?(?:(?:student|{BEST}|{TRAIN}|report|evaluation|{COPIES}|{ROWS})/)?{HALF_WRITTEN}"
)
_OWN_FOLDERS = ("student", BEST, "evaluation", TRAIN, "report", "trials", COPIES, ROWS)
# What a later run would go on from: deleted first, so that a half deleted run is begun anew.
_FIRST = (Path(LIST).name, "checkpoint.json", TRIAL, "result.json", BEST_RECORD)


def foreign(names: list[str]) -> list[str]:
    """Those that no run, sweep or trial writes."""
    return [name for name in names if not OWN.fullmatch(name)]


def is_ours(folder: Folder) -> bool:
    """By the mark; of runs of before there was one, by two of their records that read as ours."""
    if folder.exists(MARK):
        return True
    return sum(_reads_as_ours(folder, name) for name in ("config.yaml", DATA, SWEEP, RUN, "result.json", HISTORY)) >= 2


def _reads_as_ours(folder: Folder, name: str) -> bool:
    if not folder.exists(name):
        return False
    try:
        text = folder.read(name)
        if name == "config.yaml":  # not built: its method may be a file, which would be run
            tree = parse_yaml(text, name)
            return isinstance(tree, dict) and {"name", "student", "teacher", "distillation", "training"} <= tree.keys()
    except (OSError, ValueError, QskdError):
        return False
    found = own_json(text)
    if name == HISTORY:
        return (
            isinstance(found, list)
            and bool(found)
            and all(isinstance(entry, dict) and {"step", "evaluation"} <= set(entry) for entry in found)
        )
    keys = {DATA: {"data.train"}, SWEEP: {"asked"}, RUN: {"uri", "run_id"}, "result.json": {"student", "metrics"}}[name]
    return isinstance(found, dict) and keys <= found.keys()


def check_ours(folder: Folder, restart: bool = False) -> None:
    """QskdError, before anything is written, where the folder holds what qskd did not make; with `restart` also where anything
    else is in it."""
    kind = patiently(folder.path, folder.filesystem, lambda: folder.filesystem.get_file_info(folder.root).type)
    remedy = "choose another folder: --set name=... --set output=...; nothing was written or deleted"
    if kind == fs.FileType.File:
        raise QskdError(folder.path, "a file", "a folder for the run", remedy)
    if kind == fs.FileType.NotFound and is_local(folder.filesystem):
        above = next(place for place in Path(folder.root).parents if os.path.lexists(place))
        if not above.is_dir():
            raise QskdError(folder.path, f"{above} is no folder", "a place for a folder", remedy)
        return
    if links := [name for name in _OWN_FOLDERS if folder.is_link(name)]:
        said = f"{listed(links)} in it leads elsewhere, by a link: the run would write there"
        raise QskdError(folder.path, said, "folders of the run's own", f"remove the link, or {remedy}")
    if not is_ours(folder):
        names = _top_level(folder)
        if names:
            said = f"a folder that qskd did not make, with {listed(names)} in it"
            raise QskdError(folder.path, said, "a new or an empty folder, or a run's", remedy)
        return
    if restart and (strange := foreign(files_in(folder))):
        raise QskdError(
            folder.path,
            f"--restart would delete the run, and there are files in its folder that are not of it: {listed(strange)}",
            "nothing but what the run wrote",
            f"move them away, or {remedy}",
        )


def _top_level(folder: Folder) -> list[str]:
    selector = fs.FileSelector(folder.root, allow_not_found=True)
    infos = patiently(folder.path, folder.filesystem, lambda: folder.filesystem.get_file_info(selector))
    return sorted(info.base_name for info in infos if not info.base_name.startswith(UNFINISHED))


def claim(folder: Folder, verb: str, name: str) -> None:
    """Write the mark, before all other files. `check_ours` goes before."""
    if not folder.exists(MARK):
        made = {"made by": "qskd", "version": __version__, "verb": verb, "name": name}
        folder.write(MARK, json.dumps(made, indent=1) + "\n")


def delete_run(folder: Folder) -> None:
    """What --restart does: delete the run's own files one by one, the mark last, then the folders that this left empty.
    QskdError, and nothing deleted, where the folder is not ours or has other files in it."""
    check_ours(folder, restart=True)
    names = [name for name in files_in(folder) if OWN.fullmatch(name) and name != MARK]
    first = [name for name in names if Path(name).name in _FIRST]
    with ThreadPoolExecutor(16) as pool:  # a store takes its time for each
        for group in (first, [name for name in names if name not in first]):
            list(pool.map(folder.delete, group))
    folder.delete(MARK)
    if is_local(folder.filesystem):
        _remove_empty(Path(folder.root), list(_OWN_FOLDERS))
    elif not files_in(folder):
        patiently(folder.path, folder.filesystem, lambda: _delete_empty(folder))


def _delete_empty(folder: Folder) -> None:
    """The entries by which stores stand for folders, after it was seen that no file is in them."""
    if folder.exists():
        folder.filesystem.delete_dir(folder.root)


def _remove_empty(root: Path, own: list[str]) -> None:
    for top in own:
        for place, _, _ in os.walk(root / top, topdown=False):
            _rmdir(place)
    _rmdir(root)


def _rmdir(place: str | Path) -> None:
    try:
        os.rmdir(place)
    except OSError:
        return  # something is in it, which came meanwhile, or it is a link


def enclosing_run(place: Path) -> Path | None:
    """The run or sweep that a local folder is, or lies in."""
    real = Path(os.path.realpath(place))
    for folder in (real, *real.parents):
        if (folder / MARK).is_file() or ((folder / "config.yaml").is_file() and (folder / DATA).is_file()):
            return folder
    return None
