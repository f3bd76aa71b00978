"""All registered features beside every indicator of TA-Lib, in feature values per second, in one run.

    python benchmarks/features.py [--symbols 500] [--bars 2520] [--peer-symbols 100]

The work is simulated daily bars, the same for both. TA-Lib is called the way its users call it: one symbol after the other, each function on the arrays
of that symbol, on one thread; it is given fewer symbols because its rate does not depend on their number. Compilation is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from mltrading.features.registry import FeatureBlock, compute, lookup
from mltrading.market.panel import Panel, select
from mltrading.market.simulate import random_walk


def talib_all(panel: Panel) -> int:
    """Every TA-Lib function that takes prices and volume, on every symbol; the number of values."""
    from talib import abstract, get_functions

    values = 0
    for i in range(len(panel.symbols)):
        inputs = {name: np.ascontiguousarray(panel[name][i]) for name in ("open", "high", "low", "close", "volume")}
        for name in get_functions():
            try:
                result = abstract.Function(name)(inputs)
            except Exception:  # needs a second series, or periods that vary
                continue
            values += sum(len(r) for r in (result if isinstance(result, list | tuple) else [result]) if len(r) == len(panel))
    return values


def ours(panel: Panel, names: list[str], **options: Any) -> int:
    """Our features; the number of values."""
    block: FeatureBlock = compute(panel, names, benchmark=panel.symbols[0], **options)
    return block.values.size


def measured(work: str, run: Callable[[], int], repeats: int) -> dict[str, Any]:
    """The best of some runs."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        values = run()
        seconds.append(time.perf_counter() - start)
    best = min(seconds)
    return {"work": work, "values": values, "seconds": round(best, 3), "M values/s": round(values / best / 1e6, 1)}


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Print and return the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--bars", type=int, default=2520)
    parser.add_argument("--peer-symbols", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args(arguments)
    panel = random_walk(a.symbols, a.bars, seed=0, ragged=False)
    few = select(panel, panel.symbols[: min(a.peer_symbols, a.symbols)])
    names = [f.name for f in lookup() if not any(n.startswith("macro:") for n in f.needs)]
    kinds = {"symbol": "over symbols", "cross": "across symbols", "time": "over time"}
    ours(select(panel, panel.symbols[:2]), names)  # loads what is compiled
    ours(select(panel, panel.symbols[:2]), names, dtype=np.float32)
    rows = [
        measured("TA-Lib, all functions, one thread", lambda: talib_all(few), 1),
        measured(f"all {len(names)} features", lambda: ours(panel, names), a.repeats),
        measured("the same, one thread", lambda: ours(panel, names, threads=1), a.repeats),
        measured("the same, single precision", lambda: ours(panel, names, dtype=np.float32), a.repeats),
    ]
    for over, words in kinds.items():
        some = [f.name for f in lookup(names) if f.over == over]
        rows.append(measured(f"{len(some)} {words}", lambda some=some: ours(panel, some), a.repeats))
    table = pd.DataFrame(rows)
    table["ratio to TA-Lib"] = (table["M values/s"] / table["M values/s"].iloc[0]).round(1)
    print(f"{a.symbols} symbols x {a.bars} bars (TA-Lib: {len(few.symbols)} symbols), best of {a.repeats}")
    print(table.to_string(index=False))
    return table


if __name__ == "__main__":
    main()
