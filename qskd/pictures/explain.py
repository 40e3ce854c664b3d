"""What a distillation makes of one image, as numbers: objects, detections, and what each method shows of itself.

The teacher is asked as a training step asks it, so that what is shown is what the student learns from. `explained` draws it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.config import Config
from qskd.datasets.views import Pixels, View, crop_size, view_boxes, view_image, view_picture
from qskd.detectors import Detector, Preprocessing
from qskd.distillation.method import Seen, Sight, methods_of
from qskd.evaluation.average_precision import detections_from
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import best_first, most_pairs, predict_image
from qskd.structures import Targets, TeacherNeeds, TeacherRecord
from qskd.teacher.online import Choose, OnlineTeacher
from qskd.teacher.pseudo import with_pseudo_objects
from qskd.training.augmentation.student import augmentation_of

AUGMENTED = 4  # examples of what the student sees
STAND_IN_SCORE = 0.5  # of a teacher's detection that stands in for an object
STAND_IN_IOU = 0.7  # with a better one, from which on it is the same object seen twice
Boxes = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Subject:
    """One image and what is known to be in it.

    name: for people. image: uint8 [H, W, 3], as stored. boxes_xyxy: [N, 4] in its pixels, None where no one annotated it;
    labels: int64 [N], contiguous; iscrowd: bool [N]. view: what part of it is looked at, and mirrored or not. unlabeled: it is of
    `data.unlabeled`.
    """

    name: str
    image: Pixels
    boxes_xyxy: Boxes | None = None
    labels: NDArray[np.int64] | None = None
    iscrowd: NDArray[np.bool_] | None = None
    view: View = View.IDENTITY
    unlabeled: bool = False


@dataclass(frozen=True, eq=False)
class DatasetDetector:
    """A detector, its preprocessing, and which logit stands for each dataset class."""

    detector: Detector
    preprocessing: Preprocessing
    slots: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Explanation:
    """image: uint8 [H, W, 3], the view at the picture's own resolution; all boxes are in its pixels.

    objects: the targets, scores 1. stand_ins: they are the teacher's own detections of `stand_in_score`, for want of annotations.
    unlabeled: the image is of `data.unlabeled`: these are then what the student is taught to find.
    crowds_xyxy: [C, 4], regions that are no targets. teacher: None without one. seen: by the recipe's methods, empty without
    a teacher. students: by title; their `category_ids`, as all here, are indices into `labels`. augmented: uint8 [h, w, 3] each,
    what a training step may show the student of this view (`augmentation`); none where it shows the view as it is.
    """

    name: str
    image: Pixels
    labels: tuple[str, ...]
    objects: Detections
    crowds_xyxy: Boxes
    stand_ins: bool
    threshold: float
    teacher: Detections | None
    seen: tuple[Seen, ...]
    students: Mapping[str, Detections]
    augmented: tuple[Pixels, ...] = ()
    unlabeled: bool = False
    stand_in_score: float = STAND_IN_SCORE


def stand_in_objects(record: TeacherRecord) -> tuple[Tensor, Tensor]:
    """boxes_cxcywh [M, 4] and labels [M] of what one image's teacher is sure of (`STAND_IN_SCORE`), best first, an object
    seen twice (`STAND_IN_IOU`) once."""
    scores, labels = record.logits[-1, 0].float().sigmoid().max(-1)
    boxes, chosen = record.boxes_cxcywh[-1, 0].float(), list[int]()
    for query in scores.argsort(descending=True, stable=True).tolist():
        if scores[query] < STAND_IN_SCORE:
            break
        mine, better = cxcywh_to_xyxy(boxes[query]), cxcywh_to_xyxy(boxes[chosen])
        if not chosen or iou(mine, better).max() < STAND_IN_IOU:
            chosen.append(query)
    return boxes[chosen], labels[chosen]


def augmented(subject: Subject, config: Config, student: Detector) -> tuple[Pixels, ...]:
    """The view as `AUGMENTED` training steps would show it to the student; of those sizes."""
    augmentation = augmentation_of(config, student, total_steps=2**20)
    if augmentation is None:
        return ()
    pixels = torch.from_numpy(view_image(subject.image, subject.view, config.student.resize).copy())[None]
    sizes = torch.tensor([pixels.shape[1:3]])
    return tuple(augmentation(pixels, sizes, [0], step)[0][0].numpy() for step in range(AUGMENTED))


def _targets(boxes_cxcywh: Tensor, labels: Tensor) -> Targets:
    count = len(labels)
    return Targets(boxes_cxcywh[None], labels[None], torch.ones_like(labels, dtype=torch.bool)[None], (0,), (count,))


def _pseudo_objects(
    record: TeacherRecord, score: float, beside: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """As `stand_in_objects`, as a training step has them, which tells none from another: of an image without labels, or beside
    those of a labelled one (`data.completed`), boxes_cxcywh and labels."""
    own = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)) if beside is None else beside
    boxes, labels = (part.to(record.logits.device) for part in own)
    targets = replace(_targets(boxes, labels), labelled=(beside is not None,))
    found = with_pseudo_objects(targets, record, score, completed=beside is not None)
    return found.boxes_cxcywh[0], found.labels[0]


@torch.no_grad()
def explain(
    subject: Subject,
    config: Config,
    labels: tuple[str, ...],
    teacher: OnlineTeacher | None,
    students: Mapping[str, DatasetDetector],
    threshold: float = 0.3,
) -> Explanation:
    """Ask everyone about one image. threshold: the lowest score that counts as a detection, of teacher and students.

    An image that no one annotated takes the teacher's own confident detections for its objects; without a teacher it has
    none.
    """
    view, (height, width) = subject.view, subject.image.shape[:2]
    size = crop_size(height, width, view)
    scale = np.array([size[1], size[0], size[1], size[0]], np.float32)

    def pixels_of(boxes_cxcywh: Tensor) -> Boxes:
        return np.asarray(cxcywh_to_xyxy(boxes_cxcywh.float()).cpu().numpy() * scale, np.float32)

    boxes_cxcywh, object_labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    crowds_xyxy = np.zeros((0, 4), np.float32)
    if subject.boxes_xyxy is not None and subject.labels is not None and subject.iscrowd is not None:
        visible = config.data.views.min_visible
        single = ~subject.iscrowd
        seen, kept = view_boxes(subject.boxes_xyxy[single], width, height, view, visible)
        boxes_cxcywh, object_labels = torch.from_numpy(seen), torch.from_numpy(subject.labels[single][kept])
        crowds, _ = view_boxes(subject.boxes_xyxy[subject.iscrowd], width, height, view, visible)
        crowds_xyxy = pixels_of(torch.from_numpy(crowds))

    score = config.data.unlabeled_score if subject.unlabeled else STAND_IN_SCORE
    found: Detections | None = None
    shown_by: tuple[Seen, ...] = ()
    if teacher is not None:
        device = next(teacher.detector.parameters()).device
        pixels = view_image(subject.image, view, teacher.preprocessing.resize)
        images = torch.from_numpy(pixels.copy())[None].to(device)
        sizes = torch.tensor([pixels.shape[:2]], device=device)
        records: list[TeacherRecord] = []

        def ask(needs: TeacherNeeds, choose: Choose | None = None) -> TeacherRecord:
            records.append(teacher(images, sizes, needs, choose))
            return records[-1]

        if subject.boxes_xyxy is None:
            answer = ask(TeacherNeeds())
            taken = _pseudo_objects(answer, score) if subject.unlabeled else stand_in_objects(answer)
            boxes_cxcywh, object_labels = (part.cpu() for part in taken)
        elif config.data.completed:
            beside = boxes_cxcywh, object_labels
            taken = _pseudo_objects(ask(TeacherNeeds()), config.data.unlabeled_score, beside)
            boxes_cxcywh, object_labels = (part.cpu() for part in taken)
        targets = _targets(boxes_cxcywh.to(device), object_labels.to(device))
        sight = Sight(ask, targets, config.detection, width=size[1], height=size[0])
        said = [method.seen(settings, sight) for method, settings in methods_of(config.distillation)]
        shown_by = tuple(each for each in said if each is not None)
        record = records[-1] if records else ask(TeacherNeeds())
        logits, boxes = record.logits[-1].cpu(), record.boxes_cxcywh[-1].cpu()
        most = most_pairs(logits.shape[1], threshold)
        found = detections_from(logits, boxes, [0], torch.tensor([size]), range(len(labels)), most)
        found = best_first(found, threshold)

    return Explanation(
        subject.name,
        view_picture(subject.image, view),
        labels,
        Detections(
            np.zeros(len(object_labels), np.int64),
            pixels_of(boxes_cxcywh),
            np.ones(len(object_labels), np.float32),
            object_labels.numpy(),
        ),
        crowds_xyxy,
        subject.boxes_xyxy is None,
        threshold,
        found,
        shown_by,
        {
            title: predict_image(student.detector, subject.image, student.preprocessing, student.slots, threshold, view)
            for title, student in students.items()
        },
        augmented(subject, config, [*students.values()][-1].detector) if students else (),
        subject.unlabeled,
        score,
    )
