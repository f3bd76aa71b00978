"""Labels: complete or absent, unchanged by later data, equal to slow versions of themselves, and weighted by what they hold."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mltrading.core.errors import ParameterError
from mltrading.features.futures import other_future
from mltrading.labels.barriers import barrier_frame
from mltrading.labels.horizons import LabelParams, horizon_sigma, label_frame
from mltrading.labels.knockout import knockout_frame
from mltrading.labels.meta import meta_frame
from mltrading.labels.trend import trend_frame
from mltrading.labels.weights import attribution, decay, sequential_bootstrap, uniqueness
from mltrading.market.panel import Panel, until
from mltrading.market.simulate import random_walk

SHORT = settings(max_examples=25, deadline=None, derandomize=True)
FEW = settings(max_examples=8, deadline=None, derandomize=True)
SCALE = st.sampled_from([1e-12, 1.0, 1e12])
SEED, FILL = st.integers(0, 10**6), st.sampled_from(["open", "close"])
CONTRACT = ["timestamp", "symbol", "start", "end", "ret", "sigma"]


def closed(labels: pd.DataFrame) -> pd.Series:
    """When a position was closed."""
    return labels["exit" if "exit" in labels else "end"]


def market(seed: int, scale: float = 1.0, n_bars: int = 120) -> Panel:
    """Three symbols with gaps, late listings and delistings; one has only closes, another lacks an open, high or low here and there."""
    base, rng = random_walk(3, n_bars, seed, closes_only=1), np.random.default_rng(seed)
    fields = {k: b * (1 if k == "volume" else scale) for k, b in base.fields.items()}
    for name in ("open", "high", "low"):
        fields[name][1, rng.random(len(base)) < 0.3] = np.nan
    return Panel(base.times, base.symbols, fields)


def sides_of(panel: Panel) -> pd.DataFrame:
    """With the last move, out every third time."""
    close = panel.view("close").rename_axis(index="timestamp").melt(ignore_index=False, var_name="symbol", value_name="close").dropna().reset_index()
    move = close.groupby("symbol")["close"].pct_change().fillna(0)
    close["side"] = np.where((move * 1e6).round() % 3 == 0, 0, np.sign(move)).astype(int)
    return close.sort_values(["timestamp", "symbol"], ignore_index=True)


KINDS: dict[str, Callable[[Panel, str], pd.DataFrame]] = {
    "horizon": lambda p, fill: label_frame(p, 6, fill, vol_bars=10),
    "barrier": lambda p, fill: barrier_frame(p, 8, fill, profit=0.7, stop=0.5, vol_bars=10),
    "sided barrier": lambda p, fill: barrier_frame(p, 8, fill, profit=0.7, stop=0.5, vol_bars=10, sides=sides_of(p)),
    "trend": lambda p, fill: trend_frame(p, 3, 9, fill, vol_bars=10),
    "meta": lambda p, fill: meta_frame(label_frame(p, 6, fill, vol_bars=10), sides_of(p), cost_bps=5),
    "long knock-out": lambda p, fill: knockout_frame(p, 8, fill, side=1, distance=0.6, unit="sigma", rate_annual=0.03, vol_bars=10),
    "short knock-out": lambda p, fill: knockout_frame(p, 8, fill, side=-1, distance=0.05, unit="fraction", rate_annual=0.03, vol_bars=10),
}


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(SEED, FILL, st.floats(0.1, 0.99), SCALE)
def test_more_data_changes_no_label(kind: str, seed: int, fill: str, place: float, scale: float) -> None:
    """Cutting the panel keeps exactly the labels that were known by then; so does another future."""
    panel, make = market(seed, scale), KINDS[kind]
    labels, cut = make(panel, fill), panel.times[int(place * (len(panel) - 1))]
    known = labels[labels["end"] <= pd.Timestamp(cut, tz="UTC")].reset_index(drop=True)
    pd.testing.assert_frame_equal(make(until(panel, cut), fill), known, check_exact=True)
    other = make(other_future(panel, cut, np.random.default_rng(seed)), fill)
    pd.testing.assert_frame_equal(other[other["end"] <= pd.Timestamp(cut, tz="UTC")].reset_index(drop=True), known, check_exact=True)
    assert np.isfinite(labels.select_dtypes("number")).all(axis=None)
    assert set(CONTRACT) <= set(labels.columns)
    assert (labels["timestamp"] < labels["start"]).all()
    assert (labels["start"] <= labels["end"]).all()
    assert (closed(labels) <= labels["end"]).all()
    assert labels.sort_values(["timestamp", "symbol"]).index.equals(labels.index)


@SHORT
@given(SEED, st.integers(1, 10))
def test_sigma_is_known_at_the_stamp(seed: int, horizon: int) -> None:
    panel = random_walk(3, 160, seed)
    t = panel.times[100]
    frames = [label_frame(p, horizon, vol_bars=20) for p in (panel, other_future(panel, t, np.random.default_rng(seed)))]
    as_it_was, other = (f[f["timestamp"] <= pd.Timestamp(t, tz="UTC")].set_index(["timestamp", "symbol"])["sigma"] for f in frames)
    both = as_it_was.index.intersection(other.index)
    pd.testing.assert_series_equal(as_it_was.loc[both], other.loc[both], check_exact=True)


@SHORT
@given(SEED, st.integers(1, 10))
def test_horizons_equal_shifted_closes(seed: int, horizon: int) -> None:
    panel = random_walk(2, 120, seed)
    labels = label_frame(panel, horizon, "close", vol_bars=10)
    for i, symbol in enumerate(panel.symbols):
        own = pd.Series(panel["close"][i], panel.index).dropna()
        mine = labels[labels["symbol"] == symbol].set_index("timestamp")
        ret = own.shift(-1 - horizon) / own.shift(-1) - 1
        sigma = own.pct_change().rolling(10).std() * np.sqrt(horizon)
        expected = pd.DataFrame({"ret": ret, "sigma": sigma}).dropna()
        np.testing.assert_allclose(mine[["ret", "sigma"]], expected, rtol=1e-9, atol=1e-14)
        assert mine.index.equals(expected.index)


def decisions(panel: Panel, horizon: int) -> list[tuple[str, list[dict[str, float]], int, float]]:
    """Symbol, its bars, the own bar of the decision, and the volatility, for each decision that has one."""
    sigma, out = horizon_sigma(panel, horizon, 10), []
    for i, symbol in enumerate(panel.symbols):
        columns = [t for t in range(len(panel)) if not math.isnan(panel["close"][i, t])]
        bars = [{f: float(panel[f][i, t]) for f in ("open", "high", "low", "close")} | {"t": t} for t in columns]
        out += [(symbol, bars, k, float(sigma[i, t])) for k, t in enumerate(columns) if not math.isnan(sigma[i, t])]
    return out


def story(bars: list[dict[str, float]], e: int, horizon: int, fill: str) -> list[tuple[int, str, float, float]]:
    """What a position filled in own bar e sees, in order: (own bar, "price" or "range" or "time", low, high)."""
    out: list[tuple[int, str, float, float]] = []
    for j in range(e, min(e + horizon + 1, len(bars))):
        b = bars[j]
        at_open = fill == "open" and not math.isnan(b["open"])
        if j > e and not math.isnan(b["open"]):
            out.append((j, "price", b["open"], b["open"]))
        if j == e + horizon and at_open:
            return [*out, (j, "time", b["open"], b["open"])]
        if j > e or at_open:
            out += [(j, "range", b["low"], b["high"]), (j, "price", b["close"], b["close"])]
        if j == e + horizon:
            out.append((j, "time", b["close"], b["close"]))
    return out


def filled(bar: dict[str, float], fill: str) -> float:
    return bar["open"] if fill == "open" and not math.isnan(bar["open"]) else bar["close"]


def compare(labels: pd.DataFrame, panel: Panel, expected: list[tuple]) -> None:
    """Rows of (timestamp column, symbol, start column, end column, whole number, two floats) against a table's."""
    columns = [panel.index.get_indexer(c) for c in (labels["timestamp"], labels["start"], closed(labels))]
    values = labels.drop(columns=["timestamp", "symbol", "start", "end", "exit"], errors="ignore")
    rows = sorted(zip(columns[0], labels["symbol"], columns[1], columns[2], *(values[c] for c in values), strict=True), key=lambda r: r[:2])
    expected = sorted(expected, key=lambda r: r[:2])
    assert [r[:4] for r in rows] == [r[:4] for r in expected]
    np.testing.assert_allclose([r[4:] for r in rows], [r[4:] for r in expected], rtol=1e-7, atol=1e-12)


