"""The whole conversion on a device called cuda: every copy to it and from it, every generator, every pinned buffer."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from ternary_flux.quantizer import cli
from ternary_flux.quantizer.calibration import calibrate
from ternary_flux.quantizer.distillation.blockwise import BlockSettings
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.flux import rope
from ternary_flux.quantizer.pipeline.budget import Budget, plan
from ternary_flux.quantizer.pipeline.decisions import Decisions, Training
from ternary_flux.tests import builders

from . import stand_in

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=True)


@pytest.fixture
def make_device(monkeypatch):
    rope.cache_clear()
    yield partial(stand_in.Device, monkeypatch)
    rope.cache_clear()


def test_a_device_refuses_what_a_real_one_does(make_device):
    here, vector = torch.ones(3), torch.arange(3)
    with make_device(free=1 << 30) as device:
        there = here.to("cuda")
        assert (there.device, there.is_cuda, (there + 1)[1:].device) == (stand_in.CUDA, True, stand_in.CUDA)
        assert not here.is_cuda and here.device.type == there.cpu().device.type == "cpu"
        assert torch.zeros(2, device=there.device).is_cuda and there[vector].is_cuda
        assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]
        for wrong in (lambda: there + here, lambda: here.add_(there), lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device="cuda", generator=torch.Generator())
        with pytest.raises(RuntimeError, match="pinned"):
            there.copy_(here, non_blocking=True)
        there.copy_(torch.empty(3, pin_memory=True).copy_(here), non_blocking=True)
        assert device.copies == 1
        leaf = torch.ones(3, device="cuda", requires_grad=True)
        (leaf[:2] * 2).sum().backward()
        assert leaf.grad.is_cuda


@pytest.mark.slow
@pytest.mark.parametrize("free, rank", [(24 << 30, 0), (3 << 20, 4)], ids=["held", "streamed"])
def test_a_conversion(make_device, monkeypatch, tmp_path, free, rank):
    """Where all fits, codes are trained at once; where nothing does, block by block and then scales, recomputed."""
    quick = partial(calibrate.CalibrationSettings, exponents=(), sweeps=int(rank > 0))
    monkeypatch.setattr(calibrate, "CalibrationSettings", quick)
    builders.write_flux(tmp_path / "tiny.safetensors", ARCH)
    builders.write_conditioning(tmp_path / "cond.safetensors", ARCH)
    output, held = tmp_path / "out.safetensors", free > 1 << 30
    way = plan(ARCH, 21, free, torch.device("cuda"))
    assert way.autocast == torch.bfloat16 and way.codes == held
    assert way.packed == way.recompute == way.eight_bit == (not held)
    blocks = None if held else BlockSettings(2, batch=1, states=4, rank=rank, eight_bit=True, stream=torch.bfloat16)
    way = replace(way, batch=2, recompute=True, eight_bit=True)  # with codes in bf16, rounded by chance
    training = Training(way, way.codes, steps=3, seconds=None, blocks=blocks)
    small = Decisions(Budget(4, 24, 2, 6), training=training)
    small.save(tmp_path / "out.safetensors.work" / "decisions.json")
    fixed = ["--conditioning", tmp_path / "cond.safetensors", "--size", "64x64", "--sampler-steps", 2]
    command = ["convert", tmp_path / "tiny.safetensors", "-o", output, *fixed, "--device", "cuda", "--rank", rank]
    with make_device(free) as device:
        assert cli.run([str(argument) for argument in command]) == 0
    assert device.copies
    assert all(layer.rank == rank for layer in open_ternary(output).layers.values())
