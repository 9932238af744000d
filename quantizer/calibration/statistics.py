"""What the inputs and weights of a Linear are like, and what 8-bit activations would cost there.

Sums over tokens, in fp64: the same in whatever order batches come, on any rank.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...ops import GROUP_SIZE, TernaryWeight
from ..model.flux import linear_of

_ROWS = 1024  # tokens that are looked at together
# Noise of 8-bit activations beside the error that ternary weights make, in power: what they may add to the latter. In
# the miniatures they add at most 5 % to the velocity error of calibrated and distilled models (docs/quality.md).
SHARE = 0.05


@dataclass(frozen=True)
class LayerStatistics:
    """One Linear. "Inputs" are what is quantized to 8 bits: with the column scales, where there are any."""

    crest: float  # largest magnitude to RMS within a token's inputs, mean over tokens
    spread: float  # RMS of the largest channel to that of the median one within a group of 128 inputs, mean over groups
    largest_two: float  # share of the two strongest channels in the power of all
    kurtosis: float  # of the original's weights within a group, mean over groups; 3 for normally distributed ones
    int8_noise: (
        float  # power of what int8 inputs, a scale for each token, add to the outputs, relative to their variance
    )


class InputSums:
    """Sums of one Linear's inputs [T, K] and outputs [T, N], all on one device."""

    def __init__(self, outputs: int, inputs: int, column: Tensor | None, device: torch.device | str):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.column = None if column is None else column.to(device, torch.float32)
        self.tokens, self.crest = zeros(), zeros()
        self.power, self.noise = zeros(inputs), zeros(inputs)  # noise: of what int8 changes
        self.outputs, self.output_power = zeros(outputs), zeros(outputs)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.tokens, self.crest, self.power, self.noise, self.outputs, self.output_power]

    def add(self, x: Tensor, y: Tensor) -> None:
        """Inputs [..., K] as they come, and the outputs [..., N] without bias."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        self.tokens += len(x)
        for some, theirs in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
            some, theirs = some.float(), theirs.float()
            if self.column is not None:
                some = some * self.column
            squares, largest = some.square(), some.abs().amax(1, keepdim=True).clamp_min(1e-30)
            step = largest / 127
            self.power += squares.sum(0)
            self.crest += (largest[:, 0] / squares.mean(1).sqrt().clamp_min(1e-30)).sum()
            self.noise += ((some / step).round_().mul_(step) - some).square_().sum(0)
            self.outputs += theirs.sum(0)
            self.output_power += theirs.square().sum(0)

    def of(self, dense: Tensor, weight: TernaryWeight) -> LayerStatistics:
        """`dense`: the original's weight [N, K]. `weight`: what became of it."""
        tokens = self.tokens.clamp_min(1)
        power = self.power / tokens
        groups = power.view(-1, GROUP_SIZE)  # calibration refuses other numbers of inputs
        spread = (groups.amax(1) / groups.median(1).values.clamp_min(1e-30)).sqrt().mean()
        trits = replace(weight, column=None).dequantize_ternary()  # the low-rank part's inputs are not quantized
        noise = (trits.square().sum(0).double() * self.noise / tokens).sum()
        variance = (self.output_power / tokens - (self.outputs / tokens).square()).clamp_min(0).sum()
        two = power.topk(min(2, len(power))).values.sum() / power.sum().clamp_min(1e-30)
        values = self.crest / tokens, spread, two, _kurtosis(dense.float()), noise / variance.clamp_min(1e-30)
        return LayerStatistics(*torch.stack([value.double() for value in values]).tolist())


def needs_full_precision(int8_noise: float, output_error: float) -> bool:
    """Whether 8-bit activations would show beside the error (relative, not squared) that ternary weights make."""
    return int8_noise > SHARE * output_error**2


def _kurtosis(weight: Tensor) -> Tensor:
    total = weight.new_zeros((), dtype=torch.float64)
    for rows in weight.split(max(1, (1 << 22) // weight.shape[1])):
        groups = rows.reshape(-1, GROUP_SIZE)
        squares = (groups - groups.mean(1, keepdim=True)).square()
        total += (squares.square().mean(1) / squares.mean(1).square().clamp_min(1e-30)).sum()
    return total * GROUP_SIZE / weight.numel()


@contextlib.contextmanager
def watched(block: nn.Module, weights: Mapping[str, TernaryWeight]) -> Iterator[dict[str, InputSums]]:
    """Sums over what those Linears of a block get within the context that have become these weights."""

    def watch(name: str, collected: InputSums):
        def hook(module: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            collected.add(arguments[0], output if module.bias is None else output - module.bias)

        return linear_of(block, name).register_forward_hook(hook)

    sums = {
        name: InputSums(*weight.shape, weight.column, linear_of(block, name).weight.device)
        for name, weight in weights.items()
    }
    handles = [watch(name, collected) for name, collected in sums.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()
