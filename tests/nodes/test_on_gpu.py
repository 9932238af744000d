"""The cases of on_gpu.py, which nothing runs where there is no GPU, on the CPU."""

import pytest
from ternary_flux.tests.nodes import on_gpu, tiny


@pytest.mark.parametrize("name", ["rank 8, int8", "LoRA: stacked", "partly unloaded"])
def test_a_case_is_right(comfy, tmp_path, monkeypatch, name):
    monkeypatch.setattr(on_gpu, "CUDA", tiny.CPU)
    found = on_gpu.cases(comfy, tmp_path)[name]()
    assert found["distance"] < on_gpu.BOUND
    assert found.get("effect", 1) > 0.05 and found.get("left over", 0) < 1e-6


def test_a_wrong_product_shows(comfy, tmp_path, monkeypatch):
    monkeypatch.setattr(on_gpu, "CUDA", tiny.CPU)
    measure = on_gpu.cases(comfy, tmp_path)["plain, full"]
    monkeypatch.setattr(
        comfy.linear, "ternary_linear", lambda x, weight, *_: x.new_zeros(*x.shape[:-1], weight.shape[0])
    )
    assert measure()["distance"] > on_gpu.BOUND
