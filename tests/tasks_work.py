"""Work that tests hand to workers: a worker imports it, so it stands in a module of its own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed

from mltrading.core.blocks import open_block
from mltrading.core.errors import DataError, LeakError

SEED, THREADS = 7, 2  # of all tests of tasks: workers refuse what asks for others


def fit(args: dict[str, Any], folder: Path) -> None:
    """A least-squares fit on a symbol's rows: sums that come out otherwise with other threads or instructions. What it starts itself has to stay in its process."""
    block = open_block(args["block"])
    X = np.asarray(block.values[block.rows(args["symbol"])], np.float64)
    if len(X) < 100:
        raise DataError(args["symbol"], f"has {len(X)} rows", "give it a longer history")
    np.save(folder / "coefficients.npy", np.linalg.lstsq(X[:-1], X[1:, 0], rcond=None)[0])
    np.save(folder / "products.npy", X.T @ X)
    assert set(Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(4))) == {os.getpid()}


def count(args: dict[str, Any], folder: Path) -> None:
    """Notes that it was begun, and by whom; then ends well, badly or not at all."""
    notes = args["notes"]
    with (notes / args["name"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    begun = len((notes / args["name"]).read_text().split())
    time.sleep(args.get("seconds", 0.0))
    if begun <= args.get("dies", 0) and not (notes / "harmless").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    if kind := args.get("raises"):
        raise {"DataError": DataError(args["name"], f"nothing at {folder}"), "LeakError": LeakError(args["name"], "looked ahead"), "ZeroDivisionError": ZeroDivisionError("nobody thought of this")}[kind]
    (folder / "out.txt").write_text(args["name"])


def peak(args: dict[str, Any], folder: Path) -> None:
    """Reads a symbol's rows, and notes the most memory that its process ever had, MB."""
    block = open_block(args["block"])
    (folder / "sum.txt").write_text(repr(float(block.values[block.rows(args["symbol"])].sum(dtype=np.float64))))
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    (args["notes"] / args["symbol"]).write_text(str(int(line.split()[1]) / 1024))
