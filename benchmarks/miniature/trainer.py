"""A training loop whose steps depend on their numbers alone: a resumed run equals an uninterrupted one bit for bit."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...quantizer.files.atomic import atomic_file
from .muon import Muon


class Trainer:
    """Muon for the parameters `muon` and AdamW for the others, a moving average of the weights, and checkpoints.

    The learning rate rises over `warmup` steps and falls as a cosine over the last part `decay` of `steps`. `mixed`:
    forwards and backwards multiply in bf16. Muon does not: its iteration falls apart there.

    `loss(generator) -> Tensor` draws its batch from a generator that is seeded with the step's number.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        rate: float,
        *,
        warmup: int = 200,
        decay: float = 0.3,
        average: float = 0.999,
        muon: Iterable[nn.Parameter] = (),
        mixed: bool = False,
        seed: int = 0,
    ):
        self.model, self.steps, self.rate, self.mixed, self.seed = model, steps, rate, mixed, seed
        self.warmup, self.decay, self.average = warmup, decay, average
        muon = list(muon)
        others = [p for p in model.parameters() if p.requires_grad and not any(p is other for other in muon)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        ]
        if muon:
            self.optimizers.append(Muon(muon, rate))
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.step, self.seconds = 0, 0.0

    def learning_rate(self) -> float:
        left = (self.steps - self.step) / (self.steps * self.decay)
        falling = 1.0 if left >= 1 else 0.01 + 0.99 * (0.5 - 0.5 * math.cos(math.pi * max(left, 0)))
        return self.rate * min(1, (self.step + 1) / self.warmup) * falling

    def advance(self, loss: Callable[[torch.Generator], Tensor]) -> float:
        """One step; returns its loss."""
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        self.model.zero_grad(set_to_none=True)
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.mixed):
            value = loss(generator)
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
            optimizer.step()
        # A young average follows quickly.
        average = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.model.parameters()), 1 - average)
        self.step += 1
        self.seconds += time.perf_counter() - started
        return value.item()

    def save(self, path: Path) -> None:
        state = {name: getattr(self, name) for name in ("step", "seconds", "ema")}
        state |= {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        with atomic_file(path, overwrite=True) as file:
            torch.save(state, file)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint if there is one."""
        if not path.exists():
            return
        state = torch.load(path, map_location=next(self.model.parameters()).device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state["ema"].items():
            self.ema[name].copy_(value)
        self.step, self.seconds = state["step"], state["seconds"]
