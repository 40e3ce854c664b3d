"""Class map: which of the teacher's logit slots speaks for each dataset class. By name, else by an explicit map.

The same matching joins a model's classes with those of the data it is evaluated on (`MODEL`), and two splits of one dataset
(`qskd.datasets.splits`).
"""

from __future__ import annotations

import difflib
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from qskd.errors import QskdError
from qskd.printable import escaped, one_line

UNNAMED = "N/A"  # what COCO's 91-slot heads call a slot that is no class's
NOBODY = -1  # the slot of a class that `class_map` leaves to nobody
Explicit = Mapping[str, str | None]
_FIELD = "teacher.class_map"
_SHOWN = 24  # names of a vocabulary an error lists before it says how many more there are
_PASTED = (
    120  # entries of a class map that is offered whole; two vocabularies that differ in more are of different things
)
_ON_ONE_LINE = 6  # entries up to which it is offered for the command line too
_SHOWN_LETTERS = 40
_ALIKE = 0.85  # of difflib's ratio: a plural and a slip of the pen reach it, mouse and house don't
_SIDES = "an entry reads DATASET_NAME: {whose}_LABEL"
# COCO's classes as Pascal VOC and Darknet spell them, and with them some published detectors (PekingU's RT-DETR). Their
# diningtable and pottedplant differ by a space only.
_SPELLINGS = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "television": "tv",
    "hairdryer": "hairdrier",
    "doughnut": "donut",
}


@dataclass(frozen=True)
class Side:
    """Whose labels are asked, what a message about them is about, and the field with the class map."""

    name: str = "teacher"
    where: str = _FIELD
    field: str = _FIELD


TEACHER = Side()


def model_side(model: str) -> Side:
    """Of a detector that is evaluated, and nobody's teacher."""
    return Side("model", model)


def normalised(name: str) -> str:
    """The name without case, white space, underscores, hyphens and invisible characters, in one Unicode form."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    left_out = ("Cf", "Cc")  # zero-width characters, byte order marks
    kept = (one for one in text if one not in "_-" and not one.isspace() and unicodedata.category(one) not in left_out)
    return "".join(kept) or text


def listing(names: Iterable[str]) -> str:
    """Names in order, each once, cut to a length that can be read in a terminal."""
    unique = list(dict.fromkeys(names))
    lines = [one_line(name) for name in unique[:_SHOWN]]
    shown = [f"{name[:_SHOWN_LETTERS]}…" if len(name) > _SHOWN_LETTERS else name for name in lines]
    more = f", … and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return f"[{', '.join(shown)}{more}]" if unique else "[] (none)"


class Vocabulary:
    """Labels by slot, looked up as written, then by their `normalised` form, then by COCO's other spellings."""

    def __init__(self, labels: Sequence[str] | Mapping[int, str]) -> None:
        pairs = labels.items() if isinstance(labels, Mapping) else enumerate(labels)
        self.names: dict[int, str] = {int(slot): name for slot, name in sorted(pairs, key=lambda pair: int(pair[0]))}
        self._by: tuple[dict[str, list[int]], ...] = ({}, {}, {})
        for slot, name in self.names.items():
            for found, form in zip(self._by, _forms(name), strict=True):
                found.setdefault(form, []).append(slot)

    def slots(self, name: str) -> list[int]:
        """All slots a name could mean, those written exactly so before those that only read the same."""
        return next(filter(None, (found.get(form) for found, form in zip(self._by, _forms(name), strict=True))), [])

    def has_default_names(self) -> bool:
        return bool(self.names) and all(re.fullmatch(r"LABEL_\d+", name) for name in self.names.values())

    def without(self, taken: Iterable[int]) -> list[str]:
        """Labels of slots that are not `taken`, each once; what stands for no class ("N/A") is left out."""
        used = set(taken)
        return list(dict.fromkeys(name for slot, name in self.names.items() if slot not in used and name != UNNAMED))


def _forms(name: str) -> tuple[str, str, str]:
    loose = normalised(name)
    return name, loose, _SPELLINGS.get(loose, loose)


def _problem(side: Side, found: str, dataset: Sequence[str], theirs: Vocabulary, remedy: str) -> QskdError:
    expected = (
        f"each dataset class to have exactly one label of the {side.name}\n"
        f"    dataset ({len(dataset)} classes): {listing(dataset)}\n"
        f"    {side.name} ({len(theirs.names)} slots): {listing(theirs.names.values())}"
    )
    return QskdError(side.where, found, expected, remedy)