@FEW
@given(SEED, FILL, st.integers(1, 12), st.floats(0.2, 2), st.floats(0.2, 2), st.sampled_from([1, -1]))
def test_barriers_equal_a_story_told_slowly(seed: int, fill: str, horizon: int, profit: float, stop: float, side: int) -> None:
    panel, expected = market(seed), []
    for symbol, bars, k, sigma in decisions(panel, horizon):
        if k + 1 + horizon >= len(bars):
            continue
        entry, goal, limit = filled(bars[k + 1], fill), side * profit * sigma, -side * stop * sigma
        for j, what, low, high in story(bars, k + 1, horizon, fill):
            good, bad = (high, low) if side > 0 else (low, high)
            if side * (bad / entry - 1 - limit) <= 0:
                ret, touched = (bad / entry - 1 if what == "price" else limit), -1
            elif side * (good / entry - 1 - goal) >= 0:
                ret, touched = (good / entry - 1 if what == "price" else goal), 1
            elif what == "time":
                ret, touched = low / entry - 1, 0
            else:
                continue
            expected.append((bars[k]["t"], symbol, bars[k + 1]["t"], bars[j]["t"], side, touched, side * ret, sigma))
            break
    sides = sides_of(panel).assign(side=side)
    compare(barrier_frame(panel, horizon, fill, profit=profit, stop=stop, vol_bars=10, sides=sides), panel, expected)


