"""Does the draw of the weights decide what a gradient gives away? One prediction, two attackers, many draws."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from i2f.paper import estimates, sweep
from i2f.paper.attackers import ATTACKERS
from i2f.paper.claims import Claim, Judge, Thresholds
from i2f.paper.experiments import problems as shared
from i2f.paper.results import Config, Results, Tables
from i2f.paper.statistics import convergence
from i2f.paper.sweep import Problem, Settings

DROPPED = ("dataset", "split", "noise", "noise_seed", "box", "budget", "start_seed", "reconstruction")
ATTACK = ("method", "box", "budget", "start_seed")  # what is not of the noisy gradient
NONE = "none"  # the attacker of a gradient that is only looked at


def problems(config: Config) -> list[Problem]:
    """Gaussian noise of every variance on the gradients of every network, for every attacker.

    config: digits of MNIST's train split from first_digit on, under each of weight_seeds (1, 2, …); inits; variances;
    attacked: attacker, "gauss-newton" or "dgl" -> which of the inits it meets; of those that none meets, only the
    prediction is wanted (attacker "none"); gauss_newton_steps, adam_steps: the attackers' budgets.
    """
    pairs = shared.rotated(config["first_digit"], config["digits"], config["weight_seeds"], crossed=True)
    budgets = {"gauss-newton": config["gauss_newton_steps"], "dgl": config["adam_steps"]}
    meets = [(attacker, init) for attacker, inits in config["attacked"].items() for init in inits]
    meets += [(NONE, init) for init in config["inits"] if init not in {attacked for _, attacked in meets}]
    found = []
    for (attacker, init), (image, weight_seed), size in itertools.product(meets, pairs, config["variances"]):
        problem = {"dataset": "mnist", "split": "train", "init": init, "weight_seed": weight_seed, "image": image}
        # the noise is scaled from variance to variance, so that the variance alone differs
        problem |= {"noise": "gaussian", "size": size, "noise_seed": 1000 * weight_seed + image, "attacker": attacker}
        if attacker != NONE:
            problem |= {**ATTACKERS[attacker].options, "budget": budgets[attacker], "start_seed": image}
        found.append(problem)
    return found


def run(problems: list[Problem], settings: Settings = sweep.DEFAULT) -> Results:
    """One row per problem: `problems.predict`'s columns, and `problems.attack`'s where there is an attacker."""
    gradients = [{name: p[name] for name in p if name not in (*ATTACK, "attacker")} for p in problems]
    network = ("init", "weight_seed", "image")
    table = sweep.run(shared.predict, gradients, settings, network, at_most=4, description="predictions")
    table = table.assign(attacker=[p["attacker"] for p in problems]).drop(columns=["failed", "reason"], errors="ignore")
    found = []
    for attacker, together, at_most in (
        ("gauss-newton", network, 2),
        ("dgl", ("init", "weight_seed"), 10),  # of one network
    ):
        some = [k for k, p in enumerate(problems) if p["attacker"] == attacker]
        if some:
            attacks = sweep.run(
                shared.attack, [problems[k] for k in some], settings, together, at_most, description=attacker
            )
            found.append(attacks.set_index(pd.Index(some)))
    own = pd.concat(found)
    own = own[[name for name in own if name not in table]]
    return Results({"problems": table.join(own).drop(columns=list(DROPPED), errors="ignore")})


def errors(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over all draws: E[I²]/d_x, then every attacker's MSE per pixel and how many converged, by variance and
    initialisation. An attack that failed has an infinite error."""
    attacked = shared.lost(table[table.attacker != NONE]).assign(converged=lambda t: t.converged.eq(True))
    by = attacked.groupby(["size", "init"], sort=False)
    found = {"E[I²]/dₓ": by.expected_mse.median()}
    for attacker, rows in attacked.groupby("attacker", sort=False):
        own = rows.groupby(["size", "init"], sort=False)
        found |= {f"{attacker}, MSE": own.mse.median(), f"{attacker}, converged": own.converged.mean()}
    return pd.DataFrame(found)


