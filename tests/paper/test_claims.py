"""Claims: intervals over whole units, verdicts from thresholds, a file that comes back as it went."""

import math
import tomllib
from dataclasses import replace
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from i2f import claims, statistics
from i2f.paper.attackers import ATTACKERS

WORDS = {"statement": "s", "source": "p", "attacker": "knows all", "statistic": "mean"}


def judge(table, measure, unit, only=("", None), **words):
    """The claim of an experiment that has this one alone."""
    entry = {"a": {"unit": unit, "condition": only[0], **words}}
    return claims.Judge(entry, "test", {})("a", table, measure, only[1])


def noisy(images: int, rows: int, spread: float, seed: int = 0) -> pd.DataFrame:
    """Rows of one image share its level: the number that a bootstrap over rows would get wrong."""
    levels = np.random.default_rng(seed).normal(0, spread, images)
    return pd.DataFrame({"image": np.repeat(np.arange(images), rows), "value": np.repeat(levels, rows)})


def mean(table: pd.DataFrame) -> float:
    return float(table.value.mean())


def test_interval_is_over_units_not_rows():
    few, many = (statistics.bootstrap(mean, noisy(20, rows, 1.0), "image") for rows in (1, 50))
    assert many[2] - many[1] == pytest.approx(few[2] - few[1], rel=1e-6)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    tables = [noisy(30, 2, 1.0, seed) for seed in range(60)]
    covered = sum(low <= 0 <= high for _, low, high in (statistics.bootstrap(mean, t, "image", 150) for t in tables))
    assert 50 <= covered <= 60


def test_few_units_are_judged_once_a_sample_and_come_out_as_if_they_were_not():
    table, asked = noisy(4, 2, 1.0), []

    def counted(t: pd.DataFrame) -> float:
        asked.append(len(t))
        return mean(t)

    _, low, high = statistics.bootstrap(counted, table, "image", draws=500)
    assert len(asked) == 1 + 35  # so many multisets of four out of four
    values = table.value.to_numpy()[::2]
    assert (low, high) == pytest.approx((values.min(), values.max()))  # each is drawn once in 256 times


def test_exact_and_random_bootstraps_agree():
    table = noisy(6, 1, 1.0)
    exact = statistics.bootstrap(mean, table, "image", draws=500)  # 462 samples
    drawn = statistics.bootstrap(mean, pd.concat([table] * 2), "image", draws=461, seed=1)
    assert exact[1:] == pytest.approx(drawn[1:], abs=0.25)
    samples, weights = statistics._samples(6, 1000, 0)
    assert len(samples) == 462
    assert weights.sum() == pytest.approx(1)
    assert weights[0] == pytest.approx(6**-6)
    assert weights.max() == pytest.approx(720 * 6**-6)  # each unit once


def test_a_unit_drawn_twice_counts_twice():
    """Of units 1, 2 and 6, the sample 1, 1, 6 has the mean 8/3 of its units' values; merged, it would be 3.5."""
    table = pd.DataFrame({"image": [7, 8, 8, 9], "value": [1.0, 1.5, 2.5, 6.0]})

    def of_units(t: pd.DataFrame) -> float:
        return float(t.groupby("image").value.mean().mean())

    found = []
    statistics.bootstrap(lambda t: found.append(of_units(t)) or 0.0, table, "image", draws=10, least=3)
    means = sorted(
        np.mean(s)
        for s in [
            (1, 1, 1),
            (1, 1, 2),
            (1, 1, 6),
            (1, 2, 2),
            (1, 2, 6),
            (1, 6, 6),
            (2, 2, 2),
            (2, 2, 6),
            (2, 6, 6),
            (6, 6, 6),
        ]
    )
    assert sorted(found[1:]) == pytest.approx(means)
    assert found[0] == pytest.approx(3)


