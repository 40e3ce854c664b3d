"""A sweep at work: which trial is next, what was heard of each, and where that is written down. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Literal

from pipelines.run.logs import tell
from pipelines.tuning.records import ENDED, Records, Refusal, trial_config
from pipelines.tuning.report.results import best_row
from pipelines.tuning.search.population import Population
from pipelines.tuning.search.propose import REPEATS, propose
from pipelines.tuning.search.request import Search
from pipelines.tuning.tracking import SweepTracking
from pipelines.tuning.trial.costs import parameters_m
from pipelines.tuning.trial.job import Job
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import flatten, to_tree
from qskd.errors import QskdError
from qskd.evaluation.shown import score_text

DONE: Literal["FINISHED"] = "FINISHED"  # Tune's word for: nothing is left to start
REFUSALS = 200  # in a row, until the space is taken to have nothing that fits
FAILURES = 5  # in a row, or as many as are at work, until what they have in common is taken to be the cause


class Sweep:
    """The state of a sweep in the driver: `records`, and which trials are with Tune. `ask` is told how many could be at work.

    config: the recipe, of a trial's length. slots: how many trials fit into the cluster now. limit_m: most parameters, in
    millions. known_cache: of a `Job`. recipe_latency_ms: of the recipe's student, which trials' are measured against.
    steps: of a whole trial, and of an epoch.
    """

    def __init__(
        self,
        config: Config,
        search: Search,
        records: Records,
        tracking: SweepTracking,
        labels: Sequence[str],
        slots: Callable[[], int],
        recipe_latency_ms: float,
        steps: tuple[int, int],
        limit_m: float | None = None,
        known_cache: str = "",
    ) -> None:
        self.config, self.search, self.records, self.tracking = config, search, records, tracking
        self.labels, self.slots, self.recipe_latency_ms, self.limit_m = labels, slots, recipe_latency_ms, limit_m
        self.known_cache = known_cache
        self.ask: Callable[[int], None] = lambda trials: None
        self.live: dict[int, Job] = {}
        self.exhausted = False
        self.faults: dict[int, str] = {}  # by trial, what its machine said last
        self.faults_in_a_row = 0
        self.unlucky: set[int] = set()  # trials that failed by their machines' faults
        self.given_up = ""
        self.population = Population(search, config, *steps) if search.algorithm == "pbt" else None

    # --- what is next -------------------------------------------------------------------------------------------------
    def next_job(self) -> Job | str | None:
        if self.given_up:
            return DONE
        self.ask(self.open_trials())
        if len(self.live) >= self.slots():
            return None
        rows = self.records.rows
        while len(rows) < self.search.trials and (self.population or not self._interrupted()):
            row = self._propose(self.records.next_number())
            self.exhausted = row is None
            if row is None:  # what those at work will have shown may bring another proposal
                return None if self.live else DONE
            if self.population is None and row.state not in ENDED:  # one that can't even be built has ended: the next
                break
        if self.population is not None:
            return self._next_of_population()
        waiting = self._interrupted()
        return self._start(rows[waiting[0]]) if waiting else DONE

    def open_trials(self) -> int:
        """How many have not ended, those included that are yet to be proposed."""
        begun = sum(row.state not in ENDED for row in self.records.rows.values())
        return begun + (0 if self.exhausted else max(0, self.search.trials - len(self.records.rows)))

    def _interrupted(self) -> list[int]:
        """Begun or proposed, not ended, and not with Tune: of an earlier driver, or just made."""
        return [n for n, row in sorted(self.records.rows.items()) if row.state not in ENDED and n not in self.live]

    def _propose(self, number: int) -> TrialRow | None:
        """A new row, of a student within the limit. None when no such student is found."""
        while True:
            earlier = [refusal for refusal in self.records.refused if refusal.before == number]
            if len(earlier) >= REFUSALS:
                if not self.live:
                    print(
                        f"{REFUSALS} proposals in a row were refused: {earlier[-1].reason}. "
                        f"The sweep ends with {len(self.records.rows)} trials."
                    )
                return None
            found = propose(
                self.search, self.config.seed, number, self.records.in_order(), self.records.refused, len(earlier)
            )
            if found is None:
                if not self.live:
                    print(
                        f"{REPEATS} proposals in a row were trials already made. "
                        f"The sweep ends with {len(self.records.rows)} trials."
                    )
                return None
            size: float | None = None
            if self.limit_m is not None:
                try:
                    size = parameters_m(self.search.space.config(found.overrides), self.labels)
                except QskdError as error:
                    row = TrialRow(number, "waiting", found.parameters, found.overrides)
                    return self._fail(row, error, self.config)
                if size > self.limit_m * (1 + 1e-9):
                    reason = f"{size:.4g} M parameters, more than {self.limit_m:.4g} M"
                    self.records.refuse(Refusal(number, found.parameters, size / self.limit_m - 1, reason))
                    continue
            return self.records.put(TrialRow(number, "waiting", found.parameters, found.overrides, parameters_m=size))

    def _start(self, row: TrialRow, **more: Any) -> Job | str | None:
        """The job of a row; a configuration that can't be fails here and the next is asked for."""
        try:
            config = self.search.space.config(row.overrides)
        except QskdError as error:
            self._fail(row, error, self.config)
            return self.next_job()
        config = trial_config(config, row.number)
        again = row.state == "running"
        self.records.put(replace(row, state="running"))
        run_id = self.tracking.begin(row, config)
        row = self.records.put(replace(row, state="running", run_id=run_id))
        measure = row.latency_ms is None
        job = Job(
            row.number,
            to_tree(config),
            seen=row.epochs,
            recipe=to_tree(self.config) if measure else None,
            recipe_latency_ms=self.recipe_latency_ms,
            known_cache=self.known_cache,
            **more,
        )
        self.live[row.number] = job
        if not job.generation:
            what = (
                "goes on"
                if again
                else ", ".join(f"{k.rpartition('.')[2]} {_short(v)}" for k, v in flatten(row.overrides).items())
            )
            tell(f"trial {row.number}: {what or 'the recipe'}")
        return job

    def _fail(self, row: TrialRow, error: QskdError, config: Config) -> TrialRow:
        """A trial that can't even begin; config: to log it with."""
        run_id = self.tracking.begin(row, trial_config(config, row.number))
        failed = self.records.put(replace(row, state="failed", reason=str(error), run_id=run_id))
        tell(f"trial {row.number}: failed: {failed.reason.splitlines()[0]}")
        self.tracking.end(failed)
        return failed

    def _next_of_population(self) -> Job | str | None:
        assert self.population is not None
        step = self.population.next_step(self.records.rows, set(self.live), self.config.seed)
        if step is None:
            return None if self.live else DONE
        row = self.records.rows[step.number]
        if step.succession is not None and step.succession.donor is not None:
            row = replace(row, parameters=step.succession.parameters, overrides=step.succession.overrides)
            print(
                f"trial {row.number}: takes over the weights of trial {step.succession.donor}, goes on with "
                + ", ".join(f"{k.rpartition('.')[2]} {_short(v)}" for k, v in row.overrides.items()),
                flush=True,
            )
        donor = step.succession.donor if step.succession is not None else None
        job = self._start(
            row,
            generation=step.generation,
            until=step.until,
            donor=donor,
            donor_step=step.donor_step if donor is not None else 0,
        )
        self.tracking.parameters(row, step.donor_step)
        return job

    # --- what is heard ------------------------------------------------------------------------------------------------
    def heard(self, number: int, report: dict[str, Any], stop: bool) -> None:
        row = self.records.rows[number]
        if "failed" in report:
            self._failed(number, report["failed"])
        elif "broken" in report:
            self._broken(number, report["broken"])
        elif "costs" in report:
            self.records.put(replace(row, **report["costs"]))
            self.tracking.costs(number, report["costs"])
        elif report["epochs"] > row.epochs + 1e-9:
            ap = report["metrics"]["AP"]
            metrics = report["metrics"] if ap > row.best_ap else row.metrics
            state = "finished" if report["last"] else "stopped" if stop else row.state
            curve = (*row.curve, (report["epochs"], ap))
            seconds = round(row.seconds + report["seconds"], 2)
            self.records.put(replace(row, state=state, curve=curve, metrics=metrics, seconds=seconds))
            self.tracking.report(number, report)
            self.faults_in_a_row = 0
            if not self.given_up:
                self._believe(but=self.unlucky)
            self._tell(self.records.rows[number], stop)

    def _tell(self, row: TrialRow, stop: bool) -> None:
        """The trial's last evaluation, and the best there is: on the terminal, and in the sweep's run."""
        rows, (epochs, ap) = self.records.in_order(), row.curve[-1]
        best = best_row(rows)
        leader = f"  (best {best.best_ap:.3f}, trial {best.number})" if best else ""
        if best is not None:
            heard = sum(len(each.curve) for each in rows)
            self.tracking.leader(heard, best)
        print(
            f"trial {row.number}: epoch {epochs:g}  AP {score_text(ap)}{'  stopped' if stop else ''}{leader}",
            flush=True,
        )

    def ended(self, number: int) -> None:
        job = self.live.pop(number, None)
        if job is None:
            return
        row = self.records.rows[number]
        if row.state in ENDED:
            if number not in self.records.held:
                self.tracking.end(row)
        elif not self.given_up and (not job.until or row.epochs < job.until - 1e-6):
            self._failed(number, "it returned before its end")
        self.ask(self.open_trials())  # here too: once nothing is left to start, no next one is asked for

    def lost(self, number: int) -> None:
        self.live.pop(number, None)
        times = self.config.compute.max_failures + 1
        died = f"its process died {times} times; out of memory? (QSKD_VERBOSE=1 shows what Ray says)"
        fault = self.faults.pop(number, "")
        if fault and self.population is None:  # whose other members go on without it
            self.unlucky.add(number)
        self._failed(number, f"{fault}\n  tried {times} times" if fault else died)
        self.ask(self.open_trials())

    def _broken(self, number: int, reason: str) -> None:
        """Tune tries the trial again, and counts; without a limit to that, the faults of all are counted here."""
        self.faults[number] = reason
        tell(f"trial {number}: a fault of its machine: {reason.splitlines()[0]}")
        self.faults_in_a_row += 1
        if self.config.compute.max_failures < 0 and self.faults_in_a_row >= FAILURES:
            self.given_up = reason

    def _failed(self, number: int, reason: str) -> None:
        """A trial's failure is believed once some trial has been evaluated after it. Until then its cause may be one that all have
        in common, such as a node without a way to the store, which is free again at once and draws every trial that follows. Where
        the machine is to blame, trials of other machines say nothing: that failure is believed at the sweep's end."""
        self.records.hold(replace(self.records.rows[number], state="failed", reason=reason))
        tell(f"trial {number}: failed: {reason.splitlines()[0]}")
        there = self.search.trials
        if self.population is not None:  # no others will be begun
            rows = self.records.rows.values()
            there = sum(row.state != "failed" or row.number in self.records.held for row in rows)
        # Of a hundred that begin at once the first evaluation is far off, and a few are always too large for their device.
        if len(self.records.held) >= min(max(FAILURES, len(self.live)), there):
            self.given_up = reason

    def _believe(self, but: Collection[int] = ()) -> None:
        for number in sorted(self.records.held.difference(but)):
            self.tracking.end(self.records.put(self.records.rows[number]))

    def has_given_up(self) -> bool:
        return bool(self.given_up)

    def settle(self) -> None:
        """After the last trial, or a signal. QskdError where too many failed in a row: none of those has ended."""
        if self.given_up:
            failed = f"{len(self.records.held)} trials" if self.records.held else f"{self.faults_in_a_row} tries"
            by_machines = f"failed, {len(self.unlucky)} by faults of their machines"
            what = by_machines if self.unlucky else "in a row failed, and none was evaluated"
            raise QskdError(
                f"{self.config.name}: {failed} {what}",
                f"the last one: {' '.join(self.given_up.split())}",
                "trials that can be trained",
                "mend what they have in common: a node, a disk, a store, credentials (`qskd doctor --cluster` looks at all nodes). "
                "The same command then goes on with them. Where the space has nothing that can be trained, choose another, and "
                "another name",
            )
        if _all_ended(self.search, self.records, self.config.seed):
            self._believe()


def is_done(search: Search, records: Records, seed: int) -> bool:
    """Whether all trials have ended; fewer than asked for where the space had no more to offer."""
    return not records.held and _all_ended(search, records, seed)


def _all_ended(search: Search, records: Records, seed: int) -> bool:
    rows, number = records.rows, records.next_number()
    if not all(row.state in ENDED for row in rows.values()):
        return False
    refusals = sum(refusal.before == number for refusal in records.refused)
    if len(rows) >= search.trials or refusals >= REFUSALS:
        return True
    return propose(search, seed, number, records.in_order(), records.refused, refusals) is None


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
