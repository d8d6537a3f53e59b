"""Estimates: each interval against its theorem, p-values and sample sizes against the interval."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from i2f.paper import estimates
from i2f.paper.estimates import Estimate


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [8, 20])
def test_a_shares_interval_covers_every_truth_at_least_as_often_as_it_says(n):
    ends = [estimates.share([True] * k + [False] * (n - k)).interval for k in range(n + 1)]
    for truth in np.linspace(0, 1, 101):
        covered = sum(stats.binom.pmf(k, n, truth) for k, (low, high) in enumerate(ends) if low <= truth <= high)
        assert covered >= 0.95 - 1e-12


def test_a_share_of_none_or_all_has_an_interval():
    assert estimates.share([True] * 150).interval == pytest.approx((0.025 ** (1 / 150), 1))
    assert estimates.share([False] * 150).interval == pytest.approx((0, 1 - 0.025 ** (1 / 150)))


@pytest.mark.parametrize("n", [8, 20, 31])
def test_a_medians_interval_covers_as_order_statistics_do(n):
    """Of values 0 … n − 1, the interval [j, n − 1 − j] covers unless at most j of n coins show heads, or tails."""
    low, high = estimates.median(range(n)).interval
    missed = 2 * stats.binom.cdf(low, n, 0.5)
    assert high == n - 1 - low
    assert missed <= 0.05 < 2 * stats.binom.cdf(low + 1, n, 0.5)


def test_a_censored_unit_is_infinite_and_counts():
    found = estimates.median([1.0] * 3 + [2.0] * 20 + [math.inf] * 7)
    assert found.value == 2.0
    assert found.interval == (2.0, 2.0)
    assert estimates.median([1.0] * 5 + [math.inf] * 5).interval == (1.0, math.inf)
    assert estimates.median([1.0, 2.0]).interval == (-math.inf, math.inf)  # too few for 95%


def test_means_are_the_librarys():
    values = rng().normal(1, 2, 12)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimates.mean(values).interval == pytest.approx((expected.low, expected.high))
    ratios = np.exp(values)
    assert estimates.geometric_mean(ratios).interval == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert estimates.geometric_mean(ratios).value == pytest.approx(stats.gmean(ratios))
    other = rng(1).normal(0, 5, 9)
    difference = stats.ttest_ind(values, other, equal_var=False).confidence_interval(0.9)
    found = estimates.welch(values, other)
    assert found.at(0.9) == pytest.approx((difference.low, difference.high))
    assert (found.value, found.n) == (pytest.approx(values.mean() - other.mean()), 9)


def test_a_value_that_is_not_finite_leaves_no_interval():
    assert estimates.geometric_mean([1.0, 2.0, math.inf] * 4).interval == (0.0, math.inf)
    assert estimates.geometric_mean([1.0, 2.0, 0.0] * 4).interval == (0.0, math.inf)
    assert estimates.mean([1.0]).interval == (-math.inf, math.inf)
    assert estimates.verdict(estimates.mean([math.inf] * 9), 0, math.inf) == "inconclusive"


def test_a_rank_correlations_interval_covers():
    """Pairs of normal variables with correlation r have Spearman's ρ = 6/π asin(r/2)."""
    r, draws = 0.8, rng()
    truth, covered = 6 / math.pi * math.asin(r / 2), 0
    for _ in range(400):
        groups = []
        for _ in range(3):
            x, other = draws.normal(size=(2, 20))
            groups.append((x, r * x + math.sqrt(1 - r * r) * other))
        low, high = estimates.rank_correlation(groups).interval
        covered += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_groups_of_the_same_units_average_no_error_away():
    groups = [(np.arange(20), rng(k).permutation(20) + 2.0 * np.arange(20)) for k in range(4)]
    apart, again = estimates.rank_correlation(groups), estimates.rank_correlation(groups, repeated=True)
    assert (apart.n, again.n) == (80, 20)
    assert apart.value == again.value

    def width(found):
        return np.diff(np.arctanh(found.interval))

    assert width(again) == pytest.approx(2 * width(apart))
    alone = estimates.rank_correlation(groups[:1])
    rho, error = alone.value, math.sqrt((1 + alone.value**2 / 2) / 17)
    assert alone.interval == pytest.approx(tuple(np.tanh(np.arctanh(rho) + 1.959964 * error * np.array([-1, 1]))))


