"""Under bfloat16 autocast, boxes and reference points are those of float32, and the same queries are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_detectors import padded_batch
from test_detectors import tiny_model as tiny_deformable
from test_families import tiny_model, whole_batch

from qskd.config import StudentConfig
from qskd.detectors import Detector
from qskd.detectors.forward.exact import Exact, exactly

HYBRID = ("rt_detr", "v2", "d_fine", "deimv2 vit")


def detector_of(kind: str) -> Detector:
    hybrid_or_dense = (*HYBRID, "dab", "lw_detr", "rf_detr")
    return Detector(tiny_model(kind) if kind in hybrid_or_dense else tiny_deformable(kind))


def early_boxes(detector: Detector, pixels: torch.Tensor, autocast: bool) -> torch.Tensor:
    mask = torch.ones(len(pixels), *pixels.shape[-2:], dtype=torch.bool)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        early = detector(pixels, mask, with_attention=False).early_boxes_cxcywh
    assert early is not None
    return early[0]


@pytest.mark.parametrize("family", ["rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr"])
def test_the_same_queries_are_chosen_as_in_float32_and_their_boxes_are_within_a_thousandth(family: str) -> None:
    sizes = {**tiny.own(family), "queries": 60, "resize": {"size": 128}}
    found = []
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        student = tiny.silent_student(StudentConfig.model_validate({**tiny.STUDENT, **sizes}), tiny.LABELS, seed).eval()
        for name, parameter in student.named_parameters():
            if "backbone" not in name:  # its box heads begin at zero
                parameter.detach().add_(torch.randn(parameter.shape, generator=random), alpha=0.02)
        pixels = torch.randn(2, 3, 128, 128, generator=random)
        exact, rough = (early_boxes(student, pixels, autocast) for autocast in (False, True))
        nearest = (exact.unsqueeze(-2) - rough.unsqueeze(-3)).abs().amax(-1).amin(-1)
        found.append((nearest < 1e-3).float().mean())
    assert torch.stack(found).min() > 0.95


@pytest.mark.parametrize("kind", HYBRID)
def test_what_is_chosen_and_where_it_lies_is_float32s_answer_to_the_memory(kind: str) -> None:
    detector = Detector(tiny_model(kind))
    inner = detector.model.model
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            output = detector(*whole_batch(), with_attention=False)
        memory = torch.cat([level.flatten(2).transpose(1, 2) for level in output.memory], 1)
        assert memory.dtype == torch.float32
        anchors, valid = inner.generate_anchors(tuple(tuple(level.shape[-2:]) for level in output.memory))
        states = inner.enc_output(valid * memory)
        scores, places = inner.enc_score_head(states), inner.enc_bbox_head(states) + anchors
        chosen = scores.amax(-1).topk(detector.num_queries, dim=1).indices
        expected = places.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 4)).sigmoid()
    assert output.early_boxes_cxcywh is not None
    torch.testing.assert_close(output.early_boxes_cxcywh[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["conditional", "dab", "refined", "two_stage", *HYBRID, "lw_detr", "rf_detr"])
def test_reference_points_are_float32_under_autocast(kind: str) -> None:
    detector = detector_of(kind)
    said: list[Any] = []
    detector.model.model.register_forward_hook(lambda module, args, output: said.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        detector(*(padded_batch() if kind in ("conditional", "dab") else whole_batch()), with_attention=False)
    (output,) = said
    names = ("reference_points", "init_reference_points", "intermediate_reference_points", "enc_topk_bboxes")
    found = {name: value.dtype for name in names if (value := getattr(output, name, None)) is not None}
    assert found
    assert set(found.values()) == {torch.float32}


def test_what_an_error_left_open_is_closed_and_autocast_is_as_before() -> None:
    class Breaks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("broken")

    module = Breaks()
    part = Exact(module)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="broken"), exactly([part], "cpu"):
            module(torch.ones(1))
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


def test_without_autocast_a_module_is_given_what_it_was_given() -> None:
    module = torch.nn.Identity()
    part, given = Exact(module), torch.ones(2, dtype=torch.float64)
    with exactly([part], "cpu"):
        assert module(given).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16), exactly([part], "cpu"):
        assert module(given.bfloat16()).dtype == torch.float32
    assert module(given.bfloat16()).dtype == torch.bfloat16
