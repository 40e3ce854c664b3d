"""DETRDistill (Chang et al., ICCV 2023): predictions of all queries, features where the teacher's good queries point, and the
teacher's queries put to the student with the teacher's assignment.

equations.md 2 says what is the paper's, what its release has, and what is left out or ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.config import DetectionLossConfig
from qskd.config.distillation import MethodSettings
from qskd.config.section import NonNegative
from qskd.distillation.method import Facts, Lesson, Method
from qskd.distillation.qskd.lapd import alignment_terms, teacher_layer_of_student
from qskd.distillation.qskd.pairing import pair_globally
from qskd.distillation.qskd.settings import PredictionDistillationConfig
from qskd.distillation.shared.asked import AsStudent, answered, both_sides
from qskd.distillation.shared.kept import places_of
from qskd.distillation.shared.maps import Meeting, resample
from qskd.families.table import FAMILIES
from qskd.losses.detection_loss import detection_terms
from qskd.losses.matching import assign
from qskd.structures import SILENT_LOGIT, Classification, LossTerm, Targets, TeacherNeeds, TeacherRecord

PAIRS = 100  # (class, query) pairs that make the mask, as in the release
LEAST = 0.01  # of the mask before it is divided by its maximum, as in the release
TEMPERATURE = 0.07  # of InfoNCE, as in the release
_PRIOR, _DETECTION = {"class": 2.0, "l1": 5.0, "giou": 2.0}, DetectionLossConfig()
_LOGITS = PredictionDistillationConfig(pairing="global", pair_weight="uniform", teacher_layers="same_index")


class Settings(MethodSettings):
    """DETRDistill: all queries' predictions by one assignment a layer, features weighted by the teacher's good queries."""

    method: str = "detrdistill"
    class_weight: NonNegative = (
        1.0  # of the classes' BCE; this and the next two: Hungarian-matching logits distillation
    )
    l1_weight: NonNegative = 5.0  # of the boxes' L1 distance
    giou_weight: NonNegative = 2.0  # of 1 - GIoU
    # Of target-aware features, of the last layer's queries; the release sums over six layers' with weight 1 each.
    feature_weight: NonNegative = 6.0
    # Of query-prior assignment distillation: the detection loss (2, 5, 2) of the teacher's queries in the student's decoder
    prior_weight: NonNegative = 1.0
    contrast_weight: NonNegative = 0.0  # of InfoNCE between paired queries' states; 0.2 in the release, where it is on

    def weight_fields(self) -> dict[str, str]:
        fields = {part: f"{part}_weight" for part in ("class", "l1", "giou", "prior", "contrast")} | {
            "features": "feature_weight"
        }
        return {f"dd_{part}": field for part, field in fields.items() if getattr(self, field) > 0}


class DETRDistill(Method):
    """The terms "dd_class", "dd_l1", "dd_giou" (LAPD's, equations.md 1.3, but that every query of layer k is paired with one of
    layer k of the teacher by one assignment, and every pair counts alike), "dd_features", "dd_prior" and "dd_contrast":

        features   mean over images of sum over maps of mean over positions and channels of (psi phi(F_S) - psi F_T)^2
                   psi = max(sum_n s_n cos(q_n, F_T), 0.01) over its largest value in the map
                   s_n = the probability of each of the 100 best (class, query) pairs times max_j IoU(b_n, g_j)
        prior      the teacher's queries, in the student's decoder by themselves; the student's detection loss, 2 class + 5 L1 +
                   2 GIoU, but that each object has the query that the teacher's layer k gave it
        contrast   mean over the last layer's pairs of -log softmax over the image's paired t' of z_s z_t' / 0.07, at t;
                   z = normalise(MLP(linear(query state))), one linear map for each network
    """

    title = "DETRDistill"
    citation = (
        "The student learns by DETRDistill (Chang et al., ICCV 2023, [arXiv 2211.10156](https://arxiv.org/abs/2211.10156)): its "
        "logits, feature and query-prior terms, as its published code has them.\n"
    )
    settings: Settings

    @classmethod
    def needs_of(cls, settings: Settings) -> TeacherNeeds:
        terms = settings.weight_fields().keys()
        states = terms & {"dd_features", "dd_contrast"}
        reasons = {
            "all_layers": ("method", "detrdistill, whose layer k learns from the teacher's layer k"),
            "columns": ("method", "detrdistill, whose features and contrast read the states of the teacher's queries"),
        }
        return TeacherNeeds(
            memory=bool(terms & {"dd_features", "dd_prior"}),
            all_layers=bool(terms & {"dd_class", "dd_l1", "dd_giou"}),
            decoder="dd_prior" in terms,
            columns=frozenset({"states"}) if states else frozenset(),
            reasons=reasons,
        )

    @classmethod
    def asks_both(cls, settings: Settings) -> tuple[str, str]:
        asked = "dd_prior" in settings.weight_fields()
        remedy = "choose such a student, or leave the term out: prior_weight: 0"
        return ("distillation.prior_weight", remedy) if asked else ("", "")

    def __init__(self, settings: Settings, student: Facts, teacher: Facts) -> None:
        super().__init__(settings, student, teacher)
        self.weights = {term: getattr(settings, field) for term, field in settings.weight_fields().items()}
        if "dd_features" in self.weights:
            self.projectors = Meeting(student, teacher)
        if "dd_prior" in self.weights:
            self.asked = AsStudent(self, student, teacher)
            kind = FAMILIES[student.family].classification if student.family else "focal"
            self.kind: Classification = "varifocal" if kind == "varifocal" else "focal"
        if "dd_contrast" in self.weights:
            width = teacher.channels[-1]
            self.own, self.theirs = nn.Linear(student.channels[-1], width), nn.Linear(width, width)
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, lesson: Lesson) -> dict[str, LossTerm]:
        terms: dict[str, LossTerm] = {}
        if self.weights.keys() & {"dd_class", "dd_l1", "dd_giou"}:
            terms |= self._logits(lesson)
        if "dd_features" in self.weights:
            terms["dd_features"] = self._features(lesson)
        if "dd_prior" in self.weights:
            terms["dd_prior"] = self._prior(lesson)
        if "dd_contrast" in self.weights:
            terms["dd_contrast"] = self._contrast(lesson)
        return {name: term for name, term in terms.items() if name in self.weights}

    def _logits(self, lesson: Lesson) -> dict[str, LossTerm]:
        layers = teacher_layer_of_student(len(lesson.student.logits), len(lesson.teacher.logits), _LOGITS)
        own, theirs = both_sides(lesson, lesson.student, *layers)
        found = alignment_terms(own, theirs, num_objects=0, num_slots=0, config=_LOGITS)
        return {name.replace("lapd", "dd"): term for name, term in found.items()}

    def _features(self, lesson: Lesson) -> LossTerm:
        images = len(lesson.targets.counts)
        total = lesson.student.memory[0].new_zeros((), dtype=torch.float32)
        masks = target_aware_masks(lesson.teacher, lesson.targets)
        for (_, other), (shown, goal, valid) in zip(self.projectors.pairs, self.projectors.of(lesson), strict=True):
            there = lesson.teacher.memory_valid[other]
            psi = resample(masks[other][:, None], there, valid.bool())[:, 0]
            apart = (psi**2 * ((shown - goal) ** 2).mean(-1) * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
            total = total + apart.sum()
        return LossTerm(total, total.new_full((), images))

    def _prior(self, lesson: Lesson) -> LossTerm:
        assert lesson.decoder is not None
        assert lesson.ask_student is not None
        answer, targets = lesson.decoder.ask(lesson.teacher), lesson.targets
        said = lesson.ask_student(self.asked(answer.decoded.queries))
        # Matched anew: what a cache says is of the queries that were chosen from the memory before that was rounded.
        teacher = answered(lesson.teacher, answer)
        _, theirs = teacher_layer_of_student(len(said.logits), len(teacher.logits), _LOGITS)
        (matched,) = assign([(teacher.logits, teacher.boxes_cxcywh)], targets, lesson.costs)
        given = matched[theirs].masked_fill(teacher.silent[targets.labels], -1)
        # Nor is such an object background: the student's own queries learn that it is there.
        logits = said.logits.float().masked_fill(teacher.silent, SILENT_LOGIT)
        found = detection_terms(logits, said.boxes_cxcywh, targets, given, _DETECTION, self.kind)
        parts = [_PRIOR[name.partition("_")[0]] * term.total for name, term in found.items()]
        asked = sum(
            (0.0 * each.sum() for each in self.asked.parameters()), said.logits.new_zeros(())
        )  # where no state is asked
        return LossTerm(torch.stack(parts).sum() + asked, found["class"].count)

    def _contrast(self, lesson: Lesson) -> LossTerm:
        said, last = lesson.teacher.extra, (len(lesson.student.logits) - 1, len(lesson.teacher.logits) - 1)
        own, theirs = both_sides(lesson, lesson.student, [last[0]], [last[1]])
        partner = pair_globally(own, theirs)[0]  # [B, Q]
        place = places_of(said["states_queries"], theirs.logits.shape[2]).gather(1, partner.clamp(min=0))
        paired = (partner >= 0) & (place >= 0)
        mine = F.normalize(self.head(self.own(lesson.student.query_states)).float(), dim=-1)
        others = F.normalize(self.head(self.theirs(said["states"].detach().to(mine.dtype))).float(), dim=-1)
        spare = others.shape[1]
        there = torch.zeros(len(place), spare + 1, dtype=torch.bool, device=place.device)
        met = there.scatter(1, torch.where(paired, place, spare), True)[:, None, :spare]
        with torch.autocast(mine.device.type, enabled=False):
            likeness = mine @ others.transpose(1, 2) / TEMPERATURE  # [B, Q, A]
            likely = likeness.masked_fill(~met, -1e30).log_softmax(-1)
        loss = -likely.gather(2, place.clamp(min=0)[..., None])[..., 0]
        return LossTerm(torch.where(paired, loss, 0.0).sum(), paired.sum().float())


def target_aware_masks(teacher: TeacherRecord, targets: Targets) -> list[Tensor]:
    """psi of each of the teacher's maps: [B, H, W] float32, 0 on padding. An image without objects has 1 everywhere, as in the
    release, whose floor is then the maximum."""
    logits, boxes = teacher.logits[-1].float(), teacher.boxes_cxcywh[-1].float()
    images, queries, classes = logits.shape
    scores = logits.sigmoid().flatten(1)
    best = scores.topk(min(PAIRS, scores.shape[1]), dim=1)
    quality = scores.new_zeros(images, queries).scatter_add_(1, best.indices // classes, best.values)
    if targets.valid.shape[1]:
        objects = cxcywh_to_xyxy(targets.boxes_cxcywh.float())
        overlap = iou(cxcywh_to_xyxy(boxes)[:, :, None], objects[:, None]) * targets.valid[:, None]
        quality = quality * overlap.amax(-1)
    else:
        quality = 0 * quality
    kept = teacher.extra["states_queries"]
    weight = torch.where(kept >= 0, quality.gather(1, kept.clamp(min=0)), 0.0)
    states = weight[..., None] * F.normalize(teacher.extra["states"].float(), dim=-1)
    pointing = states.sum(1)  # [B, D]: a sum of cosines is one product
    masks = []
    for memory, valid in zip(teacher.memory, teacher.memory_valid, strict=True):
        alike = torch.einsum("bd,bdhw->bhw", pointing, F.normalize(memory.detach().float(), dim=1))
        mask = alike.clamp(min=LEAST) * valid
        masks.append(mask / mask.amax((1, 2), keepdim=True).clamp(min=LEAST))
    return masks
