"""A sweep of moving-average crosses, signals and Sharpe ratios included, beside the same sweep in pandas and, where it is installed, in vectorbt.

Work: 100 symbols x 2,520 days x 20 configurations (fast 5..24, slow 30..68), long while the fast mean is above the slow one, decided at the close,
filled at the next close, 5 basis points of commission. Ours keeps one account over all symbols, with weights of 1 / N, through the engine that also
writes ledgers; pandas multiplies positions by returns; vectorbt keeps one account per symbol.
"""

from __future__ import annotations

import importlib.util
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from numba import njit

from mltrading.backtest.costs import CostParams
from mltrading.backtest.engine import BacktestParams, Tape, equity_curve, lay_tape
from mltrading.market.simulate import random_walk

SYMBOLS, BARS, CONFIGS = 100, 2520, [(5 + i, 30 + 2 * i) for i in range(20)]
COSTS = CostParams(commission_bps=5, half_spread_bps=0, impact_coefficient=0, adv_bars=20, adv_floor_value=1e4, adv_assumed_value=1e7, vol_floor_daily=0.005,
                   borrow_bps_annual=0, fill="close")
PARAMS = BacktestParams(initial_cash=1e6, delay_bars=0, max_gross=1.0, delist_after_bars=5, delist_haircut=0, start="panel")


@njit(cache=True, nogil=True)
def cross_targets(close: np.ndarray, fast: int, slow: int) -> np.ndarray:
    """(T, N) weights of 1 / N where the mean of the last `fast` closes is above that of the last `slow`."""
    bars, n = close.shape
    out, quick, calm = np.zeros((bars, n)), np.zeros(n), np.zeros(n)
    for t in range(bars):
        for i in range(n):
            quick[i] += close[t, i] - (close[t - fast, i] if t >= fast else 0.0)
            calm[i] += close[t, i] - (close[t - slow, i] if t >= slow else 0.0)
            if t >= slow - 1 and quick[i] * slow > calm[i] * fast:
                out[t, i] = 1.0 / n
    return out


@njit(cache=True, nogil=True)
def sharpe(equity: np.ndarray) -> float:
    """Annualized Sharpe ratio of an equity curve of days, without a risk-free rate."""
    returns = equity[1:] / equity[:-1] - 1.0
    return returns.mean() / returns.std() * np.sqrt(252.0)


def ours(tape: Tape, threads: int) -> np.ndarray:
    def one(config: tuple[int, int]) -> float:
        return sharpe(equity_curve(tape, cross_targets(tape.close, *config), COSTS, PARAMS))
    with ThreadPoolExecutor(threads) as pool:
        return np.array(list(pool.map(one, CONFIGS)))


def in_pandas(close: pd.DataFrame) -> np.ndarray:
    returns, out = close.pct_change().fillna(0.0), []
    for fast, slow in CONFIGS:
        wanted = (close.rolling(fast).mean() > close.rolling(slow).mean()).astype(float) / close.shape[1]
        held = wanted.shift(1).fillna(0.0)
        daily = (held.shift(1).fillna(0.0) * returns - held.diff().abs().fillna(0.0) * 5e-4).sum(axis=1)
        equity = (1 + daily).cumprod()
        out.append(sharpe(equity.to_numpy()))
    return np.array(out)


def in_vectorbt(close: pd.DataFrame) -> np.ndarray:
    import vectorbt
    k = len(CONFIGS)
    fast = vectorbt.MA.run(close, [f for f, _ in CONFIGS]).ma.to_numpy()
    slow = vectorbt.MA.run(close, [s for _, s in CONFIGS]).ma.to_numpy()
    late = np.vstack([np.zeros((1, fast.shape[1]), bool), (fast > slow)[:-1]])
    prices = pd.DataFrame(np.tile(close.to_numpy(), (1, k)), index=close.index)
    entries = pd.DataFrame(late, index=close.index)
    account = vectorbt.Portfolio.from_signals(prices, entries, ~entries, fees=5e-4, freq="1D")
    return account.sharpe_ratio().to_numpy().reshape(k, -1).mean(axis=1)


def timed(work: Callable[[], np.ndarray], repeats: int) -> tuple[float, np.ndarray]:
    """Best time of several, after one run to warm up, and the result."""
    result, best = work(), np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> None:
    warnings.filterwarnings("ignore")
    panel = random_walk(SYMBOLS, BARS, seed=0, ragged=False)
    close = panel.view("close")
    cores = os.cpu_count() or 1
    rows: list[tuple[str, float, np.ndarray]] = []
    rows.append(("pandas", *timed(lambda: in_pandas(close), 2)))
    if importlib.util.find_spec("vectorbt"):
        rows.append(("vectorbt", *timed(lambda: in_vectorbt(close), 2)))
    rows.append(("mltrading, tape laid each time", *timed(lambda: ours(lay_tape(panel, COSTS), 1), 5)))
    tape = lay_tape(panel, COSTS)
    for threads in sorted({1, cores}):
        rows.append((f"mltrading, {threads} thread{'s' * (threads > 1)}", *timed(lambda threads=threads: ours(tape, threads), 5)))
    units, peer = SYMBOLS * BARS * len(CONFIGS) / 1e6, rows[0]
    table = pd.DataFrame([{"engine": name, "seconds": seconds, "M bars/s": units / seconds, "mean Sharpe": result.mean(),
                           "correlation with pandas": np.corrcoef(result, peer[2])[0, 1], "ratio to pandas": peer[1] / seconds} for name, seconds, result in rows])
    print(f"SMA cross, {SYMBOLS} symbols x {BARS} days x {len(CONFIGS)} configurations = {units:.2f} M bars, {cores} cores")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.3f}"))


if __name__ == "__main__":
    main()
