"""Snapshots: the embedded one is what data.dvc locks, and no kill at any instant costs anybody the old one."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import yaml
from replay import Market, Replay, stooq

from mltrading.cli import main
from mltrading.core.errors import DataError
from mltrading.core.params import read_yaml
from mltrading.core.storage import write_parquet
from mltrading.market.feeds import MACRO_SOURCES
from mltrading.market.macro import empty_macro
from mltrading.market.panel import to_frame
from mltrading.market.prices import PRICE_SOURCES, Stooq
from mltrading.market.quality import examine, strict
from mltrading.market.request import from_embedded
from mltrading.market.simulate import random_walk
from mltrading.market.snapshot import read_snapshot


def locked(root: Path) -> dict[str, str]:
    """File name to md5 as the remote's directory listing says."""
    name = read_yaml(root / "data.dvc")["outs"][0]["md5"]
    listing = json.loads((root / ".dvc" / "remote" / "files" / "md5" / name[:2] / name[2:]).read_text())
    return {item["relpath"]: item["md5"] for item in listing}


def md5s(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.md5(p.read_bytes(), usedforsecurity=False).hexdigest() for p in folder.rglob("*") if p.is_file()}


def test_rebuilt_snapshot_has_the_locked_bytes(root: Path, embedded_data: Path) -> None:
    assert md5s(embedded_data) == locked(root)


def test_remote_inside_the_repository_holds_it_and_is_small(root: Path) -> None:
    remote = root / ".dvc" / "remote" / "files" / "md5"
    for md5 in locked(root).values():
        assert hashlib.md5((remote / md5[:2] / md5[2:]).read_bytes(), usedforsecurity=False).hexdigest() == md5
    assert sum(p.stat().st_size for p in remote.rglob("*") if p.is_file()) < 12e6


def test_every_upstream_file_stands_in_the_manifest() -> None:
    for item in from_embedded({}).manifest["files"].values():
        assert len(item["sha256"]) == 64
        assert item["version"]
        assert item["licence"]


def test_dvc_file_is_plain(root: Path) -> None:
    assert list(yaml.safe_load((root / "data.dvc").read_text())) == ["outs"]


# ------------------------------------------------------------------------------------------------ own files, from the command line


@pytest.fixture(scope="module")
def under_dvc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What DVC writes into a new project; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("dvc")
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True)
    return folder


@pytest.fixture
def shop(project: Path, under_dvc: Path) -> Path:
    """A project under DVC, with a folder of bars of one's own beside it."""
    shutil.copytree(under_dvc, project, dirs_exist_ok=True)
    (project.parent / "mine").mkdir()
    write_parquet(to_frame(random_walk(3, 250, seed=1, ragged=False)), project.parent / "mine" / "prices.parquet")
    return project