@FEW
@given(SEED, FILL, st.integers(1, 12), st.floats(0.2, 2), st.sampled_from([1, -1]), st.floats(-0.1, 0.5))
def test_knockouts_equal_a_story_told_slowly(seed: int, fill: str, horizon: int, multiple: float, side: int, rate: float) -> None:
    panel, expected = market(seed), []
    for symbol, bars, k, sigma in decisions(panel, horizon):
        if k + 1 + horizon >= len(bars):
            continue
        entry, d, begin = filled(bars[k + 1], fill), multiple * sigma, panel.index[int(bars[k + 1]["t"])]
        for j, what, low, high in story(bars, k + 1, horizon, fill):
            years = (panel.index[int(bars[j]["t"])] - begin) / pd.Timedelta(days=365)
            level = entry * (1 - side * d) * (1 + rate * years)
            worst = low if side > 0 else high
            if side * (worst - level) <= 0 or what == "time":
                knocked = side * (worst - level) <= 0
                ret = -1.0 if knocked else side * (worst - level) / (d * entry) - 1
                expected.append((bars[k]["t"], symbol, bars[k + 1]["t"], bars[j]["t"], side, d, int(knocked), ret, sigma))
                break
    compare(knockout_frame(panel, horizon, fill, side=side, distance=multiple, unit="sigma", rate_annual=rate, vol_bars=10), panel, expected)


