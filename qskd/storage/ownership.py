"""What is qskd's own: the names that it writes, and the marks by which it knows a folder or a picture that it made.

Nothing else is ever deleted or replaced; docs/deletes.md lists every place that does either, with its guard.
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qskd.errors import QskdError, check_writable
from qskd.untrusted import parse_large_json

EXTRA_FILE = (
    "qskd.json"  # in a detector's folder: what transformers does not read, and the mark that qskd made the folder
)
# A student's folder, as a run leaves it, and a detector's, as `save_detector` and `qskd export` do.
STUDENT_FILE = re.compile(
    r"config\.json|preprocessor_config\.json|model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|"
    r"model\.safetensors\.index\.json|quantization\.safetensors|qskd\.json|README\.md|card-(?:precision_recall|thresholds|classes|confusion)\.png"
)
DETECTOR_FILE = re.compile(
    rf"{STUDENT_FILE.pattern}|model(?:\.float16|\.int8)?\.onnx|openvino_model(?:\.int8)?\.(?:xml|bin)|detect\.py"
)
BOXES, EXPLAINED = ".boxes", ".explained"  # what the stems of drawings end in: of `qskd predict` and `qskd explain`
SHOWN = 5  # names that a message lists
_SOFTWARE = 0x0131  # EXIF: the program that made a picture


def listed(names: Sequence[str]) -> str:
    """The first few, for a message."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def made_by_us(folder: Path) -> bool:
    """Whether a detector's folder carries qskd's mark: a qskd.json that is a JSON object."""
    try:
        return isinstance(own_json((folder / EXTRA_FILE).read_text()), dict)
    except (OSError, ValueError):
        return False


def foreign_to_detector(folder: Path) -> list[str]:
    """What is in the folder that qskd does not write there: other names, folders, links."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if not (entry.is_file(follow_symlinks=False) and DETECTOR_FILE.fullmatch(entry.name))
    )


def check_replaceable(folder: Path, overwrite: bool = False) -> None:
    """QskdError unless a detector may be written there: a folder that is new, empty, or made by qskd with nothing else in it;
    with `overwrite` other things may be in it, which stay."""
    remedy = "choose a new or an empty folder; nothing was written"
    if folder.exists() and not folder.is_dir():
        raise QskdError(str(folder), "a file", "a folder to save to", remedy)
    check_writable(folder.parent)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    found = foreign_to_detector(folder)
    if not made_by_us(folder):
        there = listed(found or sorted(path.name for path in folder.iterdir()))
        said = f"a folder that qskd did not make, with other things in it: {there}"
        raise QskdError(str(folder), said, "a new or an empty folder, or a detector's that qskd made", remedy)
    if found and not overwrite:
        raise QskdError(
            str(folder),
            f"a detector's folder with other things in it: {listed(found)}",
            "nothing but what qskd wrote there",
            "choose another folder; or `qskd export --overwrite`, which replaces qskd's own files there (config.json, weights, "
            "README.md, qskd.json, its graphs, detect.py) and leaves all else",
        )


def remove_own_detector_files(folder: Path, keep: Iterable[str] = ()) -> None:
    """Delete the files of a detector that `save_detector` and `qskd export` write, except `keep`, and nothing else."""
    for entry in list(os.scandir(folder)):
        if entry.is_file(follow_symlinks=False) and DETECTOR_FILE.fullmatch(entry.name) and entry.name not in keep:
            os.unlink(entry.path)


# --- pictures -----------------------------------------------------------------------------------------------------------
def is_own_picture(path: Path) -> bool:
    """Whether `save_picture` wrote this file: its EXIF names the program."""
    if not path.is_file():  # a named pipe would keep its reader waiting
        return False
    try:
        with Image.open(path) as picture:
            return str(picture.getexif().get(_SOFTWARE, "")).startswith("qskd")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def is_drawing(path: Path) -> bool:
    """Whether it is what `qskd predict` or `qskd explain` drew beside a picture: no picture of a user's."""
    return path.stem.endswith((BOXES, EXPLAINED)) and is_own_picture(path)


def check_picture(target: Path, inputs: Iterable[str | Path]) -> None:
    """QskdError when a picture written to `target` would replace an input, under whatever name, or a file that qskd did not
    draw, or could not be written there."""
    check_writable(target.parent)
    for given in inputs:
        if same_file(target, given):
            raise QskdError(str(target), f"is an input, {given}", "a file of its own", "--out ANOTHER.png")
    if os.path.lexists(target) and not is_own_picture(target):
        remedy = "--out ANOTHER.png, or move that file away; it was left as it is"
        raise QskdError(str(target), "is there already, and qskd did not draw it", "a new file", remedy)


def same_file(first: str | Path, second: str | Path) -> bool:
    """Also through links, symbolic or hard."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


def save_picture(picture: Image.Image, target: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Write a picture that `is_own_picture` knows, whole or not at all, in place of an earlier one alone (`check_picture`).
    ValueError for an ending that names no format."""
    from qskd import __version__

    check_picture(target, inputs)
    place = Path(os.path.realpath(target))
    exif = Image.Exif()
    exif[_SOFTWARE] = f"qskd {__version__}"
    unfinished = place.with_name(f".writing-{uuid.uuid4().hex}{place.suffix}")
    try:
        picture.save(unfinished, exif=exif)
        if not is_own_picture(unfinished):  # GIF, BMP: it could never be drawn again
            raise ValueError(f"a file of {place.suffix} can't carry the mark by which qskd knows its own pictures")
        os.replace(unfinished, place)
    finally:
        with contextlib.suppress(OSError):  # what was wrong with the place has been said
            unfinished.unlink(missing_ok=True)


def head_says(text: str | bytes, format_name: str) -> bool:
    """Whether a manifest begins as qskd's of this format does; true of one that was cut off or damaged further down, too."""
    head = text[:200].decode(errors="replace") if isinstance(text, bytes) else text[:200]
    return re.match(rf'\s*\{{\s*"format":\s*"{re.escape(format_name)}"', head) is not None


def own_json(text: str) -> Any:
    """Parsed, or None for what is no JSON."""
    try:
        return parse_large_json(text, "")
    except QskdError:
        return None
