"""What commands share: numbers within bounds, names of models and outputs, and the arguments of a workspace."""

import argparse
import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..pictures import SIZES

DENSE = "FLUX.1 or FLUX.2: .safetensors or .gguf, or a folder of diffusers; 16 or 32 bits, fp8, int8 or GGUF"

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace

_DENSE = ("diffusion_models", "checkpoints", "diffusers")
_SUFFIXES = (".safetensors", ".sft")  # that ComfyUI lists
_OTHER_FORMATS = (".ckpt", ".pt", ".pt2", ".bin", ".pth", ".pkl", ".gguf", ".onnx", ".zip", ".json", ".html")


def count(text: str) -> int:
    """A whole number from 1."""
    return number(text, int, 1, "a whole number from 1 (a million at most)", 1_000_000)


def natural(text: str) -> int:
    """A whole number from 0."""
    return number(text, int, 0, "a whole number from 0 (a million at most)", 1_000_000)


def positive(text: str) -> float:
    """A number above 0."""
    return number(text, float, math.ulp(0.0), "a number above 0 (a billion at most)", 1e9)


def part(text: str) -> float:
    """A number above 0 and below 1."""
    return number(text, float, math.ulp(0.0), "a number above 0 and below 1", math.nextafter(1, 0))


def guidance(text: str) -> float:
    """A number from 0 to 1000."""
    return number(text, float, 0.0, "a number from 0 to 1000", 1e3)


def seed(text: str) -> int:
    """A whole number that a seed of torch can be made of."""
    return number(text, int, 0, "a whole number from 0 to 2,147,483,647", (1 << 31) - 1)


def number(text: str, kind: type, least: float, wanted: str, most: float = math.inf):
    """A number of this kind within bounds; what is not is refused as not being what is `wanted`."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (least <= value <= most and value < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return value


def model(text: str) -> Path:
    """A diffusion model: a path, or the name of a file in ComfyUI's model folders."""
    return _find(text, *_DENSE)


def text_encoder(text: str) -> Path:
    """As `model`, in ComfyUI's folders for text encoders."""
    return _find(text, "text_encoders")


def vae(text: str) -> Path:
    """As `model`, in ComfyUI's folders for VAEs."""
    return _find(text, "vae", "vae_approx")


def clip_vision(text: str) -> Path:
    """As `model`, in ComfyUI's folder for CLIP vision models."""
    return _find(text, "clip_vision")


def _find(text: str, *kinds: str) -> Path:
    from ..comfyui import find_model

    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give a file or a folder")
    return find_model(Path(text), *kinds)


def output(text: str) -> Path:
    """A file to write, with a suffix that ComfyUI lists: .safetensors is added where there is none."""
    path = Path(text)
    if not text.strip() or text.endswith(("/", os.sep)):
        raise argparse.ArgumentTypeError(f"{text or 'an empty name'}: give the name of a file to write")
    if path.suffix.lower() in _OTHER_FORMATS:
        raise argparse.ArgumentTypeError(f"{text}: the file will be in safetensors format; call it .safetensors")
    if path.suffix.lower() in _SUFFIXES or path.exists() or not path.name:
        return path  # of what exists the checks say more
    return path.with_name(f"{path.name}.safetensors")


def add_output(parser: argparse.ArgumentParser, ending: str, metavar: str = "OUT") -> None:
    """`-o`, and `--force`; without it the file is called after the first argument, with `ending`, and lies where
    ComfyUI finds it.
    """
    default = f"(default: in ComfyUI's diffusion_models, the input's name and {ending})"
    parser.add_argument("-o", "--output", type=output, metavar=metavar, help=f"the .safetensors to write {default}")
    parser.add_argument("--force", action="store_true", help=f"replace {metavar} if it exists")
    parser.set_defaults(ending=ending)


def choose_output(args: argparse.Namespace, source: Path) -> Path:
    """`-o`, or a file named after `source` in ComfyUI's folder; ValueError where there is neither."""
    from ..comfyui import output_folder
    from ..files.advice import model_name

    if args.output is None:
        folder = output_folder()
        if folder is None:
            raise ValueError("give -o OUT, the file to write (ComfyUI's folder of models was not found)")
        args.output = folder / f"{model_name(source)}{args.ending}.safetensors"
    return args.output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conditioning", type=Path, required=True, metavar="COND", help="prompts, from `embed`")
    parser.add_argument("--size", default=SIZES, help="picture sizes in pixels: WxH,... (default: %(default)s)")
    parser.add_argument("--sampler-steps", type=count, help="of the original's pictures (default: the model's own)")
    parser.add_argument("--guidance", type=guidance, nargs="+", help="values for models with a guidance embedding")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    parser.add_argument("--seed", type=seed, default=0, help="of noise and choices by chance (default: %(default)s)")


def add_freeze_dense(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--freeze-dense", action="store_true", help="leave the layers that are not ternary as they are")


def add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, help="folder for what is kept between runs (default: OUT.work)")


def add_packing(parser: argparse.ArgumentParser, default: str | None = "planes32") -> None:
    shown = "as START" if default is None else default
    parser.add_argument(
        "--packing",
        choices=("planes32", "base3"),
        default=default,
        help=f"planes32: 2 bits a weight, loads without conversion; base3: 1.6 bits, for sharing (default: {shown})",
    )


@contextlib.contextmanager
def open_workspace(
    args: argparse.Namespace, dense: Path, target: Path | None, sources: Iterable[Path] = (), **fields
) -> Iterator["Workspace"]:
    """The workspace for these arguments, checked, and held together with `target` against other runs.

    `sources`: further inputs. `fields`: further ones of the workspace. A work folder in which nothing was kept is
    removed.
    """
    from .. import ranks
    from ..files.locks import hold
    from ..files.work_folder import check_work_folder
    from ..pictures.sampler import parse_sizes
    from ..pipeline.workspace import Workspace, choose_device

    folder = args.work or (args.output / "work" if target is None else target.with_name(f"{target.name}.work"))
    work = Workspace(
        dense,
        args.conditioning,
        folder,
        parse_sizes(args.size),
        sampler_steps=args.sampler_steps,
        guidance=None if args.guidance is None else tuple(args.guidance),
        seed=args.seed,
        device=choose_device(args.device),
        **fields,
    )
    work.check(target, target is None or args.force, *sources)
    check_work_folder(folder)
    if target is not None and Path(os.path.realpath(target)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{target} would lie in the work folder {folder}; choose another place for one of them")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as held:
            with ranks.first_alone():
                for place in (folder, *filter(None, [target])) if ranks.first() else ():
                    held.enter_context(hold(place))
            yield work
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def note_on_source(work: "Workspace") -> str:
    """What a user should know of the original before hours are spent on it; "" where there is nothing."""
    from ..files.checkpoint import open_checkpoint
    from ..pictures.sampler import default_steps

    notes = []
    if lossy := open_checkpoint(work.dense).lossy:
        notes.append(f"the original is decoded from {lossy}; one in 16 bits would be a better teacher")
    if work.arch.version == 1 and not work.arch.guidance and work.sampler_steps is None:
        notes.append(
            f"this FLUX.1 has no guidance embedding: its pictures are sampled in {default_steps(work.arch)} steps, "
            "which is right for schnell; give --sampler-steps 20 or more for a de-distilled model"
        )
    return "; ".join(notes)
