"""A student that starts from its teacher has the teacher's very weights where shapes fit, and says where they don't."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from qskd.config import BackboneConfig, Config, ResizeConfig, StudentConfig
from qskd.detectors import Detector, build_student, fitting_sizes, inherit, load_detector, save_detector
from qskd.detectors.inherit import spread
from qskd.errors import QskdError
from qskd.families.table import find_family
from qskd.from_recipe import start_student
from qskd.training.module import StepModule

TINY = {"width": 32, "heads": 4, "ffn_width": 48, "queries": 9}
BACKBONE = BackboneConfig(embedding_size=8, hidden_sizes=(8, 8), depths=(1, 1))
LABELS = ("ant", "bee", "cat")
FAMILIES = (
    "detr",
    "table-transformer",
    "conditional_detr",
    "dab-detr",
    "deformable_detr",
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "deimv2",
)


def detector(family: str, seed: int, labels: tuple[str, ...] = LABELS, **sizes: object) -> Detector:
    tree = {"family": family, "backbone": BACKBONE, "encoder_layers": 2, "decoder_layers": 3, **TINY, **sizes}
    made = build_student(StudentConfig.model_validate(tree), labels, seed)
    with torch.no_grad():  # what starts the same everywhere (a zeroed box head, norms) must differ to be told apart
        torch.manual_seed(seed)
        for parameter in made.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return made.eval()


def outputs(one: Detector) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    pixels, mask = torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    with torch.no_grad():
        said = one(pixels, mask, with_attention=False)
    return said.logits, said.boxes_cxcywh


@pytest.mark.parametrize("family", ["conditional_detr", "deformable_detr"])
def test_a_student_of_the_teachers_sizes_becomes_the_teacher(family: str) -> None:
    teacher, student = detector(family, 1), detector(family, 2)
    done = inherit(student, teacher, (0, 1, 2))
    assert not done.left
    for mine, theirs in zip(outputs(student), outputs(teacher), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", ["conditional_detr", "deformable_detr"])
def test_a_student_with_fewer_layers_takes_the_first_and_the_last(family: str) -> None:
    teacher, student = detector(family, 1), detector(family, 2, decoder_layers=2, encoder_layers=1)
    done = inherit(student, teacher, (0, 1, 2))
    assert done.copied["model.decoder.layers.0"] == "model.decoder.layers.0"
    assert done.copied["model.decoder.layers.1"] == "model.decoder.layers.2"
    assert done.copied["model.encoder.layers.0"] == "model.encoder.layers.1"
    mine, theirs = student.model.state_dict(), teacher.model.state_dict()
    for name in mine:
        if name.startswith("model.decoder.layers.1."):
            assert torch.equal(mine[name], theirs[name.replace("layers.1.", "layers.2.")]), name
    assert done.describe().count("\n") + 1 == len(done.copied) + len(done.left)


@pytest.mark.parametrize("family", ["d_fine", "deimv2"])
def test_points_that_lie_on_the_maps_in_other_numbers_are_the_teachers(family: str, tmp_path: Path) -> None:
    backbone = {"embedding_size": 8, "hidden_sizes": (8, 8, 8), "depths": (1, 1, 1)}
    sizes = {"feature_levels": 3, "backbone": backbone}
    config = detector(family, 1, **sizes).model.config
    config.decoder_n_points, config.reg_scale = [3, 6, 3], 8.0  # as the published D-FINE-X: 12 in all, as of 4, 4, 4
    teacher = Detector(find_family(family, "test").model_class(config))
    find_family(family, "test").initialise(teacher.model)
    tiny.shake(teacher, 1)
    save_detector(teacher.eval(), tmp_path / "teacher", ResizeConfig(size=64))
    student = detector(family, 2, **sizes)
    done = inherit(student, load_detector(tmp_path / "teacher"), (0, 1, 2))
    assert not done.left
    assert student.model.config.reg_scale == 8.0
    save_detector(student, tmp_path / "student", ResizeConfig(size=64))
    for one in (student, load_detector(tmp_path / "student")):
        for said, expected in zip(outputs(one), outputs(teacher), strict=True):
            torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-5)
    config.decoder_n_points = [2, 4, 2]  # as many as a student's of two maps
    teacher = Detector(find_family(family, "test").model_class(config))
    done = inherit(detector(family, 3, feature_levels=2, backbone=backbone), teacher, (0, 1, 2))
    assert done.left["model.decoder.layers.0"] == "its points lie on 3 maps, the student's on 2"


def test_another_backbone_is_left_as_it_was_and_everything_else_is_copied() -> None:
    teacher = detector("deformable_detr", 1)
    other = BackboneConfig(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    student = detector("deformable_detr", 2, backbone=other)
    before = {name: value.clone() for name, value in student.backbone.state_dict().items()}
    done = inherit(student, teacher, (0, 1, 2))
    assert set(done.left) == {"model.backbone", "model.input_proj.0.0"}
    assert all(torch.equal(value, before[name]) for name, value in student.backbone.state_dict().items())


def test_class_rows_follow_their_names_whatever_their_order() -> None:
    teacher = detector("conditional_detr", 1, labels=("cat", "dog", "ant", "bee"))
    student = detector("conditional_detr", 2)
    inherit(student, teacher, (2, 3, 0))
    mine, theirs = (one.model.class_labels_classifier for one in (student, teacher))
    for slot, source in enumerate((2, 3, 0)):
        assert torch.equal(mine.weight[slot], theirs.weight[source])
        assert mine.bias[slot] == theirs.bias[source]


def test_fewer_queries_are_spread_over_the_teachers() -> None:
    teacher = detector("conditional_detr", 1)
    rows = teacher.model.model.query_position_embeddings.weight
    few = detector("conditional_detr", 2, queries=5)
    inherit(few, teacher, (0, 1, 2))
    assert torch.equal(few.model.model.query_position_embeddings.weight, rows[[0, 2, 4, 6, 8]])


@pytest.mark.parametrize("family", ["conditional_detr", "deformable_detr", "dab-detr"])
def test_more_queries_than_the_teachers_look_first_at_places_spread_over_the_image(family: str) -> None:
    teacher, student = detector(family, 1), detector(family, 2, queries=34)
    done = inherit(student, teacher, (0, 1, 2))
    mine, theirs = (find_family(family, "test").reference_points(one.model) for one in (student, teacher))
    assert mine is not None
    assert theirs is not None
    assert any("query" in name for name in done.copied)
    torch.testing.assert_close(mine[:9], theirs)
    # An even grid of 25: every new query has its own cell of 0.2, most within a few hundredths of its middle.
    cells = {(int(x * 5), int(y * 5)) for x, y in mine[9:].tolist()}
    assert len(cells) == 25


def test_a_wider_layer_is_left_whole() -> None:
    teacher, student = detector("conditional_detr", 1), detector("conditional_detr", 2, ffn_width=64)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    done = inherit(student, teacher, (0, 1, 2))
    assert "model.decoder.layers.0" in done.left
    assert "[64, 32]" in done.left["model.decoder.layers.0"]
    after = student.model.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in after if n.startswith("model.decoder.layers."))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_student_takes_the_same_channels_everywhere(family: str) -> None:
    """A teacher of which every channel is there twice, side by side, is inherited by a student of half its widths."""
    teacher = detector(family, 1, width=64, ffn_width=96)
    narrow = detector(family, 3)
    doubled = {}
    for (name, wide), thin in zip(teacher.model.state_dict().items(), narrow.model.state_dict().values(), strict=True):
        for axis, (many, few) in enumerate(zip(wide.shape, thin.shape, strict=True)):
            if many == 2 * few:
                thin = thin.repeat_interleave(2, axis)
        doubled[name] = thin
    teacher.model.load_state_dict(doubled)
    student = detector(family, 2)
    done = inherit(student, teacher, (0, 1, 2))
    assert not done.left
    assert done.copied["model.decoder.layers.1"] == "model.decoder.layers.1, channels evenly chosen"
    expected, mine = narrow.model.state_dict(), student.model.state_dict()
    assert all(torch.equal(mine[name], expected[name]) for name in mine if "num_batches" not in name)


def of_twice(values: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Each block of as many along the axis twice, side by side."""
    return torch.cat([each for part in values.split(block, axis) for each in (part, part)], axis)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_student_of_fewer_heads_takes_whole_heads(family: str) -> None:
    """A teacher of which every head is there twice, side by side, is inherited by a student of half its heads and widths."""
    teacher = detector(family, 1, width=64, ffn_width=96, heads=8)
    narrow = detector(family, 3)
    wide, thin = teacher.model.state_dict(), narrow.model.state_dict()
    with torch.no_grad():
        for name, value in thin.items():
            for axis, (many, few) in enumerate(zip(wide[name].shape, value.shape, strict=True)):
                if many == 2 * few:
                    per_head = name.split(".")[-2] in ("sampling_offsets", "attention_weights") and axis == 0
                    block = few // 4 if per_head else 1 if few in (24, 48) else few // 4 if few == 16 else 8
                    value = of_twice(value, axis, block)
            wide[name].copy_(value)
    student = detector(family, 2)
    done = inherit(student, teacher, (0, 1, 2))
    assert not done.left
    assert done.copied["model.decoder.layers.1"] == "model.decoder.layers.1, channels evenly chosen"
    mine = student.model.state_dict()
    differing = [name for name in mine if "num_batches" not in name and not torch.equal(mine[name], thin[name])]
    assert not differing


