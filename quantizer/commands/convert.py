"""`convert`: from a dense checkpoint to a distilled ternary file in one command."""

import argparse

from . import options
from .options import count, natural, positive

EXAMPLE = "flux1-dev.safetensors --conditioning prompts.safetensors --budget 240 -o flux1-dev-1.58bit.safetensors"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="round, calibrate and distill a checkpoint in one go",
        description="Convert a FLUX checkpoint to 1.58-bit weights: round, let the original paint from the prompts of "
        "the conditioning file, calibrate on what it computed, then distill until the time is used up. Nothing but the "
        "checkpoint and the prompts is needed. An interrupted run goes on when the same command is given again.",
    )
    parser.add_argument("source", type=options.model, metavar="IN", help=options.DENSE)
    options.add_output(parser, "-1.58bit")
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
    fixed = "in the place of what the budget pays for"
    parser.add_argument("--pictures", type=count, help=f"that the original paints, {fixed}")
    parser.add_argument("--calibration-states", type=count, metavar="STATES", help=f"noisy states, {fixed}")
    parser.add_argument("--steps", type=count, help=f"of training, {fixed}; repeatable with all three")
    options.add_packing(parser)
    options.add_work(parser)
    parser.add_argument(
        "--progress",
        choices=("bars", "json"),
        default="bars",
        help="json: an object in each line of stdout, for programs (default: %(default)s)",
    )
    parser.set_defaults(interrupted="give the same command again to go on", shared=True)


def run(args: argparse.Namespace) -> None:
    from ..console import Bars, Events
    from ..pipeline.convert import Amounts, Run, expectation

    target = options.choose_output(args, args.source)
    report = Events() if args.progress == "json" else Bars()
    with report, options.open_workspace(args, args.source, target, on_progress=report.show) as work:
        codes = {"auto": None, "train": True, "freeze": False}[args.codes]
        if note := options.note_on_source(work):
            report.say(note)
        whole = Run(
            work,
            target,
            args.budget,
            rank=args.rank,
            codes=codes,
            packing=args.packing,
            growth=args.growth,
            amounts=Amounts(args.pictures, args.calibration_states, args.steps),
            overwrite=args.force,
            on_message=report.say,
        )
        stages = whole.run()
    report.say(*expectation(stages).splitlines(), f"{target} written; {work.folder} can be deleted")
