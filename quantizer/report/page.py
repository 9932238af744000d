"""report.html: what a conversion did to a model, in pictures first and numbers second, as one self-contained page."""

import base64
import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.atomic import atomic_file, check_target
from ..files.checkpoint import Checkpoint
from ..files.summary import sizes
from ..files.ternary import TernaryFile, open_ternary
from ..model.flux import Inputs
from ..model.student import load_student
from ..pictures.kinds import KINDS
from ..pictures.quality import BINS, HeldOut, Quality, measure
from ..pictures.sampler import noise_levels, sample
from ..pictures.trajectories import Picture, initial_noise
from ..pipeline.workspace import Workspace
from . import charts
from .decoders import Decode, preview
from .statistics import stated_statistics

PAGE = "report.html"
_SEEN = "seen-"
_STATISTICS = {  # what calibration saw that is drawn
    "crest": "Crest of the inputs: largest to RMS within a token",
    "spread": "Spread of channels within a group: largest to median",
    "largest_two": "Share of the two strongest channels in the power",
    "int8_noise": "Noise of int8 activations to the variance of outputs",
}
_CHARTS = ("pictures", "velocity", "detail", "divergence")  # and one of weights for each stage
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1100px; margin: 2rem auto; }
body { padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; }
td, th { padding: .35rem .9rem; border-bottom: 1px solid #d9dde3; text-align: right; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
.wide { overflow-x: auto; } p.note { color: #667080; }
"""


@dataclass(frozen=True)
class Measured:
    """One ternary file against its teacher."""

    name: str
    path: Path
    quality: Quality
    divergence: list[float]  # relative distance of its own trajectory from the teacher's after each step
    latents: Tensor  # its pictures [B, C, H, W]
    bits: float  # per weight of its ternary Linears, scales and factors included
    errors: dict[str, float]  # ternary Linear -> relative error of its weight
    statistics: dict[str, dict[str, float]]  # ternary Linear -> what calibration saw of it, as its file says


def report(
    work: Workspace,
    files: Mapping[str, Path],
    folder: Path,
    *,
    pictures: int = 4,
    held_out: int = 16,
    decode: Decode | None = None,
    overwrite: bool = False,
) -> Path:
    """Compare ternary files (by name, in the order of the stages) with their teacher; returns the page's path.

    Writes report.html and its charts as PNG. `pictures` are shown; quality is measured at states of `held_out`.
    `decode` makes pictures of latents; without it their colours are a projection of the latent channels. ValueError for
    names that are no part of a file name, and OSError where something of the report is there already and `overwrite` is
    false, both before anything is computed.
    """
    check_report(folder, files, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = work.trajectories.plan("holdout", pictures)
    chosen = [picture for picture in chosen if picture.shape == chosen[0].shape]
    theirs = _trajectory(work.teacher, work, chosen)
    held = work.hold_out(held_out)
    measured = [_measure(work, held, name, path, theirs=theirs, pictures=chosen) for name, path in files.items()]
    images = _charts(work, chosen, theirs[-1], measured, decode or preview(theirs[-1]))
    for name, image in images.items():
        with atomic_file(folder / f"{name}.png", overwrite=overwrite) as file:
            file.write(image)
    path = folder / PAGE
    with atomic_file(path, overwrite=overwrite) as file:
        file.write(_page(work, measured, images, decode is None).encode("utf-8", "backslashreplace"))
    return path


def check_report(folder: Path, names: Iterable[str], overwrite: bool = False) -> None:
    """Raises ValueError or OSError where a report on stages of these names cannot be written to the folder."""
    slugs: dict[str, str] = {}
    for name in names:
        if not name.strip() or len(name) > 60 or re.search(r'[/\\:*?"<>|]', name) or not name.isprintable():
            raise ValueError(f"{name!r} is no name for a stage: it becomes part of a file name; give another NAME=FILE")
        if (other := slugs.setdefault(_slug(name).casefold(), name)) != name:
            raise ValueError(f"the stages {other!r} and {name!r} have the same file name; give another NAME=FILE")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the name of a folder")
    if folder.is_dir():
        seen = (f"{_SEEN}{name.replace('_', '-')}" for name in _STATISTICS)
        for name in (PAGE, *(f"{chart}.png" for chart in (*_CHARTS, *seen, *map(_slug, slugs.values())))):
            check_target(folder / name, 0, overwrite)


def _slug(name: str) -> str:
    return f"weights-{name.replace(' ', '-')}"


def _measure(
    work: Workspace,
    held_out: HeldOut,
    name: str,
    path: Path,
    *,
    theirs: Sequence[Tensor],
    pictures: Sequence[Picture],
) -> Measured:
    file = open_ternary(path)
    model = load_student(file, work.device).requires_grad_(False)
    ours = _trajectory(_on_device(model, work.device), work, pictures)
    # Both start from the same noise: the first state differs by nothing.
    divergence = [float((a - b).norm() / b.norm()) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    quality = measure(model, held_out)
    return Measured(
        name,
        path,
        quality,
        divergence,
        ours[-1],
        sizes(file).bits_per_quantized_weight,
        weight_errors(file, work.teacher.checkpoint),
        stated_statistics(file),
    )


def _on_device(model, device: torch.device):
    def velocity(*inputs: Tensor | None) -> Tensor:
        with torch.no_grad():
            return model(*Inputs(*inputs).to(device)).cpu()

    return velocity


def _trajectory(velocity, work: Workspace, pictures: Sequence[Picture]) -> list[Tensor]:
    """The latents of some pictures before every step, and at the end."""
    trajectories = work.trajectories
    levels = noise_levels(trajectories.steps, trajectories.shift)
    conditions = trajectories.conditions(pictures)
    steps = sample(lambda *inputs: velocity(*inputs).cpu(), initial_noise(pictures), levels, work.arch, conditions)
    return [latent.clone() for _, latent, _ in steps]


def weight_errors(file: TernaryFile, teacher: Checkpoint) -> dict[str, float]:
    """Relative error of every ternary Linear's weight, |W - W'| / |W|."""
    errors = {}
    for name in file.layers:
        dense = teacher.tensor(f"{name}.weight").float()
        errors[name] = float((file.weight(name).dequantize() - dense).norm() / dense.norm().clamp_min(1e-30))
    return errors


def _charts(
    work: Workspace, pictures: Sequence[Picture], theirs: Tensor, measured: Sequence[Measured], decode: Decode
) -> dict[str, bytes]:
    """Name -> PNG."""
    columns = [decode(theirs)] + [decode(m.latents) for m in measured]
    rows = [list(row) for row in zip(*columns, strict=True)]
    prompts = [_short(work.conditioning.prompts[picture.prompt]) for picture in pictures]
    by_time = {m.name: _points(m.quality.by_timestep) for m in measured}
    details = {m.name: _points(m.quality.detail_by_timestep) for m in measured}
    apart = {m.name: [(i + 1, d) for i, d in enumerate(m.divergence)] for m in measured}
    sheet = charts.figure(1.6 * (len(columns) + 1), 1.6 * len(rows) + 0.4)
    charts.grid(sheet, rows, prompts, ["original", *(m.name for m in measured)])
    velocity, detail, divergence = charts.figure(), charts.figure(), charts.figure()
    charts.lines(velocity.subplots(), "Velocity error by timestep", "t (0: picture, 1: noise)", by_time, log=True)
    axes = detail.subplots()
    charts.lines(axes, "Fine detail, relative to the original's", "t (0: picture, 1: noise)", details)
    axes.axhline(1, color="#8a8a8a", linewidth=0.8)
    charts.lines(divergence.subplots(), "Distance from the original's trajectory", "sampler step", apart)
    figures = {"pictures": sheet, "velocity": velocity, "detail": detail, "divergence": divergence}
    for m in measured:
        figures[_slug(m.name)] = _map(work, f"Relative weight error after {m.name}", m.errors)
    if seen := next((m.statistics for m in measured if m.statistics), None):
        for name, title in _STATISTICS.items():
            values = {layer: found[name] for layer, found in seen.items() if name in found}
            figures[f"{_SEEN}{name.replace('_', '-')}"] = _map(work, title, values)
    return {name: charts.png(drawn) for name, drawn in figures.items()}


def _map(work: Workspace, title: str, values: Mapping[str, float]) -> charts.Figure:
    """A number for every Linear: blocks down, Linears across."""
    blocks = list(work.arch.block_names)
    names = list(dict.fromkeys(name for block in blocks for name in work.arch.block_linears(block)))
    table = [[values.get(f"{block}.{name}") for name in names] for block in blocks]
    labels = [block.replace("_blocks.", " ") for block in blocks]
    heat = charts.figure(0.5 * len(names) + 2, 0.2 * len(blocks) + 1.6)
    charts.heatmap(heat.subplots(), title, rows=labels, columns=names, values=table)
    return heat


def _points(values: Sequence[float | None]) -> list[tuple[float, float]]:
    """The middles of timestep ranges, with the values there are."""
    return [((i + 0.5) / BINS, value) for i, value in enumerate(values) if value is not None]


def _short(prompt: str, length: int = 36) -> str:
    return prompt if len(prompt) <= length else f"{prompt[: length - 1]}…"


def _page(work: Workspace, measured: Sequence[Measured], images: Mapping[str, bytes], previews: bool) -> str:
    def figure(name: str, text: str) -> str:
        data = base64.b64encode(images[name]).decode()
        return f'<div class="wide"><img alt="{html.escape(text)}" src="data:image/png;base64,{data}"></div>'

    dense = work.teacher.checkpoint.nbytes
    kinds = [kind for kind in KINDS if any(kind in m.quality.by_kind for m in measured)]
    kinds = kinds if len(kinds) > 1 else []

    def line(m: Measured) -> str:
        quality, size = m.quality, os.path.getsize(m.path)
        cells = [f"{quality.error:.4f}", *(f"{quality.by_kind[kind]:.4f}" for kind in kinds), f"{quality.detail:.2f}"]
        cells += [f"{m.divergence[-1]:.3f}", f"{quality.response:.2f}", f"{quality.alignment:.2f}", f"{m.bits:.2f}"]
        cells += [f"{size / 1e6:,.1f} MB", f"{dense / size:.1f}"]
        return _row(html.escape(m.name), *cells)

    dense_bits = f"{_dense_bits(work):.0f}"
    original = ["0", *("0" for _ in kinds), "1", "0", "1", "1", dense_bits, f"{dense / 1e6:,.1f} MB", "1"]
    rows = _row("original", *original) + "".join(map(line, measured))
    head = ["stage", "velocity error", *(f"of {kind}" for kind in kinds), "fine detail", "divergence"]
    head += ["response to prompts", "its alignment", "bits per weight", "size", "times smaller"]
    kind = "Latents in false colours (give --vae for pictures)" if previews else "Pictures"
    maps = "".join(figure(name, name) for name in images if name.startswith("weights-"))
    seen = "".join(figure(name, name) for name in images if name.startswith(_SEEN))
    seen = f"<h2>What calibration saw</h2>{seen}" if seen else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Ternary {html.escape(work.arch.name)}</title><style>{_STYLE}</style>
<h1>{html.escape(work.dense.name)} with 1.58-bit weights</h1>
<p>{kind} of held-out prompts, from the same noise: the original, then every stage.</p>
{figure("pictures", "pictures of the original and of every stage")}
<h2>In numbers</h2>
<div class="wide"><table>{_row(*head, cell="th")}{rows}</table></div>
<p class="note">Velocity error: squared, relative to the original's velocities, on its own trajectories; also over
prompts with lettering and with counting, where quantized models fail first. Fine detail: energy of high frequencies
in the pictures that the velocities lead to, relative to the original's; a model that blurs is below 1. Divergence:
distance of the finished latents from the original's, relative to their length, when each model paints on its own.
Response: how much another prompt changes the velocities, relative to the original, and the cosine of both changes.
Bits count the ternary layers with their scales and low-rank factors.</p>
<h2>Where the error is in time</h2>
{figure("velocity", "velocity error by timestep")}
{figure("detail", "fine detail by timestep")}
{figure("divergence", "divergence by sampler step")}
<h2>Where the weights changed</h2>
<p>Training moves weights away from the original's on purpose: compare maps, not stages, with this number.</p>
{maps}
{seen}
</html>
"""


def _row(*cells: str, cell: str = "td") -> str:
    return f"<tr>{''.join(f'<{cell}>{text}</{cell}>' for text in cells)}</tr>"


def _dense_bits(work: Workspace) -> float:
    name = f"{work.arch.linears[0]}.weight"
    return work.teacher.checkpoint.bits(name)
