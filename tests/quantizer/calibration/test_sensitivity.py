"""The mixed profile: sensitive Linears are found, get two terms or ComfyUI's int8, and the pipeline goes on."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer.calibration.sensitivity import Sensitivity, best_upgrades, sensitivities, write_mixed
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import FormatError
from ternary_flux.quantizer.files.export import export_checkpoint
from ternary_flux.quantizer.files.precision import int8
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import Flux, Inputs
from ternary_flux.quantizer.model.student import load_student, save_student
from ternary_flux.quantizer.model.teacher import Teacher
from ternary_flux.quantizer.pictures.states import Batch
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests import builders

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=False)
LOUD, HALF = "single_blocks.0.linear1", "single_blocks.0.linear2"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Dense checkpoint, rounded file, and states with the teacher's velocities."""
    folder = tmp_path_factory.mktemp("mixed")
    generator = torch.Generator().manual_seed(0)
    builders.write_flux(folder / "dense.safetensors", ARCH)
    model = builders.flux(ARCH)
    round_checkpoint(folder / "dense.safetensors", folder / "round.safetensors")
    states = torch.randn(4, 16, 4, 4, generator=generator), torch.rand(4, generator=generator)
    inputs = Inputs(*states, torch.randn(4, 5, 32, generator=generator), torch.randn(4, 24, generator=generator))
    with torch.no_grad():
        velocity = model(*inputs)
    dense, file = open_checkpoint(folder / "dense.safetensors"), open_ternary(folder / "round.safetensors")
    return dense, file, Batch(inputs, velocity)


def original(dense):
    model = Flux(ARCH)
    model.load_state_dict({name: dense.tensor(name).float() for name in dense.names})
    return model


def error(model, batch):
    with torch.no_grad():
        return float((model(*batch.inputs) - batch.velocity).square().sum() / batch.velocity.square().sum())


@pytest.fixture
def mixed(made, tmp_path):
    dense, file, _ = made
    write_mixed(tmp_path / "mixed.safetensors", file, dense, {LOUD: "int8", HALF: "two-terms"})
    return open_ternary(tmp_path / "mixed.safetensors")


def test_rows_of_int8():
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    codes, scale = int8(weight)
    assert codes.dtype == torch.int8 and scale.shape == (6, 1)
    assert float((codes * scale - weight).abs().max()) <= float(scale.max()) / 2 + 1e-7


@pytest.mark.parametrize("precision", ["two-terms", "int8"])
def test_the_gain_of_a_layer_is_what_it_gains(made, tmp_path, precision):
    """In the original, where it alone is ternary."""
    dense, file, batch = made
    measured = sensitivities(file, Teacher(dense), [batch], precisions=[precision])
    assert {(result.name, result.precision) for result in measured} == {(name, precision) for name in ARCH.linears}
    result = next(result for result in measured if result.name == LOUD)
    write_mixed(tmp_path / "one.safetensors", file, dense, {LOUD: precision})
    one = open_ternary(tmp_path / "one.safetensors")
    ternary, other = (original(dense) for _ in "ab")
    with torch.no_grad():
        ternary.get_parameter(f"{LOUD}.weight").copy_(file.weight(LOUD).dequantize())
        other.get_parameter(f"{LOUD}.weight").copy_(one.parameter(f"{LOUD}.weight").float())
    gain = error(ternary, batch) - error(other, batch)
    assert gain == pytest.approx(result.gain, rel=1e-3) and gain > 0
    added = one.path.stat().st_size - file.path.stat().st_size
    assert added == pytest.approx(result.cost, abs=1024)  # the header differs too


def test_choice_fits_and_helps():
    measured = [
        Sensitivity("a", "int8", 1.0, 10),
        Sensitivity("b", "int8", 0.5, 100),
        Sensitivity("c", "int8", 0.1, 20),
        Sensitivity("d", "int8", -1, 1),
    ]
    assert list(best_upgrades(measured, 40)) == ["a", "c"]
    assert best_upgrades(measured, 0) == {}


