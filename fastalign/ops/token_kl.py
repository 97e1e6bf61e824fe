r"""KL(pi || pi_ref) of each token, exact: over the whole vocabulary, from two rows of logits.

With the policy's raw logits x and the reference model's y (rows of V), soft-cap c, temperature T:

    u = softcap(x)      s_j = (u_j - max u) / T      log p_j = s_j - log_sum
    v = softcap(y)      t_j = (v_j - max v) / T      log r_j = t_j - ref_log_sum

    KL = sum_j p_j (log p_j - log r_j)           in nats, never negative

and, for upstream gradients g = dL/dlogp, e = dL/dH, k = dL/dKL (logp and H of token_logprobs),

    dL/dx_j = (g (onehot_j - p_j) - e p_j (log p_j + H) + k p_j (log p_j - log r_j - KL)) / T
              * du_j/dx_j

The reference model gets no gradient. Near the reference, where KL is a small difference of large
sums, the kernels use d_j = t_j - s_j, which is small when p is near r:

    mean_gap = sum_j p_j d_j
    KL = log1p(sum_j e^s_j expm1(d_j) / sum_j e^s_j) - mean_gap
    log p_j - log r_j - KL = mean_gap - d_j

A rounding of d_j changes both terms of KL alike, so the error is about 1e-7 times the size of d: a
KL of 1e-6 has three right digits in float32, where differences of log-probs have none.

Columns with p = 0 add nothing, whatever r is there. A column with p > 0 and r = 0 makes the KL
+inf; it is +inf for all nearby logits too, so that row's KL gives no gradient (0, never NaN).
Rows whose target is ``ignore_index`` are never read; their outputs and gradients are 0.

``kl_stats`` gives log-probs and entropy of the same pass too: fastalign/ops/linear_kl.py and the
loss head run it slab by slab. Estimates of the KL from sampled tokens:
fastalign/ops/kl_estimate.py.

C++: csrc/token_kl.cpp. Triton: kernels/token_kl.py. Tests: tests/test_token_kl.py. Benchmark:
benchmarks/bench_token_kl.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastalign.backend import choose, plain, refuse_forward_mode
from fastalign.ops.token_logprobs import (
    FLOAT_DTYPES,
    accumulation_dtype,
    dlogits_reference,
    row_stats_reference,
    temperature_tensor,
)

Stats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _shifted(logits: Tensor, kept: Tensor, temperature: Tensor, softcap: float) -> Tensor:
    """s [N, V] of the formula in the accumulation dtype; zeros in rows that are not kept."""
    u = logits.reshape(len(kept), logits.shape[-1]).to(accumulation_dtype(logits.dtype))
    u = u.masked_fill(~kept[:, None], 0.0)
    if softcap:
        u = softcap * torch.tanh(u / softcap)
    return (u - u.detach().amax(-1, keepdim=True)) / temperature[:, None]


def kl_stats_reference(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Stats:
    """The formulas above in plain PyTorch, differentiable by autograd in ``logits``.

    Args:
        logits: [N, V], or [B, T, V] with B * T = N, any float dtype.
        ref_logits: the same shape, any float dtype.
        targets: [N] int64; a row whose target is ``ignore_index`` gives zeros.
        temperature: [1] or [N], positive.
        softcap: the c of the formula; 0 means none.

    Returns:
        logp, entropy, row_max, log_sum, kl, ref_logp, ref_row_max, mean_gap: [N] each, float32
            (float64 for float64 logits); natural logarithms.
    """
    ref_logits = ref_logits.detach()
    kept = targets != ignore_index
    stats = row_stats_reference(logits, targets, temperature, softcap, ignore_index)
    ref_logp, _, ref_row_max, _ = row_stats_reference(
        ref_logits, targets, temperature, softcap, ignore_index
    )
    s = _shifted(logits, kept, temperature, softcap)
    t = _shifted(ref_logits, kept, temperature, softcap)
    log_p, log_r = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    p = log_p.exp()
    # 0 * inf is NaN, forward and backward: a column without probability gets 0 first.
    kl = (p * (log_p - log_r).masked_fill(p == 0, 0.0)).sum(-1).masked_fill(~kept, 0.0)
    mean_gap = (p * (t - s).masked_fill(p == 0, 0.0)).sum(-1).detach()
    return (*stats, kl, ref_logp, ref_row_max, mean_gap)


def kl_dlogits_reference(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    kl: Tensor,
    ref_row_max: Tensor,
    mean_gap: Tensor,
) -> Tensor:
    """dL/dlogits by the closed form above, in ``logits``' shape and dtype."""
    kept = targets != ignore_index
    x = logits.to(accumulation_dtype(logits.dtype))
    dx = dlogits_reference(
        grad_logp,
        grad_entropy,
        x,
        targets,
        temperature,
        softcap,
        ignore_index,
        logp,
        entropy,
        row_max,
        log_sum,
    )
    s = _shifted(x, kept, temperature, softcap)
    t = _shifted(ref_logits, kept, temperature, softcap)
    p = torch.softmax(s, -1)
    slope = mean_gap[:, None] - (t - s)
    slope = slope.masked_fill((p == 0) | (kl == float("inf"))[:, None], 0.0)
    part = grad_kl[:, None] * p * slope / temperature[:, None]
    part = part.masked_fill(~kept[:, None], 0.0).reshape(x.shape)
    if softcap:
        part = part * (1.0 - torch.tanh(x / softcap) ** 2)
        part = part.masked_fill(~kept.reshape(x.shape[:-1])[..., None], 0.0)
    return (dx + part).to(logits.dtype)


