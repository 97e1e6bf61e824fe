"""Lambda-returns and discounted returns by the scan of kernels/gae.py, which writes one result."""

from __future__ import annotations

from torch import Tensor

from fastalign.kernels.gae import scan


def lambda_returns_fwd(
    rewards: Tensor,
    values: Tensor | None,
    gamma: float,
    lam: float,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    rates: Tensor | None,
) -> Tensor:
    """Arguments and result as in the op ``fastalign::lambda_returns``."""
    settings = (gamma, lam, mask, cu_seqlens, bootstrap, rates)
    return scan(rewards, values, None, (1.0, 1.0, 1.0), *settings, keep_advantages=False)[1]
