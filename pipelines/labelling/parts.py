"""The files of a job that labels pictures: a part of the pictures each while it lasts, and the COCO JSON that they become."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyarrow import fs

from qskd.errors import QskdError, writing
from qskd.storage.files import publish_bytes
from qskd.storage.ownership import head_says, own_json

PART_FORMAT, VERSION = "qskd-labels-part", 1
THRESHOLDS = "thresholds.json"
_PART = re.compile(r"part-\d{5,}\.json|thresholds\.json")
MADE_BY = {"made_by": "qskd label"}  # the first of `info`
_LISTS = ("categories", "images", "annotations")
_HEAD = '{"info": {"made_by": "qskd label"'  # how a file of ours begins


def parts_folder(out: Path) -> Path:
    """Beside the file that is made of them."""
    return out.with_name(f"{out.name}.parts")


def part_file(folder: str, number: int) -> str:
    return os.path.join(folder, f"part-{number:05d}.json")


def write_part(
    path: str,
    fingerprint: str,
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    problems: Sequence[Mapping[str, str]],
) -> None:
    head = {"format": PART_FORMAT, "version": VERSION, "fingerprint": fingerprint}
    text = json.dumps({**head, "images": images, "annotations": annotations, "problems": problems})
    publish_bytes(text.encode(), fs.LocalFileSystem(), path)


def read_part(path: str, fingerprint: str, skip: bool) -> dict[str, Any] | None:
    """A part's file; None where there is none, or one of other pictures, another teacher or other thresholds, or, unless `skip`,
    one that lacks broken pictures."""
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return None
    tree = own_json(text) if head_says(text, PART_FORMAT) else None
    if not isinstance(tree, dict) or tree.get("fingerprint") != fingerprint:
        return None
    return tree if skip or not tree["problems"] else None


def write_measured(out: Path, measured: Mapping[str, Any]) -> None:
    """Thresholds that were measured, beside the parts: measured again they are others in the last digits, and so all parts."""
    text = json.dumps({"format": PART_FORMAT, "version": VERSION, "measured": measured})
    publish_bytes(text.encode(), fs.LocalFileSystem(), str(parts_folder(out).absolute() / THRESHOLDS))


def read_measured(out: Path, of: str) -> dict[str, Any] | None:
    """Those of this key, kept beside the parts or in the finished file: {"of": key, "thresholds": [[id, score], ...], "few": [id,
    ...]}."""
    for path, place in ((parts_folder(out) / THRESHOLDS, ()), (out, ("info",))):
        tree = own_json(path.read_text()) if path.is_file() and (_is_own(path) or _begins(path)) else None
        for name in (*place, "measured"):
            tree = tree.get(name) if isinstance(tree, dict) else None
        if isinstance(tree, dict) and tree.get("of") == of:
            return tree
    return None


def check_out(out: Path, overwrite: bool) -> None:
    """QskdError where something is in the way of the file, or of the parts' folder, that is not to be replaced."""
    folder = parts_folder(out)
    strange = [name for name in os.listdir(folder) if not _is_own(folder / name)] if folder.is_dir() else []
    if strange or (os.path.lexists(folder) and not folder.is_dir()):
        said = f"holds other things: {strange[0]}" if strange else "is no folder"
        raise QskdError(str(folder), said, "nothing, or parts of labels that qskd wrote", "choose another name")
    if not os.path.lexists(out):
        return
    ours = out.is_file() and _begins(out)
    if not ours or not overwrite:
        found = (
            "labels of another run of `qskd label`" if ours else "is there already, and `qskd label` did not write it"
        )
        remedy = "choose another name" + (", or pass --overwrite, which replaces this file" if ours else "")
        raise QskdError(str(out), found, "a new file", f"{remedy}; nothing was written")


def finished(out: Path, fingerprint: str, skip: bool) -> bool:
    """Whether there is a file of ours of these pictures, teacher and thresholds, which lacks none that is to stop the job."""
    if not (out.is_file() and _begins(out)):
        return False
    tree = own_json(out.read_text())
    info = tree.get("info") if isinstance(tree, dict) else None
    return isinstance(info, dict) and info.get("fingerprint") == fingerprint and (skip or not info.get("left_out"))


def write_labels(out: Path, tree: Mapping[str, Any]) -> None:
    """COCO JSON, of `info`, the lists and what else there is, an entry of a list a line; it appears whole."""

    def lines(entries: Iterable[Mapping[str, Any]]) -> str:
        return ",\n".join(json.dumps(entry) for entry in entries)

    text = f'{{"info": {json.dumps({**MADE_BY, **tree["info"]})}'
    text += "".join(f',\n"{key}": [\n{lines(tree[key])}\n]' for key in _LISTS)
    others = {key: value for key, value in tree.items() if key not in ("info", *_LISTS)}
    text += "".join(f",\n{json.dumps(key)}: {json.dumps(value)}" for key, value in others.items()) + "}\n"
    assert text.startswith(_HEAD)
    with writing(out):
        publish_bytes(text.encode(), fs.LocalFileSystem(), str(out))


def delete_parts(out: Path) -> None:
    """The parts' files and, where that leaves it empty, their folder; where there is one."""
    folder = parts_folder(out)
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        if _is_own(folder / name):
            os.unlink(folder / name)
    if not os.listdir(folder):
        os.rmdir(folder)


def _is_own(path: Path) -> bool:
    if path.name.startswith(".writing-") and path.is_file() and not path.is_symlink():
        return True
    if not _PART.fullmatch(path.name) or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return head_says(file.read(200), PART_FORMAT)


def _begins(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD.encode()
