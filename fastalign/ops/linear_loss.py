r"""Any loss on token log-probabilities, from hidden states to gradients in one pass and bounded
memory.

    z_i = softcap(W h_i + b) / T_i        logp_i, H_i from token_logprobs
    kl_i = KL(softmax(z_i) || softmax(r_i))     with a reference model, r_i its logits: token_kl
    loss = sum_i loss(logp, H, inputs)_i / normalizer
    g_i, e_i, c_i = dloss/dlogp_i, dloss/dH_i, dloss/dkl_i     by autograd on vectors of C numbers
    dZ from (g, e, c),  dH = dZ W,  dW = dZ^T H

g, e and c are known as soon as a slab's log-probs are, while its logits are still in the workspace.
So the forward pass already forms the gradients: three matrix products, where recomputing the logits
takes four. The backward pass only multiplies by the upstream gradient.

fastalign/ops/linear_loss_checks.py has the checks, linear_loss_walk.py walks the slabs,
linear_loss_call.py calls the loss, slab.py holds the products, plan.py the choice of slabs. The row
kernels are those of token_logprobs and token_kl (csrc/token_logprobs.cpp,
kernels/token_logprobs.py), the loss objects' is policy_loss's.

Tests: tests/test_linear_loss.py. Benchmark: benchmarks/bench_linear_loss.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastalign.backend import once_differentiable
from fastalign.ops.linear_logprobs import linear_logprobs_reference
from fastalign.ops.linear_loss_call import Loss, accepted
from fastalign.ops.linear_loss_checks import (
    OP,
    at_hand,
    check_inputs,
    check_loss,
    check_reduction,
    checked_groups,
    checked_normalizer,
    checked_reference,
    checked_weight_grad,
    number_of_groups,
)
from fastalign.ops.linear_loss_walk import Call, Walk
from fastalign.ops.slab import (
    IGNORE_NOTHING,
    check_head,
    check_softcap,
    follow_autocast,
    without_autocast,
)
from fastalign.ops.token_logprobs import check_targets, temperature_tensor


class LossOutput(NamedTuple):
    """What ``linear_loss`` returns."""

    loss: Tensor
    """0-d, differentiable: the sum of the losses over the normalizer."""
    logp: Tensor
    """[N] detached, 0 at ignored rows."""
    entropy: Tensor
    """[N] detached, 0 at ignored rows."""
    metrics: dict[str, Tensor]
    """0-d detached means over the rows kept: "entropy"; "top1", the share of targets that are the
    likeliest token; "ref_k1", "ref_k3" when ``ref_logp`` is an input or a reference model is given,
    "old_k1", "old_k3" when ``old_logp`` is an input: k1 = logp - other, k3 = exp(other - logp) - 1
    - (other - logp); "kl" with a reference model; and what ``loss.statistics`` names (the clip
    fraction of PPO; the rewards of DPO, as means over pairs), where the loss has it."""
    ref_logp: Tensor | None = None
    """[N] detached, with a reference model: its log-probs of the targets."""
    kl: Tensor | None = None
    """[N] detached, with a reference model: KL(policy || reference) over the whole vocabulary."""


def linear_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Loss,
    inputs: dict[str, Any],
    bias: Tensor | None,
    temperature: Tensor,
    softcap: float = 0.0,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """The formula for losses per token with the whole logits tensor, differentiable by autograd."""
    logp, entropy = linear_logprobs_reference(
        hidden, weight, targets, bias, temperature, softcap, ignore_index
    )
    kept = targets != ignore_index
    cut = {
        name: x[kept] if isinstance(x, Tensor) and x.dim() > 0 else x for name, x in inputs.items()
    }
    count = kept.sum().clamp(min=1)
    values = loss(logp[kept], entropy[kept], **cut)
    return values.sum() / (count if normalizer is None else normalizer)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, *learned: Tensor
    ) -> tuple[Tensor | None, ...]:
        walk = Walk(call, hidden, weight, bias)
        walk.run()
        ctx.into_buffer, ctx.share = call.weight_grad is not None, walk.loss.share
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias, *learned)]
        ctx.save_for_backward(*walk.grads.result(), *walk.loss.learned.values())
        found = [walk.scattered("logp"), walk.scattered("entropy")]
        if call.reference is not None:
            found += [walk.scattered("ref_logp"), walk.scattered("kl")]
        ctx.mark_non_differentiable(*found)
        return walk.loss.total, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        if ctx.into_buffer:
            _check_upstream(ctx, grad_loss)
        factor = grad_loss * ctx.share
        # Where looking at the factor is free, multiplying dW by one is not.
        done = at_hand(factor) and factor == 1.0 and ctx.dtypes[0] != torch.float16
        return None, *(
            None if g is None else g.to(dtype) if done else _times(g, factor, dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )


def _check_upstream(ctx: Any, grad_loss: Tensor) -> None:
    """The weight's gradient is in its buffer already: nothing may multiply or repeat the others."""
    if getattr(ctx, "went_backward", False):
        raise ValueError(
            f"{OP}: expected one backward pass when weight_grad is given, got a second one: the "
            "weight's gradient was added once, in the forward pass"
        )
    ctx.went_backward = True
    if not at_hand(grad_loss):
        torch._assert_async(grad_loss == 1.0, f"{OP}: weight_grad with an upstream gradient")
    elif grad_loss != 1.0:
        raise ValueError(
            f"{OP}: expected the loss to be the end of the graph when weight_grad is given (its "
            f"gradient was added in the forward pass), got the upstream gradient {grad_loss.item()}"
            "; scale by normalizer instead"
        )


