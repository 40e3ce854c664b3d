"""Other groups of queries learn beside the student's own: which say and learn of themselves what they would alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, LABELS, arrays, assert_equal, batch_of, make_training, random_teacher, recipe, shake
from torch import Tensor
from transformers import AutoModelForObjectDetection

from qskd.config import FACTS, ResizeConfig
from qskd.config.recipe import load
from qskd.datasets.batch import parts_of, train_batch
from qskd.detectors import build_student, save_detector, to_pixels
from qskd.errors import QskdError
from qskd.families.family import Family
from qskd.families.table import FAMILIES as ALL
from qskd.from_recipe import make_student
from qskd.losses.detection_loss import combine, detection_terms, detection_weights
from qskd.losses.matching import assign
from qskd.structures import DetectorOutput
from qskd.training.step import Training

STUDENTS = {**FAMILIES, "dab": {"family": "dab-detr"}}
GROUPS = "detection.query_groups=3"


def started(family: str, *options: str, **student: object) -> Training:
    """A training whose weights are no longer those of a start: heads there are zero."""
    training = make_training(recipe({**STUDENTS[family], **student}, *options))
    shake(training.student, 5)
    return training


def said(training: Training, with_groups: bool) -> tuple[DetectorOutput, tuple[Tensor, Tensor] | None]:
    student, groups = training.student.eval(), training.module.query_groups
    batch = batch_of(2, 1)
    pixels, mask = to_pixels(batch.images, batch.sizes, student.mean, student.std)
    if not with_groups:
        return student(pixels, mask, with_attention=False), None
    assert groups is not None
    with groups.asked(student):
        output = student(pixels, mask, with_attention=False)
    return groups.parted(output)


@pytest.mark.parametrize("family", STUDENTS)
def test_the_students_own_queries_say_what_they_say_alone_and_the_others_teach_them_nothing(family: str) -> None:
    training = started(family, GROUPS)
    groups, embedding = training.module.query_groups, dict(training.student.named_parameters())
    assert groups is not None
    alone, _ = said(training, with_groups=False)
    own, others = said(training, with_groups=True)
    assert others is not None
    for name in ("logits", "boxes_cxcywh", "query_states"):
        torch.testing.assert_close(getattr(own, name), getattr(alone, name), rtol=1e-5, atol=1e-5)
    queries, layers = training.student.num_queries, training.student.num_layers
    assert others[0].shape == (2 * layers, 2, queries, 3)
    assert others[1].shape == (2 * layers, 2, queries, 4)
    # No group sees another, nor is it one: what one says has a gradient in its own queries only.
    first = torch.autograd.grad(others[0][:layers].sum(), groups.others, retain_graph=True)[0]
    assert first[:queries].any()
    assert not first[queries:].any()
    (none,) = torch.autograd.grad(own.logits.sum(), groups.others, allow_unused=True, retain_graph=True)
    assert none is None or not none.any()
    assert not torch.allclose(others[0][:layers], others[0][layers:], atol=1e-3)
    # Afterwards the student is as it was.
    assert dict(training.student.named_parameters()).keys() == embedding.keys()
    again, _ = said(training, with_groups=False)
    assert torch.equal(again.logits, alone.logits)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("family", ["conditional", "refined"])
def test_their_loss_is_the_mean_over_groups_of_each_ones_own_detection_loss(family: str, auxiliary: bool) -> None:
    training = started(family, GROUPS, f"detection.auxiliary={auxiliary}", "detection.query_group_weight=0.5")
    groups, config = training.module.query_groups, training.config.detection
    assert groups is not None
    targets = batch_of(2, 1).targets
    _, others = said(training, with_groups=True)
    assert others is not None
    layers = training.student.num_layers if auxiliary else 1
    expected = torch.zeros(())
    for group in range(2):  # each as if it were a student of its own
        logits, boxes = (part[group * layers : (group + 1) * layers] for part in others)
        (assignment,) = assign([(logits, boxes)], targets, config)
        terms = detection_terms(logits, boxes, targets, assignment, config)
        expected = expected + combine(terms, detection_weights(layers, config)) / 2
    (assignment,) = assign([others], targets, config)
    found = combine(groups.terms(others, targets, assignment, "focal"), groups.weights)
    torch.testing.assert_close(found, 0.5 * expected)


@pytest.mark.parametrize("family", STUDENTS)
def test_every_query_of_every_group_learns_with_and_without_objects_and_only_the_own_ones_are_taught(
    family: str,
) -> None:
    training = make_training(recipe(STUDENTS[family], GROUPS), random_teacher())
    plain = make_training(recipe(STUDENTS[family]), random_teacher())
    for step, batch in enumerate((batch_of(2, 1), batch_of(0, 0), batch_of())):
        values, usual = training.train_step(batch), plain.train_step(batch)
        assert values.keys() - usual.keys() == {"groups_class", "groups_l1", "groups_giou"}
        assert all(torch.isfinite(value) for value in values.values())
        trained = {name: value for name, value in training.module.named_parameters() if value.requires_grad}
        assert [name for name, value in trained.items() if value.grad is None] == []
        if not step:  # the same weights: all else is as without groups, distillation too
            for name in usual.keys() - {"total"}:
                assert values[name].item() == pytest.approx(usual[name].item(), rel=1e-4, abs=1e-6), name
    assert values["total"] == 0


def test_a_stopped_run_goes_on_with_its_groups_and_micro_batches_are_parts_of_a_step() -> None:
    options = (GROUPS, "training.ema_decay=0.9", "student.dropout=0.1")
    whole, resumed = (make_training(recipe(None, *options), random_teacher()) for _ in range(2))
    for step in range(4):
        whole.train_step(batch_of(2, 1, seed=step))
        if step == 1:
            resumed.load_state(whole.state(), 2)
    for step in (2, 3):
        resumed.train_step(batch_of(2, 1, seed=step))
    assert_equal(resumed.state(), whole.state())
    assert any("query_groups.others" in name for name in whole.state())
    totals = []
    for size in (0, 2):
        config = recipe(
            {"backbone_norm": "frozen"}, GROUPS, "training.batch_size=4", f"training.micro_batch_size={size}"
        )
        parts = parts_of(arrays([1, 1, 1, 1]), config.training, 1)
        totals.append(make_training(config).train_step(*map(train_batch, parts))["total"].item())
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


def test_the_saved_student_has_its_own_queries_alone(tmp_path: Path) -> None:
    training = make_training(recipe(None, GROUPS, "training.ema_decay=0.9"))
    for step in range(2):
        training.train_step(batch_of(2, 1, seed=step))
    with training.evaluation_weights() as student:
        save_detector(student, tmp_path / "student", ResizeConfig(size=64))
        expected, _ = said(training, with_groups=False)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "student").eval()
    assert model.config.num_queries == training.student.num_queries
    batch = batch_of(2, 1)
    pixels, mask = to_pixels(batch.images, batch.sizes, student.mean, student.std)
    with torch.no_grad():
        torch.testing.assert_close(model(pixels, pixel_mask=mask).logits, expected.logits[-1], rtol=1e-5, atol=1e-5)


def test_they_start_about_the_queries_that_a_student_begins_with() -> None:
    student = build_student(recipe(None).student, LABELS, 3)
    with torch.no_grad():
        student.model.model.query_position_embeddings.weight.add_(10.0)  # as if it were trained
    training = Training(recipe(None, GROUPS), student, None, 10, torch.device("cpu"))
    groups = training.module.query_groups
    assert groups is not None
    own = student.model.model.query_position_embeddings.weight
    others = groups.others.unflatten(0, (2, len(own)))
    assert (others - own).mean().abs() < 0.2
    assert torch.corrcoef(torch.stack([others[0].flatten(), own.flatten()]))[0, 1] > 0.5
    assert not torch.allclose(others[0], others[1], atol=0.1)


def test_the_facts_name_the_families_that_have_an_embedding_of_all_their_queries() -> None:
    own = {name for name, family in ALL.items() if type(family).query_embedding is not Family.query_embedding}
    assert own == {name for name, facts in FACTS.items() if facts.groups}


def test_a_family_whose_queries_have_no_groups_is_refused_by_name(tmp_path: Path) -> None:
    hybrid = {"family": "rt_detr", "feature_levels": 2}
    with pytest.raises(QskdError, match="the queries of a rt_detr have no groups; those of conditional_detr, dab-detr"):
        recipe(hybrid, GROUPS)
    save_detector(make_training(recipe(hybrid)).student.eval(), tmp_path / "own", ResizeConfig(size=64))
    own = load(None, [f"student.init={tmp_path / 'own'}", "student.resize.size=64", GROUPS])
    with pytest.raises(QskdError, match=r"detection\.query_groups: 3, and a rt_detr"):
        Training(own, make_student(own, LABELS), None, 10, torch.device("cpu"))
