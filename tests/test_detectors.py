"""What a Detector says, against transformers itself: predictions, maps, attention."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    ConditionalDetrConfig,
    ConditionalDetrForObjectDetection,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    ResNetConfig,
)

from qskd.detectors import Detector
from qskd.errors import QskdError
from qskd.families.deformable_detr import sampling, splat

torch.set_num_threads(1)

KINDS = ["conditional", "deformable", "refined", "two_stage"]


def tiny_model(kind: str, seed: int = 0, layers: int = 3) -> Any:
    """A detector of transformers in eval mode whose every parameter is random, norms and sampling offsets too."""
    stages = ["stage3"] if kind == "conditional" else ["stage2", "stage3"]
    shared: dict[str, Any] = {
        "backbone_config": ResNetConfig(
            layer_type="basic", depths=[1, 1, 1], hidden_sizes=[8, 16, 24], embedding_size=8, out_features=stages
        ),
        **{"d_model": 32, "encoder_layers": 1, "decoder_layers": layers, "encoder_attention_heads": 4},
        **{"decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 9},
        **{"num_labels": 5, "dropout": 0.0},
    }
    torch.manual_seed(seed)
    model: Any
    if kind == "conditional":
        model = ConditionalDetrForObjectDetection(ConditionalDetrConfig(**shared))
    else:
        refined, staged = kind != "deformable", kind == "two_stage"
        extra = {"num_feature_levels": 3, "with_box_refine": refined, "two_stage": staged, "two_stage_num_proposals": 9}
        model = DeformableDetrForObjectDetection(DeformableDetrConfig(**shared, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model.eval()


def padded_batch() -> tuple[Tensor, Tensor]:
    """Two images of which the second fills a part only: pixel_values [2, 3, 96, 128], pixel_mask [2, 96, 128]."""
    torch.manual_seed(1)
    mask = torch.ones(2, 96, 128, dtype=torch.bool)
    mask[1, 70:], mask[1, :, 90:] = False, False
    return torch.randn(2, 3, 96, 128) * mask[:, None], mask


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_last_layer_equals_transformers_exactly(kind: str, training: bool) -> None:
    model = tiny_model(kind).train(training)
    pixels, mask = padded_batch()
    with torch.no_grad():
        theirs = model(pixels, pixel_mask=mask)
        ours = Detector(model)(pixels, mask)
    assert ours.logits.shape == (3, 2, 9, 5)
    assert ours.boxes_cxcywh.shape == (3, 2, 9, 4)
    assert torch.equal(ours.logits[-1], theirs.logits)
    assert torch.equal(ours.boxes_cxcywh[-1], theirs.pred_boxes)
    assert torch.equal(ours.query_states, theirs.last_hidden_state)


@pytest.mark.parametrize("kind", ["deformable", "refined"])
def test_deformable_layers_equal_the_auxiliary_outputs_of_transformers(kind: str) -> None:
    model = tiny_model(kind)
    pixels, mask = padded_batch()
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    model.config.auxiliary_loss = True  # changes no number of this family's forward pass
    with torch.no_grad():
        theirs = model(pixels, pixel_mask=mask, labels=[target, target])
        ours = Detector(model)(pixels, mask)
    for layer, auxiliary in enumerate(theirs.auxiliary_outputs):
        assert torch.equal(ours.logits[layer], auxiliary["logits"])
        assert torch.equal(ours.boxes_cxcywh[layer], auxiliary["pred_boxes"])


def test_conditional_layers_equal_the_original_computation() -> None:
    """The original norms a copy of each layer's output for the heads and passes the raw one on."""
    model = tiny_model("conditional")
    pixels, mask = padded_batch()
    with torch.no_grad():
        theirs = model(pixels, pixel_mask=mask, output_hidden_states=True)
        base = model.model(pixels, pixel_mask=mask)
        ours = Detector(model)(pixels, mask)
        reference = torch.special.logit(base.reference_points.transpose(0, 1), eps=1e-5)
        for layer in range(2):
            state = model.model.decoder.layernorm(theirs.decoder_hidden_states[layer + 1])
            box = model.bbox_predictor(state) + F.pad(reference, (0, 2))
            torch.testing.assert_close(ours.logits[layer], model.class_labels_classifier(state))
            torch.testing.assert_close(ours.boxes_cxcywh[layer], box.sigmoid())


