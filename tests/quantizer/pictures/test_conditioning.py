"""The conditioning file: round trip, streaming, and messages for what is wrong with it."""

import pytest
import safetensors.torch
import torch
from ternary_flux.benchmarks import make_prompts
from ternary_flux.quantizer.files.architecture import Architecture
from ternary_flux.quantizer.pictures import conditioning, encode

ARCH = Architecture(1, 128, 1, 1, 16, 16, context_dim=12, vec_dim=5, guidance=True)
PROMPTS = ("a red cube", "zwei grüne Bälle", 'a sign that says "hi"')


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cond.safetensors"


def test_round_trip(path):
    context, pooled = torch.randn(3, 4, 12).bfloat16(), torch.randn(3, 5).bfloat16()
    conditioning.write(path, PROMPTS, context, pooled, {"text_encoders": "none"})
    read = conditioning.read(path, ARCH)
    assert read.prompts == PROMPTS and len(read) == 3
    assert torch.equal(read.context, context) and torch.equal(read.pooled, pooled)
    some, vector = read.batch([2, 0])
    assert some.dtype == vector.dtype == torch.float32
    assert torch.equal(some, context[[2, 0]].float()) and torch.equal(vector, pooled[[2, 0]].float())
    assert set(safetensors.torch.load_file(path)) == {"context", "pooled"}


def test_flux2_has_no_pooled_vector(path):
    conditioning.write(path, PROMPTS, torch.zeros(3, 4, 12))
    assert conditioning.read(path).pooled is None
    with pytest.raises(ValueError, match="pooled: the tensor is missing"):
        conditioning.read(path, ARCH)


def test_nothing_is_written_when_prompts_are_missing_or_broken(path):
    with pytest.raises(ValueError, match="of 288 bytes were written"):
        with conditioning.create_conditioning(path, PROMPTS, context_shape=(4, 12), pooled_size=None) as file:
            file.add(torch.zeros(4, 12))
    with pytest.raises(ValueError, match="context of prompt 1 is"):
        with conditioning.create_conditioning(path, PROMPTS, context_shape=(4, 12), pooled_size=None) as file:
            file.add(torch.zeros(5, 12))
    with pytest.raises(ValueError, match="pooled of prompt 1 has values that are not finite"):
        with conditioning.create_conditioning(path, PROMPTS, context_shape=(4, 12), pooled_size=5) as file:
            file.add(torch.zeros(4, 12), torch.full((5,), torch.nan))
    assert not list(path.parent.iterdir())


def test_an_existing_file_is_kept(path):
    conditioning.write(path, PROMPTS, torch.zeros(3, 4, 12))
    with pytest.raises(FileExistsError, match="--force"):
        conditioning.write(path, PROMPTS, torch.ones(3, 4, 12))
    assert not conditioning.read(path).context.any()
    conditioning.write(path, PROMPTS, torch.ones(3, 4, 12), overwrite=True)
    assert conditioning.read(path).context.all()


def test_other_models_are_told_apart(path):
    conditioning.write(path, PROMPTS, torch.zeros(3, 4, 13), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="context: 13 channels, and the model takes 12"):
        conditioning.read(path, ARCH)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"context": torch.zeros(1, 2, 3)}, {}, "the format is None"),
        ({"context": torch.zeros(1, 2, 3)}, {"prompts": "["}, "no list of prompts"),
        ({"context": torch.zeros(1, 2, 3)}, {"prompts": '["a", "b"]'}, r"context: torch.float32 \[1, 2, 3\]"),
        ({"context": torch.zeros(1, 2, 3).int()}, {"prompts": '["a"]'}, "context: torch.int32"),
        ({"other": torch.zeros(1)}, {"prompts": '["a"]'}, "context: the tensor is missing"),
    ],
)
def test_files_that_are_something_else(path, tensors, metadata, message):
    if metadata:
        metadata |= {"format": conditioning.FORMAT}
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=message) as error:
        conditioning.read(path)
    assert str(path) in str(error.value)


def test_shipped_prompts_are_what_the_generator_writes():
    shipped = encode.PROMPTS.read_text(encoding="utf-8").splitlines()
    assert shipped == make_prompts.generate()
    assert len(shipped) == len(set(shipped)) >= 2000
    assert all(prompt == prompt.strip() and "  " not in prompt and "{" not in prompt for prompt in shipped)


def test_other_encodings_of_the_same_prompts_are_told_apart():
    generator = torch.Generator().manual_seed(0)
    context, pooled = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 5, generator=generator)
    names = ("a", "b", "c")
    whole, again, *others = (
        conditioning.Conditioning(*parts)
        for parts in (
            (context, pooled, names),
            (context.clone(), pooled.clone(), names),
            (-context, pooled, names),
            (context, -pooled, names),
            (context, None, names),
            (context, pooled, ("a", "b", "d")),
        )
    )
    assert whole.fingerprint() == again.fingerprint()
    assert len({other.fingerprint() for other in (whole, *others)}) == 5
