"""`embed`: encode prompts once, so that no later stage needs a text encoder."""

import argparse
from pathlib import Path

from . import options
from .options import count

EXAMPLE = "--text-encoders t5xxl_fp16.safetensors clip_l.safetensors -o prompts.safetensors"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "embed",
        description="Encode prompts with the text encoders of the model that will be converted, as ComfyUI does, and "
        "write the conditioning file that `calibrate`, `distill` and `convert` take. ComfyUI is found through "
        "COMFYUI_PATH, or is the one this pack is installed in.",
    )
    parser.add_argument(
        "--text-encoders",
        type=options.text_encoder,
        nargs="+",
        required=True,
        metavar="FILE",
        help="FLUX.1: T5-XXL and CLIP-L; FLUX.2: the one Mistral or Qwen3 file (.safetensors)",
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt in each line (default: this pack's own list)"
    )
    parser.add_argument("--count", type=count, metavar="N", help="take only the first N prompts")
    parser.add_argument(
        "-o", "--output", type=options.output, required=True, metavar="COND", help="the .safetensors to write"
    )
    parser.add_argument("--force", action="store_true", help="replace COND if it exists")


def run(args: argparse.Namespace) -> None:
    from ..console import progress, say
    from ..files.atomic import check_target, in_bytes
    from ..files.inputs import read_text
    from ..files.locks import hold
    from ..pictures.encode import PROMPTS, embed

    source = args.prompts or PROMPTS
    check_target(args.output, 0, args.force, [*args.text_encoders, source])
    lines = read_text(source, "a text file with a prompt in each line").split("\n")
    prompts = [line.strip() for line in lines if line.strip()][: args.count]
    if not prompts:
        raise ValueError(f"{source}: there are no prompts; put one in each line")
    with hold(args.output), progress(len(prompts), "encoding prompts", " prompts") as bar:
        tokens, channels, pooled = embed(
            prompts, args.text_encoders, args.output, overwrite=args.force, on_progress=bar.update
        )
    size = in_bytes(args.output.stat().st_size)
    vector = f" and a vector of {pooled}" if pooled else ""
    say(f"{args.output}: {len(prompts)} prompts of {tokens} tokens x {channels}{vector}, {size}")
