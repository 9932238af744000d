"""`pack`: a ternary file in the other packing."""

import argparse

from . import options

EXAMPLE = "flux1-dev-1.58bit.safetensors --packing base3 -o flux1-dev-1.58bit-base3.safetensors"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "pack",
        description="Write a ternary file with its weights in another packing: base3 (1.6 bits) to share it, planes32 "
        "(2 bits) to load it fast. The weights are the same, bit for bit, in both directions.",
    )
    parser.add_argument("source", type=options.model, metavar="FILE", help="ternary .safetensors")
    parser.add_argument(
        "--packing", choices=("planes32", "base3"), required=True, help="2 bits a weight to load, or 1.6 to share"
    )
    options.add_output(parser, "-packed")


def run(args: argparse.Namespace) -> None:
    from ..console import progress, say
    from ..files.atomic import check_target, in_bytes
    from ..files.locks import hold
    from ..files.pack import pack
    from ..files.ternary import open_ternary

    target = options.choose_output(args, args.source)
    check_target(target, 0, args.force, [args.source])
    file = open_ternary(args.source)
    weights = sum(n * k for n, k in (layer.shape for layer in file.layers.values()))
    with hold(target), progress(weights, f"packing as {args.packing}") as bar:
        pack(file, target, args.packing, overwrite=args.force, on_progress=bar.update)
    before, after = args.source.stat().st_size, target.stat().st_size
    say(f"{target}: {in_bytes(after)} in {args.packing}; {args.source.name} has {in_bytes(before)}")