def test_too_few_for_an_order_have_no_interval():
    assert estimates.rank_correlation([(range(4), range(4))]).interval == (-1, 1)
    assert estimates.rank_correlation([(range(9), [1] * 9)]).interval == (-1, 1)  # all ties


def test_a_perfect_order_is_no_more_certain_than_one_with_two_neighbours_exchanged():
    nearly = estimates.rank_correlation([(range(9), [1, 0, *range(2, 9)])])
    perfect = estimates.rank_correlation([(range(9), range(9))])
    assert nearly.value < perfect.value == 1.0
    assert perfect.interval == pytest.approx((nearly.interval[0], 1.0), abs=0.01)
    reverse = estimates.rank_correlation([(range(9), range(9, 0, -1))])
    assert reverse.interval == pytest.approx((-1.0, -perfect.interval[0]))


def test_an_effects_interval_inverts_the_noncentral_f():
    labels = np.repeat(np.arange(5), 12)
    values = rng().normal(size=60) + 0.5 * labels
    found = estimates.effect(values, labels)
    f = stats.f_oneway(*(values[labels == k] for k in range(5))).statistic
    assert found.value == pytest.approx(f * 4 / (f * 4 + 55))
    for share, tail in zip(found.interval, (0.975, 0.025), strict=True):
        assert stats.ncf.cdf(f, 4, 55, share / (1 - share) * 60) == pytest.approx(tail, rel=1e-6)
    nothing = estimates.effect(rng(3).normal(size=60), labels)
    assert nothing.interval[0] == 0.0


def test_permutations_are_all_of_them_in_the_limit():
    labels, values = np.array([0, 0, 0, 1, 1, 1]), np.array([1.0, 2.5, 2.0, 2.2, 4.0, 5.5])
    shares = [estimates.explained(values[list(order)], labels) for order in itertools.permutations(range(6))]
    exact = np.mean([share >= estimates.explained(values, labels) - 1e-12 for share in shares])
    assert estimates.permutation(values, labels, draws=5000) == pytest.approx(exact, abs=0.015)


def test_a_permutations_p_is_never_zero():
    labels = np.repeat([0, 1], 20)
    assert estimates.permutation(labels + 0.001 * rng().normal(size=40), labels, draws=99) == 0.01  # (1 + 0)/(1 + 99)


def test_seeds_are_centred_one_by_one_and_units_stay_whole():
    labels = np.repeat([0, 1], 6)
    once = rng().normal(size=12) + labels
    twice = np.stack([once, once + 100], axis=1)  # the same under other weights, at another level
    assert estimates.explained(twice, labels) == pytest.approx(estimates.explained(once, labels))
    assert estimates.permutation(twice, labels, 500) == estimates.permutation(once, labels, 500)


@pytest.mark.parametrize(
    ("estimate", "low", "high", "expected"),
    [
        (estimates.share([True] * 399 + [False]), 0.98, 1, "holds"),
        (estimates.share([True] * 12 + [False] * 8), 0.8, 1, "inconclusive"),
        (estimates.share([True] * 2 + [False] * 18), 0.8, 1, "fails"),
        (estimates.mean([1.0, 1.1, 0.9] * 4), 0.8, 1.2, "holds"),
        (estimates.mean([1.0, 1.1, 0.9] * 4), 1.02, 1.2, "inconclusive"),
        (estimates.mean([1.0, 1.1, 0.9]), 0.0, 2.0, "inconclusive"),  # three units
        (estimates.mean([1.0, 1.1, 0.9] * 4), 1.5, math.inf, "fails"),
    ],
)
def test_a_p_value_is_where_the_interval_stops_deciding(estimate, low, high, expected):
    assert estimates.verdict(estimate, low, high) == expected
    p = estimates.p_value(estimate, low, high)
    assert (p < 0.05) == (expected != "inconclusive")
    if estimates.SMALLEST < p < 1:
        assert estimates.verdict(estimate, low, high, 1 - 1.01 * p) != "inconclusive"
        assert estimates.verdict(estimate, low, high, 1 - 0.99 * p) == "inconclusive"
    if estimate.n < estimates.LEAST:
        assert p == 1


