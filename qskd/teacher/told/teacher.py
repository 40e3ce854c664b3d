"""A file of detections, seen as a teacher: each box is a query, and whatever else a DETR says is not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qskd.config import ViewConfig
from qskd.datasets.batch import TrainBatch
from qskd.datasets.classes import NOBODY
from qskd.datasets.samples import Category
from qskd.datasets.views import make_view, view_boxes
from qskd.detectors.teachers.asked import UNASKED_LOGIT
from qskd.distillation.method import Facts
from qskd.errors import QskdError
from qskd.structures import SILENT_LOGIT, TeacherNeeds, TeacherRecord
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.online import Choose, OnlineTeacher
from qskd.teacher.told.fits import of_other_classes, of_other_images
from qskd.teacher.told.results import UNSEEN, Results

_SURE = 1e-6  # a score of 0 or 1 has no finite logit


class ToldTeacher(OnlineTeacher):
    """Says of an image what its file has; of a view, its boxes as objects are seen there: cut to it, mirrored, or gone.

    A query is a box, the best first. In its class's place stands the score's logit (of several entries with the very same box, each
    one's in its class), in the others' `UNASKED_LOGIT`: what the file does not say is taken for certainly not. Where an image has
    fewer boxes than `queries`, the rest says `SILENT_LOGIT` of every class: `CachedTeacher` takes them for absent.
    It has no pixels to look at and no batch knows which view it is of: only a cache can be made of it.
    """

    def __init__(
        self, results: Results, categories: Sequence[Category], class_slots: Sequence[int], views: ViewConfig
    ) -> None:
        """categories: the dataset's. class_slots: the place of each in `labels_in`'s."""
        nn.Module.__init__(self)
        self.results, self.views, self.preprocessing = results, views, UNSEEN
        self.directions = ()
        self.knows_all = NOBODY not in class_slots
        self.classes = len(class_slots)
        self.known = [one.id for one in categories] if results.categories is None else list(results.categories)
        self.places = dict[int, list[int]]()  # of the dataset's classes, by the file's category ids
        for place, slot in enumerate(class_slots):
            if slot != NOBODY:  # without names of its own the file's ids are the dataset's, whatever these are called
                number = categories[place].id if results.categories is None else self.known[slot]
                self.places.setdefault(number, []).append(place)
        self.silent = np.array([slot == NOBODY for slot in class_slots])

    @property
    def facts(self) -> Facts:
        return Facts((), (), "", 1, self.results.queries, self.classes, chooses_queries=True)

    def sizes(self, all_layers: bool) -> CacheSizes:
        return CacheSizes(1, self.results.queries, self.classes, (), ())

    def forward(self, *_: object, **__: object) -> NoReturn:
        raise QskdError(
            self.results.path,
            "a file of detections, which can't be asked about pictures",
            "a cache made of it",
            "set teacher.cache.path, and run `qskd cache RECIPE`",
        )

    def said_of(
        self,
        arrays: Mapping[str, NDArray[np.generic]],
        batch: TrainBatch,
        needs: TeacherNeeds,
        choose: Choose | None = None,
    ) -> TeacherRecord:
        count, queries = len(arrays["image_ids"]), self.results.queries
        logits = np.full((count, queries, self.classes), SILENT_LOGIT, np.float32)
        boxes = np.tile(np.array([0.5, 0.5, 0, 0], np.float32), (count, queries, 1))
        places = zip(*(arrays[name].tolist() for name in ("image_ids", "views", "original_sizes")), strict=True)
        for line, (image_id, view, (height, width)) in enumerate(places):
            said, seen = self._image(image_id, view, height, width)
            logits[line, : len(said)], boxes[line, : len(said)] = said, seen
        device = batch.targets.valid.device
        said_, seen_ = (torch.from_numpy(each)[None].to(device) for each in (logits, boxes))
        none = torch.full((count, 0), -1, dtype=torch.int64, device=device)
        return TeacherRecord(said_, seen_, attention_queries=none if needs.attention else None)

    def _image(
        self, image_id: int, view: int, height: int, width: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """logits [n, K] and boxes_cxcywh [n, 4] of one view."""
        results, part = self.results, self.results.of(image_id)
        listed = (results.sizes or {}).get(image_id, (width, height))
        if listed != (width, height):
            raise of_other_images(
                results.path, image_id, f"{listed[0]} x {listed[1]} pixels there, {width} x {height} in the dataset"
            )
        corners, kinds = results.boxes_xyxy[part], results.category_ids[part].tolist()
        inside = np.clip(corners, 0, np.array([width, height, width, height], np.float32))
        within = np.asarray((inside[:, 2:] > inside[:, :2]).all(1))
        if len(corners) and not within.any():
            raise of_other_images(results.path, image_id, f"no box within its {width} x {height} pixels")
        scores, kept = np.clip(results.scores[part].astype(np.float64), _SURE, 1 - _SURE), list[int]()
        queries = dict[bytes, int]()  # an entry of each class with the same box: one query
        logits = np.full((len(corners), self.classes), UNASKED_LOGIT, np.float32)
        for number, kind in enumerate(kinds):
            if kind not in self.known:
                raise of_other_classes(results.path, image_id, kind, self.known)
            if kind not in self.places or not within[number]:
                continue
            query = queries.setdefault(corners[number].tobytes(), len(queries))
            if query == len(kept):
                kept.append(number)
            value = np.log(scores[number] / (1 - scores[number]))
            for place in self.places[kind]:
                logits[query, place] = max(logits[query, place], value)
        logits[:, self.silent] = SILENT_LOGIT
        seen_as = make_view(self.views, image_id, view)
        seen, still = view_boxes(inside[kept], width, height, seen_as, self.views.min_visible)
        return logits[: len(kept)][still], seen
