"""Splits, metrics and inference against their peers, measured in one run. `make bench NAME=validation`."""

import time
import warnings
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pandas as pd
import quantstats.stats as qs
from arch.bootstrap import MCS, SPA, StationaryBootstrap
from skfolio.model_selection import CombinatorialPurgedCV

from mltrading.validation import combinatorial, inference, kfold, many, metrics, overfitting, splits

TEN = ("cagr", "vol_annual", "sharpe_annual", "sortino_annual", "max_drawdown", "calmar", "profit_factor", "var_95", "es_95", "tail_ratio")


def seconds(work: Callable[[], object], repeat: int = 3) -> float:
    """The shortest of a few runs, after one that compiles."""
    work()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def ten_in_numpy(r: np.ndarray) -> np.ndarray:
    """The ten metrics as one would write them for arch, in numpy alone."""
    wealth = np.cumprod(1 + r)
    worst = (wealth / np.maximum(np.maximum.accumulate(wealth), 1) - 1).min()
    growth, spread, down = wealth[-1] ** (252 / len(r)) - 1, r.std(ddof=1), np.sqrt((np.minimum(r, 0) ** 2).mean())
    low, high = np.quantile(r, [0.05, 0.95])
    return np.array([growth, np.sqrt(252) * spread, np.sqrt(252) * r.mean() / spread, np.sqrt(252) * r.mean() / down, worst, -growth / worst,
                     -r[r > 0].sum() / r[r < 0].sum(), low, r[r <= low].mean(), abs(high / low)])


def ten_in_quantstats(r: pd.Series) -> list[float]:
    """The ten metrics from quantstats."""
    return [qs.cagr(r), qs.volatility(r), qs.sharpe(r), qs.sortino(r), qs.max_drawdown(r), qs.calmar(r), qs.profit_factor(r),
            qs.value_at_risk(r), qs.conditional_value_at_risk(r, method="historical"), qs.tail_ratio(r)]


