"""Grounding DINO and MM Grounding DINO as teachers: asked for a dataset's classes, equal to transformers, kept and distilled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from asked import KINDS, make_asked
from checkpoints import change, copied, make
from PIL import Image
from safetensors.torch import load_file, save_file
from test_detectors import padded_batch
from test_loader import Pictures
from test_teacher_cache import cache_config, losses, make_cache, stream_of
from tiny import recipe
from torch import Tensor
from transformers.models.bert.modeling_bert import BertModel
from transformers.models.grounding_dino.modeling_grounding_dino import build_label_maps
from typer.testing import CliRunner

import qskd
from pipelines.cli import app
from pipelines.health.checkpoint import model_checks
from pipelines.inspection.predict import predict_all, request
from pipelines.reporting.cards import figures
from qskd.checkpoints.clean_config import detector_config
from qskd.checks import check_cache, check_decoder
from qskd.config import Config, ResizeConfig
from qskd.config.recipe import build
from qskd.datasets.manifest import load_manifest
from qskd.datasets.shards import write_shards
from qskd.detectors import load_detector
from qskd.detectors.student import queries_of
from qskd.detectors.teachers.asked import UNASKED_LOGIT
from qskd.detectors.teachers.prompt import words_for
from qskd.errors import QskdError
from qskd.evaluation.average_precision import METRICS
from qskd.from_recipe import make_teacher, start_student
from qskd.structures import TeacherNeeds
from qskd.teacher.cached import CachedTeacher
from qskd.teacher.columns.table import encode
from qskd.teacher.identity import cache_identity

torch.set_num_threads(1)
CLASSES = ("Cat", "bird of prey", "dog_light")
DATA = ("three", "eight", "nine")  # of `Pictures`
SHORT = 11  # tokens: one of DATA fits, or two


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("asked")
    return {kind: make_asked(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shards(Pictures(22), folder, rows_per_shard=8, rows_per_group=3)
    return folder


@pytest.fixture(scope="module")
def short(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, and a text that is too short for all classes of `Pictures`."""
    folder = copied(folders["grounding-dino"], tmp_path_factory.mktemp("short") / "model")
    change(folder, {"max_text_len": SHORT})
    return folder


