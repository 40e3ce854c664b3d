"""RF-DETR (Robinson et al., 2025): LW-DETR's decoder, groups and loss on DINOv2 with windows, one map, no batch norms.

transformers lays the windows of an image that is no square out in one order and gathers them in another, so that its map is
another picture's: only square images are taken where there are windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import RfDetrConfig, RfDetrForObjectDetection

from qskd.config import StudentConfig
from qskd.errors import QskdError
from qskd.families.cells import check_cells, other_size
from qskd.families.lw_detr import LwDetr


class RfDetr(LwDetr):
    name = "rf_detr"
    model_class = RfDetrForObjectDetection
    config_class: Any = RfDetrConfig
    vit_type = "rf_detr_dinov2"
    many_maps = False
    other_weights = ("model.segmentation_head.",)  # as transformers names them where it builds a detector

    def check(self, config: Any) -> None:
        vit, again = self.check_vit(config), "save the checkpoint again with save_pretrained"
        last, depth = max(vit.out_indices), vit.num_hidden_layers
        sides = (vit.patch_size, vit.image_size, vit.num_windows)
        if not all(isinstance(each, int) and each > 0 for each in sides) or not 0 <= last <= depth:
            found = f"patch_size {vit.patch_size}, image_size {vit.image_size}, num_windows {vit.num_windows}"
            found += f", map {last} of {depth} layers"
            raise QskdError(f"{self.name} config.backbone_config", found, "a number each, maps of its layers", again)
        if config.num_feature_levels != 1:
            found = f"num_feature_levels {config.num_feature_levels}"
            raise QskdError(f"{self.name} config", found, "1: transformers makes one map", "another checkpoint")

    def image_unit(self, config: Any) -> int:
        return int(config.backbone_config.patch_size * config.backbone_config.num_windows)

    def strides(self, config: Any) -> tuple[int, ...]:
        return (int(config.backbone_config.patch_size),)

    def check_size(self, config: Any, height: int, width: int) -> None:
        check_cells(self.name, height, width, self.image_unit(config), self.strides(config), config.num_queries)
        if height != width and config.backbone_config.num_windows > 1:
            raise QskdError(
                f"{self.name} images",
                f"{height} x {width} pixels",
                "height = width: transformers mixes up the windows of others",
                other_size(height, self.image_unit(config)),
            )

    def projections(self, model: Any) -> list[nn.Module]:
        return [model.model.backbone.projector]

    def reading(self, model: Any) -> list[nn.Module]:
        return [model.model.backbone.projector.projector_layer.conv1]

    def masked_attentions(self, model: Any) -> list[nn.Module]:
        return []  # its attention is sampled

    def drop_unused(self, model: Any) -> None:
        """Its ViT's mask token and the layers after its last map too, which no gradient reaches."""
        super().drop_unused(model)
        vit = self.backbone(model)
        config: Any = vit.config
        vit.get_submodule("embeddings").mask_token = None  # type: ignore[assignment]
        last = max(config.out_indices)
        del vit.get_submodule("encoder").layer[last:]  # type: ignore[union-attr, operator]
        config.use_mask_token, config.num_hidden_layers = False, last
        config.stage_names = config.stage_names[: last + 1]

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        if not config.backbone.init:
            backbone.image_size = config.resize.size  # a place for each patch: nothing to fit
        return super().student_config(config, backbone, labels)

    def level_sizes(self, config: StudentConfig) -> dict[str, Any]:
        return {"num_feature_levels": 1, "decoder_n_points": 2}
