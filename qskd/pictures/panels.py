"""A sheet of panels: pictures of one size, each with a title, a note and a legend, under a heading. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qskd.pictures.fonts import font_for, load_font
from qskd.pictures.plots import FAINT, INK, Colour, Picture, shortened, wrapped

WARNING: Colour = (176, 52, 0)
_LEAST_WIDTH = 448  # of a column: notes and legends need as much, however narrow the picture
_GAP, _MARGIN, _SWATCH = 28, 28, (26, 15)


@dataclass(frozen=True)
class Key:
    """One entry of a legend. style: how it is drawn; "words" has no swatch, "heat" a bar of `colours` from low to high."""

    text: str
    colours: tuple[Colour, ...] = ()
    style: Literal["box", "dashed", "heat", "words"] = "box"


@dataclass(frozen=True, eq=False)
class Panel:
    """picture: uint8 [H, W, 3], shown pixel for pixel."""

    title: str
    note: str
    picture: Picture
    legend: tuple[Key, ...] = ()


def columns_for(panels: int) -> int:
    """Of a sheet: three a row at most, so that it can be read on a page, and rows as even as can be."""
    return -(-panels // -(-panels // 3)) if panels else 1


def sheet(heading: str, about: str, warning: str, panels: Sequence[Panel]) -> Picture:
    """uint8 [height, width, 3]. heading, about: a line each above the panels; warning: on a coloured bar below them, empty
    for none. Text that is too long is wrapped, names without spaces are cut short."""
    columns = columns_for(len(panels))
    cell = max([_LEAST_WIDTH, *(panel.picture.shape[1] for panel in panels)])
    width = 2 * _MARGIN + columns * cell + (columns - 1) * _GAP
    pieces = [_text_block([heading], load_font(27, bold=True), INK, width - 2 * _MARGIN)]
    pieces.append(
        _text_block(wrapped(about, load_font(17), width - 2 * _MARGIN), load_font(17), FAINT, width - 2 * _MARGIN)
    )
    if warning:
        pieces.append(_bar(wrapped(warning, load_font(18, bold=True), width - 2 * _MARGIN - 24), width - 2 * _MARGIN))
    pieces += [_row(panels[start : start + columns], cell) for start in range(0, len(panels), columns)]
    height = 2 * _MARGIN + sum(piece.height for piece in pieces) + 10 * (len(pieces) - 1)
    canvas, y = Image.new("RGB", (width, height), (255, 255, 255)), _MARGIN
    for piece in pieces:
        canvas.paste(piece, (_MARGIN, y))
        y += piece.height + 10
    return np.asarray(canvas)


def _fitting(text: str, font: ImageFont.FreeTypeFont) -> ImageFont.FreeTypeFont:
    """This font, or one of its size that has the text's letters."""
    return font_for(text, int(font.size), "Bold" in str(font.getname()[1])) or font


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return int(sum(font.getmetrics()) * 1.12)


def _text_block(lines: Sequence[str], font: ImageFont.FreeTypeFont, colour: Colour, width: int) -> Image.Image:
    block = Image.new("RGB", (width, max(1, _line_height(font) * len(lines))), (255, 255, 255))
    draw = ImageDraw.Draw(block)
    for i, line in enumerate(lines):
        own = _fitting(line, font)
        draw.text((0, i * _line_height(font)), shortened(line, own, width), fill=colour, font=own)
    return block


def _bar(lines: Sequence[str], width: int) -> Image.Image:
    font = load_font(18, bold=True)
    bar = Image.new("RGB", (width, _line_height(font) * len(lines) + 16), WARNING)
    for i, line in enumerate(lines):
        at = (12, 8 + i * _line_height(font))
        ImageDraw.Draw(bar).text(at, shortened(line, font, width - 24), fill=(255, 255, 255), font=font)
    return bar


