"""Pictures of numbers, as ComfyUI's IMAGE: float32 [1, H, W, 3] in 0..1."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER, _GRID, _LINE, _NONE = "#222222", "#ffffff", "#d8d8d8", "#1f6fb2", "#eeeeee"
_COLD, _HOT = np.array((246, 239, 200)), np.array((178, 24, 43))  # small and large errors


def curve(values: Sequence[float], title: str, axis: str) -> torch.Tensor:
    """Values from the left to the right, from zero to the largest, 768 x 448."""
    width, height, left, top, right, bottom = 768, 448, 96, 56, 24, 64
    picture, draw = _canvas(width, height)
    font, small = ImageFont.load_default(22), ImageFont.load_default(16)
    draw.text((left, 16), title, _INK, font)
    draw.text((left, height - 30), axis, _INK, small)
    most = max(*values, 1e-12)
    columns, rows = width - left - right, height - top - bottom
    for part in range(5):
        y = top + rows * (4 - part) / 4
        draw.line((left, y, width - right, y), _GRID)
        draw.text((left - 8, y), f"{most * part / 4:.3g}", _INK, small, "rm")
    points = [
        (left + columns * (i + 0.5) / len(values), top + rows * (1 - value / most)) for i, value in enumerate(values)
    ]
    draw.line(points, _LINE, 3, "curve")
    for x, y in points:
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), _LINE)
    for i in range(0, len(values), max(1, len(values) // 10)):
        draw.text((points[i][0], top + rows + 6), str(i + 1), _INK, small, "mt")
    return _image(picture)


def layer_map(errors: Mapping[str, float], title: str) -> torch.Tensor:
    """One cell for each Linear, by name: a row for each kind, a column for each block; darker is larger."""
    cells = {name: _place(name) for name in errors}
    kinds = sorted({kind for kind, _ in cells.values()})
    blocks = sorted({block for _, block in cells.values()})
    cell = max(16, min(48, 1200 // max(len(blocks), 1)))
    left, top = 250, 84
    picture, draw = _canvas(left + cell * max(len(blocks), 8) + 24, top + cell * len(kinds) + 64)
    font, small = ImageFont.load_default(22), ImageFont.load_default(14)
    draw.text((16, 12), title, _INK, font)
    if not errors:
        draw.text((16, 48), "the file states no errors", _INK, small)
        return _image(picture)
    least, most = min(errors.values()), max(errors.values())
    draw.text((16, 48), f"{least:.4g} (light) to {most:.4g} (dark)", _INK, small)
    for row, kind in enumerate(kinds):
        draw.text((left - 10, top + cell * (row + 0.5)), kind, _INK, small, "rm")
        draw.rectangle((left, top + cell * row, left + cell * len(blocks) - 1, top + cell * (row + 1) - 2), _NONE)
    for name, (kind, block) in cells.items():
        x, y = left + cell * blocks.index(block), top + cell * kinds.index(kind)
        share = (errors[name] - least) / max(most - least, 1e-12)
        draw.rectangle(
            (x, y, x + cell - 2, y + cell - 2), tuple(int(c) for c in (_COLD + share * (_HOT - _COLD)).round())
        )
    for column, (group, number) in enumerate(blocks):
        if not number or number % max(1, len(blocks) // 12) == 0:
            label = f"{group[0]}{number}"
            draw.text((left + cell * (column + 0.5), top + cell * len(kinds) + 6), label, _INK, small, "mt")
    draw.text((left, top + cell * len(kinds) + 32), "blocks: d double, s single", _INK, small)
    return _image(picture)


def _place(name: str) -> tuple[str, tuple[str, int]]:
    """Kind of a Linear, and its block: `double_blocks.3.img_attn.qkv` is `double img_attn.qkv` in block 3."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return name, ("", 0)
    i = numbers[0]
    group = parts[i - 1].removesuffix("_blocks") if i else ""
    return f"{group} {'.'.join(parts[i + 1 :])}", (group, int(parts[i]))


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    picture = Image.new("RGB", (int(width), int(height)), _PAPER)
    return picture, ImageDraw.Draw(picture)


def _image(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)[None]
