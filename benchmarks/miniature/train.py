"""Train a miniature: `python -m benchmarks.miniature.train autoencoder`, then `... train transformer`."""

import argparse
import shutil
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature.train", description=__doc__)
    parser.add_argument("part", choices=("autoencoder", "transformer"))
    parser.add_argument("--version", type=int, choices=(1, 2), default=1, help="of FLUX (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, help="default: 1500 for the autoencoder (FLUX.2's: 400), 6000 for the transformer"
    )
    parser.add_argument("--mixed", action="store_true", help="products of the transformer in bf16")
    parser.add_argument("--size", type=int, choices=(64, 128), default=64, help="side of the pictures in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="checkpoints; a run resumes there (default: output/miniature-flux1)")
    parser.add_argument("--output", type=Path, help="folder of the trained weights (default: the work folder)")
    arguments = parser.parse_args()
    version = arguments.version
    work = arguments.work or Path(f"output/miniature-flux{version}")
    output = arguments.output or work
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    if version == 2 and not (output / "text-encoder.safetensors").exists():
        shutil.copyfile(WEIGHTS / "text-encoder.safetensors", output / "text-encoder.safetensors")
    if arguments.part == "autoencoder":
        from ternary_flux.benchmarks.miniature import train_autoencoder

        train_autoencoder.train(
            work,
            output / "autoencoder.safetensors",
            arguments.steps or (1500 if version == 1 else 400),
            arguments.size,
            arguments.device,
            version=version,
            start=WEIGHTS / "autoencoder.safetensors",
        )
    else:
        from ternary_flux.benchmarks.miniature import train_transformer

        train_transformer.train(
            work,
            output,
            arguments.steps or 6000,
            arguments.size,
            arguments.device,
            arch=train_transformer.ARCHITECTURES[version],
            mixed=arguments.mixed,
        )


if __name__ == "__main__":
    main()
