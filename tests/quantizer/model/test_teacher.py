"""The teacher: the same velocities whether it is held in memory or read block by block, and how often it is read."""

import pytest
import torch
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.model.flux import Inputs
from ternary_flux.quantizer.model.teacher import Placement, Teacher, place

from .. import synthetic

DEV = Architecture(1, 3072, 19, 38, 16, 16, context_dim=4096, vec_dim=768, guidance=True)
KLEIN_9B = Architecture(2, 4096, 8, 24, 128, 128, context_dim=12288, vec_dim=None, guidance=False)
FLUX2_DEV = Architecture(2, 6144, 8, 48, 128, 128, context_dim=15360, vec_dim=None, guidance=True)
TOKENS = 512 + 64 * 64  # of a picture of 1024 x 1024 pixels and its prompt


@pytest.fixture(params=[synthetic.FLUX1, synthetic.FLUX2], ids=["flux1", "flux2"])
def checkpoint(request, tmp_path):
    return open_checkpoint(synthetic.write(tmp_path / "dense.safetensors", request.param))


def batches(arch: Architecture, sizes) -> list[Inputs]:
    def one(size: int, side: int) -> Inputs:
        pooled = torch.randn(size, arch.vec_dim) if arch.vec_dim else None
        latent, context = torch.randn(size, arch.in_channels, side, 8), torch.randn(size, 6, arch.context_dim)
        return Inputs(latent, torch.rand(size), context, pooled, torch.full((size,), 3.5))

    return [one(size, side) for size, side in sizes]


def test_streamed_velocities_are_those_of_a_model_in_memory(checkpoint):
    held, read = Teacher(checkpoint, placement=Placement(True, 0)), Teacher(checkpoint, placement=Placement(False, 100))
    given = batches(checkpoint.architecture, [(2, 8), (1, 8), (1, 4), (3, 8), (2, 8)])
    expected = [held(*inputs) for inputs in given]
    for many in (held.velocities(given), read.velocities(given)):
        assert all(torch.equal(*pair) for pair in zip(many, expected, strict=True))


def test_blocks_are_read_once_for_all_batches_that_fit_together(checkpoint):
    arch = checkpoint.architecture
    tokens = 6 + 8 * 8 // arch.patch_size**2
    teacher = Teacher(checkpoint, placement=Placement(False, 5 * 2 * tokens))
    blocks = sum(checkpoint.tensor(name).nbytes for name in checkpoint.names if "_blocks." in name)
    stem = sum(checkpoint.tensor(name).nbytes for name in checkpoint.names) - blocks
    assert teacher.bytes_read == stem
    for count in (1, 5, 11):
        before, taken = teacher.bytes_read, []
        velocities = teacher.velocities(taken.append(batch) or batch for batch in batches(arch, [(2, 8)] * count))
        next(velocities)
        assert len(taken) <= 6, "no more batches are in memory than were asked for"
        assert sum(1 for _ in velocities) == count - 1
        assert teacher.bytes_read - before == blocks * -(-count // 5)


def test_a_model_in_memory_is_read_once(checkpoint):
    teacher = Teacher(checkpoint, placement=Placement(True, 0))
    whole = sum(checkpoint.tensor(name).nbytes for name in checkpoint.names)
    assert teacher.bytes_read == whole
    list(teacher.velocities(batches(checkpoint.architecture, [(2, 8)] * 3)))
    assert teacher.bytes_read == whole


@pytest.mark.parametrize("arch", [DEV, KLEIN_9B, FLUX2_DEV], ids=lambda arch: arch.name)
def test_a_24_gb_card_reads_less_than_a_sixteenth_of_the_model_for_a_state(arch):
    placement = place(arch, 23 << 30, "cuda", 2)
    assert not placement.resident
    assert placement.together(1, TOKENS) >= 16
    assert place(arch, 141 << 30, "cuda", 2) == Placement(True, 0)


def test_a_card_that_holds_two_blocks_only_takes_one_batch_at_a_time():
    assert place(FLUX2_DEV, 6 << 30, "cuda", 2).together(2, TOKENS) == 1
