"""DEIMv2 as it is published: HGNetV2 with a whole encoder or the lite one, DINOv3; read, cut down, inherited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as hf
from test_families import DEIMV2, tiny_model, whole_batch

from qskd.config import ResizeConfig, StudentConfig
from qskd.detectors import Detector, inherit, load_detector, save_detector
from qskd.errors import QskdError
from qskd.families.table import FAMILIES

torch.set_num_threads(1)
HGNET = {
    **{"hidden_sizes": [8, 16, 24], "stem_channels": [3, 4, 4], "stage_in_channels": [4, 8, 16]},
    **{"stage_mid_channels": [4, 4, 8], "stage_out_channels": [8, 16, 24], "stage_num_blocks": [1, 1, 1]},
    **{"stage_downsample": [False, True, True], "stage_light_block": [False, False, True]},
    **{"stage_kernel_size": [3, 3, 5], "stage_numb_of_layers": [1, 1, 1], "depths": [1, 1, 1]},
    **{"use_learnable_affine_block": True},
}


def published(kind: str) -> Any:
    """Narrow look-alikes of what the conversion script in transformers writes for the nano and the pico model."""
    torch.manual_seed(0)
    whole = kind == "nano"
    backbone = hf.HGNetV2Config(**HGNET, out_indices=[2, 3] if whole else [3])
    sizes = {
        **{"backbone_config": backbone, "encoder_hidden_dim": 32, "d_model": 32, "decoder_in_channels": [32, 32]},
        **{"num_feature_levels": 2, "decoder_layers": 3, "decoder_attention_heads": 4, "encoder_attention_heads": 4},
        **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 9, "num_labels": 5, "depth_mult": 0.5},
        **{"decoder_activation_function": "silu", "eval_size": [64, 64], "hidden_expansion": 0.34},
    }
    if whole:
        own = {"encoder_in_channels": [16, 24], "feat_strides": [8, 16], "encode_proj_layers": [1]}
        own |= {"decoder_n_points": [6, 6]}
    else:
        own = {"encoder_in_channels": [24], "feat_strides": [16], "encoder_type": "lite", "encoder_layers": 0}
        own |= {"decoder_n_points": [4, 2], "use_gateway": False, "share_bbox_head": True}
    return hf.Deimv2ForObjectDetection(hf.Deimv2Config(**sizes, **own)).eval()


@pytest.mark.parametrize(("kind", "strides"), [("nano", (8, 16)), ("pico", (16, 32))])
def test_a_published_checkpoint_loads_exactly_and_says_what_transformers_says(
    kind: str, strides: tuple[int, ...], tmp_path: Path
) -> None:
    model = published(kind)
    model.save_pretrained(tmp_path)
    detector = load_detector(str(tmp_path)).eval()
    assert detector.memory_strides == strides
    pixels, mask = torch.randn(2, 3, 96, 64), torch.ones(2, 96, 64, dtype=torch.bool)
    with torch.no_grad():
        theirs, ours = model(pixels, pixel_mask=mask), detector(pixels, mask)
    torch.testing.assert_close(ours.logits[-1], theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.boxes_cxcywh[-1], theirs.pred_boxes, atol=1e-5, rtol=1e-5)
    assert [tuple(part.shape[-2:]) for part in ours.memory] == [(96 // side, 64 // side) for side in strides]
    save_detector(detector, tmp_path / "again", ResizeConfig(size=64))
    again = hf.AutoModelForObjectDetection.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pixels, pixel_mask=mask).logits, theirs.logits)


def test_the_lite_encoder_wants_sides_that_its_second_map_divides() -> None:
    with pytest.raises(QskdError, match="divisible by 32"):
        Detector(published("pico"))(torch.zeros(1, 3, 48, 64), torch.ones(1, 48, 64, dtype=torch.bool))


@pytest.mark.parametrize("kind", DEIMV2)
def test_the_backbone_alone_learns_at_the_backbones_rate(kind: str) -> None:
    """Not the projections behind it, nor the convolutions beside a ViT."""
    model = tiny_model(kind)
    own = {id(parameter) for parameter in FAMILIES["deimv2"].backbone(model).parameters()}
    found = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    start = "model.conv_encoder.backbone." if kind == "deimv2 vit" else "model.conv_encoder.model."
    assert found == {name for name, _ in model.named_parameters() if name.startswith(start)}
    assert found


def test_a_student_inherits_the_decoder_of_a_lite_teacher_and_no_encoder() -> None:
    teacher = Detector(published("pico"))
    sizes = StudentConfig.model_validate({**tiny.STUDENT, "family": "deimv2", "feature_levels": 2, "decoder_layers": 2})
    student = tiny.silent_student(sizes, [f"class {slot}" for slot in range(5)], 0)
    done = inherit(student, teacher, range(5))
    assert done.copied["model.decoder.bbox_embed.1"] == "model.decoder.bbox_embed.2"
    assert not any(name.startswith("model.encoder") for name in done.copied)
    assert any(name.startswith("model.encoder") for name in done.left)
    with torch.no_grad():
        assert torch.isfinite(student(*whole_batch()).logits).all()


def test_a_saved_student_says_its_authors_gamma(tmp_path: Path) -> None:
    sizes = StudentConfig.model_validate({**tiny.STUDENT, "family": "deimv2", "feature_levels": 2})
    save_detector(tiny.silent_student(sizes, tiny.LABELS, 0).eval(), tmp_path, sizes.resize)
    assert hf.AutoConfig.from_pretrained(tmp_path).focal_loss_gamma == 1.5
