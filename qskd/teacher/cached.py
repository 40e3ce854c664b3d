"""The teacher as its cache remembers it."""

from __future__ import annotations

import torch

from qskd.structures import TeacherRecord
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.online import OnlineTeacher


class CachedTeacher:
    """Stands for a teacher whose outputs come with every batch; knows only what its cache's manifest says."""

    def __init__(self, sizes: CacheSizes) -> None:
        self.sizes = sizes

    @property
    def memory_channels(self) -> tuple[int, ...]:
        return self.sizes.channels

    @property
    def memory_cells(self) -> tuple[float, ...]:
        return self.sizes.cells

    def blank(self, images: int, device: torch.device) -> TeacherRecord:
        """A record of zeros for images that stand in for none; its values are never used, its shapes are."""
        shape = (self.sizes.layers, images, self.sizes.queries)
        valid = torch.ones(images, 1, 1, dtype=torch.bool, device=device)
        return TeacherRecord(
            logits=torch.zeros(*shape, self.sizes.classes, device=device),
            boxes_cxcywh=torch.full((*shape, 4), 0.5, device=device),
            memory=tuple(torch.zeros(images, width, 1, 1, device=device) for width in self.sizes.channels),
            memory_valid=(valid,) * len(self.sizes.channels),
            attention_queries=torch.full((images, 1), -1, dtype=torch.int64, device=device),
            attention=(torch.zeros(images, 1, 1, 1, device=device),) * len(self.sizes.channels),
        )


Teacher = OnlineTeacher | CachedTeacher
