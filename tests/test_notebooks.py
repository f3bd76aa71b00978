"""Every library notebook runs from top to bottom; its cells hold the checks of the code beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not {"pipeline", ".ipynb_checkpoints"} & set(p.parts)]


SLOW = [p for p in LIBRARY if "#| slow" in p.read_text()]


def run(path: Path, *words: str) -> None:
    command = [str(Path(sys.executable).with_name("nbdev_test")), "--path", str(path), "--n_workers", "0", *words]
    env = os.environ | {"MLTRADING_ROOT": str(ROOT), "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.mark.parametrize("path", LIBRARY, ids=[str(p.relative_to(ROOT / "nbs")) for p in LIBRARY])
def test_notebook(path: Path) -> None:
    run(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", SLOW, ids=[str(p.relative_to(ROOT / "nbs")) for p in SLOW])
def test_notebook_with_its_slow_cells(path: Path) -> None:
    run(path, "--flags", "slow")