def _row(panels: Sequence[Panel], cell: int) -> Image.Image:
    """Titles, pictures and legends stand on common lines."""
    title_font, note_font = load_font(21, bold=True), load_font(17)
    notes = [wrapped(panel.note, note_font, cell) for panel in panels]
    legends = [_legend(panel.legend, cell) for panel in panels]
    above = _line_height(title_font) + _line_height(note_font) * max(len(lines) for lines in notes) + 8
    high = max(panel.picture.shape[0] for panel in panels)
    height = above + high + 10 + max(legend.height for legend in legends) + 12
    row = Image.new("RGB", (len(panels) * (cell + _GAP) - _GAP, height), (255, 255, 255))
    for column, (panel, lines, legend) in enumerate(zip(panels, notes, legends, strict=True)):
        x = column * (cell + _GAP)
        row.paste(_text_block([panel.title], title_font, INK, cell), (x, 0))
        row.paste(_text_block(lines, note_font, FAINT, cell), (x, _line_height(title_font)))
        row.paste(Image.fromarray(panel.picture), (x, above))
        row.paste(legend, (x, above + high + 10))
    return row


def _legend(keys: Sequence[Key], width: int) -> Image.Image:
    """Entries one after the other, as many on a line as there is room for."""
    plain = load_font(17)
    line, y, x = _line_height(plain) + 3, 0, 0
    placed = []
    for key in keys:
        font = _fitting(key.text, plain)
        offset = 0 if key.style == "words" else (_SWATCH[0] * (4 if key.style == "heat" else 1) + 8)
        text = shortened(key.text, font, width - offset)
        long = offset + int(font.getlength(text)) + 1
        if x and x + long > width:
            x, y = 0, y + line
        placed.append((x, y, offset, key, text, font))
        x += long + 22
    legend = Image.new("RGB", (width, y + line if placed else 1), (255, 255, 255))
    draw = ImageDraw.Draw(legend)
    for x, y, offset, key, text, font in placed:
        top = y + (line - 3 - _SWATCH[1]) // 2
        corners = (x, top, x + offset - 9, top + _SWATCH[1] - 1)
        if key.style == "heat":
            steps = np.linspace(0, len(key.colours) - 1, offset - 8).round().astype(int)
            bar = np.broadcast_to(np.array(key.colours, np.uint8)[steps], (_SWATCH[1], offset - 8, 3))
            legend.paste(Image.fromarray(np.ascontiguousarray(bar)), (x, top))
        elif key.style == "dashed":
            draw.rectangle(corners, fill=(120, 120, 120))
            draw_dashed(draw, (corners[0] + 3, corners[1] + 3, corners[2] - 3, corners[3] - 3), key.colours[0], 2)
        elif key.style == "box":
            draw.rectangle(corners, outline=(0, 0, 0), width=5)
            draw.rectangle((x + 1, top + 1, corners[2] - 1, corners[3] - 1), outline=key.colours[0], width=3)
        colour = FAINT if key.style == "words" else INK
        draw.text((x + offset, y), text, fill=colour, font=font)
    return legend


def draw_dashed(
    draw: ImageDraw.ImageDraw, box_xyxy: tuple[float, float, float, float], colour: Colour, width: int
) -> None:
    """A dashed rectangle inside these corners; black between the dashes, so that white ones are seen on white."""
    left, top, right, bottom = box_xyxy
    right, bottom, thick = max(left, right), max(top, bottom), width - 1
    draw.rectangle((left, top, right, bottom), outline=(0, 0, 0), width=width)
    for low, high, across in ((left, right, True), (top, bottom, False)):
        dashes = max(1, int((high - low) // (6 * width)))
        for dash in range(dashes):
            a, b = (low + (high - low) * (dash + part) / dashes for part in (0.0, 0.55))
            for edge in (top, max(top, bottom - thick)) if across else (left, max(left, right - thick)):
                draw.rectangle((a, edge, b, edge + thick) if across else (edge, a, edge + thick, b), fill=colour)
