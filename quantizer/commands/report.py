"""`report`: a page that shows what every stage did to a model."""

import argparse
import importlib.util
import sys
from pathlib import Path

from . import options
from .options import count

EXAMPLE = (
    "--teacher flux1-dev.safetensors --conditioning prompts.safetensors --vae taef1_decoder.safetensors "
    "-o report rounded=flux1-dev-rounded.safetensors converted=flux1-dev-1.58bit.safetensors"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "report",
        description="Write report.html and its charts: pictures from the same noise, velocity error by timestep, "
        "divergence of free-running trajectories, weight errors by layer, sizes.",
    )
    parser.add_argument("files", nargs="*", metavar="NAME=FILE", help="ternary files, in the order of the stages")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the page is written")
    parser.add_argument("--force", action="store_true", help="replace a report that is there")
    parser.add_argument("--teacher", type=options.model, required=True, metavar="DENSE", help=options.DENSE)
    options.add_arguments(parser)
    parser.add_argument(
        "--work", type=Path, help="the work folder of `convert`: its stages come first, its states are used"
    )
    parser.add_argument(
        "--vae", type=options.vae, help="the model's VAE, read by ComfyUI; without it latents have false colours"
    )
    parser.set_defaults(interrupted="give the same command again to go on")
    parser.add_argument("--pictures", type=count, default=4, help="to show (default: %(default)s)")
    parser.add_argument("--held-out", type=count, default=16, help="pictures to measure on (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            f"reports are drawn with matplotlib, which is missing: {sys.executable} -m pip install matplotlib"
        )
    from ..console import Bars, say
    from ..files.checkpoint import open_checkpoint
    from ..files.ternary import check_original, open_ternary
    from ..report.decoders import vae_decoder
    from ..report.page import check_report, report

    if args.work and not args.work.is_dir():
        raise ValueError(f"{args.work}: there is no such folder; give the work folder of a conversion with --work")
    files = {}
    for stage, name in (("round", "rounded"), ("calibrate", "calibrated")):
        path = (args.work or args.output) / f"{name}.safetensors"
        if args.work and path.exists():
            files[stage] = path
    for text in args.files:
        name, separator, path = text.partition("=")
        name, path = (name, path) if separator and not Path(text).exists() else (Path(text).stem, text)
        if name in files:
            raise ValueError(f"two stages are called {name}; give another NAME=FILE")
        files[name] = options.model(path)
    if not files:
        raise ValueError("give ternary files as NAME=FILE, or --work with the work folder of a conversion")
    check_report(args.output, files, args.force)
    for path in files.values():
        check_original(open_ternary(path), open_checkpoint(args.teacher))
    with Bars() as bars, options.open_workspace(args, args.teacher, None, on_progress=bars.show) as work:
        decode = vae_decoder(args.vae, work.arch) if args.vae else None
        more = {"held_out": args.held_out, "decode": decode, "overwrite": args.force}
        page = report(work, files, args.output, pictures=args.pictures, **more)
    say(str(page))
