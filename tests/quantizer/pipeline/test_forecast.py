"""What `convert --plan` computes: within the memory and the time that are given, and as the documentation says."""

from dataclasses import replace

import pytest
import torch
from ternary_flux.benchmarks.speed.models import MODELS
from ternary_flux.quantizer.cli import run
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.model.flux import Flux, Inputs
from ternary_flux.quantizer.pictures import SIZES
from ternary_flux.quantizer.pictures.sampler import default_steps, parse_sizes
from ternary_flux.quantizer.pipeline.forecast import Forecast, Machine, forecast, forward_operations
from ternary_flux.tests import builders
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import _pack

# Free memory, and TFLOP/s of a large bf16 product: what makers state, and for the H100 what an H200 was measured at.
CARDS = {"24 GB, RTX 4090": (22, 165), "32 GB, RTX 5090": (30, 210), "80 GB, H100": (78, 650)}
HOUR = 3600.0


def of(model: str, card: str, size: str = SIZES, hours: float = 4) -> Forecast:
    memory, speed = CARDS[card]
    arch, machine = MODELS[model], Machine("cuda", int(memory * 1e9), speed * 1e12)
    amounts = {"text": 512, "steps": default_steps(arch), "prompts": 2560, "seconds": hours * HOUR}
    return forecast(arch, machine, sizes=parse_sizes(size), **amounts)


def small(arch: Architecture) -> Architecture:
    """The same kind of model with few channels."""
    return replace(arch, hidden=256, depth=1, depth_single=2, context_dim=32, vec_dim=arch.vec_dim and 24)


def table() -> str:
    """As docs/convert.md has it."""
    lines = ["| model | GPU | memory | original | pictures | training | work folder |", "|---|---|---|---|---|---|---|"]
    for model in MODELS:
        for card in CARDS:
            found = of(model, card)
            stages = {stage.name: stage for stage in found.stages}
            original = "held" if found.resident else f"read once for {1 / found.passes:.0f} states"
            pictures, steps = (int(stages[name].amount.split()[0]) for name in ("sample", "distill"))
            what = stages["distill"].amount.split(", ")[1]
            lines.append(
                f"| {model} | {card} | {found.memory / 1e9:.0f} GB | {original} | {pictures:,} | {steps:,}, {what} "
                f"| {found.work / 1e9:.0f} GB |"
            )
    return "\n".join(lines) + "\n"


def test_the_table_in_the_documentation():
    assert table() in (_pack.ROOT / "docs" / "convert.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["FLUX.1-dev", "FLUX.2-klein-4B"])
def test_operations_of_a_forward(model):
    """As torch counts them."""
    arch = small(MODELS[model])
    flux, (height, width) = Flux(arch), (8 * arch.patch_size, 4 * arch.patch_size)
    latent, context = torch.randn(1, arch.in_channels, height, width), torch.randn(1, 24, arch.context_dim)
    pooled = torch.randn(1, arch.vec_dim) if arch.vec_dim else None
    inputs = Inputs(latent, torch.ones(1), context, pooled, torch.ones(1) if arch.guidance else None)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # whose products are counted
        tokens = flux.prepare(*inputs)
        with FlopCounterMode(display=False) as counter:
            for block in flux.blocks:
                tokens = block(tokens)
    assert forward_operations(arch, 24, 32) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_keeps_to_the_time_and_the_memory(model, card):
    found = of(model, card)
    assert 3.5 * HOUR < found.seconds <= 4.4 * HOUR
    for stage in found.stages[:4]:
        assert stage.memory <= CARDS[card][0] * 1e9
    assert found.memory <= CARDS[card][0] * 1e9 or model == "FLUX.2-dev"
    assert found.resident == (found.passes == 0)


def test_the_original_is_read_for_many_states_at_once():
    """On a card that cannot hold it: at most a sixteenth of a pass over its blocks for a state at 1024 pixels."""
    found = of("FLUX.1-dev", "24 GB, RTX 4090", "1024x1024")
    sample = next(stage for stage in found.stages if stage.name == "sample")
    pictures, steps = int(sample.amount.split()[0]), 20
    blocks = 2 * sum(n * k for n, k in MODELS["FLUX.1-dev"].linear_shapes.values())
    assert 0 < found.passes <= 1 / 16 and sample.read == pytest.approx(pictures * steps * found.passes * blocks)


def test_more_time_pays_for_more():
    short, long = (of("FLUX.1-dev", "80 GB, H100", hours=hours) for hours in (1, 8))
    assert int(long.stages[2].amount.split()[0]) > 4 * int(short.stages[2].amount.split()[0])


def test_the_plan_is_printed_and_nothing_written(tmp_path, capsys):
    arch = small(MODELS["FLUX.1-dev"])
    builders.write_flux(tmp_path / "flux.safetensors", arch)
    builders.write_conditioning(tmp_path / "cond.safetensors", arch)
    before = sorted(tmp_path.iterdir())
    command = ["convert", str(tmp_path / "flux.safetensors"), "--conditioning", str(tmp_path / "cond.safetensors")]
    assert run([*command, "--plan", "--size", "64x64", "--device", "cpu"]) == 0
    here = capsys.readouterr().out
    assert "on cpu" in here and "distill" in here and "the original is held in main memory" in here
    assert run([*command, "--plan", "--size", "64x64", "--device-memory", "22GB", "--tflops", "165"]) == 0
    assert "22 GB of free memory and 165 TFLOP/s on cuda" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(SystemExit):
        run([*command, "--plan", "--device-memory", "much"])
    assert "--device-memory" in capsys.readouterr().err
