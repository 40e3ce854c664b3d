"""Whatever a space proposes is a valid configuration, the first trial is the recipe, and what can't work is told at once."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from tiny import LABELS, batch_of, make_training, random_teacher, recipe, silent_student

from qskd.checks import check_enough
from qskd.config import Config
from qskd.config.quantization import PARTS
from qskd.config.recipe import build, load, replace_fields
from qskd.errors import QskdError
from search_spaces import OVERRIDES, PointTrial, RandomTrial, Range, SearchSpace, load_space, space_names

ROOT = Path(__file__).parents[1]
THREE = ("student_architecture", "query_selection", "loss_weights")
COMPOSITIONS = [names for count in (1, 2, 3) for names in itertools.combinations(THREE, count)]
RECIPES: Mapping[str, Config] = {
    "default": Config(),
    "quickstart": load(ROOT / "pipelines/assets/quickstart.yaml", ["teacher.cache.path=cache"]),
    "coco": load(ROOT / "configs/coco_conditional_r18.yaml"),
    "inherits": load(ROOT / "configs/shapes_teacher.yaml", ["student.inherit=true", "student.heads=8"]),
    "odd": build(  # sizes that share few divisors, and a selection in two bands that is offered as it is
        {
            "student": {
                **{"width": 60, "heads": 3, "ffn_width": 100, "queries": 7, "resize": {"size": 100}},
                "backbone": {"hidden_sizes": [6, 10, 14], "embedding_size": 6, "depths": [1, 3, 2]},
            },
            "teacher": {"cache": {"path": "cache", "attention_giou_floor": -1.0, "all_layers": True}},
            "distillation": {
                "selection": {"boundaries": [-0.3, 0.6], "band_weights": [0, 0.4, 3.0], "max_per_object": 0},
                "features": {"weight": 0.0},
                "warmup": 0.2,
                "decay": 0.1,
            },
        }
    ),
    "deformable": build(
        {
            "student": {
                **{"family": "deformable_detr", "width": 96, "heads": 4, "feature_levels": 3},
                "resize": {"mode": "shortest_edge", "size": 480, "longest": 640},
            },
            "distillation": {"selection": {"max_per_object": 0}, "predictions": {"student_layers": "last"}},
        }
    ),
    # Hybrids choose queries among their cells: more queries than small images have cells are no student.
    **{
        f"hybrid of {levels}, {size} px": build(
            {"student": {"family": "rt_detr", "feature_levels": levels, "queries": queries, "resize": {"size": size}}}
        )
        for levels, size, queries in ((3, 224, 300), (3, 128, 100), (2, 320, 300), (1, 320, 100))
    },
}


def study(
    names: Sequence[str], config: Config, trials: int = 300
) -> tuple[SearchSpace, list[optuna.trial.Trial], list[dict[str, Any]]]:
    """Trials of Optuna's random sampler after the recipe's own, which is enqueued as Ray Tune does it."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = SearchSpace(names, config)
    found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    found.enqueue_trial(space.recipe_point)
    asked = [found.ask() for _ in range(trials + 1)]
    return space, asked, [space(trial)[OVERRIDES] for trial in asked]


# To a space that proposes no sizes a hybrid is a student as any other.
PAIRS = [
    pytest.param(names, name, id=f"{'+'.join(names)}-{name}")
    for names, name in itertools.product(COMPOSITIONS, RECIPES)
    if THREE[0] in names or "hybrid" not in name
]


@pytest.mark.parametrize(("names", "name"), PAIRS)
def test_every_trial_is_a_valid_configuration_and_the_first_is_the_recipe(names: tuple[str, ...], name: str) -> None:
    config = RECIPES[name]
    # What holds of all three together holds of each: most are tried of those, and for each of ten recipes anew.
    space, trials, proposed = study(names, config, trials=150 if names == THREE else 20)
    assert proposed[0] == {}
    assert space.config(proposed[0]) == config
    floor = config.teacher.cache.attention_giou_floor
    for trial, overrides in zip(trials, proposed, strict=True):
        built = space.config(overrides)
        if built.teacher.cache.path:
            check_enough(built)
        boundaries = built.distillation.selection.boundaries
        assert all(low < high for low, high in itertools.pairwise(boundaries))
        assert all(floor <= boundary <= 1 for boundary in boundaries)
        assert set(overrides) <= set(space.fields)
        assert json.loads(json.dumps(overrides)) == overrides  # it goes into a trial's folder and a recipe
        assert space.overrides(trial.params) == overrides
    different = {json.dumps(overrides, sort_keys=True) for overrides in proposed}
    assert len(different) > 2 / 3 * len(proposed)


