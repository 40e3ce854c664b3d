"""The part of a model card that says what an evaluation found: classes, threshold, confusions, post-processing, pictures."""

from __future__ import annotations

import html
from collections.abc import Sequence

from qskd.checkpoints.clean_config import CATEGORY_IDS
from qskd.evaluation.details import ClassFigures, Evaluation
from qskd.printable import one_line

PICTURES = {
    "card-precision_recall.png": "Precision against recall",
    "card-thresholds.png": "Precision, recall and F1 by the lowest score that is kept",
    "card-classes.png": "Precision and recall by class, the worst first",
    "card-confusion.png": "What is there and what was found",
}
_MOST_ROWS = 40  # of the table: the others are folded
_NOTHING = "–"


def picture_name(name: str) -> str:
    """What one of an evaluation's pictures is called in a student's folder, which may hold others' pictures too."""
    return f"card-{name}"


def classes_section(evaluation: Evaluation, pictures: Sequence[str]) -> str:
    """Markdown. pictures: those of PICTURES that are beside the card."""
    parts = [
        "## Classes\n",
        f"The worst first; {evaluation.images} validation images. id: the dataset's category id, which `config.json` keeps for "
        f"each label in `{CATEGORY_IDS}`. F1: the best that one threshold on scores gives the class, at IoU 0.5.\n",
        _table(evaluation.classes),
        "\n".join(f"- {line}" for line in _remarks(evaluation)) + "\n",
    ]
    parts += [f"![{PICTURES[name]}]({name})\n" for name in PICTURES if name in pictures]
    return "\n".join(parts)


def _table(classes: Sequence[ClassFigures]) -> str:
    """The worst are to be seen at once; of a thousand classes the others are folded, with a head of their own."""
    text, others = _rows(classes[:_MOST_ROWS]), classes[_MOST_ROWS:]
    if not others:
        return text
    told = f"the other {len(others)} of {len(classes)} classes, which are better or without objects"
    return f"{text}\n<details><summary>{told}</summary>\n\n{_rows(others)}\n</details>\n"


def _rows(classes: Sequence[ClassFigures]) -> str:
    lines = [
        "| class | id | images | objects | AP | AP50 | F1 | at score |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in classes:
        best = (None, None) if one.best is None else (one.best.f1, one.best.score)
        numbers = [_NOTHING if value is None else f"{value:.3f}" for value in (one.ap, one.ap50, *best)]
        cells = [_name(one.name), str(one.id), str(one.images), str(one.objects), *numbers]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _name(name: str) -> str:
    """In a cell of a table no bar, and no markup of its own."""
    plain = html.escape(one_line(name), quote=False)
    return "".join(f"\\{letter}" if letter in "|\\`*_[]" else letter for letter in plain)


def _remarks(evaluation: Evaluation) -> list[str]:
    best, said = evaluation.best, []
    if best is None:
        said.append("No threshold is the best: there is no object or no detection.")
    else:
        said.append(
            f"Best threshold on scores, all classes together: {best.score:.3f}, where F1 is {best.f1:.3f} (precision "
            f"{best.precision:.3f}, recall {best.recall:.3f}). `pipeline` keeps scores above 0.5 unless it is given `threshold`."
        )
    taken = [
        f"{_name(one.true)} for {_name(one.predicted)} ({one.count} of {one.objects})"
        for one in evaluation.taken_for(6)
    ]
    if taken:
        said.append(f"Taken for another class at that score, most often: {', '.join(taken)}.")
    plain = evaluation.plain
    if plain is not None and "AP" in plain.metrics and "AP" in evaluation.metrics:
        there, here = plain.metrics["AP"], evaluation.metrics["AP"]
        said.append(
            f"transformers' own post-processing keeps {one_line(plain.rule)}: AP {there:.3f} there, {here:.3f} with the 100 "
            "best (query, class) pairs, which the figures of this card are of."
        )
    return said
