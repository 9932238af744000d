"""`verify`: whether a file is still what was written."""

import argparse

from . import options

EXAMPLE = "flux1-dev-1.58bit.safetensors"

_DAMAGED = 1


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "verify",
        description="Read every byte of a file written by this pack and compare it with the checksum of each tensor "
        "in its header. Exits with 0 for a whole file, 1 and the names of what is damaged otherwise.",
    )
    parser.add_argument("file", type=options.model, metavar="FILE", help="a .safetensors file written by this pack")


def run(args: argparse.Namespace) -> int:
    import time

    from ..console import progress, say
    from ..files.atomic import in_bytes
    from ..files.container import read_header
    from ..files.inputs import check_regular
    from ..files.verify import verify

    check_regular(args.file, "a .safetensors file")
    entries = read_header(args.file).entries
    size = sum(entry.nbytes for entry in entries.values())
    started = time.monotonic()
    with progress(size, "verifying", "B") as bar:
        damaged = verify(args.file, bar.update)
    rate = size / max(time.monotonic() - started, 1e-9)
    what = f"{len(entries)} tensors, {in_bytes(size)}, {in_bytes(round(rate))}/s"
    if not damaged:
        say(f"{args.file}: OK ({what})")
        return 0
    say(f"{args.file}: damaged ({what}); download or convert it again. What differs from its checksum:")
    say(*(f"  {name}" for name in damaged))
    return _DAMAGED
