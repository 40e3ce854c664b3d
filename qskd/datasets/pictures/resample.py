"""Pillow's antialiased bilinear resize of a whole batch, on any device, bit for bit.

Pillow resizes along one side, rounds to uint8, then along the other. Each pixel is a sum of a few others times fixed-point weights
of 22 bits, in int32, which any device computes exactly. So an image is the same pixels on every device, and a cache of teacher
outputs made on a GPU serves a student on a CPU.

The number of kernels depends on the strongest reduction in the batch (2 taps a side when nothing becomes smaller), not on the
number of images, save that a large batch is done in parts, for memory, and that the two orders of sides are two parts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qskd.datasets.pictures.cuts import Cuts, is_finished, sizes_of, taps

PRECISION_BITS = 22  # of Pillow's weights: 32 less 8 for the pixel and 2 to spare
PART_VALUES = 2**26  # in the largest int32 tensor of a part: 256 MiB


def make_pixels(flat: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
    """Pictures as `qskd.datasets.pictures.cuts` ships them -> a padded batch, on the device that `flat` is on, without waiting.

    flat: uint8 [bytes], of all images. cuts: float64 [n, 11], on the host. Returns images uint8 [n, H, W, 3], zeros right of and
    below the real part, and sizes int32 [n, 2], its (height, width). No images give [0, 1, 1, 3].
    """
    sizes = sizes_of(cuts)
    out = tuple(sizes.max(axis=0).tolist()) if len(sizes) else (1, 1)
    on_device = _sent(sizes, flat.device)
    if is_finished(cuts).all():
        return _padded(flat, cuts, out), on_device
    parts = list(_parts(cuts, out))
    if len(parts) == 1:
        return _resized(flat, cuts, out), on_device
    images = flat.new_empty((len(cuts), *out, 3))
    for part in parts:
        images.index_copy_(0, _sent(part, flat.device), _resized(flat, cuts[part], out))
    return images, on_device


def _parts(cuts: Cuts, out: tuple[int, int]) -> list[np.ndarray]:
    """The images that are made together: of one order of sides, few enough for memory."""
    rows, columns = int(cuts[:, 1].max()), int(cuts[:, 2].max())
    most = 3 * max(out[0], rows) * max(out[1], columns)
    length = max(1, PART_VALUES // most)
    found = []
    for order in (0, 1):  # those that are finished go with any
        where = np.flatnonzero(cuts[:, 10] == order)
        found += [where[at : at + length] for at in range(0, len(where), length)]
    return found


def _padded(flat: Tensor, cuts: Cuts, out: tuple[int, int]) -> Tensor:
    images = flat.new_zeros((len(cuts), *out, 3))
    for image, (offset, height, width) in zip(images, cuts[:, :3].astype(np.int64).tolist(), strict=True):
        image[:height, :width] = flat[offset : offset + 3 * height * width].view(height, width, 3)
    return images


def _resized(flat: Tensor, cuts: Cuts, out: tuple[int, int]) -> Tensor:
    """Images of one order of sides -> [n, *out, 3]."""
    device, count, most_taps = flat.device, len(cuts), taps(cuts)
    # Of heights, then of widths: size, size of the result, low and high end of the box, mirrored, pixels before this picture.
    ends = np.concatenate([cuts[:, [1, 3, 7, 9, 5, 0]], cuts[:, [2, 4, 6, 8, 5, 0]]])
    ends[:count, 4], ends[:, 5] = 0, ends[:, 5] // 3
    lines = _sent(ends, device) if device.type != "mps" else torch.from_numpy(ends)  # MPS has no float64
    line_from, factors = (t.to(device) for t in _weights(lines, max(out), max(most_taps)))
    sides, offsets = lines[:, 0].long().to(device).view(2, count), lines[:count, 5].long().to(device)
    places = [  # beside a smaller picture of the batch its last pixels are repeated: they are never looked at
        torch.minimum(torch.arange(int(most), device=device), side[:, None] - 1)
        for most, side in zip(cuts[:, 1:3].max(axis=0), sides, strict=True)
    ]
    # The side that is resized first comes first, so that whole lines are added.
    order = (0, 1) if cuts[0, 10] else (1, 0)
    along = places[0] * sides[1][:, None], places[1]  # in pixels
    index = along[order[0]][:, :, None] + along[order[1]][:, None, :] + offsets[:, None, None]
    pixels = flat.view(-1, 3).index_select(0, index.view(-1)).view(*index.shape, 3)
    for side in order:
        own = slice(side * count, (side + 1) * count)
        first, weights = line_from[own, : out[side]], factors[: most_taps[side], own, : out[side]]
        pixels = _summed(pixels, first, weights, sides[side])
        if side == order[0] or order[0] == 0:
            pixels = pixels.transpose(1, 2).contiguous()
    return pixels


def _summed(pixels: Tensor, first: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """Sums of consecutive lines. pixels: uint8 [n, lines, length, 3]. first: int64 [n, out]; weights: int32 [taps, n, out], of the
    lines first, first + 1 and so on; counts: [n], how many are real. Returns uint8 [n, out, length, 3]."""
    images, lines, length, _ = pixels.shape
    start = lines * torch.arange(images, device=pixels.device)[:, None]
    rows, last = pixels.view(images * lines, length * 3), counts[:, None] - 1
    half = 1 << (PRECISION_BITS - 1)
    total = torch.full((*first.shape, length * 3), half, dtype=torch.int32, device=pixels.device)
    for tap, weight in enumerate(weights):
        taken = rows.index_select(0, (start + torch.minimum(first + tap, last)).view(-1))
        total.addcmul_(taken.view(total.shape), weight[..., None])
    return total.bitwise_right_shift_(PRECISION_BITS).to(torch.uint8).view(*first.shape, length, 3)


def _weights(lines: Tensor, length: int, most_taps: int) -> tuple[Tensor, Tensor]:
    """The weights of Pillow's `precompute_coeffs`, in its order of operations, of m sides. lines: float64 [m, 5 or more]: size of
    the picture and of the result, the box's low and high end, whether it is mirrored. Returns first int64 [m, length] and weights
    int32 [most_taps, m, length], 0 beyond the result.

    Never divided by a Python number: on a GPU torch would multiply by its inverse, which rounds otherwise.
    """
    size, out, low, high, flip = lines[:, :5, None].unbind(1)  # [m, 1] each
    scale = (high.float() - low.float()).double() / out
    reach = scale.clamp(min=1.0)
    inverse = torch.ones_like(reach) / reach
    place = torch.arange(length, dtype=torch.float64, device=out.device).expand(len(out), length)
    inside = place < out
    place = torch.where(flip > 0, out - 1 - place, place)
    centre = (place + 0.5) * scale + low
    first = (centre - reach + 0.5).clamp(min=0.0).trunc()
    end = torch.minimum((centre + reach + 0.5).trunc(), size)
    taken = first + torch.arange(most_taps, dtype=torch.float64, device=out.device)[:, None, None]
    weights = (1.0 - ((taken - centre + 0.5) * inverse).abs()).clamp(min=0.0) * (taken < end)
    total = torch.zeros_like(weights[0])
    for weight in weights:  # in order: a sum of floats depends on it
        total = total + weight
    whole = torch.where(total > 0, weights / total, weights) * (1 << PRECISION_BITS) + 0.5
    return first.long(), (whole * inside).trunc().int()


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device, without waiting where it is a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
