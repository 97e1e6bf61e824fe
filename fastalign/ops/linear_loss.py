r"""Any loss on token log-probabilities, from hidden states to gradients in one pass and bounded
memory.

    z_i = softcap(W h_i + b) / T_i        logp_i, H_i from token_logprobs
    loss = sum_i loss(logp, H, inputs)_i / normalizer
    g_i = dloss/dlogp_i,  e_i = dloss/dH_i     by autograd on vectors of C numbers
    dZ from (g, e) by token_logprobs,  dH = dZ W,  dW = dZ^T H

g and e are known as soon as a slab's log-probs are, while its logits are still in the workspace. So
the forward pass already forms the gradients: three matrix products, where recomputing the logits
    takes four. The backward pass
only multiplies by the upstream gradient. fastalign/ops/slab.py holds the products,
fastalign/ops/plan.py the choice of slabs. The row kernels are token_logprobs'
(csrc/token_logprobs.cpp, kernels/token_logprobs.py).

Tests: tests/test_linear_loss.py. Benchmark: benchmarks/bench_linear_loss.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastalign.ops.linear_logprobs import linear_logprobs_reference
from fastalign.ops.plan import Plan, plan
from fastalign.ops.slab import (
    IGNORE_NOTHING,
    Groups,
    HeadGradients,
    Rows,
    check_head,
    check_softcap,
    follow_autocast,
    logits_workspace,
    slab_logits,
)
from fastalign.ops.token_logprobs import (
    accumulation_dtype,
    check_targets,
    dlogits_out,
    row_stats,
    temperature_tensor,
)

Loss = Callable[..., Tensor]
Range = tuple[int, int]


class LossOutput(NamedTuple):
    """What ``linear_loss`` returns."""

    loss: Tensor
    """0-d, differentiable: the sum of the losses over the normalizer."""
    logp: Tensor
    """[N] detached, 0 at ignored rows."""
    entropy: Tensor
    """[N] detached, 0 at ignored rows."""
    metrics: dict[str, Tensor]
    """0-d detached means over the rows kept: "entropy"; "ref_k1", "ref_k3" when ``ref_logp`` is an
    input, "old_k1", "old_k3" when ``old_logp`` is one: k1 = logp - other, k3 = exp(other - logp) -
    1 - (other - logp)."""


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


@dataclass(frozen=True)
class _Call:
    """One call of linear_loss, apart from the tensors that autograd must see."""

    targets: Tensor
    temperature: Tensor
    softcap: float
    ignore_index: int
    loss: Loss
    inputs: dict[str, Any]
    learned: tuple[str, ...]  # the names of the inputs that require grad
    normalizer: float | Tensor | None
    groups: Tensor | None
    workspace: int | None
    need: tuple[bool, bool, bool]  # gradients wanted: hidden, weight, bias
    metrics: dict[str, Tensor]  # filled by the run


class _Run:
    """Walks the slabs and collects losses and gradients."""

    def __init__(self, call: _Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.call, self.hidden, self.weight, self.bias = call, hidden, weight, bias
        self.rows = Rows(call.targets, call.ignore_index)
        self.groups = None if call.groups is None else Groups(call.groups, self.rows)
        need_hidden, need_weight, need_bias = call.need
        self.plan: Plan = plan(
            self.rows.count,
            hidden.shape[1],
            weight.shape[0],
            dtype=hidden.dtype,
            device=hidden.device,
            hidden_grad=need_hidden,
            weight_grad=need_weight or need_bias,
            longest_group=None if self.groups is None else self.groups.longest,
            workspace=call.workspace,
        )
        wide = accumulation_dtype(hidden.dtype)
        self.total = torch.zeros((), dtype=wide, device=hidden.device)
        self.stats = torch.empty(4, self.rows.count, dtype=wide, device=hidden.device)
        default = self.rows.count if self.groups is None else self.groups.count
        self.normalizer = max(default, 1) if call.normalizer is None else call.normalizer
        self.learned = {name: torch.zeros_like(call.inputs[name]) for name in call.learned}
        self.checked = False

    def run(self) -> None:
        single = self.plan.mode == "single pass"
        if self.groups is not None and single:
            units = self.groups.slabs(self.plan.slab)
            cuts = [(self.groups.bounds[a], self.groups.bounds[b]) for a, b in units]
        else:
            size = self.plan.slab
            cuts = [(a, min(a + size, self.rows.count)) for a in range(0, self.rows.count, size)]
            units = [(0, self.groups.count)] if self.groups is not None else cuts
        self.grads = HeadGradients(
            self.hidden, self.weight, self.bias, self.rows, len(cuts), self.call.need
        )
        tallest = max((stop - start for start, stop in cuts), default=0)
        with logits_workspace(tallest, self.weight.shape[0], self.hidden) as self.work:
            self.walk(cuts, units, single)

    def walk(self, cuts: list[Range], units: list[Range], single: bool) -> None:
        """Slab after slab; ``units`` are the rows or the groups that each loss call covers."""
        if single:
            for (start, stop), unit in zip(cuts, units, strict=True):
                z, h = self.forward(start, stop)
                g, e = self.evaluate(start, stop, unit)
                self.backward(z, h, g, e, start, stop)
            return
        for start, stop in cuts:
            self.forward(start, stop)
        everything = (0, self.groups.count if self.groups is not None else self.rows.count)
        g, e = self.evaluate(0, self.rows.count, everything)
        if self.plan.mode == "two stages":
            for start, stop in cuts:
                h = self.rows.take(self.hidden, start, stop)
                z = self.work[: stop - start]
                slab_logits(h, self.weight, self.bias, z)
                self.backward(
                    z, h, g[start:stop], None if e is None else e[start:stop], start, stop
                )

    def forward(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Logits and row statistics of the kept rows start..stop."""
        h = self.rows.take(self.hidden, start, stop)
        z = self.work[: stop - start]
        slab_logits(h, self.weight, self.bias, z)
        stats = row_stats(
            z,
            self.rows.take(self.call.targets, start, stop),
            self.rows.take_temperature(self.call.temperature, start, stop),
            self.call.softcap,
            self.call.ignore_index,
        )
        for row, values in zip(self.stats, stats, strict=True):
            row[start:stop] = values
        return z, h

    def backward(
        self, z: Tensor, h: Tensor, g: Tensor, e: Tensor | None, start: int, stop: int
    ) -> None:
        """dlogits in place of the logits, then the two products."""
        stats = self.stats[:, start:stop]
        targets = self.rows.take(self.call.targets, start, stop)
        temperature = self.rows.take_temperature(self.call.temperature, start, stop)
        settings = (self.call.softcap, self.call.ignore_index)
        dlogits_out(z, g, e, z, targets, temperature, *settings, *stats)
        self.grads.add(z, h, start, stop)

    def evaluate(self, start: int, stop: int, unit: Range) -> tuple[Tensor, Tensor | None]:
        """The loss of one slab, added to the total; returns dloss/dlogp and dloss/dentropy (None:
        unused)."""
        call, wanted = self.call, any(self.call.need) or bool(self.call.learned)
        logp = self.stats[0, start:stop].clone()
        entropy = self.stats[1, start:stop].clone()
        cut = {name: self.slice(x, start, stop, unit) for name, x in call.inputs.items()}
        if self.groups is not None:
            first, last = unit
            cut["cu_seqlens"] = self.groups.tensor[first : last + 1] - self.groups.tensor[first]
        leaves = [logp, entropy, *(cut[name] for name in call.learned)]
        with torch.set_grad_enabled(wanted):
            if wanted:
                for leaf in leaves:
                    leaf.requires_grad_()
            values = call.loss(logp, entropy, **cut)
        expected = (stop - start,) if self.groups is None else (unit[1] - unit[0],)
        if not isinstance(values, Tensor) or values.shape != expected:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            per = "token" if self.groups is None else "group"
            raise ValueError(
                f"linear_loss: expected loss to return one value per {per}, shape {expected}, "
                f"got {got}"
            )
        self.total += values.detach().sum(dtype=self.total.dtype) / self.normalizer
        if not wanted or not values.requires_grad:
            return torch.zeros_like(logp), None
        if not self.checked:
            _check_closed(values, leaves)
            self.checked = True
        seed = torch.ones_like(values) / self.normalizer
        g, e, *rest = torch.autograd.grad(values, leaves, seed, allow_unused=True)
        for name, grad in zip(call.learned, rest, strict=True):
            if grad is not None:
                self.accumulate(name, grad, start, stop, unit)
        return torch.zeros_like(logp) if g is None else g, e

    def slice(self, x: Any, start: int, stop: int, unit: Range) -> Any:
        """The part of one loss input that belongs to a slab, with a gradient history of its own."""
        if not isinstance(x, Tensor):
            return x
        if x.dim() == 0:
            return x.detach().clone() if x.requires_grad else x
        if x.shape[0] == self.rows.total:
            x = self.rows.take(x.detach(), start, stop)
            return x
        return x.detach()[unit[0] : unit[1]]

    def accumulate(self, name: str, grad: Tensor, start: int, stop: int, unit: Range) -> None:
        out = self.learned[name]
        if out.dim() == 0:
            out += grad
        elif out.shape[0] != self.rows.total:
            out[unit[0] : unit[1]] = grad
        elif self.rows.index is None:
            out[start:stop] = grad
        else:
            out.index_copy_(0, self.rows.index[start:stop], grad)

    def fill_metrics(self) -> None:
        logp, entropy = self.stats[0], self.stats[1]
        count = max(self.rows.count, 1)
        metrics = self.call.metrics
        metrics["entropy"] = entropy.sum() / count
        for name in ("ref", "old"):
            other = self.call.inputs.get(f"{name}_logp")
            if not isinstance(other, Tensor) or other.shape != self.call.targets.shape:
                continue
            gap = self.rows.take(other.detach(), 0, self.rows.count).to(logp.dtype) - logp
            metrics[f"{name}_k1"] = -gap.sum() / count
            metrics[f"{name}_k3"] = (torch.expm1(gap) - gap).sum() / count


