"""Draw a detector's boxes on images and videos, and keep what was found (`qskd predict`). Needs no Ray.

python -m pipelines.predict runs/quickstart/qskd/student photo.jpg --out boxes.png
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.cluster.devices import device_of
from pipelines.inspection.results import Ids, Prediction, check_results, ids_for, write_results
from pipelines.inspection.sources import IMAGE_ENDINGS, files_of, is_video
from pipelines.inspection.videos import VideoWriter, check_video, check_video_target, frame_rate, frames
from qskd.datasets.views import decoded
from qskd.detectors import Detector, Preprocessing, check_classes, load_detector, read_preprocessing
from qskd.errors import QskdError, writing
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import predict_image
from qskd.pictures.plots import draw_boxes
from qskd.printable import one_line
from qskd.quantization.model import notice_of
from qskd.storage.ownership import BOXES, check_picture, listed, save_picture
from qskd.storage.places import fetched

log = logging.getLogger("qskd")


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 [H, W, 3], upright, decoded as in training; warns where little of the file's range is used."""
    try:
        picture = decoded(path.read_bytes(), str(path))
    except OSError as error:
        raise QskdError(str(path), f"can't be read: {error.strerror}", "an image file") from None
    if picture.note:
        log.warning("%s: %s", path, picture.note)
    return np.asarray(picture.rgb)


def is_folder(out: Path | None) -> bool:
    """Whether --out names a folder: it is one, or its ending is no picture's or video's."""
    return out is not None and (out.is_dir() or out.suffix.lower() not in (*IMAGE_ENDINGS, ".mp4"))


def targets(images: Sequence[Path], out: Path | None) -> list[tuple[Path, Path]]:
    """The picture (of a video: the video) to write for each input: beside it, in the folder `out`, or `out` for one input. In a
    folder inputs of one name keep their places towards one another. QskdError where that would replace an input, or a file that
    qskd did not draw."""
    folder = is_folder(out)
    if out is not None and not folder and len(images) > 1:
        raise QskdError("--out", f"{len(images)} images for one output file", "one image", "leave --out away")
    if out is not None and not folder and images and is_video(out) != is_video(images[0]):
        kind, ending = ("a video", ".mp4") if is_video(images[0]) else ("an image", ".png")
        found = f"{out} for {images[0]}, which is {kind}"
        raise QskdError(
            "--out", found, f"a name that ends in {ending}, or a folder", f"--out {out.with_suffix(ending)}"
        )
    same_names = folder and len({(path.stem, is_video(path)) for path in images}) < len(images)
    above = os.path.commonpath([path.absolute().parent for path in images]) if same_names else ""

    stems = Counter((path.parent, path.stem, is_video(path)) for path in set(images))

    def target(path: Path) -> Path:
        ending = ".mp4" if is_video(path) else ".png"
        alone = stems[path.parent, path.stem, is_video(path)] == 1  # a.jpg beside a.png: each keeps its whole name
        drawn = path.with_name(f"{path.stem if alone else path.name}{BOXES}{ending}")
        if out is None:
            return drawn
        if not folder:
            return out
        return out / (drawn.absolute().relative_to(above) if same_names else drawn.name)

    pairs = [(path, target(path)) for path in images]
    check_all_differ(pairs)
    for path, target_ in pairs:
        if is_video(path):
            check_video_target(target_, path)
        else:
            check_picture(target_, images)
    return pairs


def check_all_differ(pairs: Sequence[tuple[str | Path, Path]]) -> None:
    """QskdError when two images would be drawn into one file."""
    first: dict[Path, str | Path] = {}
    for image, target in pairs:
        if target in first and str(first[target]) != str(image):
            found = f"{first[target]} and {image} would both be drawn there"
            raise QskdError(str(target), found, "a picture each", "give them one after the other, with --out")
        first[target] = image


def write_picture(pixels: np.ndarray, target: Path, inputs: Sequence[str | Path]) -> None:
    """RGB uint8 [H, W, 3] into a file of its own, whose folder is made; QskdError where that can't be."""
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            save_picture(Image.fromarray(pixels), target, inputs)
    except (ValueError, KeyError) as error:  # an ending that names no image format
        raise QskdError(str(target), f"can't be written: {error}", "a picture's file", "--out FILE.png") from None


