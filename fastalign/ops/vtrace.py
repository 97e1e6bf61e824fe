"""V-trace: value targets and policy-gradient advantages from tokens that another policy sampled.

With w_t = exp(log_ratio_t), the importance weight of a token, for the tokens t = 1..n of one
sequence that the mask keeps, V_{n+1} = vs_{n+1} = bootstrap:

    delta_t = r_t + gamma * V_{t+1} - V_t
    vs_t    = V_t + min(rho_bar, w_t) delta_t + gamma * lam * min(c_bar, w_t) (vs_{t+1} - V_{t+1})
    A_t     = min(pg_rho_bar, w_t) (r_t + gamma * vs_{t+1} - V_t)

rho_bar decides which policy's value is learnt, c_bar and lam how far a surprise travels back. On
the sampling policy's own tokens (w = 1, caps >= 1) vs are the lambda-returns, and at lam = 1 A are
the advantages of ``gae``. Tokens that the mask drops are skipped as in ``gae``.

Source: Espeholt et al., "IMPALA", arXiv 1802.01561, equation 1, remarks 1 and 2 and section 4.2.

Sibling files: kernels/vtrace.py (the scan: kernels/gae.py, csrc/gae.cpp), tests/test_vtrace.py,
benchmarks/bench_gae.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.backend import choose, plain
from fastalign.ops.scan_inputs import (
    carry_dtype,
    check_like,
    check_scan,
    checked_offsets,
    inside_rows,
    padded,
    rates_of,
)


class VTrace(NamedTuple):
    """What ``vtrace`` returns; both of the shape of the rewards."""

    vs: Tensor
    """Targets for the values."""
    pg_advantages: Tensor
    """Factors of grad log pi, importance weight included."""


def vtrace_reference(
    rewards: Tensor,
    values: Tensor,
    log_ratio: Tensor,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
    pg_rho_bar: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    rates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formulas above in plain PyTorch: a loop over time, all rows at once."""
    if cu_seqlens is not None:
        inside = inside_rows(cu_seqlens)
        kept = inside if mask is None else padded(mask, inside)
        r, v, w = (padded(x, inside) for x in (rewards, values, log_ratio))
        settings = (gamma, lam, rho_bar, c_bar, pg_rho_bar)
        vs, advantages = vtrace_reference(r, v, w, *settings, kept, None, bootstrap, rates)
        return vs[inside], advantages[inside]
    carry = carry_dtype(rewards.dtype)
    rewards, values, weights = rewards.to(carry), values.to(carry), log_ratio.to(carry).exp()
    n_rows, n_steps = rewards.shape
    gammas, lams = rates_of(rewards, gamma, lam, rates)
    next_value = rewards.new_zeros(n_rows) if bootstrap is None else bootstrap.to(carry)
    excess = rewards.new_zeros(n_rows)  # vs - V of the next kept token
    kept = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    excesses = torch.zeros_like(rewards, memory_format=torch.contiguous_format)
    advantages = torch.zeros_like(excesses)
    for t in reversed(range(n_steps)):
        weight, keep = weights[:, t], kept[:, t]
        delta = rewards[:, t] + gammas * next_value - values[:, t]
        advantages[:, t] = weight.clamp(max=pg_rho_bar) * (delta + gammas * excess)
        trace = gammas * lams * weight.clamp(max=c_bar)
        own = weight.clamp(max=rho_bar) * delta + trace * excess
        excess = torch.where(keep, own, excess)
        next_value = torch.where(keep, values[:, t], next_value)
        excesses[:, t] = excess
    zero = torch.zeros_like(excesses)
    return torch.where(kept, values + excesses, zero), torch.where(kept, advantages, zero)


def _computed(
    rewards: Tensor,
    values: Tensor,
    log_ratio: Tensor,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
    pg_rho_bar: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``log_ratio`` is float32, or float64 beside float64 rewards."""
    offsets = checked_offsets("vtrace", cu_seqlens, rewards.numel())
    settings = (gamma, lam, rho_bar, c_bar, pg_rho_bar)
    args = (rewards, values, log_ratio, *settings, mask, offsets, bootstrap, rates)
    which = choose("vtrace", rewards)
    if which == "triton":
        from fastalign.kernels.vtrace import vtrace_fwd

        return vtrace_fwd(*args)
    if which == "cpp":
        return torch.ops.fastalign_cpp.vtrace(*args)
    return vtrace_reference(*args)


_vtrace = torch.library.custom_op("fastalign::vtrace", _computed, mutates_args=())


@_vtrace.register_fake
def _(
    rewards: Tensor,
    values: Tensor,
    log_ratio: Tensor,
    gamma: float,
    lam: float,
    rho_bar: float,
    c_bar: float,
    pg_rho_bar: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    vs = rewards.new_empty(rewards.shape, dtype=carry_dtype(rewards.dtype))
    return vs, torch.empty_like(vs)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratio: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> VTrace:
    """Value targets and advantages of every token, by the formulas in this module's docstring.

    The result is a constant of the training step: inputs are detached and no gradient flows.

    Args:
        rewards, values, gamma, lam, mask, cu_seqlens, bootstrap: as those of ``gae``.
        log_ratio: same shape, log pi(token) - log mu(token) in nats: the policy's log-prob minus
            that of the policy that sampled the token.
        rho_bar: cap of the weights of delta, positive and finite.
        c_bar: cap of the weights of the trace, likewise; the paper takes c_bar <= rho_bar.
        pg_rho_bar: cap of the weights of the advantages, likewise; None takes rho_bar.

    Returns:
        VTrace(vs, pg_advantages), contiguous, of the shape of ``rewards``; float32, or float64 for
        float64 rewards or values.

    Raises:
        ValueError: a shape, dtype, device, rate, cap or offset that does not fit.
    """
    caps = {"rho_bar": rho_bar, "c_bar": c_bar}
    caps["pg_rho_bar"] = rho_bar if pg_rho_bar is None else pg_rho_bar
    for name, cap in caps.items():
        if not 0.0 < cap < math.inf:
            raise ValueError(f"vtrace: expected a finite {name} > 0, got {cap}")
    inputs = check_scan("vtrace", rewards, values, gamma, lam, mask, cu_seqlens, bootstrap)
    check_like("vtrace", "log_ratio", log_ratio, rewards)
    rewards, checked_values, gammas, lams, *others = inputs
    assert checked_values is not None
    weights = log_ratio.detach().to(carry_dtype(rewards.dtype))
    rates = (gammas, lams, *map(float, caps.values()))
    call: Any = _computed if plain(rewards) else _vtrace
    return VTrace(*call(rewards, checked_values, weights, *rates, *others))
