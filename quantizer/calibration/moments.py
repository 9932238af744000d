"""What is collected about one Linear while states run through the teacher and the ternary model."""

from copy import copy

import torch
from torch import Tensor

from .. import ranks

_SUMS = ("count", "second", "mean", "shift", "mean_shift", "cross", "mean_cross", "gates", "metric")


class Moments:
    """Sums over tokens of the inputs x of one Linear and of how far its outputs are from where they should be.

    `weight` of a token is how much an error of the outputs there counts. Each batch is summed in fp32, and batches in
    fp64 until `collect`: rounded to fp32, the sum is then the same in whatever order batches come, on any rank.
    """

    def __init__(self, outputs: int, inputs: int, device: torch.device | str = "cpu"):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.tokens = 0
        self.count = zeros()  # sum of weights
        self.second = zeros(inputs, inputs)  # of weight x x^T
        self.mean = zeros(inputs)  # of weight x
        self.shift: Tensor | None = None  # [K, K], of weight (teacher's x - x) x^T
        self.mean_shift: Tensor | None = None
        self.cross: Tensor | None = None  # [N, K], of gate^2 (wanted output - dense output) x^T
        self.mean_cross: Tensor | None = None
        self.gates = zeros(outputs)  # of gate^2
        self.metric: Tensor | None = None  # [N, N]: an error e [N] of the outputs costs e^T metric e; None: |e|^2

    def add(self, x: Tensor, weight: Tensor | None = None) -> None:
        """Inputs [B, L, K] of the ternary model's Linear, with a weight [B, L] for each token."""
        x, weighted = self._weighted(x, weight)
        self.tokens += len(x)
        self.count += len(x) if weight is None else weight.sum()
        self.second += weighted.t() @ x
        self.mean += weighted.sum(0)

    def expect_drift(self) -> None:
        """There will be a drift to add, on this rank or on another."""
        if self.shift is None:
            self.shift, self.mean_shift = torch.zeros_like(self.second), torch.zeros_like(self.mean)

    def expect_residual(self) -> None:
        """There will be a residual to add, on this rank or on another."""
        if self.cross is None:
            self.cross = self.mean.new_zeros(len(self.gates), len(self.mean))
            self.mean_cross = torch.zeros_like(self.gates)

    def add_drift(self, x: Tensor, teacher: Tensor, weight: Tensor | None = None) -> None:
        """The teacher's inputs [B, L, K] at the same places: the outputs should be those that the teacher has."""
        self.expect_drift()
        _, d = self._weighted(teacher.float() - x.float(), weight)
        self.shift += d.t() @ x.flatten(0, -2).float()
        self.mean_shift += d.sum(0)

    def add_residual(self, x: Tensor, missing: Tensor, gate: Tensor, weight: Tensor | None = None) -> None:
        """What the tokens [B, L, N] miss after gate [B, 1, N] * outputs was added to them with the dense Linear.

        `weight` [L]: of the tokens of every state.
        """
        self.expect_residual()
        gate = gate.float()
        weight = torch.ones_like(missing[0, :, 0], dtype=torch.float32) if weight is None else weight
        wanted = (gate * missing.float() * weight[:, None]).flatten(0, -2)
        self.cross += wanted.t() @ x.flatten(0, -2).float()
        self.mean_cross += wanted.sum(0)
        self.gates += gate.square().sum((0, 1)) * weight.sum()

    def expect_metric(self) -> None:
        """Outputs will be found to matter together, on this rank or on another."""
        if self.metric is None:
            self.metric = self.mean.new_zeros(len(self.gates), len(self.gates))

    def add_reach(self, reach: Tensor) -> None:
        """How far each output reaches, [B, L, N]: by what it is multiplied on its way to where all are mixed."""
        self.expect_metric()
        flat = reach.flatten(0, -2).float()
        self.metric += flat.t() @ flat

    def collect(self, owner: int) -> None:
        """Bring what all ranks have together on the owner, in fp32. Elsewhere it is used up."""
        self.tokens = sum(ranks.gather(self.tokens))
        ranks.add_up([value for name in _SUMS if (value := getattr(self, name)) is not None], owner)
        self.round()

    def round(self) -> None:
        """To fp32: batches are complete."""
        for name in _SUMS:
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.float())

    def rows(self, index: Tensor) -> "Moments":
        """Those of the outputs `index` alone, in memory of their own."""
        part = copy(self)
        for name in ("second", "mean", "shift", "mean_shift"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value.clone())
        for name in ("cross", "mean_cross", "gates"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[index])
        part.metric = None
        return part

    def scale_inputs(self, column: Tensor) -> None:
        """As if the inputs had been multiplied by column [K]."""
        for name in ("second", "mean", "shift", "mean_shift", "cross"):
            if (value := getattr(self, name)) is not None:
                value *= column
        for value in (self.second, self.shift):
            if value is not None:
                value *= column[:, None]

    @staticmethod
    def _weighted(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = x.flatten(0, -2).float()
        if weight is None:
            return flat, flat
        return flat, flat * weight.float().reshape(-1, 1)

    def correction(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        """E c x^T [N, K] and E c [N] of what the outputs of the dense weight [N, K] should have added."""
        if self.cross is not None:
            gates = self.gates.clamp_min(1e-30)
            return (self.cross / gates[:, None]).float(), (self.mean_cross / gates).float()
        if self.shift is not None:
            count = self.count.clamp_min(1e-30)  # a gate that is shut weighs all tokens with nothing
            return dense @ (self.shift / count).float(), dense @ (self.mean_shift / count).float()
        return torch.zeros_like(dense), dense.new_zeros(len(dense))
