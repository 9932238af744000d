"""Train the miniature: `python -m benchmarks.miniature.train autoencoder`, then `... train transformer`."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.miniature.train", description=__doc__)
    parser.add_argument("part", choices=("autoencoder", "transformer"))
    parser.add_argument("--steps", type=int, help="default: 1500 for the autoencoder, 6000 for the transformer")
    parser.add_argument("--size", type=int, choices=(64, 128), default=64, help="side of the pictures in pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("output/miniature"), help="checkpoints; a run resumes there")
    parser.add_argument("--output", type=Path, help="folder of the trained weights (default: the work folder)")
    arguments = parser.parse_args()
    work, output = arguments.work, arguments.output or arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.part == "autoencoder":
        from ternary_flux.benchmarks.miniature import train_autoencoder

        train_autoencoder.train(
            work, output / "autoencoder.safetensors", arguments.steps or 1500, arguments.size, arguments.device
        )
    else:
        from ternary_flux.benchmarks.miniature import train_transformer

        train_transformer.train(work, output, arguments.steps or 6000, arguments.size, arguments.device)


if __name__ == "__main__":
    main()
