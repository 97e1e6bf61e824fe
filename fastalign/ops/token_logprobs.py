r"""Log-probability and entropy of each token from its row of logits.

With raw logits x (one row of V), soft-cap c and temperature T:

    u_j = x_j                      or  c * tanh(x_j / c)
    s_j = (u_j - m) / T            with  m = max_j u_j
    log p_j = s_j - log_sum        with  log_sum = log(sum_j exp(s_j))
    logp = log p_y                 H = -sum_j p_j log p_j = log_sum - sum_j p_j s_j

and, for upstream gradients g = dL/dlogp and e = dL/dH,

    dL/dx_j = (g (onehot_j - p_j) - e p_j (log p_j + H)) / T * du_j/dx_j,
    du_j/dx_j = 1 - (u_j / c)^2 with a soft-cap, else 1.

The log-sum-exp is kept in two parts, ``row_max`` (m) and ``log_sum``: their sum rounded to float32
would lose three digits of every probability when logits sit near 1e4. Columns at -inf have p = 0
and add nothing. Rows whose target is ``ignore_index`` are never read; their outputs and gradients
are 0.

C++: csrc/token_logprobs.cpp. Triton: kernels/token_logprobs.py. Tests:
tests/test_token_logprobs.py. Benchmark: benchmarks/bench_token_logprobs.py.
"""

from __future__ import annotations

