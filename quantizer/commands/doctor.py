"""`doctor`: what this machine has."""

import argparse

EXAMPLE = ""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    subparsers.add_parser("doctor", help="say what this machine has")


def run(args: argparse.Namespace) -> None:
    pass
