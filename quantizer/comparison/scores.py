"""What is measured on the pictures of a comparison, and what other programs said of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.inputs import check_regular, read_json
from ..pictures.detail import detail
from ..pictures.similarity import LEAST_SIDE, ms_ssim, psnr, ssim
from . import velocities
from .gallery import AGAIN, ORIGINAL, TERNARY, Gallery
from .statistics import Finding, compare

_LEAST_DETAIL = 1e-6  # of a picture without any
Embed = Callable[[Tensor], Tensor]  # picture [3, H, W] -> vector


@dataclass(frozen=True)
class Metric:
    """How a number is called, and what it says; `logarithm` where its values are ratios, averaged as logarithms."""

    title: str
    meaning: str
    form: str = ".3f"
    logarithm: bool = False


METRICS = {
    "psnr": Metric("PSNR, dB", "to the original's picture; 58.9 where all pixels are the same", ".1f"),
    "ssim": Metric("SSIM", "to the original's picture; 1 where all pixels are the same"),
    "ms_ssim": Metric("MS-SSIM", f"the same on five scales, for pictures of {LEAST_SIDE} pixels and more"),
    "detail": Metric("fine detail", "energy above a quarter cycle per pixel, relative to the original's", ".2f", True),
    "cosine": Metric("CLIP-I", "cosine of image embeddings with the original's picture"),
    "velocity": Metric("velocity error", "squared, relative to the original's velocities on its own path", ".3g"),
}


def pair(ours: Tensor, theirs: Tensor, embed: Embed | None = None) -> dict[str, float]:
    """The metrics of a picture [3, H, W] in 0..1 beside the original's."""
    found = {"psnr": psnr(ours, theirs), "ssim": ssim(ours, theirs)}
    if min(ours.shape[1:]) >= LEAST_SIDE:
        found["ms_ssim"] = ms_ssim(ours, theirs)
    energies = detail(torch.stack((ours, theirs))).clamp_min(_LEAST_DETAIL).log()
    found["detail"] = float(energies[0] - energies[1])
    if embed is not None:
        found["cosine"] = float(torch.cosine_similarity(embed(ours), embed(theirs), dim=0))
    return found


def measure_pictures(
    gallery: Gallery, first_seed: int, embed: Embed | None, on_progress: Callable[[int], object]
) -> list[dict]:
    """A row for each prompt and seed: its pictures' files and their metrics; `again` is None beyond the first seed.

    A metric of ratios is kept as a logarithm.
    """
    rows = []
    for prompt, seed in gallery.places():
        theirs = gallery.read_picture(ORIGINAL, prompt, seed)
        row = {"prompt": gallery.prompts[prompt]["prompt"], "number": prompt, "seed": first_seed + seed}
        row["original"] = {"file": gallery.relative(gallery.picture(ORIGINAL, prompt, seed))}
        for model in (TERNARY, AGAIN):
            row[model] = None
            if model == TERNARY or seed == 0:
                metrics = pair(gallery.read_picture(model, prompt, seed), theirs, embed)
                row[model] = {"file": gallery.relative(gallery.picture(model, prompt, seed))} | metrics
        rows.append(row)
        on_progress(1)
    return rows


def findings(
    rows: Sequence[Mapping], paths: Mapping[str, Sequence[velocities.Sums]], judged: Mapping[str, Mapping[str, float]]
) -> dict[str, Finding]:
    """Metric -> what it says, of `measure_pictures`, of the sums of both models' paths, and of other programs' scores
    by file, whose difference from the original's picture counts.
    """
    found = {}
    for name in METRICS:
        if name == "velocity":
            ours, again = ([[velocities.error(path)] for path in paths[model]] for model in (TERNARY, AGAIN))
        else:
            ours, again = (
                _by_prompt(rows, model, lambda _, one, name=name: one.get(name)) for model in (TERNARY, AGAIN)
            )
        if ours and None not in ours[0]:
            found[name] = compare(ours, again, math.exp if METRICS[name].logarithm else float)
    for name, scores in judged.items():

        def difference(row, one, scores=scores):
            return scores[one["file"]] - scores[row["original"]["file"]]

        found[name] = compare(_by_prompt(rows, TERNARY, difference), _by_prompt(rows, AGAIN, difference))
    return found


def _by_prompt(rows: Sequence[Mapping], model: str, value: Callable) -> list[list[float]]:
    """Values by prompt and seed."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row[model] is not None:
            found.setdefault(row["number"], []).append(value(row, row[model]))
    return list(found.values())


def read_scores(folder: Path, rows: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Scorer -> file -> score, of the files `scores-NAME.json`. ValueError where one misses a picture."""
    files = [one["file"] for row in rows for one in (row[m] for m in (ORIGINAL, TERNARY, AGAIN)) if one is not None]
    found = {}
    for path in sorted(folder.glob("scores-*.json")):
        scores = read_json(path, dict)
        for file in files:
            value = scores.get(file)
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{path}: there is no score of {file}; let the scorer run again, or delete the file")
        found[path.stem.removeprefix("scores-")] = {file: float(scores[file]) for file in files}
    return found


def image_embedder(path: Path) -> Embed:
    """Image embeddings of a file that ComfyUI's "Load CLIP Vision" reads. ValueError for files of another kind."""
    import comfy.clip_vision

    check_regular(path, "a CLIP vision file")
    try:
        encoder = comfy.clip_vision.load(str(path))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: ComfyUI cannot load this as a CLIP vision model: {reason}") from error
    if encoder is None:
        raise ValueError(f"{path}: ComfyUI does not know this CLIP vision model; give one of models/clip_vision")
    return embedder(encoder)


def embedder(encoder) -> Embed:
    """The embeddings of a loaded CLIP vision model of ComfyUI."""

    @torch.inference_mode()
    def embed(picture: Tensor) -> Tensor:
        return encoder.encode_image(picture.movedim(0, -1)[None])["image_embeds"][0].float().flatten().cpu()

    return embed
