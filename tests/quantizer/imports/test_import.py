import json
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from ternary_flux.quantizer.cli import run
from ternary_flux.quantizer.files.container import FormatError, read_header
from ternary_flux.quantizer.files.export import export_checkpoint
from ternary_flux.quantizer.files.ternary import open_ternary
from ternary_flux.quantizer.files.verify import verify
from ternary_flux.quantizer.imports.run import import_model, open_source
from ternary_flux.tests.quantizer import synthetic
from ternary_flux.tests.quantizer.imports import bonsai

import _pack

PACKAGINGS = list(bonsai.FOLDERS)


@pytest.fixture(scope="module")
def model() -> bonsai.Model:
    return bonsai.Model()


@pytest.fixture(scope="module")
def roots(tmp_path_factory, model):
    """One downloaded folder for each packaging."""
    folder = tmp_path_factory.mktemp("bonsai")
    for packaging in PACKAGINGS:
        bonsai.write(folder / f"bonsai-image-{packaging}", packaging, model.tensors(packaging))
    return {packaging: folder / f"bonsai-image-{packaging}" for packaging in PACKAGINGS}


@pytest.fixture(scope="module")
def imported(tmp_path_factory, roots):
    folder = tmp_path_factory.mktemp("imported")
    for packaging, root in roots.items():
        assert run(["import", str(root), "-o", str(folder / f"{packaging}.safetensors")]) == 0
    return {packaging: folder / f"{packaging}.safetensors" for packaging in roots}


def assert_holds(path, model, tmp_path) -> None:
    """The file's dense export in bf16 is the model, in every tensor."""
    export_checkpoint(path, tmp_path / "export.safetensors", overwrite=True)
    exported, expected = load_file(tmp_path / "export.safetensors"), model.bfl()
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(exported[name], tensor.bfloat16()), name


@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_every_tensor_is_the_sources(imported, model, tmp_path, packaging):
    path = imported[packaging]
    assert_holds(path, model, tmp_path)
    file = open_ternary(path)
    assert (file.architecture.version, file.architecture.depth, file.architecture.depth_single) == (2, 5, 20)
    assert len(file.layers) == 80 and {layer.scales for layer in file.layers.values()} == {"bf16"}
    assert len(file.dense) == 149 - 80 and verify(path) == []
    assert file.metadata["modelspec.title"].startswith(f"bonsai-image-{packaging}")
    assert file.metadata["ternary.method"] == "import"


def test_the_packagings_give_one_file(imported):
    headers = {packaging: read_header(path) for packaging, path in imported.items()}
    told = ("modelspec.title", "modelspec.date", "ternary.source", "ternary.source_sha256", "ternary.settings")
    first, *others = (
        (
            {key: value for key, value in header.metadata.items() if key not in told},
            [(key, entry.dtype, entry.shape) for key, entry in header.entries.items()],
            imported[packaging].read_bytes()[next(iter(header.entries.values())).start :],
        )
        for packaging, header in headers.items()
    )
    assert all(other == first for other in others)


def test_the_sources_sha256_is_in_the_file(imported, roots):
    import hashlib

    content = (roots["mlx-2bit"] / "transformer-packed-mflux/diffusion_pytorch_model.safetensors").read_bytes()
    assert open_ternary(imported["mlx-2bit"]).metadata["ternary.source_sha256"] == hashlib.sha256(content).hexdigest()


def test_groups_of_scale_zero_hold_zeros_whatever_their_codes_are(imported, model):
    file, name = open_ternary(imported["gemlite-2bit"]), "single_blocks.0.linear2"
    scales = model.scales["single_transformer_blocks.0.attn.to_out"]
    assert (scales == 0).any()
    codes = file.weight(name).codes().view(len(scales), -1, 128)
    assert not codes[scales == 0].any() and codes[scales != 0].any()


def test_base3(roots, model, tmp_path):
    target = tmp_path / "b.safetensors"
    assert run(["import", str(roots["mlx-2bit"]), "-o", str(target), "--packing", "base3"]) == 0
    assert {layer.packing for layer in open_ternary(target).layers.values()} == {"base3"}
    assert_holds(target, model, tmp_path)


