"""Memory maps of two networks made to meet: resampling, pairing levels, projecting widths; and numbers that a hash draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qskd.boxes import extent_wh
from qskd.errors import QskdError

if TYPE_CHECKING:
    from qskd.distillation.method import Facts, Lesson
    from qskd.teacher.memory.basis import Basis

_WORD = 0xFFFFFFFF


def resample(map_: Tensor, valid: Tensor, onto_valid: Tensor, region_xyxy: Tensor | None = None) -> Tensor:
    """Bring a map [B, C, H, W] to another grid, valid region onto valid region: -> [B, C, H', W'] float32.

    valid: [B, H, W]; onto_valid: [B, H', W']; both True in a rectangle at the top left (what is left is padding).
    Positions outside `onto_valid` repeat the border. Bilinear; where the new grid is less than half as fine, the mean
    of several samples a cell, so that a narrow peak is not stepped over. An image whose regions agree keeps its very
    values. region_xyxy: [B, 4], left, top, right, bottom (0..1) of the valid region: this part of it instead of the whole.
    """
    return resampler(valid, onto_valid, region_xyxy)(map_)


def resampler(valid: Tensor, onto_valid: Tensor, region_xyxy: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """`resample` for several maps of the same grid, whose places are computed once."""
    (rows, columns), (height, width) = valid.shape[1:], onto_valid.shape[1:]
    alike = valid.shape[-2:] == onto_valid.shape[-2:]
    may_ask = valid.device.type == "cpu" and not torch.compiler.is_compiling()
    if alike and region_xyxy is None and may_ask and torch.equal(valid, onto_valid):
        return Tensor.float  # asking a GPU would mean waiting for it, asking in a graph to leave it
    dense = max(1, math.ceil(max(rows / height, columns / width) / 2))
    source, target = (extent_wh(each).clamp(min=1).float() for each in (valid, onto_valid))
    axes = []
    for axis, (cells, whole) in enumerate(((width, columns), (height, rows))):
        centre = (torch.arange(cells * dense, device=valid.device) + 0.5) / dense  # in target cells
        at = centre / target[:, axis, None]  # [B, cells], share of the region
        if region_xyxy is not None:
            low, high = region_xyxy[:, axis, None], region_xyxy[:, axis + 2, None]
            at = low + at * (high - low)
        at = at * source[:, axis, None]  # in source cells
        at = torch.minimum(
            at.clamp(min=0.5), source[:, axis, None] - 0.5
        )  # no reading across the valid region's border
        axes.append(at / whole * 2 - 1)
    across, down = axes
    grid = torch.stack(torch.broadcast_tensors(across.unsqueeze(1), down.unsqueeze(2)), dim=-1)  # [B, H' , W', 2]
    same = (valid == onto_valid).flatten(1).all(1) if alike else None
    if same is not None:
        same = (same if region_xyxy is None else same & whole_region(region_xyxy))[:, None, None, None]

    def move(map_: Tensor) -> Tensor:
        map_ = map_.float()
        moved = F.grid_sample(map_, grid, mode="bilinear", padding_mode="border", align_corners=False)
        if dense > 1:
            moved = F.avg_pool2d(moved, dense)
        return moved if same is None else torch.where(same, map_, moved)

    return move


def whole_region(region_xyxy: Tensor) -> Tensor:
    """[B, 4] -> [B] bool: whether it is all of the image."""
    return ((region_xyxy[:, :2] == 0) & (region_xyxy[:, 2:] == 1)).all(1)


def pair_levels(student_cells: Sequence[float], teacher_cells: Sequence[float]) -> list[tuple[int, int]]:
    """(student level, teacher level) of the maps to compare. Cells: of each map in an image of the usual size, finest first.

    Equally many: in order. Otherwise each map of the smaller set, in order, takes the map of the other set that is
    nearest in cells (by their ratio) and not yet taken. One batch's own sizes would not do: where one side squeezes its
    images into squares and the other keeps their shape, the nearest is another one from batch to batch.
    """
    if len(student_cells) == len(teacher_cells):
        return [(level, level) for level in range(len(student_cells))]
    swapped = len(student_cells) > len(teacher_cells)
    few, many = (teacher_cells, student_cells) if swapped else (student_cells, teacher_cells)
    free, pairs = list(range(len(many))), []
    for level, cells in enumerate(few):
        nearest = min(free, key=lambda other: abs(math.log(many[other] / cells)))
        free.remove(nearest)
        pairs.append((nearest, level) if swapped else (level, nearest))
    return pairs


def eye_or_orthogonal(weight: Tensor) -> None:
    """[outputs, inputs], in place."""
    if weight.shape[0] == weight.shape[1]:
        nn.init.eye_(weight)  # starts as plain mimicking
    else:
        nn.init.orthogonal_(weight)


class Projector(nn.Conv2d):
    """A 1x1 convolution: [B, C, H, W] -> [B, H, W, C']. Memory lies in this order as the encoder gives it, and a convolution
    would lay it out anew.

    basis: in which the teacher's map was cached. What comes out is then brought onto its directions too: along the others nothing
    is known of the teacher, and a student that was compared there would be taught that nothing varies along them.
    """

    mean: Tensor
    vectors: Tensor

    def __init__(self, inputs: int, outputs: int, basis: Basis | None = None) -> None:
        super().__init__(inputs, outputs, kernel_size=1)
        self.onto = basis is not None
        if basis is not None:  # the cache has them
            self.register_buffer("mean", basis.mean.clone(), persistent=False)
            self.register_buffer("vectors", basis.vectors.clone(), persistent=False)

    def forward(self, memory: Tensor) -> Tensor:
        weight, bias = self.weight.flatten(1), self.bias
        assert bias is not None
        if self.onto:  # the convolution is brought onto them, once for all cells
            weight = self.vectors @ (self.vectors.T @ weight)
            bias = self.vectors @ (self.vectors.T @ (bias - self.mean)) + self.mean
        return F.linear(memory.movedim(1, -1), weight, bias)


def projector(inputs: int, outputs: int, turned: bool = False, basis: Basis | None = None) -> Projector:
    """Between two widths: the identity at first where they agree, else orthogonal. turned: orthogonal in any case. basis: as of
    `Projector`.

    A student whose decoder reads the memory's channels as they are (`Facts.reads_raw_memory`) has to be free to choose what each
    means: begun as the identity, the projector wants them to mean what the teacher's do (docs/evidence.md has what that costs).
    """
    layer = Projector(inputs, outputs, basis)
    weight = layer.weight.data.view(outputs, inputs)
    if turned:
        nn.init.orthogonal_(weight)
    else:
        eye_or_orthogonal(weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def match_maps(
    lesson: Lesson, student_level: int, teacher_level: int, layer: nn.Module
) -> tuple[Tensor, Tensor, Tensor]:
    """One pair of memory maps, on the student's grid: the student's through the projector [B, H, W, C'], the teacher's
    without gradient [B, H, W, C'], and where the student's is no padding [B, H, W]; all float32."""
    valid = lesson.student.memory_valid[student_level]
    goal = resample(lesson.teacher.memory[teacher_level].detach(), lesson.teacher.memory_valid[teacher_level], valid)
    shown = layer(lesson.student.memory[student_level]).float()
    return shown, goal.movedim(1, -1), valid.float()


class Meeting(nn.ModuleList):
    """The maps of two networks that are compared, each pair with the projector of the student's: all that a feature loss has
    to learn."""

    def __init__(self, student: Facts, teacher: Facts) -> None:
        """QskdError where it can't be known which maps are alike."""
        if len(student.channels) != len(teacher.channels) and not (student.cells and teacher.cells):
            raise QskdError(
                "distillation.method",
                f"{len(student.channels)} student maps and {len(teacher.channels)} teacher maps of unknown sizes",
                "to know which of them are alike",
                "make the cache of teacher outputs anew: qskd cache RECIPE --overwrite, which deletes its files",
            )
        self.pairs = pair_levels(student.cells or student.channels, teacher.cells or teacher.channels)
        self.channels = [teacher.channels[other] for _, other in self.pairs]
        turned = student.reads_raw_memory
        super().__init__(
            projector(student.channels[own], teacher.channels[other], turned, teacher.basis(other))
            for own, other in self.pairs
        )

    def of(self, lesson: Lesson) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each pair, as `match_maps` has it: shown [B, H, W, C], goal [B, H, W, C], valid [B, H, W]."""
        for (own, other), layer in zip(self.pairs, self, strict=True):
            yield match_maps(lesson, own, other, layer)


def mixed(numbers: Tensor) -> Tensor:
    """int64 -> int64 below 2^32, as if drawn at random: MurmurHash3's finaliser on the lower 32 bits. On the device, which is not
    waited for."""
    found = numbers & _WORD
    found = ((found ^ (found >> 16)) * 0x85EBCA6B) & _WORD
    found = ((found ^ (found >> 13)) * 0xC2B2AE35) & _WORD
    return found ^ (found >> 16)


def uniform(seed: Tensor, step: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] in 0..1, below 1: of seed and step, and nothing else."""
    places = torch.arange(rows * columns, device=seed.device)
    drawn = mixed(mixed(mixed(seed) + step) + places)
    return ((drawn >> 8).float() / 2**24).view(rows, columns)
