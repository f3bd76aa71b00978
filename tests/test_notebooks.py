"""Every library notebook runs from top to bottom; its cells hold the checks of the code beside them. Explorations, and pages with their long cells, are marked `whole`."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

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


def execute(path: Path, said: Path, flags: str) -> None:
    """What the command `nbdev_test` does; ends with exit code 1 where a cell raises."""
    from nbdev.test import nbdev_test

    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    nbdev_test(str(path), flags, n_workers=0)


def run(processes: ForkServerContext, path: Path, said: Path, flags: str = "") -> None:
    process = processes.Process(target=execute, args=(path, said, flags))
    process.start()
    process.join()
    assert process.exitcode == 0, said.read_text()[-9000:]
    assert "Success." in said.read_text().splitlines()  # a library may grumble after it


def pages(of: Callable[[Path], bool]) -> list[Any]:
    return [pytest.param(p, id=str(p.relative_to(ROOT / "nbs"))) for p in LIBRARY if of(p)]


@pytest.mark.parametrize("path", pages(lambda p: "explore" not in p.parts))
def test_notebook(processes: ForkServerContext, path: Path, tmp_path: Path) -> None:
    run(processes, path, tmp_path / "said.txt")


@pytest.mark.whole
@pytest.mark.parametrize("path", pages(lambda p: "explore" in p.parts or "#| slow" in p.read_text()))
def test_notebook_with_its_long_cells(processes: ForkServerContext, path: Path, tmp_path: Path) -> None:
    run(processes, path, tmp_path / "said.txt", "slow")
