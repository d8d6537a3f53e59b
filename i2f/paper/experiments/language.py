"""Texts behind a gradient: how many words are read off it, without noise and under noise of a given I_lb.

Influence and error of embeddings are meant modulo the null space of J Jᵀ, which LayerNorm and, in a language model, the
last token make: an RMSE is over the remaining dimensions.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pandas as pd

from i2f.core import checks
from i2f.paper import estimates, sweep
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.results import Config, Results, Tables
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Settings
from i2f.paper.texts import ATTACKERS, READING, REFINED, solve
from i2f.text import corpus
from i2f.text.names import NAMES, PACKAGE

NAMES_SHOWN = {"bert-tiny": "BERT-type, tiny", "gpt2-tiny": "GPT-2-type, tiny", "minilm": "MiniLM"}
NETWORK = ["network", "task"]


def problems(config: Config) -> list[Problem]:
    """Every text of every network, each under one of `weight_seeds`, in rotation: read without noise, and under noise
    whose I_lb is `low` and `high`.

    config: networks, "bert-tiny" or "gpt2-tiny causal" -> texts. levels: relative noise for the first `swept` texts.
    Texts of tiny networks meet Gauss–Newton too, of gauss_newton_steps: under `low`, and the first `refined` under
    `high`, where it takes several times as long.
    """
    found, bounds = [], [{"bound": config[name]} for name in ("low", "high")]
    for name, texts in config["networks"].items():
        for text in range(texts):
            noises = [{"relative": 0.0}, *bounds]
            noises += [{"relative": level} for level in config["levels"] if text < config["swept"]]
            seed = 1 + text % config["weight_seeds"]
            found += [problem(name, text, READING, seed, **noise) for noise in noises]
            if name.endswith("tiny"):
                budget, met = config["gauss_newton_steps"], bounds if text < config["refined"] else bounds[:1]
                found += [problem(name, text, REFINED, seed, budget, **bound) for bound in met]
    return found


def problem(
    name: str, text: int, attacker: str, weight_seed: int, budget: int | None = None, **noise: float
) -> Problem:
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

    Of the problem: relative, expected norm of the noise over the gradient's, also where its `bound` was given; d_x,
    d_theta, rank (of J Jᵀ; none where J is too large to form), gradient_norm, variance (σ²), lambda_max, bound_norm
    (I_lb, L2), bound_rmse; predicted_rmse (Eq. 4, modulo the null space) and damped_rmse (at ε = σ²/τ²), where J is
    formed. spread: τ, the standard deviation of an embedding's entries.

    Of the attack: rmse, of the embeddings, modulo the null space; accuracy, rouge1, rouge2, rougeL, bleu of the text;
    feature_mse (logits), all_found: every token is right. found, truth: the words.
    """
    together = (*NETWORK, "weight_seed", "text")
    table = sweep.run(solve, problems, settings, together, at_most=64, description="texts")
    relative = np.sqrt(table.variance * table.d_theta) / table.gradient_norm
    return Results({"problems": table.assign(relative=table.relative.fillna(relative))})


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One row per network and attacker: texts, and mean ROUGE-L without noise and by the I_lb of the noise."""
    rows = table.assign(level=table.bound.mask(table.relative == 0, 0.0))
    rows = rows[rows.level.notna()]
    groups = rows.groupby([*NETWORK, "attacker"], sort=False)
    columns = {0.0: "no noise"} | {level: f"I_lb = {level:g}" for level in sorted(rows.level.unique()) if level}
    means = rows.pivot_table(index=[*NETWORK, "attacker"], columns="level", values="rougeL", sort=False)
    whole = rows[rows.level == 0].groupby([*NETWORK, "attacker"]).all_found.mean()
    return means[list(columns)].rename(columns=columns).assign(texts=groups.text.nunique(), whole=whole)


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The claims about every network that classifies, by attacker. Of the thresholds, `low` and `high` are values of
    I_lb."""
    judged = Judge.of("language", "language", thresholds)
    table = tables["problems"]
    table = table[table.task == "classification"]
    found = []
    for network, rows in table.set_index("text").groupby("network", sort=False):
        by = dict(list(rows.groupby("attacker")))
        plain = by[READING][by[READING].relative == 0]
        words: dict[str, Any] = {"suffix": f"-{network}", "network": NAMES_SHOWN.get(network, network)}
        whole = plain.all_found.where(~plain.failed.astype(bool), False).astype(bool)
        found.append(judged("read", estimates.share(whole), **words))
        for attacker in (READING, REFINED):
            if attacker in by:
                low = by[attacker][by[attacker].bound == thresholds["low"]]
                change, finished = _rouge(low) - _rouge(plain)[low.index], low.converged.fillna(False).astype(float)
                about = words | {"attacker": ATTACKERS[attacker]}
                if attacker == REFINED:
                    about["suffix"] += "-refined"
                    about["note"] = "this attacker was added after a look at three texts"
                found.append(judged("flat", estimates.mean(change), float(finished.mean()), **about))
        high = rows[rows.bound == thresholds["high"]]
        read = high[high.attacker == READING]
        held = read[~read.failed.astype(bool)]  # an attack that failed is no proof of protection
        about = words | {"refined": _refined(high[high.attacker == REFINED])}
        found.append(judged("fallen", estimates.mean(held.rougeL), len(held) / len(read), **about))
    return found


def _rouge(rows: pd.DataFrame) -> pd.Series:
    """ROUGE-L by text; none of it where the attack failed."""
    return rows.rougeL.mask(rows.failed.astype(bool), 0.0)


def _refined(rows: pd.DataFrame) -> str:
    """What Gauss–Newton makes of the words that were read, for a note."""
    if not len(rows):
        return "not refined"
    return f"refined by Gauss–Newton, {len(rows)} texts: {_rouge(rows).mean():.2f} ({convergence(rows)})"
