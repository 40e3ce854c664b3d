"""The pictures of a batch in one array: padded, or one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qskd.datasets.views import Pixels


def pad(pictures: Sequence[Pixels]) -> tuple[Pixels, NDArray[np.int32]]:
    """Pictures [h, w, 3] -> uint8 [n, H, W, 3] with zeros right and below, and their (h, w) as int32 [n, 2].
    No pictures give [0, 1, 1, 3]."""
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int32).reshape(-1, 2)
    height, width = sizes.max(axis=0).tolist() if len(sizes) else (1, 1)
    images = np.empty((len(pictures), height, width, 3), np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        high, wide = picture.shape[:2]
        image[:high, :wide] = picture
        image[high:] = 0
        image[:high, wide:] = 0
    return images, sizes


def joined(pieces: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One after the other; without a copy where they lie so in one array already."""
    whole = pieces[0].base if pieces else None
    if isinstance(whole, np.ndarray) and whole.dtype == np.uint8 and whole.ndim == 1:
        start = pieces[0].ctypes.data - whole.ctypes.data
        ends = np.cumsum([whole.ctypes.data + start, *(piece.nbytes for piece in pieces)])
        if all(piece.base is whole and piece.ctypes.data == at for piece, at in zip(pieces, ends, strict=False)):
            return whole[start : start + int(ends[-1] - ends[0])]
    return np.concatenate([np.zeros(0, np.uint8), *pieces])
