"""`calibrate`: ternary weights fitted to what the model computes, without training."""

import argparse
from pathlib import Path

from . import options
from .options import count, natural, positive

HELD_OUT = 32  # pictures that the result is measured on


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="convert a FLUX checkpoint with its own activations (the second stage)",
        description="Quantize every Linear of FLUX's blocks to {-1, 0, +1} on the inputs that it gets in pictures that "
        "the model paints itself from the prompts of the conditioning file. One block at a time is in memory. "
        "It is much better than `round` and the start for `distill`, which is what makes good pictures.",
    )
    parser.add_argument("source", type=Path, metavar="IN", help=options.DENSE)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="the .safetensors to write")
    options.add_arguments(parser)
    parser.add_argument("--pictures", type=count, default=128, help="that the original paints (default: %(default)s)")
    parser.add_argument("--states", type=count, help="noisy states of them (default: what the largest Linear needs)")
    parser.add_argument("--rank", type=natural, default=0, help="add low-rank factors to every Linear (default: none)")
    parser.add_argument("--like", type=Path, metavar="MIXED", help="Linears in two terms or 8 bits as in this file")
    parser.add_argument("--damping", type=positive, help="of the second moments, relative (default: 0.03)")
    parser.add_argument("--sweeps", type=natural, help="of descent over codes and scales (default: 3)")
    parser.add_argument("--batch", type=count, help="states at a time (default: by their number of tokens)")
    parser.add_argument("--packing", choices=("planes32", "base3"), default="planes32", help="(default: %(default)s)")
    options.add_file_arguments(parser)
    parser.set_defaults(interrupted="give the same command again to go on")


def run(args: argparse.Namespace) -> None:
    from ..calibration.calibrate import CalibrationSettings, calibrate, enough_states
    from ..console import Bars
    from ..files.precision import precisions_of
    from ..files.ternary import open_ternary

    precisions = precisions_of(open_ternary(args.like)) if args.like else {}
    if args.like and not precisions:
        raise ValueError(f"{args.like}: all of its Linears are alike; give a file of `mixed`")
    folder = options.work_folder(args)
    with Bars() as bars:
        work = options.open_workspace(args, args.source, folder, on_progress=bars.show)
        work.check(args.output, args.force, *filter(None, [args.like]))
        if precisions.keys() - set(work.arch.linears):
            raise ValueError(f"{args.like} was made from another model than {args.source}")
        pictures = work.sample_pictures(args.pictures)
        wanted = args.states or enough_states(work.arch, work.tokens)
        states = work.trajectories.states(pictures, wanted, args.seed + 1)
        changes = {"damping": args.damping, "sweeps": args.sweeps, "batch": args.batch or work.teacher_batch}
        changes = {name: value for name, value in changes.items() if value is not None}
        settings = CalibrationSettings(rank=args.rank, packing=args.packing, precisions=precisions, **changes)
        finished = work.counter("calibrated blocks", len(work.arch.block_names))

        def show(name: str, fit) -> None:
            text = f"{name}: drift {fit.img_drift:.3f} image, {fit.txt_drift:.3f} text"
            if fit.layers:
                worst = max(fit.layers.items(), key=lambda item: item[1].output_error)
                rank = min(layer.effective_rank for layer in fit.layers.values())
                text += f"; largest output error {worst[1].output_error:.3f} ({worst[0]})"
                text += f", least effective rank {rank:.0f}"
            bars.say(text)
            finished(1)

        identity = {"pictures": args.pictures, "states": wanted}
        calibrate(
            work.teacher,
            states,
            work.conditioning,
            target=args.output,
            folder=folder / "calibrate",
            settings=settings,
            identity=identity,
            overwrite=args.force,
            on_block=show,
        )
        quality = work.measure(args.output, work.hold_out(HELD_OUT))
    print(f"{args.output}: {args.output.stat().st_size / 1e9:.3f} GB")
    print(f"velocity error {quality.error:.4f} on held-out prompts (relative, squared)")
    print(f"distill it next; {folder} can be reused for that, or deleted")
