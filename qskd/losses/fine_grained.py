"""D-FINE's losses of its distributions (Peng et al., ICLR 2025): FGL, against the object, and DDF, each layer against the last.

For one layer equal on one worker to transformers' `DFineLoss.loss_local`, given that layer's own boxes and distributions: in its
lists of layers transformers 5.23 pairs each layer's distributions with the boxes of the layer before, and gives the last layer no
FGL. Here, as in D-FINE's own repository, a layer's boxes are its own and the last has FGL too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.config import DetectionLossConfig
from qskd.losses.pairs import Pairs
from qskd.structures import LossTerm, SideDistributions

TEMPERATURE = 5.0  # of DDF
SIDES = 4


PUBLISHED_FGL, PUBLISHED_DDF = 0.15, 1.5  # in D-FINE's configurations


def fine_grained_weights(config: DetectionLossConfig) -> dict[str, float]:
    """The weight of every term that `fine_grained_terms` gives."""
    weights = {"fgl": PUBLISHED_FGL if config.fgl_weight is None else config.fgl_weight}
    if config.auxiliary:
        ddf = PUBLISHED_DDF if config.ddf_weight is None else config.ddf_weight
        weights |= {"ddf_matched": ddf, "ddf_others": ddf}
    return weights


def bins_of(sides: SideDistributions, objects_cxcywh: Tensor, about_cxcywh: Tensor) -> tuple[Tensor, Tensor]:
    """Where objects' sides lie among the bins: of [..., 4] objects and the [..., 4] boxes that sides are measured from, the
    bin to the left of each side [..., 4] int64 (so that there is one to its right) and the share of the right one, in 0..1.
    A side beyond the first or the last bin is that bin's alone."""
    middle, size = about_cxcywh[..., :2], about_cxcywh[..., 2:]
    low, high = cxcywh_to_xyxy(objects_cxcywh).split(2, -1)
    away = torch.cat([middle - low, high - middle], -1) / (torch.cat([size, size], -1) / sides.scale + 1e-16)
    return bins_between(sides.values.detach(), away - 0.5 * sides.scale)


