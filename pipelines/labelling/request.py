"""What `qskd label` is asked, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qskd.config import Config, ResizeConfig
from qskd.datasets.classes import Explicit
from qskd.printable import one_line


@dataclass(frozen=True)
class Request:
    """What is asked. images: a folder or a list. like: a labelled shard folder, whose categories the labels get; empty: the
    teacher's own classes, or `classes`, of one that is asked in words. threshold: of every class; None: as RULE says. resize,
    class_map, device, precision: as a recipe has them. workers: the most processes; 0: here, without Ray. onto: a COCO JSON of the
    pictures (images: their folder), whose objects the labels are joined to; class_map is then of its categories, unless like has
    it."""

    model: str
    images: Path
    out: Path
    like: str = ""
    threshold: float | None = None
    on_error: Literal["stop", "skip"] = "stop"
    resize: ResizeConfig | None = None
    class_map: Explicit | None = None
    batch_size: int = 16
    workers: int = 1
    threads: int = 1
    device: str = "auto"
    precision: str = "float32"
    overwrite: bool = False
    onto: Path | None = None
    classes: tuple[str, ...] = ()


def as_recipe(config: Config) -> dict[str, Any]:
    """The fields of a `Request` that a recipe says."""
    return {
        "resize": config.teacher.resize,
        "class_map": config.teacher.class_map,
        "device": config.compute.device,
        "precision": config.compute.evaluation_precision,
    }


@dataclass(frozen=True)
class Labels:
    """What was written. thresholds: by class name. objects: by class name, those that were kept. mean_score: of these; None of
    none. empty: images without any. left_out: pictures, with what is wrong with them. own: objects of the dataset that they were
    joined to; None: of none."""

    out: Path
    images: int
    thresholds: Mapping[str, float]
    objects: Mapping[str, int]
    mean_score: float | None
    empty: int
    left_out: Sequence[Mapping[str, str]]
    own: int | None = None

    def lines(self) -> list[str]:
        """For the terminal."""
        total = sum(self.objects.values())
        sure = "" if self.mean_score is None else f" of mean score {self.mean_score:.2f}"
        each = f"{total / self.images:.1f} an image" if self.images else "none"
        beside = "" if self.own is None else f", beside {self.own} of the dataset"
        said = [
            f"{self.out}: {self.images} images, {total} objects ({each}){sure}{beside}; {self.empty} images without any"
        ]
        names = sorted(self.objects, key=lambda name: -self.objects[name])
        said += [f"  {one_line(name)}: {self.objects[name]} at {self.thresholds[name]:.3f} or more" for name in names]
        said += [f"left out: {one_line(each['where'])}: {one_line(each['found'])}" for each in self.left_out[:5]]
        return said + ([f"left out: {len(self.left_out) - 5} more"] if len(self.left_out) > 5 else [])
