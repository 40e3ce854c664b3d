"""The training step: who learns, at what rate, and what goes wrong."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, arrays, assert_equal, batch_of, make_training, own, random_teacher, recipe, trained_weights
from transformers.models.d_fine.modeling_d_fine import replace_batch_norm

from qskd.config import TrainingConfig
from qskd.datasets.batch import parts_of, train_batch
from qskd.datasets.order.schedule import split
from qskd.errors import QskdError
from qskd.structures import LossTerm, to_device
from qskd.training.groups import learning_rate_factor, parameter_groups
from qskd.training.step import Training

FULL_BUT_BATCHES = ("detection.dense_weight=1.0", "training.ema_decay=0.9", "training.clip_norm=1.0")

# ---- who learns


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("method", ["none", "qskd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_trained_parameter_gets_a_gradient_with_and_without_objects(
    family: str, method: str, auxiliary: bool
) -> None:
    options = (f"distillation.method={method}", f"detection.auxiliary={auxiliary}", "detection.dense_weight=1.0")
    training = make_training(recipe(FAMILIES[family], *options), random_teacher() if method == "qskd" else None)
    for batch in (batch_of(2, 1), batch_of(0, 2), batch_of(0, 0), batch_of()):
        values = training.train_step(batch)
        assert all(torch.isfinite(value) for value in values.values())
        trained = {name: value for name, value in training.module.named_parameters() if value.requires_grad}
        assert [name for name, value in trained.items() if value.grad is None] == []
        assert all(torch.isfinite(value.grad).all() for value in trained.values() if value.grad is not None)
    assert values["total"] == 0  # an empty share says nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_moves_every_parameter_that_has_a_gradient(family: str) -> None:
    config = recipe(FAMILIES[family], "detection.dense_weight=1.0", "training.weight_decay=0.0")
    training = make_training(config, random_teacher())
    training.train_step(batch_of(2, 1))  # from here on no head is zero any more
    before = trained_weights(training)
    training.train_step(batch_of(2, 3, seed=1))
    dead = [
        name for name, value in training.module.named_parameters() if value.grad is not None and not value.grad.any()
    ]
    still = [name for name, value in trained_weights(training).items() if torch.equal(value, before[name])]
    # Conditional DETR's queries start from zeros: all its first self-attention can say is the same for every query.
    assert [name for name in dead if "decoder.layers.0.self_attn" not in name] == []
    assert [name for name in still if "self_attn" not in name] == []
    assert family == "conditional" or not dead + still


def test_a_frozen_backbone_and_the_teacher_stay_as_they_are() -> None:
    teacher = random_teacher()
    training = make_training(recipe({"train_backbone": False}), teacher)
    frozen = {name: value.clone() for name, value in training.student.backbone.state_dict().items()}
    taught = {name: value.clone() for name, value in teacher.state_dict().items()}
    for seed in range(2):
        training.train_step(batch_of(2, 1, seed=seed))
    assert_equal(training.student.backbone.state_dict(), frozen)
    assert_equal(teacher.state_dict(), taught)
    assert not any("teacher" in name for name in training.state())


def test_an_empty_share_leaves_batch_statistics_alone() -> None:
    training = make_training(recipe())
    training.train_step(batch_of(2, 1))
    before = {name: value.clone() for name, value in training.student.named_buffers()}
    training.train_step(batch_of())
    assert_equal(dict(training.student.named_buffers()), before)
    training.train_step(batch_of(2, 1))
    assert any(not torch.equal(value, before[name]) for name, value in training.student.named_buffers())


def test_images_of_other_sizes_and_a_teacher_s_own_are_taken() -> None:
    training = make_training(recipe(), random_teacher())
    batch = arrays([2, 1], teacher_size=96)
    assert batch["teacher_images"].shape == (2, 96, 96, 3)
    batch["sizes"][1] = 40, 64
    values = training.train_step(train_batch(batch))
    assert torch.isfinite(values["total"])
    assert values["agfd"] > 0


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    training = make_training(recipe(None, "detection.dense_weight=0.5"), random_teacher())
    values = training.train_step(batch_of(2, 1))
    weights = training.module.weights
    assert values.keys() - {"total"} == weights.keys()
    assert {"class_0", "class", "dense_l1", "agfd", "lapd_class"} <= weights.keys()
    expected = sum(weights[name] * values[name].item() for name in weights)
    assert values["total"].item() == pytest.approx(expected, rel=1e-5)


# ---- rates


def test_warm_up_is_linear_and_reaches_the_full_rate() -> None:
    settings = TrainingConfig(warmup_steps=4, schedule="constant")
    assert [learning_rate_factor(step, 10, settings) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_step_schedule_falls_to_a_tenth_where_it_says() -> None:
    settings = TrainingConfig(schedule="step", step_at=0.8)
    assert [learning_rate_factor(step, 10, settings) for step in range(10)] == [1.0] * 8 + [0.1] * 2
    assert learning_rate_factor(9, 10, TrainingConfig(schedule="step", step_at=1.0)) == 1.0


def test_the_cosine_schedule_falls_from_one_to_nearly_nothing() -> None:
    settings = TrainingConfig(schedule="cosine", warmup_steps=2)
    factors = [learning_rate_factor(step, 12, settings) for step in range(12)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[2] == 1.0
    assert factors[7] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.05
    assert all(high >= low for high, low in itertools.pairwise(factors[1:]))
    assert learning_rate_factor(12, 12, settings) == pytest.approx(0.0)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_a_warm_up_longer_than_the_run_is_no_error(schedule: Any) -> None:
    settings = TrainingConfig(schedule=schedule, warmup_steps=100)
    assert [learning_rate_factor(step, 3, settings) for step in range(3)] == [0.01, 0.02, 0.03]


def test_the_backbone_learns_at_its_own_rate() -> None:
    options = ("training.backbone_learning_rate_scale=0.25", "training.learning_rate=0.01", "training.warmup_steps=2")
    training = make_training(recipe(None, *options))
    training.train_step(batch_of(1))
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.005, 0.00125]
    training.train_step(batch_of(1))
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.01, 0.0025]
    groups = parameter_groups(training.module, training.config.training)
    everything = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in training.module.parameters() if p.requires_grad)
    backbone = {id(parameter) for parameter in training.student.backbone.parameters()}
    assert {id(parameter) for parameter in groups[1]["params"]} == backbone


@pytest.mark.parametrize("clip_norm", [1e-3, 0.0])
def test_gradients_are_clipped_to_the_norm(clip_norm: float) -> None:
    training = make_training(recipe(None, f"training.clip_norm={clip_norm}"))
    training.train_step(batch_of(2, 3))
    gradients = [value.grad for value in training.module.parameters() if value.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert norm == pytest.approx(clip_norm, rel=1e-3) if clip_norm else norm > 1.0


# ---- what goes wrong


def poisoned(value: float, teacher: bool = True) -> Training:
    training = make_training(recipe(), random_teacher() if teacher else None)
    training.train_step(batch_of(2, 1))
    with torch.no_grad():
        next(p for n, p in training.student.named_parameters() if "class_labels_classifier.bias" in n)[0] = value
    return training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("counts", [(2, 1), (0, 0)])
def test_a_loss_that_is_not_finite_stops_the_next_step(value: float, counts: tuple[int, ...]) -> None:
    training = poisoned(value)
    training.train_step(batch_of(*counts, seed=5))
    with pytest.raises(QskdError) as caught:
        training.train_step(batch_of(2, 1, seed=6))
    text = str(caught.value)
    for word in ("training step 1:", "not finite", "class ", "agfd", "lapd_class", "images [600, 601]"):
        assert word in text
    assert "700" not in text  # the images of the step that went wrong, not of the one that found out


def test_a_loss_that_is_not_finite_at_the_last_step_is_found_too() -> None:
    training = poisoned(float("nan"), teacher=False)
    training.train_step(batch_of(2, 1, seed=5))
    with pytest.raises(QskdError, match=r"training step 1: .*images \[600, 601\]"):
        training.check_finite()
    training.check_finite()  # said once


@pytest.mark.parametrize("clip_norm", [0.1, 0.0])
def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(clip_norm: float) -> None:
    training = make_training(recipe(None, f"training.clip_norm={clip_norm}"))
    training.train_step(batch_of(2, 1))
    weight = next(p for name, p in training.student.named_parameters() if "class_labels_classifier.weight" in name)
    hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    values = training.train_step(batch_of(2, 1, seed=5))
    assert torch.isfinite(values["total"])
    hook.remove()
    with pytest.raises(QskdError, match=r"training step 1: the gradient is not finite: .*images \[600, 601\]"):
        training.state()


def test_a_checkpoint_of_a_broken_run_is_not_written() -> None:
    training = poisoned(float("nan"), teacher=False)
    training.train_step(batch_of(2, 1))
    with pytest.raises(QskdError, match="not finite"):
        training.state()


# ---- fast paths


def test_bfloat16_runs_and_keeps_weights_in_float32() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        options = (f"compute.precision={precision}", "detection.dense_weight=1.0")
        training = make_training(recipe(FAMILIES["refined"], *options), random_teacher())
        values = [training.train_step(batch_of(2, 1, seed=seed)) for seed in range(3)]
        training.check_finite()
        assert all(value.dtype == torch.float32 for value in values[-1].values())
        assert all(value.dtype == torch.float32 for value in training.module.parameters())
        losses[precision] = values[0]["total"].item()
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]  # the option has an effect


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler for inductor")
def test_a_compiled_backbone_gives_the_same_losses_and_plain_names() -> None:
    import torch._inductor.config  # a second, which the other tests need not wait for
    from torch._dynamo.utils import counters

    runs = []
    # Each stage and each layer more is seconds of the C++ compiler's.
    backbone = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    # Of images whose shape is kept: the backbone and the losses, for the whole student takes the C++ compiler minutes.
    student = {"backbone": backbone, "decoder_layers": 1, "resize": {"mode": "shortest_edge", "size": 64}}
    counters.clear()
    # Loops of single numbers: which vectors this machine has takes six compilations and as many processes to find out.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "compile_threads": 1}):
        for compiled in (False, True):
            training = make_training(recipe(student, f"compute.compile={compiled}", "training.ema_decay=0.9"))
            values = [training.train_step(batch_of(2, 1, seed=seed))["total"].item() for seed in range(2)]
            runs.append((values, set(training.state())))
    # The backbone, the costs and the losses, two of them there and back.
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"] == 5
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert runs[1][1] == runs[0][1]


FROZEN = {**FAMILIES["refined"], "backbone_norm": "frozen"}


def in_parts(training: Training, counts: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    parts = parts_of(arrays(counts, seed), training.config.training, 1)
    return training.train_step(*map(train_batch, parts))


def test_a_share_in_parts_is_the_mean_of_its_parts() -> None:
    """One that consists of the same images twice, in two parts, is one of those images."""
    once = make_training(recipe(FROZEN, *FULL_BUT_BATCHES), random_teacher("conditional"))
    twice = make_training(
        recipe(FROZEN, *FULL_BUT_BATCHES, "training.batch_size=4", "training.micro_batch_size=2"),
        random_teacher("conditional"),
    )
    for seed in range(3):
        single = arrays((2, 1), seed)
        double = {name: np.concatenate([array, array]) for name, array in single.items()}
        expected = once.train_step(train_batch(single))
        parts = parts_of(double, twice.config.training, 1)
        assert len(parts) == 2
        found = twice.train_step(*map(train_batch, parts))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], msg=name)
    for name, weight in trained_weights(twice).items():
        torch.testing.assert_close(weight, trained_weights(once)[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["deformable_detr", "detr", "rt_detr"])
@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (5, 0, 4, 0), (0, 3, 1, 6), (0, 0, 0, 0)])
def test_a_detection_loss_in_parts_is_that_of_the_whole_share(family: str, counts: tuple[int, ...]) -> None:
    """Images without objects are background of the batch's weight, not of their own."""
    plain = (
        "distillation.method=none",
        "detection.dense_weight=0",
        "detection.denoising_queries=0",
        "training.clip_norm=0",
    )
    found = []
    for size in (0, 1, 2):
        options = ("training.batch_size=4", f"training.micro_batch_size={size}")
        training = make_training(recipe({**own(family), "backbone_norm": "frozen"}, *plain, *options))
        replace_batch_norm(
            training.student.model
        )  # RT-DETR's encoder has some too, of which each part would have its own
        values = in_parts(training, counts, 3)
        found.append((values, {n: p.grad for n, p in training.module.named_parameters() if p.grad is not None}))
    (whole, gradients), *others = found
    softmax = family == "detr"  # its class term is divided by its own weights, of all queries: a mean of parts
    for values, theirs in others:
        for name in values:
            if not softmax or ("class" not in name and name != "total"):
                torch.testing.assert_close(values[name], whole[name], rtol=1e-4, atol=1e-5, msg=name)
        for name, gradient in theirs.items():
            if not softmax or "bbox" in name:
                torch.testing.assert_close(gradient, gradients[name], rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("counts", [(3,), (), (0, 0, 0), (1, 0, 2)])
def test_a_part_may_be_empty(counts: tuple[int, ...]) -> None:
    options = ("training.batch_size=4", "training.micro_batch_size=1")
    training = make_training(recipe(FROZEN, *FULL_BUT_BATCHES, *options), random_teacher("conditional"))
    values = in_parts(training, counts, 1)
    training.check_finite()
    assert all(torch.isfinite(value) for value in values.values())
    assert (values["total"] > 0) == bool(counts)


def test_the_divisors_of_a_parts_terms_are_one_tensor_whatever_the_number_of_terms() -> None:
    """On a GPU each of its own would be a kernel's start, for every term of every part."""
    training = make_training(recipe(FROZEN))
    objects, other = LossTerm(torch.ones(()), torch.ones(()), objects=2.0), LossTerm(torch.ones(()), torch.tensor(5.0))
    terms = training._to_be_divided({"a": objects, "b": other, "c": replace(objects, objects=3.0)}, 4, 6)
    assert {name: (term.count.item(), term.floor) for name, term in terms.items()} == {
        "a": (3.0, 0.25),
        "b": (5.0, 1.0),
        "c": (4.5, 0.25),
    }
    assert terms["a"].count.untyped_storage().data_ptr() == terms["c"].count.untyped_storage().data_ptr()


def test_all_images_of_all_parts_are_named_when_one_is_broken() -> None:
    options = ("training.batch_size=2", "training.micro_batch_size=1")
    training = make_training(recipe(None, *options))
    with torch.no_grad():
        next(p for n, p in training.student.named_parameters() if "class_labels_classifier.bias" in n)[0] = float("nan")
    in_parts(training, (2, 1), 5)
    with pytest.raises(QskdError, match=r"images \[600, 601\]"):
        training.state()


@pytest.mark.parametrize(
    ("batch_size", "world", "micro", "count"), [(16, 1, 0, 1), (16, 1, 4, 4), (16, 3, 4, 2), (5, 2, 2, 2), (4, 8, 2, 1)]
)
def test_every_worker_has_as_many_parts_and_none_is_larger_than_asked(
    batch_size: int, world: int, micro: int, count: int
) -> None:
    config = TrainingConfig(batch_size=batch_size, micro_batch_size=micro)
    rows = {"images": np.arange(batch_size)}
    for rank in range(world):
        own = {name: split(array, world, rank) for name, array in rows.items()}
        parts = parts_of(own, config, world)
        assert len(parts) == count
        assert np.concatenate([part["images"] for part in parts]).tolist() == own["images"].tolist()
        assert not micro or max(len(part["images"]) for part in parts) <= micro


def test_images_that_both_networks_see_go_to_the_device_once() -> None:
    moved = to_device(batch_of(2, 1), "meta")
    assert moved.images.device.type == "meta"
    assert moved.teacher_images is moved.images
    assert moved.teacher_sizes is moved.sizes
    own = to_device(train_batch(arrays((2, 1), teacher_size=96)), "meta")
    assert own.teacher_images.shape != own.images.shape
