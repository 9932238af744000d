"""The command that Quantize FLUX to Ternary runs, and the process that it runs in."""

import subprocess
import sys
import time

import psutil
import pytest
from ternary_flux.benchmarks import comfyui
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.tests import builders

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=False)
OPTIONS = ["--size", "64x64", "--sampler-steps", "4", "--device", "cpu"]
PARENT = """
import sys
import _pack; _pack.load()
from pathlib import Path
from ternary_flux.benchmarks import comfyui
comfyui.make_importable()
from ternary_flux.nodes.conversion import Display, convert
convert(sys.argv[1:], Display(None), Path("pictures"))
"""


@pytest.fixture
def folder(tmp_path):
    builders.write_flux(tmp_path / "tiny.safetensors", ARCH)
    builders.write_conditioning(tmp_path / "cond.safetensors", ARCH)
    return tmp_path


def wait_for(process: subprocess.Popen, what) -> None:
    while not what():
        assert process.poll() is None
        time.sleep(0.02)


def arguments(folder, *more) -> list[str]:
    paths = [folder / "tiny.safetensors", "-o", folder / "out.safetensors", "--work", folder / "work"]
    return [str(x) for x in [*paths, "--conditioning", folder / "cond.safetensors", *OPTIONS, *more]]


def painted(folder) -> list:
    return list((folder / "work" / "pictures").glob("*.safetensors"))


@pytest.mark.slow
def test_a_conversion_ends_with_a_comfyui_that_is_killed(folder):
    command = [sys.executable, "-c", PARENT, *arguments(folder, "--budget", "600")]
    with subprocess.Popen(command, cwd=comfyui.ROOT) as parent:
        wait_for(parent, lambda: painted(folder))
        (child,) = psutil.Process(parent.pid).children()
        parent.kill()
    try:
        child.wait(120)
    finally:
        if child.is_running():
            child.kill()
    assert painted(folder) and not list(folder.rglob("*.partial")) and not (folder / "out.safetensors").exists()


@pytest.mark.slow
def test_a_conversion_whose_stdin_ends_goes_on_later(folder):
    amounts = ["--pictures", "24", "--calibration-states", "16", "--steps", "2"]
    command = [sys.executable, "-m", "quantizer", "convert", *arguments(folder, *amounts)]
    pipes = dict.fromkeys(("stdin", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([*command, "--end-with-stdin"], cwd=comfyui.ROOT, text=True, **pipes)
    wait_for(process, lambda: painted(folder))
    _, errors = process.communicate()  # closes stdin
    assert process.returncode == 143 and "give the same command again to go on" in errors
    kept = {path: path.stat().st_mtime_ns for path in painted(folder)}
    assert subprocess.run(command, cwd=comfyui.ROOT).returncode == 0
    assert (folder / "out.safetensors").exists()
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in kept.items())
