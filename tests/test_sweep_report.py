"""What a sweep shows: the order of its trials, the front, importance, and a report that never fails."""

from __future__ import annotations

import csv
import html.parser
import io
import itertools
import json
import math
import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.tuning.report import pictures as sweep_pictures
from pipelines.tuning.report import plots as sweep_plots
from pipelines.tuning.report.axes import Axis, importances, make_axis
from pipelines.tuning.report.parallel import plot_parallel
from pipelines.tuning.report.report import GENERATOR, PICTURES, write_report
from pipelines.tuning.report.results import SweepSummary, best_row, has_ap, pareto_front, ranked, short_names
from pipelines.tuning.report.style import RECIPE_COLOUR
from pipelines.tuning.report.tables import IN_FLOAT, terminal_table
from pipelines.tuning.trial.row import TrialRow
from qskd.config import Config
from qskd.config.recipe import build, flatten, to_tree, to_yaml
from search_spaces import RandomTrial, SearchSpace

RECIPE = build({"student": {"queries": 30, "resize": {"size": 64}}, "training": {"epochs": 27}})
SPACES = ("student_architecture", "query_selection", "loss_weights", "quantization")


def sweep_rows(trials: int, spaces: Sequence[str] = SPACES, seed: int = 0) -> list[TrialRow]:
    """As ASHA leaves them: most stopped early, some failed, the recipe first."""
    space, draw, rows = SearchSpace(spaces, RECIPE), random.Random(seed), []
    for number in range(trials):
        trial = RandomTrial(1000 * seed + number)
        overrides = space(trial)["overrides"] if number else {}
        student = space.config(overrides).student
        size = 1e-5 * student.width**1.5 * (student.encoder_layers + student.decoder_layers)
        state = "finished" if number == 0 else draw.choice(("finished", "stopped", "stopped", "failed"))
        epochs = {"finished": 27, "stopped": draw.choice((3, 9)), "failed": draw.choice((0, 2))}[state]
        top = 0.2 + 0.05 * math.log(size + 1) + draw.gauss(0, 0.02)
        curve = tuple((float(epoch), top * (1 - math.exp(-epoch / 6))) for epoch in range(1, epochs + 1))
        row = TrialRow(number, state, trial.answers if number else space.recipe_point, overrides, curve)  # type: ignore[arg-type]
        measured = {
            "metrics": {"AP": row.best_ap, "AP50": 1.6 * row.best_ap},
            "latency_ms": 3 + size,
            "parameters_m": size,
            "size_mb": size * (student.quantization.weight_bits if student.quantization else 32) / 8,
        }
        rows.append(replace(row, **measured if curve else {}, reason="out of memory" if state == "failed" else ""))  # type: ignore[arg-type]
    return rows


def row(number: int, ap: float = -1.0, **others: Any) -> TrialRow:
    curve = ((1.0, ap / 2), (2.0, ap)) if ap >= 0 else ()
    return TrialRow(number, **{"state": "finished", "curve": curve, **others})


def boundary_rows(*each: list[float]) -> list[TrialRow]:
    key = "distillation.selection.boundaries"
    return [row(i, 0.1 * i, overrides={key: at}) for i, at in enumerate(each, start=1)]


# --- what the trials say --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_trial_beats(seed: int) -> None:
    draw = np.random.default_rng(seed)
    costs, values = draw.integers(1, 12, 40) / 4, draw.integers(0, 12, 40) / 40  # with ties and twins
    front = pareto_front(costs.tolist(), values.tolist())
    beaten = [
        any(
            costs[j] <= costs[i] and values[j] >= values[i] and (costs[j] < costs[i] or values[j] > values[i])
            for j in range(40)
        )
        for i in range(40)
    ]
    assert sorted(front) == [i for i in range(40) if not beaten[i]]
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)
    assert pareto_front([], []) == []


