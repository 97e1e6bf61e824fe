"""What a trained policy is worth, exactly: the probability of every string under the saved model.

Nothing of the trainer is used: the model is read by `transformers` in float64, and each string's
probability is the product of its letters'. The probabilities of all strings sum to 1, but for what
the policy gives to tokens that are no letters: what it says is left out, and reported.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign import theory
from fastalign.errors import UserError
from fastalign.laboratory.source import LETTERS, PROMPT, Source

MOST_OUTSIDE = 0.2


class Distribution(NamedTuple):
    """A policy over the strings of a source."""

    p: Tensor
    """[K^m] float64, sum 1."""
    outside: float
    """The probability of what is no string of letters, which ``p`` leaves out."""


@torch.no_grad()
def distribution(folder: Path, source: Source, prompt: list[int] | None = None) -> Distribution:
    """The policy in a folder, over the strings of ``source``.

    Args:
        folder: of a `transformers` model and its tokenizer.
        prompt: token ids; by default those of the source's prompt.

    Raises:
        UserError: more than a fifth of the probability lies outside of the strings.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    if prompt is None:
        prompt = tokenizer(PROMPT)["input_ids"]
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS[: source.k])))
    letters = ids[source.strings]
    asked = torch.tensor(prompt).expand(len(letters), -1)
    logits = model(input_ids=torch.cat([asked, letters], 1)).logits
    logp = logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    p = logp.gather(2, letters[:, :, None])[:, :, 0].sum(1).exp()
    total = float(p.sum())
    if not 1 - MOST_OUTSIDE <= total <= 1 + 1e-9:
        raise UserError(
            f"{folder}: the probabilities of all strings sum to {total:.6f}; expected 1, less at "
            f"most {MOST_OUTSIDE:g} for tokens that are no letters"
        )
    return Distribution(p / total, max(0.0, 1 - total))


def total_variation(p: Tensor, q: Tensor) -> float:
    """The share of probability that lies elsewhere, 1/2 sum |p - q|."""
    return float((p - q).abs().sum()) / 2


def measure(
    policy: Tensor, base: Tensor, target: Tensor, reward: Tensor
) -> dict[str, float | None]:
    """Where a policy stands: on the frontier of ``base``, and from what it was to become.

    Args:
        policy, base, target: [S] float64, distributions.
        reward: [S].

    Returns:
        "kl" KL(policy || base), "reward", "frontier_reward" at that KL, "regret" and "regret_share"
        of the reward's range; "target_kl", "target_reward" and "target_regret_share", the same of
        the target; "kl_to_target" KL(policy || target) (None: infinite), "kl_from_target"
        KL(target || policy) and "tv_to_target".
    """
    span = float(reward.max() - reward.min())
    found = theory.regret(policy, base, reward)
    aim = theory.regret(target, base, reward)
    to_target = theory.kl_divergence(policy, target)
    return {
        "kl": found.kl,
        "reward": found.reward,
        "frontier_reward": found.frontier_reward,
        "regret": found.regret,
        "regret_share": found.regret / span,
        "target_kl": aim.kl,
        "target_reward": aim.reward,
        "target_regret_share": aim.regret / span,
        "kl_to_target": to_target if math.isfinite(to_target) else None,
        "kl_from_target": theory.kl_divergence(target, policy),
        "tv_to_target": total_variation(policy, target),
    }
