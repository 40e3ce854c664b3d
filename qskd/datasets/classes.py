"""Class map: which of the teacher's logit slots speaks for each dataset class. By name, else by an explicit map."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from qskd.errors import QskdError

_WHERE = "teacher.class_map"
_SHOWN = 24  # names of a vocabulary an error lists before it says how many more there are
_SHOWN_LETTERS = 40
_SIDES = "an entry reads DATASET_NAME: TEACHER_LABEL"


def _normalised(name: str) -> str:
    return re.sub(r"[\s_\-]+", "", name).casefold()


def _listing(names: Iterable[str]) -> str:
    """Names in order, each once, cut to a length that can be read in a terminal."""
    unique = list(dict.fromkeys(names))
    shown = [f"{name[:_SHOWN_LETTERS]}…" if len(name) > _SHOWN_LETTERS else name for name in unique[:_SHOWN]]
    more = f", … and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return f"[{', '.join(shown)}{more}]" if unique else "[] (none)"


class _TeacherVocabulary:
    """The teacher's labels, looked up as written, then without case, spaces, underscores and hyphens."""

    def __init__(self, labels: Sequence[str] | Mapping[int, str]) -> None:
        pairs = labels.items() if isinstance(labels, Mapping) else enumerate(labels)
        self.names: dict[int, str] = {int(slot): name for slot, name in sorted(pairs, key=lambda pair: int(pair[0]))}
        self._exact: dict[str, list[int]] = {}
        self._loose: dict[str, list[int]] = {}
        for slot, name in self.names.items():
            self._exact.setdefault(name, []).append(slot)
            self._loose.setdefault(_normalised(name), []).append(slot)

    def slots(self, name: str) -> list[int]:
        """All slots a name could mean, those written exactly so before those that only read the same."""
        return self._exact.get(name) or self._loose.get(_normalised(name), [])

    def has_default_names(self) -> bool:
        return bool(self.names) and all(re.fullmatch(r"LABEL_\d+", name) for name in self.names.values())


def _problem(found: str, dataset: Sequence[str], teacher: _TeacherVocabulary, remedy: str) -> QskdError:
    expected = (
        f"each dataset class to have exactly one teacher label\n"
        f"    dataset ({len(dataset)} classes): {_listing(dataset)}\n"
        f"    teacher ({len(teacher.names)} slots): {_listing(teacher.names.values())}"
    )
    return QskdError(_WHERE, found, expected, remedy)


def map_classes(
    dataset_labels: Sequence[str], teacher_labels: Sequence[str] | Mapping[int, str], explicit: Mapping[str, str]
) -> tuple[int, ...]:
    """The teacher's logit slot of each dataset class: `teacher_logits[..., result]` is in the dataset's class order.

    dataset_labels: class names in contiguous index order, K of them.
    teacher_labels: the teacher's names in slot order, or its config's `id2label`. Slots no class needs may be named as
        they like, repeatedly too (COCO's 91-slot heads have several "N/A").
    explicit: dataset name -> teacher label, or the slot's number in quotes where labels can't tell slots apart. Wins
        over names; several dataset classes may share one teacher label this way, but not by similar names alone.

    Returns K slots. Raises QskdError, listing both vocabularies, when a class has no slot or more than one, or when an
    explicit entry names something unknown.
    """
    teacher = _TeacherVocabulary(teacher_labels)
    repeated = [name for name, count in Counter(dataset_labels).items() if count > 1]
    if repeated:
        found = f"dataset classes with the same name: {_listing(repeated)}"
        raise _problem(found, dataset_labels, teacher, "give every category of the dataset a name of its own")

    explicit_slots = _explicit_slots(dataset_labels, teacher, explicit)
    slots: dict[str, int] = {}
    unmapped: list[str] = []
    ambiguous: list[str] = []
    for name in dataset_labels:
        if name in explicit_slots:
            slots[name] = explicit_slots[name]
            continue
        candidates = teacher.slots(name)
        if len(candidates) > 1:
            ambiguous.append(f"{name} (slots {', '.join(str(slot) for slot in candidates)})")
        elif not candidates:
            unmapped.append(name)
        else:
            slots[name] = candidates[0]

    if unmapped:
        defaults = " (its checkpoint names no classes, only LABEL_0, LABEL_1, …)" if teacher.has_default_names() else ""
        found = f"the teacher has no label{defaults} for {len(unmapped)} dataset classes: {_listing(unmapped)}"
        remedy = f"name the teacher's label for each, e.g. teacher.class_map: {{{unmapped[0]}: TEACHER_LABEL}}"
        raise _problem(found, dataset_labels, teacher, remedy)
    if ambiguous:
        found = f"several teacher slots go by the name of {_listing(ambiguous)}"
        first = ambiguous[0].rpartition(" (slots")[0]
        remedy = f'choose one: its exact label, or its slot number in quotes, e.g. teacher.class_map: {{{first}: "7"}}'
        raise _problem(found, dataset_labels, teacher, remedy)
    _refuse_shared_slots(dataset_labels, teacher, slots, explicit_slots)
    return tuple(slots[name] for name in dataset_labels)


def _explicit_slots(dataset: Sequence[str], teacher: _TeacherVocabulary, explicit: Mapping[str, str]) -> dict[str, int]:
    unknown_classes = [name for name in explicit if name not in dataset]
    if unknown_classes:
        found = f"entries for classes the dataset does not have: {_listing(unknown_classes)}"
        raise _problem(found, dataset, teacher, f"correct the left side; {_SIDES}")
    slots: dict[str, int] = {}
    for name, label in explicit.items():
        candidates = teacher.slots(label)
        if not candidates and label.isdecimal() and int(label) in teacher.names:
            candidates = [int(label)]
        if not candidates:
            found = f"{name}: {label}, but the teacher has no label {label}"
            raise _problem(found, dataset, teacher, f"correct the right side; {_SIDES}")
        if len(candidates) > 1:
            found = f"{name}: {label}, but the teacher has that label at slots {', '.join(map(str, candidates))}"
            remedy = f'give the slot in quotes, e.g. teacher.class_map: {{{name}: "{candidates[0]}"}}'
            raise _problem(found, dataset, teacher, remedy)
        slots[name] = candidates[0]
    return slots


def _refuse_shared_slots(
    dataset: Sequence[str], teacher: _TeacherVocabulary, slots: Mapping[str, int], explicit_slots: Mapping[str, int]
) -> None:
    """Two classes on one slot is a choice when both were written down, and an accident otherwise."""
    owner: dict[int, str] = {}
    for name in dataset:
        other = owner.setdefault(slots[name], name)
        if other != name and not (name in explicit_slots and other in explicit_slots):
            found = f"{other} and {name} both reach the teacher's slot {slots[name]} ({teacher.names[slots[name]]})"
            remedy = (
                "if that is meant, write both in teacher.class_map; else name another teacher label for one of them"
            )
            raise _problem(found, dataset, teacher, remedy)
