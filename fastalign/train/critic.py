"""The critic: V(s), the return to expect from a state, in one of three forms.

    trunk      a value head on the policy's own hidden states: nothing to compute beside the policy
    separate   a value head on a trunk of its own, which begins as pi_init's
    reward     V(s) = w . h(s) + b with the reward ensemble's encoder and the mean of its heads,
               w = mean_k w_k / scale_k,   b = mean_k (b_k - center_k) / scale_k,
               so that V of a whole response begins as its score, and V of a state as the score of
               the response so far (PPO-max, arXiv 2307.04964, begins its critic so)

All of them are trained: of a trunk of its own every weight. `pretrain` lets a critic learn returns
of pi_init's own responses before the policy moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastalign import losses
from fastalign.data.packing import (
    Packed,
    batches_of,
    held,
    pack,
    same_prompts,
    token_budget_batches,
)
from fastalign.errors import UserError
from fastalign.models import Policy, RewardEnsemble, load_tokenizer
from fastalign.models.attention import NAME, packed_hidden, register
from fastalign.models.flops import forward_flops, training_flops
from fastalign.models.policy import ValueHead
from fastalign.models.pretrained import context, load_model
from fastalign.models.recompute import recompute_activations
from fastalign.models.reward import check_same_tokenizer
from fastalign.rollout import Rollout
from fastalign.streams import stream
from fastalign.train import distributed
from fastalign.train.meter import Meter
from fastalign.train.reward_source import parse_reward
from fastalign.train.run import RunError, Stopped, autocast

KINDS = ("trunk", "separate", "reward")
PASSES = (
    4  # over responses to pre-train on; of 256 responses 18 passes made a critic worse than none
)
WARMUP = 10


class CriticOptions(Protocol):
    """What of a command's configuration is read here."""

    critic: str
    policy: str
    reward: str
    activation_checkpointing: bool


class Critic(Protocol):
    """What the loop needs of a critic."""

    @property
    def module(self) -> nn.Module | None:
        """What optimizer and checkpoint take beside the policy; None where it is all the
        policy's."""
        ...

    @property
    def shares_prompts(self) -> bool:
        """Whether it takes packs in which several responses share a prompt."""
        ...

    def values(self, packed: Packed, hidden: Tensor | None = None) -> Tensor:
        """fp32 [M]: V of the states before the M response tokens of a pack, differentiable.

        `hidden`: the policy's hidden states [M, H] at these places, where they are at hand; a
        critic that has its own trunk does not look at them.
        """
        ...

    def values_alone(self, packed: Packed) -> Tensor:
        """The same; their gradient reaches the critic's own parameters and no others."""
        ...

    def trained(self) -> list[nn.Parameter]:
        """The critic's own parameters."""
        ...

    @property
    def sharded(self) -> nn.Module:
        """What is spread over several processes as one, and holds the critic."""
        ...


class TrunkCritic:
    """The policy's value head."""

    module = None

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @property
    def shares_prompts(self) -> bool:
        return self.policy.shares_prompts

    def values(self, packed: Packed, hidden: Tensor | None = None) -> Tensor:
        return self.policy.values(self.policy.response_hidden(packed) if hidden is None else hidden)

    def values_alone(self, packed: Packed) -> Tensor:
        with torch.no_grad():
            hidden = self.policy.response_hidden(packed)
        return self.policy.values(hidden)

    def trained(self) -> list[nn.Parameter]:
        assert self.policy.value_head is not None
        return list(self.policy.value_head.parameters())

    @property
    def sharded(self) -> nn.Module:
        return self.policy


