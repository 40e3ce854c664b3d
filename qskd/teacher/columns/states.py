"""The last decoder layer's states of the surest queries: what DETRDistill weighs features by, and compares queries by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qskd.errors import QskdError
from qskd.teacher.columns.column import TINY, Arrays, Column, float_format, floats_of, host, padded
from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qskd.structures import DetectorOutput, TeacherNeeds, TeacherRecord

MOST = 100  # queries an image, as many as DETRDistill's mask has (class, query) pairs


class States(Column):
    """states_queries: int32 [A], ascending: the `MOST` queries of the last layer with the highest class probability, or all.
    states: [A, D], D the width of the last memory map; with int8, 255 steps of the query's largest, which is 127 times its entry
    of states_scale (float32 [A])."""

    name = "states"
    arrays = ("states_queries", "states", "states_scale")
    optional = True

    def asked(self, needs: TeacherNeeds) -> bool:
        return self.name in needs.columns

    def taken(self, output: DetectorOutput) -> dict[str, Tensor]:
        import torch

        states = output.query_states.float()
        widths = states.shape[-1], output.memory[-1].shape[1]
        if widths[0] != widths[1]:
            raise QskdError(
                "the column states of the teacher's record",
                f"query states of width {widths[0]} beside memory of width {widths[1]}",
                "a teacher of which both are as wide, so that they can be compared",
                "another method than detrdistill, and teacher.cache.columns without states",
            )
        queries = torch.arange(states.shape[1], device=states.device).expand(len(states), -1)
        return {"states_queries": queries, "states": states}

    def formats(self, precision: str) -> Mapping[str, str]:
        steps = "|i1" if precision == "int8" else float_format(precision)
        return {"states_queries": "<i4", "states": steps, "states_scale": "<f4"}

    def encode(self, record: TeacherRecord, precision: str, shapes: NDArray[np.int32]) -> list[Arrays]:
        import torch

        sure = record.logits[-1].float().amax(-1)  # [B, Q]
        most = min(MOST, sure.shape[1])
        kept = sure.argsort(dim=1, descending=True, stable=True)[:, :most].sort(1).values
        states = (
            record.extra["states"].float().gather(1, kept[..., None].expand(-1, -1, record.extra["states"].shape[-1]))
        )
        scale = states.new_zeros(len(states), 0)
        if precision == "int8":
            scale = states.abs().amax(-1) / 127
            states = (states / scale.clamp(min=TINY)[..., None]).round_().clamp_(-127, 127).to(torch.int8)
        else:
            states = states.to(floats_of(precision))
        columns = (host(kept.int()), host(states), host(scale))
        return [dict(zip(self.arrays, row, strict=True)) for row in zip(*columns, strict=True)]

    def shaped(self, flat: Arrays, sizes: CacheSizes) -> Arrays:
        return flat | {"states": flat["states"].reshape(len(flat["states_queries"]), sizes.channels[-1])}

    def check(self, row: Any, sizes: CacheSizes, present: Mapping[str, Any], precision: str) -> None:
        queries = row.states_queries
        if len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < sizes.queries:
            raise ValueError(f"states of query {int(queries.max())} of {sizes.queries}")
        if len(row.states_scale) != (len(queries) if precision == "int8" else 0):
            raise ValueError(f"states_scale has {len(row.states_scale)} numbers for {len(queries)} queries")

    def mirrored(self, row: Any, sizes: CacheSizes) -> Arrays:
        return {}  # what it says of a query stays, as logits do

    def collate(self, rows: Sequence[Any], sizes: CacheSizes) -> Arrays:
        """teacher_states_queries int32 [n, A], -1 = none; teacher_states [n, A, D]; teacher_states_scale [n, A], left out where
        numbers are stored as they are."""
        most = max((len(row.states_queries) for row in rows), default=0)
        states = np.zeros((len(rows), most, sizes.channels[-1]), rows[0].states.dtype if rows else np.float32)
        for image, row in enumerate(rows):
            states[image, : len(row.states)] = row.states
        batch: Arrays = {
            "teacher_states_queries": padded([row.states_queries for row in rows], most, -1, np.int32),
            "teacher_states": states,
        }
        if any(len(row.states_scale) for row in rows):
            batch["teacher_states_scale"] = padded([row.states_scale for row in rows], most, 0, np.float32)
        return batch

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        if "teacher_states" not in tensors:
            return {}
        states = tensors["teacher_states"].float()
        if "teacher_states_scale" in tensors:
            states = states * tensors["teacher_states_scale"][..., None]
        return {"states": states, "states_queries": tensors["teacher_states_queries"].long()}

    def blank(self, images: int, sizes: CacheSizes, device: torch.device) -> dict[str, Any]:
        import torch

        return {
            "states_queries": torch.full((images, 1), -1, dtype=torch.int64, device=device),
            "states": torch.zeros(images, 1, sizes.channels[-1], device=device),
        }

    def errors(self, found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
        """For `found`'s queries: the largest difference, over the query's largest number."""
        if "states" not in found.extra or "states" not in true.extra:
            return {}
        queries, mine = found.extra["states_queries"], found.extra["states"]
        theirs = true.extra["states"].gather(1, queries.clamp(min=0)[..., None].expand(-1, -1, mine.shape[-1]))
        gap = (mine - theirs).abs().amax(-1) / theirs.abs().amax(-1).clamp(min=TINY) * (queries >= 0)
        return {"states_relative": float(gap.max()) if gap.numel() else 0.0}
