"""Several teachers asked as one: their queries and memory maps stand one after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qskd.config import ResizeConfig
from qskd.detectors import Detector, Preprocessing
from qskd.distillation.method import Facts
from qskd.structures import Attend, TeacherNeeds, TeacherRecord
from qskd.teacher.decoder import TeacherDecoder
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.online import OnlineTeacher


class TeachersTogether(OnlineTeacher):
    """As `OnlineTeacher`. members: by at least two of them each class is known to one at most, and all are given the same pictures;
    each normalises them as it was trained. What is asked of one detector (`detector`) is the first's."""

    def __init__(self, members: Sequence[OnlineTeacher]) -> None:
        nn.Module.__init__(self)
        self.members = nn.ModuleList(members)
        self.directions = ()
        self.knows_all = False

    @property
    def _members(self) -> list[OnlineTeacher]:
        return list(self.members)  # type: ignore[arg-type]

    @property
    def detector(self) -> Detector:  # type: ignore[override]
        return self._members[0].detector

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """The first's; its resize is everyone's."""
        return self._members[0].preprocessing

    @property
    def resize(self) -> ResizeConfig:
        return self.preprocessing.resize

    @property
    def facts(self) -> Facts:
        each = [member.facts for member in self._members]
        return Facts(
            channels=tuple(width for one in each for width in one.channels),
            cells=tuple(cells for one in each for cells in one.cells),
            layers=min(one.layers or 1 for one in each),
            queries=sum(one.queries or 0 for one in each),
            classes=each[0].classes,
            chooses_queries=any(one.chooses_queries for one in each),
            directions=self.directions,
            parts=self._parts(each),
        )

    @staticmethod
    def _parts(each: Sequence[Facts]) -> tuple[tuple[int, int], ...]:
        return tuple((one.queries or 0, len(one.channels)) for one in each)

    @property
    def decoder(self) -> TeacherDecoder:
        raise ValueError("several teachers have no decoder in common")  # `check_several` has refused who would ask

    def sizes(self, all_layers: bool) -> CacheSizes:
        facts = self.facts
        layers = (facts.layers or 1) if all_layers else 1
        return CacheSizes(layers, facts.queries or 0, facts.classes or 0, facts.channels, facts.cells, facts.parts)

    def said(
        self, images: Tensor, sizes: Tensor, needs: TeacherNeeds, least: tuple[int, int] | None
    ) -> tuple[TeacherRecord, Attend | None]:
        records, ways = zip(*(member.said(images, sizes, needs, least) for member in self._members), strict=True)
        record = TeacherRecord(
            logits=torch.cat([each.logits for each in records], 2),
            boxes_cxcywh=torch.cat([each.boxes_cxcywh for each in records], 2),
            memory=tuple(level for each in records for level in each.memory),
            memory_valid=tuple(level for each in records for level in each.memory_valid),
            absent=_absent(records),
            parts=self._parts([member.facts for member in self._members]),
        )
        if not needs.attention:
            return record, None
        counts, total = [queries for queries, _ in record.parts], record.logits.shape[2]

        def attend(asked: Tensor) -> tuple[Tensor, ...]:
            """Number n * total + i is query i of the n-th layer before the last. Another teacher's maps it does not see."""
            layer, query = asked.div(total, rounding_mode="floor"), asked % total
            found: list[Tensor] = []
            first = 0
            for count, way in zip(counts, ways, strict=True):
                own = (asked >= 0) & (query >= first) & (query < first + count)
                found += way(torch.where(own, layer * count + query - first, -1))
                first += count
            return tuple(found)

        return record, attend


def _absent(records: Sequence[TeacherRecord]) -> Tensor | None:
    """Of all: each query of a teacher that has no absent ones is there."""
    if all(each.absent is None for each in records):
        return None
    found = [
        torch.zeros_like(each.logits[..., 0], dtype=torch.bool) if each.absent is None else each.absent
        for each in records
    ]
    return torch.cat(found, 2)
