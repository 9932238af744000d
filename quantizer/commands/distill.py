"""`distill`: train a ternary file to follow its teacher."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from . import options
from .options import count, natural, positive

if TYPE_CHECKING:
    from ..pipeline.budget import Plan
    from ..pipeline.workspace import Workspace

EXAMPLE = (
    "flux1-dev-calibrated.safetensors --teacher flux1-dev.safetensors --conditioning prompts.safetensors "
    "--minutes 120 -o flux1-dev-1.58bit.safetensors"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "distill",
        help="train a ternary file to give the original's velocities",
        description="Train the scales, biases, norms and the layers that are not ternary (and, if asked, low-rank "
        "factors and the codes) of a ternary file so that its velocities follow the original's, at states of pictures "
        "that the original paints itself.",
    )
    parser.add_argument(
        "start", type=options.model, metavar="START", help="ternary .safetensors, from `round` or `calibrate`"
    )
    options.add_output(parser, "-distilled")
    parser.add_argument(
        "--teacher", type=options.model, required=True, metavar="DENSE", help="what START was made from"
    )
    options.add_arguments(parser)
    parser.add_argument(
        "--rank",
        type=natural,
        default=0,
        help="of low-rank factors; a START of `calibrate` must have them (default: none)",
    )
    parser.add_argument("--codes", action="store_true", help="train the ternary codes too")
    parser.add_argument("--block-steps", type=natural, default=0, help="of a first pass by blocks (default: none)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, default=1000, help="of the end-to-end pass (default: %(default)s)")
    length.add_argument("--minutes", type=positive, help="of the end-to-end pass, instead of --steps")
    parser.add_argument("--batch", type=count, help="states in a batch (default: what fits the device)")
    parser.add_argument("--accumulate", type=count, default=1, help="batches for each step (default: %(default)s)")
    parser.add_argument("--pictures", type=count, help="that the original paints (default: by the length of the run)")
    parser.add_argument("--states", type=count, help="noisy states of them (default: 12 of each)")
    parser.add_argument("--held-out", type=count, default=16, help="pictures to measure on (default: %(default)s)")
    parser.add_argument("--rate", type=positive, default=1.0, help="factor on learning rates (default: %(default)s)")
    parser.add_argument("--evaluate-every", type=count, default=100, help="steps (default: %(default)s)")
    parser.add_argument(
        "--snapshot-minutes", type=positive, default=5.0, help="between snapshots of a run (default: %(default)s)"
    )
    options.add_packing(parser, None)
    options.add_work(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the snapshot in the work folder")
    parser.set_defaults(interrupted="give the same command with --resume to go on")


def _keep_amounts(args: argparse.Namespace, work: "Workspace", plan: "Plan", path: Path) -> int:
    """Give the workspace its pictures and states and return the batch: as asked, else as fits the run and the machine.

    They are kept in `path`, so that a run that resumes has the same ones.
    """
    from ..files.atomic import write_json
    from ..files.inputs import read_json
    from ..pipeline.budget import STATES_EACH

    kept = read_json(path, dict) if args.resume and path.exists() else {}
    batch = args.batch or kept.get("batch") or plan.batch
    work.pictures = args.pictures or kept.get("pictures")
    if work.pictures is None:
        # A trained state costs about four of the teacher's forwards.
        timed = args.minutes and int(60 * args.minutes / (4 * work.time_state()))
        work.pictures = work.pictures_for(timed or args.steps * batch * args.accumulate)
    work.states = args.states or kept.get("states") or STATES_EACH * work.pictures
    write_json(path, {"batch": batch, "pictures": work.pictures, "states": work.states})
    return batch


def run(args: argparse.Namespace) -> None:
    from ..console import Bars, say
    from ..distillation.blockwise import BlockSettings
    from ..distillation.schedule import RATES
    from ..pipeline.budget import plan_for, settings_for
    from ..pipeline.stages import distill_file

    target = options.choose_output(args, args.start)
    more = {"sources": [args.start], "held_out": args.held_out}
    with Bars() as bars, options.open_workspace(args, args.teacher, target, on_progress=bars.show, **more) as work:
        snapshot, amounts = work.folder / "distill.safetensors", work.folder / "distill.json"
        if snapshot.exists() and not args.resume:
            raise ValueError(f"{snapshot} belongs to an unfinished run: give --resume to continue it, or delete it")
        plan = plan_for(work)
        batch = _keep_amounts(args, work, plan, amounts)
        rates = {group: args.rate * rate for group, rate in RATES.items()}
        settings = settings_for(
            plan,
            steps=None if args.minutes else args.steps,
            seconds=args.minutes and 60 * args.minutes,
            batch=batch,
            accumulate=args.accumulate,
            evaluate_every=args.evaluate_every,
            snapshot_minutes=args.snapshot_minutes,
            seed=args.seed,
            rates=rates,
        )
        blocks = None
        if args.block_steps:
            blocks = BlockSettings(args.block_steps, settings.batch, rank=args.rank, codes=args.codes, rates=rates)
        before = work.quality(args.start)
        say(f"start: velocity error {before.error:.4f} on held-out prompts")

        def step(row: dict) -> None:
            bars.show("training steps", row["step"], row["total"] or 0)
            if "error" in row:
                say(
                    f"step {row['step']}: loss {row['loss']:.4f}, velocity error {row['error']:.4f}, "
                    f"response to prompts {row['response']:.2f}, alignment {row['alignment']:.2f}"
                )

        distiller = distill_file(
            work,
            args.start,
            target,
            settings,
            args.rank,
            args.codes,
            args.packing,
            blocks,
            args.force,
            snapshot,
            on_step=step,
            on_block=lambda result: say(f"{result.name}: {result.before:.4f} -> {result.after:.4f}"),
        )
        for path in (snapshot, amounts):
            with contextlib.suppress(OSError):  # the file is written
                path.unlink()
    say(f"{target}: velocity error {before.error:.4f} -> {distiller.best_error:.4f} on held-out prompts")