def test_the_p_of_a_mean_against_one_threshold_is_the_t_tests():
    values = rng().normal(0.4, 1, 15)
    expected = stats.ttest_1samp(values, 0).pvalue
    assert estimates.p_value(estimates.mean(values), 0, math.inf) == pytest.approx(expected, rel=1e-6)


def test_so_many_units_would_decide():
    values = np.tile([0.0, 1.0, 0.4], 4)
    found = estimates.mean(values)
    n = estimates.needed(found, 0.4, math.inf)
    assert n > 12
    assert estimates.verdict(found, 0.4, math.inf) == "inconclusive"
    enough = estimates.mean(np.tile([0.0, 1.0, 0.4], math.ceil(n / 3)))
    assert estimates.verdict(enough, 0.4, math.inf) == "holds"
    assert estimates.needed(found, found.value, math.inf) == math.inf
    both = Estimate(1.0, lambda _: (0.9, 1.2), 10, "")
    assert estimates.needed(both, 0.95, 1.1) == math.ceil(10 * 2.0**2 - 1e-9)
    assert estimates.needed(Estimate(0.9, lambda _: (0.8, 1.0), 10, ""), 0.95, 1.1) == math.ceil(10 * 2.0**2 - 1e-9)


def mean_of(units):
    return units.mean(1)


def test_a_resampled_mean_is_the_librarys():
    values = rng().exponential(size=25)
    expected = stats.bootstrap([values], np.mean, rng=rng(1), n_resamples=4000).confidence_interval
    found = estimates.resampled(mean_of, values, draws=4000)
    assert found.interval == pytest.approx((expected.low, expected.high), abs=0.06)
    assert found.at(0.5)[0] > found.interval[0]
    assert (found.value, found.n) == (pytest.approx(values.mean()), 25)


def test_a_resampled_interval_is_open_beyond_what_its_draws_can_say():
    values = np.random.default_rng(0).gamma(1.0, size=40)
    found = estimates.resampled(mean_of, values, draws=1000)
    assert np.isfinite(found.at(0.99)).all()
    assert found.at(0.999) == found.at(1 - 1e-16) == (-math.inf, math.inf)
    assert estimates.p_value(found, 0.0, math.inf) == pytest.approx(0.002)


def test_a_resampled_rank_correlation_is_near_fishers():
    x, other = rng().normal(size=(2, 80))
    pairs = np.stack([x, x + other], axis=1)
    found = estimates.resampled(estimates.ordered, pairs, draws=2000)
    assert found.interval == pytest.approx(estimates.rank_correlation([pairs.T]).interval, abs=0.06)
    assert found.value == pytest.approx(stats.spearmanr(*pairs.T).statistic)
    ties = np.round(pairs)
    assert estimates.ordered(ties[None])[0] == pytest.approx(stats.spearmanr(*ties.T).statistic)


def test_units_that_all_agree_have_an_interval_of_no_width():
    assert estimates.resampled(mean_of, np.ones(9), draws=100).interval == (1, 1)
    x = np.arange(9.0)
    assert estimates.resampled(estimates.ordered, np.stack([x, -x], axis=1), draws=100).interval == (-1, -1)


def test_holm_by_hand():
    assert estimates.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert estimates.holm([0.9, 0.8]) == [1.0, 1.0]
    assert estimates.holm([]) == []
