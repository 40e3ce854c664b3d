"""Pictures for people: boxes on images, grids of images with titles, curves. Pillow and matplotlib, no global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from qskd.pictures.fonts import font_for, load_font, shown_name
from qskd.printable import LONGEST_LINE, one_line

Picture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
Place = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
# Okabe & Ito's palette, told apart with every kind of colour blindness; its black and yellow are left out, which can't
# be seen on dark photos and on white paper.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (213, 94, 0),
    (0, 114, 178),
    (204, 121, 167),
)
INK: Colour = (33, 33, 33)
FAINT: Colour = (110, 110, 110)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 2, 1, 2)))


def class_colour(label: int) -> Colour:
    """The colour of class index `label`, the same in every picture; six of them, then again."""
    return PALETTE[label % len(PALETTE)]


def _text_colour(background: Colour) -> Colour:
    luminance = float(np.dot(background, (0.299, 0.587, 0.114)))
    return (0, 0, 0) if luminance > 120 else (255, 255, 255)


def _as_picture(image: npt.NDArray[Any]) -> Picture:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"an image is uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    return image


def draw_boxes(
    image: npt.NDArray[Any],
    boxes_xyxy: npt.ArrayLike,
    labels: Sequence[int] | npt.NDArray[Any],
    scores: Sequence[float] | npt.NDArray[Any] | None = None,
    names: Sequence[str] | None = None,
    smallest_side: int = 384,
) -> Picture:
    """A copy of the image with its boxes, each in its class's colour and with a caption ("cat 0.87", long names cut short).

    image: uint8 [H, W, 3]. boxes_xyxy [N, 4]: pixels of `image`; may reach outside. labels [N]: class indices.
    scores [N]: shown when given, best drawn last, on top. names: of the classes; empty strings show no name, one that no
    font here has shows its number.
    Images whose longer side is below `smallest_side` are enlarged by a whole factor first, so that captions stay
    legible: the result is uint8 [f * H, f * W, 3].
    """
    pixels = _as_picture(image)
    boxes = np.asarray(boxes_xyxy, dtype=float).reshape(-1, 4)
    if len(labels) != len(boxes) or (scores is not None and len(scores) != len(boxes)):
        raise ValueError(
            f"{len(boxes)} boxes, {len(labels)} labels, {len(scores) if scores is not None else 'no'} scores"
        )
    factor = max(1, -(-smallest_side // max(pixels.shape[:2])))
    canvas = Image.fromarray(pixels.repeat(factor, axis=0).repeat(factor, axis=1))
    draw = ImageDraw.Draw(canvas)
    longer = max(canvas.size)
    line, font = max(2, round(longer / 220)), load_font(max(11, round(longer / 36)))

    order = np.argsort(np.asarray(scores), kind="stable") if scores is not None else np.arange(len(boxes))
    order = order[np.isfinite(boxes[order]).all(axis=1)]
    scaled = boxes * factor
    # Pillow takes the last pixel inside the box; an inverted or empty box would be an error there
    corners = np.concatenate([scaled[:, :2], np.maximum(scaled[:, 2:] - 1, scaled[:, :2])], axis=1)
    corners = np.nan_to_num(corners).clip(-1e6, 1e6)
    for i in order:
        # a dark rim tells a line from a photo of its own colour
        left, top, right, bottom = corners[i]
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=(0, 0, 0), width=line + 2)
        draw.rectangle((left, top, right, bottom), outline=class_colour(int(labels[i])), width=line)
    captions: list[tuple[Place, str, Colour, ImageFont.FreeTypeFont]] = []
    pad, plain = max(2, int(font.size) // 6), font
    for i in order[::-1]:  # the best choose their place first
        name = shown_name(names[int(labels[i])], int(labels[i])) if names is not None else str(int(labels[i]))
        font = font_for(name, int(plain.size)) or plain
        score = f"{float(scores[i]):.2f}" if scores is not None else ""
        room = 0.6 * canvas.width - font.getlength(f" {score}")
        text = " ".join(word for word in (shortened(name, font, room), score) if word)
        wanted = (font.getlength(text) + 2 * pad, sum(font.getmetrics()) + 2.0)
        place = _free_place(wanted, canvas.size, corners[i], [taken for taken, *_ in captions]) if text else None
        if place is not None:
            captions.append((place, text, class_colour(int(labels[i])), font))
    for (left, top, right, bottom), text, colour, font in reversed(captions):
        draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)
        draw.text((left + pad, top + 1), text, fill=_text_colour(colour), font=font)
    return np.asarray(canvas)


def _free_place(
    wanted: tuple[float, float], canvas: tuple[int, int], box: npt.NDArray[Any], taken: Sequence[Place]
) -> Place | None:
    """Where a caption of `wanted` width and height goes: above its box, else inside, else below; always on the canvas.

    None where others would hide more than a seventh of it: one caption that can be read beats two that can't.
    """
    width, height = wanted
    left, top, right, bottom = (float(side) for side in box)

    def place(x: float, y: float) -> Place:
        x, y = max(0.0, min(x, canvas[0] - width)), max(0.0, min(y, canvas[1] - height))
        return (x, y, x + width, y + height)

    def hidden(at: Place) -> float:
        return sum(
            max(0.0, min(at[2], other[2]) - max(at[0], other[0]))
            * max(0.0, min(at[3], other[3]) - max(at[1], other[1]))
            for other in taken
        )

    corners = [
        (left, top - height),
        (left, top),
        (left, bottom),
        (left, bottom - height),
        (right - width, top - height),
    ]
    corners += [(left, top + step * height) for step in (1, 2, 3)]
    best = min((place(*corner) for corner in corners), key=hidden)  # the first of equals
    return best if hidden(best) <= width * height / 7 else None


def picture_grid(
    rows: Sequence[Sequence[npt.NDArray[Any]]], column_titles: Sequence[str] = (), cell_width: int = 384
) -> Picture:
    """Images in rows and columns on white, a title above each column, as uint8 [height, width, 3].

    Each image is scaled to `cell_width`, its aspect ratio kept; a row is as high as its highest image. Every row has as
    many images as the first, and there are as many titles as columns, or none (ValueError otherwise).
    """
    columns = len(rows[0]) if rows else 0
    if not columns or any(len(row) != columns for row in rows) or len(column_titles) not in (0, columns):
        raise ValueError(f"rows of {[len(row) for row in rows]} images and {len(column_titles)} titles make no grid")
    gap = max(6, cell_width // 32)
    font = load_font(max(12, cell_width // 20), bold=True)
    titles = [wrapped(title, font, cell_width) for title in column_titles]
    line_height = sum(font.getmetrics())
    header = gap + line_height * max(len(lines) for lines in titles) if titles else 0
    cells = [[_to_width(_as_picture(image), cell_width) for image in row] for row in rows]
    heights = [max(cell.height for cell in row) for row in cells]
    size = (gap + columns * (cell_width + gap), header + gap + sum(height + gap for height in heights))
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(titles):
        middle = gap + column * (cell_width + gap) + cell_width / 2
        top = header - line_height * len(lines)  # short titles sit on the pictures, beside the last line of long ones
        for i, text in enumerate(lines):
            draw.text((middle, top + i * line_height), text, fill=INK, font=font, anchor="ma")
    y = header + gap
    for row_of_cells, height in zip(cells, heights, strict=True):
        for column, cell in enumerate(row_of_cells):
            sheet.paste(cell, (gap + column * (cell_width + gap), y + (height - cell.height) // 2))
        y += height + gap
    return np.asarray(sheet)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line, or its beginning and an ellipsis, no wider than `width` pixels (but for the ellipsis itself).

    White space of any kind is one space: Pillow can't measure a name with a line feed in it.
    """
    text = one_line(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines of whole words, each no wider than `width` pixels but for words that are wider by themselves."""
    lines: list[str] = []
    for word in one_line(text, LONGEST_LINE).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    return lines or [""]


def _to_width(pixels: Picture, width: int) -> Image.Image:
    image = Image.fromarray(pixels)
    size = (width, max(1, round(image.height * width / image.width)))
    if size[0] == image.width:
        return image
    whole = width % image.width == 0  # small images keep their pixels
    return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def curve_plot(
    series: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    xlabel: str,
    ylabel: str,
    path: str | Path,
    title: str = "",
) -> None:
    """Lines of named series (x, y) with a legend; the format is `path`'s ending.

    Values that are not finite leave a gap. Colours and dashes differ, so that lines are told apart without colour.
    Raises ValueError when an x and its y differ in length.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, (name, (x, y)) in enumerate(series.items()):
        xs, ys = np.asarray(x, dtype=float).ravel(), np.asarray(y, dtype=float).ravel()
        if len(xs) != len(ys):
            raise ValueError(f"series {name!r} has {len(xs)} x and {len(ys)} y")
        colour = tuple(part / 255 for part in class_colour(i + 4))  # blue first: the palest come late
        dash = _DASHES[i // len(PALETTE) % len(_DASHES)] if len(series) > len(PALETTE) else _DASHES[i % len(_DASHES)]
        marker = "o" if np.isfinite(ys).sum() <= 30 else ""
        axes.plot(
            xs, np.where(np.isfinite(ys), ys, np.nan), label=name, color=colour, ls=dash, marker=marker, ms=4, lw=2
        )
    faint = tuple(part / 255 for part in FAINT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(faint)
    axes.tick_params(colors=faint)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    if all((np.mod(np.asarray(x, dtype=float), 1) == 0).all() for x, _ in series.values()):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no epoch 2.5
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if title:
        axes.set_title(title, loc="left", fontweight="bold")
    if series:
        axes.legend(frameon=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
