"""What QSKD makes of one image, as numbers: the queries that GQS keeps, AGFD's mask.

The teacher is asked as a training step asks it, so that what is shown is what the student learns from. `drawn` draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, extent_wh
from qskd.config import DetectionLossConfig
from qskd.distillation.method import Seen, Sight, last_layer
from qskd.distillation.qskd.agfd import foreground_mask
from qskd.distillation.qskd.drawn import mask_panel, selection_panel
from qskd.distillation.qskd.query_selection import QuerySelection, select_queries
from qskd.distillation.qskd.settings import QuerySelectionConfig, Settings
from qskd.distillation.shared.apart import apart, matched, matches_apart, prediction
from qskd.losses.matching import assign
from qskd.pictures.panels import Panel
from qskd.structures import Targets, TeacherNeeds, TeacherRecord
from qskd.teacher.online import queries_above

Boxes = NDArray[np.float32]


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


def _without_padding(mask: Tensor, valid: Tensor) -> NDArray[np.float32]:
    """[1, H, W] and where it is no padding (a rectangle at the top left) -> that rectangle, [h, w]."""
    width, height = extent_wh(valid)[0].tolist()
    return np.asarray(mask[0, :height, :width].float().cpu().numpy())


@dataclass(frozen=True, eq=False)
class QSKDSeen(Seen):
    """kept: of the teacher's last layer. mask: computed also where the recipe does not use it; of no level where the teacher has no
    attention to show."""

    kept: KeptQueries
    mask: Mask

    def panels(self, shown: Any) -> Sequence[Panel]:
        return [selection_panel(self.kept, shown), *([mask_panel(self.mask, shown)] if self.mask.levels else [])]

    def summary(self) -> list[str]:
        said = [f"{self.kept.positives} positive and {self.kept.hard_negatives()} hard negative queries"]
        if self.mask.share == self.mask.share:  # NaN: an empty mask
            said.append(f"{self.mask.share:.0%} of the mask in objects ({self.mask.object_share:.0%} of the picture)")
        return said


def ask_teacher(
    ask: Callable[..., TeacherRecord],
    needs: TeacherNeeds,
    targets: Targets,
    settings: Settings,
    costs: DetectionLossConfig,
) -> tuple[TeacherRecord, QuerySelection, tuple[Tensor, ...]]:
    """The teacher's record, what the recipe keeps of its last layer (no layer dimension), and that layer's masks, one a map.

    ask: from needs, and a choice of the queries whose attention is wanted, to the record. The mask is computed also where
    the recipe does not use it; a teacher of boxes and classes alone has none.
    """

    def keepable(record: TeacherRecord) -> Tensor:
        return queries_above(record, targets, settings.selection.floor, costs, needs.attention_layers)

    record = ask(replace(needs, attention=True), keepable)
    (assignment,) = assign([prediction(last_layer(record))], targets, costs)
    given = matches_apart(record, matched(last_layer(record), assignment, targets)[-1])
    selections, masks = list[QuerySelection](), list[Tensor]()
    for part, matches in zip(apart(record), given, strict=True):
        strange = part.silent[targets.labels] if record.parts else None
        absent = None if part.absent is None else part.absent[-1]
        chosen = select_queries(part.boxes_cxcywh[-1], targets, matches, settings.selection, absent, strange)
        confidence = part.logits[-1].float().amax(-1).sigmoid()
        masks += foreground_mask(chosen, part, confidence, settings.features) if part.attention else ()
        selections.append(chosen)
    named = {name: [getattr(each, name) for each in selections] for name in vars(selections[0])}
    return record, QuerySelection(**{name: torch.cat(each, -1) for name, each in named.items()}), tuple(masks)


def see(settings: Settings, needs: TeacherNeeds, sight: Sight) -> QSKDSeen:
    """One image's selection and mask. needs: the method's own."""
    record, selection, masks = ask_teacher(sight.ask, needs, sight.targets, settings, sight.costs)
    scale = np.array([sight.width, sight.height, sight.width, sight.height], np.float32)
    boxes = np.asarray(cxcywh_to_xyxy(record.boxes_cxcywh[-1, 0].float()).cpu().numpy() * scale, np.float32)
    parts = (selection.is_positive, selection.band, selection.weight)
    is_positive, band, weight = (part[0].cpu().numpy() for part in parts)
    levels = tuple(_without_padding(*pair) for pair in zip(masks, record.memory_valid, strict=True))
    objects = cxcywh_to_xyxy(sight.targets.boxes_cxcywh[0].float().cpu()).numpy()
    return QSKDSeen(KeptQueries(boxes, is_positive, band, weight, settings.selection), make_mask(levels, objects))
