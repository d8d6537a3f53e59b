"""Claims: verdicts from thresholds, words from a file, a file that comes back as it went."""

import math
import tomllib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from i2f import claims, statistics
from i2f.paper import estimates
from i2f.paper.attackers import ATTACKERS

WORDS = {"number": 3, "unit": "image", "statement": "s", "source": "p", "attacker": "knows all", "statistic": "mean"}
SMALL = np.random.default_rng(0).normal(0, 0.1, 10)


def judge(estimate, thresholds=None, call=None, **words):
    """The claim of an experiment that has this one alone."""
    return claims.Judge({"a": {**WORDS, **words}}, "test", thresholds or {})("a", estimate, **call or {})


@pytest.mark.parametrize(
    ("words", "verdict", "holds_when"),
    [
        ({"at_least": -1.0}, "holds", "≥ -1"),
        ({"at_least": -1.0, "at_most": 1.0}, "holds", "≥ -1 and ≤ 1"),
        ({"at_least": 1.0}, "fails", "≥ 1"),
        ({"at_most": 0.0}, "inconclusive", "≤ 0"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(words, verdict, holds_when):
    claim = judge(estimates.mean(SMALL), **words)
    assert (claim.verdict, claim.holds_when, claim.n, claim.method) == (verdict, holds_when, 10, "Student's t")
    assert (claim.p < 0.05) == (verdict != "inconclusive")
    assert math.isfinite(claim.needed) == (verdict == "inconclusive")
    assert claim.number == 3


def test_an_undecided_claim_says_how_many_units_would_decide():
    claim = judge(estimates.mean(SMALL), at_most=0.0)
    assert claim.sentence == f"inconclusive (about {claim.needed:,.0f} images would decide)"
    assert claim.needed > 10


def test_attacks_that_did_not_finish_decide_nothing():
    claim = judge(estimates.mean(SMALL), call={"finished": 0.89}, at_least=-1.0, note="ten of them")
    assert (claim.verdict, claim.p) == ("inconclusive", 1.0)
    assert claim.note == "ten of them; only 89% of the attacks finished"
    assert math.isnan(claim.needed)
    assert judge(estimates.mean(SMALL), call={"finished": 0.9}, at_least=-1.0).verdict == "holds"
    assert judge(estimates.mean(SMALL), call={"finished": math.nan}, at_least=-1.0).verdict == "inconclusive"


def test_a_test_must_reject_as_well():
    holds, open_ = (judge(estimates.mean(SMALL), call={"p": p}, at_least=-1.0) for p in (0.01, 0.2))
    assert (holds.verdict, holds.p) == ("holds", 0.01)
    assert (open_.verdict, open_.p) == ("inconclusive", 0.2)
    assert judge(estimates.mean(SMALL), call={"p": 0.2}, at_least=1.0).verdict == "fails"


def test_a_claim_that_was_not_run_says_why():
    claim = judge(None, at_least=1.0, not_run="cost: {hours} hours", thresholds={"hours": 20})
    assert (claim.verdict, claim.note, claim.n) == ("not run", "cost: 20 hours", 0)
    assert claims.to_frame([claim]).loc[0, ["value [95% interval]", "over", "verdict"]].tolist() == [
        "–",
        "–",
        "not run",
    ]


def test_fewer_than_eight_units_decide_nothing():
    assert judge(estimates.mean(SMALL[:7]), at_least=-100.0).verdict == "inconclusive"


def test_numbers_are_compared_as_they_are_published():
    """0.99996 is published as 1."""
    exact = estimates.Estimate(0.99996, lambda level: (0.99996, 0.99996), 10, "none")
    assert judge(exact, at_least=1.0).verdict == "holds"


def test_saved_claims_come_back_rounded(tmp_path):
    censored = estimates.Estimate(math.inf, lambda level: (0.1234567, math.inf), 10, "order statistics")
    found = [
        judge(estimates.mean(SMALL), at_least=-1.0),
        judge(censored, at_least=0.05),
        judge(None, at_least=1.0, not_run="cost"),
    ]
    found = [replace(claim, id=str(k)) for k, claim in enumerate(found)]
    claims.save(found, tmp_path / "claims.json")
    loaded = claims.load(tmp_path / "claims.json")
    assert loaded[0].value == statistics.rounded(found[0].value)
    assert (loaded[1].value, loaded[1].low, loaded[1].high) == (math.inf, 0.1235, math.inf)
    assert [str(claim) for claim in loaded] == [
        str(replace(claim, **{name: statistics.rounded(getattr(claim, name)) for name in claims.NUMBERS}))
        for claim in found
    ]


def test_p_values_are_adjusted_within_a_ledger():
    found = [
        replace(judge(estimates.mean(SMALL), at_least=-1.0), id=f"{k}", p=p) for k, p in enumerate([0.01, 0.04, 0.03])
    ]
    found += [replace(found[0], id="other", ledger="beyond", p=0.04), replace(found[0], id="not run", p=math.nan)]
    adjusted = claims.adjusted(found)
    assert adjusted == pytest.approx({"0": 0.03, "1": 0.06, "2": 0.06, "other": 0.04})


def test_a_table_of_claims_reads_from_the_left():
    page = claims.show([judge(estimates.mean(SMALL), at_least=-1.0)]).data
    assert "text-align: left" in page
    assert "10 images" in page


def test_frame_shows_interval_and_verdict():
    claim = judge(estimates.mean(SMALL), at_least=-1.0)
    frame = claims.to_frame([claim])
    assert list(frame.verdict) == [f"holds (p {'< 0.0001' if claim.p < 1e-4 else f'= {claim.p:.2g}'})"]
    assert list(claims.to_frame([replace(claim, note="3 of 4 converged")]).statistic) == ["mean (3 of 4 converged)"]
    assert "[" in frame["value [95% interval]"][0]


def test_slope_of_a_power_law():
    x = np.geomspace(1e-3, 10, 7)
    assert statistics.log_slope(pd.DataFrame({"x": x, "y": 3 * x**-1.5}), "x", "y") == pytest.approx(-1.5)


def test_order_and_power():
    x = np.geomspace(1e-3, 10, 7)
    table = pd.DataFrame({"x": x, "y": 3 * x**-1.5, "z": np.exp(x)})
    assert statistics.log_correlation(table, "x", "y") == pytest.approx(-1)
    assert statistics.rank_correlation(table, "x", "z") == pytest.approx(1)
    assert statistics.log_correlation(table, "x", "z") < 0.95  # monotone, and no power law


def test_spearman_is_the_librarys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=20).astype(float), rng.standard_normal(20)
    x[3] = np.inf
    assert statistics.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(statistics.spearman(np.ones(4), y[:4]))
    y[0] = np.nan
    assert math.isnan(statistics.spearman(x, y))


def test_ranks_and_spearman_along_an_axis():
    x, y = np.random.default_rng(0).integers(0, 5, (2, 9, 3, 4))
    assert statistics.spearman(x, y).shape == (3, 4)
    assert statistics.spearman(x, y)[1, 2] == pytest.approx(spearmanr(x[:, 1, 2], y[:, 1, 2]).statistic)
    assert list(statistics.ranks(np.array([3.0, 1.0, 3.0, np.nan]))) == pytest.approx(
        [2.5, 1, 2.5, np.nan], nan_ok=True
    )


def test_an_interval_of_no_width_is_none():
    assert claims.interval((0.99964, 0.9991, 1.0)) == "0.9996 [0.9991, 1]"
    assert claims.interval((1.0, 1.0, 1.0)) == claims.interval((1.0, -math.inf, math.inf)) == "1"
    assert claims.interval((math.nan, -math.inf, math.inf)) == "–"


def test_convergence_counts_what_ended():
    table = pd.DataFrame({"converged": [True] * 4 + [False, None], "failed": [False] * 5 + [True]})
    assert statistics.convergence(table) == "4 of 6 attacks converged, 1 failed"
    assert statistics.convergence(table[:4]) == "4 of 4 attacks converged"


def test_words_of_a_claim_are_templates_of_thresholds_and_call():
    """Thresholds by name, defaults of the file, an attacker by its name, and what the call replaces."""
    entries = {
        "defaults": {"unit": "image", "source": "Eq. {eq}", "attacker": "gauss-newton", "note": "{n} rows"},
        "small": {"number": 1, "statement": "It is below {cut:g}{more}.", "statistic": "mean", "at_most": "cut"},
    }
    judged, estimate = claims.Judge(entries, "noise", {"cut": 0.5}), estimates.mean(SMALL)
    found = judged("small", estimate, suffix="-box", more=", too", eq=4, n=20)
    assert (found.id, found.statement, found.source) == ("noise-small-box", "It is below 0.5, too.", "Eq. 4")
    assert (found.attacker, found.note) == (ATTACKERS["gauss-newton"].knows, "20 rows")
    assert (found.holds_when, found.verdict, found.ledger) == ("≤ 0.5", "holds", "paper")
    assert judged("small", estimate, more="", eq=4, n=0, at_most=-1).verdict == "fails"
    with pytest.raises(ValueError, match="did you mean 'small'"):
        judged("smal", estimate)


@pytest.mark.parametrize("path", sorted(claims.WORDS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_file_of_words_is_whole(path):
    """Each claim of it has a number, every text and a unit."""
    entries = tomllib.loads(path.read_text())
    defaults = entries.pop("defaults", {})
    for name, entry in entries.items():
        entry = defaults | entry
        assert {"number", "statement", "statistic", "source", "unit"} <= entry.keys(), name
        assert entry["statement"].endswith("."), name


@pytest.mark.parametrize(
    ("entry", "words", "problem"),
    [
        ({"at_mots": 1.0}, {}, "did you mean 'at_most'"),
        ({"at_most": 1.0, "attacker": "gaus-newton"}, {}, "did you mean 'gauss-newton'"),
        ({"at_most": 1.0}, {"noet": "3"}, "word='noet' is unknown: did you mean 'note'"),
        ({}, {}, "no threshold"),
    ],
)
def test_what_is_misspelt_in_a_claim_is_refused(entry, words, problem):
    """Otherwise a claim without a threshold would hold."""
    with pytest.raises(ValueError, match=problem):
        judge(estimates.mean(SMALL), call=words, **entry)
