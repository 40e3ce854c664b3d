"""A dry run of a training says how long it will take, from steps that it tried; what can't be tried has a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pipelines
from pipelines.cli import app
from pipelines.run.resolve import resolve
from pipelines.training import estimate as module
from pipelines.training import plan as planning
from pipelines.training.estimate import Estimate, estimate, foresee_time
from pipelines.training.plan import Plan, make_plan
from qskd.config.recipe import load

TEACHER = Path(pipelines.__file__).parent / "assets" / "shapes_teacher"
SIZES = [
    "student.backbone={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}",
    *(f"student.{name}={value}" for name, value in {"width": 32, "encoder_layers": 1, "decoder_layers": 2}.items()),
    *("student.heads=4", "student.ffn_width=32", "student.queries=8", "student.resize.size=64"),
]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUDGET_S", 0.2)


def plan_of(folder: Path, verb: str, *overrides: str) -> Plan:
    fields = [f"data.train={folder}/train", f"data.val={folder}/val", "training.batch_size=2", "training.epochs=3"]
    return make_plan(resolve(load(None, [*SIZES, *fields, *overrides]), verb), verb, dry=True)


def test_steps_and_evaluations_are_added_up_and_what_was_assumed_is_said(here: Path) -> None:
    plan = plan_of(here, "train", "training.evaluate_every_epochs=2")
    schedule = plan.stream.schedule
    found = Estimate(0.5, 0.1, 0.25, images=2, steps=4, device="cpu", threads=1).describe(plan)
    evaluation_s = 0.25 * plan.val.num_images
    total_s = 0.5 * schedule.total_steps + 2 * evaluation_s  # after the second epoch and after the last
    assert found.startswith(f"time: about {total_s:.0f} s: {schedule.total_steps} steps of 500 ms are ")
    assert f"2 evaluations of {plan.val.num_images} images take {evaluation_s:.0f} s each" in found
    assert "tried here on cpu, 1 thread(s): 4 step(s) of 500 ms on 2 images" in found
    slow_readers = Estimate(0.5, 2.0, 0.25, images=2, steps=4, device="cpu", threads=1).describe(plan)
    assert "steps of 2000 ms" in slow_readers  # training waits for its batches


def test_what_readers_may_hold_of_all_data_is_held_against_the_memory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "too_much_for", lambda *asked: [f"asked: {asked}"])
    monkeypatch.setattr(planning, "memory_bytes", lambda: 77)
    plan = plan_of(here, "train")
    stored = sum(shard.bytes for shard in plan.train.shards)
    assert f"asked: ({stored}, 4096, 77)" in plan.data_notices


def test_with_several_workers_it_is_said_how_their_time_was_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.training.estimate.cores", lambda: 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    plan = plan_of(here, "train", "compute.workers=2", "compute.loader_workers=2")
    measured = estimate(plan)
    assert measured.images == 1  # of two
    found = measured.describe(plan)
    assert "one of 2 workers was tried, with its 1 of 2 images" in found
    assert f"{2 * measured.threads} times as long as tried: 2 workers share 1 cores" in found


@pytest.mark.parametrize("cache", ["", "teacher.cache.path=no-cache-yet"])
@pytest.mark.parametrize("verb", ["train", "distill"])
def test_real_steps_are_tried_with_and_without_a_teacher_and_leave_no_trace(
    verb: str, cache: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    plan = plan_of(here, verb, f"teacher.path={TEACHER}", *([cache] if cache and verb == "distill" else []))
    threads, state, there = torch.get_num_threads(), torch.random.get_rng_state(), sorted(here.rglob("*"))
    found = estimate(plan)
    assert found.steps >= 1
    assert min(found.step_s, found.read_s, found.evaluate_image_s) > 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sorted(here.rglob("*")) == there


def test_what_cannot_be_tried_here_has_a_reason_and_the_plan_stands(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(here, "train")
    stored = plan.config.model_copy(update={"data": plan.config.data.model_copy(update={"train": "s3://bucket/train"})})
    assert module.reason_not_to_try(stored) == "data.train is in a store, and not on this machine"
    if not torch.cuda.is_available():
        on_gpus = plan_of(here, "train", "compute.device=cuda")
        assert foresee_time(on_gpus) == "time: not known: compute.device is cuda, and there is no GPU here"
    for shard in (here / "train").glob("*.parquet"):
        shard.write_bytes(b"damaged")
    assert foresee_time(plan).startswith("time: not known: a step was refused here:\n")


def test_a_dry_run_shows_what_differs_from_the_defaults_first_and_all_fields_when_asked(
    here: Path, tmp_path: Path
) -> None:
    fields = [*SIZES, f"data.train={here}/train", f"data.val={here}/val", f"output={tmp_path}", "training.batch_size=2"]
    command = ["train", "--dry-run", *(word for field in fields for word in ("--set", field))]
    short, whole = (CliRunner().invoke(app, [*command, *more]) for more in ([], ["--all-fields"]))
    assert (short.exit_code, whole.exit_code) == (0, 0), short.output + whole.output
    assert short.output.startswith("# what differs from the defaults (every field: --all-fields)\n")
    assert "batch_size: 2" in short.output
    assert "learning_rate:" not in short.output  # the default's
    assert "learning_rate:" in whole.output
    assert re.search(r"^time: about \d+ \w+: \d+ steps of \d+ ms", short.output, re.M)
    refused = CliRunner().invoke(app, ["train", "--all-fields", *command[2:]])
    assert "--all-fields: has no effect without --dry-run" in str(refused.exception)


def test_a_dry_run_of_cache_shows_what_differs_too(here: Path, tmp_path: Path) -> None:
    fields = [f"data.train={here}/train", f"teacher.path={TEACHER}", f"teacher.cache.path={tmp_path}/cache"]
    done = CliRunner().invoke(app, ["cache", "--dry-run", *(word for field in fields for word in ("--set", field))])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("# what differs from the defaults")
    assert "learning_rate:" not in done.output
    assert "tried here on" in done.output


def test_a_dry_run_of_evaluate_says_how_long_it_takes_or_why_not(here: Path) -> None:
    def said(*words: str) -> str:
        done = CliRunner().invoke(app, ["evaluate", *words, "--dry-run"])
        assert done.exit_code == 0, done.output
        return done.output

    assert re.search(
        r"^time: about \d+ s: [\d.]+ ms an image, tried here on cpu", said(str(TEACHER), f"{here}/val"), re.M
    )
    assert "time: not known: it could not be tried here" in said(f"{here}/model", f"{here}/val")  # other classes