def map_classes(
    dataset_labels: Sequence[str],
    teacher_labels: Sequence[str] | Mapping[int, str],
    explicit: Explicit,
    side: Side = TEACHER,
) -> tuple[int, ...]:
    """The teacher's logit slot of each dataset class: `teacher_logits[..., result]` is in the dataset's class order.

    dataset_labels: class names in contiguous index order, K of them.
    teacher_labels: the teacher's names in slot order, or its config's `id2label`. Slots no class needs may be named as
        they like, repeatedly too (COCO's 91-slot heads have several "N/A").
    explicit: dataset name -> teacher label, or the slot's number in quotes where labels can't tell slots apart, or None for
        a class that is left to nobody. Wins over names; several dataset classes may share one teacher label this way, but
        not by similar names alone.
    side: whose labels those are, for messages: they speak of a teacher only where there is one.

    Returns K slots, `NOBODY` for a class that `explicit` leaves to nobody. Raises QskdError, listing both vocabularies, when
    a class has no slot or more than one, or when an explicit entry names something unknown.
    """
    theirs = Vocabulary(teacher_labels)
    repeated = [name for name, count in Counter(dataset_labels).items() if count > 1]
    if repeated:
        found = f"dataset classes with the same name: {listing(repeated)}"
        raise _problem(side, found, dataset_labels, theirs, "give every category of the dataset a name of its own")

    explicit_slots = _explicit_slots(dataset_labels, theirs, explicit, side)
    slots: dict[str, int] = {}
    unmapped: list[str] = []
    ambiguous: list[str] = []
    for name in dataset_labels:
        if name in explicit_slots:
            slots[name] = explicit_slots[name]
            continue
        candidates = theirs.slots(name)
        if len(candidates) > 1:
            ambiguous.append(f"{name} (slots {', '.join(str(slot) for slot in candidates)})")
        elif not candidates:
            unmapped.append(name)
        else:
            slots[name] = candidates[0]

    if unmapped:
        raise _unmapped(unmapped, dataset_labels, theirs, slots, explicit, side)
    if ambiguous:
        found = f"several slots of the {side.name} go by the name of {listing(ambiguous)}"
        first = one_line(ambiguous[0].rpartition(" (slots")[0])
        remedy = f'choose one: its exact label, or its slot number in quotes, e.g. {side.field}: {{{first}: "7"}}'
        raise _problem(side, found, dataset_labels, theirs, remedy)
    _refuse_shared_slots(dataset_labels, theirs, slots, explicit_slots, side)
    if all(slot == NOBODY for slot in slots.values()):
        found = f"{side.field} leaves every class of the dataset to nobody"
        raise _problem(side, found, dataset_labels, theirs, "take out the entries of classes that it knows")
    return tuple(slots[name] for name in dataset_labels)


def known_classes(
    dataset_labels: Sequence[str],
    teacher_labels: Sequence[str] | Mapping[int, str],
    explicit: Explicit,
    side: Side = TEACHER,
) -> tuple[int, ...]:
    """`map_classes`, but a class that the teacher has no label for is left to nobody; all of them may be."""
    theirs = Vocabulary(teacher_labels)
    strange = {name: None for name in dataset_labels if name not in explicit and not theirs.slots(name)}
    known: dict[str, str | None] = {**strange, **explicit}
    if set(known) == set(dataset_labels) and not any(label is not None for label in known.values()):
        return (NOBODY,) * len(dataset_labels)
    return map_classes(dataset_labels, teacher_labels, known, side)


def _unmapped(
    unmapped: Sequence[str],
    dataset: Sequence[str],
    theirs: Vocabulary,
    slots: Mapping[str, int],
    explicit: Explicit,
    side: Side,
) -> QskdError:
    """What is missing, what is left over to choose from, and a class map to paste."""
    free, count = theirs.without(slots.values()), len(unmapped)
    classes = "dataset class" if count == 1 else "dataset classes"
    defaults = " (its checkpoint names no classes, only LABEL_0, LABEL_1, …)" if theirs.has_default_names() else ""
    found = f"the {side.name} has no label{defaults} for {count} {classes}: {listing(unmapped)}"
    expected = (
        f"each dataset class to have one label of the {side.name}, or to be left to nobody\n"
        f"    dataset ({len(dataset)} classes): {listing(dataset)}\n"
        f"    labels of the {side.name} that no class has: {listing(free)}"
    )
    entries: dict[str, str | None] = dict(explicit)
    if theirs.has_default_names() and len(dataset) == len(theirs.names) and not slots:
        said = f"if the {side.name} was trained on these very classes in this order, paste this; else correct it"
        entries |= dict(zip(dataset, theirs.names.values(), strict=True))
    else:
        said = f"paste this and correct it: the {side.name}'s label of each, or null, which leaves a class to nobody"
        by_form = {normalised(name): name for name in free}
        for name in unmapped:
            (*close,) = difflib.get_close_matches(normalised(name), by_form, n=1, cutoff=_ALIKE)
            entries[name] = by_form[close[0]] if close else None
    return QskdError(side.where, found, expected, f"{said}\n{ready_class_map(entries, side.name == TEACHER.name)}")


