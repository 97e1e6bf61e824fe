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

fastalign/ops/linear_loss_walk.py walks the slabs, linear_loss_call.py calls the loss, slab.py holds
the products, plan.py the choice of slabs. The row kernels are those of token_logprobs and token_kl
(csrc/token_logprobs.cpp, kernels/token_logprobs.py), the loss objects' is policy_loss's.

Tests: tests/test_linear_loss.py. Benchmark: benchmarks/bench_linear_loss.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign.losses.ratio import exact_kl_coef
from fastalign.ops.linear_logprobs import linear_logprobs_reference
from fastalign.ops.linear_loss_call import FROM_REFERENCE, Loss, accepted, sequences_per_value
from fastalign.ops.linear_loss_walk import Call, Reference, Walk
from fastalign.ops.policy_loss_terms import fused
from fastalign.ops.policy_reduce import REDUCTIONS
from fastalign.ops.slab import (
    IGNORE_NOTHING,
    check_head,
    check_softcap,
    follow_autocast,
    without_autocast,
)
from fastalign.ops.token_kl import check_same_precision
from fastalign.ops.token_logprobs import accumulation_dtype, check_targets, temperature_tensor

OP = "linear_loss"


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
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
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
        if _at_hand(factor) and factor == 1.0 and ctx.dtypes[0] != torch.float16:
            return None, *ctx.saved_tensors
        dtypes = [*ctx.dtypes, *(None if g is None else g.dtype for g in ctx.saved_tensors[3:])]
        return None, *(
            None if g is None else _times(g, factor, dtype)
            for g, dtype in zip(ctx.saved_tensors, dtypes, strict=True)
        )


def _at_hand(x: Tensor) -> bool:
    """Whether the value can be looked at without a wait (a fake tensor has none)."""
    return x.device.type == "cpu" and type(x) is Tensor


