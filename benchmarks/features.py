"""All registered features beside every indicator of TA-Lib and of `ta`, in feature values per second, in one run.

    python benchmarks/features.py [--symbols 500] [--bars 2520] [--peer-symbols 100]

The work is simulated daily bars, the same for all. The peers are called the way their users call them, one symbol after the other on one thread; they are given fewer symbols because their rate does not depend on the number. TA-Lib returns loose arrays: it is
measured as a table of them, which is what we return and what the ratio refers to, and without making the table. `ta` is measured where it is installed. Then: `alpha158` on 600 symbols, all features written to Parquet by chunks with the memory that takes, `sequence60` bar by bar, and what the first use in a fresh process costs, compiled anew and from the cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mltrading.features.registry import choose, compute, lookup, write_features
from mltrading.features.stream import Stream
from mltrading.market.panel import Panel, select
from mltrading.market.simulate import random_walk


def talib_all(panel: Panel, table: bool) -> int:
    """Every TA-Lib function that takes prices and volume, on every symbol, as a table of each symbol or as loose arrays; the number of values."""
    from talib import abstract, get_functions

    values = 0
    for i in range(len(panel.symbols)):
        inputs = {name: np.ascontiguousarray(panel[name][i]) for name in ("open", "high", "low", "close", "volume")}
        columns = []
        for name in get_functions():
            try:
                result = abstract.Function(name)(inputs)
            except Exception:  # needs a second series, or periods that vary
                continue
            columns += [r for r in (result if isinstance(result, list | tuple) else [result]) if len(r) == len(panel)]
        values += np.column_stack(columns).size if table else sum(map(len, columns))
    return values


def ta_all(panel: Panel) -> int:
    """Every indicator of `ta`, on every symbol; the number of values."""
    import ta

    values = 0
    for i in range(len(panel.symbols)):
        frame = pd.DataFrame({name: panel[name][i] for name in ("open", "high", "low", "close", "volume")})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values += ta.add_all_ta_features(frame, "open", "high", "low", "close", "volume").iloc[:, 5:].size
    return values


def ours(panel: Panel, names: list[str] | str, **options: Any) -> int:
    """Our features; the number of values."""
    return compute(panel, names, benchmark=panel.symbols[0], **options).values.size


def measured(work: str, run: Callable[[], int], repeats: int) -> dict[str, Any]:
    """The best of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        values = run()
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    return {"work": work, "values": values, "seconds": round(best, 3), "M values/s": round(values / best / 1e6, 2)}


