"""How many operators and kernels a training step launches, eager and with `compute.compile`, counted on a CPU.

python -m benchmarks.launches [--family NAME ...] [--kind plain|qskd] [--eager] [--quick]

A step is forward, losses, backward, clipping and update. Eager: operators that PyTorch dispatches and that compute something
(views, and memory without values, launch nothing). Compiled: what inductor makes of the step's graphs, loops after fusion and
calls of libraries, and the operators that are left outside of the graphs. No time is measured, and no kernel is run: the graphs are
run operator by operator, so that no C++ compiler is needed. A GPU's kernels are other ones; that there are half as many operators
to launch holds there too.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.detection_loss import Sizes, make_case
from benchmarks.timing import Ratio, Report, machine
from qskd.config import Config
from qskd.config.recipe import build
from qskd.datasets.batch import train_batch
from qskd.detectors import build_student
from qskd.structures import TeacherNeeds, TeacherRecord
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import collate, columns_for, encode
from qskd.teacher.manifest import CacheSizes
from qskd.teacher.memory.directions import flat_directions
from qskd.teacher.online import queries_above
from qskd.training.compiling import compile_step
from qskd.training.step import Training

GOAL = 0.5
CPU = torch.device("cpu")
EDGE, CLASSES = 64, 8
_HYBRID = {"feature_levels": 3, "encoder_layers": 1, "decoder_layers": 3}
_SHAPES: dict[str, dict[str, Any]] = {
    "conditional_detr": {"encoder_layers": 6, "decoder_layers": 6},
    "deformable_detr": {"feature_levels": 4, "encoder_layers": 6, "decoder_layers": 6},
    "rt_detr": _HYBRID,
    "d_fine": _HYBRID,
}
FAMILIES = tuple(_SHAPES)
# As deep as the published ones with ResNet-18, and narrow: the number of operators depends on layers, not on widths.
_NARROW = {"width": 32, "heads": 4, "ffn_width": 32, "queries": 20, "resize": {"mode": "square", "size": EDGE}}
_BACKBONE = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [2, 2, 2, 2]}
_LESS = {"encoder_layers": 1, "decoder_layers": 2, "backbone": {**_BACKBONE, "depths": [1, 1, 1, 1]}}
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense"}


class Operators(TorchDispatchMode):
    """While open, counts in `found` the operators that compute something, by name; not those within graphs of `Kernels`."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        super().__init__()
        self.kernels = kernels
        self.found: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what is compiled stays so while this counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        viewed = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        name = func.overloadpacket.__name__
        if not (viewed or name in _NO_KERNEL or (self.kernels and self.kernels.running)):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Kernels:
    """A backend of torch.compile that lowers graphs as inductor does, counts the kernels of each after fusion, and runs the graph
    as it was. launched: of the graphs that were run. graphs: how many were made. running: in one of them now."""

    def __init__(self) -> None:
        self.launched, self.graphs, self.running = 0, 0, False

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx  # seconds, of which an eager step has no use

        made: Any = self._compile
        return compile_fx(graph, inputs, inner_compile=made)

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        count = _kernels_of(torch.fx.GraphModule(graph, copy.deepcopy(graph.graph)), inputs, options)
        self.graphs += 1

        def run(given: list[Any]) -> Any:
            self.launched, before, self.running = self.launched + count, self.running, True
            try:
                return torch.fx.Interpreter(graph).boxed_run(given)
            finally:
                self.running = before

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _kernels_of(graph: torch.fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> int:
    """Loops that inductor fuses into one, and calls of libraries, each once. The steps are those of `compile_fx_inner`."""
    from torch._inductor import compile_fx as compiler
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    compiler.view_to_reshape(graph)
    with torch.no_grad():
        fake = compiler.fake_tensor_prop(graph, list(inputs))
    compiler._recursive_record_original_output_strides(graph)
    with V.set_fake_mode(fake):
        compiler._recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(
            graph,
            example_inputs=inputs,
            shape_env=fake.shape_env,
            is_backward=options.get("is_backward", False),
        )
        lowering.freeze_runtime_asserts()
        debug: Any = DebugContext()
        with V.set_graph_handler(lowering), V.set_debug_handler(debug), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            lowering._update_scheduler()
    return sum(not isinstance(node, NopKernelSchedulerNode) for node in lowering.scheduler.nodes)


def recipe(family: str, quick: bool) -> Config:
    """A student of the family, narrow, on square images, with denoising queries where the family has them."""
    sizes = {**_NARROW, "family": family, "backbone": _BACKBONE, **_SHAPES[family], **(_LESS if quick else {})}
    return build({"student": sizes, "training": {"ema_decay": 0.999}})


def batches(config: Config, kind: str) -> list[dict[str, Any]]:
    """The loader's arrays: objects of several numbers, and what a cached teacher said for "qskd"."""
    random, made = np.random.default_rng(0), []
    for number, counts in enumerate(((3, 1), (2, 5), (4, 3), (6, 2), (1, 4))):
        case = make_case(counts, Sizes(1, 2, 20, CLASSES), number)
        arrays = {
            "images": random.integers(0, 256, (2, EDGE, EDGE, 3), np.uint8),
            "sizes": np.full((2, 2), EDGE, np.int32),
            "boxes_cxcywh": case.targets.boxes_cxcywh.numpy(),
            "labels": case.targets.labels.numpy(),
            "counts": np.array(counts, np.int32),
            "image_ids": np.arange(2) + 2 * number,
        }
        if kind == "qskd":
            arrays |= _said(config, case, number)
        made.append(arrays)
    return made


def _said(config: Config, case: Any, seed: int) -> dict[str, Any]:
    """The columns of a teacher of one map, 16 cells a side."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.randn(2, 16, 4, 4, generator=generator)
    record = TeacherRecord(case.logits, case.boxes, (memory,), (torch.ones(2, 4, 4, dtype=torch.bool),))
    chosen = queries_above(record, case.targets, config.teacher.cache.attention_giou_floor, config.detection)
    looks = torch.rand(*chosen.shape, 16, generator=generator).softmax(-1) * (chosen >= 0)[..., None]
    record = replace(record, attention_queries=chosen, attention=(looks.unflatten(-1, (4, 4)),))
    rows = encode(record, [0, 1], config.teacher.cache.precision)
    return collate(rows, _SIZES, columns_for(TeacherNeeds(memory=True, attention=True)))


_SIZES = CacheSizes(1, 20, CLASSES, (16,), (16.0,))


@dataclass(frozen=True)
class Count:
    """Of one step. kernels: of its graphs; operators: outside of them. graphs: forward and backward ones made in all steps."""

    operators: int
    kernels: int = 0
    graphs: int = 0
    most: tuple[tuple[str, int], ...] = ()

    @property
    def launches(self) -> int:
        return self.operators + self.kernels


def count(family: str, kind: str, compiled: bool, quick: bool = False) -> Count:
    config = recipe(family, quick)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        student = build_student(config.student, [f"class {index}" for index in range(CLASSES)], seed=0)
    cached = CachedTeacher(_SIZES, flat_directions(_SIZES.channels))
    training = Training(config, student, cached if kind == "qskd" else None, 1000, CPU)
    kernels = Kernels() if compiled else None
    if kernels is not None:
        compile_step(training.module, config, backend=kernels)
    given = [train_batch(arrays) for arrays in batches(config, kind)]
    for batch in given[:-1]:
        training.train_step(batch)
    before = kernels.launched if kernels else 0
    with Operators(kernels) as operators:
        training.train_step(given[-1])
    launched = (kernels.launched - before, kernels.graphs) if kernels else (0, 0)
    return Count(operators.found.total(), *launched, tuple(operators.found.most_common(12)))


def main(arguments: Sequence[str] | None = None) -> Report:
    """Run a command line, print and return what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--kind", nargs="+", choices=["plain", "qskd"], default=["plain", "qskd"])
    parser.add_argument("--eager", action="store_true", help="count eager steps alone")
    parser.add_argument("--quick", action="store_true", help="fewer layers")
    given = parser.parse_args(arguments)
    report = Report("Launches of a training step, compiled over eager (lower is better)")
    report.facts = [
        machine("transformers"),
        "operators that compute, and inductor's kernels after fusion; no time is measured",
    ]
    for family in given.family:
        for kind in given.kind:
            eager = count(family, kind, False, given.quick)
            report.figures.append((f"{family}, {kind}: eager", f"{eager.operators} operators; most: {_listed(eager)}"))
            if given.eager:
                continue
            torch.compiler.reset()
            found = count(family, kind, True, given.quick)
            said = f"{found.kernels} kernels + {found.operators} operators outside of {found.graphs} graphs"
            report.figures.append((f"{family}, {kind}: compiled", f"{said}; most: {_listed(found)}"))
            figures = f"{found.launches} to {eager.launches}"
            report.ratios.append(Ratio(f"{family}, {kind}", (found.launches / eager.launches,), figures, at_most=GOAL))
    report.print()
    return report


def _listed(count: Count) -> str:
    return ", ".join(f"{name} {number}" for name, number in count.most)


if __name__ == "__main__":
    sys.exit(main().exit_code)
