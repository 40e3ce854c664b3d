"""What a distillation makes of one image, as numbers: objects, detections, the queries that GQS keeps, AGFD's mask.

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
from qskd.config import Config, QuerySelectionConfig
from qskd.datasets.views import Pixels, View, crop_size, view_boxes, view_image, view_picture
from qskd.detectors import Detector, Preprocessing
from qskd.distillation.qskd.agfd import foreground_mask
from qskd.distillation.qskd.method import QSKD
from qskd.distillation.qskd.query_selection import QuerySelection, select_queries
from qskd.evaluation.average_precision import detections_from
from qskd.evaluation.detections import Detections
from qskd.evaluation.inference import best_first, predict_image
from qskd.losses.matching import assign
from qskd.structures import Targets, TeacherRecord
from qskd.teacher.online import OnlineTeacher, queries_above

STAND_IN_SCORE = 0.5  # of a teacher's detection that stands in for an object
STAND_IN_IOU = 0.7  # with a better one, from which on it is the same object seen twice
Boxes = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Subject:
    """One image and what is known to be in it.

    name: for people. image: uint8 [H, W, 3], as stored. boxes_xyxy: [N, 4] in its pixels, None where no one annotated it;
    labels: int64 [N], contiguous; iscrowd: bool [N]. view: what part of it is looked at, and mirrored or not.
    """

    name: str
    image: Pixels
    boxes_xyxy: Boxes | None = None
    labels: NDArray[np.int64] | None = None
    iscrowd: NDArray[np.bool_] | None = None
    view: View = View.IDENTITY


@dataclass(frozen=True, eq=False)
class Seer:
    """A detector, the pixels it wants, and its logit slot of each of the dataset's classes."""

    detector: Detector
    preprocessing: Preprocessing
    slots: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class KeptQueries:
    """GQS's word on each of the teacher's Q queries. boxes_xyxy: [Q, 4], pixels; is_positive: bool [Q]; band: int64 [Q];
    weight: float32 [Q], 0 = dropped. rule: the bands' boundaries and weights."""

    boxes_xyxy: Boxes
    is_positive: NDArray[np.bool_]
    band: NDArray[np.int64]
    weight: NDArray[np.float32]
    rule: QuerySelectionConfig

    @property
    def positives(self) -> int:
        return int((self.is_positive & (self.weight > 0)).sum())

    def hard_negatives(self, band: int | None = None) -> int:
        """How many are kept; of one band, or of all."""
        kept = ~self.is_positive & (self.weight > 0)
        return int((kept if band is None else kept & (self.band == band)).sum())

    @property
    def _dropped(self) -> NDArray[np.bool_]:
        """[Q], by the weight of its band; what else has no weight was too many for its object."""
        return np.asarray(self.rule.band_weights)[self.band] == 0

    @property
    def easy_negatives(self) -> int:
        return int((~self.is_positive & (self.weight == 0) & self._dropped).sum())

    @property
    def beyond_limit(self) -> int:
        """Hard negatives that are dropped: of lower GIoU than `rule.max_per_object` others of their object."""
        return int((~self.is_positive & (self.weight == 0) & ~self._dropped).sum())


@dataclass(frozen=True, eq=False)
class Mask:
    """AGFD's mask: float32 [h, w] for each of the teacher's memory maps, finest first.

    share: the part of its mass (the sum over all maps' cells) that lies in objects' boxes. object_share: the part of the
    picture that those boxes cover, which is the share of a mask that is 1 everywhere. NaN for an empty mask.
    """

    levels: tuple[NDArray[np.float32], ...]
    share: float
    object_share: float

    def density(self, height: int, width: int) -> NDArray[np.float32]:
        """[height, width] >= 0, its mass per area over the picture, all maps together: a cell counts as much as any
        other, so a map with four times the cells counts four times. Integrates to `share` over the objects."""
        total = np.zeros((height, width), np.float32)
        for level in self.levels:
            high, wide = level.shape
            rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in ((height, high), (width, wide)))
            total += level[rows[:, None], columns] * level.size
        return total / np.float32(sum(level.size for level in self.levels))


@dataclass(frozen=True, eq=False)
class Explanation:
    """image: uint8 [H, W, 3], the view at the picture's own resolution; all boxes are in its pixels.

    objects: the targets, scores 1. stand_ins: they are the teacher's own detections, for want of annotations.
    crowds_xyxy: [C, 4], regions that are no targets. teacher, kept, mask: None without a teacher. students: by title;
    their `category_ids`, as all here, are indices into `labels`.
    """

    name: str
    image: Pixels
    labels: tuple[str, ...]
    objects: Detections
    crowds_xyxy: Boxes
    stand_ins: bool
    threshold: float
    teacher: Detections | None
    kept: KeptQueries | None
    mask: Mask | None
    students: Mapping[str, Detections]