@pytest.mark.parametrize("family", ["rt_detr", "d_fine"])
def test_every_size_inherits_from_a_detector_of_published_sizes(family: str) -> None:
    """All but the backbone and what reads its maps: `size` sets the heads too, so the README's recipe has to fit."""
    sizes = {"width": 256, "heads": 8, "ffn_width": 1024, "queries": 300, "decoder_layers": 6, "encoder_layers": 1}
    three = BackboneConfig(embedding_size=8, hidden_sizes=(8, 8, 8), depths=(1, 1, 1))
    teacher = detector(family, 1, **sizes, feature_levels=3, backbone=three)
    for size in ("nano", "micro", "small", "medium"):
        own = StudentConfig.model_validate({"family": family, "size": size, "feature_levels": 3})
        student = build_student(own, LABELS, 2)
        done = inherit(student, teacher, (0, 1, 2))
        read_the_backbone = [f"model.encoder_input_proj.{level}.0" for level in range(3)]
        assert sorted(done.left) == sorted(["model.backbone", *read_the_backbone]), (size, done.left)


@pytest.mark.parametrize("sizes", [{"heads": 2}, {"heads": 8, "width": 48}, {"heads": 8}])
def test_heads_of_more_channels_or_more_heads_are_not_made_of_the_teachers(sizes: dict[str, int]) -> None:
    teacher = detector("conditional_detr", 1, width=48 + 16 * (sizes.get("width") == 48), ffn_width=96)
    done = inherit(detector("conditional_detr", 2, **sizes), teacher, (0, 1, 2))
    heads, width = sizes["heads"], sizes.get("width", 32)
    said = f"the student's {heads} heads of {width // heads} channels can't be taken from its 4 of"
    assert said in done.left["model.decoder.layers.0"]