@pytest.mark.slow
def test_what_a_path_may_be(roots, model, tmp_path):
    root = tmp_path / "models--prism-ml--bonsai"
    index = bonsai.write(tmp_path / "sharded", "unpacked", model.tensors("unpacked"), shards=3)
    shutil.copytree(roots["gemlite-2bit"], root / "snapshots" / "0123abc")
    weights = roots["mlx-2bit"] / bonsai.FOLDERS["mlx-2bit"]
    for path in (
        weights,
        weights / "diffusion_pytorch_model.safetensors",
        root,
        root / "snapshots" / "0123abc" / "transformer-gemlite-int2" / "state_dict.pt",
        tmp_path / "sharded",
        index,
        index.with_name("diffusion_pytorch_model-00002-of-00003.safetensors"),
    ):
        import_model(path, tmp_path / "out.safetensors", overwrite=True)
        assert_holds(tmp_path / "out.safetensors", model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_scales_keep_their_dtype_where_bf16_does_not_hold_them(tmp_path, packaging, dtype):
    model = bonsai.Model(seed=1, scale_dtype=dtype)
    bonsai.write(tmp_path / "m", packaging, model.tensors(packaging))
    import_model(tmp_path / "m", tmp_path / "out.safetensors")
    expected = "fp32" if packaging == "gemlite-2bit" or dtype == torch.float32 else "fp16"
    file = open_ternary(tmp_path / "out.safetensors")
    assert {layer.scales for layer in file.layers.values()} == {expected}
    for name, tensor in model.bfl().items():
        assert torch.equal(file.parameter(name), tensor.float() if name[:-7] in file.layers else tensor), name


@pytest.mark.parametrize("arch", [synthetic.FLUX1, synthetic.FLUX2], ids=["FLUX.1", "FLUX.2"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_any_checkpoint_whose_groups_are_ternary(tmp_path, arch, prefix):
    """Names of BFL with and without a prefix, biases, a last group that is not full, and other parts in the file."""
    arch = synthetic.replace(arch, hidden=256)
    state = synthetic.tensors(arch)
    for name, (n, k) in arch.linear_shapes.items():
        scale = (torch.rand(n, -(-k // 128)) * 0.1).bfloat16().repeat_interleave(128, 1)[:, :k]
        state[f"{name}.weight"] = torch.randint(-1, 2, (n, k)).bfloat16() * scale
    extra = {"vae.decoder.conv_in.weight": torch.zeros(3), "step": torch.tensor(3)}
    save_file({prefix + key: tensor for key, tensor in state.items()} | extra, tmp_path / "dense.safetensors")
    import_model(tmp_path / "dense.safetensors", tmp_path / "out.safetensors")
    export_checkpoint(tmp_path / "out.safetensors", tmp_path / "export.safetensors")
    exported = load_file(tmp_path / "export.safetensors")
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in state.items())


def test_scales_that_int8_kernels_cannot_have_are_told(tmp_path, capsys):
    """One group of 1 and others of 1.49/127 in a row: each of the others is off by 0.5/127."""
    arch = synthetic.replace(synthetic.FLUX1, hidden=256)
    state = synthetic.tensors(arch)
    for name, (n, k) in arch.linear_shapes.items():
        scale = torch.full((n, k), 0.01171875)
        scale[:, :128] = 1
        state[f"{name}.weight"] = (torch.randint(-1, 2, (n, k)) * scale).bfloat16()
    save_file(state, tmp_path / "apart.safetensors")
    assert run(["import", str(tmp_path / "apart.safetensors"), "-o", str(tmp_path / "out.safetensors")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"and 1\.1\d% in single_blocks\.\d\.linear2;", said)
    assert "in 4 Linears that is more than 1%" in said  # those with 8 or 10 groups


FIRST = "transformer_blocks.0.attn.to_k"
LAST = "single_transformer_blocks.19.attn.to_out"


def poked(state, key, index, value):
    state[key] = state[key].clone()
    state[key][index] = value


def binary(model, packaging):
    """The binary variant's layout: codes of one bit, levels -s/2 and s/2."""
    state = {f"{name}.weight": tensor for name, tensor in model.dense.items()}
    for name, (n, k) in bonsai.LINEARS.items():
        scales, signs = model.scales[name], torch.randint(0, 2, (n, k))
        if packaging == "unpacked":
            state[f"{name}.weight"] = (2 * signs - 1) * (scales + 0.01).repeat_interleave(128, 1)
        elif packaging == "mlx-2bit":
            state[f"{name}.weight"] = torch.zeros(n, k // 32, dtype=torch.uint32)
            state |= {f"{name}.scales": scales, f"{name}.biases": -scales / 2}
        else:
            state[f"{name}.W_q"] = torch.zeros(k // 8, n, dtype=torch.uint8)
            state |= {f"{name}.scales": scales.T.float(), f"{name}.zeros": -scales.T.float() / 2}
            state[f"{name}.metadata"] = torch.tensor([0, 1, 128, *[0] * 9], dtype=torch.int32)
            state[f"{name}.orig_shape"] = torch.tensor([n, k], dtype=torch.int32)
    return state


@pytest.mark.parametrize("packaging", PACKAGINGS)
@pytest.mark.parametrize("configured", [True, False])
def test_binary_models_are_refused_by_name(model, tmp_path, packaging, configured):
    said = {"bits": 1, "group_size": 128} if configured else {"note": "nothing"}
    bonsai.write(tmp_path / "m", packaging, binary(model, packaging), said)
    with pytest.raises(FormatError, match="binary .1-bit. model.*Bonsai Image's binary variant.*ternary variant"):
        import_model(tmp_path / "m", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "said, name",
    [
        ({"model_type": "prism_hadamard_qwen35", "bits": 2, "group_size": 128}, "hadamard"),
        ({"bits": 2, "group_size": 128, "rotation": {"block": 512}}, "rotation"),
    ],
)
def test_other_bases_are_refused_by_name(model, tmp_path, said, name):
    bonsai.write(tmp_path / "m", "mlx-2bit", model.tensors("mlx-2bit"), said)
    with pytest.raises(FormatError, match=f"another basis, as those of Bonsai-2 are.*'{name}'"):
        open_source(tmp_path / "m")
    bonsai.write(tmp_path / "n", "unpacked", model.tensors("unpacked") | {f"{FIRST}.hadamard_signs": torch.ones(128)})
    with pytest.raises(FormatError, match="another basis"):
        open_source(tmp_path / "n")


def poke(key, index, value):
    return lambda state: poked(state, key, index, value)


def without(*keys):
    return lambda state: [state.pop(key) for key in keys]


def negative(state):
    poked(state, f"{FIRST}.scales", 1, -0.1)
    poked(state, f"{FIRST}.biases", 1, 0.1)


def dense_linear(state):
    for part in ("scales", "biases"):
        state.pop(f"{FIRST}.{part}")
    state[f"{FIRST}.weight"] = torch.ones(128, 128)


def no_blocks(state):
    for key in list(state):
        if "transformer_blocks" in key:
            state.pop(key)


NAN, INFINITY = float("nan"), float("inf")
PACKED = [f"{FIRST}.{part}" for part in ("W_q", "scales", "zeros", "metadata", "orig_shape")]
DAMAGES = {
    "a value between": ("unpacked", poke(f"{LAST}.weight", (3, 200), 0.004), f"{LAST}.weight: .*not ternary"),
    "NaN": ("unpacked", poke(f"{FIRST}.weight", (0, 0), NAN), f"{FIRST}.weight: .*not finite"),
    "dense NaN": ("mlx-2bit", poke("norm_out.linear.weight", (5, 5), NAN), "norm_out.linear.weight: .*not finite"),
    "dense infinity": ("gemlite-2bit", poke("x_embedder.weight", (0, 0), INFINITY), "x_embedder.weight: .*not finite"),
    "scale": ("mlx-2bit", poke(f"{FIRST}.scales", (7, 0), INFINITY), f"{FIRST}.scales: .*not finite"),
    "bias": ("mlx-2bit", poke(f"{FIRST}.biases", (7, 0), -0.5), f"{FIRST}.biases: .*not -scales"),
    "zero": ("gemlite-2bit", poke(f"{LAST}.zeros", (2, 9), -0.5), f"{LAST}.zeros: .*not -scales"),
    "code 3": ("gemlite-2bit", poke(f"{LAST}.W_q", (3, 4), 0b00110000), f"{LAST}.W_q: a code 3"),
    "negative": ("mlx-2bit", negative, f"{FIRST}.scales: .*negative"),
    "missing": ("unpacked", without(f"{FIRST}.weight"), "double_blocks.0.img_attn.qkv.weight is missing"),
    "no scales": ("mlx-2bit", without(f"{FIRST}.scales"), f"{FIRST}.scales: the tensor is missing"),
    "no zeros": ("gemlite-2bit", without(f"{FIRST}.zeros"), f"{FIRST}.zeros: the tensor is missing"),
    "a Linear less": ("gemlite-2bit", without(*PACKED), "double_blocks.0.img_attn.qkv.weight is missing"),
    "a dense Linear": ("mlx-2bit", dense_linear, f"{FIRST}.weight: this Linear is not packed"),
    "shape": (
        "gemlite-2bit",
        poke(f"{FIRST}.orig_shape", 0, 129),
        rf"{FIRST}.W_q: U8 .* where U8 \[32, 129\]",
    ),
    "four bits": ("gemlite-2bit", poke(f"{FIRST}.metadata", 1, 4), f"{FIRST}.metadata: 4 bits"),
    "groups of 64": ("gemlite-2bit", poke(f"{FIRST}.metadata", 2, 64), f"{FIRST}.metadata: .*groups of 64"),
    "integers": ("unpacked", lambda state: state.update({f"{FIRST}.weight": torch.ones(128, 128).int()}), "I32"),
    "dtypes that torch lacks": (
        "unpacked",
        lambda state: state.update({f"{FIRST}.weight": torch.ones(128, 128).to(torch.uint64)}),
        "U64",
    ),
    "no FLUX": ("unpacked", no_blocks, "not a FLUX"),
}


@pytest.mark.parametrize("packaging, change, message", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_nothing_is_written(model, tmp_path, packaging, change, message):
    state = model.tensors(packaging)
    change(state)
    bonsai.write(tmp_path / "m", packaging, state)
    with pytest.raises(FormatError, match=message):
        import_model(tmp_path / "m", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_dense_checkpoints_are_told_what_to_do(tmp_path, capsys):
    source = synthetic.write(tmp_path / "dense.safetensors")
    assert run(["import", str(source), "-o", str(tmp_path / "out.safetensors")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "double_blocks.0.img_mod.lin.weight: the weight is not ternary" in said and "`convert`" in said


MEMORY = """
import resource, sys, _pack; _pack.load()
from ternary_flux.quantizer.imports.run import import_model
for source in sys.argv[2:]:
    import_model(source, sys.argv[1], overwrite=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """180 MB of bf16 are imported within less memory than they are, after the same with 30 MB."""
    sizes = []
    for name, depth in (("small", 1), ("large", 8)):
        arch = synthetic.replace(synthetic.FLUX1, hidden=1024, depth_single=depth)
        state = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in arch.shapes.items()}
        for layer in arch.linears:
            state[f"{layer}.weight"][:, ::3], state[f"{layer}.weight"][:, 1::3] = 0, -1
        save_file(state, tmp_path / f"{name}.safetensors")
        sizes.append((tmp_path / f"{name}.safetensors").stat().st_size)
    paths = [tmp_path / name for name in ("out.safetensors", "small.safetensors", "large.safetensors")]
    out = subprocess.check_output([sys.executable, "-c", MEMORY, *map(str, paths)], cwd=_pack.ROOT, text=True)
    first, second = map(int, out.split())
    assert sizes[1] - sizes[0] > 150e6 and second - first < (sizes[1] - sizes[0]) / 3


def test_other_files_are_named(tmp_path, imported, capsys):
    save_file({"lora_unet_single_blocks_0_linear1.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    for path, what in ((imported["mlx-2bit"], "this is a ternary FLUX"), (tmp_path / "lora.safetensors", "LoRA")):
        assert run(["import", str(path), "-o", str(tmp_path / "out.safetensors")]) == 2
        said = capsys.readouterr().err
        assert what in said and len(said.splitlines()) == 1


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("a pickle ran",))


def test_pickles_are_never_run(tmp_path):
    path = tmp_path / "state_dict.pt"
    torch.save({"x_embedder.weight": Evil()}, path)
    with pytest.raises(FormatError, match="more than tensors"):
        open_source(path)
    for content in (pickle.dumps({"a": 1}), b"PK\x03\x04" + bytes(100), b"", path.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="state_dict.pt: "):
            open_source(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(FormatError, match="no dictionary of tensors"):
        open_source(path)


def test_tensors_without_values_are_refused(tmp_path):
    torch.save({"x_embedder.weight": torch.ones(2, device="meta")}, tmp_path / "state_dict.pt")
    with pytest.raises(FormatError, match="no dictionary of tensors"):
        open_source(tmp_path / "state_dict.pt")


def test_paths_that_are_no_model(roots, model, tmp_path, capsys):
    def mistake(path, output="out.safetensors"):
        assert run(["import", str(path), "-o", str(tmp_path / output), "--force"]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    assert "holds no transformer" in mistake(tmp_path / "empty")
    assert "none.safetensors: No such file" in mistake(tmp_path / "none.safetensors")
    both = tmp_path / "both"
    for packaging in ("mlx-2bit", "gemlite-2bit"):
        shutil.copytree(roots[packaging], both, dirs_exist_ok=True)
    assert "several transformers" in mistake(both) and "transformer-gemlite-int2" in mistake(both)
    index = bonsai.write(tmp_path / "sharded", "unpacked", model.tensors("unpacked"), shards=3)
    next(index.parent.glob("*-00002-*")).unlink()
    assert "in 3 parts, and diffusion_pytorch_model-00002-of-00003.safetensors is missing" in mistake(index.parent)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "which is not beside it" in mistake(index)
    copied = shutil.copytree(roots["mlx-2bit"], tmp_path / "copy")
    weights = copied / "transformer-packed-mflux" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    assert "the output is an input" in mistake(copied, weights)
    assert weights.read_bytes() == before