def ask_teacher(
    teacher: OnlineTeacher, images: Tensor, sizes: Tensor, targets: Targets, config: Config
) -> tuple[TeacherRecord, QuerySelection, tuple[Tensor, ...]]:
    """The teacher's record, what the recipe keeps of its last layer (no layer dimension), and the masks, one a memory map.

    images, sizes: as `OnlineTeacher` takes them. The mask is computed also where the recipe does not use it.
    """
    distillation = config.distillation
    needs = replace(QSKD.needs_of(distillation), attention=True)

    def keepable(record: TeacherRecord) -> Tensor:
        return queries_above(record, targets, distillation.selection.floor, config.detection)

    record: TeacherRecord = teacher(images, sizes, needs, keepable)
    (assignment,) = assign([(record.logits[-1:], record.boxes_cxcywh[-1:])], targets, config.detection)
    selection = select_queries(record.boxes_cxcywh[-1], targets, assignment[-1], distillation.selection)
    confidence = record.logits[-1].float().amax(-1).sigmoid()
    return record, selection, foreground_mask(selection, record, confidence, distillation.features)


def covered(boxes_xyxy: NDArray[np.floating], height: int, width: int) -> NDArray[np.float64]:
    """The part of each of height x width cells over the picture that lies in some box: [height, width] in 0..1.

    boxes_xyxy: [N, 4], relative to the picture. Exact, overlaps counted once.
    """
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4).clip(0, 1)
    cuts = [
        np.unique(np.concatenate([boxes[:, axis::2].ravel(), np.linspace(0, 1, cells + 1)]))
        for axis, cells in ((0, width), (1, height))
    ]
    x, y = ((cut[1:] + cut[:-1]) / 2 for cut in cuts)  # between two cuts all points have the same boxes and cell
    within_x = (x >= boxes[:, :1]) & (x <= boxes[:, 2:3])
    within_y = (y >= boxes[:, 1:2]) & (y <= boxes[:, 3:])
    inside = np.einsum("ny,nx->yx", within_y.astype(np.float64), within_x.astype(np.float64)) > 0
    area = inside * np.outer(np.diff(cuts[1]), np.diff(cuts[0]))
    cell = (y * height).astype(int)[:, None] * width + (x * width).astype(int)
    sums: NDArray[np.float64] = np.bincount(cell.ravel(), area.ravel(), height * width).astype(np.float64)
    return sums.reshape(height, width) * (height * width)


def make_mask(levels: tuple[NDArray[np.float32], ...], boxes_xyxy: NDArray[np.floating]) -> Mask:
    """levels: [h, w] each, without padding; boxes_xyxy: the objects', relative to the picture."""
    whole = sum(float(level.sum()) for level in levels)
    inside = sum(float((level * covered(boxes_xyxy, *level.shape)).sum()) for level in levels)
    return Mask(levels, inside / whole if whole > 0 else float("nan"), float(covered(boxes_xyxy, 1, 1)[0, 0]))


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


def _targets(boxes_cxcywh: Tensor, labels: Tensor) -> Targets:
    count = len(labels)
    return Targets(boxes_cxcywh[None], labels[None], torch.ones_like(labels, dtype=torch.bool)[None], (0,), (count,))


@torch.no_grad()
def explain(
    subject: Subject,
    config: Config,
    labels: tuple[str, ...],
    teacher: OnlineTeacher | None,
    students: Mapping[str, Seer],
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

    found = queries = mask = None
    if teacher is not None:
        device = next(teacher.detector.parameters()).device
        pixels = view_image(subject.image, view, teacher.preprocessing.resize)
        images = torch.from_numpy(pixels.copy())[None].to(device)
        sizes = torch.tensor([pixels.shape[:2]], device=device)
        if subject.boxes_xyxy is None:
            needs = replace(QSKD.needs_of(config.distillation), attention=False)
            boxes_cxcywh, object_labels = (part.cpu() for part in stand_in_objects(teacher(images, sizes, needs)))
        targets = _targets(boxes_cxcywh.to(device), object_labels.to(device))
        record, selection, masks = ask_teacher(teacher, images, sizes, targets, config)
        logits, boxes = record.logits[-1].cpu(), record.boxes_cxcywh[-1].cpu()
        found = detections_from(logits, boxes, [0], torch.tensor([size]), range(len(labels)))
        found = best_first(found, threshold)
        said = (part[0].cpu().numpy() for part in (selection.is_positive, selection.band, selection.weight))
        is_positive, band, weight = said
        queries = KeptQueries(pixels_of(boxes[0]), is_positive, band, weight, config.distillation.selection)
        levels = tuple(_without_padding(*pair) for pair in zip(masks, record.memory_valid, strict=True))
        mask = make_mask(levels, cxcywh_to_xyxy(boxes_cxcywh).numpy())

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
        queries,
        mask,
        {
            title: predict_image(seer.detector, subject.image, seer.preprocessing, seer.slots, threshold, view)
            for title, seer in students.items()
        },
    )


def _without_padding(mask: Tensor, valid: Tensor) -> NDArray[np.float32]:
    """[1, H, W] and where it is no padding (a rectangle at the top left) -> that rectangle, [h, w]."""
    height, width = int(valid[0].any(1).sum()), int(valid[0].any(0).sum())
    return np.asarray(mask[0, :height, :width].float().cpu().numpy())