@pytest.mark.parametrize("family", ["detr", "deformable_detr"])
@pytest.mark.parametrize("heads", [2, 8])
def test_of_one_width_layers_of_other_heads_are_left(family: str, heads: int) -> None:
    """Their shapes are the same, and each of the student's heads would be two of the teacher's, or half of one."""
    done = inherit(detector(family, 2, heads=heads), detector(family, 1), (0, 1, 2))
    layers = {f"model.{side}.layers.{n}" for side, count in (("encoder", 2), ("decoder", 3)) for n in range(count)}
    assert done.left.keys() == layers
    assert all(f"the student's {heads} heads of {32 // heads} channels" in why for why in done.left.values())


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"width": 48, "heads": 4}, {"heads": 8}),  # of 12 channels, where the teacher's have 8
        ({"width": 36, "heads": 3, "ffn_width": 128}, {"width": 64, "heads": 8, "ffn_width": 96}),  # 36 % 8 is not 0
        ({"width": 128, "heads": 8}, {"width": 64}),
    ],
)
def test_where_nothing_fits_the_fields_that_are_named_make_it_fit(
    sizes: dict[str, int], named: dict[str, int], tmp_path: Path
) -> None:
    other = BackboneConfig(embedding_size=4, hidden_sizes=(4, 4), depths=(1, 1))
    teacher = detector("conditional_detr", 1, width=64, ffn_width=96, heads=8, backbone=other)
    student = detector("conditional_detr", 2, **sizes)
    done = inherit(student, teacher, (0, 1, 2))
    assert not done.copied
    assert "heads" not in done.left["model.backbone"]
    assert fitting_sizes(student, teacher) == named
    assert inherit(detector("conditional_detr", 2, **{**sizes, **named}), teacher, (0, 1, 2)).copied
    save_detector(teacher, tmp_path / "teacher", StudentConfig().resize)
    tree = {"backbone": BACKBONE, "encoder_layers": 2, "decoder_layers": 3, **TINY, **sizes, "inherit": True}
    recipe = Config.model_validate({"student": tree, "teacher": {"path": str(tmp_path / "teacher")}})
    with pytest.raises(QskdError, match="no part of") as told:
        start_student(recipe, LABELS)
    assert all(f"student.{name}: {size}, the teacher's" in told.value.remedy for name, size in named.items())
    assert told.value.remedy.endswith("or student.inherit: false")
    assert len(str(told.value).splitlines()) == 7  # three parts, how many more, what was expected, what to do
    assert " more" in told.value.found.splitlines()[-1]


def test_sizes_are_not_named_where_they_are_not_in_the_way() -> None:
    assert fitting_sizes(detector("detr", 2, width=16), detector("detr", 1)) == {}