def bins_between(values: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """Of numbers of any shape, the bin to the left of each among the rising `values` [N + 1], and the share of the right one."""
    left = (torch.searchsorted(values, moved.contiguous(), right=True) - 1).clamp(0, len(values) - 2)
    share = (moved - values[left]) / (values[left + 1] - values[left])
    return left, share.clamp(0, 1)


def moved_to(about_cxcywh: Tensor, bins: Tensor, onto_cxcywh: Tensor, onto_scale: Tensor) -> Tensor:
    """Where each bin of one network lies, in the units of another's bins: [..., 4, N + 1].

    about_cxcywh, onto_cxcywh: [..., 4], the boxes that the two networks' sides are measured from. bins: [..., N + 2], the one's
    values and its scale, as the cache's column has them. onto_scale: the other's.
    """
    values, scale = bins[..., None, :-1], bins[..., None, -1:]
    outwards = about_cxcywh.new_tensor([-1.0, -1.0, 1.0, 1.0])[:, None]
    (middle, size), (own_middle, own_size) = (
        (torch.cat([box[..., :2]] * 2, -1)[..., None], torch.cat([box[..., 2:]] * 2, -1)[..., None])
        for box in (about_cxcywh, onto_cxcywh)
    )
    at = middle + outwards * (0.5 + values / scale) * size
    return outwards * (at - own_middle) / own_size.clamp(min=1e-6) * onto_scale - 0.5 * onto_scale


def rebinned(chances: Tensor, moved: Tensor, values: Tensor) -> Tensor:
    """Probabilities [..., N + 1] of places `moved` [..., N + 1] -> probabilities [..., M + 1] of the rising `values` [M + 1].

    Each place's mass goes to the two values that it lies between, so that the mean stays. A place beyond the first or the last
    value goes to that one. What this takes from the mean is given back by mass moved to the end that was exceeded, so that a
    mean within the values, which is where the box's side lies, stays as well.
    """
    left, share = bins_between(values, moved)
    found = chances.new_zeros(*chances.shape[:-1], len(values))
    found.scatter_add_(-1, left, chances * (1 - share))
    found.scatter_add_(-1, left + 1, chances * share)
    mean, there = (chances * moved).sum(-1, keepdim=True), (found * values).sum(-1, keepdim=True)
    low, high = values[0], values[-1]
    end = torch.where(mean > there, high, low)
    part = ((mean - there) / (end - there).where(end != there, torch.ones_like(there))).clamp(0, 1)
    found = found * (1 - part)
    found[..., -1:] += part * (mean > there)
    found[..., :1] += part * (mean <= there)
    return found


def fine_grained_terms(
    sides: SideDistributions,
    logits: Tensor,
    boxes_cxcywh: Tensor,
    pairs: Pairs,
    config: DetectionLossConfig,
) -> dict[str, LossTerm]:
    """The sums over layers of D-FINE's two losses, for L layers' logits [L, B, Q, K], boxes [L, B, Q, 4], and the queries that have
    an object in each layer.

    fgl: over matched queries and sides, IoU * cross-entropy with the two bins that the object's side lies between; counts pairs.
    ddf_matched, ddf_others: over sides, 25 * w * KL(last layer || layer) at temperature 5, of matched queries (w: their IoU) and
    of all others (w: the last layer's highest probability). Each counts its sides, beside the other's (`LossTerm.rest`), so that
    their sum is DDF: the two means, weighted by the roots of their counts.
    Without `config.auxiliary`: the last layer's fgl alone. Only the layers' distributions have gradients.
    """
    layers, batch, queries, _ = logits.shape
    bins = len(sides.values)
    matched, query, theirs = pairs.matched, pairs.query, pairs.objects_cxcywh
    mine = boxes_cxcywh.detach().float().gather(2, query[..., None].expand(-1, -1, -1, SIDES))
    overlap = torch.where(matched, iou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs)), 0.0)  # [L, B, M]

    fine = torch.zeros((), device=logits.device)
    for layer in range(layers) if config.auxiliary else (layers - 1,):
        index = query[layer][..., None]
        about = sides.about_cxcywh.gather(1, index.expand(-1, -1, SIDES))
        left, share = bins_of(sides, theirs, about)
        own = sides.logits[layer].gather(1, index.expand(-1, -1, SIDES * bins)).unflatten(-1, (SIDES, bins))
        likely = own.float().log_softmax(-1)
        nearest = likely.gather(-1, torch.stack([left, left + 1], -1))  # [B, M, 4, 2]
        loss = -(nearest[..., 0] * (1 - share) + nearest[..., 1] * share).sum(-1)
        fine = fine + (overlap[layer] * loss).sum()
    terms = {"fgl": LossTerm(fine, pairs.count)}
    if not config.auxiliary:
        return terms

    last = (sides.logits[-1].detach().float().unflatten(-1, (SIDES, bins)) / TEMPERATURE).softmax(-1)
    sure = logits[-1].detach().float().sigmoid().amax(-1)  # [B, Q]
    slot = torch.where(matched, query, queries)  # one more for objects without a query
    found, others = fine.new_zeros(()), fine.new_zeros(())
    for layer in range(layers - 1):
        spare = torch.zeros(batch, queries + 1, dtype=torch.bool, device=logits.device)
        taken = spare.scatter(1, slot[layer], True)[:, :-1]
        weight = F.pad(sure, (0, 1)).scatter(1, slot[layer], overlap[layer])[:, :-1]
        guess = (sides.logits[layer].float().unflatten(-1, (SIDES, bins)) / TEMPERATURE).log_softmax(-1)
        apart = F.kl_div(guess, last, reduction="none").sum((-1, -2)) * weight * TEMPERATURE**2
        found = found + torch.where(taken, apart, 0.0).sum()
        others = others + torch.where(taken, 0.0, apart).sum()
    count = SIDES * matched[-1].sum().float()  # the same in each layer: the objects that there are queries for
    rest = SIDES * batch * queries - count
    return terms | {"ddf_matched": LossTerm(found, count, rest=rest), "ddf_others": LossTerm(others, rest, rest=count)}
