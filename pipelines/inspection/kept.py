"""An evaluation in a folder: evaluation.json, per_class.csv, pictures."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from PIL import Image
from pyarrow import fs

from qskd.errors import QskdError, check_writable, writing
from qskd.evaluation.details import FORMAT, Evaluation
from qskd.pictures.evaluated import pictures_of
from qskd.storage.files import publish_bytes
from qskd.storage.ownership import head_says, is_own_picture, save_picture

EVALUATION, TABLE = "evaluation.json", "per_class.csv"
PICTURES = ("precision_recall.png", "thresholds.png", "classes.png", "confusion.png")
COLUMNS = (
    *("name", "category_id", "images", "objects", "AP", "AP50", "best_f1", "best_score", "precision", "recall"),
    *("shared_precision", "shared_recall"),  # at the one threshold that is the best for all classes together
)


def check_kept(folder: Path) -> None:
    """QskdError where an evaluation would replace a file that no evaluation wrote, or could not be written."""
    check_writable(folder)
    own = folder / EVALUATION
    try:
        ours = own.is_file() and head_says(own.read_bytes(), FORMAT)
    except OSError:
        ours = False
    names = [EVALUATION, TABLE] if not ours else []
    there = [name for name in names if os.path.lexists(folder / name)]
    there += [name for name in PICTURES if os.path.lexists(folder / name) and not is_own_picture(folder / name)]
    if there:
        remedy = "choose another folder, or move that away; nothing was written"
        raise QskdError(
            str(folder / there[0]), "is there already, and no evaluation of qskd's wrote it", "a new file", remedy
        )


def keep(evaluation: Evaluation, folder: Path) -> list[str]:
    """Write it; the names of the files. A picture of an earlier evaluation that this one has none of is deleted: it would pass for
    this one's."""
    check_kept(folder)
    local, names = fs.LocalFileSystem(), [EVALUATION, TABLE]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        publish_bytes(evaluation.to_json().encode(), local, str(folder / EVALUATION))
        publish_bytes(class_csv(evaluation).encode(), local, str(folder / TABLE))
        pictures = pictures_of(evaluation)
        for name, picture in pictures.items():
            save_picture(Image.fromarray(picture), folder / name)
            names.append(name)
        for name in PICTURES:
            if name not in pictures and is_own_picture(folder / name):
                (folder / name).unlink()
    return names


def class_csv(evaluation: Evaluation) -> str:
    """A row a class, the worst first; empty where nothing could be measured."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for one in evaluation.classes:
        best = one.best
        of_best = [None] * 4 if best is None else [best.f1, best.score, best.precision, best.recall]
        figures = (one.ap, one.ap50, *of_best, one.shared_precision, one.shared_recall)
        numbers = ["" if value is None else value for value in figures]
        rows.writerow([one.name, one.id, one.images, one.objects, *numbers])
    return text.getvalue()
