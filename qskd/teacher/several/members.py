"""The teachers of a recipe, and whose each class of the dataset is. Reads no weights.

A class is the first teacher's that knows it, in the order in which they are named: of it all others are silent. So every class has
one teacher, and every object is one teacher's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from qskd.config import Config
from qskd.datasets.classes import NOBODY, Explicit, Side, known_classes, listing, map_classes, ready_class_map
from qskd.detectors import words_for
from qskd.errors import QskdError
from qskd.teacher.told.results import teacher_labels


@dataclass(frozen=True)
class Member:
    """One teacher. field: its section of the recipe. class_map: with null for classes that are a teacher's before it. words: what
    it is asked for, where it is asked in words. labels: its own, by slot. slots: of each class of the dataset, `NOBODY` of those
    that are not its own. shared: classes that it knows too, and which are a teacher's before it."""

    field: str
    path: str
    class_map: Explicit
    levels: tuple[int, ...] | None
    words: tuple[str, ...]
    labels: tuple[str, ...]
    slots: tuple[int, ...]
    shared: tuple[str, ...] = ()

    def classes(self, labels: Sequence[str]) -> list[str]:
        """The dataset's classes that are its own."""
        return [name for name, slot in zip(labels, self.slots, strict=True) if slot != NOBODY]


def paths_of(config: Config) -> dict[str, str]:
    """The teachers' paths by field, in their order."""
    also = {f"teacher.also.{name}.path": each.path for name, each in config.teacher.also.items()}
    return {"teacher.path": config.teacher.path} | also


def teachers_named(config: Config) -> str:
    """For people: the teacher's path, or all of theirs."""
    *before, last = paths_of(config).values()
    return f"{', '.join(before)} and {last}" if before else last


@contextmanager
def of_field(field: str, path: str) -> Iterator[None]:
    """What is said of a checkpoint's path alone gets the field of the recipe that names it."""
    try:
        yield
    except QskdError as error:
        if error.where != path:
            raise
        raise QskdError(field, f"{path}: {error.found}", error.expected, error.remedy) from error


def members_of(config: Config, labels: Sequence[str]) -> tuple[Member, ...]:
    """labels: the dataset's classes. QskdError where a class is nobody's and isn't left to nobody, or a teacher has no class."""
    teacher = config.teacher
    if not teacher.also:
        words = words_for(labels, teacher.class_map)
        with of_field("teacher.path", teacher.path):
            theirs = teacher_labels(teacher.path, words)
        slots = map_classes(labels, theirs, teacher.class_map)
        return (Member("teacher", teacher.path, teacher.class_map, teacher.levels, words, theirs, slots),)
    given = {"teacher": (teacher.path, teacher.class_map, teacher.levels)}
    given |= {f"teacher.also.{name}": (one.path, one.class_map, one.levels) for name, one in teacher.also.items()}
    found: list[Member] = []
    for field, (path, class_map, levels) in given.items():
        taken = {name: None for each in found for name in each.classes(labels)}
        side = Side(where=f"{field}.class_map", field=f"{field}.class_map")
        mine: dict[str, str | None] = {**class_map, **taken}
        words = words_for(labels, mine)
        with of_field(f"{field}.path", path):
            theirs, everything = teacher_labels(path, words), teacher_labels(path, words_for(labels, class_map))
        known = known_classes(labels, everything, class_map, side)  # its entries are right, whoever has the classes
        slots = known_classes(labels, theirs, mine, side)
        shared = [name for name, slot in zip(labels, known, strict=True) if name in taken and slot != NOBODY]
        found.append(Member(field, path, mine, levels, words, theirs, slots, tuple(shared)))
        if all(slot == NOBODY for slot in slots):
            raise QskdError(
                field,
                f"{path}, which knows no class of the dataset" + (" that is not another teacher's" if taken else ""),
                f"a teacher of at least one of {listing(labels)}\n    its labels: {listing(theirs)}",
                f"name it before the others, map its labels ({field}.class_map), or take it out",
            )
    _check_all_known(labels, found)
    return tuple(found)


def _check_all_known(labels: Sequence[str], members: Sequence[Member]) -> None:
    """A class may be left to nobody, by any teacher's class map, but not forgotten."""
    owned = {name for each in members for name in each.classes(labels)}
    meant = {name for each in members for name, label in each.class_map.items() if label is None}
    if missing := [name for name in labels if name not in owned | meant]:
        theirs = "\n".join(f"    labels of {each.path}: {listing(each.labels)}" for each in members)
        raise QskdError(
            "teacher.also",
            f"no teacher has a label for {len(missing)} dataset class(es): {listing(missing)}",
            f"each dataset class to be known by a teacher, or to be left to nobody\n{theirs}",
            "paste this and correct it: the first teacher's label of each, or null, which leaves a class to nobody\n"
            + ready_class_map(dict.fromkeys(missing)),
        )


def told_of(members: Sequence[Member], labels: Sequence[str]) -> list[str]:
    """Sentences on whose each class is; none of one teacher."""
    if len(members) == 1:
        return []
    said = [f"{each.path} teaches {listing(each.classes(labels))}" for each in members]
    if shared := [name for each in members for name in each.shared]:
        said.append(
            f"known to several teachers, and taught by the one that is named first: {listing(shared)} "
            "(null in its class_map leaves a class to the next)"
        )
    return said