@dataclass(frozen=True)
class Request:
    """What is to be predicted. sources: files alone (`files_of`). pictures: whether boxes are drawn. every: of a video each
    Nth frame is looked at. annotations: COCO JSON with the ids of images and categories. classes: what a detector that is asked in
    words is to look for."""

    model: str
    sources: tuple[Path, ...]
    out: Path | None = None
    threshold: float = 0.5
    pictures: bool = True
    every: int = 1
    annotations: Path | None = None
    classes: tuple[str, ...] = ()

    def targets(self) -> list[tuple[Path, Path]]:
        """As `targets`; looks at all that can be wrong before the detector is loaded."""
        if not self.pictures and not is_folder(self.out):
            raise QskdError("--no-pictures", "no --out folder", "one, for JSON and CSV", "--out FOLDER")
        if len(self.sources) == 1 and is_video(self.sources[0]):  # of several, one that can't be read is left out
            check_video(self.sources[0])
        if is_folder(self.out) and self.out is not None:
            check_results(self.out)
        return targets(self.sources, self.out) if self.pictures else [(path, path) for path in self.sources]


def request(
    model: str,
    given: Sequence[Path],
    out: Path | None = None,
    threshold: float = 0.5,
    pictures: bool = True,
    every: int = 1,
    annotations: Path | None = None,
    classes: Sequence[str] = (),
) -> Request:
    """given: files, folders and patterns."""
    return Request(model, tuple(files_of(given)), out, threshold, pictures, every, annotations, tuple(classes))


@dataclass(frozen=True)
class Looking:
    """A detector at work. labels: its class names."""

    detector: Detector
    preprocessing: Preprocessing
    threshold: float

    @property
    def labels(self) -> tuple[str, ...]:
        return self.detector.labels

    def find(self, pixels: np.ndarray) -> Detections:
        return predict_image(self.detector, pixels, self.preprocessing, range(len(self.labels)), self.threshold)

    def draw(self, pixels: np.ndarray, found: Detections) -> np.ndarray:
        return draw_boxes(pixels, found.boxes_xyxy, found.category_ids, found.scores, self.labels)


def predict_all(asked: Request) -> Iterator[tuple[list[Prediction], tuple[str, ...]]]:
    """For each input, when it is done: its predictions (of a video, of all frames) and the class names. Into a folder `out`
    JSON and CSV go at the end. An image that can't be read is told and left out; at the end it is a QskdError."""
    pairs = asked.targets()
    with fetched(asked.model) as folder:
        check_classes(folder, asked.classes)
        detector = load_detector(folder, words=asked.classes).eval().to(device_of("auto"))
        look = Looking(detector, read_preprocessing(folder), asked.threshold)
    if notice := notice_of(detector.model):
        log.warning("%s: %s", one_line(asked.model), notice)
    keeps = is_folder(asked.out)
    ids = ids_for(detector, asked.sources, asked.annotations, asked.classes) if keeps else Ids({}, {})
    done: list[Prediction] = []
    broken: list[QskdError] = []
    for path, target in pairs:
        try:
            some = _video(path, target, look, asked) if is_video(path) else [_image(path, target, look, asked)]
        except QskdError as error:
            if len(pairs) == 1 or error.where != QskdError(str(path), "", "").where:  # as an error shows a path
                raise
            log.warning("left out: %s", error)
            broken.append(error)
            continue
        done += some
        yield some, look.labels
    if keeps and asked.out is not None:
        write_results(done, ids, look.labels, asked.out)
    if broken:
        names = listed([error.where for error in broken])
        raise QskdError(f"{len(broken)} of {len(pairs)} inputs", f"can't be read: {names}", "images and videos")


def _image(path: Path, target: Path, look: Looking, asked: Request) -> Prediction:
    pixels = read_image(path)
    found = look.find(pixels)
    if asked.pictures:
        write_picture(look.draw(pixels, found), target, asked.sources)
    return Prediction(path, target if asked.pictures else None, found)


def _video(path: Path, target: Path, look: Looking, asked: Request) -> list[Prediction]:
    done = []
    with ExitStack() as stack:
        drawn = None
        if asked.pictures:
            drawn = stack.enter_context(VideoWriter(target, path, frame_rate(path) / asked.every))
        for frame in frames(path, asked.every):
            found = look.find(frame.pixels)
            if drawn is not None:
                drawn.add(look.draw(frame.pixels, found))
            done.append(Prediction(path, target if drawn else None, found, frame.index, frame.seconds))
    if not done:
        raise QskdError(str(path), "not one frame in it", "a whole video file")
    return done


def predict(
    model: str, images: Sequence[Path], out: Path | None = None, threshold: float = 0.5
) -> list[tuple[Path, Detections]]:
    """Write a picture with boxes for each image; the picture's path and what was found, for each."""
    every = [one for some, _ in predict_all(request(model, images, out, threshold)) for one in some]
    return [(one.picture or one.source, one.found) for one in every]
