"""Early stopping: how many evaluations have passed without a better AP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qskd.evaluation.average_precision import CocoResult
from qskd.evaluation.shown import measured


class Patience:
    """The count, alike on every worker. An evaluation that could not be measured does not count.

    limit: so many end the training; 0: none do. best_ap: None before anything was measured.
    """

    def __init__(self, limit: int, world_size: int) -> None:
        self.limit, self.world_size = limit, world_size
        self.best_ap: float | None = None
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        return 0 < self.limit <= self.waited

    def heard(self, result: CocoResult | None) -> None:
        """An evaluation's result; rank 0's, None elsewhere. With a limit all workers call it together."""
        ap = measured(result.metrics).get("AP") if result is not None else None
        if self.limit and self.world_size > 1:
            import torch.distributed as dist

            said = [ap]
            dist.broadcast_object_list(said, src=0)
            (ap,) = said
        if ap is None:
            return
        if self.best_ap is None or ap > self.best_ap:
            self.best_ap, self.waited = ap, 0
        else:
            self.waited += 1

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best_ap": self.best_ap, "waited": self.waited}

    def load(self, state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """From a checkpoint. state: empty of one of before there was a count, which begins with the AP in its metrics."""
        ap = state.get("best_ap", measured(metrics).get("AP"))
        self.best_ap = None if ap is None else float(ap)
        self.waited = int(state.get("waited", 0))
