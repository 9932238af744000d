"""Stressed models compute what the original computes, with channels of very different size."""

import pytest
import torch
from ternary_flux.benchmarks.miniature import TRANSFORMER
from ternary_flux.benchmarks.quality.stress import LEVELS, stress, write
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.model.flux import Flux

FLUX1 = Architecture(1, 256, 1, 2, 16, 16, context_dim=32, vec_dim=32, guidance=False)
FLUX2 = Architecture(2, 256, 1, 2, 128, 128, context_dim=32, vec_dim=None, guidance=False)


def random_model(arch: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.5 * (shape[1] ** -0.5 if len(shape) == 2 else 0.2)
        for name, shape in arch.shapes.items()
    }


def velocity(state: dict[str, torch.Tensor], arch: Architecture, dtype=torch.float32) -> torch.Tensor:
    model, generator = Flux(arch).requires_grad_(False), torch.Generator().manual_seed(1)
    model.load_state_dict(state)
    inputs = (
        torch.randn(2, arch.in_channels, 4, 4, generator=generator),
        torch.tensor([0.2, 0.8]),
        torch.randn(2, 5, arch.context_dim, generator=generator),
        None if arch.vec_dim is None else torch.randn(2, arch.vec_dim, generator=generator),
    )
    return model.to(dtype)(*(None if x is None else x.to(dtype) for x in inputs)).double()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("arch", [FLUX1, FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_the_function_stays_the_same(arch, level):
    state = random_model(arch)
    stressed = stress(state, arch, LEVELS[level])
    expected, found = velocity(state, arch, torch.float64), velocity(stressed, arch)
    assert expected.norm() > 1
    assert (found - expected).norm() < 2e-5 * expected.norm()
    assert state.keys() == stressed.keys()


@pytest.mark.parametrize("arch", [FLUX1, FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_every_move_spreads_what_a_linear_reads(arch):
    """The ratio of the new columns to the old ones, largest over smallest, in each Linear that a move reaches."""
    state = random_model(arch)
    stressed = stress(state, arch, LEVELS["harsh"])
    reached = {"attn.proj", "linear2", *(("attn.qkv", "mlp.0", "linear1") if arch.version == 1 else ("mlp.2",))}
    for name in arch.linears:
        ratio = (state[f"{name}.weight"] / stressed[f"{name}.weight"]).abs()
        columns = ratio.median(0).values
        spread = float(columns.max() / columns.min())
        assert (spread > 20) == name.endswith(tuple(reached)), (name, spread)


def test_a_stressed_miniature_is_written_in_fp32(tmp_path):
    write(TRANSFORMER, tmp_path / "stressed.safetensors", LEVELS["mild"])
    original, stressed = open_checkpoint(TRANSFORMER), open_checkpoint(tmp_path / "stressed.safetensors")
    assert stressed.architecture == original.architecture and stressed.metadata == original.metadata
    assert all(stressed.tensor(name).dtype == torch.float32 for name in stressed.names)
