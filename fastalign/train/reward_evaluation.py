"""What reward heads say of pairs: scores, held-out accuracy, and how far the heads differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastalign import ops
from fastalign.data.packing import Packed, Prompts, held, pack, same_prompts
from fastalign.data.tokens import TokenizedPreference
from fastalign.models import RewardEnsemble
from fastalign.train import distributed
from fastalign.train.head_diversity import correlation, shuffled
from fastalign.train.run import autocast


def packed(pairs: list[TokenizedPreference], share: bool) -> Packed:
    """One pack: chosen and rejected of each pair in turn. `share`: they hold their prompt once."""
    sequences = [p.prompt + response for p in pairs for response in (p.chosen, p.rejected)]
    return pack(sequences, [len(p.prompt) for p in pairs for _ in range(2)], share=share)


def pair_length(pair: TokenizedPreference) -> int:
    """Tokens of both sequences."""
    return 2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def shared_length(pair: TokenizedPreference) -> int:
    """The same with the prompt counted once."""
    return pair_length(pair) - len(pair.prompt)


def same_pairs(pairs: list[TokenizedPreference]) -> Prompts:
    """Of each pair the prompt."""
    return same_prompts(pair.prompt for pair in pairs)


def sizes(
    pairs: list[TokenizedPreference], passes: Iterable[Sequence[int]], share: bool
) -> tuple[list[int], list[int]]:
    """See `packing.held`: of the responses, two of each pair, in packs of these pairs."""
    own, before = list[int](), list[int]()
    for rows in passes:
        both = [(pairs[i].prompt, r) for i in rows for r in (pairs[i].chosen, pairs[i].rejected)]
        prompts = same_prompts(prompt for prompt, _ in both) if share else None
        found = held([range(len(both))], [len(p) + len(r) for p, r in both], prompts)
        own += found[0]
        before += found[1]
    return own, before


@torch.no_grad()
def score_pairs(
    ensemble: RewardEnsemble, pairs: list[TokenizedPreference], micro_tokens: int, dtype: str
) -> tuple[Tensor, Tensor]:
    """fp32 [n, K] scores of the chosen and of the rejected responses, on the CPU. Each process
    scores its share."""
    device = ensemble.weight.device
    was_training = ensemble.training
    ensemble.eval()
    scores = torch.zeros(2, len(pairs), ensemble.config.n_heads, device=device)
    share = ensemble.shares_prompts
    lengths = [shared_length(p) if share else pair_length(p) for p in pairs]
    for micro in distributed.looks(lengths, micro_tokens, same_pairs(pairs) if share else None):
        with autocast(device, dtype):
            both = ensemble(packed([pairs[i] for i in micro.rows], share).to(device))
        if micro.counts:
            scores[:, micro.rows] = both.reshape(len(micro.rows), 2, -1).transpose(0, 1)
    ensemble.train(was_training)
    chosen, rejected = distributed.total(scores).cpu()
    return chosen, rejected


def evaluate(
    ensemble: RewardEnsemble, pairs: list[TokenizedPreference], micro_tokens: int, dtype: str
) -> dict[str, float]:
    """Held-out Bradley-Terry loss, and the accuracy of every head and of the ensemble with a 95 %
    interval."""
    chosen, rejected = score_pairs(ensemble, pairs, micro_tokens, dtype)
    # Of the heads as they are trained, whether they are standardised already or not.
    scale = ensemble.scale.cpu()
    right = (chosen > rejected).float()
    together = (ensemble.reduce(chosen) > ensemble.reduce(rejected)).float().mean().item()
    disagreement = torch.cat([chosen, rejected])
    metrics = {
        "loss": ops.bradley_terry_loss(chosen * scale, rejected * scale).item(),
        "accuracy": together,
        "accuracy/ci95": 1.96 * math.sqrt(max(together * (1 - together), 1e-12) / len(pairs)),
        "disagreement": disagreement.std(1).mean().item() if ensemble.config.n_heads > 1 else 0.0,
    }
    for k, accuracy in enumerate(right.mean(0).tolist()):
        metrics[f"accuracy/head_{k}"] = accuracy
    if ensemble.config.n_heads > 1 and len(pairs) > 1:
        metrics |= differences(chosen, rejected)
    return metrics


def differences(chosen: Tensor, rejected: Tensor) -> dict[str, float]:
    """How far the heads differ on [n, K] scores: "heads/correlation", of two heads' margins r_w -
    r_l, mean over all two; and "argmin/head_k", the share of responses of which head k says the
    least (of heads that are not standardised yet, the one with the lowest offset)."""
    heads = chosen.shape[1]
    found = correlation(chosen - rejected)
    lowest = torch.cat([chosen, rejected]).argmin(1).bincount(minlength=heads).double()
    shares = (lowest / lowest.sum()).tolist()
    return found | {f"argmin/head_{k}": share for k, share in enumerate(shares)}


def out_of_distribution(
    ensemble: RewardEnsemble,
    pairs: list[TokenizedPreference],
    seed: int,
    micro_tokens: int,
    dtype: str,
) -> dict[str, float]:
    """How far the heads differ on responses unlike those of the data: the pairs' own with their
    tokens in random order. "disagreement/shuffled" and "heads/correlation/shuffled" beside
    `evaluate`'s "disagreement" and "heads/correlation"; nothing of one head, or of one pair."""
    if ensemble.config.n_heads == 1 or len(pairs) < 2:
        return {}
    chosen, rejected = score_pairs(ensemble, shuffled(pairs, seed), micro_tokens, dtype)
    found = correlation(chosen - rejected, "heads/correlation/shuffled")
    return found | {"disagreement/shuffled": torch.cat([chosen, rejected]).std(1).mean().item()}
