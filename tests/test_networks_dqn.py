"""The deep Q-network beside stable-baselines3 and dynamic programming, and trainings that are killed after any round."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import DQN as PeerDQN
from stable_baselines3.common.env_checker import check_env as peer_check
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from mltrading.core.errors import DataError
from mltrading.market.panel import to_frame
from mltrading.market.simulate import random_walk
from mltrading.models.agent import MLP, Agent, AgentParams, Batch, QNetwork, annealed, train_agent
from mltrading.models.conformance import planted
from mltrading.models.dqn import DQN, DQNParams, council
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


# ------------------------------------------------------------------ the forecaster


def test_weights_decide_how_often_rows_are_played():
    d = planted(400, seed=1)
    first = np.arange(400) < 200
    weight = np.where(first, 1e-6, 1.0)  # the first half says the opposite, and hardly counts
    y = np.where(first, -1, 1) * (d.X["x0"].to_numpy(np.float64) + 0.01)
    model = DQN(DQNParams(decisions=4000), seed=0).fit(d.X, y, weight, d.times)
    assert np.corrcoef(model.predict(d.X)["score"], d.X["x0"])[0, 1] > 0.9


def test_a_council_of_one_seed_agrees_with_itself():
    d = planted(600, seed=2)
    found = council(lambda seed: DQN(DQNParams(decisions=1000, warmup=100), 0), (0, 0, 0), d.X, d.y, d.weight, d.times, d.X)
    assert found.q.shape == (3, 600, 3)
    np.testing.assert_allclose(found.correlation, 1.0)


def test_agents_play_any_environment_of_gymnasium():
    env = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.SAME_STEP)
    with torch_state(0, threads=1):
        agent = Agent(QNetwork(MLP(4, (32,)), 2), AgentParams(decisions=1000, agents=4, gamma=0.95, train_every=4, batch_size=64, warmup=100, explore_share=0.4), env, seed=0)
    assert train_agent(agent)[-1].decisions == 1000
    assert agent.values(np.zeros((1, 4))).max() > 1.5  # to stand upright and still is worth many steps
