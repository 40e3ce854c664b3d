"""What a benchmark found, and the tables that say it (`qskd benchmark`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qskd.deploy.speed import Cost, Size, Timing
from qskd.deploy.variants import Variant
from qskd.evaluation.shown import score_text
from qskd.printable import one_line

TORCH, ONNX = "PyTorch", "onnxruntime"


@dataclass(frozen=True)
class Row:
    """One model in one runtime. memory: batch size -> bytes; empty where it was not measured. bytes: on disk, 0 where there is no
    file. metrics: of `qskd.evaluation`, empty where not measured. variant: of an exported file."""

    name: str
    runtime: str
    timings: list[Timing]
    memory: dict[int, int]
    bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    variant: Variant | None = None


@dataclass(frozen=True)
class Benchmark:
    """What was found. facts: device, threads, precision in words."""

    facts: str
    models: dict[str, tuple[str, Size, Cost]]  # name -> family, size of its input, cost
    rows: list[Row]
    busy: str = ""  # `qskd.detectors.cost.busy_note`, when timing ended
    notes: tuple[str, ...] = ()  # what else is to be said of a model


def show(found: Benchmark, console: Console | None = None) -> None:
    """Two tables: what does not depend on the machine, and what does."""
    console = console or Console()
    costs = Table(title="parameters, and operations of one image (a multiply-add is two)")
    for column in ("model", "family", "input", "parameters", "GFLOPs"):
        costs.add_column(column, justify="right" if column in ("parameters", "GFLOPs") else "left", overflow="fold")
    for name, (family, size, cost) in found.models.items():
        costs.add_row(Text(one_line(name)), family, str(size), f"{cost.parameters / 1e6:.2f} M", f"{cost.gflops:.3g}")
    console.print(costs)
    if any(row.metrics for row in found.rows) or len({row.runtime for row in found.rows} - {TORCH, ONNX}):
        files = Table(title="size on disk, and COCO AP where it was measured")
        for column in ("model", "runtime", "MB", "AP", "AP50", "AP75"):
            files.add_column(column, justify="left" if column in ("model", "runtime") else "right", overflow="fold")
        for row in found.rows:
            scores = [score_text(row.metrics.get(name)) if row.metrics else "–" for name in ("AP", "AP50", "AP75")]
            megabytes = f"{row.bytes / 1e6:.2f}" if row.bytes else "–"
            files.add_row(Text(one_line(row.name)), row.runtime, megabytes, *scores)
        console.print(files)
    first = found.rows[0]
    times = Table(
        title=f"{found.facts}; medians; ratio: of time to {escape(one_line(first.name))}'s in {first.runtime}"
    )
    for column in ("model", "runtime", "batch", "ms/image", "images/s", "ratio", "peak MB"):
        times.add_column(column, justify="left" if column in ("model", "runtime") else "right", overflow="fold")
    for row in found.rows:
        for timing in row.timings:
            memory = row.memory.get(timing.batch)
            cells = [f"{timing.ms_per_image:.2f}", f"{timing.images_per_s:.1f}", f"{timing.ratio:.2f}"]
            peak = "–" if memory is None else f"{memory / 1e6:.0f}"
            head = Text(one_line(row.name)), row.runtime, str(timing.batch)
            times.add_row(*head, *cells, peak, end_section=timing is row.timings[-1])
    console.print(times)
    if not all(row.memory for row in found.rows):
        console.print("–: not measured")
    for note in (*found.notes, *([found.busy] if found.busy else [])):
        console.print(note, markup=False, soft_wrap=True)
