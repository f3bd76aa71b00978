"""Backtests beside their peers, measured in one run. `make bench NAME=backtest`.

Sweep: moving-average crosses on 100 symbols x 2,520 days x 20 configurations (fast 5..24, slow 30, 32 .. 68), one account per symbol and configuration, decided at
the close, filled at the next close, 5 basis points of commission; signals, accounts and metrics included. The peers vectorbt and backtesting.py are no part of this
project. Where they are installed, in this environment or in a folder that PEERS names (`pip install --target FOLDER vectorbt backtesting`), a second
interpreter runs them on the same prices; backtesting.py, which runs one symbol at a time, on one symbol and five configurations.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

SYMBOLS, BARS, CONFIGS = 100, 2520, [(5 + i, 30 + 2 * i) for i in range(20)]


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Shortest of a few runs, after one to warm up, and the result."""
    result, best = work(), np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def in_pandas(close: pd.DataFrame) -> np.ndarray:
    """(N, K) Sharpe ratios of positions times returns, as one would write it down."""
    returns, out = close.pct_change().fillna(0.0), []
    for fast, slow in CONFIGS:
        held = (close.rolling(fast).mean() > close.rolling(slow).mean()).astype(float).shift(1).fillna(0.0)
        daily = held.shift(1).fillna(0.0) * returns - held.diff().abs().fillna(0.0) * 5e-4
        out.append((daily.mean() / daily.std() * np.sqrt(252)).to_numpy())
    return np.array(out).T


def in_vectorbt(close: pd.DataFrame) -> tuple[float, np.ndarray]:
    """Seconds and (N, K) Sharpe ratios."""
    import vectorbt

    def work() -> np.ndarray:
        k = len(CONFIGS)
        fast, slow = (vectorbt.MA.run(close, list(windows)).ma.to_numpy() for windows in zip(*CONFIGS, strict=True))
        entries = pd.DataFrame(np.vstack([np.zeros((1, fast.shape[1]), bool), (fast > slow)[:-1]]), index=close.index)
        prices = pd.DataFrame(np.tile(close.to_numpy(), (1, k)), index=close.index)
        account = vectorbt.Portfolio.from_signals(prices, entries, ~entries, fees=5e-4, freq="1D")
        account.total_return(), account.max_drawdown()
        return account.sharpe_ratio(year_freq="252D").to_numpy().reshape(k, -1).T
    return timed(work, 2)


def in_backtesting(close: pd.DataFrame) -> tuple[float, np.ndarray]:
    """Seconds for one symbol and five configurations, and their Sharpe ratios."""
    import contextlib
    import io

    from backtesting import Backtest, Strategy
    from backtesting.lib import crossover

    class Cross(Strategy):
        fast, slow = CONFIGS[0]

        def init(self) -> None:
            prices = pd.Series(self.data.Close)
            self.quick, self.calm = self.I(lambda: prices.rolling(self.fast).mean()), self.I(lambda: prices.rolling(self.slow).mean())

        def next(self) -> None:
            if crossover(self.quick, self.calm):
                self.buy()
            elif crossover(self.calm, self.quick):
                self.position.close()
    bars = pd.DataFrame(dict.fromkeys(("Open", "High", "Low", "Close"), close.iloc[:, 0])).assign(Volume=1e6)
    test = Backtest(bars, Cross, cash=1e6, commission=5e-4, finalize_trades=True)

    def work() -> np.ndarray:
        with contextlib.redirect_stderr(io.StringIO()):
            return np.array([[test.run(fast=f, slow=s)["Sharpe Ratio"] for f, s in CONFIGS[:5]]])
    return timed(work, 1)


PEERS = {"vectorbt": in_vectorbt, "backtesting": in_backtesting}


