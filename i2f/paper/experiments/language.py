"""Texts behind a gradient: what I²F predicts under noise, and how many words are recovered.

The noise is in proportion to the gradient, of expected norm `relative`·‖g‖, so that networks can be compared.
Influence and error of embeddings are meant modulo the null space of J Jᵀ, which LayerNorm and, in a language model, the
last token make: an RMSE is over the remaining dimensions.
"""

from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pandas as pd

from i2f.core import checks
from i2f.paper import sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.statistics import Statistic, convergence, median, rank_agreement
from i2f.paper.sweep import Problem, Settings
from i2f.paper.texts import ATTACKERS, READING, READS, REFINED, SCORES, SEARCH, SHARED, TAG, solve
from i2f.text import corpus
from i2f.text.names import NAMES, PACKAGE

NETWORK = ["network", "task"]


def problems(config: Config) -> list[Problem]:
    """Every text of every network, each under one of `weight_seeds`, in rotation: read without noise, and under noise
    whose I_lb is `low` and `high`.

    config: networks, "bert-tiny" or "gpt2-tiny causal" -> texts. levels: of relative noise, for the first `swept` texts.
    refined: so many texts meet Gauss–Newton under `low` and `high` too, of networks that are tiny; gauss_newton_steps:
    its budget.
    """
    found, bounds = [], [{"bound": config[name]} for name in ("low", "high")]
    for name, texts in config["networks"].items():
        for text in range(texts):
            noises = [{"relative": 0.0}, *bounds]
            noises += [{"relative": level} for level in config["levels"] if text < config["swept"]]
            seed = 1 + text % config["weight_seeds"]
            found += [problem(name, text, READING, seed, **noise) for noise in noises]
            if name.endswith("tiny") and text < config["refined"]:
                budget = config["gauss_newton_steps"]
                found += [problem(name, text, REFINED, seed, budget, **bound) for bound in bounds]
    return found


def problem(name: str, text: int, attacker: str, weight_seed: int, budget: int | None = None, **noise: float) -> Problem:
    """One attack on one text. noise: its `relative` norm, or its `bound`.

    corpus and weights_version say which texts and which files: MiniLM's weights and all networks' words come from one
    package.
    """
    network, _, task = name.partition(" ")
    return {
        "network": network,
        "task": task or "classification",
        "weight_seed": weight_seed,
        "weights_version": _installed() if network in NAMES else None,
        "corpus": corpus.CHECKSUM[:16],
        "text": text,
        "attacker": checks.one_of("attacker", attacker, ATTACKERS),
        "budget": budget,
        **noise,
    }


