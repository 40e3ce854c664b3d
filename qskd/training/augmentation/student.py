"""A batch as the student sees it in a step: one place, between the batch that the teacher shares and the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from qskd.config import Config, ResizeConfig
from qskd.config.augmentation import AugmentationConfig
from qskd.detectors import Detector
from qskd.errors import QskdError
from qskd.families.table import FAMILIES
from qskd.training.augmentation import pixels as pixel_ops
from qskd.training.augmentation.draws import Look, look, size_at


class StudentAugmentation:
    """Called with a worker's share of a step's batch. Keeps no state.

    sizes: what the student's size is drawn from. fill: colour of what is erased, 0..1; the student's mean, which normalises to 0.
    until: the first step (0-based) that sees plain images.
    """

    def __init__(
        self,
        config: AugmentationConfig,
        resize: ResizeConfig,
        seed: int,
        total_steps: int,
        fill: Sequence[float],
        unit: int = 1,
    ) -> None:
        """unit: what sizes must be multiples of. total_steps: of the training."""
        self.config, self.resize, self.seed = config, resize, seed
        self.fill = torch.tensor(tuple(fill), dtype=torch.float32)
        self.until = round(config.until * total_steps)
        self.sizes = config.sizes(resize.size, unit)

    def size_at(self, step: int) -> int:
        """`student.resize.size` of a step (0-based)."""
        return size_at(self.sizes, self.seed, step) if step < self.until else self.resize.size

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor, image_ids: Sequence[int], step: int) -> tuple[Tensor, Tensor]:
        """images uint8 [n, H, W, 3], sizes [n, 2] -> the same kinds, of the step's size. What was given is not changed: the
        teacher may be looking at it. Padding stays 0."""
        images, sizes = resized(images, sizes, self.resize, self.size_at(step))
        if step >= self.until or not self.config.changes_pixels:
            return images, sizes
        looks = [look(self.config, self.seed, step, image_id) for image_id in image_ids]
        return self.as_they_look(images, sizes, looks), sizes

    def as_they_look(self, images: Tensor, sizes: Tensor, looks: Sequence[Look]) -> Tensor:
        """uint8 [n, H, W, 3], each image with its look."""
        device, shape = images.device, images.shape[1:3]
        pixels = images.permute(0, 3, 1, 2).contiguous().float() / 255
        sizes, numbered = sizes.to(device), list(enumerate(looks))

        def change(wanted: Callable[[Look], object], apply: Callable[..., Tensor], *columns: Tensor) -> None:
            """Those with the look that is wanted, and no others: most looks are rare, and a CPU feels each image."""
            nonlocal pixels
            chosen = [number for number, one in numbered if wanted(one)]
            if len(chosen) == len(numbered):
                pixels = apply(pixels, *columns)
            elif chosen:
                # Made on the host and copied without waiting.
                index = torch.tensor(chosen).to(device, non_blocking=True)
                pixels.index_copy_(0, index, apply(pixels[index], *(column[index] for column in columns)))

        table = torch.tensor([_row(one) for one in looks]).to(device, non_blocking=True)
        factors, channels, place = table[:, :4].unbind(1), table[:, 4:7].long(), table[:, 10:12]
        fill = self.fill.to(device, non_blocking=True)
        brightness, contrast, saturation, hue = factors
        sigma, area, ratio = table[:, 7:10].unbind(1)
        change(lambda one: one.brightness is not None, pixel_ops.brighten, brightness)
        change(lambda one: one.contrast is not None and one.contrast_first, pixel_ops.change_contrast, contrast, sizes)
        change(lambda one: one.saturation is not None, pixel_ops.saturate, saturation)
        change(lambda one: one.hue is not None, pixel_ops.turn_hue, hue)
        change(
            lambda one: one.contrast is not None and not one.contrast_first, pixel_ops.change_contrast, contrast, sizes
        )
        change(lambda one: one.channels is not None, pixel_ops.shuffle_channels, channels)
        change(lambda one: one.grey, pixel_ops.to_grey)
        blurred = partial(pixel_ops.blur, self.config.blur_sigma)
        change(lambda one: one.sigma is not None, blurred, sigma, sizes)
        erased = partial(pixel_ops.erase, fill)
        change(lambda one: one.erased is not None, erased, area, ratio, place, sizes)
        changed = (255 * pixels).round_().to(torch.uint8).permute(0, 2, 3, 1)
        return torch.where(pixel_ops.real_part(sizes, *shape)[..., None], changed, images).contiguous()


def _row(one: Look) -> list[float]:
    """A look as numbers; what is not done has any. Twelve: four factors, three channels, sigma, what is erased."""
    factors = (one.brightness, one.contrast, one.saturation, one.hue)
    erased = one.erased or (0.0, 1.0, 0.0, 0.0)
    known = [0.0 if value is None else value for value in factors]
    return [*known, *map(float, one.channels or (0, 1, 2)), one.sigma or 1.0, *erased]


def resized(images: Tensor, sizes: Tensor, base: ResizeConfig, size: int) -> tuple[Tensor, Tensor]:
    """A batch made by `base` as one of `size` instead: images uint8 [n, H, W, 3], sizes [n, 2]; the very same where `base` has this
    size. Bilinear with antialiasing, each image by itself, so that no padding comes into it.

    This is the door for multi-scale: what resizes the pictures as they were decoded to `size` takes its place.
    """
    if size == base.size:
        return images, sizes
    if base.mode == "square":
        return _scaled(images, size, size), torch.full_like(sizes, size)
    sides = [[max(1, round(side * size / base.size)) for side in pair] for pair in sizes.tolist()]
    high, wide = (max(pair[axis] for pair in sides) for axis in (0, 1))
    result = images.new_zeros(len(images), high, wide, 3)
    for number, ((height, width), (new_height, new_width)) in enumerate(zip(sizes.tolist(), sides, strict=True)):
        part = images[number : number + 1, :height, :width]
        result[number, :new_height, :new_width] = _scaled(part, new_height, new_width)[0]
    return result, torch.tensor(sides, dtype=sizes.dtype).to(sizes.device, non_blocking=True)


def _scaled(images: Tensor, height: int, width: int) -> Tensor:
    pixels = images.permute(0, 3, 1, 2).contiguous().float()
    new = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return new.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def augmentation_of(config: Config, student: Detector, total_steps: int) -> StudentAugmentation | None:
    """What the recipe asks for; None where it asks for nothing. QskdError where the student can't take one of the sizes."""
    wanted = config.augmentation
    if not (wanted.changes_pixels or wanted.changes_sizes):
        return None
    resize = config.student.resize
    unit = FAMILIES[student.family].image_unit(student.model.config) if wanted.changes_sizes else 1
    found = StudentAugmentation(wanted, resize, config.seed, total_steps, student.mean, unit)
    for size in found.sizes if wanted.changes_sizes else ():
        try:
            FAMILIES[student.family].check_size(student.model.config, size, size)
        except QskdError as error:  # of a student from a checkpoint: of others the recipe knows (`Config`)
            raise QskdError("augmentation.scales", error.found, error.expected, "leave out that scale") from None
    return found
