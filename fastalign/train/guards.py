"""Guards: what goes wrong without a word when a policy learns from its own samples.

After every step `Guards.check` looks at the responses it learned from and raises an alarm, told
once a run, for

    sampling_gap   log-probs of the sampled tokens are not those the trainer computes for them
    negative_kl    the estimate of KL(pi || pi_init) is below 0 by more than chance allows
    entropy        the policy's entropy has collapsed
    length         responses have become several times as short or as long
    repeats        responses repeat themselves
    distinct       the responses to a prompt have become the same ones
    reward_std     all rewards are equal, or those of each prompt's responses: nothing to learn from

Four of them, from entropy to distinct, compare with the first step. `GuardConfig.stop` makes alarms
end the run. A budget of KL (`GuardConfig.max_kl`) is no alarm: where it is used up, the run ends in
order.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign import ops
from fastalign.rollout import Rollout
from fastalign.train.experience import Experience
from fastalign.train.run import RunError, Stopped, at_least

ALARMS = (
    "sampling_gap",
    "negative_kl",
    "entropy",
    "length",
    "repeats",
    "distinct",
    "reward_std",
)
N_GRAM = 4
# Rewards nearer to each other than this are the same: packs of other neighbours round differently.
FLAT = 1e-5
STANDARD_ERRORS = 3.0
KL_ROUNDING = 0.01  # nats a response; a policy at pi_init has KL 0 but for the rounding of sums

log = logging.getLogger("fastalign")


@dataclass(frozen=True)
class GuardConfig:
    """When a run that learns from its own samples raises an alarm; 0 switches one off."""

    stop: str = ""
    """Alarms that end the run, with commas: sampling_gap, negative_kl, entropy, length, repeats,
    distinct, reward_std; or all. The others are told once."""
    sampling_gap: float = 0.05
    """Mean difference of sampling and training log-probs of a token, nats."""
    negative_kl: float = 3.0
    """Standard errors below 0 of the mean KL(pi || pi_init) of a response."""
    entropy: float = 0.2
    """Share of its first value that the entropy of a token falls below."""
    length: float = 3.0
    """Factor by which the mean length of a response shrinks or grows."""
    repeats: float = 0.3
    """Rise of the share of a response's 4-grams that stood in it before."""
    distinct: float = 0.5
    """Share of its first value that the share of different responses to a prompt falls below."""
    reward_std: bool = True
    """Whether to look for rewards that are all equal."""
    max_kl: float | None = None
    """Budget: the run ends in order after the step whose responses have a mean KL(pi || pi_init)
    of more than this many nats."""

    def __post_init__(self) -> None:
        at_least(self, 0, *(name for name in ALARMS if name != "reward_std"))
        if self.max_kl is not None and not self.max_kl > 0:
            raise RunError(f"guards: expected max_kl > 0, got {self.max_kl}")
        if 0 < self.length < 1:
            raise RunError(f"guards: expected length >= 1, or 0 for no alarm, got {self.length}")
        unknown = self.fatal - set(ALARMS)
        if unknown:
            raise RunError(
                f"guards: unknown alarm {', '.join(sorted(unknown))} in stop; expected some of "
                f"{', '.join(ALARMS)}, or all"
            )

    @property
    def fatal(self) -> set[str]:
        """The alarms that end the run."""
        words = {word.strip() for word in self.stop.split(",")} - {""}
        return set(ALARMS) if words == {"all"} else words


