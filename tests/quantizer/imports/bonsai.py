"""Folders with the structure of Bonsai Image 4B: every key of FLUX.2 klein 4B, at a width of 128, in three packagings.

Written from the published layouts alone: no name, table or packing of the pack is used here.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

WIDTH, CONTEXT, CHANNELS, MLP = 128, 192, 128, 3 * 128
DOUBLE, SINGLE = 5, 20
LINEARS = {
    f"transformer_blocks.{i}.{name}": shape
    for i in range(DOUBLE)
    for name, shape in {
        **{f"attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")},
        **{f"attn.add_{x}_proj": (WIDTH, WIDTH) for x in "qkv"},
        **{f"{ff}.linear_in": (2 * MLP, WIDTH) for ff in ("ff", "ff_context")},
        **{f"{ff}.linear_out": (WIDTH, MLP) for ff in ("ff", "ff_context")},
    }.items()
} | {
    f"single_transformer_blocks.{i}.attn.{name}": shape
    for i in range(SINGLE)
    for name, shape in {"to_qkv_mlp_proj": (3 * WIDTH + 2 * MLP, WIDTH), "to_out": (WIDTH, WIDTH + MLP)}.items()
}
DENSE = {
    "x_embedder": (WIDTH, CHANNELS),
    "context_embedder": (WIDTH, CONTEXT),
    "proj_out": (CHANNELS, WIDTH),
    "norm_out.linear": (2 * WIDTH, WIDTH),
    "time_guidance_embed.timestep_embedder.linear_1": (WIDTH, 256),
    "time_guidance_embed.timestep_embedder.linear_2": (WIDTH, WIDTH),
    "double_stream_modulation_img.linear": (6 * WIDTH, WIDTH),
    "double_stream_modulation_txt.linear": (6 * WIDTH, WIDTH),
    "single_stream_modulation.linear": (3 * WIDTH, WIDTH),
    **{
        f"transformer_blocks.{i}.attn.norm_{x}": (128,) for i in range(DOUBLE) for x in ("q", "k", "added_q", "added_k")
    },
    **{f"single_transformer_blocks.{i}.attn.norm_{x}": (128,) for i in range(SINGLE) for x in "qk"},
}
FOLDERS = {
    "unpacked": "transformer",
    "mlx-2bit": "transformer-packed-mflux",
    "gemlite-2bit": "transformer-gemlite-int2",
}


class Model:
    """A random ternary model: codes 0, 1, 2 [N, K] and scales bf16 [N, K/128] of each Linear, and dense tensors."""

    def __init__(self, seed: int = 0, scale_dtype: torch.dtype = torch.bfloat16):
        draw = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.codes = {name: draw.choice(3, shape, p=(0.33, 0.34, 0.33)) for name, shape in LINEARS.items()}
        self.scales = {}
        for name, (n, k) in LINEARS.items():
            self.scales[name] = (torch.rand(n, k // 128) * 0.03 + 0.01).to(scale_dtype)
            empty = torch.rand(n, k // 128) < 0.01  # groups that training made zero
            self.scales[name][empty] = 0
        self.dense = {name: (torch.randn(shape) * 0.05).bfloat16() for name, shape in DENSE.items()}

    def weight(self, name: str) -> torch.Tensor:
        """The Linear as its maker decodes it: (code - 1) * scale in the dtype of the scales."""
        trits = torch.from_numpy(self.codes[name] - 1).to(self.scales[name].dtype)
        return trits * self.scales[name].repeat_interleave(128, 1) + 0  # without minus zeros

    def bfl(self) -> dict[str, torch.Tensor]:
        """Every tensor under the name and in the arrangement of Black Forest Labs' file."""
        state = {}
        for i in range(DOUBLE):
            ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
            for stream, parts, out, ff, norms in (
                ("img", ("to_q", "to_k", "to_v"), "to_out.0", "ff", ("norm_q", "norm_k")),
                (
                    "txt",
                    ("add_q_proj", "add_k_proj", "add_v_proj"),
                    "to_add_out",
                    "ff_context",
                    ("norm_added_q", "norm_added_k"),
                ),
            ):
                qkv = [self.weight(f"{theirs}.attn.{part}") for part in parts]
                state[f"{ours}.{stream}_attn.qkv.weight"] = torch.cat(qkv)
                state[f"{ours}.{stream}_attn.proj.weight"] = self.weight(f"{theirs}.attn.{out}")
                state[f"{ours}.{stream}_mlp.0.weight"] = self.weight(f"{theirs}.{ff}.linear_in")
                state[f"{ours}.{stream}_mlp.2.weight"] = self.weight(f"{theirs}.{ff}.linear_out")
                for norm, name in zip(norms, ("query_norm", "key_norm"), strict=True):
                    state[f"{ours}.{stream}_attn.norm.{name}.scale"] = self.dense[f"{theirs}.attn.{norm}"]
        for i in range(SINGLE):
            ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}.attn"
            state[f"{ours}.linear1.weight"] = self.weight(f"{theirs}.to_qkv_mlp_proj")
            state[f"{ours}.linear2.weight"] = self.weight(f"{theirs}.to_out")
            state[f"{ours}.norm.query_norm.scale"] = self.dense[f"{theirs}.norm_q"]
            state[f"{ours}.norm.key_norm.scale"] = self.dense[f"{theirs}.norm_k"]
        for ours, theirs in {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "final_layer.linear": "proj_out",
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
        }.items():
            state[f"{ours}.weight"] = self.dense[theirs]
        scale_shift = self.dense["norm_out.linear"]
        state["final_layer.adaLN_modulation.1.weight"] = torch.cat([scale_shift[WIDTH:], scale_shift[:WIDTH]])
        return state

    def tensors(self, packaging: str) -> dict[str, torch.Tensor]:
        state = {f"{name}.weight": tensor for name, tensor in self.dense.items()}
        for name in LINEARS:
            state |= getattr(self, f"_{packaging.partition('-')[0]}")(name)
        return state

    def _unpacked(self, name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": self.weight(name)}

    def _mlx(self, name: str) -> dict[str, torch.Tensor]:
        n, k = LINEARS[name]
        words = np.zeros((n, k // 16), np.uint32)
        for i in range(k):
            words[:, i // 16] |= self.codes[name][:, i].astype(np.uint32) << np.uint32(2 * (i % 16))
        return {
            f"{name}.weight": torch.from_numpy(words),
            f"{name}.scales": self.scales[name],
            f"{name}.biases": -self.scales[name],
        }

    def _gemlite(self, name: str) -> dict[str, torch.Tensor]:
        n, k = LINEARS[name]
        packed = np.zeros((k // 4, n), np.uint8)
        for i in range(k):
            packed[i // 4] |= (self.codes[name][:, i] << 2 * (i % 4)).astype(np.uint8)
        scales = self.scales[name].float().T.contiguous()
        metadata = [0, 2, 128, 3, 4, 0, 0, 0, 0, 0, 0, 1]
        return {
            f"{name}.W_q": torch.from_numpy(packed),
            f"{name}.scales": scales,
            f"{name}.zeros": -scales,
            f"{name}.metadata": torch.tensor(metadata, dtype=torch.int32),
            f"{name}.orig_shape": torch.tensor([n, k], dtype=torch.int32),
        }


CONFIG = {"_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32]}
QUANTIZATION = {
    "unpacked": None,
    "mlx-2bit": {"bits": 2, "group_size": 128},
    "gemlite-2bit": {"format": "gemlite-int2-ternary-g128", "bits": 2, "group_size": 128, "solver": "ternary"},
}


def write(
    root: Path, packaging: str, state: dict[str, torch.Tensor], quantization: dict | None = None, shards: int = 1
) -> Path:
    """A pipeline's folder with this transformer, a VAE and a text encoder. Returns the file with the weights."""
    folder = root / FOLDERS[packaging]
    for other in ("vae", "text_encoder"):
        (root / other).mkdir(parents=True, exist_ok=True)
        save_file({"decoder.weight": torch.zeros(2)}, root / other / "diffusion_pytorch_model.safetensors")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if quantization or QUANTIZATION[packaging]:
        (folder / "quantization_config.json").write_text(json.dumps(quantization or QUANTIZATION[packaging]))
    if packaging == "gemlite-2bit":
        torch.save(state, folder / "state_dict.pt")
        return folder / "state_dict.pt"
    if shards == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return folder / "diffusion_pytorch_model.safetensors"
    weight_map, keys = {}, list(state)
    for i in range(shards):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        chosen = keys[i::shards]
        save_file({key: state[key] for key in chosen}, folder / name)
        weight_map |= dict.fromkeys(chosen, name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
