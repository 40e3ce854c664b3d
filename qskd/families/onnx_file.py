"""A detector of any kind in an ONNX file (`qskd.checkpoints.graphs`): what it was made of is not seen."""

from __future__ import annotations

from typing import Any

from torch import nn

from qskd.families.boxes_alone import BoxesAlone
from qskd.families.facts import ONNX


class OnnxFile(BoxesAlone):
    name = ONNX
    model_class = processor_class = None  # transformers has none

    def num_queries(self, config: Any) -> int:
        return int(config.queries)

    def chooses_queries(self, config: Any) -> bool:
        return True  # for all that is known: most have sorted boxes by score

    def image_unit(self, config: Any) -> int:
        return 1

    def class_heads(self, model: Any) -> list[nn.Linear]:
        self._refuse()

    def backbone(self, model: Any) -> nn.Module:
        whole: nn.Module = model
        return whole
