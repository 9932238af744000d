"""Which kernels run where: the ladder of backends and its reasons, the tile table, and the user's tuned entries."""

import json
from types import SimpleNamespace

import pytest
import torch
from ternary_flux.ops import resolve
from ternary_flux.ops.backends import eager
from ternary_flux.ops.backends.triton import backend as backend
from ternary_flux.ops.backends.triton import configs

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that a GPU of a given compute capability is there; its probe kernel answers `probe`."""

    def pretend(major, minor, probe=None):
        def run(device):
            if isinstance(probe, Exception):
                raise probe
            return probe

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        monkeypatch.setattr(backend, "_probe", run)

    backend.unavailable.cache_clear()
    yield pretend
    backend.unavailable.cache_clear()


def test_ampere_and_newer_use_triton(gpu, monkeypatch):
    gpu(8, 6)
    monkeypatch.setattr(configs, "chip", lambda device: configs.nvidia("", 86, 84))
    choice = resolve(CUDA)
    assert choice.backend is backend and choice.activations == "int8"
    assert resolve(CUDA, "full").activations == "full"
    choice = resolve(CUDA, "e4m3")
    assert choice.activations == "int8" and "no e4m3 kernel" in choice.reason


def test_turing_dequantizes_in_triton(gpu, monkeypatch):
    gpu(7, 5)
    monkeypatch.setattr(configs, "chip", lambda device: configs.nvidia("Tesla T4", 75, 40))
    choice = resolve(CUDA)
    assert choice.backend is backend and choice.activations == "full"
    choice = resolve(CUDA, "int8")
    assert choice.activations == "full" and "no int8 kernel" in choice.reason


@pytest.mark.parametrize("capability, fastest", [(80, "int8"), (90, "int8"), (100, "e4m3"), (120, "int8")])
def test_fastest_format(gpu, monkeypatch, capability, fastest):
    gpu(capability // 10, 0)
    monkeypatch.setattr(configs, "chip", lambda device: configs.nvidia("", capability, 100))
    assert resolve(CUDA).activations == fastest


@pytest.mark.parametrize(
    "setting, reason",
    [
        (dict(major=7, minor=0), "Tesla T4 has compute capability 7.0, kernels need 7.5"),
        (dict(major=8, minor=9, probe=RuntimeError("Failed to find C compiler")), "Failed to find C compiler"),
        (dict(major=9, minor=0, probe="a test kernel gave a wrong result"), "wrong result"),
    ],
)
def test_other_gpus_fall_back_with_the_reason(gpu, setting, reason):
    gpu(**setting)
    choice = resolve(CUDA)
    assert choice.backend is eager and choice.activations == "full"
    assert reason in choice.reason


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_devices_without_triton(device):
    assert backend.unavailable(torch.device(device)) == f"kernels run on GPUs with Triton, not on {device}"


def test_triton_not_installed(monkeypatch):
    backend.unavailable.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert "Triton cannot be imported" in backend.unavailable(CUDA)
    backend.unavailable.cache_clear()


@pytest.mark.parametrize(
    "capability, family", [(80, "sm_80"), (86, "sm_86"), (89, "sm_86"), (90, "sm_90"), (100, "sm_100"), (120, "sm_86")]
)
def test_every_chip_has_a_tile_for_any_number_of_tokens(capability, family):
    chip = configs.nvidia("", capability, 100)
    assert chip.family == family and chip.ptx
    for kernel in configs.KERNELS:
        if kernel.startswith("e4m3") and "e4m3" not in chip.formats:
            continue
        limits = [limit for limit, _ in configs.table(chip)[kernel]]
        assert limits == sorted(limits)
        for m in (1, 16, 17, 64, 512, 1024):
            assert configs.tile(chip, kernel, m)
        assert (configs.tile(chip, kernel, 1_000_000) is None) == (kernel == "a16")
    assert configs.tile(chip, "int8_row", 1).block_m == 16


def test_split_covers_all_inputs():
    chip = configs.nvidia("", 90, 132)
    for m, n, blocks in [(1, 18432, 24), (1, 3072, 120), (16, 3072, 24), (512, 3072, 120), (4608, 21504, 24)]:
        tile = configs.tile(chip, "int8_group", m)
        splits, each = tile.split(m, n, blocks, chip)
        assert 1 <= splits <= tile.max_splits
        assert (splits - 1) * each < blocks <= splits * each
        assert splits == 1 or each >= tile.MIN_BLOCKS
    assert configs.tile(chip, "int8_group", 1).split(1, 3072, 120, chip)[0] >= 8
    assert configs.tile(chip, "int8_group", 4608).split(4608, 21504, 24, chip)[0] == 1


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "tiles.json"
    monkeypatch.setenv("TERNARY_FLUX_TILES", str(path))
    configs.table.cache_clear()
    yield path
    configs.table.cache_clear()


def test_tuned_tiles_take_precedence(user_file):
    chip = configs.nvidia("My GPU", 90, 132)
    entries = ((16, configs.Tile(16, 32, 2, 4, 8)), (float("inf"), configs.Tile(128, 256, 8, 3)))
    assert configs.write_user_table("Other GPU", {"int8_row": entries}) == user_file
    configs.write_user_table("My GPU", {"int8_group": entries})
    assert configs.tile(chip, "int8_group", 3) == entries[0][1]
    assert configs.tile(chip, "int8_group", 4608) == entries[1][1]
    assert configs.tile(chip, "int8_row", 4608) == configs.TABLE["sm_90"]["int8_row"][-1][1]
    assert set(json.loads(user_file.read_text())) == {"My GPU", "Other GPU"}


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("{", "tiles.json"),
        ('{"My GPU": {"int9": []}}', "unknown kernel 'int9'"),
        ('{"My GPU": {"int8_row": [[null, [128, 128, 8]]]}}', "is not .block_m"),
        ('{"My GPU": {"int8_row": [[16, [16, 64, 4, 4, 1, 0]]]}}', "last entry must have no limit"),
        ("[1]", "tiles.json"),
    ],
)
def test_a_broken_user_file_is_named(user_file, content, complaint):
    user_file.parent.mkdir()
    user_file.write_text(content)
    with pytest.raises(ValueError, match=complaint) as error:
        configs.table(configs.nvidia("My GPU", 90, 132))
    assert "delete the file" in str(error.value)


def test_chip_of_a_device(monkeypatch):
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    configs.chip.cache_clear()
    assert configs.chip(CUDA) == configs.nvidia("NVIDIA H200", 90, 132)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(
        torch, "get_device_module", lambda device: SimpleNamespace(get_device_properties=lambda d: properties)
    )
    configs.chip.cache_clear()
    amd = configs.chip(CUDA)
    assert amd.family == "portable" and not amd.ptx and amd.multiprocessors == 132
    configs.chip.cache_clear()
