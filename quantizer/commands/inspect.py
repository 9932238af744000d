"""`inspect`: say what a file is."""

import argparse

from . import options

EXAMPLE = "flux1-dev-1.58bit.safetensors --layers"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect",
        description="Say what a file or a folder is. A FLUX is checked completely: keys, shapes, every code and value.",
    )
    parser.add_argument("file", type=options.model, metavar="FILE", help="a .safetensors file of any kind")
    parser.add_argument("--layers", action="store_true", help="list every ternary Linear")


def run(args: argparse.Namespace) -> None:
    from ..console import Bars, say
    from ..files.summary import summarize

    with Bars() as bars:

        def show(done: int, total: int) -> None:
            if total > 1e9:
                bars.show("bytes checked", done, total)

        lines = summarize(args.file, args.layers, show)
    say(*lines)
