"""An evaluation on a terminal: the numbers, a row a class, the best threshold, what is taken for what."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from qskd.evaluation.details import ClassFigures, Evaluation
from qskd.evaluation.shown import is_measured, score_text, scores_text
from qskd.printable import one_line

MOST_CLASSES, MOST_CONFUSED = 30, 8
COLUMNS = ("class", "id", "images", "objects", "AP", "AP50", "best F1", "at score")
FIRST_KEPT = ("AP", "objects", "AP50", "best F1", "at score", "images", "id")  # in a narrow terminal
NAME_WIDTH, CELL_WIDTH = 16, 11
NOTHING = "–"  # in a cell: could not be measured


def _cell(value: float | None) -> str:
    return score_text(value) if is_measured(value) else NOTHING


def metrics_line(evaluation: Evaluation) -> str:
    """The twelve and AP90; AR100 is of as many detections as were counted."""
    named = {
        name.replace("AR100", f"AR{evaluation.max_detections}"): value for name, value in evaluation.metrics.items()
    }
    return scores_text(named, list(named), 4)


def class_table(evaluation: Evaluation, everything: bool = False, width: int = 120) -> Table:
    """The worst class first. everything: all of them, however many. width: of the terminal; what it has no room for is left out."""
    classes = evaluation.classes if everything else evaluation.classes[:MOST_CLASSES]
    left = len(evaluation.classes) - len(classes)
    more = f"{left} more, all better or without objects: --per-class" if left else None
    table = Table(title="Classes, the worst first", caption=more, caption_justify="left")
    room = max(1, (width - NAME_WIDTH) // CELL_WIDTH)
    kept = [column for column in COLUMNS if column == "class" or column in FIRST_KEPT[:room]]
    for column in kept:
        table.add_column(column, justify="left" if column == "class" else "right", no_wrap=column != "class")
    for one in classes:
        cells = dict(zip(COLUMNS, class_cells(one), strict=True))
        table.add_row(*(cells[column] for column in kept))
    return table


def class_cells(one: ClassFigures) -> list[Text]:
    best = (None, None) if one.best is None else (one.best.f1, one.best.score)
    cells = [one_line(one.name), str(one.id), str(one.images), str(one.objects)]
    return [Text(cell) for cell in [*cells, *(_cell(value) for value in (one.ap, one.ap50, *best))]]


def remarks(evaluation: Evaluation) -> list[str]:
    """What is to be known besides the table, a line each."""
    said = [best_threshold(evaluation)]
    taken = [
        f"{one_line(one.true)} for {one_line(one.predicted)} ({one.count} of {one.objects})"
        for one in evaluation.taken_for(MOST_CONFUSED)
    ]
    if taken:
        said.append(f"taken at that score for another class, most often: {', '.join(taken)}")
    if evaluation.plain:
        said.append(plain_line(evaluation))
    return said


def best_threshold(evaluation: Evaluation) -> str:
    best = evaluation.best
    if best is None:
        return "best threshold: none, for no detection is right, or there is no object"
    return (
        f"best threshold: score {best.score:.3f}, where F1 is {best.f1:.3f} (precision {best.precision:.3f}, recall "
        f"{best.recall:.3f}, IoU 0.5, all classes together)"
    )


def plain_line(evaluation: Evaluation) -> str:
    """How AP changes with the pairs that transformers' own post-processing keeps."""
    plain = evaluation.plain
    if plain is None:
        return ""
    there, here = plain.metrics["AP"], evaluation.metrics["AP"]
    difference = f" ({100 * (there - here):+.2f} points)" if is_measured(there) and is_measured(here) else ""
    return (
        f"with transformers' own post-processing, which keeps {plain.rule}: AP {score_text(there, 4)}{difference}, AP50 "
        f"{score_text(plain.metrics['AP50'], 4)}; the numbers above are of the "
        f"{evaluation.max_detections} best (query, class) pairs, as COCO's are"
    )
