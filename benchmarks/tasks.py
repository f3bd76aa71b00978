"""What a task costs besides its work: one after another, in processes of this machine, on the workers of a Dask cluster; and what reading a block costs beside Parquet.

    python benchmarks/tasks.py [--tasks 500] [--symbols 200] [--bars 1500] [--features 700]

Tasks write one small file. Starting the workers is timed apart. The peer of the block is the long table of the same rows in Parquet, as the pipeline writes it; memory is the peak of a fresh process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import dask
import numpy as np
import pandas as pd
from distributed import LocalCluster
from parts.small import small

from mltrading.core.blocks import open_block, write_block
from mltrading.core.params import ComputeParams
from mltrading.core.runner import fixed_environment
from mltrading.core.storage import write_parts
from mltrading.core.tasks import Task, run_tasks

SEED, THREADS = 1, 2


def seconds(home: Path, n: int, workers: int = 1, cluster: str | None = None) -> float:
    start = time.perf_counter()
    run_tasks(small, [Task(f"t{i}", {"n": i}) for i in range(n)], home, ComputeParams(seed=SEED, threads=THREADS, workers=workers, cluster=cluster))
    return time.perf_counter() - start


def overhead(n: int, folder: Path) -> None:
    """Milliseconds per task, from two numbers of tasks, and what the first one waits for."""
    def line(name: str, **how: object) -> None:
        first = seconds(folder / f"{name}_few", 2, **how)  # type: ignore[arg-type]
        many = seconds(folder / name, n + 2, **how)  # type: ignore[arg-type]
        again = seconds(folder / name, n + 2, **how)  # type: ignore[arg-type]
        print(f"{name:28s} {max(many - first, 0.0) / n * 1e3:7.1f} ms per task   first results after {first:5.2f} s   {n + 2} kept tasks {again:5.2f} s")

    seconds(folder / "warm", 1)
    line("in this process")
    line("2 processes", workers=2)
    os.environ.update(fixed_environment(THREADS, SEED))
    start = time.perf_counter()
    with (dask.config.set({"distributed.nanny.pre-spawn-environ.PYTHONHASHSEED": str(SEED)}),
          LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=":0", memory_limit=0, silence_logs=50) as cluster):
        print(f"{'2 workers of Dask':28s} started in {time.perf_counter() - start:.2f} s")
        line("2 workers of Dask", cluster=cluster.scheduler_address)


def pieces(symbols: int, bars: int, features: int) -> Iterator[pd.DataFrame]:
    """All symbols for some days, then for the next ones."""
    rng, days = np.random.default_rng(0), pd.date_range("2018-01-01", periods=bars, tz="UTC", unit="us")
    for i in range(0, bars, 50):
        part = days[i:i + 50]
        keys = pd.DataFrame({"timestamp": np.repeat(part, symbols), "symbol": [f"S{s:03d}" for s in range(symbols)] * len(part)})
        yield keys.join(pd.DataFrame(rng.standard_normal((len(keys), features), dtype=np.float32), columns=[f"f{f}" for f in range(features)]))


def fresh(code: str, path: Path) -> tuple[float, float]:
    """Seconds of some code in a fresh process, and the most memory of that process, MB."""
    whole = (f"import sys, time\nfrom mltrading.core.blocks import open_block\nfrom mltrading.core.storage import read_parquet\npath = sys.argv[1]\nstart = time.perf_counter()\n{code}\n"
             "print(time.perf_counter() - start, next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])")
    spent, most = subprocess.run([sys.executable, "-c", whole, str(path)], capture_output=True, text=True, check=True).stdout.split()
    return float(spent), int(most) / 1024


def reading(symbols: int, bars: int, features: int, folder: Path) -> None:
    making = time.perf_counter()
    for _ in pieces(symbols, bars, features):
        pass
    making = time.perf_counter() - making
    start = time.perf_counter()
    write_block(pieces(symbols, bars, features), folder / "block")
    block = open_block(folder / "block")
    size = (folder / "block" / "values.npy").stat().st_size / 2**20
    print(f"\nblock of {len(block.times):,} rows × {features} features, {size:,.0f} MB: written in {time.perf_counter() - start - making:.1f} s")
    start = time.perf_counter()
    write_parts(pieces(symbols, bars, features), folder / "rows.parquet")
    print(f"the same as Parquet, {(folder / 'rows.parquet').stat().st_size / 2**20:,.0f} MB: written in {time.perf_counter() - start - making:.1f} s")
    rows = len(block.times) * 7 // 10
    names = [f"f{f}" for f in range(0, features, 6)]
    for name, code, path in (
        ("block: opened", "open_block(path)", "block"),
        ("block: one symbol, all features", "b = open_block(path); b.values[b.rows('S000')].sum()", "block"),
        ("block: every symbol in turn", "b = open_block(path)\nfor s in b.symbols: b.values[b.rows(s)].sum()", "block"),
        ("block: everything checked", "open_block(path).check()", "block"),
        (f"block: {len(names)} features of {rows:,} rows", f"b = open_block(path); b.take(b.between(None, None)[:{rows}], {names})", "block"),
        (f"Parquet: {len(names)} features of all rows", f"read_parquet(path, {['timestamp', 'symbol', *names]})", "rows.parquet"),
        ("Parquet: everything", "read_parquet(path)", "rows.parquet"),
    ):
        spent, most = fresh(code, folder / path)
        print(f"{name:42s} {spent:7.3f} s   peak {most:6,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tasks", 500), ("symbols", 200), ("bars", 1500), ("features", 700)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        overhead(given.tasks, Path(work))
        reading(given.symbols, given.bars, given.features, Path(work))


if __name__ == "__main__":
    main()