import os
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastalign.backend import choose, plain, refuse_forward_mode

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_stats_reference(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formulas above in plain PyTorch, differentiable by autograd in ``logits``.

    Args:
        logits: [N, V], or [B, T, V] with B * T = N, any float dtype.
        targets: [N] int64; a row whose target is ``ignore_index`` gives zeros.
        temperature: [1] or [N], positive.
        softcap: the c of the formula; 0 means none.

    Returns:
        logp, entropy, row_max, log_sum: [N] each, float32 (float64 for float64 logits); natural
            logarithms.
    """
    kept = targets != ignore_index
    u = logits.reshape(len(targets), logits.shape[-1]).to(accumulation_dtype(logits.dtype))
    u = u.masked_fill(~kept[:, None], 0.0)
    if softcap:
        u = softcap * torch.tanh(u / softcap)
    row_max = u.detach().amax(-1)
    s = (u - row_max[:, None]) / temperature[:, None]
    log_sum = s.exp().sum(-1).log()
    log_p = s - log_sum[:, None]
    p = log_p.exp()
    # 0 * -inf is NaN, forward and backward: a column without probability gets log p = 0 first.
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)
    logp = log_p.gather(-1, targets.masked_fill(~kept, 0)[:, None])[:, 0]
    return (
        logp.masked_fill(~kept, 0.0),
        entropy.masked_fill(~kept, 0.0),
        row_max,
        log_sum.detach().masked_fill(~kept, 0.0),
    )


def dlogits_reference(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> Tensor:
    """dL/dlogits by the closed form above, in ``logits``' shape and dtype."""
    kept = targets != ignore_index
    u = logits.reshape(len(targets), logits.shape[-1]).to(accumulation_dtype(logits.dtype))
    u = u.masked_fill(~kept[:, None], 0.0)
    if softcap:
        u = softcap * torch.tanh(u / softcap)
    log_p = (u - row_max[:, None]) / temperature[:, None] - log_sum[:, None]
    p = log_p.exp()
    at_target = targets.masked_fill(~kept, 0)[:, None]
    # 1 - p of the target from its own logp: no second rounding, no cancellation.
    onehot_minus_p = (-p).scatter(-1, at_target, -torch.expm1(logp)[:, None])
    dz = grad_logp[:, None] * onehot_minus_p
    if grad_entropy is not None:
        dz = dz - grad_entropy[:, None] * p * (log_p.masked_fill(p == 0, 0.0) + entropy[:, None])
    dz = dz / temperature[:, None]
    if softcap:
        dz = dz * (1.0 - (u / softcap) ** 2)
    return dz.masked_fill(~kept[:, None], 0.0).to(logits.dtype).reshape(logits.shape)


@torch.library.custom_op("fastalign::row_stats", mutates_args=())
def row_stats(
    logits: Tensor, targets: Tensor, temperature: Tensor, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    which = choose("row_stats", logits)
    if which == "triton":
        from fastalign.kernels.token_logprobs import row_stats_fwd

        return row_stats_fwd(logits, targets, temperature, softcap, ignore_index)
    if which == "cpp":
        return torch.ops.fastalign_cpp.row_stats(
            logits, targets, temperature, softcap, ignore_index
        )
    return row_stats_reference(logits, targets, temperature, softcap, ignore_index)


@row_stats.register_fake
def _(
    logits: Tensor, targets: Tensor, temperature: Tensor, softcap: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits.dtype)
    one = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    return one, torch.empty_like(one), torch.empty_like(one), torch.empty_like(one)


def _write_dlogits(
    out: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> None:
    args = (
        grad_logp, grad_entropy, logits, targets, temperature, softcap, ignore_index, logp, entropy,
        row_max, log_sum,
    )  # fmt: skip
    which = choose("dlogits", logits)
    if which == "triton":
        from fastalign.kernels.token_logprobs import dlogits_fwd

        dlogits_fwd(out, *args)
    elif which == "cpp":
        torch.ops.fastalign_cpp.dlogits(out, *args)
    else:
        out.copy_(dlogits_reference(*args))


dlogits_out_op = torch.library.custom_op(
    "fastalign::dlogits_out", _write_dlogits, mutates_args=("out",)
)


@dlogits_out_op.register_fake
def _(out: Tensor, *args: Any) -> None:
    pass


def dlogits_out(out: Tensor, *args: Any) -> None:
    """Writes what ``dlogits`` gives for ``args`` into ``out``, contiguous, which may be the logits
    themselves."""
    write = _write_dlogits if plain(out) else dlogits_out_op
    write(out, *args)


@torch.library.custom_op("fastalign::dlogits", mutates_args=())
def dlogits(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dlogits_out(
        out,
        grad_logp,
        grad_entropy,
        logits,
        targets,
        temperature,
        softcap,
        ignore_index,
        logp,
        entropy,
        row_max,
        log_sum,
    )
    return out


@dlogits.register_fake
def _(
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    softcap: float,
    ignore_index: int,
    logp: Tensor,
    entropy: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, temperature, ctx.softcap, ctx.ignore_index = inputs
    _, _, row_max, log_sum = output
    ctx.save_for_backward(logits, targets, temperature, *output)
    ctx.mark_non_differentiable(row_max, log_sum)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, *_: Any) -> Any:
    logits, targets, temperature, logp, entropy, row_max, log_sum = ctx.saved_tensors
    if grad_logp is None:
        grad_logp = torch.zeros_like(entropy)
    dx = dlogits(
        grad_logp,
        grad_entropy,
        logits,
        targets,
        temperature,
        ctx.softcap,
        ctx.ignore_index,
        logp,
        entropy,
        row_max,
        log_sum,
    )
    return dx, None, None, None, None


torch.library.register_autograd("fastalign::row_stats", _backward, setup_context=_setup_context)


def check_targets(
    op: str,
    targets: Tensor,
    shape: torch.Size,
    device: torch.device,
    vocab: int,
    ignore_index: int | None,
) -> None:
    """ValueError unless ``targets`` is int64, of this shape, on this device; with FASTALIGN_DEBUG=1
    and outside torch.compile also unless each is in [0, V) or ``ignore_index``: a wait."""
    if targets.shape != shape or targets.dtype != torch.int64 or targets.device != device:
        raise ValueError(
            f"{op}: expected targets of shape {tuple(shape)}, int64, on {device}, "
            f"got shape {tuple(targets.shape)}, {targets.dtype}, on {targets.device}"
        )
    if torch.compiler.is_compiling() or os.environ.get("FASTALIGN_DEBUG") != "1":
        return
    flat = targets.reshape(-1)
    wrong = (flat < 0) | (flat >= vocab)
    if ignore_index is not None:
        wrong &= flat != ignore_index
    if wrong.any():
        row = int(wrong.nonzero()[0])
        also = "" if ignore_index is None else f" or {ignore_index}"
        raise ValueError(
            f"{op}: expected targets in [0, {vocab}){also}, got {int(flat[row])} in row {row}"
        )


def temperature_tensor(
    op: str, temperature: float | Tensor, like: Tensor, shape: torch.Size
) -> Tensor:
    """``temperature`` as a [1] or [N] tensor in the accumulation dtype of ``like``.

    A tensor's values are not looked at (that would make the host wait for the device): zero or
    negative temperatures in it give meaningless numbers.
    """
    dtype = accumulation_dtype(like.dtype)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"{op}: expected temperature > 0, got {temperature}")
        # For torch.compile the number in torch.full is a constant, each a compilation of its own.
        return torch.ones(1, dtype=dtype, device=like.device) * float(temperature)
    if temperature.requires_grad:
        raise ValueError(f"{op}: temperature has no gradient, got a tensor that requires grad")
    if temperature.numel() != 1 and temperature.shape != shape:
        raise ValueError(
            f"{op}: expected temperature as a float or a tensor of shape {tuple(shape)}, "
            f"got shape {tuple(temperature.shape)}"
        )
    return temperature.to(device=like.device, dtype=dtype).reshape(-1)


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = ...,
    ignore_index: int = ...,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at ``targets``, and the entropy of each row.

    Reads each row of logits once in the forward pass; the backward pass reads it once more and
    writes the gradient. Nothing of the size of the logits is kept beside them.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        targets: [...] int64, in [0, V) or ``ignore_index``. Other values: an error on the CPU, NaN
            on CUDA, where looking at them would make the host wait. The environment variable
            FASTALIGN_DEBUG=1 makes it look, here and in linear_logprobs and linear_loss, outside
            torch.compile.
        temperature: positive float, or a tensor [...] with one temperature per token.
        ignore_index: rows with this target give logp 0, entropy 0 and gradient 0 whatever their
            logits hold.
        return_entropy: also return the entropy (differentiable too).

    Returns:
        logp [...] in nats, float32 (float64 for float64 logits); with ``return_entropy`` (logp,
        entropy).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or temperature <= 0; with
            FASTALIGN_DEBUG=1 the first row whose target is neither in [0, V) nor ``ignore_index``.
    """
    op = "token_logprobs"
    refuse_forward_mode(op, logits)
    if logits.dim() < 1 or logits.dtype not in FLOAT_DTYPES or logits.shape[-1] < 1:
        raise ValueError(
            f"{op}: expected float logits of shape [..., V] with V >= 1, "
            f"got shape {tuple(logits.shape)}, {logits.dtype}"
        )
    shape, vocab = logits.shape[:-1], logits.shape[-1]
    check_targets(op, targets, shape, logits.device, vocab, ignore_index)
    scale = temperature_tensor(op, temperature, logits, targets.shape)
    # [B, T, V] stays as it is: a slice logits[:, :-1] would be copied whole to become [N, V].
    rows = logits if logits.dim() == 3 else logits.reshape(targets.numel(), logits.shape[-1])
    logp, entropy, _, _ = row_stats(rows, targets.reshape(-1), scale, 0.0, ignore_index)
    logp = logp.reshape(targets.shape)
    return (logp, entropy.reshape(targets.shape)) if return_entropy else logp