def test_units_with_names_and_repeated_rows_stay_whole():
    table = pd.DataFrame({"text": list("aabc"), "value": [1.0, 1.0, 2.0, 6.0], "kind": list("xyxy")})
    seen = []
    statistics.bootstrap(lambda t: seen.append(t) or 0.0, table, "text", draws=10, least=3)
    for drawn in seen[1:]:
        assert drawn.text.nunique() == 3
        assert drawn.index.is_unique
        for _, rows in drawn.groupby("text"):
            assert sorted(rows.value) in ([1.0, 1.0], [2.0], [6.0])
    assert list(table.text) == list("aabc")  # the table itself is left as it was


def test_where_many_samples_have_no_value_there_is_no_interval():
    """One image of eight decides: a third of all samples are without it, and nothing is known of these."""
    table = pd.DataFrame({"image": range(8), "x": range(8), "y": [0.0] * 7 + [1.0]})
    value, low, high = statistics.bootstrap(lambda t: statistics.rank_agreement(t, "x", "y"), table, "image")
    assert (value, low, high) == (1.0, -math.inf, math.inf)
    few = pd.DataFrame({"image": range(4), "x": range(4), "y": [1.0, 2, 4, 3]})  # 4 of 256 samples are of one image
    assert statistics.bootstrap(lambda t: statistics.rank_agreement(t, "x", "y"), few, "image")[1:] == (-1.0, 1.0)


def test_a_statistic_that_is_no_number_has_no_interval():
    claim = judge(noisy(10, 2, 1.0), lambda t: math.nan, "image", at_least=0.0, **WORDS)
    assert (claim.low, claim.high, claim.verdict) == (-math.inf, math.inf, "inconclusive")


@pytest.mark.parametrize(("p", "decision"), [(0.001, "holds"), (0.5, "inconclusive"), (math.nan, "inconclusive")])
def test_a_p_value_has_no_interval_and_proves_no_equality(p, decision):
    entry = {"a": {"unit": "image", "at_most": 0.01, **WORDS}}
    claim = claims.Judge(entry, "test", {})("a", noisy(10, 2, 1.0), lambda t: p, interval=False)
    assert (claim.low, claim.high, claim.verdict) == (-math.inf, math.inf, decision)
    assert claim.n == 10


def test_an_infinite_error_is_compared_and_not_lost():
    """Of ten images one attack ended without an image: the median stands, the mean is infinite."""
    table = noisy(10, 1, 1.0).assign(value=lambda t: t.value.where(t.image > 0, math.inf))
    median = judge(table, lambda t: float(t.value.median()), "image", at_most=5.0, **WORDS)
    assert (median.verdict, math.isfinite(median.high)) == ("holds", True)
    infinite = judge(table, mean, "image", at_most=5.0, **WORDS)
    assert (infinite.value, infinite.high, infinite.verdict) == (math.inf, math.inf, "inconclusive")


def test_a_table_of_claims_reads_from_the_left():
    claim = judge(noisy(10, 2, 0.1), mean, "image", at_least=-1.0, **WORDS)
    page = claims.show([claim]).data
    assert "text-align: left" in page
    assert "10 images" in page


def test_one_unit_gives_no_interval_and_no_verdict():
    claim = judge(noisy(1, 5, 1.0), mean, "image", at_least=-100.0, **WORDS)
    assert (claim.low, claim.high) == (-math.inf, math.inf)
    assert claim.verdict == "inconclusive"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.1, 1.9, "holds"), (0.5, 0.9, "fails"), (2.1, 3.0, "fails"), (0.9, 1.5, "inconclusive")],
)
def test_verdict(low, high, expected):
    assert statistics.verdict(low, high, at_least=1.0, at_most=2.0) == expected


def test_judge_states_its_threshold():
    claim = judge(noisy(10, 2, 0.1), mean, "image", at_least=-1.0, at_most=1.0, **WORDS)
    assert (claim.verdict, claim.n, claim.unit) == ("holds", 10, "image")
    assert claim.holds_when == "≥ -1 and ≤ 1"


