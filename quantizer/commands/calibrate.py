"""`calibrate`: ternary weights fitted to what the model computes, without training."""

import argparse

from . import options
from .options import count, natural, positive

EXAMPLE = "flux1-dev.safetensors --conditioning prompts.safetensors -o flux1-dev-calibrated.safetensors"
HELD_OUT = 32  # pictures that the result is measured on


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        description="Quantize every Linear of FLUX's blocks to {-1, 0, +1} on the inputs that it gets in pictures that "
        "the model paints itself from the prompts of the conditioning file. One block at a time is in memory. "
        "It is much better than `round` and the start for `distill`, which is what makes good pictures.",
    )
    parser.add_argument("source", type=options.model, metavar="IN", help=options.DENSE)
    options.add_output(parser, "-calibrated")
    options.add_arguments(parser)
    parser.add_argument("--pictures", type=count, default=128, help="that the original paints (default: %(default)s)")
    parser.add_argument("--states", type=count, help="noisy states of them (default: what the largest Linear needs)")
    parser.add_argument("--rank", type=natural, default=0, help="add low-rank factors to every Linear (default: none)")
    parser.add_argument(
        "--like", type=options.model, metavar="MIXED", help="Linears in two terms or 8 bits as in this file"
    )
    parser.add_argument("--damping", type=positive, help="of the second moments, relative (default: 0.03)")
    parser.add_argument("--sweeps", type=natural, help="of descent over codes and scales (default: 3)")
    parser.add_argument("--batch", type=count, help="states at a time (default: by their number of tokens)")
    options.add_freeze_dense(parser)
    options.add_packing(parser)
    options.add_work(parser)
    parser.set_defaults(interrupted="give the same command again to go on", shared=True)


def run(args: argparse.Namespace) -> None:
    from ..calibration.calibrate import CalibrationSettings, calibrate, enough_states
    from ..console import Bars, say
    from ..files.atomic import in_bytes
    from ..files.checkpoint import open_checkpoint
    from ..files.precision import precisions_of
    from ..files.ternary import check_original, open_ternary
    from ..report.statistics import statistics_table

    like = open_ternary(args.like) if args.like else None
    precisions = {} if like is None else precisions_of(like)
    if like is not None:
        check_original(like, open_checkpoint(args.source))
        if not precisions:
            raise ValueError(f"{args.like}: all of its Linears are alike; give a file of `mixed`")
    target, more = options.choose_output(args, args.source), filter(None, [args.like])
    with Bars() as bars, options.open_workspace(args, args.source, target, more, on_progress=bars.show) as work:
        pictures = work.sample_pictures(args.pictures)
        wanted = args.states or enough_states(work.arch, work.tokens)
        states = work.trajectories.states(pictures, wanted, args.seed + 1)
        changes = {"damping": args.damping, "sweeps": args.sweeps, "batch": args.batch or work.teacher_batch}
        changes = {name: value for name, value in changes.items() if value is not None}
        settings = CalibrationSettings(
            rank=args.rank, packing=args.packing, precisions=precisions, freeze_dense=args.freeze_dense, **changes
        )
        finished = work.counter("calibrated blocks", len(work.arch.block_names))

        def show(name: str, fit) -> None:
            text = f"{name}: drift {fit.img_drift:.3f} image, {fit.txt_drift:.3f} text"
            if fit.layers:
                worst = max(fit.layers.items(), key=lambda item: item[1].output_error)
                rank = min(layer.effective_rank for layer in fit.layers.values())
                text += f"; largest output error {worst[1].output_error:.3f} ({worst[0]})"
                text += f", least effective rank {rank:.0f}"
            say(text)
            finished(1)

        identity = {"pictures": args.pictures, "states": wanted}
        calibrate(
            work.teacher,
            states,
            work.conditioning,
            target=target,
            folder=work.folder / "calibrate",
            settings=settings,
            identity=identity,
            overwrite=args.force,
            on_block=show,
        )
        quality = work.measure(target, work.hold_out(HELD_OUT))
    say("means over the blocks, by kind of Linear:", *(f"  {line}" for line in statistics_table(open_ternary(target))))
    say(
        f"{target}: {in_bytes(target.stat().st_size)}",
        f"velocity error {quality.error:.4f} on held-out prompts (relative, squared)",
        f"distill it next; {work.folder} can be reused for that, or deleted",
    )
