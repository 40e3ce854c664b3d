"""A distillation method is one file, found by name; several compose; the page that shows one is run."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import STUDENT, batch_of, make_training, random_teacher, recipe
from torch import Tensor

from pipelines.inspection import explain
from pipelines.run.folder import Folder
from pipelines.run.guards import check_same_run
from pipelines.run.ownership import is_ours
from qskd.checks import check_enough
from qskd.config import Config
from qskd.config.distillation import NoMethod
from qskd.config.recipe import build, flatten, load, replace_fields, to_tree, to_yaml
from qskd.deploy.model_card import method_titles, read_card, render
from qskd.distillation.find import FOLDERS, add_folder, located, method_names
from qskd.distillation.method import Facts, Method, build_method, teacher_needs
from qskd.errors import QskdError
from qskd.losses.matching import assign
from search_spaces import SearchSpace

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the method of docs/methods.md, as its reader would write it."""
    monkeypatch.delenv(FOLDERS, raising=False)
    monkeypatch.setenv(FOLDERS, "")  # restored afterwards
    code = re.findall(r"<!-- the test of this page runs it -->\n\n```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 45
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "boxes.py").write_text(code)
    add_folder(folder)
    return folder


def method_of(config: Config) -> Method:
    found = make_training(config, random_teacher()).module.method
    assert found is not None
    return found


