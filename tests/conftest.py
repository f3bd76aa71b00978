"""Shared by all tests: the project's root, and a small project in a temporary folder that the real pipeline notebooks run in."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# the same examples every time, so that a red run is a red commit; HYPOTHESIS_PROFILE=search looks for new ones
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

ROOT = Path(__file__).parents[1]
BEGAN = pytest.StashKey[float]()
os.environ["MLTRADING_ROOT"] = str(ROOT)
os.environ["OMP_WAIT_POLICY"] = "passive"  # as in stages: two test processes share the processors
# temporary projects hold the package by link; kernels import it from where it is, or they would compile it anew for each path
os.environ |= {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}

from mltrading.core.runner import fixed_environment

# kernels are compiled as for stages, so that what is tested is what runs there, and each is compiled once for both
os.environ |= {name: value for name, value in fixed_environment(1, 0).items() if name.startswith("NUMBA_CPU_")}


class ByFile(LoadScopeScheduling):
    """A file's tests stay in one process: they share its fixtures and what it compiled. Notebooks share neither and fill all processes to the end."""

    def _split_scope(self, nodeid: str) -> str:
        return nodeid if "test_notebooks.py::" in nodeid else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--at-most", type=float, default=float("inf"), metavar="SECONDS", help="skip what has not begun by then, and say so")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[BEGAN] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - item.config.stash[BEGAN] > item.config.getoption("--at-most"):
        pytest.skip("the time is up: run make test-all")


def pytest_collection_finish() -> None:
    """All libraries are imported by now, and stay: no search for garbage goes through them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


def make_project(folder: Path) -> Path:
    """A project without data or outputs: parameters, stages, notebooks, and the package by link."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("params.yaml", "dvc.yaml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("nbs", "mltrading"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_project(tmp_path / "project")
    monkeypatch.setenv("MLTRADING_ROOT", str(folder))
    return folder


@pytest.fixture(scope="session")
def embedded_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded snapshot as `make data` writes it, made once; to be copied, not changed."""
    from mltrading.market.request import from_embedded
    from mltrading.market.snapshot import write_snapshot

    folder = tmp_path_factory.mktemp("embedded") / "data"
    write_snapshot(from_embedded({}), folder)
    return folder


@pytest.fixture(scope="session")
def new_project() -> Callable[[Path], Path]:
    return make_project


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of two workers of one task each, on this machine, in the environment that `join_cluster` gives."""
    import dask
    from distributed import LocalCluster
    from tasks_work import SEED, THREADS

    for name, value in fixed_environment(THREADS, SEED).items():
        monkeypatch.setenv(name, value)
    with (dask.config.set({"distributed.nanny.pre-spawn-environ.PYTHONHASHSEED": str(SEED)}),
          LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=":0", memory_limit=0, silence_logs=50) as started):
        yield started.scheduler_address
