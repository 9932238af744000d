"""`mixed`: give the most sensitive Linears of a ternary file two trit planes or 8 bits."""

import argparse
from collections import Counter
from pathlib import Path

from . import workshop


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "mixed",
        help="give the most sensitive Linears of a ternary file two trit planes or 8 bits",
        description="Measure how much each ternary Linear costs in velocity error and store those that cost most for "
        "their bytes as two trit planes (4.1 bits per weight) or int8, until the file has grown by --growth. "
        "`distill` goes on from the result.",
    )
    parser.add_argument("start", type=Path, metavar="START", help="ternary .safetensors, from `calibrate` or `distill`")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the file to write")
    parser.add_argument("--teacher", type=Path, required=True, metavar="DENSE", help="what START was made from")
    workshop.add_arguments(parser)
    workshop.add_file_arguments(parser)
    parser.add_argument("--growth", type=float, default=0.25, help="of the file (default: %(default)s: a quarter)")
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=("planes", "int8"),
        default=("planes", "int8"),
        help="what they may become (default: both)",
    )
    parser.add_argument("--pictures", type=int, default=8, help="whose states are measured (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from ..atomic import check_target
    from ..bars import Bars
    from ..format import open_ternary
    from ..mixed import choose, sensitivities, write_mixed

    check_target(args.output, 0, args.force)
    file = open_ternary(args.start)
    with Bars() as bars:
        shop = workshop.open_workshop(args, args.teacher, workshop.work_folder(args), held_out=args.pictures)
        batches, checkpoint = shop.holdout, shop.teacher.checkpoint
        shop.release_teacher()
        done = 0

        def count(layers: int) -> None:
            nonlocal done
            done += layers
            bars.show("measured layers", done, len(file.layers))

        measured = sensitivities(file, checkpoint, batches, shop.device, args.kinds, count)
    chosen = choose(measured, int(args.growth * args.start.stat().st_size))
    write_mixed(args.output, file, checkpoint, {name: result.kind for name, result in chosen.items()}, args.force)
    for result in sorted(chosen.values(), key=lambda result: -result.gain):
        print(f"  {result.name:<40} {result.kind:<6} velocity error falls by {result.gain:.4f}")
    counts = Counter(result.kind for result in chosen.values())
    kinds = f"{counts['planes']} in two trit planes, {counts['int8']} in 8 bits"
    size = args.output.stat().st_size
    print(f"{args.output}: of {len(file.layers)} Linears {kinds}, {size / 1e6:,.1f} MB")
