"""What commands share: numbers within bounds, and the arguments that describe a workspace."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

DENSE = "FLUX.1 or FLUX.2: .safetensors or .gguf, or a folder of diffusers; 16 or 32 bits, fp8, int8 or GGUF"

if TYPE_CHECKING:
    from ..pipeline.workspace import Workspace


def count(text: str) -> int:
    """A whole number from 1."""
    return _number(text, int, 1, "a whole number from 1")


def natural(text: str) -> int:
    """A whole number from 0."""
    return _number(text, int, 0, "a whole number from 0")


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, float, math.ulp(0.0), "a number above 0")


def _number(text: str, kind: type, least: float, wanted: str):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conditioning", type=Path, required=True, metavar="COND", help="prompts, from `embed`")
    parser.add_argument("--size", default="1024x1024", help="picture sizes in pixels: WxH,... (default: %(default)s)")
    parser.add_argument("--sampler-steps", type=count, help="of the original's pictures (default: the model's own)")
    parser.add_argument("--guidance", type=float, nargs="+", help="values for models with a guidance embedding")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    parser.add_argument("--seed", type=int, default=0)


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that write a file OUT."""
    parser.add_argument("--work", type=Path, help="folder for what is kept between runs (default: OUT.work)")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def work_folder(args: argparse.Namespace) -> Path:
    return args.work or args.output.with_name(args.output.name + ".work")


def open_workspace(args: argparse.Namespace, dense: Path, folder: Path, **fields) -> "Workspace":
    """The workspace for these arguments; `fields` are further ones of it."""
    from ..pictures.sampler import parse_sizes
    from ..pipeline.workspace import Workspace, choose_device

    return Workspace(
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
