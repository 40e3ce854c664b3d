"""The teacher as its cache remembers it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qskd.config import ResizeConfig
from qskd.datasets.batch import TrainBatch
from qskd.distillation.method import Facts, Online
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.columns.table import blank_extra, decode_batch
from qskd.teacher.crops import cropped
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.memory.basis import Bases, made_whole
from qskd.teacher.online import OnlineTeacher, without_places

if TYPE_CHECKING:
    from qskd.teacher.decoder import TeacherDecoder
    from qskd.teacher.memory.moments import Directions


class CachedTeacher:
    """Stands for a teacher whose outputs come with every batch; knows only what its cache's manifest says, and, where a method
    asks for it, has the teacher's decoder."""

    def __init__(
        self,
        sizes: CacheSizes,
        directions: tuple[Directions, ...] = (),
        decoder: TeacherDecoder | None = None,
        min_visible: float = 0.0,
        attended: bool = False,
        bases: Bases = (),
    ) -> None:
        """min_visible: of a query's box in a derived crop, or it is dropped. attended: as `Facts` has it. bases: in which the cache
        has the memory, one a map; none: as it is."""
        self.sizes, self.directions, self.decoder, self.min_visible = sizes, directions, decoder, min_visible
        self.attended, self.bases = attended, bases

    def to(self, device: torch.device) -> CachedTeacher:
        """With its decoder there."""
        self.bases = tuple(basis.to(device) for basis in self.bases)
        if self.decoder is not None:
            self.decoder.to(device)
        return self

    resize: ResizeConfig | None = None  # it wants no pixels

    @property
    def facts(self) -> Facts:
        """What its cache's manifest says of it."""
        sizes = self.sizes
        known = Facts(
            *(sizes.channels, sizes.cells, "", sizes.layers, sizes.queries, sizes.classes),
            directions=self.directions,
            attended=self.attended,
            bases=self.bases,
            parts=sizes.parts,
        )
        if self.decoder is None:
            return known
        detector = self.decoder.detector
        return replace(
            known,
            family=detector.family,
            chooses_queries=detector.chooses_queries,
            query_kind=detector.query_kind,
            query_width=detector.query_width,
        )

    def record(self, batch: TrainBatch, needs: TeacherNeeds) -> TeacherRecord:
        """What came with the batch."""
        if batch.cached:
            said = replace(made_whole(decode_batch(batch.cached), self.bases), parts=self.sizes.parts)
            crops_xyxy = batch.cached.get("teacher_crops_xyxy")
            said = said if crops_xyxy is None else cropped(said, crops_xyxy, self.min_visible)
            return said if self._gives_all else without_places(said)
        return self.blank(len(batch.images), batch.images.device, needs)

    @property
    def _gives_all(self) -> bool:
        """Whether all queries of every image are there: of each teacher that has maps, which one of boxes alone has not."""
        sizes = self.sizes
        return all(maps for _, maps in sizes.parts) if sizes.parts else bool(sizes.channels)

    def online(self, batch: TrainBatch) -> Online | None:
        """Nobody can be asked: `check_enough` has refused a method that would."""
        return None

    def blank(self, images: int, device: torch.device, needs: TeacherNeeds) -> TeacherRecord:
        """A record of zeros for images that stand in for none; its values are never used, its shapes are."""
        shape = (self.sizes.layers, images, self.sizes.queries)
        side = math.ceil(math.sqrt(self.sizes.queries)) if needs.decoder else 1  # queries may be chosen from the cells
        valid = torch.ones(images, side, side, dtype=torch.bool, device=device)
        return TeacherRecord(
            logits=torch.zeros(*shape, self.sizes.classes, device=device),
            boxes_cxcywh=torch.full((*shape, 4), 0.5, device=device),
            memory=tuple(torch.zeros(images, width, side, side, device=device) for width in self.sizes.channels),
            memory_valid=(valid,) * len(self.sizes.channels),
            attention_queries=torch.full((images, 1), -1, dtype=torch.int64, device=device),
            extra=blank_extra(images, self.sizes, device, needs),
            attention=(torch.zeros(images, 1, side, side, device=device),) * len(self.sizes.channels),
            parts=self.sizes.parts,
        )


Teacher = OnlineTeacher | CachedTeacher
