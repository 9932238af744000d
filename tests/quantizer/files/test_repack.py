from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer.calibration.sensitivity import write_mixed
from ternary_flux.quantizer.cli import run
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.layer import LayerPlan
from ternary_flux.quantizer.files.pack import pack
from ternary_flux.quantizer.files.ternary import create_ternary, open_ternary
from ternary_flux.quantizer.files.verify import verify
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests import builders
from ternary_flux.tests.quantizer import synthetic


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A file with Linears in one term, two terms and 8 bits."""
    folder = tmp_path_factory.mktemp("pack")
    arch = replace(synthetic.FLUX1, context_dim=72)
    source = synthetic.write(folder / "dense.safetensors", arch)
    round_checkpoint(source, folder / "rounded.safetensors")
    chosen = {"double_blocks.0.img_attn.qkv": "two-terms", "single_blocks.1.linear2": "int8"}
    rounded = open_ternary(folder / "rounded.safetensors")
    write_mixed(folder / "mixed.safetensors", rounded, open_checkpoint(source), chosen)
    return folder / "mixed.safetensors"


def test_forth_and_back_gives_the_same_file(mixed, tmp_path):
    there, back = tmp_path / "base3.safetensors", tmp_path / "planes32.safetensors"
    assert run(["pack", str(mixed), "--packing", "base3", "-o", str(there)]) == 0
    assert run(["pack", str(there), "--packing", "planes32", "-o", str(back)]) == 0
    assert {layer.packing for layer in open_ternary(there).layers.values()} == {"base3"}
    assert there.stat().st_size < mixed.stat().st_size and verify(there) == verify(back) == []
    before, between, after = (open_ternary(path) for path in (mixed, there, back))
    assert before.metadata == after.metadata and '"base3"' in between.metadata["ternary.settings"]
    first, last = load_file(mixed), load_file(back)
    assert first.keys() == last.keys()
    assert all(first[key].dtype == last[key].dtype and torch.equal(first[key], last[key]) for key in first)
    for name in before.layers:
        parts = between.weight(name).tensors
        assert all(torch.equal(parts[part], tensor) for part, tensor in before.weight(name).tensors.items())


@pytest.mark.parametrize("scales", ["row", "integer", "bf16", "fp32"])
@pytest.mark.parametrize("form", [{}, {"rank": 3}, {"terms": 2}, {"column": torch.bfloat16}])
def test_every_form_of_a_weight_comes_back(tmp_path, scales, form):
    weight = builders.ternary_weight(40, 300, scales, **form)
    paths = [tmp_path / name for name in ("planes32", "base3", "back")]
    with create_ternary(paths[0], {"x": LayerPlan.of(weight)}, {}, {}) as writer:
        writer.layer("x", weight)
    pack(paths[0], paths[1], "base3")
    pack(paths[1], paths[2], "planes32")
    assert paths[2].read_bytes() == paths[0].read_bytes() != paths[1].read_bytes()


def test_a_file_that_comfyui_saved_gets_its_names_and_checksums(mixed, tmp_path):
    saved = {f"model.diffusion_model.{key}": tensor for key, tensor in load_file(mixed).items()}
    save_file(saved, tmp_path / "saved.safetensors")
    packed = tmp_path / "packed.safetensors"
    assert run(["pack", str(tmp_path / "saved.safetensors"), "--packing", "planes32", "-o", str(packed)]) == 0
    assert verify(packed) == [] and load_file(packed).keys() == load_file(mixed).keys()


def test_the_source_is_never_replaced(mixed, capsys):
    assert run(["pack", str(mixed), "--packing", "base3", "-o", str(mixed), "--force"]) == 2
    assert "the output is an input" in capsys.readouterr().err
