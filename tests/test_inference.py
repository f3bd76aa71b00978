"""Luck measured and taken off: every test here is either an independent implementation, a fact, or a simulation with a known truth."""

import math
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, false_discovery_control, rankdata

from mltrading.core.errors import DataError, ParameterError
from mltrading.validation import inference, many, metrics, overfitting, relative


def autoregressive(rng, n, phi, sharpe=0.0):
    """Returns that remember the bar before, with a true annual Sharpe ratio."""
    x = rng.normal(size=n + 100) * np.sqrt(1 - phi**2)
    for i in range(1, n + 100):
        x[i] += phi * x[i - 1]
    return 0.01 * (x[100:] + sharpe / np.sqrt(252))


def same_resamples(n, block, n_boot, seed):
    """The resamples that a function draws, for another program to use."""
    drawn = np.empty((n_boot, n), np.int64)
    inference.redraw(lambda positions, places: drawn.__setitem__(places, positions), n, block, n_boot, seed)
    return drawn


class Drawn:
    """Resamples for arch: positions, or the rows that they name."""

    def __init__(self, positions, of=None):
        self.positions, self.of = positions, of

    def bootstrap(self, reps):
        """One resample after the other."""
        assert reps == len(self.positions)
        for k in self.positions:
            yield (k if self.of is None else self.of[k],), {}


# ---------------------------------------------------------------- resamples


@pytest.mark.parametrize("cores", [1, 3])
def test_the_number_of_cores_changes_no_bit(monkeypatch, cores):
    r = 0.01 * np.random.default_rng(0).standard_t(4, (300, 70))

    def everything():
        return [inference.bootstrap_metrics(r[:, 0], 1, n_boot=400).to_numpy().tobytes(), many.superior_ability(r, 1, n_boot=400),
                many.model_confidence_set(r[:, :9], 1, n_boot=400).to_numpy().tobytes(), inference.paired_difference(r[:, 0], r[:, 1], 1, n_boot=400)]

    here = everything()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert everything() == here


@pytest.mark.parametrize("phi", [0.0, 0.3])
def test_intervals_hold_the_truth(phi):
    cover(phi, rounds=120, bars=756)


@pytest.mark.slow
@pytest.mark.parametrize("phi", [0.0, 0.2, 0.4])
def test_intervals_hold_the_truth_at_length(phi):
    cover(phi, rounds=400, bars=2520)


def cover(phi, rounds, bars):
    """Of 95 % intervals, between 90 % (blocks break memory at their ends) and 98 % hold the truth, give or take the luck of the rounds."""
    rng, inside = np.random.default_rng(8), 0
    for i in range(rounds):
        low, high = inference.bootstrap_intervals(autoregressive(rng, bars, phi, 0.6), i, ["sharpe_annual"], 300).loc[0, ["low", "high"]]
        inside += low <= 0.6 <= high
    assert binom.ppf(0.005, rounds, 0.90) <= inside <= binom.ppf(0.995, rounds, 0.98)


# ---------------------------------------------------------------- deflated Sharpe ratio


def all_deflated(block):
    """DSR of each column among the trials in `block`."""
    sharpes = block.mean(axis=0) / block.std(axis=0, ddof=1)
    variance = sharpes.var(ddof=1)
    return np.array([inference.deflated_sharpe(s, len(x), metrics.skew(x), metrics.kurtosis(x), len(sharpes), variance) for s, x in zip(sharpes, block.T, strict=True)]), int(np.argmax(sharpes))


def test_of_200_worthless_strategies_hardly_one_passes():
    rng, passed = np.random.default_rng(1), 0
    for _ in range(5):
        dsr, _ = all_deflated(0.01 * rng.standard_t(4, (1260, 200)))
        passed += (dsr > 0.95).sum()
    assert passed <= binom.ppf(0.99, 1000, 0.05)


