"""What is drawn: a size for each step, and a look for each image in it. Functions of seed, step and image id, of nothing else:
workers, micro-batches and restarts change none of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from qskd.config.augmentation import AugmentationConfig

SMALLEST_SIGMA = 0.1  # pixels: no blur at all, to the eye
SMALLEST_ERASED = 0.02  # of the image's area
_RATIOS = (0.3, 3.3)  # height over width of what is erased; these and the least area are torchvision's RandomErasing's
_ORDERS = tuple(permutations(range(3)))


@dataclass(frozen=True)
class Look:
    """What is done to one image. None: it is not done.

    brightness, contrast, saturation: factors. contrast_first: before saturation and hue, else after them. hue: in circles.
    channels: where each channel is taken from. sigma: of the blur, pixels. erased: (part of the image's area, height over
    width, place from top and from left, 0..1 of the room there is).
    """

    brightness: float | None = None
    contrast: float | None = None
    contrast_first: bool = False
    saturation: float | None = None
    hue: float | None = None
    channels: tuple[int, ...] | None = None
    grey: bool = False
    sigma: float | None = None
    erased: tuple[float, float, float, float] | None = None


def _uniforms(count: int, *key: object) -> list[float]:
    """Numbers in [0, 1) from a hash: no library's random stream that could change with a release."""
    found: list[float] = []
    for block in range(-(-count // 8)):
        text = " ".join(map(str, ("qskd augmentation", *key, block)))
        digest = hashlib.blake2b(text.encode(), digest_size=64).digest()
        found += [int.from_bytes(digest[i : i + 8], "little") / 2**64 for i in range(0, 64, 8)]
    return found[:count]


def look(config: AugmentationConfig, seed: int, step: int, image_id: int) -> Look:
    """Each decision has numbers of its own: changing one field moves none of the others."""
    u = _uniforms(20, seed, step, image_id)

    def factor(strength: float, chance: float, place: float) -> float | None:
        return 1 + strength * (2 * place - 1) if strength and chance < config.colour_probability else None

    hue = config.hue * (2 * u[8] - 1) if config.hue and u[7] < config.colour_probability else None
    erased = None
    if u[14] < config.erase_probability:
        low = min(SMALLEST_ERASED, config.erase_largest)
        ratio = math.exp(math.log(_RATIOS[0]) + u[16] * math.log(_RATIOS[1] / _RATIOS[0]))
        erased = (low + u[15] * (config.erase_largest - low), ratio, u[17], u[18])
    return Look(
        brightness=factor(config.brightness, u[0], u[1]),
        contrast=factor(config.contrast, u[2], u[3]),
        contrast_first=u[4] < 0.5,
        saturation=factor(config.saturation, u[5], u[6]),
        hue=hue,
        channels=_ORDERS[int(6 * u[10])] if u[9] < config.channel_shuffle_probability else None,
        grey=u[11] < config.greyscale_probability,
        sigma=SMALLEST_SIGMA + u[13] * (config.blur_sigma - SMALLEST_SIGMA)
        if u[12] < config.blur_probability
        else None,
        erased=erased,
    )


def size_at(sizes: Sequence[int], seed: int, step: int) -> int:
    """Which of the sizes the student has in a step: the same on every worker, and in all parts of a batch."""
    return sizes[int(len(sizes) * _uniforms(1, "size", seed, step)[0])]