def asked_by_transformers(folder: Path, text: str, pixels: Tensor, mask: Tensor) -> Any:
    processor = hf.AutoProcessor.from_pretrained(folder)
    model = hf.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    tokens = processor.tokenizer([text] * len(pixels), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(pixels, input_ids=tokens, pixel_mask=mask)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_and_the_best_token_of_each_phrase_are_those_of_transformers(folders: dict[str, Path], kind: str) -> None:
    pixels, mask = padded_batch()
    theirs = asked_by_transformers(folders[kind], "cat . bird of prey . dog light .", pixels, mask)
    detector = load_detector(folders[kind], words=CLASSES)
    with torch.no_grad():
        said = detector(pixels, mask)
    assert detector.labels == CLASSES
    assert torch.equal(said.boxes_cxcywh[-1], theirs.pred_boxes)
    for image, phrases in enumerate(build_label_maps(theirs.logits, theirs.input_ids)):
        best = [theirs.logits[image].masked_fill(phrase == 0, -torch.inf).amax(-1) for phrase in phrases]
        assert torch.equal(said.logits[-1, image], torch.stack(best, -1))
    assert torch.equal(said.query_states, theirs.last_hidden_state)
    tokens = torch.cat([level.flatten(2) for level in said.memory], 2).transpose(1, 2)
    assert torch.equal(tokens, theirs.encoder_last_hidden_state_vision)
    # Their post-processing: the same boxes in pixels.
    (first, _) = hf.AutoProcessor.from_pretrained(folders[kind]).post_process_grounded_object_detection(
        theirs, threshold=0.0, target_sizes=[(100, 200), (100, 200)]
    )
    centres = said.boxes_cxcywh[-1, 0] * torch.tensor([200.0, 100.0, 200.0, 100.0])
    assert torch.allclose(first["boxes"][:, 2:] - first["boxes"][:, :2], centres[:, 2:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_where_its_decoder_samples(folders: dict[str, Path], kind: str) -> None:
    """The values of a map that is one everywhere but in one cell tell how much each query sees of that cell."""
    pixels, mask = padded_batch()
    detector = load_detector(folders[kind], words=CLASSES)
    with torch.no_grad():
        said = detector(pixels, mask)
        shown = said.attend(torch.tensor([[0, 4, -1], [6, -1, 2]]))
    total = sum(level.sum((-1, -2)) for level in shown)
    assert torch.allclose(total, torch.tensor([[1.0, 1, 0], [1, 0, 1]]), atol=1e-5)
    for level, valid in zip(shown, said.memory_valid, strict=True):
        assert not (level * ~valid[:, None]).any()
    module, heard = detector.model.model.decoder.layers[-1].encoder_attn, []
    hook = module.attn.register_forward_hook(lambda _, args, __: heard.append(args))
    with torch.no_grad():
        detector(pixels, mask)
        hook.remove()
        values, shapes, shape_list, starts, locations, weights, step = heard[-1]
        cells = torch.zeros_like(values)
        inside = torch.cat([part.flatten(1) for part in said.memory_valid], 1)
        image, query = 0, 4
        flat = torch.cat([level[image, 1].flatten() for level in shown])
        for cell in flat.topk(3).indices.tolist():
            cells.zero_()[image, cell] = 1
            one = module.attn(cells, shapes, shape_list, starts, locations, weights, step)[image, query].mean()
            cells.zero_()[image, inside[image]] = 1
            all_ = module.attn(cells, shapes, shape_list, starts, locations, weights, step)[image, query].mean()
            assert float(flat[cell]) == pytest.approx(float(one / all_), abs=1e-5)


def test_several_texts_say_what_each_says_alone(short: Path) -> None:
    detector, pixels_mask = load_detector(short, words=DATA), padded_batch()
    texts = [chunk.text for chunk in detector.prompt.chunks]  # type: ignore[attr-defined]
    assert len(texts) > 1
    assert " ".join(texts) == "three . eight . nine ."
    with torch.no_grad():
        whole = detector(*pixels_mask)
        parts = []
        for chunk in detector.prompt.chunks:  # type: ignore[attr-defined]
            words = DATA[chunk.first : chunk.first + len(chunk.spans)]
            parts.append((chunk.first, len(words), load_detector(short, words=words)(*pixels_mask)))
    queries = parts[0][2].logits.shape[2]
    assert detector.num_queries == queries * len(texts)
    for number, (first, count, alone) in enumerate(parts):
        own = slice(number * queries, (number + 1) * queries)
        assert torch.equal(whole.logits[:, :, own, first : first + count], alone.logits)
        others = [slot for slot in range(len(DATA)) if not first <= slot < first + count]
        assert (whole.logits[:, :, own][..., others] == UNASKED_LOGIT).all()
        assert torch.equal(whole.boxes_cxcywh[:, :, own], alone.boxes_cxcywh)
        asked = torch.tensor([[1, -1], [0, 3]])
        moved = torch.where(asked < 0, -1, asked + number * queries)
        early = torch.where(asked < 0, -1, moved + detector.num_queries)  # of the layer before the last
        ways = ((whole.attend, moved, alone.attend, asked), (whole.attend_mean, moved, alone.attend_mean, asked))
        theirs = torch.where(asked < 0, -1, asked + queries)
        for ours, given, way, wanted in (*ways, (whole.attend_each, early, alone.attend_each, theirs)):
            assert ours is not None
            assert way is not None
            for mine, level in zip(ours(given), way(wanted), strict=True):
                assert torch.equal(mine, level)
    for level, memory in enumerate(whole.memory):
        assert torch.allclose(memory, torch.stack([alone.memory[level] for *_, alone in parts]).mean(0))


def test_the_text_model_is_asked_once_and_let_go_of_and_the_backbone_once_an_image(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = BertModel.forward, list[int]()

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BertModel, "forward", counted)
    detector = load_detector(short, words=DATA)
    seen = list[int]()
    backbone = detector.backbone.model
    backbone.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[operator]
    with torch.no_grad():
        detector(*padded_batch())  # the first one also looks how coarse its maps are
        seen.clear()
        detector(*padded_batch())
    assert len(calls) == len(detector.prompt.chunks) > 1  # type: ignore[attr-defined]
    assert len(seen) == 1  # for all texts
    assert not [name for name, _ in detector.named_parameters() if "text_backbone" in name]


def config_of(shards: str, teacher: Path, **fields: Any) -> Config:
    return build({"data": {"train": shards}, "teacher": {"path": str(teacher), **fields}})


def test_the_prompt_is_part_of_a_caches_identity(shards: str, folders: dict[str, Path], short: Path) -> None:
    folder, data = folders["grounding-dino"], load_manifest(shards)
    plain = cache_identity(config_of(shards, folder), data)
    assert plain["teacher.prompt"] == ["three . eight . nine ."]
    other = cache_identity(config_of(shards, folder, class_map={"nine": "bird of prey"}), data)
    assert other["teacher.prompt"] == ["three . eight . bird of prey ."]
    assert other["teacher.class_slots"] == plain["teacher.class_slots"] == [0, 1, 2]
    silent = cache_identity(config_of(shards, folder, class_map={"eight": None}), data)
    assert silent["teacher.prompt"] == ["three . nine ."]
    assert silent["teacher.class_slots"] == [0, -1, 1]
    assert len(cache_identity(config_of(shards, short), data)["teacher.prompt"]) > 1
    # Other numbers for the same words are another teacher.
    said = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    swapped = copied(folder, short.parent / "swapped")
    change(swapped, {"model": said["model"]}, "tokenizer.json")
    assert cache_identity(config_of(shards, swapped), data)["teacher.weights_sha256"] != plain["teacher.weights_sha256"]


@pytest.mark.parametrize("many", [False, True])
def test_cached_and_online_give_the_same_losses_of_features_and_predictions(
    shards: str, folders: dict[str, Path], short: Path, many: bool, tmp_path: Path
) -> None:
    folder = short if many else folders["mm-grounding-dino"]
    exact, path = {"precision": "float32"}, str(tmp_path / "cache")
    config = cache_config(shards, path, **exact)  # type: ignore[arg-type]
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"path": str(folder)})})
    teacher = make_teacher(config, load_manifest(shards).labels)
    assert teacher is not None
    online = losses(config, teacher, stream_of(shards, "", None))
    assert {"agfd", "lapd_class", "lapd_giou"} <= online[0].keys()
    assert all(np.isfinite(list(terms.values())).all() for terms in online)
    assert min(online[0]["agfd"], online[0]["lapd_class"]) > 0
    manifest = make_cache(config, teacher, teacher.resize)
    cached = losses(config, CachedTeacher(manifest.sizes), stream_of(shards, path, None))
    for mine, theirs in zip(cached, online, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_nothing_that_a_cache_keeps_is_infinite_in_half_precision(shards: str, short: Path) -> None:
    teacher = make_teacher(config_of(shards, short, class_map={"eight": None}), load_manifest(shards).labels)
    assert teacher is not None
    images = torch.randint(0, 256, (2, 64, 64, 3)).to(torch.uint8)
    record = teacher(images, torch.tensor([[64, 64], [64, 40]]), TeacherNeeds(memory=True, attention=True))
    (row, _) = encode(record, [1, 2], "int8")
    assert row.logits.dtype == np.float16
    assert np.isfinite(row.logits).all()
    assert record.silent.tolist() == [False, True, False]  # not what other texts name


def test_label_evaluate_predict_and_doctor_take_it(shards: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder, photos = folders["grounding-dino"], tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)).save(photos / "a.png")
    run = CliRunner()

    def said(*words: str) -> str:
        done = run.invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output

    out = tmp_path / "like.json"
    said("label", str(folder), str(photos), str(out), "--like", shards, "--threshold", "0", "--workers", "0")
    labels = json.loads(out.read_text())
    assert [one["name"] for one in labels["categories"]] == list(DATA)
    assert [one["id"] for one in labels["categories"]] == [3, 8, 9]
    assert labels["annotations"]
    named = tmp_path / "named.json"
    asked = ("--classes", "cat, bird of prey", "--threshold", "0", "--workers", "0")
    said("label", str(folder), str(photos), str(named), *asked)
    assert [one["name"] for one in json.loads(named.read_text())["categories"]] == ["cat", "bird of prey"]
    report = qskd.evaluate(folder, shards, workers=0)
    assert set(METRICS) <= report.metrics.keys()
    drawn = tmp_path / "drawn.png"
    said("predict", str(folder), str(photos / "a.png"), "--classes", "cat,dog", "--out", str(drawn), "--threshold", "0")
    assert drawn.is_file()
    (one,) = qskd.predict(folder, photos / "a.png", classes=("owl",), threshold=0.0)
    assert set(one.labels) == {"owl"}
    detector = load_detector(folder, words=CLASSES)
    (row,), _ = figures({"teacher": (detector, {})}, {"teacher": ResizeConfig(size=64)}, recipe())
    assert row.parameters == sum(each.numel() for each in detector.parameters())
    assert row.ms is not None
    checks = {check.name: check for check in model_checks(str(folder))}
    assert checks["family"].found.startswith("Grounding DINO (grounding-dino) on swin")
    assert "asked in words" in checks["classes"].found
    assert checks["as a teacher"].status == "ok", checks["as a teacher"]
    assert checks["as a student"].found == "no: it can only teach"


