"""`compute.compile`: the whole student as one graph, the losses in others; the same values, gradients and names as without.

The graphs are run operator by operator (`aot_eager`), or as they were traced (`eager`): what inductor makes of them takes minutes
of a C++ compiler; `test_training` has one of it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from qskd.config import StudentConfig
from qskd.detectors import Detector
from qskd.detectors.forward.exact import Exact
from qskd.training.compiling import compile_step, compiles_whole

SQUARE = {"mode": "square", "size": tiny.SIZE}
COUNTS = ((2, 1), (5, 7), (0, 1), (3, 3))  # objects of each image, batch by batch


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(run_gc_after_compile=False):  # half a second for each graph
        yield
    torch._dynamo.reset()


def sizes_of(family: str) -> dict[str, Any]:
    """One decoder layer, of which each more is a second, but where transformers or the layers after the first want two."""
    own = tiny.own(family, levels=2 if family == "deformable_detr" else 1)
    layers = 2 if family in ("deformable_detr", "d_fine") else 1
    return {**tiny.STUDENT, **own, "resize": SQUARE, "decoder_layers": layers}


def forward_and_gradients(student: Detector, autocast: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    pixels = torch.randn(2, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = student(pixels, mask, with_attention=False, least=(tiny.SIZE, tiny.SIZE))
    said = [output.logits, output.boxes_cxcywh, *output.memory, *output.features, output.query_states]
    said += [each for each in (output.early_logits, output.early_boxes_cxcywh) if each is not None]
    torch.stack([each.float().square().mean() for each in said]).sum().backward()
    gradients = {name: each.grad for name, each in student.named_parameters() if each.grad is not None}
    return [each.detach() for each in said], gradients


def compare_forwards(family: str, autocast: bool, backend: str) -> None:
    student = tiny.silent_student(StudentConfig.model_validate(sizes_of(family)), tiny.LABELS, 0)
    tiny.shake(student, 3)
    compiled = copy.deepcopy(student)
    compiled.compile_training(backend=backend, fullgraph=True)  # a break in the graph is an error
    expected, gradients = forward_and_gradients(student, autocast)
    found, compiled_gradients = forward_and_gradients(compiled, autocast)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(found, expected)
    assert compiled_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    assert compiled.state_dict().keys() == student.state_dict().keys()


def test_under_autocast_a_student_is_one_graph_with_the_same_outputs_and_gradients() -> None:
    compare_forwards("d_fine", True, "eager")  # which has all of an RT-DETR


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deformable_detr", "rf_detr"])
def test_a_student_is_one_graph_with_the_same_outputs_and_gradients(family: str) -> None:
    """A Conditional DETR and a D-FINE are so in the trainings below, whose steps and weights are compared."""
    compare_forwards(family, False, "eager")


def trained(family: str, backend: str, method: bool, *more: tuple[int, int]) -> tuple[list[dict[str, float]], Any]:
    dense = 1.0 if method else 0.0  # of the one training or the other
    config = tiny.recipe(sizes_of(family), f"detection.dense_weight={dense}", "training.learning_rate=1e-5")
    training = tiny.make_training(config, tiny.random_teacher("conditional") if method else None)
    if backend:
        compile_step(training.module, config, backend=backend)
    steps = [training.train_step(tiny.batch_of(*counts, seed=seed)) for seed, counts in enumerate((*COUNTS, *more))]
    return [{name: value.item() for name, value in values.items()} for values in steps], training


def compare_steps(family: str, graphs: int, backend: str, *more: tuple[int, int], method: bool = True) -> None:
    expected, eager = trained(family, "", method, *more)
    found, compiled = trained(family, backend, method, *more)
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    weights = tiny.trained_weights(eager)
    for name, weight in tiny.trained_weights(compiled).items():
        torch.testing.assert_close(weight, weights[name], atol=2e-5, rtol=1e-4, msg=name)
    assert compiled.state().keys() == eager.state().keys()
    before = counters["stats"]["unique_graphs"]
    with compiled.evaluation_weights() as student, torch.no_grad():
        student(torch.zeros(3, 3, tiny.SIZE, tiny.SIZE), torch.ones(3, tiny.SIZE, tiny.SIZE, dtype=torch.bool))
    assert counters["stats"]["unique_graphs"] == before  # evaluation compiles nothing


@pytest.mark.slow
def test_a_quantised_student_is_compiled_as_it_is_watched_and_as_it_is_quantised() -> None:
    def steps(compiled: bool) -> list[float]:
        config = tiny.recipe({**sizes_of("detr"), "quantization": "w4a4-attn8"}, "distillation.method=none")
        training = tiny.make_training(config, None, 20)
        if compiled:
            training.student.compile_training(backend="eager")
        return [training.train_step(tiny.batch_of(2, 1, seed=seed))["total"].item() for seed in range(3)]

    expected = steps(compiled=False)
    assert steps(compiled=True) == pytest.approx(expected, rel=1e-3)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_compiled_training_takes_the_same_steps_whatever_the_number_of_objects() -> None:
    # Student, costs, dense head, losses: each once. The method: for objects, for none, and for one.
    compare_steps("conditional_detr", 7, "aot_eager", (0, 0))


@pytest.mark.slow
def test_a_student_with_denoising_queries_is_not_compiled_anew_for_each_batch() -> None:
    # Student, costs, losses: each once. By aot_eager it takes twice as long. A D-FINE has all of an RT-DETR, and distributions.
    compare_steps("d_fine", 3, "eager", method=False)


def test_a_student_of_changing_sizes_has_its_backbone_compiled_in_training_alone() -> None:
    config = tiny.recipe({**sizes_of("conditional_detr"), "resize": {"mode": "shortest_edge", "size": tiny.SIZE}})
    student = tiny.silent_student(config.student, tiny.LABELS, 0)
    student.compile_backbone(backend="eager", fullgraph=True)
    pixels, mask = torch.zeros(2, 3, tiny.SIZE, tiny.SIZE), torch.ones(2, tiny.SIZE, tiny.SIZE, dtype=torch.bool)
    with torch.no_grad():
        evaluated = student.eval()(pixels, mask, with_attention=False)
        assert counters["stats"]["unique_graphs"] == 0
        twin = copy.deepcopy(student)  # it has a compiled forward of its own
        next(twin.backbone.parameters()).fill_(1.0)
        assert not torch.equal(twin(pixels + 1, mask).logits, student(pixels + 1, mask).logits)
    student.train()(pixels, mask, with_attention=False)
    assert counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        torch.testing.assert_close(student.eval()(pixels[:1], mask[:1]).boxes_cxcywh, evaluated.boxes_cxcywh[:, :1])
    assert counters["stats"]["unique_graphs"] == 1


def test_a_student_of_changing_sizes_is_not_compiled_as_a_whole() -> None:
    assert compiles_whole(tiny.recipe({"resize": SQUARE}))
    assert not compiles_whole(tiny.recipe({"resize": {"mode": "shortest_edge", "size": 64}}))
    assert not compiles_whole(tiny.recipe({"resize": SQUARE}, "augmentation.scales=[0.5, 1]"))
    assert not compiles_whole(tiny.recipe({"resize": SQUARE}, "detection.query_groups=2"))


def test_a_copy_of_an_exact_module_is_exact_by_itself() -> None:
    module = torch.nn.Linear(2, 2)
    part = Exact(module)
    twin = copy.deepcopy(module)
    assert type(module) is torch.nn.Linear
    assert module.state_dict().keys() == {"weight", "bias"}
    part.active = True
    with torch.no_grad():
        twin.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(torch.ones(1, 2)).dtype == torch.float32
        assert twin(torch.ones(1, 2)).dtype == torch.bfloat16
    assert torch.equal(twin(torch.ones(1, 2)), twin.bias.expand(1, 2))
