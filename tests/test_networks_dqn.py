"""The deep Q-network beside stable-baselines3 and dynamic programming, and trainings that are killed after any round."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from scipy.special import expit
from sklearn.metrics import log_loss
from stable_baselines3 import DQN as PeerDQN
from stable_baselines3.common.env_checker import check_env as peer_check
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from mltrading.core.errors import DataError, ParameterError
from mltrading.core.params import block
from mltrading.market.panel import to_frame
from mltrading.market.simulate import random_walk
from mltrading.models.agent import MLP, Agent, AgentParams, Batch, QNetwork, annealed, train_agent
from mltrading.models.calibration import fit_sigmoid
from mltrading.models.conformance import planted
from mltrading.models.dqn import DQN, DQNParams, action_values, council
from mltrading.models.environment import Knockout, Steps, TradingEnv, TradingVector, Underlying, market_steps
from mltrading.models.training import torch_state


@pytest.fixture(autouse=True)
def one_thread():
    with torch_state(0, threads=1):
        yield


@pytest.fixture(scope="module")
def steps() -> Steps:
    panel = random_walk(n_symbols=3, n_bars=200, seed=1, ragged=False)
    bars = to_frame(panel)
    ret = bars.groupby("symbol")["close"].pct_change(fill_method=None)
    return market_steps(panel, bars[["timestamp", "symbol"]].assign(ret=100 * ret, sign=np.sign(ret)))


def an_agent(env, **params) -> Agent:
    p = AgentParams(**params)
    with torch_state(1, threads=1):
        return Agent(QNetwork(MLP(env.single_observation_space.shape[0], (16, 16)), 3, duelling=p.duelling), p, env, seed=1)


# ------------------------------------------------------------------ stable-baselines3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("product", [Underlying(0.001), Underlying(0.0, (0.0, 1.0)), Knockout(0.01, 0.05)])
def test_environments_pass_the_check_of_stable_baselines3(steps, product):
    peer_check(TradingEnv(steps, product, bars=10))


def peer_of(agent: Agent, env: gymnasium.Env, **options) -> PeerDQN:
    """Their agent with the weights, and with the options, of ours."""
    p = agent.params
    peer = PeerDQN("MlpPolicy", env, learning_rate=p.learning_rate, batch_size=p.batch_size, gamma=p.gamma, max_grad_norm=p.clip_norm, buffer_size=100, device="cpu",
                   exploration_initial_eps=p.explore_first, exploration_final_eps=p.explore_last, exploration_fraction=p.explore_share, policy_kwargs={"net_arch": [16, 16]}, **options)
    with torch.no_grad():
        for net, theirs in ((agent.online, peer.q_net), (agent.target, peer.q_net_target)):
            for a, b in zip(ordered(net), theirs.parameters(), strict=True):
                b.copy_(a)
    peer._logger = Logger(None, [])
    return peer


def ordered(net: QNetwork) -> list[nn.Parameter]:
    """Weights from the first layer to the last."""
    return [*net.body.parameters(), *net.advantage.parameters()]


def test_a_step_of_learning_is_that_of_stable_baselines3(steps):
    agent = an_agent(TradingVector(steps, Underlying(0.001), 10, 4), gamma=0.9, learning_rate=3e-3, clip_norm=0.5)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for weight in agent.target.parameters():  # a target that differs from the network
            weight += 0.1 * torch.from_numpy(rng.standard_normal(weight.shape).astype(np.float32))
    peer = peer_of(agent, TradingEnv(steps, Underlying(0.001), 10))
    for _ in range(10):
        batch = Batch(rng.standard_normal((64, 3)).astype(np.float32), rng.integers(3, size=64), 2 * rng.standard_normal(64), rng.standard_normal((64, 3)).astype(np.float32), rng.random(64) < 0.2)
        theirs = SimpleNamespace(observations=torch.from_numpy(batch.seen), next_observations=torch.from_numpy(batch.then), actions=torch.from_numpy(batch.action)[:, None],
                                 rewards=torch.from_numpy(batch.reward.astype(np.float32))[:, None], dones=torch.from_numpy(batch.ended.astype(np.float32))[:, None], discounts=None)
        peer.replay_buffer.sample = lambda *_, theirs=theirs, **__: theirs
        loss = agent.learn(batch)
        peer.train(1, 64)
        assert loss == pytest.approx(peer.logger.name_to_value["train/loss"], abs=1e-6)
        for a, b in zip(ordered(agent.online), peer.q_net.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_exploration_is_annealed_as_in_stable_baselines3():
    for first, last, share in ((1.0, 0.05, 0.1), (0.7, 0.2, 1.0), (2.0, 2.0, 0.5)):
        theirs = LinearSchedule(first, last, share)
        for progress in np.linspace(0, 1, 201):
            assert annealed(first, last, share, progress) == pytest.approx(theirs(1 - progress), abs=1e-12)


# ------------------------------------------------------------------ dynamic programming


def solved(reward: np.ndarray, chance: np.ndarray, gamma: float) -> np.ndarray:
    """Values (states, actions) of a decision process with chances (states, actions, states)."""
    q = np.zeros_like(reward)
    for _ in range(500):
        q = reward + gamma * chance @ q.max(axis=1)
    return q


@pytest.mark.parametrize("options", [{}, {"double": True, "duelling": True, "target_every": 5, "target_rate": 1.0}])
def test_values_of_a_random_decision_process(options):
    rng = np.random.default_rng(5)
    states, gamma = 6, 0.7
    reward, chance = rng.uniform(-1, 1, (states, 3)), rng.dirichlet(np.full(states, 0.3), (states, 3))
    env = TradingVector(Steps(np.zeros((2, states - 1), np.float32), np.zeros(2), np.array([1, -1])), Underlying(0.0), 1, 1)  # its actions and widths are all that is used
    p = AgentParams(**({"gamma": gamma, "learning_rate": 0.02, "target_every": 1, "target_rate": 0.05, "clip_norm": 1e9, "huber": 1e9} | options))
    with torch_state(0, threads=1):
        agent = Agent(QNetwork(MLP(states, ()), 3, duelling=p.duelling), p, env, seed=0)
        one = np.eye(states, dtype=np.float32)
        state, action = (k.ravel() for k in np.meshgrid(np.arange(states), np.arange(3), indexing="ij"))
        for k in range(500):
            agent.optimizer.param_groups[0]["lr"] = 0.02 * (1 - k / 500)
            repeated, done = np.repeat(state, 40), np.repeat(action, 40)
            then = (chance[repeated, done].cumsum(axis=1) < rng.random((len(done), 1))).sum(axis=1)
            agent.learn(Batch(one[repeated], done, reward[repeated, done], one[np.minimum(then, states - 1)], np.zeros(len(done), bool)))
    assert np.abs(agent.values(one) - solved(reward, chance, gamma)).max() < 0.03


def test_what_ended_is_worth_its_reward_alone(steps):
    agent = an_agent(TradingVector(steps, Underlying(0.0), 10, 4), gamma=0.9, learning_rate=0.02)
    seen = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    for _ in range(200):
        agent.learn(Batch(np.repeat(seen, 3, axis=0), np.tile([0, 1, 2], 3), np.arange(9.0) / 9, 100 * np.repeat(seen, 3, axis=0), np.ones(9, bool)))
    np.testing.assert_allclose(agent.values(seen).ravel(), np.arange(9) / 9, atol=0.02)


@pytest.mark.parametrize(("values", "says"), [
    ({"policy": "epsilon", "explore_first": 1.5}, r"explore_first: 1.5 is no share"),
    ({"policy": "epsilon", "explore_last": 2.0}, r"explore_last: 2 is no share"),
    ({"decisions": 500}, r"warmup: .* of 500 decisions nothing would be learned"),
    ({"decisions": 600, "warmup": 100, "train_every": 501}, r"warmup: .* nothing would be learned"),
    ({"hidden": [0]}, r"hidden.0: 0 is not allowed"),
])
def test_an_exploration_or_a_warm_up_that_cannot_be_is_refused(values, says):
    with pytest.raises(ParameterError, match=says):
        block(DQNParams, values, "dqn")
    block(DQNParams, {"policy": "boltzmann", "explore_first": 1.5, "decisions": 532}, "dqn")


@pytest.mark.parametrize("row", [-1, 100, 2.5, True, "first", float("nan")])
def test_an_episode_cannot_begin_where_no_row_is(steps, row):
    few = steps.take(np.arange(len(steps.after)) < 100)
    env, vector = TradingEnv(few, Underlying(0.0), bars=5), TradingVector(few, Underlying(0.0), 5, num_envs=2)
    with pytest.raises(ParameterError, match=f"reset, options, row: {row} is not a whole number from 0 to 99"):
        env.reset(options={"row": row})
    for rows in ([row, row], [3, 4, 5], 3, [[3, 4]]):
        with pytest.raises(ParameterError, match="is not 2 whole numbers from 0 to 99"):
            vector.reset(options={"row": rows})
    for play in (env, vector):
        with pytest.raises(ParameterError, match="unknown option `rows`"):
            play.reset(options={"rows": 3})
        assert play.reset(options={}) is not None
    assert env.reset(options={"row": np.int64(99)})[1]["row"] == 99
    vector.reset(options={"row": [0, 99]})
    assert vector.row.tolist() == [0, 99]


# ------------------------------------------------------------------ killed and resumed


class Power(Exception):
    """What goes out."""


def bits(agent: Agent) -> bytes:
    memory = [v[: len(agent.replay)].tobytes() for v in agent.replay.memory]
    return b"".join([*(w.detach().numpy().tobytes() for w in [*agent.online.parameters(), *agent.target.parameters()]), *memory, str(agent.random.bit_generator.state).encode()])


@pytest.mark.parametrize("product", [Underlying(0.001), Knockout(0.01, 0.05)])
def test_an_agent_is_killed_after_every_round(steps, product, tmp_path: Path):
    options = {"decisions": 500, "agents": 6, "rounds": 3, "gamma": 0.8, "double": True, "duelling": True, "replay": 300, "warmup": 50, "train_every": 12, "batch_size": 16, "target_every": 7}

    def make() -> Agent:
        return an_agent(TradingVector(steps, product, 7, 6), **options)

    def off(_) -> None:
        raise Power

    whole = make()
    rounds = train_agent(whole)
    file = tmp_path / "part.safetensors"
    for _ in range(2):
        with pytest.raises(Power):
            train_agent(make(), file, "a", off)
    resumed = make()
    assert train_agent(resumed, file, "a") == rounds
    assert bits(resumed) == bits(whole)
    with pytest.raises(DataError, match="another training"):
        train_agent(make(), file, "b")
    data = file.read_bytes()
    for damaged, told in ((data[:-1], "damaged one"), *((data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "its bytes were changed") for at in np.linspace(len(data) // 2, len(data) - 1, 5).astype(int))):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=told):
            train_agent(make(), file, "a")


# ------------------------------------------------------------------ the forecaster


def test_weights_decide_how_often_rows_are_played():
    d = planted(400, seed=1)
    first = np.arange(400) < 200
    weight = np.where(first, 1e-6, 1.0)  # the first half says the opposite, and hardly counts
    y = np.where(first, -1, 1) * (d.X["x0"].to_numpy(np.float64) + 0.01)
    model = DQN(DQNParams(decisions=4000), seed=0, purge_bars=1).fit(d.X, y, weight, d.times)
    assert np.corrcoef(model.predict(d.X)["score"], d.X["x0"])[0, 1] > 0.9


QUICK = DQNParams(decisions=1000, warmup=100)


def fitted(d, y=None, params: DQNParams = QUICK, **more) -> DQN:
    return DQN(params, seed=0, purge_bars=2, **more).fit(d.X, d.y if y is None else y, d.weight, d.times)


def test_what_is_learned_does_not_depend_on_the_rows_of_the_map():
    """And not on the rows between, whose labels reach into them; the map does, and on nothing but them."""
    d = planted(1000, seed=4)
    at = np.unique(d.times, return_inverse=True)[1]
    one, gap, other = fitted(d), fitted(d, np.where((at >= 78) & (at < 80), -9.0, d.y)), fitted(d, np.where(at >= 80, -d.y, d.y))
    for model in (gap, other):
        np.testing.assert_array_equal(action_values(model, d.X), action_values(one, d.X))
    pd.testing.assert_frame_equal(gap.predict(d.X), one.predict(d.X), check_exact=True)
    assert one.summary["slope"] > 0
    assert one.summary["odds_slope"] > 0
    assert other.summary["slope"] == other.summary["odds_slope"] == 0  # a signal that turned is none, and not its opposite
    assert np.ptp(other.predict(d.X)["prob_up"]) == 0


def test_rows_known_by_heart_do_not_make_a_forecast_sure():
    d = planted(4000, seed=6, rho=0.0)
    learn, test = d.cut(0, 1500), d.cut(1500, 4000)
    model = fitted(learn, params=DQNParams(hidden=(64, 64), train_every=8, decisions=20_000))
    edge, fresh = ((np.diff(action_values(model, part.X)[:, [0, 2]])[:, 0] - model.summary["mean"]) / model.summary["spread"] for part in (learn.cut(0, 1000), test))
    assert np.corrcoef(edge, learn.y[:1000])[0, 1] > 0.4  # it knows them by heart
    slope, intercept = fit_sigmoid(edge, learn.y[:1000] > 0, learn.weight[:1000])
    assert slope > 3 * model.summary["odds_slope"]
    steep, honest = (log_loss(test.y > 0, p) - np.log(2) for p in (expit(slope * fresh + intercept), model.predict(test.X)["prob_up"]))
    assert steep > 0.1
    assert honest < 0.02


def test_a_later_part_of_one_direction_is_refused():
    d = planted(400, seed=1)
    late = np.unique(d.times, return_inverse=True)[1] >= 32
    with pytest.raises(DataError, match="the 80 rows of the later part have one direction"):
        fitted(d, np.where(late, np.abs(d.y), d.y))
    with pytest.raises(ParameterError, match="would reach into the later one"):
        DQN(QUICK, seed=0).fit(d.X, d.y, d.weight, d.times)


def test_values_that_say_nothing_still_make_a_forecast():
    d = planted(400, seed=1)
    out = fitted(d.__class__(0 * d.X, d.y, d.weight, d.times, d.truth)).predict(0 * d.X)
    assert np.isfinite(out.to_numpy()).all()
    assert np.ptp(out["prob_up"]) == 0


def test_trainings_share_a_folder_and_leave_each_other_alone(tmp_path: Path):
    d = planted(400, seed=1)
    make = lambda seed: DQN(QUICK, seed=seed, purge_bars=1)  # noqa: E731
    for seed in (0, 1):
        make(seed).resumable(tmp_path).fit(d.X, d.y, d.weight, d.times)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert len(before) == 2
    again = make(0).resumable(tmp_path).fit(d.X, d.y, d.weight, d.times)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    pd.testing.assert_frame_equal(again.predict(d.X), make(0).fit(d.X, d.y, d.weight, d.times).predict(d.X), check_exact=True)


def test_windows_of_another_length_have_no_values():
    d = planted(400, seed=1, steps=3)
    model = fitted(d, params=DQNParams(steps=3, decisions=1000, warmup=100))
    assert action_values(model, d.X).shape == (400, 3)
    with pytest.raises(DataError, match="windows of 2 steps, where 3 were fitted"):
        action_values(model, planted(20, seed=1, steps=2).X)


def test_a_council_of_one_seed_agrees_with_itself():
    d = planted(600, seed=2)
    found = council(lambda seed: DQN(DQNParams(decisions=1000, warmup=100), 0, purge_bars=1), (0, 0, 0), d.X, d.y, d.weight, d.times, d.X)
    assert found.q.shape == (3, 600, 3)
    np.testing.assert_allclose(found.correlation, 1.0)


def test_agents_play_any_environment_of_gymnasium():
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    with torch_state(0, threads=1):
        agent = Agent(QNetwork(MLP(4, (32,)), 2), AgentParams(decisions=1000, agents=4, gamma=0.95, train_every=4, batch_size=64, warmup=100, explore_share=0.4), env, seed=0)
    assert train_agent(agent)[-1].decisions == 1000
    assert agent.values(np.zeros((1, 4))).max() > 1.5  # to stand upright and still is worth many steps
