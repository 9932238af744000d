"""`doctor`: what this machine has for ternary models, what will run them and why, and what is missing."""

import argparse
import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

EXAMPLE = ""
LIGHT = True  # it runs where torch does not
_PACK = Path(__file__).resolve().parents[2]
_COMFYUI = (0, 30, 0)
_TORCH = (2, 8)
# kinds of layers -> whether they have float group scales, and whether they ask for full precision
_KINDS = {
    "ternary, row x integer scales (of `convert`)": (False, False),
    "ternary, scales that 8 bits would change too much (some of `import`)": (True, False),
    "ternary, marked for full precision (some of `calibrate`)": (False, True),
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    subparsers.add_parser(
        "doctor",
        description="Say what this machine has for ternary models, a line for each part: Python, torch, the GPU, "
        "Triton, ComfyUI, the backend of each kind of layer and why, and what to install. Reports of problems should "
        "have it.",
    )


def run(args: argparse.Namespace) -> None:
    from ..console import say

    todo: list[str] = []
    for label, text in _lines(todo):
        say(f"{label:<9} {text}")
    for line in todo or ["nothing: everything that this machine can have is there"]:
        say(f"{'to do':<9} {line}")


def _lines(todo: list[str]) -> Iterator[tuple[str, str]]:
    """(label, what there is) of each part; what should be done is added to `todo`."""
    from ..version import version

    yield "pack", f"ternary-flux {version()} in {_PACK}"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}, {_memory()}"
    yield "python", f"{platform.python_version()}, {sys.executable}"
    yield "packages", _packages(todo)
    try:
        import torch
    except Exception as error:  # a broken installation raises whatever its parts raise
        todo.append("run this with the Python that ComfyUI runs in, or install torch there: https://pytorch.org")
        yield "torch", f"cannot be imported ({_first_line(error)})"
    else:
        yield "torch", _torch(torch, todo)
        yield "GPU", _gpu(torch, todo)
        yield "Triton", _triton(torch, todo)
        for kind, text in _backends(torch):
            yield "layers", f"{kind}: {text}"
        yield "layers", "8 bits (of `mixed`) and dense: ComfyUI's own operations"
    yield from _comfyui(todo)


def _memory() -> str:
    try:
        import psutil
    except ImportError:
        return f"{os.cpu_count()} processors"
    memory = psutil.virtual_memory()
    return f"{os.cpu_count()} processors, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB memory free"


def _packages(todo: list[str]) -> str:
    found = []
    for name in ("numpy", "safetensors", "tqdm", "psutil"):
        try:
            importlib.import_module(name)
            found.append(f"{name} {metadata.version(name)}")
        except Exception as error:
            found.append(f"{name} cannot be imported ({_first_line(error)})")
            todo.append(f"{_pip()} install -r {_PACK / 'requirements.txt'}")
    return ", ".join(found)


def _torch(torch, todo: list[str]) -> str:
    built = "ROCm " + torch.version.hip if torch.version.hip else f"CUDA {torch.version.cuda or 'not built in'}"
    if _numbers(torch.__version__) < _TORCH:
        todo.append(f"update torch: {'.'.join(map(str, _TORCH))} or newer is needed")
    return f"{torch.__version__}, {built}"


def _gpu(torch, todo: list[str]) -> str:
    if not torch.accelerator.is_available():
        nvidia = shutil.which("nvidia-smi")
        if nvidia:
            todo.append("install a torch with CUDA: there is an NVIDIA driver, and torch sees no GPU")
        return "none that torch sees: the torch fallback runs on the processor" + (
            f" ({nvidia} is there)" if nvidia else ""
        )
    kind = torch.accelerator.current_accelerator().type
    if kind != "cuda":
        return f"{kind}: the torch fallback runs there"
    names = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = "" if torch.version.hip else f", compute capability {card.major}.{card.minor}"
        names.append(f"{card.name}{capability}, {card.total_memory / 1e9:.1f} GB")
    return "; ".join(names)


def _device(torch):
    available = torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if available else torch.device("cpu")


def _triton(torch, todo: list[str]) -> str:
    from ...ops.backends.triton import backend

    device = _device(torch)
    refusal = backend.unavailable(device)
    try:
        import triton
    except Exception as error:
        if device.type in ("cuda", "xpu"):
            package = "triton-windows" if os.name == "nt" else "triton"
            todo.append(f"{_pip()} install {package}, for the fast kernels")
        return f"cannot be imported ({_first_line(error)})"
    if refusal and device.type in ("cuda", "xpu"):
        todo.append(f"make Triton work, for the fast kernels: {refusal}")
    return f"{triton.__version__}, " + (f"not used: {refusal}" if refusal else f"its kernels run on {device.type}")


def _backends(torch) -> Iterator[tuple[str, str]]:
    from ...ops import resolve

    device = _device(torch)
    for kind, (float_groups, full_precision) in _KINDS.items():
        choice = resolve(device, float_groups=float_groups, full_precision=full_precision)
        yield kind, f"backend {choice.backend.NAME}, {choice.activations} activations ({choice.reason})"


def _comfyui(todo: list[str]) -> Iterator[tuple[str, str]]:
    from ..comfyui import find_comfyui, model_folders

    try:
        path = find_comfyui()
    except FileNotFoundError as error:
        todo.append("set COMFYUI_PATH to the folder of ComfyUI, or unset it")
        yield "ComfyUI", str(error)
        return
    if path is None:
        todo.append("set COMFYUI_PATH to ComfyUI's folder, or put this pack into its custom_nodes (needed for `embed`)")
        yield "ComfyUI", "not found"
        return
    found = re.search(r'__version__ = "(.+?)"', _text(path / "comfyui_version.py"))
    version = found[1] if found else "of an unknown version"
    if found and _numbers(version) < _COMFYUI:
        todo.append(f"update ComfyUI: {'.'.join(map(str, _COMFYUI))} or newer is needed")
    parts = [f"{name} {_installed(name)}" for name in ("comfy-kitchen", "comfy-aimdo")]
    yield "ComfyUI", f"{version} in {path}, {', '.join(parts)}"
    if _installed("comfy-kitchen") == "not installed":
        todo.append(f"{_pip()} install -r {path / 'requirements.txt'}, with the Python that ComfyUI runs in")
    folders = [str(folder) for folder in model_folders("diffusion_models") if folder.is_dir()]
    yield "models", ", ".join(folders) or "no folder of diffusion models"


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _pip() -> str:
    return f"{sys.executable} -m pip"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
