"""The house rules: dependencies point one way, importing is light, and the folder never shadows ComfyUI's modules."""

import ast
import importlib
import subprocess
import sys
import tomllib

import pytest

import _pack

LAYERS = ("ops", "quantizer", "nodes")  # each may import itself and what stands before it
SOURCES = [path for layer in LAYERS for path in sorted((_pack.ROOT / layer).rglob("*.py"))]


# The quantizer's rooms: each may use itself and those on earlier floors, beside what all may use.
FLOORS = (
    {"files"},
    {"imports", "model", "rounding"},
    {"pictures"},
    {"calibration", "distillation"},
    {"pipeline"},
    {"report"},
    {"comparison"},
    {"commands"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms} | dict.fromkeys(
    ("comfyui", "console", "interrupts", "ranks", "threads", "version"), -1
)
ABOVE_NODES = {"comparison"}  # paints with what the nodes load
DOORS = {"files", "rounding", "pictures", "version"}  # what nodes may enter; conversions run as the command


def imported(tree: ast.AST, module_level_only: bool):
    """(level, dotted name) of each import statement."""
    nodes = tree.body if module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(_pack.ROOT)))
def test_dependencies_point_one_way(path):
    parts = path.relative_to(_pack.ROOT).parts
    layer, depth = parts[0], len(parts)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for level, name in imported(tree, module_level_only=False):
        if level == 0:
            assert name.split(".")[0] not in ("ternary_flux", *LAYERS) or path.name == "__main__.py"
        elif level == depth:  # reaches the pack's root
            if layer == "nodes" and name.startswith("quantizer."):
                assert name.split(".")[1] in DOORS, f"nodes must not import {name}"
            if not (name.startswith("nodes.") and parts[1] in ABOVE_NODES):
                assert LAYERS.index(name.split(".")[0]) <= LAYERS.index(layer), f"{layer} must not import {name}"
        elif layer == "quantizer" and depth == 3 and level == 2:  # leaves its room
            room, other = parts[1], name.split(".")[0]
            assert FLOOR[other] < FLOOR[room], f"{room} must not import {other}"
    if layer != "nodes":
        roots = {name.split(".")[0] for level, name in imported(tree, module_level_only=True) if level == 0}
        assert not roots & {"comfy", "comfy_kitchen", "folder_paths", "comfy_api"}


def test_the_rooms_are_the_folders():
    folders = {path.name for path in (_pack.ROOT / "quantizer").iterdir() if (path / "__init__.py").is_file()}
    assert set.union(*FLOORS) == folders


@pytest.mark.parametrize(
    "path", sorted((_pack.ROOT / "benchmarks").rglob("*.py")), ids=lambda path: str(path.relative_to(_pack.ROOT))
)
def test_benchmarks_import_no_tests(path):
    names = [name for _, name in imported(ast.parse(path.read_text(encoding="utf-8")), module_level_only=False)]
    assert not any({"tests"} & set(name.split(".")[:2]) for name in names)


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if path.relative_to(_pack.ROOT).parts[0] != "nodes" and path.name != "__main__.py"],
    ids=lambda path: str(path.relative_to(_pack.ROOT)),
)
def test_every_module_imports(path):
    """Those of nodes need ComfyUI and are imported in tests/nodes."""
    parts = path.relative_to(_pack.ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(("ternary_flux", *parts)).removesuffix(".__init__"))
    assert module.__doc__ or path.name == "__init__.py"


def after_loading(expression: str) -> str:
    """What a new interpreter in the pack's folder prints for an expression after loading the pack."""
    code = f"import importlib.util, sys, _pack; _pack.load(); print({expression})"
    return subprocess.check_output([sys.executable, "-c", code], cwd=_pack.ROOT, text=True).strip()


def test_importing_the_pack_is_light():
    heavy = "{'torch', 'numpy', 'triton', 'safetensors'}"
    assert after_loading(f"sorted({heavy} & set(sys.modules))") == "[]"


def test_importing_the_operator_searches_no_sources():
    """Python's inspect, where something asks it for a frame's source, looks for the files of all modules there are."""
    code = "import inspect, torch, _pack; _pack.load(); inspect.modulesbyfile.clear(); "
    code += "import ternary_flux.ops; print(len(inspect.modulesbyfile))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=_pack.ROOT, text=True).strip() == "0"


def test_the_folder_leaves_sys_path():
    assert after_loading("importlib.util.find_spec('nodes'), importlib.util.find_spec('ops')") == "None None"


def test_the_command_runs_from_the_packs_folder():
    result = subprocess.run(
        [sys.executable, "-m", "quantizer", "--help"], cwd=_pack.ROOT, text=True, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert "inspect" in result.stdout


def test_every_package_is_installed():
    """pyproject.toml names each folder with an __init__.py, and the data files that stand beside the code."""
    project = tomllib.loads((_pack.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {path.parent.relative_to(_pack.ROOT) for path in SOURCES if path.name == "__init__.py"}
    expected = {"ternary_flux", *(".".join(("ternary_flux", *folder.parts)) for folder in folders)}
    assert set(project["tool"]["setuptools"]["packages"]) == expected
