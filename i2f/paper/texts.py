"""One text and its gradient: what I²F predicts, and which tokens each attacker recovers."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from i2f.attacks import Reconstruction, invert
from i2f.core import perturb, spectrum, streams
from i2f.core.jacobian import GradientJacobian
from i2f.paper import attackers, devices
from i2f.paper.rows import declare
from i2f.paper.sweep import Problem, Row
from i2f.text import corpus, language
from i2f.text.language import LanguageModel
from i2f.text.tokens import read_last_token, read_tokens, token_set

READING, SHARED, REFINED, SEARCH, TAG = "reading", "reading-shared", "gauss-newton", "gauss-newton-random", "tag"
ATTACKERS = {  # name in tables -> in the registry
    READING: READING,
    SHARED: SHARED,
    REFINED: "gauss-newton, texts",
    SEARCH: SEARCH,
    TAG: TAG,
}
READS = (READING, SHARED)
DENSE = 2**31  # bytes of J up to which I²F is exact
FLOAT32 = ("gradient_norm", "variance", "lambda_max", "bound_norm", "bound_rmse", "spread")  # of a pretrained network
SCORES = ("accuracy", "rouge1", "rouge2", "rougeL", "bleu")  # which follow the attack's words
KINDS = dict.fromkeys(FLOAT32, "head") | dict.fromkeys(SCORES, "converged") | {"found": "diagnostic"}


class Span(NamedTuple):
    """The range of J Jᵀ: the nonzero eigenvalues, falling, and an orthonormal basis, (d_x, rank)."""

    values: Tensor
    basis: Tensor

    @property
    def rank(self) -> int:
        return self.basis.shape[1]


@dataclass
class Sent:
    """One text and what is known of its gradient. span: None where J is too large to form."""

    name: str
    model: LanguageModel
    tokens: Tensor
    y: Tensor
    J: GradientJacobian
    lambda_max: float
    span: Span | None

    @property
    def tau(self) -> float:
        return float(self.model.embeddings.std())


@declare("problems", kinds=KINDS)
def solve(chunk: list[Problem]) -> list[Row]:
    """The rows of a chunk, which has one text of one network. The size of its noise: `relative`, the expected norm over
    the gradient's, or `bound`, its I_lb (L2)."""
    sent = _sent(chunk[0])
    unit = perturb.gaussian(sent.J.gradient, 1.0, seed=chunk[0]["text"])
    gain, norm = float(sent.J.matvec(unit).norm()) / sent.lambda_max, float(sent.J.gradient.norm())
    sizes = [(p["bound"] / gain) ** 2 if "bound" in p else (p["relative"] * norm) ** 2 / sent.J.shape[1] for p in chunk]
    variances = list(dict.fromkeys(sizes))
    deltas = [variance**0.5 * unit for variance in variances]
    gradients = torch.stack([sent.J.gradient + delta for delta in deltas])
    predicted = [_predicted(sent, delta, variance) for delta, variance in zip(deltas, variances, strict=True)]
    read = _read(sent, gradients)
    rows = []
    for p, size in zip(chunk, sizes, strict=True):
        at, attacker = variances.index(size), p["attacker"]
        row: Row = {"embedding_gradient": "shared" if attacker == SHARED else "withheld", "variance": variances[at]}
        row |= predicted[at]
        if attacker == READING:
            row |= _scored(sent, read[at], sent.model.embed(read[at]))
        elif attacker == SHARED:
            row |= _read_shared(sent, gradients[at], variances[at], p["text"])
        else:
            row |= _searched(sent, gradients[at], read[at], p)
        rows.append(row)
    return rows


def _sent(problem: Problem) -> Sent:
    name, device = problem["network"], devices.current()
    model = _network(device, name, problem["task"], problem["weight_seed"])
    pairs, labels = corpus.load(n=1, offset=problem["text"])
    tokens = language.encode(name, pairs)[0].to(device)
    y = tokens if model.causal else labels.to(device)
    x = model.embed(tokens)
    J = GradientJacobian(model, x, y, model.loss)
    if J.shape[0] * J.shape[1] * J.dtype.itemsize > DENSE:
        return Sent(name, model, tokens, y, J, spectrum.lambda_max(J, 1e-2).value, None)
    values, vectors = spectrum.decompose(J)
    rank = spectrum.rank(J)
    return Sent(name, model, tokens, y, J, float(values[0]), Span(values[:rank], vectors[:, :rank]))


@lru_cache(maxsize=2)
def _network(device: torch.device, name: str, task: str, seed: int) -> LanguageModel:
    """In float64 where I²F is to be exact; a pretrained network as it runs, in float32."""
    model = language.build(name, task, seed)
    return (model.double() if name.endswith("tiny") else model).to(device)


