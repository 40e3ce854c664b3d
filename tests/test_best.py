"""The best checkpoint: kept across kills and resumes, delivered as the recipe says, and early stopping by it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from tiny import assert_equal, recipe

from pipelines.feed.stream import local_stream
from pipelines.inspection.evaluate import evaluate
from pipelines.reporting import choice
from pipelines.reporting.choice import choose
from pipelines.reporting.progress import TrackingCallback
from pipelines.run.best import RECORD, Best, keep_best, read_best
from pipelines.run.files import files_in
from pipelines.run.folder import Folder
from pipelines.run.history import add_report
from pipelines.run.ownership import claim, foreign
from pipelines.run.resolve import resolve
from pipelines.tracking.tracker import Tracker
from pipelines.training.checkpoint_list import LIST
from pipelines.training.checkpoints import read_state, restore, write_checkpoint
from pipelines.training.driver import finish, read_result
from pipelines.training.plan import make_plan
from pipelines.training.worker import Worker
from pipelines.tuning.finish import best_recipe
from pipelines.tuning.report.results import best_row
from pipelines.tuning.trial.alone import TrialWorker
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import build, to_tree
from qskd.deploy.model_card import read_card
from qskd.evaluation.average_precision import METRICS, CocoResult
from qskd.storage.models import model_place
from qskd.training.patience import Patience

WEIGHTS = "best/model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(Config(name="it", output=str(tmp_path)))


def checkpoint(folder: Folder, step: int) -> str:
    for name in ("config.json", "model.safetensors"):
        folder.write(f"train/checkpoint_{step}/student/{name}", f"of step {step}")
    return f"{folder.root}/train/checkpoint_{step}"


def reported(folder: Folder, step: int, ap: float | None) -> None:
    """A report and its checkpoint; without an evaluation where ap is None."""
    evaluation = {} if ap is None else {"evaluation": {"AP": ap}}
    keep_best(folder, {"step": step, **evaluation}, folder.filesystem, checkpoint(folder, step))


@pytest.mark.parametrize(
    ("aps", "kept"),
    [
        ([0.1, None, 0.3, 0.2, None], 3),
        ([0.3, 0.3], 1),  # of equal ones the earlier stays
        ([-1.0, None, -1.0], 3),  # nothing can be measured: the latest
        ([-1.0, 0.0, -1.0], 2),
    ],
)
def test_the_student_of_the_best_ap_is_kept_and_no_other(aps: list[float | None], kept: int, folder: Folder) -> None:
    for step, ap in enumerate(aps, 1):
        reported(folder, step, ap)
        reported(folder, step, ap)  # a controller that was begun again hears it twice
    assert folder.read(WEIGHTS) == f"of step {kept}"
    assert read_best(folder) == Best(kept, {"AP": aps[kept - 1]})
    claim(folder, "train", "it")
    inside = [name for name in files_in(folder) if not name.startswith("train/")]
    assert foreign(inside) == []  # --restart knows them


def test_a_best_student_that_was_half_written_is_not_taken_for_one(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported(folder, 1, 0.1)
    upload = Folder.upload

    def killed(self: Folder, local: Any, name: str) -> None:
        upload(self, local, name)
        self.write(WEIGHTS, "half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Folder, "upload", killed)
    with pytest.raises(KeyboardInterrupt):
        reported(folder, 2, 0.2)
    monkeypatch.undo()
    assert read_best(folder) is None
    reported(folder, 2, 0.2)
    assert folder.read(WEIGHTS) == "of step 2"
    assert read_best(folder) == Best(2, {"AP": 0.2})


@pytest.mark.parametrize(("last", "kept"), [(0.5, 20), (0.1, 10)])
def test_a_resume_takes_the_student_that_its_controller_had_no_time_for_and_loses_no_better_one(
    last: float, kept: int, folder: Folder, database: str
) -> None:
    add_report(folder, 10, 1, {"AP": 0.3}, [])
    reported(folder, 10, 0.3)
    checkpoint(folder, 20)
    said = {"step": 20, "epoch": 1, "evaluation": {"AP": last}, "rows": []}
    folder.write(
        LIST, json.dumps({"latest_checkpoint_result": {"metrics": said, "checkpoint_dir_name": "checkpoint_20"}})
    )
    for _ in range(2):
        TrackingCallback(Tracker(database, "0"), folder).catch_up(1)  # no such run: what is said of that stops nothing
        assert read_best(folder) == Best(kept, {"AP": max(last, 0.3)})
        assert folder.read(WEIGHTS) == f"of step {kept}"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_a_run_of_before_goes_on_and_says_which_better_student_was_not_kept(folder: Folder) -> None:
    for step, ap in ((10, 0.4), (20, 0.2), (30, 0.3)):
        add_report(folder, step, 1, {"AP": ap}, [])
    reported(folder, 30, 0.3)
    history = [{"step": step, "evaluation": {"AP": ap}} for step, ap in ((10, 0.4), (20, 0.2), (30, 0.3))]
    chosen = choose(Config(), Best(40, {"AP": 0.25}), read_best(folder), history, 40)
    assert (chosen.which, chosen.step, chosen.ap) == ("best", 30, 0.3)
    assert "0.400, after step 10; that student was not kept" in chosen.text
    assert choose(Config(), Best(40, {"AP": 0.25}), None, [], 40).which == "last"


def test_the_last_student_is_delivered_where_it_is_asked_for_or_as_good_and_the_best_is_named() -> None:
    asked = recipe(None, "training.result=last")
    chosen = choose(asked, Best(20, {"AP": 0.2}), Best(10, {"AP": 0.5}), [], 20)
    assert (chosen.which, chosen.step, chosen.ap) == ("last", 20, 0.2)
    assert "0.500, after step 10; that student is in best/" in chosen.text
    assert not chosen.early
    same = choose(Config(), Best(20, {"AP": 0.5}), Best(10, {"AP": 0.5}), [], 20)
    assert (same.which, same.text) == ("last", "The student of the last step, 20 (AP 0.500).")
    nothing = choose(Config(), Best(20, {"AP": -1.0}), Best(20, {"AP": -1.0}), [], 20)
    assert (nothing.which, nothing.text) == ("last", "The student of the last step, 20 (AP not measured).")


def test_a_runs_folder_without_a_student_yet_names_its_best(folder: Folder) -> None:
    claim(folder, "train", "it")
    reported(folder, 1, 0.1)
    with pytest.raises(Exception, match="no student yet") as error:
        model_place(folder.filesystem, folder.root, folder.path)
    assert "name best in it" in str(error.value)


# --- patience ---------------------------------------------------------------------------------------------------------
def result(ap: float) -> CocoResult:
    return CocoResult({**dict.fromkeys(METRICS, ap)}, {}, "pycocotools", SimpleNamespace())  # type: ignore[arg-type]


def test_patience_counts_evaluations_without_a_better_ap_and_none_that_measured_nothing() -> None:
    patience = Patience(2, 1)
    seen = []
    for ap in (0.1, 0.1, -1.0, 0.2, 0.15, -1.0, 0.2):
        patience.heard(result(ap))
        seen.append(patience.waited)
    assert seen == [0, 1, 1, 0, 1, 1, 2]
    assert patience.exhausted
    again = Patience(2, 1)
    again.load(json.loads(json.dumps(patience.state())), {})
    assert again.exhausted
    assert again.best_ap == 0.2
    before = Patience(2, 1)
    before.load({}, {"AP": 0.3})  # of a checkpoint that an older qskd wrote
    before.heard(result(0.25))
    assert (before.best_ap, before.waited) == (0.3, 1)
    assert not Patience(0, 1).exhausted


class Alone(Worker):
    """The house's worker on a stream without Ray; its checkpoints are kept by their steps."""

    def keep_in(self, place: Path) -> Alone:
        self.place = place
        return self

    def shares(self, start_step: int) -> Any:
        return local_stream(self.stream, start_step)

    def report(self, epoch: int, result: CocoResult | None) -> None:
        self.meter.flush()
        made = self.place / str(self.training.step)
        made.mkdir(parents=True)
        write_checkpoint(made, self.training, self.config, result, self.patience)


