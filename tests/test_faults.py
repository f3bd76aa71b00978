"""Bad input ends in one clear error with exit code 1, and what was there before is still there, whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib import rc_context

from mltrading.cli import main
from mltrading.core import runner
from mltrading.core.errors import StageError
from mltrading.core.params import read_yaml
from mltrading.core.storage import write_parquet
from mltrading.market.macro import empty_macro
from mltrading.market.news import empty_news
from mltrading.market.panel import to_frame, write_panel
from mltrading.market.simulate import random_walk

Frame = pd.DataFrame


@pytest.fixture
def shop(project: Path) -> Path:
    """A project with a small simulated snapshot and outputs of an earlier run."""
    (project / "data").mkdir()
    save(project, to_frame(random_walk(3, 400, seed=1, ragged=False)))
    write_parquet(empty_macro(), project / "data" / "macro.parquet")
    write_parquet(empty_news(), project / "data" / "news.parquet")
    write_parquet(pd.DataFrame({"symbol": pd.Series(dtype=str)}), project / "data" / "removed.parquet")
    (project / "data" / "manifest.json").write_text(json.dumps({"source": "simulated", "sets": {"daily": {"frequency": "1d", "calendar": "24/5"}}, "symbols": {f"S{i:03d}": {"name": f"S{i:03d}", "class": "simulated", "role": "traded"} for i in range(3)}}))
    change(project, lambda p: p["systems"]["multiasset"]["panel"].update(benchmark=None))
    change(project, lambda p: p["profiles"].update(smoke={"multiasset": {}}))
    old = project / "build" / "smoke" / "multiasset" / "panel"
    old.mkdir(parents=True)
    (old / "panel.parquet").write_text("an earlier output")
    return project


def save(project: Path, frame: Frame) -> None:
    write_parquet(frame, project / "data" / "bars" / "daily.parquet")


def change(project: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text())
    edit(params)
    path.write_text(yaml.safe_dump(params))


def fails(project: Path, capsys: pytest.CaptureFixture[str], *says: str, stage: str = "panel", system: str = "multiasset") -> None:
    """The stage ends with exit code 1, says all of that, and leaves the earlier output alone."""
    assert main(["stage", stage, system, "--profile", "smoke"]) == 1
    message = capsys.readouterr().err
    for words in ("error: ", "→", *says):
        assert words in message, message
    assert "Traceback" not in message
    assert (project / "build" / "smoke" / "multiasset" / "panel" / "panel.parquet").read_text() == "an earlier output"
    staging = project / "build" / ".staging"
    assert not staging.exists() or not list(staging.iterdir())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's cells run in this process, and what they raise is told as the runner tells it. The way through a kernel is the same for all of them: other tests go it."""
    def execute(notebook: Path, passed: dict[str, Any], env: dict[str, str], keep: Path) -> None:
        monkeypatch.setenv("MLTRADING_STAGING", env["MLTRADING_STAGING"])
        scope: dict[str, Any] = {"__name__": "__main__"}
        try:
            with rc_context():
                for cell in nbformat.read(notebook, as_version=4).cells:
                    if cell.cell_type == "code":
                        exec(cell.source, scope)
                        scope |= passed if "parameters" in cell.metadata.get("tags", []) else {}
        except Exception as e:
            raise StageError(f"stage {keep.stem}", runner.explain(SimpleNamespace(ename=type(e).__name__, evalue=e, cell_index=0, traceback=["Traceback"]), notebook.name, str(keep)), "") from None
        raise AssertionError("no cell raised")

    monkeypatch.setattr(runner, "execute", execute)


def bars(edit: Callable[[Frame], Frame]) -> Frame:
    return edit(to_frame(random_walk(3, 400, seed=1, ragged=False)))


def at(column: str, row: int, value: float) -> Callable[[Frame], Frame]:
    return lambda f: f.assign(**{column: f[column].where(f.index != row, value)})


