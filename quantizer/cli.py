"""The `ternary-flux` command (also `python -m quantizer`): one module for each subcommand.

A command module has `add_parser(subparsers)`, which declares the arguments, and `run(args)`, which returns an exit code
or None. Only the chosen command's module is imported. A mistake of the user (ValueError, OSError) becomes one line on
stderr and exit code 2. A command that can be resumed says so with `set_defaults(interrupted="...")`, the end of the
line printed after Ctrl-C.

argparse, because the pack adds no dependency to ComfyUI's where the standard library does.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .interrupts import Terminated, terminable

# command -> (module within the quantizer, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "round": (".commands.round", "convert a FLUX checkpoint from its weights alone (minutes; the first stage)"),
    "embed": (".commands.embed", "encode prompts with ComfyUI's text encoders"),
    "calibrate": (".commands.calibrate", "convert a FLUX checkpoint with its own activations (the second stage)"),
    "distill": (".commands.distill", "train a ternary file to give the original's velocities (the third stage)"),
    "convert": (".commands.convert", "round, calibrate and distill in one go"),
    "mixed": (".commands.mixed", "give the most sensitive Linears of a ternary file two ternary terms or 8 bits"),
    "report": (".commands.report", "write a page that compares ternary files with the original"),
    "import": (".commands.import_", "bring in a ternary FLUX made elsewhere, such as Bonsai Image 4B"),
    "inspect": (".commands.inspect", "say what a file is: layers, bits per weight, sizes"),
    "export": (".commands.export", "write a ternary file back as a dense checkpoint"),
    "pack": (".commands.pack", "write a ternary file in the other packing, for sharing or for loading"),
    "verify": (".commands.verify", "check every byte of a file against the checksums it carries"),
}
INTERRUPTED = 130
TERMINATED = 143


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake, 130 for Ctrl-C, 143 for SIGTERM."""
    args = parse(argv)
    try:
        with terminable():
            return args.run(args) or 0
    except KeyboardInterrupt as interrupt:
        print(f"\n{args.command}: stopped; {args.interrupted}", file=sys.stderr)
        return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"{args.command}: {_one_line(error)}", file=sys.stderr)
        return 2


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line, importing the module of the command that it names."""
    parser = argparse.ArgumentParser(prog="ternary-flux", description="FLUX with 1.58-bit weights.")
    parser.set_defaults(interrupted="nothing was written")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            command = importlib.import_module(module, __package__)
            command.add_parser(subparsers)
            parser.set_defaults(run=command.run)
        else:
            subparsers.add_parser(name, help=summary)
    return parser.parse_args(argv)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
