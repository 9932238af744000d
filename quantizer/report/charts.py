"""Charts and picture grids for reports, drawn with Pillow at twice the size and scaled down."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, MUTED, RULE, PAPER = "#1f2328", "#667080", "#d9dde3", "#ffffff"
# Okabe and Ito's colours, which stay apart for all kinds of colour vision, dark enough for lines on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#000000", "#7a5195", "#8a8a8a", "#5d4037")
_SCALE = 2
_MARGIN = (64, 44, 16, 46)  # left, top, right, bottom


class Canvas:
    """A white picture of width x height with text and shapes in its own units."""

    def __init__(self, width: int, height: int):
        self.image = Image.new("RGB", (width * _SCALE, height * _SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.width, self.height = width, height

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.draw.line(scaled, colour, max(1, round(width * _SCALE)), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.draw.rectangle([v * _SCALE for v in (left, top, right, bottom)], fill=colour)

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.draw.ellipse([v * _SCALE for v in (x - radius, y - radius, x + radius, y + radius)], fill=colour)

    def text(self, x: float, y: float, text: str, size: int = 12, colour: str = INK, anchor: str = "la") -> None:
        self.draw.text((x * _SCALE, y * _SCALE), text, colour, _font(size), anchor=anchor)

    def done(self) -> Image.Image:
        return self.image.resize((self.width, self.height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * _SCALE)


def text_width(text: str, size: int = 12) -> float:
    return _font(size).getlength(text) / _SCALE


def wrap(text: str, width: float, size: int = 11) -> list[str]:
    """The text in lines that are not wider than `width`, as far as its words allow."""
    result = [""]
    for word in text.split():
        longer = f"{result[-1]} {word}".strip()
        if result[-1] and text_width(longer, size) > width:
            result.append(word)
        else:
            result[-1] = longer
    return result


def lines(
    title: str,
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    log: bool = False,
    width: int = 560,
    height: int = 340,
) -> Image.Image:
    """Line chart of (x, y) points by name; points that cannot be shown on a logarithmic axis are left out."""
    shown = {name: [(x, y) for x, y in points if y > 0 or not log] for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    canvas, (left, top, right, bottom) = Canvas(width, height), _MARGIN
    columns = max(1, int((width - 32) // (max(map(text_width, shown), default=0) + 32)))
    top += 18 * -(-len(shown) // columns)
    canvas.text(16, 12, title, 15)
    xs = [x for points in shown.values() for x, _ in points] or [0, 1]
    ys = [y for points in shown.values() for _, y in points] or [0.1, 1]
    low_x, high_x = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(0, max(ys) or 1)
    low, high = (math.log10(ticks[0]), math.log10(ticks[-1])) if log else (ticks[0], ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        value = math.log10(y) if log else y
        across = (x - low_x) / (high_x - low_x)
        up = (value - low) / (high - low)
        return left + across * (width - left - right), height - bottom - up * (height - top - bottom)

    for tick in ticks:
        y = place(low_x, tick)[1]
        canvas.line([(left, y), (width - right, y)], RULE)
        canvas.text(left - 8, y, f"{tick:g}", 11, MUTED, "rm")
    for tick in _ticks(low_x, high_x):
        if low_x <= tick <= high_x:
            canvas.text(place(tick, ticks[0])[0], height - bottom + 8, f"{tick:g}", 11, MUTED, "ma")
    canvas.text((left + width - right) / 2, height - 8, x_label, 11, MUTED, "mb")
    for number, (name, points) in enumerate(shown.items()):
        colour = COLOURS[number % len(COLOURS)]
        canvas.line([place(x, y) for x, y in points], colour, 2)
        for x, y in points:
            canvas.dot(*place(x, y), 2.5, colour)
        row, column = divmod(number, columns)
        x, y = 16 + column * (width - 32) / columns, 42 + 18 * row
        canvas.box(x, y - 5, x + 14, y - 2, colour)
        canvas.text(x + 20, y - 4, name, 11, INK, "lm")
    return canvas.done()


def bars(
    title: str,
    values: Mapping[str, tuple[float, float, float]],
    top_value: float | None = None,
    percent: bool = False,
    width: int = 560,
) -> Image.Image:
    """Horizontal bars of (value, low, high), with the interval from low to high as a line."""
    labels = max((text_width(name) for name in values), default=0) + 28
    row, top = 24, 44
    canvas = Canvas(width, top + row * len(values) + 14)
    canvas.text(16, 12, title, 15)
    highest = top_value or max((high for _, _, high in values.values()), default=1) or 1
    scale = (width - labels - 70) / highest
    for number, (name, (value, low, high)) in enumerate(values.items()):
        middle = top + row * number + row / 2
        canvas.text(labels - 10, middle, name, 12, INK, "rm")
        canvas.box(labels, middle - 8, labels + max(value * scale, 1), middle + 8, "#9cc3dd")
        canvas.line([(labels + low * scale, middle), (labels + high * scale, middle)], COLOURS[0], 2)
        text = f"{100 * value:.1f} %" if percent else f"{value:.3g}"
        canvas.text(labels + max(high, value) * scale + 8, middle, text, 12, INK, "lm")
    return canvas.done()


def heatmap(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], unit: str = ""
) -> Image.Image:
    """A table of numbers on colours from white (the least) to dark blue (the most); None is an empty cell."""
    known = [v for line in values for v in line if v is not None] or [0.0]
    low, high = min(known), max(known)
    side = max((text_width(name, 11) for name in rows), default=0) + 24
    step, high_cell, top = 50, 20, 92
    canvas = Canvas(round(side + step * len(columns) + 20), top + high_cell * len(rows) + 16)
    canvas.text(16, 12, title, 15)
    canvas.text(16, 36, f"{low:.3g} (white) to {high:.3g} (dark) {unit}".rstrip(), 11, MUTED)
    for number, name in enumerate(columns):
        # Long names take turns on two lines.
        canvas.text(side + step * (number + 0.5), 62 + 14 * (number % 2), name, 10, MUTED, "mm")
    for y, (name, line) in enumerate(zip(rows, values, strict=True)):
        canvas.text(side - 8, top + high_cell * (y + 0.5), name, 11, INK, "rm")
        for x, value in enumerate(line):
            if value is None:
                continue
            part = (value - low) / (high - low) if high > low else 0.0
            colour = tuple(round(255 + part * (c - 255)) for c in (8, 64, 129))
            left, above = side + step * x, top + high_cell * y
            canvas.box(left, above, left + step - 2, above + high_cell - 2, "#{:02x}{:02x}{:02x}".format(*colour))
            ink = PAPER if part > 0.55 else INK
            canvas.text(left + step / 2 - 1, above + high_cell / 2 - 1, f"{value:.3f}", 10, ink, "mm")
    return canvas.done()


def grid(
    pictures: Sequence[Sequence[np.ndarray]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    cell: int = 96,
) -> Image.Image:
    """Rows of pictures [H, W, 3] in 0..1 with names above the columns and before the rows."""
    side = max((text_width(name, 11) for name in row_names), default=0) + 24
    headings = [wrap(name, cell) for name in column_names]
    gap, top = 6, 14 + 15 * max((len(heading) for heading in headings), default=0)
    canvas = Canvas(round(side + (cell + gap) * len(column_names) + 10), top + (cell + gap) * len(row_names) + 6)
    for x, heading in enumerate(headings):
        for line, words in enumerate(reversed(heading)):
            canvas.text(side + (cell + gap) * x + cell / 2, top - 6 - 15 * line, words, 11, INK, "mb")
    for y, (name, line) in enumerate(zip(row_names, pictures, strict=True)):
        canvas.text(side - 10, top + (cell + gap) * y + cell / 2, name, 11, INK, "rm")
        for x, picture in enumerate(line):
            pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
            image = Image.fromarray(pixels).resize((cell * _SCALE, cell * _SCALE), Image.Resampling.BICUBIC)
            place = (round((side + (cell + gap) * x) * _SCALE), (top + (cell + gap) * y) * _SCALE)
            canvas.image.paste(image, place)
    return canvas.done()


def stack(pictures: Sequence[Image.Image], columns: int = 1) -> Image.Image:
    """Pictures below each other, or in rows of `columns`."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    sizes = [(sum(p.width for p in row), max(p.height for p in row)) for row in rows]
    sheet = Image.new("RGB", (max(w for w, _ in sizes), sum(h for _, h in sizes)), PAPER)
    y = 0
    for row, (_, height) in zip(rows, sizes, strict=True):
        x = 0
        for picture in row:
            sheet.paste(picture, (x, y))
            x += picture.width
        y += height
    return sheet


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers from below `low` to above `high`."""
    span = max(high - low, 1e-12)
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 6)
    first = math.floor(low / step + 1e-9)
    count = math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, count + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten around the values; powers of ten alone where they span more than two."""
    wide = math.log10(max(high, 1e-12) / max(low, 1e-12)) > 2
    factors = (1,) if wide else (1, 2, 5)
    ticks = [f * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for f in factors]
    start = max((i for i, tick in enumerate(ticks) if tick <= low), default=0)
    stop = next((i for i, tick in enumerate(ticks) if tick >= high), len(ticks) - 1)
    if start == stop:
        start, stop = max(0, start - 1), min(len(ticks) - 1, stop + 1)
    return ticks[start : stop + 1]
