"""CrossKD for DETR (Wang et al., CVPR 2024): the student's memory goes through the teacher's decoder, which must say of it what it
says of the teacher's."""

from __future__ import annotations

import math

from torch import Tensor, nn

from qskd.boxes import cxcywh_to_xyxy, giou
from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.shared.classes import soft_cross_entropy
from qskd.distillation.shared.maps import projector, resample
from qskd.errors import QskdError
from qskd.losses.detection_loss import PARTS
from qskd.structures import LossTerm, TeacherNeeds


class Settings(MethodSettings):
    """CrossKD: the teacher's frozen decoder reads the student's memory, and must say of it what it says of the teacher's."""

    method: str = "crosskd"
    class_weight: NonNegative = 1.0  # of the quality focal loss
    l1_weight: NonNegative = 1.0  # of the boxes' L1 distance
    giou_weight: NonNegative = 1.0  # of 1 - GIoU
    class_gamma: NonNegative = 1.0  # the focal loss's power of |p_X - p_T|; 0: plain cross-entropy
    # Each layer is given the teacher's queries and reference points of the layer before. false: those that the layers before
    # have made of the student's memory.
    teacher_forcing: bool = True

    def weight_fields(self) -> dict[str, str]:
        fields = {part: f"{part}_weight" for part in PARTS}
        return {f"cross_{part}": field for part, field in fields.items() if getattr(self, field) > 0}


class CrossKD(Method):
    """The terms "cross_class", "cross_l1", "cross_giou", summed over the teacher's decoder layers D_l:

        h_T = D_l(q, F_T), h_X = D_l(q, phi(F_S)), with the same queries q; both through the teacher's heads
        class  sum over classes of |p_X - p_T|^gamma * BCE(p_X, p_T), the mean over queries and images
        l1, giou  of the boxes, the mean over queries of all layers weighted by w = max_c p_T, times the layers

    Queries are the teacher's own, so that each is paired with itself. phi: for each of the teacher's maps, the nearest map of the
    student in cells, resampled and through a 1x1 convolution.
    """

    title = "CrossKD"
    citation = (
        "The teacher's decoder reads the student's memory (CrossKD: Wang et al., CVPR 2024, in its form for DETR).\n"
    )
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        asked = bool(settings.weight_fields())
        return TeacherNeeds(memory=asked, decoder=asked)

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        if self.weights:
            self.sources = nearest_levels(student, teacher)
            self.projectors = nn.ModuleList(
                projector(student.channels[own], width, basis=teacher.basis(level))
                for level, (own, width) in enumerate(zip(self.sources, teacher.channels, strict=True))
            )

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        if not self.weights:
            return {}
        assert lesson.decoder is not None
        teacher = lesson.teacher
        answer = lesson.decoder.ask(teacher)
        maps = self._crossing(lesson)
        if self.settings.teacher_forcing:
            said = lesson.decoder.cross(answer, maps)
        else:
            said = lesson.decoder.read(maps, teacher.memory_valid, answer.decoded.queries)
        goal = answer.output
        known = (~teacher.silent).float()
        logits, wanted = said.logits.float(), goal.logits.float().sigmoid()
        classes = soft_cross_entropy(logits, wanted, self.settings.class_gamma)
        weight = (wanted * known).amax(-1)  # [L, B, Q]
        mine, theirs = said.boxes_cxcywh.float(), goal.boxes_cxcywh.float()
        overlap = giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(theirs))
        layers, images, queries = weight.shape
        everywhere, weighed = weight.new_full((), images * queries), weight.sum() / layers
        terms = {
            "cross_class": LossTerm((classes * known).sum(), everywhere),
            "cross_l1": LossTerm((weight * (mine - theirs).abs().sum(-1)).sum(), weighed),
            "cross_giou": LossTerm((weight * (1 - overlap)).sum(), weighed),
        }
        return {name: terms[name] for name in self.weights}

    def _crossing(self, lesson: Lesson) -> list[Tensor]:
        """The student's memory as the teacher's decoder reads it: maps [B, C, H, W] of the teacher's sizes, 0 on its padding."""
        maps, student, teacher = [], lesson.student, lesson.teacher
        for own, layer, valid in zip(self.sources, self.projectors, teacher.memory_valid, strict=True):
            shown = layer(student.memory[own]).float().movedim(-1, 1)
            maps.append(resample(shown, student.memory_valid[own], valid) * valid[:, None])
        return maps


def nearest_levels(student: Facts, teacher: Facts) -> list[int]:
    """For each of the teacher's maps, the student's: in order where there are equally many, else the nearest in cells, which may be
    one for several. QskdError where it can't be known."""
    if len(student.channels) == len(teacher.channels):
        return list(range(len(teacher.channels)))
    if len(student.channels) == 1:
        return [0] * len(teacher.channels)
    if not (student.cells and teacher.cells):
        raise QskdError(
            "distillation.method",
            f"{len(student.channels)} student maps and {len(teacher.channels)} teacher maps of unknown sizes",
            "to know which of them are alike",
            "make the cache of teacher outputs anew: qskd cache RECIPE --overwrite, which deletes its files",
        )

    def apart(own: int, other: int) -> float:
        return abs(math.log(student.cells[own] / teacher.cells[other]))

    owned = range(len(student.channels))
    return [min(owned, key=lambda own: apart(own, other)) for other in range(len(teacher.channels))]
