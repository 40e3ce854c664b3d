"""Cross-attention of the queries whose GIoU with some object reaches the cache's floor, and of the matched ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qskd.teacher.columns.column import (
    TINY,
    Arrays,
    Column,
    float_format,
    floats_of,
    host,
    level_shapes,
    levels_of,
    padded,
)
from qskd.teacher.columns.memory import check_counts, mirrored_maps
from qskd.teacher.manifest import CacheSizes

if TYPE_CHECKING:
    from torch import Tensor

    from qskd.structures import TeacherNeeds, TeacherRecord


class Attention(Column):
    """attention_queries: int32 [A], ascending. attention: [A, sum of h_l * w_l]; with int8, uint8 steps of a 255th of its
    query's largest, which is 255 times the query's entry of attention_scale (float32 [A])."""

    name = "attention"
    arrays = ("attention_queries", "attention", "attention_scale")
    compressed = ("attention",)  # it has many zeros
    floored = True

    def asked(self, needs: TeacherNeeds) -> bool:
        return needs.attention

    def formats(self, precision: str) -> Mapping[str, str]:
        steps = "|u1" if precision == "int8" else float_format(precision)
        return {"attention_queries": "<i4", "attention": steps, "attention_scale": "<f4"}

    def encode(self, record: TeacherRecord, precision: str, shapes: NDArray[np.int32]) -> list[Arrays]:
        import torch

        queries, images, whole = record.attention_queries, len(shapes), precision != "int8"
        attention: list[NDArray[Any]] = []
        looks = np.zeros((images, 0), np.float32)
        if queries is None or not record.attention:
            kept = np.full((images, 0), -1, np.int32)
        else:
            kept = host(queries.int())
            both = zip(record.attention, record.memory_valid, strict=True)
            flat = torch.cat([part.flatten(2) * valid.flatten(1)[:, None] for part, valid in both], dim=-1)
            if whole:
                flat = flat.to(floats_of(precision))
            else:
                top = flat.amax(-1) / 255
                flat = (flat / top.clamp(min=TINY)[..., None]).round_().clamp_(0, 255).to(torch.uint8)
                looks = host(top)
            areas = [part.shape[-2] * part.shape[-1] for part in record.attention]
            attention = [
                host(p.unflatten(-1, a.shape[-2:]))
                for p, a in zip(flat.split(areas, -1), record.attention, strict=True)
            ]
        rows = []
        for i, sizes in enumerate(shapes.tolist()):
            chosen = np.flatnonzero(kept[i] >= 0)
            parts = [
                a[i, chosen, :h, :w].reshape(len(chosen), h * w) for a, (h, w) in zip(attention, sizes, strict=False)
            ]
            rows.append(
                {
                    "attention_queries": kept[i, chosen],
                    "attention": np.concatenate(parts, axis=1) if parts else np.zeros((0, 0), np.uint8),
                    "attention_scale": looks[i, chosen] if looks.shape[1] else np.zeros(0, np.float32),
                }
            )
        return rows

    def shaped(self, flat: Arrays, sizes: CacheSizes) -> Arrays:
        queries = len(flat["attention_queries"])
        return flat | {"attention": flat["attention"].reshape(queries, -1 if queries else 0)}

    def check(self, row: Any, sizes: CacheSizes, present: Mapping[str, Any], precision: str) -> None:
        shapes, queries = row.memory_shapes.tolist(), row.attention_queries
        cells = sum(high * wide for high, wide in shapes)
        wanted = {
            "attention": len(queries) * cells,
            "attention_scale": len(queries) if precision == "int8" else 0,
        }
        check_counts(row, wanted, present, shapes)
        known = sizes.queries * sizes.layers  # of every layer, where the recipe keeps all
        if len(queries) and not 0 <= int(queries.min()) <= int(queries.max()) < known:
            raise ValueError(f"attention of query {int(queries.max())} of {known}")

    def mirrored(self, row: Any, sizes: CacheSizes) -> Arrays:
        if not len(row.attention_queries):
            return {}
        return {"attention": mirrored_maps(row.attention, [1] * len(sizes.channels), row.memory_shapes)}

    def collate(self, rows: Sequence[Any], sizes: CacheSizes) -> Arrays:
        """teacher_attention_queries int32 [n, A], -1 = none; teacher_attention_l [n, A, H, W]; teacher_attention_scale [n, A],
        left out where numbers are stored as they are."""
        batch: Arrays = {}
        most = max((len(row.attention_queries) for row in rows), default=0)
        cell = [0] * len(rows)  # where in each row's attention the level begins
        for level in range(len(sizes.channels)):
            shapes, high, wide = level_shapes(rows, level)
            looks = np.zeros((len(rows), most, high, wide), rows[0].attention.dtype if rows else np.float32)
            for i, (row, (h, w)) in enumerate(zip(rows, shapes, strict=True)):
                count = len(row.attention_queries)
                looks[i, :count, :h, :w] = row.attention[:, cell[i] : cell[i] + h * w].reshape(count, h, w)
                cell[i] += h * w
            batch[f"teacher_attention_{level}"] = looks
        batch["teacher_attention_queries"] = padded([row.attention_queries for row in rows], most, -1, np.int32)
        if any(len(row.attention_scale) for row in rows):
            batch["teacher_attention_scale"] = padded([row.attention_scale for row in rows], most, 0, np.float32)
        return batch

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        attention = tuple(map_.float() for map_ in levels_of(tensors, "attention"))
        scale = tensors.get("teacher_attention_scale")
        if scale is not None:
            attention = tuple(map_ * scale[:, :, None, None] for map_ in attention)
        queries = tensors.get("teacher_attention_queries")
        return {"attention_queries": None if queries is None else queries.long(), "attention": attention}

    def errors(self, found: TeacherRecord, true: TeacherRecord) -> dict[str, float]:
        """For `found`'s queries: the largest difference, that over its query's largest, and how many `true` does not know."""
        import torch

        if not found.attention or found.attention_queries is None or true.attention_queries is None:
            return {}
        # `true` may know other queries at other places: look each of found's up.
        match = found.attention_queries.unsqueeze(-1) == true.attention_queries.unsqueeze(1)
        known = (found.attention_queries >= 0) & match.any(-1)
        missing = float(((found.attention_queries >= 0) & ~known).sum())
        if not match.numel():  # in none of these images is any query's kept
            return {"attention": 0.0, "attention_relative": 0.0, "attention_queries_missing": missing}
        place = match.int().argmax(-1)
        tops = torch.stack([t.flatten(2).amax(-1) for t in true.attention]).amax(0).gather(1, place)
        gaps = []
        for f, t in zip(found.attention, true.attention, strict=True):
            theirs = t.gather(1, place[:, :, None, None].expand(-1, -1, *t.shape[2:]))
            gaps.append((f - theirs).abs().flatten(2).amax(-1) * known)
        gap = torch.stack(gaps).amax(0)
        return {
            "attention": float(gap.max()),
            "attention_relative": float((gap / tops.clamp(min=TINY)).max()),
            "attention_queries_missing": missing,
        }
