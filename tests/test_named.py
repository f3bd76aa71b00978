"""A named universe from a vendor's files to its report: faulty rows are taken out by rule, sick symbols keep their rows, the project's own results stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from mltrading.cli import main
from mltrading.core.storage import content_id, read_json, read_parquet
from mltrading.market.macro import as_of
from mltrading.market.panel import read_panel, to_frame
from mltrading.market.simulate import regime_market
from mltrading.systems.run import run_multi_asset

pytestmark = pytest.mark.slow  # all stages run

WELL, SICK = ["AAA", "BBB", "CCC", "DDD"], ["DEAD", "EARLY", "ENDS", "SHORT", "STILL"]
START, BARS = "2013-01-02", 1500  # of the bars; the system looks at those from 2014 on
CHANGES: dict[str, Any] = {
    "panel": {"symbols": [*WELL, *SICK], "benchmark": "SPY", "start": "2014-01-02"},
    "features": {"names": ["ret_1d", "ret_5d", "rsi_14", "vol_20d"], "benchmark": "SPY"},
    "labels": {"horizons": [5]},
    "validation": {"train_bars": 400, "test_bars": 250},
    "selection": {"max_features": 4},
    "strategies": dict.fromkeys(["voladj", "day1", "day3", "day5"]) | {"own": {"model": "logistic"}},
    "choice": {"among": ["logistic", "own"]},
    "models": {"xgboost": {"n_estimators": 10}},
    "report": {"n_boot": 100, "draws": 20, "shap_rows": 50, "published": {"source": "Nobody.", "assets": {"BBB": {"strategy": "5-day", "sharpe": 4.193, "total_return": 0.63, "accuracy": 0.607, "max_drawdown": -0.111}}}},
}
UNIVERSE = {"tables": {"vendor": {"symbols": "all"}}, "kind": "stock", "symbols": {"CCC": {"class": "commodity"}, "SPY": {"role": "benchmark"}}, "macro": {"VIXCLS": {"table": "figures"}, "X": {"table": "figures", "series": "^X", "lag": {"days": 1, "clock": "12:00"}}}, "caution": "Made up."}


def vendor() -> pd.DataFrame:
    """Bars as a vendor writes them, with what can be wrong about them."""
    bars = to_frame(regime_market(n_symbols=10, n_bars=BARS, seed=5, start=START)[0])
    bars = bars.assign(symbol=bars["symbol"].map(dict(zip(sorted(bars["symbol"].unique()), [*WELL, *SICK, "SPY"], strict=True))), timestamp=bars["timestamp"].dt.tz_localize(None).dt.normalize())
    prices, day = ["open", "high", "low", "close"], bars["timestamp"]
    bars.loc[bars["symbol"] == "DEAD", prices] = 7.0                                  # on all days: a rule takes it out
    bars.loc[(bars["symbol"] == "STILL") & (day >= "2014-01-02"), prices] = 9.0       # it moved once
    bars.loc[(bars["symbol"] == "AAA") & (day == day.unique()[700]), "low"] = 0.0     # a fault
    ends, last = day.unique()[900], day.unique()[-100]
    gone = ((bars["symbol"] == "EARLY") & (day >= "2014-01-02")) | ((bars["symbol"] == "ENDS") & (day > ends)) | ((bars["symbol"] == "SHORT") & (day < last))
    return bars[~gone].sort_values(["symbol", "timestamp"], ignore_index=True)


def figures() -> pd.DataFrame:
    """Two series, each value the number of its day."""
    days = pd.bdate_range(START, periods=BARS + 100)
    return pd.concat([pd.DataFrame({"timestamp": days, "series": name, "value": np.arange(float(len(days)))}) for name in ("VIXCLS", "^X", "other")], ignore_index=True)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, new_project: Callable[[Path], Path]) -> Path:
    """A project after `mltrading universe mine`."""
    top = tmp_path_factory.mktemp("named")
    project = new_project(top / "project")
    for name, table in (("bars/vendor", vendor()), ("macro/figures", figures())):
        (top / name).parent.mkdir()
        table.to_parquet(top / f"{name}.parquet")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["profiles"], params["universes"] = {"default": {}, "mine": {"multiasset": CHANGES}}, {"mine": UNIVERSE}
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLTRADING_ROOT", str(project))
        patch.setenv("MLTRADING_DATA", str(top))
        assert main(["universe", "mine"]) == 0
    return project


@pytest.fixture(scope="module")
def numbers(ran: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(ran / "build" / "mine" / "reports" / "metrics" / "multiasset.json")
    return found


def test_all_of_it_stands_beside_the_project(ran: Path) -> None:
    assert {p.name for p in ran.iterdir()} == {"params.yaml", "dvc.yaml", "constraints.txt", "nbs", "mltrading", "build"}
    assert {p.name for p in (ran / "build").iterdir()} <= {"mine", "failed", ".staging"}
    assert {p.name for p in (ran / "build" / "mine" / "reports").glob("*.html")} == {"data.html", "features.html", "index.html", "multiasset.html"}


def test_rules_took_out_what_is_impossible(ran: Path) -> None:
    removed = read_parquet(ran / "build" / "mine" / "data" / "removed.parquet")
    assert removed.groupby(["symbol", "rule"]).size().to_dict() == {("AAA", "not_positive"): 1, ("DEAD", "dead"): BARS}


def test_macro_values_come_no_sooner_than_they_were_public(ran: Path) -> None:
    """One series at a quarter past four, after the close; one at noon of the next day: at a close neither has that day's value."""
    panel, macro = (ran / "build" / "mine" / "multiasset" / "panel" / f"{name}.parquet" for name in ("panel", "macro"))
    times = read_panel(panel).index
    known = as_of(read_parquet(macro), times)
    assert list(known) == ["VIXCLS", "X"]
    day = pd.Series(np.arange(float(BARS + 100)), pd.bdate_range(START, periods=BARS + 100))
    today = day.reindex(times.tz_localize(None).normalize()).to_numpy()
    lag = today[:, None] - known.to_numpy()
    assert np.nanmin(lag) == 1
    assert (lag[:, 0] == 1).all()
    assert set(np.unique(lag[:, 1])) == {1.0}


