"""The files of a checkpoint, in a local folder or on the Hub, and the tensors that they say they hold.

A local folder is read by itself: nothing is asked of the Hub, and no file outside is read because one inside names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from qskd.checkpoints.json_files import first_line, is_printable, read_json_file, shown
from qskd.errors import QskdError

ONLY_SAFETENSORS = "model.safetensors (a pickle can run code when it is read, so none is)"
CONVERT = (
    "where you trust the file: AutoModelForObjectDetection.from_pretrained(path, use_safetensors=False)"
    ".save_pretrained(new_folder), which writes safetensors"
)
_MOST_TENSORS = 100_000
_MOST_FILES = 1000
_MOST_NAME = 300  # characters of a tensor's name
_FLOATS = ("F64", "F32", "F16", "BF16")
_WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")  # counters and tables of indices
_SLACK = 2**26  # elements: for what a file leaves out (tied heads), a quarter of a GiB


class Stored(NamedTuple):
    """A tensor as its file's header has it."""

    shape: tuple[int, ...]
    dtype: str


def checkpoint_file(path: str, name: str) -> Path | None:
    """A file of a checkpoint, `path` as `check_path` gives it; None where there is none. A Hub name is asked of the Hub."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(str(found))


def weight_files(path: str) -> list[Path]:
    """A checkpoint's safetensors files; `path` as `check_path` gives it. Refuses a Hub repository that has none.

    The one file goes before an index, as for transformers: `save_pretrained` leaves an earlier save's index where it is.
    """
    if (whole := checkpoint_file(path, SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    index = checkpoint_file(path, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise QskdError(path, f"no {SAFE_WEIGHTS_NAME} in it", ONLY_SAFETENSORS, CONVERT)
    found = []
    for name in _indexed(index):
        file = checkpoint_file(path, name)
        if file is None:
            remedy = "copy or download the whole checkpoint again"
            raise QskdError(path, f"no {name} in it, which {SAFE_WEIGHTS_INDEX_NAME} names", "every file of it", remedy)
        if Path(path).is_dir() and not _is_inside(file, Path(path)):
            raise QskdError(
                str(index),
                f"weight_map: {name}, a link to {file.resolve()}",
                "files inside the folder",
                "put a copy of the file in its place, where you trust it",
            )
        found.append(file)
    return found


def _indexed(index: Path) -> list[str]:
    """The files that an index names: plain names, of files beside it or below."""
    said = read_json_file(index).get("weight_map")
    if not isinstance(said, dict) or not said or len(said) > _MOST_TENSORS:
        raise QskdError(str(index), f"weight_map: {shown(said)}", "an object of file names by tensors' names")
    for name in said.values():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        inside = (
            parts and ".." not in parts and "\\" not in name and ":" not in name and not name.startswith(("/", "~"))
        )
        if not inside or not is_printable(name, 200) or not name.endswith(".safetensors"):
            raise QskdError(
                str(index), f"weight_map: {shown(name)}", "names of safetensors files inside the checkpoint's folder"
            )
    names = sorted(set(said.values()))
    if len(names) > _MOST_FILES:
        raise QskdError(str(index), f"weight_map: {len(names)} files", f"at most {_MOST_FILES}")
    return names


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file is in the folder, links followed. In the Hub's cache a snapshot's files are links to its blobs."""
    real, folder = file.resolve(), folder.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    return any(real.is_relative_to(place) for place in allowed)


def read_headers(files: Sequence[Path]) -> dict[str, Stored]:
    """What the files say they hold. safetensors checks that each file has these very bytes, so that a header can't promise
    more than the file is long. QskdError names the file."""
    found: dict[str, Stored] = {}
    for file in files:
        expected, remedy = (
            "a whole safetensors file",
            "copy or download it again: it is damaged, or no safetensors file",
        )
        try:
            with safe_open(file, "pt") as content:
                names = content.keys()
                if len(names) > _MOST_TENSORS:
                    raise QskdError(str(file), f"{len(names)} tensors", f"at most {_MOST_TENSORS}")
                for name in names:
                    part = content.get_slice(name)
                    found[name] = Stored(tuple(part.get_shape()), str(part.get_dtype()))
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            raise QskdError(str(file), f"cannot be loaded: {first_line(error)}", expected, remedy) from error
        for name, stored in found.items():
            if not is_printable(name, _MOST_NAME):
                raise QskdError(str(file), f"a tensor named {shown(name)}", f"names of at most {_MOST_NAME} characters")
            if stored.dtype not in _FLOATS + _WHOLE:
                raise QskdError(
                    str(file),
                    f"{name} is of type {stored.dtype}",
                    "weights in float32, float16 or bfloat16",
                    "choose a checkpoint that is not quantised",
                )
    return found


def read_weights(path: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name; the files' headers are checked first."""
    files = weight_files(path)
    read_headers(files)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= load_file(file)
    return state


def headers_of(state: Mapping[str, Tensor]) -> dict[str, Stored]:
    """As `read_headers` tells them, of tensors that are read already."""
    return {
        name: Stored(tuple(value.shape), "F32" if value.is_floating_point() else "I64") for name, value in state.items()
    }


def check_sizes(model_class: Any, config: Any, headers: dict[str, Stored], path: str) -> None:
    """Compare the sizes that a configuration asks for with those of the tensors in the files, before there is memory for any.

    The model is built without numbers ("meta"), in the way that from_pretrained does. QskdError where a tensor of the same
    name has another shape or is no float, or where the model has far more numbers than the files. (What is missing, or is
    there under older names, from_pretrained tells.)
    """
    with ExitStack() as stack:
        for context in model_class.get_init_context(torch.float32, False, False, False):
            stack.enter_context(context)
        model = model_class(config)
    asked = model.state_dict()
    remedy = "config.json and model.safetensors are of different models: save them again together"
    for name in sorted(asked.keys() & headers.keys()):
        wanted, stored = tuple(asked[name].shape), headers[name]
        if wanted != stored.shape:
            raise QskdError(
                path,
                f"cannot be loaded: {name} is {list(stored.shape)} in its safetensors",
                f"{list(wanted)}, as its config.json says",
                remedy,
            )
        if asked[name].is_floating_point() and stored.dtype not in _FLOATS:
            raise QskdError(path, f"cannot be loaded: {name} is of type {stored.dtype}", "floating point", remedy)
    needed, there = (sum(math.prod(one.shape) for one in some.values()) for some in (asked, headers))
    if needed > 2 * there + _SLACK:
        raise QskdError(
            path,
            f"cannot be loaded: its config.json describes a model of {needed} numbers, its safetensors have {there}",
            "a model of these weights",
            remedy,
        )
