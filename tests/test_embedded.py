"""The embedded sets are what they say: same bytes every time, stamped with their closes, and in agreement with other vendors' data."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mltrading.core.storage import write_parquet
from mltrading.market import embedded
from mltrading.market.calendar import STEP, expected
from mltrading.market.panel import BarSet, from_frame, to_frame

DATA = os.environ.get("MLTRADING_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MLTRADING_DATA names no folder")


@pytest.fixture(scope="module")
def sets() -> dict[str, BarSet]:
    return {s.name: s for s in embedded.sets()}


def _bars(name: str) -> pd.DataFrame:
    return pd.read_parquet(Path(str(DATA)) / "bars" / f"{name}.parquet")


def _closes(frame: pd.DataFrame, symbol: str, column: str = "close") -> pd.Series:
    """Prices of one symbol by naive day of the stamp."""
    own = frame[frame["symbol"] == symbol]
    stamps = own["timestamp"] if own["timestamp"].dt.tz is None else own["timestamp"].dt.tz_localize(None)
    return own.set_index(stamps.dt.normalize())[column].astype(np.float64)


BYTES = """
import hashlib, tempfile
from pathlib import Path
from mltrading.core.storage import write_parquet
from mltrading.market import embedded
tables = {**{s.name: s.bars for s in embedded.sets()}, "ticks": embedded.ticks(), "macro": embedded.macro()}
with tempfile.TemporaryDirectory() as folder:
    for name, frame in tables.items():
        write_parquet(frame, Path(folder) / name)
        print(name, hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest())
"""


def test_rebuilt_to_the_same_bytes(sets: dict[str, BarSet], tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", BYTES], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
    elsewhere = dict(line.split() for line in run.stdout.splitlines())
    tables = {**{name: s.bars for name, s in sets.items()}, "ticks": embedded.ticks(), "macro": embedded.macro()}
    assert list(elsewhere) == list(tables)
    for name, frame in tables.items():
        write_parquet(frame, tmp_path / name)
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == elsewhere[name], name
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 9e6


def test_every_set_survives_the_panel(sets: dict[str, BarSet]) -> None:
    for name, s in sets.items():
        back = to_frame(from_frame(s.bars, name))
        pd.testing.assert_frame_equal(back, s.bars[back.columns], check_dtype=False)
        if "high" in s.bars.columns:
            full = s.bars.dropna(subset=["high"])
            if name != "daily":
                assert (full["high"] >= full[["open", "low", "close"]].max(axis=1)).all()
                assert (full["low"] <= full[["open", "close"]].min(axis=1)).all()
        assert s.notes


def test_stamps_are_those_of_the_calendar(sets: dict[str, BarSet]) -> None:
    for name in ("daily", "etf_daily", "stocks_daily", "stocks_raw_daily", "crypto_daily", "crypto_1h"):
        s = sets[name]
        stamps = pd.DatetimeIndex(s.bars["timestamp"].unique())
        grid = expected(s.calendar, s.frequency, str((stamps[0] - STEP["1d"]).date()), str(stamps[-1].date()))
        assert stamps.isin(grid).all(), name


def test_facts_cover_every_symbol(sets: dict[str, BarSet]) -> None:
    facts = embedded.symbol_facts()
    assert {s for b in sets.values() for s in b.bars["symbol"].unique()} == set(facts)
    assert {s for s, f in facts.items() if f["role"] == "benchmark"} == {"SPX"}
    for item in embedded.UPSTREAM.values():
        assert len(item.sha256) == 64
        assert item.holds


@needs_data
def test_funds_against_another_vendor(sets: dict[str, BarSet]) -> None:
    """Equal to closes that are adjusted for splits only, up to splits that came after 2016."""
    other, compared = _bars("etf230_daily"), 0
    for symbol in sets["etf_daily"].bars["symbol"].unique():
        theirs = _closes(other, symbol)
        if theirs.empty:
            continue
        ratio = (_closes(sets["etf_daily"].bars, symbol) / theirs).dropna()
        later = 2.0 if symbol in ("XLB", "XLE", "XLK", "XLU") else 1.0
        assert len(ratio) == 2141
        assert (ratio / later).between(0.998, 1.002).all(), symbol
        assert ((ratio / later - 1).abs() > 1e-4).sum() <= 40, symbol
        dividends = (_closes(sets["etf_daily"].bars, symbol) / _closes(other, symbol, "adj_close") / later).dropna()
        assert dividends.iloc[0] > 1.1, symbol
        compared += 1
    assert compared == 16


@needs_data
def test_stocks_against_another_vendor(sets: dict[str, BarSet]) -> None:
    other, bars = _bars("sp500_daily"), sets["stocks_daily"].bars
    for symbol in ("AAPL", "AMZN", "GOOG", "META", "NFLX", "NVDA"):
        gap = (_closes(bars, symbol) / _closes(other, symbol) - 1).dropna()
        assert len(gap) == 1440
        assert gap.abs().max() < 1e-5
        mine = (_closes(bars, symbol) * _closes(bars, symbol, "adj_factor")).pct_change()
        theirs = _closes(other, symbol, "adj_close").pct_change()
        assert (mine - theirs).dropna().iloc[1:].abs().max() < 1e-4


@needs_data
def test_stocks_as_traded_against_another_vendor(sets: dict[str, BarSet]) -> None:
    other, bars = _bars("lean_daily"), sets["stocks_raw_daily"].bars
    for symbol in ("AAPL", "FB", "IBM"):
        gap = (_closes(bars, symbol) / _closes(other, symbol) - 1).dropna().abs()
        assert gap.median() < 1e-3
        assert (gap > 5e-3).mean() < 0.03


@needs_data
def test_hours_of_the_euro_against_another_vendor(sets: dict[str, BarSet]) -> None:
    """The other vendor's hours are stamped with their start, in UTC."""
    other = _bars("lean_1h").query("symbol == 'EURUSD_OANDA'").set_index("timestamp")["close"].astype(np.float64)
    other.index = other.index + STEP["1h"]
    mine = sets["fx_1h"].bars.set_index("timestamp")["close"]
    apart = {h: (mine - other.shift(freq=h * STEP["1h"])).dropna().abs().median() for h in (-1, 0, 1)}
    assert apart[0] < 5e-5 < 4e-4 < min(apart[-1], apart[1])


@needs_data
def test_days_of_bitcoin_against_another_vendor(sets: dict[str, BarSet]) -> None:
    """The other vendor's days are named by the UTC day that they cover."""
    mine = sets["crypto_daily"].bars.query("symbol == 'BTC/USD'").assign(timestamp=lambda f: f["timestamp"] - STEP["1d"])
    for symbol in ("btcusd_quote", "btcusd_trade"):
        gap = (_closes(mine, "BTC/USD") / _closes(_bars("crypto_daily"), symbol) - 1).dropna().abs()
        assert len(gap) > 1000
        assert gap.median() < 5e-3
