"""Two engines, one ledger; and whatever orders, prices, gaps, halts and actions come, nothing appears from nowhere and nothing gets lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mltrading.backtest.actions import Actions, lay_actions
from mltrading.backtest.bars import bars_of
from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams, simulate
from mltrading.backtest.events import Early, Moment, Opening, Weights, run
from mltrading.backtest.instruments import Instrument
from mltrading.backtest.ledger import TABLES, Ledger
from mltrading.backtest.orders import Orders
from mltrading.core.errors import DataError
from mltrading.market.panel import Panel

COSTS = CostParams(commission_bps=3, half_spread_bps=5, impact_coefficient=1, adv_bars=3, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.01, borrow_bps_annual=300, fill="open",
                   commission_per_share=0.01, commission_minimum=2, slippage_bps=2, margin_rate_annual_bps=500, participation=0.2)
PARAMS = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=3, delist_after_bars=3, delist_haircut=0.4, start="panel")
KINDS = {"S1": Instrument(lot=1), "S2": Instrument(multiplier=10, lot=1, margin=0.1, futures_style=True, financing_bps_annual=50), "S3": Instrument(margin=0.3, financing_bps_annual=-200)}


def market(rng: np.random.Generator, n: int, bars: int) -> Panel:
    """Prices on a coarse grid, so that orders and prices touch, with gaps at the open, missing bars, halts, late listings and ends."""
    jump = rng.choice([0.002, 0.02, 0.15])
    close = np.exp(np.cumsum(rng.normal(0, jump, (n, bars)), axis=1)) * rng.choice([1.0, 20.0, 300.0], (n, 1))
    before = np.concatenate([close[:, :1], close[:, :-1]], axis=1)
    start = before * np.exp(rng.normal(0, jump / 2, close.shape))
    tick = close[:, :1] * jump / 4
    start, close = (np.maximum(np.round(x / tick), 1) * tick for x in (start, close))
    high = np.maximum(start, close) + tick * rng.integers(0, 6, close.shape)
    low = np.maximum(np.minimum(start, close) - tick * rng.integers(0, 6, close.shape), tick / 2)
    volume = np.where(rng.random(close.shape) < 0.07, 0.0, np.round(rng.lognormal(9, 2, close.shape)))
    alive = rng.random(close.shape) > 0.08
    for i in range(1, n):
        alive[i, : rng.integers(0, bars // 3)] = False
        alive[i, bars - rng.integers(0, bars // 3):] = False
    alive[0] = True
    fields = {"open": start, "high": high, "low": low, "close": close, "volume": volume}
    times = np.datetime64("2020-01-03T21:00", "us") + np.cumsum(rng.integers(1, 4, bars)) * np.timedelta64(1, "D")
    return Panel(times, tuple(f"S{i}" for i in range(n)), {k: np.where(alive, b, np.nan) for k, b in fields.items()})


def happenings(panel: Panel, rng: np.random.Generator) -> pd.DataFrame:
    """Random dividends and splits, and a settlement for some of the symbols that end."""
    rows = []
    for i, symbol in enumerate(panel.symbols):
        seen = np.flatnonzero(panel.alive[i])
        end = int(seen[-1]) if len(seen) else -1
        for t in range(int(seen[0]) + 1 if len(seen) else 0, end):
            if rng.random() < 0.04:
                rows.append((t, symbol, "split", float(rng.choice([2.0, 0.1, 1.5]))))
            if rng.random() < 0.06:
                rows.append((t, symbol, "dividend", float(panel["close"][i, seen[0]] * rng.uniform(0, 0.05))))
        if 0 < end < len(panel) - 2 and rng.random() < 0.6:
            rows.append((end + int(rng.integers(0, 2)), symbol, "settlement", float(panel["close"][i, end] * rng.choice([0.0, 0.5, 1.0]))))
    t, symbol, kind, value = ([r[k] for r in rows] for k in range(4))
    return pd.DataFrame({"timestamp": panel.index[t], "symbol": symbol, "kind": kind, "value": value}) if rows else pd.DataFrame(columns=["timestamp", "symbol", "kind", "value"])


class Chaos:
    """Random orders of every kind, and random cancellations."""

    def __init__(self, seed: int, rate: float) -> None:
        self.rng, self.rate = np.random.default_rng(seed), rate

    def decide(self, now: Moment) -> Orders | Weights | None:
        rng, prices = self.rng, now.bar.prices[3]
        open_now = np.flatnonzero(~np.isnan(prices))
        if rng.random() > self.rate or not len(open_now):
            return None
        k = int(rng.integers(1, 5))
        which = rng.choice(open_now, k)
        p = prices[which]
        side = rng.choice([-1.0, 1.0], k)
        kind = rng.choice(["market", "limit", "stop", "stop_limit", "trailing"], k)
        away = rng.choice([0.97, 0.99, 1.0, 1.01, 1.03], (2, k)) * p
        bracket = (rng.random(k) < 0.6) & (kind != "stop_limit") & (kind != "trailing")
        entry = np.where(kind == "limit", away[0], np.where(kind == "stop", away[1], p))
        cancel = now.working[rng.random(len(now.working)) < 0.1, 0].astype(int).tolist()
        return Orders([now.symbols[n] for n in which], side * np.maximum(np.round(now.books.equity * rng.uniform(0.01, 0.5, k) / p), 1), kind.tolist(), limit=away[0], stop=away[1],
                      trail=rng.choice([0.01, 0.05], k), life=rng.integers(0, 4, k), take_profit=np.where(bracket, entry * (1 + 0.03 * side), np.nan),
                      stop_loss=np.where(bracket & (rng.random(k) < 0.8), entry * (1 - 0.02 * side), np.nan), cancel=cancel, reason="entry")


class Table:
    """Targets from a table."""

    def __init__(self, targets: np.ndarray) -> None:
        self.targets = targets

    def decide(self, now: Moment) -> Weights | None:
        row = self.targets[now.number]
        return None if np.isnan(row).any() else Weights(row)


def grid(panel: Panel, table: pd.DataFrame, values: np.ndarray, time: str = "timestamp") -> np.ndarray:
    """(T, N) sums of values over the rows of a table."""
    out = np.zeros((len(panel), len(panel.symbols)))
    np.add.at(out, (panel.index.get_indexer(pd.DatetimeIndex(table[time])), pd.Index(panel.symbols).get_indexer(pd.Index(table["symbol"]))), values)
    return out


def check(panel: Panel, ledger: Ledger, actions: Actions, instruments: dict[str, Instrument], costs: CostParams, params: BacktestParams) -> None:
    """Everything that has to hold for any ledger."""
    e, f, o, p = ledger.equity, ledger.fills, ledger.orders, ledger.positions
    multiplier = np.array([instruments.get(s, Instrument()).multiplier for s in panel.symbols])
    scale = max(params.initial_cash, float(np.abs(e["equity"]).max()), float((e["gross"] * e["equity"]).abs().max()))
    np.testing.assert_allclose(e["cash"] + e["positions_value"], e["equity"], atol=1e-9 * scale)
    # no position without a fill: holdings are the fills, multiplied by the splits
    split = np.ones((len(panel), len(panel.symbols)))
    bar = np.repeat(np.arange(len(panel)), np.diff(actions.begin))
    np.multiply.at(split, (bar[actions.kind == 0], actions.column[actions.kind == 0]), actions.value[actions.kind == 0])
    bought, held, value = grid(panel, f, f["quantity"].to_numpy()), grid(panel, p, p["quantity"].to_numpy()), grid(panel, p, p["value"].to_numpy())
    shares = np.zeros(len(panel.symbols))
    for t in range(len(panel)):
        shares = shares * split[t] + bought[t]
        np.testing.assert_allclose(held[t], shares, atol=1e-9 * max(1.0, float(np.abs(bought).max())), rtol=1e-9)
    # equity moves by what prices did, less what was paid
    moved = grid(panel, f, (f["quantity"] * f["reference_price"]).to_numpy()) * multiplier
    profit = (value - np.vstack([np.zeros(len(multiplier)), value[:-1]]) - moved).sum(axis=1)
    paid = e["costs"] + e["borrow"] + e["delisting"] + e["interest"] + e["financing"] - e["dividends"]
    np.testing.assert_allclose(np.diff(e["equity"], prepend=params.initial_cash), profit - paid, atol=1e-9 * scale)
    # no fill without a bar, without volume, outside the bar, or for more than its share of the volume
    trades = f[f["kind"] == "order"]
    row, column = panel.index.get_indexer(pd.DatetimeIndex(trades["timestamp"])), pd.Index(panel.symbols).get_indexer(pd.Index(trades["symbol"]))
    low, high, volume = (panel[k][column, row] for k in ("low", "high", "volume"))
    assert not np.isnan(panel["close"][column, row]).any()
    if "volume" in panel.fields:
        known = np.logical_or.accumulate(np.nan_to_num(panel["volume"]) > 0, axis=1)[column, row]
        assert (volume[known] > 0).all()
        taken = grid(panel, trades, trades["quantity"].abs().to_numpy())[row, column]
        assert (taken[known] <= volume[known] * (costs.participation or np.inf) * (1 + 1e-9)).all()
    assert ((trades["reference_price"] >= low) & (trades["reference_price"] <= high)).all()
    # no order overfills, and each kind keeps its promise
    assert (o["filled"].abs() <= o["quantity"].abs() * (1 + 1e-12)).all()
    assert (o["filled"] * o["quantity"] >= 0).all()
    both = trades.merge(o, on="order", suffixes=("", "_ordered"), validate="many_to_one")
    steady = ~both["symbol"].isin([panel.symbols[k] for k in actions.column[actions.kind == 0]])
    sums = both[steady].groupby("order")["quantity"].sum()
    np.testing.assert_allclose(sums, o.set_index("order")["filled"].loc[sums.index], rtol=1e-9)
    capped, side = both[both["kind_ordered"].isin(["limit", "stop_limit"]) & steady], np.sign
    assert (side(capped["quantity"]) * capped["fill_price"] <= side(capped["quantity"]) * capped["limit"]).all()
    opened = panel["open"][pd.Index(panel.symbols).get_indexer(pd.Index(capped["symbol"])), panel.index.get_indexer(pd.DatetimeIndex(capped["timestamp"]))]
    waited = capped[(capped["kind_ordered"] == "limit") & (capped["reference_price"] != opened)]
    assert (waited[["spread_cost", "slippage_cost", "impact_cost"]] == 0).all().all()
    # the exits behind an entry together never fill more than it did, and it fills nothing once one of them has fired
    behind = o["reason"].isin(["take profit", "stop loss"])
    entry = o["order"].where(~behind).ffill()
    still = ~o["symbol"].isin([panel.symbols[k] for k in actions.column[actions.kind == 0]])
    closed = o[behind & still].groupby(entry)["filled"].sum()
    assert (closed.abs() <= o.set_index("order")["filled"].loc[closed.index].abs() * (1 + 1e-9)).all()
    times = trades.groupby("order")["timestamp"].agg(["min", "max"])
    fired = o.loc[behind & (o["filled"] != 0), "order"]
    assert (times["max"].loc[entry.loc[fired.index]].to_numpy() <= times["min"].loc[fired].to_numpy()).all()
    if costs.participation is None:  # else a stop may be reached in a bar that has no room for it
        stopped = both[both["kind_ordered"].eq("stop") & steady]
        assert (side(stopped["quantity"]) * stopped["reference_price"] >= side(stopped["quantity"]) * stopped["stop"]).all()
    assert (both["timestamp"] >= both["decision_time"]).all()
    assert (o.loc[o["filled"] == 0, "fill_time"].isna() & ~o.loc[o["filled"] == 0, "status"].isin(["filled", "partial"])).all()
    assert (o.loc[o["status"] == "filled", "filled"] == o.loc[o["status"] == "filled", "quantity"]).all()
    assert o["order"].tolist() == list(range(len(o)))


def setting(seed: int, fill: str, delay: int) -> tuple[Panel, Actions, CostParams, BacktestParams, np.random.Generator]:
    rng = np.random.default_rng(seed)
    panel = market(rng, 5, 40)
    costs = COSTS.scaled(float(rng.choice([0.0, 1.0, 3.0]))).model_copy(update={"fill": fill, "participation": float(rng.choice([0.01, 1.0])) if rng.random() < 0.7 else None})
    params = PARAMS.model_copy(update={"delay_bars": delay, "margin_call": float(rng.choice([0.0, 0.5])), "delist_after_bars": int(rng.integers(1, 6))})
    return panel, lay_actions(panel, happenings(panel, rng)), costs, params, rng


def any_orders(seed: int, fill: str, delay: int) -> Ledger:
    panel, actions, costs, params, rng = setting(seed, fill, delay)
    ledger = run(bars_of(panel, actions, 16), panel.symbols, Chaos(seed, float(rng.choice([0.2, 0.9]))), costs, params, KINDS)
    check(panel, ledger, actions, KINDS, costs, params)
    return ledger


def any_targets(seed: int, fill: str, delay: int) -> Ledger:
    panel, actions, costs, params, rng = setting(seed, fill, delay)
    w = rng.normal(size=(40, 5)) * panel.view("close").ffill().notna().to_numpy() * (rng.random((40, 5)) < 0.8)
    w *= rng.uniform(0.1, 3.0) / np.maximum(np.abs(w).sum(axis=1, keepdims=True), 1e-9)
    w[rng.random(40) < 0.5] = np.nan
    w[0] = 0.0
    fast, slow = simulate(panel, w, costs, params, KINDS, actions), run(bars_of(panel, actions, 16), panel.symbols, Table(w), costs, params, KINDS)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(fast, name), getattr(slow, name), rtol=1e-9, atol=1e-9)
    check(panel, fast, actions, KINDS, costs, params)
    return fast


DRIVEN = {"seed": st.integers(0, 10**9), "fill": st.sampled_from(["open", "close"]), "delay": st.integers(0, 2)}
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=60, **QUIET)
@given(**DRIVEN)
def test_any_orders(seed: int, fill: str, delay: int) -> None:
    any_orders(seed, fill, delay)


@settings(max_examples=60, **QUIET)
@given(**DRIVEN)
def test_any_targets_through_both_engines(seed: int, fill: str, delay: int) -> None:
    any_targets(seed, fill, delay)


class Answer:
    """One answer at one bar, nothing otherwise."""

    def __init__(self, at: int, answer: Orders | Weights) -> None:
        self.at, self.answer = at, answer

    def decide(self, now: Moment) -> Orders | Weights | None:
        return self.answer if now.number == self.at else None


def plain(close: list[float], **more: list[float]) -> Panel:
    fields = {"close": np.array([close]), **{k: np.array([v]) for k, v in more.items()}}
    return Panel(np.datetime64("2020-01-03T21:00", "us") + np.arange(len(close)) * np.timedelta64(1, "D"), ("A",), fields)


FREE = COSTS.scaled(0).model_copy(update={"participation": None})


def once(panel: Panel, at: int, answer: Orders | Weights, costs: CostParams = FREE, **params: object) -> Ledger:
    return run(bars_of(panel, lay_actions(panel)), panel.symbols, Answer(at, answer), costs, PARAMS.model_copy(update=params))


@pytest.mark.parametrize(("answer", "message"), [
    (Weights(np.array([np.nan])), "nan is not a weight"), (Weights(np.array([0.1, 0.1])), "have shape"), (Weights(np.array([3.1])), "the account accepts 3"), (Orders(["B"], 1), "unknown symbol `B`"),
    (Orders(["A"], 1, "limit"), "no limit price"), (Orders(["A"], 1, "stop"), "no stop price"), (Orders(["A"], np.inf), "has no quantity"), (Orders(["A"], 1, "iceberg"), "unknown kind of order `iceberg`"),
    (Orders("A", 1), "is the text 'A'"), (Orders(["A"], [1, 2]), r"`quantity`: has shape \(2,\) beside 1 symbols"), (Orders(["A", "A"], 1, ["market"]), "`kind`: has shape"),
    (np.array([0.1]), "answered with a ndarray"), ({"A": 0.1}, "answered with a dict"), (Weights([0.1]), "are a list"), (Weights(np.array([0.1]), ("a", "b")), "have 2 reasons"),  # type: ignore[arg-type]
    (Orders(["A"], 1, life=1.5), "not a number of bars"), (Orders(["A"], 1, take_profit=-1), "an exit at no price"), (Orders(["A"], -1, stop_loss=0), "an exit at no price"),
    (Orders(["A"], 1, "trailing"), "no distance"), (Orders(cancel=[7]), "no order has the number 7"), (Orders(["A"], 1, take_profit=9, stop_loss=10), "wrong sides"),
    (Orders(["A"], 1, take_profit=11), "wrong sides of the last price, 11"), (Orders(["A"], 1, stop_loss=11.5), "market order for A: has exits"), (Orders(["A"], -1, take_profit=11.5), "wrong sides of the last"),
])
def test_bad_answers(answer: Orders | Weights, message: str) -> None:
    with pytest.raises(DataError, match=message):
        once(plain([10, 11, 12]), 1, answer)


def test_bars_and_actions_of_another_panel() -> None:
    """Compiled code does not look whether an index is in its array."""
    panel = plain([10, 11, 12])
    with pytest.raises(DataError, match="open, high, low, close and volume of 2 symbols"):
        run(bars_of(panel, lay_actions(panel)), ("A", "B"), Answer(1, Orders(["A"], 1)), FREE, PARAMS)
    for wrong, message in ((lay_actions(plain([10, 11])), "laid on a panel of 2 bars"), (pd.DataFrame(columns=["timestamp", "symbol", "kind", "value"]), "are a DataFrame")):
        with pytest.raises(DataError, match=message):
            simulate(panel, np.ones((3, 1)), FREE, PARAMS, actions=wrong)
        with pytest.raises(DataError, match=message):
            run(bars_of(panel, wrong), ("A",), Answer(1, Orders(["A"], 1)), FREE, PARAMS)


class Patient:
    """Now and then an order for a while, the first one for ever."""

    def decide(self, now: Moment) -> Orders | None:
        return None if now.number % 100 else Orders(["A"], 1, "limit", limit=1.0 if now.number == 0 else 1000.0)


def test_parts_in_a_folder_are_the_ledger(tmp_path: Path) -> None:
    panel = plain(list(100 + np.arange(1100) % 7))
    kept = run(bars_of(panel, lay_actions(panel)), ("A",), Patient(), COSTS, PARAMS)
    stored = run(bars_of(panel, lay_actions(panel)), ("A",), Patient(), COSTS, PARAMS, folder=tmp_path)
    assert kept.orders["status"].tolist() == ["working"] + ["filled"] * 10
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(stored, name), getattr(kept, name), check_exact=True)
    with pytest.raises(DataError, match="is not empty"):
        run(bars_of(panel, lay_actions(panel)), ("A",), Patient(), COSTS, PARAMS, folder=tmp_path)


def test_a_split_costs_nothing() -> None:
    """The same market before and after a split that multiplies shares and volume: impact, participation and equity stay as they were."""
    rng, grown = np.random.default_rng(5), np.where(np.arange(60) >= 30, 4.0, 1.0)
    close, volume = 100 * np.cumprod(1 + rng.normal(0, 0.02, 60)), rng.lognormal(10, 0.5, 60)
    whole, parts = plain(list(close), volume=list(volume)), plain(list(close / grown), volume=list(volume * grown))
    split = lay_actions(parts, pd.DataFrame({"timestamp": parts.index[[30]], "symbol": "A", "kind": "split", "value": 4.0}))
    dear, w = COSTS.model_copy(update={"commission_per_share": 0.0}), np.where(np.arange(60) % 5, np.nan, rng.uniform(-1, 1, 60))[:, None]
    before, after = simulate(whole, w, dear, PARAMS), simulate(parts, w, dear, PARAMS, actions=split)
    assert after.fills["impact_cost"].gt(0).all()
    pd.testing.assert_frame_equal(after.equity, before.equity, rtol=1e-9)
    pd.testing.assert_frame_equal(run(bars_of(parts, split), ("A",), Table(w), dear, PARAMS).equity, before.equity, rtol=1e-9)


def test_closed_sessions_and_symbols_without_a_price() -> None:
    halted = plain([10, np.nan, 12])
    with pytest.raises(DataError, match="its session is closed"):
        once(halted, 1, Orders(["A"], 1))
    late = plain([np.nan, 11, 12])
    with pytest.raises(DataError, match="before the symbol's first bar"):
        once(late, 0, Weights(np.array([1.0])))
    assert once(halted, 0, Orders(["A"], 1), delay_bars=1).orders["status"].tolist() == ["rejected"]


def test_nothing_fills_without_volume() -> None:
    quiet = plain([10, 11, 12, 13], volume=[100, 0, 0, 100])
    assert once(quiet, 0, Orders(["A"], 1, life=2)).orders["status"].tolist() == ["lapsed"]
    waited = once(quiet, 0, Orders(["A"], 1))
    assert waited.fills["timestamp"].tolist() == [quiet.index[3]]
    unknown = plain([10, 11, 12, 13], volume=[0, 0, 0, 0])
    assert once(unknown, 0, Orders(["A"], 1)).fills["timestamp"].tolist() == [unknown.index[1]]


def test_a_marketable_limit_takes() -> None:
    """Beyond the market at an open it costs what a market order costs, down to its limit and no further; inside the bar it waits and pays commission only."""
    bars = plain([100, 100, 90, 90], open=[100, 100, 90, 90], high=[100, 101, 91, 90], low=[100, 98, 89, 90])
    dear = COSTS.model_copy(update={"participation": None})
    paid = ["spread_cost", "slippage_cost", "impact_cost"]
    for side, far in ((1, 1000.0), (-1, 0.01)):
        taken, market_order = (once(bars, 0, Orders(["A"], side * 1000, kind, limit=far), dear).fills.iloc[0] for kind in ("limit", "market"))
        assert taken.drop("order").equals(market_order.drop("order"))
        assert taken[paid].gt(0).all()
        near = once(bars, 0, Orders(["A"], side * 1000, "limit", limit=100 + side * 0.01), dear).fills.iloc[0]
        assert near["fill_price"] == 100 + side * 0.01
        np.testing.assert_allclose(near[paid].astype(float).sum(), 1000 * 0.01, rtol=1e-9)
        at = once(bars, 0, Orders(["A"], side * 1000, "limit", limit=100), dear).fills.iloc[0]
        assert (at["fill_price"], at[paid].sum()) == (100, 0)
    waited = once(bars, 0, Orders(["A"], 1000, "limit", limit=99), dear).fills.iloc[0]
    assert (waited["fill_price"], waited[paid].sum()) == (99, 0)
    jumped = once(bars, 0, Orders(["A"], 1000, "limit", limit=95), dear).fills.iloc[0]
    assert jumped["timestamp"] == bars.index[2]
    assert 90 < jumped["fill_price"] <= 95
    assert jumped[paid].gt(0).all()


@pytest.mark.parametrize(("kind", "prices"), [("market", {}), ("limit", {"limit": 101}), ("limit", {"limit": 99.5}), ("stop", {"stop": 101})])
def test_an_exit_ends_its_entry(kind: str, prices: dict[str, float]) -> None:
    """An entry for 100 in parts of 20: the stop at 96 sells in the third bar what was bought up to then and in that bar, and nothing is bought afterwards."""
    bars = plain([100] * 8, open=[100] * 8, high=[101] * 8, low=[99, 99, 99, 95, 99, 99, 99, 99], volume=[100] * 8)
    ledger = once(bars, 0, Orders(["A"], 100, kind, stop_loss=96, take_profit=130, **prices), FREE.model_copy(update={"participation": 0.2}))
    o, f = ledger.orders.set_index("reason"), ledger.fills
    assert o["status"].to_dict() == {"": "partial", "stop loss": "filled", "take profit": "cancelled"}
    assert (o.loc["", "filled"], o.loc["stop loss", "filled"]) == (60, -60)
    assert f["quantity"].tolist() == [20, 20, 20, -20, -20, -20]
    assert f["timestamp"].iloc[2] == bars.index[3]
    assert ledger.positions["quantity"].iloc[-1] == 0 or ledger.positions["timestamp"].max() < bars.index[-1]


def test_a_profit_ends_its_entry() -> None:
    """A profit that is reached before the entry's close: what was held is sold, and no more is bought."""
    bars = plain([100, 100, 100, 100], open=[100] * 4, high=[101, 101, 110, 101], low=[99] * 4, volume=[100] * 4)
    ledger = once(bars, 0, Orders(["A"], 100, take_profit=105), FREE.model_copy(update={"participation": 0.2, "fill": "close"}))
    assert ledger.fills["quantity"].tolist() == [20, -20]
    assert ledger.orders["status"].tolist() == ["partial", "filled"]