@pytest.mark.parametrize("draw", ["normal", "fat tails", "one market"])
def test_the_best_of_200_worthless_strategies_does_not_pass(draw):
    rng, passed, alone = np.random.default_rng(2), 0, 0
    for _ in range(100):
        block = 0.01 * (rng.standard_t(4, (252, 200)) if draw == "fat tails" else rng.normal(size=(252, 200)))
        block += 0.01 * rng.normal(size=(252, 1)) if draw == "one market" else 0.0
        sharpes = block.mean(axis=0) / block.std(axis=0, ddof=1)
        x = block[:, i := int(np.argmax(sharpes))]
        shape = metrics.skew(x), metrics.kurtosis(x)
        passed += inference.deflated_sharpe(sharpes[i], 252, *shape, 200, sharpes.var(ddof=1)) > 0.95
        alone += inference.probabilistic_sharpe(sharpes[i], 252, *shape) > 0.95
    assert passed <= binom.ppf(0.99, 100, 0.05)
    assert alone > (50 if draw == "one market" else 95)


def test_a_planted_signal_passes():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(10):
        block = 0.01 * rng.normal(size=(2520, 200))
        block[:, 7] = (block[:, 7] - block[:, 7].mean()) / block[:, 7].std(ddof=1) * 0.01 + 0.01 * 1.5 / np.sqrt(252)
        dsr, best = all_deflated(block)
        assert best == 7
        found.append(dsr[7])
    assert np.median(found) > 0.95
    assert sum(d > 0.95 for d in found) >= 8


# ---------------------------------------------------------------- autocorrelation


@pytest.mark.parametrize("lags", [0, 1, 7, 30])
def test_long_run_variance_equals_statsmodels(lags):
    sm = pytest.importorskip("statsmodels.api")
    from statsmodels.stats.sandwich_covariance import S_hac_simple

    x = autoregressive(np.random.default_rng(lags), 800, 0.3, 1.0)
    fit = sm.OLS(x, np.ones(800)).fit(cov_type="HAC", cov_kwds={"maxlags": lags})
    found = inference.robust_mean(x, 252, lags)
    assert found["error"] == pytest.approx(252 * fit.bse[0], rel=1e-10)
    assert found["p_value"] == pytest.approx(fit.pvalues[0] / 2 if x.mean() > 0 else 1 - fit.pvalues[0] / 2, rel=1e-9)
    mean, sd = x.mean(), x.std()
    gradient = np.array([1 / sd, -mean / (2 * sd**3)])
    cov = S_hac_simple(np.column_stack([x - mean, (x - mean) ** 2 - sd**2]), lags)
    assert inference.robust_sharpe(x, 252, lags)["error"] == pytest.approx(np.sqrt(252 * gradient @ cov @ gradient) / 800, rel=1e-9)


def test_automatic_lags_by_hand():
    x = autoregressive(np.random.default_rng(5), 1000, 0.5)
    d = x - x.mean()
    cov = [(d[k:] * d[: 1000 - k]).mean() * (1000 - k) / 1000 for k in range(int(4 * 10 ** (2 / 9)) + 1)]
    s0, s1 = cov[0] + 2 * sum(cov[1:]), 2 * sum(k * c for k, c in enumerate(cov))
    assert inference.automatic_lags(x) == math.floor(1.1447 * ((s1 / s0) ** 2) ** (1 / 3) * 1000 ** (1 / 3))


def test_a_robust_test_keeps_its_level_where_a_naive_one_does_not():
    rng, naive, robust = np.random.default_rng(6), 0, 0
    for _ in range(400):
        x = autoregressive(rng, 1008, 0.3)
        naive += inference.robust_sharpe(x, lags=0)["p_value"] < 0.05
        robust += inference.robust_sharpe(x)["p_value"] < 0.05
    assert naive > binom.ppf(0.999, 400, 0.05)
    assert robust <= binom.ppf(0.995, 400, 0.07)  # long-run variances err a little on the low side


# ---------------------------------------------------------------- many at once


