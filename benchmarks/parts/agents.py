"""Agents: training beside stable-baselines3's DQN, and environments beside gymnasium's plain loop; by turns, medians, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import DQN as PeerDQN
from stable_baselines3.common.vec_env import DummyVecEnv

from mltrading.models.agent import MLP, Agent, AgentParams, QNetwork, train_agent
from mltrading.models.environment import Knockout, Steps, TradingEnv, TradingVector, Underlying
from mltrading.models.training import torch_state


def steps_for_agents(rows: int = 100_000, features: int = 20) -> Steps:
    """Decisions of one symbol, with the bars after them."""
    rng = np.random.default_rng(0)
    price = 100 * np.exp(np.cumsum(0.002 * rng.standard_normal(rows)))
    bars = np.stack([price, 1.004 * price, 0.996 * price, 1.001 * price])[:, None]
    return Steps(rng.standard_normal((rows, features)).astype(np.float32), 0.01 * rng.standard_normal(rows), np.append(np.arange(1, rows), -1), bars=np.ascontiguousarray(bars))


def in_turns(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two calls that take turns."""
    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    pairs = np.array([(seconds(ours), seconds(theirs)) for _ in range(repeats)])
    return float(np.median(pairs[:, 0])), float(np.median(pairs[:, 1]))


def environment_rows(steps: Steps, agents: int = 1024, moves: int = 200, repeats: int = 5) -> list[dict[str, Any]]:
    """Environment steps per second: the vector beside one environment in a loop, and beside gymnasium's own vector of such."""
    out, rng = [], np.random.default_rng(0)
    for name, product in (("underlying", Underlying(0.001)), ("knock-out", Knockout(0.01, 0.05))):
        vector, single = TradingVector(steps, product, 60, agents), TradingEnv(steps, product, 60)
        loop = SyncVectorEnv([lambda product=product: TradingEnv(steps, product, 60)] * 32, autoreset_mode=AutoresetMode.SAME_STEP)
        actions = rng.integers(3, size=(moves, agents))
        vector.reset(seed=0), single.reset(seed=0), loop.reset(seed=0)

        def ours(vector: Any = vector, actions: Any = actions) -> None:
            for a in actions:
                vector.step(a)

        def plain(single: Any = single, actions: Any = actions) -> None:
            for a in actions.ravel()[:5000]:
                _, _, terminated, truncated, _ = single.step(a)
                if terminated or truncated:
                    single.reset()

        def sync(loop: Any = loop, actions: Any = actions) -> None:
            for a in actions[:100, :32]:
                loop.step(a)

        ours(), plain(), sync()
        for peer, call, count in (("one in a loop", plain, 5000), ("gymnasium SyncVectorEnv", sync, 3200)):
            a, b = in_turns(ours, call, repeats)
            out.append({"work": f"environment, {name}", "steps/s": moves * agents / a, "peer": peer, "peer steps/s": count / b, "ratio": moves * agents / a / (count / b)})
    return out


def training_rows(steps: Steps, decisions: int = 8_000, repeats: int = 3) -> list[dict[str, Any]]:
    """Decisions per second of a training: 32 episodes side by side, 64 × 64 network, batches of 128, a step of learning each 32 (or 4) decisions."""
    out = []
    product, hidden = Underlying(0.001), (64, 64)
    for agents, every in ((32, 32), (4, 4)):
        p = AgentParams(decisions=decisions, agents=agents, gamma=0.9, policy="epsilon", explore_last=0.05, warmup=500, train_every=every, batch_size=128, target_every=50, rounds=1)

        def ours(p: AgentParams = p) -> None:
            with torch_state(0, threads=1):
                env = TradingVector(steps, product, 60, p.agents)
                train_agent(Agent(QNetwork(MLP(env.single_observation_space.shape[0], hidden), 3), p, env, seed=0))

        def theirs(p: AgentParams = p) -> None:
            with torch_state(0, threads=1):
                env = DummyVecEnv([lambda: TradingEnv(steps, product, 60)] * p.agents)
                PeerDQN("MlpPolicy", env, learning_rate=p.learning_rate, buffer_size=p.replay, learning_starts=p.warmup, batch_size=p.batch_size, gamma=p.gamma, train_freq=1, gradient_steps=1,
                        target_update_interval=50 * p.agents, exploration_fraction=p.explore_share, exploration_final_eps=p.explore_last, policy_kwargs={"net_arch": list(hidden)}, device="cpu", seed=0).learn(decisions)

        a, b = in_turns(ours, theirs, repeats)
        out.append({"work": f"training, {agents} episodes at once", "steps/s": decisions / a, "peer": "stable-baselines3 DQN", "peer steps/s": decisions / b, "ratio": b / a})
    return out
