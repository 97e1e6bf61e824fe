"""A policy, a reward ensemble and their tokenizer, tiny, of random weights, in folders."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.data.tokenizer import train_tokenizer
from fastalign.models import Policy, RewardEnsemble
from fastalign.models.reward import EnsembleConfig
from fastalign.rollout import Rollout


@cache
def tokenizer() -> Any:
    return train_tokenizer(["a few words", "to make a tokenizer of"], 300)


def llama(seed: int, context: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer()),
            max_position_embeddings=context,
        )
    )


def policy(seed: int = 0, *, value_head: bool = True) -> Policy:
    return Policy(llama(seed), value_head=value_head)


def ensemble(seed: int = 1, heads: int = 3, statistic: str = "mean") -> RewardEnsemble:
    """Its heads have offsets and scales of their own, as trained ones do."""
    made = RewardEnsemble(
        llama(seed, context=40).model, EnsembleConfig(n_heads=heads, statistic=statistic, coef=0.5)
    )
    made.bias.data.copy_(torch.linspace(-1, 1, heads))
    made.center.copy_(torch.linspace(0.3, -0.2, heads))
    made.scale.copy_(torch.linspace(0.5, 2.0, heads))
    return made.eval()


def save_ensemble(folder: Path, **options: Any) -> str:
    ensemble(**options).save(folder, tokenizer())
    return str(folder)


def rollouts(n_prompts: int = 3, n_samples: int = 2, seed: int = 3) -> list[Rollout]:
    """Responses of one to nine tokens to prompts of two to six."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int) -> list[int]:
        n = int(torch.randint(least, most + 1, (), generator=draw))
        return torch.randint(len(tokenizer()), (n,), generator=draw).tolist()

    prompts = [tokens(2, 6) for _ in range(n_prompts)]
    found = []
    for index, prompt in enumerate(prompts):
        for _ in range(n_samples):
            completion = tokens(1, 9)
            found.append(Rollout(index, prompt, completion, [0.0] * len(completion), True))
    return found