def test_auxiliary_loss_is_off_even_when_the_model_has_it_on() -> None:
    model = tiny_model("conditional")
    pixels, mask = padded_batch()
    with torch.no_grad():
        plain = model(pixels, pixel_mask=mask).logits
        model.config.auxiliary_loss = True
        assert not torch.allclose(model(pixels, pixel_mask=mask).logits, plain, atol=1e-3)
        assert torch.equal(Detector(model)(pixels, mask).logits[-1], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_encoder_s_tokens_and_what_it_was_given(kind: str) -> None:
    model = tiny_model(kind)
    detector = Detector(model)
    pixels, mask = padded_batch()
    with torch.no_grad():
        theirs = model(pixels, pixel_mask=mask, output_hidden_states=True)
        ours = detector(pixels, mask)
    shapes = [(6, 8)] if kind == "conditional" else [(12, 16), (6, 8), (3, 4)]
    assert [tuple(part.shape) for part in ours.memory] == [(2, 32, *shape) for shape in shapes]
    assert [tuple(part.shape) for part in ours.features] == [(2, 32, *shape) for shape in shapes]
    assert detector.memory_channels == tuple(part.shape[1] for part in ours.memory)
    assert detector.memory_strides == tuple(pixels.shape[-1] // part.shape[-1] for part in ours.memory)

    def tokens(maps: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([part.flatten(2).transpose(1, 2) for part in maps], dim=1)

    assert torch.equal(tokens(ours.memory), theirs.encoder_last_hidden_state)
    assert torch.equal(tokens(ours.features), theirs.encoder_hidden_states[0])
    for valid, shape in zip(ours.memory_valid, shapes, strict=True):
        assert valid.dtype == torch.bool
        assert torch.equal(valid, F.interpolate(mask[None].float(), size=shape)[0].bool())


QUERIES = torch.tensor([[3, 0, -1, 8], [7, 7, 1, -1]])


@pytest.mark.parametrize("padded", [False, True])
def test_conditional_attention_equals_the_eager_attention_of_transformers(padded: bool) -> None:
    model = tiny_model("conditional")
    pixels, mask = padded_batch()
    mask = mask if padded else torch.ones_like(mask)
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


def slow_splat(locations: Tensor, weights: Tensor, height: int, width: int) -> Tensor:
    """[P, 2], [P] -> [H, W], one corner of one point at a time."""
    result = torch.zeros(height, width)
    for (x, y), weight in zip((locations * torch.tensor([width, height]) - 0.5).tolist(), weights, strict=True):
        for column in (int(x // 1), int(x // 1) + 1):
            for row in (int(y // 1), int(y // 1) + 1):
                if 0 <= column < width and 0 <= row < height:
                    result[row, column] += weight * (1 - abs(x - column)) * (1 - abs(y - row))
    return result


def test_splat_is_what_grid_sample_reads() -> None:
    torch.manual_seed(0)
    locations, weights, image = torch.rand(40, 2) * 1.4 - 0.2, torch.rand(40), torch.randn(5, 7)
    read = F.grid_sample(image[None, None], locations[None, None] * 2 - 1, align_corners=False)[0, 0, 0] @ weights
    torch.testing.assert_close((splat(locations, weights, 5, 7) * image).sum(), read)
    torch.testing.assert_close(splat(locations, weights, 5, 7), slow_splat(locations, weights, 5, 7))


@pytest.mark.parametrize("kind", ["deformable", "refined", "two_stage"])
def test_deformable_attention_equals_a_slow_splat_of_transformers_own_weights(kind: str) -> None:
    model = tiny_model(kind)
    pixels, mask = padded_batch()
    heard: list[tuple[Tensor, Tensor]] = []
    last_layer = model.model.decoder.layers[-1].encoder_attn
    last_layer.attn.register_forward_hook(lambda module, args, output: heard.append((args[4], args[5])))
    with torch.no_grad():
        ours = Detector(model)(pixels, mask)
    maps = ours.attend(QUERIES)
    locations, weights = heard[0]  # [B, Q, heads, levels, points, 2], [B, Q, heads, levels, points]
    for image in range(2):
        for slot, query in enumerate(QUERIES[image].tolist()):
            expected = [
                slow_splat(
                    locations[image, query, :, level].flatten(0, 1),
                    weights[image, query, :, level].flatten(),
                    *valid.shape[1:],
                )
                * valid[image]
                for level, valid in enumerate(ours.memory_valid)
            ]
            total = sum(float(part.sum()) for part in expected)
            for part, found in zip(expected, maps, strict=True):
                torch.testing.assert_close(found[image, slot], part / total if query >= 0 else torch.zeros_like(part))


def test_sampling_weights_of_a_head_sum_to_one() -> None:
    detector = Detector(tiny_model("refined"))
    layer = detector(*padded_batch()).attend.args[1][0]
    _, weights = sampling(layer.module, layer.given, QUERIES.clamp(min=0))
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 4, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_sums_to_one_and_padding_gets_none(kind: str) -> None:
    ours = Detector(tiny_model(kind)).eval()(*padded_batch())  # in training it has a gradient (tests/test_d3etr.py)
    for attend in (ours.attend, ours.attend_mean):
        maps = attend(QUERIES)
        total = sum(part.sum((-2, -1)) for part in maps)
        torch.testing.assert_close(total, (QUERIES >= 0).float())
        for part, valid in zip(maps, ours.memory_valid, strict=True):
            assert part.dtype == torch.float32
            assert not part.requires_grad
            assert part.masked_select(~valid[:, None]).abs().sum() == 0
    assert [part.shape[1] for part in ours.attend(QUERIES[:, :0])] == [0] * len(ours.memory)


def test_without_attention_says_so_when_asked_for_it() -> None:
    output = Detector(tiny_model("conditional"))(*padded_batch(), with_attention=False)
    with pytest.raises(RuntimeError, match="with_attention=False"):
        output.attend(QUERIES)
    with pytest.raises(RuntimeError, match="with_attention=False"):
        output.attend_mean(QUERIES)


@pytest.mark.parametrize("kind", ["conditional", "refined"])
def test_nothing_of_a_step_outlives_its_output(kind: str) -> None:
    detector = Detector(tiny_model(kind))
    output = detector(*padded_batch())
    kept = [weakref.ref(output.memory[0]), weakref.ref(output.attend.args[1][0].given["hidden_states"])]
    del output
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda detector: pickle.loads(pickle.dumps(detector))])
@pytest.mark.parametrize("kind", ["conditional", "refined"])
def test_a_copy_listens_to_itself(kind: str, clone: Any) -> None:
    detector = Detector(tiny_model(kind))
    expected = detector(*padded_batch())
    attention = expected.attend(QUERIES)
    copied = clone(detector)
    with torch.no_grad():
        for parameter in detector.parameters():  # a copy that still used the first one's modules would show it
            parameter.zero_()
    output = copied(*padded_batch())
    assert torch.equal(output.logits, expected.logits)
    assert all(torch.equal(*pair) for pair in zip(output.attend(QUERIES), attention, strict=True))


@pytest.mark.parametrize("kind", ["conditional", "refined"])
def test_bf16_autocast_keeps_predictions_and_attention_in_float32(kind: str) -> None:
    detector = Detector(tiny_model(kind))
    pixels, mask = padded_batch()
    with torch.no_grad():
        exact = detector(pixels, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rough = detector(pixels, mask)
            maps = rough.attend(QUERIES)
    assert rough.logits.dtype == rough.boxes_cxcywh.dtype == rough.query_states.dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in maps)
    torch.testing.assert_close(sum(part.sum((-2, -1)) for part in maps), (QUERIES >= 0).float())
    torch.testing.assert_close(rough.boxes_cxcywh, exact.boxes_cxcywh, atol=0.1, rtol=0)


def test_gradients_reach_every_output_through_ddp(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for kind in ("conditional", "refined"):
            detector = torch.nn.parallel.DistributedDataParallel(Detector(tiny_model(kind).train()))
            for _ in range(2):
                output = detector(*padded_batch())
                loss = output.logits.sum() + output.boxes_cxcywh.sum() + output.memory[0].sum()
                loss.backward()
                assert output.attend(QUERIES)[0].shape[:2] == QUERIES.shape
    finally:
        torch.distributed.destroy_process_group()


def test_fewer_cells_than_proposals_are_refused_with_their_number() -> None:
    model = tiny_model("two_stage")
    pixels, mask = torch.randn(1, 3, 16, 16), torch.ones(1, 16, 16, dtype=torch.bool)
    with pytest.raises(QskdError, match=r"16 x 16 pixels: 6 cells on maps of strides \[8, 16, 32\]"):
        Detector(model)(pixels, mask)