def peer(name: str, close: pd.DataFrame) -> tuple[float, np.ndarray] | None:
    """A peer in an interpreter of its own, None where it is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        close.to_pickle(Path(folder) / "close.pickle")
        paths = os.pathsep.join(p for p in (os.environ.get("PEERS"), os.environ.get("PYTHONPATH")) if p)
        done = subprocess.run([sys.executable, __file__, name, folder], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False)
        if done.returncode:
            if "ModuleNotFoundError" not in done.stderr:
                print(done.stderr, file=sys.stderr)
            return None
        return float((Path(folder) / "seconds").read_text()), np.load(Path(folder) / "result.npy")


def as_peer(name: str, folder: str) -> None:
    """What the other interpreter does."""
    warnings.filterwarnings("ignore")
    seconds, result = PEERS[name](pd.read_pickle(Path(folder) / "close.pickle"))
    (Path(folder) / "seconds").write_text(repr(seconds))
    np.save(Path(folder) / "result.npy", result)


def sweeps(cores: int) -> None:
    """Ours and the peers."""
    from mltrading.backtest.costs import CostParams
    from mltrading.backtest.engine import BacktestParams
    from mltrading.backtest.rules import SMA_CROSS
    from mltrading.backtest.sweep import sweep_rule
    from mltrading.market.simulate import random_walk

    costs = CostParams(commission_bps=5, half_spread_bps=0, impact_coefficient=0, adv_bars=20, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.005, borrow_bps_annual=0, fill="close")
    params = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=1.0, delist_after_bars=5, delist_haircut=0, start="panel")
    panel, configs = random_walk(SYMBOLS, BARS, seed=0, ragged=False), pd.DataFrame(CONFIGS, columns=["fast", "slow"])
    close = panel.view("close")

    def ours(threads: int) -> np.ndarray:
        found = sweep_rule(panel, SMA_CROSS, configs, costs, params, threads=threads)
        return found.table["sharpe_annual"].to_numpy().reshape(len(CONFIGS), -1).T
    million = SYMBOLS * BARS * len(CONFIGS) / 1e6
    rows: list[tuple[str, float, tuple[float, np.ndarray] | None]] = [(f"mltrading, {n} thread{'s' * (n > 1)}", million, timed(lambda n=n: ours(n), 20)) for n in sorted({1, cores})]
    rows += [("pandas, positions times returns", million, timed(lambda: in_pandas(close), 1)), ("vectorbt", million, peer("vectorbt", close)),
             ("backtesting.py", BARS * 5 / 1e6, peer("backtesting", close))]
    fastest, reference = million / min(r[2][0] for r in rows[:2] if r[2]), rows[0][2][1]
    print(f"sweep: SMA cross, {SYMBOLS} symbols x {BARS} days x {len(CONFIGS)} configurations, {cores} cores")
    print(f"{'engine':<34} {'M bars':>8} {'seconds':>9} {'M bars/s':>10} {'ours is':>9}  Sharpe ratios against ours: mean difference, correlation")
    for name, work, measured in rows:
        if measured is None:
            print(f"{name:<34} not measured: it is not installed")
            continue
        seconds, sharpe = measured
        mine = reference[:sharpe.shape[0], :sharpe.shape[1]]
        print(f"{name:<34} {work:>8.3f} {seconds:>9.4f} {work / seconds:>10.3f} {fastest / (work / seconds):>8.1f}x  {(sharpe - mine).mean():>+.4f}, {np.corrcoef(sharpe.ravel(), mine.ravel())[0, 1]:.4f}")


def events() -> None:
    """The event engine: target weights once a week, limit orders every day, and its memory over ten times the bars."""
    from mltrading.backtest.actions import lay_actions
    from mltrading.backtest.bars import Bar, bars_of
    from mltrading.backtest.costs import CostParams
    from mltrading.backtest.engine import BacktestParams
    from mltrading.backtest.events import Moment, Weights, run
    from mltrading.backtest.orders import Orders
    from mltrading.market.simulate import random_walk

    costs = CostParams(commission_bps=1, half_spread_bps=2, impact_coefficient=1, adv_bars=20, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.005, borrow_bps_annual=50, fill="open",
                       participation=0.1)
    params = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=2, delist_after_bars=5, delist_haircut=0.3, start="panel")
    panel = random_walk(SYMBOLS, BARS, seed=1, ragged=False)
    actions = lay_actions(panel)

    class Weekly:
        def decide(self, now: Moment) -> Weights | None:
            return Weights(np.full(SYMBOLS, 1 / SYMBOLS)) if now.number % 5 == 0 else None

    class Limits:
        def decide(self, now: Moment) -> Orders:
            which = np.arange(5) + now.number % 20 * 5
            price, side = now.bar.prices[3][which], np.where(now.books.shares[which] > 0, -1, 1)
            return Orders([now.symbols[n] for n in which], side * 4e3 / price, "limit", limit=price * (1 - 0.005 * side), life=5)

    class Watched(Limits):
        resident: ClassVar[list[float]] = []

        def decide(self, now: Moment) -> Orders:
            if (now.number + 1) % BARS == 0:
                self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
            return super().decide(now)

    def again(times: int) -> Iterator[Bar]:
        for i in range(times):
            for bar in bars_of(panel, actions):
                yield bar._replace(time=bar.time + np.timedelta64(i * 4000, "D"))
    print(f"\nevent engine, {SYMBOLS} symbols x {BARS} days, one process")
    for name, strategy in (("target weights once a week", Weekly()), ("five limit orders a day, life 5", Limits())):
        seconds, _ = timed(lambda strategy=strategy: run(bars_of(panel, actions), panel.symbols, strategy, costs, params), 2)
        print(f"{name:<34} {SYMBOLS * BARS / seconds:>12,.0f} bar-symbols/s")
    with tempfile.TemporaryDirectory() as folder:
        run(again(10), panel.symbols, Watched(), costs, params, folder=folder)
    print(f"memory after 1x and 10x the bars   {Watched.resident[0]:,.0f} MB, {Watched.resident[-1]:,.0f} MB")


def knockouts(cores: int) -> None:
    """Values and probabilities of knock-out products."""
    from mltrading.backtest.knockout_values import knockout_probability, knockout_value

    rng, n = np.random.default_rng(0), 1_000_000
    side, spot = rng.choice([-1.0, 1.0], n), rng.uniform(80, 120, n)
    strike = spot * (1 - side * rng.uniform(0.02, 0.4, n))
    barrier = strike + side * rng.uniform(0, 0.5, n) * np.abs(spot - strike)
    years, vol = rng.uniform(0.01, 2, n), rng.uniform(0.1, 0.6, n)
    print(f"\nknock-out products, {n:,} at a time, {cores} cores")
    for name, work in (("value, closed form", lambda: knockout_value(side, spot, strike, barrier, years, vol, 0.03, 0.01, 0.02, threads=cores)),
                       ("probability of a knock-out", lambda: knockout_probability(side, spot, barrier, years, vol, 0.02, 0.02, threads=cores))):
        seconds, _ = timed(work, 5)
        print(f"{name:<34} {n / seconds / 1e6:>8.1f} M values/s")


def main() -> None:
    warnings.filterwarnings("ignore")
    cores = len(os.sched_getaffinity(0))
    sweeps(cores)
    events()
    knockouts(cores)


if __name__ == "__main__":
    as_peer(*sys.argv[1:]) if len(sys.argv) > 1 else main()
