"""Nights and mornings as they are lived: what can go wrong between a close and the next open, nothing is known early, and an account on disk is the account of the backtest."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import test_events as chaos
from hypothesis import given, settings
from hypothesis import strategies as st

from mltrading.backtest import books
from mltrading.backtest.actions import Actions, lay_actions
from mltrading.backtest.bars import bars_of
from mltrading.backtest.costs import MULTIPLIER, CostParams
from mltrading.backtest.engine import BacktestParams
from mltrading.backtest.events import Desk, Early, Moment, Opening, run
from mltrading.backtest.ledger import TABLES, Ledger
from mltrading.backtest.orders import Orders
from mltrading.backtest.stored import load_desk, save_desk
from mltrading.core.errors import DataError
from mltrading.core.params import block, read_params
from mltrading.features.registry import compute
from mltrading.features.state import ContextParams, context
from mltrading.labels.horizons import label_frame
from mltrading.labels.regimes import REGIMES, RegimeParams, label_regimes
from mltrading.market import embedded
from mltrading.market.panel import Panel, between, from_frame, select, until
from mltrading.models.forecaster import Model
from mltrading.models.windows import windows
from mltrading.models.zoo import model_class, spec
from mltrading.systems.lessons import Rows, market_rows
from mltrading.systems.regime.experts import UNAVAILABLE
from mltrading.systems.regime.mornings import Operator, Phases, replay_phases
from mltrading.systems.regime.nights import HEALTH, Opinions, TwoPhaseParams, market_view, opinions, signals
from mltrading.systems.regimes import stay_regimes

BLOCKS = read_params()["systems"]["regime"]
STATE, RULE = block(ContextParams, BLOCKS["features"]["context"], "context"), block(RegimeParams, BLOCKS["labels"]["regimes"], "regimes")
CLASSES = {"equity": ["AAA", "BBB", "CCC", "MKT"], "bonds": ["TTT"], "commodities": ["GGG"], "leveraged": ["LLL"]}
SYMBOLS = tuple(sorted(s for some in CLASSES.values() for s in some))
FREE = CostParams(commission_bps=0, half_spread_bps=0, impact_coefficient=0, adv_bars=20, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.005, borrow_bps_annual=0, fill="open")
ACCOUNT = BacktestParams(initial_cash=100_000, delay_bars=0, max_gross=2, delist_after_bars=5, delist_haircut=0.1, start="decision")
BEGIN = 30  # the first night that is decided: a Monday
Tables = dict[str, pd.DataFrame]

# ------------------------------------------------------------------------------------------------ a market that does as it is told


def two_phase(**decisions: Any) -> TwoPhaseParams:
    """The parameters of the system over these funds: everything may be bought, nothing is sold for its health, unless `decisions` says otherwise."""
    plain = BLOCKS["policy"]
    given = plain["decisions"] | {"buy": {"min_health": 0.0, "min_score": 0.01}, "score": {"health": 1.0, "trend": 0.0, "strength": 0.0}, "sell": plain["decisions"]["sell"] | {"min_health": 0.0}}
    given |= {name: given[name] | value if isinstance(value, dict) else value for name, value in decisions.items()}
    facts = {"vol_bars": 20, "trend_bars": 20, "strength_bars": 5, "health_bars": 60}
    return block(TwoPhaseParams, plain | {"market": "MKT", "morning_minutes": 375, "universe": {"classes": CLASSES, "leveraged": ["LLL"]}, "facts": facts, "decisions": given}, "policy")


def calm(seed: int = 0, bars: int = 60) -> Panel:
    """Prices that move by a tenth of a percent a day, on the weekdays of a quarter."""
    rng, shape = np.random.default_rng(seed), (len(SYMBOLS), bars)
    close = np.linspace(40, 160, len(SYMBOLS))[:, None] * np.exp(np.cumsum(rng.normal(0, 1e-3, shape), axis=1))
    start = np.concatenate([close[:, :1], close[:, :-1]], axis=1) * np.exp(rng.normal(0, 3e-4, shape))
    fields = {"open": start, "high": np.maximum(start, close) * 1.0005, "low": np.minimum(start, close) * 0.9995, "close": close, "volume": np.full(shape, 1e6)}
    days = pd.bdate_range("2019-12-30", periods=bars, tz="UTC") + pd.Timedelta(hours=21)
    return Panel(days.tz_localize(None).to_numpy("datetime64[us]"), SYMBOLS, fields)


def changed(panel: Panel, symbol: str | None, first: int, factor: float, last: int | None = None, at_open: bool = True) -> Panel:
    """The panel with the prices of one symbol, or of all, times a factor from one bar to another; NaN takes bars away."""
    some = slice(None) if symbol is None else slice(panel.symbols.index(symbol), panel.symbols.index(symbol) + 1)
    fields = {name: b.copy() for name, b in panel.fields.items()}
    for name, b in fields.items():
        begin = first if at_open or name != "open" else first + 1
        b[some, begin : len(panel) if last is None else last + 1] *= factor if name != "volume" or np.isnan(factor) else 1.0
    lively = ~np.isnan(fields["close"])
    fields["high"], fields["low"] = (np.where(lively, f(f(fields["high"], fields["low"]), f(fields["open"], fields["close"])), np.nan) for f in (np.fmax, np.fmin))
    return Panel(panel.times, panel.symbols, fields)


def missing(panel: Panel, bars: list[int]) -> Panel:
    """The panel without some instants, as on holidays."""
    kept = np.setdiff1d(np.arange(len(panel)), bars)
    return Panel(panel.times[kept], panel.symbols, {name: np.ascontiguousarray(b[:, kept]) for name, b in panel.fields.items()})


def heard(panel: Panel, params: TwoPhaseParams, health: Mapping[str, Any], regimes: Mapping[int, str] | None = None, actions: Any = None) -> Opinions:
    """Opinions with a health of each fund from a night on, and a regime from BEGIN on; a fund that is not named is not known, and so is not bought."""
    regime = pd.Series([None] * len(panel), panel.index, dtype=object)
    for t, name in {BEGIN: "calm_uptrend", **(regimes or {})}.items():
        regime.iloc[t:] = name
    market = pd.DataFrame({"regime": regime, "size_modifier": 1.0, "throttle": 1.0, "disagreement": 0.0}, index=panel.index)
    said = opinions(panel, pd.DataFrame(columns=["timestamp", "symbol", "fold", *HEALTH]).astype({"timestamp": panel.index.dtype}), market, params, actions=actions)
    grid = np.full((len(panel), len(SYMBOLS)), np.nan)
    for symbol, value in health.items():
        for t, v in (value if isinstance(value, dict) else {0: value}).items():
            grid[t:, SYMBOLS.index(symbol)] = v
    return replace(said, facts=said.facts | {"health": grid})


def played(panel: Panel, health: Mapping[str, Any], regimes: Mapping[int, str] | None = None, events: list[tuple[int, str, str, float]] | None = None, params: TwoPhaseParams | None = None,
           costs: CostParams = FREE, **account: Any) -> tuple[Ledger, Tables]:
    """What becomes of an account; `events` are corporate actions: bar, symbol, kind, value."""
    rows = pd.DataFrame([(panel.index[t], *rest) for t, *rest in events or []], columns=["timestamp", "symbol", "kind", "value"])
    actions, own = lay_actions(panel, rows), params or two_phase()
    return replay_phases(panel, heard(panel, own, health, regimes, actions), own, costs, ACCOUNT.model_copy(update=account), actions)


def of(table: pd.DataFrame, symbol: str) -> pd.DataFrame:
    return table[table["symbol"] == symbol].reset_index(drop=True)


def held(ledger: Ledger, symbol: str, panel: Panel) -> pd.Series:
    """(T,) shares of a symbol at each close."""
    return ledger.positions[ledger.positions["symbol"] == symbol].set_index("timestamp")["quantity"].reindex(panel.index).fillna(0.0)


def assert_same(by_day: Ledger, at_once: Ledger) -> None:
    """The same to the bit, order numbers included."""
    for name in TABLES:
        key = ["order"] if name == "orders" else ["timestamp", "symbol"] if name != "equity" else ["timestamp"]
        pd.testing.assert_frame_equal(getattr(by_day, name).sort_values(key, ignore_index=True), getattr(at_once, name).sort_values(key, ignore_index=True), check_exact=True)


def bars_from(panel: Panel, stamps: Any) -> list[int]:
    """Which bars instants belong to: the first that closes at them or later."""
    return np.searchsorted(panel.times, pd.DatetimeIndex(stamps).tz_localize(None).to_numpy("datetime64[us]")).tolist()


# ------------------------------------------------------------------------------------------------ faults


def test_a_quiet_history_is_bought_once_and_kept() -> None:
    panel = calm()
    ledger, told = played(panel, {"AAA": 0.9, "TTT": 0.8})
    assert bars_from(panel, ledger.fills["timestamp"]) == [BEGIN + 1] * 2
    assert ledger.fills["reference_price"].tolist() == [panel["open"][SYMBOLS.index(s), BEGIN + 1] for s in ledger.fills["symbol"]]
    assert set(told["checks"]["action"]) == {"execute"}


WEARING = {"health": {"AAA": 0.9, "TTT": 0.8, "GGG": {0: np.nan, BEGIN + 4: 0.7}}, "params": two_phase(score={"trend": 0.3, "strength": 0.3}), "costs": FREE.model_copy(update={"commission_bps": 2.0, "half_spread_bps": 3.0, "impact_coefficient": 1.0})}


@cache
def fallen(delay: int) -> tuple[Panel, Ledger, Tables]:
    """A fund closes 12 % lower, and its stop sells it in the morning."""
    panel = changed(calm(), "AAA", BEGIN + 5, 0.88, at_open=False)
    return panel, *played(panel, **WEARING, delay_bars=delay)


@pytest.mark.parametrize(("factor", "after", "delay"), [(2.0, -9, 0), (0.1, -1, 0), (2.0, 0, 0), (2.0, 1, 0), (0.1, 1, 0), (1.5, 3, 0), (0.1, 5, 0), (2.0, 6, 0), (0.1, 6, 0), (2.0, 9, 0), (2.0, 1, 2), (0.1, 2, 2), (1.5, 3, 2), (2.0, 7, 2)])
def test_a_split_changes_shares_and_nothing_else(factor: float, after: int, delay: int) -> None:
    """Before anything is wanted, overnight while it is wanted, while an intent waits, while it is held, on the morning of its sale, and later: the account is that of a market without the split."""
    t, (panel, plain, said) = BEGIN + after, fallen(delay)
    split, k = changed(panel, "AAA", t, 1 / factor), SYMBOLS.index("AAA")
    split.fields["volume"].flags.writeable = True
    split["volume"][k, t:] *= factor
    ledger, told = played(split, **WEARING, events=[(t, "AAA", "split", factor)], delay_bars=delay)
    np.testing.assert_allclose(ledger.equity["equity"], plain.equity["equity"], rtol=1e-11)
    np.testing.assert_allclose(held(ledger, "AAA", panel), held(plain, "AAA", panel) * np.where(np.arange(len(panel)) >= t, factor, 1.0), rtol=1e-10)
    for name, table in told.items():
        same = [c for c in table if c not in ("price", "shares", "reason")]
        pd.testing.assert_frame_equal(table[same], said[name][same], rtol=1e-9)
    sold = of(told["checks"].query("side == 'sell'"), "AAA")
    assert sold["action"].iloc[0] == "execute"
    assert "trailing stop" in sold["reason"].iloc[0]


@pytest.mark.parametrize("split_at", [1, 2])
def test_a_split_while_a_fund_is_halted_and_wanted(split_at: int) -> None:
    """An intent that waits for a quote speaks of old shares; the quote at last is of new ones."""
    panel = changed(changed(calm(), "AAA", BEGIN + split_at, 0.5), "AAA", BEGIN + 1, np.nan, BEGIN + 1)
    ledger, told = played(panel, {"AAA": 0.9}, events=[(BEGIN + split_at, "AAA", "split", 2.0)])
    checks = of(told["checks"], "AAA")
    assert checks["reason"].iloc[0] == "no quote"
    assert checks["action"].tolist()[:2] == ["skip", "execute"], checks["reason"].tolist()
    assert bars_from(panel, of(ledger.fills, "AAA")["timestamp"]) == [BEGIN + 2]


@pytest.mark.parametrize("delay", [0, 1])
def test_a_halted_fund_is_sold_at_the_first_quote_within_three_days(delay: int) -> None:
    """Sold on Monday night for its health, no bar on Tuesday and Wednesday."""
    panel = changed(calm(), "AAA", BEGIN + 6 + delay, np.nan, BEGIN + 7)
    ledger, told = played(panel, {"AAA": {0: 0.9, BEGIN + 5: 0.1}}, params=two_phase(sell={"min_health": 0.35}, buy={"min_health": 0.5}), delay_bars=delay)
    sales = of(told["checks"].query("side == 'sell'"), "AAA")
    assert sales["reason"].tolist()[: 2 - delay] == ["no quote"] * (2 - delay)
    assert bars_from(panel, of(ledger.fills, "AAA").query("quantity < 0")["timestamp"]) == [BEGIN + 8]
    waits = of(told["log"], "AAA").query("step == 'hold'")["reason"]
    assert waits.str.contains("no bar for 1 days").any()


def test_a_sale_that_has_waited_too_long_is_stale_and_decided_anew() -> None:
    """No bar from Tuesday to Thursday: on Friday the intent is four days old. The fund is looked at again on Friday night, and sold on Monday."""
    panel = changed(calm(), "AAA", BEGIN + 6, np.nan, BEGIN + 8)
    ledger, told = played(panel, {"AAA": {0: 0.9, BEGIN + 5: 0.1}}, params=two_phase(sell={"min_health": 0.35}, buy={"min_health": 0.5}))
    sales = of(told["checks"].query("side == 'sell'"), "AAA")
    assert sales["reason"].tolist()[:4] == ["no quote"] * 3 + ["4 days old; at most 3"]
    assert bars_from(panel, of(ledger.fills, "AAA").query("quantity < 0")["timestamp"]) == [BEGIN + 10]


def test_a_stop_that_waits_does_not_wait_for_its_intent() -> None:
    """The stop is looked at anew at every quote: an intent that is stale does not matter to it."""
    panel = changed(changed(calm(), "AAA", BEGIN + 5, 0.85, at_open=False), "AAA", BEGIN + 6, np.nan, BEGIN + 8)
    ledger, told = played(panel, {"AAA": 0.9})
    sales = of(told["checks"].query("side == 'sell'"), "AAA")
    assert sales["reason"].iloc[3] == "4 days old; at most 3"
    assert sales["action"].iloc[4] == "execute"
    assert "this morning" in sales["reason"].iloc[4]
    assert bars_from(panel, of(ledger.fills, "AAA").query("quantity < 0")["timestamp"])[0] == BEGIN + 9


def test_a_fund_without_opens_is_not_quoted_in_the_morning() -> None:
    """Its close is hours away: a morning that knew it would know the day."""
    panel = calm()
    panel.fields["open"].flags.writeable = True
    panel["open"][SYMBOLS.index("AAA")] = np.nan
    ledger, told = played(panel, {"AAA": 0.9, "TTT": 0.9})
    assert set(ledger.fills["symbol"]) == {"TTT"}
    assert set(of(told["checks"], "AAA")["action"]) == {"skip"}


def test_a_waiting_purchase_goes_when_the_night_speaks_against_it() -> None:
    """A halt over the morning; in the night after it the market is in a panic."""
    panel = changed(calm(), "AAA", BEGIN + 1, np.nan, BEGIN + 1)
    for regimes, bought in (({}, [BEGIN + 2]), ({BEGIN + 1: "high_vol_panic"}, [])):
        ledger, told = played(panel, {"AAA": {0: 0.9, BEGIN + 1: np.nan}}, regimes)
        assert bars_from(panel, ledger.fills["timestamp"]) == bought
        dropped = of(told["log"], "AAA").query("step == 'waiting'")
        assert dropped["reason"].tolist() == ["class equity does not suit high_vol_panic"] * bool(regimes)


def test_a_waiting_purchase_goes_when_its_fund_is_seen_again() -> None:
    """No quote in the morning, a bar all the same, and by then the fund is not wanted any more."""
    panel = calm()
    said, params = heard(panel, two_phase(), {"AAA": {0: 0.9, BEGIN + 1: np.nan}}), two_phase()
    phases, books, none = Phases(said, params), Desk(panel.symbols, FREE, ACCOUNT).books, np.ones(len(SYMBOLS))
    first = phases.night(BEGIN, none, books)
    assert first is not None
    assert [i.symbol for i in first.made] == ["AAA"]
    phases.morning(BEGIN + 1, panel.index[BEGIN + 1], np.full(len(SYMBOLS), np.nan), none, books)
    assert [i.symbol for made in phases.memory.waiting for i in made] == ["AAA"]
    second = phases.night(BEGIN + 1, none, books)
    assert second is not None
    assert second.lines[-1].reason == "has a bar tonight: decided anew"
    assert not [i for made in phases.memory.waiting for i in made]


@pytest.mark.parametrize(("halted", "bought"), [(2, BEGIN + 3), (3, None)])
def test_a_halted_fund_that_is_wanted(halted: int, bought: int | None) -> None:
    """The purchase waits for at most three days; meanwhile the fund is no candidate, and that is said."""
    panel = changed(calm(), "AAA", BEGIN + 1, np.nan, BEGIN + halted)
    ledger, told = played(panel, {"AAA": {0: 0.9, BEGIN + 1: np.nan}})
    checks = of(told["checks"], "AAA")
    assert checks["reason"].tolist()[:halted] == ["no quote"] * halted
    if bought:
        assert checks["action"].tolist()[halted:] == ["execute"]
        assert bars_from(panel, ledger.fills["timestamp"]) == [bought]
    else:
        assert checks["reason"].tolist()[halted:] == ["4 days old; at most 3"]
        assert ledger.fills.empty
    assert of(told["log"], "AAA").query("step == 'score'")["reason"].tolist()[:2] == [f"no bar for {d} days" for d in (1, 2)]


def test_intents_are_stale_after_a_long_weekend() -> None:
    """Decided on a Friday; there is no trading on Monday, and on Tuesday it is four days old."""
    panel = missing(calm(), [BEGIN + 5])
    quiet = {BEGIN: "high_vol_panic", BEGIN + 4: "calm_uptrend"}  # equities are wanted from Friday on
    ledger, told = played(panel, {"AAA": {0: 0.9, BEGIN + 5: np.nan}}, quiet)
    assert panel.index[BEGIN + 4].day_name() == "Friday"
    assert panel.index[BEGIN + 5].day_name() == "Tuesday"
    checks = of(told["checks"], "AAA")
    assert checks["reason"].tolist() == ["4 days old; at most 3"]
    assert ledger.fills.empty
    ledger, told = played(calm(), {"AAA": {0: 0.9, BEGIN + 5: np.nan}}, quiet)
    assert bars_from(panel, ledger.fills["timestamp"]) == [BEGIN + 5]  # on a Monday with trading


@pytest.mark.parametrize("gap", [0.07, -0.07])
def test_a_gap_of_seven_percent(gap: float) -> None:
    """A purchase is skipped either way. Held, a fall of seven percent fires the stop of a leveraged fund and not that of another; one that had lost four percent before is sold."""
    panel = changed(changed(calm(), "AAA", BEGIN + 1, 1 + gap), "BBB", BEGIN + 1, 1.02)
    _, told = played(panel, {"AAA": {0: 0.9, BEGIN + 1: np.nan}, "BBB": 0.8})
    assert of(told["checks"], "AAA")["action"].tolist() == ["skip"]
    assert "gap of " + f"{gap:+.0%}"[:2] in of(told["checks"], "AAA")["reason"].iloc[0]
    assert of(told["checks"], "BBB")["action"].tolist() == ["execute"]
    panel = changed(calm(), "CCC", BEGIN + 4, 0.96, at_open=False)
    for symbol in ("BBB", "CCC", "LLL"):
        panel = changed(panel, symbol, BEGIN + 6, 1 + gap)
    ledger, told = played(panel, {s: {0: 0.9, BEGIN + 3: np.nan} for s in ("BBB", "CCC", "LLL")})
    stopped = told["checks"].query("side == 'sell'")
    stopped = stopped[np.array(bars_from(panel, stopped["timestamp"])) == BEGIN + 6]
    assert stopped["symbol"].tolist() == ([] if gap > 0 else ["CCC", "LLL"])
    assert stopped["reason"].str.contains("this morning").all()
    assert (ledger.fills.query("quantity < 0")["reference_price"].to_numpy()[:2] == [panel["open"][SYMBOLS.index(s), BEGIN + 6] for s in stopped["symbol"]]).all()


def test_a_day_without_any_quote() -> None:
    """Nothing is carried out, nothing is decided on old prices, the account is worth what it was; the day after, what waited is done."""
    panel = changed(calm(), None, BEGIN + 1, np.nan, BEGIN + 1)
    ledger, told = played(panel, {"AAA": 0.9, "TTT": 0.8})
    day = np.array(bars_from(panel, told["checks"]["timestamp"]))
    assert told["checks"][day == BEGIN + 1]["reason"].unique().tolist() == ["no quote"]
    assert bars_from(panel, ledger.fills["timestamp"]) == [BEGIN + 2] * 2
    assert ledger.equity["equity"].iloc[1] == ACCOUNT.initial_cash
    night = told["log"][told["log"]["timestamp"] == panel.index[BEGIN + 1]]
    assert night["reason"].str.contains("no bar for 1 days").all()
    assert (night["outcome"] == "refused").all()


def test_a_delisted_fund() -> None:
    """It ends while it is held, and while its sale waits: kept, with the reason, until it is written off; then its money is there again, less the haircut."""
    panel, k = changed(calm(), "AAA", BEGIN + 10, np.nan), SYMBOLS.index("AAA")
    for health in (0.9, {0: 0.9, BEGIN + 9: 0.1}):
        ledger, told = played(panel, {"AAA": health}, params=two_phase(sell={"min_health": 0.35}, buy={"min_health": 0.5}))
        (end,) = ledger.fills.query("kind == 'delisting'").itertuples()
        assert bars_from(panel, [end.timestamp]) == [BEGIN + 14]
        assert end.fill_price == pytest.approx(0.9 * panel["close"][k, BEGIN + 9])
        lines = of(told["log"], "AAA").set_index("timestamp")["reason"][panel.index[BEGIN + 10] :]
        assert lines.str.contains("no bar for").all()
        assert held(ledger, "AAA", panel).iloc[BEGIN + 14 :].eq(0).all()
    assert of(told["checks"], "AAA")["reason"].tolist()[-1] == "4 days old; at most 3"
    settled, _ = played(panel, {"AAA": 0.9}, events=[(BEGIN + 11, "AAA", "settlement", 30.0)])
    assert settled.fills.query("kind == 'settlement'")["fill_price"].tolist() == [30.0]


@pytest.mark.parametrize(("cash", "orders"), [(1_240.0, 0), (1_260.0, 1), (200.0, 0)])
def test_an_account_with_little_cash(cash: float, orders: int) -> None:
    """A fifth of it is less than the smallest order, or more."""
    ledger, told = played(calm(), {"AAA": 0.9}, initial_cash=cash, params=two_phase(size={"vol_high": 1.0}))
    assert len(ledger.orders) == orders
    if not orders:
        assert of(told["log"], "AAA")["step"].eq("smallest order").all()
        assert of(told["log"], "AAA")["reason"].str.contains("is less than \\$250").all()
    assert (ledger.equity["cash"] >= 0.1 * cash - 1e-9).all()


def test_what_the_morning_leaves_too_small_is_skipped() -> None:
    """A sale that brings less than the night thought leaves less to buy for."""
    panel = changed(calm(), "AAA", BEGIN + 6, 0.55)  # opens 45 % lower
    params = two_phase(sell={"min_health": 0.35}, buy={"min_health": 0.5}, limits={"max_positions": 1, "max_weight": 1.0, "cash": BLOCKS["policy"]["decisions"]["limits"]["cash"] | {"calm_uptrend": 0.0}}, size={"base_weight": 1.0})
    ledger, told = played(panel, {"AAA": {0: 0.9, BEGIN + 5: 0.1}, "BBB": {0: np.nan, BEGIN + 5: 0.9}}, params=params, initial_cash=500.0)
    bought = of(told["checks"], "BBB").iloc[0]
    assert bought["action"] == "execute"
    assert "cut from" in bought["reason"]
    assert ledger.equity["cash"].min() > -1e-9
    ledger, told = played(panel, {"AAA": {0: 0.9, BEGIN + 5: 0.1}, "BBB": {0: np.nan, BEGIN + 5: 0.9}}, params=params, initial_cash=400.0)
    assert of(told["checks"], "BBB").iloc[0]["reason"].startswith("cash: $")


def test_a_leveraged_fund_is_sold_after_ten_bars() -> None:
    """A bar that is missing does not make it older."""
    for panel, sold in ((calm(), BEGIN + 12), (changed(calm(), "LLL", BEGIN + 4, np.nan, BEGIN + 4), BEGIN + 13)):
        ledger, told = played(panel, {"LLL": {0: 0.9, BEGIN + 2: np.nan}, "AAA": 0.8})
        fills = of(ledger.fills, "LLL")
        assert bars_from(panel, fills["timestamp"])[:2] == [BEGIN + 1, sold]
        assert (of(told["log"], "LLL").query("outcome == 'sold'")["step"] == "leveraged_age").all()
        assert held(ledger, "AAA", panel).iloc[-1] > 0


def test_a_panic_sells_equities_alone() -> None:
    panel = calm()
    health = dict.fromkeys(("AAA", "BBB", "TTT", "GGG", "LLL"), 0.9)
    ledger, told = played(panel, health, {BEGIN + 5: "high_vol_panic"})
    sold = ledger.fills.query("quantity < 0")
    assert sorted(sold["symbol"]) == ["AAA", "BBB", "LLL"]
    assert set(bars_from(panel, sold["timestamp"])) == {BEGIN + 6}
    assert set(told["log"].query("outcome == 'sold'")["step"]) == {"panic"}
    assert sorted(ledger.positions[ledger.positions["timestamp"] == panel.index[-1]]["symbol"]) == ["GGG", "TTT"]
    after = told["log"][told["log"]["timestamp"] >= panel.index[BEGIN + 6]]
    assert of(after, "AAA")["reason"].str.contains("class equity does not suit high_vol_panic").all()


def test_a_night_without_a_regime_buys_nothing_and_keeps_its_stops() -> None:
    panel = changed(changed(calm(), "AAA", BEGIN + 6, 0.85, at_open=False), "BBB", BEGIN + 2, 1.0)
    said = heard(panel, two_phase(), {"AAA": 0.9, "BBB": {0: np.nan, BEGIN + 5: 0.9}})
    said.market.loc[said.times[BEGIN + 5 : BEGIN + 10], ["regime", "size_modifier", "throttle", "disagreement"]] = [None, np.nan, np.nan, np.nan]
    ledger, told = replay_phases(panel, said, two_phase(), FREE, ACCOUNT)
    assert bars_from(panel, of(ledger.fills, "AAA").query("quantity < 0")["timestamp"]) == [BEGIN + 7]
    assert bars_from(panel, of(ledger.fills, "BBB")["timestamp"]) == [BEGIN + 11]
    nights = told["log"][(told["log"]["timestamp"] >= said.times[BEGIN + 5]) & (told["log"]["timestamp"] < said.times[BEGIN + 10])]
    assert of(nights, "BBB")["reason"].str.contains("the regime is not known").all()


# ------------------------------------------------------------------------------------------------ the event engine in the morning


class Habit:
    """Buys and sells by a table of shares, quotes or no quotes: at night, or in the morning in shares as after the splits of that morning."""

    def __init__(self, shares: np.ndarray, early: bool) -> None:
        self.shares, self.early, self.seen = shares, early, 0

    def _orders(self, number: int, symbols: tuple[str, ...], by: Any) -> Orders | None:
        wanted = self.shares[number] * by
        some = np.flatnonzero(wanted)
        return Orders([symbols[n] for n in some], wanted[some], life=1, reason="habit") if len(some) else None

    def decide(self, now: Moment) -> Orders | None:
        return Orders([]) if self.early else self._orders(now.number, now.symbols, 1.0)


class EarlyHabit(Habit):
    def open(self, now: Opening) -> Early | None:
        orders = self._orders(now.number - 1, now.symbols, now.splits) if now.number else None
        return None if orders is None else Early(now.time - np.timedelta64(375, "m"), orders)


REAL_COSTS = CostParams(commission_bps=3, half_spread_bps=5, impact_coefficient=1, adv_bars=3, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.01, borrow_bps_annual=300, fill="open",
                        commission_per_share=0.01, commission_minimum=2, slippage_bps=2, margin_rate_annual_bps=500, participation=0.003)


@pytest.mark.parametrize("fill", ["open", "close"])
@pytest.mark.parametrize("seed", range(4))
def test_orders_of_the_morning_are_orders_of_the_night(seed: int, fill: str) -> None:
    """Where a strategy does not look at quotes it does not matter when it sends market orders: fills, costs, refusals for want of margin and the account are the same to the bit, splits included."""
    rng, panel = np.random.default_rng(seed), calm(seed)
    events = [(int(t), str(rng.choice(SYMBOLS)), "split", float(rng.choice([2.0, 0.5, 4.0]))) for t in rng.choice(np.arange(2, len(panel)), 12, replace=False)]
    for t, symbol, _, factor in events:
        panel = changed(panel, symbol, t, 1 / factor)
    shares = np.where(rng.random((len(panel), len(SYMBOLS))) < 0.2, rng.integers(-4000, 6000, (len(panel), len(SYMBOLS))), 0).astype(float)
    actions = lay_actions(panel, pd.DataFrame([(panel.index[t], *rest) for t, *rest in events], columns=["timestamp", "symbol", "kind", "value"]))
    costs, account = REAL_COSTS.model_copy(update={"fill": fill}), ACCOUNT.model_copy(update={"initial_cash": 1e6, "start": "panel"})
    night, morning = (run(bars_of(panel, actions), SYMBOLS, kind(shares, kind is EarlyHabit), costs, account) for kind in (Habit, EarlyHabit))
    assert {"filled", "partial", "rejected"} <= set(morning.orders["status"])
    for name in ("fills", "positions", "equity"):
        pd.testing.assert_frame_equal(getattr(morning, name), getattr(night, name), check_exact=True)
    orders = night.orders[night.orders["decision_time"] < panel.index[-1]]  # after the last night no morning came
    pd.testing.assert_frame_equal(morning.orders.drop(columns="decision_time"), orders.drop(columns="decision_time"), check_exact=True)
    assert (morning.orders["decision_time"].to_numpy() > orders["decision_time"].to_numpy()).all()


class OneMorning:
    """One batch of orders, on one morning; nothing is ever decided at a close."""

    def __init__(self, number: int, orders: Orders, nightly: Orders | None = None) -> None:
        self.number, self.orders, self.nightly = number, orders, nightly

    def decide(self, now: Moment) -> Orders | None:
        return self.nightly if now.number == self.number - 1 else None

    def open(self, now: Opening) -> Early | None:
        return Early(now.time - np.timedelta64(375, "m"), self.orders) if now.number == self.number else None


@pytest.mark.parametrize("factor", [2.0, 0.1])
@pytest.mark.parametrize(("leverage", "status"), [(0.99, "filled"), (1.03, "rejected")])
def test_margin_on_a_morning_with_a_split(factor: float, leverage: float, status: str) -> None:
    """What the account can carry is counted in the shares of the morning: twice the shares at half the price are as much as before."""
    panel, k = changed(calm(), "AAA", 10, 1 / factor), SYMBOLS.index("AAA")
    actions = lay_actions(panel, pd.DataFrame({"timestamp": panel.index[[10]], "symbol": "AAA", "kind": "split", "value": factor}))
    account = ACCOUNT.model_copy(update={"start": "panel"})
    shares = leverage * ACCOUNT.max_gross * ACCOUNT.initial_cash / panel["close"][k, 9] * factor
    ledger = run(bars_of(panel, actions), SYMBOLS, OneMorning(10, Orders(["AAA"], shares)), FREE, account)
    assert ledger.orders["status"].tolist() == [status]
    half = shares / 2 / factor  # held before the split: what may be added is the other half
    ledger = run(bars_of(panel, actions), SYMBOLS, Two(8, half, 10, half * factor), FREE, account)
    assert ledger.orders["status"].tolist() == ["filled", status]


class Two:
    """Two purchases of AAA, each in a morning."""

    def __init__(self, first: int, some: float, second: int, more: float) -> None:
        self.wanted = {first: some, second: more}

    def decide(self, now: Moment) -> None:
        return None

    def open(self, now: Opening) -> Early | None:
        return Early(now.time - np.timedelta64(375, "m"), Orders(["AAA"], self.wanted[now.number])) if now.number in self.wanted else None


def test_margin_for_a_symbol_whose_first_bar_begins() -> None:
    """It has no last price; its order counts at the quote, and the orders behind it are not waved through."""
    panel = changed(calm(), "AAA", 0, np.nan, 9)
    for shares, status in ((1e7, ["rejected", "filled"]), (10.0, ["filled", "filled"])):
        ledger = run(bars_of(panel, lay_actions(panel)), SYMBOLS, OneMorning(10, Orders(["AAA", "BBB"], [shares, 10.0])), FREE, ACCOUNT.model_copy(update={"start": "panel"}))
        assert ledger.orders["status"].tolist() == status
    ledger = run(bars_of(panel, lay_actions(panel)), SYMBOLS, OneMorning(10, Orders(["AAA", "BBB"], [10.0, 1e7])), FREE, ACCOUNT.model_copy(update={"start": "panel"}))
    assert ledger.orders["status"].tolist() == ["filled", "rejected"]


def test_a_ledger_begins_with_the_first_orders_of_a_morning() -> None:
    """A strategy that only acts in the morning has an account all the same."""
    panel = calm()
    ledger = run(bars_of(panel, lay_actions(panel)), SYMBOLS, OneMorning(10, Orders(["AAA"], 10.0)), FREE, ACCOUNT)
    assert ledger.equity["timestamp"].iloc[0] == panel.index[10]
    assert len(ledger.fills) == 1


def test_orders_of_the_morning_are_not_delayed() -> None:
    """Those of a night wait `delay_bars` bars, those of a morning are for that morning."""
    panel = calm()
    ledger = run(bars_of(panel, lay_actions(panel)), SYMBOLS, OneMorning(10, Orders(["AAA"], 10.0), Orders(["BBB"], 10.0)), FREE, ACCOUNT.model_copy(update={"delay_bars": 3}))
    filled = ledger.fills.set_index("symbol")["timestamp"]
    assert bars_from(panel, [filled["AAA"], filled["BBB"]]) == [10, 13]


def test_orders_of_the_morning_for_a_fund_without_a_quote_are_an_error() -> None:
    panel = changed(calm(), "AAA", 10, np.nan, 10)
    with pytest.raises(DataError, match="its session is closed"):
        run(bars_of(panel, lay_actions(panel)), SYMBOLS, OneMorning(10, Orders(["AAA"], 10.0)), FREE, ACCOUNT)


# ------------------------------------------------------------------------------------------------ nothing is known early


@dataclass(frozen=True, eq=False)
class World:
    """All that there is to know, and when: prices with opens, releases, what networks say of the market and of the funds."""

    panel: Panel
    macro: pd.DataFrame
    voices: dict[str, pd.DataFrame]
    health: pd.DataFrame

    def lived(self) -> tuple[Ledger, Tables]:
        """The whole chain from prices to orders."""
        params = block(TwoPhaseParams, BLOCKS["policy"] | {"morning_minutes": 375}, "policy")
        rule = label_regimes(context(self.panel, self.macro, STATE), RULE)
        said = opinions(self.panel, self.health, market_view(self.voices, signals(self.panel, self.macro, params.experts), rule, params.fusion), params)
        return replay_phases(select(self.panel, set(said.symbols)), said, params, FREE.model_copy(update={"half_spread_bps": 2.0, "impact_coefficient": 1.0}), ACCOUNT)

    def otherwise(self, t: int, rng: np.random.Generator) -> World:
        """Another future: after night t all is different but the opens of the morning after."""
        fields = {name: b.copy() for name, b in self.panel.fields.items()}
        factor = np.exp(np.cumsum(rng.normal(0, 0.05, fields["close"][:, t + 1 :].shape), axis=1))
        for name, b in fields.items():
            kept = b[:, t + 1].copy()
            b[:, t + 1 :] *= factor
            if name == "open":
                b[:, t + 1] = kept
        fields["high"], fields["low"] = np.maximum.reduce([fields[f] for f in ("open", "high", "close")]), np.minimum.reduce([fields[f] for f in ("open", "low", "close")])
        now = self.panel.index[t]
        late = self.macro["timestamp"] > now
        macro = self.macro.assign(value=self.macro["value"].where(~late, self.macro["value"] * np.exp(rng.normal(0, 0.5, len(self.macro)))))
        voices = {}
        for name, table in self.voices.items():
            voices[name] = table.copy()
            voices[name].loc[table.index > now] = rng.dirichlet(np.full(len(REGIMES), 0.3), int((table.index > now).sum()))
        health = self.health.assign(health=self.health["health"].where(self.health["timestamp"] <= now, rng.random(len(self.health))))
        return World(Panel(self.panel.times, self.panel.symbols, fields), macro, voices, health)


@cache
def world() -> tuple[World, Ledger, Tables]:
    """Four years of the embedded funds with opens that were made up; decided is the last of them."""
    rng, closes, macro = np.random.default_rng(0), from_frame(next(s for s in embedded.sets() if s.name == "etf_daily").bars), embedded.macro()
    closes = between(closes, "2012-06-01", "2015-12-31")
    close = closes["close"]
    start = np.concatenate([close[:, :1], close[:, :-1]], axis=1) * np.exp(rng.normal(0, 0.005, close.shape))
    panel = Panel(closes.times, closes.symbols, {"open": start, "high": np.maximum(start, close) * 1.001, "low": np.minimum(start, close) * 0.999, "close": close, "volume": np.full(close.shape, 1e6)})
    rule, since = label_regimes(context(panel, macro, STATE), RULE), panel.index[-160]
    voices = {"gru": stay_regimes(rule, since, 5)[since:], "transformer": stay_regimes(rule["2014":], since, 5)[since:]}
    trend = (panel.view("close") / panel.view("close").rolling(20).mean() - 1)[panel.index[-200] :]
    health = trend.melt(ignore_index=False, var_name="symbol", value_name="health").dropna().rename_axis("timestamp").reset_index().assign(fold=0, vol_low=0.2, vol_medium=0.5, vol_high=0.3, behaviour_momentum=0.5, behaviour_reversion=0.2, behaviour_mixed=0.3)
    own = World(panel, macro, voices, health)
    return own, *own.lived()


@pytest.mark.parametrize("place", [0.1, 0.45, 0.8])
def test_what_comes_later_changes_nothing_before(place: float) -> None:
    """All prices, releases and forecasts after a night replaced, but the opens of the next morning: every word of the nights up to it, every check up to that morning, its orders and the account before it are the same to the bit. So the morning sees of its bar no high, low or close, and of its volume only that there is some."""
    own, ledger, told = world()
    busy = np.unique(bars_from(own.panel, told["checks"].query("action == 'execute'")["timestamp"]))
    t = int(busy[int(place * len(busy))]) - 1
    other, again = own.otherwise(t, np.random.default_rng(t)).lived()
    night, morning = own.panel.index[t], own.panel.index[t + 1]
    for name, table in told.items():
        end = morning if name == "checks" else night
        pd.testing.assert_frame_equal(again[name][again[name]["timestamp"] <= end], table[table["timestamp"] <= end], check_exact=True)
    assert (told["checks"]["timestamp"].between(night, morning) & (told["checks"]["action"] == "execute")).any()
    ordered = ["order", "decision_time", "symbol", "quantity", "reason"]
    pd.testing.assert_frame_equal(*(x.orders.loc[x.orders["decision_time"] <= morning, ordered] for x in (other, ledger)), check_exact=True)
    pd.testing.assert_frame_equal(*(x.fills[x.fills["timestamp"] <= morning] for x in (other, ledger)), check_exact=True)
    pd.testing.assert_frame_equal(*(x.equity[x.equity["timestamp"] <= night] for x in (other, ledger)), check_exact=True)
    assert not other.equity["equity"].equals(ledger.equity["equity"])


def test_the_morning_does_see_its_open() -> None:
    """Or the test above would say nothing."""
    own, _, told = world()
    bought = told["checks"].query("action == 'execute' and side == 'buy'").iloc[0]
    (t,) = bars_from(own.panel, [bought["timestamp"]])
    fields = {name: b.copy() for name, b in own.panel.fields.items()}
    fields["open"][own.panel.symbols.index(bought["symbol"]), t] *= 1.07
    _, again = replace(own, panel=Panel(own.panel.times, own.panel.symbols, fields)).lived()
    check = of(again["checks"][again["checks"]["timestamp"] == bought["timestamp"]], bought["symbol"]).iloc[0]
    assert check["reason"].startswith("gap of")


def test_a_week_without_vix() -> None:
    """The last figure counts for five days; after them its signal is silent and says so, the others and the regime go on, and no night goes by without a decision."""
    own, _, told = world()
    params = block(TwoPhaseParams, BLOCKS["policy"], "policy")
    before = own.macro[own.macro["series"] == "vix"]["timestamp"]
    gone = before[(before >= "2015-10-05") & (before < "2015-10-15")]
    blind = replace(own, macro=own.macro[~((own.macro["series"] == "vix") & own.macro["timestamp"].isin(gone))])
    reading = signals(blind.panel, blind.macro, params.experts)["volatility_complexity"]["2015-10-01":"2015-10-31"]
    silent = reading[reading["state"] == UNAVAILABLE]
    assert 0 < len(silent) < len(gone)
    assert silent["reason"].str.contains("vix").all()
    ledger, again = blind.lived()
    nights = again["log"]["timestamp"].unique()
    assert set(silent.index) <= set(nights)
    assert not again["log"]["reason"].str.contains("is not known").any()
    assert len(nights) == told["log"]["timestamp"].nunique()
    early = again["log"]["timestamp"] < gone.iloc[0]
    pd.testing.assert_frame_equal(again["log"][early], told["log"][told["log"]["timestamp"] < gone.iloc[0]])
    assert len(ledger.equity) == len(world()[1].equity)


# ------------------------------------------------------------------------------------------------ a desk on disk


@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([0.3, 0.9]))
def test_a_desk_put_away_after_every_bar(seed: int, rate: float) -> None:
    """Random orders of every kind, with brackets, splits, dividends, settlements, margin and partial fills: an account that is written and read after each bar has the ledger of one that never was, and its file is the same however often it is opened."""
    rng = np.random.default_rng(seed)
    panel = chaos.market(rng, 4, 20)
    actions = lay_actions(panel, chaos.happenings(panel, rng))
    bars, kinds = list(bars_of(panel, actions)), {s: k for s, k in chaos.KINDS.items() if s in panel.symbols}
    at_once = run(bars, panel.symbols, chaos.Chaos(seed, rate), chaos.COSTS, chaos.PARAMS, kinds)
    strategy = chaos.Chaos(seed, rate)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "account.safetensors"
        save_desk(Desk(panel.symbols, chaos.COSTS, chaos.PARAMS, kinds), file, chaos.COSTS, 0, kinds)
        for number, bar in enumerate(bars):
            desk, written = load_desk(file, panel.symbols, chaos.COSTS, chaos.PARAMS, kinds)
            kept = file.read_bytes()
            save_desk(desk, file, chaos.COSTS, written, kinds)
            assert file.read_bytes() == kept
            recorder = books.Recorder(desk.symbols, desk.books.terms[:, MULTIPLIER], desk.books.equity, Path(folder) / "ledger", written=written)
            desk.open(bar)
            recorder.note(desk.books, *desk.advance(bar))
            desk.act(strategy.decide(Moment(number, bar, desk.symbols, desk.books, desk.exchange.working)) if desk.books.equity > 0 else None)
            if number == len(bars) - 1:
                desk.exchange.close()
            recorder.orders.append(desk.exchange.collect())
            recorder.flush()
            save_desk(desk, file, chaos.COSTS, recorder.written, kinds)
        assert_same(Ledger.load(Path(folder) / "ledger"), at_once)
        damaged, place = bytearray(file.read_bytes()), int(rng.integers(file.stat().st_size))
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(damaged))
        with pytest.raises(DataError, match=r"damaged|other symbols"):
            load_desk(file, panel.symbols, chaos.COSTS, chaos.PARAMS, kinds)


# ------------------------------------------------------------------------------------------------ an account on disk, day by day

DEATHS = ("at once", "table 1", "table 2", "table 3", "table 4", "unfinished", "done")  # before anything, after so many tables of the ledger, before the file has its name, before anybody knows that it is done


def dying(work: Callable[[], object], where: str) -> int:
    """Do some work in a process of its own that ends on its way; its exit code."""
    child = get_context("fork").Process(target=_die, args=(work, where))
    child.start()
    child.join(120)
    assert child.exitcode is not None, where
    return child.exitcode


def _die(work: Callable[[], object], where: str) -> None:
    tables, write = 0, books.write_parquet

    def counted(table: pd.DataFrame, path: Path) -> None:
        nonlocal tables
        write(table, path)
        tables += 1
        if where == f"table {tables}":
            os._exit(9)

    def named(self: Path, target: Path) -> Path:
        if where == "unfinished" and target.name == "account.safetensors":
            os._exit(9)
        return move(self, target)
    move = Path.replace
    books.write_parquet, Path.replace = counted, named  # type: ignore[assignment, method-assign]
    if where != "at once":
        work()
    os._exit(9)


@dataclass
class Days:
    """A history as an operator lives it: a new object for each evening and morning, which knows what is in the folder and what is said tonight."""

    folder: Path
    panel: Panel
    actions: Actions
    params: TwoPhaseParams
    costs: CostParams
    account: BacktestParams
    said: Callable[[int], Opinions]  # at the close of a bar

    @property
    def operator(self) -> Operator:
        return Operator(self.folder, self.params, self.costs, self.account, self.panel.symbols)

    def live(self, first: int, last: int, deaths: Mapping[tuple[int, str], str] | None = None) -> Ledger:
        """From one bar to another; `deaths`: bar, evening or morning, and where the first try ends."""
        bars, deaths = list(bars_of(self.panel, self.actions)), deaths or {}
        self.operator.begin(bars[:first])
        for t in range(first, last + 1):
            said = self.said(t)
            self._survived(lambda t=t, said=said: self.operator.evening(bars[t], said), deaths.get((t, "evening")), "has been through")
            if t < last:
                begins, now = bars[t + 1], pd.Timestamp(self.panel.times[t + 1], tz="UTC") - pd.Timedelta(minutes=self.params.morning_minutes)
                quotes = begins.prices[3] if self.costs.fill == "close" else np.where(np.isnan(begins.prices[0]), begins.prices[3], begins.prices[0])
                self._survived(lambda said=said, now=now, quotes=quotes, splits=begins.splits: self.operator.morning(now, quotes, splits, said), deaths.get((t, "morning")), "has been through")
        return self.operator.ledger

    @staticmethod
    def _survived(work: Callable[[], object], where: str | None, told: str) -> None:
        """A piece of work that may be killed and is then done again; where it had been done, that is said."""
        if where is None:
            work()
            return
        assert dying(work, where) == 9
        if where == "done":
            with pytest.raises(DataError, match=told):
                work()
        else:
            work()


def eventful() -> tuple[Panel, Actions, Opinions, TwoPhaseParams]:
    """Two months with splits, halts, gaps, a day without quotes, changing regimes and healths."""
    rng, panel = np.random.default_rng(3), calm(3, 75)
    for _ in range(12):
        symbol, t = str(rng.choice(SYMBOLS)), int(rng.integers(BEGIN, 70))
        panel = changed(panel, symbol, t, float(rng.choice([0.88, 0.95, 1.08])), at_open=bool(rng.random() < 0.5))
    events = [(int(t), str(rng.choice(SYMBOLS)), "split", float(rng.choice([2.0, 0.1]))) for t in rng.choice(np.arange(BEGIN, 70), 8, replace=False)]
    for t, symbol, _, factor in events:
        panel = changed(panel, symbol, t, 1 / factor)
    for _ in range(25):
        t = int(rng.integers(BEGIN, 70))
        panel = changed(panel, str(rng.choice(SYMBOLS)), t, np.nan, t + int(rng.integers(0, 3)))
    panel = changed(panel, None, BEGIN + 20, np.nan, BEGIN + 20)
    actions, params = lay_actions(panel, pd.DataFrame([(panel.index[t], *rest) for t, *rest in events], columns=["timestamp", "symbol", "kind", "value"])), two_phase(sell={"min_health": 0.35}, buy={"min_health": 0.5})
    health = {s: {0: rng.random(), **{int(t): rng.random() for t in np.sort(rng.choice(np.arange(BEGIN, 70), 14))}} for s in SYMBOLS}
    regimes = {int(t): str(rng.choice(["calm_uptrend", "calm_uptrend", "risk_on_trend", "risk_off_trend", "high_vol_panic"])) for t in np.sort(rng.choice(np.arange(BEGIN + 1, 70), 6, replace=False))}
    return panel, actions, heard(panel, params, dict(health), regimes, actions), params


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_day_by_day_is_the_replay(seed: int | None, tmp_path: Path) -> None:
    """Undisturbed, and killed at points drawn at random: the ledger of the backtest."""
    panel, actions, said, params = eventful()
    costs = REAL_COSTS.model_copy(update={"participation": None})
    at_once, told = replay_phases(panel, said, params, costs, ACCOUNT, actions)
    assert told["checks"]["reason"].str.contains("no quote|gap of|replaced by|not held any more").sum() > 5
    assert len(at_once.fills) > 30
    rng, last = np.random.default_rng(seed), len(panel) - 1
    drawn = rng.choice(np.arange(BEGIN - 3, last), 12, replace=False) if seed else []
    deaths = {(int(t), when): str(rng.choice([d for d in DEATHS if when == "evening" or not d.startswith("table")])) for t in drawn for when in (str(rng.choice(["evening", "morning"])),)}
    by_day = Days(tmp_path, panel, actions, params, costs, ACCOUNT, lambda t: said.between(0, t)).live(BEGIN - 3, last, deaths)
    assert_same(by_day, at_once)


def test_the_operator_refuses_what_is_not_of_tonight(tmp_path: Path) -> None:
    panel, actions, said, params = eventful()
    days, bars = Days(tmp_path, panel, actions, params, FREE, ACCOUNT, lambda t: said.between(0, t)), list(bars_of(panel, actions))
    days.live(BEGIN, BEGIN + 3)
    now, one = pd.Timestamp(panel.times[BEGIN + 4], tz="UTC"), np.ones(len(SYMBOLS))
    for wrong in (said.between(0, BEGIN + 2), said.between(0, BEGIN + 4), replace(said.between(0, BEGIN + 3), symbols=said.symbols[:-1])):
        with pytest.raises(DataError, match="up to its last close"):
            days.operator.morning(now, bars[BEGIN + 4].prices[0], one, wrong)
    with pytest.raises(DataError, match="up to its last close"):
        days.operator.evening(bars[BEGIN + 4], said.between(0, BEGIN + 3))
    days.operator.morning(now, np.full(len(SYMBOLS), np.nan), one, said.between(0, BEGIN + 3))  # nothing is ordered, and that is a morning, too
    with pytest.raises(DataError, match="this morning already"):
        days.operator.morning(now, bars[BEGIN + 4].prices[0], one, said.between(0, BEGIN + 3))


def test_a_morning_that_nobody_came_to(tmp_path: Path) -> None:
    """The computer was off for a morning on which a wanted fund split; the evening is done later. The next morning knows the intent in new shares."""
    panel = changed(calm(), "AAA", BEGIN + 1, 0.5)
    actions, params = lay_actions(panel, pd.DataFrame({"timestamp": panel.index[[BEGIN + 1]], "symbol": "AAA", "kind": "split", "value": 2.0})), two_phase()
    said = heard(panel, params, {"AAA": {0: 0.9, BEGIN + 1: np.nan}}, actions=actions)
    days, bars = Days(tmp_path, panel, actions, params, FREE, ACCOUNT, lambda t: said.between(0, t)), list(bars_of(panel, actions))
    days.live(BEGIN, BEGIN)
    days.operator.evening(bars[BEGIN + 1], said.between(0, BEGIN + 1))
    (check,) = days.operator.morning(pd.Timestamp(panel.times[BEGIN + 2], tz="UTC"), bars[BEGIN + 2].prices[0], bars[BEGIN + 2].splits, said.between(0, BEGIN + 1))
    assert check.action == "execute"


# ------------------------------------------------------------------------------------------------ the same with models that are loaded each evening

LEARNED = pd.Timestamp("2014-06-30 20:00", tz="UTC")
KINDS = {"gru": {"hidden": 8}, "transformer": {"width": 8, "feedforward": 16}, "vae": {"hidden": (16, 8), "latent": 4}}


def made(kind: str, purge_bars: int) -> Model:
    """A small network as the system has it."""
    values = BLOCKS["models"][kind]
    return spec(kind, values | KINDS[kind] | {"train": values["train"] | {"epochs": 2}}, "models").build(7, 1, purge_bars)


def market_lesson(panel: Panel, macro: pd.DataFrame) -> Rows:
    """The market's rows, of a history."""
    state = context(panel, macro, STATE)
    return market_rows(state.rename_axis("timestamp").reset_index(), label_regimes(state, RULE).rename_axis("timestamp").reset_index(), [5])


