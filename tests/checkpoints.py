"""Small checkpoints of every family, to copy and to spoil."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import LABELS, STUDENT, own, silent_student

from qskd.config import ResizeConfig, StudentConfig
from qskd.detectors import save_detector

SQUARE = ResizeConfig(mode="square", size=64)


def make(family: str, folder: Path) -> Path:
    sizes = {**STUDENT, **own(family, 2 if family == "deformable_detr" else 1)}
    save_detector(silent_student(StudentConfig.model_validate(sizes), LABELS, 0), folder, SQUARE)
    return folder


def change(folder: Path, fields: dict[str, Any], name: str = "config.json") -> None:
    said = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(said | fields))


def copied(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
