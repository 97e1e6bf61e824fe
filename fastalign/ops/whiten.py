"""Masked whitening of advantages or rewards to mean 0 and variance 1.

    mean = sum x / n,   var = sum (x - mean)^2 / (n - 1)      over the n cells that the mask keeps
    y    = (x - mean) / sqrt(var + eps)                       (+ mean when shift_mean is False)

The variance is the unbiased one (ddof = 1), as in the single-process code of APA (arXiv
2306.02231), in TRL and in verl. With one cell the variance is taken as 0, so y = 0 (or the cell
itself when shift_mean is False).

Several ranks, each with its own cells: their (n, mean, M2 = sum (x - mean)^2) are gathered and
merged in the order of the ranks, so that all of them have the same statistics to the last bit:

    n = n_a + n_b,   mean = mean_a + delta n_b / n,   M2 = M2_a + M2_b + delta^2 n_a n_b / n,
    delta = mean_b - mean_a

Source: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
Variances" (1979).

Sibling files: csrc/whiten.cpp, kernels/whiten.py, tests/test_whiten.py, benchmarks/bench_whiten.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.backend import choose, plain, refuse_forward_mode
from fastalign.ops.token_logprobs import FLOAT_DTYPES, accumulation_dtype


def moments_reference(x: Tensor, mask: Tensor | None) -> Tensor:
    """float64 [3]: n, mean, M2 of the kept cells; the mean is taken twice, against its rounding."""
    x = x.double()
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x = torch.where(kept, x, 0.0)
    count = kept.sum().double()
    mean = x.sum() / count.clamp(min=1.0)
    mean = mean + torch.where(kept, x - mean, 0.0).sum() / count.clamp(min=1.0)
    return torch.stack([count, mean, torch.where(kept, x - mean, 0.0).square().sum()])


def whiten_by_reference(
    x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool
) -> Tensor:
    """``x`` whitened by given moments, in plain PyTorch."""
    count, mean, squares = moments.unbind()
    y = (x.double() - mean) * torch.rsqrt(squares / (count - 1.0).clamp(min=1.0) + eps)
    y = y if shift_mean else y + mean
    y = y if mask is None else torch.where(mask, y, 0.0)
    return y.to(accumulation_dtype(x.dtype)).contiguous()


def whiten_reference(x: Tensor, mask: Tensor | None, eps: float, shift_mean: bool) -> Tensor:
    """The first formulas above in plain PyTorch."""
    if mask is not None:  # autograd would multiply what stands in masked cells by 0
        x = x.masked_fill(~mask, 0.0)
    return whiten_by_reference(x, mask, moments_reference(x, mask), eps, shift_mean)


def whiten_backward_reference(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool
) -> Tensor:
    """dx = (g - sum g / n - z sum(g z) / (n - 1)) / sqrt(var + eps), z being the whitened x;
    + sum g / n when shift_mean is False."""
    count, _, squares = moments.unbind()
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    g = torch.where(kept, grad.double(), 0.0)
    z = whiten_by_reference(x.double(), kept, moments, eps, True)
    mean_g = g.sum() / count.clamp(min=1.0)
    along = (g * z).sum() / (count - 1.0).clamp(min=1.0)
    scale = torch.rsqrt(squares / (count - 1.0).clamp(min=1.0) + eps)
    dx = scale * (g - mean_g - along * z) + (0.0 if shift_mean else mean_g)
    return torch.where(kept, dx, 0.0).to(x.dtype).contiguous()


@torch.library.custom_op("fastalign::moments", mutates_args=())
def _moments(x: Tensor, mask: Tensor | None) -> Tensor:
    which = choose("moments", x)
    if which == "triton":
        from fastalign.kernels.whiten import moments_fwd

        return moments_fwd(x, mask)
    if which == "cpp":
        return torch.ops.fastalign_cpp.moments(x, mask)
    return moments_reference(x, mask)


@_moments.register_fake
def _(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


def _computed_by(
    x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool
) -> Tensor:
    """``whiten_by_reference``, by the backend in force."""
    which = choose("whiten", x)
    if which == "triton":
        from fastalign.kernels.whiten import whiten_by_fwd

        return whiten_by_fwd(x, mask, moments, eps, shift_mean)
    if which == "cpp":
        return torch.ops.fastalign_cpp.whiten_by(x, mask, moments, eps, shift_mean)
    return whiten_by_reference(x, mask, moments, eps, shift_mean)


_whiten_by = torch.library.custom_op("fastalign::whiten_by", _computed_by, mutates_args=())


@_whiten_by.register_fake
def _(x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=accumulation_dtype(x.dtype))


def _computed(
    x: Tensor, mask: Tensor | None, eps: float, shift_mean: bool
) -> tuple[Tensor, Tensor]:
    """``whiten_reference`` and the moments, by the backend in force."""
    which = choose("whiten", x)
    if which == "triton":
        from fastalign.kernels.whiten import whiten_fwd

        return whiten_fwd(x, mask, eps, shift_mean)
    if which == "cpp":
        return torch.ops.fastalign_cpp.whiten(x, mask, eps, shift_mean)
    moments = moments_reference(x, mask)
    return whiten_by_reference(x, mask, moments, eps, shift_mean), moments


@torch.library.custom_op("fastalign::whiten", mutates_args=())
def _whiten(x: Tensor, mask: Tensor | None, eps: float, shift_mean: bool) -> tuple[Tensor, Tensor]:
    return _computed(x, mask, eps, shift_mean)


@_whiten.register_fake
def _(x: Tensor, mask: Tensor | None, eps: float, shift_mean: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=accumulation_dtype(x.dtype))
    return y, x.new_empty(3, dtype=torch.float64)


@torch.library.custom_op("fastalign::whiten_backward", mutates_args=())
def _whiten_backward(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool
) -> Tensor:
    which = choose("whiten", x)
    if which == "triton":
        from fastalign.kernels.whiten import whiten_bwd

        return whiten_bwd(grad, x, mask, moments, eps, shift_mean)
    if which == "cpp":
        return torch.ops.fastalign_cpp.whiten_backward(grad, x, mask, moments, eps, shift_mean)
    return whiten_backward_reference(grad, x, mask, moments, eps, shift_mean)


@_whiten_backward.register_fake
def _(
    grad: Tensor, x: Tensor, mask: Tensor | None, moments: Tensor, eps: float, shift_mean: bool
) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, mask, ctx.eps, ctx.shift_mean = inputs
    ctx.save_for_backward(x, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None, None]:
    if grad is None:
        return None, None, None, None
    dx = _whiten_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.shift_mean)
    return dx, None, None, None


torch.library.register_autograd("fastalign::whiten", _backward, setup_context=_setup_context)


def merged_moments(parts: Tensor) -> Tensor:
    """float64 [3]: (n, mean, M2) of [P, 3] parts, merged in their order."""
    count, mean, squares = parts[0].unbind()
    for part in parts[1:]:
        n, other, own = part.unbind()
        both = (count + n).clamp(min=1.0)
        delta = other - mean
        squares = squares + own + delta.square() * (count * n / both)
        mean = mean + delta * (n / both)
        count = count + n
    return torch.stack([count, mean, squares])


def masked_moments(
    op: str, x: Tensor, mask: Tensor | None, group: dist.ProcessGroup | None
) -> Tensor:
    """float64 [3]: (n, mean, M2) of the kept cells, of all ranks with a group; no gradient.

    Raises:
        ValueError: as ``whiten``, in the name of ``op``.
    """
    return over_ranks(_moments(x.detach(), check_cells(op, x, mask)), group)


def over_ranks(moments: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The moments of all ranks of a group together, the same bits on each."""
    if group is None:
        return moments
    size = dist.get_world_size(group)
    parts = torch.zeros(size, 3, dtype=torch.float64, device=moments.device)
    # A row for each rank and zeros elsewhere: their sum is exact, in whatever order it is formed.
    parts[dist.get_rank(group)] = moments
    dist.all_reduce(parts, group=group)
    return merged_moments(parts)


