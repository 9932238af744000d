"""This pack's version."""

import functools
import re
from importlib import metadata as installed
from pathlib import Path


@functools.cache
def version() -> str:
    """The version, whether the pack is installed or lies in a folder."""
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if pyproject.is_file() and (match := re.search(r'^version = "(.+)"', pyproject.read_text("utf-8"), re.MULTILINE)):
        return match[1]
    return installed.version("comfyui-ternary-flux")