def still(here: Path, tmp_path: Path, *overrides: str) -> Config:
    """A recipe whose student stays as it is: no evaluation is better than the first."""
    data = [f"data.{split}={here / split}" for split in ("train", "val")]
    own = ["training.learning_rate=1e-12", "training.epochs=6", f"output={tmp_path}/runs", "training.batch_size=4"]
    return resolve(recipe(None, *data, *own, *overrides), "train")


def stored(place: Path) -> Any:
    from ray.train import Checkpoint

    return Checkpoint(str(place))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_training_stops_when_its_patience_is_over_and_a_resumed_one_no_later(
    ema: float, tiny_folders: Path, tmp_path: Path
) -> None:
    config = still(tiny_folders, tmp_path, "training.patience=2", f"training.ema_decay={ema}")
    plan = make_plan(config, "train")
    per_epoch = plan.stream.schedule.steps_per_epoch
    whole = Alone(config, plan.stream, 1, 0).keep_in(tmp_path / "whole")
    whole.run(0)
    assert whole.training.step == 3 * per_epoch < plan.stream.schedule.total_steps
    assert whole.details is None
    resumed = Alone(config, plan.stream, 1, 0).keep_in(tmp_path / "resumed")
    resumed.run(restore(resumed.training, stored(tmp_path / "whole" / str(2 * per_epoch)), resumed.patience))
    assert resumed.training.step == whole.training.step
    ended = Alone(config, plan.stream, 1, 0).keep_in(tmp_path / "ended")
    ended.run(restore(ended.training, stored(tmp_path / "whole" / str(3 * per_epoch)), ended.patience))
    assert not (tmp_path / "ended").exists()  # killed before it was finished: no step more


