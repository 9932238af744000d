"""`compare`: pictures of a ternary model beside its original's, in ComfyUI, with what can be said of them."""

import argparse
from pathlib import Path

from . import options
from .options import count, guidance, seed

EXAMPLE = (
    "flux1-dev.safetensors flux1-dev-1.58bit.safetensors --prompts prompts.txt --vae ae.safetensors "
    "--text-encoders t5xxl_fp16.safetensors clip_l.safetensors --seeds 4 -o comparison"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compare",
        description="Let the original, the original with another implementation of attention, and the ternary model "
        "paint the same prompts from the same noise with ComfyUI's sampler and VAE, and write a page with the "
        "pictures, PSNR, SSIM, MS-SSIM, fine detail and velocity errors, with intervals and the noise floor. The "
        "pictures lie in GenEval's folders.",
    )
    parser.add_argument("original", type=options.model, metavar="ORIGINAL", help=options.DENSE)
    parser.add_argument("ternary", type=options.model, metavar="TERNARY", help="ternary .safetensors made of it")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="a prompt in each line, GenEval's .jsonl, or a .safetensors of `embed`",
    )
    parser.add_argument(
        "--text-encoders",
        type=options.text_encoder,
        nargs="+",
        default=[],
        metavar="FILE",
        help="FLUX.1: T5-XXL and CLIP-L; FLUX.2: the one Mistral or Qwen3 file; not with prompts of `embed`",
    )
    parser.add_argument("--vae", type=options.vae, required=True, help="the model's VAE")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where all of it is written")
    parser.add_argument("--force", action="store_true", help="remove another comparison that is there")
    parser.add_argument(
        "--seeds", type=count, default=4, metavar="N", help="pictures of a prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="the first one (default: %(default)s)")
    parser.add_argument("--count", type=count, metavar="N", help="take only the first N prompts")
    parser.add_argument("--size", default="1024x1024", help="of the pictures, in pixels (default: %(default)s)")
    parser.add_argument("--sampler-steps", type=count, help="(default: the model's own)")
    parser.add_argument(
        "--guidance", type=guidance, help="of models with a guidance embedding (default: ComfyUI's 3.5)"
    )
    parser.add_argument(
        "--velocities",
        type=count,
        default=16,
        metavar="N",
        help="prompts to measure velocities on (default: %(default)s)",
    )
    parser.add_argument(
        "--clip-vision", type=options.clip_vision, metavar="FILE", help="measure the cosine of its image embeddings too"
    )
    parser.set_defaults(interrupted="give the same command again to go on")


def run(args: argparse.Namespace) -> None:
    from ..comparison.page import metric, shown
    from ..comparison.prompts import is_encoded, read_prompts
    from ..comparison.run import PAGE, Inputs, Settings, compare
    from ..console import Bars, say
    from ..files.checkpoint import open_checkpoint
    from ..files.ternary import open_ternary
    from ..pictures.sampler import parse_sizes

    sizes = parse_sizes(args.size)
    if len(sizes) > 1:
        raise ValueError(f"--size {args.size}: give one size")
    encoded = is_encoded(args.prompts)
    if encoded == bool(args.text_encoders):
        raise ValueError(
            f"{args.prompts} is encoded already; leave out --text-encoders"
            if encoded
            else "give the model's --text-encoders, or a .safetensors of `embed` as --prompts"
        )
    inputs = Inputs(
        open_checkpoint(args.original),
        open_ternary(args.ternary),
        read_prompts(args.prompts, args.count),
        args.vae,
        args.prompts if encoded else None,
        tuple(args.text_encoders),
        args.clip_vision,
    )
    settings = Settings(sizes[0], args.seeds, args.seed, args.sampler_steps, args.guidance, args.velocities)
    with Bars() as bars:
        found = compare(inputs, args.output, settings, overwrite=args.force, on_progress=bars.show)
    for name, finding in found.items():
        title, form = metric(name).title, metric(name).form
        floor = f"original against itself {shown(finding.floor, form)}"
        say(f"{title}: {shown(finding.ternary, form)}; {floor}; {finding.verdict}")
    say(str(args.output / PAGE))