def test_every_architecture_has_room_for_its_queries_at_every_size_that_it_is_trained_at() -> None:
    hybrid = {"family": "rt_detr", "feature_levels": 2, "queries": 300, "resize": {"size": 320}}
    config = build({"student": hybrid, "augmentation": {"scales": [0.75, 1.0, 1.25]}})
    space, _, proposed = study(("student_architecture",), config)
    for overrides in proposed:
        space.config(overrides)  # raises where a size has fewer cells than there are queries


@pytest.mark.parametrize("whose", RECIPES)
@pytest.mark.parametrize("name", THREE)
def test_the_parameters_that_stand_for_the_recipe_really_mean_it(name: str, whose: str) -> None:
    space, config = load_space(name), RECIPES[whose]
    overrides = space.suggest(PointTrial(space.recipe_point(config)), config)
    # Taken at their word, without the composition's promise that this point is the recipe.
    assert replace_fields(config, overrides, name) == config


@pytest.mark.parametrize(
    "selection",
    [
        {"boundaries": [0.1, 0.12, 0.97], "band_weights": [0.0, 0.0, 9.0, 0.3]},  # below the floor, too near, too high
        {"boundaries": [0.5], "band_weights": [0.2, 1.0]},
        {"boundaries": [], "band_weights": [1.0]},
        {"boundaries": [0.3, 0.4, 0.5, 0.6, 0.7], "band_weights": [0, 1, 1, 1, 1, 1]},
    ],
)
def test_a_recipe_that_is_not_offered_is_the_first_trial_all_the_same(selection: dict[str, Any]) -> None:
    config = build({"distillation": {"selection": selection}})
    space, _, proposed = study(["query_selection"], config, trials=100)
    assert proposed[0] == {}
    for overrides in proposed[1:]:
        built = space.config(overrides).distillation.selection
        assert built.floor >= 0.3
        assert all(high - low >= 0.049 for low, high in itertools.pairwise(built.boundaries))


def test_random_boundaries_are_spread_over_the_room_there_is() -> None:
    _, _, proposed = study(["query_selection"], Config())
    lists = [overrides["distillation.selection.boundaries"] for overrides in proposed[1:]]
    for place in range(3):
        drawn = [boundaries[place] for boundaries in lists if len(boundaries) == 3]
        expected = 0.3 + 0.55 * (place + 1) / 4 + 0.05 * place  # order statistics of three even draws
        assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("name", ["quickstart", "odd", "inherits"])
def test_sampled_architectures_are_built_and_run(name: str) -> None:
    space = SearchSpace(["student_architecture"], RECIPES[name])
    sizes = set()
    for overrides in space.samples(5, seed=1):
        student = space.config(overrides).student
        detector = silent_student(student, LABELS, seed=0).eval()
        side = student.resize.size
        with torch.inference_mode():
            out = detector(
                torch.zeros(1, 3, side, side), torch.ones(1, side, side, dtype=torch.bool), with_attention=False
            )
        assert out.logits.shape == (student.decoder_layers, 1, student.queries, len(LABELS))
        assert out.memory[0].shape[1] == student.width
        sizes.add(sum(parameter.numel() for parameter in detector.parameters()))
    assert len(sizes) > 1


def test_an_heir_keeps_the_sizes_that_its_inheritance_needs() -> None:
    space = SearchSpace(["student_architecture"], RECIPES["inherits"])
    for overrides in space.samples(50):
        assert not {"student.width", "student.heads", "student.ffn_width"} & set(overrides)
    twins = SearchSpace(["student_architecture"], load(None, ["distillation.predictions.pairing=index"]))
    assert not any("student.queries" in overrides for overrides in twins.samples(50))
    pretrained = SearchSpace(["student_architecture"], RECIPES["coco"])
    assert not any(field.startswith("student.backbone") for o in pretrained.samples(50) for field in o)


