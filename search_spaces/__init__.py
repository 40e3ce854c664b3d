"""What may be searched: one file a space, each a function from a trial to fields of the configuration.

A space is a module here, or any .py file, with

    FIELDS         the dotted fields of the configuration that it may set: a tuple, or a function from the recipe to one
    suggest        (trial, config) -> {field: value}. `trial` answers suggest_int, suggest_float and suggest_categorical, as
                   Optuna's does; `config` is the recipe, and what a space offers is relative to it
    recipe_point   (config) -> {parameter: value}: the answers that stand for the recipe itself, or come nearest to it

and, if `qskd tune --algorithm pbt` may change its fields in the middle of a training, MAY_CHANGE_WHILE_TRAINING = True
(WHY_NOT_WHILE_TRAINING = "..." tells those who ask for it why not). Parameters are named by the space; no two spaces'
meet, for a composition puts the space's name before each. docs/search_spaces.md has an example.

Importing this package imports neither Ray nor torch nor Optuna; checking a space about a recipe with a cache imports torch.
"""

from search_spaces._composition import OVERRIDES, SearchSpace
from search_spaces._loading import Space, load_space, space_names
from search_spaces._trials import PointTrial, RandomTrial, Range, Trial

OF_QSKD = True  # what tells this package from another of its name (`qskd.verbs`)

__all__ = [
    "OVERRIDES",
    "PointTrial",
    "RandomTrial",
    "Range",
    "SearchSpace",
    "Space",
    "Trial",
    "load_space",
    "space_names",
]
