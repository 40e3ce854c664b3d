"""Backbones' norms: frozen ones keep their input's precision, and a backbone may lie with its channels last."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoModelForObjectDetection

from qskd import precision
from qskd.config import FACTS, StudentConfig
from qskd.detectors import Detector, load_detector, save_detector, to_pixels
from qskd.detectors.norms import FrozenBatchNorm2d, is_frozen_norm

SIZES = {"queries": 20, "backbone_norm": "frozen"}
RESNETS = [family for family, facts in FACTS.items() if not facts.vit]  # a ViT has no batch norm to freeze


def sizes_of(family: str) -> dict[str, Any]:
    cells = {"queries": 12} if family == "rf_detr" else {}  # of 16
    return {**tiny.STUDENT, **SIZES, **tiny.own(family), **cells}


def frozen_student(family: str) -> Detector:
    student = tiny.silent_student(StudentConfig.model_validate(sizes_of(family)), tiny.LABELS, 0)
    random = torch.Generator().manual_seed(1)
    for module in student.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for name in ("weight", "running_var"):
                getattr(module, name).copy_(0.5 + torch.rand(module.weight.shape, generator=random))  # type: ignore[arg-type]
            for name in ("bias", "running_mean"):
                getattr(module, name).copy_(torch.randn(module.weight.shape, generator=random))  # type: ignore[arg-type]
    return student


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)), torch.ones(
        2, 64, 64, dtype=torch.bool
    )


def dtypes_of(modules: list[nn.Module]) -> list[tuple[torch.dtype, torch.dtype]]:
    """Those of what each is given and gives back, from now on."""
    said: list[tuple[torch.dtype, torch.dtype]] = []
    for module in modules:
        module.register_forward_hook(lambda _, args, output: said.append((args[0].dtype, output.dtype)))
    return said


@pytest.mark.parametrize("family", RESNETS)
def test_under_autocast_no_frozen_norm_makes_float32_of_bfloat16(family: str, tmp_path: Path) -> None:
    student = frozen_student(family)
    save_detector(student, tmp_path / "saved", StudentConfig.model_validate(sizes_of(family)).resize)
    for detector in (student.eval(), load_detector(tmp_path / "saved")):
        norms = [module for module in detector.backbone.modules() if is_frozen_norm(module)]
        assert len(norms) >= 6
        said = dtypes_of(norms)
        with torch.autocast("cpu", torch.bfloat16):
            rough = detector(*images(), with_attention=False)
        assert set(said) == {(torch.bfloat16, torch.bfloat16)}
        assert len(said) == len(norms)
        with torch.no_grad():
            exact = detector(*images(), with_attention=False)
        gap = (rough.features[-1].float() - exact.features[-1]).norm() / exact.features[-1].norm()
        assert gap < 0.02


@pytest.mark.parametrize("family", RESNETS)
def test_in_float32_a_saved_student_says_bit_for_bit_what_transformers_own_norms_say(
    family: str, tmp_path: Path
) -> None:
    student = frozen_student(family).eval()
    save_detector(student, tmp_path / "saved", StudentConfig.model_validate(sizes_of(family)).resize)
    theirs = Detector(AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")).eval()
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in theirs.modules())
    with torch.no_grad():
        mine, expected = student(*images(), with_attention=False), theirs(*images(), with_attention=False)
    assert torch.equal(mine.features[-1], expected.features[-1])
    assert torch.equal(mine.logits, expected.logits)


def test_a_frozen_norm_s_gradient_is_the_scale_in_either_precision() -> None:
    student = frozen_student("conditional_detr")
    norm = next(module for module in student.modules() if isinstance(module, FrozenBatchNorm2d))
    scale = (norm.weight / (norm.running_var + 1e-5).sqrt()).reshape(1, -1, 1, 1)  # type: ignore[operator]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        x = torch.randn(2, len(norm.weight), 3, 3).to(dtype).requires_grad_()  # type: ignore[arg-type]
        norm(x).float().sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad.float(), scale.expand_as(x), rtol=tolerance, atol=tolerance)


def test_pixels_and_backbone_lie_with_channels_last_where_the_device_wants_it_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def trained() -> Any:
        config = tiny.recipe({**tiny.FAMILIES["refined"], "backbone_norm": "frozen"}, "training.ema_decay=0.9")
        training = tiny.make_training(config, tiny.random_teacher())
        seen: list[Tensor] = []
        body = training.student.backbone.get_submodule("model")
        body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        body.register_forward_hook(lambda module, args, output: seen.append(output.feature_maps[-1]))
        terms = [training.train_step(tiny.batch_of(2, 1, seed=step)) for step in range(2)]
        return training, seen, terms[-1]

    def is_last(tensor: Tensor) -> bool:
        return tensor.is_contiguous(memory_format=torch.channels_last)

    monkeypatch.setattr(precision, "CHANNELS_LAST_ON", frozenset())
    _, (pixels, map_, *_), before = trained()
    assert not is_last(pixels)
    assert not is_last(map_)
    monkeypatch.setattr(precision, "CHANNELS_LAST_ON", frozenset({"cpu"}))
    training, (pixels, map_, *_), after = trained()
    assert is_last(pixels)
    assert is_last(map_)
    convolutions = [m.weight for m in training.student.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert all(map(is_last, convolutions))
    images = torch.randint(256, (1, 64, 64, 3), dtype=torch.uint8)
    turned = to_pixels(images, torch.tensor([[64, 64]]), training.student.mean, training.student.std)[0]
    assert is_last(turned)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-5)

    # Gone on with: state is laid out as the weights are, as a fused optimizer wants it.
    state = training.state()
    resumed, _, _ = trained()
    resumed.load_state(copy.deepcopy(state), 2)
    for weight, slots in resumed.optimizer.state.items():
        assert all(value.stride() == weight.stride() for value in slots.values() if value.shape == weight.shape)
    assert all(torch.equal(value, state[name]) for name, value in resumed.state().items())
    save_detector(resumed.student, tmp_path / "saved", resumed.config.student.resize)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "saved")
    assert all(weight.is_contiguous() for weight in model.state_dict().values())
