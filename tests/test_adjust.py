"""Factors from splits and dividends: against vendors' own factors, and their ratios whatever the day that one looks from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.market.adjust import adjusted, factor_from_actions
from mltrading.market.panel import Panel

REAL = os.environ.get("MLTRADING_DATA")
SPLITS = {"2000-06-21": 2, "2005-02-28": 2, "2014-06-09": 7, "2020-08-31": 4}  # of Apple, per share
DIVIDENDS = {
    "2012-08-09": 2.65, "2012-11-07": 2.65, "2013-02-07": 2.65, "2013-05-09": 3.05, "2013-08-08": 3.05, "2013-11-06": 3.05, "2014-02-06": 3.05, "2014-05-08": 3.29,
    "2014-08-07": 0.47, "2014-11-06": 0.47, "2015-02-05": 0.47, "2015-05-07": 0.52, "2015-08-06": 0.52, "2015-11-05": 0.52, "2016-02-04": 0.52, "2016-05-05": 0.57,
    "2016-08-04": 0.57, "2016-11-03": 0.57, "2017-02-09": 0.57, "2017-05-11": 0.63, "2017-08-10": 0.63, "2017-11-10": 0.63, "2018-02-09": 0.63, "2018-05-11": 0.73,
    "2018-08-10": 0.73, "2018-11-08": 0.73, "2019-02-08": 0.73, "2019-05-10": 0.77, "2019-08-09": 0.77, "2019-11-07": 0.77, "2020-02-07": 0.77, "2020-05-08": 0.82,
    "2020-08-07": 0.82, "2020-11-06": 0.205, "2021-02-05": 0.205,
}


def by_day(actions: dict[str, float]) -> pd.Series:
    return pd.Series(list(actions.values()), index=pd.to_datetime(list(actions)), dtype=float)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_equals_a_walk_backwards(seed: int) -> None:
    """Bar by bar from the last to the first, as the definition says."""
    rng = np.random.default_rng(seed)
    days = pd.bdate_range("2020-01-01", periods=30)
    closes = pd.Series(rng.uniform(20, 100, 30), index=days)
    splits = pd.Series(rng.choice([0.1, 2.0, 3.0], 3), index=np.sort(rng.choice(pd.date_range("2019-12-20", periods=70), 3, replace=False)))
    dividends = pd.Series(rng.uniform(0.1, 1, 5), index=np.sort(rng.choice(pd.date_range("2019-12-20", periods=70), 5, replace=False)))
    wanted, factor = np.ones(30), 1.0
    for t in range(28, -1, -1):
        new = pd.date_range(days[t] + pd.Timedelta(days=1), days[t + 1])
        paid = sum(dividends.get(d, 0.0) for d in new)
        for d in new:
            factor /= splits.get(d, 1.0)
        factor *= 1 - paid / closes.iloc[t]
        wanted[t] = factor
    np.testing.assert_allclose(factor_from_actions(splits, dividends, closes), wanted, rtol=1e-12)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), look=st.integers(-5, 60))
def test_ratios_do_not_depend_on_the_day(seed: int, look: int) -> None:
    rng = np.random.default_rng(seed)
    times = (pd.bdate_range("2020-01-01", periods=40) + pd.Timedelta(hours=21)).as_unit("us")
    fields = {f: rng.uniform(20, 100, (3, 40)) for f in ("open", "high", "low", "close", "vwap", "volume")} | {"adj_factor": np.cumprod(rng.uniform(0.9, 1.1, (3, 40)), axis=1)}
    absent = rng.random((3, 40)) < 0.2
    absent[:, 20] = False
    panel = Panel(times.to_numpy(), ("A", "B", "C"), {f: np.where(absent, np.nan, b) for f, b in fields.items()})
    one, other = adjusted(panel), adjusted(panel, times[0] + pd.Timedelta(days=look))
    for field in one.fields:
        for i in range(3):
            x, y = (p[field][i][~absent[i]] for p in (one, other))
            np.testing.assert_allclose(x[1:] / x[:-1], y[1:] / y[:-1], rtol=1e-12)
    assert (one["close"][~absent] == adjusted(one)["close"][~absent]).all()
    np.testing.assert_array_equal(one["volume"], panel["volume"])


@pytest.mark.skipif(not REAL, reason="needs MLTRADING_DATA")
def test_apple_against_published_factors() -> None:
    """Declared dividends and splits of two decades give the vendor's factor, which is rounded to seven digits."""
    frame = pd.read_parquet(Path(str(REAL)) / "bars" / "lean_daily.parquet").query("symbol == 'AAPL'").dropna(subset="price_factor").set_index("timestamp")
    found = factor_from_actions(by_day(SPLITS), by_day(DIVIDENDS), frame["close"])
    np.testing.assert_allclose(found, frame["price_factor"] * frame["split_factor"], rtol=1e-5)


@pytest.mark.skipif(not REAL, reason="needs MLTRADING_DATA")
def test_funds_against_adjusted_closes() -> None:
    """Prices of this vendor have their splits already, its dividends too. They are 32-bit, and a dividend of a fund that later split many times is a rounded cent fraction."""
    frame = pd.read_parquet(Path(str(REAL)) / "bars" / "etf230_daily.parquet").query("close > 0").astype({"close": float, "adj_close": float, "dividends": float})
    worst = {}
    for symbol, bars in frame.set_index("timestamp").groupby("symbol"):
        ratio = bars["adj_close"] / bars["close"]
        found = factor_from_actions(None, bars["dividends"][bars["dividends"] > 0], bars["close"])
        worst[symbol] = np.abs(found / (ratio / ratio.iloc[-1]) - 1).max()
    errors = pd.Series(worst)
    assert errors.max() < 1.1e-3
    assert (errors < 1e-4).mean() > 0.95
    assert errors.median() < 1e-5
