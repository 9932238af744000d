"""PSNR, SSIM, MS-SSIM and fine detail against other programs, and against what is known of them."""

import math

import pytest
import torch
from ternary_flux.quantizer.pictures.detail import detail, predicted
from ternary_flux.quantizer.pictures.similarity import LEAST_SIDE, ms_ssim, psnr, ssim


@pytest.fixture(scope="module")
def pictures():
    """Two pictures [3, 192, 208] that are alike, by formula."""
    y, x = torch.meshgrid(torch.arange(192.0), torch.arange(208.0), indexing="ij")
    one = torch.stack([0.5 + 0.5 * torch.sin(x * f + y * y * 0.002 * f) for f in (0.05, 0.11, 0.23)])
    return one, (0.9 * one + 0.05 + 0.1 * torch.cos(x * 0.9 + y * 0.7)).clamp(0, 1)


def test_values_of_other_programs(pictures):
    from kornia.metrics import ssim as theirs

    one, other = pictures
    assert ssim(one, other) == pytest.approx(
        float(theirs(one[None], other[None], 11, padding="valid").mean()), abs=1e-5
    )
    # torchmetrics 1.9.0: multiscale_structural_similarity_index_measure and peak_signal_noise_ratio, data_range=1
    assert ms_ssim(one, other) == pytest.approx(0.8998, abs=1e-4)
    assert psnr(one, other) == pytest.approx(22.1108, abs=1e-4)


def test_equal_and_opposite_pictures(pictures):
    one, _ = pictures
    assert ssim(one, one) == pytest.approx(1, abs=1e-6) and ms_ssim(one, one) == pytest.approx(1, abs=1e-6)
    assert psnr(one, one) == pytest.approx(20 * math.log10(255) + 10 * math.log10(12), abs=1e-3)
    assert ssim(one, 1 - one) < 0 and ms_ssim(one, 1 - one) == 0


def test_ms_ssim_needs_five_scales(pictures):
    one, _ = pictures
    smallest = one[:, :LEAST_SIDE, :LEAST_SIDE]
    assert ms_ssim(smallest, smallest) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match=f"needs pictures of {LEAST_SIDE} pixels, not 208 x 175"):
        ms_ssim(one[:, :175], one[:, :175])


def test_detail_is_energy_above_the_cutoff():
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(96.0), indexing="ij")
    fine = torch.cos(math.pi * (x + 0.5) * 60 / 96)  # 0.31 cycles per pixel
    coarse = 5 * torch.cos(math.pi * (y + 0.5) * 30 / 64)  # 0.23
    found = detail((fine + coarse + 7)[None, None].expand(2, 3, -1, -1))
    assert found.tolist() == pytest.approx([3 * float(fine.square().sum())] * 2, rel=1e-4)


def test_detail_of_noise_is_the_share_of_its_frequencies():
    """White noise has the same energy everywhere: all of it but a quarter of a circle."""
    noise = torch.randn(1, 8, 128, 128, generator=torch.Generator().manual_seed(0))
    assert float(detail(noise) / noise.square().sum()) == pytest.approx(1 - math.pi / 16, abs=0.01)
    assert float(detail(torch.nn.functional.avg_pool2d(noise, 3, 1, 1)) / detail(noise)) < 0.1


def test_predictions_are_pictures():
    """Control channels are left out; FLUX.2's 128 channels are patches of 2 x 2 pixels of 32 channels."""
    picture, noise = torch.randn(2, 2, 16, 4, 4).unbind()
    t = torch.tensor([0.25, 1.0])
    latent = torch.lerp(picture, noise, t.view(-1, 1, 1, 1))
    found = predicted(torch.cat((latent, noise), dim=1), noise - picture, t)
    torch.testing.assert_close(found, picture)
    patched = torch.randn(1, 128, 2, 3)
    unpacked = predicted(patched, torch.zeros_like(patched), torch.zeros(1))
    assert unpacked.shape == (1, 32, 4, 6)
    assert torch.equal(unpacked[0, 5, 2:4, 4:6].flatten(), patched[0, 20:24, 1, 2])
