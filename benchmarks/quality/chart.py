"""The picture of the quality benchmark: example pictures, accuracy, velocity error by timestep."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ...quantizer.pictures.quality import BINS
from ...quantizer.report import charts
from .peer import PEERS

# Stages before a row that is shown, and other quantizers: everyone can tell ten colours apart, no more.
_WITHOUT_LINE = ("calibrated, rank 16", "mixed, calibrated", *PEERS)


def draw(rows: Sequence[dict], pictures: Mapping[str, np.ndarray], prompts: Sequence[str]) -> Figure:
    """`pictures`: name -> [6, H, W, 3] for the six prompts, in the order of the rows."""
    names = [row["name"] for row in rows]
    height = 1.2 * len(names) + 0.6
    sheet = charts.figure(1.2 * (len(prompts) + 2), height + 4)
    halves = sheet.add_gridspec(2, 1, height_ratios=[height, 4])
    above, below = sheet.add_subfigure(halves[0]), sheet.add_subfigure(halves[1])
    charts.grid(above, [list(pictures[name]) for name in names], names, list(prompts))
    left, right = below.subplots(1, 2)
    charts.bars(
        left,
        "Right pictures (95 % interval)",
        {row["name"]: tuple(row["accuracy"]["overall"]) for row in rows},
        top=1.0,
        percent=True,
    )
    series = {
        row["name"]: [((i + 0.5) / BINS, e) for i, e in enumerate(row["velocity"]["by_timestep"]) if e]
        for row in rows
        if row["velocity"]["error"] > 0 and row["name"] not in _WITHOUT_LINE
    }
    charts.lines(right, "Velocity error by timestep (1: noise)", "t", series, log=True)
    return sheet
