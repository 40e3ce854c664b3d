"""The teacher's decoder and heads alone, asked in the step about the memory that its cache holds: exact answers for any queries,
without pixels, backbone and encoder."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qskd.config import Config, ResizeConfig
from qskd.datasets.classes import NOBODY, map_classes
from qskd.detectors import Detector, checkpoint_digests, load_detector
from qskd.detectors.decoding import Decoded, decode, through_layers
from qskd.errors import QskdError
from qskd.families.table import FAMILIES, find_family
from qskd.structures import SILENT_LOGIT, DetectorOutput, Queries, TeacherRecord
from qskd.teacher.identity import teacher_preprocessing

if TYPE_CHECKING:
    from qskd.teacher.manifest import CacheManifest

log = logging.getLogger("qskd")
_WEIGHTS = "teacher.weights_sha256"


@dataclass(frozen=True)
class Answer:
    """output: in the dataset's class order, without gradient. decoded: what `TeacherDecoder.cross` goes through again."""

    output: DetectorOutput
    decoded: Decoded


class TeacherDecoder:
    """A frozen detector's decoder. detector: only what is behind its memory is used. class_slots: as `OnlineTeacher` has them.

    Not a module, so that no optimizer and no checkpoint of a student finds its weights.
    """

    def __init__(self, detector: Detector, class_slots: Sequence[int], resize: ResizeConfig) -> None:
        check_decodes(detector.family, resize)
        self.detector = detector.eval().requires_grad_(False)
        self.class_slots = torch.tensor(tuple(class_slots), dtype=torch.int64)
        self.knows_all = NOBODY not in class_slots
        self.masked = resize.mode != "square"  # a square batch has no padding

    def to(self, device: torch.device) -> TeacherDecoder:
        self.detector.to(device)
        self.class_slots = self.class_slots.to(device)
        return self

    @torch.no_grad()
    def ask(self, record: TeacherRecord, queries: Queries | None = None) -> Answer:
        """What it says of the record's memory: every decoder layer; its own queries where none are given."""
        decoded = decode(self.detector, record.memory, record.memory_valid, queries, self.masked)
        return Answer(self._of_dataset(decoded.output), decoded)

    def cross(self, answer: Answer, maps: Sequence[Tensor]) -> DetectorOutput:
        """What each of its layers says where the memory is another one, with gradient to that (`through_layers`)."""
        return self._of_dataset(through_layers(self.detector, answer.decoded, maps))

    def read(self, maps: Sequence[Tensor], valid: Sequence[Tensor], queries: Queries | None = None) -> DetectorOutput:
        """What it says of another memory throughout, with gradient to that."""
        return self._of_dataset(decode(self.detector, maps, valid, queries, self.masked).output)

    def _of_dataset(self, output: DetectorOutput) -> DetectorOutput:
        logits = output.logits.index_select(-1, self.class_slots.clamp(min=0))
        if not self.knows_all:
            logits = logits.masked_fill(self.class_slots == NOBODY, SILENT_LOGIT)
        return replace(output, logits=logits)


def check_decodes(family: str, resize: ResizeConfig) -> None:
    """QskdError where a teacher of this family, whose pictures are made so, can't be asked about a memory."""
    found = find_family(family, "teacher.path")
    if not found.decodes:
        able = ", ".join(name for name, each in FAMILIES.items() if each.decodes)
        raise QskdError(
            "teacher.path",
            f"a teacher of family {family}, whose decoder can't be asked about its memory alone",
            f"one of {able}, for a method that asks the teacher's decoder",
            "choose another method: --set distillation.method=qskd",
        )
    if not found.masks_padding and resize.mode != "square":
        raise QskdError(
            f"teacher.resize.mode = {resize.mode}",
            f"a teacher of family {family}, whose decoder reads the padding of a batch, which no memory holds",
            "pictures without padding, for a method that asks the teacher's decoder",
            "--set teacher.resize.mode=square, as it was trained; make the cache with it",
        )


def load_decoder(config: Config, labels: Sequence[str], manifest: CacheManifest) -> TeacherDecoder:
    """The recipe's teacher without what comes before its memory. labels: the dataset's classes. QskdError unless its weights are
    those that the cache was made with.

    The whole checkpoint is in the host's memory while it is read; what is let go of is free before this returns.
    """
    path = config.teacher.path
    found, known = checkpoint_digests(path)[_WEIGHTS], manifest.identity.get(_WEIGHTS)
    if found != known:
        raise QskdError(
            path,
            f"other weights ({found[:12]}…) than the cache of its outputs was made with ({str(known)[:12]}…)",
            "the teacher of the cache: its decoder is asked about the memory that the cache holds",
            "bring back the checkpoint, or make the cache again: `qskd cache RECIPE --overwrite`",
        )
    whole = load_detector(path)
    before = _megabytes(whole)
    FAMILIES[whole.family].drop_front(whole.model)
    left = Detector(whole.model)  # the other one listens to what is gone, and so holds it
    del whole
    gc.collect()
    log.info("teacher.path: the decoder and heads of %s are loaded, %.1f of %.1f MB", path, _megabytes(left), before)
    return TeacherDecoder(
        left, map_classes(labels, left.labels, config.teacher.class_map), teacher_preprocessing(config).resize
    )


def _megabytes(detector: Detector) -> float:
    return sum(value.numel() * value.element_size() for value in detector.model.state_dict().values()) / 1e6
