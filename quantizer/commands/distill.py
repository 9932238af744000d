"""`distill`: train a ternary file to follow its teacher."""

import argparse
import contextlib
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

from . import options
from .options import count, natural, positive

if TYPE_CHECKING:
    from ..pipeline.decisions import Decisions
    from ..pipeline.workspace import Workspace

EXAMPLE = (
    "flux1-dev-calibrated.safetensors --teacher flux1-dev.safetensors --conditioning prompts.safetensors "
    "--minutes 120 -o flux1-dev-1.58bit.safetensors"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "distill",
        description="Train the scales, biases, norms and the layers that are not ternary (and, if asked, low-rank "
        "factors and the codes) of a ternary file so that its velocities follow the original's, at states of pictures "
        "that the original paints itself.",
    )
    parser.add_argument(
        "start", type=options.model, metavar="START", help="ternary .safetensors, from `round` or `calibrate`"
    )
    options.add_output(parser, "-distilled")
    parser.add_argument(
        "--teacher",
        type=options.model,
        required=True,
        metavar="DENSE",
        help=f"what START was made from; {options.DENSE}",
    )
    options.add_arguments(parser)
    parser.add_argument(
        "--rank",
        type=natural,
        default=0,
        help="of low-rank factors; a START of `calibrate` must have them (default: none)",
    )
    parser.add_argument("--codes", action="store_true", help="train the ternary codes too")
    options.add_freeze_dense(parser)
    parser.add_argument("--block-steps", type=natural, default=0, help="of a first pass by blocks (default: none)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=count, default=1000, help="of the end-to-end pass (default: %(default)s)")
    length.add_argument("--minutes", type=positive, help="of the end-to-end pass, instead of --steps")
    parser.add_argument("--batch", type=count, help="states in a batch (default: what fits the device)")
    parser.add_argument("--accumulate", type=count, help="batches for each step (default: one for each process)")
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
    parser.set_defaults(interrupted="give the same command with --resume to go on", shared=True)


def _decide(args: argparse.Namespace, work: "Workspace", kept: "Decisions | None") -> "Decisions":
    """Amounts as asked, else as `kept` by the run that this one resumes, else as fits the run and the machine."""
    from .. import ranks
    from ..distillation.blockwise import BlockSettings
    from ..distillation.schedule import RATES
    from ..pipeline.budget import STATES_EACH, Budget, plan_for
    from ..pipeline.decisions import Decisions, Training

    amounts = None if kept is None else kept.budget
    plan = plan_for(work) if kept is None else kept.training.plan
    plan = replace(plan, batch=args.batch or plan.batch)
    accumulate: int = args.accumulate or (ranks.world() if kept is None else kept.training.accumulate)
    pictures: int | None = args.pictures or (amounts.pictures if amounts else None)
    if pictures is None:
        # A trained state costs about four of the teacher's forwards.
        timed = args.minutes and int(ranks.world() * 60 * args.minutes / (4 * work.time_state()))
        pictures = work.pictures_for(timed or args.steps * plan.batch * accumulate)
    states = args.states or (amounts.states if amounts else STATES_EACH * pictures)
    steps, seconds = None if args.minutes else args.steps, args.minutes and 60 * args.minutes
    blocks = None
    if args.block_steps:
        rates = {group: args.rate * rate for group, rate in RATES.items()}
        blocks = BlockSettings(args.block_steps, plan.batch, accumulate, rank=args.rank, codes=args.codes, rates=rates)
    training = Training(plan, args.codes, steps=steps, seconds=seconds, blocks=blocks, accumulate=accumulate)
    return Decisions(Budget(pictures, states, args.held_out), training=training)


def run(args: argparse.Namespace) -> None:
    from .. import ranks
    from ..console import Bars, say
    from ..distillation.schedule import RATES
    from ..files.checkpoint import open_checkpoint
    from ..files.ternary import check_original, open_ternary
    from ..pipeline.budget import settings_for
    from ..pipeline.decisions import Decisions
    from ..pipeline.distill_file import check_rank, distill_file

    start = open_ternary(args.start)
    check_original(start, open_checkpoint(args.teacher))
    check_rank(start, args.rank)
    target = options.choose_output(args, args.start)
    opened = options.open_workspace
    with Bars() as bars, opened(args, args.teacher, target, [args.start], on_progress=bars.show) as work:
        snapshot, kept = work.folder / "distill.safetensors", work.folder / "distill.json"
        if snapshot.exists() and not args.resume:
            raise ValueError(f"{snapshot} belongs to an unfinished run: give --resume to continue it, or delete it")
        decisions = ranks.agree(_decide(args, work, ranks.agree(Decisions.load(kept) if args.resume else None)))
        ranks.once(lambda: decisions.save(kept))
        training, budget = decisions.training, decisions.budget
        held_out = work.hold_out(budget.held_out)
        before = work.measure(args.start, held_out)
        say(f"start: velocity error {before.error:.4f} on held-out prompts")

        def step(row: dict) -> None:
            bars.show("training steps", row["step"], row["total"] or 0)
            if "error" in row:
                say(
                    f"step {row['step']}: loss {row['loss']:.4f}, velocity error {row['error']:.4f}, "
                    f"fine detail {row['detail']:.2f}, response to prompts {row['response']:.2f}, "
                    f"alignment {row['alignment']:.2f}"
                )

        distiller = distill_file(
            work,
            args.start,
            target,
            pool=work.label_states(budget.pictures, budget.states),
            held_out=held_out,
            settings=settings_for(
                training.plan,
                steps=training.steps,
                seconds=training.seconds,
                accumulate=training.accumulate,
                evaluate_every=args.evaluate_every,
                snapshot_minutes=args.snapshot_minutes,
                seed=args.seed,
                freeze_dense=args.freeze_dense,
                rates={group: args.rate * rate for group, rate in RATES.items()},
            ),
            rank=args.rank,
            codes=training.codes,
            packing=args.packing,
            block_settings=training.blocks,
            overwrite=args.force,
            snapshot=snapshot,
            on_step=step,
            on_block=lambda result: say(f"{result.name}: {result.before:.4f} -> {result.after:.4f}"),
        )
        blocks = work.folder / "blocks"
        for path in (snapshot, kept, blocks.with_suffix(".safetensors")) if ranks.first() else ():
            with contextlib.suppress(OSError):  # the file is written
                path.unlink(missing_ok=True)
        if ranks.first():
            shutil.rmtree(blocks, ignore_errors=True)
    say(f"{target}: velocity error {before.error:.4f} -> {distiller.best_error:.4f} on held-out prompts")