def test_sick_symbols_are_in_the_table_with_the_reason(numbers: dict[str, Any]) -> None:
    told = {s: row["reason"] for s, row in numbers["assets"].items()}
    assert sorted(told) == sorted([*WELL, *SICK])
    assert told["DEAD"] == told["EARLY"] == "no data"
    assert told["STILL"].startswith("its price is 9 on all ")
    assert "inside fold 0" in told["ENDS"]
    assert told["SHORT"].startswith(("no forecast", "100 bars", "99 bars", "39 bars"))
    assert all(numbers["assets"][s]["sharpe"] is not None for s in WELL)
    assert {row["class"] for s, row in numbers["assets"].items() if s in WELL} == {"stock", "commodity"}


def test_the_published_numbers_stand_beside_ours(ran: Path, numbers: dict[str, Any]) -> None:
    page = (ran / "build" / "mine" / "reports" / "multiasset.html").read_text()
    assert "Beside what was published" in page
    assert "+4.19" in page
    assert f"{numbers['assets']['BBB']['sharpe']:+.2f}".replace("-", "−") in page


def test_the_rest_is_as_without_them(ran: Path, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one asset, and what they earned on it, do not know who else is there."""
    monkeypatch.setenv("MLTRADING_ROOT", str(ran))
    alone = {"choice": {"among": ["own"]}, "panel": {"benchmark": "SPY"}}
    few, many = (run_multi_asset(symbols, ran / "build" / "mine" / "data", changes=alone, profile="mine").table for symbols in (WELL, [*WELL, *SICK, "NONE"]))
    pd.testing.assert_frame_equal(few.loc[WELL], many.loc[WELL])
    assert many.loc[["DEAD", "EARLY", "NONE"], "reason"].eq("there are no bars of it").all()
    assert many.loc["STILL", "reason"] == "its price never changes"
    assert many.loc["SHORT", "status"] == "refused"
    assert many.loc["ENDS", "status"] == "ended"
    assert np.isfinite(many.loc["ENDS", "accuracy"])


def test_the_command_finds_the_snapshot_of_its_profile(ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLTRADING_ROOT", str(ran))
    before = content_id(ran / "build" / "mine")
    assert main(["run", "multiasset", "--symbols", "AAA,CCC,SHORT", "--profile", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "commodity" in shown
    assert "all of them: cagr " in shown
    assert ", sharpe_annual " in shown
    assert content_id(ran / "build" / "mine") == before
