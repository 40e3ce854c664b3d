"""docs/recipe.md says what the configuration is now, and the recipes in configs/ are recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qskd.config import Config, DataConfig, MethodSettings, TrainingConfig
from qskd.config.recipe import flatten, load, to_tree
from qskd.config.reference import RECIPE, comments_of, reference, renewed, sections_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_the_page_is_what_the_generator_says_today() -> None:
    now = renewed(PAGE, (ROOT / RECIPE).read_text(encoding="utf-8"))
    assert now == PAGE, "renew it: python -m qskd.config.reference docs/recipe.md"


def test_every_field_has_a_row_and_every_row_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    for path, section in sections_of(Config):
        assert section.__doc__, path
        for name in section.model_fields:
            mine = [row for row in rows if row.startswith(f"| `{name}` |")]
            inner = any(other == f"{path}.{name}".lstrip(".") for other, _ in sections_of(Config))
            assert mine or inner or name in MethodSettings.model_fields, f"{path}.{name}"
    assert not [row for row in rows if row.endswith("|  |")], "a field without a comment"
    assert {path for path, _ in sections_of(Config)} >= {"", "data.views", "student.backbone", "teacher.resize"}
    assert len(rows) >= len(flatten(to_tree(Config()))) - 10  # resize, twice in a recipe, has one table


def test_a_comment_is_found_behind_a_field_above_it_and_inside_brackets() -> None:
    assert comments_of(TrainingConfig)["batch_size"] == "over all workers"
    assert comments_of(TrainingConfig)["max_steps"].startswith("end after so many steps")  # ( ... # comment ... )
    assert comments_of(Config)["name"].startswith("Of the run, which is OUTPUT/NAME")  # above
    assert comments_of(DataConfig)["views"] == ""


def test_every_environment_variable_of_ours_is_in_the_page() -> None:
    code = "".join(path.read_text() for room in ("qskd", "pipelines") for path in sorted((ROOT / room).rglob("*.py")))
    ours = set(re.findall(r"\bQSKD_[A-Z_]+\b", code))
    assert ours
    assert ours == set(re.findall(r"^\| `(QSKD_[A-Z_]+)` \|", PAGE, re.MULTILINE))


def test_types_and_defaults_are_in_a_readers_words() -> None:
    text = reference()
    assert "| `batch_size` | whole number ≥ 1 | `16` |" in text
    assert "| `learning_rate` | number > 0 | `0.0001` |" in text
    assert "| `boundaries` | list: above -1 to 1 | `[0.5]` |" in text
    assert "| `max_failures` | whole number ≥ -1 | `3` |" in text
    assert "| `mode` | `square`, `shortest_edge` | `square` |" in text
    assert r"\|p_t - p_s\|^gamma" in text  # a bar would end the cell


@pytest.mark.parametrize("page", ["no marks", "<!-- qskd.config.reference: recipe --> no end"])
def test_a_page_without_marks_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="no <!-- qskd"):
        renewed(page, "")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_read_and_opens_with_command_cost_and_expected_result(path: Path) -> None:
    assert load(path).name
    opening = path.read_text(encoding="utf-8").partition("\nname:")[0].lower()
    assert all(line.startswith("#") for line in opening.splitlines())
    for word in ("cost:", "expected:"):
        assert word in opening, word
    assert "qskd " in opening or "python -m" in opening


def test_the_recipe_for_a_fine_tuned_teacher_is_resolved_as_it_says() -> None:
    student = load(ROOT / RECIPE).student
    assert (student.encoder_layers, student.decoder_layers, student.queries, student.feature_levels) == (1, 3, 200, 3)
    assert (student.width, student.heads, student.ffn_width) == (256, 8, 1024)
    assert student.backbone.hidden_sizes == (64, 128, 256, 512)
    assert student.resize.size % student.backbone.unit == 0