def test_slope_of_a_power_law():
    x = np.geomspace(1e-3, 10, 7)
    assert statistics.log_slope(pd.DataFrame({"x": x, "y": 3 * x**-1.5}), "x", "y") == pytest.approx(-1.5)


def test_saved_claims_come_back_rounded(tmp_path):
    claim = judge(noisy(1, 3, 1.0), mean, "image", at_least=0.0, **WORDS)
    claims.save([claim], tmp_path / "claims.json")
    (loaded,) = claims.load(tmp_path / "claims.json")
    assert loaded.value == statistics.rounded(claim.value)
    assert (loaded.low, loaded.high, loaded.verdict) == (-math.inf, math.inf, "inconclusive")


def test_empty_table_is_refused():
    with pytest.raises(ValueError, match="no rows"):
        statistics.bootstrap(mean, pd.DataFrame({"image": [], "value": []}), "image")


def test_frame_shows_interval_and_verdict():
    claim = judge(noisy(10, 2, 0.1), mean, "image", at_least=-1.0, **WORDS)
    frame = claims.to_frame([claim])
    assert list(frame.verdict) == ["holds"]
    assert list(claims.to_frame([replace(claim, note="3 of 4 converged")]).statistic) == ["mean (3 of 4 converged)"]
    assert "[" in frame["value [95% interval]"][0]


def test_a_claim_may_hold_only_when():
    """Fails over the whole table, holds over the rows that meet a condition: the verdict names it."""
    table = pd.DataFrame({"image": np.tile(range(10), 2), "value": np.repeat([0.1, 5.0], 10)})
    small = table[table.value < 1]
    claim = judge(table, mean, "image", at_most=1.0, only=("the noise is small", small), **WORDS)
    assert (claim.verdict, claim.condition) == ("holds only when", "the noise is small")
    assert claim.sentence == "holds only when the noise is small"
    assert claim.within == pytest.approx((0.1, 0.1, 0.1))
    assert claim.value == pytest.approx(2.55)
    large = table[table.value > 1]
    claim = judge(table, mean, "image", at_most=3.0, only=("the noise is large", large), **WORDS)
    assert claim.sentence == "holds except when the noise is large"
    for at_most, verdict in ((9.0, "holds"), (0.01, "fails")):
        claim = judge(table, mean, "image", at_most=at_most, only=("the noise is small", small), **WORDS)
        assert claim.sentence == verdict


def test_a_condition_comes_back_from_the_file(tmp_path):
    table = noisy(10, 2, 0.1)
    claim = judge(table, mean, "image", at_least=9.0, only=("it is even", table[table.image % 2 == 0]), **WORDS)
    claims.save([claim], tmp_path / "claims.json")
    (loaded,) = claims.load(tmp_path / "claims.json")
    assert loaded.within == tuple(statistics.rounded(number) for number in claim.within)
    assert (loaded.condition, loaded.verdict) == ("it is even", "fails")


def test_order_and_power():
    x = np.geomspace(1e-3, 10, 7)
    table = pd.DataFrame({"x": x, "y": 3 * x**-1.5, "z": np.exp(x)})
    assert statistics.log_correlation(table, "x", "y") == pytest.approx(-1)
    assert statistics.rank_correlation(table, "x", "z") == pytest.approx(1)
    assert statistics.log_correlation(table, "x", "z") < 0.95  # monotone, and no power law


def test_few_units_have_no_interval():
    for images in (1, 2, 3):
        assert statistics.bootstrap(mean, noisy(images, 5, 1.0), "image")[1:] == (-math.inf, math.inf)
    assert math.isfinite(statistics.bootstrap(mean, noisy(4, 5, 1.0), "image")[1])


def test_spearman_is_the_librarys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=20).astype(float), rng.standard_normal(20)
    x[3] = np.inf
    assert statistics.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert math.isnan(statistics.spearman(np.ones(4), y[:4]))
    y[0] = np.nan
    assert math.isnan(statistics.spearman(x, y))


