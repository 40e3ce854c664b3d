"""The model card of a detector: README.md with front matter for the Hub, from facts that stay in qskd.json beside it.

What nobody measured is said to be not measured, what nobody stated to be not stated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qskd import __version__
from qskd.config import MethodSettings
from qskd.config.distillation import DEFAULT, NONE
from qskd.deploy.card_evaluation import PICTURES, classes_section
from qskd.deploy.chosen import Chosen
from qskd.deploy.variants import VariantsFound
from qskd.deploy.variants import section as variants_section
from qskd.distillation.find import is_built_in
from qskd.distillation.method import find_method, methods_of
from qskd.errors import QskdError
from qskd.evaluation.details import Evaluation
from qskd.evaluation.shown import NOT_MEASURED, is_measured, score_text
from qskd.quantization.files import FILE as QUANTISERS
from qskd.storage.ownership import EXTRA_FILE
from qskd.untrusted import parse_large_json, parse_yaml

CARD_FILE = "README.md"
SHOWN = ("AP", "AP50", "AP75")
NOT_STATED = "not stated"
MADE = {"distill": "distilled from {teachers} with {methods}", "train": "trained without a teacher", "": "exported"}


ONNX = """\
`model.onnx`, whose weights are {weights}, takes `pixel_values` [{batch}, 3, {size}, {size}] (RGB, resized to a square,
normalised as `preprocessor_config.json` says) and returns `logits` and `pred_boxes` of every query. No mask, and no
post-processing: that is in `detect.py`, which needs numpy, onnxruntime and Pillow only:

```
python detect.py photo.jpg --threshold 0.5
```

In a program of yours:

```python
from detect import boxes_of, pixels_of  # numpy only

pixel_values = pixels_of(images_uint8, mean, std)  # [B, {size}, {size}, 3], already resized
logits, pred_boxes = session.run(["logits", "pred_boxes"], {{"pixel_values": pixel_values}})
found = boxes_of(logits, pred_boxes, original_heights_and_widths, "{family}", threshold=0.5)
```

Largest difference to PyTorch, over {images} images{among}: class probabilities {probabilities:.1e}, boxes {boxes:.1e} (of the
image), logits {logits:.1e}. {latency}
"""


@dataclass(frozen=True)
class Figures:
    """One row of the card's table. metrics: of `qskd.evaluation`, empty where not measured. input: height x width in pixels
    that parameters, gflops and ms (of one image, batch 1) were taken at."""

    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    gflops: float | None = None
    ms: float | None = None
    input: str = ""


@dataclass(frozen=True)
class OnnxFacts:
    """What `qskd export` found. batch: None for any number. latency: a sentence, or empty. among: which queries the differences are
    of, where not of all."""

    batch: int | None
    size: int
    images: int
    logits: float
    probabilities: float
    boxes: float
    latency: str = ""
    among: str = ""
    weights: str = "float32"  # most of them


@dataclass(frozen=True)
class Card:
    """The facts. kind: the verb that made the model, empty where it is not known. rows: the last is this model. recipe: what
    differs from the defaults, YAML. timing: how `Figures.ms` were measured."""

    name: str
    family: str
    classes: int
    rows: tuple[Figures, ...]
    kind: str = ""
    version: str = __version__
    recipe: str = ""
    data: str = ""
    data_licence: str = ""
    train_images: int | None = None
    val_images: int | None = None
    teacher: str = ""
    teacher_licence: str = ""
    licence: str = ""
    timing: str = ""
    onnx: OnnxFacts | None = None
    methods: tuple[tuple[str, str], ...] = ()  # (title, citation) of each method that taught it
    evaluation: Evaluation | None = None  # of this model, without its curves
    chosen: Chosen | None = None  # which of its training's students this model is
    unlabeled_images: int = 0  # of the training: those that the teacher alone said something of
    variants: VariantsFound | None = None  # the exported files, side by side
    teachers: int = 1  # how many `teacher` names


_CARD = TypeAdapter(Card)
QUANTISED = (
    "The figures are of a quantised network. transformers, as above, runs its weights so, but activations in float, which is "
    f"not the same; {QUANTISERS} has the rest, and `qskd.quantization.files.restore_quantisers` puts it in place.\n"
)


def read_card(folder: str | Path) -> Card | None:
    """The facts that a folder made by qskd keeps; None where there are none, or not a card's."""
    try:
        card = _CARD.validate_python((read_facts(folder) or {}).get("card"))  # what a later qskd adds is left out
    except ValidationError:
        return None
    return card if card.rows and card.kind in MADE else None


