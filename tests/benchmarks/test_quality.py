"""The quality benchmark's parts, with untrained models: rounding to bits, intervals, scores, the picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from ternary_flux.benchmarks.miniature import autoencoder, scenes
from ternary_flux.benchmarks.miniature.text import TextEncoder
from ternary_flux.benchmarks.quality import chart, massive, run, scores
from ternary_flux.benchmarks.quality.models import (
    dense_of,
    round_by_peer,
    round_to_bits,
    rounded,
    with_int8_activations,
)
from ternary_flux.benchmarks.quality.peer import PEERS
from ternary_flux.benchmarks.quality.scores import Setup, evaluate, interval
from ternary_flux.benchmarks.quality.stress import LEVELS
from ternary_flux.ops import ternary_linear
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import Flux, Inputs
from ternary_flux.quantizer.pictures.pool import Pool
from ternary_flux.quantizer.pictures.states import Batch
from ternary_flux.quantizer.rounding.round import round_checkpoint

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=32, guidance=False)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher():
    model, generator = Flux(ARCH), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.08 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    prompts = [p for category in scenes.CATEGORIES for p in scenes.prompts("held_out", category, 2)]
    text, vae = TextEncoder(32).requires_grad_(False), autoencoder.Autoencoder(4).requires_grad_(False)
    return Setup(ARCH, text, vae, 32, prompts, 2, CPU)


# What the best clipped rounding of Gaussian weights in groups of 128 leaves of them.
@pytest.mark.parametrize("bits, expected", [(4, 0.099), (3, 0.187)])
def test_rounding_to_bits_is_as_good_as_known(bits, expected):
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    result = rounded(weight, bits)
    assert float((result - weight).norm() / weight.norm()) == pytest.approx(expected, rel=0.1)
    assert all(len(group.unique()) <= 2**bits for group in result.view(-1, 128)[:20])


def test_files_become_models(teacher, tmp_path):
    state = {name: value.bfloat16() for name, value in teacher.state_dict().items()}
    save_file(state, tmp_path / "dense.safetensors")
    round_to_bits(tmp_path / "dense.safetensors", tmp_path / "four.safetensors", 4)
    round_checkpoint(tmp_path / "dense.safetensors", tmp_path / "ternary.safetensors")
    models = {name: dense_of(tmp_path / f"{name}.safetensors", CPU) for name in ("dense", "four", "ternary")}
    assert [round(bits, 2) for _, _, bits in models.values()][:2] == [16, 4.12]
    assert 2 < models["ternary"][2] < 2.5
    sizes = [size for _, size, _ in models.values()]
    assert sizes[0] > sizes[1] > sizes[2]
    weight = open_ternary(tmp_path / "ternary.safetensors").weight(ARCH.linears[0]).dequantize()
    assert torch.equal(models["ternary"][0].get_parameter(f"{ARCH.linears[0]}.weight"), weight)


def test_8_bit_activations_are_the_loaders(teacher, tmp_path):
    """A Linear with them computes what ComfyUI's layer does, and one that asks for full precision is left alone."""
    save_file({name: value.bfloat16() for name, value in teacher.state_dict().items()}, tmp_path / "dense.safetensors")
    round_checkpoint(tmp_path / "dense.safetensors", tmp_path / "ternary.safetensors")
    model = with_int8_activations(dense_of(tmp_path / "ternary.safetensors", CPU)[0], tmp_path / "ternary.safetensors")
    name = "single_blocks.0.linear2"
    layer, weight = model.get_submodule(name), open_ternary(tmp_path / "ternary.safetensors").weight(name)
    x = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(2))
    expected = [ternary_linear(x, weight, layer.bias.data, activations=kind) for kind in ("int8", "full")]
    assert torch.allclose(layer(x), expected[0], rtol=1e-4, atol=1e-4)
    assert (expected[1] - expected[0]).abs().max() > 1e-3


