"""What `qskd predict` is given: image files, videos, folders of both, patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from pipelines.inspection.videos import is_own_video
from qskd.errors import QskdError
from qskd.storage.ownership import BOXES, is_drawing

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_ENDINGS


def _is_own(path: Path) -> bool:
    return path.stem.endswith(BOXES) and is_own_video(path) if is_video(path) else is_drawing(path)


def files_of(given: Sequence[Path]) -> list[Path]:
    """Files as they are given; of folders (not of those inside) and patterns (`**` is any depth) the images and videos, by name.
    What `qskd predict` and `explain` drew there themselves is left out. QskdError for a folder or pattern with none."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            found += _kept(path, [path / name for name in sorted(os.listdir(path))])
        elif glob.has_magic(str(path)) and not os.path.lexists(path):  # a file may be called a[1].jpg
            found += _kept(path, [Path(name) for name in sorted(glob.glob(str(path), recursive=True))])
        else:
            found.append(path)
    return list(dict.fromkeys(found))


def _kept(given: Path, inside: Sequence[Path]) -> list[Path]:
    kept = [path for path in inside if path.suffix.lower() in IMAGE_ENDINGS + VIDEO_ENDINGS and path.is_file()]
    kept = [path for path in kept if not _is_own(path)]
    if not kept:
        endings = ", ".join(IMAGE_ENDINGS + VIDEO_ENDINGS)
        raise QskdError(str(given), "no images or videos", f"files that end in {endings}", "check the path")
    return kept
