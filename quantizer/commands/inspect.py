"""`inspect`: say what a file is."""

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="say what a file is: layers, bits per weight, sizes",
        description="Say what a safetensors file is. A ternary file is checked completely: keys, shapes, every code.",
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--layers", action="store_true", help="list every ternary Linear")


def run(args: argparse.Namespace) -> None:
    from ..files.summary import summarize

    print("\n".join(summarize(args.file, args.layers)))
