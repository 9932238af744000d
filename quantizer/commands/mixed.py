"""`mixed`: give the most sensitive Linears of a ternary file two trit planes or 8 bits."""

import argparse
from collections import Counter
from pathlib import Path

from . import options
from .options import count, positive


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "mixed",
        help="give the most sensitive Linears of a ternary file two trit planes or 8 bits",
        description="Measure how much each ternary Linear alone costs the original in velocity error, and store those "
        "that cost most for their bytes as two trit planes (4.1 bits per weight) or int8, until the file has grown by "
        "--growth. Then `calibrate --like` the result, and `distill`: they fit the other Linears to these.",
    )
    parser.add_argument("start", type=Path, metavar="START", help="ternary .safetensors, from `round`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the file to write")
    parser.add_argument("--teacher", type=Path, required=True, metavar="DENSE", help="what START was made from")
    options.add_arguments(parser)
    options.add_file_arguments(parser)
    parser.add_argument("--growth", type=positive, default=0.25, help="of the file (default: %(default)s: a quarter)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=("planes", "int8"),
        default=("planes", "int8"),
        help="what they may become (default: both)",
    )
    parser.add_argument("--pictures", type=count, default=8, help="whose states are measured (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from ..calibration.sensitivity import choose, sensitivities, write_mixed
    from ..console import Bars
    from ..files.ternary import open_ternary
    from ..rounding.one_plane import METHODS

    file = open_ternary(args.start)
    if (method := file.metadata.get("ternary.method")) not in (None, *METHODS):
        raise ValueError(
            f"{args.start}: {method} fitted its Linears to each other, and one that gets better alone would make it "
            "worse; give the file of `round`, then calibrate --like the result"
        )
    with Bars() as bars:
        work = options.work_folder(args)
        shop = options.open_workshop(args, args.teacher, work, held_out=args.pictures, on_progress=bars.show)
        shop.check(args.output, args.force, args.start)
        show = shop.counter("measured layers", len(file.layers))
        measured = sensitivities(file, shop.teacher, shop.holdout, args.kinds, show)
    chosen = choose(measured, int(args.growth * args.start.stat().st_size))
    kinds = {name: result.kind for name, result in chosen.items()}
    write_mixed(args.output, file, shop.teacher.checkpoint, kinds, args.force)
    for result in sorted(chosen.values(), key=lambda result: -result.gain):
        print(f"  {result.name:<40} {result.kind:<6} alone costs {result.gain:.4f} less of the velocity error")
    counts = Counter(kinds.values())
    changed = f"{counts['planes']} in two trit planes, {counts['int8']} in 8 bits"
    print(f"{args.output}: of {len(file.layers)} Linears {changed}, {args.output.stat().st_size / 1e6:,.1f} MB")
    print(f"next: calibrate --like {args.output}, so that the ternary Linears are fitted to these")