def folds_by_masks(t: np.ndarray, end: np.ndarray, bars: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same training and test rows by comparing every row with the edges of every window, without any check."""
    out = []
    for s in range(500, len(bars), 63):
        train = (t >= bars[s - 500]) & (t < bars[s]) & (end < bars[s - 5])
        out.append((np.flatnonzero(train), np.flatnonzero((t >= bars[s]) & (t <= bars[min(s + 63, len(bars)) - 1]))))
    return out


def blocks_by_masks(t: np.ndarray, end: np.ndarray, bars: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Ten purged folds with an embargo of five bars by comparing every row with the edges of every block, without any check."""
    out = []
    for part in np.array_split(bars, 10):
        test = (t >= part[0]) & (t <= part[-1])
        over = np.searchsorted(bars, np.fmax.reduce(end[test], initial=part[-1]), side="right") + 5
        free = t >= bars[over] if over < len(bars) else np.zeros(len(t), bool)
        out.append((np.flatnonzero((end < part[0]) | (free & ~np.isnat(end))), np.flatnonzero(test)))
    return out


def overfitting_by_halves(returns: np.ndarray, blocks: int) -> float:
    """The probability of overfitting as the paper writes it: every half is put together and measured."""
    parts, below = np.array_split(returns, blocks), 0
    for half in combinations(range(blocks), blocks // 2):
        past, future = (np.concatenate([parts[s] for s in range(blocks) if (s in half) == inside]) for inside in (True, False))
        best = np.argmax(past.mean(axis=0) / past.std(axis=0, ddof=1))
        sharpes = future.mean(axis=0) / future.std(axis=0, ddof=1)
        below += 2 * (1 + (sharpes < sharpes[best]).sum()) <= 1 + len(sharpes)
    return below / len(list(combinations(range(blocks), blocks // 2)))


def of_arch(test: SPA | MCS) -> None:
    """Run a test of arch."""
    test.compute()


def main() -> None:
    warnings.filterwarnings("ignore")
    r = 0.01 * np.random.default_rng(0).standard_t(4, 2520) + 0.0004
    series = pd.Series(r, index=pd.date_range("2010-01-04", periods=len(r), freq="B"))
    bars = pd.date_range("2000-01-03 21:00", periods=2000, freq="B", tz="UTC", unit="us")
    times, ends = bars.repeat(500), bars.to_series().shift(-5).array.repeat(500)
    walk, folds, groups = splits.WalkForward(500, 63, 5), kfold.PurgedKFold(10, 5), combinatorial.CombinatorialPurged(10, 2, 5)
    theirs = CombinatorialPurgedCV(10, 2, purged_size=2500, embargo_size=2500)  # of rows: 5 bars of 500 symbols
    trials = 0.01 * np.random.default_rng(1).normal(size=(2520, 1000))
    field, nothing = trials[:, :100], np.zeros(2520)
    plain = [x.tz_localize(None).to_numpy() for x in (times, pd.DatetimeIndex(ends), bars)]
    assert all(np.array_equal(f.train, train) for f, (train, _) in zip(folds.folds(times, ends, bars), blocks_by_masks(*plain), strict=True))
    rows = [
        ("1,000 bootstrap intervals, 10 metrics, 2,520 days", "arch, metrics in numpy",
         seconds(lambda: inference.bootstrap_intervals(r, 0, TEN, block=10)),
         seconds(lambda: StationaryBootstrap(10, r, seed=0).conf_int(ten_in_numpy, 1000, method="percentile"), 1)),
        ("10 metrics, 2,520 days", "quantstats", seconds(lambda: metrics.performance(r), 20), seconds(lambda: ten_in_quantstats(series), 5)),
        ("walk-forward, 1,000,000 rows, purged by label end", "boolean masks in numpy",
         seconds(lambda: walk.folds(times, ends, bars)), seconds(lambda: folds_by_masks(*plain))),
        ("10 folds, 1,000,000 rows, purged by label end", "boolean masks in numpy",
         seconds(lambda: folds.folds(times, ends, bars)), seconds(lambda: blocks_by_masks(*plain))),
        ("45 combinations, 1,000,000 rows, purged by label end", "skfolio, purged by row count",
         seconds(lambda: sum(len(f.train) for f in groups.folds(times, ends, bars))),
         seconds(lambda: sum(len(train) for train, _ in theirs.split(np.zeros((len(times), 1)))), 1)),
        ("PBO, 1,000 trials, 2,520 days, 252 ways", "halves put together in numpy",
         seconds(lambda: overfitting.backtest_overfitting(trials, 10)), seconds(lambda: overfitting_by_halves(trials, 10), 1)),
        ("PBO, 1,000 trials, 2,520 days, 12,870 ways", "", seconds(lambda: overfitting.backtest_overfitting(trials)), float("nan")),
        ("superior ability, 100 strategies, 2,520 days", "arch SPA",
         seconds(lambda: many.superior_ability(field, 0, block=10)), seconds(lambda: of_arch(SPA(nothing, -field, block_size=10, seed=0)), 1)),
        ("superior ability, 1,000 strategies, 2,520 days", "", seconds(lambda: many.superior_ability(trials, 0, block=10)), float("nan")),
        *[(f"confidence set by {statistic}, 100 strategies, 2,520 days", "arch MCS", seconds(lambda s=statistic: many.model_confidence_set(field, 0, s, block=10)),
           seconds(lambda m=method: of_arch(MCS(-field, 0.05, block_size=10, method=m, seed=0)), 1)) for statistic, method in (("range", "R"), ("max", "max"))],
        ("Sharpe ratio allowing for autocorrelation", "", seconds(lambda: inference.robust_sharpe(r), 20), float("nan")),
    ]
    print(f"{'work':<52} {'peer':<28} {'ours, ms':>9} {'peer, ms':>9} {'times faster':>13}")
    for work, peer, ours, theirs in rows:
        beside = f"{1e3 * theirs:>9.2f} {theirs / ours:>13.1f}" if peer else ""
        print(f"{work:<52} {peer:<28} {1e3 * ours:>9.2f} {beside}".rstrip())


if __name__ == "__main__":
    main()
