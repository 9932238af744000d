"""`convert`: from a dense checkpoint to a distilled ternary file in one command."""

import argparse
from pathlib import Path

from . import options
from .options import natural, positive


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="round, calibrate and distill a checkpoint in one go",
        description="Convert a FLUX checkpoint to 1.58-bit weights: round, let the original paint from the prompts of "
        "the conditioning file, calibrate on what it computed, then distill until the time is used up. Nothing but the "
        "checkpoint and the prompts is needed. An interrupted run goes on when the same command is given again.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help=options.DENSE)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the ternary file to write")
    options.add_arguments(parser)
    parser.add_argument(
        "--budget", type=positive, metavar="MINUTES", help="time for all of it (default: 15 for small models, else 240)"
    )
    parser.add_argument("--rank", type=natural, default=0, help="add low-rank factors to every Linear (default: none)")
    parser.add_argument(
        "--codes",
        choices=("auto", "train", "freeze"),
        default="auto",
        help="train the ternary codes too, where memory allows it (default: %(default)s)",
    )
    parser.add_argument(
        "--growth",
        type=positive,
        default=0.0,
        help="part by which the file may grow for the most sensitive Linears in two terms or 8 bits (default: none)",
    )
    parser.add_argument("--packing", choices=("planes32", "base3"), default="planes32", help="(default: %(default)s)")
    options.add_file_arguments(parser)
    parser.set_defaults(interrupted="give the same command again to go on")


def run(args: argparse.Namespace) -> None:
    from ..console import Bars
    from ..pipeline.convert import Run, expectation

    folder = options.work_folder(args)
    with Bars() as bars:
        work = options.open_workspace(args, args.source, folder, on_progress=bars.show)
        codes = {"auto": None, "train": True, "freeze": False}[args.codes]
        if note := options.note_on_source(work):
            bars.say(note)
        whole = Run(
            work,
            args.output,
            args.budget,
            rank=args.rank,
            codes=codes,
            packing=args.packing,
            growth=args.growth,
            overwrite=args.force,
            on_message=bars.say,
        )
        stages = whole.run()
    print(expectation(stages))
    print(f"{args.output} written; {folder} can be deleted")
