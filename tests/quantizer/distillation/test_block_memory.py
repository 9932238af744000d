"""One double and one single block of a third of FLUX.1-dev's width, synthetic weights, through the block-wise pass."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LIMIT = 2.5  # GiB of main memory

SCRIPT = """
import json, resource, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import _pack

_pack.load()
import torch
from ternary_flux.quantizer.pictures import conditioning
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.distillation.blockwise import BlockSettings, train_blocks
from ternary_flux.quantizer.files.checkpoint import open_checkpoint
from ternary_flux.quantizer.files.container import create
from ternary_flux.quantizer.rounding.round import round_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.pictures.pool import Pool
from ternary_flux.quantizer.model.teacher import Placement, Teacher
from ternary_flux.quantizer.pictures.states import LabelledStates, States

folder = Path(sys.argv[2])
arch = Architecture(1, 1024, 1, 1, 16, 16, context_dim=4096, vec_dim=768, guidance=True)
# One random row block, repeated: making a hundred million independent numbers would take longer than the test.
noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
with create(folder / "dense.safetensors", {k: (torch.bfloat16, s) for k, s in arch.shapes.items()}, {}) as file:
    for offset, (name, shape) in enumerate(arch.shapes.items()):
        count = torch.Size(shape).numel()
        values = noise.roll(offset * 7919).repeat(-(-count // noise.numel()))[:count].view(shape)
        if name.endswith("scale"):
            file.write(name, torch.ones(shape, dtype=torch.bfloat16))
        else:
            file.write(name, values * (0.02 if len(shape) == 2 else 0.1))
round_checkpoint(folder / "dense.safetensors", folder / "start.safetensors")
conditioning.write(folder / "cond.safetensors", ["a", "b"], torch.randn(2, 16, 4096), torch.randn(2, 768))
cond = conditioning.read(folder / "cond.safetensors", arch)
states = States(torch.randn(2, 16, 16, 16), torch.tensor([0.3, 0.7]), torch.arange(2), torch.full((2,), 3.5))
pool = Pool([LabelledStates(states, torch.zeros(2, 16, 16, 16))], cond)
teacher = Teacher(open_checkpoint(folder / "dense.safetensors"), placement=Placement(False, 0))
blocks, started = {}, time.perf_counter()


def on_block(result):
    global started
    now = time.perf_counter()
    blocks[result.name] = {"before": result.before, "after": result.after, "seconds": now - started}
    started = now


settings = BlockSettings(steps=2, batch=1, states=2, codes=True, eight_bit=True, warmup=1)
start = open_ternary(folder / "start.safetensors", check_codes=False)
places = {"target": folder / "out.safetensors", "folder": folder / "work"}
train_blocks(start, teacher, pool, **places, settings=settings, on_block=on_block)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"peak": peak, "blocks": blocks}))
"""


def test_codes_of_blocks_train_in_bounded_memory(tmp_path, capsys):
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", SCRIPT, str(root), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result = json.loads(done.stdout)
    with capsys.disabled():
        for name, block in result["blocks"].items():
            print(f"\n{name} of a third of FLUX.1-dev's width: {block['seconds']:.0f} s for 2 steps", end="")
        print(f", peak {result['peak']:.1f} GiB")
    assert list(result["blocks"]) == ["double_blocks.0", "single_blocks.0"]
    assert all(block["after"] < block["before"] for block in result["blocks"].values())
    assert result["peak"] < LIMIT
