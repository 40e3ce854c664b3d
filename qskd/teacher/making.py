"""Making the cache of teacher outputs, free of Ray: which images the teacher sees together, and what is kept of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qskd.config import Config, ResizeConfig, ViewConfig
from qskd.datasets.batch import train_batch
from qskd.datasets.shards import ShardReader
from qskd.datasets.views import make_view, viewed_size
from qskd.errors import QskdError
from qskd.precision import autocast, cached_in
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.columns.attended import ATTENDED, packed, silenced
from qskd.teacher.columns.table import TeacherRow, encode, rounded
from qskd.teacher.identity import cached_needs
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.memory.basis import Bases, find_bases, in_parts, kept_of
from qskd.teacher.memory.moments import Directions, Moments
from qskd.teacher.online import OnlineTeacher, queries_above
from qskd.teacher.pseudo import with_pseudo_objects

WINDOW_BATCHES = 8
Rows = NDArray[np.int32]  # [n, 3] of (shard, row, view index)


def row_batches(
    reader: ShardReader, shard: int, view: int, views: ViewConfig, resize: ResizeConfig, batch_size: int
) -> list[list[Rows]]:
    """A shard's rows as windows of batches. Inside a window rows go together by size, so that little of a batch is padding;
    windows follow one another in the shard's order, so that rows can be written while others are computed.

    Depends on the arguments only: the same images meet in the same batch whenever and wherever the cache is made.
    """
    table = reader.read_table(shard, ["image_id", "width", "height"])
    columns = (table.column(name).to_pylist() for name in ("image_id", "width", "height"))
    sizes = [viewed_size(h, w, make_view(views, image, view), resize) for image, w, h in zip(*columns, strict=True)]
    windows = []
    step = WINDOW_BATCHES * batch_size
    for start in range(0, len(sizes), step):
        order = sorted(range(start, min(start + step, len(sizes))), key=lambda row: (sizes[row], row))
        rows = np.array([(shard, row, view) for row in order], np.int32)
        windows.append(np.split(rows, range(batch_size, len(rows), batch_size)))
    return windows


class CacheMaker:
    """The teacher, asked for everything that a cache with the recipe's settings holds."""

    def __init__(self, config: Config, teacher: OnlineTeacher, device: torch.device, bases: Bases = ()) -> None:
        """bases: in which memory is kept, one a map; none: as it is."""
        self.config, self.device, self.needs = config, device, cached_needs(config)
        self.teacher, self.bases = teacher.to(device), tuple(basis.to(device) for basis in bases)
        # The maps' widths, where some of their cells are kept.
        self.attended_of = self.sizes.stored if config.teacher.cache.cells == ATTENDED else ()

    def ask(self, arrays: Mapping[str, np.ndarray]) -> TeacherRecord:
        """The loader's arrays, at the teacher's resolution -> the teacher's record, with attention of the queries that
        the cache keeps."""
        cache, costs, data = self.config.teacher.cache, self.config.detection, self.config.data
        batch = train_batch(arrays, self.device)

        def choose(record: TeacherRecord) -> torch.Tensor:
            known = replace(record, logits=rounded(record.logits, cache.precision))
            objects = with_pseudo_objects(batch.targets, known, data.unlabeled_score, data.completed)
            return queries_above(known, objects, cache.attention_giou_floor, costs, cache.attention_layers)

        with torch.inference_mode(), autocast(cached_in(self.config.compute.precision), self.device):
            return self.teacher.said_of(arrays, batch, self.needs, choose)

    def rows(self, arrays: Mapping[str, np.ndarray]) -> list[TeacherRow]:
        """One encoded row for each image. QskdError when the teacher says something that is not finite."""
        image_ids = arrays["image_ids"].tolist()
        rows = encode(in_parts(self.ask(arrays), self.bases), image_ids, self.config.teacher.cache.precision)
        for row in rows:
            checked = (row.logits, row.boxes_cxcywh, row.memory_scale if len(row.memory_scale) else row.memory)
            if not all(np.isfinite(part).all() for part in checked):
                raise self._not_finite(row.image_id)
        return [silenced(row, self.attended_of) for row in rows] if self.attended_of else rows

    def _not_finite(self, image_id: int) -> QskdError:
        return QskdError(
            f"teacher {self.config.teacher.path}",
            f"not a finite answer to image {image_id}",
            "finite logits, boxes and memory",
            "look at the picture; try compute.precision=float32, or teacher.cache.precision=float32",
        )

    def bases_of(self, decoded: Iterable[Mapping[str, np.ndarray]]) -> Bases:
        """In which the recipe's cache keeps memory, of the loader's arrays of some images. None: as it is. QskdError where the
        teacher's memory of one is not finite: the basis would be of no number at all."""
        share, widths = self.config.teacher.cache.memory_share, self.teacher.facts.channels
        if share == 1 or not widths:
            return ()
        return find_bases(self._memory_of(decoded), widths, share)

    def directions_of(self, decoded: Iterable[Mapping[str, np.ndarray]]) -> tuple[Directions, ...]:
        """In which the teacher's memory of these images varies, by map. QskdError as `bases_of`."""
        moments = Moments(self.teacher.facts.channels)
        for record in self._memory_of(decoded):
            moments.add_maps(record.memory, record.memory_valid)
        return moments.directions()

    def _memory_of(self, decoded: Iterable[Mapping[str, np.ndarray]]) -> Iterator[TeacherRecord]:
        for arrays in decoded:
            batch = train_batch(arrays, self.device)
            with torch.inference_mode(), autocast(cached_in(self.config.compute.precision), self.device):
                record = self.teacher.said_of(arrays, batch, TeacherNeeds(memory=True))
            for image, image_id in enumerate(arrays["image_ids"].tolist()):
                if not all(map_[image].isfinite().all() for map_ in record.memory):
                    raise self._not_finite(image_id)
            yield record

    @property
    def sizes(self) -> CacheSizes:
        """Of the rows."""
        return replace(self.teacher.sizes(self.config.teacher.cache.all_layers), kept=kept_of(self.bases))

    def stored(self, row: TeacherRow) -> TeacherRow:
        """As it is in a file."""
        return packed(row, self.attended_of) if self.attended_of else row

    def in_order(self, windows: Sequence[list[Rows]], decoded: Iterator[Mapping[str, Any]]) -> Iterator[TeacherRow]:
        """All rows of a shard in its own order. decoded: the loader's arrays of each batch, windows flattened."""
        for window in windows:
            places = np.concatenate([batch[:, 1] for batch in window])
            rows = [row for _ in window for row in self.rows(next(decoded))]
            for place in np.argsort(places):
                yield rows[place]
