"""Tokens read off a transformer's gradient, without any search: the exact attack on texts."""

from dataclasses import dataclass

import torch
from scipy.stats import chi2
from torch import Tensor
from torch.nn import functional as F

from i2f.core import checks
from i2f.core.brief import brief
from i2f.core.gradient import GradientMap
from i2f.text.model import LanguageModel, is_transposed

STANDS_OUT = 100.0  # ‖row‖² of ∇_E L over its median, above what a tied head gives to every row


@dataclass(frozen=True)
class Reading:
    """What is read off k gradients.

    tokens: (k, length), the best at each place. distance: (k, length), the sine of the angle between what the first
    layers receive for that token and the span of the gradient's rows; zero to rounding where it lies in the span.
    rank: (k,), of the spans.
    """

    tokens: Tensor
    distance: Tensor
    rank: Tensor

    __repr__ = brief


def read_tokens(model: LanguageModel, gradient: Tensor, length: int, among: Tensor | None = None) -> Reading:
    """The tokens behind a gradient, from its first layers alone; no label is needed.

    The gradient of a linear layer is Σ_t δ_t u_tᵀ, where u_t is its input for token t. So the rows of the first layers'
    gradients (queries, keys and values) span the u_t, which are embeddings and positions before tokens mix. At each
    place the token whose u is nearest to that span is taken. Without noise u_t lies in it, if the text is shorter than
    the network is wide and the error signals δ_t are linearly independent. Under noise, the span is that of the
    `length` largest singular vectors. Source: Petrov et al. (2024), who read the tokens of batches this way.

    Args:
        gradient: as sent, flat (d_θ,), or (k, d_θ), of k texts of one length (or of one text k times). length: of the
            text, known. among: candidate tokens; None: all.

    Raises: ValueError for a text as long as the network is wide, whose span is everything, or for frozen first layers.
    """
    gmap = GradientMap(model, None, model.loss)
    checks.flat("gradient", gradient, gmap.size, "the model's trainable parameter space")
    width = model.embeddings.shape[1]
    if not 1 <= length < width:
        raise ValueError(
            f"length={length}: tokens are read where a text has at least 1 and fewer than {width} of them, the width "
            "of the network; from there on their span is everything"
        )
    spans = [_span(model, gmap, one, length) for one in torch.atleast_2d(gradient)]
    among = torch.arange(len(model.embeddings)) if among is None else among
    found, distance = [], []
    for seen in model.entering(range(length), among.to(gradient.device)).values():
        unit = F.normalize(seen, dim=-1)
        outside = torch.stack([1 - (unit @ span.T).square().sum(-1) for span in spans])
        best = outside.min(-1)
        found.append(among.to(gradient.device)[best.indices])
        distance.append(best.values.clamp_min(0).sqrt())
    rank = torch.tensor([len(span) for span in spans])
    return Reading(torch.stack(found, -1), torch.stack(distance, -1), rank)


def _span(model: LanguageModel, gmap: GradientMap, gradient: Tensor, length: int) -> Tensor:
    """An orthonormal basis of the first layers' rows, (rank, width)."""
    parts = dict(zip(gmap.parameters, gmap.split(gradient), strict=True))
    names = model.first_layers()
    if missing := [name for name in names if name not in parts]:
        raise ValueError(f"the first layers are frozen, and no token can be read: {', '.join(missing)}")
    stacked = torch.cat([parts[name].T if is_transposed(model, name) else parts[name] for name in names])
    _, sizes, rows = torch.linalg.svd(stacked, full_matrices=False)
    rank = int((sizes > sizes[0] * max(stacked.shape) * torch.finfo(sizes.dtype).eps).sum())
    basis: Tensor = rows[: min(length, rank)]
    return basis


def read_last_token(model: LanguageModel, gradient: Tensor, tokens: Tensor) -> Tensor:
    """The last token of a text behind the gradient of a causal language model. It enters no layer that the loss
    depends on: it is only a label, and the gradient is affine in that label's embedding. With h the state that predicts
    it and p the predicted probabilities,

        ∇_θ L = ∇_θ⟨h, Eᵀp − E[last]⟩/(length − 1) + the other places' part,

    with Eᵀp − E[last] held fixed: E[last] solves a least-squares problem in `width` unknowns.

    Args: tokens: (1, length), all but the last of which are right. Returns: (1, length).
    """
    gmap = GradientMap(model, None, model.loss)
    count = tokens.shape[1] - 1
    parameters = gmap.leaves()
    logits, state = _last_state(gmap, parameters, model.embed(tokens), count)
    with torch.enable_grad():
        known = F.cross_entropy(logits[: count - 1], tokens[0, 1:count], reduction="sum") / count if count > 1 else 0.0
        free = logits[count - 1].logsumexp(-1) / count  # the last place's part that does not depend on its label
        base = _flat_gradient(known + free, parameters)
        columns = [_flat_gradient(entry, parameters) for entry in state]
    A = torch.stack(columns, dim=1) / count
    wanted = torch.linalg.lstsq(A, (base - gradient)[:, None]).solution[:, 0]
    last = (model.net.get_output_embeddings().weight - wanted).square().sum(-1).argmin()
    return torch.cat([tokens[:, :-1], last.view(1, 1)], dim=1)


def _last_state(gmap: GradientMap, parameters: dict[str, Tensor], x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The logits at every place, (length, vocabulary), and what the head receives at place `count` − 1, (width,)."""
    states: list[Tensor] = []
    model = gmap.model
    assert isinstance(model, LanguageModel)
    handle = model.net.get_output_embeddings().register_forward_pre_hook(lambda _, seen: states.append(seen[0]))
    try:
        with torch.enable_grad():
            logits = gmap.output(parameters, x)
            return logits[0], states[0][0, count - 1]
    finally:
        handle.remove()


def _flat_gradient(value: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    leaves = list(parameters.values())
    parts = torch.autograd.grad(value, leaves, retain_graph=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def token_set(embedding_gradient: Tensor, variance: float = 0.0, level: float = 1e-3) -> Tensor:
    """The tokens that a text holds, in no order, read off ∇_E L, (vocabulary, width): rows that are more than noise.

    Under noise of variance σ², a row that is zero has ‖row‖² ~ σ²χ²(width). A row is taken where chance gives any row
    such a norm in a share `level` of texts. A tied head gives every row a part, so that a row must also exceed
    `STANDS_OUT` times the median.
    """
    energy = embedding_gradient.double().square().sum(-1)
    vocabulary, width = embedding_gradient.shape
    noise = checks.at_least("variance", variance, 0.0)
    by_chance = noise * (float(chi2.isf(level / vocabulary, width)) - width)
    by_the_head = STANDS_OUT * max(0.0, float(energy.median()) - noise * width)
    return (energy - noise * width > max(by_chance, by_the_head)).nonzero()[:, 0]
