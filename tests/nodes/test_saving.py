"""Files saved by ComfyUI's own nodes: what they keep of the file that was loaded, and who loads them."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.tests.nodes import adapters, tiny

METADATA = {
    "modelspec.title": "tiny",
    "modelspec.author": "somebody",
    "ternary.method": "distill",
    "ternary.source": "x",
}


@pytest.fixture
def file(tmp_path):
    """A ternary file as the quantizer writes it for sharing."""
    options = {"packing": "base3", "dtype": torch.bfloat16, "metadata": METADATA, "columns": "half"}
    return tiny.write(tmp_path / "file.safetensors", **options)


@pytest.fixture
def save(comfy, tmp_path, monkeypatch):
    """The node Save Model; returns the file that it wrote."""
    from comfy_extras.nodes_model_merging import ModelSave

    monkeypatch.setattr(comfy.folder_paths, "get_output_directory", lambda: str(tmp_path))

    def save(model, prefix="saved"):
        ModelSave().save(model, prefix, prompt={"1": "a workflow"})
        return sorted(tmp_path.glob(f"{prefix}*.safetensors"))[-1]

    return save


def header(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


@pytest.mark.feature("Save Model (ModelSave)", "keeps metadata, packing and dtypes")
@pytest.mark.parametrize("loaded", [True, False])
def test_a_saved_model_is_the_file_again(comfy, file, save, loaded, monkeypatch):
    model = comfy.loader.load(str(file), "full")
    if not loaded:
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models: None)
        model.patch_model(tiny.CPU, lowvram_model_memory=1)
    saved = save(model)
    before, after = load_file(file), load_file(saved)
    names = {f"model.diffusion_model.{name.replace('_norm.scale', '_norm.weight')}": name for name in before}
    assert names.keys() == after.keys()
    for name, source in names.items():
        assert after[name].dtype == before[source].dtype and torch.equal(after[name], before[source]), name
    assert header(saved).items() >= METADATA.items()
    assert "prompt" in header(saved)  # core's own


def test_the_functions_below_the_node_keep_the_metadata_too(comfy, file, tmp_path):
    model = comfy.loader.load(str(file), "full")
    for metadata in (None, {"modelspec.title": "another"}):
        comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), model, metadata=metadata)
        assert header(tmp_path / "saved.safetensors").items() >= (METADATA | (metadata or {})).items()


@pytest.mark.parametrize("part", ["img_in", "double_blocks.0.img_attn.qkv"])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_lora_on_dense_parameters_is_saved_in_their_dtype(comfy, file, save, loaded, part, monkeypatch):
    kind, shape = ("diff", (tiny.HIDDEN, 64)) if part == "img_in" else ("diff_b", (3 * tiny.HIDDEN,))
    lora = {f"diffusion_model.{part}.{kind}": torch.randn(shape, generator=tiny.generator(0))}
    model = adapters.apply(comfy, comfy.loader.load(str(file), "full"), [(lora, 1.0)])
    if not loaded:
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", lambda models: None)
    saved, before = load_file(save(model)), load_file(file)
    name = f"{part}.{'weight' if part == 'img_in' else 'bias'}"
    found = saved[f"model.diffusion_model.{name}"]
    assert found.dtype == torch.bfloat16
    assert tiny.distance(found.float(), before[name].float() + next(iter(lora.values()))) < 0.01


def merge(comfy, first, second, ratio):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(first, second, ratio)[0]


def no_merge(comfy, file, other):
    return merge(comfy, comfy.loader.load(str(file), "full"), comfy.loader.load(str(other), "full"), 1.0)


def no_strength(comfy, file, other):
    loras = [(adapters.KINDS[kind](1), 0.0) for kind in ("dora", "difference", "lokr")]
    return adapters.apply(comfy, comfy.loader.load(str(file), "full"), loras)


@pytest.mark.feature("Merges of ratio 1 and LoRAs of strength 0", "stay ternary")
@pytest.mark.parametrize("change", [no_merge, no_strength])
def test_a_merge_that_changes_nothing_stays_ternary(comfy, file, tmp_path, save, change, caplog):
    model = change(comfy, file, tiny.write(tmp_path / "other.safetensors", seed=9))
    saved = save(model)
    assert not [record for record in caplog.records if "Ternary FLUX" in record.message]
    before, after = load_file(file), load_file(saved)
    for name in (name for name in before if name.endswith(".weight") and before[name].dtype == torch.uint8):
        assert torch.equal(after[f"model.diffusion_model.{name}"], before[name])


def test_a_dense_merge_says_which_node_loads_it(comfy, file, tmp_path, save, caplog):
    other = tiny.write(tmp_path / "other.safetensors", seed=9)
    merged = merge(comfy, comfy.loader.load(str(file), "full"), comfy.loader.load(str(other), "full"), 0.5)
    saved = save(merged)
    (line,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING and "saved" in r.message]
    assert "13 of 13 ternary layers" in line and "the node Load Diffusion Model" in line
    expected = tiny.run(merged)
    assert tiny.distance(tiny.run(comfy.sd.load_diffusion_model(str(saved))), expected) < 0.03  # weights in bf16
    assert "modelspec.author" in header(saved) and "ternary.method" not in header(saved)
    with pytest.raises(ValueError, match="Load it with the node Load Diffusion Model"):
        comfy.loader.load(str(saved))


def test_some_dense_layers_leave_it_to_our_node(comfy, file, save, caplog):
    model = adapters.apply(comfy, comfy.loader.load(str(file), "full"), [(adapters.dora(4), 1.0)])
    saved = save(model)
    (line,) = [r.message for r in caplog.records if r.levelno >= logging.WARNING and "saved" in r.message]
    assert "4 of 13 ternary layers" in line and "the node Load Ternary FLUX" in line
    assert tiny.distance(tiny.run(comfy.loader.load(str(saved), "full")), tiny.run(model)) < 0.03


@pytest.mark.feature("Save Checkpoint", "the loader finds the file")
def test_a_checkpoint_with_other_models_is_loaded(comfy, file, tmp_path):
    """Save Checkpoint writes the text encoders and the VAE into the same file."""
    from safetensors.torch import save_file

    state = {f"model.diffusion_model.{name}": tensor for name, tensor in load_file(file).items()}
    state |= {"vae.decoder.conv_in.weight": torch.zeros(4, 4), "text_encoders.clip_l.x.weight": torch.zeros(4, 4)}
    save_file(state, tmp_path / "checkpoint.safetensors")
    expected = tiny.run(comfy.loader.load(str(file), "full"))
    assert tiny.distance(tiny.run(comfy.loader.load(str(tmp_path / "checkpoint.safetensors"), "full")), expected) < 1e-5


@pytest.mark.parametrize("packing", [None, "planes32", "base3"])
def test_the_save_node_writes_what_was_loaded(comfy, file, tmp_path, packing):
    from ternary_flux.nodes import save

    save.write(comfy.loader.load(str(file), "full"), tmp_path / "new" / "saved.safetensors", packing)
    before, after = open_ternary(file), open_ternary(tmp_path / "new" / "saved.safetensors")
    assert {plan.packing for plan in after.layers.values()} == {packing or "base3"}
    assert after.layers.keys() == before.layers.keys() and after.dense.keys() == before.dense.keys()
    for name in before.layers:
        wanted, found = before.weight(name), after.weight(name)
        assert all(torch.equal(tensor, found.tensors[field]) for field, tensor in wanted.tensors.items()), name
    assert after.metadata.items() >= METADATA.items()


def test_the_save_node_keeps_int8_layers(comfy, mixed, tmp_path):
    from ternary_flux.nodes import save

    model = adapters.apply(comfy, comfy.loader.load(str(mixed), "full"), [(adapters.bfl_lora(4), 0.5)])
    save.write(model, tmp_path / "saved.safetensors", "base3")
    again = comfy.loader.load(str(tmp_path / "saved.safetensors"), "full")
    assert tiny.distance(tiny.run(again), tiny.run(model)) < 0.02  # factors in bf16, the int8 layer rounded again


@pytest.mark.parametrize("prefix", ["../escape", "..", ""])
def test_the_save_node_writes_into_its_folder_alone(comfy, file, tmp_path, prefix, monkeypatch):
    from ternary_flux.nodes.save import SaveTernaryFlux

    monkeypatch.setattr(comfy.folder_paths, "output_directory", str(tmp_path / "output"))
    model = comfy.loader.load(str(file))
    with pytest.raises(ValueError, match="give the name of a file inside output/diffusion_models"):
        SaveTernaryFlux.execute(model, prefix)
    assert set(tmp_path.rglob("*.safetensors*")) <= {file}