@torch.library.custom_op("fastalign::kl_stats", mutates_args=())
def kl_stats(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, row_max, log_sum, kl, ref_logp, ref_row_max, mean_gap: one joint pass."""
    args = (logits, ref_logits, targets, temperature, softcap, ignore_index)
    which = choose("kl_stats", logits)
    if which == "triton":
        from fastalign.kernels.token_kl import kl_stats_fwd

        return kl_stats_fwd(*args)
    if which == "cpp":
        return torch.ops.fastalign_cpp.kl_stats(*args)
    return kl_stats_reference(*args)


@kl_stats.register_fake
def _(
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
) -> Stats:
    dtype = accumulation_dtype(logits.dtype)
    a, b, c, d, e, f, g, h = (
        torch.empty(targets.shape, dtype=dtype, device=logits.device) for _ in range(8)
    )
    return a, b, c, d, e, f, g, h


def _write_kl_dlogits(
    out: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    kl: Tensor,
    ref_row_max: Tensor,
    mean_gap: Tensor,
) -> None:
    args = (
        grad_logp, grad_entropy, grad_kl, logits, ref_logits, targets, temperature, softcap,
        ignore_index, logp, entropy, row_max, log_sum, kl, ref_row_max, mean_gap,
    )  # fmt: skip
    which = choose("kl_dlogits", logits)
    if which == "triton":
        from fastalign.kernels.token_kl import kl_dlogits_fwd

        kl_dlogits_fwd(out, *args)
    elif which == "cpp":
        torch.ops.fastalign_cpp.kl_dlogits(out, *args)
    else:
        out.copy_(kl_dlogits_reference(*args))


kl_dlogits_out_op = torch.library.custom_op(
    "fastalign::kl_dlogits_out", _write_kl_dlogits, mutates_args=("out",)
)


@kl_dlogits_out_op.register_fake
def _(out: Tensor, *args: Any) -> None:
    pass


def kl_dlogits_out(out: Tensor, *args: Any) -> None:
    """Writes what ``kl_dlogits`` gives for ``args`` into ``out``, contiguous, which may be
    ``logits`` itself."""
    write = _write_kl_dlogits if plain(out) else kl_dlogits_out_op
    write(out, *args)


@torch.library.custom_op("fastalign::kl_dlogits", mutates_args=())
def kl_dlogits(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    stats: list[Tensor],
) -> Tensor:
    """dL/dlogits; ``stats`` as ``kl_dlogits_out`` wants them, from logp to mean_gap."""
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    kl_dlogits_out(
        out,
        grad_logp,
        grad_entropy,
        grad_kl,
        logits,
        ref_logits,
        targets,
        temperature,
        softcap,
        ignore_index,
        *stats,
    )
    return out


@kl_dlogits.register_fake
def _(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    grad_kl: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    stats: list[Tensor],
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, targets, temperature, ctx.softcap, ctx.ignore_index = inputs
    logp, entropy, row_max, log_sum, kl, ref_logp, ref_row_max, mean_gap = output
    ctx.save_for_backward(
        logits,
        ref_logits,
        targets,
        temperature,
        *(logp, entropy, row_max, log_sum, kl, ref_row_max, mean_gap),
    )
    ctx.mark_non_differentiable(row_max, log_sum, ref_logp, ref_row_max, mean_gap)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> Any:
    logits, ref_logits, targets, temperature, *stats = ctx.saved_tensors
    grad_logp, grad_entropy, _, _, grad_kl, *_ = grads
    dx = kl_dlogits(
        torch.zeros_like(stats[0]) if grad_logp is None else grad_logp,
        grad_entropy,
        torch.zeros_like(stats[0]) if grad_kl is None else grad_kl,
        logits,
        ref_logits,
        targets,
        temperature,
        ctx.softcap,
        ctx.ignore_index,
        stats,
    )
    return dx, None, None, None, None, None


torch.library.register_autograd("fastalign::kl_stats", _backward, setup_context=_setup_context)


def check_mask(op: str, mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    """ValueError unless ``mask`` is None or bool, of this shape, on this device."""
    if mask is None:
        return
    if mask.shape != shape or mask.dtype != torch.bool or mask.device != device:
        raise ValueError(
            f"{op}: expected mask of shape {tuple(shape)}, bool, on {device}, "
            f"got shape {tuple(mask.shape)}, {mask.dtype}, on {mask.device}"
        )


def check_same_precision(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """ValueError unless x is on like's device, and both or neither are float64."""
    double = torch.float64 in (x.dtype, like.dtype) and x.dtype != like.dtype
    if x.dtype not in FLOAT_DTYPES or double or x.device != like.device:
        raise ValueError(
            f"{op}: expected float {name} on {like.device} (float64 only beside float64), "
            f"got {x.dtype} beside {like.dtype}, on {x.device}"
        )


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(softmax(logits / temperature) || softmax(ref_logits / temperature)) of each row, exact.

    Differentiable in ``logits``. Reads each row of both once in the forward pass; the backward pass
    reads both once more and writes the gradient. Nothing of the size of the logits is kept beside
    them.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        ref_logits: [..., V], the same shape; its dtype may be another one (float64 only beside
            float64). It gets no gradient.
        temperature: positive float, or a tensor [...] with one temperature per token, for both.
        mask: [...] bool; rows with False give 0 and gradient 0 whatever their logits hold.

    Returns:
        kl [...] in nats, float32 (float64 for float64 logits). +inf where the reference excludes a
            token that the policy does not; such a row has gradient 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or temperature <= 0.
    """
    op = "token_kl"
    refuse_forward_mode(op, logits)
    if logits.dim() < 1 or logits.dtype not in FLOAT_DTYPES or logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: expected float logits of shape [..., V] with V >= 1, "
            f"got shape {tuple(logits.shape)}, {logits.dtype}"
        )
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"{op}: expected ref_logits of shape {tuple(logits.shape)}, "
            f"got {tuple(ref_logits.shape)}"
        )
    check_same_precision(op, "ref_logits", ref_logits, logits)
    shape = logits.shape[:-1]
    check_mask(op, mask, shape, logits.device)
    scale = temperature_tensor(op, temperature, logits, shape)
    # Column 0 stands for the target, whose log-prob is not asked for.
    targets = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    if mask is not None:
        targets = targets.masked_fill(~mask, -100)
    if logits.dim() != 3:
        logits = logits.reshape(targets.numel(), logits.shape[-1])
        ref_logits = ref_logits.reshape(logits.shape)
    kl = kl_stats(logits, ref_logits.detach(), targets.reshape(-1), scale, 0.0, -100)[4]
    return kl.reshape(shape)
