"""What can be done to the pixels of a batch, each image by its own amount: plain torch, on whatever device the batch is.

All take pixels [n, 3, H, W] float32 in 0..1 and give the same; amounts are [n]. `sizes` [n, 2] is (height, width) of the real
part, in the top left corner: what an image has outside counts nowhere. Each equals what torchvision does to a float image, one
image at a time (tests/test_augmentation_pixels.py has slow references of each).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, Pillow's "L"


def _each(amounts: Tensor) -> Tensor:
    return amounts[:, None, None, None]


def grey_of(pixels: Tensor) -> Tensor:
    """[n, 1, H, W]."""
    red, green, blue = pixels.unbind(1)
    return (_GREY[0] * red + _GREY[1] * green + _GREY[2] * blue)[:, None]


def real_part(sizes: Tensor, height: int, width: int) -> Tensor:
    """[n, H, W] bool."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def brighten(pixels: Tensor, factor: Tensor) -> Tensor:
    return (pixels * _each(factor)).clamp_(0, 1)


def change_contrast(pixels: Tensor, factor: Tensor, sizes: Tensor) -> Tensor:
    """Away from the mean of the image's greys, or towards it."""
    real = real_part(sizes, *pixels.shape[-2:])
    # In double: how far a batch is padded must not show in an image's mean.
    total = (grey_of(pixels)[:, 0] * real).sum((1, 2), dtype=torch.float64)
    mean = _each((total / sizes.prod(1)).float())
    return torch.lerp(mean, pixels, _each(factor)).clamp_(0, 1)


def saturate(pixels: Tensor, factor: Tensor) -> Tensor:
    """Away from each pixel's grey, or towards it."""
    return torch.lerp(grey_of(pixels), pixels, _each(factor)).clamp_(0, 1)


def turn_hue(pixels: Tensor, turn: Tensor) -> Tensor:
    """Hues by so many circles; value and saturation, as HSV has them, stay."""
    red, green, blue = pixels.unbind(1)
    value, least = pixels.amax(1), pixels.amin(1)
    chroma = value - least
    divisor = torch.where(chroma > 0, chroma, 1.0)
    # In sixths of a circle; 0 where there is no hue.
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * turn[:, None, None]
    channels = []
    for start in (5, 3, 1):  # of red, green and blue
        away = torch.remainder(hue + start, 6)
        channels.append(value - chroma * torch.minimum(away, 4 - away).clamp_(0, 1))
    return torch.stack(channels, 1).clamp_(0, 1)


def shuffle_channels(pixels: Tensor, sources: Tensor) -> Tensor:
    """sources: [n, 3] int64, where each channel is taken from."""
    return pixels.gather(1, sources[:, :, None, None].expand_as(pixels))


def to_grey(pixels: Tensor) -> Tensor:
    return grey_of(pixels).expand_as(pixels).contiguous()


def blur(largest_sigma: float, pixels: Tensor, sigma: Tensor, sizes: Tensor) -> Tensor:
    """Gaussian, reaching three times the largest sigma that there may be; beyond an image's edges it is mirrored."""
    reach = math.ceil(3 * largest_sigma)
    taps = torch.arange(-reach, reach + 1, device=pixels.device)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    for axis in (2, 3):
        length, real = pixels.shape[axis], sizes[:, axis - 2, None]
        places = torch.arange(-reach, length + reach, device=pixels.device)[None]
        period = (2 * (real - 1)).clamp(min=1)
        places = torch.remainder(places, period)
        places = torch.where(places < real, places, period - places)  # [n, length + 2 reach]
        places = places[:, None, :, None] if axis == 2 else places[:, None, None, :]
        shape = list(pixels.shape)
        shape[axis] += 2 * reach
        wide = pixels.gather(axis, places.long().expand(shape))
        pixels = torch.zeros_like(pixels)
        for tap in range(2 * reach + 1):  # sums, not a convolution: their order does not depend on the batch
            pixels.add_(wide.narrow(axis, tap, length) * _each(weights[:, tap]))
    return pixels


def erase(colour: Tensor, pixels: Tensor, area: Tensor, ratio: Tensor, place: Tensor, sizes: Tensor) -> Tensor:
    """A rectangle of `colour` [3]: of `area` of the image, `ratio` as high as wide, cut to the image where it is longer; `place`
    [n, 2], 0..1 of the room that is left above and left of it."""
    sides = sizes.float()
    pixels_of_area = area * sides.prod(1)
    wanted = torch.stack([(pixels_of_area * ratio).sqrt(), (pixels_of_area / ratio).sqrt()], 1)
    size = torch.minimum(wanted.round().clamp(min=1), sides)
    first = (place * (sides - size + 1)).floor()
    rows = torch.arange(pixels.shape[2], device=pixels.device)
    columns = torch.arange(pixels.shape[3], device=pixels.device)
    inside_rows = (rows >= first[:, :1]) & (rows < first[:, :1] + size[:, :1])
    inside_columns = (columns >= first[:, 1:]) & (columns < first[:, 1:] + size[:, 1:])
    inside = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
    return torch.where(inside, colour[None, :, None, None], pixels)