def test_the_page_s_method_is_found_trained_and_says_what_a_loop_says(
    mine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "boxes" in method_names()
    config = recipe(None, distillation={"method": "boxes", "weight": 3.0})
    assert located("boxes") == str((mine / "boxes.py").resolve())
    teacher = random_teacher()
    training = make_training(config, teacher)
    assert [record.getMessage() for record in caplog.records if "is run" in record.getMessage()]
    batch = batch_of(2, 0, 1)
    record = training._ask_teacher(batch)
    assert record is not None
    terms = training.module(batch.images, batch.sizes, batch.targets, record)
    training.module.eval()
    output = training.student(*pixels(training, batch), with_attention=False)
    sides = [(output.logits, output.boxes_cxcywh), (record.logits, record.boxes_cxcywh)]
    ours, theirs = assign(sides, batch.targets, config.detection, [training.student.classification])
    total = torch.zeros(())
    for image, count in enumerate(batch.targets.counts):
        for slot in range(count):
            own = output.boxes_cxcywh[-1, image, ours[-1, image, slot]]
            goal = record.boxes_cxcywh[-1, image, theirs[-1, image, slot]]
            total = total + (own - goal).abs().sum()
    assert terms["boxes"].count == 3
    assert training.module.weights["boxes"] == 3.0
    for _ in range(3):
        values = training.train_step(batch)
        assert "boxes" in values
    training.check_finite()
    assert total > 0


def pixels(training: Any, batch: Any) -> tuple[Tensor, Tensor]:
    from qskd.detectors import to_pixels

    return to_pixels(batch.images, batch.sizes, training.student.mean, training.student.std)


def test_the_page_s_method_needs_of_a_cache_only_what_it_says_and_its_settings_travel(mine: Path) -> None:
    config = recipe(None, distillation={"method": "boxes", "weight": 3.0})
    check_enough(config)  # the smallest cache is enough
    needs = teacher_needs(config.distillation)
    assert needs is not None
    assert [needs.memory, needs.attention, needs.all_layers, needs.online] == [False] * 4
    assert pickle.loads(pickle.dumps(config)) == config
    assert build(to_tree(config)) == config
    assert "weight: 3.0" in to_yaml(config)
    with pytest.raises(QskdError, match=r"unknown field distillation.wieght \(did you mean weight\?\)"):
        recipe(None, distillation={"method": "boxes", "wieght": 3.0})
    space = SearchSpace(["loss_weights"], config)
    assert "distillation.weight" in space.fields
    assert "loss_weights.boxes" in space.ranges
    assert method_titles(config.distillation) == (("matched boxes", ""),)


def test_a_method_is_found_by_the_path_of_its_file_and_by_a_dotted_name(
    mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDERS, "")
    config = recipe(None, distillation={"method": str(mine / "boxes.py")})
    assert type(method_of(config)).__name__ == "Boxes"
    monkeypatch.syspath_prepend(str(mine))
    assert (
        type(method_of(recipe(None, distillation={"method": "boxes_of_mine.it"}))).__name__ == "Boxes"
        if (package(mine))
        else True
    )


def package(mine: Path) -> bool:
    (mine / "boxes_of_mine").mkdir()
    (mine / "boxes_of_mine" / "__init__.py").write_text("")
    (mine / "boxes_of_mine" / "it.py").write_text((mine / "boxes.py").read_text())
    return True


@pytest.mark.parametrize(
    ("distillation", "words"),
    [
        ({"method": "qsdk"}, "no such method (did you mean qskd?)"),
        ({"method": "/nowhere/it.py"}, "no such file"),
        ({"method": "no.such.module"}, "cannot be imported: ModuleNotFoundError"),
        ({"method": "qskd.boxes"}, "no class Settings(MethodSettings)"),
        ({"also": {"mimic": {"wieght": 1}}}, "unknown field distillation.also.mimic.wieght (did you mean weight?)"),
        ({"also": {"mimic": {"also": {"mimic": {}}}}}, "`also` of its own"),
        ({"also": {"a-b": {"method": "mimic"}}}, "letters, digits and underscores"),
        ({"method": "none", "also": {"mimic": {}}}, "stands alone"),
    ],
)
def test_what_names_no_method_is_refused_by_name(distillation: dict[str, Any], words: str) -> None:
    with pytest.raises(QskdError) as caught:
        build({"distillation": distillation})
    assert words in str(caught.value)


def test_a_file_that_is_no_method_or_raises_is_refused_by_name(tmp_path: Path) -> None:
    settings = "from qskd.config.distillation import MethodSettings\nclass Settings(MethodSettings):\n    pass\n"
    for text, words in {
        "x = 1": "no class Settings",
        "1 / 0": "ZeroDivisionError",
        settings: "defines 0 methods",
    }.items():
        path = tmp_path / f"{words.replace(' ', '_')}.py"
        path.write_text(text)
        with pytest.raises(QskdError) as caught:
            method_of(recipe(None, distillation={"method": str(path)}))
        assert words in str(caught.value)


def test_several_methods_sum_their_terms_each_with_its_own_weight_and_fading() -> None:
    alone = {"selection": {"boundaries": [-0.9], "band_weights": [0.0, 1.0]}, "decay": 0.0}
    also = {"mimic": {"weight": 7.0, "decay": 1.0}, "second": {"method": "mimic", "weight": 2.0, "decay": 0.0}}
    batch, teacher = batch_of(2, 1), random_teacher()
    found: dict[str, dict[str, Tensor]] = {}
    for name, tree in {"qskd": alone, "mimic": {"method": "mimic"}, "both": alone | {"also": also}}.items():
        training = make_training(recipe(None, distillation=tree), teacher)
        record = training._ask_teacher(batch)
        terms = training.module(batch.images, batch.sizes, batch.targets, record)
        found[name] = {term: value.total.detach() for term, value in terms.items()}
        if name == "both":
            weights = [training.module.weights_at(step, 10) for step in (0, 9)]
    assert found["both"].keys() == found["qskd"].keys() | {"mimic", "second_mimic"}
    for term in ("lapd_class", "lapd_l1", "lapd_giou", "class_0"):
        assert torch.equal(
            found["both"][term], found["qskd"][term]
        )  # projectors are drawn in another order, memory waits
    assert weights[0]["agfd"] == weights[1]["agfd"] == 50.0
    assert (weights[0]["mimic"], weights[1]["mimic"]) == (7.0, pytest.approx(0.7))
    assert weights[0]["second_mimic"] == weights[1]["second_mimic"] == 2.0


def test_terms_and_needs_of_a_recipe_with_several_are_searched_and_refused_each_by_its_own_path() -> None:
    tree = {"also": {"mimic": {"weight": 7.0}, "low": {"method": "qskd", "selection": {"boundaries": [0.1]}}}}
    config = build({"distillation": tree, "teacher": {"cache": {"attention_giou_floor": 0.3}}})
    space = SearchSpace(["loss_weights"], build({"distillation": {"also": {"mimic": {"weight": 7.0}}}}))
    assert {"distillation.features.weight", "distillation.also.mimic.weight"} <= space.fields.keys()
    assert {"loss_weights.agfd", "loss_weights.mimic_mimic", "loss_weights.mimic_decay"} <= space.ranges.keys()
    assert any("distillation.also.mimic.weight" in overrides for overrides in space.samples(4))
    with pytest.raises(QskdError, match=r"distillation\.also\.low\.selection: boundaries that reach down to GIoU 0\.1"):
        check_enough(config)


def test_fields_of_a_part_can_be_set_and_come_back() -> None:
    config = build({"distillation": {"also": {"mimic": {"weight": 7.0}}}})
    assert flatten(to_tree(config))["distillation.also.mimic.weight"] == 7.0
    again = replace_fields(config, {"distillation.also.mimic.weight": 2.0}, "test")
    assert again.distillation.also["mimic"].weight == 2.0  # type: ignore[attr-defined]


def test_mimic_is_the_mean_squared_error_over_valid_cells() -> None:
    teacher = random_teacher("conditional")
    training = make_training(recipe({**STUDENT, "width": 64}, distillation={"method": "mimic"}), teacher)
    batch = batch_of(1, 2)
    record = training._ask_teacher(batch)
    assert record is not None
    training.module.eval()
    terms = training.module(batch.images, batch.sizes, batch.targets, record)
    output = training.student(*pixels(training, batch), with_attention=False)
    expected = torch.zeros(())
    for image in range(2):  # projectors begin as the identity: the widths agree
        expected = expected + (output.memory[0][image] - record.memory[0][image]).square().mean(0).sum()
    torch.testing.assert_close(terms["mimic"].total, expected, rtol=1e-4, atol=1e-5)
    assert terms["mimic"].count == output.memory_valid[0].sum()


def test_a_method_that_asks_the_teacher_itself_gets_it_and_no_cache(tmp_path: Path) -> None:
    path = tmp_path / "asker.py"
    path.write_text(
        "import torch\n"
        "from qskd.config.distillation import MethodSettings\n"
        "from qskd.distillation.method import Method\n"
        "from qskd.structures import LossTerm, TeacherNeeds\n"
        "class Settings(MethodSettings):\n    pass\n"
        "class Asker(Method):\n"
        "    def __init__(self, settings, student, teacher):\n"
        "        super().__init__(settings, student, teacher)\n"
        "        self.weights['asked'] = 1.0\n"
        "    @classmethod\n"
        "    def needs_of(cls, settings):\n        return TeacherNeeds(online=True)\n"
        "    def forward(self, lesson):\n"
        "        said = lesson.online.ask(TeacherNeeds(all_layers=True))\n"
        "        assert len(said.logits) == 3\n"
        "        return {'asked': LossTerm(lesson.student.logits.float().mean() * 0, torch.ones(()))}\n"
    )
    config = recipe(None, distillation={"method": str(path)})
    assert "asked" in make_training(config, random_teacher()).train_step(batch_of(1))
    with pytest.raises(QskdError, match="asks the teacher itself"):
        check_enough(config)


def test_no_method_takes_a_recipe_of_any_and_none_of_its_settings() -> None:
    config = build({"distillation": {"method": "none", "selection": {"boundaries": [0.3]}, "weight": 2}})
    assert isinstance(config.distillation, NoMethod)
    facts = Facts((8,))
    assert build_method(config.distillation, facts, facts) is None
    assert replace(facts, layers=2).layers == 2


def test_another_method_by_set_leaves_out_what_the_recipe_says_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("distillation: {decay: 0.2, features: {background: 0.1}, also: {mimic: {weight: 2.0}}}")
    for name in ("cwd", "pkd", "mgd", "mimic"):
        told = load(path, [f"distillation.method={name}"]).distillation
        assert (told.method, told.decay, told.also["mimic"].weight) == (name, 0.2, 2.0)  # type: ignore[attr-defined]
        assert f"distillation.method={name}: what the recipe says of qskd's is left out: features" in caplog.text
    caplog.clear()
    other: Any = load(path, ["distillation.method=qskd-tprd"]).distillation  # another reading of the same: it has them
    assert (other.features.background, other.features.query_weight) == (0.1, "giou")
    assert not caplog.records
    with pytest.raises(QskdError, match=r"unknown field distillation\.features"):
        load(path, ["distillation.method=cwd", "distillation.features.weight=1"])
    path.write_text("distillation: {method: mimic, weight: 7.0}")
    assert load(path, ["distillation.method=cwd"]).distillation.weight == 1.0  # type: ignore[attr-defined]


def test_a_folder_of_others_runs_no_method_of_theirs(tmp_path: Path) -> None:
    trap, flag = tmp_path / "trap.py", tmp_path / "it_ran"
    trap.write_text(f"open({str(flag)!r}, 'w').close()\n")
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    told = to_tree(load(None, ["name=run"]))
    for section in ({"method": str(trap)}, {"method": "qskd", "also": {"second": {"method": str(trap)}}}):
        (run / "config.yaml").write_text(yaml.safe_dump({**told, "distillation": section}))
        recipe = yaml.safe_dump({"distillation": section})
        rows = [{"name": "this model", "metrics": {}}]
        facts = {"name": "a", "family": "detr", "classes": 3, "rows": rows, "kind": "distill", "recipe": recipe}
        (run / "qskd.json").write_text(json.dumps({"card": facts}))
        card = read_card(run)
        assert card
        render(card)
        folder = Folder(load(None, ["name=run", f"output={tmp_path}/runs"]))
        assert not is_ours(folder)
        with pytest.raises(QskdError, match=r"trap\.py"):
            explain.read_source(str(run), ())
    assert not flag.exists()


def test_a_run_that_an_earlier_qskd_began_without_a_method_is_gone_on_with(tmp_path: Path) -> None:
    folder = Folder(load(None, ["name=run", f"output={tmp_path}/runs"]))
    now = load(None, ["name=run", f"output={tmp_path}/runs", "distillation.method=none"])
    sections = {"method": "none", "selection": {"group_boundaries": [0.3, 0.7]}, "features": {}, "predictions": {}}
    before = {**to_tree(now), "distillation": {**sections, "decay": "none"}}
    folder.write_record("config.yaml", yaml.safe_dump(before))
    check_same_run(folder, now)
    with pytest.raises(QskdError, match=r"distillation\.method was 'none', is 'qskd'"):
        check_same_run(folder, load(None, ["name=run", f"output={tmp_path}/runs"]))