def test_a_student_is_not_evaluated_before_all_of_it_is_quantised_that_is_to_be(
    tiny_folders: Path, tmp_path: Path
) -> None:
    bits = "student.quantization={bits: w4a4, rest_from: 0.4}"
    config = still(tiny_folders, tmp_path, "training.epochs=4", "distillation.method=none", bits)
    plan = make_plan(config, "train")
    per_epoch = plan.stream.schedule.steps_per_epoch
    worker = Alone(config, plan.stream, 1, 0).keep_in(tmp_path / "whole")
    worker.run(0)
    students = {int(path.name): (path / "student").is_dir() for path in (tmp_path / "whole").iterdir()}
    assert students == {per_epoch: False, 2 * per_epoch: True, 3 * per_epoch: True, 4 * per_epoch: True}
    assert (tmp_path / "whole" / str(4 * per_epoch) / "student" / "quantization.safetensors").is_file()
    resumed = Alone(config, plan.stream, 1, 0).keep_in(tmp_path / "resumed")
    resumed.run(restore(resumed.training, stored(tmp_path / "whole" / str(per_epoch)), resumed.patience))
    assert_equal(resumed.training.state(), worker.training.state())


def test_a_trial_whose_patience_is_over_has_come_to_its_end(tiny_folders: Path, tmp_path: Path) -> None:
    config = still(tiny_folders, tmp_path, "training.patience=1", "name=trial")
    plan, folder, sent = make_plan(config, "train"), Folder(config), list[dict[str, Any]]()
    job = Job(0, to_tree(config))
    for _ in range(2):  # the second finds it ended
        worker = TrialWorker(job, plan, folder, sent.append)
        worker.run(worker.start())
        assert [(report["epochs"], report["last"]) for report in sent] == [(1.0, False), (2.0, True)]


def test_a_sweep_ranks_by_the_best_evaluation_and_its_winner_trained_again_delivers_that_one(tmp_path: Path) -> None:
    own = {"parameters": {}, "overrides": {"training.learning_rate": 2e-4}, "state": "finished"}
    rows = [
        TrialRow(number=at, curve=curve, **own) for at, curve in enumerate((((1, 0.3), (2, 0.4)), ((1, 0.5), (2, 0.2))))
    ]
    winner = best_row(rows)
    assert winner is rows[1]
    assert winner.best_ap == 0.5
    again = build(yaml.safe_load(best_recipe(Config(output=str(tmp_path)), winner)))
    assert (again.training.result, again.training.learning_rate) == ("best", 2e-4)


