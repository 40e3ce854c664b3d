"""What transformers would ask the device is answered on the host: nothing is asked, and the outputs are the same bit for bit."""

from __future__ import annotations

import os
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from test_norms import images, sizes_of
from transformers.models.deformable_detr import modeling_deformable_detr

from benchmarks.host_waits import BEHIND_AN_EVENT, HostWaits
from qskd.config import FACTS
from qskd.datasets.batch import TrainBatch, train_batch
from qskd.detectors import Detector
from qskd.detectors.forward.unasked import hides_nothing
from qskd.structures import OnItsWay

WHOLE, PADDED = ((64, 64), (64, 64)), ((40, 64), (64, 47))
ONE_MAP = ("detr", "conditional_detr", "dab-detr")


def student_of(family: str) -> Detector:
    return tiny.make_training(tiny.recipe(sizes_of(family) | {"backbone_norm": "batch"})).student.eval()


@pytest.mark.parametrize("family", [*ONE_MAP, "deformable_detr"])
@pytest.mark.parametrize("real", [WHOLE, PADDED, ((63, 64), (64, 64))], ids=["whole", "padded", "by a pixel"])
def test_a_mask_that_the_host_knows_gives_the_same_outputs(family: str, real: tuple[tuple[int, int], ...]) -> None:
    student = student_of(family)
    pixels, mask = images()
    for row, (height, width) in zip(mask, real, strict=True):
        row[height:], row[:, width:] = False, False
    least = (min(height for height, _ in real), min(width for _, width in real))
    with torch.no_grad():
        expected = student(pixels * mask[:, None], mask)
        with HostWaits() as waits:
            found = student(pixels * mask[:, None], mask, least=least)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.boxes_cxcywh, expected.boxes_cxcywh)
    queries = torch.tensor([[0, 3], [1, -1]])
    assert all(map(torch.equal, found.attend(queries), expected.attend(queries)))
    assert [where for _, where in waits.found if "transformers" in where] == []


@pytest.mark.parametrize("cells", [2, 3, 5, 13, 20])
def test_the_host_shrinks_a_mask_as_transformers_does(cells: int) -> None:
    for pixels in (33, 64, 151):
        for real in range(pixels // 2, pixels + 1):
            mask = torch.zeros(1, pixels, 20, dtype=torch.bool)
            mask[:, :real] = True
            shrunk = torch.nn.functional.interpolate(mask[None].float(), size=(cells, 5))[0].bool()
            assert hides_nothing((real, 20), (pixels, 20), (cells, 5)) == bool(shrunk.all())


def step_waits(family: str, batch: TrainBatch) -> Counter[tuple[str, str]]:
    training = tiny.make_training(tiny.recipe(sizes_of(family)), tiny.random_teacher("conditional"))
    for group in training.optimizer.param_groups:
        group |= {"foreach": False, "fused": True}  # as on a GPU
    training.train_step(batch)
    with HostWaits() as waits:
        training.train_step(batch)
    # Asked on a CPU alone: whether there is anything to resample.
    return Counter({at: count for at, count in waits.found.items() if not at[1].endswith(" resampler")})


@pytest.mark.parametrize("family", FACTS)
def test_of_a_whole_step_nothing_waits_but_for_the_costs_and_for_the_step_before(family: str) -> None:
    arrays = tiny.arrays((2, 1))
    if not FACTS[family].hybrid:  # those take whole images alone here
        arrays["sizes"] = np.array([[64, 64], [40, 64]], np.int32)
    found = step_waits(family, train_batch(arrays))
    places = {(what, where.split(":")[0], where.split()[-1]): count for (what, where), count in found.items()}
    assert places == {
        (BEHIND_AN_EVENT, "qskd/losses/matching.py", "finish"): 1,
        (BEHIND_AN_EVENT, "qskd/training/step.py", "check_finite"): 1,
    }


def test_what_a_forward_turns_off_is_on_again_after_it_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_DISABLE_TORCH_CHECK", raising=False)
    student = student_of("deformable_detr")
    seen: list[tuple[str | None, bool]] = []

    def breaks(*_: object) -> None:
        own = modeling_deformable_detr.torch
        seen.append((os.environ.get("TRANSFORMERS_DISABLE_TORCH_CHECK"), own is torch))
        raise ValueError("broken")

    student.model.model.encoder.register_forward_hook(breaks)
    with pytest.raises(ValueError, match="broken"):
        student(*images())
    assert seen == [("1", False)]
    assert "TRANSFORMERS_DISABLE_TORCH_CHECK" not in os.environ
    assert modeling_deformable_detr.torch is torch
    before = os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "0"
    with pytest.raises(ValueError, match="broken"):
        student(*images())
    assert os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] == before


def test_a_value_on_its_way_is_without_gradient_and_what_it_was() -> None:
    value = torch.tensor([1.5, 2.5], requires_grad=True)
    coming = OnItsWay(value * 2)
    assert not coming.read().requires_grad
    assert coming.read().tolist() == [3.0, 5.0]
