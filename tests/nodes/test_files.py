"""Names of files: what the node offers, names from other systems and from other nodes, files that change."""

import os
import shutil

import pytest
from ternary_flux.tests.nodes import tiny


@pytest.fixture
def models(comfy, tmp_path, monkeypatch, path):
    """A models folder with ternary and other files, and a ternary checkpoint."""
    for folder in ("diffusion_models", "checkpoints"):
        (tmp_path / folder / "flux").mkdir(parents=True)
        monkeypatch.setitem(
            comfy.folder_paths.folder_names_and_paths, folder, ([str(tmp_path / folder)], {".safetensors", ".gguf"})
        )
        monkeypatch.delitem(comfy.folder_paths.filename_list_cache, folder, raising=False)
    (tmp_path / "diffusion_models" / "a-broken.safetensors").write_bytes(b"x")
    (tmp_path / "diffusion_models" / "b.gguf").write_bytes(b"GGUF")
    shutil.copy(path, tmp_path / "diffusion_models" / "z.safetensors")
    shutil.copy(path, tmp_path / "diffusion_models" / "flux" / "y.safetensors")
    shutil.copy(path, tmp_path / "checkpoints" / "c.safetensors")
    (tmp_path / "checkpoints" / "sdxl.safetensors").write_bytes(b"x")
    return tmp_path


def test_ternary_files_come_first(comfy, models):
    assert comfy.files.names() == [
        os.path.join("flux", "y.safetensors"),
        "z.safetensors",
        "c.safetensors",
        "a-broken.safetensors",
    ]


def test_one_name_in_two_folders(comfy, models, tmp_path):
    """Both are offered, and each means one file, also when the other is gone."""
    first, second = (models / folder / "c.safetensors" for folder in ("diffusion_models", "checkpoints"))
    tiny.write(first, seed=5)
    assert [name for name in comfy.files.names() if "c.safe" in name] == ["c.safetensors", "checkpoints/c.safetensors"]
    assert comfy.files.find("c.safetensors") == str(first)
    for name in ("checkpoints/c.safetensors", "checkpoints\\c.safetensors"):
        assert comfy.files.find(name) == str(second)
    with pytest.raises(FileNotFoundError):
        comfy.files.find("checkpoints/z.safetensors")


def test_a_model_is_described_as_it_was_loaded(comfy, models):
    """Also where its file is another one by now, or no model at all."""
    from ternary_flux.nodes import info

    path = models / "diffusion_models" / "z.safetensors"
    model = comfy.loader.load(str(path), "full")
    lines, errors = info.of_model(model)
    assert lines[0] == "z.safetensors: FLUX.1"
    for replace in (lambda: path.write_bytes(b"<!doctype html>"), path.unlink):
        replace()
        assert info.of_model(model) == ([*lines, "its file was replaced or removed since it was loaded"], errors)


def test_what_happens_to_files_is_counted(comfy, tmp_path):
    watch, path = comfy.files.Watch(), tmp_path / "x"
    path.write_text("a")
    watch.add(path)
    assert watch.changes() == watch.changes() == 0
    path.write_text("other")
    assert watch.changes() == watch.changes() == 1
    path.unlink()
    assert watch.changes() == watch.changes() == 2
    path.write_text("again")
    watch.add(path)
    assert watch.changes() == 2
    path.write_text("seen by another node first")
    watch.add(path)
    assert watch.changes() == watch.changes() == 3


@pytest.mark.parametrize("name", ["flux/y.safetensors", "flux\\y.safetensors"])
def test_both_separators_of_folders_find_the_file(comfy, models, name):
    assert comfy.files.find(name) == str(models / "diffusion_models" / "flux" / "y.safetensors")
    assert comfy.loader.LoadTernaryFlux.validate_inputs(name) is True


@pytest.mark.parametrize(
    "name", ["../checkpoints/c.safetensors", "..\\..\\gone.safetensors", "gone.safetensors", "b.gguf"]
)
def test_other_files_are_not_found(comfy, models, name):
    with pytest.raises(FileNotFoundError, match="is not in models/diffusion_models"):
        comfy.files.find(name)


def test_a_name_from_another_node_is_checked_when_it_runs(comfy, models):
    node = comfy.loader.LoadTernaryFlux
    assert node.validate_inputs(file=None) is True
    assert node.fingerprint_inputs(file=None, activations="auto") == node.fingerprint_inputs(None, activations="auto")
    with pytest.raises(ValueError, match="^a-broken.safetensors: ") as refused:
        node.execute(file="a-broken.safetensors", activations="auto")
    assert str(models) not in str(refused.value)
    assert node.execute(file="flux\\y.safetensors", activations="auto").args[0].model is not None


def test_errors_name_the_file_and_not_the_servers_folders(comfy, models):
    problem = comfy.loader.LoadTernaryFlux.validate_inputs("a-broken.safetensors")
    assert problem.startswith("a-broken.safetensors: ") and str(models) not in problem


def overwrite(path, source):
    """As cp does: into the same file."""
    with open(path, "r+b") as file:
        file.write(source.read_bytes())


def test_a_loaded_model_does_not_change_with_its_file(comfy, models, tmp_path, reference, mixed):
    other = tiny.write(tmp_path / "other.safetensors", seed=9)
    for name, source in (("z.safetensors", None), ("mixed.safetensors", mixed)):
        file = models / "diffusion_models" / name
        if source:
            shutil.copy(source, file)
        model = comfy.loader.load(str(file), "full")
        before = tiny.run(model)
        overwrite(file, other)
        os.truncate(file, 100)  # a map of the file would end the process here
        assert tiny.distance(tiny.run(model), before) < 1e-5


def test_a_file_that_is_still_read_is_reported_when_it_changes(comfy, models, tmp_path):
    """Dynamic VRAM reads weights from the file when it needs them."""
    from dataclasses import replace

    file = models / "diffusion_models" / "z.safetensors"
    model = comfy.loader.load(str(file), "full")
    model.model.ternary_origin = replace(model.model.ternary_origin, mapped=True)
    before = comfy.loader.LoadTernaryFlux.fingerprint_inputs(None)
    comfy.model_management.load_models_gpu([model])
    model.unpatch_model(tiny.CPU)
    replacement = tiny.write(tmp_path / "other.safetensors", seed=9)
    shutil.copy(replacement, tmp_path / "renamed.safetensors")
    os.replace(tmp_path / "renamed.safetensors", file)  # the old file stays readable
    model.partially_load(tiny.CPU, 1e32)
    model.unpatch_model(tiny.CPU)
    model.model.ternary_origin = replace(model.model.ternary_origin, stamp=comfy.files.stamp(file))
    overwrite(file, tiny.write(tmp_path / "third.safetensors", seed=10))
    with pytest.raises(RuntimeError, match="z.safetensors was written over.*Run again"):
        model.partially_load(tiny.CPU, 1e32)
    assert comfy.loader.LoadTernaryFlux.fingerprint_inputs(None) != before  # a linked name is loaded again
