"""The statistic of every claim, on tables where its value is known: the claim perfectly true, perfectly false, between.

A statistic that cannot reach its threshold where the claim is true, or must reach it where it is false, says nothing.
Values are worked out by hand; those of rank correlations from Σd², the sum of squared differences of ranks.
"""

import math
import pkgutil
from functools import partial

import numpy as np
import pandas as pd
import pytest

from i2f import claims, statistics
from i2f.paper import experiments
from i2f.paper.experiments import (
    batch_size,
    damping,
    deep_networks,
    efficiency,
    language,
    pruning,
    smoothness,
    training,
)

N = 8  # images, texts or seeds
ENDED = {"converged": True, "matched": True, "failed": False, "reason": ""}
SAME, REVERSED, HALVES = (lambda i: i), (lambda i: N - 1 - i), (lambda i: (i + N // 2) % N)
HALVES_ORDER = 1 - 6 * (8 * 4**2) / (8 * 63)  # every rank is off by four


@pytest.fixture(autouse=True, scope="module")
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "bootstrap", partial(statistics.bootstrap, draws=10))
        yield


def judge_efficiency(bound=20, attacks=(2000, 2000), exact=785):
    """Evaluations of I_lb and I²F on both networks, and of the attack on one and the other."""
    rows = [
        {"dataset": "mnist", "network": network, "image": image, "method": method, "evaluations": cost, "reached": True}
        for network, attack in zip("ab", attacks, strict=True)
        for image in range(N)
        for method, cost in (("I_lb", bound), ("I²F", exact), ("dgl", attack))
    ]
    return efficiency.judge({"problems": pd.DataFrame(rows)}, {"cheaper": 10.0, "products": 100.0}, "mnist")


def judge_damping(free=0.0, damped=0.0, pulled=0.0, bayes=1.0, weight=0.5, paper=1.0, order=SAME, ranks=SAME, miss=0.0):
    """free, damped, pulled: relative errors of predictions. bayes, weight: ratios of the MAP attacker's MSE to Bayes
    error and to the others' MSE. paper: factor by which damped I²F is off. miss: of Adam's end, at the best ε."""
    table, curves, survey = [], [], []
    for image in range(N):
        for size in (1e-5, 1e-3):
            common = {"image": image, "size": size, "bayes": size / 0.05}
            for attacker, method in (("no prior", "gauss-newton"), ("MAP", "gauss-newton"), ("Adam", "dgl")):
                mse = (1 + image) * (1 if attacker == "MAP" else 1 / weight)
                off, other = free if attacker == "no prior" else damped, mse / (1 + image) * (1 + ranks(image))
                table.append(
                    {
                        **common,
                        "attacker": attacker,
                        "method": method,
                        "mse": mse,
                        "rmse": mse**0.5,
                        **ENDED,
                        "expected_rmse": (mse / bayes) ** 0.5,
                        "damped_rmse": mse**0.5 / (1 + off),
                        "pulled_rmse": mse**0.5 / (1 + pulled),
                    }
                )
                for e in (0.01, *damping.PAPER):
                    curves.append(
                        {
                            **common,
                            "attacker": attacker,
                            "epsilon": e,
                            "rmse": mse**0.5,
                            "below": 0.5,
                            "damped_rmse": other**0.5 / paper,
                            "pulled_rmse": 1.0,
                            "pulled_miss": miss + (e != 0.01),
                        }
                    )
            names = [f"predicted_rmse, ε = {e:g}" for e in damping.PAPER]
            survey.append({**common, "predicted_rmse": 1 + image, **dict.fromkeys(names, 1 + order(image))})
    tables = {"problems": pd.DataFrame(table), "curves": pd.DataFrame(curves), "survey": pd.DataFrame(survey)}
    thresholds = {"cut": 0.05, "accuracy": 0.05, "factor": 2.0, "order": 0.9, "near": 0.5}
    return damping.judge(tables, thresholds, "mnist")


def judge_pruning(errors=(1.0, 2.0), falling=0, miss=0.0, bound=1, recovered=(True, True), images=4):
    """Two ratios and four images, as in the default profile, each image with a level of error of its own. In the first
    `falling` images the larger ratio has the smaller error. recovered: at each ratio, by who reads the mask."""
    rows = []
    for image in range(images):
        found = [10.0**image * e for e in (errors[::-1] if image < falling else errors)]
        for size, rmse, read in zip((0.5, 0.7), found, recovered, strict=True):
            common = {"image": image, "size": size}
            rows += [
                {
                    **common,
                    "attacker": attacker,
                    "rmse": rmse,
                    "predicted_rmse": rmse / (1 + miss),
                    "bound_rmse": rmse**bound,
                }
                for attacker in ("ignores", "ignores, Adam")
            ]
            rows.append({**common, "attacker": "reads", "predicted_rmse": 0.0, "rmse": 1e-9 if read else 1.0})
    table = pd.DataFrame(rows).assign(mse=lambda t: t.rmse**2, **ENDED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "MOST", 0.7)
        return pruning.judge(
            {"problems": table},
            {"cut": 0.05, "accuracy": 0.05, "order": 0.9, "exact": 1e-8, "share": 0.99, "far": 0.7},
            "mnist",
        )


def judge_training(epochs=(1, 2, 3), bound=1, mse=1e-12, miss=0.0):
    """epochs: logarithm of the expected error at three checkpoints. miss: of its prediction at the last."""
    rows = []
    config = dict.fromkeys(training.TRAINING) | {"epochs": [0, 10, 20], "images": N, "gauss_newton_steps": 1}
    for p in training.problems(config | {"fixed": [1e-7], "relative": [1e-3]}):
        expected = 10.0 ** epochs[p["epoch"] // 10] * (1 + p["image"])
        rmse = mse**0.5 if p["noise"] == "none" else expected * (1 + miss * (p["epoch"] == 20))
        rows.append(
            {
                **p,
                "expected_rmse": expected,
                "predicted_rmse": expected,
                "bound_rmse": expected**bound,
                "rmse": rmse,
                "mse": rmse**2,
                **ENDED,
            }
        )
    thresholds = {"growth": 0.5, "exact": 1e-8, "share": 0.99, "accuracy": 0.02, "tracking": 0.8, "cut": 0.05}
    return training.judge({"problems": pd.DataFrame(rows)}, thresholds, "mnist")


def judge_batch_size(mse=1e-12, rank=1568, mixing=1.5, miss=0.0):
    rows = []
    for image in range(N):
        for batch in (1, 2):
            for part in batch_size.PARTS if batch > 1 else batch_size.PARTS[:2]:
                expected = 1e-3 * (1 if batch == 1 else mixing * (2 if part == batch_size.FIXED else 1))
                rmse = mse**0.5 if part == batch_size.NONE else expected * (1 + miss)
                rows.append(
                    {
                        "part": part,
                        "batch": batch,
                        "image": image,
                        "set": image // 2,
                        "attacked": True,
                        "d_x": 784 * batch,
                        "rank": rank if batch == 2 else 784,
                        "expected_rmse": expected,
                        "predicted_rmse": expected,
                        "rmse": rmse,
                        "mse": rmse**2,
                        **ENDED,
                    }
                )
    thresholds = {"exact": 1e-8, "share": 0.99, "hidden": 2.0, "averaging": 0.5, "accuracy": 0.05, "cut": 0.05}
    return batch_size.judge({"problems": pd.DataFrame(rows)}, thresholds | {"compared": 2, "group": 2}, "mnist")


def judge_deep_networks(products=20, place=SAME, loose=5.0):
    bound = np.arange(1.0, N + 1)
    exact = loose * bound if place is SAME else [1.0 + place(i) for i in range(N)]
    table = pd.DataFrame(
        {
            "dataset": "cifar10",
            "network": "vit",
            "image": range(N),
            "products": products,
            "bound_rmse": bound,
            "damped_rmse": exact,
            "rmse": exact,
            **ENDED,
            "steps allowed": 60,
            "relative_residual": 0.3,
        }
    )
    thresholds = {"products": 52, "order": 0.5, "tight": 10.0}
    return deep_networks.judge({"problems": table}, thresholds) + deep_networks.judge_photos(table, thresholds)


def judge_smoothness(missed=(), rank=784, growth=3.0):
    """missed: (depth, image) of the networks that do not give their image away. growth: of the error by depth."""
    rows = [
        {
            "depth": depth,
            "width": width,
            "activation": activation,
            "image": image,
            "rank": rank,
            "mse": 1.0 if (depth, image) in missed else 1e-12,
            "expected_rmse": growth ** math.log2(depth),
            **ENDED,
        }
        for depth in (2, 4)
        for width in (8, 16)
        for activation in ("softplus", "relu")
        for image in range(N)
    ]
    table = pd.DataFrame(rows).assign(rmse=lambda t: t.mse**0.5)
    return smoothness.judge({"problems": table}, {"exact": 1e-8, "share": 0.99, "safer": 2.0}, "mnist")


def judge_language(found=True, miss=0.0, lost=(0.0, 0.1, 0.9), order=1, flat=0.0, named=1.0):
    """lost: share of tokens and words at an I_lb of about 0.001, 0.1 and 10. order: −1 where texts with a larger I_lb
    lose less."""
    rows = []
    for attacker in language.ATTACKERS:
        for text in range(N):
            for level, gone in zip((0.0, 0.001, 0.1, 10.0), (0.0, *lost), strict=True):
                gone, predicted = gone * (1 + text / 100), 0.01 + level
                rows.append(
                    {
                        "network": "bert-tiny",
                        "task": "classification",
                        "attacker": attacker,
                        "text": text,
                        "relative": level,
                        "bound_norm": level * (1 + text / N) ** order,
                        "spread": 1.0,
                        "predicted_rmse": predicted,
                        "rmse": predicted * (1 + miss),
                        "rougeL": 1 - gone - flat,
                        "accuracy": 1 - gone,
                        "feature_mse": gone,
                        "all_found": found,
                        "named": named,
                        "named_wrongly": 0,
                        **ENDED,
                    }
                )
    thresholds = {"share": 0.9, "cut": 0.1, "accuracy": 0.05, "order": 0.7, "low": 0.01, "high": 1.0}
    thresholds |= {"kept": 0.9, "fallen": 0.5, "middle": 0.1}
    return language.judge({"problems": pd.DataFrame(rows)}, thresholds)


NOWHERE = [(depth, image) for depth in (2, 4) for image in range(N)]
GN = "gauss-newton"
# judge -> names of its claims -> the arguments where they are true, where they are false and between, and the values
CASES = {
    judge_efficiency: {
        "products": [({}, 20), ({"bound": 200}, 200)],
        "bound-dgl": [({}, 100), ({"attacks": (20, 20)}, 1), ({"attacks": (2000, 100)}, 5)],
        "exact-dgl": [({"exact": 800}, 2.5), ({"attacks": (157, 157)}, 0.2), ({"attacks": (7850, 1570)}, 2)],
    },
    judge_damping: {
        "none": [({}, 0), ({"free": 0.5}, 0.5)],
        "map": [({}, 0), ({"damped": 0.5}, 0.5)],
        "pull": [({}, 0), ({"pulled": 0.5}, 0.5)],
        "bayes": [({}, 1), ({"bayes": 9.0}, 9), ({"bayes": 0.6}, 0.6)],
        "weight": [({}, 0.5), ({"weight": 2.0}, 2)],
        "paper": [({}, 1), ({"paper": 9.0}, 9), ({"paper": 0.8}, 1.25)],
        "order": [({}, 1), ({"order": REVERSED}, -1), ({"order": HALVES}, HALVES_ORDER)],
        "ranks": [({}, 1), ({"ranks": REVERSED}, -1), ({"ranks": HALVES}, HALVES_ORDER)],
        "stopping": [({}, 0), ({"miss": 0.9}, 0.9)],
    },
    judge_pruning: {
        # the last: errors at the floor, which have no order
        "protects protects-adam": [({}, 1), ({"falling": 4}, -1), ({"falling": 1}, 0.5), ({"errors": (1.0, 1.0)}, 0)],
        "prediction": [({}, 0), ({"miss": 0.5}, 0.5)],
        "bound": [({}, 1), ({"bound": -1}, -1)],
        "mask-50": [({}, 1), ({"recovered": (False, True)}, 0)],
        "mask-70": [({}, 1), ({"recovered": (True, False)}, 0)],
        "reach": [({}, 0.7), ({"recovered": (False, True)}, 0), ({"recovered": (True, False)}, 0.5)],
        "rank": [({}, 1), ({"recovered": (False, False)}, 0), ({"recovered": (True, False)}, 0.5)],
    },
    judge_training: {
        "fixed relative": [({}, 1), ({"epochs": (3, 2, 1)}, -1), ({"epochs": (1, 3, 2)}, 0.5)],
        "bound": [({}, 1), ({"bound": -1}, -1)],
        "without-noise without-noise-near": [({}, 1), ({"mse": 1e-3}, 0)],
        "prediction prediction-near": [({}, 0), ({"miss": 0.5}, 0.5)],
    },
    judge_batch_size: {
        "recovered-1 recovered-2": [({}, 1), ({"mse": 1e-3}, 0)],
        "rank": [({}, 1), ({"rank": 784}, 0.5)],
        "hides": [({}, 3), ({"mixing": 0.5}, 1), ({"rank": 784}, math.inf)],
        "averaging": [({}, math.log(2) / math.log(3)), ({"mixing": 8.0}, 0.25), ({"rank": 784}, 0)],
        "prediction-2": [({}, 0), ({"miss": 0.5}, 0.5)],
    },
    judge_deep_networks: {
        "products": [({}, 20), ({"products": 200}, 200)],
        "images-cifar10-vit photos": [({}, 1), ({"place": REVERSED}, -1), ({"place": HALVES}, HALVES_ORDER)],
        "tight-cifar10-vit": [({}, 5), ({"loose": 50.0}, 50)],
    },
    judge_smoothness: {
        "kinks narrow": [({}, 1), ({"missed": NOWHERE}, 0), ({"missed": [(2, 0), (2, 1), (4, 0), (4, 3)]}, 0.75)],
        "smooth-softplus": [({}, 1), ({"missed": NOWHERE}, 0), ({"missed": [(2, 0), (4, 0), (4, 3)]}, 0.75)],
        "rank": [({}, 1), ({"rank": 700}, 0)],
        "depth": [({}, 3), ({"growth": 1.0}, 1)],
    },
    judge_language: {
        "read searched tag": [({}, 1), ({"found": False}, 0)],
        "accuracy": [({}, 0), ({"miss": 0.5}, 0.5)],
        # the last: nothing is lost at two of three levels, where no Spearman exceeds √(1 − (2/3)³) = 0.84
        "features order": [({}, 1), ({"lost": (0.9, 0.1, 0.0), "order": -1}, -1), ({"lost": (0.0, 0.0, 0.9)}, 1)],
        "texts": [({}, 1), ({"order": -1}, -1)],
        "flat": [({}, 1), ({"flat": 0.5}, 0.5)],
        "fallen": [({}, 1 - 0.9 * 1.035), ({"lost": (0.0, 0.0, 0.1)}, 1 - 0.1 * 1.035)],
        "shared": [({}, 1), ({"named": 0.1}, 0.1)],
    },
}
FLAT = [
    pytest.param(judge, names, number, *case, id=f"{judge.__name__}-{names.split()[0]}-{number}")
    for judge, claimed in CASES.items()
    for names, cases in claimed.items()
    for number, case in enumerate(cases)
]
BY_ESTIMATES = {
    "leakage",
    "influence_vs_attack",
    "designed_noise",
    "eigenvectors",
    "fairness",
    "initialization",
    "joint",
    "lower_bound",
    "rivals",
}  # whose intervals are tested in test_estimates.py
_KEPT: dict[str, dict[str, claims.Claim]] = {}


def judged(judge, arguments) -> dict[str, claims.Claim]:
    key = f"{judge.__name__}{sorted((k, str(v)) for k, v in arguments.items())}"
    if key not in _KEPT:
        prefixes = ("mnist-", "bert-tiny-", "net-")
        _KEPT[key] = {}
        for claim in judge(**arguments):
            name = claim.id.partition("-")[2]
            _KEPT[key][next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)] = claim
    return _KEPT[key]


@pytest.mark.parametrize(("judge", "names", "number", "arguments", "value"), FLAT)
def test_a_statistic_is_what_it_should_be(judge, names, number, arguments, value):
    for name in names.split():
        found = judged(judge, arguments)[name]
        assert found.value == pytest.approx(value, rel=1e-4, abs=1e-6), name
        if number < 2:
            assert found.verdict == ("holds", "fails")[number], name


def test_every_claim_of_every_experiment_is_among_the_cases():
    others = {"problems", "audited", "frontier", *BY_ESTIMATES}
    modules = {name for _, name, _ in pkgutil.iter_modules(experiments.__path__)} - others
    assert modules == {
        judge.__globals__[name].__name__.split(".")[-1]
        for judge in CASES
        for name in judge.__code__.co_names
        if name in modules
    }
    for judge, claimed in CASES.items():
        names = {name for names in claimed for name in names.split()}
        assert set(judged(judge, {})) == names, judge.__name__
