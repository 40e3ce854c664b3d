"""The files that one detector is deployed as: which there are, and what was found of each. Light: the model card keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qskd.evaluation.shown import score_text

ONNXRUNTIME, OPENVINO = "onnxruntime", "OpenVINO"


@dataclass(frozen=True)
class Variant:
    """file: the name in the exported folder. weights: what most of them are stored as. computes: what the runtime computes in.
    Those below are a float detector's; `qskd.deploy.runtimes.as_stored` looks into the file."""

    file: str
    runtime: str
    weights: str
    computes: str

    @property
    def name(self) -> str:
        return f"{self.computes} {self.runtime}"

    def bytes_in(self, folder: Path) -> int:
        """On disk; OpenVINO's weights are in a file of their own."""
        file = folder / self.file
        parts = [file, *([file.with_suffix(".bin")] if file.suffix == ".xml" else [])]
        return sum(part.stat().st_size for part in parts)


FLOAT32 = Variant("model.onnx", ONNXRUNTIME, "float32", "float32")
FLOAT16 = Variant("model.float16.onnx", ONNXRUNTIME, "float16", "float16")
INT8 = Variant("model.int8.onnx", ONNXRUNTIME, "int8", "int8")
OPENVINO_FLOAT32 = Variant("openvino_model.xml", OPENVINO, "float16", "float32")
OPENVINO_BFLOAT16 = Variant("openvino_model.xml", OPENVINO, "float16", "bfloat16")
OPENVINO_INT8 = Variant("openvino_model.int8.xml", OPENVINO, "int8", "int8")
VARIANTS = (FLOAT32, FLOAT16, INT8, OPENVINO_FLOAT32, OPENVINO_BFLOAT16, OPENVINO_INT8)


@dataclass(frozen=True)
class Differences:
    """To model.onnx in onnxruntime, over all queries of `images` images. reordered: queries that stand in another place."""

    images: int
    largest_probability: float
    mean_probability: float
    largest_box: float
    mean_box: float
    reordered: int = 0


@dataclass(frozen=True)
class VariantFacts:
    """metrics: of `qskd.evaluation`, empty where not measured. ms: of a batch's image; ratio: of its time to the first's."""

    variant: Variant
    bytes: int
    differences: Differences | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    ms: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class VariantsFound:
    """facts: model.onnx in onnxruntime first. notes: sentences: how they were made and measured."""

    facts: tuple[VariantFacts, ...]
    notes: tuple[str, ...] = ()


FIGURES = ("file", "in", "MB", "AP", "AP50", "ms/image", "ratio")
GAPS = ("file", "in", "scores", "mean", "boxes", "mean")  # the largest and the mean difference of each


def figures(one: VariantFacts) -> list[str]:
    """One row under FIGURES."""
    found = [one.variant.file, one.variant.computes, f"{one.bytes / 1e6:.2f}"]
    found += [score_text(one.metrics.get(name)) if one.metrics else "–" for name in ("AP", "AP50")]
    return found + ["–" if value is None else f"{value:.2f}" for value in (one.ms, one.ratio)]


def gaps(one: VariantFacts) -> list[str]:
    """One row under GAPS."""
    found, far = [one.variant.file, one.variant.computes], one.differences
    if far is None:
        return found + ["–"] * 4
    numbers = (far.largest_probability, far.mean_probability, far.largest_box, far.mean_box)
    return found + [f"{number:.1e}" for number in numbers]


def section(found: VariantsFound) -> str:
    """Markdown for the model card; empty where float32 is all there is and nobody measured its AP."""
    if len(found.facts) < 2 and not any(one.metrics for one in found.facts):
        return ""
    head = [*FIGURES, "scores: largest difference", "mean", "boxes: largest", "mean"]
    rows = [[*figures(one), *gaps(one)[2:]] for one in found.facts]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * 2 + ['---:'] * (len(head) - 2))} |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", *found.notes, ""])


def there(folder: Path) -> Sequence[Variant]:
    """Those whose file an exported folder holds."""
    return [variant for variant in VARIANTS if (folder / variant.file).is_file()]
