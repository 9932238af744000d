import hashlib

import pytest
import torch
from safetensors.torch import save_file
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import FormatError, TensorFile
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
@pytest.mark.parametrize("arch", [synthetic.FLUX1, synthetic.FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_reads(tmp_path, arch, prefix, dtype):
    checkpoint = open_checkpoint(synthetic.write(tmp_path / "flux.safetensors", arch, dtype, prefix))
    assert checkpoint.architecture == arch
    assert checkpoint.metadata["modelspec.title"] == "Synthetic"
    expected = synthetic.tensors(arch, dtype)
    assert set(checkpoint.names) == expected.keys()
    for name in ("img_in.weight", f"{arch.linears[0]}.weight", "final_layer.linear.weight"):
        assert checkpoint.dtype(name) == dtype
        assert torch.equal(checkpoint.tensor(name), expected[name])


def test_takes_the_model_out_of_an_all_in_one_file(tmp_path):
    extra = {"first_stage_model.decoder.conv.weight": torch.zeros(2), "text_encoders.t5.img_in.weight": torch.zeros(3)}
    path = synthetic.write(tmp_path / "all.safetensors", prefix="model.diffusion_model.", extra=extra)
    assert set(open_checkpoint(path).names) == synthetic.FLUX1.shapes.keys()


def test_comfyui_names_of_the_norms_become_bfls(tmp_path):
    state = {n.replace("norm.scale", "norm.weight"): t for n, t in synthetic.tensors().items()}
    save_file(state, tmp_path / "x.safetensors")
    assert set(open_checkpoint(tmp_path / "x.safetensors").names) == synthetic.FLUX1.shapes.keys()


def test_pieces_are_the_file(tmp_path):
    path = synthetic.write(tmp_path / "flux.safetensors", extra={"vae.x": torch.ones(5000)}, prefix="m.")
    checkpoint = open_checkpoint(path)
    pieces = list(checkpoint.pieces(size=4000))
    assert b"".join(piece.data for piece in pieces) == path.read_bytes()
    name = f"{synthetic.FLUX1.linears[0]}.weight"
    rows = [piece for piece in pieces if piece.name == name]
    assert len(rows) > 1 and sum(piece.rows for piece in rows) == checkpoint.shape(name)[0]
    assert torch.equal(torch.cat([piece.values() for piece in rows]), checkpoint.tensor(name))


def refused(path, message):
    with pytest.raises(FormatError, match=message) as error:
        open_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_ternary_file_is_refused_as_a_source(tmp_path):
    source = synthetic.write(tmp_path / "flux.safetensors")
    round_checkpoint(source, tmp_path / "ternary.safetensors")
    refused(tmp_path / "ternary.safetensors", "this is a ternary FLUX.*quantizer export")


def test_a_missing_or_misshapen_tensor_is_named(tmp_path):
    state = synthetic.tensors()
    missing = state.pop("single_blocks.1.linear2.bias")
    save_file(state, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "single_blocks.1.linear2.bias is missing")
    save_file(state | {"single_blocks.1.linear2.bias": missing[1:].clone()}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", r"single_blocks.1.linear2.bias has shape \[127\]")


def test_the_source_is_hashed_while_it_is_read(tmp_path):
    source = synthetic.write(tmp_path / "flux.safetensors", prefix="m.", extra={"vae": torch.ones(3)})
    round_checkpoint(source, tmp_path / "ternary.safetensors")
    metadata = TensorFile(tmp_path / "ternary.safetensors").header.metadata
    assert metadata["ternary.source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
