"""The mixed profile: the sensitive Linears are found and stored as ComfyUI's int8, and the pipeline goes on from it."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer.architecture import Architecture
from ternary_flux.quantizer.checkpoint import open_checkpoint
from ternary_flux.quantizer.container import FormatError
from ternary_flux.quantizer.conversion import round_checkpoint
from ternary_flux.quantizer.export import export_checkpoint
from ternary_flux.quantizer.flux import Flux
from ternary_flux.quantizer.format import open_ternary
from ternary_flux.quantizer.mixed import Sensitivity, choose, int8, sensitivities, write_mixed
from ternary_flux.quantizer.student import load_student, save_student
from ternary_flux.quantizer.velocity import Batch

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=False)
LOUD = "single_blocks.0.linear1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dense checkpoint, rounded file, and states with the teacher's velocities."""
    folder = tmp_path_factory.mktemp("mixed")
    generator = torch.Generator().manual_seed(0)
    model, state = Flux(ARCH), {}
    for name, parameter in model.named_parameters():
        scale, mean = (0.08, 0.0) if parameter.ndim == 2 else (0.1, float(name.endswith("scale")))
        state[name] = (mean + scale * torch.randn(parameter.shape, generator=generator)).bfloat16()
    save_file(state, folder / "dense.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    round_checkpoint(folder / "dense.safetensors", folder / "round.safetensors")
    inputs = [torch.randn(4, 16, 4, 4, generator=generator), torch.rand(4, generator=generator)]
    inputs += [torch.randn(4, 5, 32, generator=generator), torch.randn(4, 24, generator=generator), None]
    with torch.no_grad():
        velocity = model(*inputs)
    dense, file = open_checkpoint(folder / "dense.safetensors"), open_ternary(folder / "round.safetensors")
    return dense, file, Batch(*inputs, velocity)


def error(model, batch):
    with torch.no_grad():
        return float((model(*batch.inputs) - batch.velocity).square().sum() / batch.velocity.square().sum())


@pytest.fixture
def mixed(made, tmp_path):
    dense, file, _ = made
    write_mixed(tmp_path / "mixed.safetensors", file, dense, [LOUD])
    return open_ternary(tmp_path / "mixed.safetensors")


def test_rows_of_int8():
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    codes, scale = int8(weight)
    assert codes.dtype == torch.int8 and scale.shape == (6, 1)
    assert float((codes * scale - weight).abs().max()) <= float(scale.max()) / 2 + 1e-7


def test_the_gain_of_a_layer_is_what_it_gains(made, mixed):
    dense, file, batch = made
    ranking = sensitivities(file, dense, [batch])
    assert {result.name for result in ranking} == set(ARCH.linears)
    worth = [result.gain / result.cost for result in ranking]
    assert worth == sorted(worth, reverse=True)
    gain = next(result.gain for result in ranking if result.name == LOUD)
    assert error(load_student(file), batch) - error(load_student(mixed), batch) == pytest.approx(gain, rel=1e-3)


def test_choice_fits_and_helps():
    ranking = [
        Sensitivity("a", 1.0, 10),
        Sensitivity("b", 0.5, 100),
        Sensitivity("c", 0.1, 20),
        Sensitivity("d", -1, 1),
    ]
    assert choose(ranking, 40) == ["a", "c"]
    assert choose(ranking, 0) == []


def test_the_file_has_comfyuis_format(mixed):
    assert mixed.int8 == (LOUD,) and LOUD not in mixed.layers
    assert mixed.architecture == ARCH
    state = mixed.state_dict()
    assert state[f"{LOUD}.weight"].dtype == torch.int8 and state[f"{LOUD}.weight_scale"].shape == (7 * 128, 1)
    assert b'"int8_tensorwise"' in state[f"{LOUD}.comfy_quant"].numpy().tobytes()


def test_it_is_exported_and_saved_again(made, mixed, tmp_path):
    dense = made[0]
    export_checkpoint(mixed, tmp_path / "export.safetensors", torch.float32)
    exported = load_file(tmp_path / "export.safetensors")
    assert exported.keys() == dense.names.keys()
    codes, scale = int8(dense.tensor(f"{LOUD}.weight"))
    assert torch.equal(exported[f"{LOUD}.weight"], codes * scale)
    student = load_student(mixed)
    assert not student.get_parameter(f"{LOUD}.weight").requires_grad
    save_student(tmp_path / "again.safetensors", student, mixed, mixed.metadata)
    again = open_ternary(tmp_path / "again.safetensors")
    assert torch.equal(again.tensor(f"{LOUD}.weight"), mixed.tensor(f"{LOUD}.weight"))
    assert again.int8 == mixed.int8


def test_comfyui_loads_the_layer(mixed):
    from ternary_flux.tests import host

    host.comfyui()
    import comfy.ops

    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32)
    layer = operations.Linear(128, 7 * 128, dtype=torch.float32)
    state = mixed.state_dict()
    parts = ("weight", "weight_scale", "comfy_quant", "bias")
    layer.load_state_dict({part: state[f"{LOUD}.{part}"].clone() for part in parts})
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    expected = x @ mixed.parameter(f"{LOUD}.weight").t() + mixed.tensor(f"{LOUD}.bias").float()
    with torch.no_grad():
        assert float((layer(x) - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("part, change", [("weight_scale", lambda t: t[:5].clone()), ("weight", lambda t: t.float())])
def test_damage_is_named(mixed, tmp_path, part, change):
    state = mixed.state_dict()
    state[f"{LOUD}.{part}"] = change(state[f"{LOUD}.{part}"])
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "damaged.safetensors")
    with pytest.raises(FormatError, match=f"{LOUD}.{part}"):
        open_ternary(tmp_path / "damaged.safetensors")


def test_all_layers_in_8_bits_are_refused(made, tmp_path):
    dense, file, _ = made
    with pytest.raises(ValueError, match="stay ternary"):
        write_mixed(tmp_path / "all.safetensors", file, dense, list(file.layers))
