"""A comparison from start to end: the original paints, paints again, the ternary model paints, all is measured.

One model is in memory at a time, and one picture. What is painted and measured is kept, so that a run goes on where it
was stopped.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..comfyui import import_comfyui
from ..files.architecture import Architecture
from ..files.atomic import atomic_file, check_space, write_json
from ..files.checkpoint import Checkpoint, digest, fingerprint
from ..files.container import save
from ..files.inputs import read_json
from ..files.locks import hold
from ..files.ternary import TernaryFile, check_original
from ..files.work_folder import open_kept
from ..pictures import conditioning, encode
from ..pictures.sampler import default_steps, latent_shape
from ..report.decoders import load_vae
from . import painter, scores, velocities
from .gallery import AGAIN, ORIGINAL, PAGE, TERNARY, Gallery
from .page import page
from .statistics import Finding

Progress = Callable[[str, int, int], object]  # (what, done, total)


@dataclass(frozen=True)
class Settings:
    """How a comparison paints.

    seeds        pictures of each prompt; their noise is that of the seeds `seed`, `seed` + 1, ... in ComfyUI
    steps        of the sampler; None: 4 for schnell and klein, else 20
    guidance     for models with a guidance embedding; None: ComfyUI's 3.5
    velocities   prompts whose first picture's path velocities are measured on
    """

    size: tuple[int, int] = (1024, 1024)
    seeds: int = 4
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    velocities: int = 16


@dataclass(frozen=True)
class Inputs:
    """What is compared: `prompts` as `read_prompts` gives them, and their conditioning file or their text encoders."""

    original: Checkpoint
    ternary: TernaryFile
    prompts: list[dict]
    vae: Path
    conditioning: Path | None = None
    text_encoders: tuple[Path, ...] = ()
    clip_vision: Path | None = None


def compare(
    inputs: Inputs, folder: Path, settings: Settings, *, overwrite: bool = False, on_progress: Progress
) -> dict[str, Finding]:
    """Compare a ternary model with its original in ComfyUI; returns what each metric says.

    Writes the folder that `gallery` describes. A folder with another comparison is refused unless `overwrite`; one with
    this comparison is gone on with, and scores of other programs that lie in it (`scores.read_scores`) are taken in.
    Raises ValueError and OSError, before anything is painted where the inputs do not fit each other.
    """
    arch = inputs.original.architecture
    check_original(inputs.ternary, inputs.original)
    latent_shape(arch, settings.size)
    steps = settings.steps or default_steps(arch)
    import_comfyui()
    vae = load_vae(inputs.vae, arch)
    embed = scores.image_embedder(inputs.clip_vision) if inputs.clip_vision else None
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; give the name of a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        new = not (folder / "settings.json").exists()
        kept = asdict(settings) | {"steps": steps} | _identities(inputs)
        gallery = Gallery.open(folder, inputs.prompts, settings.seeds, kept, overwrite)
        progress = _Counter(on_progress)
        try:
            encoded = _conditioning(inputs, gallery, arch, progress)
        except BaseException:
            if new:  # the settings were never used, and others may follow
                gallery.clear()
            raise
        run = _Run(inputs, gallery, encoded, vae, settings, steps)
        return _evaluate(run, run.paint(progress), embed, progress)


class _Counter:
    """Counts what is done of a stage, and shows it."""

    def __init__(self, show: Progress):
        self.show = show

    def start(self, what: str, total: int) -> Callable[..., object]:
        done = 0

        def count(more: int = 1) -> None:
            nonlocal done
            done += more
            self.show(what, done, total)

        return count


def _identities(inputs: Inputs) -> dict[str, str]:
    """What tells these inputs from others: of large files the header and the size."""

    def of(path: Path) -> str:
        with open(path, "rb") as file:
            return digest(str(path.stat().st_size).encode(), file.read(1 << 20))

    encoders = [of(path) for path in (*([inputs.conditioning] if inputs.conditioning else ()), *inputs.text_encoders)]
    return {
        "original": fingerprint(inputs.original),
        "ternary": inputs.ternary.fingerprint,
        "vae": of(inputs.vae),
        "conditioning": digest(*(encoder.encode() for encoder in encoders)),
    }


def _conditioning(
    inputs: Inputs, gallery: Gallery, arch: Architecture, progress: _Counter
) -> conditioning.Conditioning:
    """The prompts' encodings, in the order of the gallery's prompts."""
    file = inputs.conditioning
    texts = [row["prompt"] for row in gallery.prompts]
    if file is None:
        file = gallery.folder / "work" / "prompts.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            encode.embed(texts, inputs.text_encoders, file, on_progress=progress.start("encoding prompts", len(texts)))
            painter.release()
    encoded = conditioning.read(file, arch)
    if list(encoded.prompts[: len(texts)]) != texts:
        raise ValueError(f"{file} holds other prompts; give --text-encoders, or the file itself as --prompts")
    return encoded


class _Run:
    """What all painters have in common, and what each of them adds to the gallery."""

    def __init__(
        self, inputs: Inputs, gallery: Gallery, encoded: conditioning.Conditioning, vae, settings: Settings, steps: int
    ):
        self.inputs, self.gallery, self.encoded, self.vae = inputs, gallery, encoded, vae
        self.settings, self.steps = settings, steps
        self.shape = latent_shape(inputs.original.architecture, settings.size)
        self.measured = range(min(settings.velocities, len(gallery.prompts)))

    def paint(self, progress: _Counter) -> tuple[str, str]:
        """Paint and measure what is not there yet; returns the names of the original's attention and of the other."""
        attention, paths = self.gallery.folder / "work" / "attention.json", self.gallery.folder / "work" / "paths"
        numbers = sum(map(self._path_needed, self.measured)) * 3 * self.steps * math.prod(self.shape)
        check_space(self.gallery.folder, 4 * numbers, "velocities on the original's paths take")
        if self._missing(ORIGINAL) or self._missing(AGAIN) or not attention.exists():
            write_json(attention, self._paint_original(progress))
            painter.release()
        if self._missing(TERNARY):
            self._add(TERNARY, self._painter(painter.load_ternary(self.inputs.ternary.path)), progress)
            painter.release()
        shutil.rmtree(paths, ignore_errors=True)
        own, other = read_json(attention, list)
        return own, other

    def _paint_original(self, progress: _Counter) -> tuple[str, str]:
        model = painter.load_original(self.inputs.original)
        again, own, other = painter.with_other_attention(model)
        self._add_original(self._painter(model), progress)
        self._add(AGAIN, self._painter(again), progress)
        return own, other

    def _painter(self, model) -> painter.Painter:
        more = self.steps, self.settings.guidance
        return painter.Painter(model, self.vae, self.encoded, self.shape, *more)

    def _swapped(self, prompt: int) -> int:
        return (prompt + 1) % len(self.gallery.prompts)

    def _places(self, model: str) -> list[tuple[int, int]]:
        return list(self.gallery.places(1 if model == AGAIN else None))

    def _missing(self, model: str) -> bool:
        """Whether pictures of a model, or what is measured of it, are not there yet."""
        measured = self.measured
        if model == ORIGINAL:
            kept = [self.gallery.path(prompt) for prompt in measured if self._path_needed(prompt)]
        else:
            kept = [self.gallery.velocities(model, prompt) for prompt in measured]
        pictures = (self.gallery.picture(model, *place) for place in self._places(model))
        return not all(path.exists() for path in (*pictures, *kept))

    def _path_needed(self, prompt: int) -> bool:
        """Whether a model's velocities are still to be measured on the original's path."""
        return not all(self.gallery.velocities(model, prompt).exists() for model in (AGAIN, TERNARY))

    def _add_original(self, model: painter.Painter, progress: _Counter) -> None:
        gallery, places = self.gallery, self._places(ORIGINAL)
        count = progress.start("pictures of the original", len(places))
        for prompt, seed in places:
            kept = gallery.path(prompt) if seed == 0 and prompt in self.measured and self._path_needed(prompt) else None
            if not gallery.picture(ORIGINAL, prompt, seed).exists() or (kept and not kept.exists()):
                picture, path = model.paint(prompt, self.settings.seed + seed)
                if kept:
                    states = painter.states_of(path)
                    if len(gallery.prompts) > 1:
                        states["swapped"] = model.velocities(self._swapped(prompt), path)
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    save(kept, states, overwrite=True)
                gallery.write_picture(ORIGINAL, prompt, seed, picture)
            count()

    def _add(self, name: str, model: painter.Painter, progress: _Counter) -> None:
        gallery, places = self.gallery, self._places(name)
        what = {AGAIN: "the original again", TERNARY: "the ternary model"}[name]
        count = progress.start(f"pictures of {what}", len(places))
        for place in places:
            if not gallery.picture(name, *place).exists():
                picture, _ = model.paint(place[0], self.settings.seed + place[1])
                gallery.write_picture(name, *place, picture)
            count()
        count = progress.start(f"velocities of {what}", self.measured.stop)
        for prompt in self.measured:
            target = gallery.velocities(name, prompt)
            if not target.exists():
                file = open_kept(gallery.path(prompt))
                states = {key: file.tensor(key).clone() for key in file.entries}
                path, swapped = painter.path_of(states), None
                if "swapped" in states:
                    swapped = model.velocities(self._swapped(prompt), path)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_json(target, velocities.sums(states, model.velocities(prompt, path), swapped))
            count()


