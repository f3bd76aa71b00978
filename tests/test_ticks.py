"""Bars from ticks: against plain Python, without a look ahead, with ticks that share an instant."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.core.errors import DataError
from mltrading.market.panel import check_bars
from mltrading.market.ticks import KINDS, bars_from_ticks, check_ticks

SIZES = {"time": 7.5, "tick": 9, "volume": 40, "dollar": 4000, "tick_imbalance": 15, "dollar_imbalance": 15}


def stream(seed: int, n: int = 600, symbols: tuple[str, ...] = ("ES", "NQ"), drift: float = 0.0) -> pd.DataFrame:
    """Trades in bursts, many in the same instant, on a grid of quarters."""
    rng = np.random.default_rng(seed)
    gaps = rng.choice([0, 1, 250_000, 3_000_000], n, p=[0.4, 0.1, 0.3, 0.2]) * rng.integers(1, 4, n)
    price = 100 + 0.25 * np.cumsum(rng.choice([-1, 0, 1], n, p=[0.2 - drift / 2, 0.6, 0.2 + drift / 2]))
    times = pd.Timestamp("2024-01-02 14:30", tz="UTC").as_unit("us") + pd.to_timedelta(np.cumsum(gaps), unit="us")
    return pd.DataFrame({"timestamp": times.as_unit("us"), "symbol": rng.choice(symbols, n), "price": np.maximum(price, 0.25), "volume": rng.integers(0, 12, n)})


def imbalance_ends(price: list[float], weight: list[float], size: float, span: float) -> list[int]:
    """Expectations recomputed from the whole past at each close."""
    sides = [0.0]
    for before, now in pairwise(price):
        sides.append(float(np.sign(now - before)) or sides[-1])
    flow = np.array(sides) * np.array(weight)
    ends, start, threshold, most, past = [], 0, np.inf, size, []
    for i in range(len(price)):
        theta = flow[start : i + 1].sum()
        if abs(theta) < threshold and i + 1 - start < most:
            continue
        past.append((i + 1 - start, theta**2 if ends else float((np.array(weight[: i + 1]) ** 2).sum())))
        ends.append(i)
        start, most = i + 1, 10 * size
        fade = (1 - 2 / (span * size + 1)) ** np.arange(i, -1, -1)
        length, square = size, past[0][1]
        for count, squared in past[1:]:
            length, square = length + 2 / (span + 1) * (count - length), square + 2 / (span + 1) * (squared - square)
        threshold = max(length * abs((fade * flow[: i + 1]).sum() / fade.sum()), np.sqrt(size * square / length))
    return ends


def plain(ticks: pd.DataFrame, kind: str, size: float, span: float) -> pd.DataFrame:
    """The same, tick by tick."""
    rows = []
    for symbol in sorted(ticks["symbol"].unique()):
        own = ticks[ticks["symbol"] == symbol]
        price, volume, times = own["price"].tolist(), own["volume"].tolist(), own["timestamp"].tolist()
        money = [p * v for p, v in zip(price, volume, strict=True)]
        if kind == "time":
            stamps = [pd.Timestamp(int(np.ceil(t.value / 1000 / (size * 1e6))) * round(size * 1e6), unit="us", tz="UTC") for t in times]
            ends = [i for i in range(len(own) - 1) if stamps[i + 1] > stamps[i]]
        elif kind.endswith("imbalance"):
            ends, stamps = imbalance_ends(price, [1.0] * len(own) if kind == "tick_imbalance" else money, size, span), times
        else:
            ends, stamps, total = [], times, 0.0
            for i in range(len(own)):
                total += {"tick": 1, "volume": volume[i], "dollar": money[i]}[kind]
                if total >= size:
                    ends.append(i)
                    total = 0.0
        start, last = 0, pd.Timestamp(0, tz="UTC")
        for end in ends:
            p, v = price[start : end + 1], volume[start : end + 1]
            last = max(stamps[end], last + pd.Timedelta(microseconds=1))
            vwap = sum(money[start : end + 1]) / sum(v) if sum(v) else np.nan
            rows.append((last, symbol, p[0], max(p), min(p), p[-1], float(sum(v)), vwap, float(len(p))))
            start = end + 1
    return pd.DataFrame(rows, columns=["timestamp", "symbol", "open", "high", "low", "close", "volume", "vwap", "trade_count"]).sort_values(["timestamp", "symbol"], ignore_index=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("drift", [0.0, 0.2])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_equals_plain_python(kind: str, drift: float, seed: int) -> None:
    ticks = stream(seed, drift=drift)
    found = bars_from_ticks(ticks, kind, SIZES[kind], span=5)
    assert len(found) > 10
    pd.testing.assert_frame_equal(found, plain(ticks, kind, SIZES[kind], 5), check_dtype=False, rtol=1e-12)
    assert ((found["low"] <= found["vwap"]) & (found["vwap"] <= found["high"]) | found["vwap"].isna()).all()
    check_bars(found)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), cut=st.integers(0, 600), kind=st.sampled_from(KINDS), scale=st.floats(0.2, 3))
def test_later_ticks_change_nothing(seed: int, cut: int, kind: str, scale: float) -> None:
    ticks = stream(seed)
    size = max(1.0, SIZES[kind] * scale)
    whole, part = bars_from_ticks(ticks, kind, size), bars_from_ticks(ticks.iloc[:cut], kind, size)
    for symbol in ("ES", "NQ"):
        one, other = (b[b["symbol"] == symbol].reset_index(drop=True) for b in (part, whole))
        pd.testing.assert_frame_equal(one, other.iloc[: len(one)])


@pytest.mark.parametrize("kind", KINDS)
def test_no_bar_is_stamped_before_its_ticks(kind: str) -> None:
    ticks = stream(5, symbols=("ES",))
    bars = bars_from_ticks(ticks, kind, SIZES[kind])
    last = ticks["timestamp"].iloc[bars["trade_count"].cumsum().astype(int) - 1].reset_index(drop=True)
    assert (bars["timestamp"] >= last).all()
    assert bars["timestamp"].is_monotonic_increasing
    assert bars["timestamp"].is_unique


def test_a_burst_in_one_microsecond() -> None:
    ticks = pd.DataFrame({"timestamp": pd.Timestamp("2024-01-02 14:30", tz="UTC"), "symbol": "ES", "price": np.arange(1.0, 11), "volume": 1.0})
    bars = bars_from_ticks(ticks, "tick", 2)
    assert bars["timestamp"].dt.microsecond.tolist() == [0, 1, 2, 3, 4]
    assert bars["close"].tolist() == [2, 4, 6, 8, 10]  # their order in the table
    assert bars_from_ticks(ticks.iloc[::-1], "tick", 2)["close"].tolist() == [9, 7, 5, 3, 1]
    assert bars_from_ticks(ticks, "time", 60).empty


def test_imbalance_bars_neither_collapse_nor_run_away() -> None:
    """A balanced market takes `size` ticks a bar on average; one-sided trading closes sooner."""
    rng = np.random.default_rng(0)
    n = 50_000
    def market(share: np.ndarray) -> pd.DataFrame:
        price = 1000 + 0.01 * np.cumsum(np.where(rng.random(n) < share, 1, -1))
        return pd.DataFrame({"timestamp": pd.date_range("2024-01-02", periods=n, freq="s", tz="UTC").as_unit("us"), "symbol": "ES", "price": price, "volume": 1.0})
    balanced = bars_from_ticks(market(np.full(n, 0.5)), "tick_imbalance", 100)["trade_count"]
    assert 80 < balanced.mean() < 120
    pushed = bars_from_ticks(market(np.where(np.arange(n) >= 40_000, 0.8, 0.5)), "tick_imbalance", 100)
    quiet = pushed["trade_count"][pushed["trade_count"].cumsum() <= 40_000]
    assert pushed["trade_count"].iloc[len(quiet) + 1 : len(quiet) + 6].max() < 0.5 * quiet.mean()


@pytest.mark.parametrize(("change", "message"), [
    ({"price": -1.0}, "column `price`, row 0"), ({"price": np.nan}, "column `price`"), ({"volume": -1.0}, "column `volume`"), ({"volume": np.inf}, "column `volume`"),
])
def test_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_ticks(stream(1).assign(**change))
