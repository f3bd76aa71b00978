"""Five hundred symbols from prices to forecasts: features into a block, labels, then a walk of one pooled strategy, with time and memory of each step.

    MLTRADING_DATA=/path/to/data python benchmarks/multiasset.py [--symbols 504] [--train-bars 756] [--test-bars 252] [--workers 2] [--cluster tcp://…]

The prices are `bars/sp500_daily.parquet` of that folder, adjusted for splits and dividends; the features are all that they can feed; strategy, model, choice of features, embargo, seed and threads are those of params.yaml. Memory is that of this process and all that it starts, shared pages counted once and those of mapped
files apart: the system takes those back when it is short. Processor time tells more than time on a machine that does other things as well.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from mltrading.core.memory import measured
from mltrading.core.params import ComputeParams, block, load_params, read_params
from mltrading.features.redundancy import SelectionParams
from mltrading.features.registry import write_features
from mltrading.labels.horizons import LabelParams, horizon_sigma, label_frame
from mltrading.market.adjust import adjusted
from mltrading.market.panel import Panel, from_frame, long_column
from mltrading.models.zoo import ModelsParams
from mltrading.systems.lessons import rows
from mltrading.systems.strategies import Learner, StrategiesParams
from mltrading.systems.walk import walk
from mltrading.validation.splits import WalkForward


def prices(path: Path, symbols: int) -> Panel:
    """Adjusted daily bars of the first so many symbols."""
    frame = pd.read_parquet(path)
    frame = frame[frame["symbol"].isin(sorted(frame["symbol"].unique())[:symbols])]
    frame = frame.sort_values(["timestamp", "symbol"]).assign(timestamp=lambda f: f["timestamp"].dt.tz_localize("UTC"), adj_factor=lambda f: f["adj_close"] / f["close"])
    return adjusted(from_frame(frame[["timestamp", "symbol", "open", "high", "low", "close", "volume", "adj_factor"]]))


def spent() -> float:
    """Processor seconds of this process and those that it has waited for."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("symbols", 504), ("train-bars", 756), ("test-bars", 252), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--strategy", default="xgboost")
    parser.add_argument("--cluster", default=None)
    a = parser.parse_args(arguments)
    path = Path(os.environ.get("MLTRADING_DATA", "")) / "bars" / "sp500_daily.parquet"
    if not os.environ.get("MLTRADING_DATA") or not path.exists():
        print("not measured: set MLTRADING_DATA to a folder that holds bars/sp500_daily.parquet")
        return
    params = load_params("multiasset")
    compute = block(ComputeParams, read_params()["compute"] | {"workers": a.workers, "cluster": a.cluster}, "compute")
    strategy, asked = block(StrategiesParams, params["strategies"], "strategies")[a.strategy], block(LabelParams, params["labels"], "labels")
    learner = Learner(strategy, block(ModelsParams, params["models"], "models")[strategy.model], compute.seed, compute.threads)
    begun, used = time.perf_counter(), spent()

    def step(name: str, do: Callable[[], Any]) -> Any:
        before = spent()
        with measured() as used:
            out = do()
        print(f"{name:44s} processor {spent() - before:7.1f} s, {used}", flush=True)
        return out

    with tempfile.TemporaryDirectory() as folder:
        panel = step("prices", lambda: prices(path, a.symbols))
        made = step("features into a block", lambda: write_features(panel, Path(folder) / "rows"))
        sigma = made.keys(made.between(None, None)).assign(sigma=long_column(panel, horizon_sigma(panel, 1, asked.vol_bars)))
        labels = step("labels", lambda: label_frame(panel, strategy.horizon_bars, asked.fill, vol_bars=asked.vol_bars))
        data = step("rows, the block read and checked", lambda: rows(made.check(), sigma, labels, None))
        folds = WalkForward(a.train_bars, a.test_bars, params["validation"]["embargo_bars"]).folds(data.times, data.end, panel.index)
        done = step(f"walk: {a.strategy}, {len(folds)} folds, {a.workers} processes", lambda: walk(data, folds, {a.strategy: learner}, Path(folder) / "models", block(SelectionParams, params["selection"], "selection"), compute=compute))
        print(f"{len(panel.symbols)} symbols × {len(panel)} bars, {len(data.keys):,} rows of {len(data.names)} features ({(Path(folder) / 'rows' / 'values.npy').stat().st_size / 2**30:.2f} GiB); {len(done.forecasts):,} forecasts, mean area under the curve {done.quality['auc'].mean():.3f}")
    print(f"all: {time.perf_counter() - begun:.0f} s, processor {spent() - used:.0f} s")


if __name__ == "__main__":
    main()
