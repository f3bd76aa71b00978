"""Universes say who was a member when, and the table that ships is what the pinned files give."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.market.panel import Panel
from mltrading.market.universe import UNIVERSES, build, ever, mask, members, spells_of, symbols, with_members

DATA = os.environ.get("MLTRADING_DATA")
REAL = ("sp500", "nasdaq100")


def test_the_shipped_table_is_what_the_pinned_files_give() -> None:
    assert (resources.files("mltrading.market") / "universes.csv").read_text(encoding="utf-8") == build()


@pytest.mark.parametrize("name", list(UNIVERSES))
def test_spells_are_in_order_and_apart(name: str) -> None:
    spells = members(name)
    closed = spells.dropna()
    assert (closed["start"] < closed["end"]).all()
    for _, own in spells.groupby("symbol"):
        own = own.sort_values("start", na_position="first")
        assert (own["end"].iloc[:-1].to_numpy() <= own["start"].iloc[1:].to_numpy()).all()  # equal: FOX, two companies
    assert spells["start"].max() <= pd.Timestamp(UNIVERSES[name].as_of)
    assert not spells["end"].gt(pd.Timestamp(UNIVERSES[name].as_of)).any()


@pytest.mark.parametrize("name", list(UNIVERSES))
def test_mask_agrees_with_asking_day_by_day(name: str) -> None:
    rng = np.random.default_rng(5)
    span = pd.date_range(UNIVERSES[name].first or "1995-01-02", UNIVERSES[name].as_of, freq="D")
    days = span[np.sort(rng.choice(len(span), 40, replace=False))]
    spells = members(name)
    known = sorted({*rng.choice(sorted(set(spells["symbol"])), 12), "NOBODY"})
    panel = Panel((days + pd.Timedelta(hours=21)).to_numpy("datetime64[us]"), tuple(known), {"close": np.ones((len(known), len(days)))})
    got = mask(panel, spells)
    for j, day in enumerate(days):
        today = set(symbols(name, day))
        brute = {s for s, a, b in spells.itertuples(index=False) if (pd.isna(a) or a <= day) and (pd.isna(b) or day < b)}
        assert today == brute
        assert [s in today for s in known] == got[:, j].tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from("ABCDE")), max_size=25))
def test_spells_give_back_the_roster_of_every_day(steps: list[tuple[int, str]]) -> None:
    """A log in which each event turns membership over, walked by a set and by spells."""
    roster, log, after = {"A", "B"}, [], {}
    for day, symbol in sorted({(f"2020-01-{d + 2:02d}", s) for d, s in steps}):
        log.append((day, symbol not in roster, symbol))
        roster ^= {symbol}
        after[day] = set(roster)
    spells = spells_of(["A", "B"], "2020-01-01", sorted(log))
    for day, expected in after.items():
        assert {s for s, a, b in spells if a <= day and (not b or day < b)} == expected


def test_membership_on_known_days() -> None:
    for symbol, joined in (("TSLA", "2020-12-21"), ("META", "2022-06-09"), ("NFLX", "2010-12-20"), ("UBER", "2023-12-18")):
        day = pd.Timestamp(joined)
        assert symbol in symbols("sp500", day), symbol
        assert symbol not in symbols("sp500", day - pd.Timedelta(days=1)), symbol
    for symbol, left in (("FB", "2022-06-09"), ("LEH", "2008-09-15"), ("SIVB", "2023-03-15")):
        day = pd.Timestamp(left)
        assert symbol not in symbols("sp500", day), symbol
        assert symbol in symbols("sp500", day - pd.Timedelta(days=1)), symbol
    assert "META" in symbols("nasdaq100", "2013-01-02")


def test_ever_is_the_union_of_the_days() -> None:
    days = pd.date_range("2012-06-01", "2012-09-30", freq="D")
    assert ever("sp500", days[0], days[-1]) == sorted(set().union(*(symbols("sp500", d) for d in days)))


def test_after_its_own_date_a_list_stands_still() -> None:
    for name in UNIVERSES:
        assert symbols(name, "2031-05-05") == symbols(name)


@pytest.mark.parametrize(("name", "low", "high"), [("sp500", 490, 510), ("nasdaq100", 100, 112)])
def test_size_over_time(name: str, low: int, high: int) -> None:
    spells = members(name)
    days = pd.date_range(UNIVERSES[name].first, UNIVERSES[name].as_of, freq="D")
    count = np.zeros(len(days), int)
    for a, b in zip(spells["start"].to_numpy(), spells["end"].to_numpy(), strict=True):
        count += ((days >= a) & ~(days >= b)).astype(int)
    assert count.min() >= low
    assert count.max() <= high


def test_field_is_missing_where_the_bar_is() -> None:
    times = pd.to_datetime(["2020-12-18 21:00", "2020-12-21 21:00"]).to_numpy("datetime64[us]")
    panel = Panel(times, ("AAPL", "TSLA"), {"close": np.array([[np.nan, 1.0], [2.0, 3.0]])})
    got = with_members(panel, members("sp500"))
    np.testing.assert_array_equal(got["member"], [[np.nan, 1.0], [0.0, 1.0]])
    assert got.fields["close"] is panel.fields["close"]
    assert "member" not in panel.fields


@pytest.mark.skipif(not DATA, reason="MLTRADING_DATA names no folder")
def test_against_the_members_of_a_larger_panel() -> None:
    """504 symbols gathered in December 2023: the stocks, and a gold fund."""
    held = {s.replace("-", ".") for s in pd.read_parquet(Path(str(DATA)) / "bars" / "sp500_daily.parquet", columns=["symbol"])["symbol"].unique()}
    listed = set(symbols("sp500", "2023-12-15"))
    assert listed - held == {"BLL", "FISV"}          # the tickers of Ball and Fiserv before or after the change
    assert held - listed == {"BALL", "FI", "GLD"}


@pytest.mark.skipif(not DATA, reason="MLTRADING_DATA names no folder")
def test_inception_is_shortly_before_the_first_bar() -> None:
    first = pd.read_parquet(Path(str(DATA)) / "bars" / "etf230_daily.parquet", columns=["timestamp", "symbol"]).groupby("symbol")["timestamp"].min()
    late = first[first > "2005-01-10"]
    spells = pd.concat([members("etf65"), members("commodities")]).drop_duplicates("symbol").set_index("symbol")["start"].dropna()
    both = spells.index.intersection(late.index)
    assert len(both) > 20
    gap = (late[both] - spells[both]).dt.days
    assert gap.between(0, 14).all(), gap[~gap.between(0, 14)]
