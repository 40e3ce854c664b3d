"""Starting a student from its teacher: what fits is copied, layers are chosen evenly, and all of it is told."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.datasets.classes import NOBODY
from qskd.detectors.detector import Detector
from qskd.errors import QskdError
from qskd.families.facts import TEACHERS_ONLY
from qskd.families.table import find_family
from qskd.quantization.model import belongs_to_quantiser

# Per-layer parts, by where their number stands: encoder and decoder layers (RT-DETR's encoder has its own inside
# "aifi"), and heads of which there is one a layer (D-FINE has a quality head, "lqe_layers", too).
_NUMBERED = re.compile(
    r"^(?P<stem>(?:.*\.)?(?:encoder(?:\.aifi\.\d+)?\.layers|decoder\.(?:lqe_)?layers|(?:bbox|class)_embed))\.(?P<layer>\d+)\."
)


@dataclass(frozen=True)
class Inheritance:
    """What came of it. copied: student's part -> teacher's part; left: parts that start as they were, and why. backbone:
    whether it is copied, and with it what pixels are to be normalised with."""

    copied: dict[str, str]
    left: dict[str, str]
    backbone: bool

    def describe(self, most: int | None = None) -> str:
        """One line a part; of more than `most`, how many more there are."""
        said = {
            name: f"the same{source[len(name) :]}"
            for name, source in self.copied.items()
            if source.split(",")[0] == name
        }
        lines = [f"  {name} <- {said.get(name, source)}" for name, source in self.copied.items()]
        lines += [f"  {name}: not inherited, {why}" for name, why in self.left.items()]
        if most is not None and len(lines) > most:
            lines[most:] = [f"  and {len(lines) - most} more"]
        return "\n".join(lines)


def spread(count: int, available: int) -> list[int]:
    """`count` of `available` numbered things: the first and the last among them, evenly; one alone is the last."""
    if count == 1:
        return [available - 1]
    return [round(place * (available - 1) / (count - 1)) for place in range(count)]


def _parts(state: dict[str, Tensor], backbone: str) -> dict[str, list[str]]:
    """Parameter names by the part that is copied whole or not at all: the backbone, a layer, else the owning module."""
    parts: dict[str, list[str]] = defaultdict(list)
    for name in state:
        numbered = _NUMBERED.match(name)
        if name.startswith(backbone):
            parts[backbone.rstrip(".")].append(name)
        elif numbered:
            parts[f"{numbered['stem']}.{numbered['layer']}"].append(name)
        else:
            parts[name.rpartition(".")[0]].append(name)
    return dict(parts)


def _counts(state: dict[str, Tensor]) -> dict[str, int]:
    """How many layers each numbered stem has."""
    counts: dict[str, int] = {}
    for name in state:
        numbered = _NUMBERED.match(name)
        if numbered:
            counts[numbered["stem"]] = max(counts.get(numbered["stem"], 0), int(numbered["layer"]) + 1)
    return counts


def _sources(mine: dict[str, int], theirs: dict[str, int]) -> dict[str, list[int]]:
    """For each numbered stem that both have, the teacher's number for each of the student's.

    Heads go with the decoder layers they read; one more than those is the proposals' (Deformable DETR in two stages).
    """

    def decoder(counts: dict[str, int], stem: str) -> int:
        whole = counts[stem]
        layers = max((count for name, count in counts.items() if name.endswith("decoder.layers")), default=whole)
        return min(whole, layers) if stem.endswith("_embed") else whole

    found = {}
    for stem in mine.keys() & theirs.keys():
        own, other = decoder(mine, stem), decoder(theirs, stem)
        found[stem] = spread(own, other) + [other + place for place in range(mine[stem] - own)]
    return found


def _named(model: nn.Module, modules: Sequence[nn.Module]) -> set[str]:
    wanted = {id(module) for module in modules}
    return {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in wanted}


@torch.no_grad()
def inherit(student: Detector, teacher: Detector, class_slots: Sequence[int]) -> Inheritance:
    """Copy into the student (in place) every part of the teacher whose shapes fit.

    class_slots: the teacher's logit slot of each of the student's classes, `NOBODY` for one that it does not know, whose
    row stays the student's own. A student with fewer layers takes the first,
    the last and evenly spaced ones between; a layer is copied whole or not at all, and so is the backbone. Class heads
    are copied row by row; of more queries than the student has, evenly spaced ones are taken, and of fewer, as many as
    there are, the others looking first at places of their own, spread over the image. A narrower student of as many heads,
    or of fewer that are no wider, takes evenly chosen channels of evenly chosen heads, the same ones everywhere (weight
    selection, Xu et al., ICLR 2024), save in the backbone. Of a teacher of another family only the backbone is copied: its
    other parts mean other things, whatever their shapes. Raises QskdError when that does not fit either.
    """
    if teacher.family in TEACHERS_ONLY:
        raise QskdError(
            "student.inherit",
            f"a teacher that is a {TEACHERS_ONLY[teacher.family]}, of which no part fits into a student",
            "a teacher of a family that can be a student",
            "--set student.inherit=false, and student.backbone.init or student.init for a start",
        )
    if student.family != teacher.family:
        return _backbone_only(student, teacher)
    mine, theirs = _weights(student.model), _weights(teacher.model)
    own, family = student.model, find_family(student.family, "student.inherit")
    prefix = next(iter(_named(own, [student.backbone]))) + "."
    heads = _named(own, family.class_heads(own))
    queries = {
        name for name, module in own.named_modules() if isinstance(module, nn.Embedding) and "query" in name.lower()
    }
    if parts := family.group_parts(own):
        queries |= _named(own, [parts.places])
    reading = {f"{name}." for name in _named(own, family.reading(own))}
    narrow = _Narrowing.between(family.sizes(own.config), family.sizes(teacher.model.config))
    layers = _sources(_counts(mine), _counts(theirs))
    other_maps = family.follow(own, teacher.model)
    # Rows after the classes' ("no object") are the last on both sides.
    more = range(teacher.model.config.num_labels, teacher.model.config.num_labels + family.no_object_rows)
    slots = torch.tensor([*class_slots, *more], dtype=torch.int64)
    unknown = slots == NOBODY
    copied, left = {}, {}
    inherited: set[str] = set()
    for part, names in _parts(mine, prefix).items():
        numbered = _NUMBERED.match(part + ".")
        source = part
        if numbered and not part.startswith(prefix) and numbered["stem"] in layers:
            source = f"{numbered['stem']}.{layers[numbered['stem']][int(numbered['layer'])]}"
        stem = numbered["stem"] if numbered else ""
        if (other_maps and stem.endswith("decoder.layers")) or (narrow.other_heads and stem.endswith(".layers")):
            left[part] = narrow.other_heads or other_maps
            continue
        values: dict[str, Tensor] = {}
        chosen = False
        for name in names:
            value = theirs.get(source + name[len(part) :])
            if value is not None and part in heads:
                value = value[slots.clamp(min=0)]
            if value is not None and name.startswith(prefix) and name.endswith("position_embeddings"):
                value = _places(value, mine[name])
            if value is not None and not name.startswith(prefix):
                wanted, before = mine[name].shape, value.shape
                if any(name.startswith(one) for one in reading):  # what they read is the backbone's, of another width
                    wanted = torch.Size([*wanted[:1], *before[1:]])
                value = narrow.channels(value, wanted, name)
                chosen |= value.shape != before
            if value is not None and part in queries and value.shape[1:] == mine[name].shape[1:]:
                value = _rows(value, mine[name])
            if value is None or value.shape != mine[name].shape:
                found = "nothing" if value is None else list(value.shape)
                why = "" if name.startswith(prefix) else narrow.why_not  # the backbone's channels are no head's
                left[part] = f"{name[len(part) + 1 :]} is {list(mine[name].shape)}, the teacher's {found}{why}"
                break
            if part in heads and unknown.any():
                value = value.clone()
                value[unknown] = mine[name][unknown].to(value.dtype)
            values[name] = value
        else:
            copied[part] = f"{source}, channels evenly chosen" if chosen else source
            inherited |= values.keys()
            for name, value in values.items():
                mine[name].copy_(value)
    had = family.num_queries(teacher.model.config)
    if family.num_queries(own.config) > had and queries & copied.keys():
        family.place_queries(own, had)
    student.inherited = frozenset(inherited)
    return Inheritance(copied, left, backbone=prefix.rstrip(".") in copied)


def fitting_sizes(student: Detector, teacher: Detector) -> dict[str, int]:
    """The fields of `student` in a recipe by which parts of this teacher would fit, of those that now keep them out: heads that
    can be chosen among the teacher's, and nothing wider. Empty where the sizes are not what is in the way."""
    family = find_family(student.family, "student.inherit")
    own, theirs = family.sizes(student.model.config), family.sizes(teacher.model.config)
    found = {name: theirs[name] for name in ("width", "ffn_width") if own[name] > theirs[name]}
    if _Narrowing.between({**own, **found}, theirs).why_not:
        found["heads"] = theirs["heads"]
        if own["width"] % theirs["heads"]:  # no such student could be built
            found["width"] = theirs["width"]
    return {name: found[name] for name in ("width", "heads", "ffn_width") if name in found}


