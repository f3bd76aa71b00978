"""Nights and mornings of the system `regime`: how many a second, with models that are fitted already. `make bench NAME=regime`.

The embedded funds, closes of 2008 to 2016, with the system's own parameters. No network is trained: two tables of transitions stand for the networks and a trend for the autoencoder, which for this measure is what forecasts from a file are. A replay lays out
what is said of all nights, fuses, decides and trades them. Beside it, on the same bars and desk: an event engine whose strategy is asked at every close and every morning and does nothing, which is the floor. Then evenings and mornings of an operator whose account is
opened and put away each time, once with what is said taken from the whole history, and once worked out anew from a history that ends that evening, as somebody lives it. To reach: 50 days a second for the replay.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mltrading.backtest.actions import lay_actions
from mltrading.backtest.bars import bars_of
from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams
from mltrading.backtest.events import Moment, Opening, run
from mltrading.core.params import block, read_params
from mltrading.features.state import ContextParams, context
from mltrading.labels.regimes import RegimeParams, label_regimes
from mltrading.market import embedded
from mltrading.market.panel import Panel, from_frame, select, until
from mltrading.systems.regime.mornings import Operator, replay_phases
from mltrading.systems.regime.nights import Opinions, TwoPhaseParams, market_view, opinions, signals
from mltrading.systems.regimes import stay_regimes

LEARNED, EVENINGS = pd.Timestamp("2010-12-31 21:00", tz="UTC"), 60


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Shortest of a few runs, after one to warm up, and the result."""
    result, best = work(), np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


class Idle:
    """Is asked at night and in the morning, and does nothing."""

    def decide(self, now: Moment) -> None:
        return None

    def open(self, now: Opening) -> None:
        return None


class Bench:
    """Funds, parameters, and what is said up to an instant."""

    def __init__(self) -> None:
        blocks = read_params()["systems"]["regime"]
        self.params, self.costs, self.account = block(TwoPhaseParams, blocks["policy"], "policy"), block(CostParams, blocks["costs"], "costs"), block(BacktestParams, blocks["backtest"], "backtest")
        self.state, self.names = block(ContextParams, blocks["features"]["context"], "context"), block(RegimeParams, blocks["labels"]["regimes"], "regimes")
        self.panel, self.macro = from_frame(next(s for s in embedded.sets() if s.name == "etf_daily").bars), embedded.macro()
        rule = label_regimes(context(self.panel, self.macro, self.state), self.names)
        self.voices = {"long": stay_regimes(rule, LEARNED, 5)[LEARNED:], "short": stay_regimes(rule["2010":], LEARNED, 5)[LEARNED:]}
        trend = self.panel.view("close") / self.panel.view("close").rolling(100).mean() - 1
        health = trend.melt(ignore_index=False, var_name="symbol", value_name="health").dropna().rename_axis("timestamp").reset_index()
        self.health = health.assign(fold=0, vol_low=0.2, vol_medium=0.5, vol_high=0.3, behaviour_momentum=0.5, behaviour_reversion=0.2, behaviour_mixed=0.3)

    def said(self, now: pd.Timestamp) -> Opinions:
        """What was said by an instant, from prices, releases and forecasts up to it: state, regimes, signals, fusion, facts."""
        panel, macro = until(self.panel, now), self.macro[self.macro["timestamp"] <= now]
        rule = label_regimes(context(panel, macro, self.state), self.names)
        view = market_view({name: table[:now] for name, table in self.voices.items()}, signals(panel, macro, self.params.experts), rule, self.params.fusion)
        return opinions(panel, self.health[self.health["timestamp"] <= now], view, self.params)


def operated(bench: Bench, funds: Panel, first: int, said: Callable[[int], Opinions]) -> float:
    """Seconds for an evening and the morning after it, the account opened and put away for each."""
    bars, one = list(bars_of(funds, lay_actions(funds))), np.ones(len(funds.symbols))
    with tempfile.TemporaryDirectory() as folder:
        operator = Operator(Path(folder), bench.params, bench.costs, bench.account, funds.symbols)
        operator.begin(bars[:first])
        start = time.perf_counter()
        for t in range(first, first + EVENINGS):
            tonight = said(t)
            operator.evening(bars[t], tonight)
            operator.morning(pd.Timestamp(bars[t + 1].time, tz="UTC"), bars[t + 1].prices[3], one, tonight)
        return (time.perf_counter() - start) / EVENINGS


def main() -> None:
    bench = Bench()
    end = bench.panel.index[-1]
    laid, said = timed(lambda: bench.said(end), 2)
    funds, nights = select(bench.panel, {*said.symbols}), len(said.times) - said.begin
    rows = [("opinions of all nights laid out", laid / nights)]
    replayed, (ledger, _) = timed(lambda: replay_phases(funds, said, bench.params, bench.costs, bench.account), 2)
    rows += [("replay, all that is said kept", replayed / nights), ("opinions and replay together", (laid + replayed) / nights)]
    rows.append(("replay, the ledger alone", timed(lambda: replay_phases(funds, said, bench.params, bench.costs, bench.account, full=False), 2)[0] / nights))
    actions, account = lay_actions(funds), bench.account.model_copy(update={"start": "panel"})
    rows.append(("event engine, idle strategy", timed(lambda: run(bars_of(funds, actions), funds.symbols, Idle(), bench.costs, account), 3)[0] / len(funds)))
    first = said.begin + 250
    rows.append((f"operator, {EVENINGS} evenings and mornings", operated(bench, funds, first, lambda t: said.between(0, t))))
    rows.append(("the same, all worked out anew", operated(bench, funds, first, lambda t: bench.said(funds.index[t]))))
    print(f"{len(funds.symbols)} funds, {nights} nights, {len(ledger.fills)} fills, one process; the event engine is asked at {len(funds)} bars")
    print(f"{'work':<44} {'ms per day':>11} {'days per s':>11}")
    for name, seconds in rows:
        print(f"{name:<44} {1e3 * seconds:>11.3f} {1 / seconds:>11,.0f}")


if __name__ == "__main__":
    main()
