"""The families beyond Conditional and Deformable DETR, each against transformers' own forward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from test_detectors import QUERIES, padded_batch
from torch import Tensor

from qskd.config import FACTS
from qskd.deploy.onnx_detect import BEST_PAIRS, SOFTMAX
from qskd.detectors import FAMILIES, Detector
from qskd.errors import QskdError
from qskd.families.detr import from_softmax

torch.set_num_threads(1)

DENSE = ["detr", "table", "dab", "dab patterns"]
DEIMV2 = ["deimv2", "deimv2 lite", "deimv2 vit"]
HYBRID = ["rt_detr", "rt_detr_v2", "discrete", "d_fine", *DEIMV2]
SAMPLED = [*HYBRID, "lw_detr", "rf_detr"]
ONE_MAP = [*DENSE, "rf_detr"]
KINDS = [*DENSE, *SAMPLED]
ONE_BLOCK = 0.34  # of three, in each stage of a hybrid encoder


def tiny_model(kind: str, seed: int = 0, layers: int = 3) -> Any:
    """A detector of transformers in eval mode, with denoising where it has that, whose every parameter is random."""
    stages = ["stage3"] if kind in DENSE else ["stage2", "stage3"]
    backbone = {"depths": [1, 1, 1], "hidden_sizes": [8, 16, 24], "embedding_size": 8, "out_features": stages}
    vd = hf.RTDetrResNetConfig if kind == "rt_detr" else hf.ResNetConfig
    sizes: dict[str, Any] = {
        **{"backbone_config": vd(layer_type="basic", **backbone), "encoder_layers": 1, "decoder_layers": layers},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        **{"num_queries": 9, "num_labels": 5, "dropout": 0.0},
    }
    hybrid = {
        **{"encoder_hidden_dim": 24, "encoder_in_channels": [16, 24], "feat_strides": [8, 16], "num_denoising": 10},
        **{"encode_proj_layers": [1], "decoder_in_channels": [24, 24], "num_feature_levels": 2, "d_model": 32},
    }
    torch.manual_seed(seed)
    model: Any
    if kind == "lw_detr":
        model = hf.LwDetrForObjectDetection(lw_detr_config(decoder_layers=layers))
    elif kind == "rf_detr":
        model = hf.RfDetrForObjectDetection(rf_detr_config(decoder_layers=layers))
    elif kind == "detr":
        model = hf.DetrForObjectDetection(hf.DetrConfig(d_model=32, **sizes))
    elif kind == "table":
        model = hf.TableTransformerForObjectDetection(hf.TableTransformerConfig(d_model=32, **sizes))
    elif kind in DENSE:
        patterns = {"num_patterns": 2, "keep_query_pos": True} if kind == "dab patterns" else {}
        model = hf.DabDetrForObjectDetection(hf.DabDetrConfig(hidden_size=32, **patterns, **sizes))
    elif kind == "rt_detr":
        model = hf.RTDetrForObjectDetection(hf.RTDetrConfig(**sizes, **hybrid))
    elif kind == "d_fine":
        # Its convolutions stand on the encoder's width; without a projection the decoder reads the encoder's own maps.
        wide: dict[str, Any] = {"encoder_hidden_dim": 32, "decoder_in_channels": [32, 32], "decoder_n_points": [3, 5]}
        wide["depth_mult"] = ONE_BLOCK
        model = hf.DFineForObjectDetection(hf.DFineConfig(**sizes, **{**hybrid, **wide}))
    elif kind in DEIMV2:
        model = hf.Deimv2ForObjectDetection(deimv2_config(kind, {**sizes, **hybrid}))
    else:
        method = "discrete" if kind == "discrete" else "default"
        config = hf.RTDetrV2Config(**sizes, **hybrid, decoder_n_levels=2, decoder_method=method)
        model = hf.RTDetrV2ForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(("reg_scale", "up")):
                parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def deimv2_config(kind: str, sizes: dict[str, Any]) -> Any:
    """As published: a whole encoder on convolutions with a box head a layer; one map made two, one box head, no gates; a ViT with
    convolutions beside it."""
    sizes = {**sizes, "encoder_hidden_dim": 32, "decoder_in_channels": [32, 32], "decoder_n_points": [3, 5]}
    sizes["depth_mult"] = ONE_BLOCK
    if kind == "deimv2 lite":
        backbone = hf.ResNetConfig(
            **{"layer_type": "basic", "depths": [1, 1], "hidden_sizes": [8, 16]},
            **{"embedding_size": 8, "out_features": ["stage2"]},
        )
        sizes |= {"backbone_config": backbone, "encoder_in_channels": [16], "feat_strides": [8], "encoder_layers": 0}
        return hf.Deimv2Config(**sizes, encoder_type="lite", use_gateway=False, share_bbox_head=True)
    if kind == "deimv2 vit":
        vit = hf.DINOv3ViTConfig(
            **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32},
            **{"patch_size": 16, "image_size": 64, "num_register_tokens": 2, "out_indices": [1, 2, 3]},
            **{"apply_layernorm": True, "reshape_hidden_states": True, "pos_embed_rescale": None},  # or training draws
        )
        maps = {"encoder_in_channels": [32] * 3, "decoder_in_channels": [32] * 3, "decoder_n_points": [3, 5, 3]}
        maps |= {"feat_strides": [8, 16, 32], "num_feature_levels": 3, "encode_proj_layers": [2]}
        ending = {"encoder_has_trailing_conv": False, "spatial_tuning_adapter_inplanes": 4}
        return hf.Deimv2Config(**{**sizes, **maps, **ending, "backbone_config": vit})
    return hf.Deimv2Config(**sizes)


def lw_detr_config(**changes: Any) -> Any:
    """Maps of strides 8 and 16, so that images of 96 x 128 have the cells that the other kinds' have."""
    vit = hf.LwDetrViTConfig(
        **{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_windows": 4},
        **{"pretrain_image_size": 64, "window_block_indices": [0], "out_indices": [2, 3]},
    )
    sizes = {
        **{"backbone_config": vit, "projector_scale_factors": [2.0, 1.0], "d_model": 32, "num_queries": 9},
        **{"decoder_layers": 3, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 8},
        **{"decoder_ffn_dim": 32, "group_detr": 1, "num_labels": 5},
    }
    return hf.LwDetrConfig(**sizes | changes)


def rf_detr_config(windows: int = 1, **changes: Any) -> Any:
    """windows: of more than one, images have to be squares."""
    vit = hf.RfDetrDinov2Config(
        **{"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 16, "image_size": 64},
        **{"num_windows": windows, "out_features": ["stage1", "stage3"]},
    )
    sizes = {
        **{"backbone_config": vit, "d_model": 32, "num_queries": 9, "decoder_layers": 3, "decoder_n_points": 2},
        **{"decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 8, "decoder_ffn_dim": 32},
        **{"group_detr": 1, "num_labels": 5, "dropout": 0.0},
    }
    return hf.RfDetrConfig(**sizes | changes)


def whole_batch() -> tuple[Tensor, Tensor]:
    pixels, mask = padded_batch()
    return pixels, torch.ones_like(mask)


def batch_for(kind: str) -> tuple[Tensor, Tensor]:
    """With padding where the family masks it."""
    return whole_batch() if kind in HYBRID else padded_batch()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_last_layer_equals_transformers(kind: str, training: bool) -> None:
    model = tiny_model(kind).train(training)
    pixels, mask = batch_for(kind)
    with torch.no_grad():
        theirs = copy.deepcopy(model)(pixels, pixel_mask=mask)
        ours = Detector(model)(pixels, mask)
    queries = 18 if kind == "dab patterns" else 9
    assert Detector(model).num_queries == queries
    assert ours.logits.shape == (3, 2, queries, 5)
    assert ours.boxes_cxcywh.shape == (3, 2, queries, 4)
    last = ours.query_states
    if kind in ("detr", "table"):
        expected = theirs.logits.softmax(-1)
        torch.testing.assert_close(ours.logits[-1].sigmoid(), expected[..., :-1], atol=1e-6, rtol=1e-5)
        assert ours.no_object is not None
        torch.testing.assert_close(ours.no_object[-1].exp(), expected[..., -1], atol=1e-6, rtol=1e-5)
    else:
        assert ours.no_object is None
        torch.testing.assert_close(ours.logits[-1], theirs.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.boxes_cxcywh[-1], theirs.pred_boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["dab", *SAMPLED])
def test_every_layer_and_what_comes_before_equal_the_auxiliary_outputs_of_transformers(kind: str) -> None:
    """In training mode, for D-FINE says nothing of its other layers in evaluation; without denoising, so that it is the
    same forward pass."""
    model = tiny_model(kind).train()
    pixels, mask = batch_for(kind)
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    reference = copy.deepcopy(model)
    reference.config.auxiliary_loss, reference.config.num_denoising = True, 0
    with torch.no_grad():
        theirs = reference(pixels, pixel_mask=mask, labels=[target, target])
        ours = Detector(model)(pixels, mask)
    if kind not in HYBRID:
        pairs = [(entry["logits"], entry["pred_boxes"]) for entry in theirs.auxiliary_outputs]
        layers = list(zip(ours.logits[:-1], ours.boxes_cxcywh[:-1], strict=True))
        if kind in ("lw_detr", "rf_detr"):
            assert ours.early_logits is not None
            assert ours.early_boxes_cxcywh is not None
            pairs.append((theirs.enc_outputs_class, theirs.enc_outputs_coord_logits))
            layers += zip(ours.early_logits, ours.early_boxes_cxcywh, strict=True)
    else:
        # transformers' list of auxiliary outputs is these; D-FINE's loses an entry on the way (docs/families.md).
        said = theirs.intermediate_logits.unbind(1), theirs.intermediate_reference_points.unbind(1)
        pairs = [(theirs.enc_topk_logits, theirs.enc_topk_bboxes), *zip(*said, strict=True)]
        assert ours.early_logits is not None
        assert ours.early_boxes_cxcywh is not None
        assert len(ours.early_logits) == len(ours.early_boxes_cxcywh) == Detector(model).num_early
        logits = torch.cat([ours.early_logits, ours.logits])
        layers = list(zip(logits, torch.cat([ours.early_boxes_cxcywh, ours.boxes_cxcywh]), strict=True))
    for mine, expected in zip(layers, pairs, strict=True):
        torch.testing.assert_close(mine[0], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine[1], expected[1], atol=1e-5, rtol=1e-5)


def test_detr_layers_equal_the_original_computation() -> None:
    """The original norms a copy of each layer's output for the heads and passes the raw one on."""
    model = tiny_model("detr")
    with torch.no_grad():
        theirs = model(*whole_batch()[:1], output_hidden_states=True)
        ours = Detector(model)(*whole_batch())
        for layer in range(2):
            state = model.model.decoder.layernorm(theirs.decoder_hidden_states[layer + 1])
            expected = model.class_labels_classifier(state).softmax(-1)[..., :-1]
            torch.testing.assert_close(ours.logits[layer].sigmoid(), expected, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(ours.boxes_cxcywh[layer], model.bbox_predictor(state).sigmoid())


def test_softmax_logits_are_those_of_its_probabilities_at_both_ends_too() -> None:
    torch.manual_seed(0)
    logits = torch.cat([torch.randn(50, 6, dtype=torch.float64) * scale for scale in (1, 10, 30)])
    logits[0], logits[1] = torch.tensor([0.0, 0, 0, 0, 80, 0]), torch.tensor([0.0, 0, 0, 0, 0, 80])
    p = logits.softmax(-1)
    others = torch.stack([torch.cat([p[:, :k], p[:, k + 1 :]], -1).sum(-1) for k in range(5)], -1)
    made = logits.float().requires_grad_()
    z, no_object = from_softmax(made)
    torch.testing.assert_close(z.double(), (p[:, :5] / others).log(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(no_object.double(), p[:, 5].log(), atol=1e-4, rtol=1e-5)
    (z.sum() + no_object.sum()).backward()
    assert made.grad is not None
    assert torch.isfinite(made.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_the_cross_attention_reads(kind: str) -> None:
    model = tiny_model(kind)
    detector = Detector(model)
    heard: list[dict[str, Any]] = []
    cross = FAMILIES[detector.family].cross_attentions(model)[-1]
    cross.register_forward_hook(lambda module, args, kwargs, output: heard.append(kwargs), with_kwargs=True)
    pixels, mask = batch_for(kind)
    ours = detector(pixels, mask)
    shapes = [(6, 8)] if kind in ONE_MAP else [(12, 16), (6, 8), (3, 4)][: 3 if kind == "deimv2 vit" else 2]
    projected = shapes[:1] if kind == "deimv2 lite" else shapes
    assert [tuple(part.shape) for part in ours.memory] == [(2, 32, *shape) for shape in shapes]
    assert detector.memory_strides == tuple(pixels.shape[-1] // part.shape[-1] for part in ours.memory)
    wide = 24 if kind in ("rt_detr", "rt_detr_v2", "discrete") else 32
    assert [tuple(part.shape) for part in ours.features] == [(2, wide, *shape) for shape in projected]
    assert (detector.memory_channels, detector.feature_channels) == ((32,) * len(shapes), (wide,) * len(projected))
    read = heard[0]["key_value_states" if kind in ("detr", "table") else "encoder_hidden_states"]
    assert torch.equal(torch.cat([part.flatten(2).transpose(1, 2) for part in ours.memory], 1), read)
    for valid, shape in zip(ours.memory_valid, shapes, strict=True):
        assert torch.equal(valid, F.interpolate(mask[None].float(), size=shape)[0].bool())


@pytest.mark.parametrize("kind", DENSE)
def test_dense_attention_equals_the_eager_attention_of_transformers(kind: str) -> None:
    model = tiny_model(kind)
    pixels, mask = padded_batch()
    with torch.no_grad():
        ours = Detector(model)(pixels, mask)
        last, mean = ours.attend(QUERIES)[0], ours.attend_mean(QUERIES)[0]
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        theirs = torch.stack(eager(pixels, pixel_mask=mask, output_attentions=True).cross_attentions).mean(2)
    for image in range(2):
        for slot, query in enumerate(QUERIES[image].tolist()):
            expected = theirs[:, image, query].unflatten(-1, (6, 8)) if query >= 0 else torch.zeros(3, 6, 8)
            torch.testing.assert_close(last[image, slot], expected[-1])
            torch.testing.assert_close(mean[image, slot], expected.mean(0))


@pytest.mark.parametrize("kind", SAMPLED)
def test_sampled_attention_reads_what_the_layer_reads(kind: str) -> None:
    """The layer's own sampling kernel is given maps that are 1 in one cell and 0 elsewhere: what comes out is the
    attention to that cell."""
    model = tiny_model(kind)
    pixels, mask = batch_for(kind)
    with torch.no_grad():
        ours = Detector(model)(pixels, mask)
        maps = torch.cat([part.flatten(2) for part in ours.attend(QUERIES)], dim=-1)  # [B, S, N]
        layer = ours.attend.args[1][0]
        module, cells = copy.deepcopy(layer.module), maps.shape[-1]
        for name in ("value_proj", "output_proj"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Identity())
        for cell in torch.randperm(cells, generator=torch.Generator().manual_seed(0))[:25].tolist():
            one = torch.zeros_like(layer.given["encoder_hidden_states"])
            one[:, cell] = 1
            read, _ = module(**{**layer.given, "encoder_hidden_states": one})  # [B, Q, D], heads side by side
            expected = read.mean(-1).gather(1, QUERIES.clamp(min=0)) * (QUERIES >= 0)
            everything, _ = module(**{**layer.given, "encoder_hidden_states": torch.ones_like(one)})
            seen = everything.mean(-1).gather(1, QUERIES.clamp(min=0))
            torch.testing.assert_close(maps[..., cell], expected / seen, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_sums_to_one_and_padding_gets_none(kind: str) -> None:
    ours = Detector(tiny_model(kind))(*padded_batch())
    for attend in (ours.attend, ours.attend_mean):
        maps = attend(QUERIES)
        total, known = sum(part.sum((-2, -1)) for part in maps), (QUERIES >= 0).float()
        # A family that ignores padding may have queries that look at nothing else: they are shown to see nothing.
        blind = known.new_tensor([[0, 0, 0, 0], [kind in HYBRID] * 4]).bool() & (total == 0)
        torch.testing.assert_close(total, torch.where(blind, 0.0, known))
        for part, valid in zip(maps, ours.memory_valid, strict=True):
            assert part.masked_select(~valid[:, None]).abs().sum() == 0


@pytest.mark.parametrize("kind", ["rt_detr", "d_fine"])
def test_boxes_of_a_family_that_ignores_padding_are_relative_to_the_image_itself(kind: str) -> None:
    model = tiny_model(kind)
    pixels, mask = padded_batch()
    with torch.no_grad():
        theirs, ours = model(pixels), Detector(model)(pixels, mask)
    torch.testing.assert_close(ours.boxes_cxcywh[-1, 0], theirs.pred_boxes[0], atol=1e-5, rtol=1e-5)
    part = torch.tensor([90 / 128, 70 / 96, 90 / 128, 70 / 96])
    torch.testing.assert_close(ours.boxes_cxcywh[-1, 1] * part, theirs.pred_boxes[1], atol=1e-5, rtol=1e-5)


def test_images_that_a_hybrid_encoder_cannot_take_are_refused_with_a_remedy() -> None:
    detector = Detector(tiny_model("rt_detr"))
    with pytest.raises(QskdError, match=r"100 x 128 pixels\n.*divisible by 16\n.*mode: square"):
        detector(torch.zeros(1, 3, 100, 128), torch.ones(1, 100, 128, dtype=torch.bool))
    with pytest.raises(QskdError, match=r"5 cells .*\n.*at least 9"):
        detector(torch.zeros(1, 3, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool))


def test_d_fine_that_predicts_from_another_layer_is_refused() -> None:
    model = tiny_model("d_fine")
    model.config.eval_idx = 1
    with pytest.raises(QskdError, match="the last of the 3 decoder layers"):
        Detector(model)


def test_lw_detr_of_a_size_that_its_windows_do_not_divide_or_of_another_backbone_is_refused_with_a_remedy() -> None:
    detector = Detector(tiny_model("lw_detr"))
    with pytest.raises(QskdError, match=r"96 x 80 pixels\n.*divisible by 32\n.*mode: square"):
        detector(torch.zeros(1, 3, 96, 80), torch.ones(1, 96, 80, dtype=torch.bool))
    with pytest.raises(QskdError, match=r"5 cells .*\n.*at least 9"):
        Detector(hf.LwDetrForObjectDetection(lw_detr_config(projector_scale_factors=[1.0, 0.5])))(
            torch.zeros(1, 3, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool)
        )
    config = lw_detr_config()
    config.backbone_config = hf.ResNetConfig()
    with pytest.raises(QskdError, match=r"a resnet\n.*lw_detr_vit"):
        FAMILIES["lw_detr"].check(config)


@pytest.mark.parametrize("kind", ["detr", "table", "dab", "rt_detr", "d_fine", "deimv2", "lw_detr", "rf_detr"])
def test_bf16_autocast_keeps_predictions_in_float32(kind: str) -> None:
    detector = Detector(tiny_model(kind))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = detector(*batch_for(kind))
        maps = rough.attend(QUERIES)
    for value in (rough.logits, rough.boxes_cxcywh, rough.query_states, rough.early_logits, rough.early_boxes_cxcywh):
        assert value is None or value.dtype == torch.float32
    torch.testing.assert_close(sum(part.sum((-2, -1)) for part in maps), (QUERIES >= 0).float())


def test_every_family_has_a_row_of_facts_that_its_file_agrees_with() -> None:
    assert set(FACTS) == set(FAMILIES)
    for name, family in FAMILIES.items():
        facts = FACTS[name]
        assert family.many_maps == (facts.size.get("feature_levels") != 1), name
        assert BEST_PAIRS.get(name) == facts.best_pairs, name  # detect.py stands alone: it has a table of its own
        assert (name in SOFTMAX) == facts.softmax == (FAMILIES[name].classification == "softmax")
