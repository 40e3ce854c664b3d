"""A sweep that can't work is refused with the reason, and the plan of one that can adds up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_loader import Pictures
from test_search_spaces import own_space
from test_unlabeled_shards import draw, shards
from tiny import recipe, silent_student

from pipelines.tuning import driver
from pipelines.tuning.calibration import Calibration, calibrate
from pipelines.tuning.driver import TuneRequest, plan_without_cache, with_effective_epochs
from pipelines.tuning.plan import TunePlan, halving_epochs, make_tune_plan
from pipelines.tuning.search.request import Search, SearchRequest, check_request
from qskd.config import Config, StudentConfig
from qskd.config.recipe import load, replace_fields
from qskd.datasets.shards import write_shards
from qskd.detectors import save_detector
from qskd.errors import QskdError

NAMES = ("three", "eight", "nine")
MEASURED = Calibration(
    cached_step_s=0.1,
    online_step_s=0.3,
    teacher_image_s=0.02,
    evaluate_image_s=0.01,
    cached_bytes=1000.0,
    stored_bytes=1500.0,
    device="cpu",
)


def request(*spaces: str, **changes: Any) -> SearchRequest:
    return SearchRequest(spaces or ("query_selection",), **changes)


def epochs(count: int, every: int = 1) -> Config:
    return load(None, [f"training.epochs={count}", f"training.evaluate_every_epochs={every}"])


# ---- what may be asked for


def test_defaults_are_tpe_with_early_stopping_for_ap() -> None:
    search = check_request(request(), epochs(18))
    assert (search.algorithm, search.objectives, search.modes) == ("tpe", ("AP",), ("max",))
    assert (search.asha, search.grace_epochs, search.reduction) == (True, 2, 3)
    assert check_request(request(algorithm="random", asha=False), epochs(18)).asha is False
    assert check_request(request(), epochs(18, every=5)).grace_epochs == 5
    assert check_request(request(grace_epochs=4), epochs(18)).grace_epochs == 4


def test_early_stopping_is_on_only_where_it_helps() -> None:
    assert not check_request(request(), epochs(1)).asha
    assert not check_request(request(), epochs(4, every=4)).asha
    assert not check_request(request(trials=1), epochs(4)).asha
    both = ("AP", "parameters_m")
    assert not check_request(request("student_architecture", objectives=both), epochs(9)).asha
    assert check_request(request("student_architecture", objectives=both, asha=True), epochs(9)).asha
    assert not check_request(request("loss_weights", algorithm="pbt"), epochs(9)).asha


def test_bits_change_the_size_and_no_other_cost() -> None:
    assert check_request(request("quantization", objectives=("AP", "size_mb")), epochs(9)).modes == ("max", "min")
    for cost in ("latency_ms", "parameters_m"):
        with pytest.raises(QskdError, match="bits alone change size_mb"):
            check_request(request("quantization", objectives=("AP", cost)), epochs(9))


def test_two_objectives_have_their_directions() -> None:
    for cost in ("latency_ms", "parameters_m", "size_mb"):
        search = check_request(request("student_architecture", objectives=("AP", cost)), epochs(9))
        assert search.modes == ("max", "min")
        assert f"AP against {cost}" in search.describe()


@pytest.mark.parametrize(
    ("asked", "config", "words"),
    [
        (request(algorithm="grid"), epochs(9), ["--algorithm: grid", "tpe, random, pbt"]),
        (request(trials=0), epochs(9), ["--trials: 0", "1 or more"]),
        (request("loss_weights", algorithm="pbt", trials=1), epochs(9), ["--trials: 1", "2 or more, a population"]),
        (request(objectives=()), epochs(9), ["--objective: none", "AP alone"]),
        (request(objectives=("latency_ms",)), epochs(9), ["--objective: latency_ms"]),
        (request(objectives=("AP", "AP")), epochs(9), ["AP, AP"]),
        (request(objectives=("AP", "latency_ms", "parameters_m")), epochs(9), ["AP against one of"]),
        (request(objectives=("AP", "latency_ms")), epochs(9), ["same for all trials", "student_architecture"]),
        (
            request("student_architecture", algorithm="pbt"),
            epochs(9),
            [
                "--algorithm pbt",
                "student_architecture: it changes shapes",
                "loss_weights",
                "leave out --space student_a",
            ],
        ),
        (
            request("loss_weights", "query_selection", algorithm="pbt"),
            epochs(9),
            ["query_selection: PBT moves each number"],
        ),
        (request("loss_weights", algorithm="pbt", asha=True), epochs(9), ["both decide which trials go on"]),
        (
            request("loss_weights", algorithm="pbt"),
            replace_fields(epochs(9), {"compute.workers": 2}, "test"),
            ["--algorithm pbt: compute.workers = 2", "--algorithm tpe"],
        ),
        (
            request("loss_weights", algorithm="pbt"),
            load(None, ["training.patience=2"]),
            ["training.patience = 2", "members that all train to the end"],
        ),
        (request("loss_weights", algorithm="pbt"), epochs(3, every=3), ["the first AP comes at the end"]),
        (
            request("loss_weights", algorithm="pbt", objectives=("AP", "latency_ms")),
            epochs(9),
            ["same for all trials"],
        ),
        (request(asha=True), epochs(1), ["--asha: 1 epoch(s)", "evaluate_every_epochs=1"]),
        (request(grace_epochs=9), epochs(9), ["--grace-epochs: 9", "1 to 8"]),
        (request("query_select"), epochs(9), ["did you mean query_selection?"]),
        (request("student_architecture", "student_architecture"), epochs(9), ["given twice"]),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(asked: SearchRequest, config: Config, words: list[str]) -> None:
    with pytest.raises(QskdError) as caught:
        check_request(asked, config)
    for word in words:
        assert word in str(caught.value)


def test_a_space_of_ones_own_may_change_in_training_only_if_it_says_so(tmp_path: Path) -> None:
    path = own_space(tmp_path)
    with pytest.raises(QskdError, match="mine: it does not say MAY_CHANGE_WHILE_TRAINING = True"):
        check_request(request(path, algorithm="pbt"), epochs(9))
    with open(path, "a") as file:
        file.write("MAY_CHANGE_WHILE_TRAINING = True\n")
    assert check_request(request(path, "loss_weights", algorithm="pbt"), epochs(9)).algorithm == "pbt"


# ---- the plan


@pytest.mark.parametrize(
    ("trials", "length", "grace", "expected"),
    [
        (9, 9, 1, 9 * (1 + 2 / 3 + 6 / 9)),  # all to 1, three to 3, one to 9
        (27, 4, 1, 27 * (1 + 2 / 3 + 1 / 9)),
        (1, 9, 1, 9),  # someone reaches the end
        (5, 9, 9, 45),
        (4, 2, 1, 4 * (1 + 1 / 3)),
    ],
)
def test_halving_trains_what_its_rungs_let_through(trials: int, length: int, grace: int, expected: float) -> None:
    assert halving_epochs(trials, length, grace, 3) == pytest.approx(expected)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_shards(Pictures(22), str(root / "train"), rows_per_shard=8, rows_per_group=3)
    write_shards(Pictures(9), str(root / "val"), rows_per_shard=8, rows_per_group=3)
    sizes = StudentConfig.model_validate(
        {**recipe().student.model_dump(), "width": 64, "decoder_layers": 3, "queries": 9}
    )
    save_detector(silent_student(sizes, NAMES, seed=7).eval(), root / "teacher", sizes.resize)
    return root


def sweep_config(work: Path, *overrides: str) -> Config:
    fixed = [
        *(f"data.train={work}/train", f"data.val={work}/val", f"teacher.path={work}/teacher"),
        *("training.batch_size=4", "training.epochs=9", "data.views.count=2"),
    ]
    return recipe(None, *fixed, *overrides, teacher={"cache": {"path": f"{work}/none", "attention_giou_floor": -1.0}})


def plan_of(work: Path, *overrides: str, **changes: Any) -> TunePlan:
    config = sweep_config(work, *overrides)
    search: Search = check_request(request(**{"trials": 9, **changes}), config)
    return make_tune_plan(config, search, MEASURED)


def test_early_stopping_counts_the_epochs_that_the_most_steps_leave(work: Path) -> None:
    short = sweep_config(work, "training.max_steps=7")  # five steps an epoch
    found = with_effective_epochs(short, plan_without_cache(short))
    assert found.training.epochs == 2
    assert check_request(request(), found).grace_epochs == 1
    with pytest.raises(QskdError, match="--grace-epochs: 5"):
        check_request(request(grace_epochs=5), found)
    whole = sweep_config(work)
    assert with_effective_epochs(whole, plan_without_cache(whole)) == whole


def test_a_plan_adds_up(work: Path) -> None:
    plan = plan_of(work, asha=False)
    steps, one, val = 9 * 9 * 5, plan.train.shards, plan.val.shards
    train_bytes, val_bytes = sum(s.bytes for s in one), sum(s.bytes for s in val)
    assert (plan.most_epochs, plan.likely_epochs) == (81, 81)
    online, cached = plan.cost(cached=False), plan.cost(cached=True)
    evaluating = 81 * 9 * 0.01
    assert online.accelerator_s == pytest.approx(steps * 0.3 + evaluating)
    assert cached.accelerator_s == pytest.approx(steps * 0.1 + evaluating + 22 * 2 * 0.02)
    assert online.bytes_read == pytest.approx(steps * 4 * train_bytes / 22 + 81 * val_bytes)
    assert cached.bytes_read == pytest.approx(online.bytes_read + steps * 4 * 1000 + 2 * train_bytes)
    assert online.accelerator_hours == pytest.approx(online.accelerator_s / 3600)


def test_images_without_labels_are_counted_where_they_are_read_and_where_the_teacher_is_asked(work: Path) -> None:
    made = shards(draw(work / "pool", 6), work / "photos")
    plan = plan_of(work, f"data.unlabeled=[{work}/photos]", asha=False)
    labelled, photos = (sum(shard.bytes for shard in each.shards) for each in (plan.train, made))
    steps = 9 * 9 * (22 // 2)  # two of a batch's four are labelled
    assert plan.cost_of_cache().accelerator_s == pytest.approx((22 + 6) * 2 * 0.02)
    assert plan.cost_of_cache().bytes_read == pytest.approx(2 * (labelled + photos))
    read = plan.cost_of_trials(plan.most_epochs, cached=False).bytes_read
    evaluated = 81 * sum(shard.bytes for shard in plan.val.shards)
    assert read == pytest.approx(steps * 2 * (labelled / 22 + photos / 6) + evaluated)
    alone = plan_of(work, f"data.unlabeled=[{work}/photos]", "data.train=", asha=False)
    assert alone.cost_of_cache().accelerator_s == pytest.approx(6 * 2 * 0.02)


def test_early_stopping_and_a_cache_that_is_there_cost_less(work: Path) -> None:
    plan = plan_of(work)
    assert plan.likely_epochs == pytest.approx(9 * (1 + 2 / 3 + 6 / 9))
    assert plan.cost(True).accelerator_s < plan.cost(True, likely=False).accelerator_s
    there = replace(plan, missing=0, missing_bytes=0.0)
    assert there.cost_of_cache().accelerator_s == 0
    assert there.cost(True).accelerator_s == pytest.approx(plan.cost(True).accelerator_s - 22 * 2 * 0.02)
    fewer = plan_of(work, "training.evaluate_every_epochs=3", "training.max_steps=12", asha=False)
    assert fewer.trial_epochs == 12 / 5
    assert fewer.cost(False).accelerator_s == pytest.approx(9 * (12 * 0.3 + 12 / 5 * 9 / 3 * 0.01))


def test_the_plan_is_told_with_and_without_the_cache(work: Path) -> None:
    text = plan_of(work).describe()
    for words in (
        *("query_selection: 9 trials by tpe for AP, ASHA after 1 epoch(s); the first is the recipe",),
        *("epochs: 9 a trial, 81 in all; with ASHA about 21", "with the cache", "without it", "1 s, 66.0 kB"),
        *("accelerator-hours, with ASHA", "bytes read, at most, none stopped", "100 ms", "300 ms", "on cpu"),
    ):
        assert words in text
    plain = replace(plan_of(work, asha=False), missing=0, missing_bytes=0.0).describe()
    assert "ASHA" not in plain
    assert "is there" in plain


def test_a_calibration_measures_steps_and_bytes(work: Path) -> None:
    config = sweep_config(work)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    found = calibrate(config, budget_s=0.3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert 0 < found.cached_step_s < 10
    assert 0 < found.online_step_s < 10
    assert 0 < found.teacher_image_s < 10
    assert 0 < found.evaluate_image_s < 10
    # Logits float16 [9, 3], boxes float32 [9, 4]: the least there can be; memory int8 [64, 8, 8] comes on top.
    assert found.cached_bytes > 9 * 3 * 2 + 9 * 4 * 4 + 64 * 64
    assert found.stored_bytes >= found.cached_bytes
    lean = replace_fields(config, {"distillation.features.weight": 0.0}, "test")
    assert calibrate(lean, budget_s=0.01).cached_bytes < 9 * 3 * 2 + 9 * 4 * 4 + 100
    two = Calibration.mean([found, replace(found, cached_step_s=3 * found.cached_step_s)])
    assert (two.students, two.cached_step_s) == (2, pytest.approx(2 * found.cached_step_s))


@pytest.mark.parametrize(
    "overrides",
    [
        ["teacher.resize.size=96"],
        ["compute.workers=2", "distillation.predictions.teacher_layers=same_index"],
        ["distillation.features.attention_layers=mean", "distillation.selection.relative=true"],
    ],
)
def test_a_calibration_needs_no_cache_that_would_fit(overrides: list[str], work: Path) -> None:
    found = calibrate(sweep_config(work, *overrides), budget_s=0.01)
    assert min(found.cached_step_s, found.online_step_s) > 0


def test_a_calibration_without_data_or_distillation_says_what_is_missing(work: Path) -> None:
    with pytest.raises(QskdError, match=r"data\.train: empty"):
        calibrate(recipe())
    with pytest.raises(QskdError, match=r"distillation\.method: none"):
        calibrate(sweep_config(work, "distillation.method=none"))


def test_choices_that_change_are_refused_before_the_search_that_cannot_bear_them(tmp_path: Path) -> None:
    """Optuna's TPE raises an error, in the middle of the sweep, and again whenever it goes on."""
    (tmp_path / "heads.py").write_text(
        "FIELDS = ('student.heads', 'student.width')\n"
        "def recipe_point(config):\n    return {'width': 32, 'heads': 4}\n"
        "def suggest(trial, config):\n"
        "    width = trial.suggest_categorical('width', (32, 48))\n"
        "    heads = trial.suggest_categorical('heads', (2, 4) if width == 32 else (2, 4, 8))\n"
        "    return {'student.width': width, 'student.heads': heads}\n"
    )
    config = recipe(None, "training.epochs=9")
    with pytest.raises(QskdError, match=r"other choices at one time than at another: heads\.heads") as told:
        check_request(request(str(tmp_path / "heads.py")), config)
    assert "--algorithm random" in told.value.remedy
    assert check_request(request(str(tmp_path / "heads.py"), algorithm="random"), config).algorithm == "random"