def test_massive_channels_are_held_and_what_the_model_computes_is_kept(teacher):
    def batch(index, size=8, seed=0, device="cpu"):
        generator = torch.Generator().manual_seed(index)
        shapes = (size, 16, 8, 8), (size,), (size, 6, 32), (size, 32)
        latent, t, context, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
        inputs = Inputs(latent, t.sigmoid(), context, pooled)
        return Batch(inputs, teacher(*inputs))

    model = massive.widened(teacher, batch(0))
    channels = massive.massive_channels(model)
    tokens = model.prepare(*batch(1).inputs)
    for block in model.blocks:
        tokens = block(tokens)
        for stream in (tokens.img, tokens.txt):
            sizes = stream.square().mean((0, 1)).sqrt()
            others = [i for i in range(len(sizes)) if i not in channels]
            assert 10 < float(sizes[channels].min() / sizes[others].square().mean().sqrt()) < 250
            assert float(stream[..., channels].std((0, 1)).max()) == pytest.approx(0, abs=1e-3)
    error = relative_error(model, batch(1))
    pool = SimpleNamespace(draw=lambda *_: batch(1), power=lambda: torch.ones(10), bin=Pool.bin)
    massive.fine_tune(model, pool, 20)
    assert relative_error(model, batch(1)) < 0.7 * error
    assert float(model.prepare(*batch(1).inputs).img[..., channels].std((0, 1)).max()) == pytest.approx(0, abs=1e-3)


def relative_error(model, batch):
    wrong = model(*batch.inputs) - batch.velocity
    return float(wrong.square().mean() / batch.velocity.square().mean())


def test_a_peer_rounds_weights_and_activations(teacher, tmp_path):
    """OrbitQuant's levels are Lloyd-Max's for Gaussian values: 2 bits leave 0.1175 of the energy."""
    save_file({name: value.bfloat16() for name, value in teacher.state_dict().items()}, tmp_path / "dense.safetensors")
    names = ("OrbitQuant, 2 bits", "OrbitQuant, 4 bits", "OrbitQuant, W2A4")
    models = {}
    for name in names:
        round_by_peer(tmp_path / "dense.safetensors", tmp_path / f"{name}.safetensors", name)
        models[name], size, bits = dense_of(tmp_path / f"{name}.safetensors", CPU)
        assert int(name.split("W")[-1][0] if "W" in name else name.split()[1]) < bits < 5, name
        assert size < (tmp_path / "dense.safetensors").stat().st_size
    weight = teacher.get_parameter("single_blocks.0.linear1.weight")
    left = [
        float((models[name].get_parameter("single_blocks.0.linear1.weight") - weight).norm() / weight.norm())
        for name in names[:2]
    ]
    assert left[0] == pytest.approx(0.343, rel=0.1) and left[1] < 0.12
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 128, generator=generator)
    products = [models[name].get_submodule("single_blocks.0.linear1")(x) for name in (names[0], names[2])]
    lost = float((products[1] - products[0]).norm() / products[0].norm())
    assert 0.05 < lost < 0.2  # 4 bits of the activations leave 0.0095 of the energy


def test_scores_of_the_teacher_and_of_another_model(teacher, setup):
    reference = evaluate(teacher, setup, teacher, None)
    assert reference.summary["velocity"]["error"] == 0 and "psnr" not in reference.summary
    assert reference.pictures.shape == (12, 2, 32, 32, 3)
    other = evaluate(lambda *inputs: 0.9 * teacher(*inputs), setup, teacher, reference)
    assert other.summary["velocity"]["error"] == pytest.approx(0.01, rel=1e-3)
    assert other.summary["velocity"]["response"] == pytest.approx(0.9, rel=1e-3)
    assert set(other.summary["accuracy"]) == {"overall", *scenes.CATEGORIES}
    value, low, high = other.summary["psnr"]
    assert low <= value <= high
    rows = [
        {"name": name, "accuracy": s.summary["accuracy"], "velocity": s.summary["velocity"]}
        for name, s in (("original", reference), ("other", other))
    ]
    drawn = chart.draw(rows, {"original": reference.examples, "other": other.examples}, setup.examples)
    shown = [axes.images[0].get_array() for axes in drawn.axes if axes.images]
    expected = [*reference.examples, *other.examples]
    assert len(shown) == len(expected) and all(np.allclose(a, b) for a, b in zip(shown, expected, strict=True))
    (velocity,) = [axes for axes in drawn.axes if axes.lines and axes.get_xlabel() == "t"]
    assert len(velocity.lines) == 1 and np.allclose(velocity.lines[0].get_ydata(), 0.01, rtol=1e-3)


