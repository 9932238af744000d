"""Which backend multiplies by a layer's weight: asked once per layer, at load, never per call."""

from dataclasses import dataclass
from types import ModuleType

import torch

from .backends import eager, triton

BACKENDS: dict[str, ModuleType] = {backend.NAME: backend for backend in (triton, eager)}
ACTIVATIONS = ("auto", "int8", "full")


@dataclass(frozen=True)
class Choice:
    """A backend (module with `linear`), the activations it will use ("int8" or "full"), and why."""

    backend: ModuleType
    activations: str
    reason: str


def resolve(device: torch.device | str, activations: str = "auto") -> Choice:
    """The best backend on `device`. "auto" means int8 where a kernel makes it fast, and full precision elsewhere."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, not {activations!r}")
    device = torch.device(device)
    refusals = []
    for backend in BACKENDS.values():
        refusal = backend.unavailable(device)
        if refusal is None:
            break
        refusals.append(f"{backend.NAME}: {refusal}")
    if activations == "auto":
        activations = "full" if backend is eager else "int8"
    return Choice(backend, activations, "; ".join(refusals) or f"{backend.NAME} runs on {device}")
