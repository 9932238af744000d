"""The block-wise pass on a tiny FLUX: every block gets nearer to its teacher, finished blocks are not trained again."""

import pytest
import torch
from ternary_flux.quantizer.calibration.sensitivity import write_mixed
from ternary_flux.quantizer.distillation.blockwise import BlockSettings, train_blocks
from ternary_flux.quantizer.distillation.schedule import RATES
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.model.student import load_student
from ternary_flux.quantizer.model.teacher import Teacher
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.pictures.pool import Pool
from ternary_flux.quantizer.pictures.states import LabelledStates, States
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.tests import builders

ARCHITECTURES = {
    "flux1": Architecture(1, 128, 1, 1, 16, 16, context_dim=32, vec_dim=24, guidance=True),
    "flux2": Architecture(2, 128, 1, 1, 128, 128, context_dim=32, vec_dim=None, guidance=False),
}


@pytest.fixture(params=ARCHITECTURES)
def job(request, tmp_path):
    """Start file, teacher and pool of a tiny model."""
    arch = ARCHITECTURES[request.param]
    generator = torch.Generator().manual_seed(0)
    builders.write_flux(tmp_path / "teacher.safetensors", arch)
    round_checkpoint(tmp_path / "teacher.safetensors", tmp_path / "start.safetensors")
    cond = conditioning.read(builders.write_conditioning(tmp_path / "cond.safetensors", arch, 4), arch)
    latent = torch.randn(16, arch.in_channels, 4, 4, generator=generator)
    t, guidance = torch.rand(16, generator=generator), torch.full((16,), 3.5) if arch.guidance else None
    states = States(latent, t, torch.arange(16) % 4, guidance)
    teacher = Teacher(open_checkpoint(tmp_path / "teacher.safetensors"))
    velocity = teacher(*states.inputs(slice(None), cond)).clone()
    return open_ternary(tmp_path / "start.safetensors"), teacher, Pool([LabelledStates(states, velocity)], cond)


def error(file, pool):
    batch = pool.batch(0, torch.arange(16))
    with torch.no_grad():
        return float(
            (load_student(file)(*batch.inputs) - batch.velocity).square().mean() / batch.velocity.square().mean()
        )


@pytest.mark.slow
@pytest.mark.parametrize("rank, codes", [(0, False), (4, True)])
def test_every_block_improves_and_so_does_the_model(job, tmp_path, rank, codes):
    start, teacher, pool = job
    results = []
    rates = RATES | {"code": 1e-2}  # so that codes change within so few steps
    settings = BlockSettings(steps=30, batch=8, states=16, rank=rank, codes=codes, rates=rates)
    train_blocks(
        start,
        teacher,
        pool,
        target=tmp_path / "out.safetensors",
        folder=tmp_path / "work",
        settings=settings,
        on_block=results.append,
    )
    assert [result.name for result in results] == list(start.architecture.block_names)
    # FLUX.2 has no biases: without codes or factors only scales and norms can move.
    part = 0.9 if rank or start.architecture.bias else 0.99
    assert all(result.after < part * result.before for result in results)
    written = open_ternary(tmp_path / "out.safetensors")
    assert written.architecture == start.architecture and written.layers.keys() == start.layers.keys()
    assert error(written, pool) < part * error(start, pool)


def test_layers_of_two_terms_and_of_8_bits_stay_as_they_are(job, tmp_path):
    start, teacher, pool = job
    precisions = {"single_blocks.0.linear1": "int8", "single_blocks.0.linear2": "two-terms"}
    write_mixed(tmp_path / "mixed.safetensors", start, teacher.checkpoint, precisions)
    mixed = open_ternary(tmp_path / "mixed.safetensors")
    settings = BlockSettings(steps=1, batch=8, states=8)
    train_blocks(mixed, teacher, pool, target=tmp_path / "out.safetensors", folder=tmp_path / "work", settings=settings)
    written = open_ternary(tmp_path / "out.safetensors")
    assert written.layers == mixed.layers and written.int8 == mixed.int8
    for name in precisions:
        assert torch.equal(written.parameter(f"{name}.weight"), mixed.parameter(f"{name}.weight"))


def test_an_interrupted_pass_goes_on_to_the_same_file(job, tmp_path):
    start, teacher, pool = job
    settings = BlockSettings(steps=4, batch=8, states=16)

    def stop(result):
        if result.name == "single_blocks.0":
            raise KeyboardInterrupt

    train_blocks(
        start, teacher, pool, target=tmp_path / "through.safetensors", folder=tmp_path / "a", settings=settings
    )
    with pytest.raises(KeyboardInterrupt):
        train_blocks(
            start,
            teacher,
            pool,
            target=tmp_path / "resumed.safetensors",
            folder=tmp_path / "b",
            settings=settings,
            on_block=stop,
        )
    again = []
    train_blocks(
        start,
        teacher,
        pool,
        target=tmp_path / "resumed.safetensors",
        folder=tmp_path / "b",
        settings=settings,
        on_block=again.append,
    )
    assert [result.name for result in again] == ["single_blocks.0"]
    assert (tmp_path / "through.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()