def _installed() -> str | None:
    """The version of the package with MiniLM's weights and the words; None where it is missing: no row is known."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per attack.

    Of the problem: embedding_gradient, withheld or shared; d_x, d_theta, rank (of J Jᵀ; none where J is too large to
    form), gradient_norm, variance (σ²), lambda_max, bound_norm (I_lb, L2), bound_rmse; predicted_rmse (Eq. 4, modulo
    the null space) and damped_rmse (at ε = σ²/τ²), where J is formed. spread: τ, the standard deviation of an
    embedding's entries.

    Of the attack: rmse, of the embeddings, modulo the null space; accuracy, rouge1, rouge2, rougeL, bleu of the text;
    feature_mse (logits), all_found: every token is right; named: F-measure of the tokens that the embedding's
    gradient names, and named_wrongly, how many are not the text's (attacker "reading-shared"). found, truth: the words.
    """
    together = (*NETWORK, "weight_seed", "text")
    return Results({"problems": sweep.run(solve, problems, settings, together, at_most=64, description="texts")})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network, attacker and level: the share of tokens found, ROUGE-L, and of texts found whole."""
    groups = table.groupby([*NETWORK, "attacker", "relative"], sort=False)
    return groups.agg(
        texts=("text", "nunique"), tokens=("accuracy", "mean"), rougeL=("rougeL", "mean"), whole=("all_found", "mean")
    )


def lost(table: pd.DataFrame) -> pd.DataFrame:
    """The table in which an attack that failed has found nothing: no token, no word, and an infinite error."""
    failed = table.failed.astype(bool)
    shown = [name for name in ("all_found", "named", *SCORES) if name in table]
    return shared.lost(table).assign(**{name: table[name].mask(failed, 0.0).astype(float) for name in shown})


def judge(tables: Tables, thresholds: Thresholds, dataset: str = "") -> list[Claim]:
    """The experiment's claims, by network. Of the thresholds, `share` is of texts or tokens found; `cut`, in standard
    deviations of an embedding, bounds the regime in which I²F is held to `accuracy`; `order` is a rank correlation;
    `low`, `high` are values of I_lb at which ROUGE-L is at least `kept`, and at most `fallen`; `middle` is the noise at
    which texts are compared."""
    found = []
    for (network, task), whole in lost(tables["problems"]).groupby(NETWORK, sort=False):
        tag = network if task == "classification" else f"{network}-{task}"
        label = tag.replace("-", " ", 1) if network != "minilm" else "MiniLM"
        judged = Judge.of("language", f"language-{tag}", thresholds)
        for name, rows, measure, words in _claims(whole, thresholds):
            if len(rows):
                found.append(judged(name, rows, measure, network=label, **words))
    return found


def _claims(whole: pd.DataFrame, limits: Thresholds) -> Iterator[tuple[str, pd.DataFrame, Statistic, dict[str, Any]]]:
    """One network's claims: name, rows, measure, words."""
    by = {name: whole[whole.attacker == name] for name in ATTACKERS}
    for attacker, name in ((READING, "read"), (SEARCH, "searched"), (TAG, "tag")):
        yield name, by[attacker][by[attacker].relative == 0], lambda t: float(t.all_found.mean()), {}
    if "predicted_rmse" in whole and whole.predicted_rmse.notna().any():
        rows = by[REFINED]
        rows = rows[(rows.relative > 0) & (rows.predicted_rmse <= limits["cut"] * rows.spread)]
        yield "accuracy", rows, _relative_error, {"converged": convergence(rows)}
    best = REFINED if len(by[REFINED]) else READING
    words = {"attacker": ATTACKERS[best]}
    noisy = by[best][(by[best].relative > 0) & by[best].bound_norm.notna()]
    yield "features", noisy, partial(rank_agreement, x="bound_norm", y="feature_mse"), words
    order = partial(rank_agreement, x="bound_norm", y="lost")
    yield "order", noisy.assign(lost=1 - noisy.rougeL), order, words
    level = by[READING]
    level = level[(level.relative == limits["middle"]) & level.bound_norm.notna()]
    yield "texts", level.assign(lost=1 - level.accuracy), order, {}
    yield "flat", noisy[noisy.bound_norm <= limits["low"]], _mean_rouge, words
    finished = noisy[~noisy.failed.astype(bool)]  # an attack that failed is no proof of protection
    yield "fallen", finished[finished.bound_norm >= limits["high"]], _mean_rouge, words
    named = by[SHARED]
    named = named[named.relative == named.relative.max()]
    yield "shared", named, partial(median, column="named"), {"named": _named(named, by[READING])}


def _relative_error(table: pd.DataFrame) -> float:
    return float(shared.relative_error(table).median())


def _mean_rouge(table: pd.DataFrame) -> float:
    return float(table.rougeL.mean())


def _named(named: pd.DataFrame, read: pd.DataFrame) -> str:
    if not len(named):
        return ""
    level = named.relative.iloc[0]
    alone = read[read.relative == level]
    return (
        f"relative noise {level:g}; {named.named_wrongly.sum():.0f} other tokens named; tokens at their place: "
        f"{named.accuracy.mean():.2f} with it, {alone.accuracy.mean():.2f} without"
    )