def fund_rows(panel: Panel, macro: pd.DataFrame) -> pd.DataFrame:
    """The funds' features, of a history."""
    return compute(panel, BLOCKS["features"]["names"], macro, BLOCKS["features"]["benchmark"], short=True).to_frame()


def taught(panel: Panel, macro: pd.DataFrame, folder: Path) -> None:
    """Fit the three networks on the history up to LEARNED, and leave them in their folders."""
    past, released = until(panel, LEARNED), macro[macro["timestamp"] <= LEARNED]
    data = market_lesson(past, released)
    known = data.labels[5]["end"].notna().to_numpy()
    seen = windows(data.features, data.keys["symbol"], 21).take(np.flatnonzero(known))
    for kind in ("gru", "transformer"):
        made(kind, 5).fit(seen, data.labels[5]["regime"].to_numpy()[known], np.ones(known.sum()), data.times[known], LEARNED + pd.Timedelta(days=1)).save(folder / kind)
    rows = fund_rows(past, released).merge(label_frame(past, 5, "close", vol_bars=60)[["timestamp", "symbol", "ret_voladj"]].dropna())
    names = BLOCKS["features"]["names"]
    made("vae", 5).fit(rows[names], rows["ret_voladj"].to_numpy(), np.ones(len(rows)), rows["timestamp"].to_numpy("datetime64[us]"), LEARNED + pd.Timedelta(days=1)).save(folder / "vae")