@pytest.mark.parametrize("side", [1, -1])
def test_an_open_beyond_the_barrier_is_seen_without_high_and_low(side: int) -> None:
    close = np.array([[100, 101, 99, 100, 100, 100, 100.0]])
    opened = np.array([[100, 100, 100, 100, 100, 100 - 20 * side, 100.0]])
    panel = Panel(pd.bdate_range("2020-01-01 21:00", periods=7).as_unit("us").to_numpy(), ("A",), {"open": opened, "close": close})
    sides = pd.DataFrame({"timestamp": panel.index[[3]], "symbol": "A", "side": side})
    stopped = barrier_frame(panel, 2, profit=np.inf, stop=1.0, vol_bars=3, sides=sides).iloc[0]
    assert (stopped["exit"], stopped["touched"]) == (panel.index[5], -1)
    assert stopped["ret"] == pytest.approx(-0.2)
    knocked = knockout_frame(panel, 2, side=side, distance=0.1, unit="fraction", rate_annual=0.0, vol_bars=3).iloc[0]
    assert (knocked["exit"], knocked["knocked"], knocked["ret"]) == (panel.index[5], 1, -1.0)


@FEW
@given(SEED, FILL, st.sampled_from([0.0, 5.0, 200.0]))
def test_meta_labels_follow_the_sides(seed: int, fill: str, cost_bps: float) -> None:
    panel = market(seed)
    sides = sides_of(panel)
    side = sides.set_index(["timestamp", "symbol"])["side"].to_dict()
    for kind, earned in (("horizon", lambda r: side[r.timestamp, r.symbol] * r.ret), ("sided barrier", lambda r: r.ret)):
        labels = KINDS[kind](panel, fill)
        followed = [r for r in labels.itertuples() if side[r.timestamp, r.symbol] != 0]
        meta = meta_frame(labels, sides, cost_bps=cost_bps)
        assert meta[["timestamp", "symbol", "end"]].to_numpy().tolist() == [[r.timestamp, r.symbol, r.end] for r in followed]
        assert meta["side"].tolist() == [side[r.timestamp, r.symbol] for r in followed]
        assert meta["ret"].tolist() == [earned(r) for r in followed]
        assert meta["meta"].tolist() == [int(earned(r) - cost_bps / 1e4 > 0) for r in followed]


@settings(max_examples=4, deadline=None, derandomize=True)
@given(SEED, FILL, st.integers(2, 5), st.integers(0, 6))
def test_trends_equal_regressions(seed: int, fill: str, lo: int, more: int) -> None:
    panel, expected, hi = market(seed, n_bars=70), [], lo + more
    for symbol, bars, k, sigma in decisions(panel, hi):
        if k + 1 + hi >= len(bars):
            continue
        y = np.log([filled(b, fill) for b in bars[k + 1 : k + 2 + hi]])
        found = []
        for n in range(lo, hi + 1):
            x = np.arange(n + 1) - n / 2
            slope = x @ y[: n + 1] / (x @ x)
            rest = y[: n + 1] - y[: n + 1].mean() - slope * x
            found.append((slope / np.sqrt(rest @ rest / (n - 1) / (x @ x)), n))
        t, n = max(found, key=lambda f: abs(f[0]))
        expected.append((bars[k]["t"], symbol, bars[k + 1]["t"], bars[k + 1 + hi]["t"], np.sign(t), t, n, np.exp(y[hi] - y[0]) - 1, sigma))
    compare(trend_frame(panel, lo, hi, fill, vol_bars=10), panel, expected)


def odd_market(scale: float) -> Panel:
    """A constant price, no bar, one bar, and a price that jumps between the smallest and the largest."""
    times = pd.bdate_range("2020-01-01 21:00", periods=60).as_unit("us").to_numpy()
    close = np.full((4, 60), scale)
    close[1], close[2, 1:], close[3, ::2] = np.nan, np.nan, 1 / scale
    return Panel(times, ("CONST", "NONE", "ONE", "WILD"), {"close": close, "open": close * 1.001, "high": close * 1.01, "low": close / 1.01})


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("kind", KINDS)
def test_odd_prices_give_numbers_or_no_label(kind: str, scale: float) -> None:
    for fill in ("open", "close"):
        labels = KINDS[kind](odd_market(scale), fill)
        assert set(labels["symbol"]) <= {"WILD"}
        assert np.isfinite(labels.select_dtypes("number")).all(axis=None)
        for panel in (until(odd_market(scale), "2020-01-02"), until(odd_market(scale), "2019-12-31")):
            assert KINDS[kind](panel, fill).empty


