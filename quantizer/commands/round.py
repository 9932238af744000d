"""`round`: a FLUX checkpoint becomes ternary from its weights alone."""

import argparse

from . import options

EXAMPLE = "flux1-dev.safetensors -o flux1-dev-rounded.safetensors"
_STATUS = """\
This is the first stage. FLUX rounded to ternary from its weights alone is not expected to make good pictures, whatever
the rounding. Calibration on the model's own activations and distillation from the original come next: see
`{program} calibrate --help` and `distill --help`, or `convert --help` for all stages in one go."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "round",
        description="Round every Linear of FLUX's blocks to {-1, 0, +1} with a scale for each group of 128 inputs. "
        "It needs no GPU and under 2 GB of memory. Weights-only ternary FLUX is not expected to make good pictures: "
        "this is the start for the later stages, and a test of the pipeline.",
    )
    parser.add_argument("source", type=options.model, metavar="IN", help=options.DENSE)
    options.add_output(parser, "-rounded")
    options.add_packing(parser)
    parser.add_argument(
        "--method",
        choices=("least-squares", "absmean"),
        default="least-squares",
        help="least-squares: the exact optimum of each group; absmean: BitNet's rule, for comparison",
    )


def run(args: argparse.Namespace) -> None:
    from ..console import program, progress, say
    from ..files.atomic import check_target, in_bytes
    from ..files.checkpoint import open_checkpoint
    from ..files.locks import hold
    from ..rounding.round import round_checkpoint

    target = options.choose_output(args, args.source)
    check_target(target, 0, args.force, [args.source])
    arch = open_checkpoint(args.source).architecture
    weights = sum(n * k for n, k in arch.linear_shapes.values())
    with hold(target), progress(weights, f"rounding {arch.name}") as bar:
        summary = round_checkpoint(
            args.source, target, packing=args.packing, method=args.method, overwrite=args.force, on_progress=bar.update
        )
    ratio = summary.source_bytes / summary.target_bytes
    rate = summary.weights / summary.seconds / 1e6
    say(
        f"{target}: {in_bytes(summary.target_bytes)}, {ratio:.2f} times smaller than {summary.source}",
        f"{len(summary.errors)} ternary Linears, {summary.weights / 1e6:,.1f} M weights at {rate:.0f} M/s",
        f"relative weight error {summary.mean_error:.4f}",
    )
    if summary.ignored:
        say(f"{summary.ignored} other tensors of {summary.source} were left out: they are not the transformer's")
    if summary.lossy:
        say(f"decoded from {summary.lossy}: what that lost is lost here too; the original in 16 bits is better")
    say(*_STATUS.format(program=program()).splitlines())