def test_own_files_become_a_locked_snapshot(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--source", "folder", "--from", str(shop.parent / "mine"), "--calendar", "24/5", "--stamp", "close"]) == 0
    said = capsys.readouterr().out
    assert "daily: 750 bars of 3 symbols" in said
    assert "quality: the rules found nothing" in said
    assert read_snapshot(shop / "data").store("daily").panel().symbols == ("S000", "S001", "S002")
    assert read_yaml(shop / "data.dvc")["outs"][0]["md5"].endswith(".dir")
    before = md5s(shop / "data")
    assert main(["data", "--source", "folder", "--from", str(shop.parent / "mine"), "--calendar", "24/5", "--stamp", "close"]) == 0
    assert md5s(shop / "data") == before


@pytest.mark.parametrize(("options", "says"), [
    (["--source", "yahoo"], "unknown source `yahoo`"),
    (["--source", "stooq", "--symbols", "SPY", "--start", "tomorrow"], "make data.start: 'tomorrow' is not allowed"),
    (["--source", "stooq", "--symbols", "SPY"], "add START="),
    (["--source", "folder", "--from", "MINE", "--policy", "jumps=fail"], "unknown rule `jumps`"),
    (["--source", "folder", "--from", "MINE", "--policy", "jump"], "write POLICY=jump=drop"),
    (["--source", "folder", "--from", "MINE", "--manifest", "nowhere.json"], "look at the path after MANIFEST="),
    (["--source", "folder", "--from", "MINE", "--policy", "gaps=fail", "--calendar", "24/7", "--stamp", "close"], "rule `gaps`"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_and_nothing_is_lost(shop: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str) -> None:
    (shop / "data").mkdir()
    (shop / "data" / "manifest.json").write_text("an earlier snapshot")
    assert main(["data", *[str(shop.parent / "mine") if o == "MINE" else o for o in options]]) == 1
    message = capsys.readouterr().err
    assert says in message
    assert "→" in message
    assert "Traceback" not in message
    assert md5s(shop / "data") == {"manifest.json": hashlib.md5(b"an earlier snapshot", usedforsecurity=False).hexdigest()}


# ------------------------------------------------------------------------------------------------ kills

SYMBOLS = ["AAA.US", *(f"S{i:02d}.US" for i in range(19))]

# the real command, which asks a server of this computer instead of the real one
COMMAND = """
import sys
from functools import partial
from mltrading.market import prices
prices.PRICE_SOURCES["stooq"] = partial(prices.Stooq, base_url=sys.argv[1], per_minute=60_000, backoff_s=0.01)
from mltrading.cli import main
print("go", flush=True)
sys.exit(main(["data", "--source", "stooq", "--symbols", sys.argv[2], "--start", "2024-03-01", "--end", sys.argv[3]]))
"""


class Slow(Market):
    """A market that knows all symbols and takes its time."""

    def days(self, *span: object) -> list[object]:
        time.sleep(0.01)
        return super().days(*span)  # type: ignore[arg-type, return-value]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replay]:
    monkeypatch.setattr("replay.KNOWN", {s.lower() for s in SYMBOLS})
    with Replay([stooq(Slow())]) as server:
        yield server


def start(shop: Path, service: Replay, end: str) -> subprocess.Popen[str]:
    env = {**os.environ, "MLTRADING_ROOT": str(shop), "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", COMMAND, service.url, ",".join(SYMBOLS), end], cwd=shop, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    return process


def killed_at_random(shop: Path, service: Replay, kills: int) -> None:
    """A first snapshot; then commands that ask for another one are killed, one in each part of a run's span; then one is let through."""
    rng = random.Random(1)
    first, began = start(shop, service, "2024-03-08"), time.monotonic()
    _, err = first.communicate()
    assert first.returncode == 0, err
    span, finished = time.monotonic() - began, 0
    for k in range(kills):
        before, asked = md5s(shop / "data"), rng.choice(["2024-03-11", "2024-03-12", "2024-11-27", "2024-11-29"])
        process = start(shop, service, asked)
        time.sleep((k + rng.random()) / kills * span)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        market = read_snapshot(shop / "data")
        if md5s(shop / "data") != before:
            finished += 1
            assert market.manifest["request"]["end"] == asked
        panel = market.store("daily").panel()
        assert panel.symbols == tuple(sorted(SYMBOLS))
        assert panel.alive.sum() == market.manifest["sets"]["daily"]["rows"]
    assert finished < kills
    last = start(shop, service, "2024-12-02")
    out, err = last.communicate()
    assert last.returncode == 0, err
    assert f"daily: {7 * len(SYMBOLS)} bars of {len(SYMBOLS)} symbols" in out
    assert read_snapshot(shop / "data").store("daily").panel().alive.all()
    assert [p.name for p in shop.iterdir() if p.name.startswith(".data")] == []


@pytest.mark.slow
def test_twenty_kills_leave_a_whole_snapshot(shop: Path, service: Replay) -> None:
    killed_at_random(shop, service, kills=20)


def test_an_interrupted_download_goes_on_where_it_was(shop: Path, service: Replay) -> None:
    process = start(shop, service, "2024-03-12")
    while len(service.asked) < 8:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (shop / "data").exists()
    come = len(list((shop / ".cache" / "stooq-XNYS" / "1d").glob("*.json")))
    assert come >= 6
    before = len(service.asked)
    again = start(shop, service, "2024-03-12")
    again.communicate()
    assert again.returncode == 0
    assert len(service.asked) - before == len(SYMBOLS) - come


def test_a_policy_holds_for_the_stages_too(shop: Path) -> None:
    """What `make data` was told to keep, the panel stage does not refuse."""
    still = to_frame(random_walk(3, 250, seed=1, ragged=False))
    still.loc[still["symbol"] == "S001", ["open", "high", "low", "close"]] = 10.0
    write_parquet(still, shop.parent / "mine" / "prices.parquet")
    asked = ["data", "--source", "folder", "--from", str(shop.parent / "mine"), "--calendar", "24/5", "--stamp", "close"]
    assert main([*asked, "--policy", "dead=flag"]) == 0
    market = read_snapshot(shop / "data")
    frame = to_frame(market.store("daily").panel())
    assert set(frame["symbol"]) == {"S000", "S001", "S002"}
    assert not len(examine(frame, "irregular", None, strict(market.manifest["policies"])).removed)
    with pytest.raises(DataError, match="rule `dead`"):
        examine(frame, "irregular", None, strict({}))
    assert main(asked) == 0
    assert read_snapshot(shop / "data").store("daily").symbols == ("S000", "S002")


@pytest.mark.parametrize(("macro", "says"), [("fred:CPI,CPI", ""), ("fried:CPI", "did you mean `fred`"), ("fred:", "does not say what to ask for")])
def test_a_macro_request(shop: Path, service: Replay, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, macro: str, says: str) -> None:
    asked: list[str] = []

    class Source:
        name = "fred"

        def macro(self, series: str, start: date, end: date) -> pd.DataFrame:
            asked.append(series)
            return empty_macro()

    monkeypatch.setitem(MACRO_SOURCES, "fred", Source)
    monkeypatch.setitem(PRICE_SOURCES, "stooq", partial(Stooq, base_url=service.url, per_minute=60_000))
    done = main(["data", "--source", "stooq", "--symbols", "AAA.US", "--start", "2024-03-01", "--end", "2024-03-12", "--macro", macro])
    assert done == (1 if says else 0)
    assert says in capsys.readouterr().err
    assert asked == ([] if says else ["CPI"])


def test_a_bar_that_has_not_happened_is_refused(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = to_frame(random_walk(1, 250, seed=1, ragged=False))
    frame.loc[frame.index[-1], "timestamp"] = pd.Timestamp.now(tz="UTC").normalize() + pd.Timedelta(days=400)
    write_parquet(frame, shop.parent / "mine" / "prices.parquet")
    assert main(["data", "--source", "folder", "--from", str(shop.parent / "mine"), "--calendar", "24/7", "--stamp", "close"]) == 1
    assert "a bar that has not happened yet" in capsys.readouterr().err
    assert not (shop / "data").exists()
