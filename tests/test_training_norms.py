"""Batch norm over all workers: on one it is torch's own (on two: tests/test_training_distributed.py), and a student stays plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection

from qskd.config import FACTS
from qskd.detectors import save_detector
from qskd.training.norms import SharedBatchNorm2d, put_right, share_statistics


def passed(norm: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    output = norm(x)
    (output.float() * torch.linspace(-1, 2, x.numel()).view(x.shape)).sum().backward()
    assert x.grad is not None
    found = {"output": output.detach(), "gradient": x.grad}
    found |= {f"gradient of {name}": value.grad for name, value in norm.named_parameters() if value.grad is not None}
    return found | {name: value.clone() for name, value in norm.named_buffers()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_alone_it_is_torch_s_batch_norm_in_values_gradients_and_running_statistics(
    dtype: torch.dtype, order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = (
        (100 + 3 * torch.randn(4, 5, 6, 7)).to(dtype).to(memory_format=order)
    )  # far from 0: E[x^2] - E[x]^2 would cancel
    holder = nn.Sequential(nn.BatchNorm2d(5))
    nn.init.uniform_(holder[0].weight, 0.5, 2.0)  # type: ignore[arg-type]
    expected = [passed(holder[0], batch) for batch in (x, 2 * x)]
    holder[0].reset_running_stats()  # type: ignore[operator]
    holder.zero_grad()
    assert len(share_statistics(holder)) == 1
    found = [passed(holder[0], batch) for batch in (x, 2 * x)]
    tolerance = {"rtol": 2e-3, "atol": 2e-3} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    torch.testing.assert_close(holder.eval()(x.float()), nn.functional.batch_norm(
        x.float(), holder[0].running_mean, holder[0].running_var, holder[0].weight, holder[0].bias  # type: ignore[arg-type]
    ))  # fmt: skip


@pytest.mark.parametrize("which", ["input", "gradient"])
@pytest.mark.parametrize(("kind", "traced"), [(SharedBatchNorm2d, ""), (nn.BatchNorm2d, ""), (nn.BatchNorm2d, "eager")])
def test_one_image_whose_numbers_come_transposed_gets_the_gradient_of_the_same_image_in_order(
    kind: type[nn.BatchNorm2d], traced: str, which: str
) -> None:
    torch.manual_seed(0)
    plain, turned = torch.randn(1, 5, 4, 6), torch.randn(1, 24, 5).transpose(1, 2).unflatten(2, (4, 6))
    x, gradient = (plain, turned) if which == "gradient" else (turned, plain)
    norm = kind(5)
    put_right(norm, traced=bool(traced))
    run = torch.compile(norm, backend=traced, fullgraph=True) if traced else norm
    found = x.clone(memory_format=torch.preserve_format).as_strided(x.shape, x.stride()).requires_grad_()
    run(found).backward(gradient)
    exact = x.double().requires_grad_()
    centred = exact - exact.mean((0, 2, 3), keepdim=True)
    expected = centred / (centred.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    expected.backward(gradient.double())
    torch.testing.assert_close(found.grad, exact.grad, check_dtype=False, rtol=1e-4, atol=1e-5)


def test_without_an_image_on_any_worker_the_statistics_stay_and_gradients_are_nought() -> None:
    norm = SharedBatchNorm2d(3).eval()
    norm.absent = True
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    (0.0 * norm(x)).sum().backward()
    assert torch.equal(norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]
    assert torch.equal(norm.running_var, torch.ones(3))  # type: ignore[arg-type]
    assert norm.weight.grad is not None
    assert torch.equal(norm.weight.grad, torch.zeros(3))


@pytest.mark.parametrize("family", [family for family in FACTS if FACTS[family].hybrid and FACTS[family].batch_norms])
def test_all_norms_of_a_family_are_shared_and_what_is_saved_is_plain(family: str, tmp_path: Path) -> None:
    sizes = {**tiny.own(family), "queries": 20, "backbone_norm": "sync"}
    training = tiny.make_training(tiny.recipe(sizes, "distillation.method=none"))
    assert training.shared_norms == []  # one worker: torch's own
    names = set(training.student.state_dict())
    shared = share_statistics(training.student)
    outside = [
        m for m in training.student.modules() if isinstance(m, nn.BatchNorm2d) and not isinstance(m, SharedBatchNorm2d)
    ]
    assert outside == []
    within = len([m for m in training.student.backbone.modules() if isinstance(m, SharedBatchNorm2d)])
    assert len(shared) > within
    assert (within > 0) == (not FACTS[family].vit)
    assert set(training.student.state_dict()) == names
    training.train_step(tiny.batch_of(2, 1))
    training.check_finite()
    save_detector(training.student.eval(), tmp_path / "saved", training.config.student.resize)
    model, info = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs = model.eval()(pixels).logits
        mine = training.student(pixels, torch.ones(1, 64, 64, dtype=torch.bool)).logits[-1]
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
