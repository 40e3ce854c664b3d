"""Denoising queries of RT-DETR, RT-DETRv2, D-FINE and DEIMv2: transformers' own groups and losses on the same noise, which is a
function of seed, step and image; and nobody but the detection loss sees them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from reference import make_targets, transformers_labels
from test_families import tiny_model, whole_batch
from tiny import batch_of, make_training, random_teacher, recipe
from torch import Tensor
from transformers.loss.loss_d_fine import DFineLoss
from transformers.loss.loss_deimv2 import Deimv2Loss
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from qskd import Distiller
from qskd.config import DetectionLossConfig
from qskd.detectors import Detector, load_detector, save_detector
from qskd.detectors.forward.extra_queries import ExtraQueries
from qskd.losses.denoising import Denoising, Noise, denoising_terms, denoising_weights, draw_noise
from qskd.losses.detection_loss import MATCHABILITY_GAMMA, combine, detection_terms, detection_weights
from qskd.losses.fine_grained import fine_grained_terms, fine_grained_weights
from qskd.losses.matching import assign
from qskd.losses.pairs import own_pairs, united_pairs
from qskd.structures import DetectorOutput, LossTerm, Targets
from qskd.training.step import Training

torch.set_num_threads(1)

HYBRID = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
CLASSES, DENOISING, QUERIES = 5, 10, 9  # of test_families.tiny_model
CONFIG = DetectionLossConfig(denoising_queries=DENOISING)
# Images without objects, more objects than denoising queries, and more than the model's own.
COUNTS = [[3, 0], [2, 4], [12, 1]]


def drawn_by_transformers(batch: int, objects: int, seed: int) -> Noise:
    """What its function draws after this seed, as ours takes it."""
    groups = max(1, DENOISING // objects)
    number = groups * 2 * objects
    torch.manual_seed(seed)
    classes, boxes = torch.zeros(batch, number), torch.zeros(batch, number, 4)
    renamed = torch.rand_like(classes)
    names = torch.randint_like(classes, 0, CLASSES)
    directions, distances = torch.randint_like(boxes, 0, 2), torch.rand_like(boxes)
    uniform = torch.cat([renamed[..., None], (names[..., None] + 0.5) / CLASSES, directions * 0.5, distances], -1)
    return Noise(uniform, groups, objects)


@pytest.mark.parametrize("counts", COUNTS)
def test_groups_are_transformers_own_on_the_same_noise(counts: list[int]) -> None:
    targets, denoising = make_targets(counts, CLASSES), Denoising(CLASSES, 8)
    noise = drawn_by_transformers(2, max(counts), seed=4)
    torch.manual_seed(4)
    states, places, hidden, said = get_contrastive_denoising_training_group(
        transformers_labels(targets), CLASSES, QUERIES, denoising.embedding, DENOISING
    )
    made = denoising(targets, noise)
    assert torch.equal(made.queries.states, states)
    torch.testing.assert_close(made.queries.places, places, atol=2e-5, rtol=1e-5)
    assert torch.equal(made.queries.hidden(QUERIES), hidden)
    for image, count in enumerate(counts):
        mine = made.assignment[image][made.targets.valid[image]]
        assert torch.equal(mine, said["dn_positive_idx"][image])
        assert made.targets.counts[image] == count * said["dn_num_group"]


def ours(
    model: Any, targets: Targets, noise: Noise, united: bool = False
) -> tuple[Tensor, dict[str, LossTerm], Denoising]:
    """The whole detection loss of a student, as `StepModule` puts it together, with transformers' own embedding."""
    detector = Detector(model)
    denoising = Denoising(CLASSES, detector.memory_channels[0])
    denoising.embedding.weight = model.model.denoising_class_embed.weight
    groups = denoising(targets, noise)
    output = detector(*whole_batch(), with_attention=False, extra=groups.queries)
    logits = torch.cat([output.early_logits, output.logits])
    boxes = torch.cat([output.early_boxes_cxcywh, output.boxes_cxcywh])
    early = detector.num_early
    kind = detector.classification
    (assignment,) = assign([(logits, boxes)], targets, CONFIG, [kind])
    together = united_pairs(assignment, targets, QUERIES) if united else None
    terms = detection_terms(logits, boxes, targets, assignment, CONFIG, kind, early, united=together)
    weights = detection_weights(detector.num_layers, CONFIG, early)
    if detector.side_distributions:
        pairs = together or own_pairs(assignment, targets)
        terms |= fine_grained_terms(output.sides, output.logits, output.boxes_cxcywh, pairs.after(early), CONFIG)
        weights |= fine_grained_weights(CONFIG)
    terms |= denoising_terms(output.extra, groups, CONFIG, kind)
    return combine(terms, weights | denoising_weights(CONFIG, detector.side_distributions)), terms, denoising