# --- the result -------------------------------------------------------------------------------------------------------
def test_a_finished_run_delivers_its_best_student_and_says_so_everywhere(
    tiny_folders: Path, tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        choice, "evaluate", lambda *a, **k: asked.append(k) or evaluate(*a, **{**k, "workers": 0})
    )  # without Ray
    own = ["training.learning_rate=1e-3", "training.patience=1", "name=done", "compute.evaluation_precision=bfloat16"]
    config = still(tiny_folders, tmp_path, *own, f"tracking.uri={database}")
    plan, folder = make_plan(config, "train"), Folder(config)
    claim(folder, "train", "done")
    tracker = Tracker.open(config, "train")
    tracking = TrackingCallback(tracker, folder)
    worker = Alone(config, plan.stream, 1, 0)
    for step, ap in ((1, 0.5), (2, 0.25)):
        worker.training.step = step
        with_step = tmp_path / f"checkpoint-{step}"
        with_step.mkdir()
        for parameter in worker.training.student.parameters():
            parameter.data += 0.01
        worker.patience.heard(result(ap))
        write_checkpoint(with_step, worker.training, config, result(ap), worker.patience)
        said = {"step": step, "epoch": 0, "rows": [(step, {"loss/total": 1.0})], "evaluation": dict(result(ap).metrics)}
        said["evaluations_since_best"] = worker.patience.waited
        tracking.after_report(None, [said], stored(with_step))
    done = finish(plan, folder, tracker, SimpleNamespace(error=None, checkpoint=stored(tmp_path / "checkpoint-2")), 1.0)
    assert (done.which, done.step, done.ap) == ("best", 1, 0.5)
    assert read_result(folder) == done
    (how,) = asked  # the details are of an evaluation as the training's are
    assert (how["precision"], how["batch_size"]) == ("bfloat16", config.training.batch_size)
    delivered = load_file(f"{done.student}/model.safetensors")
    expected = load_file(tmp_path / "checkpoint-1/student/model.safetensors")
    assert all(delivered[name].equal(expected[name]) for name in expected)
    assert (tmp_path / "runs/done/best/model.safetensors").read_bytes() == (
        tmp_path / "checkpoint-1/student/model.safetensors"
    ).read_bytes()
    card = read_card(done.student)
    assert card is not None
    assert card.chosen is not None
    assert (card.chosen.which, card.chosen.step, card.chosen.best_step) == ("best", 1, 1)
    text = Path(done.student, "README.md").read_text()
    assert "The student of the best AP on the validation images, after step 1 (AP 0.500)" in text
    assert f"stopped early, after step 2 of {plan.stream.schedule.total_steps}" in text
    assert "## Classes" in text  # of the very student
    import mlflow

    run = mlflow.MlflowClient(tracker.uri).get_run(tracker.run_id)
    assert run.data.tags["qskd.student"] == "best, step 1"
    assert "stopped early" in run.data.tags["qskd.stopped_early"]
    assert run.data.metrics["best/AP"] == 0.5
    assert run.data.metrics["best/evaluations_since"] == 1.0
    assert run.data.params["training.patience"] == "1"
    assert read_state(tmp_path / "checkpoint-2")["patience"] == {"best_ap": 0.5, "waited": 1}


def test_the_record_goes_before_the_files_that_it_names_change(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    reported(folder, 1, 0.1)
    seen: list[bool] = []
    upload = Folder.upload

    def looked_at(self: Folder, local: Any, name: str) -> None:
        seen.append(self.exists(RECORD))
        upload(self, local, name)

    monkeypatch.setattr(Folder, "upload", looked_at)
    reported(folder, 2, 0.2)
    assert seen == [False]
    assert folder.exists(RECORD)