def test_a_parameter_that_decides_alone_gets_the_most_importance() -> None:
    draw = random.Random(0)
    values: dict[str, list[Any]] = {
        "s.noise": [draw.random() for _ in range(30)],
        "s.decides": [10 ** draw.uniform(-3, 1) for _ in range(30)],
        "s.layers": [draw.choice(("all", "last", True)) for _ in range(30)],
        "s.heads": [draw.choice((2, 4, 8)) for _ in range(30)],
        "s.sometimes": [draw.random() if i % 3 else None for i in range(30)],
        "s.constant": [7] * 30,
    }
    aps = [0.2 + 0.05 * math.log10(at) + 0.002 * draw.gauss(0, 1) for at in values["s.decides"]]
    axes = [axis for name, each in values.items() if (axis := make_axis(name, name, each))]
    assert {axis.name for axis in axes} == set(values) - {"s.constant"}
    found = importances(axes, aps)
    assert next(iter(found)) == "s.decides"
    assert found["s.decides"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert importances(axes, aps) == found  # the forest has a seed

    switch = [0.3 if word == "last" else 0.2 for word in values["s.layers"]]
    assert next(iter(importances(axes, switch))) == "s.layers"
    assert importances(axes, [0.2] * 30) == {}
    assert importances([make_axis("a", "a", [1, 2, 3]) or axes[0]], [0.1, 0.2, 0.3]) == {}  # too few


def test_the_best_trial_is_the_smaller_of_equals_then_the_earlier_and_within_the_limit() -> None:
    rows = [
        row(0, 0.30, parameters_m=1.0),
        row(1, 0.40, parameters_m=2.0),
        row(2, 0.40, parameters_m=1.5),
        row(3, 0.40, parameters_m=1.5),
        row(4, 0.40),
        row(5, 0.90, parameters_m=0.1, state="failed"),
    ]
    for order in itertools.permutations(rows):
        assert best_row(order) is rows[2]
        assert best_row(order, 1.49) is rows[0]
    assert best_row(rows, 1.5) is rows[2]
    assert best_row(rows, 0.5) is None
    assert best_row([row(0), row(1, 0.2, state="failed")]) is None


def test_trials_are_listed_best_first_and_failed_ones_last() -> None:
    rows = [
        row(0, 0.2),
        row(1, state="failed"),
        row(2, 0.3),
        row(3, state="running"),
        row(4, 0.9, state="failed"),
        row(5, 0.0),
    ]
    assert [each.number for each in ranked(rows)] == [2, 0, 5, 3, 1, 4]


def test_names_lose_their_first_part_only_where_the_rest_is_unambiguous() -> None:
    names = ["distillation.predictions.weight", "distillation.features.weight", "a.width", "b.width", "plain_name"]
    expected = ["predictions.weight", "features.weight", "a.width", "b.width", "plain name"]
    assert list(short_names(names).values()) == expected


def test_axes_are_logarithmic_where_values_span_a_lot_and_leave_out_what_does_not_vary() -> None:
    logarithmic = make_axis("a.lr", "lr", [1e-4, None, 1e-3, 1e-2])
    assert logarithmic is not None
    assert logarithmic.positions == pytest.approx((0.0, None, 0.5, 1.0))
    assert {text: at for at, text in logarithmic.ticks} == pytest.approx({"0.0001": 0, "0.001": 0.5, "0.01": 1})
    linear = make_axis("a.n", "n", [2, 4, 6, 8])
    assert linear is not None
    assert linear.positions == pytest.approx((0, 1 / 3, 2 / 3, 1))
    assert [text for _, text in linear.ticks] == ["2", "4", "6", "8"]
    words = make_axis("a.w", "w", ["x", False, None, "x"])
    assert words is not None
    assert words.positions == (1.0, 0.0, None, 1.0)
    assert [text for _, text in words.ticks] == ["false", "x"]
    for constant in ([3, 3], [None, 3], ["a", "a"], [], [0.0, 0]):
        assert make_axis("a.c", "c", constant) is None
    many = make_axis("a.m", "m", [math.exp(i / 7) for i in range(60)])
    assert many is not None
    assert 3 <= len(many.ticks) <= 12
    assert all(0 <= at <= 1 for at, _ in many.ticks)


def test_boundaries_are_shown_as_gious_not_as_the_searchers_shares() -> None:
    rows = sweep_rows(12, ("query_selection",))
    sweep = SweepSummary(tuple(rows), RECIPE)
    axis = next(axis for axis in sweep.axes if axis.name == "query_selection.boundary_1")
    gious = [each.overrides.get("distillation.selection.boundaries", [0.5])[0] for each in sweep.scored]
    low, high = min(gious), max(gious)
    assert axis.positions == pytest.approx([(at - low) / (high - low) for at in gious])


# --- pictures and pages ---------------------------------------------------------------------------------------------
class Tags(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.words.append(data)


def without_plotly(page: str) -> str:
    """The page without plotly.js, of which there is one."""
    from plotly.offline import get_plotlyjs

    assert page.count(get_plotlyjs()[:2000]) == 1
    return page.replace(get_plotlyjs(), "")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrialRow], list[Path]]:
    folder, rows = tmp_path_factory.mktemp("sweep") / "report", sweep_rows(24)
    return folder, rows, write_report(folder, rows, RECIPE, to_yaml(RECIPE), "A sweep")


