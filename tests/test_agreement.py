"""The agreement evaluator: perfect with oneself, independent of the memory's basis, and falling with what differs."""

from __future__ import annotations

import pytest
import torch
from tiny import LABELS, batch_of, random_teacher, recipe, shake, silent_student

from qskd.config import DetectionLossConfig
from qskd.detectors import Preprocessing
from qskd.evaluation.agreement import agreement, bernoulli_kl, readable_cosine
from qskd.teacher.online import OnlineTeacher


def test_kl_is_that_of_independent_coins() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(5, 4), torch.randn(5, 4)
    coins = [torch.distributions.Bernoulli(logits=logits) for logits in (teacher, student)]
    expected = torch.distributions.kl_divergence(*coins).sum(-1)
    torch.testing.assert_close(bernoulli_kl(teacher, student), expected, rtol=1e-4, atol=1e-6)
    assert bernoulli_kl(teacher, teacher).abs().max() < 1e-6


def test_memory_that_is_a_linear_map_away_is_read_and_noise_is_not() -> None:
    torch.manual_seed(0)
    student = torch.randn(2000, 12)
    assert readable_cosine(student, student @ torch.randn(12, 20) + 3) == pytest.approx(1, abs=1e-3)
    assert abs(readable_cosine(student, torch.randn(2000, 20))) < 0.1
    half = student @ torch.randn(12, 20) + 3 * torch.randn(2000, 20)
    assert 0.3 < readable_cosine(student, half) < 0.95


def test_a_network_agrees_with_itself_and_less_with_another() -> None:
    config = recipe()
    student = silent_student(config.student, LABELS, 0).eval()
    other = silent_student(config.student, LABELS, 1).eval()
    shake(other, 3)
    own = OnlineTeacher(silent_student(config.student, LABELS, 0), (0, 1, 2), Preprocessing(config.student.resize))
    given = [batch_of(2, 0, 3, 1, seed=seed) for seed in range(3)]
    same, differs = (agreement(one, own, given, DetectionLossConfig()) for one in (student, other))
    assert same["matched_kl"] == pytest.approx(0, abs=1e-6)
    assert same["matched_iou"] == pytest.approx(1, abs=1e-5)
    assert same["memory_cosine"] == pytest.approx(1, abs=1e-2)
    assert differs["matched_iou"] < 0.999
    assert differs["memory_cosine"] < same["memory_cosine"]


def test_a_teacher_of_other_width_and_classes_order_can_be_compared() -> None:
    said = agreement(
        silent_student(recipe().student, LABELS, 0).eval(), random_teacher(), [batch_of(1, 2, 3)], DetectionLossConfig()
    )
    assert said["matched_kl"] > 0
    assert 0 <= said["matched_iou"] <= 1
    assert -1 <= said["memory_cosine"] <= 1
