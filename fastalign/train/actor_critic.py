"""What apa, awr and ppo share: rewards of single tokens, a critic, advantages by GAE.

    scaled   = score / std, or (score - mean) / std, by the running moments of all scores seen
    r_t      = -kl_coef * K_t(pi || pi_init) + [t last] clip(scaled)          ops.token_rewards
    delta_t  = r_t + gamma V_{t+1} - V_t
    A_t      = delta_t + gamma lam A_{t+1},    R_t = A_t + V_t                ops.gae

from the values V of the critic that the round began with. R is not whitened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastalign import ops
from fastalign.models import Policy
from fastalign.rollout import Rollout
from fastalign.train.critic import KINDS as CRITICS
from fastalign.train.critic import Critic, make_critic, pretrain
from fastalign.train.experience import Experience
from fastalign.train.meter import Meter
from fastalign.train.moments import RunningMoments
from fastalign.train.online import UNSET, Method, OnlineConfig, Signal, one_of
from fastalign.train.run import RunError, at_least

WHITEN_OVER = ("round", "update", "padded")


@dataclass
class ActorCriticConfig(OnlineConfig):
    """What every online method with a critic has."""

    gamma: float = 1.0
    """Discount of GAE."""
    lam: float = 0.95
    """Decay of GAE."""
    vf_coef: float = 1.0
    """Weight of the value loss."""
    value_clip: float = 0.0
    """Values may move this far from what they were when the round was sampled; 0: no bound."""
    critic: str = "trunk"
    """Where values come from: trunk, a head on the policy; separate, a network that begins as
    pi_init; reward, one that begins as the reward ensemble."""
    critic_steps: int = 0
    """Updates of the critic alone on pi_init's own responses, before the first step; as many rounds
    are sampled for it as it takes to learn from none more than about four times."""
    whiten: bool = True
    """Whiten the advantages."""
    whiten_over: str = UNSET
    """Over the response tokens of the round (the default), of each update, or padded: those of an
    update with the zeros that pad its responses to the longest."""
    scale_reward: bool = True
    """Divide rewards by the running standard deviation of all rewards seen."""
    center_reward: bool = False
    """Subtract their running mean before."""
    clip_reward: float = 0.0
    """Bound of the magnitude of a scaled reward; 0: none."""
    missing_eos_penalty: float = 0.0
    """Taken from the scaled reward of a response that was cut off before its end."""
    value_lr: float = UNSET
    """Peak learning rate of the critic; by default 3e-3 for a head on the trunk, which starts from
    nothing, and three times lr for a network of its own."""

    def __post_init__(self) -> None:
        if not self.whiten and self.whiten_over not in (UNSET, "round"):
            raise RunError(f"--whiten_over {self.whiten_over} is for --whiten true; it is false")
        self.whiten_over = self.whiten_over or "round"
        if self.value_lr is UNSET:
            self.value_lr = 3e-3 if self.critic == "trunk" else 3 * self.lr
        super().__post_init__()
        at_least(self, 0, "gamma", "lam", "vf_coef", "value_lr", "value_clip", "clip_reward")
        at_least(self, 0, "missing_eos_penalty", "critic_steps")
        one_of(self, "whiten_over", WHITEN_OVER)
        one_of(self, "critic", CRITICS)
        if self.center_reward and not self.scale_reward:
            raise RunError("--center_reward goes with --scale_reward true; it is false")


class ActorCritic(Method):
    """A method whose tokens learn from advantages over a critic."""

    def __init__(self, config: ActorCriticConfig) -> None:
        self.config = config
        self.vf_coef, self.value_lr = config.vf_coef, config.value_lr
        self.value_clip = config.value_clip or None
        self.value_head = config.critic == "trunk"
        self.critic_steps = config.critic_steps
        self.moments = RunningMoments()
        self.kl_in_reward = True

    @property
    def weights(self) -> dict[str, float]:
        return {"loss/value": self.vf_coef}

    def make_critic(self, policy: Policy, tokenizer: Any, device: torch.device) -> Critic:
        return make_critic(self.config, policy, tokenizer, device)

    def state(self) -> dict[str, Any]:
        return {"moments": self.moments}

    def scaled(self, scores: Tensor) -> Tensor:
        """Scores [S] in units of all scores' deviation, these included."""
        self.moments.update(scores)
        if not self.config.scale_reward:
            return scores
        return self.moments.normalize(scores, shift_mean=self.config.center_reward)

    def rewards(self, found: Experience, kl_coef: float) -> Tensor:
        """Of each token, [N]."""
        config = self.config
        rewards, _ = ops.token_rewards(
            found.logp,
            found.ref_logp,
            self.scaled(found.proxy),
            kl_coef=kl_coef if self.kl_in_reward else 0.0,
            kl_kind=config.kl_kind if self.kl_in_reward else "k1",
            clip_score=config.clip_reward or None,
            finished=found.finished,
            missing_eos_penalty=config.missing_eos_penalty,
            cu_seqlens=found.cu_seqlens,
        )
        return rewards

    def pretrain(
        self, critic: Critic, rounds: list[Experience], kl_coef: float, meter: Meter
    ) -> dict[str, float]:
        """The critic learns the returns of pi_init's responses before the policy moves."""
        config = self.config
        rollouts: list[Rollout] = []
        returns: list[Tensor] = []
        for found in rounds:
            rewards = self.rewards(found, kl_coef)
            # Of values 0 and lam 1, advantages are the sums of the rewards to come.
            to_come, _ = ops.gae(
                rewards,
                torch.zeros_like(rewards),
                gamma=config.gamma,
                lam=1.0,
                cu_seqlens=found.cu_seqlens,
            )
            returns.append(to_come)
            before = 1 + rollouts[-1].prompt_index if rollouts else 0
            rollouts += [replace(r, prompt_index=before + r.prompt_index) for r in found.rollouts]
        return pretrain(
            critic,
            rollouts,
            torch.cat(returns),
            steps=config.critic_steps,
            lr=config.value_lr,
            batch_tokens=config.batch_tokens,
            micro_tokens=config.micro_tokens,
            dtype=config.dtype,
            seed=config.seed,
            meter=meter,
        )

    def signal(self, found: Experience, values: Tensor | None, kl_coef: float) -> Signal:
        config = self.config
        assert values is not None
        rewards = self.rewards(found, kl_coef)
        advantages, returns = ops.gae(
            rewards, values, gamma=config.gamma, lam=config.lam, cu_seqlens=found.cu_seqlens
        )
        metrics = {}
        if values.numel() > 1:  # a single token has no variance
            unexplained = (returns - values).var().item() / max(returns.var().item(), 1e-12)
            metrics = {
                "advantage/std": advantages.std().item(),
                "value/explained_variance": 1 - unexplained,
            }
        if config.whiten and config.whiten_over == "round":
            advantages = ops.whiten(advantages)
        tokens = {
            "advantages": advantages,
            "returns": returns,
            "old_values": values,
            "old_logp": found.logp,
            "ref_logp": found.ref_logp,
        }
        return Signal(tokens, metrics, list(range(len(found.rollouts))))

    def of_update(
        self, rows: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        config = self.config
        if config.whiten and config.whiten_over != "round":
            rows = rows | {"advantages": whitened(rows["advantages"], config.whiten_over)}
        return rows, {}


def whitened(advantages: list[Tensor], over: str) -> list[Tensor]:
    """Advantages of the responses of an update with mean 0 and variance 1.

    "update": of their tokens. "padded": of the matrix of them, padded with zeros to the longest,
    as in the code of 2306.02231: the zeros count in mean and variance.
    """
    lengths = [len(a) for a in advantages]
    if over == "padded":
        padded = torch.nn.utils.rnn.pad_sequence(advantages, batch_first=True)
        return [row[:n] for row, n in zip(ops.whiten(padded), lengths, strict=True)]
    return list(ops.whiten(torch.cat(advantages)).split(lengths))