def voice(folder: Path, kind: str, panel: Panel, macro: pd.DataFrame, since: pd.Timestamp) -> pd.DataFrame:
    """What a network, as it lies in its folder, says of the instants since one."""
    data, model = market_lesson(panel, macro), model_class({"gru": "gru_attention"}.get(kind, kind)).load(folder / kind)
    at = np.flatnonzero(data.keys["timestamp"] >= since)
    said = model.predict(windows(data.features, data.keys["symbol"], 21).take(at))
    return pd.DataFrame(said[[f"prob_{r}" for r in REGIMES]].to_numpy(), pd.DatetimeIndex(data.keys["timestamp"].iloc[at], name=None), list(REGIMES))


def healths(folder: Path, panel: Panel, macro: pd.DataFrame, since: pd.Timestamp) -> pd.DataFrame:
    """What the autoencoder in its folder says of the funds since an instant."""
    rows = fund_rows(panel, macro)
    rows = rows[rows["timestamp"] >= since].reset_index(drop=True)
    return rows[["timestamp", "symbol"]].assign(fold=0).join(model_class("vae").load(folder / "vae").predict(rows[BLOCKS["features"]["names"]])[list(HEALTH)])


@pytest.mark.slow
def test_sixty_days_with_models_from_their_folders(tmp_path: Path) -> None:
    """Each evening the history is what had happened by then: features, state of the market, signals and regimes are worked out anew, and the networks, loaded from disk, are asked about tonight alone. At twenty points the process is killed. What was said, and the ledger, are those of the history in one go, to the bit."""
    full, macro = from_frame(next(s for s in embedded.sets() if s.name == "etf_daily").bars), embedded.macro()
    full, params = between(full, "2010-06-01", "2015-06-30"), block(TwoPhaseParams, BLOCKS["policy"], "policy")
    costs, account = block(CostParams, BLOCKS["costs"], "costs"), block(BacktestParams, BLOCKS["backtest"], "backtest")
    taught(full, macro, tmp_path / "models")
    first = int(np.searchsorted(full.index, LEARNED)) + 40
    last, began = first + 64, full.index[first - 39]

    def told(panel: Panel, released: pd.DataFrame, voices: dict[str, pd.DataFrame], health: pd.DataFrame) -> Opinions:
        rule = label_regimes(context(panel, released, STATE), RULE)
        return opinions(panel, health, market_view(voices, signals(panel, released, params.experts), rule, params.fusion), params)

    whole = {kind: voice(tmp_path / "models", kind, full, macro, began) for kind in ("gru", "transformer")}
    health = healths(tmp_path / "models", full, macro, began)
    at_once = told(full, macro, whole, health)
    panel = select(full, set(at_once.symbols))
    heard_of = {kind: table[: full.index[first - 1]] for kind, table in whole.items()} | {"vae": health[health["timestamp"] < full.index[first]]}

    def tonight(t: int) -> Opinions:
        now = full.index[t]
        past, released = until(full, now), macro[macro["timestamp"] <= now]
        for kind in ("gru", "transformer"):
            heard_of[kind] = pd.concat([heard_of[kind], voice(tmp_path / "models", kind, past, released, now)])
        heard_of["vae"] = pd.concat([heard_of["vae"], healths(tmp_path / "models", past, released, now)], ignore_index=True)
        return told(past, released, {kind: heard_of[kind] for kind in ("gru", "transformer")}, heard_of["vae"])

    rng = np.random.default_rng(9)
    deaths = {(int(t), when): str(rng.choice([d for d in DEATHS if when == "evening" or not d.startswith("table")])) for t in rng.choice(np.arange(first, last), 20, replace=False) for when in (str(rng.choice(["evening", "morning"])),)}
    days = Days(tmp_path / "account", panel, lay_actions(panel), params, costs, account, tonight)
    by_day = days.live(first, last, deaths)
    end = full.index[last]
    for kind in ("gru", "transformer"):
        pd.testing.assert_frame_equal(heard_of[kind], whole[kind][:end], check_exact=True, check_freq=False)
    pd.testing.assert_frame_equal(heard_of["vae"], health[health["timestamp"] <= end], check_exact=True)
    silent = replace(at_once, market=at_once.market.copy())
    silent.market.loc[: full.index[first - 1], ["models", "regime"]] = None  # the account is opened on the first of these days
    replayed, tables = replay_phases(until(panel, end), silent.between(0, last), params, costs, account)
    assert_same(by_day, replayed)
    assert len(replayed.fills) > 15
    assert tables["checks"]["action"].eq("execute").sum() == len(replayed.orders)
