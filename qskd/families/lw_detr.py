"""LW-DETR (Chen et al., 2024): a plain ViT with windows, a projector to maps, sampled attention, queries chosen in each image.

Its boxes are proposals of the encoder's cells that every decoder layer moves anew: none goes on to the next layer, and there is
no sigmoid, so that a box may reach out of the image. Its own code has groups of queries in training; a student here, and a
loaded checkpoint, has one (`qskd.training.query_groups` has the others).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeformableDetrImageProcessorPil, LwDetrConfig, LwDetrForObjectDetection

from qskd.config import StudentConfig
from qskd.errors import QskdError
from qskd.families.cells import check_cells
from qskd.families.deformable_detr import sampling, splat_levels
from qskd.families.family import Family, GroupParts, Predictions
from qskd.families.initialisation import set_class_prior, xavier, zero_box_head

_SCALES = {
    1: [1.0],
    2: [2.0, 0.5],
    3: [2.0, 1.0, 0.5],
}  # of maps over the ViT's, by feature_levels; 1 and 2 are published


def moved(reference: Tensor, delta: Tensor) -> Tensor:
    """Boxes [..., 4] moved by [..., 4]: in units of their own sizes, and sizes by a factor; not bounded."""
    centre = reference[..., :2] + delta[..., :2] * reference[..., 2:]
    return torch.cat([centre, reference[..., 2:] * delta[..., 2:].exp()], dim=-1)


class LwDetr(Family):
    name = "lw_detr"
    model_class = LwDetrForObjectDetection
    config_class: Any = LwDetrConfig
    processor_class = DeformableDetrImageProcessorPil
    vit_type = "lw_detr_vit"
    many_maps = True
    classification = "iou_aware"
    num_early = 1  # the encoder's proposals

    def check(self, config: Any) -> None:
        vit, again = self.check_vit(config), "save the checkpoint again with save_pretrained"
        scales, patch = list(config.projector_scale_factors), vit.patch_size
        if not scales or not isinstance(patch, int) or vit.num_windows != vit.num_windows_side**2:
            found = f"projector_scale_factors {scales}, patch_size {patch}, num_windows {vit.num_windows}"
            raise QskdError(f"{self.name} config", found, "a scale or more, a number, the square of a number", again)

    def check_vit(self, config: Any) -> Any:
        """Its configuration; QskdError where the backbone is another."""
        found = getattr(config.backbone_config, "model_type", None)
        if found != self.vit_type:
            expected = f"a {self.vit_type}: transformers builds no other"
            again = "save the checkpoint again with save_pretrained"
            raise QskdError(f"{self.name} config.backbone_config", f"a {found}", expected, again)
        return config.backbone_config

    def chooses_queries(self, config: Any) -> bool:
        return True

    def image_unit(self, config: Any) -> int:
        vit = config.backbone_config
        return int(vit.patch_size * vit.num_windows_side)

    def strides(self, config: Any) -> tuple[int, ...]:
        return tuple(int(config.backbone_config.patch_size / scale) for scale in config.projector_scale_factors)

    def check_size(self, config: Any, height: int, width: int) -> None:
        check_cells(self.name, height, width, self.image_unit(config), self.strides(config), config.num_queries)

    def projections(self, model: Any) -> list[nn.Module]:
        return list(model.model.backbone.projector.scale_layers)

    def reading(self, model: Any) -> list[nn.Module]:
        scales = model.model.backbone.projector.scale_layers
        return [part for scale in scales for part in (scale.sampling_layers, scale.projector_layer.conv1)]

    def class_heads(self, model: Any) -> list[nn.Linear]:
        return [model.class_embed, *model.model.enc_out_class_embed]

    def memory_sources(self, model: Any) -> list[nn.Module]:
        return self.projections(model)  # there is no encoder after them

    def memory(self, returned: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        return tuple(returned)

    def backbone(self, model: Any) -> nn.Module:
        vit: nn.Module = (
            model.model.backbone.backbone
        )  # without the projector, which starts anew where the ViT is pretrained
        return vit

    def trunk(self, model: Any) -> nn.Module:
        return self.backbone(model)

    def cross_attentions(self, model: Any) -> list[nn.Module]:
        return [layer.cross_attn for layer in model.model.decoder.layers]

    def placing(self, model: Any) -> list[nn.Module]:
        inner = model.model
        chosen_by = [*inner.enc_output, *inner.enc_output_norm, *inner.enc_out_class_embed, *inner.enc_out_bbox_embed]
        # With what ends the projector: proposals have the precision of its maps.
        return [part.get_submodule("layer_norm") for part in self.projections(model)] + chosen_by

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        states = outputs.intermediate_hidden_states.float()  # [L, B, Q, D], each layer's after the norm
        boxes = moved(outputs.init_reference_points.float(), model.bbox_embed(states))
        chosen = outputs.enc_outputs_class.float().split(model.config.num_queries, 1)  # states, in spite of the name
        heads = model.model.enc_out_class_embed  # one a group of queries
        early = torch.cat([head(each) for head, each in zip(heads, chosen, strict=False)], 1)
        return Predictions(
            model.class_embed(states),
            boxes,
            states[-1],
            early_logits=(early,),
            early_boxes_cxcywh=(outputs.enc_outputs_coord_logits.float(),),  # boxes, in spite of the name
        )

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        locations, weights = sampling(module, given, queries)
        return splat_levels(list(zip(locations.unbind(3), weights.unbind(3), strict=True)), shapes, valid)

    def query_embedding(self, model: Any) -> nn.Embedding:
        embedding: nn.Embedding = model.model.query_feat
        return embedding

    def group_parts(self, model: Any) -> GroupParts:
        inner = model.model
        lists = (inner.enc_output, inner.enc_output_norm, inner.enc_out_class_embed, inner.enc_out_bbox_embed)
        return GroupParts(inner.reference_point_embed, lists, (inner, *self.self_attentions(model)))

    def drop_unused(self, model: Any) -> None:
        parts = self.group_parts(model)
        for modules in parts.lists:
            del modules[1:]
        for embedding in (self.query_embedding(model), parts.places):
            embedding.weight = nn.Parameter(embedding.weight.detach()[: model.config.num_queries].clone())
            embedding.num_embeddings = model.config.num_queries
        model.config.group_detr = model.model.group_detr = 1

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        return self.config_class(
            backbone_config=backbone,
            d_model=config.width,
            decoder_layers=config.decoder_layers,
            decoder_self_attention_heads=config.heads,
            # Twice as many, as published, where they divide the width.
            decoder_cross_attention_heads=config.heads * (1 if config.width % (2 * config.heads) else 2),
            decoder_ffn_dim=config.ffn_width,
            num_queries=config.queries,
            dropout=config.dropout_taken,
            **self.level_sizes(config),
            group_detr=1,
            auxiliary_loss=False,
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )

    def level_sizes(self, config: StudentConfig) -> dict[str, Any]:
        """What its configuration says of maps, as published."""
        scales = _SCALES[config.feature_levels]
        return {"projector_scale_factors": scales, "decoder_n_points": 2 if len(scales) == 1 else 4}

    def initialise(self, model: Any) -> None:
        inner = model.model
        xavier(inner.backbone.projector)
        for layer in inner.decoder.layers:
            xavier(layer.self_attn)
            xavier(layer.mlp)
        for part in (inner.decoder.ref_point_head, inner.enc_output, inner.enc_out_bbox_embed, model.bbox_embed):
            xavier(part)
        for head in (*inner.enc_out_bbox_embed, model.bbox_embed):
            zero_box_head(head.layers[-1], 0.0)  # start as the cells' own proposals
        # As its authors start them: transformers' N(0, 0.02) leaves queries all but alike, and moves their boxes.
        nn.init.normal_(inner.query_feat.weight)
        nn.init.zeros_(inner.reference_point_embed.weight)
        for class_head in self.class_heads(model):
            nn.init.normal_(class_head.weight, std=0.02)  # so small that the bias, which is the prior, decides
            set_class_prior(class_head)

    def prepare_student(self, model: Any) -> None:
        self.drop_unused(model)

    def sizes(self, config: Any) -> dict[str, Any]:
        return {
            "family": config.model_type,
            "width": config.d_model,
            "decoder_layers": config.decoder_layers,
            "heads": config.decoder_self_attention_heads,
            "ffn_width": config.decoder_ffn_dim,
            "queries": config.num_queries,
            "feature_levels": len(self.strides(config)),
        }
