"""`mixed`: give the most sensitive Linears of a ternary file two ternary terms or 8 bits."""

import argparse
from collections import Counter

from . import options
from .options import count

EXAMPLE = (
    "flux1-dev-rounded.safetensors --teacher flux1-dev.safetensors --conditioning prompts.safetensors "
    "--growth 0.25 -o flux1-dev-mixed.safetensors"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "mixed",
        description="Measure how much each ternary Linear alone costs the original in velocity error, and store those "
        "that cost most for their bytes as two ternary terms (4.1 bits per weight) or int8, until the file has grown "
        "by --growth. Then `calibrate --like` the result, and `distill`: they fit the other Linears to these.",
    )
    parser.add_argument("start", type=options.model, metavar="START", help="ternary .safetensors, from `round`")
    options.add_output(parser, "-mixed")
    parser.add_argument(
        "--teacher",
        type=options.model,
        required=True,
        metavar="DENSE",
        help=f"what START was made from; {options.DENSE}",
    )
    options.add_arguments(parser)
    options.add_work(parser)
    parser.add_argument(
        "--growth", type=options.part, default=0.25, help="of the file (default: %(default)s: a quarter)"
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("two-terms", "int8"),
        default=("two-terms", "int8"),
        help="what they may become (default: both)",
    )
    parser.set_defaults(interrupted="give the same command again to go on")
    parser.add_argument("--pictures", type=count, default=8, help="whose states are measured (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from ..calibration.sensitivity import best_upgrades, sensitivities, write_mixed
    from ..console import Bars, say
    from ..files.atomic import in_bytes
    from ..files.checkpoint import open_checkpoint
    from ..files.ternary import check_original, open_ternary
    from ..rounding.one_term import METHODS

    file = open_ternary(args.start)
    if (method := file.metadata.get("ternary.method")) not in (None, *METHODS):
        raise ValueError(
            f"{args.start}: {method} fitted its Linears to each other, and one that gets better alone would make it "
            "worse; give the file of `round`, then calibrate --like the result"
        )
    check_original(file, open_checkpoint(args.teacher))
    target = options.choose_output(args, args.start)
    opened = options.open_workspace
    with Bars() as bars, opened(args, args.teacher, target, [args.start], on_progress=bars.show) as work:
        show = work.counter("measured layers", len(file.layers))
        batches = work.hold_out(args.pictures).batches
        measured = sensitivities(file, work.teacher, batches, precisions=args.precisions, on_layer=show)
        chosen = best_upgrades(measured, int(args.growth * args.start.stat().st_size))
        if not chosen:
            raise ValueError(f"no Linear gains within --growth {args.growth:g}: give more, or take START as it is")
        precisions = {name: result.precision for name, result in chosen.items()}
        write_mixed(target, file, work.teacher.checkpoint, precisions, overwrite=args.force)
    for result in sorted(chosen.values(), key=lambda result: -result.gain):
        say(f"  {result.name:<40} {result.precision:<9} alone costs {result.gain:.4f} less of the velocity error")
    counts = Counter(precisions.values())
    changed = f"{counts['two-terms']} in two ternary terms, {counts['int8']} in 8 bits"
    say(
        f"{target}: of {len(file.layers)} Linears {changed}, {in_bytes(target.stat().st_size)}",
        f"next: calibrate --like {target}, so that the ternary Linears are fitted to these",
    )