def test_categories_of_what_was_asked_for_are_said_to_be_numbered_as_asked(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    out = tmp_path / "out"
    list(predict_all(request(str(folders["grounding-dino"]), [tmp_path / "a.png"], out, 0.0, classes=("cat", "dog"))))
    assert {one["category_id"] for one in json.loads((out / "detections.json").read_text())} <= {0, 1}
    assert "category_id is the number of the class in --classes, from 0" in caplog.text
    assert "config.json" not in caplog.text


def test_another_prompt_is_another_labelling(folders: dict[str, Path], tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out.json"
    photos.mkdir()
    Image.new("RGB", (64, 64), "red").save(photos / "a.png")
    qskd.label(folders["grounding-dino"], photos, out, classes=("cat",))
    with pytest.raises(QskdError, match="labels of another run"):
        qskd.label(folders["grounding-dino"], photos, out, classes=("dog",))


def test_a_student_is_refused_by_name(shards: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["grounding-dino"]
    with pytest.raises(QskdError, match="Grounding DINO can only teach"):
        recipe({"family": "grounding-dino"})
    with pytest.raises(QskdError, match=r"student\.init.*Grounding DINO, which can only teach"):
        queries_of(recipe({"init": str(folder)}).student)
    with pytest.raises(QskdError, match=r"student\.inherit.*of which no part fits"):
        start_student(recipe({"inherit": True}, teacher={"path": str(folder)}), DATA)
    model = hf.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    with pytest.raises(QskdError, match="Grounding DINO, which can only teach"):
        qskd.Distiller(model, folder, None)
    with pytest.raises(QskdError, match="Grounding DINO, which can only teach"):
        qskd.export(folder, tmp_path / "out")
    with pytest.raises(QskdError, match="decoder can't be asked"):
        check_decoder(recipe(distillation={"method": "kd-detr"}, teacher={"path": str(folder)}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "asked for nothing"),
        (("cat", "CAT"), "both asked as 'cat'"),
        (("cat", "日本"), "which its text model can't read"),
        (("cat", "?!."), "which its text model can't read"),
        (("a" * 60,), "60 tokens"),
    ],
)
def test_what_cannot_be_asked_for_is_named(folders: dict[str, Path], words: tuple[str, ...], said: str) -> None:
    with pytest.raises(QskdError, match=said):
        load_detector(folders["grounding-dino"], words=words)


def test_a_tokenizer_that_is_missing_or_anothers_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["grounding-dino"], tmp_path / "copy")
    said = json.loads((folder / "tokenizer.json").read_text())
    said["model"]["vocab"]["."] = 7
    (folder / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(QskdError, match="other numbers than in BERT's vocabulary"):
        load_detector(folder, words=("cat",))
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(QskdError, match="cannot be loaded"):
        load_detector(folder, words=("cat",))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(QskdError, match=r"no tokenizer\.json"):
        load_detector(folder, words=("cat",))


def test_images_with_fewer_cells_than_queries_are_refused(folders: dict[str, Path]) -> None:
    detector = load_detector(folders["grounding-dino"], words=("cat",))
    with pytest.raises(QskdError, match="give 4 cells to choose 7 queries from"):
        detector(torch.zeros(1, 3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool))


def test_classes_are_for_detectors_that_have_none(tmp_path: Path) -> None:
    folder = make("conditional_detr", tmp_path / "own")
    with pytest.raises(QskdError, match="which has classes of its own"):
        qskd.predict(folder, np.zeros((64, 64, 3), np.uint8), classes=("cat",))


@pytest.mark.parametrize("kind", ["GroundingDino", "MMGroundingDino"])
def test_the_published_sizes_are_taken_whole_and_other_text_models_refused(kind: str) -> None:
    """transformers' defaults are the published tiny's: Swin-T, BERT base, 900 queries."""
    said = json.loads(getattr(hf, f"{kind}Config")().to_json_string(use_diff=False))
    clean = json.loads(detector_config(said, "config.json").to_json_string(use_diff=False))
    own = ("d_model", "num_queries", "encoder_layers", "max_text_len", "num_feature_levels", "two_stage")
    assert {name: clean[name] for name in own} == {name: said[name] for name in own}
    for part in ("backbone_config", "text_config"):
        sizes = {name: value for name, value in said[part].items() if isinstance(value, int | list)}
        assert {name: clean[part][name] for name in sizes} == sizes
    for field in ("auto_map", "custom_pipelines", "_name_or_path", "use_kernels"):
        odd = {**said, "text_config": {**said["text_config"], field: {"AutoModel": "org/repo--code.Model"}}}
        assert not hasattr(detector_config(odd, "config.json").text_config, field) or field == "_name_or_path"
    for field in ("quantization_config", "attn_implementation"):
        odd = {**said, "text_config": {**said["text_config"], field: "org/kernel"}}
        with pytest.raises(QskdError, match=field):
            detector_config(odd, "config.json")
    with pytest.raises(QskdError, match=r"text_config: model_type 'roberta'"):
        detector_config({**said, "text_config": {"model_type": "roberta"}}, "config.json")


def test_words_are_the_class_maps_where_it_has_any() -> None:
    assert words_for(("a", "b", "c", "d"), {"a": "b", "c": None}) == ("b", "d")


def test_a_cache_of_another_prompt_is_refused_with_both(shards: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(shards, folders["grounding-dino"], cache={"path": str(tmp_path / "cache")})
    teacher, data = make_teacher(config, load_manifest(shards).labels), load_manifest(shards)
    assert teacher is not None
    make_cache(config, teacher, teacher.resize)
    changed = config_of(
        shards, folders["grounding-dino"], cache={"path": str(tmp_path / "cache")}, class_map={"nine": "owl"}
    )
    with pytest.raises(QskdError, match=r"teacher\.prompt.*owl"):
        check_cache(changed, data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_shared_weights_written_out_and_swins_tables_loads_the_same(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """As older versions of transformers wrote them."""
    folder = copied(folders[kind], tmp_path / "copy")
    model = hf.AutoModelForZeroShotObjectDetection.from_pretrained(folder)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    written = load_file(folder / "model.safetensors")
    assert len(state) > len(written)
    table = "model.backbone.conv_encoder.model.encoder.layers.0.blocks.0.attention.self.relative_position_index"
    save_file(state | {table: torch.zeros(16, 16, dtype=torch.int64)}, folder / "model.safetensors", {"format": "pt"})
    ours, theirs = (load_detector(each, words=CLASSES)(*padded_batch()) for each in (folder, folders[kind]))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.boxes_cxcywh, theirs.boxes_cxcywh)
