"""Rows of shards -> uint8 batches, for the student and, at its own size, for the teacher: padded, or as they are shipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qskd.config import ResizeConfig, ViewConfig
from qskd.datasets.manifest import REMEDY as SHARDS_REMEDY
from qskd.datasets.manifest import Manifest
from qskd.datasets.order.schedule import Subset
from qskd.datasets.pictures.cuts import SHIP_BYTES, Plan, placed, planned
from qskd.datasets.pictures.joining import joined, pad
from qskd.datasets.samples import BesideRow, RowReader, Sample
from qskd.datasets.shards import ShardReader
from qskd.datasets.unlabeled.joined import JoinedShards
from qskd.datasets.views import View, derivations, is_mirrored, make_view, source_view, view_boxes, viewed_size
from qskd.errors import QskdError
from qskd.storage.recent import Key, Recent
from qskd.storage.spool import RowGroupSpool

DIMENSION_BYTES = 2**25  # of the sizes of a million pictures


Room = Callable[[int], NDArray[np.uint8]]


def _empty(nbytes: int) -> NDArray[np.uint8]:
    return np.empty(nbytes, np.uint8)


@dataclass(frozen=True, eq=False)
class Example:
    """One view of one image. pixels: uint8 [bytes], as planned. boxes_cxcywh: [N, 4] relative to the view."""

    plan: Plan
    pixels: NDArray[np.uint8]
    boxes_cxcywh: NDArray[np.float32]
    labels: NDArray[np.int64]
    image_id: int
    original_size: tuple[int, int]  # height, width of the file's image
    labelled: bool = True

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes + self.boxes_cxcywh.nbytes + self.labels.nbytes + 500


class BatchLoader:
    """Loads batches of rows from a train and a val shard folder (an empty URI: there is none). Not for several threads.

    keep_bytes bounds what is kept in memory: encoded rows, so that rows stored together are read together once, for good when
    all of them fit, else until each was asked for; and finished views too, when all of them fit beside the rows. spool: in
    place of this process's memory, encoded rows are kept there, for all readers of this machine.
    teacher_resize equal to student_resize counts as none.
    teacher_cache: where what comes beside the training views (the teacher's outputs) is read from; the teacher's pixels are
    then not needed. finish: crop, flip, resize and pad here; else they are left to the device that the batch goes to
    (`qskd.datasets.batch`), which makes the same pixels. unlabeled_uris: shard folders without labels, whose shards' numbers
    follow those of the train folder.
    """

    def __init__(
        self,
        train_uri: str,
        val_uri: str,
        views: ViewConfig,
        student_resize: ResizeConfig,
        teacher_resize: ResizeConfig | None = None,
        keep_bytes: int = 2**30,
        teacher_cache: RowReader | None = None,
        finish: bool = True,
        spool: RowGroupSpool | None = None,
        unlabeled_uris: Sequence[str] = (),
    ) -> None:
        self._spool = spool
        self._readers: dict[Subset, ShardReader | JoinedShards] = {}
        if unlabeled_uris:
            self._readers["train"] = JoinedShards([*([train_uri] if train_uri else []), *unlabeled_uris], spool)
        elif train_uri:
            self._readers["train"] = ShardReader(train_uri, spool)
        if val_uri:
            self._readers["val"] = ShardReader(val_uri, spool)
        self._views = views
        self._resizes = [student_resize]
        if teacher_resize is not None and teacher_resize != student_resize:
            self._resizes.append(teacher_resize)
        self._cache, self._finish = teacher_cache, finish
        self._recent, self._dimensions = Recent(keep_bytes), Recent(DIMENSION_BYTES)
        self.rows_requested = self.rows_not_in_memory = (
            0  # rows (and teacher's rows) asked for so far; those that were not in memory then
        )
        # When not all fits, views would push out the encoded rows, and a lost row costs reading its whole group.
        stored, finished = self._estimated_bytes()
        fits = stored + finished <= keep_bytes
        # Where every epoch has a crop of its own, none is asked for again. Fresh flips are two views.
        self._keep_views: dict[Subset, bool] = {"train": fits and views.derived_taken != "flip_and_crop", "val": fits}
        # When the rows alone don't fit, one that was used would only push out others that are yet to be, and be gone itself
        # before its next turn: an epoch later.
        self._keep_rows = stored <= keep_bytes
        self._held = self._recent.get if self._keep_rows else self._recent.take

    def _read_along(self, group: range, row: int) -> Sequence[int]:
        """The rows to read when one is: those stored with it, unless they are kept outside."""
        return group if self._spool is None else [row]

    def manifest(self, subset: Subset) -> Manifest:
        """The manifest behind "train" or "val"."""
        return self._reader(subset).manifest

    def sizes(self, subset: Subset, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """(height, width) [n, 2] that the student will see of rows [n, 3]; no picture is read."""
        found = []
        for shard, row, index in np.asarray(rows).reshape(-1, 3).tolist():
            image_ids, all_sizes = self._known(subset, shard)
            image_id, (height, width) = int(image_ids[row]), all_sizes[row].tolist()
            view = View.IDENTITY if subset == "val" else make_view(self._views, image_id, index)
            found.append(viewed_size(height, width, view, self._resizes[0]))
        return np.array(found, np.int64).reshape(-1, 2)

    def _known(self, subset: Subset, shard: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of a shard's rows: image ids [n], and (height, width) [n, 2]."""
        known: tuple[NDArray[np.int64], NDArray[np.int64]] | None = self._dimensions.get((subset, shard))
        if known is None:
            known = self._reader(subset).dimensions(shard)
            self._dimensions.put((subset, shard), known, sum(each.nbytes for each in known))
        return known

    def load(self, subset: Subset, rows: NDArray[np.integer[Any]], room: Room = _empty) -> dict[str, NDArray[Any]]:
        """rows [n, 3] of (shard, row, view index) -> a batch of n images, n may be 0. room: gives the memory for pixels that are
        not finished.

        images: uint8 [n, H, W, 3], zeros right of and below the real part. sizes: int32 [n, 2], its (height, width).
        boxes_cxcywh: float32 [n, M, 4], relative to the view; labels: int64 [n, M], contiguous; both zero after the
        first counts: int32 [n]. Crowds are no targets. image_ids: int64 [n]. views: int32 [n]. positions: int32 [n, 2],
        (shard, row). original_sizes: int32 [n, 2], (height, width) of the file's image. With another teacher_resize,
        teacher_images and teacher_sizes are the same views at the teacher's size; with a cache, "train" has its rows, as
        its `collate` gives them, and with derived views teacher_derived: bool [n], whether a row is of another view, mirrored
        or still to be cropped, and with derived crops teacher_crops_xyxy: float32 [n, 4] (`derived_crop`). labelled: bool [n],
        where some are not. "val" is always the identity view. Not finished: pixels uint8 [bytes] and, in place of images and
        sizes, cuts [n, 11] (`qskd.datasets.pictures.cuts`).

        Raises QskdError naming shard and image id when a shard, a picture or the cache is broken.
        """
        rows = np.asarray(rows).reshape(-1, 3)
        wanted: list[tuple[int, int, int]] = [(int(s), int(r), int(v)) for s, r, v in rows]
        self.rows_requested += len(wanted) * (2 if self._cache is not None and subset == "train" else 1)
        examples = self._examples(subset, wanted, room)
        objects = max((len(example.labels) for example in examples), default=0)
        boxes_cxcywh = np.zeros((len(examples), objects, 4), np.float32)
        labels = np.zeros((len(examples), objects), np.int64)
        for i, example in enumerate(examples):
            boxes_cxcywh[i, : len(example.labels)] = example.boxes_cxcywh
            labels[i, : len(example.labels)] = example.labels
        batch: dict[str, NDArray[Any]] = {
            "boxes_cxcywh": boxes_cxcywh,
            "labels": labels,
            "counts": np.array([len(example.labels) for example in examples], np.int32),
            "image_ids": np.array([example.image_id for example in examples], np.int64),
            "views": rows[:, 2].astype(np.int32),
            "positions": rows[:, :2].astype(np.int32),
            "original_sizes": np.array([e.original_size for e in examples], np.int32).reshape(-1, 2),
        }
        if not all(example.labelled for example in examples):
            batch["labelled"] = np.array([example.labelled for example in examples])
        batch |= self._pixels(examples)
        if self._cache is not None and subset == "train":
            said = self._rows_beside(self._cache, wanted, [example.image_id for example in examples])
            batch |= self._cache.collate(said) | derivations(self._views, rows[:, 2], batch["image_ids"])
        return batch

    def _pixels(self, examples: Sequence[Example]) -> dict[str, NDArray[Any]]:
        prefixes = ("", "teacher_")[: len(self._resizes)]
        if not self._finish:
            cuts = placed([each.plan for each in examples]) if examples else [np.zeros((0, 11))] * len(prefixes)
            return {
                "pixels": joined([each.pixels for each in examples]),
                **{f"{prefix}cuts": lines for prefix, lines in zip(prefixes, cuts, strict=True)},
            }
        found: dict[str, NDArray[Any]] = {}
        for number, prefix in enumerate(prefixes):
            images, sizes = pad([each.plan.finished(each.pixels, number) for each in examples])
            found |= {f"{prefix}images": images, f"{prefix}sizes": sizes}
        return found

    def _rows_beside(
        self, cache: RowReader, wanted: Sequence[tuple[int, int, int]], image_ids: Sequence[int]
    ) -> list[BesideRow]:
        places = [(shard, row, source_view(self._views, view)) for shard, row, view in wanted]
        found, unread, asked = dict[Key, BesideRow](), dict[tuple[int, int], set[int]](), dict.fromkeys(places)
        for shard, row, view in asked:
            kept = self._held(("beside", shard, row, view))
            if kept is None:
                unread.setdefault((shard, view), set()).update(
                    self._read_along(cache.group_rows(shard, view, row), row)
                )
                self.rows_not_in_memory += self._spool is None
            else:
                found[shard, row, view] = kept
        before = cache.rows_read
        for (shard, view), rows in unread.items():
            ordered = sorted(rows)
            for row, said in zip(ordered, cache.read(shard, view, ordered), strict=True):
                if self._spool is None and (self._keep_rows or (shard, row, view) not in asked):
                    self._recent.put(("beside", shard, row, view), said, said.nbytes + 2000)
                found[shard, row, view] = said
        self.rows_not_in_memory += 0 if self._spool is None else cache.rows_read - before
        for (shard, row, view), image_id in zip(places, image_ids, strict=True):
            if found[shard, row, view].image_id != image_id:
                problem = f"row {row} is of image {found[shard, row, view].image_id}"
                raise QskdError(
                    cache.where(shard, view), problem, f"image {image_id}, as the shard has it", cache.remedy
                )
        return [
            cache.mirrored(found[place]) if is_mirrored(self._views, image_id, index) else found[place]
            for place, image_id, (_, _, index) in zip(places, image_ids, wanted, strict=True)
        ]

    def _reader(self, subset: Subset) -> ShardReader | JoinedShards:
        if subset not in self._readers:
            raise QskdError(f"data.{subset}", "not given", "a folder of shards", "make one with `qskd prepare`")
        return self._readers[subset]

    def _estimated_bytes(self) -> tuple[int, int]:
        """Of all rows as they are stored, the teacher's too, and of all finished views."""
        stored = finished = 0
        for subset, reader in self._readers.items():
            # An estimate is enough: the store is bounded.
            picture = sum(3 * each.usual_pixels for each in self._resizes) if self._finish else SHIP_BYTES
            views = self._views.count * (2 if self._views.derived_taken == "flip" else 1) if subset == "train" else 1
            stored += sum(shard.bytes for shard in reader.manifest.shards)
            finished += reader.manifest.num_images * views * (picture + 1000)
        return stored + (self._cache.num_bytes if self._cache is not None else 0), finished

    def _examples(self, subset: Subset, wanted: Sequence[tuple[int, int, int]], room: Room) -> list[Example]:
        found, keep = dict[Key, Example](), self._keep_views[subset]
        shown = {place: self._shown(subset, place) for place in wanted} if keep else {}
        for place, key in shown.items():
            example = self._recent.get(key)
            if example is not None:
                found[place] = example
        missing = [place for place in dict.fromkeys(wanted) if place not in found]
        samples = self._samples(subset, [place[:2] for place in missing])
        plans = [self._plan(subset, place, samples[place[:2]]) for place in missing]
        # One after the other, so that they need not be joined; those that are kept have memory of their own.
        ends = np.cumsum([0, *(plan.nbytes for plan in plans)]).tolist()
        flat = (_empty if keep or self._finish else room)(0 if keep else ends[-1])
        for place, plan, start, stop in zip(missing, plans, ends, ends[1:], strict=False):
            pixels = np.empty(plan.nbytes, np.uint8) if keep else flat[start:stop]
            example = self._make(subset, place, samples[place[:2]], plan, pixels)
            if keep:
                self._recent.put(shown[place], example, example.nbytes)
            found[place] = example
        return [found[place] for place in wanted]

    def _shown(self, subset: Subset, place: tuple[int, int, int]) -> Key:
        """The same for all places that show the same: a view derived by a flip shows its source, or the mirror image of that."""
        shard, row, index = place
        source, mirrored = index if subset == "val" else source_view(self._views, index), False
        if source != index:
            mirrored = is_mirrored(self._views, int(self._known(subset, shard)[0][row]), index)
        return ("view", subset, shard, row, source, mirrored)

    def _samples(self, subset: Subset, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Sample]:
        reader = self._reader(subset)
        found: dict[tuple[int, int], Sample] = {}
        unread: dict[int, set[int]] = {}
        asked = dict.fromkeys(places)
        for shard, row in asked:
            sample = self._held(("row", subset, shard, row))
            if sample is None:
                unread.setdefault(shard, set()).update(self._read_along(reader.group_rows(shard, row), row))
                self.rows_not_in_memory += self._spool is None
            else:
                found[shard, row] = sample
        before = reader.rows_read
        for shard, shard_rows in unread.items():
            ordered = sorted(shard_rows)
            for row, sample in zip(ordered, reader.read(shard, ordered), strict=True):
                if self._spool is None and (self._keep_rows or (shard, row) not in asked):
                    self._recent.put(("row", subset, shard, row), sample, len(sample.encoded) + 1000)
                if (shard, row) in asked:
                    found[shard, row] = sample
        self.rows_not_in_memory += 0 if self._spool is None else reader.rows_read - before
        return found

    def _plan(self, subset: Subset, place: tuple[int, int, int], sample: Sample) -> Plan:
        view = View.IDENTITY if subset == "val" else make_view(self._views, sample.image_id, place[2])
        return planned((sample.height, sample.width), view, self._resizes, self._finish)

    def _make(
        self, subset: Subset, place: tuple[int, int, int], sample: Sample, plan: Plan, pixels: NDArray[np.uint8]
    ) -> Example:
        shard, row, _ = place
        reader = self._reader(subset)
        where = f"{reader.where(shard)}: row {row}, image {sample.image_id} ({sample.file_name})"
        height, width = plan.fill(sample.encoded, where, pixels)
        if (height, width) != plan.size:
            found, expected = f"{width} x {height} pixels", f"{sample.width} x {sample.height}"
            raise QskdError(where, found, expected, SHARDS_REMEDY)
        single = ~sample.iscrowd
        min_visible = self._views.min_visible
        boxes, kept = view_boxes(sample.boxes_xyxy[single], sample.width, sample.height, plan.view, min_visible)
        labels = label_index(reader.manifest, sample.category_ids[single][kept], where)
        size = sample.height, sample.width
        return Example(plan, pixels, boxes, labels, sample.image_id, size, sample.labelled)


def label_index(manifest: Manifest, category_ids: NDArray[np.int64], where: str = "") -> NDArray[np.int64]:
    """The dataset's category ids [N] -> contiguous labels 0..K-1 [N]. QskdError for an id the manifest doesn't have."""
    index = manifest.category_index
    try:
        return np.array([index[category] for category in category_ids.tolist()], np.int64)
    except KeyError as error:
        raise QskdError(where or manifest.source, f"category id {error.args[0]}", f"one of {sorted(index)}") from None