def test_a_report_has_every_picture_twice_the_tables_and_the_recipe(
    report: tuple[Path, list[TrialRow], list[Path]],
) -> None:
    folder, _, written = report
    pictures = {f"{name}.{kind}" for name in PICTURES for kind in ("png", "html")}
    assert {path.name for path in written} == pictures | {"index.html", "trials.csv", "trials.md", "best.yaml"}
    assert written[0].name == "index.html"
    assert set(folder.iterdir()) == set(written)
    assert (folder / "best.yaml").read_text() == to_yaml(RECIPE)
    for name in PICTURES:
        pixels = np.asarray(Image.open(folder / f"{name}.png").convert("RGB"))
        assert pixels.shape[0] > 400
        assert (pixels != 255).any(-1).mean() > 0.01
        colour = [int(RECIPE_COLOUR[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(-1).any() == (name != "importance"), f"the recipe is not marked in {name}.png"


def test_every_page_stands_alone_and_loads_nothing(report: tuple[Path, list[TrialRow], list[Path]]) -> None:
    folder, _, _ = report
    for name in ("index", *PICTURES):
        text = without_plotly((folder / f"{name}.html").read_text())
        tags = Tags(text).found
        assert not [tag for tag, attributes in tags if {"src", "href"} & set(attributes)]
        assert text.count("Plotly.newPlot(") == (len(PICTURES) if name == "index" else 1)


def test_the_table_of_all_trials_reads_back_as_the_sweep_was(
    report: tuple[Path, list[TrialRow], list[Path]],
) -> None:
    folder, rows, _ = report
    space = SearchSpace(SPACES, RECIPE)
    lines = list(csv.DictReader(io.StringIO((folder / "trials.csv").read_text())))
    assert [int(line["number"]) for line in lines] == [each.number for each in ranked(rows)]
    for line in lines:
        trial = rows[int(line["number"])]
        assert line["state"] == trial.state
        assert line["best_ap"] == (str(trial.best_ap) if trial.curve else "")
        assert {n: v for n, v in line.items() if n.startswith("parameters.") and v} == {
            f"parameters.{name}": str(value) for name, value in trial.parameters.items()
        }
        fields = flatten(to_tree(space.config(trial.overrides)))
        told = {n.removeprefix("fields."): v for n, v in line.items() if n.startswith("fields.")}
        assert told == {name: "" if fields.get(name) is None else str(fields[name]) for name in told}
        sections = {name.rpartition(".")[0] for name in told}  # bits are a section's
        assert {*space.fields} - {"student.resize.longest"} <= {*told} | sections
    table = (folder / "trials.md").read_text().splitlines()
    assert [int(line.split("|")[1]) for line in table if re.match(r"\| \d", line)] == [t.number for t in ranked(rows)]
    assert sum("failed: out of memory" in line for line in table) == sum(each.state == "failed" for each in rows)


def test_the_plots_front_has_steps_through_what_no_other_trial_beats(
    report: tuple[Path, list[TrialRow], list[Path]],
) -> None:
    _, rows, _ = report
    sweep = SweepSummary(tuple(rows), RECIPE)
    line = sweep_plots.plot_front(sweep, "latency_ms").data[0]
    assert line.line.shape == "hv"
    fastest_first = sorted(sweep.scored, key=lambda each: (each.latency_ms or 0, -each.best_ap))
    expected: list[tuple[float, float]] = []
    for each in fastest_first:
        if not expected or each.best_ap > expected[-1][1]:
            expected.append((each.latency_ms or 0, each.best_ap))
    np.testing.assert_allclose(np.stack([line.x, line.y], axis=1)[:-1], expected)
    assert line.x[-1] == max(each.latency_ms or 0 for each in sweep.scored)
    curves = [trace for trace in sweep_plots.plot_curves(sweep).data if trace.x[0] is not None]
    assert sorted(len(trace.x) for trace in curves) == sorted(len(each.curve) for each in rows if each.curve)


def test_parallel_coordinates_have_every_trial_at_its_place_on_every_axis() -> None:
    rows = sweep_rows(10, ("query_selection",), seed=3)
    sweep = SweepSummary(tuple(rows), RECIPE)
    first, *others = plot_parallel(sweep).data[0].dimensions
    aps = np.asarray([each.best_ap for each in sweep.scored])
    np.testing.assert_allclose(first["values"], (aps - aps.min()) / (aps.max() - aps.min()))
    third = next(dimension for dimension in others if "boundary 3" in dimension["label"])
    has_three = ["query_selection.boundary_3" in each.parameters for each in sweep.scored]
    assert any(has_three)
    assert [at >= 0 for at in third["values"]] == has_three
    assert third["ticktext"][-1] == "none"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures, and pages without the 5 MB that are the same in each: of what is drawn at all, not of how it looks."""
    new_picture = sweep_pictures.new_picture

    def small(*size: float) -> tuple[Any, Any]:
        figure, axes = new_picture(*size)
        figure.set_dpi(30)
        return figure, axes

    monkeypatch.setattr(sweep_pictures, "new_picture", small)
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")


# --- what can go wrong ----------------------------------------------------------------------------------------------
NASTY = "<img src=x onerror=alert(1)> | & $\\frac{1}$ [bold]`"


def test_names_with_html_are_shown_as_they_are(tmp_path: Path) -> None:
    rows = [
        row(
            i,
            0.1 + 0.01 * i,
            parameters={f"{NASTY}.{NASTY}": i + 1, f"{NASTY}.other": NASTY if i % 2 else "</script>"},
            overrides={"student.width": 8 * i, NASTY: NASTY} if i else {},
            parameters_m=1.0 + i,
        )
        for i in range(6)
    ]
    rows.append(row(6, state="failed", reason=f"{NASTY}\n</script><script>alert(2)</script>"))
    write_report(tmp_path, rows, RECIPE, f"# {NASTY}", NASTY)
    for name in ("index", "parallel", "importance", "history", "front_parameters"):
        text = without_plotly((tmp_path / f"{name}.html").read_text())
        tags = Tags(text)
        assert not [tag for tag, _ in tags.found if tag == "img"]
        assert "alert(2)" not in re.sub(r"<[^>]*>", "", text).split("Plotly")[0] or name == "index"
        assert NASTY in "".join(tags.words) or name == "index"
        for told in re.findall(r'"(?:text|hovertext|label)":("(?:[^"\\]|\\.)*"|\[(?:"(?:[^"\\]|\\.)*",?)*\])', text):
            shown = json.loads(told)
            assert "<img" not in "".join(shown)
    index = Tags((tmp_path / "index.html").read_text())
    assert sum(word.count("<img src=x onerror=alert(1)>") for word in index.words) >= 3
    console = Console(width=150, file=io.StringIO())
    console.print(terminal_table(rows, f"qskd distill {NASTY}"))
    assert "[bold]`" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_terminal_of_any_width_shows_a_trial_in_few_lines(width: int) -> None:
    rows = sweep_rows(6, ("loss_weights",))
    console = Console(width=width, file=io.StringIO())
    console.print(terminal_table(rows, "", RECIPE))
    table = console.file.getvalue().split("6 trials")[0].splitlines()  # type: ignore[attr-defined]
    trials = [place for place, line in enumerate(table) if re.match(r" {0,4}\d+ ", line)]
    assert len(trials) == sum(has_ap(each) for each in rows)
    assert max(end - begin for begin, end in itertools.pairwise([*trials, len(table)])) <= 8
    assert ("AP50" in table[0]) == (width >= 110)


def named(parameters: dict[str, Any], rows: Sequence[TrialRow]) -> list[TrialRow]:
    return [replace(each, parameters={name: at(each.number) for name, at in parameters.items()}) for each in rows]


FOUR = [row(i, 0.1 * (i + 1)) for i in range(4)]
VARIED = named({"a.x": lambda i: i}, FOUR)


@pytest.mark.parametrize(
    ("rows", "pictures", "words"),
    [
        ([], "", "no trial has an AP"),
        ([row(0, state="failed", reason="boom"), row(1, 0.2, state="failed")], "", "no trial has an AP"),
        ([row(0, state="waiting"), row(1, state="running")], "", "no trial has an AP"),
        ([row(0, 0.3)], "history curves", "only one trial has an AP"),
        (FOUR, "history curves", "no parameter varies between the trials"),
        (named({"a.x": lambda i: 3}, FOUR), "history curves", "no parameter varies"),
        (VARIED[:3], "parallel history curves", "it takes 4 trials with an AP, and there are 3"),
        (named({"a.x": lambda i: i}, [row(i, 0.2) for i in range(5)]), "parallel history curves", "the same AP"),
        (VARIED, "parallel importance history curves", "the latency of no trial is known"),
        (
            [replace(each, parameters_m=1.25) for each in VARIED],
            "parallel importance history curves",
            "all trials have the same size, 1.25 M",
        ),
        (
            [replace(each, parameters_m=1.0 + each.number) for each in VARIED[:3]] + VARIED[3:],
            "parallel importance history curves front_parameters",
            "the latency of no trial is known",
        ),
        (boundary_rows([0.4], [0.4], [0.4]), "history curves", "the boundaries are the same in all trials (0.4)"),
        (boundary_rows([0.4], [], [0.4, 0.7, 0.8, 0.9]), "history curves boundary", "no parameter varies"),
        ([row(3, 0.0), row(9, 0.0)], "history curves", "no parameter varies"),
    ],
)
def test_what_cannot_be_drawn_is_told_instead(
    rows: list[TrialRow], pictures: str, words: str, tmp_path: Path, light: None
) -> None:
    (tmp_path / "parallel.png").touch()  # of an earlier report, as its index says
    (tmp_path / "index.html").write_text(GENERATOR)
    written = write_report(tmp_path, rows, RECIPE, "", "A sweep")
    assert {path.name for path in written if path.suffix == ".png"} == {f"{name}.png" for name in pictures.split()}
    assert set(tmp_path.iterdir()) == set(written)
    index = "".join(Tags((tmp_path / "index.html").read_text()).words)
    assert words in index
    assert index.count("There is no picture") == (len(PICTURES) - len(pictures.split()) if pictures else 1)
    console = Console(width=120, file=io.StringIO())
    console.print(terminal_table(rows, "qskd distill best.yaml", RECIPE))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("qskd distill best.yaml" in said) == (best_row(rows) is not None)


def test_bits_have_a_front_of_their_own_and_latency_a_word(tmp_path: Path, light: None) -> None:
    rows = [
        row(number, ap, overrides={"student.quantization": bits} if bits else {}, size_mb=size, latency_ms=3.0 + number)
        for number, (bits, ap, size) in enumerate([("", 0.3, 0.84), ("w8a8", 0.3, 0.24), ({"bits": "w2a2"}, 0.1, 0.1)])
    ]
    written = write_report(tmp_path, rows, RECIPE, "", "A sweep")
    assert tmp_path / "front_size.png" in written
    index = "".join(Tags((tmp_path / "index.html").read_text()).words)
    assert index.count(IN_FLOAT) == 2  # below the table, above the picture
    assert "0.84 MB" in index
    assert IN_FLOAT in (tmp_path / "trials.md").read_text()
    write_report(tmp_path, [replace(each, overrides={}) for each in rows], RECIPE, "", "A sweep")
    assert not (tmp_path / "front_size.png").exists()
    assert IN_FLOAT not in (tmp_path / "index.html").read_text()


def test_two_hundred_trials_are_drawn_and_absent_parameters_among_them(tmp_path: Path, light: None) -> None:
    rows = sweep_rows(200, ("query_selection",), seed=1)
    written = write_report(tmp_path, rows, RECIPE, "", "A sweep")
    drawn = {path.stem for path in written if path.suffix == ".png"}
    assert drawn == {*PICTURES} - {"front_latency", "front_parameters", "front_size"}  # sizes and bits don't vary


def test_the_terminal_shows_the_best_the_recipe_and_a_command_that_can_be_copied() -> None:
    rows = [row(0, 0.1, parameters_m=2.5)]
    rows += [row(i, 0.1 + 0.01 * i, overrides={"student.width": 128, "student.queries": 300 - i}) for i in range(1, 13)]
    rows += [row(13, state="failed", reason="out of memory"), row(14, state="failed", reason="out of memory")]
    command = (
        "qskd distill a-rather-long-folder/best.yaml --set 'name=the winner' --set training.epochs=50 --set seed=1"
    )
    config: Config = build({"student": {"width": 128}})
    console = Console(width=100, file=io.StringIO())
    console.print(terminal_table(rows, command, config))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    numbers = [int(line.split()[0]) for line in lines if re.match(r" *\d+ +finished", line)]
    assert numbers == [12, 11, 10, 9, 8, 7, 6, 5, 0]
    assert "0.220" in lines[1]  # AP as everywhere
    assert "queries 288" in lines[1]
    assert "width" not in lines[1]  # as in the recipe
    assert "2.50 M" in lines[9]
    assert "the recipe itself" in lines[9]
    at = lines.index("The winner at full length:") + 1
    assert len(lines[at:]) == 2
    assert shlex.split("\n".join(lines[at:]).replace("\\\n", "")) == shlex.split(command)
    assert "failed, 2 times: out of memory" in lines
    assert "15 trials: 13 finished, 2 failed." in lines


def test_no_pyplot_and_no_word_of_optuna(capfd: pytest.CaptureFixture[str]) -> None:
    import sys

    sweep = SweepSummary(tuple(sweep_rows(6, ("loss_weights",))), RECIPE)
    assert isinstance(sweep.axes[0], Axis)
    assert capfd.readouterr() == ("", "")
    assert sweep_pictures.__name__ in sys.modules
    assert "matplotlib.pyplot" not in sys.modules
