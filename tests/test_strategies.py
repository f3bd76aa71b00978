"""Whole strategies, with every digit of their results stored: a change in any of them has to be meant.

After a change that is meant: `python tests/test_strategies.py` writes the file anew, and its difference is part of the change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mltrading.backtest.actions import lay_actions
from mltrading.backtest.bars import bars_of
from mltrading.backtest.baselines import equal_weight, hold
from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams, simulate
from mltrading.backtest.events import Moment, Weights, run
from mltrading.backtest.instruments import Instrument
from mltrading.backtest.ledger import Ledger
from mltrading.backtest.orders import Orders
from mltrading.market.panel import Panel
from mltrading.market.simulate import random_walk

STORED = Path(__file__).parent / "data" / "strategies.json"
COSTS = CostParams(commission_bps=1, half_spread_bps=2, impact_coefficient=1, adv_bars=20, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.005, borrow_bps_annual=50, fill="open")
BROKER = COSTS.model_copy(update={"commission_bps": 0.0, "commission_per_share": 0.005, "commission_minimum": 1.0, "slippage_bps": 1.0, "margin_rate_annual_bps": 500.0})
PARAMS = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=2, delist_after_bars=5, delist_haircut=0.3, start="decision")
STEADY, RAGGED = random_walk(6, 500, seed=11, ragged=False), random_walk(8, 500, seed=12, closes_only=1)


class Each:
    """A strategy from a function of the moment and of the closes so far, (t, N)."""

    def __init__(self, rule: Callable[[Moment, np.ndarray], Orders | Weights | None]) -> None:
        self.rule, self.closes = rule, []

    def decide(self, now: Moment) -> Orders | Weights | None:
        self.closes.append(now.books.last.copy())
        return self.rule(now, np.array(self.closes[-60:]))


def events(panel: Panel, rule: Callable[[Moment, np.ndarray], Orders | Weights | None], costs: CostParams = COSTS, params: BacktestParams = PARAMS, **more: object) -> Ledger:
    table = more.pop("actions", None)
    return run(bars_of(panel, lay_actions(panel, table)), panel.symbols, Each(rule), costs, params, **more)


def orders(now: Moment, which: np.ndarray, quantity: np.ndarray, kind: str, **prices: object) -> Orders | None:
    """Orders for the symbols of a mask."""
    at = np.flatnonzero(which & (quantity != 0))
    return Orders([now.symbols[i] for i in at], quantity[at], kind, **{k: v[at] if isinstance(v, np.ndarray) else v for k, v in prices.items()}) if len(at) else None


def free(now: Moment) -> np.ndarray:
    """Symbols that trade, are not held and have no order."""
    busy = np.zeros(len(now.symbols), bool)
    busy[now.working[:, 3].astype(int)] = True
    return ~busy & (now.books.shares == 0) & ~np.isnan(now.bar.prices[3])


def momentum(now: Moment, c: np.ndarray) -> Weights | None:
    if len(c) < 60 or now.number % 20:
        return None
    rank = np.argsort(np.argsort(np.nan_to_num(c[-1] / c[0], nan=-1)))
    return Weights(np.where((rank >= len(rank) - 2) & ~np.isnan(c[-1]), 0.5, 0.0))


def long_short(now: Moment, c: np.ndarray) -> Weights | None:
    if len(c) < 20 or now.number % 5:
        return None
    moved = np.nan_to_num(c[-1] / c[-20] - 1)
    score = np.where(np.isnan(c[-1]), 0, moved - moved.mean())
    return Weights(score / max(np.abs(score).sum(), 1e-9) * 1.5)


def dips(now: Moment, c: np.ndarray) -> Orders | None:
    p = now.bar.prices[3]
    exits = orders(now, (now.books.shares != 0) & ~np.isnan(p) & (len(c) % 7 == 0), -now.books.shares, "market", life=1)
    return exits or orders(now, free(now), 1e5 / p, "limit", limit=p * 0.98, life=3)


def breakout(now: Moment, c: np.ndarray) -> Orders | None:
    p, top = now.bar.prices[3], c.max(axis=0)
    return orders(now, free(now), 1e5 / p, "stop", stop=np.maximum(top, p * 1.001), life=5, stop_loss=p * 0.95)


def trailing(now: Moment, c: np.ndarray) -> Orders | None:
    p, held = now.bar.prices[3], now.books.shares
    guarded = np.isin(np.arange(len(p)), now.working[:, 3].astype(int))
    return orders(now, (held > 0) & ~guarded & ~np.isnan(p), -held, "trailing", trail=0.06) or orders(now, free(now), 1e5 / p, "market", life=1)


def brackets(now: Moment, c: np.ndarray) -> Orders | None:
    p = now.bar.prices[3]
    side = np.where(c[-1] >= c[max(len(c) - 10, 0)], 1.0, -1.0)
    return orders(now, free(now), side * 1e5 / p, "market", life=1, take_profit=p * (1 + 0.04 * side), stop_loss=p * (1 - 0.03 * side))


def stop_limits(now: Moment, c: np.ndarray) -> Orders | None:
    p = now.bar.prices[3]
    return orders(now, free(now), -1e5 / p, "stop_limit", stop=p * 0.99, limit=p * 0.985, life=4, take_profit=p * 0.95, stop_loss=p * 1.02)


def levered(now: Moment, c: np.ndarray) -> Weights | None:
    if len(c) < 30 or now.number % 3:
        return None
    return Weights(np.where(c[-1] > c[-30:].mean(axis=0), 1.0, -1.0) * 0.8)


def cross(panel: Panel, fast: int, slow: int) -> pd.DataFrame:
    close = panel.view("close").ffill()
    return (close.rolling(fast).mean() > close.rolling(slow).mean()).astype(float) / len(panel.symbols)


def turbo(seed: int) -> Ledger:
    """Long an index by way of a product with a financing level at 85 % of it, which ends worthless where the level is touched."""
    index = random_walk(1, 400, seed=seed, ragged=False)
    level = index["close"][0, 0] * 0.85
    hit = int(np.argmax(index["low"][0] <= level)) if (index["low"][0] <= level).any() else len(index)
    alive = np.arange(len(index)) < hit
    fields = {k: np.where(alive, np.maximum(index[k] - level, 1e-9), np.nan) for k in ("open", "high", "low", "close")}
    product = Panel(index.times, ("TURBO",), fields)
    table = pd.DataFrame({"timestamp": product.index[[hit]], "symbol": "TURBO", "kind": "settlement", "value": 0.0}) if hit < len(index) else None
    return events(product, lambda now, c: Weights(np.array([0.1])) if now.number % 10 == 0 else None, actions=table)


def corporate() -> Ledger:
    """Equal parts of prices as traded, with dividends and splits."""
    rng = np.random.default_rng(5)
    rows = [(STEADY.index[t], s, kind, v) for s in STEADY.symbols for t, kind, v in ((int(rng.integers(50, 250)), "split", 2.0), (int(rng.integers(250, 450)), "dividend", 0.8), (120, "dividend", 0.5))]
    actions = lay_actions(STEADY, pd.DataFrame(rows, columns=["timestamp", "symbol", "kind", "value"]))
    return simulate(STEADY, equal_weight(STEADY, "monthly"), BROKER, PARAMS, actions=actions)


FUTURES = {s: Instrument(multiplier=5, lot=1, margin=0.2, futures_style=True, financing_bps_annual=20) for s in STEADY.symbols}
STRATEGIES: dict[str, Callable[[], Ledger]] = {
    "buy and hold": lambda: simulate(RAGGED, hold(RAGGED, RAGGED.symbols[0]), COSTS, PARAMS),
    "equal weight, monthly": lambda: simulate(RAGGED, equal_weight(RAGGED, "monthly"), COSTS, PARAMS),
    "average cross": lambda: simulate(STEADY, cross(STEADY, 10, 40), BROKER, PARAMS),
    "average cross, a bar late": lambda: simulate(STEADY, cross(STEADY, 10, 40), BROKER, PARAMS.model_copy(update={"delay_bars": 1})),
    "momentum": lambda: events(RAGGED, momentum),
    "long and short": lambda: events(RAGGED, long_short, BROKER),
    "dips at a limit": lambda: events(STEADY, dips, BROKER),
    "breakouts at a stop": lambda: events(STEADY, breakout),
    "trailing stops": lambda: events(RAGGED, trailing, BROKER),
    "brackets": lambda: events(STEADY, brackets),
    "stop-limits": lambda: events(STEADY, stop_limits),
    "futures, four times": lambda: events(STEADY, levered, COSTS, PARAMS.model_copy(update={"margin_call": 0.5}), instruments=FUTURES),
    "part of the volume": lambda: events(STEADY, long_short, COSTS.model_copy(update={"participation": 0.002}), PARAMS.model_copy(update={"initial_cash": 1e8})),
    "not knocked out": lambda: turbo(3),
    "knocked out": lambda: turbo(8),
    "dividends and splits": corporate,
}


def statistics(ledger: Ledger) -> dict[str, float | int | str]:
    """Counts, and numbers that JSON keeps to the last digit."""
    e, f, o = ledger.equity, ledger.fills, ledger.orders
    numbers = {"final equity": e["equity"].iloc[-1], "mean return": e["ret"].mean(), "deviation": e["ret"].std(), "drawdown": (e["equity"] / e["equity"].cummax()).min() - 1, "turnover": e["turnover"].sum(),
               "mean gross": e["gross"].mean(), **{k: e[k].sum() for k in ("costs", "borrow", "interest", "financing", "dividends", "delisting")}}
    return {"bars": len(e), "orders": len(o), "fills": len(f), "states": ", ".join(f"{k} {n}" for k, n in sorted(o["status"].value_counts().items()))} | {k: float(v) for k, v in numbers.items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_digit_changes(name: str) -> None:
    assert statistics(STRATEGIES[name]()) == json.loads(STORED.read_text())[name]


if __name__ == "__main__":
    STORED.write_text(json.dumps({name: statistics(play()) for name, play in STRATEGIES.items()}, indent=1) + "\n")