class LinearHead(nn.Module):
    """V = w . h + b in fp32, from the mean of an ensemble's heads times `weight`."""

    def __init__(self, ensemble: RewardEnsemble, weight: float) -> None:
        super().__init__()
        scale = ensemble.scale.detach()
        self.weight = nn.Parameter(weight * (ensemble.weight.detach() / scale[:, None]).mean(0))
        offset = (ensemble.bias.detach() - ensemble.center) / scale
        self.bias = nn.Parameter(weight * offset.mean(0, keepdim=True))

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] -> fp32 [N]."""
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ self.weight + self.bias


class OwnCritic(nn.Module):
    """A trunk of its own and a head on it.

    Args:
        trunk: a causal `transformers` base model with packed attention.
        head: [N, H] -> fp32 [N].
        shares_prompts: see `Critic`.
    """

    def __init__(self, trunk: Any, head: nn.Module, shares_prompts: bool) -> None:
        super().__init__()
        self.trunk, self.head, self.shares_prompts = trunk, head, shares_prompts
        self.requires_grad_(True).eval()

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return context(self.trunk)

    def values(self, packed: Packed, hidden: Tensor | None = None) -> Tensor:
        return self.head(packed_hidden(self.trunk, packed).index_select(0, packed.kept))

    def values_alone(self, packed: Packed) -> Tensor:
        return self.values(packed)

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())

    @property
    def sharded(self) -> nn.Module:
        return self


def make_critic(
    config: CriticOptions, policy: Policy, tokenizer: Any, device: torch.device
) -> Critic:
    """The critic that `config.critic` names, on `device`.

    Args:
        config: the kind; `policy`, whose trunk a separate one begins as; `reward`, whose ensemble
            another one begins as.
        policy: what is trained, with a value head where the critic is that.
        tokenizer: the policy's.

    Raises:
        UserError: an unknown kind, a policy without value head, a reward without ensemble, an
            ensemble on another tokenizer or with an encoder that sees later tokens.
    """
    if config.critic not in KINDS:
        raise RunError(f"unknown critic {config.critic!r}: expected one of {', '.join(KINDS)}")
    if config.critic == "trunk":
        if policy.value_head is None:
            raise RunError("critic trunk: expected a policy with a value head, got one without")
        return TrunkCritic(policy)
    separate = config.critic == "separate"
    own = _separate(config, policy) if separate else _of_reward(config, tokenizer)
    if config.activation_checkpointing:
        recompute_activations(own.trunk)
    return own.to(device)


def _separate(config: CriticOptions, policy: Policy) -> OwnCritic:
    from transformers import AutoModel

    register()
    trunk = load_model(config.policy, AutoModel)
    trunk.set_attn_implementation(NAME)
    return OwnCritic(trunk, ValueHead(trunk.config.hidden_size), policy.shares_prompts)


def _of_reward(config: CriticOptions, tokenizer: Any) -> OwnCritic:
    entries = [entry for entry in parse_reward(config.reward) if entry.function is None]
    if not entries:
        raise RunError(
            f"critic reward begins as a reward ensemble, and --reward {config.reward} has none; "
            "expected critic trunk or separate"
        )
    folder, *others = entries[0].folders
    if others:
        raise RunError(
            f"critic reward begins as one reward model, and --reward {config.reward} has "
            f"{1 + len(others)} with an encoder each; expected critic trunk or separate"
        )
    ensemble = RewardEnsemble.load(folder)
    check_same_tokenizer(tokenizer, load_tokenizer(folder), config.policy, folder)
    check_causal(ensemble.encoder, folder)
    head = LinearHead(ensemble, entries[0].weight)
    return OwnCritic(ensemble.encoder, head, ensemble.shares_prompts)


@torch.no_grad()
def check_causal(trunk: Any, name: str) -> None:
    """Refuses a trunk whose states know the tokens after them: its V would be told the end.

    Raises:
        UserError: the state of a token changes with the next token.
    """
    vocab = trunk.config.vocab_size
    one, other = (
        packed_hidden(trunk, pack([[1 % vocab, 2 % vocab, last % vocab]]))[:2] for last in (3, 4)
    )
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"critic reward: the encoder of {name} reads later tokens too, so it cannot value the "
            "beginning of a response; expected a causal one"
        )


@torch.no_grad()
def values_of(critic: Critic, rollouts: list[Rollout], micro_tokens: int, dtype: str) -> Tensor:
    """fp32 [N], on the CPU: V of the state before every response token, response by response.

    Args:
        micro_tokens: tokens of one forward pass.
        dtype: of it, as in the configuration.
    """
    rows: list[Tensor] = [torch.empty(0)] * len(rollouts)
    prompts = same_prompts(r.prompt for r in rollouts) if critic.shares_prompts else None
    for batch in token_budget_batches(_lengths(rollouts), micro_tokens, prompts=prompts):
        with autocast(_device(critic), dtype):
            values = critic.values(_packed([rollouts[i] for i in batch], critic)).cpu()
        sizes = [len(rollouts[i].completion) for i in batch]
        for i, row in zip(batch, values.split(sizes), strict=True):
            rows[i] = row
    return torch.cat(rows)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(R - V) / var(R) over tokens: 1 of a perfect critic, 0 of a constant; of returns that
    are all the same NaN."""
    spread = returns.double().var()
    return (1 - (returns.double() - values.double()).var() / spread).item() if spread else math.nan


