"""Deformable DETR (Zhu et al., ICLR 2021): several maps, sampled attention, boxes refined layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrImageProcessorPil

from qskd.config import StudentConfig
from qskd.families.cells import too_few_cells
from qskd.families.family import Family, Memory, Predictions, detr_sizes, linear32, shift_boxes, take
from qskd.families.initialisation import START_SIZE_LOGIT, grid_points, set_class_prior, solve_points, zero_box_head
from qskd.structures import Queries


def splat(locations: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """What each pixel of a map contributes to a bilinear sample of it (grid_sample, align_corners=False, zero padding).

    locations: [..., P, 2] x, y, 0..1 over the map. weights: [..., P]. Returns [..., H, W]; what is outside is lost.
    A bilinear kernel is a product of two triangles, so this is a matrix product: no scatter, deterministic.
    """
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    columns = (1 - (x[..., None] - torch.arange(width, device=x.device)).abs()).clamp(min=0)
    rows = (1 - (y[..., None] - torch.arange(height, device=y.device)).abs()).clamp(min=0)
    return torch.einsum("...p,...ph,...pw->...hw", weights, rows, columns)


def splat_levels(samples: Sequence[tuple[Tensor, Tensor]], shapes: Sequence[tuple[int, int]], valid: Tensor) -> Tensor:
    """Samples of each level -> attention [B, S, N], mean over heads, summing to 1 over the valid positions.

    samples: locations [B, S, heads, P, 2], x, y in 0..1 over the padded map, and weights [B, S, heads, P], a level each.
    shapes: (H, W) of each level, N = sum of H * W. valid: [B, N] bool. What falls on padding, or outside, is left out; a
    query that sees nothing at all gets zeros.
    """
    maps = [
        splat(locations.flatten(2, 3), weights.flatten(2), height, width).flatten(2)
        for (locations, weights), (height, width) in zip(samples, shapes, strict=True)
    ]
    seen = torch.cat(maps, dim=-1) * valid[:, None]
    return seen / seen.sum(-1, keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)


def sampling(module: Any, given: dict[str, Any], queries: Tensor) -> tuple[Tensor, Tensor]:
    """Where and how strongly a deformable attention samples for `queries` [B, S].

    Returns locations [B, S, heads, levels, points, 2], x, y in 0..1 over the padded maps, and weights [B, S, heads,
    levels, points] whose sum is 1 for each head.
    """
    states = take(given["hidden_states"], queries).float()
    if given.get("position_embeddings") is not None:
        states = states + take(given["position_embeddings"], queries).float()
    reference = take(given["reference_points"], queries).float()[:, :, None, :, None]  # [B, S, 1, levels, 1, 2 or 4]
    parts = (module.n_heads, module.n_levels, module.n_points)
    weights = linear32(module.attention_weights, states).unflatten(-1, (module.n_heads, -1))
    weights = weights.softmax(-1).unflatten(-1, parts[1:])
    offsets = linear32(module.sampling_offsets, states).unflatten(-1, (*parts, 2))
    if reference.shape[-1] == 4:
        return reference[..., :2] + offsets / module.n_points * reference[..., 2:] * 0.5, weights
    sizes_xy = given["spatial_shapes"].flip(-1)
    return reference + offsets / sizes_xy[:, None], weights


class DeformableDetr(Family):
    name = "deformable_detr"
    model_class = DeformableDetrForObjectDetection
    processor_class = DeformableDetrImageProcessorPil
    many_maps = True
    refinement_optional = True

    def projections(self, model: Any) -> list[nn.Module]:
        return list(model.model.input_proj)

    def class_heads(self, model: Any) -> list[nn.Linear]:
        return [*model.class_embed, *(model.model.decoder.class_embed or [])]

    def num_queries(self, config: Any) -> int:
        return int(config.two_stage_num_proposals if config.two_stage else config.num_queries)

    def placing(self, model: Any) -> list[nn.Module]:
        inner, decoder = model.model, model.model.decoder
        if not model.config.two_stage:
            return [inner.reference_points, *(decoder.bbox_embed or [])]
        return [inner.enc_output, inner.enc_output_norm, decoder.class_embed[-1], *decoder.bbox_embed]

    def predict(self, model: Any, outputs: Any, layer_states: Sequence[Tensor]) -> Predictions:
        logits, boxes = [], []
        reference = outputs.init_reference_points
        for layer, state in enumerate(layer_states):
            logits.append(model.class_embed[layer](state.float()))
            boxes.append(shift_boxes(model.bbox_embed[layer](state.float()), reference.float()))
            reference = outputs.intermediate_reference_points[:, layer]
        return Predictions(torch.stack(logits), torch.stack(boxes), layer_states[-1].float())

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        locations, weights = sampling(module, given, queries)
        return splat_levels(list(zip(locations.unbind(3), weights.unbind(3), strict=True)), shapes, valid)

    def query_embedding(self, model: Any) -> nn.Embedding | None:
        return None if model.config.two_stage else model.model.query_position_embeddings

    def reference_points(self, model: Any) -> Tensor:
        embedding = model.model.query_position_embeddings.weight[:, : model.config.d_model]
        points: Tensor = model.model.reference_points(embedding)
        return points.sigmoid()

    def kind_of_queries(self, config: Any) -> Literal["embedding", "boxes"]:
        return "boxes" if config.two_stage else "embedding"

    def own_queries(self, model: Any, memory: Memory) -> Queries:
        inner = model.model
        if not model.config.two_stage:
            return Queries(embedding=inner.query_position_embeddings.weight[None])
        cells, anchors = inner.gen_encoder_output_proposals(memory.tokens, ~memory.mask, list(memory.shapes))
        scores = inner.decoder.class_embed[-1](cells)[..., 0]
        places = inner.decoder.bbox_embed[-1](cells) + anchors
        chosen = scores.topk(model.config.two_stage_num_proposals, 1).indices
        return Queries(places=take(places, chosen).detach())

    def decode(self, model: Any, memory: Memory, queries: Queries) -> Any:
        inner, batch = model.model, len(memory.tokens)
        if queries.embedding is not None:
            asked = queries.embedding.expand(batch, -1, -1)
        else:  # of two stages: all of a query is read from its box
            assert queries.places is not None
            asked = inner.get_proposal_pos_embed(queries.places.expand(batch, -1, -1))
            asked = inner.pos_trans_norm(inner.pos_trans(asked))
        positions, states = asked.chunk(2, -1)
        reference = (
            inner.reference_points(positions) if queries.places is None else queries.places.expand(batch, -1, -1)
        )
        outputs = inner.decoder(
            inputs_embeds=states,
            object_queries_position_embeddings=positions,
            encoder_hidden_states=memory.tokens,
            encoder_attention_mask=memory.mask,
            reference_points=reference.sigmoid(),
            valid_ratios=torch.stack([inner.get_valid_ratio(mask) for mask in memory.valid], 1),
            **memory.levels(),
        )
        outputs.init_reference_points = reference.sigmoid()
        return outputs

    def drop_front(self, model: Any) -> None:
        inner = model.model
        inner.backbone, inner.encoder = nn.Identity(), nn.Identity()
        inner.input_proj = nn.ModuleList(nn.Identity() for _ in inner.input_proj)

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        return DeformableDetrConfig(
            **detr_sizes(config, backbone, labels),
            num_feature_levels=config.feature_levels,
            with_box_refine=config.box_refinement,
        )

    def initialise(self, model: Any) -> None:
        for head in self.class_heads(model):
            set_class_prior(head)
        for layer, head in enumerate(model.bbox_embed):
            # With refinement every layer adds to the box of the one before: only the first sets the size.
            first = layer == 0 or not model.config.with_box_refine
            zero_box_head(head.layers[-1], START_SIZE_LOGIT if first else 0.0)
        embedding = model.model.query_position_embeddings.weight.detach()[:, : model.config.d_model]
        solve_points(embedding, model.model.reference_points, grid_points(embedding.shape[0]))

    def place_queries(self, model: Any, first: int) -> None:
        embedding = model.model.query_position_embeddings.weight.detach()[first:, : model.config.d_model]
        solve_points(embedding, model.model.reference_points, grid_points(len(embedding)))

    def check_size(self, config: Any, height: int, width: int) -> None:
        super().check_size(config, height, width)
        strides = _strides(config) if config.two_stage else []
        cells = sum(-(-height // stride) * -(-width // stride) for stride in strides)
        if strides and cells < config.two_stage_num_proposals:
            raise too_few_cells(self.name, height, width, cells, strides, config.two_stage_num_proposals)

    def chooses_queries(self, config: Any) -> bool:
        return bool(config.two_stage)

    def classes_replaceable(self, config: Any) -> bool:
        return not config.two_stage  # its proposals are scored by the first class's row, whatever that class is

    def prepare_student(self, model: Any) -> None:
        if model.config.two_stage:  # the loss here has no term for proposals: they stay as the checkpoint has them
            decoder = model.model.decoder
            for part in (decoder.bbox_embed[-1], decoder.class_embed[-1], model.model.enc_output):
                part.requires_grad_(False)
            model.model.enc_output_norm.requires_grad_(False)

    def sizes(self, config: Any) -> dict[str, Any]:
        return {
            **super().sizes(config),
            "feature_levels": config.num_feature_levels,
            "box_refinement": config.with_box_refine,
        }


def _strides(config: Any) -> list[int]:
    """Pixels that a cell of each map is wide: of the backbone's stages, and of halves of the last. Empty of a backbone whose stages
    have other names than transformers' ResNet's."""
    names = list(getattr(config.backbone_config, "out_features", None) or [])
    if not names or not all(name.startswith("stage") and name[5:].isdigit() for name in names):
        return []
    stages = [2 << int(name[5:]) for name in names]
    if getattr(config, "dilation", False):
        stages[-1] //= 2
    return stages + [stages[-1] << n for n in range(1, config.num_feature_levels - len(stages) + 1)]