QUANTIZED: dict[str, Any] = {
    "float": None,
    "w8a8": "w8a8",
    "its parts": {"bits": "w4a3-attn2", "parts": ["backbone", "heads"], "rest_from": 0.3},
}


@pytest.mark.parametrize("own", QUANTIZED)
def test_bits_are_searched_beside_all_else_and_the_recipe_is_among_them(own: str) -> None:
    config = build({"student": {"family": "deformable_detr", "quantization": QUANTIZED[own]}})
    space = load_space("quantization")
    assert replace_fields(config, space.suggest(PointTrial(space.recipe_point(config)), config), "test") == config
    together, trials, proposed = study([*THREE, "quantization"], config, trials=200)
    assert proposed[0] == {}
    found = [together.config(overrides).student.quantization for overrides in proposed]
    said = [each for each in found[1:] if each is not None]
    assert {each.weight_bits for each in said} == {each.attention_bits for each in said} == {8, 4, 3, 2}
    assert 20 < found.count(None) < 70  # a fifth is in float
    assert {"backbone", "encoder", "decoder", "heads"} <= {
        "+".join(sorted(set(PARTS) - {*each.parts})) for each in said
    }
    assert {each.rest_from for each in said} == {0.3 if own == "its parts" else None}
    assert all(together.overrides(trial.params) == each for trial, each in zip(trials, proposed, strict=True))


@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.9, 0.0), (0.0, 0.95), (0.4, 0.6), (1.0, 0.0)])
def test_warmup_and_decay_always_fit_into_the_training(warmup: float, decay: float) -> None:
    config = build({"distillation": {"warmup": warmup, "decay": decay}})
    space = SearchSpace(["loss_weights"], config)
    for overrides in space.samples(200):
        space.config(overrides)
    assert space.ranges["loss_weights.warmup"].high >= warmup
    assert space.ranges["loss_weights.decay"].high >= decay


def test_warmup_leaves_room_for_the_decay_of_images_without_labels() -> None:
    space = SearchSpace(["loss_weights"], build({"distillation": {"decay_unlabeled": 0.9}}))
    assert space.ranges["loss_weights.warmup"].high == pytest.approx(0.1)
    for overrides in space.samples(200):
        space.config(overrides)


def test_bands_are_searched_down_to_the_highest_floor_that_is_named_as_fitting() -> None:
    config = build({"teacher": {"cache": {"attention_giou_floor": 0.9}}})
    for overrides in SearchSpace(["query_selection"], config).samples(50):
        assert min(overrides["distillation.selection.boundaries"]) >= 0.9


def test_a_term_that_is_off_stays_off_and_layers_are_offered_that_the_cache_holds() -> None:
    space = SearchSpace(["loss_weights"], build({"distillation": {"features": {"weight": 0}}}))
    assert "loss_weights.agfd" not in space.ranges
    assert space.ranges["loss_weights.layers"].choices == ("all", "last", "same_index")
    assert SearchSpace(["loss_weights"], RECIPES["coco"]).ranges["loss_weights.layers"].choices == ("all", "last")
    only = build({"distillation": {"predictions": {"weight": 0}}})
    assert "loss_weights.layers" not in SearchSpace(["loss_weights"], only).ranges