def spectra(table: pd.DataFrame) -> pd.DataFrame:
    """Medians over all draws of what J alone says of every initialisation: mean 1/λ, λ_max, λ_min, λ_max/λ_min."""
    networks = table.assign(
        mean_inverse=table.expected_mse / table["size"], condition=table.lambda_max / table.lambda_min
    )
    columns = {"mean_inverse": "mean 1/λ", "lambda_max": "λ_max", "lambda_min": "λ_min", "condition": "λ_max/λ_min"}
    return networks.groupby("init", sort=False)[list(columns)].median().rename(columns=columns)


class View(NamedTuple):
    """At which noise variance and against whom initialisations are compared, and what the note says of the variance."""

    suffix: str
    attacker: str
    variance: float
    about: str


RELEASED = "the variance of the released runs, whose code passes 0.001 as a standard deviation"
VIEWS = [
    View("-gauss-newton-released", "gauss-newton", 1e-6, RELEASED),
    View("-dgl-released", "dgl", 1e-6, RELEASED),
    View("-gauss-newton", "gauss-newton", 1e-3, "the variance that the paper states"),
    View("-dgl", "dgl", 1e-3, "the variance that the paper states"),
]
TOO_LONG = {  # why an attacker was not run
    "gauss-newton": "hundreds of steps on each of Kaiming's and Xavier's gradients",
    "dgl": "{adam_steps:,} steps on each gradient",
}
SMALL = ["kaiming", "xavier"]
COMPARED = {"uniform": (SMALL, ["uniform"]), "normal": (SMALL, ["normal"]), "anomaly": (["normal"], ["uniform"])}


def judge(tables: Tables, thresholds: Thresholds) -> list[Claim]:
    """The experiment's claims: differences of means over weight seeds, of each seed's mean over its images; at those of
    the paper's two variances that are among `variances`."""
    table = tables["problems"]
    judged = Judge.of("initialization", "initialization", thresholds)
    views = [view for view in VIEWS if np.isclose(view.variance, thresholds["variances"], atol=0).any()]
    found = []
    for name, (more, less) in COMPARED.items():
        for view in views:
            mine = table[(table.attacker == view.attacker) & np.isclose(table["size"], view.variance, atol=0)]
            mine = mine[mine.init.isin(more + less)]
            newton = view.attacker == "gauss-newton"
            rows = mine[mine.converged.eq(True)] if newton else shared.scored(mine)
            about: dict[str, Any] = {
                "suffix": view.suffix,
                "attacker": view.attacker,
                "variance": f"{view.variance:g}",
                "about": view.about,
            }
            if {*more, *less} - {*mine.init}:
                why = TOO_LONG[view.attacker].format(**thresholds)
                found.append(judged(name, None, **about, why=why))
                continue
            low, high = (expected := _difference(rows, "expected_mse", more, less)).interval
            failed = int(mine.failed.eq(True).sum())
            # Adam is judged at its published budget, however it ended
            finished = mine.converged.eq(True).mean() if newton else 1 - failed / len(mine)
            spent = f"{len(mine)} attacks of {thresholds['adam_steps']:,} steps" + f", {failed} failed" * bool(failed)
            found.append(
                judged(
                    name,
                    _difference(rows, "mse", more, less),
                    float(finished),
                    **about,
                    expected=f"{expected.value:.2f} [{low:.2f}, {high:.2f}]",
                    converged=convergence(mine) if newton else spent,
                )
            )
    networks = table.drop_duplicates(["init", "weight_seed", "image"])
    networks = networks.assign(condition=networks.lambda_max / networks.lambda_min)
    apart: dict[str, Any] = {
        name: f"{_difference(networks, 'condition', [name], ['uniform']).value:.2f}" for name in SMALL
    }
    smallest = f"{_difference(networks, 'lambda_min', SMALL, ['uniform']).value:.2f}"
    pooled = _difference(networks, "condition", SMALL, ["uniform"])
    return [*found, judged("singular", pooled, **apart, smallest=smallest)]


def _difference(rows: pd.DataFrame, column: str, more: list[str], less: list[str]) -> estimates.Estimate:
    """Of the mean logarithm of a column, over weight seeds, of the initialisations `more` from those `less`."""
    logs = rows.assign(log=np.log(rows[column]))
    first, second = (logs[logs.init.isin(some)].groupby("weight_seed").log.mean() for some in (more, less))
    return estimates.welch(first, second)
