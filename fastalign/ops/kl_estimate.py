"""Estimates of KL(pi || pi_ref) from the log-probabilities of sampled tokens.

With d = ref_logp - logp, for tokens sampled from pi:

    k1 = -d                        unbiased, any sign
    k2 = d^2 / 2                   biased, never negative; its gradient on-policy is that of the KL
    k3 = exp(d) - 1 - d            unbiased, never negative

k1 of float32 or float64 is one subtraction: torch's own, on every device.

Gradients with respect to logp: 1, -d, 1 - exp(d); their negatives with respect to ref_logp. Nothing
is clipped: k3 in float32 is inf for d > 88.7.

Source: J. Schulman, "Approximating KL Divergence" (2020).

Sibling files: csrc/kl_estimate.cpp, kernels/kl_estimate.py, tests/test_kl_estimate.py,
benchmarks/bench_kl_estimate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastalign.backend import CPP_BUILT, choose, once_differentiable, plain, refuse_forward_mode
from fastalign.ops.direct import CODES, dense, direct
from fastalign.ops.token_logprobs import FLOAT_DTYPES, accumulation_dtype

if CPP_BUILT:
    from fastalign import _C

KINDS = ("k1", "k2", "k3")


def kl_estimate_reference(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """The formulas above in plain PyTorch."""
    wide = accumulation_dtype(logp.dtype)
    d = ref_logp.to(wide) - logp.to(wide)
    if kind == "k1":
        kl = -d
    elif kind == "k2":
        kl = 0.5 * d.square()
    else:
        # exp(d) - 1 would lose every digit for the small d of a policy near its reference.
        kl = torch.expm1(d) - d
    return kl.contiguous()


def kl_estimate_backward_reference(
    grad: Tensor, logp: Tensor, ref_logp: Tensor, kind: str
) -> Tensor:
    """``grad`` times the derivative of k2 or k3 by logp, in the dtype of ``logp``."""
    wide = accumulation_dtype(logp.dtype)
    d = ref_logp.to(wide) - logp.to(wide)
    return (grad * -(d if kind == "k2" else torch.expm1(d))).to(logp.dtype).contiguous()


def _computed(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """``kl_estimate_reference``, by the backend in force."""
    which = choose("kl_estimate", logp)
    if which == "triton":
        from fastalign.kernels.kl_estimate import kl_estimate_fwd

        return kl_estimate_fwd(logp, ref_logp, KINDS.index(kind))
    if which == "cpp" and direct(logp, ref_logp):
        logp, ref_logp = dense(logp), dense(ref_logp)
        kl = logp.new_empty(logp.shape, dtype=torch.float32)
        _C.kl_estimate(
            KINDS.index(kind), CODES[logp.dtype], logp.data_ptr(), ref_logp.data_ptr(),
            logp.numel(), kl.data_ptr(),
        )  # fmt: skip
        return kl
    if which == "cpp":
        return torch.ops.fastalign_cpp.kl_estimate(logp, ref_logp, KINDS.index(kind))
    return kl_estimate_reference(logp, ref_logp, kind)


def _computed_backward(grad: Tensor, logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    """``kl_estimate_backward_reference``, by the backend in force."""
    which = choose("kl_estimate", logp)
    if which == "triton":
        from fastalign.kernels.kl_estimate import kl_estimate_bwd

        return kl_estimate_bwd(grad, logp, ref_logp, KINDS.index(kind))
    if which == "cpp" and direct(grad, logp, ref_logp):
        grad, logp, ref_logp = dense(grad), dense(logp), dense(ref_logp)
        dlogp = logp.new_empty(logp.shape)
        _C.kl_estimate_backward(
            KINDS.index(kind), CODES[logp.dtype], grad.data_ptr(), logp.data_ptr(),
            ref_logp.data_ptr(), logp.numel(), dlogp.data_ptr(),
        )  # fmt: skip
        return dlogp
    if which == "cpp":
        return torch.ops.fastalign_cpp.kl_estimate_backward(grad, logp, ref_logp, KINDS.index(kind))
    return kl_estimate_backward_reference(grad, logp, ref_logp, kind)


@torch.library.custom_op("fastalign::kl_estimate", mutates_args=())
def _kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    return _computed(logp, ref_logp, kind)


@_kl_estimate.register_fake
def _(logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    return logp.new_empty(logp.shape, dtype=accumulation_dtype(logp.dtype))


@torch.library.custom_op("fastalign::kl_estimate_backward", mutates_args=())
def _kl_estimate_backward(grad: Tensor, logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    return _computed_backward(grad, logp, ref_logp, kind)


@_kl_estimate_backward.register_fake
def _(grad: Tensor, logp: Tensor, ref_logp: Tensor, kind: str) -> Tensor:
    return logp.new_empty(logp.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    *log_probs, ctx.kind = inputs
    ctx.save_for_backward(*([] if ctx.kind == "k1" else log_probs))


def _backward(
    ctx: Any, grad: Tensor, compute: Callable[..., Tensor] = _kl_estimate_backward
) -> tuple[Tensor | None, Tensor | None, None]:
    log_probs = ctx.saved_tensors  # none for k1, whose slope is 1
    dlogp = compute(grad, *log_probs, ctx.kind) if log_probs else grad
    needs_logp, needs_ref_logp, _ = ctx.needs_input_grad
    return dlogp if needs_logp else None, -dlogp if needs_ref_logp else None, None


torch.library.register_autograd("fastalign::kl_estimate", _backward, setup_context=_setup_context)


class _KlEstimate(torch.autograd.Function):
    """The op without the dispatcher, which takes as long as the arithmetic of 30,000 tokens."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = _computed(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # A second derivative would be wrong in silence, but for k1, whose slope is a constant.
        refuse = torch.is_grad_enabled() and ctx.kind != "k1"
        compute = _backward_once if refuse else _backward
        return compute(ctx, grads[0], _computed_backward)


