"""Labels read off a gradient: the last layer's gradient counts how many images of each class are behind it."""

import torch
from torch import Tensor, nn

from i2f.core import streams
from i2f.core.gradient import GradientMap

PROBES = 64  # random images, at least, over which the network's mean answer is taken
EVEN = 1e-6  # relative difference of the images' weights in local steps
TIED = 0.99  # −cosine of two rows of ∇_W L from which both may be the label's


def recover_labels(gmap: GradientMap, gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The n labels behind a shared gradient, sorted, (n,).

    Cross-entropy's derivative by the logits of image i is s·(p_i − e_{y_i}), where s is the reduction's factor (1/n for
    the mean). So the last layer's bias gradient is

        ∇_b L = s (Σ_i p_i − counts),    counts = Σ_i p_i − ∇_b L / s,

    the number of images of each class, up to the unknown probabilities p_i. These are replaced by the network's mean
    answer to random images, n at a time, and the counts by the nearest whole ones that sum to n. For one image, the
    only negative entry of ∇_b L is at its label (Zhao et al. 2020), and nothing is unknown. Without a bias, ∇_W L
    projected on the mean feature takes the place of ∇_b L; for one image, ∇_W L = (p − e_y) hᵀ has its largest row at
    the label. The result is exact for one image. For a batch it assumes that the network answers alike to all images,
    as an untrained one does (cf. Wainakh et al. 2022, Geng et al. 2021). Images that the loss ignores (`ignore_index`)
    leave no trace: n does not count them. What several local steps change (`gmap.message`) is taken for a multiple of a
    gradient, which holds while the network's answers hardly change.

    Args:
        gmap: its labels are not used. gradient: flat (d_θ,), or as `GradientMap.flat` takes it. shape: (n, ...), of the
            private batch.

    Raises:
        ValueError: the model does not end in a trainable linear layer, the loss is not a plain cross-entropy, or two
            labels explain the gradient equally well.
    """
    n = shape[0]
    gradient = gmap.flat("gradient", gradient, batch=False).detach().to(gmap.device).double()
    generator = streams.generator("label probe", 0)

    def images() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(gmap.device, gmap.dtype)

    name, features, logits = _last_layer(gmap, images())
    scale = _weight(gmap, logits)
    parts = dict(zip(gmap.parameters, gmap.split(gradient), strict=True))
    bias, weight = parts.get(f"{name}.bias"), parts.get(f"{name}.weight")
    if n == 1 and bias is not None:
        return bias.argmin().view(1)
    passes = [(features, logits), *(_last_layer(gmap, images())[1:] for _ in range(-(-PROBES // n) - 1))]
    features, logits = (torch.cat(parts).double() for parts in zip(*passes, strict=True))
    if bias is None:
        if weight is None:
            raise ValueError(f"y=None: the last layer, {name}, is frozen, so that no label can be read from it; give y")
        if n == 1:
            return _largest_row(weight, features)
        mean = features.mean(0)
        bias = weight @ mean / (mean @ mean)
    return nearest_counts(n * logits.softmax(1).mean(0), bias, scale, n)


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
        shaped = torch.is_tensor(output) and logits.ndim == 2 and logits.shape == output.shape and len(logits) == len(x)
        if shaped and torch.equal(logits, output):
            return name, features, logits
    raise ValueError("y=None: labels are read from a last linear layer, and this model does not end in one; give y")


def _weight(gmap: GradientMap, logits: Tensor) -> float:
    """What softmax − one-hot of each image is multiplied by: s, or its sum over the local steps that the image is in.

    Raises: ValueError where the steps weigh the images differently.
    """
    if gmap.message is None:
        return _reduction(gmap, logits)
    n, each = len(logits), [0.0] * len(logits)
    batches = gmap.message.batches(n)
    scales = {size: _reduction(gmap, logits[:size]) for size in {len(images) for images in batches}}
    for rate, images in zip(gmap.message.rates(n), batches, strict=True):
        for i in images:
            each[i] += rate * scales[len(images)]
    if max(each) - min(each) > EVEN * max(each):
        raise ValueError("y=None: the local steps weigh the images differently, so that no labels can be read; give y")
    return each[0]


def _reduction(gmap: GradientMap, like: Tensor) -> float:
    """s with ∂L/∂logits = s (softmax − one-hot), over `gmap.unit`, for logits of the shape (n, classes) of `like`.

    Each class is set among others in one batch, since a mean divides by the weights that are in it. For one image, a
    class weight is no obstacle: the sign of s is enough.

    Raises: ValueError where the loss is not of that form for every label: weighted or ignored classes, smoothed labels.
    """
    n, classes = like.shape
    generator = streams.generator("label probe", 1)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64).to(like)
    answers, scale, rows = logits.double().softmax(1), 0.0, torch.arange(n, device=like.device)
    for label in range(classes):
        z, y, expected = logits.clone().requires_grad_(), rows % classes, answers.clone()
        y[0] = label
        expected[rows, y] -= 1
        try:
            with torch.enable_grad():
                (found,) = torch.autograd.grad(gmap.loss(z, y), z)
        except (RuntimeError, IndexError, TypeError, ValueError):
            found = torch.full_like(z, torch.nan)
        found = found.double() / gmap.unit
        scale = float((found * expected).sum() / expected.square().sum())
        if not (scale > 0 and torch.allclose(found, scale * expected, rtol=1e-3, atol=1e-6 * scale)):
            raise ValueError("y=None: labels can be read from a plain cross-entropy's gradient only; give y")
    return scale


def _largest_row(weight: Tensor, features: Tensor) -> Tensor:
    """The label of one image from ∇_W L = (p − e_y) hᵀ alone, (1,): 1 − p_y is no smaller than any other p. Where one
    other class has all of it, the sign of h decides, if it is known (features that are never negative)."""
    label = weight.square().sum(1).argmax()
    rows = weight @ weight[label]
    rival = rows.argmin()
    if rows[rival] > -TIED * rows[label]:
        return label.view(1)
    if (features < 0).any():
        both = f"{int(label)} and {int(rival)}"
        raise ValueError(f"y=None: without a bias, labels {both} explain the gradient equally well; give y")
    return (weight @ features.mean(0)).argmin().view(1)


def nearest_counts(answers: Tensor, bias: Tensor, scale: float, n: int) -> Tensor:
    """Labels of n images, (n,), whose class counts are the nearest to  c = answers − bias/scale  among all whole,
    non-negative ones with sum n.

    These are the floors of c's Euclidean projection max(c − t, 0) on {k ≥ 0, Σk = n}, plus one for the largest
    remainders: the nearest whole counts take the n largest of {c_j − i, i = 0, 1, …}, and so do these.
    """
    c = answers - (bias - bias.min()) / scale
    falling = c.sort(descending=True).values
    thresholds = (falling.cumsum(0) - n) / torch.arange(1, len(c) + 1, device=c.device)
    t = thresholds[(falling > thresholds).nonzero()[-1, 0]]
    share = (c - t).clamp(min=0)
    counts = share.floor().long()
    missing = n - int(counts.sum())
    counts[(share - counts).topk(missing).indices] += 1
    return torch.arange(len(c), device=c.device).repeat_interleave(counts)
