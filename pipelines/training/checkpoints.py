"""A training's checkpoint: written, looked at before it is trusted, read again.

Ray Train's controller imports this, to look at checkpoints; torch and the detectors, which are seconds of its start, are
imported where a checkpoint is written or read.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyarrow import fs
from safetensors import SafetensorError

from pipelines.run.folder import Folder
from qskd.config import Config
from qskd.errors import QskdError
from qskd.storage.stores import patiently
from qskd.untrusted import parse_large_json

if TYPE_CHECKING:
    from torch import Tensor

    from qskd.evaluation.average_precision import CocoResult
    from qskd.training.patience import Patience
    from qskd.training.step import Training


def write_checkpoint(
    folder: Path, training: Training, config: Config, result: CocoResult | None, patience: Patience | None = None
) -> None:
    """state.safetensors, state.json, and, after an evaluation, the student as a plain Hugging Face folder."""
    from safetensors.torch import save_file

    from qskd.detectors import save_detector

    save_file(training.state(), folder / WEIGHTS)
    metrics = result.metrics if result else {}
    counted = {"patience": patience.state()} if patience else {}
    (folder / STATE).write_text(json.dumps({"step": training.step, "metrics": metrics, **counted}))
    if result is not None:
        with training.evaluation_weights() as student:
            # Not waited for: this is scratch, and what is copied from it is.
            save_detector(student, folder / "student", config.student.resize, durable=False)


def restore(training: Training, checkpoint: Any, patience: Patience | None = None) -> int:
    """Load a checkpoint; the number of training steps done. At an epoch's end its evaluation is done too. QskdError that names
    the file that can't be read. patience: to count on from there."""
    with checkpoint.as_directory() as folder:
        state = read_state(folder, checkpoint.path)
        training.load_state(read_training_state(folder, checkpoint.path), state["step"])
        if patience:
            patience.load(state["patience"], state["metrics"])
    return training.step


STATE, WEIGHTS = "state.json", "state.safetensors"
LONGEST_HEADER = 100_000_000  # safetensors' own limit, bytes
GO_BACK = "give the same command again: it goes on from the checkpoint before this one"


def damage(folder: Folder, checkpoint: str) -> list[str]:
    """The full names of the files of a checkpoint that are missing or cut, each with what is wrong; empty when it is whole.

    checkpoint: its name in the run's folder. A store that does not answer is a QskdError, not damage.
    """
    root, filesystem = f"{folder.root}/{checkpoint}", folder.filesystem

    def look() -> list[str]:
        found = filesystem.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        sizes = {info.path: info.size for info in found if info.type == fs.FileType.File}
        wrong = {path: "is missing" for path in (f"{root}/{STATE}", f"{root}/{WEIGHTS}") if path not in sizes}
        for path, size in sizes.items():
            if path.endswith(".safetensors"):
                wrong |= {path: problem} if (problem := _weights_problem(filesystem, path, size)) else {}
            elif path.endswith(".json"):
                wrong |= {path: problem} if (problem := _json_problem(filesystem, path)) else {}
        return [f"{folder.where(checkpoint + path[len(root) :])} {problem}" for path, problem in wrong.items()]

    return patiently(folder.where(checkpoint), filesystem, look)


def _weights_problem(filesystem: fs.FileSystem, path: str, size: int) -> str:
    with filesystem.open_input_file(path) as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER + 1
        header = stream.read(length) if length <= LONGEST_HEADER else b""
    try:
        tensors = parse_large_json(header, path)
        ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (QskdError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return f"has {size} bytes and no whole header"
    return "" if size == expected else f"has {size} of {expected} bytes"


def _json_problem(filesystem: fs.FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as stream:
        content = stream.read()
    try:
        whole = isinstance(parse_large_json(content, path), dict)
    except QskdError:
        whole = False
    return "" if whole else f"has {len(content)} bytes, which are no JSON object"


def read_state(checkpoint: str | Path, named: str = "") -> dict[str, Any]:
    """step (of training, done), metrics (of the evaluation after it, if there was one) and patience (its count; {} of a run of
    before) from a checkpoint's local folder; QskdError where they can't be read. named: the folder that messages name, where the
    local one is a copy."""
    try:
        state = parse_large_json(Path(checkpoint, STATE).read_bytes(), STATE)
        counted = dict(state.get("patience", {}))
        return {"step": int(state["step"]), "metrics": dict(state["metrics"]), "patience": counted}
    except (OSError, QskdError, ValueError, KeyError, TypeError) as error:
        raise QskdError(f"{named or checkpoint}/{STATE}", f"can't be read: {error}", "a whole file", GO_BACK) from None


def read_training_state(checkpoint: str | Path, named: str = "") -> dict[str, Tensor]:
    """What `Training.state` gave, by name; QskdError where it can't be read."""
    from safetensors.torch import load_file

    try:
        return load_file(Path(checkpoint, WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise QskdError(
            f"{named or checkpoint}/{WEIGHTS}", f"can't be read: {error}", "a whole file", GO_BACK
        ) from None


def nothing_whole(folder: Folder, wrong: list[str]) -> QskdError:
    """Where no checkpoint can be gone on from. Nothing is deleted."""
    return QskdError(
        folder.path,
        f"no checkpoint of this run is whole: {'; '.join(wrong)}",
        "one whole checkpoint, to go on from",
        "bring these files back from a backup, or train again under another name (--set name=...); nothing was deleted. "
        f"--restart would begin again in the same place, and deletes all of {folder.path} first",
    )
