"""The training's state: exactly again after a stop, and the moving average of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FULL, assert_equal, batch_of, full_training, make_training, random_teacher, recipe
from torch import Tensor


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