class Script:
    """Answers by the number of the bar."""

    def __init__(self, answers: dict[int, Orders | Weights]) -> None:
        self.answers = answers

    def decide(self, now: Moment) -> Orders | Weights | None:
        return self.answers.get(now.number)


@pytest.mark.parametrize("delay", [0, 1])
def test_weights_withdraw_what_works(delay: int) -> None:
    """A working limit and a stop do not disturb the weights that come after them."""
    bars = plain([100, 100, 100, 100, 50, 50, 50])
    script = Script({0: Orders(["A", "A"], [10, 1000], ["market", "limit"], limit=60, stop_loss=[70, np.nan]), 2: Weights(np.array([0.5]))})
    ledger = run(bars_of(bars, lay_actions(bars)), ("A",), script, FREE, PARAMS.model_copy(update={"delay_bars": delay}))
    assert ledger.orders["status"].tolist() == ["filled", "cancelled", "cancelled", "filled"]
    assert ledger.positions.iloc[-1]["quantity"] == 5000


def test_delayed_orders_are_split() -> None:
    """A limit at 99 for 10 with a stop at 90, two bars late, with a split of one to two between: 20 at 49.5 with a stop at 45, as if it had worked all along."""
    bars = plain([100, 50, 50, 50, 50, 50, 44], open=[100, 50, 50, 50, 50, 50, 50], high=[101, 51, 51, 51, 51, 51, 51], low=[100, 49, 49.8, 49.8, 49, 49, 44])
    split = lay_actions(bars, pd.DataFrame({"timestamp": bars.index[[1]], "symbol": "A", "kind": "split", "value": 2.0}))
    ledger = run(bars_of(bars, split), ("A",), Answer(0, Orders(["A"], 10, "limit", limit=99, stop_loss=90)), FREE, PARAMS.model_copy(update={"delay_bars": 2}))
    assert ledger.fills[["quantity", "fill_price"]].to_numpy().tolist() == [[20, 49.5], [-20, 45]]


