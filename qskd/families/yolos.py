"""YOLOS (Fang et al., NeurIPS 2021): a ViT whose last tokens are detections. It has no decoder and no memory: boxes alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import YolosForObjectDetection, YolosImageProcessorPil

from qskd.errors import QskdError
from qskd.families.boxes_alone import BoxesAlone


class Yolos(BoxesAlone):
    name = "yolos"
    model_class = YolosForObjectDetection
    processor_class = YolosImageProcessorPil
    classification = "softmax"
    no_object_rows = 1

    def check(self, config: Any) -> None:
        sides, patch = config.image_size, config.patch_size
        right = isinstance(patch, int) and len(sides) == 2 and all(isinstance(side, int) for side in sides)
        if not right or min(sides) < patch or config.hidden_size % config.num_attention_heads:
            found = (
                f"image_size {sides}, patch_size {patch}, {config.num_attention_heads} heads of {config.hidden_size}"
            )
            raise QskdError(self.name, found, "two sides of whole patches, and heads that divide the width")

    def num_queries(self, config: Any) -> int:
        return int(config.num_detection_tokens)

    def image_unit(self, config: Any) -> int:
        return int(config.patch_size)

    def check_size(self, config: Any, height: int, width: int) -> None:
        if min(height, width) < config.patch_size:
            raise QskdError(
                self.name, f"images of {height} x {width} pixels", f"sides of {config.patch_size} at least, one patch"
            )

    def class_heads(self, model: Any) -> list[nn.Linear]:
        return [model.class_labels_classifier.layers[-1]]

    def backbone(self, model: Any) -> nn.Module:
        vit: nn.Module = model.vit
        return vit
