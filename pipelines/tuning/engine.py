"""Ray Tune's side of a sweep: it starts the trials where there is room, passes reports on and stops the trials that ASHA rejects.

What to try, what is known and what is written down is the sweep's (`pipelines.tuning.sweep`); Tune is asked for nothing that has to
survive the driver. So its own saved state is left alone: a sweep that goes on makes a new Tuner for the trials that remain.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import ray
from ray import PlacementGroupID, tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipelines.cluster.devices import uses_gpu
from pipelines.cluster.environment import VERBOSE
from pipelines.tuning.search.request import Search
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config

log = logging.getLogger("qskd")


class Conductor(Protocol):
    """The sweep, as Tune's hooks see it. All are called in the driver's one thread."""

    def next_job(self) -> Job | str | None:
        """The next trial to start; None: not now; Searcher.FINISHED: there is nothing left to start."""

    def heard(self, number: int, report: dict[str, Any], stop: bool) -> None:
        """A report, and whether the trial is stopped for it."""

    def ended(self, number: int) -> None:
        """The trial's function returned, or it was stopped."""

    def lost(self, number: int) -> None:
        """Its process died more often than is borne."""

    def has_given_up(self) -> bool:
        """Whether all is to be stopped."""


class SweepSearcher(Searcher):
    """Passes on the sweep's jobs, as many at a time as it gives."""

    def __init__(self, conductor: Conductor) -> None:
        super().__init__()
        self.conductor = conductor

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        job = self.conductor.next_job()
        return {"number": job.number, "job": job.to_json()} if isinstance(job, Job) else job

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The scheduler hears of it, with the trial."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: see the module's head."""


class SweepScheduler(FIFOScheduler):
    """First come, first served; ASHA says who is stopped. Every report is with the sweep before Tune acts on it.

    ASHA is Ray's. It is told of the trials by their numbers, and of all that earlier drivers heard, in the order of the
    trials (its rungs are sets of results: the order makes no difference); what it said to those was acted on then.

    reuse: a trial's process trains the next. Otherwise a stopped trial's is killed at once (`_release`).
    """

    def __init__(
        self, conductor: Conductor, asha: AsyncHyperBandScheduler | None, past: Sequence[TrialRow], reuse: bool = True
    ) -> None:
        super().__init__()
        self.conductor, self.asha, self.reuse = conductor, asha, reuse
        self.known: set[int] = set()
        self.stopped: set[int] = set()
        self.held: dict[int, dict[str, str]] = {}
        for row in past:
            for epochs, ap in row.curve:
                self._ask(row.number, epochs, ap)

    def _ask(self, number: int, epochs: float, ap: float) -> bool:
        """Whether ASHA would stop the trial."""
        if self.asha is None:
            return False
        trial = SimpleNamespace(trial_id=str(number))
        if number not in self.known:
            self.known.add(number)
            self.asha.on_trial_add(None, trial)
        decision = self.asha.on_trial_result(None, trial, {"epochs": epochs, "AP": ap})
        return bool(decision == TrialScheduler.STOP)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number, report = trial.config["number"], json.loads(result["report"])
        metrics = report.get("metrics")
        stop = bool(metrics) and self._ask(number, report["epochs"], metrics["AP"]) and not report["last"]
        self.held[number] = report.pop("held", {})
        self.conductor.heard(number, report, stop)
        if stop:
            self.stopped.add(number)
        return str(TrialScheduler.STOP if stop else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        number = trial.config["number"]
        if number in self.stopped:
            self._release(trial)
        self.conductor.ended(number)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._release(trial)

    def _release(self, trial: Any) -> None:
        """End a trial of several workers: its process, Ray Train's controller, and the placement group of its workers.

        Asked to leave, the process would wait for its training to end, until Tune kills it ten seconds later. In either case
        Ray keeps the workers' placement group for as long as the driver lives, unless it runs a dashboard. The controller goes
        first: one that sees its workers go starts others, in a new group that nobody would give back.
        """
        if self.reuse:
            return
        held = self.held.pop(trial.config["number"], {})
        if held.get("placement_group"):
            end_controller(ray.cloudpickle.loads(bytes.fromhex(held["controller"])))
        if trial.temporary_state.ray_actor is not None:
            ray.kill(trial.temporary_state.ray_actor)
        if held.get("placement_group"):
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(held["placement_group"]))))


