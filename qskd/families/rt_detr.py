"""RT-DETR (Zhao et al., CVPR 2024): a hybrid encoder, sampled attention, queries chosen from the encoder in each image.

transformers makes denoising queries only when labels are given, which never happens here: training adds its own
(`qskd.losses.denoising`), and no student has their embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrImageProcessorPil

from qskd.config import StudentConfig
from qskd.families.cells import check_cells
from qskd.families.deformable_detr import sampling, splat_levels
from qskd.families.family import Family, Memory, Predictions, detr_sizes, shift_boxes, take
from qskd.families.initialisation import set_class_prior, xavier, zero_box_head
from qskd.structures import Classification, Queries


class RTDetr(Family):
    name = "rt_detr"
    model_class = RTDetrForObjectDetection
    config_class: Any = RTDetrConfig
    processor_class = RTDetrImageProcessorPil
    many_maps = True
    masks_padding = False
    classification: ClassVar[Classification] = "varifocal"
    num_early = 1  # the encoder's proposals
    denoises = True
    query_kind = "boxes"
    query_has_state = True

    def chooses_queries(self, config: Any) -> bool:
        return True

    def image_unit(self, config: Any) -> int:
        return int(max(config.feat_strides))  # the encoder doubles its coarsest map and lays it on the next finer one

    def check_size(self, config: Any, height: int, width: int) -> None:
        check_cells(self.name, height, width, self.image_unit(config), config.feat_strides, config.num_queries)

    def projections(self, model: Any) -> list[nn.Module]:
        return list(model.model.encoder_input_proj)

    def class_heads(self, model: Any) -> list[nn.Linear]:
        # RT-DETRv2's, D-FINE's and DEIMv2's detectors have modules of their own with the decoder's parameters.
        tied = getattr(model, "class_embed", ())
        return [*tied, *model.model.decoder.class_embed, model.model.enc_score_head]

    def memory_sources(self, model: Any) -> list[nn.Module]:
        return list(model.model.decoder_input_proj)

    def memory(self, returned: Sequence[Any], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        return tuple(returned)

    def feature_channels(self, config: Any) -> int:
        return int(config.encoder_hidden_dim)

    def placing(self, model: Any) -> list[nn.Module]:
        inner = model.model
        # With its input projections: anchors have the precision of what these give.
        chosen_by = [*inner.decoder_input_proj, inner.enc_output, inner.enc_score_head, inner.enc_bbox_head]
        return [*chosen_by, *inner.decoder.bbox_embed]

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        decoder, logits, boxes = model.model.decoder, [], []
        reference = outputs.init_reference_points.float().sigmoid()
        for layer, state in enumerate(layer_states):
            logits.append(decoder.class_embed[layer](state.float()))
            boxes.append(shift_boxes(decoder.bbox_embed[layer](state.float()), reference))
            reference = outputs.intermediate_reference_points[:, layer].detach().float()
        return Predictions(
            torch.stack(logits),
            torch.stack(boxes),
            layer_states[-1].float(),
            early_logits=(outputs.enc_topk_logits.float(),),
            early_boxes_cxcywh=(outputs.enc_topk_bboxes.float(),),
        )

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        locations, weights = sampling(module, given, queries)
        return splat_levels(list(zip(locations.unbind(3), weights.unbind(3), strict=True)), shapes, valid)

    def own_queries(self, model: Any, memory: Memory) -> Queries:
        inner, flat = model.model, memory.tokens
        if model.training or model.config.anchor_image_size is None:
            anchors, inside = inner.generate_anchors(memory.shapes, device=flat.device, dtype=flat.dtype)
        else:
            anchors, inside = (part.to(flat.device, flat.dtype) for part in (inner.anchors, inner.valid_mask))
        cells = inner.enc_output(inside.to(flat.dtype) * flat)
        scores, places = inner.enc_score_head(cells).amax(-1), inner.enc_bbox_head(cells) + anchors
        chosen = scores.topk(model.config.num_queries, 1).indices
        return Queries(places=take(places, chosen).detach(), states=take(cells, chosen).detach())

    def decode(self, model: Any, memory: Memory, queries: Queries) -> Any:
        assert queries.places is not None
        inner, batch = model.model, len(memory.tokens)
        places = queries.places.expand(batch, -1, -1)
        states = queries.states
        if states is None:
            states = memory.tokens.new_zeros(1, places.shape[1], model.config.d_model)
        outputs = inner.decoder(
            inputs_embeds=states.expand(batch, -1, -1),
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=None,
            reference_points=places,
            **memory.levels(),
        )
        outputs.init_reference_points = places
        outputs.enc_topk_logits = outputs.enc_topk_bboxes = places.new_zeros(0)  # there are no proposals
        return outputs

    def drop_front(self, model: Any) -> None:
        inner = model.model
        inner.backbone, inner.encoder = nn.Identity(), nn.Identity()
        for name in ("encoder_input_proj", "decoder_input_proj"):
            setattr(inner, name, nn.ModuleList(nn.Identity() for _ in getattr(inner, name)))

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        channels = backbone.hidden_sizes[-len(backbone.out_features) :]
        levels = len(channels)
        coarsest = 4 * 2 ** (len(backbone.hidden_sizes) - 1)
        return self.config_class(
            **detr_sizes(config, backbone, labels),
            encoder_hidden_dim=config.width,
            encoder_in_channels=list(channels),
            feat_strides=[coarsest // 2**level for level in reversed(range(levels))],
            encode_proj_layers=[levels - 1],
            decoder_in_channels=[config.width] * levels,
            num_feature_levels=levels,
            num_denoising=0,
        )

    def initialise(self, model: Any) -> None:
        inner, decoder = model.model, model.model.decoder
        # transformers starts everything at N(0, 0.01), norms' weights too: next to nothing comes through.
        for module in (*self.projections(model), inner.encoder, *inner.decoder_input_proj):
            for norm in module.modules():
                if isinstance(norm, nn.BatchNorm2d):
                    norm.reset_parameters()
            xavier(module)
        xavier(inner.enc_output)
        for layer in decoder.layers:
            for name, part in layer.named_children():
                if name != "encoder_attn":  # sampling offsets and weights have a start of their own
                    xavier(part)
        for part in (decoder.query_pos_head, inner.enc_bbox_head, decoder.bbox_embed):
            xavier(part)
        zero_box_head(inner.enc_bbox_head.layers[-1], 0.0)  # start as the cells' own anchors
        for head in decoder.bbox_embed:
            zero_box_head(head.layers[-1], 0.0)
        for head in self.class_heads(model):
            nn.init.normal_(head.weight, std=0.02)  # so small that the bias, which is the prior, decides
            set_class_prior(head)

    def prepare_student(self, model: Any) -> None:
        if hasattr(model.model, "denoising_class_embed"):  # training has one of its own, which is not saved
            del model.model.denoising_class_embed
            model.config.num_denoising = 0
        if getattr(model.config, "decoder_method", "") == "discrete":  # rounded to cells, offsets have no gradient
            for attention in self.cross_attentions(model):
                attention.get_submodule("sampling_offsets").requires_grad_(False)

    def sizes(self, config: Any) -> dict[str, Any]:
        return {**super().sizes(config), "feature_levels": config.num_feature_levels}
