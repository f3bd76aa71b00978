"""Gathering bars into intervals: against pandas, in two steps as in one, without a look ahead, on real calendars and real bars."""

from __future__ import annotations

import os
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.core.errors import DataError
from mltrading.market.calendar import STEP, close_of, expected, session_of, sessions
from mltrading.market.grid import Grid, align, onto, resample, session_grid
from mltrading.market.panel import Panel, from_frame, to_frame, until

REAL = os.environ.get("MLTRADING_DATA")
HOW = {"open": "first", "high": "max", "low": "min", "close": "last", "volume": "sum", "trade_count": "sum", "adj_factor": "last"}


def minutes(calendar: str, first: str | date, last: str | date, seed: int, holes: float = 0.2, own: str = "1m") -> Panel:
    """Three symbols with missing bars; the third has only closes. The first and the last stamp exist."""
    rng = np.random.default_rng(seed)
    times = expected(calendar, own, first, last).tz_localize(None).to_numpy()
    close = np.round(100 * np.exp(np.cumsum(1e-3 * rng.standard_normal((3, len(times))), axis=1)), 2)
    fields = {"open": np.round(close * (1 + 1e-3 * rng.standard_normal(close.shape)), 2), "close": close,
              "volume": rng.integers(0, 1000, close.shape).astype(float), "trade_count": rng.integers(1, 9, close.shape).astype(float),
              "adj_factor": np.repeat([[1.0], [0.5], [0.25]], len(times), axis=1)}
    fields["high"], fields["low"] = np.maximum(fields["open"], close) + 0.01, np.minimum(fields["open"], close) - 0.01
    fields["vwap"] = (fields["high"] + fields["low"]) / 2
    absent = rng.random(close.shape) < holes
    absent[0, [0, -1]] = False
    for name, block in fields.items():
        block[absent] = np.nan
        if name != "close":
            block[2] = np.nan
    return Panel(times, ("AAA", "BBB", "CCC"), fields)


def with_pandas(panel: Panel, grid: Grid) -> pd.DataFrame:
    """The same by a plain groupby over long rows."""
    frame = to_frame(panel)
    bins = pd.IntervalIndex.from_arrays(pd.DatetimeIndex(grid.starts, tz="UTC"), pd.DatetimeIndex(grid.ends, tz="UTC"), closed="right")
    at = bins.get_indexer(pd.Index(frame["timestamp"]))
    frame = frame.assign(value=frame["vwap"] * frame["volume"], timestamp=np.where(at >= 0, grid.ends[at], np.datetime64("NaT", "us")))
    groups = frame.dropna(subset="timestamp").groupby(["timestamp", "symbol"])
    out = groups.agg({f: (lambda x: x.sum(min_count=1)) if how == "sum" else how for f, how in HOW.items()})
    total = groups["volume"].sum()
    return out.assign(vwap=(groups["value"].sum() / total).where(total > 0)).reset_index()


def same(one: Panel, other: Panel) -> None:
    np.testing.assert_array_equal(one.times, other.times)
    for field in one.fields:
        if field == "vwap":
            np.testing.assert_allclose(one[field], other[field], rtol=1e-12)
        else:
            np.testing.assert_array_equal(one[field], other[field], err_msg=field)


@pytest.mark.parametrize(("calendar", "first", "last"), [
    ("XNYS", "2024-11-27", "2024-12-02"),  # Thanksgiving, a half day
    ("XNYS", "2024-03-07", "2024-03-12"),  # summer time begins
    ("XLON", "2024-10-24", "2024-10-29"),  # and ends
    ("XTKS", "2024-03-07", "2024-03-12"),  # a break at noon
    ("24/7", "2024-03-09", "2024-03-11"),
])
@pytest.mark.parametrize("frequency", ["5m", "30m", "1h", "1d"])
def test_equals_a_groupby(calendar: str, first: str, last: str, frequency: str) -> None:
    panel = minutes(calendar, first, last, seed=1)
    found = resample(panel, "1m", frequency, calendar)
    table = with_pandas(panel, session_grid(calendar, frequency, first, last)).astype({"symbol": object})
    pd.testing.assert_frame_equal(to_frame(found)[table.columns], table, check_dtype=False, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), day=st.dates(pd.Timestamp("2010-01-04").date(), pd.Timestamp("2024-12-20").date()), calendar=st.sampled_from(["XNYS", "XETR", "XHKG", "24/7", "24/5"]),
       steps=st.lists(st.sampled_from(["5m", "15m", "30m", "1h"]), unique=True), extended=st.booleans())
def test_in_steps_as_at_once(seed: int, day: date, calendar: str, steps: list[str], extended: bool) -> None:
    last = day + timedelta(days=5)
    panel = minutes("24/7" if extended else calendar, day, last, seed)
    chain, own = panel, "1m"
    for step in [*sorted(steps, key=lambda s: STEP[s]), "1d"]:
        chain, own = resample(chain, own, step, calendar, extended), step
    same(chain, resample(panel, "1m", "1d", calendar, extended))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(400, 900), frequency=st.sampled_from(["5m", "1h", "1d"]), extended=st.booleans())
