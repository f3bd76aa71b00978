"""Trades are the account to the cent, a night is told as it was, and a dashboard of little is a page, too."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.display import Markdown
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from screenshots import FLAGS, chromium

from mltrading.backtest.actions import lay_actions
from mltrading.backtest.bars import bars_of
from mltrading.backtest.books import BEST, ENTRY, Books
from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams
from mltrading.backtest.events import Moment, run
from mltrading.backtest.ledger import Ledger
from mltrading.backtest.orders import Orders
from mltrading.core.errors import DataError
from mltrading.core.render import normalise, outside, page
from mltrading.core.style import svg
from mltrading.labels.regimes import REGIMES
from mltrading.market.panel import Panel, from_frame
from mltrading.reports.dashboard import TOLD, Dashboard
from mltrading.reports.summary import EXPERTS, summary
from mltrading.reports.timelines import Lines, Rows, Timeline
from mltrading.reports.trades import trades_of

N = 40
DAYS = pd.bdate_range("2024-01-01", periods=N, tz="UTC", unit="us") + pd.Timedelta(hours=21)
COSTS = CostParams(commission_bps=3, half_spread_bps=5, impact_coefficient=0.1, adv_bars=2, adv_floor_value=1, adv_assumed_value=5e7, vol_floor_daily=0.01, borrow_bps_annual=50, fill="close")
ACCOUNT = BacktestParams(initial_cash=50_000, delay_bars=0, max_gross=5, delist_after_bars=4, delist_haircut=0.3, start="panel")


class Plan:
    """Orders by bar; keeps the books that the account itself has."""

    def __init__(self, plan: dict[int, list[tuple[str, float]]]) -> None:
        self.plan, self.books = plan, cast("Books", None)

    def decide(self, now: Moment) -> Orders | None:
        rows, self.books = self.plan.get(now.number, []), now.books
        return Orders([s for s, _ in rows], [q for _, q in rows], life=1, reason=[f"{'buy' if q > 0 else 'sell'}: because of {now.number}" for _, q in rows]) if rows else None


def prices(seed: int, gone: int = N) -> Panel:
    rng = np.random.default_rng(seed)
    close = {s: 50 * np.exp(np.cumsum(rng.normal(0, 0.02, N))) for s in ("AAA", "BBB", "SPY")}
    return from_frame(pd.DataFrame([(t, s, float(close[s][k])) for k, t in enumerate(DAYS) for s in close if s != "BBB" or k < gone], columns=["timestamp", "symbol", "close"]))


def lived(panel: Panel, way: Plan, actions: list[tuple[int, str, str, float]]) -> Ledger:
    table = pd.DataFrame([(DAYS[k], s, what, v) for k, s, what, v in actions], columns=["timestamp", "symbol", "kind", "value"])
    return run(bars_of(panel, lay_actions(panel, table)), panel.symbols, way, COSTS, ACCOUNT)


def account(panel: Panel, plan: dict[int, list[tuple[str, float]]]) -> Ledger:
    return lived(panel, Plan(plan), [])


orders = st.dictionaries(st.integers(0, N - 3), st.lists(st.tuples(st.sampled_from(["AAA", "BBB"]), st.sampled_from([-60.0, -25.0, -10.0, 10.0, 25.0, 50.0])), min_size=1, max_size=2, unique_by=lambda o: o[0]), max_size=15)
happened = st.lists(st.tuples(st.integers(1, N - 2), st.sampled_from(["AAA", "SPY"]), st.sampled_from(["split", "dividend"]), st.sampled_from([0.5, 1.5, 2.0, 3.0])), max_size=4, unique_by=lambda a: a[:3])


@given(seed=st.integers(0, 99), plan=orders, actions=happened, gone=st.sampled_from([N, N - 10]))
@settings(deadline=None, max_examples=60)
def test_trades_are_the_change_of_the_equity_to_the_cent(seed: int, plan: dict[int, list[tuple[str, float]]], actions: list[tuple[int, str, str, float]], gone: int) -> None:
    panel, way = prices(seed, gone), Plan({k: [o for o in rows if o[0] != "BBB" or k < gone - 2] for k, rows in plan.items()})
    ledger = lived(panel, way, actions)
    found = trades_of(ledger)
    money = ledger.equity
    gross = found.closed["pnl"].sum() + found.held["pnl"].sum() + ledger.fills["commission"].sum()  # realized and unrealized
    change = money["equity"].iloc[-1] - ACCOUNT.initial_cash - money["dividends"].sum() + money[["interest", "borrow", "financing"]].sum().sum()
    assert abs(gross - ledger.fills["commission"].sum() - change) < 0.005
    assert abs(found.sums["start"] - ACCOUNT.initial_cash) < 1e-6
    assert found.fills["pnl"].sum() == pytest.approx(found.closed["pnl"].sum(), abs=1e-9)
    last = ledger.positions[ledger.positions["timestamp"] == money["timestamp"].iloc[-1]].set_index("symbol")
    assert set(found.held["symbol"]) == set(last.index)
    for row in found.held.itertuples():
        assert row.shares == pytest.approx(last.loc[row.symbol, "quantity"], rel=1e-9)
        entry, best = way.books.memory[[ENTRY, BEST], panel.symbols.index(row.symbol)]  # what the engine remembers
        assert row.entry == pytest.approx(entry, rel=1e-9)
        assert row.best == pytest.approx(max(entry, best) if row.shares > 0 else min(entry, best), rel=1e-9)


def test_a_trade_is_what_its_fills_say() -> None:
    ledger = account(prices(1), {0: [("AAA", 30.0)], 5: [("AAA", -10.0)], 9: [("AAA", 10.0)], 12: [("AAA", -30.0)], 20: [("BBB", 5.0)]})
    found = trades_of(ledger)
    own = ledger.fills[ledger.fills["symbol"] == "AAA"]
    assert len(found.closed) == 1
    assert found.closed["pnl"].item() == pytest.approx(-(own["quantity"] * own["fill_price"]).sum() - own["commission"].sum(), abs=1e-9)
    assert (found.closed["bought"].item(), found.closed["sold"].item()) == ("buy: because of 0", "sell: because of 12")
    assert found.win_rate in (0.0, 1.0)


# A night made by hand.
T = DAYS[-1]
LEDGER = account(prices(2), {3: [("AAA", 100.0)], 10: [("BBB", 200.0)], 25: [("AAA", -100.0)], 30: [("AAA", 50.0)]})
MARKET = pd.DataFrame({"models": "calm_uptrend", "regime": "calm_uptrend", "size_modifier": 1.0, "throttle": 1.0, "disagreement": np.linspace(0.0, 0.3, N), "said": ""}, index=DAYS)
EVEN = pd.DataFrame(np.tile([0.6, 0.1, 0.1, 0.1, 0.1], (N, 1)), DAYS, list(REGIMES))
SAYS: dict[str, dict[str, Any]] = {
    "macro_credit": {"slope": 1.1, "widening": -0.4, "score": 0.55, "state": "keep"}, "volatility_complexity": {"vix": 14.0, "vvix": np.nan, "skew": np.nan, "vix_rank": 0.3, "vvix_rank": np.nan, "skew_rank": np.nan, "score": 0.3, "state": "normal"},
    "fragility": {"mean_correlation": 0.4, "first_share": 0.5, "bets": 2.1, "score": 0.41, "cap": 1.0, "state": "diverse"}, "entropy_shift": {"entropy": 1.7, "score": 0.2, "run_bars": 0.0, "cap": 1.0, "state": "stable"}}
SIGNALS = {name: pd.DataFrame([{**row, "reason": ""}] * N, index=DAYS) for name, row in SAYS.items()}
EMPTY = {name: pd.DataFrame({"timestamp": pd.DatetimeIndex([], tz="UTC").as_unit("us"), **{c: pd.Series(dtype="float64" if c in ("dollars", "score", "health", "trend", "strength", "factor", "weight", "price") else "str") for c in columns}}) for name, columns in TOLD.items()}
BOARD = Dashboard(LEDGER, MARKET, {"gru": EVEN, "transformer": EVEN}, SIGNALS, EMPTY, prices(2), "SPY", 252.0)


def told(b: Dashboard) -> str:
    return str(b.summary().data)


def test_no_intents_and_a_quiet_night() -> None:
    text = told(BOARD)
    assert f"for {N} nights in a row" in text
    assert "no trigger has fired on 2 positions" in text
    assert "no fund was a candidate" in text
    assert "changes nothing" in text
    assert "nan" not in text


def test_nothing_held() -> None:
    idle = replace(BOARD, ledger=account(prices(2), {}))
    assert "Nothing is held, so there is nothing to sell." in told(idle)
    assert isinstance(idle.holdings(), Markdown)
    assert isinstance(idle.trade_log(), Markdown)
    assert idle.performance().frame["System"]["Closed trades"] == 0
    assert np.isnan(idle.performance().frame["System"]["Win rate of closed trades"])


def test_panic() -> None:
    market = MARKET.copy()
    market.loc[T, ["regime", "size_modifier", "throttle", "said"]] = ["high_vol_panic", 0.25, 0.5, "override: calm_uptrend → high_vol_panic, size 1.00 → 0.25; stress: throttle 1.00 → 0.50"]
    signals = {**SIGNALS, "volatility_complexity": SIGNALS["volatility_complexity"].assign(vix=45.0, vix_rank=1.0, score=1.0, state="panic")}
    sales = pd.DataFrame({"timestamp": T, "symbol": ["AAA", "BBB"], "side": "sell", "dollars": 100.0, "score": np.nan, "reason": "high_vol_panic: class equity does not stay; -3.0% since 2024-01-05"})
    log = pd.DataFrame({"timestamp": T, "symbol": ["SPY", "SPY"], "step": ["score", "score"], "outcome": "refused", "reason": "class equity does not suit high_vol_panic"})
    text = told(replace(BOARD, market=market, signals=signals, told={**EMPTY, "intents": sales, "log": log}, reserves={"high_vol_panic": 0.4}))
    assert "**high vol panic**, since tonight" in text
    assert "It was calm uptrend before" in text
    assert "panic at a stress of 1.00 (0 to 1): VIX 45.0 (rank 1.00)" in text
    assert "override (calm uptrend → high vol panic, size 1.00 → 0.25)" in text
    assert "12 % of its usual size" in text  # a quarter of a half
    assert "AAA (high_vol_panic: class equity does not stay) and BBB" in text
    assert "of 1 fund looked at, 1 fell to health, class or score" in text
    cash, equity = LEDGER.equity[["cash", "equity"]].iloc[-1]
    assert f"${abs(cash - 0.4 * equity):,.0f} {'above' if cash >= 0.4 * equity else 'below'} the reserve of 40 %" in text


def test_purchases_name_the_layers_that_took_most() -> None:
    buys = pd.DataFrame({"timestamp": T, "symbol": ["SPY"], "side": "buy", "dollars": 1234.0, "score": 0.7, "reason": "score 0.700"})
    sizes = pd.DataFrame({"timestamp": T, "symbol": "SPY", "layer": ["base", "volatility", "regime", "expert", "throttle"], "factor": [0.2, 1.2, 0.7, 0.5, 0.9], "weight": [0.2, 0.24, 0.17, 0.08, 0.08]})
    text = told(replace(BOARD, told={**EMPTY, "intents": buys, "sizes": sizes}))
    assert "SPY for $1,234 (score 0.70); most was taken off by the experts' size modifier (times 0.50) and the regime (times 0.70)." in text


def test_signals_and_networks_that_are_silent() -> None:
    silent = {name: table.assign(**dict.fromkeys(table.select_dtypes("number"), np.nan), state="not available", reason="nobody spoke") for name, table in SIGNALS.items()}
    dark = replace(BOARD, signals=silent, probabilities={"gru": EVEN * np.nan}, market=MARKET.assign(models=None, regime=None, size_modifier=np.nan, throttle=np.nan, disagreement=np.nan, said="no model has probabilities"))
    text = told(dark)
    assert text.count("not available: nobody spoke") == 4
    assert "has no regime" in text
    assert "No network gives probabilities" in text
    assert "nan" not in text
    assert "silent" in dark.networks()._repr_html_()
    for name in EXPERTS:
        assert "nan" not in re.sub(r"<script.*?</script>", "", str(dark.expert(name)._repr_html_()))
    missing = summary(MARKET, {}, {}, EMPTY, LEDGER.equity.iloc[-1], 0, {})
    assert len(missing) == 8


def sections(b: Dashboard) -> list[Any]:
    return [b.summary(), b.performance(), b.equity(), b.monthly(), b.holdings(), b.candidates(), b.regimes(), b.networks(), b.disagreement(), *(b.expert(name) for name in EXPERTS), b.trade_log()]


def written(b: Dashboard) -> str:
    def out(shown: Any) -> Any:
        data = {"image/svg+xml": svg(shown)} if isinstance(shown, Figure) else {"text/markdown": shown.data} if isinstance(shown, Markdown) else {"text/html": shown._repr_html_()}
        return new_code_cell("#| echo: false\nshow()", outputs=[new_output("execute_result", data=data)])
    return page(normalise(new_notebook(cells=[new_markdown_cell("# Board"), *map(out, sections(b))])), {})


@pytest.mark.parametrize("nights", [1, 2, N])
def test_a_dashboard_of_few_nights_is_a_page_that_stands_alone(nights: int) -> None:
    cut = {name: getattr(LEDGER, name) for name in ("orders", "fills", "positions", "equity")}
    last = DAYS[nights - 1]
    ledger = Ledger(*(t[t[c] <= last] for t, c in zip(cut.values(), ("decision_time", "timestamp", "timestamp", "timestamp"), strict=True)))
    html = written(replace(BOARD, ledger=ledger))
    assert outside(html) == []
    assert html.count("<script>") == 1
    assert html == written(replace(BOARD, ledger=ledger))
    shown = re.sub(r"<style>.*?</style>|<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"\bnan\b|NaT|None|inf\b", shown)


def test_the_log_holds_all_fills_and_all_that_was_skipped() -> None:
    skipped = pd.DataFrame({"timestamp": [T], "symbol": "SPY", "side": "buy", "action": "skip", "price": 51.0, "reason": "gap of +7.0% since 47.66; at most 5.0%"})
    log = replace(BOARD, told={**EMPTY, "checks": skipped}).trade_log().frame
    assert log["action"].value_counts().to_dict() == {"bought": 3, "sold": 1, "no buy": 1}
    assert log["reason"].iloc[0].startswith("gap of +7.0%")
    assert log["result"].sum() == pytest.approx(BOARD.trades.closed["pnl"].sum())


def test_stops_stand_below_the_highest_close() -> None:
    frame = replace(BOARD, stops={"AAA": 0.1}).holdings().frame
    close = prices(2).view("close")["AAA"].iloc[30:].max()
    best = max(close, BOARD.trades.held.set_index("symbol").loc["AAA", "entry"])
    assert frame.loc["AAA", "stop"] == pytest.approx(0.9 * best)
    assert np.isnan(frame.loc["BBB", "stop"])


def test_what_cannot_be_shown_is_refused() -> None:
    with pytest.raises(DataError, match="no column reason"):
        replace(BOARD, told={**EMPTY, "log": EMPTY["log"].drop(columns="reason")})
    with pytest.raises(DataError, match="no row for the last night"):
        replace(BOARD, market=MARKET.iloc[:-1])
    with pytest.raises(DataError, match="sum up to"):
        replace(BOARD, ledger=replace(LEDGER, fills=LEDGER.fills.assign(commission=0.0))).performance()


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium")
def test_charts_and_tables_answer() -> None:
    """In a browser: arrows and pointer move the read-out, a click orders a table, a word searches it."""
    lines = Timeline(DAYS, [Lines("n", {"n": np.arange(N) * 1.0}, ["system"], "number:0"), Rows("w", ["a"] * (N - 1) + ["b"], {"a": "index", "b": "down"})], "T")
    cells = [new_markdown_cell("# Board"), *(new_code_cell("x", outputs=[new_output("execute_result", data={"text/html": s._repr_html_()})]) for s in (lines, BOARD.trade_log()))]
    ask = """<script>
    const chart = document.querySelector(".timeline"), read = () => chart.querySelector(".reading").textContent, out = {rest: read()};
    chart.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})); out.left = read();
    chart.dispatchEvent(new KeyboardEvent("keydown", {key: "Home"})); out.home = read();
    const box = chart.querySelector(".lanes").getBoundingClientRect();
    chart.querySelector(".lanes").dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2 + 1})); out.middle = read();
    chart.querySelector(".lanes").dispatchEvent(new PointerEvent("pointerleave")); out.after = read();
    const table = document.querySelector("table.sortable"), column = k => [...table.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[k].textContent);
    table.tHead.rows[0].cells[3].click(); out.down = column(3);
    table.tHead.rows[0].cells[3].click(); out.up = column(3);
    const search = document.querySelector(".search input"); search.value = "bbb"; search.dispatchEvent(new Event("input")); out.found = column(2);
    document.body.innerHTML = `<pre id="out">${JSON.stringify(out)}</pre>`;
    </script>"""
    html = page(normalise(new_notebook(cells=cells)), {}).replace("</body>", ask + "</body>")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(html, encoding="utf-8")
        dom = subprocess.run([str(chromium()), *FLAGS, f"--user-data-dir={folder}/profile", "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120, check=False).stdout
    got = json.loads(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1])  # type: ignore[index]
    assert got["rest"] == got["after"] == f"{DAYS[-1]:%Y-%m-%d}n {N - 1}w b"
    assert got["left"] == f"{DAYS[-2]:%Y-%m-%d}n {N - 2}w a"
    assert got["home"] == f"{DAYS[0]:%Y-%m-%d}n 0w a"
    assert got["middle"] == f"{DAYS[N // 2]:%Y-%m-%d}n {N // 2}w a"
    assert got["up"] == got["down"][::-1] or sorted(map(float, got["up"])) == [float(v) for v in got["up"]]
    assert [float(v) for v in got["down"]] == sorted(map(float, got["down"]), reverse=True)
    assert got["found"] == ["BBB"]