CASES: dict[str, tuple[Callable[[Frame], Frame], tuple[str, ...]]] = {
    "missing column": (lambda f: f.drop(columns="close"), ("daily.parquet", "column `close`", "is missing")),
    "duplicate bar": (lambda f: pd.concat([f, f.iloc[[-1]]], ignore_index=True), ("daily.parquet", "row 1200 (S002 at", "a second bar")),
    "negative price": (at("close", 7, -3.5), ("daily.parquet", "column `close`", "row 7 (S001 at", "-3.5")),
    "NaN price": (at("close", 8, np.nan), ("daily.parquet", "column `close`", "row 8 (S002 at", "nan")),
    "unsorted times": (lambda f: f.iloc[::-1].reset_index(drop=True), ("daily.parquet", "column `timestamp`", "row 1 (", "not sorted")),
    "naive times": (lambda f: f.assign(timestamp=f["timestamp"].dt.tz_localize(None)), ("daily.parquet", "column `timestamp`", "without a zone")),
    "empty panel": (lambda f: f.iloc[:0], ("daily.parquet", "holds no bars")),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_bars(shop: Path, here: None, capsys: pytest.CaptureFixture[str], case: str) -> None:
    edit, says = CASES[case]
    save(shop, bars(edit))
    fails(shop, capsys, *says)


def test_a_price_that_stands_still_stops_nothing(shop: Path) -> None:
    save(shop, bars(lambda f: f.assign(**{c: np.where(f["symbol"] == "S001", 10.0, f[c]) for c in ("open", "high", "low", "close")})))
    assert main(["stage", "panel", "multiasset", "--profile", "smoke"]) == 0
    said = (shop / "build" / "smoke" / "multiasset" / "notebooks" / "panel.html").read_text()
    assert "dead" in said
    assert "the price never changes" in said


def test_file_cut_short(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shop / "data" / "bars" / "daily.parquet"
    path.write_bytes(path.read_bytes()[:2000])
    fails(shop, capsys, "daily.parquet", "not a complete Parquet file")


def test_unknown_parameter_in_a_block(shop: Path, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    change(shop, lambda p: p["systems"]["multiasset"]["panel"].update(symbol="all"))
    fails(shop, capsys, "systems.multiasset.panel: unknown parameter `symbol`", "did you mean `symbols`?")


@pytest.mark.parametrize(("name", "says"), [("smoke", "universes.smoke: is no name for a universe"), ("multiasset", "universes.multiasset: is no name"), ("../elsewhere", "is no name for a universe")])
def test_a_universe_that_would_lie_in_the_way(shop: Path, capsys: pytest.CaptureFixture[str], name: str, says: str) -> None:
    change(shop, lambda p: p.update(universes={name: {"tables": {"mine": {"symbols": "all"}}, "kind": "stock", "symbols": {}, "caution": ""}}))
    fails(shop, capsys, says)


def test_a_misspelt_role_in_a_universe(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(shop, lambda p: p["universes"]["sp500"].update(symbols={"AAPL": {"rol": "benchmark"}}))
    fails(shop, capsys, "universes.sp500.symbols.AAPL: unknown parameter `rol`", "did you mean `role`?")


def test_unknown_block(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(shop, lambda p: p["systems"]["multiasset"].update(polcy={"max_weight": 1}))
    fails(shop, capsys, "params.yaml: systems.multiasset: unknown parameter block `polcy`", "did you mean `policy`?")


@pytest.mark.parametrize(("edit", "says"), [
    (lambda p: p["compute"].update(thread=3), "compute: unknown parameter `thread`"),
    (lambda p: p["compute"].update(threads="two"), "compute.threads: 'two' is not allowed"),
    (lambda p: p["run"].update(profile="smoke"), "run.profile: `smoke` runs beside the pipeline"),
    (lambda p: p["run"].update(systems=["multiaset"]), "run.systems: unknown system `multiaset`"),
    (lambda p: p["systems"].update(multiasset=None), "systems.multiasset: is missing"),
    (lambda p: p["systems"]["multiasset"].update(policy=None), "systems.multiasset.policy: is missing"),
    (lambda p: p["profiles"].update(smoke=["a"]), "profiles.smoke: is ['a'], not a block"),
])
def test_parts_of_the_parameter_file(shop: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[dict[str, Any]], Any], says: str) -> None:
    change(shop, edit)
    fails(shop, capsys, says)


def test_value_out_of_range(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(shop, lambda p: p["systems"]["multiasset"]["panel"].update(start="soon"))
    fails(shop, capsys, "systems.multiasset.panel.start: 'soon' is not allowed")


def test_unknown_system(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fails(shop, capsys, "unknown system `multiaset`", "did you mean `multiasset`?", system="multiaset")


def test_unknown_symbol(shop: Path, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    change(shop, lambda p: p["systems"]["multiasset"]["panel"].update(symbols=["S0001"]))
    fails(shop, capsys, "unknown symbol `S0001`", "did you mean `S001`?")


def test_fewer_bars_than_a_warm_up(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(shop, to_frame(random_walk(3, 40, seed=1, ragged=False)))
    assert main(["stage", "panel", "multiasset", "--profile", "smoke"]) == 0
    (shop / "build" / "smoke" / "multiasset" / "features").mkdir()
    (shop / "build" / "smoke" / "multiasset" / "features" / "old.txt").write_text("old")
    params = (shop / "params.yaml").read_text()
    (shop / "params.yaml").unlink()
    (shop / "params.yaml").write_text(re.sub(r"names: all\b.*", "names: [ret_1d, ret_252d]", params))
    capsys.readouterr()
    assert main(["stage", "features", "multiasset", "--profile", "smoke"]) == 1
    message = capsys.readouterr().err
    assert "fewer bars than a warm-up" in message, message
    assert "the longest history has 40" in message
    assert (shop / "build" / "smoke" / "multiasset" / "features" / "old.txt").read_text() == "old"


def test_input_that_moves_while_a_stage_runs(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The notebook of this project appends to its own input."""
    (shop / "nbs").unlink()
    (shop / "nbs" / "pipeline").mkdir(parents=True)
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, "cells": [
        {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "outputs": [], "execution_count": None, "source": "system = 'x'\nprofile = 'smoke'"},
        {"cell_type": "code", "id": "b", "metadata": {}, "outputs": [], "execution_count": None, "source": f"open({str(shop / 'data' / 'manifest.json')!r}, 'a').write(' ')"}]}
    (shop / "nbs" / "pipeline" / "10_panel.ipynb").write_text(json.dumps(notebook))
    fails(shop, capsys, "data: changed while stage panel@multiasset was reading it")


@pytest.mark.parametrize("command", [["stage", "panel", "multiasset", "--profile", "etf230"], ["run", "multiasset", "--profile", "etf230"], ["run", "--symbols", "SPY", "--profile", "etf230"]])
def test_a_universe_without_its_snapshot(shop: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """The prices of the project are there; those of the universe are not, and `make repro` would not bring them."""
    assert main(command) == 1
    message = capsys.readouterr().err
    assert "build/etf230/data" in message, message
    assert "→ run `MLTRADING_DATA=… make universe NAME=etf230`" in message, message
    assert "make repro" not in message


@pytest.mark.parametrize("command", [["stage", "features", "multiasset", "--profile", "etf230"], ["run", "--symbols", "SPY", "--profile", "etf230"]])
def test_parameters_are_read_once(shop: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    """What a command is told at its beginning holds until its end."""
    seen = []

    def counted(path: str | Path) -> dict[str, Any]:
        seen.append(Path(path).name)
        return read_yaml(path)

    for module in ("params", "stage"):
        monkeypatch.setattr(f"mltrading.core.{module}.read_yaml", counted)
    assert main(command) == 1
    assert seen.count("params.yaml") == 1


def test_an_interrupt_is_one_sentence(shop: Path) -> None:
    """Control-C while a notebook computes."""
    (shop / "nbs").unlink()
    (shop / "nbs" / "pipeline").mkdir(parents=True)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("system = 'x'\nprofile = 'smoke'", metadata={"tags": ["parameters"]}),
                                               nbformat.v4.new_code_cell(f"import pathlib, time\npathlib.Path({str(shop / 'begun')!r}).touch()\ntime.sleep(600)")], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(notebook, shop / "nbs" / "pipeline" / "10_panel.ipynb")
    ran = subprocess.Popen([sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from mltrading.cli import main; sys.exit(main(['stage', 'panel', 'multiasset', '--profile', 'smoke']))"],
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (shop / "begun").exists() and ran.poll() is None:
        time.sleep(0.05)
    assert ran.poll() is None, ran.communicate()
    os.killpg(ran.pid, signal.SIGINT)  # as a terminal does, to all of its foreground processes
    message = ran.communicate(timeout=300)[1]
    assert (ran.returncode, message) == (1, "error: stage panel@multiasset: was interrupted\n  → its outputs are as they were; run it again\n")
    assert (shop / "build" / "smoke" / "multiasset" / "panel" / "panel.parquet").read_text() == "an earlier output"


def test_an_interrupt_between_stages_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mltrading.core.pipeline.repro", interrupted)
    assert main(["repro"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_scorer_without_news(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(shop, lambda p: p["systems"]["multiasset"]["features"].update(sentiment="vader"))
    write_panel(random_walk(3, 400, seed=1, ragged=False), shop / "build" / "smoke" / "multiasset" / "panel" / "panel.parquet")
    for name, table in (("macro", empty_macro()), ("news", empty_news())):
        write_parquet(table, shop / "build" / "smoke" / "multiasset" / "panel" / f"{name}.parquet")
    assert main(["stage", "features", "multiasset", "--profile", "smoke"]) == 1
    assert "features.sentiment: `vader` has nothing to read: the prices come without news" in capsys.readouterr().err


def test_notebook_without_its_tag(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "nbs").unlink()
    (shop / "nbs" / "pipeline").mkdir(parents=True)
    (shop / "nbs" / "pipeline" / "10_panel.ipynb").write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []}))
    fails(shop, capsys, "nbs/pipeline/10_panel.ipynb", "0 cells are tagged `parameters`")
