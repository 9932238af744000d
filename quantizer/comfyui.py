"""ComfyUI: where it is, its modules in this process, and its model folders."""

import contextlib
import logging
import os
import sys
from pathlib import Path

_PACK = Path(__file__).resolve().parents[1]


def find_comfyui() -> Path | None:
    """ComfyUI's folder: COMFYUI_PATH, else the ComfyUI whose custom_nodes hold this pack, else None.

    FileNotFoundError where COMFYUI_PATH is another folder.
    """
    if path := os.environ.get("COMFYUI_PATH"):
        if not (Path(path) / "comfy" / "sd.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH={path} holds no ComfyUI (there is no comfy/sd.py)")
        return Path(path).resolve()
    # A pack that is linked into custom_nodes is where it was started from, not where the link leads.
    folders = [*_PACK.parents, *Path(os.path.abspath(sys.argv[0])).parents, *_working_folder().parents]
    return next((f.parent for f in folders if f.name == "custom_nodes" and (f.parent / "comfy/sd.py").is_file()), None)


def _working_folder() -> Path:
    """With the links that the shell went through."""
    named = os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if named and os.path.samefile(named, "."):
            return Path(named) / "_"
    return Path.cwd() / "_"


def import_comfyui() -> None:
    """Make `import comfy` work in this process, on the CPU where there is no accelerator."""
    import torch

    _reach()
    try:
        import comfy.cli_args
    except ImportError as error:
        raise FileNotFoundError(
            f"ComfyUI is needed for text encoders and VAEs, and `import comfy` fails ({error}): "
            "set COMFYUI_PATH to its folder, and use the Python environment that ComfyUI runs in"
        ) from None
    if not torch.accelerator.is_available():
        comfy.cli_args.args.cpu = True


def _reach() -> Path | None:
    path = find_comfyui()
    if path and "comfy" not in sys.modules and str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return path


def model_folders(*kinds: str) -> list[Path]:
    """The folders where ComfyUI looks for models of these kinds, `extra_model_paths.yaml` included; [] without it."""
    with contextlib.suppress(FileNotFoundError):
        if comfyui := _reach():
            try:
                import folder_paths
            except ImportError:
                return [comfyui / "models" / kind for kind in kinds]
            _add_extra_paths(comfyui / "extra_model_paths.yaml")
            known = folder_paths.folder_names_and_paths
            return [Path(folder) for kind in kinds if kind in known for folder in known[kind][0]]
    return []


def _add_extra_paths(path: Path) -> None:
    if not path.is_file():
        return
    try:
        from utils.extra_config import load_extra_path_config

        load_extra_path_config(str(path))
    except Exception as error:  # ComfyUI's own file and reader: the standard folders remain
        logging.getLogger(__name__).warning("%s: %s", path, error)


def find_model(path: Path, *kinds: str) -> Path:
    """A path as it was typed, or the file of this name in ComfyUI's folders for these kinds of models."""
    if path.is_absolute() or path.exists():
        return path
    name = Path(str(path).replace("\\", "/"))
    return next((found for folder in model_folders(*kinds) if (found := folder / name).exists()), path)


def output_folder(kind: str = "diffusion_models") -> Path | None:
    """The folder in which ComfyUI will find a new model: the first of this kind that is there."""
    folders = [folder for folder in model_folders(kind) if folder.is_dir()]
    return next((f for f in folders if f.name == kind), folders[0] if folders else None)