@pytest.mark.parametrize(
    ("name", "tree", "words"),
    [
        ("loss_weights", {"distillation": {"method": "none"}}, "distillation.method = none"),
        ("quantization", {"student": {"family": "dab-detr"}}, "student.family = dab-detr: "),
        (
            "loss_weights",
            {"distillation": {"features": {"weight": 0}, "predictions": {"weight": 0}}},
            "all distillation terms have weight 0",
        ),
        ("query_selection", {"distillation": {"method": "none"}}, "distillation.method = none"),
        ("query_selection", {"distillation": {"selection": {"relative": True}}}, "relative = true"),
        ("query_selection", {"distillation": {"selection": {"shuffled": True}}}, "shuffled = true"),
        ("query_selection", {"teacher": {"cache": {"attention_giou_floor": 0.93}}}, "0.93 leaves no room"),
        *(
            ("query_selection", {"distillation": {"features": features, "predictions": predictions}}, "nothing reads")
            for features in ({"weight": 0}, {"background": 1.0})
            for predictions in (
                {"weight": 0},
                {"pairing": "global"},
                {"class_weight": 0, "l1_weight": 0, "giou_weight": 0},
            )
        ),
        ("student_architecture", {"student": {"init": "some/detector"}}, "student.init = some/detector"),
    ],
)
def test_a_recipe_in_which_a_space_means_nothing_is_refused(name: str, tree: dict[str, Any], words: str) -> None:
    with pytest.raises(QskdError) as caught:
        SearchSpace([name], build(tree))
    assert f"search space {name}: " in str(caught.value)
    assert words in str(caught.value)


# ---- a user's own

OWN = """
FIELDS = ({fields!r},)

def recipe_point(config):
    return {point!r}

def suggest(trial, config):
    return {returned}
"""


def own_space(
    folder: Path,
    field: str = "training.learning_rate",
    point: Mapping[str, Any] | None = None,
    returned: str = "{FIELDS[0]: trial.suggest_float('rate', 1e-5, 1e-3, log=True)}",
    name: str = "mine",
) -> str:
    path = folder / f"{name}.py"
    path.write_text(OWN.format(fields=field, point={"rate": 1e-4} if point is None else dict(point), returned=returned))
    return str(path)


def test_a_file_is_a_space_and_joins_the_others(tmp_path: Path) -> None:
    space, trials, proposed = study([own_space(tmp_path), "query_selection"], Config())
    assert proposed[0] == {}
    assert trials[0].params["mine.rate"] == 1e-4
    rates = {space.config(overrides).training.learning_rate for overrides in proposed}
    assert len(rates) == 301
    assert space.fields["training.learning_rate"] == "mine"


def test_the_example_in_the_documentation_works(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "search_spaces.md").read_text()
    (tmp_path / "learning.py").write_text(text.split("```python\n")[1].split("```")[0])
    for config in RECIPES.values():
        space, _, proposed = study([str(tmp_path / "learning.py"), "query_selection"], config, trials=30)
        assert space.config(proposed[0]) == config
        assert {space.config(overrides).training.ema_decay > 0 for overrides in proposed} == {False, True}


