"""Charts and picture grids of reports, drawn with matplotlib on figures of their own (no pyplot, no window).

Every function draws on axes or a figure that it is given, so that one picture can hold several.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogFormatter

# Okabe and Ito's colours, which stay apart for all kinds of colour vision, dark enough for lines on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#000000", "#7a5195", "#8a8a8a", "#5d4037")
_BLUES = LinearSegmentedColormap.from_list("white to blue", ["#ffffff", "#084081"])
_DPI = 160
_CHARACTER = 0.075  # width in inches, about, of the text of labels


def figure(width: float = 5.6, height: float = 3.4) -> Figure:
    """An empty figure of that many inches, whose parts make room for each other."""
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def png(drawn: Figure) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()


def lines(
    axes: Axes, title: str, x_label: str, series: Mapping[str, Sequence[tuple[float, float]]], log: bool = False
) -> None:
    """Lines through (x, y) points by name; points that cannot be shown on a logarithmic axis are left out."""
    shown = {name: [(x, y) for x, y in points if y > 0 or not log] for name, points in series.items()}
    shown = {name: points for name, points in shown.items() if points}
    for number, (name, points) in enumerate(shown.items()):
        axes.plot(
            *zip(*points, strict=True), marker="o", markersize=3, color=COLOURS[number % len(COLOURS)], label=name
        )
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_xlabel(x_label)
    axes.grid(color="#d9dde3", linewidth=0.6)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
    else:
        axes.set_ylim(bottom=0)
    if shown:
        for text in axes.legend(fontsize="x-small").get_texts():
            text.set_parse_math(False)


def bars(
    axes: Axes,
    title: str,
    values: Mapping[str, tuple[float, float, float]],
    *,
    top: float | None = None,
    percent: bool = False,
) -> None:
    """Horizontal bars of (value, low, high), the first on top, with the interval from low to high as a line."""
    middles = np.array([value for value, _, _ in values.values()])
    spread = np.array([(value - low, high - value) for value, low, high in values.values()]).T
    drawn = axes.barh(range(len(values)), middles, xerr=spread, color="#9cc3dd", ecolor=COLOURS[0])
    axes.bar_label(drawn, [f"{100 * v:.1f} %" if percent else f"{v:.3g}" for v in middles], padding=4, fontsize="small")
    axes.set_yticks(range(len(values)), list(values), fontsize="small", parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * (top or max(high for _, _, high in values.values())))
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])


def heatmap(
    axes: Axes,
    title: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
) -> None:
    """A table of numbers on colours from white (the least) to dark blue (the most); None is an empty cell."""
    table = np.ma.masked_invalid(np.array([[np.nan if v is None else v for v in line] for line in values], float))
    image = axes.imshow(table, cmap=_BLUES, aspect="auto")
    middle = (table.min() + table.max()) / 2 if table.count() else 0.0
    for (row, column), value in np.ndenumerate(table.filled(np.nan)):
        if not np.isnan(value):
            ink = "white" if value > middle else "black"
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize="xx-small", color=ink)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize="x-small", parse_math=False)
    axes.set_yticks(range(len(rows)), rows, fontsize="x-small", parse_math=False)
    axes.set_title(title, loc="left", fontsize="medium")
    axes.figure.colorbar(image, ax=axes, fraction=0.05)


def grid(
    drawn: Figure | SubFigure,
    pictures: Sequence[Sequence[np.ndarray]],
    row_names: Sequence[str],
    column_names: Sequence[str],
) -> None:
    """Rows of pictures [H, W, 3] in 0..1 with names above the columns and before the rows."""
    cells = drawn.subplots(len(row_names), len(column_names), squeeze=False)
    width = drawn.bbox.width / drawn.dpi / (len(column_names) + 1)
    letters = max(8, int(width / _CHARACTER))
    for name, line, row in zip(row_names, pictures, cells, strict=True):
        for picture, axes in zip(line, row, strict=True):
            axes.imshow(np.clip(picture, 0, 1))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        label = textwrap.fill(name, letters)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize="x-small", parse_math=False)
    for name, axes in zip(column_names, cells[0], strict=True):
        axes.set_title(textwrap.fill(name, letters), fontsize="x-small", parse_math=False)
