"""How alike a student and its teacher are on the same images: an evaluator beside AP, which can't tell why AP moved.

Three numbers, all on images neither was trained on when the caller gives such: what both say of the same object, where
both put it, and how much of the teacher's memory can be read off the student's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qskd.boxes import cxcywh_to_xyxy, iou
from qskd.config import DetectionLossConfig
from qskd.datasets.batch import TrainBatch
from qskd.detectors import Detector, to_pixels
from qskd.distillation.shared.maps import pair_levels, resample
from qskd.losses.matching import assign
from qskd.structures import DetectorOutput, TeacherNeeds, TeacherRecord
from qskd.teacher.online import OnlineTeacher

_RIDGE = 1e-3  # of the mean square of the student's memory: keeps the read-out finite when channels agree


def bernoulli_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) of independent classes, summed over them: [..., K], [..., K] -> [...], nats, float32.

    Each class is a coin of its own, as a sigmoid classifier has it.
    """
    goal, own = teacher_logits.float(), student_logits.float()
    p = goal.sigmoid()
    log = torch.nn.functional.logsigmoid
    return (p * (log(goal) - log(own)) + (1 - p) * (log(-goal) - log(-own))).sum(-1)


def readable_cosine(student: Tensor, teacher: Tensor) -> float:
    """Mean cosine of the teacher's memory and its best linear prediction from the student's: [N, C], [N, C'] -> -1..1.

    The read-out (with a constant) is fitted by ridge regression on the first half of the rows and judged on the second, so
    that widths may differ and no projector has to exist. Both sides are centred by the fitted half's means.
    """
    half = len(student) // 2
    x, y = student.double(), teacher.double()
    x, y = x - x[:half].mean(0), y - y[:half].mean(0)
    gram = x[:half].T @ x[:half]
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram + ridge, x[:half].T @ y[:half])
    return float(torch.nn.functional.cosine_similarity(x[half:] @ weights, y[half:], dim=-1).mean())


@torch.no_grad()
def agreement(
    student: Detector, teacher: OnlineTeacher, batches: Iterable[TrainBatch], costs: DetectionLossConfig
) -> Mapping[str, float]:
    """Over all batches (both networks in evaluation mode, on the batches' device):

    matched_kl: KL of the two networks' class probabilities on the query each matched to the same object, mean over
    objects. matched_iou: IoU of those two boxes. memory_cosine: `readable_cosine` of the finest pair of memory maps.
    """
    kls, ious, mine, theirs = [], [], [], []
    met: list[tuple[int, int]] = []
    for batch in batches:
        output, record = _ask(student, teacher, batch)
        last = output.logits[-1:], output.boxes_cxcywh[-1:]
        pairs = assign([last, (record.logits, record.boxes_cxcywh)], batch.targets, costs)
        both = (pairs[0][-1] >= 0) & (pairs[1][-1] >= 0)
        image = torch.arange(len(both), device=both.device)[:, None].expand_as(both)[both]
        own, goal = pairs[0][-1][both], pairs[1][-1][both]
        known = ~record.silent
        kls.append(bernoulli_kl(record.logits[-1][image, goal][:, known], last[0][0][image, own][:, known]))
        boxes = [cxcywh_to_xyxy(b[image, q]) for b, q in ((last[1][0], own), (record.boxes_cxcywh[-1], goal))]
        ious.append(iou(boxes[0], boxes[1]))
        if not met:  # the first batch decides for all
            met = pair_levels(*([m.shape[-2] * m.shape[-1] for m in maps] for maps in (output.memory, record.memory)))
        student_level, teacher_level = met[0]
        valid = output.memory_valid[student_level]
        goal_map = resample(record.memory[teacher_level], record.memory_valid[teacher_level], valid)
        mine.append(output.memory[student_level].float().movedim(1, -1)[valid].cpu())
        theirs.append(goal_map.movedim(1, -1)[valid].cpu())
    return {
        "matched_kl": float(torch.cat(kls).mean()),
        "matched_iou": float(torch.cat(ious).mean()),
        "memory_cosine": readable_cosine(torch.cat(mine), torch.cat(theirs)),
    }


def _ask(student: Detector, teacher: OnlineTeacher, batch: TrainBatch) -> tuple[DetectorOutput, TeacherRecord]:
    pixels, mask = to_pixels(batch.images, batch.sizes, student.mean, student.std)
    needs = TeacherNeeds(memory=True)
    return student(pixels, mask, with_attention=False), teacher(batch.teacher_images, batch.teacher_sizes, needs)
