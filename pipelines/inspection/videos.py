"""Frames of a video, and a video of frames, by PyAV, which is installed with the extra `video`."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from qskd import __version__
from qskd.errors import QskdError, check_writable, writing
from qskd.storage.ownership import same_file

_RATE = Fraction(25)  # frames a second, where a file does not say


@dataclass(frozen=True, eq=False)
class Frame:
    """index: of all frames of the video, 0 on. pixels: RGB uint8 [H, W, 3], turned as the file says that it is to be shown."""

    index: int
    seconds: float
    pixels: np.ndarray


def _pyav(path: Path) -> Any:
    try:
        import av
    except ImportError:
        remedy = "pip install 'qskd[video]', or give its frames as image files"
        raise QskdError(str(path), "a video, and PyAV is not installed", "the extra `video`", remedy) from None
    av.logging.set_level(av.logging.PANIC)  # its complaints come as exceptions, too
    return av


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """The opened file. QskdError where it is no video that can be read."""
    av = _pyav(path)
    if not path.is_file():
        raise QskdError(str(path), "no such file", "a video", "check the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise QskdError(str(path), "no moving pictures in it", "a video")
            yield container
    except av.error.FFmpegError as error:
        raise QskdError(str(path), f"can't be read: {error.strerror}", "a whole video file") from None


def check_video(path: Path) -> None:
    """QskdError for what is no video, before the detector is loaded."""
    with _reading(path):
        pass


def frames(path: Path, every: int = 1) -> Iterator[Frame]:
    """Every Nth frame (N: `every`), from the first. One is in memory at a time."""
    with _reading(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if index % every == 0:
                turns = round(frame.rotation / 90) % 4
                pixels = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
                yield Frame(index, float(frame.time or 0.0), pixels)


def frame_rate(path: Path) -> Fraction:
    """Frames a second."""
    with _reading(path) as container:
        return Fraction(container.streams.video[0].average_rate or _RATE)


def is_own_video(path: Path) -> bool:
    """Whether `writer` wrote this file: it says so itself."""
    if not path.is_file():
        return False
    try:
        with _pyav(path).open(str(path)) as container:
            return str(container.metadata.get("comment", "")).startswith("qskd")
    except (QskdError, OSError, ValueError):
        return False


def check_video_target(target: Path, source: Path) -> None:
    """QskdError where a video would replace its source, or a file that qskd did not write, or could not be written."""
    check_writable(target.parent)
    if same_file(target, source):
        raise QskdError(str(target), f"is an input, {source}", "a file of its own", "--out ANOTHER.mp4")
    if os.path.lexists(target) and not is_own_video(target):
        remedy = "--out ANOTHER FOLDER, or move that file away; it was left as it is"
        raise QskdError(str(target), "is there already, and qskd did not write it", "a new file", remedy)


class VideoWriter:
    """H.264 (MPEG-4 where there is none) in an .mp4 of its own; a context manager. The file appears whole, or not at all."""

    def __init__(self, target: Path, source: Path, rate: Fraction) -> None:
        self.target, self.source, self.rate = Path(os.path.realpath(target)), source, rate
        self.unfinished = self.target.with_name(f".writing-{uuid.uuid4().hex}.mp4")
        self.container: Any = None

    def add(self, pixels: np.ndarray) -> None:
        """RGB uint8 [H, W, 3], of one size; an odd last row or column is left out, as the format wants it."""
        import av

        if self.container is None:
            with writing(self.target):
                self.target.parent.mkdir(parents=True, exist_ok=True)
                self.unfinished.touch()
            self.container = av.open(str(self.unfinished), "w")
            self.container.metadata["comment"] = f"qskd {__version__}"
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            self.stream = self.container.add_stream(codec, rate=self.rate)
            self.stream.height, self.stream.width = (side - side % 2 for side in pixels.shape[:2])
            self.stream.pix_fmt = "yuv420p"
        cut = np.ascontiguousarray(pixels[: self.stream.height, : self.stream.width])
        for packet in self.stream.encode(av.VideoFrame.from_ndarray(cut, format="rgb24")):
            self.container.mux(packet)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self.container is not None and kind is None:
                for packet in self.stream.encode():
                    self.container.mux(packet)
                self.container.close()
                check_video_target(self.target, self.source)  # what came meanwhile
                os.replace(self.unfinished, self.target)
        finally:
            with contextlib.suppress(Exception):  # of a video that broke off; what was wrong is being told
                if self.container is not None:
                    self.container.close()
            with contextlib.suppress(OSError):
                self.unfinished.unlink(missing_ok=True)
