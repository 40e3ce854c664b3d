"""Perturbed queries and the critic: equal to slow loops, shares of a batch sum to it, and nobody learns of another's term."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import tiny
import torch
from test_decoder_methods import COUNTS, built, lesson_of, networks
from test_feature_methods import STUDENT, TEACHER, share
from test_feature_methods import built as built_features
from test_feature_methods import lesson_of as features_of
from torch import Tensor

from qskd.distillation.adversarial import at_centres
from qskd.errors import QskdError
from qskd.structures import Queries

torch.set_num_threads(1)


def sigmoid(value: float) -> float:
    return 1 / (1 + exp(-value))


@pytest.mark.parametrize("family", ["conditional", "rt_detr"])
def test_a_student_s_answer_has_to_move_as_the_teacher_s_does(family: str) -> None:
    student, teacher = networks("conditional", "conditional") if family == "conditional" else rt_detr()
    method, totals = built(student, teacher, method="perturbed"), []
    for images in (slice(None), slice(0, 1), slice(1, 3)):
        lesson, start = lesson_of(student, teacher, images), method.steps.clone()
        assert lesson.decoder is not None
        assert lesson.ask_student is not None
        terms = method(lesson)
        assert method.steps == start + 1
        method.steps -= 1
        own = lesson.decoder.ask(lesson.teacher)
        queries, moved = own.decoded.queries, method.moved(own.decoded.queries)
        said = [lesson.ask_student(method.asked(each)) for each in (queries, moved)]
        told = [own.output, lesson.decoder.ask(lesson.teacher, moved).output]
        expected = [0.0, 0.0]
        for image in range(len(lesson.targets.counts)):
            top = [max(sigmoid(z) for z in row) for row in told[0].logits[-1, image].tolist()]
            for query, weight in enumerate(top):
                at = (-1, image, query)
                for part, kind in enumerate(("logits", "boxes_cxcywh")):
                    ours, theirs = ([getattr(each, kind)[at].tolist() for each in both] for both in (said, told))
                    if part == 0:
                        ours, theirs = ([[sigmoid(z) for z in row] for row in both] for both in (ours, theirs))
                    apart = [(b - a) - (d - c) for a, b, c, d in zip(*ours, *theirs, strict=True)]
                    expected[part] += weight / sum(top) * sum((each / 0.1) ** 2 for each in apart)
        found = [terms[name].total.item() for name in ("perturbed_class", "perturbed_boxes")]
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-5)
        assert all(term.count == len(lesson.targets.counts) for term in terms.values())
        totals.append(found)
    assert totals[0] == pytest.approx([a + b for a, b in zip(*totals[1:], strict=True)], rel=1e-3)


def rt_detr() -> tuple[Any, Any]:
    detector = tiny.silent_student(tiny.recipe(tiny.own("rt_detr")).student, tiny.LABELS, 0)
    tiny.shake(detector, 5)
    return detector.eval(), tiny.random_teacher("rt_detr")


def test_one_edge_of_each_box_moves_by_its_share_and_no_other() -> None:
    student, teacher = rt_detr()
    method = built(student, teacher, method="perturbed", move=0.2)
    torch.manual_seed(3)
    boxes = torch.cat([torch.rand(1, 50, 2) * 0.4 + 0.3, torch.rand(1, 50, 2) * 0.2 + 0.1], -1)
    edges: set[int] = set()
    for step in range(2):
        method.steps.fill_(step)
        moved = method.moved(Queries(places=torch.logit(boxes))).places.sigmoid()
        corners = [torch.cat([b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2], -1)[0] for b in (boxes, moved)]
        for before, after, size in zip(corners[0].tolist(), corners[1].tolist(), boxes[0, :, 2:].tolist(), strict=True):
            (edge,) = (place for place in range(4) if abs(after[place] - before[place]) > 1e-5)
            assert abs(after[edge] - before[edge]) == pytest.approx(0.2 * size[edge % 2], abs=1e-5)
            edges.add(edge)
    assert edges == {0, 1, 2, 3}


def test_networks_that_can_not_be_asked_the_same_are_refused() -> None:
    with pytest.raises(QskdError, match=r"distillation\.method = perturbed"):
        built(*networks("deformable", "conditional"), method="perturbed")


def softplus(value: float) -> float:
    return log(1 + exp(value))


def test_the_critic_and_the_student_learn_each_its_own() -> None:
    given, method = features_of(STUDENT, TEACHER, list(COUNTS)), built_features(1, 2, method="adversarial")
    method.eval()  # spectral norm then counts no step
    terms = method(given)
    fooled = learnt = right = objects = 0.0
    for critic, (shown, goal, valid) in zip(method.critics, method.projectors.of(given), strict=True):
        mine, theirs = (at_centres(map_, valid, given.targets) for map_ in (shown, goal))
        for image, count in enumerate(given.targets.counts):
            for place in range(count):
                at = (slice(image, image + 1), slice(place, place + 1))
                asked = given.targets.labels[at], given.targets.boxes_cxcywh[at]
                ours, real = (critic(each[at], *asked).item() for each in (mine, theirs))
                fooled, learnt = fooled + softplus(-ours), learnt + softplus(-real) + softplus(ours)
                right, objects = right + ((real > 0) + (ours < 0)) / 2, objects + 1
    found = [terms[name].total.item() for name in ("adversarial", "adversarial_critic", "adversarial_accuracy")]
    assert found == pytest.approx([fooled, learnt, right], rel=1e-4)
    assert terms["adversarial"].count == objects == sum(COUNTS)
    assert method.weights["adversarial_accuracy"] == 0

    critic, own = list(method.critics.parameters()), list(method.projectors.parameters())

    def touched(term: Tensor, parameters: list[Tensor]) -> bool:
        grads = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        return any(grad is not None and bool(grad.any()) for grad in grads)

    assert touched(terms["adversarial"].total, own)
    assert not touched(terms["adversarial"].total, critic)
    assert touched(terms["adversarial_critic"].total, critic)
    assert not touched(terms["adversarial_critic"].total, own)

    parts = [method(share(given, images)) for images in (slice(0, 2), slice(2, 3))]
    for name, term in terms.items():
        assert sum(part[name].total.item() for part in parts) == pytest.approx(term.total.item(), rel=1e-4, abs=1e-6)


def test_features_are_read_at_objects_centres_within_what_is_no_padding() -> None:
    given = features_of(STUDENT, TEACHER, list(COUNTS))
    _, goal, valid = next(iter(built_features(1, 2, method="mimic").projectors.of(given)))
    ramp = torch.arange(goal.shape[2]).float().add(0.5)[None, None, :, None].expand(*goal.shape[:3], 1)
    found = at_centres(ramp, valid, given.targets)[..., 0]
    for image, count in enumerate(given.targets.counts):
        wide = int(valid[image].amax(0).sum())
        for place in range(count):
            at = float(given.targets.boxes_cxcywh[image, place, 0]) * wide
            assert found[image, place].item() == pytest.approx(min(max(at, 0.5), wide - 0.5), abs=1e-3)


def test_both_train_beside_qskd_and_a_critic_that_learns_nothing_is_refused() -> None:
    tree = {"method": "qskd", "also": {"adversarial": {}, "perturbed": {}}, "selection": tiny.EASY_SELECTION}
    config = tiny.recipe(None, distillation=tree)
    training = tiny.make_training(config, tiny.random_teacher("conditional"))
    said = [training.train_step(tiny.batch_of(2, 0, 1)) for _ in range(3)]
    assert said[0].keys() >= {"agfd", "adversarial", "adversarial_critic", "perturbed_class", "perturbed_boxes"}
    assert 0 <= float(said[-1]["adversarial_accuracy"]) <= 1
    training.train_step(tiny.batch_of(0, 0))  # no object at all
    training.check_finite()
    with pytest.raises(QskdError, match="a critic that learns"):
        built_features(1, 2, method="adversarial", critic_weight=0.0)
    assert replace(tiny.batch_of(1).targets).counts == (1,)
