"""Rewards of single tokens: a KL penalty on each, the response's score on the last one.

For the kept tokens t = 1..n of one response, K(t) an estimate of KL(pi || pi_ref) at t (k1, k2 or
k3 of fastalign/ops/kl_estimate.py) and clip(x, c) = min(max(x, -c), c):

    r_t = -kl_coef * K(t) + [t = n] * terminal
    terminal = clip(score, clip_score) - missing_eos_penalty * [the response did not finish]

With the log-probs of a model trained by DPO (RTO) each token also has the reward that this model
implies, whose sum over the response is DPO's:

    r_t += clip(dpo_coef * (dpo_logp_t - ref_logp_t), clip_dpo)

A token that the mask drops does not exist: its reward is 0, and the last kept token is the
response's last one. The score of a response without a kept token counts nowhere.

Sources: Ziegler et al., "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593,
equation 2 (the KL penalty); Zhong et al., "DPO Meets PPO: Reinforced Token Optimization for RLHF",
arXiv 2404.18922, and its authors' code, which has dpo_coef = 0.05, clip_dpo = 0.05, kl_coef = 0.01,
clip_score = 10; missing_eos_penalty as in TRL.

Sibling files: csrc/token_rewards.cpp, kernels/token_rewards.py, tests/test_token_rewards.py,
benchmarks/bench_token_rewards.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalign.backend import choose, plain
from fastalign.ops.kl_estimate import KINDS, check_kind, kl_estimate_reference
from fastalign.ops.policy_reduce import check_layout, check_like
from fastalign.ops.token_logprobs import FLOAT_DTYPES, accumulation_dtype


def token_rewards_reference(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    dpo_logp: Tensor | None,
    finished: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_kind: str,
    kl_coef: float,
    clip_score: float,
    dpo_coef: float,
    clip_dpo: float,
    missing_eos_penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas above in plain PyTorch: rewards, KL of each sequence, mean KL of a token."""
    wide = accumulation_dtype(logp.dtype)
    n_rows = scores.shape[0]
    lengths = logp.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    sequence = torch.arange(n_rows, device=logp.device).repeat_interleave(lengths)
    kept = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask

    def flat(x: Tensor) -> Tensor:
        return torch.where(kept, x, 0.0).reshape(-1)

    kl = kl_estimate_reference(flat(logp), flat(ref_logp), kl_kind)
    rewards = -kl_coef * kl if kl_coef else torch.zeros_like(kl)
    if dpo_logp is not None:
        implied = dpo_coef * (flat(dpo_logp).to(wide) - flat(ref_logp).to(wide))
        rewards = rewards + implied.clamp(-clip_dpo, clip_dpo)
    terminal = scores.to(wide).clamp(-clip_score, clip_score)
    if finished is not None:
        terminal = torch.where(finished, terminal, terminal - missing_eos_penalty)
    at = kept.reshape(-1).nonzero()[:, 0]
    last = at.new_full((n_rows,), -1).scatter_reduce(0, sequence[at], at, "amax")
    rewards[last[last >= 0]] += terminal[last >= 0]
    # float64: index_add adds one token after the other.
    sequence_kl = kl.new_zeros(n_rows, dtype=torch.float64).index_add(0, sequence, kl.double())
    mean = sequence_kl.sum() / kept.sum().clamp(min=1)
    return rewards.reshape(logp.shape), sequence_kl.to(wide), mean.to(wide)


