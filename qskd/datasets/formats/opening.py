"""Which format a path holds, and its reader: the way in for all datasets that are not shards yet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from qskd.datasets.coco import CocoDataset, OnError, read_coco
from qskd.datasets.formats.box_formats import BOX_FORMATS
from qskd.datasets.formats.hugging_face import HuggingFaceDataset
from qskd.datasets.formats.reading import some
from qskd.datasets.formats.rows import find_splits
from qskd.datasets.formats.voc import VocDataset
from qskd.datasets.formats.yolo import YoloDataset
from qskd.datasets.manifest import MANIFEST
from qskd.datasets.pictures.facts import Exif
from qskd.errors import QskdError

_ROBOFLOW_COCO = "_annotations.coco.json"
_EXPECTED = (
    "COCO JSON, YOLO's data.yaml, a folder of Pascal VOC's XML, or a Hugging Face dataset "
    "(a folder with metadata.jsonl, Parquet files, what save_to_disk wrote)"
)


def open_dataset(
    source: Path,
    images: Path | None,
    on_error: OnError = "stop",
    *,
    split: str | None = None,
    classes: Path | None = None,
    box_format: str | None = None,
    exif: Exif = "auto",
) -> CocoDataset:
    """The samples of a dataset in any format, recognised by what `source` is.

    images: the folder of its pictures. COCO JSON needs it; for YOLO it is what the data.yaml's entries are relative to, for VOC the
    folder of pictures. split, classes, box_format: docs/data.md; QskdError where a format has no use for one.
    """
    if box_format not in (None, *BOX_FORMATS):
        raise QskdError("--box-format", str(box_format), f"one of {some(BOX_FORMATS)}")
    if images is None and not os.path.exists(source):
        raise QskdError(str(source), "no such file or folder", _EXPECTED, "check the path")
    kind, source, images = _recognised(source, images)
    unused: dict[str, dict[str, Any]] = {
        "coco": {"--split": split, "--classes": classes, "--box-format": box_format},
        "yolo": {"--classes": classes, "--box-format": box_format},
        "voc": {"--box-format": box_format},
        "hf": {"an image folder": images},
    }
    for option, value in unused[kind].items():
        if value is not None:
            raise QskdError(str(source), f"{option} {value}", f"no such thing for {_NAMES[kind]}", "leave it away")
    if kind == "coco":
        if images is None:
            remedy = f"name it: `qskd prepare {source} IMAGES DESTINATION`"
            raise QskdError(str(source), "COCO JSON without the folder of its images", "that folder", remedy)
        return read_coco(source, images, on_error, exif)
    if kind == "yolo":
        return YoloDataset(source, images, on_error, exif, split)
    if kind == "voc":
        return VocDataset(source, images, on_error, exif, split, classes)
    return HuggingFaceDataset(source, on_error, exif, split, classes, box_format)


_NAMES = {"coco": "COCO JSON", "yolo": "YOLO's data.yaml", "voc": "Pascal VOC", "hf": "a Hugging Face dataset"}


def _recognised(source: Path, images: Path | None) -> tuple[str, Path, Path | None]:
    if not source.is_dir():
        suffix = source.suffix.lower()
        if suffix in (".yaml", ".yml"):
            return "yolo", source, images
        if suffix in (".parquet", ".arrow", ".jsonl"):
            return "hf", source, images
        if suffix in (".xml", ".txt") and source.is_file():
            remedy = "give the folder with the XML files" if suffix == ".xml" else _MAKE_YAML
            raise QskdError(str(source), f"a single {suffix} file", _EXPECTED, remedy)
        return "coco", source, images
    if (source / MANIFEST).is_file() and any(source.glob("shard-*.parquet")):
        raise QskdError(str(source), "shards that are made already", _EXPECTED, "name this folder in a recipe's `data`")
    found: dict[str, tuple[str, Path, Path | None]] = {}
    yamls = sorted(path for pattern in ("*.yaml", "*.yml") for path in source.glob(pattern))
    if yamls:
        chosen = next((path for path in yamls if path.stem == "data"), yamls[0])
        found[f"YOLO: {chosen}"] = "yolo", chosen, images
    if (source / _ROBOFLOW_COCO).is_file():
        found[f"COCO: {source / _ROBOFLOW_COCO}"] = "coco", source / _ROBOFLOW_COCO, images or source
    if annotations := _voc_folder(source):
        found[f"Pascal VOC: {annotations}"] = "voc", annotations, images
    if find_splits(source):
        found["a Hugging Face dataset"] = "hf", source, images
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise QskdError(str(source), f"several datasets: {some(found)}", "one", "give its file or folder itself")
    jsons = sorted(source.glob("*.json")) or sorted(source.glob("annotations/*.json"))
    remedies = (
        [f"of COCO's name the JSON and the images: `qskd prepare {jsons[0]} IMAGES DESTINATION`"] if jsons else []
    )
    # Label Studio puts a notes.json beside YOLO's labels.
    if any(source.glob("labels/**/*.txt")) or (not jsons and any(source.glob("*.txt"))):
        remedies.insert(0, _MAKE_YAML)
    remedy = "; ".join(remedies) or _GIVE
    raise QskdError(str(source), "no dataset that is known", _EXPECTED, remedy)


_GIVE = (
    "give the file or folder that has the annotations, not the pictures' alone; of pictures without labels: "
    "`qskd prepare --unlabeled PICTURES DESTINATION`"
)
_MAKE_YAML = (
    "for YOLO's label files write a data.yaml with the lines `names: [first, second]` and `train: images/train`"
)


def _voc_folder(source: Path) -> Path | None:
    """Where VOC's folders or XML files are: here, in the folders here (Roboflow's splits), or in the one here (VOCdevkit)."""
    if (source / "Annotations").is_dir() or any(source.glob("*.xml")):
        return source
    inside = sorted(path for path in source.iterdir() if path.is_dir())
    devkits = [path for path in inside if (path / "Annotations").is_dir()]
    if len(devkits) == 1:
        return devkits[0]
    if devkits:
        raise QskdError(str(source), f"several datasets: {some(devkits)}", "one", f"give {devkits[-1]}")
    return source if any(any(path.glob("*.xml")) for path in inside) else None
