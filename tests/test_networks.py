"""Networks in the pipeline: windows that do not look ahead, a training that is really killed, folders, and the table of kinds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mltrading.core.errors import DataError, ParameterError
from mltrading.models.conformance import planted
from mltrading.models.zoo import KINDS, build, load_forecaster, model_class, spec
from mltrading.systems.lessons import Rows
from mltrading.systems.strategies import Learner, Strategy
from mltrading.systems.walk import walk
from mltrading.validation.splits import WalkForward

STEPS = 6
QUICK = {"steps": STEPS, "units": 4, "backbone": [4], "train": {"epochs": 5, "batch_size": 128, "learning_rate": 0.01, "patience": 2}}


CFC = Learner(Strategy(model="cfc", horizon_bars=2, target="ret_voladj", scope="pooled", row_step=1), spec("cfc", QUICK), 0, 1)


def a_network(seed: int = 0):
    return build("cfc", QUICK, seed, purge_bars=2)


@pytest.fixture(scope="module")
def data():
    return planted(1200, seed=1, steps=STEPS)


def test_every_kind_is_there_and_refuses_what_it_does_not_know():
    for kind in KINDS:
        assert model_class(kind).__name__ == KINDS[kind].split(":")[1]
        with pytest.raises(ParameterError, match=r"unknown parameter `no_such`|is missing"):
            build(kind, {"no_such": 1}, 0)


def market(seed: int, changed_from: int | None = None) -> Rows:
    """Three symbols over 300 days; from a day on, everything is different."""
    rng = np.random.default_rng(seed)
    days = pd.date_range("2020-01-01", periods=300, tz="UTC").as_unit("us")
    keys = pd.DataFrame({"timestamp": days.repeat(3), "symbol": ["A", "B", "C"] * 300})
    x, y = rng.standard_normal((900, 4)).astype(np.float32), rng.standard_normal(900)
    if changed_from is not None:
        x[3 * changed_from :], y[3 * changed_from :] = 7, np.abs(y[3 * changed_from :])
    start = keys["timestamp"]
    labels = pd.DataFrame({"symbol": keys["symbol"], "start": start, "end": start + pd.Timedelta(days=2), "ret": 0.01 * y, "ret_voladj": y})
    return Rows(keys, pd.DataFrame(x, columns=list("abcd")), {2: labels}, np.full(900, 0.01))


def test_a_network_in_a_walk_does_not_look_ahead(tmp_path):
    one = market(0)
    folds = WalkForward(100, 50, 2).folds(one.times, one.end)[:2]
    other = market(0, int(np.flatnonzero(one.times >= folds[1].test_start).min()) // 3)  # all is different from the first test row on
    made = [walk(d, folds, {"cfc": CFC}, tmp_path / name) for name, d in (("one", one), ("other", other))]
    first = [m.forecasts[m.forecasts["fold"] == 0] for m in made]
    pd.testing.assert_frame_equal(first[0], first[1])
    assert not made[0].forecasts.equals(made[1].forecasts)
    for fold in ("fold_000", "fold_001"):
        assert (tmp_path / "one/cfc" / fold / "model.json").read_bytes() == (tmp_path / "other/cfc" / fold / "model.json").read_bytes()


def test_a_window_is_the_past_of_its_symbol_in_a_walk(tmp_path):
    one = market(0)
    folds = WalkForward(100, 50, 2).folds(one.times, one.end)[:1]
    last = one.features.copy()
    shown = folds[0].test
    last.iloc[shown.max()] += 3  # the very last row of the window that is forecast, of symbol C
    made = [walk(d, folds, {"cfc": CFC}, tmp_path / name).forecasts for name, d in (("one", one), ("two", Rows(one.keys, last, one.labels, one.sigma)))]
    differs = (made[0]["prob_up"] != made[1]["prob_up"]).to_numpy()
    assert differs.sum() == 1
    assert made[0].loc[differs, ["timestamp", "symbol"]].to_numpy().tolist() == [one.keys.iloc[shown.max()].tolist()]


def test_a_damaged_network_is_refused(tmp_path, data):
    a_network().fit(data.X, data.y, data.weight, data.times).save(tmp_path / "m")
    weights = tmp_path / "m" / "weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-4], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        with pytest.raises(DataError, match="was changed since it was written"):
            load_forecaster(tmp_path / "m")
    weights.write_bytes(whole)
    load_forecaster(tmp_path / "m")


def test_extreme_scales_and_silence_are_handled(data):
    from dataclasses import replace

    scaled = replace(data.X, block=data.X.block * np.array([1e-30, 1e30, 1, 1, 1, 1, 0, np.nan], np.float32))
    out = a_network().fit(scaled, data.y, data.weight, data.times).predict(scaled)
    assert np.isfinite(out.to_numpy()).all()


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_networks import a_network, data_for_kill
d = data_for_kill()
model = a_network().resumable(sys.argv[1])
def tell(epoch):
    print("epoch", epoch.number, flush=True)
    if sys.argv[2] == "slowly" and epoch.number == 2:
        time.sleep(60)
model.on_epoch = tell
model.fit(d.X, d.y, d.weight, d.times).save(sys.argv[3])
"""


def data_for_kill():
    return planted(1200, seed=1, steps=STEPS)


@pytest.mark.slow
def test_a_training_that_is_killed_ends_with_the_same_bits(tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent))

    def run(*more: str) -> list[str]:
        return [sys.executable, "-c", script, str(tmp_path / "part"), *more]

    process = subprocess.Popen(run("slowly", str(tmp_path / "never")), stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    assert [process.stdout.readline().strip() for _ in range(2)] == ["epoch 1", "epoch 2"]
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "never").exists()
    resumed = subprocess.run(run("at once", str(tmp_path / "resumed")), check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert resumed[:2] == ["epoch", "3"]
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "other"), "at once", str(tmp_path / "whole")], check=True)
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert all((tmp_path / "resumed" / f).read_bytes() == (tmp_path / "whole" / f).read_bytes() for f in files)