@pytest.mark.parametrize("seed", range(3))
def test_superior_ability_equals_arch(seed):
    bootstrap = pytest.importorskip("arch.bootstrap")
    rng = np.random.default_rng(seed)
    values = pd.DataFrame(0.01 * rng.normal(size=(260, 70)) + np.linspace(-0.004, 0.0007, 70), columns=[f"m{i}" for i in range(70)])
    base = 0.01 * rng.normal(size=260)
    theirs = bootstrap.SPA(-base, -values.to_numpy(), block_size=7, reps=200)
    theirs.bootstrap = Drawn(same_resamples(260, 7, 200, seed), values.to_numpy() - base[:, None])
    theirs.compute()
    mine = many.superior_ability(values, seed, base, 200, 7, studentized=False)
    np.testing.assert_allclose([(mine[k] * 201 - 1) / 200 for k in ("p_lower", "p_value", "p_upper")], theirs.pvalues, atol=1e-10)
    assert many.reality_check(values, seed, base, 200, 7)["p_value"] == mine["p_upper"]
    for size in (4 / 199, 40 / 199, 119 / 199):  # at these, arch's critical value is a resampled value and no interpolation
        step = bootstrap.StepM(-base, -values.to_numpy(), size=size, block_size=7, reps=200)
        step.spa.bootstrap = Drawn(same_resamples(260, 7, 200, seed), values.to_numpy() - base[:, None])
        step.compute()
        named = many.stepwise_superior(values, seed, base, 200, 7, studentized=False)
        assert set(named["trial"][(named["p_value"] * 201 - 1) / 200 < size]) == {f"m{i}" for i in step.superior_models}


def test_the_studentized_statistic_by_hand():
    rng = np.random.default_rng(4)
    x = 0.01 * rng.normal(size=(150, 6)) * np.arange(1, 7) + np.array([-0.02, 0.0, 0.001, -0.001, 0.002, 0.0])
    drawn, n = same_resamples(150, 5, 400, 9), 150
    omega = []
    for column in (x - x.mean(axis=0)).T:
        lags = np.arange(1, n)
        kappa = (1 - lags / n) * 0.8**lags + lags / n * 0.8 ** (n - lags)
        omega.append(math.sqrt((column @ column + 2 * sum(k * (column[i:] @ column[:-i]) for i, k in zip(lags, kappa, strict=True))) / n))
    omega = np.array(omega)
    statistic = max(0, (math.sqrt(n) * x.mean(axis=0) / omega).max())
    centre = np.where(x.mean(axis=0) >= -omega * math.sqrt(2 * math.log(math.log(n)) / n), x.mean(axis=0), 0)
    simulated = [max(0, (math.sqrt(n) * (x[k].mean(axis=0) - centre) / omega).max()) for k in drawn]
    found = many.superior_ability(x, 9, n_boot=400, block=5)
    assert found["statistic"] == pytest.approx(statistic, rel=1e-10)
    assert found["p_value"] == pytest.approx((1 + sum(s >= statistic for s in simulated)) / 401, abs=1e-12)
    assert found["p_lower"] <= found["p_value"] <= found["p_upper"]


@pytest.mark.parametrize(("statistic", "method"), [("range", "R"), ("max", "max")])
@pytest.mark.parametrize("seed", range(3))
def test_the_model_confidence_set_equals_arch(statistic, method, seed):
    bootstrap = pytest.importorskip("arch.bootstrap")
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=(200, 1)) + rng.normal(size=(200, 15)) * rng.uniform(0.5, 2, 15) + np.linspace(0, 0.6, 15)
    theirs = bootstrap.MCS(losses, size=0.1, reps=250, block_size=6, method=method)
    theirs.bootstrap = Drawn(same_resamples(200, 6, 250, seed))
    theirs.compute()
    mine = many.model_confidence_set(-losses, seed, statistic, 250, 6)[::-1]
    assert list(mine["trial"]) == list(theirs.pvalues.index)
    np.testing.assert_allclose((mine["p_value"].iloc[:-1] * 251 - 1) / 250, theirs.pvalues["Pvalue"].iloc[:-1], atol=1e-10)


