"""The benchmark of the training step runs, and QSKD adds no wait for the device to the plain step's."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from benchmarks import step, step_methods
from benchmarks.host_waits import HostWaits
from benchmarks.step_cases import quickstart
from qskd.datasets.batch import train_batch


def test_a_quick_run_yields_finite_ratios_and_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    report = step.main(["--quick"])
    assert [ratio.name for ratio in report.ratios if ratio.goal] == ["quickstart", "r18"]
    assert all(math.isfinite(ratio.value) and ratio.value > 0 for ratio in report.ratios)
    printed = capsys.readouterr().out
    for label in ("decode the record", "query selection", "backward of AGFD", "qskd/losses/matching.py"):
        assert label in printed


def test_a_quick_run_of_methods_yields_finite_ratios() -> None:
    report = step_methods.main(["--quick", "crosskd", "kd-detr:general_points=3"])
    assert [ratio.name for ratio in report.ratios][:3] == ["qskd over plain", "crosskd over plain", "crosskd over qskd"]
    assert all(math.isfinite(ratio.value) and ratio.value > 0 for ratio in report.ratios)


@pytest.mark.parametrize("method", ["crosskd", "kd-detr:general_points=3"])
def test_a_method_that_asks_decoders_waits_for_the_device_no_more_than_the_plain_step(method: str) -> None:
    case = quickstart(4, 1)
    side = step_methods.side(case, method)
    for group in side.training.optimizer.param_groups:
        group |= {"foreach": False, "fused": True}  # as on a GPU
    side()
    batch = train_batch(side.batches[0])
    with HostWaits() as waits:
        side.training.train_step(batch)
    places = {f"{where.split(':')[0]} {where.split()[-1]}" for _, where in waits.found}
    assert {place for place in places if "torch/" not in place} <= {*step.CPU_ONLY, *step.REMAIN}


def test_qskd_waits_for_the_device_no_more_than_the_plain_step() -> None:
    case = quickstart(4, 1)
    counted = {}
    for kind in ("plain", "qskd"):
        ours: dict[str, int] = {}
        for (_, where), count in step.host_waits(case, kind).items():
            place = f"{where.split(':')[0]} {where.split()[-1]}"
            if place.startswith("qskd/") and place not in step.CPU_ONLY:
                ours[place] = ours.get(place, 0) + count
        counted[kind] = ours
    assert counted["qskd"] == counted["plain"]
    assert counted["qskd"]["qskd/losses/matching.py finish"] == 1
    assert counted["qskd"]["qskd/training/step.py check_finite"] == 1
    # Constants for normalising pixels may be copied to the device; nothing else may be there.
    allowed = {
        "qskd/losses/matching.py finish",
        "qskd/training/step.py check_finite",
        "qskd/checkpoints/preprocessing.py to_pixels",
    }
    assert set(counted["qskd"]) <= allowed


@pytest.mark.parametrize("family", ["detr", "conditional_detr", "deformable_detr", "rt_detr", "rt_detr_v2", "d_fine"])
def test_encoder_layers_do_not_ask_the_device_whether_they_are_finite(family: str) -> None:
    levels = 1 if family in ("detr", "conditional_detr") else 2
    sizes = {"family": family, "feature_levels": levels, "queries": 20, "encoder_layers": 1}
    training = tiny.make_training(tiny.recipe(sizes, "distillation.method=none"))
    layers = [m for m in training.student.modules() if type(m).__name__.endswith("EncoderLayer")]
    assert layers
    batch = tiny.batch_of(2, 1)

    def asked() -> list[str]:
        training.student.train()
        with HostWaits() as waits:
            output = training.student(torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 64, dtype=torch.bool))
        seen.append(output.logits)
        return [where for what, where in waits.found if what == "reads a value" and f"modeling_{family}.py" in where]

    seen: list[torch.Tensor] = []
    training.train_step(batch)
    assert asked() == []
    for layer in layers:
        layer.dropout = 1e-9  # as good as none, but the layer can't know
    assert len(asked()) == 1
    torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)


def test_waits_are_counted_where_a_value_or_a_size_is_asked_for() -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with HostWaits() as waits:
        values.sum().item()
        if values[0] > 1:
            raise AssertionError
        values[mask]
        values.clone()[mask] = 0.0  # a masked_fill
        values.cpu().tolist()
        mask.nonzero()
        torch.tensor([1.0], device="cpu")
        torch.tensor([1.0]).to("cpu", non_blocking=True)
        torch.tensor([1.0]).item()
    kinds = [what for (what, where), count in waits.found.items() for _ in range(count) if "test_step" in where]
    assert sorted(kinds) == [
        "copies from the host, waiting",
        "copies to the host",
        *["reads a value"] * 2,
        *["size from values"] * 2,
    ]
    assert "cpu" not in vars(torch.Tensor)  # as it was before
    assert torch.equal(torch.tensor([1]).cpu(), torch.ones(1, dtype=torch.int64))
