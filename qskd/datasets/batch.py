"""A worker's share of one global batch, as tensors: what the loader hands to the training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qskd.config import TrainingConfig
from qskd.datasets.order.schedule import split
from qskd.datasets.pictures.cuts import sizes_of
from qskd.datasets.pictures.resample import make_pixels
from qskd.structures import Targets, to_device


@dataclass(frozen=True)
class TrainBatch:
    """A worker's share of one global batch, as tensors. n may be 0.

    images: uint8 [n, H, W, 3]; sizes: int32 [n, 2], height and width of the real part. The teacher's are the same tensors
    when both networks see the same resolution. cached: the columns of a second reader of rows that came with the images
    (the teacher's outputs, from their cache), by their names; empty without one. least: height and width that each image has
    at least, known on the host; None where nobody has looked.
    """

    images: Tensor
    sizes: Tensor
    teacher_images: Tensor
    teacher_sizes: Tensor
    targets: Targets
    cached: dict[str, Tensor] = field(default_factory=dict)
    least: tuple[int, int] | None = None
    teacher_least: tuple[int, int] | None = None


def _tensor(array: np.ndarray, device: torch.device | str) -> Tensor:
    if torch.device(device).type != "cuda":
        return torch.from_numpy(np.require(array, requirements="W"))
    like = torch.from_numpy(np.empty(0, array.dtype))
    pinned = torch.empty(array.shape, dtype=like.dtype, pin_memory=True)
    pinned.numpy()[...] = array  # the one copy on the host: the array itself is Ray's, and read-only
    return pinned


def images_of(
    arrays: Mapping[str, np.ndarray], device: torch.device | str = "cpu", pixels: Tensor | None = None, prefix: str = ""
) -> tuple[Tensor, Tensor]:
    """The loader's images uint8 [n, H, W, 3] and sizes int32 [n, 2] on `device`, which makes them where the loader has not
    finished them. pixels: `arrays["pixels"]` where they are there already. prefix: "teacher_" for the teacher's."""
    if f"{prefix}images" in arrays:
        images, sizes = (_tensor(arrays[f"{prefix}{name}"], device) for name in ("images", "sizes"))
        return images.to(device, non_blocking=True), sizes.to(device, non_blocking=True)
    if pixels is None:
        pixels = _tensor(arrays["pixels"], device).to(device, non_blocking=True)
    return make_pixels(pixels, arrays[f"{prefix}cuts"])


def train_batch(arrays: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> TrainBatch:
    """The loader's arrays -> tensors on `device` (pinned on the way to a GPU, so that copies overlap with work)."""

    def tensor(name: str) -> Tensor:
        return _tensor(arrays[name], device)

    counts = tuple(int(count) for count in arrays["counts"])
    slots = torch.arange(arrays["labels"].shape[1])
    targets = Targets(
        boxes_cxcywh=tensor("boxes_cxcywh"),
        labels=tensor("labels"),
        valid=slots[None, :] < torch.tensor(counts, dtype=torch.int64)[:, None],
        image_ids=tuple(int(image_id) for image_id in arrays["image_ids"]),
        counts=counts,
        labelled=tuple(bool(each) for each in arrays["labelled"]) if "labelled" in arrays else (),
    )
    pixels = tensor("pixels").to(device, non_blocking=True) if "pixels" in arrays else None
    images, sizes = images_of(arrays, device, pixels)
    own, cached = not arrays.keys().isdisjoint(("teacher_images", "teacher_cuts")), "teacher_logits" in arrays
    teacher_images, teacher_sizes = images_of(arrays, device, pixels, "teacher_") if own else (images, sizes)
    batch = TrainBatch(
        images=images,
        sizes=sizes,
        teacher_images=teacher_images,
        teacher_sizes=teacher_sizes,
        targets=targets,
        cached={name: tensor(name) for name in arrays if name.startswith("teacher_")} if cached else {},
        least=least_of(arrays),
        teacher_least=least_of(arrays, "teacher_" if own else ""),
    )
    return to_device(batch, device)


def least_of(arrays: Mapping[str, np.ndarray], prefix: str = "") -> tuple[int, int] | None:
    """Height and width that each of the loader's images has at least; None of none."""
    sizes = arrays[f"{prefix}sizes"] if f"{prefix}sizes" in arrays else sizes_of(arrays[f"{prefix}cuts"])
    return (int(sizes[:, 0].min()), int(sizes[:, 1].min())) if len(sizes) else None


def parts_of(
    arrays: Mapping[str, np.ndarray], config: TrainingConfig, world_size: int
) -> list[Mapping[str, np.ndarray]]:
    """Split a worker's share into micro-batches (`training.micro_batch_size`): the same number on every worker and step, since
    they wait for each other. Some may be empty."""
    if not config.micro_batch_size:
        return [arrays]
    share = -(-config.batch_size // world_size)  # the largest worker's
    count = -(-share // config.micro_batch_size)
    return [_part(arrays, count, part) for part in range(count)]


def _part(arrays: Mapping[str, np.ndarray], count: int, part: int) -> dict[str, np.ndarray]:
    found = {name: split(array, count, part) for name, array in arrays.items() if name != "pixels"}
    if "pixels" in arrays:  # one after the other, of images of any size
        names = [name for name in ("cuts", "teacher_cuts") if name in arrays]
        starts = np.min([arrays[name][:, 0] for name in names], axis=0).astype(np.int64)
        ends = np.append(starts, len(arrays["pixels"]))
        first, stop = ends[len(starts) * part // count], ends[len(starts) * (part + 1) // count]
        found["pixels"] = arrays["pixels"][first:stop]
        for name in names:
            found[name] = found[name].copy()
            found[name][:, 0] -= first
    return found
