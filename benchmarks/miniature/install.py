"""`python -m benchmarks.miniature.install`: puts the miniature's files where ComfyUI finds them."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from ternary_flux.benchmarks import miniature
from ternary_flux.quantizer.comfyui import find_comfyui


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.install",
        description="Put the FLUX miniature, dense and ternary, and its VAE into ComfyUI's models folder (32 MB).",
    )
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="ComfyUI's models folder (default: of the ComfyUI this pack is in)"
    )
    models = parser.parse_args().models or _models()
    if models is None or not models.is_dir():
        sys.exit(f"{models or 'this pack is in no custom_nodes folder'}: give ComfyUI's models folder with --models")
    for path in install(models):
        print(path)
    print('now open the template "Miniature FLUX in 1.58 bits, text to image" in ComfyUI and press Run')


def _models() -> Path | None:
    """The models folder of the ComfyUI that this pack belongs to."""
    try:
        comfyui = find_comfyui()
    except FileNotFoundError as error:
        sys.exit(str(error))
    return comfyui and comfyui / "models"


def install(models: Path) -> list[Path]:
    """Write the miniature's files into a models folder; returns their paths."""
    written = []
    for source in (miniature.TRANSFORMER, miniature.TERNARY):
        target = models / "diffusion_models" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        shutil.copyfile(source, partial)
        os.replace(partial, target)
        written.append(target)
    written.append(models / "vae" / miniature.STOCK_AUTOENCODER)
    miniature.write_stock_autoencoder(written[-1])
    return written


if __name__ == "__main__":
    main()
