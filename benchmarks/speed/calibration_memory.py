"""Memory and time of calibration at FLUX.1-dev's size: `python -m benchmarks.speed.calibration_memory`.

A checkpoint with one double and one single block of FLUX.1-dev's width and random weights goes through `calibrate`.
Prints the seconds of each block and the peak of the process's memory, and fails where that is over the limit.
"""

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from ternary_flux.quantizer.calibration import calibrate
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import create
from ternary_flux.quantizer.model.teacher import Placement, Teacher
from ternary_flux.quantizer.pictures.conditioning import Conditioning
from ternary_flux.quantizer.pictures.sampler import draw_times
from ternary_flux.quantizer.pictures.states import States

WIDTH = 3072


def architecture(width: int) -> Architecture:
    """FLUX.1-dev with one block of each kind."""
    return Architecture(1, width, 1, 1, 16, 16, context_dim=4096, vec_dim=768, guidance=True)


def write_checkpoint(path: Path, arch: Architecture) -> None:
    """Random bf16 weights that keep activations in a normal range."""
    generator = torch.Generator().manual_seed(0)
    plan = {name: (torch.bfloat16, shape) for name, shape in arch.shapes.items()}
    with create(path, plan, {}) as file:
        for name, shape in arch.shapes.items():
            if name.endswith("scale"):
                tensor = torch.ones(shape)
            else:
                tensor = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
            file.write(name, tensor.bfloat16())


def make_states(arch: Architecture, count: int, side: int) -> tuple[list[States], Conditioning]:
    """States of noise, and random prompts of 256 tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = 8
    context = torch.randn(prompts, 256, arch.context_dim, generator=generator).bfloat16()
    pooled = torch.randn(prompts, arch.vec_dim, generator=generator)
    latent = torch.randn(count, arch.in_channels, side // 8, side // 8, generator=generator)
    prompt, guidance = torch.arange(count) % prompts, torch.full((count,), 3.5)
    states = States(latent, draw_times(count, 1.15), prompt, guidance)
    return [states], Conditioning(context, pooled, tuple(map(str, range(prompts))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=WIDTH, help="hidden size (default: %(default)s, as FLUX.1-dev)")
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--side", type=int, default=512, help="of the pictures, in pixels (default: %(default)s)")
    parser.add_argument("--sweeps", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=12, help="GiB of memory (default: %(default)s)")
    args = parser.parse_args()
    arch = architecture(args.width)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_checkpoint(folder / "dense.safetensors", arch)
        states, conditioning = make_states(arch, args.states, args.side)
        teacher = Teacher(open_checkpoint(folder / "dense.safetensors"), args.device, placement=Placement(False, 0))
        started = time.perf_counter()

        def show(name: str, fit: calibrate.BlockFit) -> None:
            nonlocal started
            now = time.perf_counter()
            worst = max(layer.output_error for layer in fit.layers.values())
            print(f"{name}: {now - started:.1f} s, largest output error {worst:.3f}, peak {peak():.2f} GiB", flush=True)
            started = now

        settings = calibrate.CalibrationSettings(batch=1, sweeps=args.sweeps)
        output = folder / "ternary.safetensors"
        calibrate.calibrate(
            teacher, states, conditioning, target=output, folder=folder / "work", settings=settings, on_block=show
        )
        sizes = output.stat().st_size / 1e6, teacher.checkpoint.nbytes / 1e6
        print("ternary file: {:.0f} MB, of {:.0f} MB".format(*sizes))
    print(f"peak memory {peak():.2f} GiB on {args.device}")
    if peak() > args.limit:
        sys.exit(f"over the limit of {args.limit:g} GiB")


def peak() -> float:
    """GiB of memory this process has held at most, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
