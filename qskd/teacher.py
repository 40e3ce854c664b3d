"""The teacher at work in the training step: pixels in, TeacherRecord out, in the dataset's class order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qskd.detectors import Detector, Preprocessing, to_pixels
from qskd.structures import TeacherNeeds, TeacherRecord


class OnlineTeacher(nn.Module):
    """A frozen detector that says what a distillation method needs of it.

    class_slots: the teacher's logit slot of each dataset class (`qskd.classes.map_classes`).
    """

    def __init__(self, detector: Detector, class_slots: tuple[int, ...], preprocessing: Preprocessing) -> None:
        super().__init__()
        self.detector = detector.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.register_buffer("class_slots", torch.tensor(class_slots, dtype=torch.int64), persistent=False)

    @property
    def memory_channels(self) -> tuple[int, ...]:
        return self.detector.memory_channels

    def train(self, mode: bool = True) -> OnlineTeacher:
        """Stays in evaluation mode, whatever it is part of."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Tensor, needs: TeacherNeeds) -> TeacherRecord:
        """images: uint8 [B, H, W, 3] at the teacher's own resolution; sizes: int [B, 2] real height and width."""
        pixels, mask = to_pixels(images, sizes, self.preprocessing.mean, self.preprocessing.std)
        output = self.detector(pixels, mask, with_attention=needs.attention)
        layers = slice(None) if needs.all_layers else slice(-1, None)
        record = TeacherRecord(
            logits=output.logits[layers].index_select(-1, self.class_slots),
            boxes_cxcywh=output.boxes_cxcywh[layers],
            memory=output.memory if needs.memory else (),
            memory_valid=output.memory_valid if needs.memory else (),
        )
        if not needs.attention:
            return record
        # All queries: which of them a method keeps depends on the matching, which has not been done yet.
        queries = torch.arange(self.detector.num_queries, device=images.device).expand(len(images), -1)
        attend = output.attend_mean if needs.attention_layers == "mean" else output.attend
        return replace(record, attention_queries=queries, attention=attend(queries))
