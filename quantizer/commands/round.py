"""`round`: a FLUX checkpoint becomes ternary from its weights alone."""

import argparse
from pathlib import Path

from . import options

_STATUS = """\
This is the first stage. FLUX rounded to ternary from its weights alone is not expected to make good pictures, whatever
the rounding. Calibration on the model's own activations and distillation from the original come next: see
`ternary-flux calibrate --help` and `distill --help`, or `convert --help` for all stages in one go.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "round",
        help="convert a FLUX checkpoint from its weights alone",
        description="Round every Linear of FLUX's blocks to {-1, 0, +1} with a scale for each group of 128 inputs. "
        "It needs no GPU and under 2 GB of memory. Weights-only ternary FLUX is not expected to make good pictures: "
        "this is the start for the later stages, and a test of the pipeline.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help=options.DENSE)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the .safetensors to write")
    parser.add_argument(
        "--packing",
        choices=("planes32", "base3"),
        default="planes32",
        help="planes32: 2 bits a weight, loads without conversion; base3: 1.6 bits, for sharing (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        choices=("least-squares", "absmean"),
        default="least-squares",
        help="least-squares: the exact optimum of each group; absmean: BitNet's rule, for comparison",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> None:
    from ..console import progress
    from ..files.atomic import check_target
    from ..files.checkpoint import open_checkpoint
    from ..rounding.round import round_checkpoint

    check_target(args.output, 0, args.force, [args.source])
    arch = open_checkpoint(args.source).architecture
    weights = sum(n * k for n, k in arch.linear_shapes.values())
    with progress(weights, f"rounding {arch.name}") as bar:
        summary = round_checkpoint(args.source, args.output, args.packing, args.method, args.force, bar.update)
    ratio = summary.source_bytes / summary.target_bytes
    rate = summary.weights / summary.seconds / 1e6
    print(f"{args.output}: {summary.target_bytes / 1e9:.3f} GB, {ratio:.2f} times smaller than {summary.source}")
    print(f"{len(summary.errors)} ternary Linears, {summary.weights / 1e6:,.1f} M weights at {rate:.0f} M/s")
    print(f"relative weight error {summary.mean_error:.4f}")
    if summary.ignored:
        print(f"{summary.ignored} other tensors of {summary.source} were left out: they are not the transformer's")
    if summary.lossy:
        print(
            f"decoded from {summary.lossy}: what that lost is lost here too; the original in 16 bits is a better source"
        )
    print(_STATUS, end="")
