"""Contrastive denoising (Zhang et al., DINO, ICLR 2023) as RT-DETR, RT-DETRv2 and D-FINE have it: in training, objects put out of
place and renamed are queries too, and have to find back (positives) or to be refused (negatives, which are further away).

Groups, noise and losses are those of transformers' `get_contrastive_denoising_training_group` and `RTDetrLoss`. Unlike there, the
noise of an image is a function of seed, step and image, and the groups are those of the whole batch, whatever the number of
workers. The embedding of the classes is training's own: no student has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qskd.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from qskd.config import DetectionLossConfig
from qskd.detectors.forward.extra_queries import ExtraQueries
from qskd.losses.detection_loss import PARTS, detection_terms
from qskd.losses.fine_grained import fine_grained_terms, fine_grained_weights
from qskd.losses.pairs import own_pairs
from qskd.structures import Classification, ExtraPredictions, LossTerm, Targets

PREFIX = "denoising_"
LABEL_NOISE = 0.5  # half of these labels are drawn anew; transformers' label_noise_ratio
BOX_NOISE = 1.0  # in halves of a box's width and height; transformers' box_noise_scale
DRAWS = 10  # numbers for a query: renamed?, its label, then for each side a direction and a distance


@dataclass(frozen=True)
class Noise:
    """The random part of a batch's denoising queries. uniform: [B, D, 10] float32 in 0..1 (below 1), D = groups * 2 * objects.

    groups: copies of each object, as positive and as negative. objects: the most that any image of the global batch has.
    """

    uniform: Tensor
    groups: int
    objects: int


def draw_noise(seed: int, step: int, image_ids: Sequence[int], objects: int, queries: int) -> Noise:
    """The same for the same image at the same step, whichever worker has it. `objects` of the global batch; at least 1.

    As many groups as there are times `objects` in `queries`, at least one.
    """
    groups = max(1, queries // objects)
    number = groups * 2 * objects
    drawn = np.empty((len(image_ids), number * DRAWS), np.float32)
    for row, image_id in enumerate(image_ids):
        digest = hashlib.blake2b(repr(("denoising", seed, step, image_id)).encode(), digest_size=16).digest()
        # Raw bits are the one stream that NumPy keeps between releases; 24 of them are a float32 below 1.
        bits = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(number * DRAWS)
        drawn[row] = (bits >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return Noise(torch.from_numpy(drawn).unflatten(1, (number, DRAWS)), groups, objects)


@dataclass(frozen=True)
class Groups:
    """Denoising queries and what is wanted of them: each object once for each group, and the positive query that has it.

    queries: D of them. targets: of groups * objects slots. assignment: [B, groups * objects] query of each.
    """

    queries: ExtraQueries
    targets: Targets
    assignment: Tensor


class Denoising(nn.Module):
    """The queries of objects with noise; what has a gradient of them is an embedding of classes, one more for padding."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding = nn.Embedding(classes + 1, width, padding_idx=classes)
        nn.init.xavier_uniform_(self.embedding.weight)  # padding too, as in transformers

    def forward(self, targets: Targets, noise: Noise) -> Groups:
        """Targets of images, and their noise -> their denoising queries."""
        batch, slots = targets.valid.shape
        missing = noise.objects - slots  # which another worker's images have
        boxes = nn.functional.pad(targets.boxes_cxcywh.float(), (0, 0, 0, missing))
        labels = nn.functional.pad(targets.labels, (0, missing))
        valid = nn.functional.pad(targets.valid, (0, missing))
        device = boxes.device
        place = torch.arange(2 * noise.objects * noise.groups, device=device)
        negative = (place % (2 * noise.objects) >= noise.objects)[:, None]

        all_boxes, all_valid = boxes.repeat(1, 2 * noise.groups, 1), valid.repeat(1, 2 * noise.groups)
        renamed, name, directions, distances = noise.uniform.split([1, 1, 4, 4], -1)
        anew = (renamed[..., 0] < LABEL_NOISE * 0.5) & all_valid
        names = torch.where(all_valid, labels.repeat(1, 2 * noise.groups), self.classes)
        names = torch.where(anew, (name[..., 0] * self.classes).long(), names)
        moved = torch.where(directions < 0.5, -1.0, 1.0) * (distances + negative.float())
        reach = all_boxes[..., 2:].repeat(1, 1, 2) * 0.5 * BOX_NOISE
        places = (cxcywh_to_xyxy(all_boxes) + moved * reach).clamp(0.0, 1.0)

        positive = torch.arange(noise.groups * noise.objects, device=device)
        positive = positive + positive // noise.objects * noise.objects
        wanted = Targets(
            boxes.repeat(1, noise.groups, 1),
            labels.repeat(1, noise.groups),
            valid.repeat(1, noise.groups),
            targets.image_ids,
            tuple(count * noise.groups for count in targets.counts),
            targets.labelled,
            targets.unsure_xyxy,
            targets.unsure,
        )
        queries = ExtraQueries(self.embedding(names), xyxy_to_cxcywh(places), place // (2 * noise.objects))
        return Groups(queries, wanted, positive.expand(batch, -1))

    def nothing(self, names: Iterable[str]) -> dict[str, LossTerm]:
        """The terms of a batch without objects: 0, and attached to the embedding, for whose gradient other workers wait."""
        zero = 0.0 * self.embedding.weight.sum()
        count = zero.detach()
        return {name: LossTerm(zero, count, rest=count if "ddf" in name else None) for name in names}


def denoising_weights(config: DetectionLossConfig, sides: bool) -> dict[str, float]:
    """The weight of every term that `denoising_terms` gives. sides: of a family whose boxes are distributions."""
    weights = {"class": config.class_weight, "l1": config.l1_weight, "giou": config.giou_weight}
    weights |= fine_grained_weights(config) if sides else {}
    return {PREFIX + name: weight for name, weight in weights.items()}


def denoising_terms(
    found: ExtraPredictions, groups: Groups, config: DetectionLossConfig, classification: Classification
) -> dict[str, LossTerm]:
    """The detection loss of denoising queries: nothing to match, for each knows its object. Each term is the sum over all layers
    (and what comes before them), and counts boxes times groups."""
    layers, early = len(found.logits), 0
    logits, boxes = found.logits, found.boxes_cxcywh
    if found.early_logits is not None and found.early_boxes_cxcywh is not None:
        early = len(found.early_logits)
        logits, boxes = torch.cat([found.early_logits, logits]), torch.cat([found.early_boxes_cxcywh, boxes])
    assignment = groups.assignment.expand(early + layers, -1, -1)
    by_layer = detection_terms(logits, boxes, groups.targets, assignment, config, classification, early)
    terms: dict[str, LossTerm] = {}
    for kind in PARTS:
        mine = [term for name, term in by_layer.items() if name.split("_")[0] == kind]
        terms[PREFIX + kind] = LossTerm(torch.stack([term.total for term in mine]).sum(), mine[0].count)
    if found.sides is not None:
        fine = fine_grained_terms(
            found.sides, found.logits, found.boxes_cxcywh, own_pairs(assignment[early:], groups.targets), config
        )
        terms |= {PREFIX + name: term for name, term in fine.items()}
    return terms
