"""Random LoRAs of every kind for the tiny FLUX, and what ComfyUI makes of them on a dense model."""

import torch
from ternary_flux.tests.nodes import tiny

H = tiny.HIDDEN
QKV = "double_blocks.0.img_attn.qkv"

DIFFUSERS = {
    "transformer_blocks.0.attn.to_q": (H, H),
    "transformer_blocks.0.attn.to_k": (H, H),
    "transformer_blocks.0.attn.to_v": (H, H),
    "transformer_blocks.0.attn.to_out.0": (H, H),
    "transformer_blocks.0.norm1.linear": (6 * H, H),
    "transformer_blocks.0.ff.net.2": (H, 4 * H),
    "single_transformer_blocks.0.attn.to_q": (H, H),
    "single_transformer_blocks.0.proj_mlp": (4 * H, H),
    "single_transformer_blocks.0.proj_out": (H, 5 * H),
}
BFL = {
    "double_blocks.0.img_attn.qkv": (3 * H, H),
    "double_blocks.0.txt_mlp.0": (4 * H, H),
    "single_blocks.0.linear2": (H, 5 * H),
    "single_blocks.0.modulation.lin": (3 * H, H),
}


def diffusers_lora(seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    tensors = {}
    for name, (n, k) in DIFFUSERS.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, k, generator=g) * 0.05
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(n, rank, generator=g) * 0.05
    return tensors


def bfl_lora(seed: int, rank: int = 8, alpha: float = 4.0, shapes=BFL, **extra) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    tensors = {}
    for name, (n, k) in shapes.items():
        name = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, k, generator=g) * 0.05
        tensors[f"{name}.lora_up.weight"] = torch.randn(n, rank, generator=g) * 0.05
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        tensors |= {f"{name}.{key}": make(n, k, g) for key, make in extra.items()}
    return tensors


def dora(seed: int, shapes=BFL) -> dict[str, torch.Tensor]:
    return bfl_lora(seed, shapes=shapes, dora_scale=lambda n, k, g: torch.rand(n, 1, generator=g) + 0.5)


def _each(seed: int, shapes, make) -> dict[str, torch.Tensor]:
    """make(n, k, g) -> the tensors of one layer by the end of their names."""
    g = tiny.generator(seed)
    tensors = {}
    for name, (n, k) in shapes.items():
        tensors |= {f"lora_unet_{name.replace('.', '_')}.{end}": tensor for end, tensor in make(n, k, g).items()}
    return tensors


def lokr(seed: int, shapes=BFL) -> dict[str, torch.Tensor]:
    def make(n, k, g):
        w1, w2 = torch.randn(4, 4, generator=g), torch.randn(n // 4, k // 4, generator=g)
        return {"lokr_w1": w1 * 0.05, "lokr_w2": w2 * 0.05}

    return _each(seed, shapes, make)


def loha(seed: int, shapes=BFL) -> dict[str, torch.Tensor]:
    def make(n, k, g):
        sizes = {"w1_a": (n, 4), "w1_b": (4, k), "w2_a": (n, 4), "w2_b": (4, k)}
        return {f"hada_{part}": torch.randn(size, generator=g) * 0.1 for part, size in sizes.items()}

    return _each(seed, shapes, make)


def glora(seed: int, shapes=BFL) -> dict[str, torch.Tensor]:
    def make(n, k, g):
        sizes = {"a1": (k, 4), "a2": (4, k), "b1": (n, 4), "b2": (4, k)}
        return {f"{part}.weight": torch.randn(size, generator=g) * 0.05 for part, size in sizes.items()}

    return _each(seed, shapes, make)


def oft(seed: int, shapes=BFL) -> dict[str, torch.Tensor]:
    def make(n, k, g):
        return {"oft_blocks": torch.randn(n // 8, 8, 8, generator=g) * 0.05, "alpha": torch.tensor(0.0)}

    return _each(seed, shapes, make)


def boft(seed: int, shapes=BFL) -> dict[str, torch.Tensor]:
    def make(n, k, g):
        return {"oft_blocks": torch.randn(2, n // 8, 8, 8, generator=g) * 0.05, "alpha": torch.tensor(0.0)}

    return _each(seed, shapes, make)


def difference(seed: int, shapes=BFL) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    return {f"diffusion_model.{name}.diff": torch.randn(shape, generator=g) * 0.01 for name, shape in shapes.items()}


def bias_difference(seed: int) -> dict[str, torch.Tensor]:
    g = tiny.generator(seed)
    return {f"diffusion_model.{name}.diff_b": torch.randn(n, generator=g) * 0.1 for name, (n, _) in BFL.items()}


def apply(comfy, model, loras):
    for lora, strength in loras:
        model, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)
    return model


def merged(comfy, twin, loras) -> torch.Tensor:
    """What core computes with the LoRAs merged into the dense twin."""
    model = apply(comfy, twin(), loras)
    comfy.model_management.load_models_gpu([model])
    return tiny.run(model)


def hooked(comfy, model, lora, strength=1.0):
    """Register a LoRA as a hook the way the node Create Hook LoRA does; returns the model and its hook group."""
    group = comfy.hooks.create_hook_lora(dict(lora), strength, 0.0)
    model = model.clone()
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    model.register_all_hook_patches(group, target)
    return model, group


KINDS = {
    "lora": bfl_lora,
    "dora": dora,
    "lokr": lokr,
    "loha": loha,
    "glora": glora,
    "oft": oft,
    "boft": boft,
    "difference": difference,
}

COMBINATIONS = {
    "diffusers keys": [(diffusers_lora(1), 1.0)],
    "bfl keys, alpha": [(bfl_lora(2), 1.0)],
    "negative": [(diffusers_lora(1), -0.7)],
    "stacked": [(diffusers_lora(1), -0.7), (bfl_lora(2), 1.3), (diffusers_lora(3, rank=2), 0.5)],
    "zero": [(bfl_lora(2), 0.0)],
    "dora": [(dora(4), 0.8)],
    "dora and lora": [(bfl_lora(2), 1.0), (dora(4), 0.8)],
    "lokr": [(lokr(5), 1.0)],
    "difference": [(difference(6), 1.0), (diffusers_lora(1), 1.0)],
    "bias": [(bias_difference(7), 1.0), (diffusers_lora(1), 1.0)],
}