def ready_class_map(entries: Explicit, in_a_recipe: bool = True) -> str:
    """The entries as a recipe has them, and, where they are few or there is no recipe, as an option of the command line; names
    in quotes where YAML asks for it."""
    shown = dict(list(entries.items())[: len(entries) if len(entries) <= _PASTED else _SHOWN])
    more = len(entries) - len(shown)
    lines = []
    if in_a_recipe:
        lines = [f"    {line}" for line in _yaml({"teacher": {"class_map": shown}}).splitlines()]
    if not in_a_recipe or len(entries) <= _ON_ONE_LINE:
        written = shlex.quote(f"{_FIELD}={_yaml(shown, flow=True)}")
        lines.append(f"  or: --set {written}" if in_a_recipe else f"    --set {written}")
    return "\n".join([*lines, *([f"    # and {more} more"] if more else [])])


def _yaml(value: object, flow: bool = False) -> str:
    """Text that a terminal shows whole and that is read back as the same: what it would not show is escaped, in quotes."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6, default_flow_style=flow)
    return escaped(str(text).strip())


class _Dumper(yaml.SafeDumper):
    """Puts names with control characters, or others that are not shown, in double quotes, the only ones that know escapes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        odd = escaped(data) != data or "\n" in data or "\t" in data
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if odd else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _explicit_slots(dataset: Sequence[str], theirs: Vocabulary, explicit: Explicit, side: Side) -> dict[str, int]:
    sides = _SIDES.format(whose=side.name.upper())
    unknown_classes = [name for name in explicit if name not in dataset]
    if unknown_classes:
        found = f"entries for classes the dataset does not have: {listing(unknown_classes)}"
        raise _problem(side, found, dataset, theirs, f"correct the left side of {side.field}; {sides}")
    slots: dict[str, int] = {}
    for name, label in explicit.items():
        if label is None:
            slots[name] = NOBODY
            continue
        candidates = theirs.slots(label)
        if not candidates and label.isdecimal() and int(label) in theirs.names:
            candidates = [int(label)]
        if not candidates:
            found = f"{one_line(name)}: {one_line(label)}, but the {side.name} has no label {one_line(label)}"
            raise _problem(side, found, dataset, theirs, f"correct the right side of {side.field}; {sides}")
        if len(candidates) > 1:
            slots_there = ", ".join(map(str, candidates))
            found = f"{one_line(name)}: {one_line(label)}, but the {side.name} has that label at slots {slots_there}"
            remedy = f'give the slot in quotes, e.g. {side.field}: {{{one_line(name)}: "{candidates[0]}"}}'
            raise _problem(side, found, dataset, theirs, remedy)
        slots[name] = candidates[0]
    return slots


def _refuse_shared_slots(
    dataset: Sequence[str], theirs: Vocabulary, slots: Mapping[str, int], explicit_slots: Mapping[str, int], side: Side
) -> None:
    """Two classes on one slot is a choice when both were written down, and an accident otherwise."""
    owner: dict[int, str] = {}
    for name in dataset:
        if slots[name] == NOBODY:
            continue
        other = owner.setdefault(slots[name], name)
        if other != name and not (name in explicit_slots and other in explicit_slots):
            label = theirs.names[slots[name]]
            both = f"{one_line(other)} and {one_line(name)} both reach"
            found = f"{both} the {side.name}'s slot {slots[name]} ({one_line(label)})"
            remedy = f"if that is meant, write both in {side.field}; else name another label for one of them"
            raise _problem(side, found, dataset, theirs, remedy)


def respelled(dataset_labels: Sequence[str], labels: Sequence[str], slots: Sequence[int]) -> str:
    """The classes whose names are spelled otherwise on the other side, for a notice; empty where none is."""
    pairs = zip(dataset_labels, slots, strict=True)
    differing = [f"{name} = {labels[slot]}" for name, slot in pairs if slot != NOBODY and name != labels[slot]]
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    return ", ".join(one_line(pair) for pair in differing[:_SHOWN]) + more
