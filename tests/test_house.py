"""The walls of the house: who imports whom, what is light, how many files a room has; a method is one file."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pipelines.cli import DOORS

ROOT = Path(__file__).parents[1]
HOUSE = ("qskd", "pipelines", "search_spaces")
MOST_FILES = 13  # in a folder, its __init__ included
ONE_EACH = {"pipelines", "qskd/distillation", "qskd/families"}  # doors, one a verb; methods and families, one a file
RAY = {"ray", "mlflow"}


def modules() -> dict[str, Path]:
    found = {}
    for path in (path for folder in HOUSE for path in (ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """All that a file imports, wherever in it, but for what only a type checker reads."""
    tree = ast.parse(path.read_text())
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module -> all that it imports."""
    return {name: imports(path) for name, path in modules().items()}


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    left = [start]
    while left:
        for name in graph[left.pop()] & graph.keys() - seen:
            seen.add(name)
            left.append(name)
    return seen


# In a function, so that configurations stay free of torch: methods' settings are subclasses of what configurations are made of.
KNOT = {("qskd.config.distillation", "qskd.distillation.find")}


def test_no_file_imports_another_in_a_circle(graph: dict[str, set[str]]) -> None:
    apart = {name: {used for used in uses if (name, used) not in KNOT} for name, uses in graph.items()}
    assert [name for name in apart if name in reached(apart, name)] == []


def test_the_library_knows_neither_ray_nor_mlflow_nor_the_programs(graph: dict[str, set[str]]) -> None:
    for name, uses in graph.items():
        packages = {used.partition(".")[0] for used in uses}
        if not name.startswith("pipelines"):
            assert not packages & (RAY | {"pipelines"}), name
        if name.startswith("qskd"):
            assert "search_spaces" not in packages, name


def test_one_file_of_the_library_reaches_the_programs_by_name() -> None:
    """`import qskd` offers the verbs. What an import statement can't hide, `importlib` could: it stands in one file."""
    naming = [
        name
        for name, path in modules().items()
        if name.startswith("qskd")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and re.fullmatch(r"pipelines[\w.]*", node.value)
    ]
    assert set(naming) == {"qskd.verbs"}


def test_datasets_and_losses_know_no_teacher_and_nobody_imports_the_command_line(graph: dict[str, set[str]]) -> None:
    for name in graph:
        below = reached(graph, name)
        if name.startswith(("qskd.datasets", "qskd.config", "qskd.storage", "qskd.families", "qskd.losses")):
            assert not [used for used in below if used.startswith(("qskd.teacher", "qskd.training"))], name
        assert "pipelines.cli" not in graph[name], name


def test_a_room_has_about_a_dozen_files_and_a_file_about_three_hundred_lines() -> None:
    paths = modules().values()
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in paths)
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES and folder not in ONE_EACH} == {}
    assert {path.stem for path in (ROOT / "pipelines").glob("*.py")} == {
        "__init__", "api", "cli", "command", *(door.__name__.rpartition(".")[2] for door in DOORS.values())
    }  # fmt: skip
    assert {str(path): lines for path in paths if (lines := len(path.read_text().splitlines())) > 345} == {}


def test_every_section_and_page_that_is_cited_is_there() -> None:
    sections = set(re.findall(r"^##+ (\d[\d.]*?)\.? ", (ROOT / "docs/equations.md").read_text(), re.MULTILINE))
    assert sections > {"1", "1.3", "5"}
    for path in modules().values():
        text = path.read_text()
        assert set(re.findall(r"\bequations\.md (\d(?:\.\d)?)", text)) <= sections, path
        assert "METHODS2" not in text, path  # a page of before
        for page in re.findall(r"\bdocs/(\w+\.md)", text):
            assert (ROOT / "docs" / page).is_file(), (path, page)


def test_every_folder_is_a_package() -> None:
    """`packages.find` finds packages alone: an installed copy would lose a folder without an __init__.py."""
    folders = {path.parent for folder in HOUSE for path in (ROOT / folder).rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


LIGHT = ("qskd.config.recipe", "qskd.datasets.loader", "qskd.teacher.cache", "pipelines.feed.stream")


@pytest.fixture(scope="module")
def light() -> dict[str, dict[str, object]]:
    """What processes that import these, and the command line's help, have loaded."""
    code = "import sys, json; __import__(sys.argv[1]); print(json.dumps([m for m in ('torch', 'ray') if m in sys.modules]))"
    found: dict[str, dict[str, object]] = {}
    for name in (*LIGHT, "pipelines.cli"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True, cwd=ROOT)
        found[name] = {"loaded": json.loads(done.stdout)}
    return found


@pytest.mark.parametrize("name", LIGHT)
def test_what_is_light_stays_free_of_torch(light: dict[str, dict[str, list[str]]], name: str) -> None:
    assert "torch" not in light[name]["loaded"]


def test_help_needs_neither_torch_nor_ray(light: dict[str, dict[str, list[str]]]) -> None:
    assert light["pipelines.cli"]["loaded"] == []


@pytest.mark.parametrize("verb", DOORS)
def test_a_door_alone_says_what_the_command_says(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli import main
    from pipelines.command import run

    said = []
    for ask in (lambda: main([verb, "--help"]), lambda: run(DOORS[verb].command, verb, ["--help"])):
        with pytest.raises(SystemExit) as ended:
            ask()
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert f"qskd {verb}" in said[0]
    text = Path(DOORS[verb].__file__ or "").read_text()
    assert f'run(command, "{verb}")' in text


def test_the_tree_in_the_readme_has_every_room() -> None:
    tree = re.findall(r"^## Where things are\n\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.S | re.M)[0]
    rooms = {path.parent.name for path in modules().values()} - {"pipelines", "qskd", "search_spaces", "shapes_teacher"}
    assert [room for room in rooms if f"{room}/" not in tree] == []
