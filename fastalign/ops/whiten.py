"""Masked whitening of advantages or rewards to mean 0 and variance 1.

    mean = sum x / n,   var = sum (x - mean)^2 / (n - 1)      over the n cells that the mask keeps
    y    = (x - mean) / sqrt(var + 1e-8)                      (+ mean when shift_mean is False)

The variance is the unbiased one (ddof = 1), as in the single-process code of APA (arXiv
2306.02231). With one cell the variance is taken as 0, so y = 0 (or the cell itself when shift_mean
is False).

Sibling file: tests/test_whiten.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-8


def whiten_reference(x: Tensor, mask: Tensor | None, shift_mean: bool) -> Tensor:
    """The formula above in plain PyTorch; the mean is taken twice, against its rounding."""
    x = x if x.dtype == torch.float64 else x.float()
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    zero = torch.zeros_like(x)
    x = torch.where(kept, x, zero)
    count = kept.sum()
    mean = x.sum() / count.clamp(min=1)
    centred = torch.where(kept, x - mean, zero)
    # Equal cells would otherwise all be off by the rounding of their mean, which is then scaled up.
    centred = torch.where(kept, centred - centred.sum() / count.clamp(min=1), zero)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    y = centred * torch.rsqrt(variance + EPS)
    return y if shift_mean else torch.where(kept, y + mean, zero)


torch.library.define("fastalign::whiten", "(Tensor x, Tensor? mask, bool shift_mean) -> Tensor")
torch.library.impl("fastalign::whiten", "CompositeImplicitAutograd", whiten_reference)


def whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """Scales the kept cells of ``x`` to variance 1, and to mean 0 unless ``shift_mean`` is False.

    Differentiable. Statistics are taken over all kept cells of the tensor, not row by row.

    Args:
        x: any shape; bfloat16, float16, float32 or float64.
        mask: same shape, bool or integer; cells where it is False come out as 0 and, NaN included,
            have no effect.
        shift_mean: False adds the mean back, so only the spread changes.

    Returns:
        The shape of ``x``, float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if not x.is_floating_point():
        raise ValueError(f"whiten: expected a floating dtype, got {x.dtype}")
    if mask is not None:
        if mask.shape != x.shape:
            raise ValueError(
                f"whiten: expected a mask of the shape of x, {tuple(x.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        if mask.is_floating_point():
            raise ValueError(f"whiten: expected a bool or integer mask, got {mask.dtype}")
        if mask.device != x.device:
            raise ValueError(
                f"whiten: expected the mask on the device of x, {x.device}, got {mask.device}"
            )
        mask = mask.to(torch.bool)
    return torch.ops.fastalign.whiten(x, mask, shift_mean)