def test_rank_agreement_is_spearmans_over_the_largest_that_ties_allow():
    rng = np.random.default_rng(0)
    for _ in range(5):
        table = pd.DataFrame({"x": rng.integers(4, size=6), "y": rng.integers(3, size=6)}).astype(float)
        largest = {
            sign: sign * max(sign * spearmanr(table.x, order).statistic for order in set(permutations(table.y)))
            for sign in (1, -1)
        }
        plain = spearmanr(table.x, table.y).statistic
        assert statistics.rank_agreement(table, "x", "y") == pytest.approx(
            plain / abs(largest[1 if plain >= 0 else -1])
        )
    table = pd.DataFrame({"x": [1.0, 2, 3, 4], "y": [0.0, 0, 0, 5]})
    assert statistics.rank_agreement(table, "x", "y") == 1
    assert statistics.rank_agreement(table.assign(y=-table.y), "x", "y") == -1
    assert math.isnan(statistics.rank_agreement(table.assign(y=0.0), "x", "y"))
    plain = pd.DataFrame({"x": [1.0, 2, 3, 4], "y": [1.0, 3, 2, 4]})
    assert statistics.rank_agreement(plain, "x", "y") == pytest.approx(0.8)  # without ties, Spearman's


def test_orders_are_those_within_a_unit():
    floor, lost = 1e-10, np.inf
    errors = [1.0, 2, 3, 300, 200, 100, floor, floor, floor, floor, floor, 7, 1, lost, lost]
    table = pd.DataFrame({"image": np.repeat(range(5), 3), "x": [1, 2, 3] * 5, "y": errors})
    found = statistics.orders(table, "image", "x", "y").order.to_numpy()
    tied = 1.5 / 3**0.5  # ranks 1, 2, 3 with 1½, 1½, 3
    assert found == pytest.approx([1, -1, 0, tied, tied])
    assert statistics.mean_order(statistics.orders(table, "image", "x", "y")) == pytest.approx(2 * tied / 5)
    missing = table.assign(y=table.y.mask(table.image == 4))
    assert math.isnan(statistics.mean_order(statistics.orders(missing, "image", "x", "y")))
    assert statistics.orders(table.assign(x=1), "image", "x", "y").order.isna().all()  # nothing was compared


def test_a_rank_correlation_may_ask_for_more_units():
    table = noisy(5, 2, 0.1)
    assert judge(table, mean, "image", at_least=-9.0, **WORDS).verdict == "holds"
    assert judge(table, mean, "image", at_least=-9.0, least=6, **WORDS).verdict == "inconclusive"


def test_an_interval_of_no_width_is_none():
    assert claims.interval((0.99964, 0.9991, 1.0)) == "0.9996 [0.9991, 1]"
    assert claims.interval((1.0, 1.0, 1.0)) == claims.interval((1.0, -math.inf, math.inf)) == "1"


def test_no_verdict_hangs_on_a_last_digit():
    table = pd.DataFrame({"image": range(9), "value": 0.1 + 0.7 - 1e-16})  # 0.7999999999999999
    assert judge(table, mean, "image", at_least=0.8, **WORDS).verdict == "holds"


def test_inconclusive_is_not_only_when():
    """What was not shown to fail elsewhere does not hold only under the condition."""
    table = pd.DataFrame({"image": range(10), "value": [0.1] * 6 + [2.5] * 4})
    small = table[table.value < 1]
    claim = judge(table, mean, "image", at_most=1.0, only=("the noise is small", small), **WORDS)
    assert claim.verdict == "inconclusive"


