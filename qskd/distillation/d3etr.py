"""D3ETR (Chen et al., IJCAI 2024): the student's decoder learns the teacher's predictions and cross-attention, by two matchings.

docs/methods.md has what was seen of it: the matchings, the terms and their weights. Its attention is compared head by head, and its
self-attention too; a cache keeps cross-attention alone, the mean over heads, of the queries near objects. So that is compared here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.qskd.lapd import alignment_terms, teacher_layer_of_student
from qskd.distillation.qskd.pairing import pair_globally
from qskd.distillation.qskd.settings import PredictionDistillationConfig
from qskd.distillation.shared.asked import AsStudent, answered, both_sides
from qskd.distillation.shared.kept import places_of
from qskd.distillation.shared.maps import resample
from qskd.losses.detection_loss import PARTS
from qskd.structures import LossTerm, TeacherNeeds

_ADAPTIVE = PredictionDistillationConfig(pairing="global", pair_weight="uniform", teacher_layers="same_index")
_FIXED = _ADAPTIVE.model_copy(update={"pairing": "index"})


class Settings(MethodSettings):
    """D3ETR: predictions of all queries by an assignment, the teacher's own queries in the student's decoder, cross-attention."""

    method: str = "d3etr"
    class_weight: NonNegative = 1.0  # of the classes' BCE, of both matchings
    l1_weight: NonNegative = 5.0  # of the boxes' L1 distance
    giou_weight: NonNegative = 2.0  # of 1 - GIoU
    fixed: bool = True  # the teacher's own queries are put to the student's decoder too: "fixed matching"
    attention_weight: NonNegative = 1000.0  # of the mean squared error of cross-attention, as in TPRD's port

    def weight_fields(self) -> dict[str, str]:
        fields = {f"d3_{part}": f"{part}_weight" for part in PARTS}
        if self.fixed:
            fields |= {f"d3_fixed_{part}": f"{part}_weight" for part in PARTS}
        return {
            term: field
            for term, field in (fields | {"d3_attention": "attention_weight"}).items()
            if getattr(self, field)
        }


class D3ETR(Method):
    """Of adaptive matching "d3_class", "d3_l1", "d3_giou": LAPD's terms (equations.md 1.3) of all queries, student layer k with the
    teacher's at its place, paired by one assignment a layer; of fixed matching "d3_fixed_class", ...: the same of the teacher's
    own queries in the student's decoder, each with itself. And

        attention   mean over the last layer's pairs, whose teacher's attention is known, of the mean over the cells of the
                    student's finest map of (A_S - A_T)^2, A the cross-attention of all maps brought there, its sum kept
    """

    title = "D3ETR"
    citation = (
        "The student's decoder learns from the teacher's by D3ETR (Chen et al., IJCAI 2024, [arXiv 2211.09768](https://arxiv.org/abs/"
        "2211.09768)): predictions by its two matchings, and cross-attention; without its self-attention.\n"
    )
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        terms = settings.weight_fields().keys()
        fixed = any("fixed" in term for term in terms)
        predictions = bool(terms - {"d3_attention"})
        reasons = {"all_layers": ("method", "d3etr, whose layer k learns from the teacher's layer k")}
        return TeacherNeeds(
            memory=fixed,
            attention="d3_attention" in terms,
            attention_giou_floor=0.5 if "d3_attention" in terms else 1.0,
            all_layers=predictions,
            decoder=fixed,
            attended=not fixed,
            reasons=reasons if predictions else {},
        )

    @classmethod
    def asks_both(cls, settings: Settings) -> tuple[str, str]:
        remedy = "choose such a student, or leave the matching out: fixed: false"
        return ("distillation.fixed", remedy) if cls.needs_of(settings).decoder else ("", "")

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        self.reads_attention = "d3_attention" in self.weights
        if self.needs.decoder:
            self.asked = AsStudent(self, student, teacher)

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        terms: dict[str, LossTerm] = {}
        student, layers = lesson.student, (len(lesson.student.logits), len(lesson.teacher.logits))
        pairs = (
            teacher_layer_of_student(*layers, _ADAPTIVE)
            if self.needs.all_layers
            else ([layers[0] - 1], [layers[1] - 1])
        )
        own, theirs = both_sides(lesson, student, *pairs)
        partner = pair_globally(own, theirs)  # [L, B, Q], of each of the student's queries
        if self.needs.all_layers:
            terms |= _named("d3", alignment_terms(own, theirs, 0, 0, _ADAPTIVE, partner))
        if self.needs.decoder:
            terms |= self._fixed(lesson)
        if self.reads_attention:
            terms["d3_attention"] = self._attention(lesson, partner[-1])
        return {name: term for name, term in terms.items() if name in self.weights}

    def _fixed(self, lesson: Lesson) -> dict[str, LossTerm]:
        assert lesson.decoder is not None
        assert lesson.ask_student is not None
        answer = lesson.decoder.ask(lesson.teacher)
        said = lesson.ask_student(self.asked(answer.decoded.queries))
        # Its answers to these very queries: a cache's are of those that it had chosen from the memory before that was rounded.
        asked = replace(lesson, teacher=answered(lesson.teacher, answer))
        layers = len(said.logits), len(answer.output.logits)
        own, theirs = both_sides(asked, said, *teacher_layer_of_student(*layers, _ADAPTIVE))
        theirs = replace(theirs, selection=replace(theirs.selection, weight=torch.ones_like(theirs.selection.weight)))
        terms = alignment_terms(own, theirs, 0, 0, _FIXED)
        if self.asked.adapter is not None:  # where no state is asked, its gradient is waited for nonetheless
            none = 0.0 * self.asked.adapter.weight.sum()
            terms = {name: replace(term, total=term.total + none) for name, term in terms.items()}
        return _named("d3_fixed", terms)

    def _attention(self, lesson: Lesson, partner: Tensor) -> LossTerm:
        """partner: [B, Q], the teacher's query of each of the student's in the last layer, -1 = none."""
        student, teacher = lesson.student, lesson.teacher
        kept = teacher.attention_queries
        assert kept is not None
        mine = places_of(partner, teacher.logits.shape[2])  # [B, Q'], the student's query of each of the teacher's
        last = (kept >= 0) & (kept < mine.shape[1])  # a cache of all layers has others behind
        asked = torch.where(last, mine.gather(1, kept.clamp(0, mine.shape[1] - 1)), -1)
        onto = student.memory_valid[0]
        shown = on_one_map(student.attend(asked), student.memory_valid, onto)
        goal = on_one_map(tuple(map_.detach() for map_ in teacher.attention), teacher.memory_valid, onto)
        cells = onto.sum((1, 2)).clamp(min=1)[:, None]
        apart = ((shown - goal).square() * onto[:, None]).flatten(2).sum(2) / cells
        return LossTerm(torch.where(asked >= 0, apart, 0.0).sum(), (asked >= 0).sum().float())


def _named(prefix: str, terms: dict[str, LossTerm]) -> dict[str, LossTerm]:
    return {name.replace("lapd", prefix): term for name, term in terms.items()}


def on_one_map(maps: tuple[Tensor, ...], valid: tuple[Tensor, ...], onto: Tensor) -> Tensor:
    """[B, A, H, W] of each map, `valid` [B, H, W] of each -> [B, A, H', W'] float32, what is looked at in each cell of `onto`: as
    much of a map's attention as lies there, all maps together."""
    total = torch.zeros(())
    cells = onto.sum((1, 2)).clamp(min=1)
    for map_, there in zip(maps, valid, strict=True):
        share = there.sum((1, 2)) / cells  # cells of this map in one of those
        moved = resample(map_, there, onto) * (share[:, None, None] * onto)[:, None]
        total = total.to(moved.device) + moved
    return total
