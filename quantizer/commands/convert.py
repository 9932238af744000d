"""`convert`: from a dense checkpoint to a distilled ternary file in one command."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="round, calibrate and distill a checkpoint in one go",
        description="Convert a FLUX checkpoint to 1.58-bit weights: round, let the original paint from the prompts of "
        "the conditioning file, calibrate on what it computed, then distill until the time is used up. Nothing but the "
        "checkpoint and the prompts is needed. An interrupted run goes on when the same command is given again.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help="dense FLUX.1 or FLUX.2 checkpoint, .safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the ternary file to write")
    parser.add_argument("--conditioning", type=Path, required=True, metavar="COND", help="prompts, from `embed`")
    parser.add_argument("--size", default="1024x1024", help="picture sizes in pixels: WxH,... (default: %(default)s)")
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="time for everything (default: 15 for small models, else 240)"
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    parser.add_argument("--rank", type=int, default=0, help="add low-rank factors to every Linear (default: none)")
    parser.add_argument(
        "--codes",
        choices=("auto", "train", "freeze"),
        default="auto",
        help="train the ternary codes too, where memory allows it (default: %(default)s)",
    )
    parser.add_argument("--packing", choices=("planes32", "base3"), default="planes32", help="(default: %(default)s)")
    parser.add_argument("--sampler-steps", type=int, help="of the original's pictures (default: the model's own)")
    parser.add_argument("--work", type=Path, help="folder for what is kept between runs (default: OUT.work)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(interrupted="give the same command again to go on")


def run(args: argparse.Namespace) -> None:
    from ..bars import Bars
    from ..convert import Conversion, expectation
    from ..pipeline import Workshop, choose_device
    from ..trajectories import parse_sizes

    work = args.work or args.output.with_name(args.output.name + ".work")
    with Bars() as bars:
        shop = Workshop(
            args.source,
            args.conditioning,
            work,
            parse_sizes(args.size),
            sampler_steps=args.sampler_steps,
            seed=args.seed,
            device=choose_device(args.device),
            on_progress=bars.show,
        )
        codes = {"auto": None, "train": True, "freeze": False}[args.codes]
        conversion = Conversion(
            shop, args.output, args.budget, args.rank, codes, args.packing, args.force, say=bars.say
        )
        stages = conversion.run()
    print(expectation(stages))
    print(f"{args.output} written; {work} can be deleted")
