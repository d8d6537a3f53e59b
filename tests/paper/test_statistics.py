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
    smoothness,
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


    "a",
    "mnist",
}  # whose intervals are tested in test_estimates.py


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


    "classification",
    "net",
}  # whose intervals are tested in test_estimates.py


NOWHERE = [(depth, image) for depth in (2, 4) for image in range(N)]
GN = "gauss-newton"
# judge -> names of its claims -> the arguments where they are true, where they are false and between, and the values
CASES = {
}  # whose intervals are tested in test_estimates.py
    },
    judge_batch_size: {
        "recovered-1 recovered-2": [({}, 1), ({"mse": 1e-3}, 0)],
        "rank": [({}, 1), ({"rank": 784}, 0.5)],
        "hides": [({}, 3), ({"mixing": 0.5}, 1), ({"rank": 784}, math.inf)],
        "averaging": [({}, math.log(2) / math.log(3)), ({"mixing": 8.0}, 0.25), ({"rank": 784}, 0)],
        "prediction-2": [({}, 0), ({"miss": 0.5}, 0.5)],
    },
    judge_smoothness: {
        "kinks narrow": [({}, 1), ({"missed": NOWHERE}, 0), ({"missed": [(2, 0), (2, 1), (4, 0), (4, 3)]}, 0.75)],
        "smooth-softplus": [({}, 1), ({"missed": NOWHERE}, 0), ({"missed": [(2, 0), (4, 0), (4, 3)]}, 0.75)],
        "rank": [({}, 1), ({"rank": 700}, 0)],
        "depth": [({}, 3), ({"growth": 1.0}, 1)],
    },
}  # whose intervals are tested in test_estimates.py
    },
}
FLAT = [
    pytest.param(judge, names, number, *case, id=f"{judge.__name__}-{names.split()[0]}-{number}")
    for judge, claimed in CASES.items()
    for names, cases in claimed.items()
    for number, case in enumerate(cases)
]
    "deep_networks",
    "designed_noise",
    "eigenvectors",
    "fairness",
    "influence_vs_attack",
    "initialization",
    "joint",
    "language",
    "leakage",
    "lower_bound",
    "rivals",
    "training",
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
