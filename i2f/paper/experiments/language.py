"""Texts behind a gradient: what I²F says of the noise, and how many words come back.

The noise is in proportion to the gradient, of expected norm `relative`·‖g‖, so that networks can be compared.
Influence and error of embeddings are meant modulo the null space of J Jᵀ, which LayerNorm and, in a language model, the
last token make: an RMSE is over the coordinates that are left.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from i2f.attacks import Reconstruction, invert
from i2f.core import checks, perturb, spectrum, streams
from i2f.core.jacobian import GradientJacobian
from i2f.paper import claims, devices, sweep
from i2f.paper.experiments import problems as shared
from i2f.paper.sweep import Problem, Row
from i2f.text import corpus as text
from i2f.text import language
from i2f.text.language import LanguageModel
from i2f.text.tokens import read_last_token, read_tokens, token_set

READING, SHARED, REFINED, SEARCH, TAG = "reading", "reading-shared", "gauss-newton", "gauss-newton-random", "tag"
ATTACKERS = {  # name -> what it does, and what it knows besides model, length and noise level
    READING: "tokens read off the first layers' gradients; needs no label",
    SHARED: "the same, among the tokens that the embedding's gradient names",
    REFINED: "Gauss–Newton from the tokens read; knows the label, which for the next token is the text read",
    SEARCH: "Gauss–Newton from a random start; knows the label",
    TAG: "Adam on ‖·‖² + 0.01·‖·‖₁ from a random start; knows the label",
}
READS = (READING, SHARED)
L1, LR = 0.01, 0.03  # of TAG: its own weight, and a rate a third of DGL's, as embeddings are a tenth of a pixel's size
DENSE = 2**31  # bytes of J up to which I²F is exact
NETWORK = ["network", "task"]
METRICS = ("accuracy", "rouge1", "rouge2", "rougeL", "bleu")


def problems(
    networks: dict[str, int], levels: dict[str, list[float]], few: dict[str, int], weight_seed: int
) -> list[Problem]:
    """Every network, text and level of noise under every attacker of `levels`.

    networks: "bert-tiny", or "gpt2-tiny causal" -> texts. levels: attacker -> its levels. few: attacker -> of how many
    texts, where not of all. Networks that are too large for Gauss–Newton are read alone. So are causal ones but for
    what is refined: who searches without their text has no labels. Their tied head gives every token a row of the
    embedding's gradient, which is another question than `SHARED` asks.
    """
    for attacker in levels:
        checks.one_of("attacker", attacker, ATTACKERS)
    found = []
    for name, texts in networks.items():
        network, task, *_ = [*name.split(), "classification"]
        able = ATTACKERS if task == "classification" else (READING, REFINED)
        able = [a for a in able if a in levels and (a in READS or network.endswith("tiny"))]
        for attacker in able:
            count = min(texts, few.get(attacker, texts))
            found += sweep.grid(network=network, task=task, weight_seed=weight_seed, text=range(count),
                                attacker=attacker, relative=levels[attacker])  # fmt: skip
    return found


def run(tasks: list[Problem], steps: dict[str, int], jobs: int | None = None) -> pd.DataFrame:
    """A row an attack. `steps`: of each attacker that searches.

    Of the problem: embedding_gradient, withheld or shared; d_x, d_theta, rank (of J Jᵀ; none where J is too large to
    form), gradient_norm, variance (σ²), lambda_max, bound_norm (I_lb, L2), bound_rmse; predicted_rmse (Eq. 4, modulo
    the null space) and damped_rmse (at ε = σ²/τ², τ² the variance of an embedding's entries), where J is formed.
    spread: τ.

    Of the attack: rmse, of the embeddings, modulo the null space; accuracy, rouge1, rouge2, rougeL, bleu of the text;
    feature_mse (logits), all_found: every token is right; named: F-measure of the tokens that the embedding's
    gradient names, and named_wrongly, how many are not the text's (attacker "reading-shared"). found, truth: the words.
    """
    solve = partial(_solve, steps)
    return sweep.run(solve, tasks, together=(*NETWORK, "text"), at_most=64, jobs=jobs, description="texts")


@dataclass
class Sent:
    """One text and what is known of its gradient. span: an orthonormal basis of the range of J Jᵀ, or None."""

    name: str
    model: LanguageModel
    tokens: Tensor
    y: Tensor
    J: GradientJacobian
    lambda_max: float
    values: Tensor | None
    span: Tensor | None

    @property
    def spread(self) -> float:
        return float(self.model.embeddings.std())


def _solve(steps: dict[str, int], chunk: list[Problem]) -> list[Row]:
    """A chunk has one text of one network."""
    sent = _sent(chunk[0])
    sizes = list(dict.fromkeys(p["relative"] for p in chunk))
    variances = [(size * float(sent.J.gradient.norm())) ** 2 / sent.J.shape[1] for size in sizes]
    unit = perturb.gaussian(sent.J.gradient, 1.0, seed=chunk[0]["text"])
    deltas = [variance**0.5 * unit for variance in variances]
    gradients = torch.stack([sent.J.gradient + delta for delta in deltas])
    said = [_predicted(sent, delta, variance) for delta, variance in zip(deltas, variances, strict=True)]
    read = _read(sent, gradients)
    rows = []
    for p in chunk:
        at = sizes.index(p["relative"])
        attacker = p["attacker"]
        row = {"embedding_gradient": "shared" if attacker == SHARED else "withheld", "variance": variances[at]}
        row |= said[at]
        if attacker == READING:
            row |= _scored(sent, read[at], sent.model.embed(read[at]))
        elif attacker == SHARED:
            row |= _read_shared(sent, gradients[at], variances[at], p["text"])
        else:
            start = sent.model.embed(read[at]) if attacker == REFINED else _random(sent, p.get("start_seed", p["text"]))
            row |= _searched(sent, gradients[at], read[at], start, attacker, steps[attacker])
        rows.append(row)
    return rows


def _sent(problem: Problem) -> Sent:
    name, device = problem["network"], devices.current()
    model = _network(device, name, problem["task"], problem["weight_seed"])
    pairs, labels = text.load(n=1, offset=problem["text"])
    tokens = language.encode(name, pairs)[0].to(device)
    y = tokens if model.causal else labels.to(device)
    x = model.embed(tokens)
    J = GradientJacobian(model, x, y, model.loss)
    if J.shape[0] * J.shape[1] * J.dtype.itemsize > DENSE:
        return Sent(name, model, tokens, y, J, spectrum.lambda_max(J, 1e-2).value, None, None)
    values, vectors = spectrum.decompose(J)
    rank = spectrum.rank(J)
    return Sent(name, model, tokens, y, J, float(values[0]), values[:rank], vectors[:, :rank])


@lru_cache(maxsize=2)
def _network(device: torch.device, name: str, task: str, seed: int) -> LanguageModel:
    """In float64 where I²F is to be exact; a pretrained network as it runs, in float32."""
    model = language.build(name, task, seed)
    return (model.double() if name.endswith("tiny") else model).to(device)


def _predicted(sent: Sent, delta: Tensor, variance: float) -> Row:
    J, moved = sent.J, sent.J.matvec(delta)
    bound = float(moved.norm()) / sent.lambda_max
    row = {"d_x": J.shape[0], "d_theta": J.shape[1], "gradient_norm": float(J.gradient.norm()),
           "lambda_max": sent.lambda_max, "bound_norm": bound, "bound_rmse": bound / J.shape[0] ** 0.5,
           "spread": sent.spread}  # fmt: skip
    if sent.span is None:
        return row
    along, rank = sent.span.T @ moved.double(), sent.span.shape[1]
    damped = along / (sent.values + variance / sent.spread**2)
    return row | {
        "rank": rank, "lambda_min": float(sent.values[-1]), "bound_rmse": bound / rank**0.5,
        "predicted_rmse": float((along / sent.values).norm()) / rank**0.5,
        "damped_rmse": float(damped.norm()) / rank**0.5,
    }  # fmt: skip


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
    return _scored(sent, found, sent.model.embed(found)) | {
        "named": 2 * right / (len(truth) + len(named)), "named_wrongly": len(named) - right,
    }  # fmt: skip


def _random(sent: Sent, seed: int) -> Tensor:
    """N(0, τ²), as embeddings are: nothing of the text is in it."""
    noise = torch.randn(sent.J.x.shape, generator=streams.generator("start", seed), dtype=torch.float64)
    return sent.spread * noise.to(sent.J.x)


def _searched(sent: Sent, gradient: Tensor, read: Tensor, start: Tensor, attacker: str, steps: int) -> Row:
    """An attack in the space of embeddings. A language model's labels are its text: those that were read."""
    model, y = sent.model, read if sent.model.causal else sent.y
    if attacker == TAG:
        own: dict[str, Any] = {"method": "dgl", "l1": L1, "lr": LR}
        model = language.build(sent.name, "causal" if model.causal else "classification", 0).to(gradient.device)
        model.load_state_dict(sent.model.state_dict())
        gradient, start = gradient.float(), start.float()
    else:
        own = {"method": "gauss-newton"}
    found = invert(model, gradient, y, sent.J.x.shape, loss=sent.model.loss, start=start, steps=steps, **own)
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
        rmse = float((sent.span.T @ off.flatten().double()).norm()) / sent.span.shape[1] ** 0.5
    words = language.tokenizer(sent.name)
    truth, said = sent.tokens[0].tolist(), tokens[0].tolist()
    with torch.no_grad():
        feature = float((sent.model(x) - sent.model(sent.J.x)).square().mean())
    row: Row = {
        "rmse": rmse, "accuracy": text.accuracy(said, truth, words.all_special_ids), "all_found": said == truth,
        **text.overlap(language.decode(sent.name, tokens[0]), language.decode(sent.name, sent.tokens[0])),
        "feature_mse": feature, "found": " ".join(words.convert_ids_to_tokens(said)),
        "truth": " ".join(words.convert_ids_to_tokens(truth)), "converged": True,
    }  # fmt: skip
    if found is None:
        return row
    return row | {
        "relative_residual": found.relative_residual, "steps": found.steps, "evaluations": found.evaluations,
        "converged": found.converged, "matched": found.matched, "failed": found.failed, "reason": found.reason,
    }  # fmt: skip


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row a network, attacker and level: the share of tokens found, ROUGE-L, and of texts found whole."""
    groups = table.groupby([*NETWORK, "attacker", "relative"], sort=False)
    return groups.agg(
        texts=("text", "nunique"), tokens=("accuracy", "mean"), rougeL=("rougeL", "mean"), whole=("all_found", "mean")
    )


def lost(table: pd.DataFrame) -> pd.DataFrame:
    """The table in which an attack that failed has found nothing: no token, no word, and an infinite error."""
    failed = table.failed.astype(bool)
    shown = [name for name in ("all_found", "named", *METRICS) if name in table]
    return shared.lost(table).assign(**{name: table[name].mask(failed, 0.0).astype(float) for name in shown})


def judge(
    table: pd.DataFrame, share: float, cut: float, accuracy: float, order: float, flat: tuple[float, float],
    kept: float, fallen: float, middle: float,
) -> list[claims.Claim]:  # fmt: skip
    """The experiment's claims. The thresholds are the notebook's parameters."""
    found: list[claims.Claim] = []
    table = lost(table)
    for (network, task), whole in table.groupby(NETWORK, sort=False):
        tag = network if task == "classification" else f"{network}-{task}"
        words = tag.replace("-", " ", 1) if network != "minilm" else "MiniLM"

        def claim(
            rows: pd.DataFrame, name: str, statement: str, statistic: str, measure: Any, attacker: str, *,
            tag: str = tag, words: str = words, source: str = "the language experiment", **more: Any,
        ) -> None:  # fmt: skip
            if len(rows):
                found.append(claims.judge(rows, measure, "text", id=f"language-{tag}-{name}", source=source,
                                          statement=f"{words}: {statement}", statistic=statistic,
                                          attacker=attacker, **more))  # fmt: skip

        def of(attacker: str, whole: pd.DataFrame = whole) -> pd.DataFrame:
            return whole[whole.attacker == attacker]

        none, ties = "share of texts found whole, no noise", ", over the largest that ties allow"
        for attacker, name, statement in (
            (READING, "read", "every token is read off the first layers' gradient, without a search."),
            (SEARCH, "searched", "Gauss–Newton finds every token from a random start."),
            (TAG, "tag", "TAG finds every token from a random start."),
        ):
            rows = whole[(whole.attacker == attacker) & (whole.relative == 0)]
            claim(rows, name, statement, none, lambda t: float(t.all_found.mean()), ATTACKERS[attacker],
                  at_least=share, source="ours")  # fmt: skip
        if "predicted_rmse" in whole and whole.predicted_rmse.notna().any():
            fine = of(REFINED)
            fine = fine[(fine.relative > 0) & (fine.predicted_rmse <= cut * fine.spread)]
            claim(fine, "accuracy", "I²F is the error of the embeddings, modulo what LayerNorm hides.",
                  "median relative error of the predicted RMSE", lambda t: float(shared.relative_error(t).median()),
                  ATTACKERS[REFINED], at_most=accuracy,
                  note=f"predicted RMSE at most {cut:g} standard deviations of E; {claims.settled(fine)}")  # fmt: skip
        best = of(REFINED if (whole.attacker == REFINED).any() else READING)
        noisy = best[(best.relative > 0) & best.bound_norm.notna()]
        claim(noisy, "features", "I_lb tells how far the network's answer moves, over levels of noise.",
              f"Spearman of the feature MSE with I_lb{ties}",
              lambda t: claims.rank_agreement(t, "bound_norm", "feature_mse"), ATTACKERS[best.attacker.iloc[0]],
              at_least=order)  # fmt: skip
        claim(noisy.assign(lost=1 - noisy.rougeL), "order", "I_lb tells how much text leaks, over levels of noise.",
              f"Spearman of 1 − ROUGE-L with I_lb{ties}", lambda t: claims.rank_agreement(t, "bound_norm", "lost"),
              ATTACKERS[best.attacker.iloc[0]], at_least=order)  # fmt: skip
        level = of(READING)
        level = level[(level.relative == middle) & level.bound_norm.notna()]
        claim(level.assign(lost=1 - level.accuracy), "texts", "at one level of noise, I_lb tells which texts leak.",
              f"Spearman over texts of the share of tokens lost with I_lb{ties}, relative noise {middle:g}",
              lambda t: claims.rank_agreement(t, "bound_norm", "lost"), ATTACKERS[READING], at_least=order,
              least=claims.LEAST_RANKED)  # fmt: skip
        low, high = flat
        claim(noisy[noisy.bound_norm <= low], "flat", f"ROUGE-L is flat up to an I_lb of {low:g}.",
              f"mean ROUGE-L at I_lb ≤ {low:g}", lambda t: float(t.rougeL.mean()),
              ATTACKERS[best.attacker.iloc[0]], at_least=kept)  # fmt: skip
        finished = noisy[~noisy.failed.astype(bool)]  # an attack that failed is no proof of protection
        claim(finished[finished.bound_norm >= high], "fallen", f"ROUGE-L has fallen at an I_lb of {high:g}.",
              f"mean ROUGE-L at I_lb ≥ {high:g}", lambda t: float(t.rougeL.mean()),
              ATTACKERS[best.attacker.iloc[0]], at_most=fallen)  # fmt: skip
        named = of(SHARED)
        named = named[named.relative == named.relative.max()]
        claim(named, "shared", "the embedding's gradient names a text's words, in no order.",
              "median F-measure of the words that it names", lambda t: float(t.named.median()), ATTACKERS[SHARED],
              at_least=share, note=_named(named, whole))  # fmt: skip
    return found


def _named(shared: pd.DataFrame, whole: pd.DataFrame) -> str:
    if not len(shared):
        return ""
    level = shared.relative.iloc[0]
    alone = whole[(whole.attacker == READING) & (whole.relative == level)]
    return (f"relative noise {level:g}; {shared.named_wrongly.sum():.0f} other tokens named; tokens at their place: "
            f"{shared.accuracy.mean():.2f} with it, {alone.accuracy.mean():.2f} without")  # fmt: skip
