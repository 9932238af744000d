"""What the Comfy registry takes from this repository, by its own tool, and what installing the pack must not do."""

import os
import re
import shutil
import struct
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from comfy_cli.registry.config_parser import extract_node_configuration
from packaging.requirements import Requirement

import _pack

PROJECT = tomllib.loads((_pack.ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# What ComfyUI brings: another version of these in its environment breaks other packs, or takes the GPU from torch.
HOSTS = {"torch", "torchvision", "torchaudio", "triton", "transformers", "comfyui-frontend-package", "comfy-kitchen"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A clean clone, with what is not committed yet."""
    folder = tmp_path_factory.mktemp("registry") / "comfyui-ternary-flux"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=_pack.ROOT, check=True, capture_output=True).stdout.split(b"\0")
    for name in filter(None, map(os.fsdecode, names)):
        source, target = _pack.ROOT / name, folder / name
        if source.is_file() and not source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def comfy(checkout: Path, *arguments: str) -> str:
    environment = os.environ | {"DO_NOT_TRACK": "1", "HOME": str(checkout.parent), "COLUMNS": "120"}
    command = [Path(sys.executable).with_name("comfy"), "--skip-prompt", "node", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


@pytest.mark.slow
def test_the_registrys_tool_finds_nothing_to_complain_about(checkout):
    said = comfy(checkout, "validate")
    assert "warning" not in said.lower() and "error" not in said.lower(), said


@pytest.mark.slow
def test_the_archive_of_the_registry_is_the_whole_pack(checkout, tmp_path):
    comfy(checkout, "pack")
    (archive,) = checkout.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "pack")
    names = {path.name for path in (tmp_path / "pack").iterdir()}
    assert {"__init__.py", "nodes", "ops", "quantizer", "workflows", "requirements.txt", "README.md", "web"} <= names
    assert "tests" not in names and archive.stat().st_size < 50e6
    code = "import _pack; _pack.load(); from ternary_flux.quantizer.cli import run; run(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "pack", capture_output=True, text=True)
    assert done.returncode == 0 and "ternary-flux" in done.stdout.lower(), done.stdout + done.stderr


def test_the_registrys_fields_are_complete(capsys):
    found = extract_node_configuration(str(_pack.ROOT / "pyproject.toml"))
    assert "Warning" not in capsys.readouterr().out
    comfy, project = found.tool_comfy, found.project
    assert all((comfy.publisher_id, comfy.display_name, comfy.icon, comfy.banner_url))
    assert all((project.urls.repository, project.urls.documentation, project.urls.issues))
    assert project.supported_comfyui_version and project.supported_os and project.supported_accelerators
    assert project.license.text == "Apache-2.0" and re.fullmatch(r"\d+\.\d+\.\d+", project.version)
    assert project.urls.repository.startswith(f"https://github.com/{comfy.publisher_id}/")
    assert project.urls.documentation.startswith(project.urls.repository)


@pytest.mark.parametrize("field, shape", [("Icon", (400, 400)), ("Banner", (1260, 540))])
def test_pictures_of_the_registry_are_in_the_repository(field, shape):
    """An icon of 400 x 400 pixels at most, a banner of 21 : 9."""
    address = PROJECT["tool"]["comfy"][field]
    owner, _, name = PROJECT["project"]["urls"]["Repository"].removeprefix("https://github.com/").partition("/")
    _, path = address.split(f"https://raw.githubusercontent.com/{owner}/{name}/main/")
    header = (_pack.ROOT / path).read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", header[16:]) == shape


def test_installing_leaves_the_hosts_packages_alone():
    """ComfyUI's managers install requirements.txt: it holds nothing of the host's, and forces no version upward."""
    lines = (_pack.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert not {requirement.name for requirement in requirements} & HOSTS
    assert all(part.operator == ">=" for requirement in requirements for part in requirement.specifier)
    assert not any(requirement.url for requirement in requirements)
    unlisted = {Requirement(line).name for line in PROJECT["project"]["dependencies"]} - {r.name for r in requirements}
    assert unlisted == {"torch"}
