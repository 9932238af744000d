"""The `ternary-flux` command (also `python -m quantizer`): one module for each subcommand.

A command module has `add_parser(subparsers)`, which declares the arguments, `EXAMPLE`, the arguments of a call,
`run(args)`, which returns an exit code or None, and `LIGHT` where it can run without torch. Only the chosen command's
module is imported. A mistake of the user (ValueError, OSError) becomes one line on stderr and exit code 2. A command
that can be resumed says so with `set_defaults(interrupted="...")`, the end of the line printed after Ctrl-C, and one
that can share its work with other processes with `shared=True`.

argparse, because the pack adds no dependency to ComfyUI's where the standard library does.
"""

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from . import ranks
from .console import lenient, message, program
from .interrupts import Terminated, at_once, terminable

# command -> (module within the quantizer, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "round": (".commands.round", "convert a FLUX checkpoint from its weights alone (minutes; the first stage)"),
    "embed": (".commands.embed", "encode prompts with ComfyUI's text encoders"),
    "calibrate": (".commands.calibrate", "convert a FLUX checkpoint with its own activations (the second stage)"),
    "distill": (".commands.distill", "train a ternary file to give the original's velocities (the third stage)"),
    "convert": (".commands.convert", "round, calibrate and distill in one go"),
    "mixed": (".commands.mixed", "give the most sensitive Linears of a ternary file two ternary terms or 8 bits"),
    "report": (".commands.report", "write a page that compares ternary files with the original"),
    "compare": (
        ".commands.compare",
        "paint with a ternary model and its original in ComfyUI, and measure the pictures",
    ),
    "import": (".commands.import_", "bring in a ternary FLUX made elsewhere, such as Bonsai Image 4B"),
    "inspect": (".commands.inspect", "say what a file is: layers, bits per weight, sizes"),
    "export": (".commands.export", "write a ternary file back as a dense checkpoint"),
    "pack": (".commands.pack", "write a ternary file in the other packing, for sharing or for loading"),
    "verify": (".commands.verify", "check every byte of a file against the checksums it carries"),
    "doctor": (".commands.doctor", "say what this machine has, which backend it will use, and what to install"),
}
MISTAKE = 2
INTERRUPTED = 130
_HEAVY = ("torch", "safetensors", "tqdm")
# Threads that wait for one another spin, on a busy machine in front of those they wait for: beside two other programs
# on two cores `pack` took four times as long. Not spinning for long costs a few percent where nothing else runs.
_OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    for name, value in _OPENMP.items():
        os.environ.setdefault(name, value)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code: 0, 2 for a mistake, 130 for Ctrl-C, 143 for SIGTERM."""
    try:
        with lenient():
            return _run(argv)
    except KeyboardInterrupt:  # while the last lines are printed
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    name, interrupted = _chosen(argv) or program(), ""
    try:
        with at_once(f"{name}: stopped; nothing was written"):
            args = parse(argv)
            if args is None:
                return 0
            interrupted = args.interrupted
            for module in () if args.light else _HEAVY:
                importlib.import_module(module)
        with terminable():
            if args.shared:
                ranks.join()
            elif ranks.launched():
                raise ValueError("one process does this: start it without torchrun")
            return args.run(args) or 0
    except KeyboardInterrupt as interrupt:
        _tell(f"\n{name}: stopped; {interrupted}")
        return 128 + interrupt.number if isinstance(interrupt, Terminated) else INTERRUPTED
    except (ValueError, OSError, OverflowError, RecursionError) as error:
        _tell(f"{name}: {message(error)}")
        return MISTAKE
    except ImportError as error:
        remedy = f"use the Python that ComfyUI runs in ({program()} doctor says more)"
        missing = isinstance(error, ModuleNotFoundError)
        problem = f"{error.name} is not installed" if missing else f"a package cannot be imported ({message(error)})"
        _tell(f"{name}: {problem} in {sys.executable}; {remedy}")
        return MISTAKE
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        remedy = "close other programs, or give it less to do at once (--batch, --size) where it takes these"
        _tell(f"{name}: not enough memory ({message(error).split('. ')[0]}); {remedy}")
        return MISTAKE
    finally:
        ranks.leave()


def _tell(text: str) -> None:
    """Why the run ends, on stderr, from one of its processes."""
    if ranks.may_speak():
        print(text, file=sys.stderr)


def _chosen(argv: Sequence[str]) -> str | None:
    return argv[0] if argv and argv[0] in COMMANDS else None


def parse(argv: Sequence[str]) -> argparse.Namespace | None:
    """Parse the command line, importing the module of the command that it names; None after help without a command."""
    parser = argparse.ArgumentParser(prog=program(), description="FLUX with 1.58-bit weights.")
    parser.add_argument("--version", action="store_true", help="print the version")
    parser.set_defaults(interrupted="nothing was written", shared=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = _chosen(argv)
    for name, (module, summary) in COMMANDS.items():
        if name == chosen:
            command = importlib.import_module(module, __package__)
            command.add_parser(subparsers)
            subparser = subparsers.choices[name]  # its line of help is for those who have not chosen
            subparser.formatter_class = _Help
            subparser.epilog = f"Example:\n  {subparser.prog} {command.EXAMPLE}"
            parser.set_defaults(run=command.run, light=getattr(command, "LIGHT", False))
        else:
            subparsers.add_parser(name, help=summary)
    with contextlib.nullcontext() if ranks.first() else contextlib.redirect_stderr(None):
        args = parser.parse_args(argv)
    if args.version:
        from .version import version

        print(f"ternary-flux {version()}")
        return None
    if args.command is None:
        parser.print_help()
        return None
    return args


class _Help(argparse.HelpFormatter):
    """Leaves the example as it is, to be copied."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("Example:") else super()._fill_text(text, width, indent)


def _out_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, MemoryError):
        return True
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