def rates(panel: Panel, names: list[str], peer_symbols: int, repeats: int) -> pd.DataFrame:
    """Feature values per second, ours and the peers'."""
    few, fewer = (select(panel, panel.symbols[:n]) for n in (peer_symbols, max(1, peer_symbols // 20)))
    ours(few, names)  # loads what is compiled
    rows = [measured("TA-Lib, all functions, one thread", lambda: talib_all(few, table=True), repeats)]
    rows.append(measured("the same, loose arrays", lambda: talib_all(few, table=False), repeats))
    try:
        rows.append(measured("ta, all indicators, one thread", lambda: ta_all(fewer), 1))
    except ImportError:
        print("ta is not installed: not measured")
    rows += [
        measured(f"all {len(names)} features", lambda: ours(panel, names), repeats),
        measured("the same, one thread", lambda: ours(panel, names, threads=1), 1),
        measured("the same, single precision", lambda: ours(panel, names, dtype=np.float32), repeats),
    ]
    for family, part in pd.Series(names, index=[f.family for f in lookup(names)]).groupby(level=0):
        rows.append(measured(f"  {family}: {len(part)}", lambda part=part: ours(panel, part.tolist()), 1))
    table = pd.DataFrame(rows)
    table["ratio to TA-Lib"] = (table["M values/s"] / table["M values/s"].iloc[0]).round(1)
    return table


def peak(start: bool = False) -> float:
    """The most memory this process has held since the last start, in GiB (Linux)."""
    if start:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) / 2**20


def written(symbols: int, bars: int) -> None:
    """All features to Parquet by chunks: seconds, and the memory it takes. Run in a process of its own."""
    panel = random_walk(symbols, bars, seed=0, ragged=False)
    names = [f.name for f in choose(panel, benchmark=panel.symbols[0])]
    ours(select(panel, panel.symbols[:2]), names)
    before = peak(start=True)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        write_features(panel, Path(folder) / "features.parquet", benchmark=panel.symbols[0])
        seconds = time.perf_counter() - start
        size = (Path(folder) / "features.parquet").stat().st_size
    grown, whole = peak() - before, 4 * len(names) * symbols * bars / 2**30
    print(f"written to Parquet by chunks: {seconds:.1f} s, {size / 2**30:.2f} GiB; memory grew by {grown:.2f} GiB, {grown / whole:.2f} x the result in single precision ({whole:.2f} GiB)")


def held(symbols: int, bars: int) -> None:
    """All features in memory: the peak beside the result. Run in a process of its own."""
    panel = random_walk(symbols, bars, seed=0, ragged=False)
    names = [f.name for f in choose(panel, benchmark=panel.symbols[0])]
    ours(select(panel, panel.symbols[:2]), names)
    before = peak(start=True)
    size = ours(panel, names) * 8 / 2**30
    grown = peak() - before
    print(f"in memory, double precision: {size:.2f} GiB; memory grew by {grown:.2f} GiB, {grown / size:.2f} x the result")


def streamed(symbols: int, bars: int) -> None:
    """`sequence60` bar by bar: bars per second, of one symbol and of many."""
    for n in (1, symbols):
        panel = random_walk(n, bars, seed=1, ragged=False)
        stream, count = Stream("sequence60", panel.symbols), min(bars, max(20, 20_000 // n))
        rows = [{f: np.ascontiguousarray(b[:, k]) for f, b in panel.fields.items()} for k in range(count)]
        stream.update(panel.times[0], rows[0])
        start = time.perf_counter()
        for k in range(1, count):
            stream.update(panel.times[k], rows[k])
        print(f"sequence60 bar by bar, {n} symbol(s) at a time: {n * (count - 1) / (time.perf_counter() - start):,.0f} bars/s")


_FIRST = """
import time; start = time.perf_counter()
from mltrading.features.registry import compute
from mltrading.market.simulate import random_walk
compute(random_walk(2, 300, seed=0, ragged=False), "alpha158")
print(time.perf_counter() - start)
"""


def first_use() -> None:
    """Seconds until the first features of a fresh process are there, compiled anew and from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "NUMBA_CACHE_DIR": folder}
        for words in ("compiled anew", "from the cache"):
            done = subprocess.run([sys.executable, "-c", _FIRST], env=env, capture_output=True, text=True, check=True)
            print(f"first use in a fresh process, {words}: {float(done.stdout.split()[-1]):.1f} s")


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Print all, return the table of rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--bars", type=int, default=2520)
    parser.add_argument("--peer-symbols", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args(arguments)
    panel = random_walk(a.symbols, a.bars, seed=0, ragged=False)
    names = [f.name for f in choose(panel, benchmark=panel.symbols[0])]
    table = rates(panel, names, min(a.peer_symbols, a.symbols), a.repeats)
    print(f"{a.symbols} symbols x {a.bars} bars (TA-Lib: {min(a.peer_symbols, a.symbols)} symbols), best of {a.repeats}")
    print(table.to_string(index=False))
    wide = random_walk(600, 2520, seed=3, ragged=False) if a.symbols >= 500 else panel
    row = measured("alpha158", lambda: ours(wide, "alpha158"), a.repeats)
    print(f"alpha158 on {len(wide.symbols)} symbols x {len(wide)} bars: {row['seconds']} s")
    for work in ("held", "written"):
        subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import features; features.{work}({a.symbols}, {a.bars})"], check=True)
    streamed(min(500, a.symbols), a.bars)
    first_use()
    return table


if __name__ == "__main__":
    main()