def test_a_saved_teacher_s_backbone_is_inherited_too(tmp_path: Path) -> None:
    """Its norms are frozen and count no batches; the student's do."""
    teacher, student = detector("conditional_detr", 1), detector("conditional_detr", 2)
    save_detector(teacher, tmp_path, StudentConfig().resize)
    assert not inherit(student, load_detector(tmp_path), (0, 1, 2)).left
    for mine, theirs in zip(outputs(student), outputs(teacher), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("family", ["deformable_detr", "dab-detr", "rt_detr"])
def test_of_another_family_the_backbone_alone_is_inherited(family: str) -> None:
    teacher, student = detector("conditional_detr", 1), detector(family, 2)
    before = {name: value.clone() for name, value in student.model.state_dict().items()}
    done = inherit(student, teacher, (0, 1, 2))
    assert list(done.copied.values()) == ["the backbone of the conditional_detr"]
    assert "everything else: not inherited, the teacher is a conditional_detr" in done.describe()
    theirs = teacher.backbone.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in student.backbone.state_dict().items())
    place = next(iter(done.copied)) + "."
    after = student.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items() if not name.startswith(place))


def test_another_family_on_another_backbone_is_refused() -> None:
    other = BackboneConfig(embedding_size=8, hidden_sizes=(8, 16), depths=(1, 1))
    student = detector("conditional_detr", 1, backbone=other)
    with pytest.raises(QskdError, match="one family for both, or one backbone"):
        inherit(student, detector("deformable_detr", 2), (0, 1, 2))


@pytest.mark.parametrize(
    ("count", "available", "chosen"), [(1, 6, [5]), (2, 6, [0, 5]), (3, 6, [0, 2, 5]), (6, 6, list(range(6)))]
)
def test_spread_keeps_the_ends(count: int, available: int, chosen: list[int]) -> None:
    assert spread(count, available) == chosen


def tiny_teacher(**options: object) -> Detector:
    """A Deformable DETR whose configuration is what build_student never makes."""
    own = detector("deformable_detr", 1).model.config
    model = DeformableDetrForObjectDetection(DeformableDetrConfig(**{**own.to_dict(), **options}))
    return Detector(model.eval())


def test_of_a_teacher_in_two_stages_heads_go_with_their_layers_and_the_proposals_are_left_out() -> None:
    teacher = tiny_teacher(two_stage=True, with_box_refine=True, two_stage_num_proposals=9)
    student = detector("deformable_detr", 2, decoder_layers=2)
    assert len(teacher.model.class_embed) == 4  # three layers', and the proposals'
    done = inherit(student, teacher, (0, 1, 2))
    for mine, theirs in enumerate((0, 2)):
        for part in ("model.decoder.layers", "class_embed"):
            assert done.copied[f"{part}.{mine}"] == f"{part}.{theirs}"
    # transformers ties a student's class heads: the last one written is the last layer's.
    assert torch.equal(student.model.class_embed[1].weight, teacher.model.class_embed[2].weight)
    assert torch.equal(student.model.bbox_embed[1].layers[0].weight, teacher.model.bbox_embed[2].layers[0].weight)


def test_parts_that_an_unrefined_teacher_has_not_are_left_and_told() -> None:
    teacher, student = tiny_teacher(with_box_refine=False), detector("deformable_detr", 2)
    done = inherit(student, teacher, (0, 1, 2))
    assert done.copied["model.decoder.layers.0"] == "model.decoder.layers.0"
    assert any("bbox_embed" in part and "nothing" in why for part, why in done.left.items()), done.describe()


@pytest.mark.parametrize(
    ("family", "teacher", "inherits", "same"),
    [
        ("d_fine", "refined", False, False),  # its decoder reads channels as they are: they are its own
        ("d_fine", "d_fine", True, True),
        ("d_fine", "refined", True, False),  # of another family the backbone alone is inherited
        ("deimv2", "refined", False, False),
        ("rt_detr", "refined", False, True),
    ],
)
def test_a_feature_loss_begins_as_the_identity_unless_the_student_reads_channels_of_its_own(
    family: str, teacher: str, inherits: bool, same: bool
) -> None:
    config = tiny.recipe({**tiny.own(family), "width": 64})
    student = tiny.silent_student(config.student, tiny.LABELS, 0)
    taught = tiny.random_teacher(teacher)
    if inherits:
        inherit(student, taught.detector, range(len(tiny.LABELS)))
        assert bool(student.inherited) is same
    module = StepModule(config, student, taught)
    for layer in module.method.features.projectors.values():
        weight = layer.weight[:, :, 0, 0]
        assert torch.equal(weight, torch.eye(64)) is same
        torch.testing.assert_close(weight @ weight.T, torch.eye(64), atol=1e-5, rtol=0)
