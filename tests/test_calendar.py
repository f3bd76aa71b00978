"""Sessions and expected bars against the calendar package's own minutes."""

from __future__ import annotations

import exchange_calendars as xc
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.core.errors import MLTradingError
from mltrading.market.calendar import buckets, close_of, expected, guess_calendar, session_of, sessions

NAMES = ["XNYS", "XLON", "XETR", "XTKS", "XHKG", "XASX", "CMES", "24/7", "24/5"]


@pytest.mark.parametrize("name", NAMES)
def test_minutes_are_those_of_the_package(name: str) -> None:
    calendar = xc.get_calendar(name, start="2023-01-01", end="2025-06-30", side="right")  # minutes named by their ends
    for first, last in (("2024-03-04", "2024-04-05"), ("2024-10-21", "2024-11-08"), ("2024-11-25", "2024-12-31")):
        wanted = calendar.minutes_in_range(pd.Timestamp(first, tz="UTC") - pd.Timedelta(days=2), pd.Timestamp(last, tz="UTC") + pd.Timedelta(days=2))
        found = expected(name, "1m", first, last)
        inside = wanted[(wanted >= found[0]) & (wanted <= found[-1])]
        assert (found == inside).all()
        sample = found[::97]
        assert [str(d) for d in session_of(sample, name)] == [str(calendar.minute_to_session(m)) for m in sample]


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(NAMES), frequency=st.sampled_from(["5m", "15m", "30m", "1h", "1d"]), day=st.dates(pd.Timestamp("2005-01-01").date(), pd.Timestamp("2025-06-01").date()))
def test_buckets_tile_their_sessions(name: str, frequency: str, day: object) -> None:
    last = pd.Timestamp(day) + pd.Timedelta(days=14)
    table, whole = buckets(name, frequency, day, last), sessions(name, day, last)
    ends = table.groupby("session").agg(open=("open", "first"), close=("close", "last"))
    pd.testing.assert_frame_equal(ends, whole, check_names=False, check_freq=False)
    inner = table["session"].eq(table["session"].shift())
    assert (table["open"] == table["close"].shift())[inner].all()
    assert (session_of(pd.DatetimeIndex(table["close"]), name) == pd.DatetimeIndex(table["session"])).all()
    assert (close_of(pd.DatetimeIndex(whole.index), name) == pd.DatetimeIndex(whole["close"])).all()


def test_asking_for_more_years_changes_no_session() -> None:
    before = sessions("XLON", "2019-05-01", "2019-05-31").copy()
    sessions("XLON", "1995-01-01", "2021-01-01")
    pd.testing.assert_frame_equal(sessions("XLON", "2019-05-01", "2019-05-31"), before)


def test_a_guess_survives_gaps_and_stray_rows() -> None:
    rng = np.random.default_rng(0)
    days = pd.DatetimeIndex(sessions("XNYS", "2018-01-01", "2022-12-31").index)
    thin = days[rng.random(len(days)) < 0.4]
    assert guess_calendar(thin) == "XNYS"
    assert guess_calendar(thin.append(pd.DatetimeIndex(["2019-12-25", "2020-07-03"]))) == "XNYS"
    coin = pd.date_range("2018-01-01", "2022-12-31")
    assert guess_calendar(coin[rng.random(len(coin)) < 0.95]) == "24/7"
    assert guess_calendar(pd.bdate_range("2018-01-01", "2022-12-31")) == "24/5"
    assert guess_calendar(pd.date_range("2000-01-01", "2022-12-31", freq="MS")) is None


@pytest.mark.parametrize("call", [
    lambda: sessions("NYSEE", "2024-01-01", "2024-02-01"), lambda: sessions("XBOM", "1990-01-01", "1990-02-01"), lambda: sessions("XNYS", pd.NaT, "2024-02-01"),
    lambda: close_of(pd.DatetimeIndex(["2024-01-02"], tz="UTC"), "XNYS"), lambda: session_of(pd.DatetimeIndex(["2024-01-02"]), "XNYS"), lambda: expected("XNYS", "irregular", "2024-01-01", "2024-02-01"),
])
def test_refused(call: object) -> None:
    with pytest.raises(MLTradingError):
        call()
