"""Adam (arXiv 1412.6980) with a learning rate for each tensor, optionally with 8-bit states and bf16 parameters.

It is our own because a run that was interrupted must go on to the same bits on every machine: its 8-bit states run
without a compiler and on CPUs, and the chance in rounding bf16 parameters depends on seed and step alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ranks

_BLOCK = 256  # values that share a scale in an 8-bit state
_SMALL = 4096  # smaller tensors keep fp32 states
_PORTION = 1 << 24  # values that are updated at a time
_TINY = 1e-30


class Adam:
    """`step(factors)` moves every parameter by rate * factor * m / sqrt(v).

    rates       name -> learning rate, or a tensor of them that broadcasts to the parameter. There is no weight decay,
                and no epsilon beyond what avoids 0 / 0: the size of a step depends on the rates alone, not on the
                scale of the loss.
    eight_bit   moments of large tensors in 8 bits with one scale for 256 values (arXiv 2110.02861; here the first
                moment is companded by a square root and the second by a fourth root).

    bf16 parameters are rounded stochastically, from a generator that depends on seed and step only.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        rates: Mapping[str, float | Tensor],
        betas: tuple[float, float] = (0.9, 0.99),
        eight_bit: bool = False,
        seed: int = 0,
    ):
        self.parameters, self.betas, self.seed, self.count = dict(parameters), betas, seed, 0
        self.rates = {name: 1.0 if isinstance(rate, Tensor) else rate for name, rate in rates.items()}
        # The root of the second moment is divided by these.
        self.each = {
            name: rate.to(parameters[name].device).expand_as(parameters[name])
            for name, rate in rates.items()
            if isinstance(rate, Tensor)
        }
        self.packed = {name for name, p in parameters.items() if eight_bit and p.numel() > _SMALL}
        self.first: dict[str, Any] = {}  # a tensor, or its codes and scales in 8 bits
        self.second: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            zero = torch.zeros_like(parameter, dtype=torch.float32)
            self.first[name] = _pack_signed(zero) if name in self.packed else zero
            self.second[name] = _pack_positive(zero) if name in self.packed else zero.clone()

    @torch.no_grad()
    def step(self, factors: Mapping[str, float] | None = None) -> None:
        """One update from the gradients of the parameters; those without a gradient stay.

        `factors`: name -> part of the learning rate that is used now (default: all of it).
        """
        rates = {name: rate if factors is None else rate * factors[name] for name, rate in self.rates.items()}
        self.count += 1
        corrections = [1 - beta**self.count for beta in self.betas]
        plain = [
            name
            for name, p in self.parameters.items()
            if p.grad is not None and name not in self.packed and p.dtype == torch.float32
        ]
        for names in _portions(plain, self.parameters):
            self._step_plain(names, rates, corrections)
        generators: dict[torch.device, torch.Generator] = {}
        for name in sorted(set(self.parameters) - set(plain)):
            parameter = self.parameters[name]
            if parameter.grad is not None:
                if parameter.device not in generators:
                    seed = self.seed * 1_000_003 + self.count
                    generators[parameter.device] = torch.Generator(parameter.device).manual_seed(seed)
                self._step_one(name, rates[name], corrections, generators[parameter.device])

    def _step_plain(self, names: list[str], rates: Mapping[str, float], corrections: list[float]) -> None:
        parameters = [self.parameters[name] for name in names]
        gradients = [parameter.grad for parameter in parameters]
        first, second = [self.first[name] for name in names], [self.second[name] for name in names]
        torch._foreach_lerp_(first, gradients, 1 - self.betas[0])
        torch._foreach_mul_(second, self.betas[1])
        torch._foreach_addcmul_(second, gradients, gradients, 1 - self.betas[1])
        divisors = torch._foreach_div(second, corrections[1])
        torch._foreach_sqrt_(divisors)
        torch._foreach_add_(divisors, _TINY)
        for name, divisor in zip(names, divisors, strict=True):
            if name in self.each:
                divisor.div_(self.each[name])
        steps = [-rates[name] / corrections[0] for name in names]
        torch._foreach_addcdiv_(parameters, first, divisors, steps)

    def _step_one(self, name: str, rate: float, corrections: list[float], generator: torch.Generator) -> None:
        """In portions: what is computed in between takes many times the memory of an 8-bit state."""
        whole, packed = self.parameters[name], name in self.packed
        values, gradients = whole.view(-1), whole.grad.reshape(-1)
        each = self.each[name].reshape(-1) if name in self.each else None
        for start in range(0, len(values), _PORTION):
            span = slice(start, min(start + _PORTION, len(values)))
            rows = slice(start // _BLOCK, -(-span.stop // _BLOCK))
            parameter, gradient = values[span], gradients[span].float()
            if packed:
                first_codes, second_codes = ([part[rows] for part in of[name]] for of in (self.first, self.second))
                first = _unpack_signed(first_codes, gradient.shape)
                second = _unpack_positive(second_codes, gradient.shape)
            else:
                first, second = (of[name].view(-1)[span] for of in (self.first, self.second))
            first.lerp_(gradient, 1 - self.betas[0])
            second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
            divisor = (second / corrections[1]).sqrt_().add_(_TINY)
            if each is not None:
                divisor.div_(each[span])
            update = (first / divisor).mul_(-rate / corrections[0])
            if packed:
                for kept, new in ((first_codes, _pack_signed(first)), (second_codes, _pack_positive(second))):
                    for part, value in zip(kept, new, strict=True):
                        part.copy_(value)
            if parameter.dtype == torch.bfloat16:
                parameter.copy_(round_stochastically(parameter.float() + update, generator))
            else:
                parameter += update

    def state_dict(self) -> dict[str, Tensor]:
        """Flat name -> tensor, for a checkpoint."""
        tensors = {"count": torch.tensor(self.count)}
        for kind in ("first", "second"):
            for name, value in getattr(self, kind).items():
                parts = value if isinstance(value, tuple) else (value,)
                tensors |= {f"{kind}.{i}.{name}": part for i, part in enumerate(parts)}
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state written by `state_dict`."""
        for key, own in self.state_dict().items():
            if key == "count":
                self.count = int(tensors[key])
            else:
                own.copy_(tensors[key])


def sum_gradients(parameters: Iterable[Tensor], *others: Tensor) -> None:
    """Sum the gradients of what is trained, and other tensors, over the ranks, in place."""
    if ranks.world() > 1:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # this rank had no batch
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([*(parameter.grad for parameter in trained), *others])


def _portions(names: Iterable[str], parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of parameters with no more than `_PORTION` values together, or of one that has more."""
    portion: list[str] = []
    size = 0
    for name in names:
        if portion and size + parameters[name].numel() > _PORTION:
            yield portion
            portion, size = [], 0
        portion.append(name)
        size += parameters[name].numel()
    if portion:
        yield portion


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down with the probability that makes the mean exact."""
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).bfloat16()


def _blocks(values: Tensor) -> Tensor:
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)


def _pack_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _blocks(values)
    top = blocks.abs().amax(1, keepdim=True).clamp_min(_TINY)
    return ((blocks.abs() / top).sqrt_().copysign_(blocks) * 127).round_().to(torch.int8), top


def _unpack_signed(packed: Sequence[Tensor], shape: torch.Size) -> Tensor:
    codes, top = packed
    roots = codes.float() / 127
    return (roots * roots.abs() * top).flatten()[: shape.numel()].view(shape)


def _pack_positive(values: Tensor) -> tuple[Tensor, Tensor]:
    blocks = _blocks(values)
    top = blocks.amax(1, keepdim=True).clamp_min(_TINY)
    # Rounded up: a second moment of zero under a first moment that is not would be an unbounded step.
    return ((blocks / top).sqrt_().sqrt_() * 255).ceil_().to(torch.uint8), top


def _unpack_positive(packed: Sequence[Tensor], shape: torch.Size) -> Tensor:
    codes, top = packed
    return ((codes.float() / 255).pow_(4) * top).flatten()[: shape.numel()].view(shape)
