"""The embedded snapshot is what data.dvc locks, wherever and whenever it is built."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mltrading.core.params import read_yaml
from mltrading.market.snapshot import from_embedded, read_snapshot, recover, write_snapshot


def locked(root: Path) -> dict[str, str]:
    """File name to md5 as the remote's directory listing says."""
    name = read_yaml(root / "data.dvc")["outs"][0]["md5"]
    listing = json.loads((root / ".dvc" / "remote" / "files" / "md5" / name[:2] / name[2:]).read_text())
    return {item["relpath"]: item["md5"] for item in listing}


def md5s(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.md5(p.read_bytes(), usedforsecurity=False).hexdigest() for p in folder.iterdir()}


def test_rebuilt_snapshot_has_the_locked_bytes(root: Path, tmp_path: Path) -> None:
    write_snapshot(from_embedded(), tmp_path / "data")
    assert md5s(tmp_path / "data") == locked(root)


def test_remote_inside_the_repository_holds_it_and_is_small(root: Path) -> None:
    remote = root / ".dvc" / "remote" / "files" / "md5"
    for md5 in locked(root).values():
        assert hashlib.md5((remote / md5[:2] / md5[2:]).read_bytes(), usedforsecurity=False).hexdigest() == md5
    assert sum(p.stat().st_size for p in remote.rglob("*") if p.is_file()) < 12e6


def test_every_upstream_file_stands_in_the_manifest(tmp_path: Path) -> None:
    manifest = from_embedded().manifest
    for item in manifest["files"].values():
        assert len(item["sha256"]) == 64
        assert item["version"]
        assert item["licence"]


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1])
def test_a_kill_leaves_the_old_snapshot_or_the_new(tmp_path: Path, delay: float) -> None:
    folder = tmp_path / "data"
    write_snapshot(from_embedded(), folder)
    before = md5s(folder)
    code = f"from mltrading.market.snapshot import *\ns = from_embedded()\nprint('go', flush=True)\nwhile True: write_snapshot(s, {str(folder)!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    recover(folder)
    assert md5s(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert len(read_snapshot(folder).panel.symbols) == 28


def test_dvc_file_is_plain(root: Path) -> None:
    assert list(yaml.safe_load((root / "data.dvc").read_text())) == ["outs"]
