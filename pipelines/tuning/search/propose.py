"""What to try next: a function of (seed, trial's number, what is known), and of nothing else. Knows no Ray.

A searcher that keeps its state in memory has to be saved and loaded, and draws on from wherever its generator stands. Here
the study is made anew from the rows for every proposal, with a sampler seeded by the trial's number: a driver that was
killed and started again, with the same rows, proposes the same. (Two trials at a time end in an order that depends on the
machine; so does what is known when the next is proposed.)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.tuning.records import Refusal
from pipelines.tuning.search.request import Search
from pipelines.tuning.trial.row import TrialRow
from search_spaces import OVERRIDES, RandomTrial, Range

REPEATS = 64  # proposals in a row of trials that there are, before the search is over
INSISTS = 16  # of them by TPE, which may insist on what is best; the rest at random
_APART = 2**40  # of the seeds of repeated draws, so that none is another trial's
FAILED_EXCESS = 10.0  # a trial that failed is worse than any that is only too large


@dataclass(frozen=True)
class Proposal:
    """parameters: the spaces' answers by name; overrides: the fields of the recipe they set."""

    parameters: dict[str, Any]
    overrides: dict[str, Any]


def propose(
    search: Search,
    seed: int,
    number: int,
    rows: Sequence[TrialRow] = (),
    refused: Sequence[Refusal] = (),
    attempt: int = 0,
) -> Proposal | None:
    """Trial 0 is the recipe. attempt: how many proposals for this trial were refused. None where `REPEATS` proposals in a row are
    trials that there are already: few choices, all or nearly all of them tried."""
    if number == 0 and not attempt:
        return Proposal(search.space.recipe_point, search.space.overrides(search.space.recipe_point))
    # A training is a function of its recipe. Members of a population are not: they go other ways from the same start.
    known = {_said(row.overrides) for row in rows if row.number < number and search.algorithm != "pbt"}
    study = _study(search, rows, refused) if search.algorithm == "tpe" else None
    for again in range(REPEATS):
        own_seed = (seed * 1_000_003 + number) * 1_009 + attempt + again * _APART
        found = _drawn(search, own_seed, study if again < INSISTS else None)
        if _said(found.overrides) not in known:
            return found
    return None


def _said(overrides: dict[str, Any]) -> str:
    """The same before and after a row was kept as JSON."""
    return json.dumps(overrides, sort_keys=True)


def _drawn(search: Search, seed: int, study: Any) -> Proposal:
    if study is None:
        drawn = RandomTrial(seed)
        overrides = search.space(drawn)[OVERRIDES]
        return Proposal(drawn.answers, overrides)
    with _quiet():
        study.sampler = _sampler(seed % 2**32, start_up_trials(search.trials))
        trial = study.ask()  # one that was drawn before counts as running, and so as bad
        overrides = search.space(trial)[OVERRIDES]
        return Proposal(dict(trial.params), overrides)


def start_up_trials(trials: int) -> int:
    """How many are drawn at random before TPE has enough to go by: a third of a small sweep, ten of a large one."""
    return max(2, min(10, trials // 3))


def _study(search: Search, rows: Sequence[TrialRow], refused: Sequence[Refusal]) -> Any:
    """An Optuna study that has seen these rows: finished, stopped (pruned), running, failed and refused (infeasible)."""
    import optuna

    with _quiet():
        directions = ["maximize" if mode == "max" else "minimize" for mode in search.modes]
        # Never past its start-up: it only enters what is known, and the constraint with it.
        study = optuna.create_study(directions=directions, sampler=_sampler(0, 10**9))
        for row in rows:
            study.enqueue_trial(row.parameters)
            trial = study.ask()
            search.space(trial)
            if row.state in ("finished", "stopped", "failed"):
                _tell(study, trial, row, search)
        for refusal in refused:
            study.enqueue_trial(refusal.parameters)
            trial = study.ask()
            search.space(trial)
            trial.set_user_attr("excess", refusal.excess)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return study


def _tell(study: Any, trial: Any, row: TrialRow, search: Search) -> None:
    import optuna

    values = [_value(row, name) for name in search.objectives]
    if row.state == "failed" or any(value is None for value in values):
        trial.set_user_attr("excess", FAILED_EXCESS)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    elif row.state == "stopped" and len(values) == 1:
        for step, (_, ap) in enumerate(row.curve, start=1):
            trial.report(ap, step)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, values)


def _value(row: TrialRow, objective: str) -> float | None:
    if objective == "AP":
        return row.best_ap if row.curve else None
    value: float | None = getattr(row, objective)
    return value


def _sampler(seed: int, start_up: int) -> Any:
    import optuna

    return optuna.samplers.TPESampler(
        seed=seed,
        n_startup_trials=start_up,
        multivariate=True,
        group=True,  # parameters that exist only sometimes: each set that occurs together is modelled together
        constant_liar=True,  # what is running counts as bad, so that the next one is not the same
        constraints_func=lambda trial: (trial.user_attrs.get("excess", 0.0),),
    )


class _quiet(warnings.catch_warnings):
    """Optuna says of each option above that it is experimental, and logs every trial."""

    def __enter__(self) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered


# --- population based training -------------------------------------------------------------------------------------------
QUANTILE = 0.25  # so many of the population, the worst, go on from as many of the best
RESAMPLE = 0.25  # the chance of a parameter to be drawn anew instead of moved
FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Succession:
    """How a member of the population begins a generation. donor: whose weights it takes over; its own when None."""

    parameters: dict[str, Any]
    overrides: dict[str, Any]
    donor: int | None = None


def succession(search: Search, seed: int, number: int, generation: int, scores: dict[int, TrialRow]) -> Succession:
    """What `number` does in `generation` (1 is the second), given every living member's row with its AP when the last one
    ended: `curve[-1]` of each. The same whenever and however often it is asked.

    Ray's own PopulationBasedTraining draws from the process's global generators, by whichever trial comes first: it can't be
    stopped and gone on with to the same end. The rule is the same (Jaderberg et al. 2017): the worst quarter copy one of
    the best quarter and move each parameter by 0.8 or 1.2, or draw it anew.
    """
    ranked = sorted(scores, key=lambda each: (-scores[each].curve[-1][1], each))
    count = min(max(1, int(len(ranked) * QUANTILE)), len(ranked) // 2)
    own = scores[number]
    if not count or number not in ranked[-count:]:
        return Succession(own.parameters, own.overrides)
    drawn = RandomTrial(((seed * 1_000_003 + number) * 1_009 + generation) * 31)
    donor = ranked[drawn.random.randrange(count)]
    search.space(drawn)  # what a draw anew would give
    moved = _Moved(drawn, scores[donor].parameters)
    overrides = search.space(moved)[OVERRIDES]
    return Succession(moved.answers, overrides, donor)


class _Moved(RandomTrial):
    """Answers as the donor did, a little away from it. What the donor was not asked, or may not say here, is drawn anew: another
    choice may bring other questions."""

    def __init__(self, drawn: RandomTrial, donor: Mapping[str, Any]) -> None:
        self.random, self.anew, self.donor = drawn.random, drawn.answers, donor
        self.answers = {}

    def answer(self, name: str, range_: Range) -> Any:
        found = self.donor.get(name, self.anew.get(name))
        if name in self.donor:
            if self.random.random() < RESAMPLE:
                found = self.anew.get(name, found)
            elif range_.kind != "categorical":
                found *= self.random.choice(FACTORS)
        if found is not None:
            found = range_.nearest(found)
        self.answers[name] = found if range_.holds(found) else self._draw(range_)
        return self.answers[name]
