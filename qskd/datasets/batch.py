"""A worker's share of one global batch, as tensors: what the loader hands to the training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qskd.config import TrainingConfig
from qskd.datasets.schedule import split
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


def train_batch(arrays: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> TrainBatch:
    """The loader's arrays -> tensors on `device` (pinned on the way to a GPU, so that copies overlap with work)."""

    def tensor(name: str) -> Tensor:
        value = torch.from_numpy(np.require(arrays[name], requirements="W"))
        return value.pin_memory() if torch.device(device).type == "cuda" else value

    counts = tuple(int(count) for count in arrays["counts"])
    slots = torch.arange(arrays["labels"].shape[1])
    targets = Targets(
        boxes_cxcywh=tensor("boxes_cxcywh"),
        labels=tensor("labels"),
        valid=slots[None, :] < torch.tensor(counts, dtype=torch.int64)[:, None],
        image_ids=tuple(int(image_id) for image_id in arrays["image_ids"]),
        counts=counts,
    )
    images, sizes = tensor("images"), tensor("sizes")
    own, cached = "teacher_images" in arrays, "teacher_logits" in arrays
    batch = TrainBatch(
        images=images,
        sizes=sizes,
        teacher_images=tensor("teacher_images") if own else images,
        teacher_sizes=tensor("teacher_sizes") if own else sizes,
        targets=targets,
        cached={name: tensor(name) for name in arrays if name.startswith("teacher_")} if cached else {},
        least=least_size(arrays["sizes"]),
        teacher_least=least_size(arrays["teacher_sizes" if own else "sizes"]),
    )
    return to_device(batch, device)


def least_size(sizes: np.ndarray) -> tuple[int, int] | None:
    """Height and width that each of [n, 2] has at least; None of none."""
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
    return [{name: split(array, count, part) for name, array in arrays.items()} for part in range(count)]
