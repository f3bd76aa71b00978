"""Nothing is known before it was published: macro values and news against plain readings of their definitions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.core.errors import DataError
from mltrading.features.registry import compute
from mltrading.market.macro import (
    FREQUENCY_LAGS,
    LAGS,
    Lag,
    as_of,
    check_macro,
    empty_macro,
    frequency_of,
    histories,
    lag_of,
    lagged,
    release,
    vintage,
)
from mltrading.market.news import (
    NEWS,
    attach,
    between,
    check_news,
    empty_news,
    first_seen,
    news_table,
    normal_title,
    published,
)
from mltrading.market.panel import TIME
from mltrading.market.simulate import random_walk

MANY = settings(max_examples=60, deadline=None, derandomize=True)
START = pd.Timestamp("2020-01-01", tz="UTC")


def hour(n: float) -> pd.Timestamp:
    return (START + pd.Timedelta(hours=n)).as_unit("us")


@st.composite
def releases(draw: st.DrawFn) -> pd.DataFrame:
    """Two series, periods published in any order, revised at any time, several at one instant."""
    keys = draw(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 6), st.integers(0, 40)), unique=True, max_size=40))
    rows = [(hour(6 + k), s, float(draw(st.integers(-9, 9))), hour(r)) for s, r, k in keys]
    table = pd.DataFrame(rows, columns=["timestamp", "series", "value", "reference"]) if rows else empty_macro()
    return table.astype({"timestamp": TIME, "reference": TIME})


def stood(macro: pd.DataFrame, series: str, t: pd.Timestamp) -> list[tuple[pd.Timestamp, float, pd.Timestamp]]:
    """By the definition, row by row: reference, newest value and first release of what was known at `t`."""
    known: dict[pd.Timestamp, tuple[pd.Timestamp, float, pd.Timestamp]] = {}
    for row in macro.itertuples():
        if row.series != series or row.timestamp > t:
            continue
        when, value, first = known.get(row.reference, (row.timestamp, row.value, row.timestamp))
        newest = (row.timestamp, row.value) if row.timestamp >= when else (when, value)
        known[row.reference] = (*newest, min(first, row.timestamp))
    return [(r, known[r][1], known[r][2]) for r in sorted(known)]


@MANY
@given(releases(), st.integers(0, 3), st.integers(1, 50))
def test_as_of_is_its_definition(macro: pd.DataFrame, back: int, hours: int) -> None:
    times = pd.DatetimeIndex([hour(h) for h in range(0, 50, 3)])
    got = as_of(macro, times, pd.Timedelta(hours=hours), back)
    assert list(got.columns) == sorted(macro["series"].unique())
    for series in got.columns:
        for t, value in got[series].items():
            known = stood(macro, series, t)
            fresh = len(known) > back and t - known[-1][2] <= pd.Timedelta(hours=hours)
            np.testing.assert_equal(value, known[-1 - back][1] if fresh else np.nan)


@MANY
@given(releases(), st.integers(0, 50))
def test_a_vintage_is_its_definition_and_ends_in_the_as_of(macro: pd.DataFrame, h: int) -> None:
    for series in macro["series"].unique():
        then = vintage(macro, series, hour(h))
        assert [(r, v) for r, v, _ in stood(macro, series, hour(h))] == list(then.items())
        last = as_of(macro, pd.DatetimeIndex([hour(h)]))[series].iloc[0]
        np.testing.assert_equal(last, then.iloc[-1] if len(then) else np.nan)


@MANY
@given(releases(), st.integers(0, 50), st.integers(0, 2))
def test_no_later_row_is_used(macro: pd.DataFrame, h: int, back: int) -> None:
    times = pd.DatetimeIndex([hour(k) for k in range(h + 1)])
    later = macro["timestamp"] > hour(h)
    without, other = macro[~later], macro.assign(value=macro["value"].where(~later, 1e6))
    whole = as_of(macro, times, back=back)
    pd.testing.assert_frame_equal(as_of(other, times, back=back), whole)
    part = as_of(without, times, back=back)
    pd.testing.assert_frame_equal(part.reindex(columns=whole.columns), whole)


@MANY
@given(releases(), st.randoms())
def test_the_order_of_rows_does_not_matter(macro: pd.DataFrame, random: object) -> None:
    order = list(range(len(macro)))
    random.shuffle(order)  # type: ignore[attr-defined]
    times = pd.DatetimeIndex([hour(k) for k in range(0, 50, 5)])
    pd.testing.assert_frame_equal(as_of(macro.iloc[order], times), as_of(macro, times))


def test_features_use_a_revision_from_its_release_on() -> None:
    panel = random_walk(2, 120, seed=0, ragged=False)
    day = panel.index.normalize()
    first = pd.DataFrame({"timestamp": panel.index + pd.Timedelta(minutes=15), "series": "vix", "value": 20.0 + np.arange(len(panel)), "reference": day})
    revised = pd.DataFrame({"timestamp": [panel.index[60]], "series": "vix", "value": [100.0], "reference": [day[54]]})
    plain, other = (compute(panel, ["vix_level", "vix_change_5"], m) for m in (first, pd.concat([first, revised], ignore_index=True)))
    np.testing.assert_array_equal(plain["vix_level"], other["vix_level"])  # a late revision of an old figure does not displace a newer one
    changed = np.flatnonzero(plain["vix_change_5"][0] != other["vix_change_5"][0])
    assert changed[changed > 5].tolist() == [60]  # the bar whose change reaches back to the revised day, known at that instant
    assert other["vix_change_5"][0, 60] == (20.0 + 59) / 100.0 - 1


@MANY
@given(st.dates(pd.Timestamp("1960-01-01").date(), pd.Timestamp("2040-01-01").date()), st.sampled_from([*LAGS.values(), *FREQUENCY_LAGS.values(), Lag(0, 0, "02:30"), Lag(0, 0, "23:59", "Asia/Tokyo")]))
def test_a_stated_release_is_in_utc_and_in_order(day: object, lag: Lag) -> None:
    reference = pd.DatetimeIndex([pd.Timestamp(day)])
    stamp = release(reference.append(reference + pd.Timedelta(days=1)), lag)
    assert stamp.dtype == TIME
    assert stamp[0] <= stamp[1]
    local = stamp[0].tz_convert(lag.zone)
    assert local.strftime("%H:%M") >= lag.clock
    assert local.tz_localize(None).normalize() == pd.Timestamp(day) + pd.DateOffset(months=lag.months, days=lag.days)


def test_every_listed_lag_is_plausible_and_says_why() -> None:
    for series, lag in LAGS.items():
        assert lag.why, series
        assert 0 <= lag.months * 30.5 + lag.days <= 190, series
    assert [lag_of("NOT_LISTED", f) for f in FREQUENCY_LAGS] == list(FREQUENCY_LAGS.values())


@pytest.mark.skipif("MLTRADING_DATA" not in os.environ, reason="needs MLTRADING_DATA")
def test_real_series_get_their_lag() -> None:
    raw = pd.read_parquet(Path(os.environ["MLTRADING_DATA"]) / "macro" / "series.parquet")
    parts = [lagged(part.set_index("timestamp")["value"], str(name)) for name, part in raw.drop_duplicates(["series", "timestamp"]).groupby("series", observed=True)]
    table = check_macro(pd.concat(parts, ignore_index=True), "real series")
    assert table["series"].nunique() == raw["series"].nunique()
    read = as_of(table, pd.DatetimeIndex(["2015-06-15 20:00"], tz="UTC"), pd.Timedelta(days=400))
    newest = {s: vintage(table, s, "2015-06-15 20:00").index[-1].strftime("%F") for s in ("CPIAUCSL", "UNRATE", "GDPC1", "VIXCLS")}
    assert newest == {"CPIAUCSL": "2015-04-01", "UNRATE": "2015-05-01", "GDPC1": "2015-01-01", "VIXCLS": "2015-06-12"}
    assert read[list(newest)].notna().all(axis=None)
    assert len(histories(table)) == raw["series"].nunique()


def test_frequencies_of_real_calendars() -> None:
    business = pd.bdate_range("2015-01-01", "2016-01-01")
    assert frequency_of(business.delete([4, 77])) == "daily"
    assert frequency_of(pd.date_range("2015-01-01", periods=9, freq="QE")) == "quarterly"


@st.composite
def stories(draw: st.DrawFn) -> pd.DataFrame:
    """Items of two sources in any order, with edits, copies and equal stamps."""
    titles = ["Rates rise", "RATES  rise!", "Rates fall", "", "Ｒates rise"]
    rows = draw(st.lists(st.tuples(st.integers(0, 150), st.sampled_from(["x", "y"]), st.integers(0, 9), st.sampled_from(titles)), max_size=30))
    table = pd.DataFrame([(hour(h), s, str(i), t, "", "", "") for h, s, i, t in rows], columns=list(NEWS)) if rows else empty_news()
    return table.astype(empty_news().dtypes.to_dict())


@MANY
@given(stories())
def test_what_was_seen_first_is_its_definition(news: pd.DataFrame) -> None:
    kept = check_news(first_seen(news, 2), "kept")
    items: set[tuple[str, str]] = set()
    shown: dict[str, pd.Timestamp] = {}
    expected = []
    for row in sorted(news.itertuples(), key=lambda r: r.timestamp):
        if (row.source, row.id) in items:
            continue
        items.add((row.source, row.id))
        title = normal_title(row.title)
        if title and title in shown and row.timestamp - shown[title] <= pd.Timedelta(days=2):
            continue
        shown[title] = row.timestamp
        expected.append((row.timestamp, row.source, row.id, row.title))
    assert sorted(expected) == [(r.timestamp, r.source, r.id, r.title) for r in kept.itertuples()]
    pd.testing.assert_frame_equal(first_seen(kept, 2), kept)


@MANY
@given(stories(), st.integers(0, 150))
def test_what_stays_depends_on_nothing_later(news: pd.DataFrame, h: int) -> None:
    whole, part = first_seen(news), first_seen(news[news["timestamp"] <= hour(h)])
    pd.testing.assert_frame_equal(part, whole[whole["timestamp"] <= hour(h)].reset_index(drop=True))


@MANY
@given(stories(), st.lists(st.integers(0, 150), unique=True, max_size=12))
def test_an_item_reaches_the_first_bar_that_closes_with_it_or_after(news: pd.DataFrame, closes: list[int]) -> None:
    news = first_seen(news)
    times = pd.DatetimeIndex([hour(h) for h in sorted(closes)], dtype=TIME)
    got = attach(news, times)
    for stamp, bar in zip(news["timestamp"], got, strict=True):
        assert bar == next((i for i, t in enumerate(times) if stamp <= t), -1)
    for i in range(1, len(times)):
        assert between(news, times[i - 1], times[i]).index.tolist() == np.flatnonzero(got == i).tolist()


def test_times_of_items() -> None:
    assert published(["2024-03-01", "2024-03-01T00:00:00-05:00", "20240301"], "s").tolist() == [pd.Timestamp(t, tz="UTC") for t in ("2024-03-02", "2024-03-01 05:00", "2024-03-02")]
    for text in ("", "soon", "2024-13-01", "2024-03-01T10:00:00"):
        with pytest.raises(DataError):
            published([text], "s")


def test_an_item_from_the_future_is_refused() -> None:
    news = news_table([("2024-03-01T10:00:00Z", "1", "A", "", "", "")], "s")
    assert len(check_news(news, "s", pd.Timestamp("2024-03-01 10:00", tz="UTC"))) == 1
    with pytest.raises(DataError, match="after it was retrieved"):
        check_news(news, "s", pd.Timestamp("2024-03-01 09:59", tz="UTC"))


@pytest.mark.skipif("MLTRADING_DATA" not in os.environ, reason="needs MLTRADING_DATA")
def test_real_headlines_and_posts() -> None:
    folder = Path(os.environ["MLTRADING_DATA"])
    raw = pd.read_parquet(folder / "text" / "tsla_news.parquet")
    with pytest.raises(DataError, match="names no zone"):
        published(raw["dt"].tolist(), "headlines")
    rows = [(t, str(i), title, "", "", "TSLA") for i, (t, title) in enumerate(zip(raw["dt"], raw["title"], strict=True))]
    table = news_table(rows, "headlines", "UTC")
    assert 0.8 < len(table) / len(raw) < 1.0
    posts = pd.read_parquet(folder / "acl18" / "tweets.parquet").query("symbol == 'AAPL'")
    kept = news_table([(t.isoformat(), f"{t.isoformat()} {text[:40]}", text, "", "", "AAPL") for t, text in zip(posts["created_at"], posts["text"], strict=True)], "posts")
    days = pd.date_range(kept["timestamp"].iloc[0].normalize(), periods=800, freq="D") + pd.Timedelta(hours=21)
    bar = attach(kept, days)
    assert (days[bar] >= kept["timestamp"]).all()
    assert (days[bar] - kept["timestamp"] < pd.Timedelta(days=1)).all()