def _predicted(sent: Sent, delta: Tensor, variance: float) -> Row:
    J, moved = sent.J, sent.J.matvec(delta)
    bound = float(moved.norm()) / sent.lambda_max
    row = {
        "d_x": J.shape[0],
        "d_theta": J.shape[1],
        "gradient_norm": float(J.gradient.norm()),
        "lambda_max": sent.lambda_max,
        "bound_norm": bound,
        "bound_rmse": bound / J.shape[0] ** 0.5,
        "spread": sent.tau,
    }
    if sent.span is None:
        return row
    (values, basis), rank = sent.span, sent.span.rank
    along = basis.T @ moved.double()
    return row | {
        "rank": rank,
        "lambda_min": float(values[-1]),
        "bound_rmse": bound / rank**0.5,
        "predicted_rmse": float((along / values).norm()) / rank**0.5,
        "damped_rmse": float((along / (values + variance / sent.tau**2)).norm()) / rank**0.5,
    }


def _read(sent: Sent, gradients: Tensor, among: Tensor | None = None) -> list[Tensor]:
    """The tokens read off each gradient, (1, length) each."""
    tokens = read_tokens(sent.model, gradients, sent.tokens.shape[1], among).tokens
    if sent.model.causal:
        return [read_last_token(sent.model, g, found[None]) for g, found in zip(gradients, tokens, strict=True)]
    return list(tokens[:, None])


def _read_shared(sent: Sent, gradient: Tensor, variance: float, seed: int) -> Row:
    rows = language.embedding_gradient(sent.model, sent.tokens, sent.y)
    noise = variance**0.5 * torch.randn(rows.shape, generator=streams.generator("embedding", seed), dtype=torch.float64)
    named = token_set(rows + noise.to(rows), variance)
    truth = sent.tokens.unique()
    right = int(torch.isin(truth, named).sum())
    (found,) = _read(sent, gradient[None], named if len(named) else None)
    score = 2 * right / (len(truth) + len(named))
    return _scored(sent, found, sent.model.embed(found)) | {"named": score, "named_wrongly": len(named) - right}


def _random(sent: Sent, seed: int) -> Tensor:
    """N(0, τ²), as embeddings are: it holds nothing of the text."""
    noise = torch.randn(sent.J.x.shape, generator=streams.generator("start", seed), dtype=torch.float64)
    return sent.tau * noise.to(sent.J.x)


def _searched(sent: Sent, gradient: Tensor, read: Tensor, p: Problem) -> Row:
    """An attack in the space of embeddings. A language model's labels are its text: those that were read."""
    model, y = sent.model, read if sent.model.causal else sent.y
    seed = p["start_seed"] if "start_seed" in p else p["text"]
    start = model.embed(read) if p["attacker"] == REFINED else _random(sent, seed)
    if p["attacker"] == TAG:  # in float32, as published
        model = language.build(sent.name, "causal" if model.causal else "classification", 0).to(gradient.device)
        model.load_state_dict(sent.model.state_dict())
        gradient, start = gradient.float(), start.float()
    own, loss = attackers.ATTACKERS[ATTACKERS[p["attacker"]]].options, sent.model.loss
    found = invert(model, gradient, y, sent.J.x.shape, loss=loss, start=start, steps=p["budget"], **own)
    tokens = sent.model.nearest(found.x)
    if sent.model.causal:  # its last place is a label, and no input that the gradient knows
        tokens = torch.cat([tokens[:, :-1], read[:, -1:]], dim=1)
    return _scored(sent, tokens, found.x.to(sent.J.x), found)


def _scored(sent: Sent, tokens: Tensor, x: Tensor, found: Reconstruction | None = None) -> Row:
    off = x - sent.J.x
    if sent.span is None:
        off = off - off.mean(-1, keepdim=True)
        rmse = float(off.norm()) / (off.shape[1] * (off.shape[2] - 1)) ** 0.5
    else:
        rmse = float((sent.span.basis.T @ off.flatten().double()).norm()) / sent.span.rank**0.5
    words = language.tokenizer(sent.name)
    truth, recovered = sent.tokens[0].tolist(), tokens[0].tolist()
    with torch.no_grad():
        feature = float((sent.model(x) - sent.model(sent.J.x)).square().mean())
    row: Row = {
        "rmse": rmse,
        "accuracy": corpus.accuracy(recovered, truth, words.all_special_ids),
        "all_found": recovered == truth,
        **corpus.overlap(language.decode(sent.name, tokens[0]), language.decode(sent.name, sent.tokens[0])),
        "feature_mse": feature,
        "found": " ".join(words.convert_ids_to_tokens(recovered)),
        "truth": " ".join(words.convert_ids_to_tokens(truth)),
        "converged": True,
    }
    if found is None:
        return row
    ended = ("relative_residual", "steps", "evaluations", "converged", "matched", "failed", "reason")
    return row | {name: getattr(found, name) for name in ended}
