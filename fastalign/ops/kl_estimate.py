"""Estimates of KL(pi || pi_ref) from the log-probabilities of sampled tokens.

With d = ref_logp - logp, for tokens sampled from pi:

    k1 = -d                        unbiased, any sign
    k2 = d^2 / 2                   biased, never negative; its gradient on-policy is that of the KL
    k3 = exp(d) - 1 - d            unbiased, never negative

Gradients with respect to logp: 1, -d, 1 - exp(d). Nothing is clipped: k3 in float32 is inf for d >
88.7.

Source: J. Schulman, "Approximating KL Divergence" (2020).

Sibling file: tests/test_kl_estimate.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("k1", "k2", "k3")


def kl_estimate_reference(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """The formulas above in plain PyTorch."""
    wide = torch.promote_types(torch.promote_types(logp.dtype, ref_logp.dtype), torch.float32)
    d = ref_logp.to(wide) - logp.to(wide)
    if kind == "k1":
        return -d
    if kind == "k2":
        return 0.5 * d.square()
    # exp(d) - 1 would lose every digit for the small d of a policy near its reference.
    return torch.expm1(d) - d


torch.library.define("fastalign::kl_estimate", "(Tensor logp, Tensor ref_logp, str kind) -> Tensor")
torch.library.impl("fastalign::kl_estimate", "CompositeImplicitAutograd", kl_estimate_reference)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) in nats, by the formulas in this module's docstring.

    Args:
        logp: any shape, log-probabilities of sampled tokens under pi; bfloat16, float16, float32 or
            float64.
        ref_logp: same shape, under pi_ref. Gradient flows to both; detach the one that is a
            constant.
        kind: "k1", "k2" or "k3".

    Returns:
        The shape of ``logp``, float32 (float64 when an input is float64).

    Raises:
        ValueError: an unknown kind, or shapes, dtypes or devices that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(
            f"kl_estimate: expected kind to be one of {', '.join(KINDS)}, got {kind!r}"
        )
    if logp.shape != ref_logp.shape:
        raise ValueError(
            f"kl_estimate: expected ref_logp of the shape of logp, {tuple(logp.shape)}, "
            f"got {tuple(ref_logp.shape)}"
        )
    if logp.device != ref_logp.device:
        raise ValueError(
            f"kl_estimate: expected ref_logp on the device of logp, {logp.device}, "
            f"got {ref_logp.device}"
        )
    for name, tensor in (("logp", logp), ("ref_logp", ref_logp)):
        if not tensor.is_floating_point():
            raise ValueError(
                f"kl_estimate: expected {name} of a floating dtype, got {tensor.dtype}"
            )
    return torch.ops.fastalign.kl_estimate(logp, ref_logp, kind)
