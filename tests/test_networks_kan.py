"""Networks of curves and autoencoders: splines and layers beside other ways to compute them, heads beside the core, and what may not depend on company."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.interpolate import BSpline
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from mltrading.core.errors import DataError, ParameterError
from mltrading.models.autoencoder import (
    Autoencoder,
    AutoencoderParams,
    Variational,
    VariationalAutoencoder,
    VariationalParams,
)
from mltrading.models.conformance import planted
from mltrading.models.kan import KAN, KANEncoder, KANLayer, KANParams, spline_basis
from mltrading.models.network import Heads
from mltrading.models.tasks import Behaviour, Buckets, Direction, Health
from mltrading.models.training import TrainParams


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def recursive_basis(x: Tensor, grid: int, reach: float) -> Tensor:
    """The recursion of Cox and de Boor, as it is written down for knots at any distance."""
    k, x = torch.arange(-3, grid + 4, dtype=x.dtype) * (2 * reach / grid) - reach, x.unsqueeze(-1)
    b = ((x >= k[:-1]) & (x < k[1:])).to(x.dtype)
    for p in (1, 2, 3):
        b = (x - k[: -p - 1]) / (k[p:-1] - k[: -p - 1]) * b[..., :-1] + (k[p + 1 :] - x) / (k[p + 1 :] - k[1:-p]) * b[..., 1:]
    return b


@pytest.mark.parametrize("seed", range(8))
def test_splines_and_their_slopes_are_those_of_scipy(seed):
    rng = np.random.default_rng(seed)
    grid, reach = int(rng.integers(1, 30)), float(rng.uniform(0.5, 10))
    h = 2 * reach / grid
    coefficients, knots = rng.standard_normal(grid + 3), h * np.arange(-3, grid + 4) - reach
    spline = BSpline(knots, coefficients, 3)
    x = torch.from_numpy(rng.uniform(-reach, reach, 200)).requires_grad_()
    basis = spline_basis(x, grid, reach)
    y = basis @ torch.from_numpy(coefficients)
    y.sum().backward()
    np.testing.assert_allclose(y.detach(), spline(x.detach()), atol=1e-12)
    np.testing.assert_allclose(x.grad, spline.derivative()(x.detach()), atol=1e-11 / h)
    np.testing.assert_allclose(basis.detach().sum(-1), 1, atol=1e-13)
    assert ((basis >= 0) & (basis <= 2 / 3 + 1e-12)).all()
    beyond = torch.tensor([-reach - 3 * h, reach + 3 * h, -1e6, 1e6], dtype=torch.float64) * (1 + 1e-12)
    assert (spline_basis(beyond, grid, reach).abs() < 1e-30).all()


def test_a_layer_and_its_gradients_are_those_of_the_recursion():
    layer = KANLayer(5, 4, grid=7, reach=2.0).double()
    x = (2 * torch.randn(50, 5, dtype=torch.float64)).requires_grad_()
    plain = F.linear(F.silu(x), layer.base) + F.linear(recursive_basis(x, 7, 2.0).flatten(1), layer.spline.flatten(1))
    weights, inputs = torch.randn(50, 4, dtype=torch.float64), (x, layer.base, layer.spline)
    torch.testing.assert_close(layer(x), plain, atol=1e-12, rtol=0)
    torch.testing.assert_close(layer.edges(x).sum(-1), plain, atol=1e-12, rtol=0)
    for ours, theirs in zip(torch.autograd.grad((layer(x) * weights).sum(), inputs), torch.autograd.grad((plain * weights).sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_one_layer_is_additive_and_two_are_not():
    def mixed(widths):  # the mixed second difference in two inputs
        encoder = KANEncoder(3, widths, grid=5, reach=3.0, sparsity=0.0).double()
        at = torch.tensor([[[a, b, 0.3]] for a in (-1.0, 2.0) for b in (0.5, -2.0)], dtype=torch.float64)
        z = encoder(at).detach()
        return float((z[0] - z[1] - z[2] + z[3]).abs().max())
    assert mixed((4,)) < 1e-12 < 1e-3 < mixed((4, 4))


def test_inputs_beyond_the_grid_and_half_precision():
    encoder = KANEncoder(6, (8, 2), grid=5, reach=3.0, sparsity=0.01)
    x = torch.randn(64, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        half, own = encoder.learn(x)
    assert own is not None
    assert own.shape == (64,)
    assert own.isfinite().all()
    torch.testing.assert_close(half.float(), encoder(x), atol=0.05, rtol=0.05)
    assert encoder(1e6 * x).isfinite().all()
    constant, penalty = encoder.learn(torch.zeros(4, 2, 3))
    penalty.sum().backward()
    assert constant.isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_own_losses_count_in_training_alone_and_as_they_are():
    heads, x = Heads(KANEncoder(6, (4,), 5, 3.0, sparsity=0.7), (Direction(), Health()), horizons=1), torch.randn(32, 2, 3)
    targets, weight = [[torch.randint(0, 2, (32,))], [torch.rand(32)]], torch.rand(32) + 0.5
    with torch.no_grad():
        heads.noise.copy_(torch.tensor([0.3, -0.4]))
    own = heads.encoder.learn(x)[1]
    assert own is not None
    trained, told = heads.train().costs(x, targets, weight), heads.eval().costs(x, targets, weight)
    torch.testing.assert_close(trained.objective - told.objective, own[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(trained.main, told.main)


def test_the_variational_middle():
    encoder = Variational(6, (16,), 3, reconstruction=2.0, beta=0.5).double().train()
    x = torch.randn(7, 2, 3, dtype=torch.float64)
    mean, log_variance = encoder.posterior(x)
    torch.testing.assert_close(encoder(x), mean, atol=0, rtol=0)
    drawn, costs = zip(*(encoder.learn(x) for _ in range(500)), strict=True)
    torch.testing.assert_close(torch.stack(drawn).mean(0), mean, atol=0.25, rtol=0)
    torch.testing.assert_close(torch.stack(drawn).var(0), log_variance.exp(), atol=0, rtol=0.35)
    divergence = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(1)
    for z, cost in zip(drawn[:3], costs[:3], strict=True):
        lost = (encoder.decoder(z) - x.flatten(1)).square().mean(1) / 2
        torch.testing.assert_close(cost, 2.0 * (lost + 0.5 / 6 * divergence), atol=1e-12, rtol=0)


QUICK = TrainParams(epochs=2, batch_size=128, patience=0)


@pytest.mark.parametrize(("model", "params"), [(Autoencoder, AutoencoderParams), (VariationalAutoencoder, VariationalParams)])
def test_novelty_and_place_of_a_row_do_not_depend_on_company(model, params, tmp_path):
    d = planted(400, seed=0, steps=3)
    y = pd.DataFrame({1: d.y, 5: d.y[::-1]})
    own = params(steps=3, hidden=(8,), latent=2, train=QUICK, auxiliary=(Health(), Buckets(), Behaviour(past="x0")))
    fitted = model(own, seed=1).fit(d.X, y, d.weight, d.times)
    novelty, latent = fitted.novelty(d.X), fitted.latent(d.X)
    assert novelty["rank"].between(0, 1).all()
    assert abs(novelty["rank"].mean() - 0.5) < 0.01
    assert latent.shape == (400, 2)
    for rows in (slice(3, 4), slice(None, None, -1), slice(100, 137)):
        pd.testing.assert_frame_equal(fitted.novelty(d.X.take(rows)), novelty.iloc[rows], check_exact=True)
        pd.testing.assert_frame_equal(fitted.latent(d.X.take(rows)), latent.iloc[rows], check_exact=True)
    fitted.save(tmp_path / "m")
    pd.testing.assert_frame_equal(model.load(tmp_path / "m").novelty(d.X), novelty, check_exact=True)
    told = fitted.predict(d.X)
    assert list(told.columns.get_level_values(0).unique()) == [1, 5]
    assert told[5][["health", "vol_low", "vol_high", "behaviour_momentum", "behaviour_mixed"]].to_numpy().min() >= 0
    with pytest.raises(DataError, match="windows of 2 steps, where 3 were fitted"):
        fitted.novelty(planted(20, seed=0, steps=2).X)
    with pytest.raises(ParameterError, match="not fitted"):
        model(own, seed=0).latent(d.X)


@pytest.mark.parametrize("patience", [0, 3])
def test_novelty_is_a_rank_among_rows_not_learned_from(patience):
    """Where there are some: those that patience looks at."""
    d = planted(600, seed=0)
    own = AutoencoderParams(hidden=(8,), latent=4, train=TrainParams(epochs=3, batch_size=32, patience=patience))
    said = Autoencoder(own, seed=0, purge_bars=1).fit(d.X, d.y, d.weight, d.times).novelty(d.X)
    among = said[np.unique(d.times, return_inverse=True)[1] >= (48 if patience else 0)].sort_values("error")
    assert among["rank"].iloc[[0, -1]].tolist() == [0, 1]
    np.testing.assert_allclose(among["rank"], np.linspace(0, 1, len(among)), atol=0.01)


def test_a_middle_has_to_be_narrow():
    d = planted(100, seed=0, steps=3)
    for latent in (24, 30):
        for model, params in ((Autoencoder, AutoencoderParams), (VariationalAutoencoder, VariationalParams)):
            with pytest.raises(ParameterError, match=rf"params.latent: {latent} numbers in the middle of 24, which are 8 features × 3 steps"):
                model(params(steps=3, latent=latent, train=QUICK), seed=0).fit(d.X, d.y, d.weight, d.times)


def test_curves_learn_what_bends():
    d, test = planted(3000, seed=1), planted(3000, seed=2)
    truth, noise = (lambda p: np.abs(p.X["x0"].to_numpy(np.float64)) - 0.8), np.random.default_rng(0).standard_normal(3000)
    params = KANParams(widths=(2,), train=TrainParams(epochs=6, batch_size=64, learning_rate=0.03, patience=0))
    score = KAN(params, seed=0).fit(d.X, truth(d) + 0.5 * noise, d.weight, d.times).predict(test.X)["score"]
    assert np.corrcoef(score, truth(test))[0, 1] > 0.9


def test_targets_of_the_heads():
    rng = np.random.default_rng(0)
    y, past = rng.standard_t(3, 3001), pd.DataFrame({"p": rng.standard_normal(3001)})
    assert np.ptp(np.bincount(Buckets().encode(y))) <= 1
    rank = Health().encode(y)
    assert (np.argsort(rank) == np.argsort(y)).all()
    assert 0 < rank.min() < rank.max() < 1
    assert abs(rank.mean() - 0.5) < 1e-12
    told, turned = Behaviour(past="p").target(y, past), Behaviour(past="p").target(-y, past)
    assert ((told == 2) == (turned == 2)).all()
    assert ((told == 0) == (turned == 1)).all()
    assert (Behaviour(past="p").target(y, past.mask(past > 0))[past["p"] > 0] == 2).all()
    assert (Behaviour(past="p").target(7 * y, 0.01 * past) == told).all()
