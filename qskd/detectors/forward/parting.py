"""A forward's predictions: those of the model's own queries, those of queries that were added to them
(`qskd.detectors.forward.extra_queries`), relative to the image without its padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qskd.families.family import Predictions
from qskd.structures import ExtraPredictions, SideDistributions


def real_part(pixel_mask: Tensor) -> Tensor:
    """[B, 1, 4]: the real width and height of each image, twice, over those of the padded batch."""
    width, height = pixel_mask.any(1).float().mean(1), pixel_mask.any(2).float().mean(1)
    return torch.stack([width, height, width, height], dim=-1).unsqueeze(1)


def without_padding(predictions: Predictions, pixel_mask: Tensor) -> Predictions:
    """Boxes relative to the padded image -> relative to the image itself. Without padding they keep their very values."""
    part = real_part(pixel_mask)
    early, sides = predictions.early_boxes_cxcywh, predictions.sides
    return replace(
        predictions,
        boxes_cxcywh=predictions.boxes_cxcywh / part,
        early_boxes_cxcywh=tuple(boxes / part for boxes in early),
        sides=sides and replace(sides, about_cxcywh=sides.about_cxcywh / part),
    )


def taken(values: Tensor, queries: slice, axis: int = 2) -> Tensor:
    """[L, B, Q, ...] or, with axis 1, [B, Q, ...] of some queries. Traced by torch.compile, it is laid out as if there were no
    others: the graphs that read it next are for one layout, and how many others there are changes from batch to batch."""
    found = values[(slice(None),) * axis + (queries,)]
    return found.contiguous() if torch.compiler.is_compiling() else found


def stacked(early: Sequence[Tensor], queries: slice) -> Tensor | None:
    """Early predictions [E, B, Q, ...] of some queries."""
    return torch.stack([prediction[:, queries] for prediction in early]) if early else None


def of_sides(sides: SideDistributions | None, queries: slice) -> SideDistributions | None:
    if sides is None:
        return None
    logits = tuple(taken(layer, queries, 1) for layer in sides.logits)
    return replace(sides, logits=logits, about_cxcywh=taken(sides.about_cxcywh, queries, 1))


def of_extra(predictions: Predictions, number: int) -> ExtraPredictions:
    """Of the first `number` queries. Proposals, the first of the early predictions, know nothing of them."""
    queries = slice(number)
    return ExtraPredictions(
        taken(predictions.logits, queries),
        taken(predictions.boxes_cxcywh, queries),
        stacked(predictions.early_logits[1:], queries),
        stacked(predictions.early_boxes_cxcywh[1:], queries),
        of_sides(predictions.sides, queries),
    )
