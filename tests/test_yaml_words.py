"""Words that YAML takes for something else than text: every key and every text of a recipe says so, and what to write."""

from __future__ import annotations

from pathlib import Path

import pytest

from qskd.config.recipe import build, load
from qskd.errors import QskdError

ODD = ["no", "yes", "on", "off", "True", "null", "~", "1", "010", "0x1f", "1:30", "1.5", ".inf", "2024-01-31"]
PLAIN = ["1e3", "y", "none", "'no'", '"1"', "0o17", "norway"]  # text in YAML 1.1, as it looks


def told(text: str, folder: Path, *overrides: str) -> str:
    (folder / "r.yaml").write_text(text)
    with pytest.raises(QskdError) as caught:
        load(folder / "r.yaml", overrides)
    return str(caught.value)


@pytest.mark.parametrize("word", ODD)
def test_a_key_that_is_no_text_is_named_with_its_line_and_the_quotes_it_needs(word: str, tmp_path: Path) -> None:
    for text, path in [
        (f"name: a\nteacher:\n  class_map:\n    {word}: circle\n", "teacher.class_map"),
        (f"name: a\n\n\n{word}: {{}}\n", "the whole"),
        (f"\n\ndistillation:\n  also: {{{word}: {{}}}}\n", "distillation.also"),
    ]:
        said = told(text, tmp_path)
        assert f"{path} has the key {word} (line 4), which YAML takes for" in said
        assert f'write it in quotes: "{word}"' in said
    said = told("name: a", tmp_path, f"teacher.class_map={{{word}: circle}}")
    assert said.startswith(f"--set teacher.class_map={{{word}: circle}}: ")
    assert f'write it in quotes: "{word}"' in said
    assert load(None, [f'teacher.class_map={{"{word}": circle}}']).teacher.class_map == {word: "circle"}


@pytest.mark.parametrize("word", PLAIN)
def test_what_yaml_reads_as_text_is_text(word: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"teacher: {{class_map: {{{word}: {word}}}}}")
    assert load(tmp_path / "r.yaml").teacher.class_map == {word.strip("'\""): word.strip("'\"")}


@pytest.mark.parametrize("word", [word for word in ODD if word not in ("null", "~")])
@pytest.mark.parametrize("field", ["name", "teacher.class_map.cat", "tracking.experiment", "data.train"])
def test_a_text_that_yaml_takes_for_something_else_is_to_be_quoted(field: str, word: str, tmp_path: Path) -> None:
    said = told("seed: 1", tmp_path, f"{field}={word}")
    assert f"{field} = " in said
    assert "unless it is quoted" in said
    assert f"--set '{field}=\"...\"'" in said
    config = load(None, [f'teacher.class_map.cat="{word}"'])
    assert config.teacher.class_map == {"cat": word}


def test_an_empty_field_and_a_python_key_are_told_too(tmp_path: Path) -> None:
    assert "data.train = None" in (said := told("data:\n  train:\n", tmp_path))
    assert 'train: "..."' in said
    with pytest.raises(QskdError, match="write the key in quotes: '1'"):
        build({"teacher": {"class_map": {1: "a"}}})


def test_merge_keys_and_aliases_still_work(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("training: &a {epochs: 3}\ndetection: {<<: {class_cost: 4.0}}\n")
    config = load(tmp_path / "r.yaml")
    assert (config.training.epochs, config.detection.class_cost) == (3, 4.0)