def read_facts(folder: str | Path) -> dict[str, Any] | None:
    """What qskd.json holds; None where there is none, or what anyone else wrote there is no JSON object."""
    try:
        found = parse_large_json((Path(folder) / EXTRA_FILE).read_bytes(), EXTRA_FILE)
    except (OSError, QskdError):
        return None
    return found if isinstance(found, dict) else None


def write_card(folder: str | Path, card: Card) -> None:
    """Write README.md, and the facts into qskd.json, whose other entries stay."""
    facts = Path(folder) / EXTRA_FILE
    extra = read_facts(folder) or {}
    facts.write_text(json.dumps({**extra, "card": asdict(card)}, indent=2, sort_keys=True) + "\n")
    pictures = [name for name in PICTURES if (Path(folder) / name).is_file()]
    quantised = (Path(folder) / QUANTISERS).is_file()
    (Path(folder) / CARD_FILE).write_text(render(card, pictures, quantised), encoding="utf-8")


def is_hub_name(model: str) -> bool:
    """Whether a model's name is one of the Hub, `owner/model`, and no folder here."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model)) and not Path(model).exists()


def front_matter(card: Card) -> str:
    """YAML between two lines of `---`, as huggingface_hub writes and reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    data = card.data or NOT_STATED
    own = card.rows[-1].metrics
    results = [
        EvalResult(
            task_type="object-detection",
            dataset_type="coco-format",
            dataset_name=data,
            dataset_split="validation",
            metric_type="mAP" if name == "AP" else f"mAP{name[2:]}",
            metric_name=f"{name}, COCO's definition",
            metric_value=round(own[name], 4),
        )
        for name in SHOWN
        if is_measured(own.get(name))
    ]
    tags = ["object-detection", "detr", card.family.replace("_", "-")]
    tags += {"distill": ["qskd", "knowledge-distillation"], "train": ["qskd"]}.get(card.kind, [])
    said = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license=card.licence or None,
        base_model=card.teacher if is_hub_name(card.teacher) else None,
        tags=list(dict.fromkeys(tags)),
        model_name=card.name if results else None,
        eval_results=results or None,
    )
    return f"---\n{said.to_yaml()}\n---\n"


