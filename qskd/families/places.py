"""A ViT's embeddings of places, for images of one size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def fixed_places(embeddings: Any, height: int, width: int) -> Iterator[None]:
    """Within it they are a constant. ONNX has no bicubic resizing with antialiasing, by which some ViTs fit them to an image."""
    places = embeddings.position_embeddings
    cells = (height // embeddings.patch_size) * (width // embeddings.patch_size)
    tokens = places.new_zeros(1, cells + 1, places.shape[-1])
    with torch.no_grad():
        fitted = embeddings.interpolate_pos_encoding(tokens, height, width).detach().clone()

    def fixed(embedded: Tensor, height: int, width: int) -> Tensor:
        return fitted

    embeddings.interpolate_pos_encoding = fixed
    try:
        yield
    finally:
        del embeddings.interpolate_pos_encoding
