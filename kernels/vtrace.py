"""V-trace by the scan of kernels/gae.py, whose maps then hold the capped importance weights."""

from __future__ import annotations

from torch import Tensor

from fastalign.kernels.gae import scan


def vtrace_fwd(
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
    """Arguments and results as in the op ``fastalign::vtrace``."""
    caps = (rho_bar, c_bar, pg_rho_bar)
    settings = (gamma, lam, mask, cu_seqlens, bootstrap, rates)
    pg_advantages, vs, _ = scan(rewards, values, log_ratio, caps, *settings)
    return vs, pg_advantages
