"""Sweeps: the engine's accounts, the metrics' numbers, no look ahead, and every trial counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams, Ledger, simulate
from mltrading.backtest.rules import BREAKOUT, MEAN_REVERSION, MOMENTUM, SMA_CROSS, Rule, decide, grid
from mltrading.backtest.sweep import heatmap, sweep_rule
from mltrading.core.errors import DataError, LeakError, ParameterError
from mltrading.core.jit import njit
from mltrading.features.machine import FeatureBlock
from mltrading.market.panel import Panel
from mltrading.market.simulate import random_walk
from mltrading.validation.metrics import performance
from mltrading.validation.trials import read

COSTS = CostParams(commission_bps=3, half_spread_bps=5, impact_coefficient=1, adv_bars=3, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.01, borrow_bps_annual=300, fill="open",
                   commission_per_share=0.01, commission_minimum=1.0, slippage_bps=2, margin_rate_annual_bps=800)
PARAMS = BacktestParams(initial_cash=1e5, delay_bars=0, max_gross=1, delist_after_bars=3, delist_haircut=0.4, start="panel")


@njit(nogil=True)
def _follow(bars: Any, config: Any, out: Any) -> None:
    for t in range(bars.shape[1]):
        out[t] = config[0] * bars[0, t]


FOLLOW = Rule("follow", _follow, ("size",), ("wish",))


def market(seed: int, n: int, bars: int, jump: float) -> Panel:
    """Prices with late listings, gaps, bars without volume and symbols that end early; the axis has no empty instant."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, jump, (n, bars)), axis=1))
    alive = rng.random((n, bars)) > 0.15
    for i in range(1, n):
        alive[i, : rng.integers(0, bars // 2)] = False
        alive[i, bars - rng.integers(0, bars // 2):] = False
        alive[i, bars // 2] = True
    alive[0] = True
    fields = {"open": close * np.exp(rng.normal(0, jump / 3, close.shape)), "close": close, "volume": rng.uniform(1e3, 1e5, close.shape) * (rng.random(close.shape) > 0.1)}
    times = pd.bdate_range("2020-01-01", periods=bars).as_unit("us").to_numpy() + np.timedelta64(21, "h")
    return Panel(times, tuple(f"S{i}" for i in range(n)), {k: np.where(alive, b, np.nan) for k, b in fields.items()})


def wishes(panel: Panel, seed: int, biggest: float = 1.0) -> FeatureBlock:
    """Random exposures, a third of them none and a fifth of them zero, the first one included."""
    rng = np.random.default_rng(seed)
    w = rng.uniform(-biggest, biggest, panel["close"].shape)
    w[rng.random(w.shape) < 0.2] = 0.0
    w[rng.random(w.shape) < 0.33] = np.nan
    w[np.arange(len(w)), panel.alive.argmax(axis=1)] = 0.0
    return FeatureBlock(("wish",), panel.times, panel.symbols, w[None], panel.alive)


def of_engine(panel: Panel, block: FeatureBlock, i: int, size: float, costs: CostParams, params: BacktestParams) -> tuple[Ledger, np.ndarray]:
    """The engine's ledger of one symbol on its own bars, and the instants of the panel that it covers."""
    bars = np.flatnonzero(panel.alive[i])
    at = np.concatenate([bars, np.arange(bars[-1] + 1, len(panel))])
    alone = Panel(panel.times[at], (panel.symbols[i],), {f: np.ascontiguousarray(b[i:i + 1, at]) for f, b in panel.fields.items()})
    targets = np.full((len(at), 1), np.nan)
    targets[: len(bars), 0] = size * block["wish"][i, bars]
    return simulate(alone, targets, costs, params), at


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), jump=st.floats(0.001, 0.15), delay=st.integers(0, 3), patience=st.integers(1, 6), fill=st.sampled_from(["open", "close"]), scale=st.floats(0, 4),
       size=st.floats(0.01, 1), participation=st.sampled_from([None, 0.001, 0.05]), call=st.sampled_from([0.0, 0.9, 1.0]))
def test_accounts_are_the_engines(seed: int, jump: float, delay: int, patience: int, fill: str, scale: float, size: float, participation: float | None, call: float) -> None:
    panel = market(seed, 3, 50, jump)
    block, costs = wishes(panel, seed + 1), COSTS.model_copy(update={"fill": fill, "participation": participation})
    params = PARAMS.model_copy(update={"delist_after_bars": patience, "margin_call": call})
    made = sweep_rule(panel, FOLLOW, grid(size=[size, size / 2]), costs, params, features=block, delay_bars=delay, cost_scale=scale, check=False, threads=1)
    total = np.zeros(len(panel))
    for i in range(3):
        ledger, at = of_engine(panel, block, i, size, costs.scaled(scale), params.model_copy(update={"delay_bars": delay}))
        equity = pd.Series(ledger.equity["equity"].to_numpy(), at).reindex(range(len(panel))).ffill().fillna(1e5)
        total += equity.to_numpy()
        row = made.table.query("config == 0").iloc[i]
        assert row["total_return"] == pytest.approx(equity.iloc[-1] / 1e5 - 1, abs=1e-9)
        assert row["costs"] == pytest.approx(ledger.equity[["costs", "borrow", "interest", "delisting"]].to_numpy().sum() / 1e5, rel=1e-9, abs=1e-12)
        assert row["exposure"] == pytest.approx((ledger.equity["gross"] != 0).mean())
        if (equity > 0).all() and equity.min() < equity.max():
            theirs = performance(ledger.equity["ret"])
            mine = row[["annual_return", "vol_annual", "sharpe_annual", "max_drawdown", "turnover_annual"]].to_numpy(float)
            np.testing.assert_allclose(mine, [*(theirs[m] for m in ("cagr", "vol_annual", "sharpe_annual", "max_drawdown")), ledger.equity["turnover"].mean() * 252], rtol=1e-9, atol=1e-9)
    assume((total > 0).all())
    np.testing.assert_allclose(3e5 * (1 + made.returns[0]).cumprod(), total, rtol=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_trades_are_counted(seed: int) -> None:
    """Without costs, with fills at the close: a trade's profit is the price's move times the shares, one after the other."""
    panel = market(seed, 2, 60, 0.02)
    block, costs = wishes(panel, seed), COSTS.scaled(0).model_copy(update={"fill": "close"})
    made = sweep_rule(panel, FOLLOW, grid(size=[1.0]), costs, PARAMS, features=block, check=False)
    for i in range(2):
        ledger, at = of_engine(panel, block, i, 1.0, costs, PARAMS)
        fills = ledger.fills.assign(bar=pd.DatetimeIndex(ledger.fills["timestamp"]).map({t: k for k, t in enumerate(panel.index[at])}))
        shares, profit, trades, won, closed = 0.0, 0.0, 0, 0, 0
        price = pd.Series(panel["close"][i, at]).ffill().to_numpy()
        done = fills.set_index("bar")["quantity"].to_dict()
        settled = fills.loc[fills["kind"] == "delisting"].set_index("bar")["fill_price"].to_dict()
        for t in range(len(at)):
            profit += shares * (settled.get(t, price[t]) - price[t - 1]) if t else 0.0
            after = shares + done.get(t, 0.0)
            if shares and shares * after <= 0:
                closed, won = closed + 1, won + (profit > 1e-9)
            if after and shares * after <= 0:
                trades, profit = trades + 1, 0.0
            shares = after
        row = made.table.iloc[i]
        assert row["trades"] == trades
        assert closed == 0 or row["win_rate"] == pytest.approx(won / closed)
    assert made.portfolio["trades"][0] == made.table["trades"].sum()


def test_a_turn_divides_its_costs() -> None:
    """500 long at 100, turned into 500 short at 100.15: the turn's commission belongs to both trades, half of it to each."""
    times = pd.bdate_range("2024-01-01", periods=8).as_unit("us").to_numpy() + np.timedelta64(21, "h")
    panel = Panel(times, ("A",), {"close": np.array([[100.0, 100, 100.15, 100.15, 100.15, 100.15, 100.15, 100.15]])})
    w = np.full((1, 1, 8), np.nan)
    w[0, 0, [0, 2, 4]] = 0.5, -0.5, 0.0
    costs = COSTS.scaled(0).model_copy(update={"commission_bps": 10.0})
    made = sweep_rule(panel, FOLLOW, grid(size=[1.0]), costs, PARAMS, features=FeatureBlock(("wish",), times, ("A",), w, panel.alive), check=False)
    row = made.table.iloc[0]
    # 500 bought for 50 of commission and 75 gained, of the turn's 100 half is its own: it lost
    assert (row["trades"], row["win_rate"]) == (2, 0.0)
    free_exit = sweep_rule(panel, FOLLOW, grid(size=[1.0]), costs.model_copy(update={"commission_bps": 7.0}), PARAMS, features=FeatureBlock(("wish",), times, ("A",), w, panel.alive), check=False)
    # 35 to buy, 35 of the turn's 70: 70 < 75, so the first trade wins; charged with all of the turn it would lose
    assert free_exit.table["win_rate"][0] == 0.5


def test_a_ruined_account_stays_at_nothing() -> None:
    times = pd.bdate_range("2024-01-01", periods=8).as_unit("us").to_numpy() + np.timedelta64(21, "h")
    panel = Panel(times, ("A",), {"close": np.array([[100.0, 100, 100, 350, 360, 370, 380, 390]])})
    w = np.full((1, 1, 8), -1.0)
    block = FeatureBlock(("wish",), times, ("A",), w, panel.alive)
    made = sweep_rule(panel, FOLLOW, grid(size=[1.0]), COSTS, PARAMS, features=block, check=False)
    ledger, _ = of_engine(panel, block, 0, 1.0, COSTS, PARAMS)
    assert made.table["total_return"][0] == pytest.approx(ledger.equity["equity"].iloc[-1] / 1e5 - 1)
    assert made.table["total_return"][0] < -1
    assert made.returns[0].min() == -1.0
    assert (made.returns[0].to_numpy()[4:] == 0).all()
    assert made.table["annual_return"][0] == made.table["max_drawdown"][0] == -1.0


def test_threads_and_company_change_nothing() -> None:
    panel = random_walk(5, 300, seed=3)
    settings_ = grid(fast=range(2, 12), slow=[15, 30, 60])
    one = sweep_rule(panel, SMA_CROSS, settings_, COSTS, PARAMS, threads=1)
    two = sweep_rule(panel, SMA_CROSS, settings_, COSTS, PARAMS, threads=7)
    pd.testing.assert_frame_equal(one.table, two.table, check_exact=True)
    pd.testing.assert_frame_equal(one.portfolio, two.portfolio, check_exact=True)
    pd.testing.assert_frame_equal(one.returns, two.returns, check_exact=True)
    few = sweep_rule(panel, SMA_CROSS, settings_.iloc[[7]], COSTS, PARAMS)
    pd.testing.assert_frame_equal(few.table.drop(columns="config"), one.table.query("config == 7").drop(columns="config").reset_index(drop=True), check_exact=True)


@pytest.mark.parametrize(("rule", "config"), [(SMA_CROSS, grid(fast=[3], slow=[10])), (MOMENTUM, grid(lookback=[5], every=[2])), (BREAKOUT, grid(entry=[10], exit=[5])), (MEAN_REVERSION, grid(window=[8], width=[1.0]))])
def test_the_rules_do_what_they_say(rule: Rule, config: pd.DataFrame) -> None:
    """Each rule's decisions, from the closes up to then, by pandas."""
    panel = random_walk(1, 200, seed=7, ragged=False)
    out = decide(rule, np.array([panel[f][0] for f in rule.needs]), config.to_numpy(float)[0])
    held = pd.Series(out).ffill().fillna(0.0).to_numpy()
    c, width = pd.Series(panel["close"][0]), config.to_numpy(float)[0, 1]
    if rule is SMA_CROSS:
        expected = (c.rolling(3).mean() > c.rolling(10).mean()).to_numpy(float)
    elif rule is MOMENTUM:
        expected = np.sign(c - c.shift(5)).where((np.arange(200) - 5) % 2 == 0).ffill().fillna(0).to_numpy()
    else:
        top, bottom = pd.Series(panel["high"][0]).rolling(10).max().shift(1), pd.Series(panel["low"][0]).rolling(5).min().shift(1)
        mean, spread = c.rolling(8).mean(), c.rolling(8).std()
        expected, now = np.zeros(200), 0.0
        for t in range(200):
            if rule is BREAKOUT:
                now = 1.0 if not now and c[t] > top[t] else 0.0 if now and c[t] < bottom[t] else now
            elif t >= 7:
                gap = c[t] - mean[t]
                now = -np.sign(gap) if abs(gap) > width * spread[t] else 0.0 if now * gap >= 0 else now
            expected[t] = now
    np.testing.assert_array_equal(held, expected)
    assert len(np.unique(held)) > 1
    assert sweep_rule(panel, rule, config, COSTS, PARAMS).table["trades"][0] > 0


@njit(nogil=True)
def _next_bar(bars: Any, config: Any, out: Any) -> None:
    for t in range(bars.shape[1] - 1):
        out[t] = 1.0 if bars[0, t + 1] > bars[0, t] else 0.0


@njit(nogil=True)
def _from_the_end(bars: Any, config: Any, out: Any) -> None:
    for t in range(bars.shape[1]):
        out[t] = 1.0 if bars[0, t] > bars[0, t - 1] else 0.0


@njit(nogil=True)
def _whole_mean(bars: Any, config: Any, out: Any) -> None:
    mean = bars[0].mean()
    for t in range(bars.shape[1]):
        out[t] = 1.0 if bars[0, t] > mean else 0.0


@njit(nogil=True)
def _centred(bars: Any, config: Any, out: Any) -> None:
    for t in range(2, bars.shape[1] - 2):
        out[t] = 1.0 if bars[0, t] > bars[0, t - 2:t + 3].mean() else 0.0


@njit(nogil=True)
def _last_bar(bars: Any, config: Any, out: Any) -> None:
    out[0] = 1.0 if bars[0, -1] > bars[0, 0] else -1.0


@pytest.mark.parametrize("signal", [_next_bar, _from_the_end, _whole_mean, _centred, _last_bar])
@pytest.mark.parametrize("seed", range(3))
def test_a_look_ahead_is_caught(signal: Any, seed: int) -> None:
    panel = random_walk(2, 250, seed=seed)
    with pytest.raises(LeakError, match=r"rule `leaky`, x 1, symbol S00\d, bar \d+ \(20.*decides"):
        sweep_rule(panel, Rule("leaky", signal, ("x",)), grid(x=[1]), COSTS, PARAMS)


@njit(nogil=True)
def _too_far(bars: Any, config: Any, out: Any) -> None:
    for t in range(3):
        out[t] = 1.0


@njit(nogil=True)
def _sized(bars: Any, config: Any, out: Any) -> None:
    out[10:] = config[0]


@njit(nogil=True)
def _infinite(bars: Any, config: Any, out: Any) -> None:
    if config[0] == 1.0:
        out[10:] = np.inf


def test_bad_input_is_refused() -> None:
    panel = random_walk(2, 60, seed=0, ragged=False)
    sized, ones = Rule("sized", _sized, ("size",)), grid(size=[1.0])
    for rule, value, found in ((sized, 1.01, "1.01"), (sized, -3.0, "-3"), (Rule("endless", _infinite, ("size",)), 1.0, "inf")):
        with pytest.raises(ParameterError, match=rf"rule `{rule.name}`, size {value:g}, symbol S000, bar 10 \(2015-.*wants an exposure of {found}"):
            sweep_rule(panel, rule, grid(size=[0.5, value]), COSTS, PARAMS)
    with pytest.raises(ParameterError, match="reaches outside of its bars where there are only"):
        sweep_rule(panel, Rule("far", _too_far, ("size",)), ones, COSTS, PARAMS)
    for configs, text in ((ones.rename(columns={"size": "sise"}), "did you mean `size`"), (ones[[]], "no column `size`"), (ones[:0], "the table is empty"), (grid(size=[1.0, np.nan]), "row 1.*not a number"),
                          (grid(size=[0.5, 0.5]), "row 1.*twice")):
        with pytest.raises(ParameterError, match=text):
            sweep_rule(panel, sized, configs, COSTS, PARAMS)
    for bad in (lambda: grid(), lambda: grid(size=[])):
        with pytest.raises(ParameterError, match="grid"):
            bad()
    with pytest.raises(ParameterError, match="takes 2 arguments"):
        Rule("short", njit(lambda bars, out: None), ("size",))
    with pytest.raises(ParameterError, match="not compiled"):
        Rule("plain", lambda bars, config, out: None, ("size",))
    with pytest.raises(DataError, match="unknown field or feature `closee`"):
        sweep_rule(panel, Rule("typo", _sized, ("size",), ("closee",)), ones, COSTS, PARAMS)
    with pytest.raises(DataError, match="are not the panel's"):
        sweep_rule(panel, sized, ones, COSTS, PARAMS, features=wishes(market(0, 2, 50, 0.01), 0))
    made = sweep_rule(panel, sized, grid(size=[0.5, 1.0]), COSTS, PARAMS)
    for across, down, measure, message in (("sise", "size", "costs", "unknown parameter"), ("size", "size", "cost", "unknown measure"), ("size", "size", "costs", "both axes")):
        with pytest.raises(ParameterError, match=f"heatmap: .*{message}"):
            heatmap(made, across, down, measure)
    with pytest.raises(DataError, match="ever traded"):
        _ = sweep_rule(panel, sized, grid(size=[0.0]), COSTS, PARAMS).best


def test_every_trial_is_on_record(tmp_path: Path) -> None:
    panel, book = random_walk(2, 300, seed=0), tmp_path / "trials.jsonl"
    with pytest.raises(DataError, match="data_id"):
        sweep_rule(panel, SMA_CROSS, grid(fast=[2], slow=[5]), COSTS, PARAMS, ledger=book)
    made = sweep_rule(panel, SMA_CROSS, grid(fast=[2, 3, 4], slow=[5, 20]), COSTS, PARAMS, ledger=book, data_id="x")
    assert len(read(book)) == made.best.n_trials == 6
    body = book.read_bytes()
    sweep_rule(panel, SMA_CROSS, grid(fast=[2, 3, 4], slow=[5, 20]), COSTS, PARAMS, ledger=book, data_id="x", threads=1)
    assert book.read_bytes() == body
    with pytest.raises(ParameterError, match="exposure"):
        sweep_rule(panel, Rule("sized", _sized, ("size",)), grid(size=[1.0, 2.0]), COSTS, PARAMS, ledger=book, data_id="x")
    rows = read(book)
    assert rows["status"].tolist() == ["ok"] * 6 + ["failed"] * 2
    assert "exposure" in rows["error"].iloc[-1]
    # judged alone the same sweep looks better, or as good
    alone = sweep_rule(panel, SMA_CROSS, grid(fast=[2, 3, 4], slow=[5, 20]), COSTS, PARAMS).best
    again = sweep_rule(panel, SMA_CROSS, grid(fast=[2, 3, 4], slow=[5, 20]), COSTS, PARAMS, ledger=book, data_id="x").best
    assert alone.sharpe_annual == again.sharpe_annual
    assert (alone.n_trials, again.n_trials) == (6, 8)
    assert alone.dsr >= again.dsr
