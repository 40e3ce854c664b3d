"""A batch for a worker whose share is empty."""

from __future__ import annotations

import torch
from torch import Tensor

from qskd.config import ResizeConfig
from qskd.datasets.batch import TrainBatch
from qskd.structures import Targets, to_device
from qskd.teacher.cached import Teacher


def stand_in(device: torch.device, student: ResizeConfig, teacher: Teacher | None) -> TrainBatch:
    """One black image without objects, for a worker whose share is empty: no detector takes a batch of none, and the
    other workers wait for its gradients. Small, where a network does not insist on its own (square) size."""

    def black(resize: ResizeConfig) -> tuple[Tensor, Tensor]:
        side = resize.size if resize.mode == "square" else 64
        return torch.zeros(1, side, side, 3, dtype=torch.uint8), torch.full((1, 2), side, dtype=torch.int32)

    none = torch.zeros(1, 0, dtype=torch.int64)
    targets = Targets(torch.zeros(1, 0, 4), none, none.bool(), image_ids=(), counts=(0,))
    own = (teacher and teacher.resize) or student
    images, teacher_images = black(student), black(own)
    sides = [(size, size) for size in (images[0].shape[1], teacher_images[0].shape[1])]
    return to_device(TrainBatch(*images, *teacher_images, targets, {}, *sides), device)