def _table(card: Card) -> str:
    def cell(value: float | None, text: str) -> str:
        return NOT_MEASURED if value is None else text.format(value)

    lines = [
        "| | AP | AP50 | AP75 | parameters | input | GFLOPs | ms/image |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in card.rows:
        metrics = [score_text(row.metrics.get(name)) for name in SHOWN]
        millions = None if row.parameters is None else row.parameters / 1e6
        cells = [*metrics, cell(millions, "{:.2f} M"), row.input or NOT_STATED]
        cells += [cell(row.gflops, "{:.3g}"), cell(row.ms, "{:.1f}")]
        lines.append(f"| {' | '.join([row.name, *cells])} |")
    return "\n".join(lines)


def render(card: Card, pictures: Sequence[str] = (), quantised: bool = False) -> str:
    """The whole README.md. pictures: of its evaluation, those that are beside it. quantised: its quantisers are, too."""
    own = card.rows[-1]
    size = NOT_MEASURED if own.parameters is None else f"{own.parameters / 1e6:.2f} million parameters"
    measured_on = "" if card.val_images is None else f"AP is COCO's, on {card.val_images} validation images. "
    taught = _methods(card) if card.kind == "distill" else []
    made = MADE[card.kind if taught or card.kind != "distill" else "train"].format(
        teachers="a teacher" if card.teachers == 1 else f"{card.teachers} teachers",
        methods=" and ".join(title for title, _ in taught),
    )
    parts = [
        front_matter(card),
        f"# {card.name}\n",
        f"An object detector of {card.classes} classes (transformers' `{card.family}`, {size}), {made} by qskd "
        f"{card.version}.\n",
        "## Figures\n",
        _table(card) + "\n",
        *([card.chosen.text + "\n"] if card.chosen is not None else []),
        f"{measured_on}GFLOPs are of one image, a multiply-add counted as two. {card.timing or 'Latency was not measured.'}\n",
        "## Use\n",
        '```python\nfrom transformers import pipeline\n\npipeline("object-detection", model="THIS_FOLDER")("photo.jpg")\n```\n',
        *([QUANTISED] if quantised else []),
    ]
    if card.evaluation is not None:
        parts.append(classes_section(card.evaluation, pictures))
    if card.onnx is not None:
        facts = asdict(card.onnx) | {"batch": "any number" if card.onnx.batch is None else card.onnx.batch}
        facts["among"] = f", {card.onnx.among}" if card.onnx.among else ""
        facts["latency"] = card.onnx.latency or "Its latency was not measured."
        parts += ["## ONNX\n", ONNX.format(family=card.family, **facts)]
    if card.variants is not None and (text := variants_section(card.variants)):
        parts += ["## The same detector in each file\n", text]
    parts += ["## Training\n", _training(card), "## Data and licences\n", _licences(card)]
    if taught:
        heading = "## Method\n" if len(taught) == 1 else "## Methods\n"
        parts += [heading, *(citation for _, citation in taught if citation)]
    return "\n".join(parts)


def _methods(card: Card) -> Sequence[tuple[str, str]]:
    """Title and citation of each method. A card from before they were kept has a recipe that names one of the package's; no
    other is looked up: whoever wrote the folder could name a file to run."""
    if card.methods:
        return card.methods
    try:
        section = (parse_yaml(card.recipe, "the card's recipe") or {}).get("distillation") or {}
        name = section.get("method", DEFAULT)
    except (QskdError, AttributeError):
        return ()
    if name == NONE or not is_built_in(name):
        return ()
    method = find_method(name)
    return ((method.title, method.citation),)


def method_titles(settings: MethodSettings) -> tuple[tuple[str, str], ...]:
    """Of each method of a recipe: its title, and what the card says of whose it is."""
    return tuple((method.title or method.__name__, method.citation) for method, _ in methods_of(settings))


def _training(card: Card) -> str:
    if not card.kind:
        return "How this model was trained is not known to qskd, which only exported it.\n"
    return (
        f"`qskd {card.kind} recipe.yaml`, with qskd {card.version} and this recipe (all else as by default):\n\n"
        f"```yaml\n{card.recipe.strip()}\n```\n"
    )


def _licences(card: Card) -> str:
    images = "" if card.train_images is None else f", {card.train_images} training images"
    images += f", {card.unlabeled_images} more without labels" if card.unlabeled_images else ""
    lines = [
        "| | | licence |",
        "| --- | --- | --- |",
        f"| data | {card.data or NOT_STATED}{images} | {card.data_licence or NOT_STATED} |",
    ]
    named = "teacher" if card.teachers == 1 else "teachers"
    if card.kind == "distill":
        lines.append(f"| {named} | {card.teacher or NOT_STATED} | {card.teacher_licence or NOT_STATED} |")
    lines.append(f"| this model | | {card.licence or NOT_STATED} |")
    note = (
        ""
        if card.licence
        else f"\nWhoever publishes this model states its licence; those of the data and of the {named} bear on it.\n"
    )
    return "\n".join(lines) + "\n" + note
