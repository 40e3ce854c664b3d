"""Which of a teacher's memory maps a recipe's student learns from."""

from __future__ import annotations

from pipelines.caching.plan import CachePlan
from qskd.config import StudentConfig
from qskd.distillation.method import Facts
from qskd.distillation.shared.maps import pair_levels
from qskd.families.table import find_family
from qskd.teacher.online import OnlineTeacher


def levels_read(student: StudentConfig, teacher: Facts) -> tuple[int, ...]:
    """The numbers of the teacher's maps that meet one of the student's (`pair_levels`); all of them where the student starts
    from a checkpoint, whose maps are not known before it is read."""
    every = tuple(range(len(teacher.channels)))
    count = student.feature_levels if find_family(student.family, "student.family").many_maps else 1
    if student.init or count >= len(every) or not teacher.cells:
        return every
    if student.backbone.is_vit:
        strides = student.backbone.strides(count) or (student.backbone.unit,)
    else:  # the backbone's last stages, at most three, and after them maps of doubled strides
        stages = min(count, 3, len(student.backbone.depths))
        strides = tuple(student.backbone.unit * 2 ** (place - stages + 1) for place in range(count))
    cells = [student.resize.usual_pixels / stride**2 for stride in strides]
    return tuple(sorted(level for _, level in pair_levels(cells, teacher.cells)))


def look_at_levels(plan: CachePlan, teacher: OnlineTeacher) -> str:
    """A sentence where the recipe's student learns from some of the teacher's maps alone, and all are to be kept; else nothing."""
    config, facts = plan.config, teacher.facts
    read = levels_read(config.student, facts)
    if facts.parts or config.teacher.levels is not None or len(read) == len(facts.channels):
        return ""
    numbers = [width * cells for width, cells in zip(facts.channels, facts.cells, strict=True)]
    share = sum(numbers[level] for level in read) / sum(numbers)
    return (
        f"cache: the student learns from {len(read)} of the teacher's {len(numbers)} memory maps, which have {share:.0%} of their "
        f"numbers: --set teacher.levels=[{','.join(map(str, read))}] keeps these alone (a cache of its own)"
    )
