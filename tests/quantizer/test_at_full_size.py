"""FLUX at full width on a device that only counts: no value is read back, nothing lies on another device, memory fits.

Tensors are torch's FakeTensors: shapes, dtypes and devices, without values. A repeated block adds nothing here, so that
models have one or two of each kind.
"""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from ternary_flux.ops import TernaryWeight
from ternary_flux.ops.packing import groups_of, packed_shape
from ternary_flux.quantizer.calibration.calibrate import calibration_memory
from ternary_flux.quantizer.calibration.streams import Streams, TokenFile
from ternary_flux.quantizer.distillation import distill
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.model import teacher
from ternary_flux.quantizer.model.flux import Flux, Inputs, rope
from ternary_flux.quantizer.model.teacher import Placement, Teacher, streaming_memory
from ternary_flux.quantizer.model.ternary_linear import TernaryLinear
from ternary_flux.quantizer.pictures.pool import Pool
from ternary_flux.quantizer.pictures.states import Batch
from ternary_flux.quantizer.pipeline.budget import Plan, settings_for, training_memory
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from . import stand_in

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns that there is no CUDA and no data

DEV = Architecture(1, 3072, 1, 1, 16, 16, context_dim=4096, vec_dim=768, guidance=True)
KLEIN_9B = Architecture(2, 4096, 1, 1, 128, 128, context_dim=12288, vec_dim=None, guidance=False)
FLUX2_DEV = Architecture(2, 6144, 1, 1, 128, 128, context_dim=15360, vec_dim=None, guidance=True)
MODELS = pytest.mark.parametrize("arch", [DEV, KLEIN_9B, FLUX2_DEV], ids=["dev", "klein-9b", "flux2-dev"])
TEXT, IMAGE = 512, 64 * 64
TOKENS = TEXT + IMAGE  # of a picture of 1024 x 1024 pixels


@pytest.fixture(autouse=True)
def device(monkeypatch):
    stand_in.install(monkeypatch, free=24 << 30)
    monkeypatch.setattr(teacher, "check_finite", lambda *_: None)  # the one look at values, when they are first read
    rope.cache_clear()
    yield
    rope.cache_clear()


def inputs(arch: Architecture, batch: int = 1) -> Inputs:
    side = 64 * arch.patch_size
    latent, context = torch.empty(batch, arch.in_channels, side, side), torch.empty(batch, TEXT, arch.context_dim)
    pooled = torch.empty(batch, arch.vec_dim) if arch.vec_dim else None
    return Inputs(latent, torch.empty(batch), context, pooled, torch.empty(batch) if arch.guidance else None)


def size(arch: Architecture) -> int:
    return sum(torch.Size(shape).numel() for shape in arch.shapes.values())


@MODELS
def test_the_teacher(arch, tmp_path):
    checkpoint = open_checkpoint(stand_in.sparse_checkpoint(tmp_path / "dense.safetensors", arch))
    with FakeTensorMode(allow_non_fake_inputs=True), stand_in.PeakMemory("cuda") as memory:
        model = Teacher(checkpoint, "cuda", placement=Placement(False, 2 * TOKENS))
        for velocity in model.velocities(inputs(arch) for _ in range(3)):
            assert velocity.device.type == "cuda" and velocity.shape[1] == arch.out_channels
        assert memory.peak <= streaming_memory(arch, 2, TOKENS, 2 * TOKENS)
        stem, whole = model.stem.state_dict(), 2 * size(arch)
        assert model.bytes_read == 2 * whole - sum(tensor.nbytes for tensor in stem.values())
        del model, velocity, stem
        held = Teacher(checkpoint, "cuda", placement=Placement(True, 0))
        memory.peak = memory.now
        held(*inputs(arch))
    planned = streaming_memory(arch, 2, TOKENS, 0) - streaming_memory(arch, 2, 0, 0)
    assert 0.6 * planned < memory.peak - whole <= planned


