"""The teacher's weight over a training: a function of the step alone, and by default falling over the second half."""

from __future__ import annotations

import pytest
import torch
from tiny import batch_of, make_training, random_teacher, recipe

from pipelines.run.folder import Folder
from pipelines.run.guards import check_same_run
from qskd.config import Config
from qskd.config.recipe import build, to_yaml
from qskd.distillation.qskd.settings import Settings
from qskd.distillation.shared.ramp import distillation_factor
from qskd.errors import QskdError
from qskd.training.step import Training


def factors(steps: int, **fields: float) -> list[float]:
    config = Settings.model_validate({"decay": 0.0} | fields)
    return [distillation_factor(step, steps, config) for step in range(steps)]


def test_weights_rise_to_one_and_fall_from_it() -> None:
    assert factors(5) == [1.0] * 5
    assert factors(10, warmup=0.4) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])
    assert factors(10, decay=0.4) == pytest.approx([*[1.0] * 7, 0.75, 0.5, 0.25])
    assert factors(10, warmup=0.2, decay=0.2) == pytest.approx([0.5, *[1.0] * 8, 0.5])
    assert factors(4, warmup=1.0) == [0.25, 0.5, 0.75, 1.0]
    assert factors(4, warmup=0.5, decay=0.5) == [0.5, 1.0, 1.0, 0.5]
    assert factors(3, warmup=0.01, decay=0.01) == [1.0] * 3


def test_by_default_weights_fall_over_the_second_half() -> None:
    config = Settings()
    assert [distillation_factor(step, 8, config) for step in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_a_ramp_longer_than_the_training_is_refused() -> None:
    with pytest.raises(QskdError, match=r"warmup 0\.6 and decay 0\.5 are more than the whole training"):
        build({"distillation": {"warmup": 0.6, "decay": 0.5}})
    with pytest.raises(QskdError, match=r"distillation\.warmup = -0\.1"):
        build({"distillation": {"warmup": -0.1}})


def training(**distillation: float) -> Training:
    config = recipe()
    changed = config.distillation.model_copy(update={"decay": 0.0} | distillation)
    return make_training(config.model_copy(update={"distillation": changed}), random_teacher(), total_steps=8)


def test_only_the_teachers_terms_are_weighed_down() -> None:
    module = training(warmup=0.5).module
    assert module.method is not None
    weights = module.weights_at(0, 8)
    assert weights.keys() == module.weights.keys()
    for name, weight in module.weights.items():
        assert weights[name] == (0.25 * weight if name in module.method.weights else weight)
    assert module.weights_at(3, 8) == module.weights


def test_without_a_ramp_the_total_is_what_it_was() -> None:
    module = training().module
    assert all(module.weights_at(step, 8) == module.weights for step in range(8))


def test_each_step_minimises_the_terms_at_that_steps_weights() -> None:
    taught = training(warmup=0.5, decay=0.25)
    for step in range(8):
        values = taught.train_step(batch_of(2, 1, seed=step))
        weights = taught.module.weights_at(step, 8)
        expected = sum(weights[name] * float(value) for name, value in values.items() if name != "total")
        assert float(values["total"]) == pytest.approx(expected, rel=1e-5)


def test_a_resumed_run_weighs_as_the_first_would_have() -> None:
    batches = [batch_of(2, 1, seed=number) for number in range(4)]
    whole, first = training(warmup=0.5, decay=0.25), training(warmup=0.5, decay=0.25)
    totals = [whole.train_step(batch)["total"] for batch in batches]
    for batch in batches[:2]:
        first.train_step(batch)
    resumed = training(warmup=0.5, decay=0.25)
    resumed.load_state(first.state(), 2)
    assert [resumed.train_step(batch)["total"] for batch in batches[2:]] == totals[2:]
    expected = whole.state()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state().items())
    plain = training()
    assert plain.train_step(batches[0])["total"] > totals[0]


def test_a_run_begun_before_a_field_was_known_goes_on(tmp_path: object) -> None:
    config = Config(output=str(tmp_path))
    folder = Folder(config)
    older = [line for line in to_yaml(config).splitlines() if line.strip() not in ("warmup: 0.0", "decay: 0.5")]
    folder.write("config.yaml", "\n".join(older))
    check_same_run(folder, config)
    changed = config.distillation.model_copy(update={"warmup": 0.1})
    with pytest.raises(QskdError, match=r"distillation\.warmup was 0\.0, is 0\.1"):
        check_same_run(folder, config.model_copy(update={"distillation": changed}))
