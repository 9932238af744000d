"""On a ComfyUI without the needed capabilities the pack shows one clear message instead of a stack trace."""

import asyncio

import pytest

NODE = "TernaryFluxLoader"


def nodes():
    from ternary_flux.nodes import TernaryFluxExtension

    return asyncio.run(TernaryFluxExtension().get_node_list())


def test_nothing_is_missing_in_the_tested_version(comfy):
    assert comfy.compat.missing() == []
    others = [f"TernaryFlux{name}" for name in ("Quantize", "Save", "Info", "Compare")]
    assert [node.GET_SCHEMA().node_id for node in nodes()] == [NODE, *others]


@pytest.mark.parametrize(
    ("module", "name", "capability"),
    [
        ("comfy.ops", "mixed_precision_ops", "comfy.ops.mixed_precision_ops"),
        ("comfy.model_patcher", "ModelPatcherDynamic", "comfy.model_patcher.ModelPatcherDynamic"),
        ("comfy_kitchen.tensor", "BaseLayoutParams", "comfy_kitchen.tensor.BaseLayoutParams"),
    ],
)
def test_an_older_comfyui_is_told_what_to_update(comfy, monkeypatch, module, name, capability):
    import importlib

    monkeypatch.delattr(importlib.import_module(module), name)
    (node,) = nodes()
    schema = node.GET_SCHEMA()
    assert schema.node_id == NODE
    assert "needs ComfyUI" in schema.description and capability in schema.description
    with pytest.raises(RuntimeError, match="Update ComfyUI"):
        node.execute()


def test_missing_arguments_count_as_missing_capabilities(comfy, monkeypatch):
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda sd, model_options: None)
    assert "comfy.sd.load_diffusion_model_state_dict(metadata=)" in comfy.compat.missing()


def test_a_missing_module_is_named(comfy, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "comfy_kitchen.tensor", None)
    assert comfy.compat.missing() == ["comfy_kitchen.tensor"]


def test_unknown_options_of_the_node_api_are_left_out(comfy):
    assert comfy.compat.accepted(lambda known: None, known=1, unknown=2) == {"known": 1}