@pytest.mark.parametrize("field", ["training.batch_size", "training.epochs"])
def test_a_population_refuses_what_would_give_its_members_steps_of_their_own(field: str, tmp_path: Path) -> None:
    name = field.rpartition(".")[2]
    (tmp_path / "length.py").write_text(
        f"FIELDS = ('{field}',)\nMAY_CHANGE_WHILE_TRAINING = True\n"
        f"def recipe_point(config):\n    return {{'n': config.training.{name}}}\n"
        f"def suggest(trial, config):\n    return {{'{field}': trial.suggest_int('n', 1, 64)}}\n"
    )
    with pytest.raises(QskdError, match=f"--algorithm pbt: {field} would give members"):
        check_request(request(str(tmp_path / "length.py"), algorithm="pbt"), epochs(9))
    assert check_request(request(str(tmp_path / "length.py")), epochs(9)).algorithm == "tpe"


def test_a_wrong_limit_on_parameters_is_told_before_anything_is_made(work: Path, tmp_path: Path) -> None:
    config = sweep_config(work, f"output={tmp_path}", "name=s", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    asked = TuneRequest(request("student_architecture"), at_most_parameters="0.1 M")
    for run in (driver.run, driver.foresee):
        with pytest.raises(QskdError, match=r"--at-most-parameters: 0\.1 M"):
            run(config, asked)
    assert not (tmp_path / "s").exists()  # the same command, corrected, is no other sweep


def test_the_recipe_is_timed_on_what_its_trials_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials' latencies are ratios, times this. A head without one asks a node with a GPU; trials of several workers hold none."""
    asked: list[tuple[str, Any]] = []

    def remote(**options: Any) -> Any:
        return lambda function: SimpleNamespace(remote=lambda *_: asked.append((function.__name__, options)) or 8.0)

    monkeypatch.setattr("ray.remote", remote)
    monkeypatch.setattr("ray.get", lambda found: found)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    monkeypatch.setattr(driver, "recipe_latency_ms", lambda config, labels, device: asked.append(("here", device.type)))
    for here, workers, expected in (
        ("cpu", 1, ("recipe_latency_there", {"num_gpus": 1})),
        ("cuda", 1, ("here", "cuda")),
        ("cuda", 2, ("here", "cpu")),
        ("cpu", 2, ("here", "cpu")),
    ):
        monkeypatch.setattr("pipelines.cluster.devices.device_here", lambda config, here=here: torch.device(here))
        driver._time_recipe(load(None, [f"compute.workers={workers}"]), ("a",))
        assert asked[-1] == expected
