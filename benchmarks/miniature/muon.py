"""Muon (https://kellerjordan.github.io/posts/muon): momentum with every matrix replaced by its nearest orthogonal one.

The miniature's decoder, deep and without norms, learns about twice as fast with it as with AdamW.
"""

import torch
from torch import Tensor


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest orthogonal matrices of a stack [n, rows, columns], by a quintic Newton-Schulz iteration.

    The iteration runs on the Gram matrices of the short side: half the work for the shapes of a transformer.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, product = x @ x.mT, None
    for step in range(steps):
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of Linears and convolutions; matrices of one shape are orthogonalised together."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # no closure is taken
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, parameters in by_shape.items():
                self._step(parameters, shape, group)

    def _step(self, parameters: list[Tensor], shape: torch.Size, group: dict) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers, gradients = [self.state[p]["momentum"] for p in parameters], [p.grad for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = orthogonalize(torch.stack([u.flatten(1) for u in nesterov]))
        # Gives every update about the size of an Adam step (https://arxiv.org/abs/2502.16982).
        scale = 0.2 * max(updates.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, [u.reshape(shape) for u in updates], alpha=-group["lr"] * scale)
