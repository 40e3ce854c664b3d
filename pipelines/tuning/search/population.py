"""Population based training as a sequence of short trainings, each of one member over one generation.

A generation begins when every member has ended the one before; who takes over whose weights, and with which parameters, is
then a function of the rows (`propose.succession`). Nothing is paused, nothing is kept in memory: a driver that
was killed asks the rows again. Members wait for the slowest at each generation's end, which is the price.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pipelines.tuning.search.propose import Succession, succession
from pipelines.tuning.search.request import REDUCTION, Search
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config

EPSILON = 1e-6


@dataclass(frozen=True)
class Step:
    """One member's next generation: from `generation * epochs` to `until` epochs (0: to the end). succession: None in
    the first. donor_step: the training step at which the generation begins."""

    number: int
    generation: int
    until: float
    succession: Succession | None
    donor_step: int


class Population:
    def __init__(self, search: Search, config: Config, total_steps: int, steps_per_epoch: int) -> None:
        every = config.training.evaluate_every_epochs
        self.search, self.steps_per_epoch = search, steps_per_epoch
        self.epochs = total_steps / steps_per_epoch
        # A ninth of the training, in whole evaluations.
        self.interval = every * max(1, round(self.epochs / REDUCTION**2 / every))

    def generations_done(self, row: TrialRow) -> int:
        if row.state == "finished":
            return math.ceil(self.epochs / self.interval)
        return int((row.epochs + EPSILON) / self.interval)

    def next_step(self, rows: Mapping[int, TrialRow], live: set[int], seed: int) -> Step | None:
        """Who is to train next; None when all that may are at work or done."""
        members = {number: row for number, row in rows.items() if row.state != "failed"}
        if not members:
            return None
        generation = min(map(self.generations_done, members.values()))
        ready = [
            number
            for number, row in sorted(members.items())
            if self.generations_done(row) == generation and row.state != "finished" and number not in live
        ]
        if not ready:
            return None
        begun = generation * self.interval
        until = float(begun + self.interval)
        found = None
        if generation:
            # As they stood when the generation began: some have gone on since, or failed.
            stood = {
                number: replace(row, curve=tuple(point for point in row.curve if point[0] <= begun + EPSILON))
                for number, row in rows.items()
            }
            reached = {n: row for n, row in stood.items() if row.epochs >= begun - EPSILON}
            found = succession(self.search, seed, ready[0], generation, reached)
        return Step(ready[0], generation, until, found, round(begun * self.steps_per_epoch))
