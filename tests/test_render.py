"""Pages stand alone, are the same bytes every time, and fit a phone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mltrading.core.render import normalise, outside, page, render
from mltrading.core.style import THEME

HERE = Path(__file__).parent
FOOT = {"profile": "default", "parameters": {"policy": {"max_weight": 0.1}}, "inputs": {"build/default/panel.parquet": "0" * 40}}
# Draws and shows, in a process of its own, one of every table and two figures, and writes the page.
MAKE = """
import sys, nbformat, numpy as np, pandas as pd
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from mltrading.core.render import normalise, render
from mltrading.core.style import svg
from mltrading.reports import plots
from mltrading.reports.tables import Table, signals_table
rng = np.random.default_rng(5)
days = pd.bdate_range("2018-01-01", periods=800, tz="UTC").as_unit("us")
curve = pd.Series(np.exp(rng.normal(0, 0.01, 800).cumsum()), index=days)
signals = pd.DataFrame({"timestamp": days[-1], "symbol": ["AAA", "BBB"], "prob_up": [0.56, 0.47], "target": [0.1, 0.0], "current": [0.0, 0.1], "reasons": [["one", "two"], "none"]})
wide = pd.DataFrame(rng.normal(size=(3, 20)), columns=[f"a_rather_long_name_{k}" for k in range(20)])
shown = [signals_table(signals), Table(wide, caption="Wide"), wide, plots.plot_equity({"system": curve, "buy and hold": curve ** 0.5}), plots.plot_monthly(curve.pct_change())]
def out(value):
    html = value._repr_html_()
    data = {"text/html": html} if html else {"image/svg+xml": svg(value)}
    return new_code_cell("show(value)", outputs=[new_output("execute_result", data={**data, "text/plain": repr(value)}, execution_count=int(sys.argv[2]))])
nb = new_notebook(cells=[new_markdown_cell("# A page\\n\\n> In short."), *(c for k, v in enumerate(shown) for c in (new_markdown_cell(f"## Part {k}\\n\\n" + "word " * 60 + "`" + "x" * 90 + "`"), out(v)))])
render(normalise(nb), sys.argv[1], {"profile": "default"})
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pages")
    paths = [folder / "first.html", folder / "second.html"]
    for seed, path in enumerate(paths, 1):
        subprocess.run([sys.executable, "-c", MAKE, str(path), str(seed)], check=True, env={**os.environ, "PYTHONHASHSEED": str(seed)})
    return paths


def test_two_processes_write_the_same_bytes(made: list[Path]) -> None:
    first, second = (hashlib.sha256(p.read_bytes()).hexdigest() for p in made)
    assert first == second


def test_a_page_stands_alone(made: list[Path]) -> None:
    html = made[0].read_text()
    assert outside(html) == []
    assert "<script" not in html
    assert "http" not in re.sub(r'<a [^>]*href="[^"]*"', "", html)


def test_a_page_says_what_it_is(made: list[Path]) -> None:
    html = made[0].read_text()
    assert '<html lang="en">' in html
    assert html.count("<main") == html.count("<h1") == html.count("<footer") == 1
    assert "<svg" in html
    assert all('role="img"' in tag and 'aria-label="' in tag for tag in re.findall(r"<svg[^>]*>", html))
    assert len(re.findall(r'<th scope="row">', html)) >= 2
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_every_colour_with_a_meaning_is_a_variable(made: list[Path]) -> None:
    body = made[0].read_text().split("</style>", 1)[1]
    for light, _ in THEME.values():
        assert light not in body


def _run(text: str, html: str, count: int) -> Any:
    outputs = [
        new_output("stream", name="stdout", text=text), new_output("stream", name="stderr", text=f"{count} it/s"), new_output("stream", name="stdout", text="end"),
        new_output("display_data", data={"text/html": html, "text/plain": text, "application/vnd.jupyter.widget-view+json": {"model_id": str(count)}}, metadata={"took": count}),
    ]
    cell = new_code_cell("x", outputs=outputs, execution_count=count, metadata={"tags": ["parameters"], "execution": {"iopub": str(count)}, "papermill": {"duration": count}})
    return new_notebook(cells=[new_markdown_cell("# Title"), cell], metadata={"papermill": {"n": count}, "language_info": {"name": "python"}})


NOISE = st.lists(st.sampled_from([
    "0x7f3a21bc04d0", "0xdeadbeef12", "/tmp/tmpab_1/x.parquet", "/var/folders/zz/abc/T/tmp9/y", "10bd6a1e-93a2-4b4c-8d0f-1c2b3a4d5e6f", "T_0a1b2 ", "id-1", "plain words", "0x…", "/tmp/…/z",
    '<style scoped>\n td { x }\n</style>\n', '<table border="1" class="dataframe">', '<tr style="text-align: right;">', "\n", " ",
]), max_size=12).map("".join)


@settings(max_examples=60, deadline=None)
@given(text=NOISE, html=NOISE)
def test_normalising_twice_is_normalising_once(text: str, html: str) -> None:
    once = normalise(_run(text, html, 3))
    assert json.dumps(normalise(once), sort_keys=True) == json.dumps(once, sort_keys=True)


def test_runs_that_differ_in_accidents_only_become_equal() -> None:
    a = _run("<X at 0x7f0000000010> /tmp/tmp1/a 10bd6a1e-93a2-4b4c-8d0f-1c2b3a4d5e6f", "<p>1</p>", 1)
    b = _run("<X at 0x7fffffffff10> /tmp/tmp2/a 99bd6a1e-93a2-4b4c-8d0f-1c2b3a4d5e6f", "<p>1</p>", 2)
    before = json.dumps(a, sort_keys=True)
    assert json.dumps(normalise(a), sort_keys=True) == json.dumps(normalise(b), sort_keys=True)
    assert json.dumps(a, sort_keys=True) == before
    nbformat.validate(normalise(a))
    assert normalise(a).cells[1].metadata == {"tags": ["parameters"]}


def test_what_was_computed_is_kept() -> None:
    kept = normalise(_run("Sharpe 0.41 in 0x41 ways", "<b>1.5</b>", 1)).cells[1].outputs
    assert kept[0].text == "Sharpe 0.41 in 0x41 waysend"
    assert kept[1].data["text/html"] == "<b>1.5</b>"


def test_standard_error_does_not_reach_a_page() -> None:
    assert "it/s" not in page(normalise(_run("text", "<b>1</b>", 7)), FOOT)


def test_text_is_escaped() -> None:
    nb = normalise(new_notebook(cells=[new_markdown_cell("# A & <b>"), new_code_cell("1", outputs=[new_output("stream", name="stdout", text="<script>x</script>")])]))
    html = page(nb, {"profile": "<i>"}, title="a <b> & c")
    assert "<script>" not in html
    assert "<title>a &lt;b&gt; &amp; c</title>" in html
    assert "<dd>&lt;i&gt;</dd>" in html


def test_a_refused_page_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="would load"):
        render(normalise(new_notebook(cells=[new_markdown_cell('<link rel="stylesheet" href="//cdn.example/a.css">')])), path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_scrolls_sideways(made: list[Path], width: int) -> None:
    sys.path.insert(0, str(HERE))
    from screenshots import chromium, size

    if chromium() is None:
        pytest.skip("no Chromium")
    assert size(made[0], width)[0] <= width
