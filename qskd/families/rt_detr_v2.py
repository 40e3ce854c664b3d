"""RT-DETRv2 (Lv et al., 2024): RT-DETR with a sampled attention whose points may also be read without interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

from qskd.config import StudentConfig
from qskd.families.deformable_detr import splat_levels
from qskd.families.family import linear32, take
from qskd.families.rt_detr import RTDetr


def level_samples(
    module: Any,
    given: dict[str, Any],
    queries: Tensor,
    shapes: Sequence[tuple[int, int]],
    points: Sequence[int],
    discrete: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Where and how strongly `queries` [B, S] sample each level, whose numbers of points a head are `points`.

    Returns for each level locations [B, S, heads, P, 2], x, y in 0..1 over the padded map, and weights [B, S, heads, P];
    a head's weights sum to 1 over all levels. discrete: a point reads one cell, so its location is that cell's middle.
    """
    states = take(given["hidden_states"], queries).float()
    if given.get("position_embeddings") is not None:
        states = states + take(given["position_embeddings"], queries).float()
    box = take(given["reference_points"], queries).float()[:, :, None]  # [B, S, 1, 1, 4]
    weights = linear32(module.attention_weights, states).unflatten(-1, (module.n_heads, -1)).softmax(-1)
    offsets = linear32(module.sampling_offsets, states).unflatten(-1, (module.n_heads, -1, 2))
    share = torch.cat([offsets.new_full((count, 1), 1 / count) for count in points])  # of an offset unit, by level
    locations = box[..., :2] + offsets * share * box[..., 2:] * module.offset_scale
    samples = list(zip(locations.split(list(points), 3), weights.split(list(points), 3), strict=True))
    if not discrete:
        return samples
    middles = []
    for (place, weight), (height, width) in zip(samples, shapes, strict=True):
        size = place.new_tensor([width, height])
        cell = (place * size + 0.5).floor().clamp(min=0).minimum(size - 1)
        middles.append(((cell + 0.5) / size, weight))
    return middles


class RTDetrV2(RTDetr):
    name = "rt_detr_v2"
    model_class = RTDetrV2ForObjectDetection
    config_class = RTDetrV2Config

    def attention(
        self, module: Any, given: dict[str, Any], queries: Tensor, shapes: Sequence[tuple[int, int]], valid: Tensor
    ) -> Tensor:
        discrete = module.method == "discrete"
        samples = level_samples(module, given, queries, shapes, module.n_points_list, discrete)
        return splat_levels(samples, shapes, valid)

    def student_config(self, config: StudentConfig, backbone: Any, labels: Sequence[str]) -> Any:
        made = super().student_config(config, backbone, labels)
        made.decoder_n_levels = made.num_feature_levels
        return made