@pytest.mark.parametrize(
    ("options", "names", "words"),
    [
        ({"field": "training.learning_rat"}, [], ["search space mine", "training.learning_rat", "mean training.learning_rate?"]),
        ({"field": "training.learning_rate.x"}, [], ["unknown field training.learning_rate.x"]),
        ({"field": "nothing.like.it"}, [], ["unknown field nothing.like.it"]),
        ({"field": "student.queries"}, ["student_architecture"], ["student.queries", "student_architecture"]),
        ({"field": "student.resize"}, ["student_architecture"], ["student.resize, and so", "(student.resize.size)"]),
        ({"field": "student"}, ["student_architecture"], ["sets student, and so does"]),
        ({"field": "compute.workers"}, [], ["compute.workers", "no field of the sweep's own"]),
        ({"field": "name"}, [], ["sets name"]),
        ({"field": "training"}, [], ["space mine, a trial with", "training = ", "valid dictionary"]),
        ({"point": {}}, [], ["mine: recipe_point", "no value for the parameter mine.rate"]),
        ({"point": {"rate": 1.0}}, [], ["mine: recipe_point", "mine.rate = 1.0", "float 1e-05 to 0.001, log"]),
        ({"point": {"rate": "low"}}, [], ["mine: recipe_point", "'low'"]),
        ({"returned": "{'seed': trial.suggest_float('rate', 1e-5, 1e-3)}"}, [], ["suggest sets seed", "FIELDS"]),
        ({"returned": "{}"}, [], ["nothing to search"]),
        ({"returned": "{FIELDS[0]: trial.suggest_int('rate', 1)}"}, [], ["mine: suggest: TypeError"]),
        ({"returned": "1 / 0"}, [], ["mine: suggest: ZeroDivisionError"]),
        (
            {"returned": "{FIELDS[0]: -trial.suggest_float('rate', 1e-5, 1e-3)}"},
            [],
            ["mine", "training.learning_rate = -", "greater than 0"],
        ),
    ],
)  # fmt: skip
def test_a_space_that_cannot_work_is_told_before_anything_starts(
    options: dict[str, Any], names: list[str], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(QskdError) as caught:
        SearchSpace([*names, own_space(tmp_path, **options)], Config())
    for word in words:
        assert word in str(caught.value)


def test_one_cache_serves_all_trials(tmp_path: Path) -> None:
    with_cache = load(None, ["teacher.cache.path=cache"])
    for field, value in (
        ("data.views.flip_probability", 0.5),
        ("detection.class_cost", 2.0),
        ("teacher.cache", 0.0),
        ("data.unlabeled_score", 0.4),  # which objects an image without labels has, and so whose attention is kept
        ("data.completed", 1.0),
    ):
        returned = f"{{FIELDS[0]: {value} * trial.suggest_categorical('rate', (1.0,))}}"
        path = own_space(tmp_path, field, {"rate": 1.0}, returned)
        with pytest.raises(QskdError, match="one cache for all trials"):
            SearchSpace([path], with_cache)
    floor = own_space(
        tmp_path,
        "distillation.selection.boundaries",
        {"rate": 0.5},
        "{FIELDS[0]: [trial.suggest_float('rate', 0.0, 0.9)]}",
    )
    with pytest.raises(QskdError, match="raise the boundaries"):
        SearchSpace([floor], with_cache)
    SearchSpace([floor], Config())
    levels = own_space(
        tmp_path, "teacher.levels", {"rate": 1}, "{FIELDS[0]: [trial.suggest_categorical('rate', (0, 1))]}"
    )
    with pytest.raises(QskdError, match=r"(?s)teacher\.levels, which the cached.*one cache for all trials"):
        SearchSpace([levels], load(None, ["teacher.cache.path=cache", "teacher.levels=[1]"]))
    online = SearchSpace([levels], load(None, ["teacher.levels=[1]"]))
    assert {tuple(found.get("teacher.levels", ())) for found in online.samples(9)} <= {(), (0,), (1,)}


def test_names_that_are_no_space_are_told(tmp_path: Path) -> None:
    for name, words in (
        ("query_select", r"did you mean query_selection\?"),
        ("_trials", "no such search space"),
        (str(tmp_path / "none.py"), "no such file"),
    ):
        with pytest.raises(QskdError, match=words):
            load_space(name)
    (tmp_path / "half.py").write_text("FIELDS = 'seed'\n")
    with pytest.raises(QskdError, match=r"no FIELDS .* and no suggest and no recipe_point"):
        load_space(str(tmp_path / "half.py"))
    (tmp_path / "broken.py").write_text("import nothing_like_it\n")
    with pytest.raises(QskdError, match="cannot be imported: ModuleNotFoundError"):
        load_space(str(tmp_path / "broken.py"))
    with pytest.raises(QskdError, match="at least one search space"):
        SearchSpace([], Config())
    with pytest.raises(QskdError, match="given twice"):
        SearchSpace(["query_selection", "query_selection"], Config())


def test_a_space_survives_pickling_as_a_saved_sweep_needs(tmp_path: Path) -> None:
    space = SearchSpace(["query_selection", own_space(tmp_path)], Config())
    again = pickle.loads(pickle.dumps(space))
    assert again.samples(20) == space.samples(20)
    assert again.recipe_point == space.recipe_point


def test_rays_searcher_takes_it_as_it_is_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    from ray.tune.search.optuna import OptunaSearch  # without a cluster: the searcher lives in the driver

    space = SearchSpace(THREE, RECIPES["quickstart"])

    def make() -> OptunaSearch:
        sampler = optuna.samplers.TPESampler(seed=1, n_startup_trials=3)
        return OptunaSearch(space, metric="AP", mode="max", points_to_evaluate=[space.recipe_point], sampler=sampler)

    def tell(searcher: OptunaSearch, number: int) -> dict[str, Any]:
        found = searcher.suggest(f"trial-{number}")
        assert found is not None
        assert space.overrides(found) == found[OVERRIDES]  # a trial's parameters are all it takes to know it again
        searcher.on_trial_complete(f"trial-{number}", {"AP": number / 10, "training_iteration": 1})
        return found

    searcher = make()
    first = [tell(searcher, number) for number in range(6)]
    assert first[0][OVERRIDES] == {}
    assert {name: value for name, value in first[0].items() if name != OVERRIDES} == space.recipe_point
    searcher.save(str(tmp_path / "searcher.pkl"))
    on = [tell(searcher, number) for number in range(6, 9)]
    restored = make()
    restored.restore(str(tmp_path / "searcher.pkl"))
    assert [tell(restored, number) for number in range(6, 9)] == on


def test_a_trial_goes_on_with_the_weights_of_another_where_a_space_says_it_can() -> None:
    config = recipe()
    space = SearchSpace(["loss_weights"], config)
    one, other = (
        make_training(space.config(overrides), random_teacher(), total_steps=4) for overrides in space.samples(2)
    )
    one.train_step(batch_of(2, 1))
    other.load_state(one.state(), 1)
    other.train_step(batch_of(1, 2))
    other.check_finite()


def test_numbers_out_of_range_are_refused_and_the_nearest_is_one_that_is_offered() -> None:
    space = SearchSpace(["loss_weights"], Config())
    moved = space.recipe_point | {"loss_weights.agfd": 1e6, "loss_weights.warmup": -1.0}
    with pytest.raises(QskdError, match=r"loss_weights\.agfd = 1000000\.0"):
        space.overrides(moved)
    assert Range("int", 3, 11, 4).nearest(8.9) == 7
    assert Range("int", 32, 112, 32).nearest(112) == 96  # Optuna offers no 112 either
    assert {RandomTrial(seed).suggest_int("width", 32, 112, step=32) for seed in range(60)} == {32, 64, 96}
    assert Range("float", 0.5, 1.5, 0.25).nearest(9) == 1.5
    assert math.isclose(Range("float", 0.0, 1.0).nearest(0.3), 0.3)


def test_random_trials_reach_both_ends_of_a_range() -> None:
    drawn = {RandomTrial(seed).suggest_int("a", 1, 4) for seed in range(60)}
    assert drawn == {1, 2, 3, 4}
    assert {RandomTrial(seed).suggest_float("a", 0.5, 1.0, step=0.25) for seed in range(60)} == {0.5, 0.75, 1.0}
    assert all(1 <= RandomTrial(seed).suggest_int("a", 1, 30, log=True) <= 30 for seed in range(60))


def test_the_package_is_data_and_imports_no_framework() -> None:
    code = (
        "import sys; from search_spaces import SearchSpace, space_names; from qskd.config import Config;"
        "SearchSpace(space_names(), Config()).samples(3);"
        "print({'ray', 'torch', 'optuna', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"
    assert set(THREE) <= set(space_names())


def test_a_file_from_outside_is_told_to_be_code_that_is_run_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = own_space(tmp_path)
    for _ in range(2):
        load_space(path)
    load_space("query_selection")
    assert [record.getMessage() for record in caplog.records] == [
        f"--space: the code in {Path(path).resolve()} is run, with all your rights"
    ]


def test_choices_that_json_does_not_bring_back_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "depths.py").write_text(
        "FIELDS = ('student.backbone.depths',)\n"
        "def recipe_point(config):\n    return {'depths': (1, 1)}\n"
        "def suggest(trial, config):\n"
        "    return {'student.backbone.depths': trial.suggest_categorical('depths', ((1, 1), (2, 2)))}\n"
    )
    with pytest.raises(QskdError, match=r"search space depths: parameter depths offers \(1, 1\)") as told:
        SearchSpace([str(tmp_path / "depths.py")], recipe())
    assert "a word for each" in told.value.remedy
