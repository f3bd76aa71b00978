"""Liquid networks against the authors' package, the compiled solver against its definition, and what must not change a bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ncps.torch as peers
import ncps.wirings as peer_wirings
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mltrading.core.errors import ParameterError
from mltrading.models.conformance import planted
from mltrading.models.dual import LiquidDual, LiquidDualParams
from mltrading.models.liquid import LTC, CfC, CfCLayer, CfCParams, Clock, LTCLayer
from mltrading.models.network import Encoder, Network
from mltrading.models.synapses import solve, solve_plain, wires
from mltrading.models.training import TrainParams
from mltrading.models.wiring import NCP, CfCCircuit, NCPParams, Wiring, auto_wiring, circuit, ncp_wiring

ROWS, STEPS, INPUTS, UNITS = 5, 4, 6, 12


@pytest.fixture(autouse=True)
def _double_precision_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


def wired(seed: int = 3) -> Wiring:
    return auto_wiring(INPUTS, UNITS, 3, 0.5, seed)


def tensors(wiring: Wiring) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(wiring.sensory), torch.from_numpy(wiring.recurrent)


def inputs(elapsed: bool) -> tuple[Tensor, Tensor | None]:
    return torch.randn(ROWS, STEPS, INPUTS, requires_grad=True), torch.rand(ROWS, STEPS) + 0.3 if elapsed else None


def unrolled(cell: nn.Module, x: Tensor, elapsed: Tensor | None, units: int) -> tuple[Tensor, Tensor]:
    """A peer's cell along a sequence: its outputs, and its states. (Its own loop cannot take a time for each row.)"""
    state, outputs, states = x.new_zeros(len(x), units), [], []
    for t in range(x.shape[1]):
        output, state = cell(x[:, t], state, 1.0 if elapsed is None else elapsed[:, t, None])
        outputs.append(output)
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


def close(a: Tensor, b: Tensor) -> None:
    np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-10, atol=1e-12)


# ------------------------------------------------------------------ LTC


def ltc_pair(full: bool, unfolds: int) -> tuple[LTCLayer, nn.Module]:
    """Our layer and the peer's cell with the same wiring and the same numbers."""
    if full:
        wiring, ours = peer_wirings.FullyConnected(UNITS), LTCLayer(torch.ones(INPUTS, UNITS), torch.where(torch.rand(UNITS, UNITS) < 0.5, 1, -1), unfolds)
    else:
        wiring, ours = peer_wirings.AutoNCP(UNITS, 3, 0.5, seed=3), LTCLayer(*tensors(wired()), unfolds)
    cell = peers.LTCCell(wiring, INPUTS, ode_unfolds=unfolds, implicit_param_constraints=True)
    with torch.no_grad():
        ours.scale.uniform_(0.5, 1.5)
        ours.shift.uniform_(-0.5, 0.5)
        for name, value in (("input_w", ours.scale), ("input_b", ours.shift), ("gleak", ours.membrane[0]), ("vleak", ours.membrane[1]), ("cm", ours.membrane[2])):
            getattr(cell, name).copy_(value)
        for prefix, synapses, source, target in (("sensory_", ours.sensory, ours.sensory_source, ours.sensory_target), ("", ours.recurrent, ours.source, ours.target)):
            for name, row in zip(("mu", "sigma", "w", "erev"), synapses, strict=True):
                getattr(cell, prefix + name)[source, target] = row
    return ours, cell


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("unfolds", [1, 6])
@pytest.mark.parametrize("elapsed", [True, False])
def test_ltc_is_the_peer_s(full: bool, unfolds: int, elapsed: bool) -> None:
    """States and every gradient, fully connected and as a circuit."""
    ours, cell = ltc_pair(full, unfolds)
    x, times = inputs(elapsed)
    outputs, states = unrolled(cell, x, times, UNITS)
    mine = ours(x, times)
    close(mine, states)
    close(mine[..., : outputs.shape[-1]], outputs)
    weight = torch.randn_like(mine)
    names = [(ours.scale, "input_w"), (ours.shift, "input_b")]
    got = torch.autograd.grad((mine * weight).sum(), [x, ours.scale, ours.shift, ours.membrane, ours.sensory, ours.recurrent])
    parts = [prefix + name for prefix in ("sensory_", "") for name in ("mu", "sigma", "w", "erev")]
    theirs = torch.autograd.grad((states * weight).sum(), [x, *(getattr(cell, n) for _, n in names), *(getattr(cell, n) for n in ("gleak", "vleak", "cm", *parts))])
    for a, b in zip(got[:3], theirs[:3], strict=True):
        close(a, b)
    close(got[3], torch.stack(theirs[3:6]))
    close(got[4], torch.stack([t[ours.sensory_source, ours.sensory_target] for t in theirs[6:10]]))
    close(got[5], torch.stack([t[ours.source, ours.target] for t in theirs[10:]]))


