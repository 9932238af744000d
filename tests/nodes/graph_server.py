"""A ComfyUI server with the pack and the miniature, as somebody has it after the README's first command."""

from pathlib import Path

from ternary_flux.benchmarks import comfyui
from ternary_flux.benchmarks.miniature.install import install

PACK = "comfyui-ternary-flux"


def start(base: Path) -> comfyui.Server:
    models = base / "models"
    models.mkdir(parents=True)
    install(models)
    return comfyui.Server(base, {PACK: comfyui.ROOT})
