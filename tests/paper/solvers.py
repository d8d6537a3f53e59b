"""Solvers that the tests of the row store, of sweeps and of verification share: importable by name, as workers need."""

import os
import time
from pathlib import Path

import numpy as np

from i2f.paper.rows import Brief, declare

LOG = "I2F_TEST_LOG"  # a folder in which every chunk that is worked on leaves a file
WAIT = "I2F_TEST_WAIT"  # the seconds that `slow` takes, where it is to be killed


def _log(chunk):
    if folder := os.environ.get(LOG):
        Path(folder, f"{chunk[0]['number']}-{len(chunk)}-{time.monotonic_ns()}").touch()


@declare("problems", defaults={"power": 2}, kinds={"noisy": "converged"})
def powers(chunk):
    _log(chunk)
    return [{"value": float(p["number"]) ** p.get("power", 2), "noisy": p["number"] / 3, "steps": 1} for p in chunk]


@declare("paths", version=3)
def paths(chunk):
    """Several rows per problem, with a picture in the last."""
    found = []
    for p in chunk:
        rows = [{"step": k, "error": 1.0 / (k + p["number"])} for k in range(1, 4)]
        rows[-1]["picture"] = np.full((1, 2, 2), p["number"], dtype=np.float32)
        found.append(rows)
    return found


def _again(problem, row):
    return {"final": float(row["kept"].sum())}


@declare("long", brief=Brief(lambda p: None if "until" in p else {**p, "until": 2}, "early", _again))
def long(chunk):
    """A long way, whose early part is stored."""
    _log(chunk)
    found = []
    for p in chunk:
        end = p.get("until", p["steps"])
        if p["steps"] < 2:  # ended before the early part was over
            found.append({"final": float(end)})
            continue
        found.append({"early": 2.0 * p["number"], "kept": np.arange(end), "final": float(np.arange(end).sum())})
    return found


@declare("problems")
def slow(chunk):
    _log(chunk)
    time.sleep(float(os.environ.get(WAIT, 0)))
    return [{"square": p["number"] ** 2} for p in chunk]
