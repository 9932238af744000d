"""The table of diffusers' names, forth and back over the complete key sets of the published models."""

import pytest
import torch
from ternary_flux.benchmarks import comfyui
from ternary_flux.quantizer.files.sources.names import assemble, bfl_name, diffusers_names, parts_shape
from ternary_flux.tests.quantizer.files.sources import foreign
from ternary_flux.tests.quantizer.files.test_architecture import MODELS


def full_shapes(name):
    """Diffusers' keys and shapes of a published model, from the writer by hand."""
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in MODELS[name].shapes.items()}
    return {key: tuple(tensor.shape) for key, tensor in foreign.diffusers(state).items()}


@pytest.mark.parametrize("name", MODELS)
def test_every_name_forth_and_back(name):
    arch = MODELS[name]
    theirs = [key for ours in arch.shapes for key in diffusers_names(ours, arch.version)]
    assert len(theirs) == len(set(theirs)) and set(theirs) == full_shapes(name).keys()
    for ours in arch.shapes:
        for i, key in enumerate(diffusers_names(ours, arch.version)):
            assert bfl_name(key, arch.version) == (ours, i)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_rows_of_a_whole_model(name):
    shapes = full_shapes(name)
    parts = assemble(shapes)
    assert {ours: parts_shape(of, shapes) for ours, of in parts.items()} == MODELS[name].shapes
    for of in parts.values():  # each of the parameter's rows, and each of the tensors', exactly once
        rows = sorted((part.at, part.rows) for part in of)
        assert [at for at, _ in rows] == [sum(count for _, count in rows[:i]) for i in range(len(rows))]
        for key in {part.key for part in of}:
            assert sum(part.rows for part in of if part.key == key) == shapes[key][0]


def test_the_number_of_tensors_that_klein_has():
    """169 in diffusers, of which 138 are alike, 1 is swapped and 30 become 10."""
    shapes = full_shapes("FLUX.2-klein-4B")
    parts = assemble(shapes)
    assert len(shapes) == 169 and len(parts) == 149
    assert sum(len(of) == 1 for of in parts.values()) == 138


def test_comfyui_has_the_same_table():
    """Its table lacks FLUX.2's embedders and modulations; where it has a key, it says the same."""
    comfyui.make_importable()
    import comfy.utils

    for name, arch in MODELS.items():
        config = {"depth": arch.depth, "depth_single_blocks": arch.depth_single, "hidden_size": arch.hidden}
        table = comfy.utils.flux_to_diffusers(config)
        shapes = full_shapes(name)
        parts = assemble(shapes)
        checked = 0
        for ours, of in parts.items():
            for part in of:
                if part.key not in table:
                    assert arch.version == 2
                    continue
                theirs = table[part.key]
                target, span = (theirs, None) if isinstance(theirs, str) else (theirs[0], theirs[1])
                assert target.replace("norm.weight", "norm.scale") == ours.replace("norm.weight", "norm.scale")
                assert span is None or part.at == span[1]
                checked += 1
        assert checked > 100


@pytest.mark.parametrize("key", ["img_in.weight", "transformer_blocks.0.attn.to_q.lora_A", "pos_embed.weight", "x", ""])
def test_other_keys_are_nobodys(key):
    assert bfl_name(key, 1) is None and bfl_name(key, 2) is None


def test_incomplete_parameters_are_left_out():
    shapes = full_shapes("FLUX.1-dev")
    del shapes["transformer_blocks.3.attn.to_k.weight"]
    assert MODELS["FLUX.1-dev"].shapes.keys() - assemble(shapes).keys() == {"double_blocks.3.img_attn.qkv.weight"}