# ------------------------------------------------------------------ CfC


def copy_cell(ours: CfCLayer, cell: nn.Module) -> None:
    """Give a peer's cell the numbers of our layer."""
    with torch.no_grad():
        *backbone, last = ours.layers
        theirs = [m for m in cell.backbone if isinstance(m, nn.Linear)] if cell.backbone is not None else []
        for mine, other in zip(backbone, theirs, strict=True):
            other.weight.copy_(mine.weight)
            other.bias.copy_(mine.bias)
        names = ["ff1"] if ours.mode == "pure" else ["ff1", "ff2", "time_a", "time_b"]
        for name, weight, bias in zip(names, last.weight.chunk(len(names)), last.bias.chunk(len(names)), strict=True):
            getattr(cell, name).weight.copy_(weight)
            getattr(cell, name).bias.copy_(bias)
        if ours.mode == "pure":
            cell.w_tau.copy_(ours.rate.uniform_(-1, 1))
            cell.A.copy_(ours.amplitude.uniform_(-1, 1))


def same_gradients(x: Tensor, mine: Tensor, theirs: Tensor, ours: nn.Module, cells: list[nn.Module]) -> None:
    """Of the inputs, and summed over all parameters of each kind of map."""
    weight = torch.randn_like(mine)
    got = torch.autograd.grad((mine * weight).sum(), [x, *ours.parameters()])
    given = [p for cell in cells for p in cell.parameters() if p.requires_grad]
    expected = torch.autograd.grad((theirs * weight).sum(), [x, *given])
    close(got[0], expected[0])
    close(torch.cat([g.flatten() for g in got[1:]]).sort().values, torch.cat([g.flatten() for g in expected[1:]]).sort().values)


@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("elapsed", [True, False])
def test_cfc_is_the_peer_s(mode: str, layers: int, elapsed: bool) -> None:
    ours = CfCLayer(INPUTS, UNITS, mode, (10,) * layers)
    cell = peers.CfCCell(INPUTS, UNITS, mode, backbone_units=10, backbone_layers=layers)
    copy_cell(ours, cell)
    x, times = inputs(elapsed)
    mine, (_, theirs) = ours(x, times), unrolled(cell, x, times, UNITS)
    close(mine, theirs)
    same_gradients(x, mine, theirs, ours, [cell])


@pytest.mark.parametrize("mode", ["default", "no_gate", "pure"])
def test_circuit_of_cfc_is_the_peer_s(mode: str) -> None:
    ours, cell = CfCCircuit(wired(), mode), peers.WiredCfCCell(INPUTS, peer_wirings.AutoNCP(UNITS, 3, 0.5, seed=3), mode)
    for mine, other in zip(ours.layers, cell._layers, strict=True):
        copy_cell(mine, other)
    cell.double()  # its masks are 32-bit
    x, times = inputs(True)
    mine, (theirs, _) = ours(x, times), unrolled(cell, x, times, UNITS)
    close(mine, theirs)
    same_gradients(x, mine, theirs, ours, list(cell._layers))


# ------------------------------------------------------------------ wirings