def test_a_standing_price_has_no_label() -> None:
    panel = random_walk(2, 120, seed=1, ragged=False)
    close = panel["close"].copy()
    close[0, 40:90] = close[0, 40]
    labels = label_frame(Panel(panel.times, panel.symbols, {"close": close}), 3, vol_bars=10)
    mine = labels[labels["symbol"] == "S000"]["timestamp"]
    still = panel.index[50:90]  # ten returns of zero
    assert not mine.isin(still).any()
    assert panel.index[[49, 90]].isin(mine).all()
    assert len(label_frame(until(panel, panel.times[5]), 3, vol_bars=10)) == 0


@FEW
@given(SEED, FILL, st.floats(0.1, 0.99))
def test_whether_a_label_exists_does_not_depend_on_its_outcome(seed: int, fill: str, place: float) -> None:
    """Decisions with a barrier label, or an option's, are those with a horizon label: near barriers, far ones and none, at any end of the data."""
    panel = market(seed)
    panel = until(panel, panel.times[int(place * (len(panel) - 1))])
    plain, keys = label_frame(panel, 8, fill, vol_bars=10), ["timestamp", "symbol", "start", "end"]
    expected = plain[keys]
    for x in (0.1, 1.0, np.inf):
        pd.testing.assert_frame_equal(barrier_frame(panel, 8, fill, profit=x, stop=x, vol_bars=10)[keys], expected)
    for side, unit in ((1, "sigma"), (-1, "fraction")):
        options = knockout_frame(panel, 8, fill, side=side, distance=0.01, unit=unit, rate_annual=0.03, vol_bars=10)
        pd.testing.assert_frame_equal(options[keys], expected)


def spans_of(labels: pd.DataFrame, axis: np.ndarray) -> np.ndarray:
    """(n, bars): which bars of a symbol's axis each label spans."""
    first, last = (np.searchsorted(axis, c.to_numpy("datetime64[us]")) for c in (labels["start"], closed(labels)))
    bars = np.arange(len(axis))
    return (bars > np.minimum(first, last - 1)[:, None]) & (bars <= last[:, None])


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(SEED, FILL, st.booleans())
def test_weights_follow_their_definition(kind: str, seed: int, fill: str, with_panel: bool) -> None:
    panel = market(seed)
    labels = KINDS[kind](panel, fill)
    got, shared = uniqueness(labels, panel if with_panel else None), attribution(labels, panel)
    assert ((got > 0) & (got <= 1)).all()
    raw = np.empty(len(labels))
    for symbol, rows in labels.groupby("symbol").indices.items():
        mine, i = labels.iloc[rows], panel.symbols.index(str(symbol))
        own = panel.times[panel.alive[i]]
        axis = own if with_panel else np.unique(np.concatenate([c.to_numpy("datetime64[us]") for c in (mine["start"], closed(mine))]))
        spans = spans_of(mine, axis)
        np.testing.assert_allclose(got[rows], (spans / np.maximum(spans.sum(axis=0), 1)).sum(axis=1) / spans.sum(axis=1), rtol=1e-12)
        spans, close = spans_of(mine, own), panel["close"][i, panel.alive[i]]
        returns = np.log(close / np.r_[close[0], close[:-1]])
        raw[rows] = np.abs((spans * returns / np.maximum(spans.sum(axis=0), 1)).sum(axis=1))
    np.testing.assert_allclose(shared, raw / raw.mean(), rtol=1e-6, atol=1e-9)


@FEW
@given(SEED, st.floats(-0.9, 1))
def test_decay_falls_with_age(seed: int, oldest: float) -> None:
    labels = KINDS["barrier"](market(seed), "close")
    unique = uniqueness(labels)
    factor = decay(labels, unique, oldest)
    assert ((factor >= max(oldest, 0) - 1e-12) & (factor <= 1)).all()
    assert (np.diff(factor) >= -1e-12).all()
    assert labels.assign(factor=factor).groupby("timestamp")["factor"].nunique().max() == 1
    assert factor[-1] == pytest.approx(1)


