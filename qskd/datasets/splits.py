"""Two splits of one dataset: which of the classes that are trained each category of the validation split is.

By name, as `qskd evaluate` joins a model with data: ids and order may differ, and classes may be missing in the validation
split. Supercategories say nothing about what a detector is trained on, and are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from qskd.datasets.classes import NOBODY, Explicit, Vocabulary, listing
from qskd.datasets.manifest import Manifest
from qskd.datasets.samples import Category
from qskd.errors import QskdError
from qskd.printable import one_line

_REMEDY = "prepare both splits from JSON files with the same categories"
Slots = tuple[int, ...]


def join_categories(train: Manifest, val: Manifest) -> Slots:
    """The trained class of each of the validation split's categories, `NOBODY` where it is none of the training's.

    QskdError where a name could mean two classes, or two categories the same one.
    """
    if train.labels == val.labels:
        return tuple(range(len(train.labels)))
    known, owner, slots = Vocabulary(train.labels), dict[int, Category](), list[int]()
    for category in val.categories:
        candidates = known.slots(category.name)
        if len(candidates) > 1:
            names = " and ".join(_named(train.categories[slot]) for slot in candidates)
            raise QskdError(val.source, f"{_named(category)} could be {names} of {train.source}", "one class", _REMEDY)
        slot = candidates[0] if candidates else NOBODY
        if slot != NOBODY and (other := owner.setdefault(slot, category)) is not category:
            both = f"{_named(other)} and {_named(category)} both read like {_named(train.categories[slot])}"
            raise QskdError(val.source, f"{both} of {train.source}", "a class each", _REMEDY)
        slots.append(slot)
    return tuple(slots)


def united(
    ours: Sequence[Category], theirs: Sequence[Category], slots: Sequence[int]
) -> tuple[tuple[Category, ...], list[int]]:
    """The union of two datasets' categories, by ascending id, and the id of each of `theirs` in it.

    slots: for each of ours, its place in `theirs`, `NOBODY` where it is none of them: those two are one category, with our id and
    name. The others of theirs keep their id where it is free, and get one above all where it is not.
    """
    owner = {slot: ours[place].id for place, slot in enumerate(slots) if slot != NOBODY}
    found = {one.id: one for one in ours}
    following, ids = max((one.id for one in (*ours, *theirs)), default=0) + 1, list[int]()
    for place, one in enumerate(theirs):
        number = owner.get(place, one.id)
        if place not in owner:
            if number in found:
                number, following = following, following + 1
            found[number] = Category(number, one.name, one.supercategory)
        ids.append(number)
    return tuple(found[number] for number in sorted(found)), ids


def check_splits(
    train: Manifest, val: Manifest, where: tuple[str, str], used: Callable[[], Mapping[int, int]]
) -> list[str]:
    """What there is to say of how the splits differ, in sentences. QskdError where the validation split has objects of a class
    that is not trained: no student could find them.

    where: the two folders, training's first. used: the validation split's objects by category id; asked only where it
    matters, for that reads its annotations.
    """
    ours, theirs = (f"{folder} (of {split.source})" for folder, split in zip(where, (train, val), strict=True))
    slots = join_categories(train, val)
    strange = [category for category, slot in zip(val.categories, slots, strict=True) if slot == NOBODY]
    counts = used() if strange else {}
    if lost := [category for category in strange if counts.get(category.id)]:
        named = [f"{_named(category)} with {counts[category.id]} object(s)" for category in lost]
        raise QskdError(
            where[1],
            f"classes that {where[0]} does not have: {listing(named)}. {_first_difference(train, val, slots, ours, theirs)}",
            f"the classes of {ours}: {listing(train.labels)}",
            f"{_REMEDY}, or take these out of {val.source}: a student is never taught them",
        )
    if all(slot == NOBODY for slot in slots):
        raise QskdError(
            where[1], f"no class of {where[0]}: {listing(val.labels)}", f"of {ours}: {listing(train.labels)}", _REMEDY
        )
    return _told(train, val, slots, strange)


def _told(train: Manifest, val: Manifest, slots: Slots, strange: Collection[Category]) -> list[str]:
    places = sorted((slot, place) for place, slot in enumerate(slots) if slot != NOBODY)
    pairs = [(train.categories[slot], val.categories[place]) for slot, place in places]
    said = []
    if other := [(mine, its) for mine, its in pairs if (mine.id, mine.name) != (its.id, its.name)]:
        mine, its = other[0]
        said.append(
            f"data.val is joined with data.train by name: {len(other)} of its categories have another id or spelling "
            f"(first: {_named(mine)} of {train.source} is {_named(its)} of {val.source})"
        )
    if absent := [one.name for slot, one in enumerate(train.categories) if slot not in slots]:
        said.append(f"data.val has no category for {listing(absent)}: AP is over the other {len(pairs)} classes")
    if strange:
        said.append(
            f"data.val has categories that data.train lacks, and no object of them: {listing(map(_named, strange))}"
        )
    return said


def _first_difference(train: Manifest, val: Manifest, slots: Slots, ours: str, theirs: str) -> str:
    """The first category of the validation split that is another one than stands there in the training split."""
    place = slots.index(NOBODY)
    category = val.categories[place]
    same_id = next((_named(one) for one in train.categories if one.id == category.id), f"no id {category.id}")
    return f"First difference: {_named(category)} in {theirs}, {same_id} in {ours}"


def _named(category: Category) -> str:
    return f"id {category.id} {one_line(category.name)}"


def evaluated(train: Manifest, val: Manifest) -> tuple[Slots | None, tuple[int, ...]]:
    """What an evaluation of a student on the validation split needs: the student's logit slots, and the category id of each.
    None for all slots in their own order. Classes that the split does not have are left out, as its annotations are."""
    slots = join_categories(train, val)
    if slots == tuple(range(len(train.categories))):
        return None, tuple(category.id for category in val.categories)
    pairs = [(slot, one.id) for slot, one in zip(slots, val.categories, strict=True) if slot != NOBODY]
    return tuple(slot for slot, _ in pairs), tuple(number for _, number in pairs)


def labels_of_categories(train: Manifest, val: Manifest) -> dict[int, int]:
    """The validation split's category ids -> the training's contiguous labels, for those that it has."""
    slots = join_categories(train, val)
    return {one.id: slot for slot, one in zip(slots, val.categories, strict=True) if slot != NOBODY}


def class_map_for(explicit: Explicit, train: Manifest, val: Manifest) -> dict[str, str | None]:
    """A class map of the training split's names, in those of the validation split; what is not trained is left to nobody."""
    found: dict[str, str | None] = {}
    for category, slot in zip(val.categories, join_categories(train, val), strict=True):
        if slot == NOBODY:
            found[category.name] = None
        elif train.labels[slot] in explicit:
            found[category.name] = explicit[train.labels[slot]]
    return found
