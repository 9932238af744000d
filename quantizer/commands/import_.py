"""`import`: a ternary model made elsewhere, bit for bit."""

import argparse

from . import options

EXAMPLE = "bonsai-image-4b-unpacked -o bonsai-image-4b.safetensors"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "import",
        description="Write a ternary FLUX made elsewhere as a file for ComfyUI, bit for bit: Bonsai Image 4B in its "
        "packagings unpacked, mlx-2bit and gemlite-2bit, and any checkpoint whose groups of 128 inputs are exactly "
        "{-s, 0, s}. Nothing is rounded: `export` gives the source's weights back.",
    )
    parser.add_argument(
        "source",
        type=options.model,
        metavar="PATH",
        help="the folder as it was downloaded, or the file with the weights",
    )
    options.add_output(parser, "-1.58bit")
    options.add_packing(parser)


def run(args: argparse.Namespace) -> None:
    from ...ops.scales import SHOWS
    from ..console import progress, say
    from ..files.atomic import check_target, in_bytes
    from ..files.locks import hold
    from ..imports.run import import_model, open_source

    target = options.choose_output(args, args.source)
    check_target(target, 0, args.force, [args.source])
    source = open_source(args.source)
    weights = sum(n * k for n, k in source.architecture.linear_shapes.values())
    with hold(target), progress(weights, f"importing {source.architecture.name}") as bar:
        summary = import_model(source, target, packing=args.packing, overwrite=args.force, on_progress=bar.update)
    sizes = f"{in_bytes(summary.target_bytes)}, the source {in_bytes(summary.source_bytes)}"
    worst = max(summary.scale_errors, key=summary.scale_errors.get)
    mean = sum(summary.scale_errors.values()) / len(summary.scale_errors)
    say(
        f"{target}: {sizes}; {summary.base_model} from {summary.packaging}, bit for bit",
        f"{summary.linears} ternary Linears, {summary.weights / 1e6:,.1f} M weights; {summary.dense} dense tensors",
        f"int8 kernels round these scales when the file is loaded, by {mean:.2%} in the mean and "
        f"{summary.scale_errors[worst]:.2%} in {worst}; full precision takes them as they are",
    )
    if shown := sum(error > SHOWS for error in summary.scale_errors.values()):
        say(f"in {shown} Linears that is more than {SHOWS:.0%}: the loader's `auto` computes them in full precision")
