"""A parted set of bars is the same bars, and a part of it costs the memory of a part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mltrading.core.errors import DataError
from mltrading.core.storage import write_parquet
from mltrading.market.panel import TIME, Panel, from_frame, stack, to_frame
from mltrading.market.simulate import random_walk
from mltrading.market.store import BarStore, file_name, symbol_of, write_part

WALK = """
import sys
from pathlib import Path
from mltrading.market.store import BarStore
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
store = BarStore(Path(sys.argv[1]))
store.panel(list(store.symbols[:1]))
before, bars = peak(), 0
for panel in store.chunks(5):
    bars += int(panel.alive.sum())
print(bars, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read where Linux writes it")
def test_a_set_larger_than_what_is_held_of_it(tmp_path: Path) -> None:
    n_symbols, n_bars = 60, 30_000
    times = pd.Series(pd.date_range("2024-01-01", periods=n_bars, freq="min", tz="UTC")).astype(TIME)
    rng = np.random.default_rng(1)
    for i in range(n_symbols):
        close = 100 * np.exp(np.cumsum(1e-3 * rng.standard_normal(n_bars)))
        write_part(pd.DataFrame({"timestamp": times, "symbol": f"S{i:03d}", "open": close, "high": close, "low": close, "close": close, "volume": 1.0}), tmp_path)
    whole_mb = n_symbols * n_bars * 5 * 8 / 2**20
    done = subprocess.run([sys.executable, "-c", WALK, str(tmp_path)], capture_output=True, text=True, check=True)
    bars, grown_mb = done.stdout.split()
    assert int(bars) == n_symbols * n_bars
    assert float(grown_mb) < whole_mb / 2


@pytest.mark.parametrize("seed", range(5))
def test_both_forms_and_any_part_are_the_same_bars(tmp_path: Path, seed: int) -> None:
    walk = random_walk(7, 200, seed=seed, closes_only=2)
    write_parquet(to_frame(walk), tmp_path / "daily.parquet")
    for _, bars in to_frame(walk).groupby("symbol"):
        write_part(bars, tmp_path / "daily")
    rng = np.random.default_rng(seed)
    asked = sorted(rng.choice(walk.symbols, size=3, replace=False).tolist())
    first, last = (pd.Timestamp(t).date() for t in np.sort(rng.choice(walk.times, size=2, replace=False)))
    whole, parted = (BarStore(tmp_path / name).panel(asked, first, last) for name in ("daily.parquet", "daily"))
    expected = to_frame(walk).query("symbol in @asked and @first <= timestamp.dt.date <= @last").reset_index(drop=True)
    for panel in (whole, parted):
        got = to_frame(panel)
        pd.testing.assert_frame_equal(got, expected[got.columns], check_dtype=False)


def test_stack_is_the_inverse_of_taking_apart() -> None:
    walk = random_walk(6, 150, seed=3, closes_only=1)
    parts = [from_frame(bars.reset_index(drop=True)) for _, bars in to_frame(walk).groupby("symbol")]
    again = stack(parts[::-1])
    assert again.symbols == walk.symbols
    np.testing.assert_array_equal(again.times, walk.times)
    for field in walk.fields:
        np.testing.assert_array_equal(again[field], walk[field])


@pytest.mark.parametrize("symbol", ["SPY", "^IRX", "BTC/USDT", "BRK.B", "..", "../x", "a%2Fb", "CON", "x y", "Ü", "*"])
def test_any_symbol_has_a_file(symbol: str, tmp_path: Path) -> None:
    assert Path(file_name(symbol)).name == file_name(symbol)
    assert symbol_of(tmp_path / file_name(symbol)) == symbol
    assert not file_name(symbol).startswith(".")


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    for _, bars in to_frame(random_walk(3, 50, seed=1)).groupby("symbol"):
        write_part(bars, tmp_path)
    path = tmp_path / file_name("S001")
    path.write_bytes(path.read_bytes()[:-40])
    store = BarStore(tmp_path)
    assert isinstance(store.panel(["S000", "S002"]), Panel)
    with pytest.raises(DataError, match=r"_S001\.parquet: not a complete Parquet file"):
        store.panel()
