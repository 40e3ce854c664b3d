"""Asking teacher and student the same queries: the methods that do, the adapter, and what both say of all queries, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.qskd.pairing import Side
from qskd.distillation.qskd.query_selection import none_selected
from qskd.distillation.shared.maps import eye_or_orthogonal
from qskd.errors import QskdError
from qskd.structures import SILENT_LOGIT, DetectorOutput, Queries, TeacherNeeds, TeacherRecord

if TYPE_CHECKING:
    from qskd.teacher.decoder import Answer


class AsStudent(nn.Module):
    """The teacher's queries as the student is asked them. Boxes are the same to both; what else there is to a query has each
    network's own width, and goes through a learned linear map, the identity at first where widths agree."""

    def __init__(self, method: Method, student: Facts, teacher: Facts) -> None:
        """method: whose field is named in the QskdError where the two can't be asked the same."""
        super().__init__()
        where, remedy = method.asks_both(method.settings)
        check_pair(where, student, teacher, remedy)
        self.adapter: nn.Linear | None = None
        if student.query_width and teacher.query_width:
            self.adapter = nn.Linear(teacher.query_width, student.query_width, bias=False)
            eye_or_orthogonal(self.adapter.weight)

    def forward(self, queries: Queries) -> Queries:
        own = queries.states if queries.embedding is None else queries.embedding
        said = None
        if own is not None and self.adapter is not None:
            with torch.autocast(own.device.type, enabled=False):  # reference points are read from an embedding
                said = self.adapter(own.detach().float())
        return Queries(places=queries.places, states=said) if queries.embedding is None else Queries(embedding=said)


class AskingBoth(Method):
    """A method that asks both decoders queries which are drawn anew in each step, of `seed` and `steps` alone. A subclass adds one
    to `steps`."""

    steps: Tensor
    seed: Tensor

    @classmethod
    def needs_of(cls, settings: Any) -> TeacherNeeds:
        asked = bool(settings.weight_fields())
        return TeacherNeeds(memory=asked, decoder=asked)

    @classmethod
    def asks_both(cls, settings: Any) -> tuple[str, str]:
        field, remedy = f"distillation.method = {settings.method}", "choose such a student, or another method"
        return (field, remedy) if settings.weight_fields() else ("", "")

    def __init__(self, settings: Any, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        if not self.weights:
            return
        self.asked = AsStudent(self, student, teacher)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Of torch's own random state, which is the run's seed when a training builds its method: alike on every worker.
        self.register_buffer("seed", torch.randint(2**31, ()))


def check_pair(where: str, student: Facts, teacher: Facts, remedy: str) -> None:
    """QskdError where the two can't be asked the same."""
    if not teacher.query_kind or not student.query_kind:
        return  # not known: a training knows it
    alike = student.query_kind == teacher.query_kind == "boxes" or student.family == teacher.family
    if student.query_kind != teacher.query_kind or not alike:
        said = {"boxes": "boxes", "embedding": "learned vectors, which mean something to its own family alone"}
        raise QskdError(
            where,
            f"a student of family {student.family}, whose queries are {said[student.query_kind]}, and a teacher of family "
            f"{teacher.family}, whose queries are {said[teacher.query_kind]}",
            "two networks that can be asked the same: both of queries that are boxes (dab-detr, rt_detr, rt_detr_v2, d_fine, "
            "two-stage deformable_detr), or both of one family",
            remedy,
        )


def answered(record: TeacherRecord, answer: Answer) -> TeacherRecord:
    """The record, but that it says of its queries what the decoder has said of those that it was asked."""
    said = answer.output
    return replace(record, logits=said.logits, boxes_cxcywh=said.boxes_cxcywh, absent=None)


def both_sides(lesson: Lesson, said: DetectorOutput, mine: list[int], theirs: list[int]) -> tuple[Side, Side]:
    """Layers of what the student said and of the teacher, of all queries: no selection is asked."""
    teacher = lesson.teacher
    # Of a class that the teacher knows nothing of, nothing is learnt: both sides are as sure that it isn't there.
    logits = said.logits.float().masked_fill(teacher.silent, SILENT_LOGIT)
    goal, boxes = teacher.logits.detach().float(), teacher.boxes_cxcywh.detach().float()
    own, other = (
        Side(values, places, none_selected(places.shape[:-1], places.device)).layers(layers)
        for values, places, layers in ((logits, said.boxes_cxcywh.float(), mine), (goal, boxes, theirs))
    )
    return own, other