@pytest.mark.slow
@MODELS
def test_calibration_of_a_block(arch, tmp_path):
    checkpoint = open_checkpoint(stand_in.sparse_checkpoint(tmp_path / "dense.safetensors", arch))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), stand_in.PeakMemory("cuda") as memory:
        model = Teacher(checkpoint, "cuda", placement=Placement(False, 0))
        stem = memory.now
        img, txt = (torch.empty(2, 2, count, arch.hidden, dtype=torch.bfloat16) for count in (IMAGE, TEXT))
        vec = torch.empty(2, arch.hidden, dtype=torch.bfloat16, device="cuda")
        streams = Streams.__new__(Streams)
        streams.teacher, streams.batch, streams.vectors = model, 1, vec.repeat(512, 1)
        streams.groups, streams.teacher_ahead = [TokenFile(img, txt, vec, (64, 64))], False
        for _, block in model.blocks():
            student = deepcopy(block)
            for part in block.parts:
                for tier in part.tiers:
                    for moments in streams.moments(block, student, part, tier).values():
                        assert moments.second.device.type == "cuda"
                with pytest.raises(DataDependentOutputException):  # the drift, once for all states
                    streams.advance(block, student, part)
            del student, block, moments
    assert memory.peak - stem <= calibration_memory(arch, TOKENS, 2)


def distiller(arch: Architecture, way: Plan, device: str, monkeypatch) -> distill.Distiller:
    """A run that is about to begin, without values."""

    def linear(inputs: int, outputs: int, bias: bool) -> TernaryLinear:
        shape, groups = (outputs, inputs), groups_of(inputs)
        trits = torch.empty(packed_shape(shape, "planes32"), dtype=torch.uint8, device=device)
        scale, group = (
            torch.empty(outputs, device=device),
            torch.empty(groups, outputs, dtype=torch.uint8, device=device),
        )
        layer = TernaryLinear(TernaryWeight(trits, scale, shape, group), scale if bias else None, way.packed)
        if way.codes:
            layer.train_codes(torch.empty(shape, device=device), torch.bfloat16 if way.eight_bit else torch.float32)
        return layer

    def rates(model, _) -> dict[str, float]:
        return {name: 1e-3 for name, _ in model.named_parameters()}

    monkeypatch.setattr(distill, "learning_rates", rates)
    pool = SimpleNamespace(power=lambda: torch.empty(10), bin=Pool.bin)
    with torch.device(device):
        model = Flux(arch, linear)
    return distill.Distiller(model, SimpleNamespace(dense={}), pool, None, settings_for(way, steps=100))


def batch(arch: Architecture, device: str) -> Batch:
    given = inputs(arch)
    return Batch(given, torch.empty(1, arch.out_channels, *given.latent.shape[2:])).to(device)


@pytest.mark.slow
@MODELS
def test_the_forward_pass_of_training(arch, monkeypatch):
    way = Plan(False, True, True, True, 1, torch.bfloat16)
    with FakeTensorMode():
        run = distiller(arch, way, "cuda", monkeypatch)
        assert run.loss(batch(arch, "cuda")).device.type == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, way",
    [
        (DEV, Plan(False, True, True, True, 1, torch.bfloat16)),
        (KLEIN_9B, Plan(True, False, True, True, 1, torch.bfloat16)),
        (FLUX2_DEV, Plan(False, False, False, False, 1, torch.bfloat16)),
    ],
    ids=["dev-packed", "klein-9b-codes", "flux2-dev-kept"],
)
def test_a_training_step(arch, way, monkeypatch):
    """On a device called "cpu": without a driver torch has no backward pass for cuda."""
    with FakeTensorMode(), stand_in.PeakMemory("cpu") as memory:
        run, given = distiller(arch, way, "cpu", monkeypatch), batch(arch, "cpu")
        memory.peak = memory.now
        run.learn([given])
    in_main_memory = sum(value.nbytes for value in run.best.values())
    planned = training_memory(arch, TOKENS, way)
    assert 0.7 * planned < memory.peak - in_main_memory <= planned