def false_alarms(rounds, n_trials, phi, edge=0.0):
    """Alarms of the test of superior ability over samples of strategies that share a market."""
    rng, alarms = np.random.default_rng(7), 0
    for i in range(rounds):
        x = np.column_stack([autoregressive(rng, 504, phi) for _ in range(n_trials + 1)])
        x = (x[:, 1:] + x[:, :1]) / np.sqrt(2)
        x[:, 0] += edge * 0.01 / np.sqrt(252)
        alarms += many.superior_ability(x, i, n_boot=200)["p_value"] < 0.05
    return alarms


def test_superior_ability_has_size_and_power():
    assert false_alarms(100, 10, 0.0) <= binom.ppf(0.995, 100, 0.05)
    assert false_alarms(40, 10, 0.0, edge=3.5) >= 32


@pytest.mark.slow
@pytest.mark.parametrize("phi", [0.0, 0.2])
def test_superior_ability_has_size_at_length(phi):
    assert false_alarms(400, 30, phi) <= binom.ppf(0.995, 400, 0.05 if phi == 0 else 0.08)


def test_stepwise_seldom_names_a_worthless_one_and_the_set_seldom_loses_the_best():
    rng, false, lost = np.random.default_rng(9), 0, 0
    for i in range(100):
        x = 0.01 * rng.normal(size=(504, 12))
        x[:, :2] += 0.003
        named = many.stepwise_superior(x, i, n_boot=200, block=2)
        false += (named["trial"][named["p_value"] < 0.05] > 1).any()
        x[:, 0] += 0.0002
        kept = many.model_confidence_set(x, i, n_boot=200, block=2)
        lost += 0 not in set(kept["trial"][kept["p_value"] >= 0.05])
    assert false <= binom.ppf(0.995, 100, 0.05)
    assert lost <= binom.ppf(0.995, 100, 0.05)


def test_sharpe_terms_are_what_a_bar_adds():
    """Their mean is the ratio, their spread that of Ledoit and Wolf's delta method on the first two moments, and leverage changes nothing."""
    r = 0.0005 + 0.01 * np.random.default_rng(13).standard_t(5, (1500, 2))
    terms = np.column_stack([inference.sharpe_terms(r[:, i]) for i in (0, 1)])
    assert terms.mean(axis=0) == pytest.approx([metrics.sharpe_annual(r[:, i]) for i in (0, 1)], rel=1e-12)
    assert inference.sharpe_terms(3 * r[:, 0]).to_numpy() == pytest.approx(terms[:, 0], rel=1e-9)
    (m1, m2), (s1, s2) = r.mean(axis=0), (r**2).mean(axis=0)
    gradient = np.array([s1 / (s1 - m1**2) ** 1.5, -s2 / (s2 - m2**2) ** 1.5, -m1 / (2 * (s1 - m1**2) ** 1.5), m2 / (2 * (s2 - m2**2) ** 1.5)])
    error = np.sqrt(252 * gradient @ np.cov(np.hstack([r, r**2]).T, ddof=0) @ gradient)
    assert (terms[:, 0] - terms[:, 1]).std() == pytest.approx(error, rel=1e-9)


def test_copies_of_one_strategy_count_as_one():
    rng = np.random.default_rng(10)
    one = autoregressive(rng, 1008, 0.0, 1.4)[:, None]
    copies = one + 1e-5 * rng.normal(size=(1008, 200))
    alone = inference.robust_sharpe(one[:, 0])["p_value"]
    assert many.superior_ability(copies, 0, n_boot=2000)["p_value"] == pytest.approx(alone, abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 40])
def test_discoveries_equal_their_peers(n):
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(n).uniform(size=n) ** 3
    for any_dependence, theirs, ours in ((False, "fdr_bh", "bh"), (True, "fdr_by", "by")):
        found = many.discoveries(p, 0.1, any_dependence)
        np.testing.assert_allclose(found["q_value"], multitest.multipletests(p, 0.1, theirs)[1], rtol=1e-12)
        np.testing.assert_allclose(found["q_value"], false_discovery_control(p, method=ours), rtol=0)


