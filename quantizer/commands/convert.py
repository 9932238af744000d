"""`convert`: from a dense checkpoint to a distilled ternary file in one command."""

import argparse

from . import options
from .options import count, natural, positive

EXAMPLE = "flux1-dev.safetensors --conditioning prompts.safetensors --budget 240 -o flux1-dev-1.58bit.safetensors"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "convert",
        description="Convert a FLUX checkpoint to 1.58-bit weights: round, let the original paint from the prompts of "
        "the conditioning file, calibrate on what it computed, then distill until the time is used up. Nothing but the "
        "checkpoint and the prompts is needed. An interrupted run goes on when the same command is given again.",
    )
    parser.add_argument("source", type=options.model, metavar="IN", help=options.DENSE)
    options.add_output(parser, "-1.58bit")
    options.add_arguments(parser)
    parser.add_argument(
        "--budget", type=positive, metavar="MINUTES", help="time for all of it (default: 15 for small models, else 240)"
    )
    parser.add_argument("--rank", type=natural, default=0, help="add low-rank factors to every Linear (default: none)")
    parser.add_argument(
        "--codes",
        choices=("auto", "train", "freeze"),
        default="auto",
        help="train the ternary codes too, where memory allows it (default: %(default)s)",
    )
    options.add_freeze_dense(parser)
    parser.add_argument(
        "--growth",
        type=options.part,
        default=0.0,
        help="part by which the file may grow for the most sensitive Linears in two terms or 8 bits (default: none)",
    )
    fixed = "in the place of what the budget pays for"
    parser.add_argument("--pictures", type=count, help=f"that the original paints, {fixed}")
    parser.add_argument("--calibration-states", type=count, metavar="STATES", help=f"noisy states, {fixed}")
    parser.add_argument("--steps", type=count, help=f"of training, {fixed}; repeatable with all three")
    parser.add_argument("--plan", action="store_true", help="only print what would be done here, computed from sizes")
    parser.add_argument(
        "--device-memory", type=size, metavar="SIZE", help="for --plan: free memory of another GPU, as 22GB"
    )
    parser.add_argument("--tflops", type=positive, help="for --plan: of a large bf16 product on another GPU")
    options.add_packing(parser)
    options.add_work(parser)
    parser.add_argument(
        "--progress",
        choices=("bars", "json"),
        default="bars",
        help="json: an object in each line of stdout, for programs (default: %(default)s)",
    )
    parser.add_argument(
        "--stop-at-eof", action="store_true", help="stop when stdin ends, as for Ctrl-C: for programs that start it"
    )
    parser.set_defaults(interrupted="give the same command again to go on", shared=True)


def size(text: str) -> int:
    """Bytes, from a number with GB, MB or nothing behind it."""
    number, unit = text.upper().removesuffix("B"), 1.0
    for letter, factor in (("G", 1e9), ("M", 1e6)):
        if number.endswith(letter):
            number, unit = number[:-1], factor
    try:
        return int(options.number(number, float, 1.0, "", 1e15) * unit)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is not a size, such as 22GB or 22e9") from None


def show_plan(args: argparse.Namespace) -> None:
    """Print what a conversion with these arguments would do, here or on the GPU that they describe."""
    from dataclasses import replace

    from ..console import say
    from ..files.checkpoint import open_checkpoint
    from ..pictures import conditioning
    from ..pictures.sampler import default_steps, parse_sizes
    from ..pipeline.budget import default_minutes
    from ..pipeline.forecast import Machine, described, forecast, this_machine
    from ..pipeline.workspace import choose_device

    arch = open_checkpoint(args.source).architecture
    encoded = conditioning.read(args.conditioning, arch)
    if args.tflops and args.device_memory:
        machine = Machine("cuda", args.device_memory, 1e12 * args.tflops)
    else:
        machine = this_machine(choose_device(args.device))
        given = {"speed": args.tflops and 1e12 * args.tflops, "memory": args.device_memory}
        machine = replace(machine, **{name: value for name, value in given.items() if value})
    minutes = args.budget or default_minutes(sum(n * k for n, k in arch.linear_shapes.values()))
    found = forecast(
        arch,
        machine,
        text=encoded.context.shape[1],
        sizes=parse_sizes(args.size),
        steps=args.sampler_steps or default_steps(arch),
        prompts=len(encoded),
        seconds=60 * minutes,
    )
    say(f"{args.source.name}: {arch.name}, within {minutes:g} minutes", *described(found, machine))


def run(args: argparse.Namespace) -> None:
    if args.plan:
        return show_plan(args)
    if args.device_memory or args.tflops:
        raise ValueError("--device-memory and --tflops describe another GPU to --plan: give that, or leave them out")
    from ..console import Bars, Events
    from ..interrupts import terminate_at_eof
    from ..pipeline.convert import Amounts, Run, expectation

    if args.stop_at_eof:
        terminate_at_eof()
    target = options.choose_output(args, args.source)
    report = Events() if args.progress == "json" else Bars()
    with report, options.open_workspace(args, args.source, target, on_progress=report.show) as work:
        codes = {"auto": None, "train": True, "freeze": False}[args.codes]
        if note := options.note_on_source(work):
            report.say(note)
        whole = Run(
            work,
            target,
            args.budget,
            rank=args.rank,
            codes=codes,
            packing=args.packing,
            growth=args.growth,
            freeze_dense=args.freeze_dense,
            amounts=Amounts(args.pictures, args.calibration_states, args.steps),
            overwrite=args.force,
            on_message=report.say,
        )
        stages = whole.run()
    report.say(*expectation(stages).splitlines(), f"{target} written; {work.folder} can be deleted")
