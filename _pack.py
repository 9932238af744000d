"""Loads this folder as the package `ternary_flux`, whatever the folder is called.

ComfyUI has a top-level module named `nodes`, and so has this folder: the folder must not stay on `sys.path`.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent


def load() -> ModuleType:
    """Import the folder as `ternary_flux`, take it off `sys.path`, and return the package."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if "ternary_flux" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "ternary_flux", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        package = importlib.util.module_from_spec(spec)
        sys.modules["ternary_flux"] = package
        spec.loader.exec_module(package)
    return sys.modules["ternary_flux"]
