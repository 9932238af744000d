"""`pack`: a ternary file in the other packing."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "pack",
        help="write a ternary file in the other packing",
        description="Write a ternary file with its weights in another packing: base3 (1.6 bits) to share it, planes32 "
        "(2 bits) to load it fast. The weights are the same, bit for bit, in both directions.",
    )
    parser.add_argument("source", type=Path, metavar="FILE", help="ternary .safetensors")
    parser.add_argument("--packing", choices=("planes32", "base3"), required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the .safetensors to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    from ..console import progress
    from ..files.atomic import check_target
    from ..files.pack import pack
    from ..files.summary import in_bytes
    from ..files.ternary import open_ternary

    check_target(args.output, 0, args.force, [args.source])
    file = open_ternary(args.source)
    weights = sum(n * k for n, k in (layer.shape for layer in file.layers.values()))
    with progress(weights, f"packing as {args.packing}") as bar:
        pack(file, args.output, args.packing, args.force, bar.update)
    before, after = args.source.stat().st_size, args.output.stat().st_size
    print(f"{args.output}: {in_bytes(after)} in {args.packing}; {args.source.name} has {in_bytes(before)}")
