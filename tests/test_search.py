"""Searches over parameters: the same bits however often they are stopped, pruned where they should be, on record, and blind to the outer test rows."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mltrading.core.errors import DataError, ParameterError
from mltrading.core.params import block
from mltrading.validation.evolution import Evolution, EvolutionParams, consistency, fitness, pareto
from mltrading.validation.kfold import PurgedKFold
from mltrading.validation.nested import attempt, every, nested_search
from mltrading.validation.search import (
    ParameterSearch,
    SearchParams,
    check_space,
    draw_search,
    importance,
    journal,
    with_values,
)
from mltrading.validation.splits import WalkForward
from mltrading.validation.trials import deflated, looking, read, read_rows


class Train(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    rate: float = Field(gt=0, le=1)


class Params(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    x: float = Field(ge=0, le=1)
    n: int = Field(ge=1, le=9)
    side: str = "left"
    train: Train = Train(rate=0.1)
    maybe: Train | None = None

    @model_validator(mode="after")
    def _corner(self) -> Params:
        if self.x > 0.97 and self.n > 8:
            raise ValueError("the corner is closed")
        return self


BASE = Params(x=0.9, n=8)
SPACE = {"x": {"kind": "float", "low": 0, "high": 1}, "n": {"kind": "int", "low": 1, "high": 9}, "side": {"kind": "categorical", "choices": ["left", "right"]},
         "train.rate": {"kind": "float", "low": 0.001, "high": 1, "log": True}}
DAYS = pd.date_range("2020-01-01 21:00", periods=421, freq="B", tz="UTC", unit="us")
T, END = DAYS[:-1], DAYS[1:]
NOISE = 0.01 * np.random.default_rng(0).normal(size=(420, 4))
OUTER, INNER = WalkForward(240, 90).folds(T, END), PurgedKFold(4)


def earned(p: Params, train: np.ndarray, test: np.ndarray) -> pd.Series:
    """Returns that are better near a setting; no fit, so that tests are fast."""
    far = (p.x - 0.3) ** 2 + 0.02 * (p.n - 4) ** 2 + 0.1 * (p.side == "right") + 0.05 * np.log10(p.train.rate / 0.03) ** 2
    return pd.Series(NOISE[test, p.n % 4] * (1 + p.x) + 0.002 * (1 - far), T[test])


def search(trials: int = 14, sampler: str = "tpe", pruner: str = "none", space: dict[str, Any] = SPACE, startup: int = 6, after: int = 1) -> SearchParams:
    return block(SearchParams, {"space": space, "sampler": sampler, "trials": trials, "startup": startup, "pruner": pruner, "prune_after": after}, "search")


def evolution(population: int = 5, generations: int = 4, space: dict[str, Any] = SPACE) -> EvolutionParams:
    return block(EvolutionParams, {"space": space, "population": population, "generations": generations, "objectives": {"sharpe_annual": 2, "calmar": 1, "hit_rate": 1, "consistency": 1}}, "evolution")


def found(by: Any, score: Callable[..., Any] = earned, folds: list[Any] = OUTER) -> pd.DataFrame:
    return nested_search(folds, INNER, T, END, by, score)


def stopped_at(call: int) -> Callable[..., pd.Series]:
    """The score, interrupted at its n-th call."""
    calls = iter(range(1, call))

    def score(p: Params, train: np.ndarray, test: np.ndarray) -> pd.Series:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return earned(p, train, test)
    return score


def until_done(make: Callable[[], Any], steps: list[int]) -> pd.DataFrame:
    """A search that is interrupted again and again."""
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            found(make(), stopped_at(step))
    return found(make())


@pytest.mark.parametrize("pruner", ["none", "median", "halving"])
@pytest.mark.parametrize("steps", [[1], [30], [57, 1, 40]])
def test_a_search_that_is_interrupted_ends_the_same(tmp_path: Path, pruner: str, steps: list[int]) -> None:
    params = search(pruner=pruner)
    whole = found(ParameterSearch(params, BASE, 3))
    again = until_done(lambda: ParameterSearch(params, BASE, 3, tmp_path), [min(s, int(whole["fits"].sum()) // 2) for s in steps])
    pd.testing.assert_frame_equal(again, whole, check_exact=True)
    pd.testing.assert_frame_equal(found(ParameterSearch(params, BASE, 3, tmp_path)), whole, check_exact=True)  # all of it from the journal
    assert (whole["status"] == "pruned").any() == (pruner != "none")
    other = found(ParameterSearch(params, BASE, 4))
    assert not other["x"].equals(whole["x"])
    assert whole.loc[whole["candidate"] == 1, "x"].nunique() == len(OUTER)  # folds draw their own


def test_the_gaussian_process_that_is_interrupted_ends_the_same(tmp_path: Path) -> None:
    params, fold = search(7, "gp", startup=4, space={"x": SPACE["x"]}), OUTER[:1]
    whole = found(ParameterSearch(params, BASE, 3), folds=fold)
    with pytest.raises(KeyboardInterrupt):
        found(ParameterSearch(params, BASE, 3, tmp_path), stopped_at(4 * 5 + 2), fold)
    assert 1 + 4 < len((tmp_path / "fold_000.jsonl").read_text().splitlines()) < 1 + 7
    pd.testing.assert_frame_equal(found(ParameterSearch(params, BASE, 3, tmp_path), folds=fold), whole, check_exact=True)


def test_an_evolution_that_is_interrupted_anywhere_ends_the_same(tmp_path: Path) -> None:
    """In the first child of a generation, in its last, and in between."""
    params, fold = evolution(), OUTER[:1]
    whole = found(Evolution(params, BASE, 3, 252), folds=fold)
    assert whole.groupby("generation").size().tolist() == [5] * 4
    for trial in (1, 3, 4, 5, 7, 10, 14, 19):
        folder = tmp_path / str(trial)
        with pytest.raises(KeyboardInterrupt):
            found(Evolution(params, BASE, 3, 252, folder), stopped_at(int(whole["fits"][:trial].sum()) + 1), fold)
        pd.testing.assert_frame_equal(found(Evolution(params, BASE, 3, 252, folder), folds=fold), whole, check_exact=True)


def test_a_longer_search_begins_like_a_shorter_one(tmp_path: Path) -> None:
    short, fold = found(ParameterSearch(search(8), BASE, 3, tmp_path)), ["fold", "candidate", *SPACE, "inner"]
    calls = []
    long = found(ParameterSearch(search(14), BASE, 3, tmp_path), lambda p, train, test: calls.append(1) or earned(p, train, test))
    pd.testing.assert_frame_equal(long.loc[long["candidate"] < 8, fold].reset_index(drop=True), short[fold], check_exact=True)
    pd.testing.assert_frame_equal(long, found(ParameterSearch(search(14), BASE, 3)), check_exact=True)
    assert len(calls) == int(long.loc[long["candidate"] >= 8, "fits"].sum()) + len(OUTER)
    pd.testing.assert_frame_equal(found(ParameterSearch(search(8), BASE, 3, tmp_path)), short, check_exact=True)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_search as s
by = {by}
calls = 0
def score(p, train, test):
    global calls
    calls += 1
    if calls == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return s.earned(p, train, test)
table = s.found(by, score)
table.to_pickle({out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["s.ParameterSearch(s.search(12, 'tpe', 'halving'), s.BASE, 3, Path({folder!r}))", "s.ParameterSearch(s.search(9, 'gp', startup=5), s.BASE, 3, Path({folder!r}))",
                                "s.Evolution(s.evolution(), s.BASE, 3, 252, Path({folder!r}))"], ids=["tpe", "gp", "nsga2"])
def test_a_killed_process_leaves_what_another_goes_on_from(tmp_path: Path, by: str) -> None:
    """The same bits from processes with other hashes of strings, one of them killed by the system in the middle of a score."""
    tables = []
    for run, kills in (("whole", [0]), ("killed", [33, 0])):
        for k, kill in enumerate(kills):
            code = KILLED.format(tests=str(Path(__file__).parent), by=by.format(folder=str(tmp_path / run)), kill=kill, out=str(tmp_path / f"{run}.pkl"))
            done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": str(k + 7 * len(kills))}, capture_output=True, text=True)
            assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr
        tables.append(pd.read_pickle(tmp_path / f"{run}.pkl"))
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    files = [[json.loads(line) for line in (tmp_path / run / "fold_001.jsonl").read_text().splitlines()] for run in ("whole", "killed")]
    assert files[0] == files[1]


def test_what_a_kill_may_leave_in_a_journal(tmp_path: Path) -> None:
    params, path, fold = search(6), tmp_path / "fold_000.jsonl", OUTER[:1]
    whole = found(ParameterSearch(params, BASE, 3, tmp_path), folds=fold)
    data = path.read_bytes()
    for cut in (0, 10, len(data) // 2, len(data) - 1):  # nothing, part of the first line, part of a trial, all but the line's end
        path.write_bytes(data[:cut])
        pd.testing.assert_frame_equal(found(ParameterSearch(params, BASE, 3, tmp_path), folds=fold), whole, check_exact=True)
        assert path.read_bytes() == data
    lines = data.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"fold_000.jsonl, line 3: is no trial: it is not JSON"):
        found(ParameterSearch(params, BASE, 3, tmp_path), folds=fold)
    for number, line in ((1, b"[]\n"), (3, b"7\n"), (3, b"{}\n"), (3, lines[2].replace(b'"fresh"', b'"stale"')), (4, lines[3].replace(b'"status": "ok"', b'"status": "good"'))):
        path.write_bytes(b"".join([*lines[: number - 1], line, *lines[number:]]))
        for by in (ParameterSearch(params, BASE, 3, tmp_path), Evolution(evolution(), BASE, 3, 252, tmp_path)):
            with pytest.raises(DataError, match=rf"fold_000.jsonl, line {number}: is no trial, or was changed"):
                found(by, folds=fold)
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(DataError, match="line 3: trial 1 is missing"):
        found(ParameterSearch(params, BASE, 3, tmp_path), folds=fold)
    path.write_bytes(data)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is at work"):
            found(ParameterSearch(params, BASE, 3, tmp_path), folds=fold)


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    fold = OUTER[:1]
    found(ParameterSearch(search(6), BASE, 3, tmp_path, {"data": "a"}), folds=fold)
    wider = {**SPACE, "n": {"kind": "int", "low": 1, "high": 8}}
    for by, key in ((ParameterSearch(search(6), BASE, 4, tmp_path, {"data": "a"}), "seed"), (ParameterSearch(search(6), BASE, 3, tmp_path, {"data": "b"}), "about"),
                    (ParameterSearch(search(6, space=wider), BASE, 3, tmp_path, {"data": "a"}), "search"), (ParameterSearch(search(6), Params(x=0.8, n=8), 3, tmp_path, {"data": "a"}), "base"),
                    (Evolution(evolution(), BASE, 3, 252, tmp_path, {"data": "a"}), "")):
        with pytest.raises(DataError, match=f"journal of another search: its `{key}"):
            found(by, folds=fold)
    with pytest.raises(DataError, match="its `folds` was another"):
        nested_search(fold, PurgedKFold(3), T, END, ParameterSearch(search(6), BASE, 3, tmp_path, {"data": "a"}), earned)
    with journal(None, {}) as kept:
        kept.add({"number": 0, "values": [0.1 + 0.2, float("inf")]})
    assert kept.rows == [{"number": 0, "values": [0.1 + 0.2, float("inf")]}]


def test_median_and_halving_prune_by_their_rules(tmp_path: Path) -> None:
    """Told again from the scores in the journals."""
    for pruner in ("median", "halving"):
        found(ParameterSearch(search(30, pruner=pruner, after=2 if pruner == "median" else 1), BASE, 3, tmp_path / pruner), folds=OUTER[:1])
        rows = [json.loads(line) for line in (tmp_path / pruner / "fold_000.jsonl").read_text().splitlines()[1:]]
        rows = [row for row in rows if row["fresh"]]
        means = [[float(np.mean(row["told"]["scores"][: k + 1])) for k in range(len(row["told"]["scores"]))] for row in rows]
        assert 3 < sum(row["status"] == "pruned" for row in rows) < 28
        for i, (row, mine) in enumerate(zip(rows, means, strict=True)):
            if pruner == "median":
                came = [m for r, m in zip(rows[:i], means[:i], strict=True) if r["status"] == "ok"]
                behind = [k for k in (2, 3) if len(mine) >= k and len(came) >= 6 and max(mine[:k]) < np.median([m[k - 1] for m in came])]
            else:
                behind = [k for k in (1, 3) if len(mine) >= k and (rivals := sorted([m[k - 1] for m in means[:i] if len(m) >= k] + [mine[k - 1]])) and mine[k - 1] < rivals[-max(len(rivals) // 3, 1)]]
            assert (row["status"] == "pruned") == bool(behind)
            assert not behind or len(mine) == behind[0]


def test_a_search_is_one_trial_whose_fits_are_all_of_them(tmp_path: Path) -> None:
    """Pruned and failed ones are counted; a copy costs none; two searches are two trials."""
    coarse = {"n": {"kind": "int", "low": 6, "high": 9}, "side": SPACE["side"]}
    asked: list[Params] = []

    def score(p: Params, train: np.ndarray, test: np.ndarray) -> pd.Series:
        asked.append(p)
        if p.n == 6:
            raise DataError("training rows", "are too few", "")
        return earned(p, train, test)

    def recorded(params: SearchParams) -> Any:
        with looking(tmp_path / "l.jsonl", "demo", "searched", {"search": params.model_dump(mode="json")}, "d") as look:
            return nested_search(OUTER, INNER, T, END, ParameterSearch(params, BASE, 3), score, look=look), look.returns

    table, returns = recorded(search(20, pruner="median", space=coarse))
    row = read_rows(tmp_path / "l.jsonl")[0]
    assert row["fits"] == len(asked) == int(table["fits"].sum()) + len(OUTER)
    assert set(table["status"]) == {"ok", "failed"} | ({"pruned"} & set(table["status"]))
    assert (table.loc[table["n"] == 6, "error"] == "DataError: training rows: are too few").all()
    assert table.groupby(["fold", "n", "side"])["fits"].apply(lambda f: (f > 0).sum()).eq(1).all()
    assert row["n_bars"] == len(returns) == sum(len(f.test) for f in OUTER)
    assert deflated(returns, read(tmp_path / "l.jsonl"))["n_trials"] == 1
    recorded(search(20, pruner="median", space={"n": {"kind": "int", "low": 8, "high": 9}}))
    assert [r["status"] for r in read_rows(tmp_path / "l.jsonl")] == ["ok", "ok"]


def test_a_search_that_fails_keeps_the_fits_of_the_folds_it_came_through(tmp_path: Path) -> None:
    """Otherwise a failure would say that next to nothing was tried."""
    asked: list[np.ndarray] = []

    def score(p: Params, train: np.ndarray, test: np.ndarray) -> pd.Series:
        asked.append(test)
        if test is OUTER[1].test:
            raise DataError("test rows", "cannot be judged", "")
        return earned(p, train, test)

    with pytest.raises(DataError, match="cannot be judged"), looking(tmp_path / "l.jsonl", "demo", "searched", {}, "d") as look:
        nested_search(OUTER, INNER, T, END, ParameterSearch(search(6), BASE, 3), score, look=look)
    (row,) = read_rows(tmp_path / "l.jsonl")
    assert row["status"] == "failed"
    assert row["fits"] == len(asked) > 2


def test_a_setting_that_is_good_only_on_outer_test_rows_is_not_preferred() -> None:
    """And without the trap the same trials are proposed."""
    def tempting(p: Params, train: np.ndarray, test: np.ndarray) -> pd.Series:
        r = earned(p, train, test)
        return r + 0.1 * (p.x > 0.6) * np.isin(test, outside) - 0.01 * (p.x > 0.6) * ~np.isin(test, outside)

    for by in (ParameterSearch(search(20), BASE, 3), Evolution(evolution(), BASE, 3, 252), every({"good": Params(x=0.3, n=4), "trap": Params(x=0.7, n=4)})):
        for fold in OUTER:
            outside = fold.test
            caught = found(by, tempting, [fold])
            outside = np.array([], int)
            free = found(by, tempting, [fold])
            pd.testing.assert_frame_equal(caught.drop(columns="outer"), free.drop(columns="outer"), check_exact=True)
            chosen = caught[caught["chosen"]].iloc[0]
            assert chosen["candidate"] == "good" if "x" not in caught else chosen["x"] <= 0.6


def test_a_search_without_folds_is_refused() -> None:
    for none in ([], iter(())):
        with pytest.raises(ParameterError, match=r"nested_search.folds: there are none"):
            found(every({"good": Params(x=0.3, n=4)}), earned, none)


def test_failures_do_not_end_a_search_and_mistakes_do() -> None:
    def shy(p: Params, train: np.ndarray, test: np.ndarray) -> float:
        if p.side == "right":
            raise ParameterError("side", "is wrong", "")
        return float("nan") if p.n == 4 else float(earned(p, train, test).mean())

    table = found(ParameterSearch(search(16), BASE, 3), shy)
    assert set(table.loc[table["side"] == "right", "error"]) == {"ParameterError: side: is wrong"}
    assert table.loc[(table["n"] == 4) & (table["side"] == "left"), "error"].str.contains("the score is nan").all()
    assert not table.loc[table["status"] != "ok", "chosen"].any()
    assert (table.loc[table["status"] == "failed", "inner"].isna()).all()
    with pytest.raises(ZeroDivisionError):
        found(ParameterSearch(search(), BASE, 3), lambda *_: 1 / 0)
    with pytest.raises(DataError, match=r"inside fold 0, search: none of 14 candidates .* DataError: fold 0: the score is nan"):
        found(ParameterSearch(search(), BASE, 3), lambda *_: float("nan"))
    tried = attempt({"x": 0.99, "n": 9}, list(PurgedKFold(2).folds(T, END)), lambda v, train, test: earned(with_values(BASE, v), train, test))
    assert (tried.status, tried.fits) == ("failed", 1)
    assert "the corner is closed" in tried.error


@pytest.mark.parametrize(("line", "says"), [
    ({"x": {"kind": "float", "low": 0, "high": 2}}, r"search.space.x: 2.0 is not allowed"),
    ({"y": {"kind": "float", "low": 0, "high": 1}}, "unknown parameter `y`"),
    ({"train.rat": {"kind": "float", "low": 0.1, "high": 1}}, "did you mean `rate`"),
    ({"maybe.rate": {"kind": "float", "low": 0.1, "high": 1}}, "leads into None"),
    ({"train": {"kind": "float", "low": 0.1, "high": 1}}, r"0.1 is not allowed"),
    ({"n": {"kind": "float", "low": 1, "high": 9}}, "fractional part"),
    ({"n": {"kind": "int", "low": 1, "high": 7}}, "the default, 8, is not among"),
    ({"n": {"kind": "int", "low": 2, "high": 9, "step": 2}}, "a whole number of steps"),
    ({"n": {"kind": "int", "low": 0, "high": 9, "log": True}}, "begins above 0"),
    ({"x": {"kind": "float", "low": 0.0, "high": float("inf")}}, "finite number"),
    ({"side": {"kind": "categorical", "choices": ["left", "left"]}}, "stands there twice"),
    ({"side": {"kind": "categorical", "choices": ["left", 3]}}, "not allowed"),
    ({"x": {"low": 0, "high": 1}}, "kind"),
    ({}, "at least 1 item"),
])
def test_a_space_that_the_parameters_do_not_have_is_refused_before_anything_is_fitted(line: dict[str, Any], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        ParameterSearch(search(space=line), BASE, 3)


@given(st.floats(0, 0.97), st.integers(1, 9), st.floats(0.001, 1))
def test_values_go_where_their_names_lead(x: float, n: int, rate: float) -> None:
    got = with_values(BASE, {"x": x, "n": n, "train.rate": rate, "maybe": {"rate": rate}})
    assert (got.x, got.n, got.train.rate, got.maybe.rate, got.side) == (x, n, rate, rate, "left")
    assert with_values(got, {}) == got


def test_a_column_s_name_is_no_parameter() -> None:
    class Folds(BaseModel):
        folds: int

    with pytest.raises(ParameterError, match="the name of a column"):
        check_space(search(space={"folds": {"kind": "int", "low": 1, "high": 3}}).space, Folds(folds=2), "search.space")


def test_importance_finds_what_matters() -> None:
    table = found(ParameterSearch(search(20), BASE, 3), lambda p, train, test: -((p.n - 4) ** 2) - 0.01 * p.x, OUTER[:1])
    shares = importance(table, search().space)
    assert shares.loc["n", 0] > 0.5
    assert draw_search(table, search().space).axes
    flat = found(ParameterSearch(search(5), BASE, 3), lambda *_: 1.0)
    assert importance(flat, search().space).shape == (4, 0)
    assert flat.loc[flat["chosen"], "candidate"].tolist() == [0] * len(OUTER)  # of equals the default


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=25))
def test_the_front_is_the_one_that_optuna_finds(values: list[tuple[int, ...]]) -> None:
    import optuna
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(directions=["maximize"] * 3)
    study.add_trials([optuna.trial.create_trial(values=list(map(float, v))) for v in values])
    table = np.array(values, float)
    assert sorted(t.number for t in study.best_trials) == np.flatnonzero(pareto(table)).tolist()
    assert pareto(table)[fitness(table, np.array([1.0, 0.2, 3.0])).argmax()]


def test_an_evolution_breeds_past_failures_and_counts_every_evaluation() -> None:
    def shy(p: Params, train: np.ndarray, test: np.ndarray) -> pd.Series:
        return earned(p, train, test) * (p.side == "left")  # those on the right never earn anything

    table = found(Evolution(evolution(6, 6), BASE, 3, 252), shy, OUTER[:1])
    assert set(table.loc[table["side"] == "right", "status"]) == {"failed"}
    ok = table[table["status"] == "ok"]
    assert ok.groupby("generation").size().iloc[:-1].eq(6).all()  # a generation is as many as came through
    assert ok["generation"].max() < 6
    assert (ok["side"] == "left").all()
    later = ok[ok["generation"] > 0]
    assert later["sharpe_annual"].mean() > ok.loc[ok["generation"] == 0, "sharpe_annual"].mean()
    assert table["front"].sum() == pareto(ok[["sharpe_annual", "calmar", "hit_rate", "consistency"]].to_numpy()).sum()
    with pytest.raises(DataError, match="none of 30 candidates"):
        found(Evolution(evolution(6, 5), BASE, 3, 252), lambda p, train, test: earned(p, train, test) * 0, OUTER[:1])


def test_consistency_is_counted_in_months() -> None:
    days = pd.date_range("2021-01-01", "2021-04-30", freq="D", tz="UTC")
    r = pd.Series(0.0, days)
    r["2021-01-05"], r["2021-01-06"], r["2021-02-10"], r["2021-04-30"] = 0.10, -0.08, -0.01, 0.02  # March stands still
    assert consistency(r) == 2 / 3
