"""The four expert signals against brute force on panels with holes, and on real crises."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import entropy, rankdata

from mltrading.market.calendar import close_of
from mltrading.market.macro import LAGS, empty_macro, lagged
from mltrading.market.panel import Panel, from_frame, until
from mltrading.market.simulate import random_walk
from mltrading.systems.regime.experts import (
    UNAVAILABLE,
    EntropyShiftParams,
    FragilityParams,
    MacroCreditParams,
    VolatilityComplexityParams,
    entropy_shift,
    fragility,
    fragility_cap,
    macro_credit,
    volatility_complexity,
)

REAL = os.environ.get("MLTRADING_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="needs MLTRADING_DATA")

CREDIT = MacroCreditParams(slope_long="long", slope_short="short", safe="S000", risky="S001", yield_strong=None, yield_weak=None, change_bars=5, norm_bars=80, least_bars=40, slope_full_pp=1.2,
                           widening_full_sd=2.0, slope_weight=0.5, warning_sd=1.0, downgrade_at=-0.4, upgrade_at=0.75, max_age_days=10, yield_age_days=60)
STORM = VolatilityComplexityParams(vix="vix", vvix="vvix", skew="skew", window_bars=100, least_bars=30, vix_weight=0.5, vvix_weight=0.3, skew_weight=0.2, panic_score=0.7, panic_vix=30.0,
                                   calm_rank=0.5, unstable_rank=0.8, max_age_days=5)
TIGHT = FragilityParams(symbols=["S000", "S001", "S002", "S003", "S004"], window_bars=30, least_bars=20, normal=0.3, max_age_days=5)
SHIFT = EntropyShiftParams(market="S002", window_bars=20, history_bars=40, bins=10, reach_sd=3.0, norm_bars=60, least_bars=30, z_at=1.0, run_bars=3, cap=0.75, max_age_days=5)
CALLS = ((macro_credit, CREDIT), (volatility_complexity, STORM), (fragility, TIGHT), (entropy_shift, SHIFT))


def holed(seed: int, n_bars: int = 260) -> Panel:
    """A panel whose symbols are halted now and then, for a day and for weeks."""
    panel, rng = random_walk(n_symbols=5, n_bars=n_bars, seed=seed), np.random.default_rng(seed)
    gone = rng.random(panel["close"].shape) < 0.02
    for k in range(5):
        start = int(rng.integers(60, n_bars - 30))
        gone[k, start : start + int(rng.integers(2, 20))] = True
    return Panel(panel.times, panel.symbols, {f: np.where(gone, np.nan, b) for f, b in panel.fields.items()})


def figures(panel: Panel, seed: int) -> pd.DataFrame:
    """Macro values of most days, known the evening after."""
    rng, parts = np.random.default_rng(seed), []
    for name, base in {"long": 3.0, "short": 2.5, "vix": 20.0, "vvix": 95.0, "skew": 130.0}.items():
        values = base * np.exp(0.05 * rng.standard_normal(len(panel)).cumsum())
        keep = (rng.random(len(panel)) < 0.9) & ~((np.arange(len(panel)) > 150) & (np.arange(len(panel)) < 158))
        day = panel.index.normalize()
        parts.append(pd.DataFrame({"timestamp": (day + pd.Timedelta(hours=40)).as_unit("us"), "series": name, "value": values, "reference": day})[keep])
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("signal", "params"), CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_the_future_changes_nothing(signal, params, seed: int) -> None:
    panel = holed(seed)
    macro = figures(panel, seed)
    whole = signal(panel, macro, params)
    assert {"score", "state", "reason"} <= set(whole.columns)
    assert whole.index.equals(panel.index)
    for cut in (70, 155, 200, 258):
        t = panel.index[cut]
        pd.testing.assert_frame_equal(signal(until(panel, t), macro[macro["timestamp"] <= t], params), whole.iloc[: cut + 1], check_exact=True)
        other = Panel(panel.times, panel.symbols, {f: np.where(np.arange(len(panel)) > cut, 2 * b[:, ::-1], b) for f, b in panel.fields.items()})
        later = macro.assign(value=np.where(macro["timestamp"] > t, 9.0, macro["value"]))
        pd.testing.assert_frame_equal(signal(other, later, params).iloc[: cut + 1], whole.iloc[: cut + 1], check_exact=True)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("signal", "params"), CALLS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_signal_that_is_not_available_says_why_and_does_nothing(signal, params, seed: int) -> None:
    panel = holed(seed)
    table = signal(panel, figures(panel, seed), params)
    silent = table["state"] == UNAVAILABLE
    assert silent.any()
    assert not silent.all()
    assert (table.loc[silent, "reason"] != "").all()
    assert table.loc[silent, "score"].isna().all()
    assert table.loc[~silent, "score"].notna().all()
    if "cap" in table:
        assert (table.loc[silent, "cap"] == 1).all()
        assert table["cap"].gt(0).all()
        assert table["cap"].le(1).all()


def carried(panel: Panel, symbols: list[str], days: int) -> pd.DataFrame:
    """Closes by pandas: the newest one of no more than some days, on days on which half of the symbols have a bar."""
    close = panel.view("close")[symbols]
    seen = pd.DataFrame({s: close.index.where(close[s].notna()) for s in symbols}, index=close.index).ffill()
    old = pd.DataFrame({s: close.index - seen[s] for s in symbols}, index=close.index) > pd.Timedelta(days=days)
    return close.ffill().mask(old)[close.notna().sum(axis=1) * 2 >= len(symbols)]


@pytest.mark.parametrize("seed", range(3))
def test_fragility_is_numpys_day_by_day(seed: int) -> None:
    panel, n = holed(seed), len(TIGHT.symbols)
    table = fragility(panel, empty_macro(), TIGHT)
    close = carried(panel, TIGHT.symbols, TIGHT.max_age_days)
    returns = np.log(close).diff()
    checked = 0
    for k, t in enumerate(close.index):
        rows = returns.iloc[max(0, k - TIGHT.window_bars + 1) : k + 1].dropna().to_numpy()
        if k < TIGHT.window_bars - 1 or len(rows) < TIGHT.least_bars or close.loc[t].isna().any():
            assert table.loc[t, "state"] == UNAVAILABLE
            continue
        c = np.corrcoef(rows.T)
        mean, share = np.abs(c[~np.eye(n, dtype=bool)]).mean(), np.linalg.eigvalsh(c)[-1] / n
        np.testing.assert_allclose(table.loc[t, ["mean_correlation", "first_share"]].astype(float), [mean, share], rtol=1e-11)
        np.testing.assert_allclose(table.loc[t, "score"], (mean + (share * n - 1) / (n - 1)) / 2, rtol=1e-11)
        checked += 1
    assert checked > 30


def test_fragility_does_not_depend_on_the_order_or_scale_of_symbols() -> None:
    panel = holed(4)
    one = fragility(panel, empty_macro(), TIGHT)
    other = fragility(panel, empty_macro(), TIGHT.model_copy(update={"symbols": TIGHT.symbols[::-1]}))
    scaled = fragility(Panel(panel.times, panel.symbols, {"close": panel["close"] * np.arange(1, 6)[:, None]}), empty_macro(), TIGHT)
    for table in (other, scaled):
        np.testing.assert_allclose(table["score"], one["score"], rtol=1e-9)


def test_a_more_fragile_market_is_never_capped_less() -> None:
    cap = fragility_cap(np.linspace(0, 1, 1001), TIGHT)
    assert (np.diff(cap) <= 0).all()
    assert cap[0] == 1
    assert cap[-1] == (1 + 4 * 0.3) / 5


@pytest.mark.parametrize("seed", range(3))
def test_entropy_is_scipys_on_own_bars(seed: int) -> None:
    panel = holed(seed)
    table = entropy_shift(panel, empty_macro(), SHIFT)
    close = panel.view("close")["S002"].dropna()
    returns = np.log(close).diff().dropna()
    inner = np.linspace(-SHIFT.reach_sd, SHIFT.reach_sd, SHIFT.bins - 1)
    expected = pd.Series(np.nan, close.index)
    for k in range(SHIFT.history_bars + SHIFT.window_bars - 1, len(returns)):
        begin = k - SHIFT.window_bars + 1
        past, now = returns.iloc[begin - SHIFT.history_bars : begin], returns.iloc[begin : k + 1]
        bins = np.searchsorted(past.mean() + past.std(ddof=0) * inner, now, side="right")
        expected[returns.index[k]] = entropy(np.bincount(bins))
    np.testing.assert_allclose(table["entropy"].reindex(close.index), expected, rtol=1e-10)
    norm = expected.shift(SHIFT.window_bars).rolling(SHIFT.norm_bars, min_periods=SHIFT.least_bars)
    z = (expected - norm.mean()) / norm.std()
    np.testing.assert_allclose(table["score"].reindex(close.index), z, rtol=1e-8, atol=1e-8)
    far = np.sign(z).where(z.abs() >= SHIFT.z_at, 0.0)
    three = (far == far.shift(1)) & (far == far.shift(2)) & (far != 0)
    word = pd.Series(np.select([z.isna(), three & (far > 0), three], [UNAVAILABLE, "dispersing", "compressing"], "stable"), close.index)
    assert table["state"].reindex(close.index).tolist() == word.tolist()


def test_ranks_are_scipys() -> None:
    panel = random_walk(n_symbols=1, n_bars=260, seed=1)
    macro = figures(panel, 1)
    table = volatility_complexity(panel, macro, STORM)
    for name in ("vix", "vvix", "skew"):
        x = table[name].to_numpy()
        for t in range(len(x)):
            window = x[max(0, t - STORM.window_bars + 1) : t + 1]
            window = window[~np.isnan(window)]
            there = len(window) >= STORM.least_bars and not np.isnan(x[t])
            np.testing.assert_allclose(table[f"{name}_rank"].iloc[t], (rankdata(window)[-1] - 1) / (len(window) - 1) if there else np.nan, rtol=1e-12)


def test_panels_with_too_little_are_not_available() -> None:
    panel = until(holed(0), holed(0).index[3])
    for signal, params in CALLS:
        assert set(signal(panel, empty_macro(), params)["state"]) == {UNAVAILABLE}


@pytest.fixture(scope="module")
def real() -> tuple[Panel, pd.DataFrame]:
    wanted = ["EFA", "GLD", "HYG", "IEF", "LQD", "SPY", "TLT", "VWO", "XLE"]
    bars = pd.read_parquet(Path(str(REAL)) / "bars/etf230_daily.parquet", filters=[("symbol", "in", wanted)])
    frame = pd.DataFrame({"timestamp": close_of(pd.DatetimeIndex(bars["timestamp"]), "XNYS"), "symbol": bars["symbol"].to_numpy(), "close": bars["adj_close"].to_numpy(np.float64)})
    series = pd.read_parquet(Path(str(REAL)) / "macro/series.parquet")
    parts = []
    for theirs, ours, lag in (("VIXCLS", "vix", "VIXCLS"), ("VVIX", "vvix", "VIXCLS"), ("SKEW", "skew", "VIXCLS"), ("DGS10", "DGS10", "DGS10"), ("^IRX", "IRX", "DGS10")):
        own = series[(series["series"] == theirs) & (series["timestamp"] >= "2004")]
        parts.append(lagged(pd.Series(own["value"].to_numpy(), pd.DatetimeIndex(own["timestamp"])), ours, LAGS[lag]))
    return from_frame(frame.sort_values(["timestamp", "symbol"], ignore_index=True)), pd.concat(parts, ignore_index=True)


@needs_data
def test_real_crises_read_as_crises(real: tuple[Panel, pd.DataFrame]) -> None:
    panel, macro = real
    credit = macro_credit(panel, macro, CREDIT.model_copy(update={"slope_long": "DGS10", "slope_short": "IRX", "safe": "IEF", "risky": "HYG", "change_bars": 20, "norm_bars": 504, "least_bars": 252}))
    storm = volatility_complexity(panel, macro, STORM.model_copy(update={"window_bars": 504, "least_bars": 252}))
    tight = fragility(panel, macro, FragilityParams(symbols=["SPY", "EFA", "VWO", "XLE", "GLD", "TLT", "LQD", "HYG"], window_bars=60, least_bars=45, normal=0.5, max_age_days=5))
    assert (credit.loc["2019-08-15":"2019-08-30", "slope"] < 0).all()
    assert credit.loc["2019-08", "state"].eq("downgrade").any()
    assert credit.loc["2023", "state"].eq("upgrade").sum() == 0
    assert storm.loc["2008-10-10":"2008-10-31", "state"].eq("panic").all()
    assert storm.loc["2020-03-10":"2020-03-31", "state"].eq("panic").all()
    assert not storm.loc["2013":"2014", "state"].eq("panic").any()
    assert tight.loc["2011-10", "score"].min() > tight.loc["2017-06", "score"].max()
    assert tight.loc["2007-05-01", "state"].tolist() == [UNAVAILABLE]  # HYG was one month old
