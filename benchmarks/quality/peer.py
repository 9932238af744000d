"""OrbitQuant (arXiv 2607.02461), the best published quantizer that needs no data and no training, by its own package.

Weights lie in a permuted, sign-flipped block-Hadamard basis, rows are normalised, and values are one of 2^bits levels
of a Lloyd-Max codebook; so are activations, token by token, where they are quantized. The package is in
`benchmarks/requirements.txt` only.
"""

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...quantizer.model.flux import Flux, linear_of

NAME = "benchmark.peer"  # in the metadata of a file: which of PEERS quantizes it again when it is loaded


@dataclass(frozen=True)
class Peer:
    """`activations`: their bits, None for full precision. `own`: what the package chooses for FLUX with 2 bits, which
    are 4 bits for modulation and for the blocks at both ends; otherwise all Linears of the blocks are alike.
    """

    bits: int
    activations: int | None = None
    own: bool = False


PEERS = {
    "OrbitQuant, 4 bits": Peer(4),
    "OrbitQuant, 3 bits": Peer(3),
    "OrbitQuant, 2 bits": Peer(2),
    "OrbitQuant, W2A4": Peer(2, 4),
    "OrbitQuant, W2A4, its own choice of layers": Peer(2, 4, own=True),
}


def installed() -> bool:
    return importlib.util.find_spec("orbitquant") is not None


def quantize(model: Flux, peer: Peer) -> float:
    """Quantize the Linears of the blocks in place; returns the bits per weight that they take, without biases."""
    os.environ["ORBITQUANT_KERNELS_AUTOFETCH"] = "0"  # no downloads: its reference in torch has the same numbers
    from orbitquant import OrbitQuantConfig, quantize_model

    alike: dict[str, Any] = {"lowbit_boundary_protection": 0, "lowbit_interior_protection": False}
    config = OrbitQuantConfig(
        weight_bits=peer.bits,
        activation_bits=peer.activations or 4,  # or unused; a codebook of 8 bits takes minutes
        runtime_mode="debug_no_activation_quant" if peer.activations is None else "dequant_bf16",
        target_policy="flux",
        modules_to_convert=["*_blocks.*"],
        modules_to_use_adaln=["*.lin"] if peer.own else [],
        **({} if peer.own else alike),
    )
    quantize_model(model, config, quantization_device="cpu")
    layers = [model.get_submodule(name) for name in model.arch.linears]
    taken = sum(v.nbytes for layer in layers for key, v in layer.state_dict().items() if key != "bias")
    return 8 * taken / sum(n * k for n, k in model.arch.linear_shapes.values())


@torch.no_grad()
def weights(model: Flux) -> dict[str, Tensor]:
    """What a quantized model multiplies by, by BFL's names: the products of its layers with the identity."""
    found = {}
    for name in model.arch.linears:
        layer = linear_of(model, name)
        product = layer(torch.eye(layer.in_features))
        found[f"{name}.weight"] = (product if layer.bias is None else product - layer.bias).t().contiguous()
    return found
