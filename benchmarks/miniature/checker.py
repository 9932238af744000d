"""An exact check of a picture against its caption: no neural scorer, only colours, connected regions and outlines.

Thresholds come from ground-truth renders, never from generated pictures, with room for the blur of the autoencoder.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from .scenes import BACKGROUND, COLOURS, PALETTE, RELATIONS, SHAPES, Prompt, distance, parse

_RGB = np.array([PALETTE[colour] for colour in COLOURS], np.float32) / 255
_FOREGROUND = 0.25  # a pixel belongs to an object where a channel differs this much from the background
_SMALLEST = 0.006  # of the picture's area: 25 pixels of 64 x 64; smaller specks are ignored
_COLOUR = 0.3  # Euclidean RGB distance to the named colour
_OVERLAP = 0.65  # intersection over union with the best outline
_GRID = 32


@dataclass(frozen=True)
class Found:
    shape: str | None
    colour: str | None
    x: float
    y: float


@dataclass(frozen=True)
class Result:
    correct: bool
    found: tuple[Found, ...]
    reason: str

    def __bool__(self) -> bool:
        return self.correct


@cache
def _outlines() -> np.ndarray:
    """Masks [shape, 32, 32] of the five shapes, each stretched to its own bounding box."""
    steps = np.linspace(-1, 1, 401)
    x, y = np.meshgrid(steps, steps)
    masks = []
    for shape in SHAPES:
        inside = distance(shape, x, y) <= 0
        masks.append(_to_grid(inside.astype(np.float32), inside))
    return np.stack(masks) > 0.5


def _to_grid(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The bounding box of the mask, sampled linearly at 32 x 32 cell centres."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cells = (np.arange(_GRID) + 0.5) / _GRID
    ys = rows[0] - 0.5 + cells * (rows[-1] - rows[0] + 1)
    xs = columns[0] - 0.5 + cells * (columns[-1] - columns[0] + 1)
    return ndimage.map_coordinates(values, np.meshgrid(ys, xs, indexing="ij"), order=1, mode="nearest")


def find(image: np.ndarray) -> tuple[Found, ...]:
    """The objects of a picture [H, W, 3] in 0..1, with centres in units of its sides."""
    difference = np.asarray(image, np.float32) - BACKGROUND
    regions, count = ndimage.label(abs(difference).max(-1) > _FOREGROUND)
    height, width = regions.shape
    things = []
    for index in range(1, count + 1):
        region = regions == index
        if region.sum() < _SMALLEST * height * width:
            continue
        # The colour is the median of the pixels far from the background: borders are mixtures.
        strength = np.linalg.norm(difference, axis=-1)
        core = region & (strength >= np.quantile(strength[region], 0.5))
        colour = np.median(difference[core], 0)
        errors = np.linalg.norm(_RGB - BACKGROUND - colour, axis=-1)
        name = COLOURS[errors.argmin()] if errors.min() < _COLOUR else None
        cover = np.clip(difference @ colour / (colour @ colour), 0, 1) * ndimage.binary_dilation(region, iterations=1)
        solid = cover > 0.5
        grid = _to_grid(cover, solid) > 0.5
        outlines = _outlines()
        overlap = (grid & outlines).sum((1, 2)) / (grid | outlines).sum((1, 2))
        shape = SHAPES[overlap.argmax()] if overlap.max() > _OVERLAP else None
        y, x = ndimage.center_of_mass(solid)
        things.append(Found(shape, name, (x + 0.5) / width, (y + 0.5) / height))
    return tuple(things)


def check(image: np.ndarray, prompt: str | Prompt) -> Result:
    """Whether a picture [H, W, 3] in 0..1 shows exactly what the caption names and nothing else."""
    prompt = parse(prompt) if isinstance(prompt, str) else prompt
    found = find(image)
    if len(found) != len(prompt.things):
        return Result(False, found, f"{len(found)} objects instead of {len(prompt.things)}")
    orders = (found, found[::-1]) if len(found) == 2 else (found,)
    reasons = [_mismatch(order, prompt) for order in orders]
    correct = "" in reasons
    return Result(correct, found, "" if correct else reasons[0])


def _mismatch(found: tuple[Found, ...], prompt: Prompt) -> str:
    """Why the objects, in this order, are not the prompt's; empty if they are."""
    for thing, wanted in zip(found, prompt.things, strict=True):
        if thing.shape != wanted.shape:
            return f"{thing.shape or 'no known shape'} instead of {wanted.shape}"
        if wanted.colour and thing.colour != wanted.colour:
            return f"{thing.colour or 'no known colour'} instead of {wanted.colour}"
    if prompt.relation:
        dx, dy = found[0].x - found[1].x, found[0].y - found[1].y
        main, other = (dx, dy) if RELATIONS[prompt.relation][0] else (dy, dx)
        if main * sum(RELATIONS[prompt.relation]) <= abs(other):
            return f"not {prompt.relation}"
    return ""
