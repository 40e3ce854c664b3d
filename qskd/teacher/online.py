"""The teacher at work in the training step: a TeacherRecord in the dataset's class order, as `qskd.teacher.cached` reads it
from the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qskd.boxes import cxcywh_to_xyxy, pairwise_giou
from qskd.config import DetectionLossConfig, ResizeConfig
from qskd.datasets.batch import TrainBatch
from qskd.datasets.classes import NOBODY
from qskd.detectors import Detector, Preprocessing, to_pixels
from qskd.distillation.method import Facts, Online
from qskd.distillation.shared.apart import deaf, matched, prediction
from qskd.errors import QskdError
from qskd.losses.matching import assign
from qskd.structures import SILENT_LOGIT, Attend, Targets, TeacherNeeds, TeacherRecord
from qskd.teacher.columns.table import COLUMNS
from qskd.teacher.decoder import TeacherDecoder
from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    from qskd.teacher.memory.moments import Directions

T = TypeVar("T")
Choose = Callable[[TeacherRecord], Tensor]


class OnlineTeacher(nn.Module):
    """A frozen detector that says what a distillation method needs of it.

    class_slots: the teacher's logit slot of each dataset class (`qskd.datasets.classes.map_classes`); of one that is left to
    nobody the record says `SILENT_LOGIT`. levels: the memory maps that its records have, by number, the finest first; None: all.
    """

    def __init__(
        self,
        detector: Detector,
        class_slots: tuple[int, ...],
        preprocessing: Preprocessing,
        levels: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        there = len(detector.memory_channels)
        if levels is not None and levels[-1] >= there:
            raise QskdError(
                "teacher.levels",
                f"map {levels[-1]}, and a teacher of {there}",
                f"numbers from 0, the finest, to {there - 1}" if there > 1 else "null: it has one map",
            )
        self.levels = tuple(range(there)) if levels is None else levels
        self.detector = detector.eval().requires_grad_(False)
        self.preprocessing = preprocessing
        self.register_buffer("class_slots", torch.tensor(class_slots, dtype=torch.int64), persistent=False)
        self.knows_all = NOBODY not in class_slots
        self.directions: tuple[Directions, ...] = ()  # only a cache knows them

    @property
    def resize(self) -> ResizeConfig:
        """How it wants its pixels."""
        return self.preprocessing.resize

    @property
    def facts(self) -> Facts:
        known = facts_of(self.detector, self.resize)
        return replace(
            known,
            channels=self._kept(known.channels),
            cells=self._kept(known.cells),
            classes=len(self.class_slots),  # type: ignore[arg-type]
            directions=self.directions,
        )

    def _kept(self, maps: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(maps[level] for level in self.levels)

    @property
    def decoder(self) -> TeacherDecoder:
        """Its decoder, to be asked about a memory. QskdError where that can't be."""
        slots: Tensor = self.class_slots  # type: ignore[assignment]
        return TeacherDecoder(self.detector, slots.tolist(), self.resize).to(slots.device)

    def record(self, batch: TrainBatch, needs: TeacherNeeds) -> TeacherRecord:
        """Asked about a training batch, all queries' attention included where attention is needed."""
        record: TeacherRecord = self(batch.teacher_images, batch.teacher_sizes, needs, least=batch.teacher_least)
        return record

    def said_of(
        self,
        arrays: Mapping[str, NDArray[np.generic]],
        batch: TrainBatch,
        needs: TeacherNeeds,
        choose: Choose | None = None,
    ) -> TeacherRecord:
        """Of the loader's arrays at the teacher's own resolution, which `batch` was made of."""
        record: TeacherRecord = self(batch.images, batch.sizes, needs, choose, batch.least)
        return record

    def online(self, batch: TrainBatch) -> Online:
        return Online(self, batch.teacher_images, batch.teacher_sizes, batch.teacher_least)

    def sizes(self, all_layers: bool) -> CacheSizes:
        """What a cache of its outputs has in every row."""
        layers, classes = self.detector.num_layers if all_layers else 1, len(self.class_slots)  # type: ignore[arg-type]
        facts = self.facts
        return CacheSizes(layers, self.detector.num_queries, classes, facts.channels, facts.cells)

    def train(self, mode: bool = True) -> OnlineTeacher:
        """Stays in evaluation mode, whatever it is part of."""
        return super().train(False)

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        sizes: Tensor,
        needs: TeacherNeeds,
        choose: Choose | None = None,
        least: tuple[int, int] | None = None,
    ) -> TeacherRecord:
        """images: uint8 [B, H, W, 3] at the teacher's own resolution; sizes: int [B, 2] real height and width.

        choose: from the record without attention to the queries [B, A] whose attention is wanted, -1 = none. Without it
        all queries', for which of them a method keeps depends on the matching, which has not been done yet. least: see
        `Detector.forward`.
        """
        record, attend = self.said(images, sizes, needs, least)
        if attend is None:
            return record
        if choose is None:
            known = record.logits.shape[2] * (len(record.logits) if needs.attention_layers == "all" else 1)
            queries = torch.arange(known, device=images.device).expand(len(images), -1)
        else:
            queries = choose(record)
        return replace(record, attention_queries=queries, attention=attend(queries))

    def said(
        self, images: Tensor, sizes: Tensor, needs: TeacherNeeds, least: tuple[int, int] | None
    ) -> tuple[TeacherRecord, Attend | None]:
        """The record without attention, and what gives that of certain queries, where `needs` asks for any."""
        pixels, mask = to_pixels(images, sizes, self.preprocessing.mean, self.preprocessing.std)
        output = self.detector(pixels, mask, with_attention=needs.attention, least=least)
        layers = slice(None) if needs.all_layers else slice(-1, None)
        record = TeacherRecord(
            logits=self._of_dataset(output.logits[layers]),
            boxes_cxcywh=output.boxes_cxcywh[layers],
            memory=self._kept(output.memory) if needs.memory else (),
            memory_valid=self._kept(output.memory_valid) if needs.memory or needs.attention else (),
            extra={
                name: value
                for column in COLUMNS
                if column.optional and column.asked(needs)
                for name, value in column.taken(output).items()
            },
        )
        if not self.detector.memory_channels:
            record = without_places(record)
        if not needs.attention:
            return record, None
        ways = {"last": output.attend, "mean": output.attend_mean, "all": output.attend_each}
        attend = ways[needs.attention_layers]
        assert attend is not None
        return record, lambda queries: self._kept(attend(queries))

    def _of_dataset(self, logits: Tensor) -> Tensor:
        """[..., K'] -> [..., K], in the dataset's class order."""
        slots: Tensor = self.class_slots  # type: ignore[assignment]
        if self.knows_all:
            return logits.index_select(-1, slots)
        return logits.index_select(-1, slots.clamp(min=0)).masked_fill(slots == NOBODY, SILENT_LOGIT)


