"""What runs while pictures are labelled: processes that hold the teacher; a part of the pictures goes in, its file is written."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch

from pipelines.cluster.devices import device_of
from pipelines.labelling.onto import overlapping
from pipelines.labelling.parts import part_file, read_part, write_part
from pipelines.reporting.pulse import Pulse
from qskd.datasets.pictures.joining import pad
from qskd.datasets.pictures.reader import PicturesInFolder
from qskd.datasets.views import View, decode_image, view_image
from qskd.detectors import Preprocessing, load_detector
from qskd.errors import QskdError
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import predict_pairs
from qskd.evaluation.pairs import Pairs
from qskd.storage.places import fetched

DETECTIONS = 100  # of an image, of which labels are made, at least; of a detector with more queries as many as these
PART = 64  # pictures: what a killed job loses of each process, at most


class Picture(TypedDict):
    """One to label. digest: of its bytes. boxes_xyxy: of the objects that are known, in pixels: what overlaps one is no label."""

    id: int
    file_name: str
    digest: str
    boxes_xyxy: NotRequired[list[list[float]]]


@dataclass(frozen=True)
class Job:
    """What each process does.

    slots: the teacher's logit slot of each class that it knows; category_ids and thresholds: that class's, in the same order.
    root: what file names are relative to. parts: the folder of the parts' files. skip: whether broken pictures are left out.
    words: what a teacher that is asked in words is asked. identity: sha256 of all that decides the labels beside the pictures.
    most: detections of an image that may become labels.
    """

    model: str
    preprocessing: Preprocessing
    slots: tuple[int, ...]
    category_ids: tuple[int, ...]
    thresholds: tuple[float, ...]
    root: str
    parts: str
    identity: str
    skip: bool
    batch_size: int = 16
    threads: int = 1
    device: str = "auto"
    precision: str = "float32"
    most: int = DETECTIONS
    words: tuple[str, ...] = ()

    def fingerprint(self, pictures: Sequence[Picture]) -> str:
        """Of a part: the same, the same labels. `skip` and `batch_size` are not in it: whoever goes on with others after a broken
        picture, or for want of memory, keeps what is done."""
        content = [self.identity, *([each["id"], each["file_name"], each["digest"]] for each in pictures)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class LabelActor:
    """Holds the teacher. subject: of `Pulse`."""

    def __init__(self, job: Job, subject: str = "") -> None:
        self.job, self.pulse, self.images = job, Pulse(subject, uuid.uuid4().hex), 0
        torch.set_num_threads(job.threads)
        self.device = device_of(job.device)
        with fetched(job.model) as folder:
            self.detector = load_detector(folder, words=job.words).to(self.device).eval()
        self.pictures = PicturesInFolder(Path(job.root))
        self.threshold = dict(zip(job.category_ids, job.thresholds, strict=True))

    def __call__(self, parts: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        """parts: "number" [n], and "pictures" [n], JSON of `Picture`s. Yields the number of each, and what stopped it."""
        for number, text in zip(parts["number"].tolist(), parts["pictures"].tolist(), strict=True):
            failure = ""
            try:
                self.label(int(number), json.loads(text))
            except QskdError as error:  # trying again would not help: to the driver, which says it
                failure = error.to_json()
            yield {"number": np.array([number]), "failure": np.array([failure])}

    def label(self, number: int, pictures: Sequence[Picture]) -> None:
        """Write the part's file, unless it is there."""
        path, fingerprint = part_file(self.job.parts, number), self.job.fingerprint(pictures)
        if read_part(path, fingerprint, self.job.skip) is None:
            images, annotations, problems = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, str]]()
            for start in range(0, len(pictures), self.job.batch_size):
                batch = pictures[start : start + self.job.batch_size]
                sizes, found = self._detect(batch, problems)
                images += sizes
                known = {each["id"]: np.array(each.get("boxes_xyxy", []), np.float32) for each in batch}
                annotations += self._annotations(sizes, found, known)
            write_part(path, fingerprint, images, annotations, problems)
        self.images += len(pictures)
        self.pulse.tell(images=self.images)

    def _detect(
        self, batch: Sequence[Picture], problems: list[dict[str, str]]
    ) -> tuple[list[dict[str, Any]], Detections]:
        """The images' entries of COCO JSON, and what the teacher says of them."""
        entries, views = list[dict[str, Any]](), list[np.ndarray]()
        for each in batch:
            where = str(Path(self.job.root, each["file_name"]))
            located = self.pictures.locate(each["file_name"], "", where)
            try:
                picture = decode_image(self.pictures.read(located, each["file_name"], where), where)
            except QskdError as error:
                if not self.job.skip:
                    remedy = (
                        "mend or remove the picture; or the same command with `--on-error skip`, which leaves it out"
                    )
                    raise QskdError(
                        error.where, error.found, error.expected, f"{remedy}. What is labelled is kept"
                    ) from error
                problems.append({"where": error.where, "found": error.found})
                continue
            width, height = picture.size
            entries.append({"id": each["id"], "file_name": each["file_name"], "width": width, "height": height})
            views.append(view_image(picture, View.IDENTITY, self.job.preprocessing.resize))
        images, sizes = pad(views)
        arrays: dict[str, np.ndarray] = {
            "images": images,
            "sizes": sizes,
            "original_sizes": np.array([[each["height"], each["width"]] for each in entries], np.int32).reshape(-1, 2),
            "image_ids": np.array([each["id"] for each in entries], np.int64),
        }
        job = self.job
        (found,) = predict_pairs(
            *(
                self.detector,
                arrays,
                job.preprocessing,
                job.category_ids,
                [Pairs(job.most, False)],
                job.slots,
                self.device,
            ),
            precision=job.precision,
        )
        return entries, found

    def _annotations(
        self, images: Sequence[Mapping[str, Any]], found: Detections, known: Mapping[int, np.ndarray]
    ) -> list[dict[str, Any]]:
        """Those that reach their class's threshold and are no known object once more, cut to the image; not numbered yet. known:
        the objects' boxes of each image."""
        sizes = {each["id"]: (each["width"], each["height"]) for each in images}
        kept = list[dict[str, Any]]()
        for image_id, box, score, category in zip(
            found.image_ids.tolist(), found.boxes_xyxy, found.scores.tolist(), found.category_ids.tolist(), strict=True
        ):
            if score < self.threshold[category]:
                continue
            limits = np.array(sizes[image_id] * 2, np.float64)
            if overlapping(np.clip(box, 0, limits), known[image_id]).any():
                continue
            left, top, right, bottom = (round(float(side), 3) for side in np.clip(box.astype(np.float64), 0, limits))
            width, height = round(right - left, 3), round(bottom - top, 3)
            if min(width, height) < 1:  # nothing can be seen in it
                continue
            bbox = {"bbox": [left, top, width, height], "area": round(width * height, 3), "iscrowd": 0}
            kept.append({"image_id": image_id, "category_id": category, **bbox, "score": round(score, 6)})
        return kept
