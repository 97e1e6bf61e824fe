"""KL estimates and their gradient; formulas: fastalign/ops/kl_estimate.py.

One program per block of tokens. Forward: two log-probs in, an estimate out. Backward: the log-probs
are read again, which costs what a slope kept from the forward pass would.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastalign.kernels._device import expm1_near, kl_k3

BLOCK = 2048
# One compilation serves all sizes and alignments.
GENERIC = {
    "do_not_specialize": ["n_tokens"],
    "do_not_specialize_on_alignment": [
        "logp_ptr",
        "ref_logp_ptr",
        "grad_ptr",
        "kl_ptr",
        "dlogp_ptr",
    ],
}


@triton.jit
def kl_of(d, KIND: tl.constexpr):
    """k1, k2 or k3 of d = ref_logp - logp; KIND is an index into KINDS."""
    if KIND == 0:
        kl = -d
    elif KIND == 1:
        kl = 0.5 * d * d
    else:
        kl = kl_k3(d)
    return kl


@triton.jit(**GENERIC)
def _kl_estimate_fwd_kernel(
    logp_ptr,  # [n_tokens], as all
    ref_logp_ptr,
    kl_ptr,  # float32
    n_tokens,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_tokens
    logp = tl.load(logp_ptr + at, mask=inside, other=0.0).to(tl.float32)
    ref_logp = tl.load(ref_logp_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(kl_ptr + at, kl_of(ref_logp - logp, KIND), mask=inside)


@triton.jit(**GENERIC)
def _kl_estimate_bwd_kernel(
    grad_ptr,  # [n_tokens] float32
    logp_ptr,  # [n_tokens], as below
    ref_logp_ptr,
    dlogp_ptr,  # the dtype of logp
    n_tokens,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_tokens
    logp = tl.load(logp_ptr + at, mask=inside, other=0.0).to(tl.float32)
    ref_logp = tl.load(ref_logp_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    d = ref_logp - logp
    if KIND == 1:
        slope = -d
    else:
        slope = tl.where(tl.abs(d) < 0.5, -expm1_near(d), 1.0 - tl.exp(d))
    dlogp = grad * slope
    tl.store(dlogp_ptr + at, dlogp.to(dlogp_ptr.dtype.element_ty), mask=inside)


def kl_estimate_fwd(logp: Tensor, ref_logp: Tensor, kind: int) -> Tensor:
    """The estimates, float32 and contiguous; ``kind``: an index into KINDS."""
    logp, ref_logp = logp.contiguous(), ref_logp.contiguous()
    kl = torch.empty_like(logp, dtype=torch.float32)
    n = logp.numel()
    if n > 0:
        with torch.cuda.device_of(logp):
            _kl_estimate_fwd_kernel[(triton.cdiv(n, BLOCK),)](
                logp, ref_logp, kl, n, KIND=kind, BLOCK=BLOCK, num_warps=4
            )
    return kl


def kl_estimate_bwd(grad: Tensor, logp: Tensor, ref_logp: Tensor, kind: int) -> Tensor:
    """dlogp of k2 or k3, in the dtype of ``logp`` and contiguous; dref_logp is its negative."""
    grad, logp, ref_logp = grad.contiguous(), logp.contiguous(), ref_logp.contiguous()
    dlogp = torch.empty_like(logp)
    n = logp.numel()
    if n > 0:
        with torch.cuda.device_of(logp):
            _kl_estimate_bwd_kernel[(triton.cdiv(n, BLOCK),)](
                grad, logp, ref_logp, dlogp, n, KIND=kind, BLOCK=BLOCK, num_warps=4
            )
    return dlogp
