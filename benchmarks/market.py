"""Reading, validating and pivoting bars; resampling; the memory it takes. Ratios to plain pandas on the same file in the same run.

    python benchmarks/market.py [--symbols 500] [--days 2000]

The peer reads the file with pandas, checks the same rules and pivots each field; for resampling it is pandas' own resample, which knows no sessions.
With MLTRADING_DATA the real panels of that folder are read too. Compilation is not timed. Memory is the growth of a fresh process's peak, which Linux tells.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from mltrading.core.storage import write_parquet
from mltrading.market.grid import resample
from mltrading.market.panel import PRICES, Panel, read_panel, to_frame
from mltrading.market.quality import examine
from mltrading.market.simulate import bridge_intraday, random_walk, regime_market


def best(work: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the fastest of some rounds, after one that compiles."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def by_pandas(path: Path) -> dict[str, pd.DataFrame]:
    """The peer: read, check the same rules, pivot each field."""
    frame = pd.read_parquet(path)
    fields = [c for c in (*PRICES, "volume") if c in frame]
    assert not frame.duplicated(["timestamp", "symbol"]).any()
    assert frame["timestamp"].is_monotonic_increasing
    assert np.isfinite(frame[fields].to_numpy()).all()
    assert (frame[[c for c in PRICES if c in frame]] > 0).all().all()
    return {f: frame.pivot(index="timestamp", columns="symbol", values=f) for f in fields}


def peak_mb(path: Path) -> float:
    """Most memory that reading a panel adds to a process that has imported everything, MB."""
    code = ("import sys\nfrom mltrading.market.panel import read_panel\n"
            "def peak():\n    return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
            "read_panel(sys.argv[1])\nbefore = peak()\nread_panel(sys.argv[2])\nprint((peak() - before) / 1024)")
    tiny = path.with_name("tiny.parquet")
    write_parquet(to_frame(random_walk(3, 50)), tiny)
    return float(subprocess.run([sys.executable, "-c", code, str(tiny), str(path)], capture_output=True, text=True, check=True).stdout)


def clean(frame: pd.DataFrame) -> pd.DataFrame:
    """Real bars as the panel's door wants them."""
    if frame["timestamp"].dt.tz is None:
        frame = frame.assign(timestamp=frame["timestamp"].dt.tz_localize("UTC") + pd.Timedelta(hours=21))
    frame = frame[[c for c in ("timestamp", "symbol", *PRICES, "volume") if c in frame]].astype({c: float for c in (*PRICES, "volume") if c in frame})
    return frame[(frame[list(PRICES)] > 0).all(axis=1)].sort_values(["timestamp", "symbol"], ignore_index=True)


def report(name: str, path: Path) -> None:
    """One line: rows, seconds per million rows, the peer's time over ours, memory over the arrays."""
    panel = read_panel(path)
    rows = int(panel.alive.sum())
    arrays = sum(b.nbytes for b in panel.fields.values()) / 2**20
    ours, theirs = best(lambda: read_panel(path)), best(lambda: by_pandas(path), 1)
    print(f"{name:34s} {rows:>9,} rows  {ours / rows * 1e6:6.3f} s per million  {theirs / ours:5.1f} × pandas  memory {peak_mb(path) / arrays:4.2f} × the arrays ({arrays:,.0f} MB)")


def real(folder: Path, work: Path) -> None:
    """The panels of the folder in MLTRADING_DATA."""
    for name, file in (("504 stocks, daily", "sp500_daily"), ("220 funds, daily", "etf230_daily"), ("28 stocks, 5 minutes", "us_stocks_5m")):
        write_parquet(clean(pd.read_parquet(folder / "bars" / f"{file}.parquet")), work / f"{file}.parquet")
        report(name, work / f"{file}.parquet")


def rules(panel: Panel) -> None:
    """The quality rules over a table of daily bars."""
    frame = to_frame(panel)
    took = best(lambda: examine(frame, "1d", "24/5", {}), 1)
    print(f"{'all quality rules':34s} {len(frame):>9,} rows  {took / len(frame) * 1e6:6.3f} s per million")


def minutes(n_symbols: int, n_days: int) -> None:
    """Resampling minutes to five minutes, hours and days; the peer is pandas' own resample."""
    daily, _ = regime_market(n_symbols, n_days, seed=1)
    panel = bridge_intraday(daily, "1m", "XNYS", seed=1)
    rows = int(panel.alive.sum())
    frames = [panel.view(f) for f in ("open", "high", "low", "close", "volume")]
    how = ("first", "max", "min", "last", "sum")
    for frequency, rule in (("5m", "5min"), ("1h", "1h"), ("1d", "1D")):
        ours = best(lambda f=frequency: resample(panel, "1m", f, "XNYS"))
        theirs = best(lambda r=rule: [getattr(x.resample(r, closed="right", label="right"), h)() for x, h in zip(frames, how, strict=True)], 1)
        print(f"{'1 minute to ' + frequency:34s} {rows:>9,} rows  {rows / ours / 1e6:6.1f} M bars/s      {theirs / ours:5.1f} × pandas")


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--symbols", type=int, default=500)
    given.add_argument("--days", type=int, default=2000)
    args = given.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, panel = Path(folder), random_walk(args.symbols, args.days, seed=1, ragged=False)
        write_parquet(to_frame(panel), work / "walk.parquet")
        report("simulated, daily", work / "walk.parquet")
        if data := os.environ.get("MLTRADING_DATA"):
            real(Path(data), work)
        rules(panel)
    minutes(28, 250)


if __name__ == "__main__":
    main()
