"""Distributions of the sides of boxes, of the queries whose attention is kept: for localization distillation (D-FINE, DEIMv2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qskd.errors import QskdError
from qskd.teacher.columns.column import Arrays, Column, float_format, floats_of, host, padded
from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qskd.structures import DetectorOutput, TeacherNeeds, TeacherRecord

_SIDES = 4


class Sides(Column):
    """sides_queries: int32 [A], ascending: those of the last decoder layer that the cache's GIoU floor lets in, and the matched
    ones. sides: [A, 4, N + 1], log-probabilities over the bins, of left, top, right, bottom. sides_about_cxcywh: float32 [A, 4],
    the boxes that sides are measured from. sides_bins: float32 [N + 2], what each bin says and, last, the scale
    (`qskd.structures.SideDistributions`).

    Log-probabilities are float16 at the least: the largest are nearest to 0, where it is finest.
    """

    name = "sides"
    arrays = ("sides_queries", "sides", "sides_about_cxcywh", "sides_bins")
    compressed = ("sides",)
    optional = True
    floored = True

    def asked(self, needs: TeacherNeeds) -> bool:
        return self.name in needs.columns

    def taken(self, output: DetectorOutput) -> dict[str, Tensor]:
        import torch

        said = output.sides
        if said is None:
            raise _refused("a teacher")
        images, queries = said.about_cxcywh.shape[:2]
        bins = torch.cat([said.values.flatten().float(), said.scale.flatten()[:1].float()])
        likely = said.logits[-1].float().unflatten(-1, (_SIDES, -1)).log_softmax(-1)
        return {
            "sides_queries": torch.arange(queries, device=likely.device).expand(images, -1),
            "sides": likely,
            "sides_about_cxcywh": said.about_cxcywh.float(),
            "sides_bins": bins.expand(images, -1),
        }

    def check_teacher(self, family: str) -> None:
        from qskd.families.table import FAMILIES, TEACHERS

        if family in TEACHERS or (family in FAMILIES and not FAMILIES[family].side_distributions):
            raise _refused(f"a teacher of family {family}")

    def formats(self, precision: str) -> Mapping[str, str]:
        floats = {"sides_about_cxcywh": "<f4", "sides_bins": "<f4"}
        return {"sides_queries": "<i4", "sides": float_format(precision)} | floats

    def encode(self, record: TeacherRecord, precision: str, shapes: NDArray[np.int32]) -> list[Arrays]:
        kept = record.extra["sides_queries"] if record.attention_queries is None else record.attention_queries
        kept = _of_last_layer(kept, record.logits.shape[2])
        said = {name: record.extra[name] for name in self.arrays}
        likely, about = host(said["sides"].to(floats_of(precision))), host(said["sides_about_cxcywh"])
        bins, queries = host(said["sides_bins"]), host(kept.int())
        rows = []
        for image in range(len(queries)):
            own = queries[image][queries[image] >= 0]
            row = (own, likely[image, own], about[image, own], bins[image])
            rows.append(dict(zip(self.arrays, row, strict=True)))
        return rows

    def shaped(self, flat: Arrays, sizes: CacheSizes) -> Arrays:
        queries = len(flat["sides_queries"])
        bins = max(0, len(flat["sides_bins"]) - 1)
        return flat | {
            "sides": flat["sides"].reshape(queries, _SIDES, bins),
            "sides_about_cxcywh": flat["sides_about_cxcywh"].reshape(queries, _SIDES),
        }

    def check(self, row: Any, sizes: CacheSizes, present: Mapping[str, Any], precision: str) -> None:
        queries = row.sides_queries
        if len(row.sides_bins) < 3:
            raise ValueError(f"{len(row.sides_bins)} numbers for the bins of sides")
        if len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < sizes.queries:
            raise ValueError(f"sides of query {int(queries.max())} of {sizes.queries}")

    def mirrored(self, row: Any, sizes: CacheSizes) -> Arrays:
        about = row.sides_about_cxcywh.copy()
        about[:, 0] = 1 - about[:, 0]
        return {"sides": row.sides[:, [2, 1, 0, 3]], "sides_about_cxcywh": about}

    def collate(self, rows: Sequence[Any], sizes: CacheSizes) -> Arrays:
        """teacher_sides_queries int32 [n, A], -1 = none; teacher_sides [n, A, 4, N + 1]; teacher_sides_about_cxcywh [n, A, 4];
        teacher_sides_bins [n, N + 2]. All of a cache have as many bins."""
        most = max((len(row.sides_queries) for row in rows), default=0)
        bins = len(rows[0].sides_bins) - 1 if rows else 2
        batch: Arrays = {
            "teacher_sides_queries": padded([row.sides_queries for row in rows], most, -1, np.int32),
            "teacher_sides": np.zeros((len(rows), most, _SIDES, bins), rows[0].sides.dtype if rows else np.float32),
            "teacher_sides_about_cxcywh": np.full((len(rows), most, _SIDES), 0.5, np.float32),
            "teacher_sides_bins": np.zeros((len(rows), bins + 1), np.float32),
        }
        for image, row in enumerate(rows):
            count = len(row.sides_queries)
            batch["teacher_sides"][image, :count] = row.sides
            batch["teacher_sides_about_cxcywh"][image, :count] = row.sides_about_cxcywh
            batch["teacher_sides_bins"][image] = row.sides_bins
        return batch

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        if "teacher_sides" not in tensors:
            return {}
        floats = {name: tensors[f"teacher_{name}"].float() for name in self.arrays[1:]}
        return floats | {"sides_queries": tensors["teacher_sides_queries"].long()}

    def blank(self, images: int, sizes: CacheSizes, device: torch.device) -> dict[str, Any]:
        import torch

        return {
            "sides_queries": torch.full((images, 1), -1, dtype=torch.int64, device=device),
            "sides": torch.zeros(images, 1, _SIDES, 2, device=device),
            "sides_about_cxcywh": torch.full((images, 1, _SIDES), 0.5, device=device),
            "sides_bins": torch.tensor([-1.0, 1.0, 4.0], device=device).expand(images, -1),
        }

    def errors(self, found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
        """For `found`'s queries: the largest difference of a probability, and of the boxes that sides are measured from."""
        if "sides" not in found.extra or "sides" not in true.extra:
            return {}
        queries = found.extra["sides_queries"]
        known = (queries >= 0)[..., None]
        gaps = {}
        for name, key in (("sides", "side_probability"), ("sides_about_cxcywh", "sides_about_cxcywh")):
            mine, theirs = found.extra[name].flatten(2), true.extra[name].flatten(2)
            theirs = theirs.gather(1, queries.clamp(min=0)[..., None].expand(-1, -1, theirs.shape[-1]))
            if name == "sides":
                mine, theirs = mine.exp(), theirs.exp()
            gap = (mine - theirs).abs() * known
            gaps[key] = float(gap.max()) if gap.numel() else 0.0
        return gaps


def _refused(who: str) -> QskdError:
    return QskdError(
        "the column sides of the teacher's record",
        f"{who}, whose boxes are four numbers each",
        "one that gives each side of a box as a distribution: D-FINE or DEIMv2",
        "another method than localization, and teacher.cache.columns without sides; or a teacher of these",
    )


def _of_last_layer(queries: Tensor, number: int) -> Tensor:
    """Of numbered queries, as `TeacherRecord.attention_queries` has them, the last layer's; -1 for all others."""
    return queries.masked_fill(queries >= number, -1)
