"""Grounding DINO (Liu et al., ECCV 2024) and MM Grounding DINO: Deformable DETR's maps and sampled attention, asked in words.

They can teach and no more. What a query says is a logit for each token of a text; `qskd.detectors.teachers` makes classes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    MMGroundingDinoForObjectDetection,
)

from qskd.config import StudentConfig
from qskd.errors import QskdError
from qskd.families.deformable_detr import sampling, splat_levels
from qskd.families.facts import TEACHERS_ONLY
from qskd.families.family import Family, Predictions


class GroundingDino(Family):
    name = "grounding-dino"
    model_class: ClassVar[Any] = GroundingDinoForObjectDetection
    processor_class = GroundingDinoImageProcessorPil
    many_maps = True
    asked_in_words = True

    def check(self, config: Any) -> None:
        if not getattr(config, "two_stage", True):
            raise QskdError(
                self.name,
                "two_stage: false",
                "a detector that chooses its queries in each image, as all that are published do",
                "choose another checkpoint",
            )

    def chooses_queries(self, config: Any) -> bool:
        return True

    def projections(self, model: Any) -> list[nn.Module]:
        return list(model.model.input_proj_vision)

    def class_heads(self, model: Any) -> list[nn.Linear]:
        return []  # a class is a text

    def backbone(self, model: Any) -> nn.Module:
        backbone: nn.Module = model.model.backbone.conv_encoder
        return backbone

    def placing(self, model: Any) -> list[nn.Module]:
        inner = model.model
        heads = [inner.encoder_output_class_embed, inner.encoder_output_bbox_embed, *inner.decoder.bbox_embed]
        return [inner.enc_output, inner.enc_output_norm, *heads]

    def memory(self, returned: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        tokens = returned[0].last_hidden_state_vision.transpose(1, 2)
        parts = tokens.split([height * width for height, width in shapes], dim=2)
        return tuple(part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True))

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        """logits: [L, B, Q, T], of the T tokens of the text that was asked."""
        text = outputs.encoder_last_hidden_state_text.float()
        everywhere = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        logits, boxes = [], []
        reference = outputs.init_reference_points
        for layer in range(len(layer_states)):
            state = outputs.intermediate_hidden_states[:, layer].float()
            # What transformers has behind the text's last token, up to its longest text, is -inf.
            logits.append(model.class_embed[layer](state, text, everywhere)[..., : text.shape[1]])
            boxes.append((model.bbox_embed[layer](state) + torch.special.logit(reference.float(), eps=1e-5)).sigmoid())
            reference = outputs.intermediate_reference_points[:, layer]
        return Predictions(torch.stack(logits), torch.stack(boxes), state)

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        locations, weights = sampling(module, given, queries)
        return splat_levels(list(zip(locations.unbind(3), weights.unbind(3), strict=True)), shapes, valid)

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        self._refuse()

    def initialise(self, model: Any) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise QskdError(
            "student", f"a {TEACHERS_ONLY[self.name]}", "a family that can be a student", "choose a student.family"
        )


class MMGroundingDino(GroundingDino):
    name = "mm-grounding-dino"
    model_class: ClassVar[Any] = MMGroundingDinoForObjectDetection
