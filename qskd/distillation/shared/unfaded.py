"""Images without labels keep what they teach while the weights of a method's terms fall: its gradient counts more there.

Weights are of terms, which are sums over all images of a batch. So an image's part of the gradient is scaled instead, where the
method takes what the student says of it; all values stay as they are. What a method trains of its own is not scaled.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qskd.config.distillation import MethodSettings, parts_of
from qskd.distillation.shared.ramp import falling
from qskd.structures import Attend, DetectorOutput, Targets


def boosts_of(settings: MethodSettings, targets: Targets, step: int, total_steps: int) -> tuple[Tensor, ...]:
    """For each method of a recipe, [B]: 1 for labelled images; for the others the ratio of the two schedules, so that they follow
    `decay_unlabeled` instead of `decay`. Empty where nothing is to be scaled."""
    parts = list(parts_of(settings).values())
    if targets.all_labelled or all(part.decay == part.decay_unlabeled for part in parts):
        return ()
    device = targets.boxes_cxcywh.device
    labelled = torch.tensor(targets.labelled).to(device, non_blocking=True)
    return tuple(torch.where(labelled, 1.0, _boost(part, step, total_steps)) for part in parts)


def _boost(settings: MethodSettings, step: int, total_steps: int) -> float:
    own = falling(step, total_steps, settings.decay_unlabeled)
    return own / falling(step, total_steps, settings.decay)


def scaled(values: Tensor, by: Tensor, images: int = 0) -> Tensor:
    """The values, with a gradient that is multiplied by [B] along the dimension `images`."""
    shape = [1] * values.dim()
    shape[images] = len(by)
    fixed = values.detach()
    return fixed + (values - fixed) * by.to(values.dtype).view(shape)


def boosted(output: DetectorOutput, by: Tensor) -> DetectorOutput:
    """All that a method may learn from. by: [B]."""

    def attend(asked: Attend) -> Attend:
        return lambda queries: tuple(scaled(part, by) for part in asked(queries))

    sides = output.sides
    return replace(
        output,
        logits=scaled(output.logits, by, 1),
        boxes_cxcywh=scaled(output.boxes_cxcywh, by, 1),
        memory=tuple(scaled(part, by) for part in output.memory),
        features=tuple(scaled(part, by) for part in output.features),
        query_states=scaled(output.query_states, by),
        attend=attend(output.attend),
        attend_mean=attend(output.attend_mean),
        attend_each=None if output.attend_each is None else attend(output.attend_each),
        no_object=None if output.no_object is None else scaled(output.no_object, by, 1),
        sides=None if sides is None else replace(sides, logits=tuple(scaled(part, by) for part in sides.logits)),
    )
