"""Labels read off a gradient: the last layer's gradient counts how many images of each class are behind it."""

import torch
from torch import Tensor, nn

from i2f.gradient import GradientMap

PROBES = 64  # dummy images that stand for the private ones where the network's average answer is needed


def recover_labels(gmap: GradientMap, gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The n labels behind a shared gradient, sorted, (n,).

    Cross-entropy's derivative by the logits of image i is s·(p_i − e_{y_i}), s the reduction's factor (1/n for the
    mean). So the last layer's bias gradient is

        ∇_b L = s (Σ_i p_i − counts),    counts = Σ_i p_i − ∇_b L / s,

    the number of images of each class, up to the unknown probabilities p_i. These are replaced by the network's mean
    answer to random images, and the counts rounded so that they sum to n. One image: the only negative entry of ∇_b L
    is at its label (Zhao et al. 2020), which needs no guess. Without a bias, ∇_W L projected on the mean feature
    takes the place of ∇_b L. Exact for one image; for a batch, as good as "one answer for all images" is: an untrained
    network's (cf. Wainakh et al. 2022, Geng et al. 2021).

    Args:
        gmap: its labels are not used. gradient: flat (d_θ,). shape: (n, ...), of the private batch.

    Raises:
        ValueError: the model does not end in a trainable linear layer, or the loss is not a cross-entropy.
    """
    n = shape[0]
    noise = torch.rand(PROBES, *shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    name, features, logits = _last_layer(gmap, noise.to(gradient))
    probabilities = logits.softmax(1).mean(0)
    scale = _reduction(gmap, logits[:1].expand(n, -1))
    parts = dict(zip(gmap.parameters, gmap.split(gradient), strict=True))
    bias, weight = parts.get(f"{name}.bias"), parts.get(f"{name}.weight")
    if bias is None and weight is None:
        raise ValueError(f"y=None: the last layer, {name}, is frozen, so that no label can be read from it; give y")
    if bias is None:
        mean = features.mean(0)
        bias = weight @ mean / (mean @ mean)
    if n == 1:
        return bias.argmin().view(1)
    return _round(n * probabilities - bias / scale, n)


def _last_layer(gmap: GradientMap, x: Tensor) -> tuple[str, Tensor, Tensor]:
    """The name of the linear layer whose output is the model's, its input and its output at `x`."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
        for name, module in gmap.model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.no_grad():
            output = gmap.output(gmap.parameters, x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, (features, logits) in reversed(seen.items()):
        if logits.ndim == 2 and logits.shape == output.shape and torch.equal(logits, output):
            return name, features, logits
    raise ValueError("y=None: labels are read from a last linear layer, and this model does not end in one; give y")


def _reduction(gmap: GradientMap, logits: Tensor) -> float:
    """s with ∂L/∂logits = s (softmax − one-hot); a ValueError where the loss is not of that form."""
    logits = logits.detach().clone().requires_grad_()
    y = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    expected = logits.detach().softmax(1)
    expected[torch.arange(len(y)), y] -= 1
    try:
        (found,) = torch.autograd.grad(gmap.loss(logits, y), logits)
        scale = float((found * expected).sum() / expected.square().sum())
        plain = torch.allclose(found, scale * expected, rtol=1e-3, atol=1e-6 * abs(scale))
    except (RuntimeError, IndexError, TypeError, ValueError):
        plain = False
    if not plain or scale <= 0:
        raise ValueError("y=None: labels can be read from a plain cross-entropy's gradient only; give y")
    return scale


def _round(counts: Tensor, n: int) -> Tensor:
    """Labels of n images whose class counts are nearest to `counts`: whole, not negative, n in sum."""
    whole = counts.clamp(min=0).floor().long()
    while int(whole.sum()) > n:
        whole[torch.where(whole > 0, counts - whole, torch.inf).argmin()] -= 1
    while int(whole.sum()) < n:
        whole[(counts - whole).argmax()] += 1
    return torch.arange(len(whole), device=counts.device).repeat_interleave(whole)
