"""LTC and CfC beside the authors' package `ncps`, in one run, at equal outputs: forward and backward of one batch, and the forecast of one row."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import ncps.torch as peers
import ncps.wirings as peer_wirings
import numpy as np
import torch
from torch import Tensor, nn

from mltrading.models.liquid import CfCLayer, LTCLayer
from mltrading.models.wiring import auto_wiring

ROWS, STEPS, FEATURES, UNITS, MOTOR, REPEATS = 256, 60, 60, 64, 8, 3
THREADS = int(os.environ.get("THREADS", "2"))


def ltc_pair(full: bool) -> tuple[nn.Module, nn.Module]:
    """Our layer and the peer's network with the same wiring and numbers."""
    if full:
        polarity = torch.ones(FEATURES, UNITS), torch.where(torch.rand(UNITS, UNITS) < 2 / 3, 1, -1)
        theirs = peers.LTC(FEATURES, UNITS)
    else:
        drawn = auto_wiring(FEATURES, UNITS, MOTOR, 0.5, 22222)
        polarity = torch.from_numpy(drawn.sensory), torch.from_numpy(drawn.recurrent)
        theirs = peers.LTC(FEATURES, peer_wirings.AutoNCP(UNITS, MOTOR, 0.5, seed=22222))
    ours, cell = LTCLayer(*polarity), theirs.rnn_cell
    with torch.no_grad():
        for name, row in zip(("gleak", "vleak", "cm"), ours.membrane, strict=True):
            getattr(cell, name).copy_(row)
        for prefix, synapses, source, target in (("sensory_", ours.sensory, ours.sensory_source, ours.sensory_target), ("", ours.recurrent, ours.source, ours.target)):
            for name, row in zip(("mu", "sigma", "w", "erev"), synapses, strict=True):
                getattr(cell, prefix + name)[source, target] = row
    return ours, theirs


def cfc_pair() -> tuple[nn.Module, nn.Module]:
    """The same of CfC with a backbone of 128."""
    ours, theirs = CfCLayer(FEATURES, UNITS), peers.CfC(FEATURES, UNITS)
    cell = theirs.rnn_cell
    with torch.no_grad():
        cell.backbone[0].weight.copy_(ours.layers[0].weight)
        cell.backbone[0].bias.copy_(ours.layers[0].bias)
        for name, weight, bias in zip(("ff1", "ff2", "time_a", "time_b"), ours.layers[1].weight.chunk(4), ours.layers[1].bias.chunk(4), strict=True):
            getattr(cell, name).weight.copy_(weight)
            getattr(cell, name).bias.copy_(bias)
    return ours, theirs


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def step(network: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def call() -> None:
        network(x).square().mean().backward()
    return call


def without_gradient(network: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            network(x)
    return call


def liquid() -> list[dict[str, object]]:
    """Rows of the table: medians of calls that take turns."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    rows, x = [], torch.randn(ROWS, STEPS, FEATURES)
    for name, (ours, theirs) in {"LTC": ltc_pair(True), "LTC, NCP": ltc_pair(False), "CfC": cfc_pair()}.items():
        peer = lambda x, theirs=theirs: theirs(x)[0]  # noqa: E731
        with torch.no_grad():
            expected = peer(x[:8])
            gap = float((ours(x[:8])[..., : expected.shape[-1]] - expected).abs().max())
        assert gap < 1e-5, f"{name}: outputs differ by {gap:.0e}"
        for work, make, data, repeats in (("forward and backward", step, x, REPEATS), ("one row", without_gradient, x[:1], 20)):
            a, b = make(ours, data), make(peer, data)
            a()
            pairs = np.array([(seconds(a), seconds(b)) for _ in range(repeats)])
            mine, other = np.median(pairs, axis=0)
            rows.append({"model": name, "work": work, "outputs differ by": f"{gap:.0e}", "ms": 1e3 * mine, "p99 ms": 1e3 * np.quantile(pairs[:, 0], 0.99) if repeats > 3 else np.nan,
                         "rows/s": len(data) / mine, "ncps ms": 1e3 * other, "ncps ms / ms": other / mine})
    return rows
