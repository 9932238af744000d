"""Code in the documentation runs and says the truth."""

import re

import pytest
import torch
from ternary_flux.ops import TernaryWeight
from ternary_flux.quantizer.files.layer import LayerPlan
from ternary_flux.quantizer.files.ternary import create_ternary

import _pack


@pytest.mark.parametrize("packing", ["planes32", "base3"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("k", [100, 300])
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("column", [None, torch.bfloat16, torch.float32])
def test_the_formats_numpy_decoder(tmp_path, packing, grouped, k, terms, column):
    (source,) = re.findall(
        r"```python\n(.*?)```", (_pack.ROOT / "docs" / "format.md").read_text(encoding="utf-8"), re.DOTALL
    )
    namespace = {}
    exec(source, namespace)
    codes = torch.randint(-1, 2, (6, terms * k), dtype=torch.int8)
    group = torch.randint(1, 128, (terms * -(-k // 128), 6), dtype=torch.uint8) if grouped else None
    column = None if column is None else torch.rand(k).to(column)
    weight = TernaryWeight.from_codes(codes, torch.rand(6), group, terms=terms, column=column)
    path = tmp_path / "one.safetensors"
    with create_ternary(path, {"layer": LayerPlan.of(weight, packing)}, {}, {}) as writer:
        writer.layer("layer", weight)
    assert torch.equal(torch.from_numpy(namespace["dense_weight"](str(path), "layer")), weight.dequantize())