def test_a_late_market_order_is_refused_where_its_exits_were_passed() -> None:
    bars = plain([100, 90, 90])
    order = Orders(["A"], 10, take_profit=110, stop_loss=95)
    assert once(bars, 0, order).orders["status"].tolist()[0] == "filled"
    late = once(bars, 0, order, delay_bars=1)
    assert late.orders["status"].tolist() == ["rejected"] * 3
    assert late.orders["reason"].unique().tolist() == ["rejected: the market has come to its exits"]


def test_margin_call_closes_everything() -> None:
    future = {"A": Instrument(margin=0.1, futures_style=True)}
    prices, params = plain([100, 100, 95, 92, 91]), PARAMS.model_copy(update={"margin_call": 0.5, "max_gross": 1.0})
    ledger = run(bars_of(prices, lay_actions(prices)), ("A",), Answer(0, Weights(np.array([10.0]))), FREE, params, future)
    # 10 × exposure: at 95 half is left, over 47.5 % of it is required, and at 92 a fifth of it
    assert ledger.orders["reason"].tolist() == ["target", "margin call: closed"]
    assert ledger.fills["timestamp"].tolist() == [prices.index[1], prices.index[4]]
    np.testing.assert_allclose(ledger.equity["equity"], [1e6, 1e6, 5e5, 2e5, 1e5])
    np.testing.assert_allclose(ledger.equity["cash"], ledger.equity["equity"])


