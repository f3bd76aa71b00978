"""Models beside their peers, in one run: batches of windows, fits through the protocol, training steps of every network, one row's forecast.

`make bench NAME=models` prints tables; a ratio is the peer's time over ours: above 1 ours is faster. `make bench NAME=models ARGS="windows liquid"` runs some of them."""

from __future__ import annotations

import os
import sys
import time
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from parts import agents, attention, liquid, splines, trees, xlstm_blocks
from parts.agents import in_turns
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mltrading.models.conformance import planted
from mltrading.models.windows import Gather, Windows
from mltrading.models.zoo import build

THREADS = int(os.environ.get("THREADS", "1"))  # more than one only helps where the cores are idle


def show(title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.to_string(index=False, float_format='{:,.2f}'.format)}", flush=True)


def of_windows(symbols: int = 500, bars: int = 2520, steps: int = 60, features: int = 60, batch: int = 1024) -> None:
    """Windows of 500 symbols × 2,520 days × 60 steps × 60 features, batched in random order; peer: numpy's gather from the same block, and its scaling."""
    rng, lead = np.random.default_rng(0), steps - 1
    block = rng.standard_normal((symbols * (bars + lead), features), dtype=np.float32)
    last = (np.arange(symbols)[:, None] * (bars + lead) + lead + np.arange(bars)).ravel()
    x = Windows(block, last, steps, pd.RangeIndex(features), pd.RangeIndex(len(last)))
    zero, one = np.zeros(features, np.float32), np.ones(features, np.float32)
    gather, order, back = Gather(zero, -5 * one, 5 * one, zero, one), rng.permutation(len(last)), np.arange(1 - steps, 1)
    parts = [order[i : i + batch] for i in range(0, 100 * batch, batch)]

    def ours() -> None:
        for rows in parts:
            x.batch(rows, gather)

    def numpys() -> None:
        for rows in parts[:10]:
            np.nan_to_num((np.clip(block[last[rows][:, None] + back], gather.low, gather.high) - gather.mean) * gather.scale, copy=False)

    x.batch(parts[0], gather)
    a, b = in_turns(ours, numpys, 3)
    mine, other = len(parts) * batch / a, 10 * batch / b
    show("batches of windows, one thread", pd.DataFrame([{"windows": len(last), "block MB": block.nbytes / 1e6, "written out MB": len(last) * steps * features * 4 / 1e6, "windows/s": mine, "numpy windows/s": other, "ratio": mine / other}]))


def of_logistic(rows: int = 50_000, features: int = 60) -> None:
    """The logistic regression through the protocol beside scikit-learn's pipeline."""
    d = planted(rows, seed=0, n_features=features)
    model = build("logistic", {"l2": 0.001, "winsor": 0.0, "missing_indicators": False, "max_iter": 1000}, 0, THREADS)
    peer = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(C=1 / (0.001 * rows), tol=1e-6, max_iter=1000))
    raw, up = d.X.to_numpy(), d.y > 0
    work: list[tuple[str, Any, Any, int]] = [
        ("fit", lambda: model.fit(d.X, d.y, d.weight, d.times), lambda: peer.fit(raw, up, logisticregression__sample_weight=d.weight), 5),
        ("predict", lambda: model.predict(d.X), lambda: peer.predict_proba(raw), 5),
        ("one row", lambda: model.predict(d.X.iloc[:1]), lambda: peer.predict_proba(raw[:1]), 200),
    ]
    found = [{"logistic": what, "ms": 1e3 * a, "scikit-learn ms": 1e3 * b, "ratio": b / a} for what, ours, theirs, n in work for a, b in [in_turns(ours, theirs, n)]]
    show(f"{rows:,} rows × {features} features", pd.DataFrame(found))


def of_trees() -> None:
    """Tree models beside their libraries."""
    show("trees, fit of 20,000 × 40", trees.trees_fit().reset_index())
    show("trees, one row, microseconds", trees.trees_one_row().reset_index())


def of_attention() -> None:
    """Training steps beside torch.nn."""
    found = attention.step_ratios(threads=THREADS)
    show("training step of 256 × 60 × 60 beside torch.nn", pd.DataFrame([{"kind": kind, "ms": a, "torch.nn ms": b, "ratio": r} for kind, (a, b, r) in found.items()]))


def of_xlstm() -> None:
    """xLSTM beside its package."""
    show("xLSTM, 256 × 60 × 64, beside `xlstm`", pd.DataFrame([{"what": k, "value": v} for k, v in xlstm_blocks.bench_xlstm().items()]))


def of_liquid() -> None:
    """Liquid networks beside `ncps`."""
    show(f"{liquid.ROWS} rows × {liquid.STEPS} steps × {liquid.FEATURES} features, {liquid.UNITS} neurons, {liquid.THREADS} threads, beside `ncps`", pd.DataFrame(liquid.liquid()))


def of_splines() -> None:
    """Splines and autoencoders beside plain torch."""
    torch.set_num_threads(THREADS)
    show("KAN layer beside the recursion; autoencoders beside torch.nn", pd.DataFrame([{"what": "KAN layer"} | splines.kan(), {"what": "autoencoder"} | splines.autoencoder()]))


def of_agents() -> None:
    """Agents beside stable-baselines3 and gymnasium."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps = agents.steps_for_agents()
    show("agents", pd.DataFrame(agents.environment_rows(steps) + agents.training_rows(steps)))


def of_one_row(steps: int = 60, features: int = 60, repeats: int = 200) -> None:
    """The forecast of one window by every network, at the defaults of its page."""
    d = planted(1200, seed=0, steps=steps, n_features=features)
    quick, found = {"epochs": 1, "patience": 0}, []
    kinds = ["lstm", "lstm_attention", "gru_attention", "transformer", "xlstm", "xlstm_transformer", "ltc", "cfc", "kan", "autoencoder", "vae"]
    for kind in kinds:
        model = build(kind, {"steps": steps, "train": quick}, 0, 1, purge_bars=5).fit(d.X, d.y, d.weight, d.times)
        one = d.X.take(slice(0, 1))
        model.predict(one)
        took = []
        for _ in range(repeats):
            start = time.perf_counter()
            model.predict(one)
            took.append(1e3 * (time.perf_counter() - start))
        found.append({"kind": kind, "p50 ms": np.percentile(took, 50), "p99 ms": np.percentile(took, 99)})
    show(f"one window of {steps} × {features} through `predict`", pd.DataFrame(found))


PARTS = {"windows": of_windows, "logistic": of_logistic, "trees": of_trees, "attention": of_attention, "xlstm": of_xlstm, "liquid": of_liquid, "splines": of_splines, "agents": of_agents, "one_row": of_one_row}


def main() -> None:
    """Print the tables that were asked for."""
    asked = sys.argv[1:] or list(PARTS)
    for name in asked:
        if name not in PARTS:
            raise SystemExit(f"no part `{name}`; there are: {' '.join(PARTS)}")
        PARTS[name]()


if __name__ == "__main__":
    main()
