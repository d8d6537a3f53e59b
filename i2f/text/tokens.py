"""Tokens read off a transformer's gradient, without any search: the exact attack on texts."""

from dataclasses import dataclass

import torch
from scipy.stats import chi2
from torch import Tensor
from torch.nn import functional as F

from i2f.core import checks
from i2f.core.gradient import GradientMap
from i2f.text.language import LanguageModel, turned

STANDS_OUT = 100.0  # times the median row of ∇_E L, squared: above what a tied head gives to every row


@dataclass(frozen=True)
class Reading:
    """Of k gradients. tokens: (k, length), the best at each place. distance: (k, length), of what they look like to the
    first layers from the span, in [0, 1]; zero to rounding where they are certain. rank: (k,), of the spans."""

    tokens: Tensor
    distance: Tensor
    rank: Tensor


def read_tokens(model: LanguageModel, gradient: Tensor, length: int, among: Tensor | None = None) -> Reading:
    """The tokens behind a gradient, from its first layers alone; no label is needed.

    The gradient of a linear layer is Σ_t δ_t u_tᵀ, with u_t what enters of token t. So the rows of the first layers'
    gradients (queries, keys and values) span what the tokens look like there: embedding and position, before they mix.
    At each place the token is taken that lies nearest to that span: exactly in it, without noise, as long as the
    text is shorter than the network is wide, and as each token has an error signal δ_t of its own (Petrov et al. 2024,
    who read the tokens of batches so). In noise, the span is that of the `length` largest singular vectors.

    Args:
        gradient: what was sent, flat (d_θ,), or (k, d_θ), of k texts of one length (or of one text k times). length: of
            the text, known. among: the tokens that come into question; None: all.

    Raises: ValueError for a text as long as the network is wide, whose span is everything, or for frozen first layers.
    """
    gmap = GradientMap(model, None, model.loss)
    checks.flat("gradient", gradient, gmap.size, "the model's trainable parameter space")
    width = model.embeddings.shape[1]
    if not 1 <= length < width:
        raise ValueError(f"length={length}: tokens are read where a text has at least 1 and fewer than {width} of "
                         "them, the width of the network; from there on their span is everything")  # fmt: skip
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
    stacked = torch.cat([parts[name].T if turned(model, name) else parts[name] for name in names])
    _, sizes, rows = torch.linalg.svd(stacked, full_matrices=False)
    rank = int((sizes > sizes[0] * max(stacked.shape) * torch.finfo(sizes.dtype).eps).sum())
    return rows[: min(length, rank)]


def read_last_token(model: LanguageModel, gradient: Tensor, tokens: Tensor) -> Tensor:
    """A causal language model's text with its last token, which no layer that the loss sees takes in: it is a label
    alone. The gradient is affine in that label's embedding. With h the state that predicts it, p the answer,

        ∇_θ L = ∇_θ⟨h, Eᵀp − E[last]⟩/(length − 1) + the other places' part,

    the last but one factor held fixed: so E[last] solves a least-squares problem in `width` unknowns.

    Args: tokens: (1, length), of which all but the last are right. Returns: (1, length).
    """
    gmap = GradientMap(model, None, model.loss)
    count = tokens.shape[1] - 1
    x = model.embed(tokens)
    head, states = model.net.get_output_embeddings(), []
    parameters = gmap.leaves()
    handle = gmap.model.net.get_output_embeddings().register_forward_pre_hook(lambda _, seen: states.append(seen[0]))
    try:
        with torch.enable_grad():
            logits = gmap.output(parameters, x)
    finally:
        handle.remove()
    with torch.enable_grad():
        known = (
            F.cross_entropy(logits[0, : count - 1], tokens[0, 1:count], reduction="sum") / count if count > 1 else 0.0
        )
        free = logits[0, count - 1].logsumexp(-1) / count  # of the last place, what does not depend on its label
        state = states[0][0, count - 1]
        base = torch.autograd.grad(known + free, list(parameters.values()), retain_graph=True, materialize_grads=True)
        columns = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(
                state[k], list(parameters.values()), retain_graph=True, materialize_grads=True)])
            for k in range(len(state))
        ]  # fmt: skip
    left = torch.cat([g.reshape(-1) for g in base]) - gradient
    A = torch.stack(columns, dim=1) / count
    wanted = torch.linalg.lstsq(A, left[:, None]).solution[:, 0]
    last = (head.weight - wanted).square().sum(-1).argmin()
    return torch.cat([tokens[:, :-1], last.view(1, 1)], dim=1)


def token_set(embedding_gradient: Tensor, variance: float = 0.0, level: float = 1e-3) -> Tensor:
    """The tokens that a text holds, in no order, read off ∇_E L, (vocabulary, width): rows that are more than noise.

    Under noise of the `variance`, a row of nothing has ‖row‖² ~ σ²χ²(width); a row is taken where that would happen
    once in 1/`level` texts. A tied head gives every row a little, so that a row must stand out from the median too.
    """
    energy = embedding_gradient.double().square().sum(-1)
    vocabulary, width = embedding_gradient.shape
    noise = checks.at_least("variance", variance, 0.0)
    by_chance = noise * (float(chi2.isf(level / vocabulary, width)) - width)
    by_the_head = STANDS_OUT * max(0.0, float(energy.median()) - noise * width)
    return (energy - noise * width > max(by_chance, by_the_head)).nonzero()[:, 0]