def end_controller(controller: Any, timeout_s: float = 10.0) -> None:
    """Let Ray Train's controller end its workers, give back their placement group and leave; kill it if it does not.

    A kill alone is not enough. Ray calls a killed actor dead before its process is: on a busy machine the process lives on for
    seconds, sees its workers go, and starts others.
    """
    try:
        ray.get(controller.abort.remote(), timeout=timeout_s)
    except ray.exceptions.RayActorError:
        return  # it has left, or somebody else ended it
    except ray.exceptions.GetTimeoutError:
        log.warning("a trial's controller did not leave within %g s: it is killed", timeout_s)
    ray.kill(controller)


class LostTrials(tune.Callback):
    """A scheduler hears of every process that died; a callback of those that are not started again."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.conductor.lost(trial.config["number"])


class GivenUp(tune.Stopper):
    """Ends all trials, as Ctrl-C does, once the sweep has given up."""

    def __init__(self, conductor: Conductor) -> None:
        self.conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.conductor.has_given_up()


def make_asha(search: Search, epochs: float) -> AsyncHyperBandScheduler | None:
    if not search.asha:
        return None
    return AsyncHyperBandScheduler(
        time_attr="epochs",
        metric="AP",
        mode="max",
        max_t=max(math.ceil(epochs), search.grace_epochs),
        grace_period=search.grace_epochs,
        reduction_factor=search.reduction,
    )


def trials_at_once(config: Config, nodes: Sequence[dict[str, float]]) -> int:
    """How many trials fit on these nodes (resources by Ray's names): at least one, that a sweep may wait for its first."""
    compute = config.compute
    there = [{name: node.get(name, 0.0) for name in ("CPU", "GPU")} for node in nodes]
    total = {name: sum(node[name] for node in there) for name in ("CPU", "GPU")}
    gpu, threads = uses_gpu(config, total), max(1, compute.threads_per_worker)
    if compute.workers == 1:
        fits = sum(int(min(node["GPU"], node["CPU"]) if gpu else node["CPU"] // threads) for node in there)
    elif gpu:
        readers = compute.workers * max(1, compute.loader_workers)
        fits = int(min(total["GPU"] // compute.workers, total["CPU"] // readers))
    else:
        fits = int(total["CPU"] // (compute.workers + 1))  # the readers of a training share one CPU
    return max(1, fits)


def trial_resources(config: Config, gpu: bool) -> dict[str, float]:
    """What Tune holds for a trial: a one-worker trial trains in it; another asks for its workers itself."""
    if config.compute.workers > 1:
        return {"CPU": 0.01}  # Tune takes no 0
    return {"CPU": 1, "GPU": 1} if gpu else {"CPU": max(1, config.compute.threads_per_worker)}


@contextlib.contextmanager
def tunes_handlers() -> Iterator[Callable[[], bool]]:
    """Around Tune's run, which takes the signals and leaves its handlers behind: the next Ctrl-C would do nothing. Gives a function
    that says whether a signal has ended the run: Tune's handler, once called, puts the one before it back."""
    if threading.current_thread() is not threading.main_thread():  # where Tune sets none
        yield lambda: False
        return
    numbers = [signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield lambda: signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_tuner(
    conductor: Conductor, config: Config, search: Search, epochs: float, past: Sequence[TrialRow], folder: str
) -> bool:
    """Run until the sweep has nothing left to start and all have ended, or it gives up, or until Ctrl-C: whether a signal ended
    it. folder: for Tune's own files."""

    def trial(config: dict[str, Any]) -> None:
        # Pickled by value, with its imports inside: the driver's own modules stay out of it.
        from ray import tune

        from pipelines.tuning.trial.job import Job
        from pipelines.tuning.trial.run import run_trial

        run_trial(Job.from_json(config["job"]), lambda report: tune.report({"report": json.dumps(report)}))

    if not VERBOSE:  # it would advise to go on with Tuner.restore
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    one = config.compute.workers == 1
    resources = trial_resources(config, uses_gpu(config, ray.cluster_resources()))
    tuner = tune.Tuner(
        tune.with_resources(trial, resources),
        tune_config=tune.TuneConfig(
            search_alg=SweepSearcher(conductor),
            scheduler=SweepScheduler(conductor, make_asha(search, epochs), past, reuse=one),
            num_samples=-1,
            # A process that has trained one trial trains the next: starting one and importing torch takes seconds. Not for
            # trials of several workers, whose training can't be ended from within.
            reuse_actors=one,
            trial_name_creator=lambda trial: f"trial-{trial.config['number']:04d}",
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=folder,
            verbose=0,
            callbacks=[LostTrials(conductor)],
            stop=GivenUp(conductor),
            # For processes that die, and machines that fail; any other error is reported (`run_trial`), since it would come again.
            failure_config=tune.FailureConfig(max_failures=config.compute.max_failures),
        ),
    )
    with tunes_handlers() as was_signalled:
        tuner.fit()
        return was_signalled()