def pretrain(
    critic: Critic,
    rollouts: list[Rollout],
    returns: Tensor,
    *,
    steps: int,
    lr: float,
    batch_tokens: int,
    micro_tokens: int,
    dtype: str,
    seed: int,
    meter: Meter | None = None,
) -> dict[str, float]:
    """Regression of V to returns before the policy moves; the policy stays as it is.

    Minimises the mean over response tokens of (V - R)^2 / 2 by AdamW at a constant rate after ten
    steps of warm-up, gradient norm at most 1. Every fourth prompt is held out.

    Args:
        rollouts: pi_init's, S of N response tokens.
        returns: fp32 [N], response by response, in the units of training.
        steps: updates, of `batch_tokens` tokens (prompts included) each.
        lr: learning rate.
        micro_tokens, dtype: size and precision of one forward pass.
        seed: of the order.
        meter: counts the passes.

    Returns:
        "value/explained_variance/before" and ".../after" on the held-out prompts (on all, where
        there are fewer than four), and "value/pretrain_loss", the mean over the last tenth of the
        updates.

    Raises:
        ValueError: not one return for each response token.
        Stopped: a loss or gradient that is not finite.
    """
    sizes = [len(r.completion) for r in rollouts]
    if returns.shape != (sum(sizes),):
        raise ValueError(
            f"pretrain: expected returns of the {sum(sizes)} response tokens, got "
            f"{tuple(returns.shape)}"
        )
    of = returns.split(sizes)
    indices = sorted({r.prompt_index for r in rollouts})
    apart = set(indices[3::4])
    train = [i for i, r in enumerate(rollouts) if r.prompt_index not in apart]
    test = [i for i, r in enumerate(rollouts) if r.prompt_index in apart] or train

    lengths = _lengths(rollouts)

    prompts = same_prompts(r.prompt for r in rollouts) if critic.shares_prompts else None

    def count(flops: Callable[..., float], passes: list[list[int]]) -> None:
        if meter is not None:
            own, before = held(passes, lengths, prompts)
            meter.count(flops=flops(critic.sharded, own, 0, before))

    # The trunk under a value head is read, and learns nothing.
    learning = forward_flops if isinstance(critic, TrunkCritic) else training_flops

    def explained() -> float:
        count(forward_flops, batches_of(test, lengths, micro_tokens, prompts))
        values = values_of(critic, [rollouts[i] for i in test], micro_tokens, dtype)
        return explained_variance(values, torch.cat([of[i] for i in test]))

    before, device, module = explained(), _device(critic), critic.sharded
    distributed.let_go(module)
    parameters = critic.trained()
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    train_lengths = [lengths[i] for i in train]
    train_prompts = None if prompts is None else prompts.of(train)
    done, epoch, last = 0, 0, []
    while done < steps:
        order = stream(seed, "pretrain", epoch)
        batches = token_budget_batches(train_lengths, batch_tokens, generator=order)
        for batch in batches[: steps - done]:
            chosen = [train[i] for i in batch]
            count(learning, distributed.passes(chosen, lengths, micro_tokens, prompts))
            n_tokens = sum(sizes[train[i]] for i in batch)
            total = torch.zeros((), device=device)
            for micro in distributed.micros(
                module, batch, train_lengths, micro_tokens, train_prompts
            ):
                chosen = [train[i] for i in micro.rows]
                with autocast(device, dtype):
                    values = critic.values_alone(_packed([rollouts[i] for i in chosen], critic))
                targets = torch.cat([of[i] for i in chosen]).to(device)
                loss = losses.ValueLoss()(values, targets).sum() / micro.divisor(n_tokens)
                loss.backward()
                total += loss.detach()
            distributed.total(total)
            norm = distributed.whole(nn.utils.clip_grad_norm_(parameters, 1.0))
            if not math.isfinite(float(norm)) or not math.isfinite(float(total)):
                raise Stopped(
                    f"pre-training of the critic, update {done + 1}: loss {float(total):g}, "
                    f"gradient norm {float(norm):g}"
                )
            adam.param_groups[0]["lr"] = lr * min(1.0, (done + 1) / WARMUP)
            adam.step()
            adam.zero_grad(set_to_none=True)
            done += 1
            if done > steps - max(1, steps // 10):
                last.append(float(total))
        epoch += 1
    return {
        "value/explained_variance/before": before,
        "value/explained_variance/after": explained(),
        "value/pretrain_loss": sum(last) / max(1, len(last)),
    }


def _lengths(rollouts: list[Rollout]) -> list[int]:
    """Tokens of prompt and response of each."""
    return [len(r.prompt) + len(r.completion) for r in rollouts]


def _device(critic: Critic) -> torch.device:
    return critic.trained()[0].device


def _packed(rollouts: list[Rollout], critic: Critic) -> Packed:
    """One pack on the critic's device; its targets are the response tokens."""
    sequences = [r.prompt + r.completion for r in rollouts]
    prompts = [len(r.prompt) for r in rollouts]
    return pack(sequences, prompts, share=critic.shares_prompts).to(_device(critic))
