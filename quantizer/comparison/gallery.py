"""The folder of a comparison: where each picture and each measurement lies.

original/00000/metadata.jsonl           GenEval's folders, one for each prompt
original/00000/samples/0000.png         the pictures of its seeds
original.json                           {prompt: file}, of the first seed
again/..., ternary/...                  the same of the original with another attention, and of the ternary model
pictures.json, summary.json, index.html what was measured
work/                                   paths of the sampler and velocities on them, until all is done
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files.atomic import atomic_file, write_json
from ..files.checkpoint import digest
from ..files.inputs import read_json
from ..files.work_folder import keep_settings

ORIGINAL, AGAIN, TERNARY = MODELS = ("original", "again", "ternary")
PAGE = "index.html"
_FORMAT = "ternary_flux_comparison_v1"


class Gallery:
    """The pictures of some prompts and seeds, and what is measured on them."""

    def __init__(self, folder: Path, prompts: Sequence[dict], seeds: int):
        self.folder, self.prompts, self.seeds = folder, prompts, seeds

    @classmethod
    def open(cls, folder: Path, prompts: Sequence[dict], seeds: int, settings: dict, overwrite: bool) -> "Gallery":
        """A new comparison, or one with the same settings to go on with; with `overwrite` another one is removed.

        ValueError where the folder holds one with other settings, FileExistsError where it holds something else.
        """
        gallery = cls(folder, prompts, seeds)
        if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()):
            if not _is_comparison(folder):
                raise FileExistsError(f"{folder} is not empty, and no comparison; give another folder")
            if overwrite:
                gallery.clear()
        texts = digest(json.dumps(list(prompts)).encode())
        kept = {"format": _FORMAT, "prompts": texts, "seeds": seeds} | settings
        keep_settings(folder, kept, "give another folder, or --force to remove what is there")
        return gallery

    def clear(self) -> None:
        """Remove everything that a comparison writes, and nothing else."""
        for name in (*MODELS, "work"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (*(f"{model}.json" for model in MODELS), "pictures.json", "summary.json", PAGE, "settings.json"):
            (self.folder / name).unlink(missing_ok=True)

    def places(self, seeds: int | None = None) -> Iterator[tuple[int, int]]:
        """(prompt, seed) of every picture, or of those of the first seeds."""
        return ((prompt, seed) for prompt in range(len(self.prompts)) for seed in range(seeds or self.seeds))

    def picture(self, model: str, prompt: int, seed: int) -> Path:
        return self.folder / model / f"{prompt:05}" / "samples" / f"{seed:04}.png"

    def path(self, prompt: int) -> Path:
        """The states on the way to the original's picture, with its velocities."""
        return self.folder / "work" / "paths" / f"{prompt:05}.safetensors"

    def velocities(self, model: str, prompt: int) -> Path:
        """What a model's velocities are there."""
        return self.folder / "work" / model / f"{prompt:05}.json"

    def relative(self, path: Path) -> str:
        """A path as it is written in the folder's files: from the folder, with slashes."""
        return path.relative_to(self.folder).as_posix()

    def write_picture(self, model: str, prompt: int, seed: int, picture: np.ndarray) -> None:
        """Keep a picture uint8 [H, W, 3]."""
        from PIL import Image

        place = self.picture(model, prompt, seed)
        place.parent.mkdir(parents=True, exist_ok=True)
        metadata = place.parents[1] / "metadata.jsonl"
        if not metadata.exists():
            with atomic_file(metadata, overwrite=True) as file:
                file.write((json.dumps(self.prompts[prompt], ensure_ascii=False) + "\n").encode())
        with atomic_file(place, overwrite=True) as file:
            Image.fromarray(picture).save(file, format="png")

    def read_picture(self, model: str, prompt: int, seed: int) -> Tensor:
        """A picture fp32 [3, H, W] in 0..1. ValueError where it is damaged."""
        from PIL import Image

        place = self.picture(model, prompt, seed)
        try:
            with Image.open(place) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{place} cannot be read ({error}); delete it, and give the command again") from None
        return torch.from_numpy(pixels.astype(np.float32) / 255).movedim(2, 0).contiguous()

    def write_maps(self) -> None:
        """{prompt: file} of each model's pictures of the first seed; of prompts that come twice, the first."""
        for model in MODELS:
            rows = reversed(list(enumerate(self.prompts)))
            files = {row["prompt"]: self.relative(self.picture(model, number, 0)) for number, row in rows}
            write_json(self.folder / f"{model}.json", dict(reversed(files.items())))


def _is_comparison(folder: Path) -> bool:
    settings = folder / "settings.json"
    return settings.is_file() and read_json(settings, dict, remedy="give another folder").get("format") == _FORMAT