def test_worst_and_convergence():
    table = pd.DataFrame(
        {
            "size": [1, 1, 1, 2, 2, 2],
            "miss": [0.1, 0.2, 9, 0.5, 0.3, 0.4],
            "converged": [True] * 4 + [False, None],
            "failed": [False] * 5 + [True],
        }
    )
    assert statistics.worst(table, "size", "miss") == 0.4
    assert statistics.worst(table.assign(kind=list("aabbba")), ["size", "kind"], "miss") == 9
    for values in ([np.nan, 1.0], [1.0, np.nan]):
        assert math.isnan(statistics.worst(pd.DataFrame({"size": [1, 2], "miss": values}), "size", "miss"))
    assert statistics.convergence(table) == "4 of 6 attacks converged, 1 failed"
    assert statistics.convergence(table[:4]) == "4 of 4 attacks converged"


def test_words_of_a_claim_are_templates_of_thresholds_and_call():
    """Thresholds by name, defaults of the file, an attacker by its name, and what the call replaces."""
    entries = {
        "defaults": {"unit": "image", "source": "Eq. {eq}", "attacker": "gauss-newton", "note": "{n} rows"},
        "small": {"statement": "It is below {cut:g}{more}.", "statistic": "mean", "at_most": "cut"},
    }
    judged = claims.Judge(entries, "noise-mnist", {"cut": 0.5})
    found = judged("small", noisy(10, 2, 0.01), mean, suffix="-box", more=", too", eq=4, n=20)
    assert (found.id, found.statement, found.source) == ("noise-mnist-small-box", "It is below 0.5, too.", "Eq. 4")
    assert (found.attacker, found.note) == (ATTACKERS["gauss-newton"].knows, "20 rows")
    assert (found.holds_when, found.verdict) == ("≤ 0.5", "holds")
    assert judged("small", noisy(10, 2, 0.01), mean, more="", eq=4, n=0, at_most=-1).verdict == "fails"
    with pytest.raises(ValueError, match="did you mean 'small'"):
        judged("smal", noisy(10, 2, 0.01), mean)


def test_ranks_and_spearman_along_an_axis():
    x, y = np.random.default_rng(0).integers(0, 5, (2, 9, 3, 4))
    assert statistics.spearman(x, y).shape == (3, 4)
    assert statistics.spearman(x, y)[1, 2] == pytest.approx(spearmanr(x[:, 1, 2], y[:, 1, 2]).statistic)
    assert list(statistics.ranks(np.array([3.0, 1.0, 3.0, np.nan]))) == pytest.approx(
        [2.5, 1, 2.5, np.nan], nan_ok=True
    )


@pytest.mark.parametrize("path", sorted(claims.WORDS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_file_of_words_is_whole(path):
    """Each claim of it has every text, a unit and a bound, and attackers that are registered or described."""
    entries = tomllib.loads(path.read_text())
    defaults = entries.pop("defaults", {})
    for name, entry in entries.items():
        entry = defaults | entry
        assert {"statement", "statistic", "source", "unit"} <= entry.keys(), name
        assert entry["statement"].endswith("."), name


@pytest.mark.parametrize(
    ("entry", "words", "problem"),
    [
        ({"at_mots": 1.0}, {}, "did you mean 'at_most'"),
        ({"at_most": 1.0, "least": "rankd"}, {}, "did you mean 'ranked'"),
        ({"at_most": 1.0, "attacker": "gaus-newton"}, {}, "did you mean 'gauss-newton'"),
        ({"at_most": 1.0}, {"noet": "3"}, "word='noet' is unknown: did you mean 'note'"),
        ({}, {}, "no threshold"),
        ({"at_most": 1.0}, {"within": noisy(3, 1, 0.1)}, "no condition"),
    ],
)
def test_what_is_misspelt_in_a_claim_is_refused(entry, words, problem):
    """Otherwise a claim without a threshold would hold."""
    with pytest.raises(ValueError, match=problem):
        claims.Judge({"a": {**WORDS, "unit": "image", **entry}}, "test", {})("a", noisy(8, 1, 0.1), mean, **words)
