"""D-FINE (Peng et al., ICLR 2025): RT-DETR whose box sides are distributions over bins, refined layer by layer.

transformers gives predictions of the last layer only in evaluation; here the heads are run on every layer's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DFineConfig, DFineForObjectDetection
from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function

from qskd.errors import QskdError
from qskd.families.deformable_detr import splat_levels
from qskd.families.family import Predictions, shift_boxes
from qskd.families.initialisation import xavier, zero_box_head
from qskd.families.rt_detr import RTDetr
from qskd.families.rt_detr_v2 import level_samples
from qskd.structures import SideDistributions


class DFine(RTDetr):
    name = "d_fine"
    model_class = DFineForObjectDetection
    config_class = DFineConfig
    num_early = 2  # the encoder's proposals, the initial boxes
    side_distributions = True
    projects_memory = False  # each head reads channels of the encoder's own maps

    def check(self, config: Any) -> None:
        last = config.decoder_layers - 1
        if config.eval_idx % config.decoder_layers != last:
            raise QskdError(
                "d_fine config.eval_idx",
                f"{config.eval_idx}",
                f"the last of the {config.decoder_layers} decoder layers (-1 or {last})",
                "choose a checkpoint that predicts from its last layer: D-FINE's published ones do",
            )

    def placing(self, model: Any) -> list[nn.Module]:
        decoder = model.model.decoder
        return [*super().placing(model), decoder.pre_bbox_head, decoder.integral]

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        decoder, logits, boxes = model.model.decoder, [], []
        sides: list[Tensor] = []
        states = [state.float() for state in layer_states]
        anchors = outputs.init_reference_points.float().sigmoid()
        initial = shift_boxes(decoder.pre_bbox_head(states[0]), anchors)
        bins = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
        before: Tensor | float = 0.0
        added: Tensor | float = 0.0
        about = initial.detach()
        others: Sequence[Tensor] | None = getattr(
            outputs, "exchanged", None
        )  # what the layers before have really given
        for layer, state in enumerate(states):
            # Each layer adds to the logits of the four sides' distributions; the boxes stay those about `initial`.
            corners = decoder.bbox_embed[layer](state + before) + added
            sides.append(corners)
            box = distance2bbox(about, decoder.integral(corners, bins), decoder.reg_scale)
            boxes.append(torch.cat([box[..., :2], box[..., 2:].clamp(min=0)], dim=-1))  # distances may cross over
            logits.append(decoder.lqe_layers[layer](decoder.class_embed[layer](state), corners))
            if others is None:
                before, added = state.detach(), corners
                continue
            given = others[layer].float()
            before, added = given.detach(), decoder.bbox_embed[layer](given + before) + added
            if not layer:
                about = shift_boxes(decoder.pre_bbox_head(given), anchors).detach()
        first = decoder.class_embed[0](states[0])
        return Predictions(
            torch.stack(logits),
            torch.stack(boxes),
            states[-1],
            early_logits=(outputs.enc_topk_logits.float(), first),
            early_boxes_cxcywh=(outputs.enc_topk_bboxes.float(), initial),
            sides=SideDistributions(tuple(sides), initial.detach(), bins, decoder.reg_scale),
        )

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        discrete = module.decoder_method == "discrete"
        samples = level_samples(module, given, queries, shapes, module.num_points_list, discrete)
        return splat_levels(samples, shapes, valid)

    def exchanged(self, model: Any, outputs: Any, states: Sequence[Tensor], before: Sequence[Tensor]) -> Any:
        none = outputs.enc_topk_logits
        return SimpleNamespace(
            init_reference_points=outputs.init_reference_points,
            enc_topk_logits=none,
            enc_topk_bboxes=none,
            exchanged=before,
        )

    def follow(self, model: Any, other: Any) -> str:
        model.config.reg_scale = other.config.reg_scale  # for transformers' own loss: the decoder's is inherited
        attentions = self.cross_attentions(model)
        points: list[int] = list(self.cross_attentions(other)[0].num_points_list)  # type: ignore[arg-type]
        own: list[int] = list(attentions[0].num_points_list)  # type: ignore[arg-type]
        if sum(points) != sum(own):
            return ""  # of other shapes
        if len(points) != len(own):
            return f"its points lie on {len(points)} maps, the student's on {len(own)}"
        model.config.decoder_n_points = points
        for attention in attentions:
            attention.n_points = attention.num_points_list = points  # type: ignore[assignment]
            share = [1 / count for count in points for _ in range(count)]
            attention.get_buffer("num_points_scale").copy_(torch.tensor(share))
        return ""

    def initialise(self, model: Any) -> None:
        super().initialise(model)  # its box heads' last layers at 0: even distributions, the initial box unmoved
        decoder = model.model.decoder
        xavier(decoder.pre_bbox_head)
        zero_box_head(decoder.pre_bbox_head.layers[-1], 0.0)
        for layer in decoder.layers:  # gates half open, as transformers has them
            if layer.gateway is not None:
                nn.init.zeros_(layer.gateway.gate.weight)
