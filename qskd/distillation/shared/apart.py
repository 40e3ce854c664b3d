"""Several teachers in one record: their queries stand one after another, and so do their memory maps.

Each class is one teacher's (`qskd.teacher.several.members`): of all others the record is silent at that teacher's queries. So
an object is matched among the queries of the teacher whose class it is, and what is learnt of a teacher is what it would teach
alone of its own classes' objects. A record, or facts, of one teacher are their own only part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qskd.structures import Targets, TeacherRecord

if TYPE_CHECKING:
    from qskd.distillation.method import Facts

Prediction = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def apart(record: TeacherRecord) -> tuple[TeacherRecord, ...]:
    """What each teacher said, as a record of its own."""
    if not record.parts:
        return (record,)
    return tuple(_part(record, *places) for places in _places(record.parts))


def _places(parts: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, slice]]:
    """Of each part the places of its queries and of its maps."""
    query = level = 0
    for queries, maps in parts:
        yield slice(query, query + queries), slice(level, level + maps)
        query, level = query + queries, level + maps


def _part(record: TeacherRecord, own: slice, maps: slice) -> TeacherRecord:
    asked = record.attention_queries
    if asked is not None:
        # Number n * Q + i is query i of the n-th layer before the last.
        layer, query = asked.div(record.logits.shape[2], rounding_mode="floor"), asked % record.logits.shape[2]
        known = (asked >= 0) & (query >= own.start) & (query < own.stop)
        asked = torch.where(known, layer * (own.stop - own.start) + query - own.start, -1)
    return TeacherRecord(
        logits=record.logits[:, :, own],
        boxes_cxcywh=record.boxes_cxcywh[:, :, own],
        memory=record.memory[maps],
        memory_valid=record.memory_valid[maps],
        attention_queries=asked,
        attention=record.attention[maps],
        derived=record.derived,
        absent=None if record.absent is None else record.absent[:, :, own],
    )


def facts_apart(facts: Facts) -> tuple[Facts, ...]:
    """Of each teacher."""
    if not facts.parts:
        return (facts,)
    return tuple(
        replace(
            facts,
            channels=facts.channels[maps],
            cells=facts.cells[maps],
            directions=facts.directions[maps],
            bases=facts.bases[maps],
            queries=own.stop - own.start,
            parts=(),
        )
        for own, maps in _places(facts.parts)
    )


def matches_apart(record: TeacherRecord, assignment: Tensor) -> tuple[Tensor, ...]:
    """The query of each object [..., B, M] -> the same by each teacher's own numbers, -1 where the object is not its own."""
    if not record.parts:
        return (assignment,)
    return tuple(
        torch.where((assignment >= own.start) & (assignment < own.stop), assignment - own.start, -1)
        for own, _ in _places(record.parts)
    )


def deaf(record: TeacherRecord) -> Tensor:
    """[Q, K] bool, of several teachers: the queries of those that say nothing of a class which another one knows.

    A teacher that says nothing at all has seen nothing in this share of the batch (all its queries are absent). Its classes may
    be any that the others don't know, so that these stay as deaf to them as they are where it has seen something.
    """
    silent = torch.stack([part.silent for part in apart(record)])  # [teachers, K]
    others = silent & (~silent | silent.all(1, keepdim=True)).any(0)
    counts = torch.tensor([queries for queries, _ in record.parts], device=silent.device)
    return others.repeat_interleave(counts, 0, output_size=record.logits.shape[2])


def prediction(record: TeacherRecord) -> Prediction:
    """As `qskd.losses.matching.assign` takes it: an object is matched with a query of the teacher whose class it is."""
    if not record.parts:
        return record.logits, record.boxes_cxcywh
    return record.logits, record.boxes_cxcywh, deaf(record)


def matched(record: TeacherRecord, assignment: Tensor, targets: Targets) -> Tensor:
    """What `assign` gave for the record, [L', B, M], -1 also for objects for which only an absent query was left, or one of a
    teacher that does not know them."""
    assignment = record.matched(assignment)
    if not record.parts or not assignment.shape[-1]:
        return assignment
    strange = deaf(record)[assignment.clamp(min=0), targets.labels.expand_as(assignment)]
    return assignment.masked_fill(strange, -1)