def _computed(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    dpo_logp: Tensor | None,
    finished: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_kind: str,
    kl_coef: float,
    clip_score: float,
    dpo_coef: float,
    clip_dpo: float,
    missing_eos_penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``token_rewards_reference``, by the backend in force."""
    tensors = (logp, ref_logp, scores, dpo_logp, finished, mask, cu_seqlens)
    numbers = (kl_coef, clip_score, dpo_coef, clip_dpo, missing_eos_penalty)
    which = choose("token_rewards", logp)
    if which == "triton":
        from fastalign.kernels.token_rewards import token_rewards_fwd

        return token_rewards_fwd(*tensors, KINDS.index(kl_kind), *numbers)
    if which == "cpp":
        return torch.ops.fastalign_cpp.token_rewards(*tensors, KINDS.index(kl_kind), *numbers)
    return token_rewards_reference(*tensors, kl_kind, *numbers)


_token_rewards = torch.library.custom_op("fastalign::token_rewards", _computed, mutates_args=())


@_token_rewards.register_fake
def _(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    dpo_logp: Tensor | None,
    finished: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_kind: str,
    kl_coef: float,
    clip_score: float,
    dpo_coef: float,
    clip_dpo: float,
    missing_eos_penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulation_dtype(logp.dtype)
    sequence_kl = logp.new_empty(scores.shape, dtype=wide)
    return logp.new_empty(logp.shape, dtype=wide), sequence_kl, sequence_kl.new_empty(())


def token_rewards(
    logp: Tensor,
    ref_logp: Tensor,
    scores: Tensor,
    *,
    kl_coef: float,
    kl_kind: str = "k1",
    clip_score: float | None = None,
    finished: Tensor | None = None,
    missing_eos_penalty: float = 0.0,
    dpo_logp: Tensor | None = None,
    dpo_coef: float = 0.05,
    clip_dpo: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Rewards of every token, by the formulas in this module's docstring, and KL statistics.

    The result is a constant of the training step: inputs are detached and no gradient flows.
    Scores that are to be whitened, or divided by a running deviation, come here after that.

    Args:
        logp: [B, T], or packed [N] with ``cu_seqlens``: log-probs of the sampled tokens under the
            policy that sampled them; bfloat16, float16, float32 or float64.
        ref_logp: same shape, under pi_ref.
        scores: [B] or [S], one per response, floating; a reward model's, for instance.
        kl_coef: weight of the KL penalty, >= 0 (0: none, but the statistics are there).
        kl_kind: "k1", "k2" or "k3".
        clip_score: bound of the score's magnitude, > 0; None: none.
        finished: [B] or [S], bool or integer: False (0) where the response was cut off before its
            end-of-sequence token.
        missing_eos_penalty: >= 0, taken from the terminal reward of responses not ``finished``.
        dpo_logp: like ``logp``, under a model trained by DPO from pi_ref.
        dpo_coef: its weight, usually DPO's beta.
        clip_dpo: bound of a token's implied reward, > 0; None: none.
        mask: like ``logp``, bool or integer, True (nonzero) where the token counts. What stands in
            the other cells, NaN included, has no effect.
        cu_seqlens: [S + 1], int32 or int64, the bounds of the packed sequences, from 0 to N. Its
            content is checked on CPU only (a check on GPU would wait).

    Returns:
        (rewards, statistics): rewards contiguous, of the shape of ``logp``, float32 (float64 when a
        log-prob is float64); "kl", 0-d, the mean estimate over the kept tokens, and "sequence_kl",
        [B] or [S], its sum over each sequence, both in nats and without kl_coef.

    Raises:
        ValueError: shapes, dtypes, devices or offsets that do not fit, an unknown kl_kind, a
            coefficient or bound out of its range, a penalty without ``finished``.
    """
    op = "token_rewards"
    check_kind(op, kl_kind)
    if cu_seqlens is None and logp.dim() != 2:
        raise ValueError(
            f"{op}: expected logp [B, T], or [N] with cu_seqlens, got shape {tuple(logp.shape)}"
        )
    layout = check_layout(op, logp, "logp", mask, cu_seqlens)
    log_probs = {"logp": logp, "ref_logp": ref_logp}
    if dpo_logp is not None:
        log_probs["dpo_logp"] = dpo_logp
    dtype = logp.dtype
    for name, x in log_probs.items():
        check_like(op, name, x, logp, "logp")
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{op}: expected {name} of a floating dtype, got {x.dtype}")
        dtype = torch.promote_types(dtype, x.dtype)
    n_rows = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    for name, row in (("scores", scores), ("finished", finished)):
        if row is None:
            continue
        if row.shape != (n_rows,) or row.device != logp.device:
            raise ValueError(
                f"{op}: expected {name} of shape ({n_rows},), one per sequence, on {logp.device}, "
                f"got {tuple(row.shape)} on {row.device}"
            )
        if row.is_floating_point() != (name == "scores"):
            want = "a floating" if name == "scores" else "a bool or integer"
            raise ValueError(f"{op}: expected {name} of {want} dtype, got {row.dtype}")
    for name, coef in (
        ("kl_coef", kl_coef),
        ("dpo_coef", dpo_coef),
        ("missing_eos_penalty", missing_eos_penalty),
    ):
        if not 0.0 <= coef < math.inf:
            raise ValueError(f"{op}: expected {name} >= 0, got {coef}")
    for name, bound in (("clip_score", clip_score), ("clip_dpo", clip_dpo)):
        if bound is not None and not bound > 0.0:
            raise ValueError(f"{op}: expected {name} > 0 or None, got {bound}")
    if missing_eos_penalty and finished is None:
        raise ValueError(f"{op}: expected finished with a missing_eos_penalty, got None")
    call = _computed if plain(logp) else _token_rewards
    rewards, sequence_kl, kl = call(
        logp.detach().to(dtype),
        ref_logp.detach().to(dtype),
        scores.detach().to(accumulation_dtype(dtype)),
        None if dpo_logp is None else dpo_logp.detach().to(dtype),
        None if finished is None else finished.to(torch.bool),
        layout.mask,
        layout.cu_seqlens,
        kl_kind,
        float(kl_coef),
        math.inf if clip_score is None else float(clip_score),
        float(dpo_coef),
        math.inf if clip_dpo is None else float(clip_dpo),
        float(missing_eos_penalty),
    )
    return rewards, {"kl": kl, "sequence_kl": sequence_kl}