def of_transformers(model: Any, targets: Targets, seed: int, united: bool = False) -> Tensor:
    """Its loss; D-FINE's and DEIMv2's with the lists of their layers put right: each layer's own boxes, no layer lost, FGL of the
    last too. DEIMv2's with its authors' gamma. united: box losses have the matches of all layers."""
    labels, (pixels, mask) = transformers_labels(targets), whole_batch()
    torch.manual_seed(seed)
    said = model(pixels, mask, labels=labels)
    if model.config.model_type not in ("d_fine", "deimv2"):
        return said.loss
    split = said.denoising_meta_values["dn_num_split"]

    def layers(queries: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        logits, boxes, corners, about = (
            part.split(split, dim=2)[queries].unbind(1)
            for part in (
                said.intermediate_logits,
                said.intermediate_reference_points,
                said.intermediate_predicted_corners,
                said.initial_reference_points,
            )
        )
        teacher = {"teacher_corners": corners[-1], "teacher_logits": logits[-1].clone()}
        each = [
            {"logits": a, "pred_boxes": b, "pred_corners": c, "ref_points": d, **teacher}
            for a, b, c, d in zip(logits[1:], boxes[1:], corners, about, strict=True)
        ]
        return {"logits": logits[0], "pred_boxes": boxes[0]}, each

    initial, own = layers(1)
    dn_initial, dn = layers(0)
    proposals = {"logits": said.enc_topk_logits, "pred_boxes": said.enc_topk_bboxes}
    outputs = {
        **own[-1],
        "auxiliary_outputs": [proposals, initial, *own[:-1]],
        "dn_auxiliary_outputs": [dn_initial, *dn],
        "denoising_meta_values": said.denoising_meta_values,
    }
    if model.config.model_type == "d_fine":
        return sum(DFineLoss(model.config)(outputs, labels).values())  # type: ignore[return-value]
    model.config.focal_loss_gamma, model.config.use_dense_one_to_one = MATCHABILITY_GAMMA, united
    return sum(Deimv2Loss(model.config)(outputs, labels).values())  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("kind", "counts", "united"),
    [
        *((kind, counts, False) for kind in ("rt_detr", "d_fine") for counts in COUNTS),
        *(("deimv2", counts, True) for counts in COUNTS),
        *((kind, COUNTS[0], False) for kind in ("rt_detr_v2", "deimv2", "deimv2 lite", "deimv2 vit")),
    ],
)
def test_the_sum_of_losses_is_transformers_own_on_the_same_noise_values_and_gradients(
    kind: str, counts: list[int], united: bool
) -> None:
    model = tiny_model(kind).train()
    other = copy.deepcopy(model)
    other.config.auxiliary_loss = True
    targets = make_targets(counts, CLASSES)
    total, terms, _ = ours(model, targets, drawn_by_transformers(2, max(counts), seed=4), united)
    expected = of_transformers(other, targets, seed=4, united=united)
    assert all(term.total > 0 for name, term in terms.items() if name.startswith("denoising"))
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-5)
    total.backward()
    expected.backward()
    theirs = dict(other.named_parameters())
    assert model.model.denoising_class_embed.weight.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        if theirs[name].grad is not None:
            torch.testing.assert_close(
                parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("kind", HYBRID)
def test_the_models_own_queries_say_what_they_say_without_denoising(kind: str) -> None:
    """So neither distillation nor matching can tell; the others are in `extra` alone."""
    detector = Detector(tiny_model(kind).train())
    groups = Denoising(CLASSES, 32)(make_targets([3, 0], CLASSES), draw_noise(0, 0, (1, 2), 3, DENOISING))
    with torch.no_grad():
        alone, beside = copy.deepcopy(detector)(*whole_batch()), detector(*whole_batch(), extra=groups.queries)
    assert alone.extra is None
    assert beside.extra.logits.shape == (3, 2, 18, CLASSES)
    for name in ("logits", "boxes_cxcywh", "query_states", "early_logits", "early_boxes_cxcywh"):
        torch.testing.assert_close(getattr(beside, name), getattr(alone, name), atol=1e-5, rtol=1e-5)
    if kind in ("d_fine", "deimv2"):
        assert beside.extra.early_logits.shape == (1, 2, 18, CLASSES)
        for mine, expected in zip(beside.sides.logits, alone.sides.logits, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # and they are gone with the step
        assert detector(*whole_batch()).extra is None


def test_a_denoising_query_looks_where_its_box_is_in_a_padded_batch_too() -> None:
    """These networks know no padding; a fresh one leaves boxes where they begin."""
    student = hybrid("rt_detr").student
    boxes = torch.tensor([[[0.3, 0.4, 0.2, 0.1], [0.6, 0.5, 0.3, 0.3]]])
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :48, :32] = True
    with torch.no_grad():
        output = student(
            torch.randn(1, 3, 64, 64),
            mask,
            extra=ExtraQueries(torch.randn(1, 2, 32), boxes, group=torch.tensor([0, 0])),
        )
    for layer in output.extra.boxes_cxcywh:
        torch.testing.assert_close(layer, boxes, atol=1e-4, rtol=0)


# ---- noise


def test_noise_is_a_function_of_seed_step_and_image_and_not_of_the_batch() -> None:
    whole = draw_noise(3, 7, (11, 12, 13), 4, 100)
    assert (whole.groups, whole.objects, whole.uniform.shape) == (25, 4, (3, 200, 10))
    assert torch.equal(draw_noise(3, 7, (13, 11), 4, 100).uniform, whole.uniform[[2, 0]])
    assert not torch.equal(whole.uniform[0], whole.uniform[1])
    for seed, step in ((3, 8), (4, 7)):
        assert not torch.equal(draw_noise(seed, step, (11,), 4, 100).uniform[0], whole.uniform[0])
    assert 0 <= whole.uniform.min() < whole.uniform.max() < 1
    drawn = np.sort(whole.uniform.flatten().numpy())
    assert np.abs(drawn - np.linspace(0, 1, len(drawn))).max() < 0.03  # even


def test_two_shares_of_a_batch_sum_to_the_whole_batch() -> None:
    """With the groups of the whole batch: the first share's images have fewer objects, the second none at all."""
    targets, model = make_targets([1, 4, 0], CLASSES), tiny_model("d_fine")
    denoising, detector = Denoising(CLASSES, 32), Detector(model)
    pixels, mask = torch.randn(3, 3, 64, 96), torch.ones(3, 64, 96, dtype=torch.bool)

    def terms(images: slice) -> dict[str, LossTerm]:
        counts, ids = targets.counts[images], targets.image_ids[images]
        most = max(counts)
        own = Targets(
            targets.boxes_cxcywh[images, :most],
            targets.labels[images, :most],
            targets.valid[images, :most],
            ids,
            counts,
        )
        groups = denoising(own, draw_noise(0, 5, ids, 4, DENOISING))
        output: DetectorOutput = detector(pixels[images], mask[images], extra=groups.queries)
        return denoising_terms(output.extra, groups, CONFIG, "varifocal")  # type: ignore[arg-type]

    parts = [terms(slice(0, 1)), terms(slice(1, 2)), terms(slice(2, 3))]
    for name, term in terms(slice(0, 3)).items():
        torch.testing.assert_close(sum(part[name].total for part in parts), term.total, rtol=1e-4, atol=1e-4)
        assert sum(part[name].count for part in parts) == term.count


# ---- in training


def hybrid(family: str, *options: str, teacher: bool = False, **sizes: Any) -> Training:
    own = {"family": family, "feature_levels": 2, "resize": {"mode": "square", "size": tiny.SIZE}, **sizes}
    config = recipe(own, "detection.denoising_queries=8", *options)
    return make_training(config, random_teacher() if teacher else None)


@pytest.mark.parametrize("family", ["rt_detr", "d_fine", "deimv2"])
def test_every_trained_parameter_gets_a_gradient_with_and_without_objects(family: str) -> None:
    """Other workers wait for it: for the embedding's too, in a share without objects or without images."""
    training = hybrid(family, teacher=True)
    names = set(denoising_weights(training.config.detection, family != "rt_detr"))
    for batch in (batch_of(2, 1), batch_of(7, 0), batch_of(0, 0), batch_of()):
        values = training.train_step(batch)
        assert names <= values.keys()
        assert all(torch.isfinite(value) for value in values.values())
        trained = {name: value for name, value in training.module.named_parameters() if value.requires_grad}
        assert [name for name, value in trained.items() if value.grad is None] == []
    training.check_finite()


@pytest.mark.parametrize("options", [("detection.denoising_queries=0",), ("detection.auxiliary=false",)])
def test_it_is_off_by_one_field(options: tuple[str, ...]) -> None:
    training = hybrid("d_fine", *options)
    assert not any("denoising" in name for name in training.train_step(batch_of(2, 1)))
    assert not any("denoising" in name for name in training.state())


def test_by_default_they_are_a_third_of_the_students_queries() -> None:
    own = {"family": "rt_detr", "feature_levels": 2, "resize": {"mode": "square", "size": tiny.SIZE}, "queries": 12}
    training = make_training(recipe(own))
    assert training.module.denoising_queries == 4
    assert training._noise(batch_of(1, 2)).groups == 2  # type: ignore[union-attr]
    assert training._noise(batch_of(0, 0)) is None


def test_a_family_without_denoising_has_none() -> None:
    assert make_training(recipe()).module.denoising is None


def test_a_resumed_run_denoises_as_an_undisturbed_one() -> None:
    batches = [batch_of(2, 0, seed=seed) for seed in range(4)]
    whole = hybrid("rt_detr", "training.ema_decay=0.9", dropout=0.1)
    for step, batch in enumerate(batches):
        if step == 2:
            kept = whole.state()
        whole.train_step(batch)
    again = hybrid("rt_detr", "training.ema_decay=0.9", dropout=0.1)
    again.load_state(kept, 2)
    for batch in batches[2:]:
        again.train_step(batch)
    tiny.assert_equal(again.state(), whole.state())


def test_the_saved_student_knows_nothing_of_it(tmp_path: Path) -> None:
    training = hybrid("rt_detr")
    training.train_step(batch_of(2, 1))
    with training.evaluation_weights() as student:
        save_detector(student, tmp_path, student_resize := training.config.student.resize)
    again = load_detector(tmp_path)
    assert student_resize.size == tiny.SIZE
    assert again.model.config.num_denoising == 0
    assert not any("denoising" in name for name in again.state_dict())


def test_beside_a_loop_of_ones_own_denoising_queries_stay_and_learn_nothing_of_the_teacher() -> None:
    student = hybrid("rt_detr").student
    said = []
    for number in (0, 8):
        model = copy.deepcopy(student.model).train()
        distiller = Distiller(model, random_teacher(), student.preprocessing(recipe().student.resize))
        if said:
            distiller.load_state_dict(said[0][1].state_dict())
        model.config.num_denoising = number
        model.model.denoising_class_embed = torch.nn.Embedding(4, 32)
        torch.manual_seed(0)
        pixels, labels = torch.randn(2, 3, 64, 64), transformers_labels(make_targets([2, 1], 3))
        outputs = model(pixels, labels=labels)
        assert (outputs.denoising_meta_values is not None) == bool(number)
        said.append((distiller({"pixel_values": pixels, "labels": labels}), distiller))
    for name, value in said[0][0].terms.items():
        torch.testing.assert_close(said[1][0].terms[name], value, rtol=1e-4, atol=1e-5)
