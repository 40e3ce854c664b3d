"""DEIMv2 (Huang et al., 2025): D-FINE's decoder with gated feed-forward parts, matched by DEIM's loss, on HGNetV2 or DINOv3.

Its encoder is hybrid, as D-FINE's, or "lite": one map of the backbone, and a second made of it. A student has the hybrid one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import Deimv2Config, Deimv2ForObjectDetection

from qskd.config import StudentConfig
from qskd.families.cells import check_cells
from qskd.families.d_fine import DFine
from qskd.losses.detection_loss import MATCHABILITY_GAMMA
from qskd.structures import Classification


class Deimv2(DFine):
    name = "deimv2"
    model_class = Deimv2ForObjectDetection
    config_class = Deimv2Config
    classification: ClassVar[Classification] = "matchability"

    def strides(self, config: Any) -> tuple[int, ...]:
        known = [int(stride) for stride in config.feat_strides][: config.num_feature_levels]
        # A lite encoder makes a second map, which published configurations leave out.
        while len(known) < config.num_feature_levels:
            known.append(2 * known[-1])
        return tuple(known)

    def image_unit(self, config: Any) -> int:
        return max(self.strides(config))

    def check_size(self, config: Any, height: int, width: int) -> None:
        check_cells(self.name, height, width, self.image_unit(config), self.strides(config), config.num_queries)

    def backbone(self, model: Any) -> nn.Module:
        """Without what projects its maps, and without what a ViT has beside it for fine maps: these learn with the rest."""
        convolutions = model.model.conv_encoder
        found: nn.Module = convolutions.backbone if hasattr(convolutions, "backbone") else convolutions.model
        return found

    def trunk(self, model: Any) -> nn.Module:
        return self.backbone(model)

    def projections(self, model: Any) -> list[nn.Module]:
        inner = model.model
        if model.config.encoder_type == "lite":
            return list(inner.encoder.input_proj)
        convolutions = inner.conv_encoder
        return list(getattr(convolutions, "fusion_proj", None) or convolutions.encoder_input_proj)

    def drop_front(self, model: Any) -> None:
        inner, projections = model.model, nn.ModuleList(nn.Identity() for _ in self.projections(model))
        inner.conv_encoder, inner.encoder = nn.Identity(), nn.Identity()
        # As `backbone` and `projections` find them.
        inner.conv_encoder.model = nn.Identity()
        inner.conv_encoder.encoder_input_proj = inner.encoder.input_proj = projections
        inner.decoder_input_proj = nn.ModuleList(nn.Identity() for _ in inner.decoder_input_proj)

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        made = super().student_config(config, backbone, labels)
        made.focal_loss_gamma = MATCHABILITY_GAMMA  # transformers' own loss of the saved student is then its authors'
        return made
