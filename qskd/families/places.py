"""A plain ViT's patches, and its embeddings of places."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qskd.config.backbone import KINDS
from qskd.errors import QskdError
from qskd.families.cells import other_size


def patch_of(backbone: Any) -> int:
    """The side of a plain ViT's patches, pixels; 1 for other backbones. backbone: transformers' configuration of one."""
    kind = KINDS.get(getattr(backbone, "model_type", ""))
    return int(backbone.patch_size) if kind is not None and kind.patch and not kind.family else 1


def check_whole_patches(name: str, unit: int, height: int, width: int) -> None:
    """QskdError where an image's sides are no multiples of `unit`."""
    if height % unit or width % unit:
        raise QskdError(
            f"{name} images",
            f"{height} x {width} pixels",
            f"height and width divisible by {unit}, the side of its ViT's patches: it would cut off what is left over",
            other_size(height, unit),
        )


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