def test_the_same_noise_for_every_model(setup):
    assert torch.equal(setup.noise(1), setup.noise(1)) and not torch.equal(setup.noise(0), setup.noise(1))


def test_training_prompts_are_seen_compositions(setup):
    prompts = setup.training_prompts()
    assert not set(prompts) & {p for p in setup.prompts if scenes.parse(p).category != "single"}


def test_intervals_hold_the_value():
    correct = np.random.default_rng(0).random((60, 4)) < 0.7
    categories = np.repeat(np.arange(6), 10)
    value, low, high = interval(correct, categories, lambda rows: correct[rows].mean())
    assert low < value < high and value == pytest.approx(correct.mean())
    assert interval(correct, categories, lambda rows: correct[rows].mean(), 2)[0] == pytest.approx(
        correct[20:30].mean()
    )


def write_weights(teacher, setup, folder):
    folder.mkdir()
    parts = {"flux-miniature": teacher, "text-encoder": setup.text, "autoencoder": setup.vae}
    for name, part in parts.items():
        state = {key: value.bfloat16().contiguous() for key, value in part.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors", {"size": "32"})
    return folder


@pytest.fixture
def quick(monkeypatch, simple_solver):
    """Shorter paths and fewer resamples, too: the benchmark's parts are what its tests are about."""
    monkeypatch.setattr(scores, "STEPS", 4)
    monkeypatch.setattr(Setup, "steps", 4)
    monkeypatch.setattr(scores, "_RESAMPLES", 20)


@pytest.mark.slow
def test_a_whole_run(quick, teacher, setup, tmp_path):
    weights = write_weights(teacher, setup, tmp_path / "weights")
    scale = run.Scale(prompts=1, seeds=1, pictures=16, states=64, steps=14, calibration_states=16)
    outputs = tmp_path / "quality.json", tmp_path / "quality.png"
    # What differs from another recipe by an argument alone takes half of the time.
    without = ("ternary, absmean", "calibrated, rank 16", "distilled: scales, rank 16")
    without += "distilled: codes", "mixed, distilled: codes", *(name for name in PEERS if name != "OrbitQuant, W2A4")
    result = run.run(scale, tmp_path / "work", *outputs, CPU, weights, without)
    errors = {row["name"]: row["velocity"]["error"] for row in result["models"]}
    assert errors["OrbitQuant, W2A4"] > errors["3-bit rounding"]
    assert errors["original, bf16"] == 0
    assert errors["4-bit rounding"] < errors["3-bit rounding"] < errors["ternary, least squares"]
    assert errors["distilled: scales"] < errors["calibrated"]
    assert all(path.stat().st_size > 1000 for path in outputs)


@pytest.mark.slow
def test_the_stages_on_a_stressed_model(quick, teacher, setup, tmp_path):
    weights = write_weights(teacher, setup, tmp_path / "weights")
    scale = run.Scale(prompts=1, seeds=1, pictures=16, states=64, steps=4, calibration_states=16)
    levels = {"harsh": LEVELS["harsh"]}
    path = tmp_path / "stressed.json"
    result = run.run_stressed(scale, tmp_path / "work", path, CPU, weights, levels, tuple(PEERS), fine_tuning=4)
    rows = {(row["level"], row["name"]): row for row in result["models"]}
    assert len(rows) == 3 * len(run.STAGES) and path.stat().st_size > 1000
    plain, harsh = (rows[level, "ternary, least squares"] for level in ("plain", "harsh"))
    assert plain["to_plain"] == 1 and harsh["to_plain"] < 1.5
    errors = [rows["massive", name]["velocity"]["error"] for name in run.STAGES]
    assert 0 == errors[0] < errors[2] < errors[1]
    assert all(("int8_error" in row) == (name in run.STAGES[1:]) for (_, name), row in rows.items())
    error = plain["velocity"]["error"]
    assert plain["int8_error"] != error and plain["int8_error"] == pytest.approx(error, rel=0.05)
    assert harsh["to_plain"] == pytest.approx(harsh["velocity"]["error"] / plain["velocity"]["error"])
