"""Every library notebook runs from top to bottom; its cells hold the checks of the code beside them. Explorations and pages with long cells run among the long proofs."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not {"pipeline", ".ipynb_checkpoints"} & set(p.parts)]

IMPORTED = ["pytest", "nbdev.test", "fastcore.test", "pandas", "numba", "matplotlib.pyplot", "pyarrow.parquet", "scipy.stats", "sklearn.linear_model", "torch", "torch._dynamo", "xgboost", "exchange_calendars", "papermill", "nbconvert", "first_use"]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Each notebook has a process of its own, which begins with the libraries of others imported and nothing of this project."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MLTRADING_ROOT": str(ROOT), "MLTRADING_QUICK": "1", "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
                            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}.items():
            patch.setenv(name, value)
        patch.chdir(ROOT)
        forkserver.ensure_running()
    return context


def execute(path: Path, said: Path) -> None:
    """What the command `nbdev_test` does; ends with exit code 1 where a cell raises."""
    from nbdev.test import nbdev_test

    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    nbdev_test(str(path), "slow", n_workers=0)


def run(processes: ForkServerContext, path: Path, said: Path) -> None:
    process = processes.Process(target=execute, args=(path, said))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()[-9000:]
    assert "Success." in said.read_text().splitlines()  # a library may grumble after it


def long(path: Path) -> bool:
    """Explorations, and pages with cells that take long, run whole among the long proofs."""
    return "explore" in path.parts or "#| slow" in path.read_text()


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT / "nbs")), marks=[pytest.mark.slow] * long(p)) for p in LIBRARY])
def test_notebook(processes: ForkServerContext, path: Path, tmp_path: Path) -> None:
    run(processes, path, tmp_path / "said.txt")
