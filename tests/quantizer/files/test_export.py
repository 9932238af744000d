import pytest
import torch
from safetensors.torch import load_file
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import FormatError
from ternary_flux.quantizer.files.export import export_checkpoint
from ternary_flux.quantizer.files.layer import LayerPlan
from ternary_flux.quantizer.files.ternary import create_ternary, open_ternary
from ternary_flux.quantizer.rounding.columns import column_scales
from ternary_flux.quantizer.rounding.one_term import ternarize
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests.quantizer import synthetic


@pytest.mark.parametrize("arch", [synthetic.FLUX1, synthetic.FLUX2], ids=["FLUX.1", "FLUX.2"])
@pytest.mark.parametrize("packing", ["planes32", "base3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_export_is_the_rounded_model(tmp_path, arch, packing, dtype):
    source = synthetic.write(tmp_path / "dense.safetensors", arch)
    round_checkpoint(source, tmp_path / "ternary.safetensors", packing=packing)
    done = []
    export_checkpoint(
        tmp_path / "ternary.safetensors", tmp_path / "export.safetensors", dtype=dtype, on_progress=done.append
    )
    state, exported = synthetic.tensors(arch), load_file(tmp_path / "export.safetensors")
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        is_ternary = layer != name and layer in arch.linears
        expected = tensor.to(dtype)
        if is_ternary:
            expected = ternarize(tensor, column=column_scales(tensor))[0].dequantize(dtype)
        assert exported[name].dtype == dtype and torch.equal(exported[name], expected), name
    assert sum(done) == sum(n * k for n, k in arch.linear_shapes.values())
    assert open_checkpoint(tmp_path / "export.safetensors").architecture == arch


def test_the_low_rank_part_is_added(tmp_path):
    arch = synthetic.FLUX1
    state = synthetic.tensors(arch)
    weights = {name: ternarize(state[f"{name}.weight"])[0] for name in arch.linears}
    name = arch.linears[0]
    n, k = weights[name].shape
    low_rank = {"down": torch.randn(3, k).bfloat16(), "up": torch.randn(n, 3).bfloat16()}
    weights[name] = type(weights[name])(**weights[name].tensors, shape=(n, k), **low_rank)
    plan = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.items()}
    dense = {key: spec for key, spec in plan.items() if key.removesuffix(".weight") not in weights}
    layers = {name: LayerPlan.of(weight) for name, weight in weights.items()}
    with create_ternary(tmp_path / "t.safetensors", layers, dense, {}) as writer:
        for layer, weight in weights.items():
            writer.layer(layer, weight)
        for key in dense:
            writer.dense(key, state[key])
    export_checkpoint(tmp_path / "t.safetensors", tmp_path / "e.safetensors", dtype=torch.float32)
    exported = load_file(tmp_path / "e.safetensors")[f"{name}.weight"]
    assert torch.allclose(exported, weights[name].dequantize(), atol=1e-5)
    assert not torch.allclose(exported, weights[name].dequantize_ternary(), atol=1e-2)


def test_refusals(tmp_path):
    source = synthetic.write(tmp_path / "dense.safetensors")
    with pytest.raises(FormatError, match="this is FLUX.1, not ternary"):
        export_checkpoint(source, tmp_path / "e.safetensors")
    round_checkpoint(source, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="the output is an input"):
        export_checkpoint(tmp_path / "t.safetensors", tmp_path / "t.safetensors", overwrite=True)
    (tmp_path / "e.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="--force"):
        export_checkpoint(tmp_path / "t.safetensors", tmp_path / "e.safetensors")
    assert (tmp_path / "e.safetensors").read_bytes() == b"mine"
    export_checkpoint(open_ternary(tmp_path / "t.safetensors"), tmp_path / "e.safetensors", overwrite=True)
