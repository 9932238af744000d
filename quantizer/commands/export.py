"""`export`: a ternary file back as a dense checkpoint."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a ternary file back as a dense checkpoint",
        description="Write a ternary file as a dense checkpoint that any FLUX loader reads: for comparison, and for "
        "other tools. It is as large as the original and holds the same values as the ternary file.",
    )
    parser.add_argument("source", type=Path, metavar="FILE", help="ternary .safetensors")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DENSE", help="the .safetensors to write")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="(default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace DENSE if it exists")


def run(args: argparse.Namespace) -> None:
    from ..console import progress
    from ..files.atomic import check_target
    from ..files.export import DTYPES, export_checkpoint
    from ..files.ternary import open_ternary

    check_target(args.output, 0, args.force, [args.source])
    file = open_ternary(args.source)
    weights = sum(n * k for n, k in (layer.shape for layer in file.layers.values()))
    with progress(weights, "exporting") as bar:
        export_checkpoint(file, args.output, DTYPES[args.dtype], args.force, bar.update)
    print(f"{args.output}: {args.output.stat().st_size / 1e9:.3f} GB, {args.dtype}")
