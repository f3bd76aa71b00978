"""The leak benchmark: a sample of its pairs here, all of them in the slow test, and what the command makes of a result."""

import re
from typing import Literal

import numpy as np
import pandas as pd
import pytest

from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams, simulate
from mltrading.cli import main
from mltrading.market.panel import Panel
from mltrading.market.simulate import random_walk
from mltrading.validation import leaks, leaks_accounts
from mltrading.validation.leaks import CHECKS, Pair, audit_pipeline, benchmark
from mltrading.validation.leaks_accounts import PAIRS
from mltrading.validation.leaks_pairs import market, releases

FEW = ("survivors only", "weeks stamped at their start", "macro as restated", "scaler across folds", "labels overlap the test window", "purged by rows", "folds shuffled across time",
       "weights not shifted", "filled at the close that decides", "filled while halted", "profit from the decision on", "stop filled at its level through a gap", "largest fill from the days volume", "tomorrow in one month")


def score(leak: bool, panel: Panel) -> dict[str, pd.DataFrame]:
    table = panel.view("close").pct_change(fill_method=None).shift(-1 if leak else 1).rename_axis("timestamp").melt(ignore_index=False, var_name="symbol", value_name="score").reset_index()
    return {"forecasts": table.dropna()}


def test_the_benchmark_is_large_and_says_how_each_mistake_happens() -> None:
    leaks = [p for p in PAIRS.values() if not p.only_clean]
    assert len(leaks) >= 40
    assert {p.stage for p in leaks} == {"universe", "data", "features", "labels", "fit", "execution", "size", "subtle", "beyond"}
    assert all(len(p.how) > 30 and "\n" not in p.how for p in PAIRS.values())
    assert sum(bool(p.beyond) for p in leaks) <= 0.05 * len(leaks)


@pytest.mark.slow
def test_a_sample_of_the_pairs() -> None:
    table = benchmark({n: PAIRS[n] for n in FEW}, market(), releases(), cuts=8)
    assert table.loc[~table["caught"], "pair"].tolist() == []
    assert table.loc[table["accused"], "accusation"].tolist() == []
    assert set(table["check"]) == set(CHECKS)
    assert all(" at " in found and "→" in found for found in table["found"])


def only(monkeypatch: pytest.MonkeyPatch, *pairs: Pair) -> None:
    monkeypatch.setattr(leaks_accounts, "PAIRS", {p.name: p for p in pairs})


def test_the_command_passes_where_all_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, Pair("tomorrow", "features", "", score), Pair("hopeless", "beyond", "", lambda leak, p: score(False, p), beyond="a constant"))
    assert main(["leaks"]) == 0
    said = capsys.readouterr()
    assert "caught: future" in said.out
    assert "MISSED (known)" in said.out
    assert "detection: 1 of 2 = 50.0% (95 % interval 1.3% to 98.7%)" in said.out
    assert "false alarms: 0 of 2 = 0.0% (95 % interval 0.0% to 84.2%)" in said.out


def test_the_command_fails_on_a_missed_leak(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, Pair("unseen", "features", "", lambda leak, p: score(False, p)))
    assert main(["leaks"]) == 1
    said = capsys.readouterr()
    assert re.search(r"unseen +MISSED +twin passed", said.out)
    assert "detection: 0 of 1 = 0.0%" in said.out
    assert "error: leaks: missed: unseen" in said.err


def test_the_command_fails_on_an_accused_twin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, Pair("guilty", "features", "", lambda leak, p: score(True, p)))
    assert main(["leaks"]) == 1
    said = capsys.readouterr()
    assert "TWIN ACCUSED: `score`" in said.out
    assert "false alarms: 1 of 1 = 100.0%" in said.out
    assert "accused without a leak: guilty" in said.err


@pytest.mark.parametrize("fill", ["open", "close"])
def test_the_ledger_of_the_engine_passes_as_it_is(fill: Literal["open", "close"]) -> None:
    costs = CostParams(commission_bps=3, half_spread_bps=5, impact_coefficient=0.5, adv_bars=3, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.01, borrow_bps_annual=100, fill=fill)
    params = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=3, delist_after_bars=3, delist_haircut=0.4, start="panel")

    def pipeline(p: Panel) -> dict[str, pd.DataFrame]:
        weights = np.sign(p.view("close").ffill().pct_change(5).fillna(0.0)) / len(p.symbols)
        ledger = simulate(p, weights, costs, params)
        return {"orders": ledger.orders, "fills": ledger.fills, "equity": ledger.equity}
    assert audit_pipeline(pipeline, random_walk(3, 120, seed=2, ragged=False), fill=fill, cuts=4) == []


@pytest.mark.parametrize("when", ["halted", "off the axis", "another symbol"])
@pytest.mark.parametrize("stop", [None, 1.0])
def test_a_fill_without_a_bar_is_refused(when: str, stop: float | None) -> None:
    p = random_walk(3, 60, seed=2, ragged=False)
    there = ~((np.arange(3) == 0)[:, None] & (np.arange(60) == 30))
    halted = Panel(p.times, p.symbols, {f: np.where(there, x, np.nan) for f, x in p.fields.items()})
    bar = {"halted": p.index[30], "off the axis": p.index[29] + pd.Timedelta(hours=1), "another symbol": p.index[31]}[when]
    symbol = "NOBODY" if when == "another symbol" else p.symbols[0]

    def pipeline(panel: Panel, bar: pd.Timestamp = bar, symbol: str = symbol) -> dict[str, pd.DataFrame]:
        order = pd.DataFrame({"decision_time": [p.index[28]], "fill_time": [bar], "symbol": [symbol], "quantity": [1.0], "stop": [np.nan if stop is None else stop]})
        return {"orders": order, "fills": pd.DataFrame({"timestamp": [bar], "symbol": [symbol], "quantity": [1.0], "fill_price": [1e6]})}

    found = list(leaks._price_faults(pipeline(halted), halted, "open"))
    assert len(found) == 1
    assert f"fill of {symbol} at {bar}" in found[0]
    assert "a bar which the symbol does not have" in found[0]
    assert list(leaks._price_faults(pipeline(halted, p.index[29], p.symbols[0]), halted, "open")) == []