def moments_by(op: str, statistics: Tensor, x: Tensor) -> Tensor:
    """(n, mean, M2) from (n, mean, variance); ValueError for what ``gae`` would not return."""
    if statistics.shape != (3,) or statistics.dtype != torch.float64:
        raise ValueError(
            f"{op}: expected statistics [3] of float64 (count, mean, variance), "
            f"got {tuple(statistics.shape)} {statistics.dtype}"
        )
    if statistics.device != x.device:
        raise ValueError(
            f"{op}: expected statistics on the device of x, {x.device}, got {statistics.device}"
        )
    count, mean, variance = statistics.unbind()
    return torch.stack([count, mean, variance * (count - 1.0).clamp(min=0.0)])


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Scales the kept cells of ``x`` to variance 1, and to mean 0 unless ``shift_mean`` is False.

    Differentiable, once. Statistics are taken over all kept cells of the tensor, not row by row:
    padded [B, T] with a mask and the same tokens packed [N] give the same numbers.

    Args:
        x: any shape; bfloat16, float16, float32 or float64.
        mask: same shape, bool or integer; cells where it is False come out as 0 and, NaN included,
            have no effect.
        shift_mean: False adds the mean back, so only the spread changes.
        eps: added to the variance; > 0.
        group: a ``torch.distributed`` process group: statistics over the kept cells of all its
            ranks, which may differ in number. Every rank must call. ``x`` must then be a constant:
            no gradient crosses ranks.
        statistics: [3], float64: count, mean and unbiased variance of the kept cells (with a group,
            of this rank's), as ``gae(..., return_statistics=True)`` returns them with the
            advantages and the same mask. ``x`` is then read once, and must be a constant.

    Returns:
        The shape of ``x``, contiguous, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, eps <= 0, or an ``x`` that requires a
            gradient beside a group or statistics.
        NotImplementedError: an ``x`` with a tangent (forward-mode derivatives).
    """
    refuse_forward_mode("whiten", x)
    mask = check_cells("whiten", x, mask)
    if not 0.0 < eps < math.inf:
        raise ValueError(f"whiten: expected eps > 0, got {eps}")
    constant = not (x.requires_grad and torch.is_grad_enabled())
    if group is None and statistics is None:
        call = _computed if constant and plain(x) else _whiten
        return call(x, mask, float(eps), shift_mean)[0]
    if not constant:
        given = "a group" if statistics is None else "statistics"
        raise ValueError(f"whiten: expected an x that requires no gradient with {given}")
    x = x.detach()
    own = _moments(x, mask) if statistics is None else moments_by("whiten", statistics, x)
    call_by = _computed_by if plain(x) else _whiten_by
    return call_by(x, mask, over_ranks(own, group), float(eps), shift_mean)


def check_cells(op: str, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as bool; ValueError for one that does not fit ``x``, or an x of no float dtype."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: expected a floating dtype, got {x.dtype}")
    if mask is None:
        return None
    if mask.shape != x.shape:
        raise ValueError(
            f"{op}: expected a mask of the shape of x, {tuple(x.shape)}, got {tuple(mask.shape)}"
        )
    if mask.is_floating_point():
        raise ValueError(f"{op}: expected a bool or integer mask, got {mask.dtype}")
    if mask.device != x.device:
        raise ValueError(
            f"{op}: expected the mask on the device of x, {x.device}, got {mask.device}"
        )
    return mask.to(torch.bool)