def slow_draws(spans: np.ndarray, uniform: np.ndarray) -> list[int]:
    """The sequential bootstrap as it is defined: all probabilities anew for each draw."""
    drawn, out = np.zeros(spans.shape[1]), []
    for u in uniform:
        chance = (spans / (1 + drawn)).sum(axis=1) / spans.sum(axis=1)
        out.append(int(np.searchsorted(np.cumsum(chance), u * chance.sum(), side="right")))
        drawn += spans[out[-1]]
    return out


@FEW
@given(SEED, st.integers(0, 1000))
def test_sequential_bootstrap_equals_its_definition(seed: int, draw_seed: int) -> None:
    panel = market(seed)
    labels = KINDS["barrier"](panel, "open")
    labels = labels[labels["symbol"] == labels["symbol"].iloc[0]].reset_index(drop=True)
    own = panel.times[panel.alive[panel.symbols.index(labels["symbol"][0])]]
    expected = slow_draws(spans_of(labels, own), np.random.default_rng(draw_seed).random(60))
    assert sequential_bootstrap(labels, 60, draw_seed, panel).tolist() == expected


def test_parameters_are_checked() -> None:
    good = {"horizons": [1, 5], "vol_bars": 20, "fill": "close"}
    assert LabelParams(**good).horizons == [1, 5]
    for bad in ({"horizons": [0]}, {"horizons": []}, {"horizons": [5, 1]}, {"vol_bars": 1}, {"fill": "mid"}, {"horizon": 5}):
        with pytest.raises(ValidationError):
            LabelParams(**(good | bad))


BARRIER = {"horizon_bars": 5, "profit": 1.0, "stop": 1.0, "vol_bars": 10}
TREND = {"lo_bars": 3, "hi_bars": 9, "vol_bars": 10}
KNOCKOUT = {"horizon_bars": 5, "side": 1, "distance": 0.1, "unit": "fraction", "rate_annual": 0.0, "vol_bars": 10}
WRONG = [
    (label_frame, {"horizon_bars": 5, "vol_bars": 10}, {"horizon_bars": 0, "vol_bars": 1}),
    (barrier_frame, BARRIER, {"horizon_bars": 0, "profit": -1.0, "stop": 0.0, "vol_bars": 1}),
    (trend_frame, TREND, {"lo_bars": 1, "hi_bars": 2, "vol_bars": 1}),
    (knockout_frame, KNOCKOUT, {"horizon_bars": 0, "side": 2, "distance": 1.0, "unit": "bps", "rate_annual": math.nan, "vol_bars": 1}),
]


@pytest.mark.parametrize(("make", "good", "name", "value"), [(make, good, name, value) for make, good, bad in WRONG for name, value in bad.items()])
def test_a_bad_parameter_is_named(make: Callable[..., pd.DataFrame], good: dict[str, object], name: str, value: object) -> None:
    panel = market(0)
    make(panel, **good)
    with pytest.raises(ParameterError, match=rf"labels\.{name}: "):
        make(panel, **(good | {name: value}))
    with pytest.raises(ParameterError, match="not a price to fill at"):
        make(panel, fill="mid", **good)


@pytest.mark.parametrize("horizon", [1, 250])
def test_a_price_that_moves_by_rounding_has_no_label_at_any_horizon(horizon: int) -> None:
    """Returns of a few parts in 1e11 are the last digits of a price that stands still; a longer horizon does not make a volatility of them."""
    close = 100 * (1 + 2e-11 * np.random.default_rng(0).standard_normal((1, 300)))
    panel = Panel(pd.bdate_range("2020-01-01 21:00", periods=300).as_unit("us").to_numpy(), ("A",), {"close": close})
    assert np.isnan(horizon_sigma(panel, horizon, 20)).all()
