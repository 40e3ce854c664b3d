"""Shares of batches as tensors on the worker's device, ahead of the step that wants them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipelines.feed.read_ahead import read_ahead
from pipelines.feed.stream import LOADER_ROWS, Share
from qskd.config import TrainingConfig
from qskd.datasets.batch import TrainBatch, parts_of, train_batch
from qskd.structures import tensors_of


@dataclass(frozen=True)
class ReadyShare:
    """share: as the stream has it. parts: of a training batch, its micro-batches on the device; of an evaluation's none."""

    share: Share
    parts: tuple[TrainBatch, ...]
    copied: Any = None  # the CUDA event after which the parts are there
    device: torch.device | None = None  # where, if there is such an event

    @property
    def loader_rows(self) -> np.ndarray | None:
        """What the reader said of its memory (`LOADER_ROWS`)."""
        return self.share.arrays.get(LOADER_ROWS)

    def wait(self) -> tuple[TrainBatch, ...]:
        """The parts, for the current stream of the device, which waits for them there; the host does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.copied)
            for part in self.parts:
                for tensor in tensors_of(part):
                    tensor.record_stream(stream)  # else its memory might be given away while the step still reads it
        return self.parts


def ready_shares(
    shares: Iterator[Share], config: TrainingConfig, world_size: int, device: torch.device
) -> Iterator[ReadyShare]:
    """The shares, two ahead: unpacked, pinned, copied and resized in the background, on a GPU in a stream of their own."""
    return read_ahead(_made(shares, config, world_size, device))


def _made(
    shares: Iterator[Share], config: TrainingConfig, world_size: int, device: torch.device
) -> Iterator[ReadyShare]:
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    for share in shares:
        if share.subset != "train":
            yield ReadyShare(share, ())
            continue
        parts = parts_of(_without_notes(share.arrays), config, world_size)
        if stream is None:
            yield ReadyShare(share, tuple(train_batch(part, device) for part in parts))
            continue
        with torch.cuda.stream(stream):
            made = tuple(train_batch(part, device) for part in parts)
            copied = stream.record_event()
        yield ReadyShare(share, made, copied, device)


def _without_notes(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in arrays.items() if name != LOADER_ROWS}
