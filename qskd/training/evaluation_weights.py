"""The student as it is evaluated and saved, for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from qskd.detectors import Detector

if TYPE_CHECKING:
    from qskd.training.step import Training


class EvaluationWeights:
    """Of `Training.evaluation_weights`."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.saved: dict[str, Tensor] = {}

    def __enter__(self) -> Detector:
        training, student = self.training, self.training.student
        if training.world > 1 and training.shared_buffers_at != training.step:
            # The average's too: it is what is evaluated, and each worker averages its own statistics.
            averaged = [training.average[name] for name, _ in student.named_buffers() if name in training.average]
            for buffer in [*student.buffers(), *averaged]:
                dist.broadcast(buffer, 0)
            training.shared_buffers_at = training.step
        if training.average:
            self.saved = {k: v.detach().clone() for k, v in student.state_dict().items()}
            student.load_state_dict(training.average)
        for norm in training.shared_norms:
            norm.absent = False
        return student.eval()

    def __exit__(self, *_: object) -> None:
        if self.saved:
            self.training.student.load_state_dict(self.saved)
        self.training.student.train()