# ---------------------------------------------------------------- overfitting


def by_the_paper(returns, blocks, ratio=True):
    """Combinatorially symmetric cross-validation without any short cut: chosen trial, past, future, logit."""
    edges = np.append(np.arange(blocks) * len(returns) // blocks, len(returns))
    parts, rows = [returns[a:b] for a, b in pairwise(edges)], []

    def performance(x):
        return x.mean(axis=0) / x.std(axis=0, ddof=1) if ratio else x.mean(axis=0)

    for half in combinations(range(blocks), blocks // 2):
        past = performance(np.concatenate([parts[s] for s in half]))
        future = performance(np.concatenate([parts[s] for s in range(blocks) if s not in half]))
        omega = rankdata(future)[np.argmax(past)] / (len(future) + 1)
        rows.append((np.argmax(past), past.max(), future[np.argmax(past)], math.log(omega / (1 - omega))))
    return np.array(rows)


@pytest.mark.parametrize(("bars", "trials", "blocks"), [(100, 2, 2), (97, 5, 4), (250, 30, 8), (331, 11, 10)])
@pytest.mark.parametrize("metric", ["sharpe", "mean"])
def test_overfitting_equals_the_paper(bars, trials, blocks, metric):
    rng = np.random.default_rng(bars)
    returns = 0.01 * rng.standard_t(4, (bars, trials)) * rng.uniform(0.01, 10, trials) + rng.normal(size=trials) * 1e-3
    mine, theirs = overfitting.backtest_overfitting(returns, blocks, metric, 1), by_the_paper(returns, blocks, metric == "sharpe")
    np.testing.assert_allclose(mine.ways.to_numpy(float), theirs, rtol=1e-9, atol=1e-12)
    assert mine.pbo == (theirs[:, 3] <= 0).mean()
    assert mine.prob_loss == (theirs[:, 2] < 0).mean()
    np.testing.assert_allclose([mine.slope, mine.intercept], np.polyfit(theirs[:, 1], theirs[:, 2], 1), rtol=1e-7, atol=1e-12)


def test_overfitting_is_stable_where_means_are_large():
    returns = 1e-6 * np.random.default_rng(0).normal(size=(400, 20)) + 3.0
    np.testing.assert_allclose(overfitting.backtest_overfitting(returns, 6, bars_per_year=1).ways.to_numpy(float), by_the_paper(returns, 6), rtol=1e-6)


def test_overfitting_does_not_depend_on_leverage_or_order():
    rng = np.random.default_rng(1)
    returns = 0.01 * rng.normal(size=(500, 25))
    one = overfitting.backtest_overfitting(returns, 10)
    order = rng.permutation(25)
    other = overfitting.backtest_overfitting((returns * rng.uniform(0.1, 3, 25))[:, order], 10)
    assert one.pbo == other.pbo
    np.testing.assert_array_equal(order[other.ways["trial"].astype(int)], one.ways["trial"])


def test_overfitting_knows_noise_from_an_edge():
    rng = np.random.default_rng(2)
    noise = np.array([overfitting.backtest_overfitting(rng.normal(size=(252, 40)), 8).pbo for _ in range(150)])
    assert abs(noise.mean() - 0.5) < 3 * noise.std() / np.sqrt(150)
    edge = 0.01 * rng.normal(size=(2520, 200))
    edge[:, 3] += 2.5 * 0.01 / np.sqrt(252)
    assert overfitting.backtest_overfitting(edge).pbo < 0.02
    level = 0.01 * rng.normal(size=(800, 30))
    assert overfitting.backtest_overfitting(level - level.mean(axis=0), 8, "mean").pbo == 1.0


def test_a_trial_that_rests_in_a_half_has_no_ratio_there():
    returns = 0.01 * np.random.default_rng(3).normal(size=(80, 3))
    returns[:40, 0] = 0.0
    ways = overfitting.backtest_overfitting(returns, 2).ways
    assert np.isfinite(ways[["past", "future", "logit"]].to_numpy()).all()


# ---------------------------------------------------------------- errors

GOOD = 0.01 * np.random.default_rng(0).normal(size=(60, 4))
BAD = {
    "NaN": np.where(np.arange(4) == 2, np.nan, GOOD), "infinity": np.where(np.arange(4) == 2, np.inf, GOOD), "one bar": GOOD[:1], "no bar": GOOD[:0], "one trial": GOOD[:, :1],
    "a series": GOOD[:, 0], "zero variance": GOOD * (np.arange(4) != 1),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("test", [lambda x: many.superior_ability(x, 0), lambda x: many.reality_check(x, 0), lambda x: many.stepwise_superior(x, 0), lambda x: many.model_confidence_set(x, 0), overfitting.backtest_overfitting])
def test_what_cannot_be_compared_is_refused(kind, test):
    with pytest.raises(DataError, match="trial"):
        test(BAD[kind])


@pytest.mark.parametrize("blocks", [0, 3, 15, 22, -2, 40])
def test_blocks_that_cannot_be_halved_are_refused(blocks):
    with pytest.raises(ParameterError, match="blocks"):
        overfitting.backtest_overfitting(GOOD, blocks)


def test_more_blocks_than_bars_are_refused():
    with pytest.raises(ParameterError, match="do not fit into 12 bars"):
        overfitting.backtest_overfitting(GOOD[:12])


@pytest.mark.parametrize("test", [inference.robust_mean, inference.robust_sharpe, inference.long_run_variance])
@pytest.mark.parametrize("bad", [[0.01], [], [0.01] * 9, [0.01, np.nan, 0.02], [[0.01, 0.02]]])
def test_what_has_no_long_run_variance_is_refused(test, bad):
    with pytest.raises(DataError):
        test(bad)


@pytest.mark.parametrize("call", [lambda c: inference.min_track_record_bars(0.1, confidence=c), lambda c: inference.min_track_record_bars(-0.1, confidence=c)])
@pytest.mark.parametrize("confidence", [0, 1, 95, -0.5, math.nan])
def test_a_confidence_outside_of_0_to_1_is_refused(call, confidence):
    with pytest.raises(ParameterError, match="confidence"):
        call(confidence)


@pytest.mark.parametrize("bars_per_year", [0, 0.5, -252, math.inf, math.nan])
def test_less_than_a_bar_per_year_is_refused(bars_per_year):
    for test in (lambda: inference.robust_sharpe(GOOD[:, 0], bars_per_year), lambda: inference.annualization_factor([0.1], bars_per_year)):
        with pytest.raises(ParameterError, match="bars_per_year"):
            test()


# ---------------------------------------------------------------- where a formula or rounding would mislead

@pytest.mark.parametrize(("sharpe", "skew", "kurtosis"), [(0.1, -1, 6), (-0.05, 0, 3), (0.0, 1, 5)])
def test_having_tried_more_never_raises_the_probability(sharpe, skew, kurtosis):
    found = [inference.deflated_sharpe(sharpe, 500, skew, kurtosis, n, 0.002) for n in (1, 1 + 1e-12, 1.01, 1.1, 1.25, 1.29, 1.3, 1.5, 2, 3.7, 10, 1e4, 1e9)]
    assert found[0] == inference.probabilistic_sharpe(sharpe, 500, skew, kurtosis)
    assert all(a >= b for a, b in pairwise(found))
    assert found[-1] < found[0]


def test_a_fractional_number_of_bars_per_year():
    x = GOOD[:, 0] + 0.003
    assert inference.robust_sharpe(x, 365.0) == inference.robust_sharpe(x, 365)
    few, some, many_ = (inference.robust_sharpe(x, q) for q in (365, 365.25, 366))
    assert all(min(few[k], many_[k]) <= some[k] <= max(few[k], many_[k]) for k in ("value", "error", "time_aggregated"))


@pytest.mark.parametrize("n", [50, 1000, 10_000])
@pytest.mark.parametrize("more", [0.001, -0.001])
def test_a_constant_difference_of_means_is_certain(n, more):
    b = 0.01 * np.random.default_rng(0).normal(size=n)
    found = inference.paired_difference(b + more, b, 0, metric="mean", n_boot=99)
    assert found["diff"] == found["low"] == found["high"] == pytest.approx(252 * more, rel=1e-9)
    assert found["p_value"] == (0.01 if more > 0 else 1.0)
    lost = inference.paired_loss(b, b + more, np.arange(n), 0, n_boot=99)
    assert lost["diff"] == lost["low"] == lost["high"] == pytest.approx(more, rel=1e-9)
    assert lost["p_value"] == (0.01 if more > 0 else 1.0)


def test_a_constant_difference_raises_a_sharpe_ratio():
    b = 0.01 * np.random.default_rng(0).normal(size=1000)
    found = inference.paired_difference(b + 0.001, b, 0)
    assert 0 < found["low"] < found["diff"] < found["high"]
    assert found["p_value"] < 0.01


@pytest.mark.parametrize("scale", [1e-4, 1 / 3, 3, 20])
@pytest.mark.parametrize("other", [1e-4, 1, 3])
def test_leverage_is_no_difference_of_sharpe_ratios(scale, other):
    b = 0.0005 + 0.01 * np.random.default_rng(1).normal(size=1000)
    found = inference.paired_difference(scale * b, other * b, 0)
    assert (found["diff"], found["low"], found["high"], found["p_value"]) == (0, 0, 0, 1)


def test_rounding_is_no_gain_of_a_forecast():
    loss = np.random.default_rng(2).uniform(size=500)
    for other in (loss, loss + 1e-16 * np.arange(500)):
        found = inference.paired_loss(loss, other, np.repeat(np.arange(100), 5), 0)
        assert (found["diff"], found["low"], found["high"], found["p_value"]) == (0, 0, 0, 1)


@pytest.mark.parametrize("test", [many.superior_ability, many.reality_check, many.stepwise_superior])
@pytest.mark.parametrize("noise", [0.0, 1e-18, 1e-16, "random"])
@pytest.mark.parametrize("size", [1e-6, 1, 1e6])
def test_rounding_is_no_gain_over_the_baseline(test, noise, size):
    rng = np.random.default_rng(3)
    base, other = 0.01 * rng.normal(size=(2, 300))
    twin = base + (1e-17 * rng.uniform(size=300) if noise == "random" else noise)
    with pytest.raises(DataError, match=r"trials minus baseline, column 1: .*variance is zero"):
        test(size * np.column_stack([other, twin]), 0, size * base, 99)
    test(size * np.column_stack([other, base + 1e-9 * rng.normal(size=300)]), 0, size * base, 99)


def test_counts_that_are_not_whole_and_years_without_bars_are_refused():
    r, b = 0.01 * np.random.default_rng(0).normal(size=(2, 400))
    for count in (1.5, True, "9", -1):
        for of in (lambda n: inference.bootstrap_intervals(r, 0, n_boot=n), lambda n: inference.paired_difference(r, b, 0, n_boot=n), lambda n: inference.robust_mean(r, lags=n), lambda n: inference.robust_sharpe(r, lags=n),
                   lambda n: many.superior_ability(np.column_stack([r, b]), 0, n_boot=n), lambda n: overfitting.backtest_overfitting(np.column_stack([r, b]), n)):
            with pytest.raises(ParameterError, match="is not a whole number"):
                of(count)
    for year in (0, -252, float("nan"), float("inf")):
        for of in (lambda y: relative.relative(r, b, y), lambda y: overfitting.backtest_overfitting(np.column_stack([r, b]), 4, bars_per_year=y), lambda y: inference.paired_difference(r, b, 0, bars_per_year=y),
                   lambda y: inference.robust_mean(r, y), lambda y: inference.robust_sharpe(r, y), lambda y: inference.sharpe_significance(r, 5, bars_per_year=y), lambda y: inference.bootstrap_intervals(r, 0, bars_per_year=y)):
            with pytest.raises(ParameterError, match="make no year"):
                of(year)