def _evaluate(
    run: _Run, attention: tuple[str, str], embed: scores.Embed | None, progress: _Counter
) -> dict[str, Finding]:
    """Measure the pictures, and write what was found."""
    gallery, settings, inputs = run.gallery, run.settings, run.inputs
    count = progress.start("measuring pictures", len(list(gallery.places())))
    rows = scores.measure_pictures(gallery, settings.seed, embed, count)
    paths = {
        model: [read_json(gallery.velocities(model, prompt), dict) for prompt in run.measured]
        for model in (TERNARY, AGAIN)
    }
    judged = scores.read_scores(gallery.folder, rows)
    found = scores.findings(rows, paths, judged)
    steps = {model: velocities.by_sigma(sums) for model, sums in paths.items()}
    names = {
        ORIGINAL: inputs.original.name,
        TERNARY: inputs.ternary.path.name,
        AGAIN: f"the original, {attention[1]} attention",
    }
    width, height = settings.size
    seeds = "seed" if settings.seeds == 1 else "seeds"
    about = [
        f"{len(gallery.prompts)} prompts, {settings.seeds} {seeds} from {settings.seed} on, {width} x {height} pixels, "
        f"{run.steps} steps of ComfyUI's euler sampler, every model from the same noise.",
        f"Attention is ComfyUI's {attention[0]}.",
        f"Velocities are measured on the paths to the first pictures of {run.measured.stop} prompts.",
    ]
    summary = {name: asdict(finding) | {"verdict": finding.verdict} for name, finding in found.items()}
    gallery.write_maps()
    write_json(gallery.folder / "pictures.json", rows)
    write_json(gallery.folder / "summary.json", {"about": about, "names": names, "metrics": summary, "steps": steps})
    text = page(names=names, about=about, size=settings.size, findings=found, steps=steps, rows=rows)
    with atomic_file(gallery.folder / PAGE, overwrite=True) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return found
