"""A training-only dense head: every cell of the encoder's input says which object it lies in and where that object is.

A detector whose backbone starts from random weights learns almost nothing from the few queries that are matched; dense
supervision gives every cell a gradient from the first step. It stands in for pretrained weights where there are none,
and is off (`detection.dense_weight: 0`) where there are. It is never exported. Our own choice, in the spirit of
Co-DETR's auxiliary heads; no equation of QSKD's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qskd.boxes import cxcywh_to_xyxy, extent_wh, giou
from qskd.losses.detection_loss import unlabelled_focal
from qskd.losses.unsure import in_unsure
from qskd.structures import LossTerm, Targets

CENTRAL_PART = 0.6  # of a box's width and height: cells in it belong to the object


def cell_centres(valid: Tensor) -> Tensor:
    """[B, H, W] bool of real (unpadded) cells -> [B, H*W, 2] centres x, y relative to each image's real part."""
    height, width = valid.shape[-2:]
    columns, rows = extent_wh(valid).clamp(min=1)[:, :, None, None].unbind(1)
    y = (torch.arange(height, device=valid.device)[None, :, None] + 0.5) / rows
    x = (torch.arange(width, device=valid.device)[None, None, :] + 0.5) / columns
    return torch.stack([x.expand(len(valid), height, width), y.expand(len(valid), height, width)], -1).flatten(1, 2)


def cells_of_objects(centres: Tensor, cell_size: Tensor, targets: Targets) -> Tensor:
    """Which object each cell belongs to: [B, P, 2] centres, [B, 2] cell width and height -> [B, P] int64, -1 = none.

    A cell belongs to an object when its centre lies in the object's central part, or its cell holds the object's centre;
    of several objects to the smallest.
    """
    if not targets.valid.shape[1]:
        return centres.new_full(centres.shape[:2], -1, dtype=torch.int64)
    boxes = targets.boxes_cxcywh[:, None]
    reach = torch.maximum(boxes[..., 2:] * CENTRAL_PART / 2, cell_size[:, None, None] / 2)
    inside = ((centres[:, :, None] - boxes[..., :2]).abs() <= reach).all(-1) & targets.valid[:, None]
    area = boxes[..., 2] * boxes[..., 3]
    smallest, owner = torch.where(inside, area, torch.inf).min(-1)
    return torch.where(smallest.isfinite(), owner, -1)


class DenseHead(nn.Module):
    """Class logits and a box for each cell of the finest feature map."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Conv2d(channels, num_classes, 1)
        self.boxes = nn.Conv2d(channels, 4, 1)
        nn.init.constant_(self.classes.bias, -4.6)  # type: ignore[arg-type]  # log(0.01 / 0.99), as the detector's own prior
        nn.init.normal_(self.boxes.weight, std=0.01)

    def forward(self, features: Tensor, valid: Tensor, targets: Targets) -> dict[str, LossTerm]:
        """features [B, C, H, W], valid [B, H, W] bool -> terms dense_class, dense_l1, dense_giou, counted by owned cells."""
        logits = self.classes(features).flatten(2).transpose(1, 2).float()
        raw = self.boxes(features).flatten(2).transpose(1, 2).float()
        centres = cell_centres(valid)
        cell_size = 1.0 / extent_wh(valid).clamp(min=1)
        owner = cells_of_objects(centres, cell_size, targets)
        owned = (owner >= 0) & valid.flatten(1)
        count = owned.sum().float()
        predicted = torch.cat(
            [(torch.logit(centres, eps=1e-3) + raw[..., :2]).sigmoid(), (raw[..., 2:] - 1.4).sigmoid()], -1
        )
        if targets.valid.shape[1]:
            wanted = targets.boxes_cxcywh.gather(1, owner.clamp(min=0)[..., None].expand(-1, -1, 4))
            classes = targets.labels.gather(1, owner.clamp(min=0))
            labels = functional.one_hot(classes, logits.shape[-1]) * owned[..., None]
        else:
            wanted = torch.zeros_like(predicted)
            labels = torch.zeros_like(logits, dtype=torch.int64)
        weight = owned.float()
        # A label turns its logit's sign, so that all go through one focal loss.
        focal = (0.75 - 0.5 * labels) * unlabelled_focal(logits * (1.0 - 2.0 * labels))
        known = (
            valid.flatten(1) & (owned | ~in_unsure(centres, targets))
            if targets.unsure is not None
            else valid.flatten(1)
        )
        overlap = giou(cxcywh_to_xyxy(predicted), cxcywh_to_xyxy(wanted))
        return {
            "dense_class": LossTerm((focal * known[..., None]).sum(), count),
            "dense_l1": LossTerm(((predicted - wanted).abs().sum(-1) * weight).sum(), count),
            "dense_giou": LossTerm(((1 - overlap) * weight).sum(), count),
        }


DENSE_WEIGHTS = {"dense_class": 1.0, "dense_l1": 5.0, "dense_giou": 2.0}
