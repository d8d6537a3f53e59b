"""How close a reconstruction is: one number per image, in pixels."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from i2f.core import checks

Range = tuple[float | Tensor, float | Tensor]
UNIT: Range = (0.0, 1.0)
ENDS = "the smallest and largest value that an input can have"


class Units(NamedTuple):
    """The range [low, low + span] of an input's entries, (…) float64, and its unit pixels u = (x − low)/span."""

    low: Tensor
    span: Tensor

    @property
    def plain(self) -> bool:
        """Whether inputs are unit pixels already."""
        return bool((self.low == 0).all() and (self.span == 1).all())

    def of(self, x: Tensor) -> Tensor:
        """u, float64, not clamped."""
        return (x.double() - self.low.to(x.device)) / self.span.to(x.device)

    def within(self, name: str, x: Tensor) -> Tensor:
        """u, float64, in [0, 1]; a ValueError where x leaves the range by more than rounding."""
        u = self.of(checks.finite(name, x))
        eps = max(torch.finfo(dtype).eps for dtype in (x.dtype, torch.float32))  # float64 may hold what once was less
        rounding = 4 * eps * max(float(x.abs().max()), 1.0) / float(self.span.min())
        if float(u.min()) < -rounding or float(u.max()) > 1 + rounding:
            low, high = float(self.low.min()), float((self.low + self.span).max())
            stated = f"[{low:g}, {high:g}]" if self.low.numel() == 1 else f"stated for each entry, [{low:g}, {high:g}]"
            found = f"{name} has values from {float(x.min()):g} to {float(x.max()):g}, outside the range {stated}"
            raise ValueError(f"{found}: give range=(low, high), {ENDS}, or one for each channel (--range LOW HIGH)")
        return u.clamp(0, 1)


def units(range: Range, shape: tuple[int, ...]) -> Units:
    """The range (low, high) of an input of this shape (…), without its batch axis: numbers, tensors that broadcast to
    it, or one number per channel, (C,).

    Raises: ValueError for what is no such pair, is not finite, does not broadcast, or has a low that is not below high.
    """
    try:
        ends = [torch.as_tensor(end, dtype=torch.float64, device="cpu") for end in range]
        low, high = (end.view(-1, *[1] * (len(shape) - 1)) if end.ndim == 1 else end for end in ends)
        fits = all(torch.broadcast_shapes(end.shape, shape) == torch.Size(shape) for end in (low, high))
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        forms = "each a number, one for each channel, or a tensor that broadcasts to an input"
        raise ValueError(f"range does not fit an input of shape {tuple(shape)}: give (low, high), {forms}")
    checks.finite("range", torch.cat([low.reshape(-1), high.reshape(-1)]))
    if not (low < high).all():
        raise ValueError(f"range has a low that is not below its high: give (low, high), {ENDS}")
    return Units(*torch.broadcast_tensors(low, high - low))


def mse(x: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error per pixel, (n,). Nothing is clamped: an unbounded attack shows its unbounded error."""
    _same(x, truth)
    return ((x - truth) ** 2).flatten(1).mean(1)


def rmse(x: Tensor, truth: Tensor) -> Tensor:
    """√MSE, (n,): the unit in which I²F/√d_x is compared with an attack."""
    return mse(x, truth).sqrt()


def psnr(x: Tensor, truth: Tensor, range: Range = UNIT) -> Tensor:
    """Peak signal-to-noise ratio in dB of the images clamped to their range, (n,); infinite where they are equal.

    range: (low, high), the values that an image can have, as in `units`; the peak is high − low. Raises: ValueError for
    a truth outside.
    """
    x, truth = _in_units(x, truth, range)
    return -10 * torch.log10(mse(x.clamp(0, 1), truth))


def ssim(x: Tensor, truth: Tensor, range: Range = UNIT) -> Tensor:
    """Structural similarity of the images clamped to their range, (n,): Wang et al. (2004), an 11-pixel Gaussian
    window, the mean over channels and over the windows that lie inside the image. range, errors: as for `psnr`.
    Source: scikit-image."""
    from skimage.metrics import structural_similarity

    x, truth = _in_units(x, truth, range)
    pairs = zip(x.detach().clamp(0, 1).cpu().numpy(), truth.detach().cpu().numpy(), strict=True)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [structural_similarity(a, b, channel_axis=0, data_range=1.0, **window) for a, b in pairs]
    return torch.tensor(values, dtype=x.dtype, device=x.device)


def feature_mse(model: nn.Module, x: Tensor, truth: Tensor) -> Tensor:
    """Mean squared difference of the model's logits, (n,)."""
    with torch.no_grad():
        return mse(model(x), model(truth))


def assign(x: Tensor, truth: Tensor) -> Tensor:
    """x in the order of images with the least total squared error to the truth, (n, ...).

    A gradient does not depend on the order of its images, so an attack cannot find it. Source: the Hungarian method,
    scipy.optimize.linear_sum_assignment.
    """
    from scipy.optimize import linear_sum_assignment

    _same(x, truth)
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(truth.flatten(1).double(), x.flatten(1).double(), compute_mode=exact)
    _, order = linear_sum_assignment(distances.square().cpu().numpy())
    return x[torch.as_tensor(order, device=x.device)]


def compare(x: Tensor, truth: Tensor, range: Range = UNIT) -> dict[str, float]:
    """One reconstruction (n, ...) against the truth, its images in the best order; the mean over them of each of
    mse, mse_clamped, rmse, psnr, ssim (NaN unless (n, C, H, W) of at least 11 × 11).

    range: (low, high), as for `psnr`; every error is in units of high − low. Raises: ValueError for a truth outside."""
    x, truth = _in_units(x, truth, range)
    x = assign(x, truth) if len(x) > 1 else x
    return {
        "mse": float(mse(x, truth).mean()),
        "mse_clamped": float(mse(x.clamp(0, 1), truth).mean()),
        "rmse": float(rmse(x, truth).mean()),
        "psnr": float(psnr(x, truth).mean()),
        "ssim": float(ssim(x, truth).mean()) if x.ndim == 4 and min(x.shape[2:]) >= 11 else float("nan"),
    }


def _in_units(x: Tensor, truth: Tensor, range: Range) -> tuple[Tensor, Tensor]:
    """Both in unit pixels and their own dtype, x not clamped."""
    _same(x, truth)
    scale = units(range, tuple(truth.shape[1:]))
    inside = scale.within("truth", truth).to(truth)
    return (x, inside) if scale.plain else (scale.of(x).to(x), inside)


def _same(x: Tensor, truth: Tensor) -> None:
    if x.shape != truth.shape or x.ndim < 2:
        raise ValueError(f"x is {tuple(x.shape)} and truth {tuple(truth.shape)}; both must be the same (n, ...) batch")
    checks.finite("x", x)
    checks.finite("truth", truth)
