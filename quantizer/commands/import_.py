"""`import`: a ternary model made elsewhere, bit for bit."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "import",
        help="bring in a ternary FLUX made elsewhere, such as Bonsai Image 4B",
        description="Write a ternary FLUX made elsewhere as a file for ComfyUI, bit for bit: Bonsai Image 4B in its "
        "packagings unpacked, mlx-2bit and gemlite-2bit, and any checkpoint whose groups of 128 inputs are exactly "
        "{-s, 0, s}. Nothing is rounded: `export` gives the source's weights back.",
    )
    parser.add_argument(
        "source", type=Path, metavar="PATH", help="the folder as it was downloaded, or the file with the weights"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the .safetensors to write")
    parser.add_argument(
        "--packing",
        choices=("planes32", "base3"),
        default="planes32",
        help="planes32: 2 bits a weight, loads without conversion; base3: 1.6 bits, for sharing (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    from ..console import progress
    from ..files.atomic import check_target
    from ..files.summary import in_bytes
    from ..imports.run import import_model, open_source

    check_target(args.output, 0, args.force, [args.source])
    source = open_source(args.source)
    weights = sum(n * k for n, k in source.architecture.linear_shapes.values())
    with progress(weights, f"importing {source.architecture.name}") as bar:
        summary = import_model(source, args.output, args.packing, args.force, bar.update)
    sizes = f"{in_bytes(summary.target_bytes)}, the source {in_bytes(summary.source_bytes)}"
    print(f"{args.output}: {sizes}; {summary.base_model} from {summary.packaging}, bit for bit")
    print(f"{summary.linears} ternary Linears, {summary.weights / 1e6:,.1f} M weights; {summary.dense} dense tensors")
    worst = max(summary.scale_errors, key=summary.scale_errors.get)
    mean = sum(summary.scale_errors.values()) / len(summary.scale_errors)
    print(
        f"int8 kernels round these scales when the file is loaded, by {mean:.2%} in the mean and "
        f"{summary.scale_errors[worst]:.2%} in {worst}; full precision takes them as they are"
    )