class Guards:
    """Looks at every step of a run. What it remembers belongs into the checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.first: dict[str, float] = {}  # what the first step showed
        self.told: list[str] = []
        self.step, self.kl = 0, 0.0  # the last one, and the mean KL of its responses

    def state_dict(self) -> dict[str, Any]:
        return {
            "first": dict(self.first),
            "told": list(self.told),
            "step": self.step,
            "kl": self.kl,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.told = dict(state["first"]), list(state["told"])
        self.step, self.kl = state["step"], state["kl"]

    @property
    def spent(self) -> str | None:
        """Why the run is to end in order, where the last step used up its budget of KL."""
        most = self.config.max_kl
        if most is None or self.kl <= most:
            return None
        return (
            f"step {self.step}: KL(pi || pi_init) of a response is {self.kl:.3g} nats, the budget "
            f"{most:g} (guards.max_kl): the run ends here"
        )

    def check(self, step: int, found: Experience, metrics: dict[str, float]) -> dict[str, float]:
        """Looks at a step.

        Args:
            found: the responses that the step learned from.
            metrics: of the step; read are "entropy" (nats a token) and "sampling_gap" (mean
                |difference| of sampling and training log-probs, nats a token), where they are.

        Returns:
            "repeats" and "distinct" (shares, means over responses and prompts), "reward/zero_std"
            (the share of prompts whose responses all have the same reward), "kl/k1_stderr".

        Raises:
            Stopped: an alarm that `config.stop` names.
        """
        kl = found.per_response(ops.kl_estimate(found.logp, found.ref_logp, kind="k1").double())
        groups = by_prompt(found.rollouts)
        seen = {"repeats": repeats(found.rollouts)}
        if any(len(group) > 1 for group in groups):
            seen["distinct"] = distinct(found.rollouts, groups)
            seen["reward/zero_std"] = zero_std(found.proxy, groups)
        if len(kl) > 1:
            seen["kl/k1_stderr"] = kl.std().item() / len(kl) ** 0.5
        now = {name: metrics[name] for name in ("entropy",) if name in metrics}
        now |= {name: seen[name] for name in ("repeats", "distinct") if name in seen}
        now["length"] = found.cu_seqlens.diff().double().mean().item()
        for name, value in now.items():
            self.first.setdefault(name, value)
        alarms = self._sampling(kl, seen, metrics) | self._collapse(now)
        alarms |= self._rewards(found.proxy, seen)
        for name, text in alarms.items():
            self._raise(step, name, text)
        self.step, self.kl = step, kl.mean().item()
        return seen

    def _raise(self, step: int, name: str, text: str) -> None:
        if name in self.config.fatal:
            raise Stopped(f"step {step}: {text} (guards.stop names {name})")
        if name not in self.told:
            self.told.append(name)
            log.warning("step %d: %s (told once)", step, text)

    def _sampling(
        self, kl: Tensor, seen: dict[str, float], metrics: dict[str, float]
    ) -> dict[str, str]:
        alarms, config = {}, self.config
        gap = metrics.get("sampling_gap")
        apart = bool(gap is not None and config.sampling_gap and gap > config.sampling_gap)
        if apart:
            alarms["sampling_gap"] = (
                f"sampling and training log-probs of a token differ by {gap:.3g} nats on average "
                f"(tolerance {config.sampling_gap:g}): the sampler has older weights, another "
                "temperature or a lower precision"
            )
        error, mean = seen.get("kl/k1_stderr"), kl.mean().item()
        if error is None or not config.negative_kl:
            return alarms
        if mean < -max(config.negative_kl * error, KL_ROUNDING):
            if apart:
                cause = "the sampler's log-probs are not the policy's, see sampling_gap"
            elif gap is None:
                cause = (
                    "the sampler's log-probs are not the policy's (older weights, another "
                    "temperature), or the responses are not drawn from them (top-k, top-p, edited)"
                )
            else:
                cause = (
                    "the log-probs are the policy's, so the responses are not drawn from them "
                    "(top-k, top-p, edited), or pi_init's are of another temperature"
                )
            alarms["negative_kl"] = (
                f"KL(pi || pi_init) of a response comes out as {mean:.3g} nats, "
                f"{-mean / error if error else float('inf'):.1f} standard errors below 0: {cause}"
            )
        return alarms

    def _collapse(self, now: dict[str, float]) -> dict[str, str]:
        alarms, config, first = {}, self.config, self.first
        if "entropy" in now and now["entropy"] < config.entropy * first["entropy"]:
            alarms["entropy"] = (
                f"the policy's entropy is {now['entropy']:.3g} nats a token, "
                f"{first['entropy']:.3g} at first: it hardly draws anything but its favourite"
            )
        was, length = first["length"], now["length"]
        if config.length and not was / config.length <= length <= was * config.length:
            alarms["length"] = (
                f"responses have {length:.3g} tokens on average, {was:.3g} at first: the reward "
                f"may pay for {'shortness' if length < was else 'length'}"
            )
        if config.repeats and now["repeats"] > first["repeats"] + config.repeats:
            alarms["repeats"] = (
                f"{now['repeats']:.0%} of a response's {N_GRAM}-grams stood in it before, "
                f"{first['repeats']:.0%} at first: responses repeat themselves"
            )
        if "distinct" in now and now["distinct"] < config.distinct * first["distinct"]:
            alarms["distinct"] = (
                f"{now['distinct']:.0%} of the responses to a prompt are different ones, "
                f"{first['distinct']:.0%} at first: the policy has one answer left"
            )
        return alarms

    def _rewards(self, rewards: Tensor, seen: dict[str, float]) -> dict[str, str]:
        if not self.config.reward_std or len(rewards) < 2:
            return {}
        if bool(flat(rewards)):
            same = f"the rewards of all {len(rewards)} responses are {rewards[0].item():g}"
        elif seen.get("reward/zero_std") == 1.0:
            same = "the responses to each prompt all have the same reward"
        else:
            return {}
        return {"reward_std": f"{same}: there is nothing to tell good responses from bad ones"}


def by_prompt(rollouts: list[Rollout]) -> list[list[int]]:
    """The responses of each prompt."""
    groups: dict[int, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        groups.setdefault(rollout.prompt_index, []).append(i)
    return list(groups.values())


def repeats(rollouts: list[Rollout]) -> float:
    """The share of 4-grams of tokens that stood in their response before; mean over the responses
    of four tokens and more, 0 where there are none."""
    shares = []
    for rollout in rollouts:
        n = len(rollout.completion) - N_GRAM + 1
        if n > 0:
            grams = set(zip(*(rollout.completion[i:] for i in range(N_GRAM)), strict=False))
            shares.append(1 - len(grams) / n)
    return sum(shares) / max(1, len(shares))


def distinct(rollouts: list[Rollout], groups: list[list[int]]) -> float:
    """Different responses over responses to a prompt; mean over the prompts with several."""
    shares = [
        len({tuple(rollouts[i].completion) for i in group}) / len(group)
        for group in groups
        if len(group) > 1
    ]
    return sum(shares) / len(shares)


def flat(rewards: Tensor) -> Tensor:
    """bool [...]: whether rewards [..., n] are all the same but for rounding."""
    return rewards.amax(-1) - rewards.amin(-1) <= FLAT


def zero_std(rewards: Tensor, groups: list[list[int]]) -> float:
    """The share of prompts, of those with several responses, that have one reward for all."""
    several = [rewards[torch.tensor(group)] for group in groups if len(group) > 1]
    return sum(bool(flat(r)) for r in several) / len(several)