def _times(g: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """g * factor; a gradient scaler's 65536 is infinite in float16, so there in float32."""
    wide = torch.float32 if torch.float16 in (g.dtype, dtype) else g.dtype
    return (g.to(wide) * factor.to(wide)).to(dtype)


# torch.compiler.disable, but without the second that importing the compiler takes.
@torch._disable_dynamo
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss: Loss,
    inputs: dict[str, Any] | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = -100,
    normalizer: float | Tensor | None = None,
    groups: Tensor | Sequence[int] | None = None,
    reduction: str | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    weight_grad: Tensor | None = None,
    workspace: int | None = None,
    batch_invariant: bool = False,
) -> LossOutput:
    """sum(loss(logp, entropy, **inputs)) / normalizer, and its gradients, without a full logits
    tensor.

    Gradients flow into hidden, weight, bias and every float tensor of ``inputs`` that requires
    grad. They are formed in the forward pass (three matrix products; two when the weight does not
    require grad; one without any gradient) and handed over by ``backward``. Per-token losses are
    evaluated slab by slab; with ``groups`` a slab holds whole groups, and when one does not fit
    into ``workspace`` the logits are computed twice.

    Inside ``torch.compile`` the call is one graph break: what stands before and after it is
    compiled, the call runs as it is (so ``fullgraph=True`` is refused).

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64.
        weight: [V, H], same dtype and device.
        targets: [N] int64, in [0, V) or ``ignore_index``. Other values: an error on the CPU, a NaN
            loss on CUDA.
        loss: any callable ``loss(logp, entropy, **inputs)`` in plain PyTorch. logp and entropy are
            [C] for the C kept rows of the slab at hand; it returns one value per row, [C]. With
            ``groups`` a loss that takes ``cu_seqlens`` receives it, [g + 1], int64, the bounds of
            the slab's g groups among those C rows (a group whose rows are all ignored is empty),
            and returns one value per group, [g]; a loss that does not take it stays one per row.
            All that requires grad must come through ``inputs``. A loss object on pairs (DPO and its
            relatives) receives the bounds of both sequences of each pair.
        inputs: tensors with leading dimension N (cut like the rows), for a loss per group also of
            leading dimension G (cut like the groups), 0-d tensors and plain values. Where G = N
            every group must be one row, and they are cut like the rows: anything else is refused,
            as nothing tells which is meant (so is an ignored row there, but for a reduction that
            leaves empty groups out). The loss gets copies of the tensors and may change them in
            place; 0-d ones that require grad come in float32 where they are narrower. All are on
            the device of ``hidden``, but for 0-d constants.
        bias: [V], same dtype.
        temperature: positive float, or a tensor [N] with one temperature per token.
        softcap: c of c * tanh(z / c), applied before the temperature; None for none.
        ignore_index: rows with this target are dropped before the first product. Counting them
            makes the host wait once for a CUDA device; ``None`` drops nothing.
        normalizer: number or 0-d tensor to divide by in place of the reduction's own. With
            ``weight_grad`` and float16 the host waits for a CUDA tensor once.
        groups: cu_seqlens [G + 1], integers from 0 to N, not falling: the groups of a loss per
            group, the sequences of a "sequence_mean". Read by the host: one wait when it is a CUDA
            tensor, none for a list or a tensor on the CPU. With a loss object on pairs [2G + 1],
            the bounds of the sequences: chosen, rejected, chosen, ...; slabs hold whole pairs.
        reduction: as in ``policy_loss``, over the rows kept. "token_mean": the sum over the number
            of rows. "sequence_mean": each row counts 1 / (rows of its sequence), and the sum is
            divided by the number of sequences that have any; a loss per group: the mean over those
            groups (the others are left out). "sum": divided by 1. None: the loss's own
            (``loss.reduction``, where it has one), else the mean over rows, or over all groups.
        ref_hidden, ref_weight, ref_bias: [N, H'], [V, H'] and [V] of a frozen reference model, H'
            of any size. Its logits are computed slab by slab beside the policy's (one more product)
            at the same temperature and soft-cap, and the loss receives ``kl`` [C], the exact
            KL(policy || reference) over the vocabulary in nats, differentiable, and ``ref_logp``
            [C], whichever of the two it takes (an object of fastalign.losses may take neither: the
            metrics have them).
        weight_grad: float32 (float64 for float64) [V, H] contiguous buffer to which the weight's
            gradient is added during this call, instead of being returned by ``backward``: no
            accumulator, no copy, over micro-batches no rounding. Usually ``weight.grad``. Each call
            adds once, whether or not ``backward`` follows (one in which the loss raises an error:
            a part): the loss must be the end of the graph,
            run backward once, and not lie in an activation checkpoint, which would call it again.
            Hooks on the weight do not see it.
        workspace: bytes of logits that may be held at once; see ``plan``.
        batch_invariant: every product has the shape of a full slab (the last one is filled up with
            zeros), so that a token's log-prob, entropy and, with a ``normalizer``, its dhidden are
            the same bits whatever other tokens are in the batch. ``workspace`` fixes the slab.

    Returns:
        LossOutput(loss, logp, entropy, metrics, ref_logp, kl).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; temperature or softcap <= 0; groups
            that do not cover the rows; a loss that returns anything but one value per row or group;
            a loss that uses a tensor requiring grad from outside ``inputs``; a workspace smaller
            than one row of logits.
    """
    inputs = {} if inputs is None else dict(inputs)
    hidden, weight, bias = follow_autocast(hidden, weight, bias)
    check_head(OP, hidden, weight, bias)
    vocab = weight.shape[0]
    check_targets(OP, targets, hidden.shape[:1], hidden.device, vocab, ignore_index)
    bounds = None if groups is None else checked_groups(groups, hidden.shape[0], inputs)
    n_groups = None
    if bounds is not None and accepted(loss, "cu_seqlens"):
        n_groups = number_of_groups(loss, bounds)
    check_inputs(inputs, hidden, n_groups, bounds)
    if reduction is None:
        reduction = getattr(loss, "reduction", None)
    check_reduction(loss, reduction, bounds is not None, n_groups is not None)
    grad = torch.is_grad_enabled()
    learned = tuple(
        name for name, x in inputs.items() if grad and isinstance(x, Tensor) and x.requires_grad
    )
    check_loss(loss, learned, ref_hidden is not None)
    call = Call(
        targets=targets,
        temperature=temperature_tensor(OP, temperature, hidden, targets.shape),
        softcap=check_softcap(OP, softcap),
        ignore_index=IGNORE_NOTHING if ignore_index is None else ignore_index,
        loss=loss,
        inputs=inputs,
        learned=learned,
        normalizer=checked_normalizer(normalizer),
        groups=bounds,
        reduction=reduction,
        reference=checked_reference(hidden, weight, ref_hidden, ref_weight, ref_bias, inputs),
        weight_grad=checked_weight_grad(weight_grad, weight),
        workspace=workspace,
        batch_invariant=batch_invariant,
        need=(
            grad and hidden.requires_grad,
            grad and (weight.requires_grad or weight_grad is not None),
            grad and bias is not None and bias.requires_grad,
        ),
        metrics={},
    )
    with without_autocast(hidden.device):
        loss_value, logp, entropy, *others = _LinearLoss.apply(
            call, hidden, weight, bias, *(inputs[name] for name in learned)
        )
    return LossOutput(loss_value, logp, entropy, call.metrics, *others)