def test_orders_that_the_account_cannot_carry() -> None:
    prices = plain([100, 100, 100, 100])
    assert once(prices, 0, Orders(["A"], 30_001)).orders["status"].tolist() == ["rejected"]
    assert once(prices, 0, Orders(["A"], 30_000)).orders["status"].tolist() == ["filled"]
    both = once(prices, 0, Orders(["A", "A"], [20_000, 20_000], "limit", limit=90))
    assert both.orders["status"].tolist() == ["working", "rejected"]
    assert once(prices, 0, Orders(["A", "A"], [20_000, -20_000], "limit", limit=[90, 110])).orders["status"].tolist() == ["working", "working"]


class Noise:
    """Market orders at random."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def decide(self, now: Moment) -> Orders:
        which = np.flatnonzero(self.rng.random(len(now.symbols)) < 0.3)
        return Orders([now.symbols[i] for i in which], self.rng.normal(0, 1000, len(which)), life=1)


def test_random_orders_lose_their_costs_and_nothing_else() -> None:
    """On prices without drift, the mean profit before costs of random orders is within three standard errors of zero."""
    gross = []
    for seed in range(150):
        close = 100 * np.cumprod(1 + np.random.default_rng(seed).normal(0, 0.01, (4, 60)), axis=1)
        panel = Panel(np.datetime64("2020-01-03T21:00", "us") + np.arange(60) * np.timedelta64(1, "D"), ("A", "B", "C", "D"), {"close": close})
        e = run(bars_of(panel, lay_actions(panel)), panel.symbols, Noise(seed), COSTS, PARAMS).equity
        gross.append(e["equity"].iloc[-1] - 1e6 + e[["costs", "borrow", "interest"]].sum().sum())
    error = np.std(gross, ddof=1) / np.sqrt(len(gross))
    assert abs(np.mean(gross)) < 3 * error


@pytest.mark.slow
@settings(max_examples=300, **QUIET)
@given(**DRIVEN)
def test_any_orders_at_length(seed: int, fill: str, delay: int) -> None:
    any_orders(seed, fill, delay)


@pytest.mark.slow
@settings(max_examples=300, **QUIET)
@given(**DRIVEN)
def test_any_targets_at_length(seed: int, fill: str, delay: int) -> None:
    any_targets(seed, fill, delay)


class Mornings:
    """Orders one share of all that is quoted, in each morning."""

    def __init__(self) -> None:
        self.unquoted: list[tuple[np.datetime64, str]] = []

    def decide(self, now: Moment) -> Orders | None:
        return None

    def open(self, now: Opening) -> Early | None:
        there = [s for s, price in zip(now.symbols, now.quotes, strict=True) if not np.isnan(price)]
        self.unquoted += [(now.time, s) for s in now.symbols if s not in there]
        return Early(now.time - np.timedelta64(6, "h"), Orders(there, np.ones(len(there)), life=1)) if there else None


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.sampled_from(["open", "close"]))
def test_what_is_quoted_in_the_morning_is_filled_at_that_price(seed: int, fill: str) -> None:
    """A price at which nothing is traded is no quote: who counts on the proceeds of a sale gets them."""
    panel = market(np.random.default_rng(seed), 4, 40)
    way = Mornings()
    costs = COSTS.model_copy(update={"fill": fill, "participation": None})
    ledger = run(bars_of(panel, lay_actions(panel)), panel.symbols, way, costs, PARAMS.model_copy(update={"max_gross": 100}))
    assert (ledger.orders["status"] == "filled").all()
    place = {t: k for k, t in enumerate(panel.times)}
    volume, alive = panel["volume"], panel.alive
    begun = np.logical_or.accumulate(np.nan_to_num(volume) > 0, axis=1)
    for t, s in way.unquoted:
        i, k = panel.symbols.index(s), place[t]
        assert not alive[i, k] or (begun[i, k] and volume[i, k] == 0)