def _check_upstream(ctx: Any, grad_loss: Tensor) -> None:
    """The weight's gradient is in its buffer already: nothing may multiply or repeat the others."""
    if getattr(ctx, "went_backward", False):
        raise ValueError(
            f"{OP}: expected one backward pass when weight_grad is given, got a second one: the "
            "weight's gradient was added once, in the forward pass"
        )
    ctx.went_backward = True
    if not _at_hand(grad_loss):
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
            as nothing tells which is meant. The loss gets copies of the tensors and may change them
            in place. All are on the device of ``hidden``, but for 0-d constants.
        bias: [V], same dtype.
        temperature: positive float, or a tensor [N] with one temperature per token.
        softcap: c of c * tanh(z / c), applied before the temperature; None for none.
        ignore_index: rows with this target are dropped before the first product. Counting them
            makes the host wait once for a CUDA device; ``None`` drops nothing.
        normalizer: number or 0-d tensor to divide by in place of the reduction's own.
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
            adds once, whether or not ``backward`` follows: the loss must be the end of the graph,
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
    bounds = None if groups is None else _checked_groups(groups, hidden.shape[0], inputs)
    n_groups = None
    if bounds is not None and accepted(loss, "cu_seqlens"):
        n_groups = _number_of_groups(loss, bounds)
    _check_inputs(inputs, hidden, n_groups, bounds)
    if reduction is None:
        reduction = getattr(loss, "reduction", None)
    _check_reduction(loss, reduction, bounds is not None, n_groups is not None)
    grad = torch.is_grad_enabled()
    learned = tuple(
        name for name, x in inputs.items() if grad and isinstance(x, Tensor) and x.requires_grad
    )
    _check_loss(loss, learned, ref_hidden is not None)
    call = Call(
        targets=targets,
        temperature=temperature_tensor(OP, temperature, hidden, targets.shape),
        softcap=check_softcap(OP, softcap),
        ignore_index=IGNORE_NOTHING if ignore_index is None else ignore_index,
        loss=loss,
        inputs=inputs,
        learned=learned,
        normalizer=_checked_normalizer(normalizer),
        groups=bounds,
        reduction=reduction,
        reference=_checked_reference(hidden, weight, ref_hidden, ref_weight, ref_bias, inputs),
        weight_grad=_checked_weight_grad(weight_grad, weight),
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


def _check_loss(loss: Loss, learned: tuple[str, ...], has_reference: bool) -> None:
    """What the objects of fastalign.losses ask for beyond their inputs."""
    name = type(loss).__name__
    per_sequence = getattr(loss, "per_sequence", False)
    if learned and (fused(loss) or per_sequence):
        raise ValueError(
            f"{OP}: expected constants, because {name} has no gradient in its inputs; "
            f"{', '.join(learned)} requires grad"
        )
    if exact_kl_coef(loss) and not has_reference:
        raise ValueError(f"{OP}: expected ref_hidden and ref_weight for the exact KL of {loss}")
    if has_reference and not hasattr(loss, "required"):
        if not any(accepted(loss, given) for given in FROM_REFERENCE):
            raise ValueError(
                f"{OP}: ref_hidden is given, so expected a loss that takes kl or ref_logp, "
                f"got {loss}"
            )


def _check_reduction(loss: Loss, reduction: str | None, groups: bool, per_group: bool) -> None:
    if reduction not in (None, *REDUCTIONS):
        raise ValueError(
            f"{OP}: expected reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    if reduction == "sequence_mean" and not groups:
        raise ValueError(f"{OP}: expected groups, the sequences of a sequence_mean")
    if reduction == "sequence_mean" and sequences_per_value(loss) > 1:
        raise ValueError(f"{OP}: expected reduction sum or None (the mean over pairs) for {loss}")
    if reduction == "token_mean" and per_group:
        raise ValueError(f"{OP}: expected reduction sequence_mean or sum for a loss per group")


def _checked_normalizer(normalizer: float | Tensor | None) -> float | Tensor | None:
    if isinstance(normalizer, Tensor):
        if normalizer.requires_grad:
            raise ValueError(f"{OP}: normalizer has no gradient, got a tensor that requires grad")
        if normalizer.dim() != 0:
            raise ValueError(
                f"{OP}: expected normalizer as a number or a 0-d tensor, "
                f"got shape {tuple(normalizer.shape)}"
            )
        if _at_hand(normalizer) and not normalizer > 0:
            raise ValueError(f"{OP}: expected normalizer > 0, got {normalizer.item()}")
        return normalizer.detach()
    if normalizer is not None and not normalizer > 0:
        raise ValueError(f"{OP}: expected normalizer > 0, got {normalizer}")
    return normalizer


def _checked_groups(groups: Tensor | Sequence[int], n: int, inputs: dict[str, Any]) -> list[int]:
    """cu_seqlens on the host."""
    if isinstance(groups, Tensor):
        if groups.dim() != 1 or groups.is_floating_point():
            raise ValueError(
                f"{OP}: expected groups as integer cu_seqlens of shape [G + 1], "
                f"got shape {tuple(groups.shape)}, {groups.dtype}"
            )
        groups = groups.tolist()
    bounds = list(groups)
    if len(bounds) < 2:
        raise ValueError(f"{OP}: expected groups [G + 1] with G >= 1, got {len(bounds)} bounds")
    if "cu_seqlens" in inputs:
        raise ValueError(f"{OP}: expected no input named cu_seqlens beside groups")
    if bounds[0] != 0 or bounds[-1] != n or bounds != sorted(bounds):
        raise ValueError(
            f"{OP}: expected groups to rise from 0 to N = {n}, got {bounds[:3]}..{bounds[-1]}"
        )
    return bounds


def _number_of_groups(loss: Loss, bounds: list[int]) -> int:
    per = sequences_per_value(loss)
    if (len(bounds) - 1) % per:
        raise ValueError(
            f"{OP}: expected groups with {per} sequences for each value of {loss}, "
            f"got {len(bounds) - 1}"
        )
    return (len(bounds) - 1) // per


def _checked_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    inputs: dict[str, Any],
) -> Reference | None:
    if ref_hidden is None or ref_weight is None:
        if not (ref_hidden is ref_weight is ref_bias is None):
            raise ValueError(f"{OP}: expected ref_hidden and ref_weight together, got one of them")
        return None
    ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
    ref_bias = None if ref_bias is None else ref_bias.detach()
    ref_hidden, ref_weight, ref_bias = follow_autocast(ref_hidden, ref_weight, ref_bias)
    check_head(f"{OP} (reference)", ref_hidden, ref_weight, ref_bias)
    check_same_precision(OP, "ref_hidden", ref_hidden, hidden)
    fits = ref_hidden.shape[0] == hidden.shape[0] and ref_weight.shape[0] == weight.shape[0]
    if not fits or ref_hidden.device != hidden.device:
        raise ValueError(
            f"{OP}: expected ref_hidden [{hidden.shape[0]}, H'] and ref_weight "
            f"[{weight.shape[0]}, H'] on {hidden.device}, got {tuple(ref_hidden.shape)} and "
            f"{tuple(ref_weight.shape)} on {ref_hidden.device}"
        )
    for name in FROM_REFERENCE:
        if name in inputs:
            raise ValueError(f"{OP}: expected no input named {name} beside ref_hidden")
    return Reference(ref_hidden, ref_weight, ref_bias)


def _checked_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> Tensor | None:
    if weight_grad is None:
        return None
    dtype = accumulation_dtype(weight.dtype)
    if (
        weight_grad.shape != weight.shape
        or weight_grad.dtype != dtype
        or weight_grad.device != weight.device
        or not weight_grad.is_contiguous()
        or weight_grad.requires_grad
    ):
        raise ValueError(
            f"{OP}: expected weight_grad as a contiguous {dtype} buffer of shape "
            f"{tuple(weight.shape)} on {weight.device}, got {weight_grad.dtype}, "
            f"{tuple(weight_grad.shape)} on {weight_grad.device}"
        )
    return weight_grad


def _check_inputs(
    inputs: dict[str, Any], hidden: Tensor, n_groups: int | None, bounds: list[int] | None
) -> None:
    n = hidden.shape[0]
    sizes = [n] + ([] if n_groups is None else [n_groups])
    ambiguous = n_groups == n and bounds != list(range(n + 1))
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            continue
        # A constant of 0-d on the host goes along with a launch; its gradient would be waited for.
        if x.device != hidden.device and (x.dim() > 0 or x.requires_grad):
            raise ValueError(f"{OP}: expected input {name!r} on {hidden.device}, got {x.device}")
        if x.dim() > 0 and x.shape[0] not in sizes:
            raise ValueError(
                f"{OP}: expected input {name!r} with leading dimension "
                f"{' or '.join(map(str, sizes))}, or 0-d, got shape {tuple(x.shape)}"
            )
        if x.dim() > 0 and ambiguous:
            raise ValueError(
                f"{OP}: expected groups of one row each where there are as many as rows, G = N = "
                f"{n}: nothing else tells whether input {name!r} is one per row or one per group; "
                "leave the empty groups out"
            )