def without_places(record: TeacherRecord) -> TeacherRecord:
    """Of a teacher of predictions alone, whose images have fewer boxes than there are places for: those that say nothing of any
    class are absent."""
    return replace(record, absent=(record.logits <= SILENT_LOGIT / 2).all(-1))


def facts_of(detector: Detector, resize: ResizeConfig) -> Facts:
    """What a method is told of a detector that gets its pictures so; classes: its own."""
    return Facts(
        detector.memory_channels,
        detector.memory_cells(resize),
        detector.family,
        detector.num_layers,
        detector.num_queries,
        len(detector.labels),
        detector.chooses_queries,
        query_kind=detector.query_kind,
        query_width=detector.query_width,
        reads_raw_memory=detector.reads_raw_memory,
    )


@torch.no_grad()
def queries_above(
    record: TeacherRecord, targets: Targets, floor: float, costs: DetectionLossConfig, attention_layers: str = "last"
) -> Tensor:
    """The last layer's queries that GQS could keep at any boundary from `floor` up: those whose GIoU with some object
    reaches it, and the matched ones; of several teachers objects of their own classes. [B, A] int64, ascending, -1 in the padding.

    attention_layers "all": of every layer's, numbered as in `TeacherRecord.attention_queries`."""
    part = slice(None) if attention_layers == "all" else slice(-1, None)
    boxes = record.boxes_cxcywh[part].float().flip(0)  # the last layer first
    record = replace(record, logits=record.logits[part].flip(0), boxes_cxcywh=boxes, absent=None)
    (pairs,) = assign([prediction(record)], targets, costs)
    pairs = matched(record, pairs, targets)
    keep = torch.zeros(boxes.shape[:3], dtype=torch.bool, device=boxes.device)
    if targets.valid.shape[1]:
        overlap = pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets.boxes_cxcywh.float()))
        seen = (overlap >= floor) & targets.valid[:, None]
        if record.parts:
            seen &= ~deaf(record)[:, targets.labels].transpose(0, 1)
        keep = seen.any(-1)
        spare = torch.where(pairs < 0, boxes.shape[2], pairs)
        padded = torch.cat([keep, keep.new_zeros(*keep.shape[:2], 1)], dim=2).scatter(2, spare, True)
        keep = padded[..., :-1]
    keep = keep.transpose(0, 1).flatten(1)
    order = torch.sort((~keep).int(), dim=1, stable=True)
    most = int(keep.sum(1).max()) if len(keep) else 0
    return torch.where(order.values == 0, order.indices, -1)[:, :most]
