"""Simulated markets have the truth that they claim, and bars within a day are that day's bar, to the last bit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.market.calendar import close_of, expected, session_of, sessions
from mltrading.market.grid import onto, session_grid
from mltrading.market.panel import Panel, check_bars, from_frame, select, to_frame, until
from mltrading.market.simulate import REGIMES, Regime, bridge_intraday, is_simulated, regime_market, simulated_set

REAL = os.environ.get("MLTRADING_DATA")


def daily(seed: int, calendar: str, first: str, days: int) -> Panel:
    """Days with all the oddities that a day may have: flat, opened at its high, closed at its low, hardly traded, traded in fractions, absent."""
    rng = np.random.default_rng(seed)
    closes = sessions(calendar, first, pd.Timestamp(first) + pd.Timedelta(days=days))["close"].to_numpy("datetime64[us]")
    shape = (3, len(closes))
    o, c = np.round(np.exp(rng.normal(3, 0.5, shape)), 2), np.round(np.exp(rng.normal(3, 0.5, shape)), 2)
    h, l = np.round(np.maximum(o, c) * (1 + rng.choice([0, 0.01, 0.2], shape)), 2), np.round(np.minimum(o, c) * (1 - rng.choice([0, 0.01, 0.2], shape)), 2)  # noqa: E741
    flat = rng.random(shape) < 0.1
    fields = {f: np.where(flat, c, x) for f, x in (("open", o), ("high", h), ("low", l), ("close", c))}
    fields["volume"] = np.where(rng.random(shape) < 0.3, rng.uniform(0, 10, shape), rng.choice([0, 1, 17, 1_234_567, 3_000_000_001], shape))
    absent = rng.random(shape) < 0.1
    absent[0] = False
    return Panel(closes, ("AAA", "BBB", "CCC"), {f: np.where(absent, np.nan, b) for f, b in fields.items()})


def assert_same(one: Panel, other: Panel) -> None:
    np.testing.assert_array_equal(one.times, other.times)
    for field in other.fields:
        np.testing.assert_array_equal(one[field], other[field], err_msg=field)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), calendar=st.sampled_from(["XNYS", "24/7", "XTKS", "XLON"]), frequency=st.sampled_from(["1m", "15m", "1h", "1d"]),
       first=st.sampled_from(["2024-11-25", "2024-03-06", "2024-12-20"]))
def test_a_bridged_day_is_its_daily_bar(seed: int, calendar: str, frequency: str, first: str) -> None:
    days = daily(seed, calendar, first, 8)
    fine = bridge_intraday(days, frequency, calendar, seed)
    names = session_of(days.index, calendar)
    assert_same(onto(fine, session_grid(calendar, "1d", names[0], names[-1])), days)
    np.testing.assert_array_equal(fine.times, expected(calendar, frequency, names[0], names[-1]).tz_localize(None).to_numpy())
    for side in ("open", "close"):
        assert ((fine["low"] <= fine[side]) & (fine[side] <= fine["high"]))[fine.alive].all()
    assert (fine["volume"][fine.alive] >= 0).all()


def test_half_days_have_fewer_bars() -> None:
    days = daily(1, "XNYS", "2024-11-27", 5)
    fine = bridge_intraday(days, "5m", "XNYS")
    assert pd.Series(session_of(fine.index, "XNYS")).value_counts().sort_index().tolist() == [78, 42, 78]
    check_bars(to_frame(fine))


def test_other_symbols_and_later_days_change_nothing() -> None:
    days = daily(2, "XNYS", "2024-11-18", 14)
    whole = bridge_intraday(days, "30m", "XNYS", seed=3)
    assert_same(select(whole, ["BBB"]), select(bridge_intraday(select(days, ["BBB"]), "30m", "XNYS", seed=3), ["BBB"]))
    now = days.times[5]
    assert_same(until(whole, now), bridge_intraday(until(days, now), "30m", "XNYS", seed=3))
    assert not np.array_equal(whole["close"], bridge_intraday(days, "30m", "XNYS", seed=4)["close"])


def test_volume_is_u_shaped_and_paths_are_rough() -> None:
    market, _ = regime_market(4, 100, seed=1)
    fine = bridge_intraday(market, "30m", "XNYS")
    n = fine["close"].shape[1]
    place = np.concatenate([np.arange(k) for k in pd.Series(session_of(fine.index, "XNYS")).value_counts().sort_index()])
    by_place = pd.Series(fine["volume"].mean(axis=0)).groupby(place[:n]).mean()
    assert by_place.iloc[[0, 12]].min() > 1.5 * by_place.iloc[4:9].max()
    r = np.diff(np.log(fine["close"]), axis=1)
    inside = r[:, place[1:] > 0]
    spread = np.log(market["high"] / market["low"]) / np.sqrt(4 * np.log(2))
    realized = np.sqrt((inside**2).sum(axis=1) / market["close"].shape[1])
    assert (np.abs(realized / np.sqrt((spread**2).mean(axis=1)) - 1) < 0.35).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_regimes_are_what_they_say(seed: int) -> None:
    plain = tuple(Regime(r.name, r.drift_annual, r.vol_annual, r.correlation, 0.0, r.days) for r in REGIMES)
    panel, truth = regime_market(6, 12_000, seed=seed, regimes=plain, start="1970-01-02")
    returns = panel.view("close").apply(np.log).diff().iloc[1:]
    for regime in plain:
        own = returns[truth.iloc[1:] == regime.name]
        assert abs(own.std().mean() * np.sqrt(252) / regime.vol_annual - 1) < 0.15
        assert abs(own.corr().to_numpy()[~np.eye(6, dtype=bool)].mean() - regime.correlation) < 0.1
    stays = truth.groupby((truth != truth.shift()).cumsum()).agg(["first", "size"])
    for regime in plain:
        assert 0.5 < stays[stays["first"] == regime.name]["size"].mean() / regime.days < 1.8
    assert abs(returns["R000"]).autocorr() > 0.1


def test_jumps_fatten_the_tails() -> None:
    one = Regime("one", 0.0, 0.15, 0.3, 0.0, 100.0)
    calm, _ = regime_market(3, 3000, seed=1, regimes=(one,))
    jumpy, path = regime_market(3, 3000, seed=1, regimes=(Regime("one", 0.0, 0.15, 0.3, 12.0, 100.0),))
    kurt = [p.view("close").apply(np.log).diff().kurt().mean() for p in (calm, jumpy)]
    assert kurt[1] > kurt[0] + 2
    assert set(path) == {"one"}


def test_regime_market_stands_on_sessions() -> None:
    panel, truth = regime_market(2, 300, seed=4, start="2024-01-02")
    days = session_of(panel.index, "XNYS")
    assert (close_of(days, "XNYS") == panel.index).all()
    assert len(panel) == len(truth) == 300
    assert_same(panel, regime_market(2, 300, seed=4, start="2024-01-02")[0])
    check_bars(to_frame(panel))
    assert is_simulated(simulated_set(panel, "daily", "1d", "XNYS", "three regimes, seed 4").notes)


@pytest.mark.skipif(not REAL, reason="needs MLTRADING_DATA")
def test_real_days_are_kept() -> None:
    frame = pd.read_parquet(Path(str(REAL)) / "bars" / "etf230_daily.parquet").query("symbol in ['SPY', 'QQQ', 'TLT'] and timestamp >= '2022-06-01'")
    stamps = close_of(pd.DatetimeIndex(frame["timestamp"]), "XNYS")
    days = from_frame(frame.assign(timestamp=stamps)[["timestamp", "symbol", "open", "high", "low", "close", "volume"]].sort_values(["timestamp", "symbol"], ignore_index=True))
    names = session_of(days.index, "XNYS")
    assert_same(onto(bridge_intraday(days, "5m", "XNYS"), session_grid("XNYS", "1d", names[0], names[-1])), days)
