"""The training step: who learns, at what rate, exactly again after a stop; and distillation end to end."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LABELS, STUDENT, arrays, batch_of, make_training, random_teacher, recipe
from torch import Tensor

from pipelines.streaming import StreamConfig, local_stream
from qskd.coco import CocoDataset, Sample, read_coco
from qskd.config import ResizeConfig, TrainingConfig, ViewConfig
from qskd.errors import QskdError
from qskd.schedule import Schedule
from qskd.shards import load_manifest, write_shards
from qskd.teacher import OnlineTeacher
from qskd.training import TrainBatch, Training, learning_rate_factor, parameter_groups, train_batch

REAL = Path(__file__).parents[2] / "shared" / "coco-sample"
FULL = ("detection.dense_weight=1.0", "training.ema_decay=0.9", "training.clip_norm=1.0", "student.dropout=0.1")


def trained_weights(training: Training) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in training.module.named_parameters() if value.requires_grad}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def full_training(total_steps: int = 5, **changes: Any) -> Training:
    """With everything that has state: batch norm, dropout, a dense head, a projector, a teacher, a moving average."""
    return make_training(recipe({**FAMILIES["refined"], **changes}, *FULL), random_teacher("conditional"), total_steps)


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


# ---- the same again


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    runs: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        training = make_training(recipe(None, *FULL, f"seed={seed}"), random_teacher())
        torch.rand(seed + len(runs))  # what else drew random numbers must not matter
        for step in range(3):
            training.train_step(batch_of(2, 1, seed=step))
        runs.append(training.state())
    assert_equal(runs[1], runs[0])
    assert any(not torch.equal(runs[2][name], runs[0][name]) for name in runs[0])


@pytest.mark.parametrize("changes", [{}, {"box_refinement": False}, {"family": "conditional_detr"}])
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(changes: dict[str, Any], tmp_path: Path) -> None:
    batches = [batch_of(2, 1, seed=0), batch_of(0, 3, seed=1), batch_of(0, 0, seed=2), batch_of(1, 1, seed=3)]
    batches.append(batch_of(4, 2, seed=4))
    whole = full_training(**changes)
    for step, batch in enumerate(batches):
        whole.train_step(batch)
        if step == 1:
            save_file(whole.state(), tmp_path / "state.safetensors")
    resumed = full_training(**changes)
    resumed.load_state(load_file(tmp_path / "state.safetensors"), step=2)
    torch.rand(17)
    for batch in batches[2:]:
        resumed.train_step(batch)
    assert resumed.step == whole.step == 5
    state, expected = resumed.state(), whole.state()
    assert {name.split(".")[0] for name in state} == {"module", "average", "optimizer"}
    assert any("projectors" in name for name in state)
    assert any("dense_head" in name for name in state)
    assert_equal(state, expected)


def test_a_state_holds_copies(tmp_path: Path) -> None:
    training = full_training()
    training.train_step(batch_of(2))
    state = training.state()
    kept = {name: value.clone() for name, value in state.items()}
    training.train_step(batch_of(2))
    assert_equal(state, kept)


def test_a_state_of_another_student_is_refused() -> None:
    state = make_training(recipe({"width": 64})).state()
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_training(recipe()).load_state(state, 0)


# ---- the moving average


def test_evaluation_takes_the_average_and_gives_the_weights_back() -> None:
    training = full_training()
    for seed in range(3):
        training.train_step(batch_of(2, 1, seed=seed))
    own = {name: value.clone() for name, value in training.student.state_dict().items()}
    assert any(not torch.equal(value, own[name]) for name, value in training.average.items())
    with training.evaluation_weights() as student:
        assert not student.training
        assert_equal(student.state_dict(), training.average)
    assert training.student.training
    assert_equal(training.student.state_dict(), own)


def test_without_an_average_evaluation_takes_the_weights() -> None:
    training = make_training(recipe())
    training.train_step(batch_of(2))
    own = {name: value.clone() for name, value in training.student.state_dict().items()}
    assert training.average == {}
    with training.evaluation_weights() as student:
        assert_equal(student.state_dict(), own)


def test_evaluation_that_fails_gives_the_weights_back() -> None:
    training = full_training()
    training.train_step(batch_of(2, 1))
    own = {name: value.clone() for name, value in training.student.state_dict().items()}
    with pytest.raises(RuntimeError, match="broken"), training.evaluation_weights():
        raise RuntimeError("broken")
    assert_equal(training.student.state_dict(), own)


def test_the_average_of_weights_that_stand_still_is_those_weights() -> None:
    training = make_training(recipe(None, "training.ema_decay=0.9"))
    for value in training.average.values():
        if value.is_floating_point():
            value += 1.0
    for _ in range(200):
        training._update_average()
        training.step += 1
    current = training.student.state_dict()
    for name, value in training.average.items():
        torch.testing.assert_close(value, current[name], atol=1e-5, rtol=1e-5)


def test_the_average_is_that_of_the_formula() -> None:
    training = make_training(recipe(None, "training.ema_decay=0.3", "training.learning_rate=0.01"))
    name = "model.class_labels_classifier.bias"
    expected = training.student.state_dict()[name].clone()
    for step in range(4):
        training.train_step(batch_of(2, 1, seed=step))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * training.student.state_dict()[name]
    torch.testing.assert_close(training.average[name], expected)


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
    runs = []
    backbone = {
        "embedding_size": 8,
        "hidden_sizes": [8],
        "depths": [1],
    }  # each stage more is seconds of the C++ compiler's
    for compiled in (False, True):
        options = (f"compute.compile={compiled}", "training.ema_decay=0.9")
        training = make_training(recipe({"backbone": backbone}, *options))
        values = [training.train_step(batch_of(2, 1, seed=seed))["total"].item() for seed in range(2)]
        runs.append((values, set(training.state())))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    assert runs[1][1] == runs[0][1]


# ---- distillation end to end


class FirstImages:
    """The first images of a dataset that have at most so many objects."""

    def __init__(self, dataset: CocoDataset, count: int, most_objects: int) -> None:
        self.source, self.source_sha256 = dataset.source, dataset.source_sha256
        self.categories, self.problems = dataset.categories, dataset.problems
        fitting = (sample for sample in dataset.samples() if 1 <= len(sample.category_ids) <= most_objects)
        self.chosen = list(itertools.islice(fitting, count))

    def __len__(self) -> int:
        return len(self.chosen)

    def samples(self) -> Iterator[Sample]:
        return iter(self.chosen)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not REAL.is_dir():
        pytest.skip(f"the COCO sample is not at {REAL}")
    folder = str(tmp_path_factory.mktemp("photographs"))
    dataset = read_coco(REAL / "annotations" / "instances_val2017.json", REAL / "val2017")
    write_shards(FirstImages(dataset, 8, 6), folder)
    return folder


def coco_slots(labels: tuple[str, ...]) -> list[str]:
    """91 slots as in COCO's heads, with the dataset's classes in another order and "N/A" between them."""
    slots = ["N/A"] * 91
    for index, label in enumerate(reversed(labels)):
        slots[index + 1 + index // 9] = label
    return slots


def photograph_batches(uri: str, epochs: int) -> list[TrainBatch]:
    """All eight photographs each step, for the teacher at another size."""
    schedule = Schedule(load_manifest(uri).shard_rows, (), 0, epochs, batch_size=8, window_images=8)
    stream = StreamConfig(uri, "", schedule, ViewConfig(), ResizeConfig(size=64), ResizeConfig(size=80))
    return [train_batch(share.arrays) for share in local_stream(stream)]


FAST = (
    *("training.learning_rate=2e-3", "training.backbone_learning_rate_scale=1.0", "training.clip_norm=1.0"),
    *("training.schedule=constant", "detection.dense_weight=1.0"),
)


def teach(teacher: OnlineTeacher, batches: list[TrainBatch], labels: tuple[str, ...]) -> None:
    """Train it on the photographs, in its own class order, so that it knows something."""
    config = recipe(None, *FAST, "distillation.method=none")
    teacher.detector.requires_grad_(True)
    training = Training(config, teacher.detector, None, len(batches), torch.device("cpu"))
    for batch in batches:
        targets = replace(batch.targets, labels=teacher.get_buffer("class_slots")[batch.targets.labels])
        training.train_step(replace(batch, images=batch.teacher_images, sizes=batch.teacher_sizes, targets=targets))
    training.check_finite()
    teacher.detector.eval().requires_grad_(False)


@pytest.mark.parametrize(("teacher_family", "student_family"), [("conditional", "refined"), ("refined", "conditional")])
def test_distillation_lowers_every_term(photographs: str, teacher_family: str, student_family: str) -> None:
    labels = load_manifest(photographs).labels
    slots = coco_slots(labels)
    assert slots.count("N/A") == 11
    teacher = random_teacher(teacher_family, labels, slots)
    assert teacher.detector.num_queries != STUDENT["queries"]
    assert teacher.memory_channels[0] != STUDENT["width"]
    assert teacher.get_buffer("class_slots").tolist() == [slots.index(label) for label in labels]
    batches = photograph_batches(photographs, 30)
    teach(teacher, batches, labels)
    training = make_training(recipe(FAMILIES[student_family], *FAST), teacher, len(batches), labels)
    rows = [training.train_step(batch) for batch in batches]
    training.check_finite()
    assert {"agfd", "lapd_class", "lapd_l1", "lapd_giou", "class_0", "l1", "dense_giou"} <= rows[0].keys()
    first, last = (
        {name: float(np.mean([row[name].item() for row in part])) for name in rows[0]} for part in (rows[:5], rows[-5:])
    )
    assert {name: (first[name], last[name]) for name in first if not 0 <= last[name] < first[name]} == {}


def test_a_teacher_s_hard_negatives_are_aligned_beyond_its_positives() -> None:
    counted = {}
    for name, boundaries in (("with", [-0.9]), ("without", [0.99])):
        selection = {"boundaries": boundaries, "band_weights": [0.0, 1.0]}
        config = recipe(None, distillation={"selection": selection})
        training = make_training(config, random_teacher())
        batch = batch_of(2, 1)
        record = training._ask_teacher(batch)
        terms = training.module.forward(batch.images, batch.sizes, batch.targets, record)
        counted[name] = terms["lapd_class"].count.item()
    assert counted["without"] == 3  # the positives alone
    assert counted["with"] > 6


def test_labels_of_the_student_are_the_dataset_s() -> None:
    assert make_training(recipe(), random_teacher()).student.labels == LABELS