_backward_once = once_differentiable(_backward)


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) in nats, by the formulas in this module's docstring.

    Differentiable, once (k2, k3).

    Args:
        logp: any shape, log-probabilities of sampled tokens under pi; bfloat16, float16, float32 or
            float64.
        ref_logp: same shape, under pi_ref. Gradient flows to both; detach the one that is a
            constant.
        kind: "k1", "k2" or "k3".

    Returns:
        The shape of ``logp``, contiguous, float32 (float64 when an input is float64).

    Raises:
        ValueError: an unknown kind, or shapes, dtypes or devices that do not fit.
    """
    refuse_forward_mode("kl_estimate", logp, ref_logp)
    check_kind("kl_estimate", kind)
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
    dtype, ref_dtype = logp.dtype, ref_logp.dtype
    if dtype not in FLOAT_DTYPES or ref_dtype not in FLOAT_DTYPES:
        name, wrong = ("ref_logp", ref_dtype) if dtype in FLOAT_DTYPES else ("logp", dtype)
        raise ValueError(f"kl_estimate: expected {name} of a floating dtype, got {wrong}")
    if dtype != ref_dtype:
        dtype = torch.promote_types(dtype, ref_dtype)
        logp, ref_logp = logp.to(dtype), ref_logp.to(dtype)
    if kind == "k1" and accumulation_dtype(dtype) == dtype:
        return (logp - ref_logp).contiguous()
    if not (plain(logp) and plain(ref_logp)):
        return _kl_estimate(logp, ref_logp, kind)
    if torch.is_grad_enabled() and (logp.requires_grad or ref_logp.requires_grad):
        return _KlEstimate.apply(logp, ref_logp, kind)
    return _computed(logp, ref_logp, kind)


def check_kind(op: str, kind: str) -> None:
    """ValueError unless ``kind`` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{op}: expected kind to be one of {', '.join(KINDS)}, got {kind!r}")
