"""What `detect` recognises, and what it says when it does not."""

from pathlib import Path

import pytest
from ternary_flux.quantizer.files.architecture import Architecture, canonical, detect
from ternary_flux.quantizer.files.layer import LayerPlan

ROOT = Path(__file__).resolve().parents[3]


def dev(**changes) -> Architecture:
    config = dict(version=1, hidden=3072, depth=19, depth_single=38, in_channels=16, out_channels=16)
    return Architecture(**config | dict(context_dim=4096, vec_dim=768, guidance=True) | changes)


def klein(**changes) -> Architecture:
    config = dict(version=2, hidden=3072, depth=5, depth_single=20, in_channels=128, out_channels=128)
    return Architecture(**config | dict(context_dim=7680, vec_dim=None, guidance=False) | changes)


MODELS = {
    "FLUX.1-dev": dev(),
    "FLUX.1 without guidance (schnell or de-distilled)": dev(guidance=False),
    "FLUX.1-Fill": dev(in_channels=96),
    "FLUX.1-Canny/Depth": dev(in_channels=32),
    "FLUX.2-klein-4B": klein(),
    "FLUX.2-klein-9B": klein(hidden=4096, depth=8, depth_single=24, context_dim=12288),
    "FLUX.2-dev": klein(hidden=6144, depth=8, depth_single=48, context_dim=15360, guidance=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_recognised(name):
    arch = detect(MODELS[name].shapes)
    assert arch == MODELS[name]
    assert arch.name == name
    assert arch.heads * arch.head_dim == arch.hidden


def test_parameter_counts_are_the_published_ones():
    def count(arch):
        return sum(_product(shape) for shape in arch.shapes.values())

    assert count(dev()) == 11_901_408_320
    assert count(dev(guidance=False)) == 11_891_178_560
    assert count(klein()) == 3_875_544_576
    ternary = {name: _product(shape) for name, shape in dev().linear_shapes.items()}
    modulation = sum(size for name, size in ternary.items() if name.endswith("lin"))
    assert len(ternary) == 19 * 10 + 38 * 3
    assert (sum(ternary.values()), modulation) == (11_834_228_736, 3_227_516_928)


@pytest.mark.parametrize(
    "name, row",
    [
        ("FLUX.1-dev", "FLUX.1 [dev], 11.9 B"),
        ("FLUX.2-klein-4B", "FLUX.2 [klein] 4B"),
        ("FLUX.2-klein-9B", "FLUX.2 [klein] 9B"),
        ("FLUX.2-dev", "FLUX.2 [dev], 32 B"),
    ],
)
def test_sizes_in_the_readme(name, row):
    arch = MODELS[name]
    dense = 2 * sum(_product(shape) for shape in arch.shapes.values())
    cells = [row, f"{dense / 1e9:.1f} GB"]
    for packing in ("planes32", "base3"):
        saved = sum(2 * _product(shape) - LayerPlan(shape, packing).nbytes for shape in arch.linear_shapes.values())
        cells.append(f"{(dense - saved) / 1e9:.2f} GB, {dense / (dense - saved):.1f}x smaller")
    assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_linears_are_listed_in_forward_order():
    arch = dev(depth=1, depth_single=1)
    assert arch.linears[:4] == (
        "double_blocks.0.img_mod.lin",
        "double_blocks.0.txt_mod.lin",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.txt_attn.qkv",
    )
    assert arch.linears[-3:] == (
        "single_blocks.0.modulation.lin",
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
    )
    assert not any("modulation" in name for name in klein().linears)


def test_norms_may_have_comfyui_names():
    shapes = {name.replace("_norm.scale", "_norm.weight"): shape for name, shape in dev().shapes.items()}
    assert detect(shapes) == dev()
    assert canonical("single_blocks.0.norm.key_norm.weight") == "single_blocks.0.norm.key_norm.scale"
    assert canonical("img_in.weight") == "img_in.weight"


def test_unknown_extra_keys_are_ignored():
    assert detect(dev().shapes | {"something.else": (3,), "double_blocks.x.note": ()}) == dev()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_in.weight": None}, "img_in.weight is missing"),
        ({"vector_in.in_layer.weight": None}, "vector_in.in_layer.weight is missing"),
        ({"img_in.weight": (3000, 64)}, "multiples of 128"),
        ({"single_blocks.7.linear2.bias": None}, "single_blocks.7.linear2.bias is missing"),
        ({"double_blocks.3.img_mlp.0.weight": (4096, 3072)}, "double_blocks.3.img_mlp.0.weight has shape"),
        ({"double_blocks.250000.x": (1,)}, "double_blocks.19 is missing, and double_blocks.250000 is there"),
    ],
)
def test_errors_name_the_key(change, message):
    shapes = {name: shape for name, shape in (dev().shapes | change).items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        detect(shapes)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="not a FLUX transformer"):
        detect({"encoder.block.0.layer.0.SelfAttention.k.weight": (4096, 4096)})


def _product(shape):
    total = 1
    for size in shape:
        total *= size
    return total
