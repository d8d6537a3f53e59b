"""Errors by hand, and who clamps."""

import math

import pytest
import torch
from torch import nn

import i2f
from i2f import metrics


def gray(*values):
    """One 12×12 image for each value."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None].expand(-1, 1, 12, 12)


def test_mse_by_hand():
    x = torch.tensor([[[[1.0, 0.0]]], [[[0.5, 0.5]]]])
    truth = torch.tensor([[[[0.0, 0.0]]], [[[0.5, 0.1]]]])
    torch.testing.assert_close(metrics.mse(x, truth), torch.tensor([0.5, 0.08]))
    torch.testing.assert_close(metrics.rmse(x, truth), torch.tensor([0.5, 0.08]).sqrt())


@pytest.mark.parametrize(("error", "decibels"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0), (0.0, math.inf)])
def test_psnr_by_hand(error, decibels):
    assert float(metrics.psnr(gray(error), gray(0.0))) == pytest.approx(decibels, abs=1e-9)


def test_mse_is_not_clamped():
    assert float(metrics.mse(gray(3.0), gray(1.0))) == 4.0
    assert float(metrics.rmse(gray(-2.0), gray(0.0))) == 2.0


def test_psnr_and_ssim_are_clamped():
    noise = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, truth = 0.5 + noise, torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert (x.clamp(0, 1) != x).any()
    for metric in (metrics.psnr, metrics.ssim):
        assert torch.equal(metric(x, truth), metric(x.clamp(0, 1), truth))
    torch.testing.assert_close(metrics.psnr(x, truth), -10 * metrics.mse(x.clamp(0, 1), truth).log10())


def test_ssim_is_the_formula_over_the_windows_inside(digits):
    """Wang et al. (2004), Eq. 13, with c₁ = 0.01², c₂ = 0.03², written out."""
    x, truth = digits[0][:3], digits[0][2:5]
    bell = torch.exp(-((torch.arange(11, dtype=x.dtype) - 5) ** 2) / (2 * 1.5**2))
    window = (torch.outer(bell, bell) / bell.sum() ** 2)[None, None]

    def mean(image):
        return nn.functional.conv2d(image, window)

    a, b = mean(x), mean(truth)
    luminance = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    spread = mean(x**2) - a**2 + mean(truth**2) - b**2
    structure = (2 * (mean(x * truth) - a * b) + 9e-4) / (spread + 9e-4)
    torch.testing.assert_close(metrics.ssim(x, truth), (luminance * structure).mean((1, 2, 3)))


@pytest.mark.parametrize("n", [1, 3])
def test_ssim_of_the_truth_is_one(digits, n):
    torch.testing.assert_close(metrics.ssim(digits[0][:n], digits[0][:n]), torch.ones(n, dtype=torch.float64))


def test_feature_mse_is_on_logits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))
    x, truth = torch.tensor([[[[1.0, 1.0]]]]), torch.zeros(1, 1, 1, 2)
    found = metrics.feature_mse(model, x, truth)
    assert float(found) == (2.0**2 + 4.0**2) / 2
    assert not found.requires_grad


def test_compare():
    found = metrics.compare(gray(1.5), gray(0.5))
    assert list(found) == ["mse", "mse_clamped", "rmse", "psnr", "ssim"]
    assert [found[key] for key in ("mse", "mse_clamped", "rmse")] == [1.0, 0.25, 1.0]
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.25))
    assert found["ssim"] == float(metrics.ssim(gray(1.5), gray(0.5)))


def test_rmse_is_the_unit_of_influence(mlp):
    """An image displaced by what I²F predicts has the RMSE that I²F reports."""
    J = i2f.GradientJacobian(*mlp)
    prediction = i2f.influence(J, i2f.perturb.gaussian(J.gradient, 1e-4, seed=0))
    assert float(metrics.rmse(J.x + prediction.displacement.view_as(J.x), J.x)) == pytest.approx(prediction.rmse)
