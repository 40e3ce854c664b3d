"""Distillation methods. Each declares what it needs of the teacher (`needs`), how its terms weigh (`weights`), and maps
(student output, teacher record, targets, assignments) to named loss terms. A new one is a file here and a line in
`METHODS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qskd.config import DistillationConfig
from qskd.distillation.qskd.method import QSKD
from qskd.distillation.ramp import distillation_factor
from qskd.structures import TeacherNeeds

METHODS: Mapping[str, type[QSKD]] = {"qskd": QSKD}


def build_method(
    config: DistillationConfig,
    student_channels: Sequence[int],
    teacher_channels: Sequence[int],
    pairs: Sequence[tuple[int, int]] | None = None,
) -> QSKD | None:
    """The method that `config.method` names, or None for "none".

    student_channels, teacher_channels: the width of each encoder memory map, finest first. pairs: (student map, teacher map),
    which meet (`features.pair_levels`); in order, where they are not given.
    """
    if config.method == "none":
        return None
    return METHODS[config.method](config, student_channels, teacher_channels, pairs)


def teacher_needs(config: DistillationConfig) -> TeacherNeeds | None:
    """What the method reads of the teacher's record; None without a method."""
    return None if config.method == "none" else METHODS[config.method].needs_of(config)


__all__ = ["METHODS", "QSKD", "build_method", "distillation_factor", "teacher_needs"]
