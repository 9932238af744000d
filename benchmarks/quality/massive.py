"""FLUX.1's miniature with two massive residual channels: activations have outliers that weights do not have.

Two channels of the residual stream are held at 50 times the size of the others, from the first block to the last, as in
FLUX.1 (arXiv 2505.18584). This changes the function: every layer norm divides by their size. Modulations are enlarged
to make up for it, and the model is fine-tuned on the original's velocities. FLUX.2 has no biases that could hold such
channels.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...quantizer.files.checkpoint import open_checkpoint
from ...quantizer.model.flux import Flux, Inputs, linear_of, parts_of
from ...quantizer.pictures.pool import Pool
from ...quantizer.pictures.states import Batch
from .models import dense_of

SIZE = 50.0
STEPS = 300
_BATCH = 32
_RATE = 3e-4
_SEED = 0


def write(source: Path, target: Path, pool: Pool, steps: int = STEPS) -> None:
    """A dense checkpoint in fp32, fine-tuned to compute nearly what `source` does."""
    original = dense_of(source, torch.device("cpu"))[0]
    model = widened(original, pool.draw(0, _BATCH, _SEED))
    fine_tune(model, pool, steps)
    save_file(model.state_dict(), target, dict(open_checkpoint(source).metadata))


def massive_channels(model: Flux) -> list[int]:
    """The two channels, the same in all blocks: those of least weight in the final layer."""
    return model.final_layer.linear.weight.square().sum(0).topk(2, largest=False).indices.tolist()


def widened(original: Flux, batch: Batch) -> Flux:
    """A copy of a FLUX.1 with the two channels held at plus and minus SIZE times the RMS of all."""
    if original.arch.version != 1:
        raise ValueError(f"{original.arch.name} has no biases that could hold massive channels")
    model = Flux(original.arch)
    model.load_state_dict(original.state_dict())
    variances = _variances(original, batch.inputs)
    size, channels = SIZE * math.sqrt(sum(variances) / len(variances)), massive_channels(model)
    held = torch.tensor([size, -size])  # their sum stays 0, so that layer norms subtract the mean that they did
    with torch.no_grad():
        for entry in (model.img_in, model.txt_in):
            entry.weight[channels] = 0
            entry.bias[channels] = held
        for parameter in _added(model):
            parameter[channels] = 0
        for (modulation, first, linear), variance in zip(_modulated(model), variances, strict=True):
            _enlarge(modulation, first, linear, variance, channels, held)
    return model.requires_grad_(False)


def fine_tune(model: Flux, pool: Pool, steps: int) -> None:
    """Fit all parameters to the pool's velocities with Adam; nothing is added to the massive channels."""
    channels, power = massive_channels(model), pool.power()
    model.requires_grad_(True)
    held = (*_added(model), *model.img_in.parameters(), *model.txt_in.parameters())
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps, pct_start=0.1)
    for step in range(steps):
        batch = pool.draw(step, _BATCH, _SEED)
        error = (model(*batch.inputs) - batch.velocity).square().mean((1, 2, 3))
        loss = (error / power[pool.bin(batch.inputs.t)]).mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in held:
                parameter.grad[channels] = 0
        optimizer.step()
        schedule.step()
    model.requires_grad_(False)


def _added(model: Flux) -> Iterator[nn.Parameter]:
    """Weights and biases of the Linears whose outputs are added to the residual stream."""
    for block in model.blocks:
        for tier in (tier for part in parts_of(block) for tier in part.tiers):
            if tier.role == "add":
                for name in tier.linears:
                    yield from linear_of(block, name).parameters()


def _modulated(model: Flux) -> Iterator[tuple[nn.Linear, int, nn.Linear]]:
    """(modulation, number of its rows' chunk with the shift, Linear that reads), in the order of a forward."""
    for block in model.double_blocks:
        for first, part in ((0, "attn.qkv"), (3, "mlp.0")):
            for stream in ("img", "txt"):
                yield linear_of(block, f"{stream}_mod.lin"), first, linear_of(block, f"{stream}_{part}")
    for block in model.single_blocks:
        yield linear_of(block, "modulation.lin"), 0, linear_of(block, "linear1")
    yield linear_of(model.final_layer, "adaLN_modulation.1"), 0, model.final_layer.linear


@torch.no_grad()
def _variances(model: Flux, inputs: Inputs) -> list[float]:
    """What each layer norm divides by the root of, mean over tokens, in the order of `_modulated`."""
    tokens, norms = model.prepare(*inputs), []
    for block in model.double_blocks:
        norms += [tokens.img, tokens.txt]
        tokens = block.attend(tokens)
        norms += [tokens.img, tokens.txt]
        tokens = block.feed(tokens)
    for block in model.single_blocks:
        norms.append(torch.cat((tokens.txt, tokens.img), dim=1))
        tokens = block(tokens)
    return [float(x.var(-1, correction=0).mean()) for x in (*norms, tokens.img)]


def _enlarge(
    modulation: nn.Linear, first: int, linear: nn.Linear, variance: float, channels: list[int], held: Tensor
) -> None:
    """Let a modulation undo what the massive channels do to the layer norm before it, and the Linear's bias what they
    add on the average; their own modulation is constant.
    """
    hidden = linear.in_features
    shift, scale = (slice(chunk * hidden, (chunk + 1) * hidden) for chunk in (first, first + 1))
    ratio = math.sqrt(1 + float(held.square().sum()) / hidden / variance)
    modulation.weight[scale] *= ratio
    modulation.bias[scale] = ratio * (1 + modulation.bias[scale]) - 1
    for rows, constant in ((shift, 0.0), (scale, ratio - 1)):
        modulation.weight[rows][channels] = 0
        modulation.bias[rows][channels] = constant
    linear.bias.sub_(linear.weight[:, channels] @ (held / math.sqrt(variance)))