# What has as many outputs for each head: a Deformable DETR's places of each head and their weights, head after head.
_OF_HEADS = re.compile(r"(?:^|\.)(?:sampling_offsets|attention_weights)\.")


@dataclass(frozen=True)
class _Narrowing:
    """From a teacher's sizes to a student's. Pairs are (teacher's, student's); why_not: why nothing is narrowed, else empty.

    A channel of d_model is one of a head's: of fewer heads, evenly spaced ones are taken, and of each head evenly spaced channels.
    """

    width: tuple[int, int]
    ffn_width: tuple[int, int]
    heads: tuple[int, int]
    why_not: str = ""

    @staticmethod
    def between(student: dict[str, int], teacher: dict[str, int]) -> _Narrowing:
        width, ffn_width, heads = ((teacher[name], student[name]) for name in ("width", "ffn_width", "heads"))
        a_head = width[0] // heads[0], width[1] // heads[1]
        if heads[1] <= heads[0] and a_head[1] <= a_head[0]:
            return _Narrowing(width, ffn_width, heads)
        why = f" (the student's {heads[1]} heads of {a_head[1]} channels can't be taken from its {heads[0]} of {a_head[0]})"
        return _Narrowing(width, ffn_width, heads, why)

    @property
    def other_heads(self) -> str:
        """Why a layer of the very same shapes would compute another attention; empty where it would not."""
        return f"its attention has other heads{self.why_not}" if self.width[0] == self.width[1] and self.why_not else ""

    def channels(self, value: Tensor, shape: torch.Size, name: str) -> Tensor:
        """`value`, a parameter of this name, with evenly chosen channels where it is wider than `shape` by what d_model, the FFN
        or the number of heads is smaller."""
        if value.dim() != len(shape) or self.why_not:
            return value
        for axis, (theirs, mine) in enumerate(zip(value.shape, shape, strict=True)):
            if mine < theirs and (index := self._index(theirs, mine, bool(_OF_HEADS.search(name)) and axis == 0)):
                value = value.index_select(axis, torch.tensor(index, device=value.device))
        return value

    def _index(self, theirs: int, mine: int, of_heads: bool) -> list[int]:
        """Which of `theirs` channels are the student's `mine`; empty where that has no meaning."""
        if of_heads:
            whole = self.width[1] * self.heads[0] <= self.width[0] * self.heads[1]  # none is made of several
            return self._by_head(theirs, mine) if whole and theirs * self.heads[1] == mine * self.heads[0] else []
        if theirs % self.width[0] == 0 and mine * self.width[0] == theirs * self.width[1]:
            # Multiples of d_model too (queries of place and content): each block then gives the same channels.
            block = self._by_head(*self.width)
            return [start + place for start in range(0, theirs, self.width[0]) for place in block]
        # Of d_model or the FFN a part: half of it, within a block of convolutions or a gated FFN.
        narrower = any(mine * wide == theirs * own for wide, own in (self.width, self.ffn_width))
        return _evenly(mine, theirs) if narrower else []

    def _by_head(self, theirs: int, mine: int) -> list[int]:
        heads, own = self.heads
        if theirs % heads or mine % own:
            return _evenly(mine, theirs)
        of_a_head = _evenly(mine // own, theirs // heads)
        return [head * (theirs // heads) + place for head in spread(own, heads) for place in of_a_head]


def _evenly(count: int, available: int) -> list[int]:
    """The middles of `count` equal parts of `available` channels."""
    return [int((place + 0.5) * available / count) for place in range(count)]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Without batch counters: a frozen norm, such as every loaded detector has, counts none. And without quantisers, whose steps
    are found in training."""
    state = {name: value for name, value in model.state_dict().items() if not belongs_to_quantiser(name)}
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _backbone_only(student: Detector, teacher: Detector) -> Inheritance:
    mine, theirs = _weights(student.backbone), _weights(teacher.backbone)
    differing = [name for name, value in mine.items() if name not in theirs or theirs[name].shape != value.shape]
    if differing or len(mine) != len(theirs):
        name = differing[0] if differing else next(name for name in theirs if name not in mine)
        shapes = [list(state[name].shape) if name in state else "nothing" for state in (mine, theirs)]
        raise QskdError(
            "student.inherit",
            f"a student of family {student.family} and a teacher of family {teacher.family}, whose backbones differ too "
            f"({name} is {shapes[0]}, the teacher's {shapes[1]})",
            "one family for both, or one backbone",
            f"set student.family: {teacher.family}, student.backbone as the teacher's, or student.inherit: false",
        )
    for name, value in mine.items():
        value.copy_(theirs[name])
    (part,) = (name for name, module in student.model.named_modules() if module is student.backbone)
    why = f"the teacher is a {teacher.family}, whose parts mean other things"
    return Inheritance({part: f"the backbone of the {teacher.family}"}, {"everything else": why}, backbone=True)


def _places(theirs: Tensor, mine: Tensor) -> Tensor:
    """A ViT's embeddings of places [1, 1 + cells of a square, C] for a square of as many cells as `mine` has, as the ViT
    itself fits them to an image of another size."""
    sides = [math.isqrt(len(each[0]) - 1) if each.dim() == 3 else 0 for each in (theirs, mine)]
    squares = all(side > 0 and side**2 + 1 == len(each[0]) for side, each in zip(sides, (theirs, mine), strict=True))
    if theirs.shape == mine.shape or not squares or theirs.shape[2] != mine.shape[2]:
        return theirs
    grid = theirs[:, 1:].transpose(1, 2).unflatten(2, (sides[0], sides[0]))
    fitted = F.interpolate(grid, size=(sides[1], sides[1]), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([theirs[:, :1], fitted.flatten(2).transpose(1, 2)], 1)


def _rows(theirs: Tensor, mine: Tensor) -> Tensor:
    """Query embeddings for as many queries as `mine` has."""
    if len(mine) <= len(theirs):
        return theirs[spread(len(mine), len(theirs))]
    return torch.cat([theirs, mine[len(theirs) :].to(theirs.dtype)])