@pytest.mark.parametrize(
    "extra, precisions",
    [
        (29, {"a": "two-terms"}),
        (30, {"a": "two-terms", "b": "two-terms"}),  # the second layer before the small rest of the first
        (49, {"a": "two-terms", "b": "two-terms"}),
        (50, {"a": "int8", "b": "two-terms"}),
        (70, {"a": "int8", "b": "int8"}),
    ],
)
def test_two_terms_first_then_8_bits(extra, precisions):
    measured = [
        Sensitivity("a", "two-terms", 0.8, 10),
        Sensitivity("a", "int8", 1.0, 30),
        Sensitivity("b", "two-terms", 0.4, 20),
        Sensitivity("b", "int8", 0.5, 40),
    ]
    assert {name: result.precision for name, result in best_upgrades(measured, extra).items()} == precisions


def test_the_file_has_comfyuis_format(mixed):
    assert mixed.int8 == (LOUD,) and LOUD not in mixed.layers
    assert [name for name, plan in mixed.layers.items() if plan.terms == 2] == [HALF]
    assert mixed.architecture == ARCH
    state = load_file(mixed.path)
    assert state[f"{LOUD}.weight"].dtype == torch.int8 and state[f"{LOUD}.weight_scale"].shape == (7 * 128, 1)
    assert b'"int8_tensorwise"' in state[f"{LOUD}.comfy_quant"].numpy().tobytes()


def test_it_is_exported_and_saved_again(made, mixed, tmp_path):
    dense = made[0]
    export_checkpoint(mixed, tmp_path / "export.safetensors", dtype=torch.float32)
    exported = load_file(tmp_path / "export.safetensors")
    assert exported.keys() == set(dense.names)
    codes, scale = int8(dense.tensor(f"{LOUD}.weight"))
    assert torch.equal(exported[f"{LOUD}.weight"], codes * scale)
    original = dense.tensor(f"{HALF}.weight").float()
    assert float((exported[f"{HALF}.weight"] - original).norm() / original.norm()) < 0.2
    student = load_student(mixed)
    for name in (LOUD, HALF):
        assert not student.get_parameter(f"{name}.weight").requires_grad
    save_student(tmp_path / "again.safetensors", student, mixed, metadata=mixed.metadata)
    again = open_ternary(tmp_path / "again.safetensors")
    assert torch.equal(again.tensor(f"{LOUD}.weight"), mixed.tensor(f"{LOUD}.weight"))
    assert again.int8 == mixed.int8 and again.layers == mixed.layers
    kept = mixed.weight(HALF).tensors
    assert all(torch.equal(tensor, kept[part]) for part, tensor in again.weight(HALF).tensors.items())


def test_comfyui_loads_the_layer(mixed):
    from ternary_flux.benchmarks import comfyui

    comfyui.make_importable()
    import comfy.ops

    operations = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32)
    layer = operations.Linear(128, 7 * 128, dtype=torch.float32)
    state = load_file(mixed.path)
    parts = ("weight", "weight_scale", "comfy_quant", "bias")
    layer.load_state_dict({part: state[f"{LOUD}.{part}"].clone() for part in parts})
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    expected = x @ mixed.parameter(f"{LOUD}.weight").t() + mixed.tensor(f"{LOUD}.bias").float()
    with torch.no_grad():
        assert float((layer(x) - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("part, change", [("weight_scale", lambda t: t[:5].clone()), ("weight", lambda t: t.float())])
def test_damage_is_named(mixed, tmp_path, part, change):
    state = load_file(mixed.path)
    state[f"{LOUD}.{part}"] = change(state[f"{LOUD}.{part}"])
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "damaged.safetensors")
    with pytest.raises(FormatError, match=f"{LOUD}.{part}"):
        open_ternary(tmp_path / "damaged.safetensors")


def test_all_layers_in_8_bits_are_refused(made, tmp_path):
    dense, file, _ = made
    with pytest.raises(ValueError, match="stay ternary"):
        write_mixed(tmp_path / "all.safetensors", file, dense, dict.fromkeys(file.layers, "int8"))
