"""How close a reconstruction came: one number an image, in pixels."""

import torch
from torch import Tensor, nn

from i2f import checks


def mse(x: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error per pixel, (n,). Nothing is clamped: an unbounded attack shows its unbounded error."""
    _same(x, truth)
    return ((x - truth) ** 2).flatten(1).mean(1)


def rmse(x: Tensor, truth: Tensor) -> Tensor:
    """√MSE, (n,): the unit in which I²F/√d_x is compared with an attack."""
    return mse(x, truth).sqrt()


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of the images clamped to [0, 1], (n,); infinite where they are equal."""
    return -10 * torch.log10(mse(x.clamp(0, 1), truth.clamp(0, 1)))


def ssim(x: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of the images clamped to [0, 1], (n,): Wang et al. (2004), an 11-pixel Gaussian window, the
    mean over channels and over the windows that lie inside the image. Source: scikit-image."""
    from skimage.metrics import structural_similarity

    _same(x, truth)
    pairs = zip(x.detach().clamp(0, 1).cpu().numpy(), truth.detach().clamp(0, 1).cpu().numpy(), strict=True)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [structural_similarity(a, b, channel_axis=0, data_range=1.0, **window) for a, b in pairs]
    return torch.tensor(values, dtype=x.dtype, device=x.device)


def feature_mse(model: nn.Module, x: Tensor, truth: Tensor) -> Tensor:
    """Mean squared difference of the model's logits, (n,)."""
    with torch.no_grad():
        return mse(model(x), model(truth))


def assign(x: Tensor, truth: Tensor) -> Tensor:
    """x in the order that suits the truth best: the permutation of images with the least total squared error, (n, ...).

    A gradient does not say in which order its images came, so neither can an attack. Source: the Hungarian method,
    scipy.optimize.linear_sum_assignment.
    """
    from scipy.optimize import linear_sum_assignment

    _same(x, truth)
    distances = torch.cdist(
        truth.flatten(1).double(), x.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    _, order = linear_sum_assignment(distances.square().cpu().numpy())
    return x[torch.as_tensor(order, device=x.device)]


def compare(x: Tensor, truth: Tensor) -> dict[str, float]:
    """One reconstruction (n, ...) beside the truth, its images in the best order, a mean over them for each of
    mse, mse_clamped, rmse, psnr, ssim (NaN unless (n, C, H, W) of at least 11 × 11)."""
    x = assign(x, truth) if len(x) > 1 else x
    return {
        "mse": float(mse(x, truth).mean()),
        "mse_clamped": float(mse(x.clamp(0, 1), truth).mean()),
        "rmse": float(rmse(x, truth).mean()),
        "psnr": float(psnr(x, truth).mean()),
        "ssim": float(ssim(x, truth).mean()) if x.ndim == 4 and min(x.shape[2:]) >= 11 else float("nan"),
    }


def _same(x: Tensor, truth: Tensor) -> None:
    if x.shape != truth.shape or x.ndim < 2:
        raise ValueError(f"x is {tuple(x.shape)} and truth {tuple(truth.shape)}; both must be the same (n, ...) batch")
    checks.finite("x", x)
    checks.finite("truth", truth)