def _check_closed(values: Tensor, leaves: list[Tensor]) -> None:
    """ValueError when the loss reaches a tensor that requires grad by any way but its arguments."""
    known = {id(leaf) for leaf in leaves}
    stack, seen = [values.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise ValueError(
                "linear_loss: the loss uses a tensor that requires grad and is not among inputs, "
                f"shape {tuple(variable.shape)}; expected it in inputs: its gradient would be lost"
            )
        stack.extend(next_node for next_node, _ in node.next_functions)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, hidden: Tensor, weight: Tensor, bias: Tensor | None, *learned: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = _Run(call, hidden, weight, bias)
        run.run()
        run.fill_metrics()
        grads = run.grads.result()
        ctx.save_for_backward(*grads, *(run.learned[name] for name in call.learned))
        logp, entropy = run.rows.scatter(run.stats[:2].t().contiguous()).t().contiguous()
        ctx.mark_non_differentiable(logp, entropy)
        return run.total, logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        grads = ctx.saved_tensors
        # On a CPU looking at the factor is free, and multiplying dW by one is not.
        if grad_loss.device.type != "cpu" or grad_loss != 1.0:
            grads = tuple(None if g is None else _times(g, grad_loss) for g in grads)
        return None, *grads


def _times(g: Tensor, factor: Tensor) -> Tensor:
    """g * factor; a gradient scaler's 65536 is infinite in float16, so there in float32."""
    wide = torch.float32 if g.dtype == torch.float16 else g.dtype
    return (g.to(wide) * factor.to(wide)).to(g.dtype)


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
    groups: Tensor | None = None,
    workspace: int | None = None,
) -> LossOutput:
    """sum(loss(logp, entropy, **inputs)) / normalizer, and its gradients, without a full logits
    tensor.

    Gradients flow into hidden, weight, bias and every float tensor of ``inputs`` that requires
    grad. They are formed in the forward pass (three matrix products; two when the weight does not
    require grad; one without any gradient) and handed over by ``backward``. Per-token losses are
    evaluated slab by slab; with ``groups`` a slab holds whole groups, and when one does not fit
    into ``workspace`` the logits are computed twice.

    Args:
        hidden: [N, H] float32, bfloat16, float16 or float64.
        weight: [V, H], same dtype and device.
        targets: [N] int64, in [0, V) or ``ignore_index``.
        loss: any callable ``loss(logp, entropy, **inputs)`` in plain PyTorch. logp and entropy are
            [C] for the C kept rows of the slab at hand; it returns one value per row, [C]. With
            ``groups`` it also receives ``cu_seqlens`` [g + 1], int64, the bounds of the slab's g
            groups among those C rows (a group whose rows are all ignored is empty), and returns one
            value per group, [g]. All that requires grad must come through ``inputs``.
        inputs: tensors with leading dimension N (cut like the rows), with ``groups`` also of
            leading dimension G (cut like the groups; N wins when both are equal), 0-d tensors and
            plain values (passed on as they are).
        bias: [V], same dtype.
        temperature: positive float, or a tensor [N] with one temperature per token.
        softcap: c of c * tanh(z / c), applied before the temperature; None for none.
        ignore_index: rows with this target are dropped before the first product. Counting them
            makes the host wait once for a CUDA device; ``None`` drops nothing.
        normalizer: number or 0-d tensor; default: the number of rows kept (of groups, with
            ``groups``).
        groups: cu_seqlens [G + 1], integers from 0 to N, not falling. Read by the host: one wait on
            CUDA.
        workspace: bytes of logits that may be held at once (default 1 GiB); see ``plan``.

    Returns:
        LossOutput(loss, logp, entropy, metrics).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; temperature or softcap <= 0; a loss
            that returns anything but one value per row or group; a loss that uses a tensor
            requiring grad from outside ``inputs``; a workspace smaller than one row of logits.
    """
    op = "linear_loss"
    inputs = {} if inputs is None else dict(inputs)
    hidden, weight, bias = follow_autocast(hidden, weight, bias)
    check_head(op, hidden, weight, bias)
    check_targets(op, targets, hidden.shape[:1], hidden.device)
    _check_inputs(inputs, hidden, groups)
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(
                f"{op}: expected normalizer as a number or a 0-d tensor, "
                f"got shape {tuple(normalizer.shape)}"
            )
        normalizer = normalizer.detach()
    elif normalizer is not None and not normalizer > 0:
        raise ValueError(f"{op}: expected normalizer > 0, got {normalizer}")
    grad = torch.is_grad_enabled()
    learned = tuple(
        name for name, x in inputs.items() if grad and isinstance(x, Tensor) and x.requires_grad
    )
    call = _Call(
        targets=targets,
        temperature=temperature_tensor(op, temperature, hidden, targets.shape),
        softcap=check_softcap(op, softcap),
        ignore_index=IGNORE_NOTHING if ignore_index is None else ignore_index,
        loss=loss,
        inputs=inputs,
        learned=learned,
        normalizer=normalizer,
        groups=groups,
        workspace=workspace,
        need=(
            grad and hidden.requires_grad,
            grad and weight.requires_grad,
            grad and bias is not None and bias.requires_grad,
        ),
        metrics={},
    )
    with torch.autocast(hidden.device.type, enabled=False):
        loss_value, logp, entropy = _LinearLoss.apply(
            call, hidden, weight, bias, *(inputs[name] for name in learned)
        )
    return LossOutput(loss_value, logp, entropy, call.metrics)


