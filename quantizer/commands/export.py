"""`export`: a ternary file back as a dense checkpoint."""

import argparse

from . import options

EXAMPLE = "flux1-dev-1.58bit.safetensors -o flux1-dev-dense.safetensors"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        description="Write a ternary file as a dense checkpoint that any FLUX loader reads: for comparison, and for "
        "other tools. It is as large as the original and holds the same values as the ternary file.",
    )
    parser.add_argument("source", type=options.model, metavar="FILE", help="ternary .safetensors")
    options.add_output(parser, "-dense", "DENSE")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from ..console import progress, say
    from ..files.atomic import check_target, in_bytes
    from ..files.export import DTYPES, export_checkpoint
    from ..files.locks import hold
    from ..files.ternary import open_ternary

    target = options.choose_output(args, args.source)
    check_target(target, 0, args.force, [args.source])
    file = open_ternary(args.source)
    weights = sum(n * k for n, k in (layer.shape for layer in file.layers.values()))
    with hold(target), progress(weights, "exporting") as bar:
        export_checkpoint(file, target, dtype=DTYPES[args.dtype], overwrite=args.force, on_progress=bar.update)
    say(f"{target}: {in_bytes(target.stat().st_size)}, {args.dtype}")
