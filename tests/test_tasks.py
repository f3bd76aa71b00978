"""Tasks side by side: the same bytes however many and wherever, what a death costs, what is done again and what is not, and how much memory it takes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tasks_work import SEED, THREADS, count, fit, peak

from mltrading.core.blocks import open_block, write_block
from mltrading.core.errors import ParameterError, StageError
from mltrading.core.params import ComputeParams, load_params, read_yaml
from mltrading.core.runner import fixed_environment
from mltrading.core.tasks import Task, run_tasks

SAYS = ["task", "status", "reason"]


def compute(workers: int = 1, cluster: str | None = None, threads: int = THREADS) -> ComputeParams:
    return ComputeParams(seed=SEED, threads=threads, workers=workers, cluster=cluster)


def written(home: Path) -> dict[str, bytes]:
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file() and not p.relative_to(home).parts[0].startswith(".")}


def begun(notes: Path) -> dict[str, int]:
    return {p.name: len(p.read_text().split()) for p in sorted(notes.iterdir()) if p.name != "harmless"}


def make_block(folder: Path, symbols: int, bars: int, features: int) -> Path:
    """A block of noise; the last symbol has 50 rows."""
    days = pd.date_range("2015-01-01", periods=bars, tz="UTC", unit="us")
    rng = np.random.default_rng(1)
    names = [f"f{i}" for i in range(features)]

    def pieces() -> Iterator[pd.DataFrame]:
        for s in range(symbols):
            n = 50 if s == symbols - 1 else bars
            yield pd.concat([pd.DataFrame({"timestamp": days[:n], "symbol": f"S{s:03d}"}), pd.DataFrame(rng.standard_normal((n, features), dtype=np.float32), columns=names)], axis=1)

    write_block(pieces(), folder)
    return folder


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    folder = make_block(tmp_path_factory.mktemp("block") / "block", 5, 600, 40)
    block = open_block(folder).check()
    return [Task(s, {"block": folder, "symbol": s}, block.id) for s in block.symbols]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def counted(notes: Path, names: str = "abcdef", **special: dict[str, object]) -> list[Task]:
    return [Task(n, {"name": n, "notes": notes} | special.get(n, {})) for n in names]


def alone(tasks: Sequence[Task], home: Path) -> pd.DataFrame:
    """All tasks one after another in one process, in the environment that the runner gives a stage."""
    plain = [[t.name, {k: str(v) for k, v in t.args.items()}, t.data_id] for t in tasks]
    code = ("import json, sys\nfrom pathlib import Path\nfrom tasks_work import fit\nfrom mltrading.core.params import ComputeParams\nfrom mltrading.core.tasks import Task, run_tasks\n"
            "tasks = [Task(n, a | {'block': Path(a['block'])}, d) for n, a, d in json.loads(sys.argv[1])]\n"
            f"print(run_tasks(fit, tasks, sys.argv[2], ComputeParams(seed={SEED}, threads={THREADS}, workers=1, cluster=None)).to_json())")
    env = os.environ | fixed_environment(THREADS, SEED) | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    out = subprocess.run([sys.executable, "-c", code, json.dumps(plain), str(home)], env=env, capture_output=True, text=True, check=True)
    return pd.DataFrame(json.loads(out.stdout)).reset_index(drop=True)


# ------------------------------------------------------------------ the same bytes


def test_one_two_and_a_cluster_write_the_same_bytes(fits: list[Task], tmp_path: Path, cluster: str) -> None:
    one = alone(fits, tmp_path / "one")
    two = run_tasks(fit, fits, tmp_path / "two", compute(2))
    far = run_tasks(fit, fits, tmp_path / "far", compute(1, cluster))
    assert len(written(tmp_path / "one")) == 4 * 3 + 1
    assert written(tmp_path / "one") == written(tmp_path / "two") == written(tmp_path / "far")
    assert list(two["status"]) == ["done"] * 4 + ["refused"]
    assert two[SAYS].equals(far[SAYS])
    assert two[SAYS].to_dict("list") == one[SAYS].to_dict("list")
    assert run_tasks(fit, fits, tmp_path / "two", compute(1, cluster))["kept"].all()  # where it was computed is not in the key


def test_workers_and_cluster_are_no_part_of_a_result(root: Path) -> None:
    for name, stage in read_yaml(root / "dvc.yaml")["stages"].items():
        assert {p for p in stage["params"] if p.startswith("compute")} == {"compute.seed", "compute.threads"}, name
    assert set(load_params("multiasset")["compute"]) == set(load_params("")["compute"]) == {"seed", "threads"}


# ------------------------------------------------------------------ deaths


def test_a_killed_worker_costs_its_own_task(tmp_path: Path, notes: Path) -> None:
    tasks = counted(notes, b={"dies": 1, "seconds": 0.2}, a={"seconds": 1.5}, c={"raises": "DataError"})
    table = run_tasks(count, tasks, tmp_path / "home", compute(2))
    assert begun(notes) == {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1, "f": 1}  # `a` was running when `b` was killed
    assert list(table["status"]) == ["done", "done", "refused", "done", "done", "done"]
    pids = {n: (notes / n).read_text().split() for n in "ab"}
    assert len({*pids["a"], *pids["b"]}) == 3


def test_a_task_that_kills_thrice_has_failed_and_the_rest_is_kept(tmp_path: Path, notes: Path) -> None:
    tasks = counted(notes, "abcd", b={"dies": 99})
    with pytest.raises(StageError, match=r"task b: its worker died 3 times.*\n.*another run does only what is missing"):
        run_tasks(count, tasks, tmp_path / "home", compute(2))
    assert begun(notes) == {"a": 1, "b": 3, "c": 1, "d": 1}
    (notes / "harmless").touch()
    table = run_tasks(count, tasks, tmp_path / "home", compute(2))
    assert list(table["kept"]) == [True, False, True, True]
    assert begun(notes)["b"] == 4
    assert sorted(written(tmp_path / "home")) == sorted(f"{n}/{f}" for n in "abcd" for f in ("out.txt", "task.json"))


def test_a_killed_run_ends_its_workers_and_goes_on_where_it_was(tmp_path: Path, notes: Path) -> None:
    code = ("import sys\nfrom pathlib import Path\nfrom tasks_work import count\nfrom mltrading.core.params import ComputeParams\nfrom mltrading.core.tasks import Task, run_tasks\n"
            "tasks = [Task(n, {'name': n, 'notes': Path(sys.argv[1]), 'seconds': 0.0 if n in 'ab' else 120.0}) for n in 'abcd']\n"
            f"run_tasks(count, tasks, sys.argv[2], ComputeParams(seed={SEED}, threads={THREADS}, workers=2, cluster=None))")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    run = subprocess.Popen([sys.executable, "-c", code, str(notes), str(tmp_path / "home")], env=env, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while len(begun(notes)) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    pids = {int(p) for n in "cd" for p in (notes / n).read_text().split()}
    until = time.monotonic() + 60
    while any(Path(f"/proc/{p}").exists() for p in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{p}").exists() for p in pids)
    finished = written(tmp_path / "home")
    table = run_tasks(count, [Task(n, {"name": n, "notes": notes, "seconds": 0.0}) for n in "ab"], tmp_path / "home", compute())
    assert table["kept"].all()
    assert written(tmp_path / "home") == finished


# ------------------------------------------------------------------ what is done, and what is done again


def test_errors_of_the_project_refuse_and_others_fail(tmp_path: Path, notes: Path) -> None:
    table = run_tasks(count, counted(notes, "ab", b={"raises": "DataError"}), tmp_path / "home", compute())
    assert table.iloc[1][SAYS].to_list() == ["b", "refused", "b: nothing at b"]  # no word of where it was tried
    for kind, says in (("ZeroDivisionError", "task c: ZeroDivisionError: nobody thought of this"), ("LeakError", "task c: LeakError: c: looked ahead")):
        with pytest.raises(StageError, match=says):
            run_tasks(count, counted(notes, "acd", c={"raises": kind}), tmp_path / "home", compute(1 if kind == "LeakError" else 2))
        assert kind in (tmp_path / "home" / ".failed" / "c.txt").read_text().splitlines()[-1]
    assert begun(notes) == {"a": 1, "b": 1, "c": 2, "d": 1}
    assert not (tmp_path / "home" / "c").exists()


def test_only_a_changed_key_is_done_again(tmp_path: Path, notes: Path) -> None:
    home = tmp_path / "home"
    run_tasks(count, counted(notes, "abc"), home, compute())
    assert run_tasks(count, counted(notes, "abc"), home, compute())["kept"].all()
    changed = [Task("a", {"name": "a", "notes": notes}, "another data id"), *counted(notes, "bc", b={"seconds": 0.01})]
    assert list(run_tasks(count, changed, home, compute())["kept"]) == [False, False, True]
    assert begun(notes) == {"a": 2, "b": 2, "c": 1}
    moved = notes.rename(tmp_path / "elsewhere")  # a path is not part of the key
    assert list(run_tasks(count, counted(moved, "abc"), home, compute())["kept"]) == [False, False, True]


def test_two_runs_do_not_share_a_home(tmp_path: Path, notes: Path) -> None:
    import fcntl

    home = tmp_path / "home"
    home.mkdir()
    with (home / ".token").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StageError, match="another run is at work here"):
            run_tasks(count, counted(notes, "a"), home, compute())


# ------------------------------------------------------------------ memory


@pytest.mark.slow
def test_workers_stay_small_on_a_large_block(tmp_path: Path, notes: Path) -> None:
    folder = make_block(tmp_path / "block", 40, 1000, 1500)
    size = (folder / "values.npy").stat().st_size / 2**20
    tasks = [Task(s, {"block": folder, "symbol": s, "notes": notes}) for s in open_block(folder).symbols]
    run_tasks(peak, tasks, tmp_path / "home", compute(2))
    most = max(float(p.read_text()) for p in notes.iterdir())
    assert most < 200 < size, (most, size)


# ------------------------------------------------------------------ clusters


def test_a_cluster_survives_deaths_and_is_asked_what_it_is(tmp_path: Path, notes: Path, cluster: str) -> None:
    tasks = counted(notes, b={"dies": 1, "seconds": 0.2}, a={"seconds": 1.0}, c={"raises": "DataError"})
    table = run_tasks(count, tasks, tmp_path / "home", compute(1, cluster))
    assert begun(notes) == {"a": 1, "b": 2, "c": 1, "d": 1, "e": 1, "f": 1}
    assert list(table["status"]) == ["done", "done", "refused", "done", "done", "done"]
    with pytest.raises(StageError, match=r"worker tcp://127.0.0.1:\d+: runs with OMP_NUM_THREADS=2, not 3"):
        run_tasks(count, counted(notes, "x"), tmp_path / "home", compute(1, cluster, threads=3))
    assert "x" not in begun(notes)


@pytest.mark.slow
def test_a_task_that_kills_every_worker_of_a_cluster_has_failed(tmp_path: Path, notes: Path, cluster: str) -> None:
    with pytest.raises(StageError, match="task b: its worker died 3 times"):
        run_tasks(count, counted(notes, "abcd", b={"dies": 99}), tmp_path / "home", compute(1, cluster))
    assert begun(notes) == {"a": 1, "b": 3, "c": 1, "d": 1}


@pytest.mark.slow
def test_workers_that_do_not_fit_are_refused(tmp_path: Path, notes: Path) -> None:
    from distributed import LocalCluster

    def on(**options: int) -> None:
        with LocalCluster(processes=True, host="127.0.0.1", dashboard_address=":0", memory_limit=0, silence_logs=50, **options) as started:
            run_tasks(count, counted(notes, "a"), tmp_path / "home", compute(1, started.scheduler_address))

    with pytest.raises(StageError, match=r"has no workers\n.*join_cluster"):
        on(n_workers=0)
    with pytest.raises(StageError, match="does 2 tasks at once in one process"):
        on(n_workers=1, threads_per_worker=2)
    assert begun(notes) == {}


@pytest.mark.slow
def test_workers_join_from_the_command_line(tmp_path: Path, fits: list[Task]) -> None:
    from distributed import LocalCluster

    env = {k: v for k, v in os.environ.items() if k not in fixed_environment(1, 1)} | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])}
    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=":0", silence_logs=50) as started:
        code = f"from mltrading.core.tasks import join_cluster; join_cluster('{started.scheduler_address}')"
        worker = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
        try:
            params = ComputeParams.model_validate(read_yaml(Path(os.environ["MLTRADING_ROOT"]) / "params.yaml")["compute"] | {"cluster": started.scheduler_address})
            until = time.monotonic() + 60
            while not started.scheduler_info["workers"] and time.monotonic() < until:
                time.sleep(0.2)
            assert list(run_tasks(fit, fits, tmp_path / "home", params)["status"]) == ["done"] * 4 + ["refused"]
        finally:
            worker.terminate()
            worker.wait()


def test_without_the_extra_one_sentence_says_so(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ParameterError, match=r"`distributed` is not installed\n.*mltrading\[cluster\]"):
        run_tasks(count, counted(notes, "a"), tmp_path / "home", compute(1, "tcp://127.0.0.1:9"))
