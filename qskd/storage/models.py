"""Where a model is that a folder names: in the folder itself, or, of a run's folder, in its student's."""

from __future__ import annotations

import os

import pyarrow.fs as pafs

from qskd.errors import QskdError
from qskd.redaction import redacted
from qskd.storage.stores import join, patiently

CONFIG = "config.json"  # transformers' name, in every model's folder
STUDENT = "student"  # a run's, a trial's and a checkpoint's: the folder of the model that it trains
BEST = "best"  # a run's: the student of its best evaluation so far
RUN_MARK = ".qskd-run.json"  # in a run's folder from its first moment on
SWEEP = "sweep.json"  # in a sweep's: what it was asked for


def model_place(filesystem: pafs.FileSystem, root: str, where: str) -> str:
    """`root`, or the student's folder in it where that is what a run's folder holds. where: the folder's name for messages.

    QskdError for a run that has no student yet, and for a sweep, which has several.
    """

    def there(*names: str) -> list[bool]:
        found = patiently(where, filesystem, lambda: filesystem.get_file_info([f"{root}/{name}" for name in names]))
        return [info.type == pafs.FileType.File for info in found]

    whole, student, run, sweep = there(CONFIG, f"{STUDENT}/{CONFIG}", RUN_MARK, SWEEP)
    if whole or not (student or run):
        return root
    if student:
        return f"{root}/{STUDENT}"
    if sweep:
        example = join(where, "trials/0000")
        raise QskdError(
            redacted(where),
            "the folder of a sweep, whose trials have a student each",
            "a model's folder, or a run's",
            f"name a trial's, e.g. {redacted(example)}; `report/index.html` in it says which is best",
        )
    raise QskdError(
        redacted(where),
        f"the folder of a run that has no {STUDENT} yet",
        "a model's folder, or that of a run that came to its end",
        f"give the run's command again, which goes on with it; or name {BEST} in it, the {STUDENT} of its best evaluation so far",
    )


def local_model(folder: str) -> str:
    """The same of a local folder. What is none (a Hub's name) is given back as it is."""
    path = os.path.expanduser(folder)
    if not os.path.isdir(path):
        return folder
    place = model_place(pafs.LocalFileSystem(), path.rstrip("/") or path, folder)
    return path if os.path.normpath(place) == os.path.normpath(path) else place
