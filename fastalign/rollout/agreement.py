"""Whether an engine of its own still samples from the policy that is being trained."""

from __future__ import annotations

import torch
from torch import Tensor

from fastalign.data.packing import pack
from fastalign.errors import UserError
from fastalign.models.policy import Policy
from fastalign.rollout.engine import Rollout

TOKENS = 2048
TOLERANCE = 0.1


class Disagreement(UserError):
    """The engine's log-probs are not the policy's; the message is one line for the user."""


@torch.no_grad()
def gap(policy: Policy, rollouts: list[Rollout], temperature: float, tokens: int = TOKENS) -> float:
    """mean |log p_engine - log p_policy| over the response tokens of the first rollouts, nats.

    Args:
        policy: what the responses should have been drawn from, at `temperature`.
        rollouts: what the engine gave.
        tokens: look at as many whole rollouts as fit, at least one.
    """
    chosen: list[Rollout] = []
    count = 0
    for rollout in rollouts:
        count += len(rollout.prompt) + len(rollout.completion)
        if chosen and count > tokens:
            break
        chosen.append(rollout)
    sequences = [r.prompt + r.completion for r in chosen]
    packed = pack(sequences, [len(r.prompt) for r in chosen], share=policy.shares_prompts)
    was_training = policy.training
    policy.eval()
    ours, _ = policy.logprobs(packed.to(policy.head_weight.device), temperature=temperature)
    policy.train(was_training)
    theirs: Tensor = torch.tensor([x for r in chosen for x in r.logp])
    return (ours.cpu() - theirs).abs().mean().item()


def check(policy: Policy, rollouts: list[Rollout], temperature: float, engine: str) -> float:
    """`gap`, which rounding may cause up to 0.1 nats a token in half precision.

    Raises:
        Disagreement: it is larger; training on such samples would be off-policy without a word.
    """
    found = gap(policy, rollouts, temperature)
    if not found <= TOLERANCE:
        raise Disagreement(
            f"{engine} samples from another policy than the one that is trained: their log-probs "
            f"of the same tokens differ by {found:.3f} nats on average, expected at most "
            f"{TOLERANCE}. Its weights were not updated, or it draws at another temperature"
        )
    return found