def test_later_bars_change_nothing(seed: int, cut: int, frequency: str, extended: bool) -> None:
    panel = minutes("24/7" if extended else "XNYS", "2024-11-27", "2024-12-03", seed)
    now = panel.times[cut]
    forged = Panel(panel.times, panel.symbols, {f: np.where(panel.times > now, 7.0, b) for f, b in panel.fields.items()})
    whole, other, known = (until(resample(p, "1m", frequency, "XNYS", extended), now) for p in (panel, forged, until(panel, now)))
    same(whole, other)
    same(whole, known)
    moments = panel.times[:: 7]
    same(until(align(panel, moments), now), until(align(forged, moments), now))


def test_nothing_is_lost_and_nothing_counted_twice() -> None:
    panel = minutes("XNYS", "2024-11-25", "2024-12-06", seed=3)
    for frequency in ("5m", "15m", "30m", "1h", "1d"):
        found = resample(panel, "1m", frequency, "XNYS")
        assert np.nansum(found["volume"]) == np.nansum(panel["volume"])
        assert set(found.times) <= set(expected("XNYS", frequency, "2024-11-25", "2024-12-06").tz_localize(None).to_numpy())


def test_extended_hours_go_to_the_next_session() -> None:
    stamps = pd.DatetimeIndex(["2024-11-27 21:00", "2024-11-27 23:00", "2024-11-29 14:00", "2024-11-29 14:31", "2024-11-29 18:00", "2024-11-29 19:00"])
    panel = Panel(stamps.as_unit("us").to_numpy(), ("AAA",), {"close": np.arange(1.0, 7.0)[None], "volume": np.ones((1, 6))})
    day = resample(panel, "1m", "1d", "XNYS", extended=True)
    assert str(day.times[-1]) == "2024-11-29T18:00:00.000000"
    assert day["volume"][0, -1] == 4
    assert resample(panel, "1m", "1d", "XNYS")["volume"][0, -1] == 2
    hour = resample(panel, "1m", "1h", "XNYS", extended=True)
    assert hour.times.astype("datetime64[m]").astype(str).tolist() == ["2024-11-27T23:30", "2024-11-29T14:30", "2024-11-29T15:30", "2024-11-29T18:00"]


def test_a_wrong_summer_time_is_found() -> None:
    """Days stamped 21:00 UTC all year close an hour late in summer."""
    days = pd.DatetimeIndex(sessions("XNYS", "2024-03-04", "2024-03-15").index)
    wrong = Panel((days + pd.Timedelta(hours=21)).to_numpy(), ("AAA",), {"close": np.arange(1.0, len(days) + 1)[None]})
    with pytest.raises(DataError, match="2024-03-11T21:00"):
        resample(wrong, "1d", "1d", "XNYS")
    right = Panel(close_of(days, "XNYS").tz_localize(None).to_numpy(), ("AAA",), dict(wrong.fields))
    same(resample(right, "1d", "1d", "XNYS"), right)


def test_nothing_is_expected_at_lunch() -> None:
    """Tokyo rests from 11:30 to 12:30, which is 2:30 to 3:30 UTC. An hour that lies half in the break is expected."""
    assert [len(expected("XTKS", f, "2024-03-11", "2024-03-11")) for f in ("1m", "5m", "30m", "1h", "1d")] == [300, 60, 10, 6, 1]
    assert pd.Timestamp("2024-03-11 03:00", tz="UTC") not in expected("XTKS", "30m", "2024-03-11", "2024-03-11")


def test_an_empty_grid_and_an_empty_panel() -> None:
    panel, none = minutes("XNYS", "2024-11-27", "2024-11-27", seed=0), np.array([], "datetime64[us]")
    assert len(onto(panel, Grid(none, none))) == 0
    assert np.isnan(onto(until(panel, "2020-01-01"), session_grid("XNYS", "1d", "2024-11-27", "2024-11-29"))["close"]).all()


@pytest.mark.skipif(not REAL, reason="needs MLTRADING_DATA")
@pytest.mark.parametrize(("file", "own"), [("spy_1m", "1m"), ("spy_qqq_1m", "1m"), ("us_stocks_5m", "5m")])
def test_real_bars(file: str, own: str) -> None:
    frame = pd.read_parquet(Path(str(REAL)) / "bars" / f"{file}.parquet")
    frame = frame.assign(timestamp=frame["timestamp"] + STEP[own]).sort_values(["timestamp", "symbol"], ignore_index=True)  # stamped at the start there
    panel = from_frame(frame, file)
    day = resample(panel, own, "1d", "XNYS")
    for frequency in ("15m", "30m", "1h"):
        same(resample(resample(panel, own, frequency, "XNYS"), frequency, "1d", "XNYS"), day)
    inside = frame.assign(session=session_of(pd.DatetimeIndex(frame["timestamp"]), "XNYS")).dropna(subset="session")
    table = inside.groupby(["session", "symbol"]).agg({f: HOW[f] for f in ("open", "high", "low", "close", "volume")})
    table = table[table.index.get_level_values("session").isin(day.index.tz_convert("America/New_York").tz_localize(None).normalize())]
    np.testing.assert_allclose(to_frame(day)[list(table.columns)], table, rtol=1e-12)
