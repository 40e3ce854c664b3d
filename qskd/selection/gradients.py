"""What each image teaches: the gradient of the recipe's distillation loss in the projectors' weights, image by image.

The student is as it stands before its first step. A projector is linear in each cell, so an image's gradient is a sum over its
cells of (gradient of what comes out) x (what goes in): one backward pass gives those of a whole batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qskd.datasets.batch import TrainBatch
from qskd.distillation.shared.maps import Projector
from qskd.errors import QskdError
from qskd.structures import TeacherRecord
from qskd.teacher.pseudo import with_pseudo_objects
from qskd.training.module import StepModule

# Wider sides are mixed into so many numbers by random signs: lengths and angles stay about as they are, and COCO's gradients fit
# into memory.
SIDE = 24


@dataclass
class _Seen:
    given: Tensor
    made: Tensor


class GradientMaker:
    """module: of a recipe whose method has projectors (QskdError otherwise)."""

    def __init__(self, module: StepModule) -> None:
        method = module.method
        found = [] if method is None else [each for each in method.modules() if isinstance(each, Projector)]
        if not found:
            raise QskdError(
                f"distillation.method = {module.config.distillation.method}",
                "no projector of features, in whose weights gradients could be compared",
                "a method that distils feature maps, such as qskd",
                "choose by uncertainty: --by uncertainty",
            )
        self.module, self.projectors = module.eval(), found
        for parameter in module.student.parameters():
            parameter.requires_grad_(False)

    @property
    def length(self) -> int:
        """D, the numbers that an image has."""
        return sum(min(SIDE, each.out_channels) * min(SIDE, each.in_channels) for each in self.projectors)

    def of(self, batch: TrainBatch, record: TeacherRecord) -> NDArray[np.float32]:
        """[n, D] of n images. Each image's own, as if it were a batch alone, but for the count that its terms are divided by."""
        module, seen = self.module, list[_Seen]()
        assert module.method is not None

        def keep(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            seen.append(_Seen(given[0].detach(), made))

        hooks = [each.register_forward_hook(keep) for each in self.projectors]
        try:
            data = module.config.data
            targets = with_pseudo_objects(batch.targets, record, data.unlabeled_score, data.completed)
            terms = module(batch.images, batch.sizes, targets, record, None, None, batch.least)
        finally:
            for hook in hooks:
                hook.remove()
        wanted = [weight * terms[name].total for name, weight in module.method.weights.items()]
        outputs = [each.made for each in seen]
        gradients = torch.autograd.grad(torch.stack(wanted).sum(), outputs, allow_unused=True)
        parts = []
        for number, (one, gradient) in enumerate(zip(seen, gradients, strict=True)):
            after = torch.zeros_like(one.made) if gradient is None else gradient
            before = one.given.movedim(1, -1).flatten(1, 2).float()  # [n, cells, C]
            left, right = _mixed(after.flatten(1, 2).float(), (number, "after")), _mixed(before, (number, "before"))
            parts.append(torch.einsum("npo,npi->noi", left, right).flatten(1))
        return torch.cat(parts, 1).cpu().numpy().astype(np.float32)


def _mixed(values: Tensor, key: tuple[int, str]) -> Tensor:
    """[n, cells, C] -> [n, cells, min(C, SIDE)]."""
    width = values.shape[-1]
    if width <= SIDE:
        return values
    digest = hashlib.blake2b(repr(("signs", *key)).encode(), digest_size=16).digest()
    bits = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(width * SIDE)
    signs = np.where(bits >> np.uint64(63), 1.0, -1.0).reshape(width, SIDE) / np.sqrt(SIDE)
    return values @ torch.from_numpy(signs.astype(np.float32)).to(values.device)