def _check_inputs(inputs: dict[str, Any], hidden: Tensor, groups: Tensor | None) -> None:
    n = hidden.shape[0]
    sizes = [n]
    if groups is not None:
        if groups.dim() != 1 or groups.numel() < 2 or groups.is_floating_point():
            raise ValueError(
                "linear_loss: expected groups as integer cu_seqlens of shape [G + 1] with G >= 1, "
                f"got shape {tuple(groups.shape)}, {groups.dtype}"
            )
        if "cu_seqlens" in inputs:
            raise ValueError("linear_loss: expected no input named cu_seqlens beside groups")
        bounds = groups.tolist()
        if bounds[0] != 0 or bounds[-1] != n or bounds != sorted(bounds):
            raise ValueError(
                f"linear_loss: expected groups to rise from 0 to N = {n}, "
                f"got {bounds[:3]}..{bounds[-1]}"
            )
        sizes.append(groups.numel() - 1)
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            continue
        if x.device != hidden.device and x.dim() > 0:
            raise ValueError(
                f"linear_loss: expected input {name!r} on {hidden.device}, got {x.device}"
            )
        if x.dim() > 0 and x.shape[0] not in sizes:
            raise ValueError(
                f"linear_loss: expected input {name!r} with leading dimension "
                f"{' or '.join(map(str, sizes))}, or 0-d, got shape {tuple(x.shape)}"
            )