@pytest.mark.parametrize("features", [1, 8, 60])
@pytest.mark.parametrize(("units", "motor"), [(8, 1), (16, 3), (64, 8), (19, 16)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_circuits_are_the_peer_s(features: int, units: int, motor: int, sparsity: float) -> None:
    """The same seed gives the same synapses with the same polarity."""
    for seed in (0, 22222):
        peer = peer_wirings.AutoNCP(units, motor, sparsity, seed=seed)
        peer.build(features)
        ours = auto_wiring(features, units, motor, sparsity, seed)
        assert (ours.sensory == peer.sensory_adjacency_matrix).all()
        assert (ours.recurrent == peer.adjacency_matrix).all()
        assert [list(r) for r in (ours.inter, ours.command, ours.motor)] == [list(peer.get_neurons_of_layer(k)) for k in range(3)]


def test_circuits_by_hand_are_the_peer_s() -> None:
    peer = peer_wirings.NCP(10, 8, 4, 2, 3, 12, 5, seed=1)
    peer.build(7)
    ours = ncp_wiring(7, 10, 8, 4, 2, 3, 12, 5, seed=1)
    assert (ours.sensory == peer.sensory_adjacency_matrix).all()
    assert (ours.recurrent == peer.adjacency_matrix).all()


# ------------------------------------------------------------------ the solver


def random_problem(rows: int, dtype: torch.dtype) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    wired_ = wires(torch.rand(7, 10) < 0.6, torch.rand(10, 10) < 0.6)
    synapses = [torch.stack([torch.randn(len(s)), 4 * torch.randn(len(s)), torch.rand(len(s)), torch.randn(len(s))]) for s in (wired_[0], wired_[2])]
    made = [torch.randn(rows, 6, 7), torch.randn(rows, 10), 1 + 9 * torch.rand(rows, 6), 0.1 + torch.rand(3, 10), *synapses]
    return [t.to(dtype).requires_grad_() for t in made], wired_


@pytest.mark.parametrize(("dtype", "least"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("rows", [1, 64, 130])
def test_the_solver_is_its_definition(dtype: torch.dtype, least: float, rows: int) -> None:
    given, wired_ = random_problem(rows, dtype)
    ours, plain = (f(*given, wired_, 3) for f in (solve, solve_plain))
    weight = torch.randn_like(ours)
    for a, b in zip((ours, *torch.autograd.grad((ours * weight).sum(), given)), (plain, *torch.autograd.grad((plain * weight).sum(), given)), strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < least


def test_threads_change_no_bit() -> None:
    given, wired_ = random_problem(300, torch.float32)
    found = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        out = solve(*given, wired_, 3)
        found.append([out, *torch.autograd.grad(out.square().sum(), given)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_extreme_synapses_stay_finite() -> None:
    given, wired_ = random_problem(3, torch.float32)
    with torch.no_grad():
        for k, scale in ((0, 1e6), (4, 1e4), (5, 1e4)):
            given[k] *= scale
    out = solve(*given, wired_, 2)
    gradients = torch.autograd.grad(out.sum(), given)
    assert all(torch.isfinite(t).all() for t in (out, *gradients))


# ------------------------------------------------------------------ encoders


@pytest.mark.parametrize("cell", ["ltc", "cfc"])
def test_a_feature_tells_the_time(cell: str) -> None:
    """It is the logarithm of how long a step lasts, less its mean, over its standard deviation."""
    names = [f"f{k}" for k in range(INPUTS)]
    plain, timed = (circuit(NCPParams(units=UNITS, motor=3, cell=cell), names, clock) for clock in (None, Clock(2, 0.5, 2.0)))
    timed.load_state_dict(plain.state_dict())
    x, days = torch.randn(ROWS, STEPS, INPUTS), 0.1 + 3 * torch.rand(ROWS, STEPS)
    x[..., 2] = (days.log() - 0.5) / 2
    close(timed(x), plain.layer(x, days)[:, -1, :3])
    assert not torch.allclose(timed(x), plain(x))
    assert isinstance(timed, Encoder)


@pytest.mark.parametrize(("model", "more"), [(LTC, {"units": 6, "unfolds": 2}), (CfC, {"units": 6, "backbone": (8,)}), (NCP, {"units": 8, "motor": 2, "cell": "cfc"}), (LiquidDual, {"units": 8, "motor": 2, "static": ("x0", "x3")})])
def test_a_network_is_told_the_time_that_it_was_given(model: type[Network], more: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the scaling: the steps of a window last as many days as the feature says, in training, after it and from a folder."""
    torch.set_default_dtype(torch.float32)
    d = planted(400, seed=1, steps=STEPS)
    days = np.random.default_rng(0).choice([1.0, 3.0, 4.0], len(d.X.block), p=[0.8, 0.15, 0.05])
    block = d.X.block.copy()
    block[:, 5] = np.log(days)
    x, heard = replace(d.X, block=block), []
    own = model(model.Params(steps=STEPS, elapsed="x5", train=TrainParams(epochs=1, patience=0), **more), seed=0).fit(x, d.y, d.weight, d.times)
    own.save(tmp_path / "m")
    for fitted in (own, model.load(tmp_path / "m")):
        liquid = fitted.heads.encoder.liquid if model is LiquidDual else fitted.heads.encoder
        liquid.layer.register_forward_pre_hook(lambda layer, given: heard.append(given[1]))
        fitted.predict(x)
        at = x.last[:, None] - np.arange(STEPS)[::-1]
        np.testing.assert_allclose(heard.pop().numpy(), days[at], rtol=1e-5)
    assert not heard


def test_a_clock_that_is_no_feature_is_refused() -> None:
    torch.set_default_dtype(torch.float32)
    d = planted(100, seed=1, steps=STEPS)
    for model, params in ((CfC, CfCParams(steps=STEPS, elapsed="x55")), (LiquidDual, LiquidDualParams(steps=STEPS, static=("x5",), elapsed="x5"))):
        with pytest.raises(ParameterError, match=r"params.elapsed: unknown feature `x55?`"):
            model(params, seed=0, purge_bars=1).fit(d.X, d.y, d.weight, d.times)
