"""Calling the loss that linear_loss was given: on the rows or groups of one slab, with its inputs
cut to them, and with its derivatives.

Everything here is work on vectors of one number per token; the slabs of logits are the business of
fastalign/ops/linear_loss_walk.py. A loss object that fastalign/ops/policy_loss.py knows gives its
values and derivatives in one launch, in place of a few dozen by autograd; any other callable goes
through autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.losses.ratio import exact_kl_coef
from fastalign.ops.policy_loss_terms import fused, policy_loss_terms
from fastalign.ops.slab import Groups, Rows
from fastalign.ops.token_logprobs import accumulation_dtype

Loss = Callable[..., Tensor]
Range = tuple[int, int]

FROM_REFERENCE = ("ref_logp", "kl")


def accepted(loss: Loss, name: str) -> bool:
    """Whether ``loss`` takes an input of this name: by its ``required`` and ``optional`` where it
    has them, as the objects of fastalign.losses do, else by its signature (a module's: that of its
    ``forward``); no, where it has none."""
    if hasattr(loss, "required"):
        return name in (*loss.required, *getattr(loss, "optional", ()))
    try:
        form = loss.forward if isinstance(loss, torch.nn.Module) else loss
        parameters = inspect.signature(form).parameters
    except ValueError:  # built-in functions and scripted ones
        return False
    return name in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def check_readings(inputs: dict[str, Any], given: int, groups: Groups, rows: Rows) -> None:
    """ValueError where an input of as many numbers as rows and groups were ``given`` would have to
    be cut like both, and other rows than groups are left."""
    if given == rows.total and groups.count != rows.count:
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.dim() > 0:
                raise ValueError(
                    f"linear_loss: expected no ignored row where groups of one row each are as "
                    f"many as rows, G = N = {given}, got {rows.total - rows.count}: nothing tells "
                    f"whether input {name!r} is one per row or one per group; leave the empty "
                    "groups out"
                )


def sequences_per_value(loss: Loss) -> int:
    """How many sequences of ``groups`` one value of the loss is about: 2 for a loss on pairs."""
    return getattr(loss, "sequences_per_value", 1)


@dataclass(frozen=True)
class Derivatives:
    """dloss/d(logp, entropy, kl) of the rows of a slab, [C] each, over ``LossCall.divisor``; None:
    not used."""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None

    def rows(self, start: int, stop: int) -> Derivatives:
        entropy = None if self.entropy is None else self.entropy[start:stop]
        kl = None if self.kl is None else self.kl[start:stop]
        return Derivatives(self.logp[start:stop], entropy, kl)


class LossCall:
    """The loss, its inputs, and what it gave so far.

    Args:
        loss: the callable.
        inputs: all of them, uncut.
        learned: names of the inputs that require grad.
        rows, groups: the rows that count, and their groups (None: a loss per token).
        shares: [C] for the rows that count, what each one's loss is multiplied with; None: 1.
        normalizer: what the sum is divided by.
        want_grad: whether any derivative will be used.
        narrow: derivatives stay undivided by the normalizer; ``share`` is what is left to do.
        like: a tensor of the dtype and on the device of the loss.
    """

    def __init__(
        self,
        loss: Loss,
        inputs: dict[str, Any],
        learned: tuple[str, ...],
        rows: Rows,
        groups: Groups | None,
        shares: Tensor | None,
        normalizer: float | Tensor,
        want_grad: bool,
        narrow: bool,
        like: Tensor,
    ) -> None:
        # The gradient of a number is a sum over all rows, in as many parts as there are slabs: a
        # narrow one would wear with every addition, or be infinite before it is divided.
        sums = {
            name: inputs[name].detach().to(accumulation_dtype(inputs[name].dtype))
            for name in learned
            if inputs[name].dim() == 0
        }
        self.loss, self.inputs, self.names = loss, inputs | sums, learned
        self.rows, self.groups, self.want_grad = rows, groups, want_grad
        self.shares, self.normalizer = shares, normalizer
        # float16 cannot hold dlogits of a mean over thousands of tokens: there it is divided last.
        self.unscaled = narrow
        self.divisor = 1.0 if narrow else self.normalizer
        self.total = torch.zeros((), dtype=like.dtype, device=like.device)
        self.learned = {name: torch.zeros_like(self.inputs[name]) for name in learned}
        self.statistics: dict[str, tuple[Tensor, int | Tensor]] = {}
        self.fused = fused(loss) and groups is None
        # What the loss does not take is there for the metrics.
        known = hasattr(loss, "required")
        self.withheld = [
            name for name in ("ref_logp", "old_logp") if known and not accepted(loss, name)
        ]

    @property
    def share(self) -> float | Tensor:
        """What is still to be multiplied with the derivatives: 1, or one over the normalizer."""
        return 1.0 / self.normalizer if self.unscaled else 1.0

    def __call__(self, start: int, stop: int, unit: Range, stats: dict[str, Tensor]) -> Derivatives:
        """Adds the loss of the kept rows start..stop to ``total``; returns its derivatives.

        Args:
            unit: the same rows, or the range of groups that they make up.
            stats: "logp", "entropy" and what else is known of each row, [C] detached.
        """
        cut = {
            name: self._cut(x, start, stop, unit)
            for name, x in self.inputs.items()
            if name not in self.withheld
        }
        shares = None if self.shares is None else self.shares[start:stop]
        if self.groups is not None:
            first, last = unit
            cut["cu_seqlens"] = self.groups.cu_seqlens(first, last)
        elif self.fused:
            return self._fused(stats, cut, shares)
        logp, entropy = stats["logp"].clone(), stats["entropy"].clone()
        leaves = [logp, entropy]
        if "kl" in stats:
            kl = stats["kl"].clone()
            leaves.append(kl)
            known = {"kl": kl, "ref_logp": stats["ref_logp"].clone()}
            cut |= {name: x for name, x in known.items() if accepted(self.loss, name)}
        n_stats = len(leaves)
        leaves += [cut[name] for name in self.names]
        self._collect_statistics(logp, entropy, cut)  # before the loss may edit them
        with torch.set_grad_enabled(self.want_grad):
            if self.want_grad:
                for leaf in leaves:
                    leaf.requires_grad_()
            values = self.loss(logp, entropy, **cut)
        self._check(values, (stop - start,) if self.groups is None else (unit[1] - unit[0],))
        self._add(values.detach(), shares)
        if not self.want_grad:
            return Derivatives(torch.zeros_like(logp), None, None)
        if not values.requires_grad:
            raise ValueError(
                "linear_loss: expected loss to return values with a gradient in logp, entropy or "
                f"an input, got {values.dtype} values without one; under torch.no_grad() none is "
                "asked for"
            )
        _check_closed(values, leaves)
        seed = (torch.ones_like(values) if shares is None else shares) / self.divisor
        grads = torch.autograd.grad(values, leaves, seed, allow_unused=True)
        for name, grad in zip(self.names, grads[n_stats:], strict=True):
            if grad is not None:
                self._accumulate(name, grad, start, stop, unit)
        g = torch.zeros_like(logp) if grads[0] is None else grads[0]
        return Derivatives(g, grads[1], grads[2] if n_stats > 2 else None)

    def _fused(
        self, stats: dict[str, Tensor], cut: dict[str, Any], shares: Tensor | None
    ) -> Derivatives:
        """Values and derivatives by one kernel; an exact KL's derivative is its coefficient."""
        logp, entropy = stats["logp"], stats["entropy"]
        for name in FROM_REFERENCE:
            if name in stats and accepted(self.loss, name):
                cut[name] = stats[name]
        values, g, e = policy_loss_terms(self.loss, logp, entropy, cut)
        self._add(values, shares)
        self._collect_statistics(logp, entropy, cut)
        kl_coef = exact_kl_coef(self.loss)
        factor = 1.0 / self.divisor if shares is None else shares / self.divisor
        return Derivatives(
            g * factor,
            None if e is None else e * factor,
            torch.full_like(g, kl_coef) * factor if kl_coef else None,
        )

    def _add(self, values: Tensor, shares: Tensor | None) -> None:
        values = values if shares is None else values * shares
        self.total += values.sum(dtype=self.total.dtype) / self.normalizer

    def _check(self, values: Any, expected: tuple[int]) -> None:
        if isinstance(values, Tensor) and values.shape == expected:
            return
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        per = "token" if self.groups is None else "group"
        raise ValueError(
            f"linear_loss: expected loss to return one value per {per}, shape {expected}, got {got}"
        )

    def _collect_statistics(self, logp: Tensor, entropy: Tensor, cut: dict[str, Any]) -> None:
        """Sums of the loss object's own ``statistics``, where it has some, and of how many."""
        statistics = getattr(self.loss, "statistics", None)
        if statistics is None:
            return
        with torch.no_grad():
            for name, values in statistics(logp.detach(), entropy.detach(), **cut).items():
                total, count = self.statistics.get(name, (0.0, 0))
                if hasattr(self.loss, "sequences_per_value"):
                    # One number per group, NaN where it does not apply.
                    counted = (~values.isnan()).sum()
                    self.statistics[name] = total + values.nansum(), count + counted
                else:
                    self.statistics[name] = total + values.sum(), count + values.numel()

    def _cut(self, x: Any, start: int, stop: int, unit: Range) -> Any:
        """The part of one input that belongs to a slab, without a gradient history: a copy where a
        loss that edits it in place would reach the caller's tensor."""
        if not isinstance(x, Tensor):
            return x
        part = x.detach()
        if part.dim() > 0 and part.shape[0] == self.rows.total:
            part = self.rows.take(part, start, stop)
        elif part.dim() > 0:
            assert self.groups is not None
            part = self.groups.take(part, *unit)
        return part if self.fused else part.clone()

    def _accumulate(self, name: str, grad: Tensor, start: int, stop: int, unit: Range) -> None:
        out = self.learned[name]
        if out.dim() == 0:
            out += grad
        elif out.shape[0] != self.rows.total:
            assert self.groups is not None
            self.groups.put(out, grad, *unit)
        elif self.rows.index is None:
            out[start:stop] = grad
        else:
            out.index_copy_(0, self.rows.index[start:stop], grad)


def reduced(
    reduction: str | None, rows: Rows, groups: Groups | None, per_group: bool, like: Tensor
) -> tuple[Tensor | None, float]:
    """What each row's loss is multiplied with ([C]; None: 1), and the default normalizer.

    Args:
        reduction: "token_mean", "sequence_mean" or "sum"; None: the mean over rows, or over all
            groups.
        groups: the sequences; those of a sequence mean without the empty ones.
        per_group: the loss is one number for each of them.
    """
    if reduction == "sum":
        return None, 1.0
    if groups is not None and per_group:
        return None, max(groups.count, 1)
    if groups is None or reduction != "sequence_mean":
        return None, max(rows.count, 1)
    lengths = groups.tensor.diff()
    shares = (1.0 / lengths.to(like.dtype)).repeat_interleave(lengths, output_size=rows.count)
    return shares, max(groups.count, 1)


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


def means(
    stats: dict[str, Tensor],
    sums: dict[str, tuple[Tensor, int | Tensor]],
    inputs: dict[str, Any],
    rows: Rows,
) -> dict[str, Tensor]:
    """The metrics of a LossOutput: means over the kept rows, computed without waiting; NaN where
    nothing was counted of groups."""
    logp, count = stats["logp"], max(rows.count, 1)
    metrics = {
        name: total / (of if isinstance(of, Tensor) else max(of, 1))
        for name, (total, of) in sums.items()
    }
    metrics["entropy"] = stats["entropy"].sum() / count
    # The target is the likeliest token when nothing is left of its distance from the maximum.
    metrics["top1"] = (logp == -stats["log_sum"]).to(logp.dtype).sum() / count
    others = {
        name: rows.take(x.detach(), 0, rows.count).to(logp.dtype)
        for name, x in inputs.items()
        if name in ("ref_logp", "old_logp") and isinstance(x, Tensor) and x.shape == (rows.total,)
    }
    if "kl" in stats:
        metrics["kl"] = stats["kl"].sum() / count
        others["ref_logp"] = stats["ref_logp"]
    for name, other in others.items():
        gap = other - logp
        kind = name.removesuffix("_logp")
        metrics[f"{kind}_k1"] = -gap.sum() / count
        metrics[f"{kind}_k3"] = (torch.expm1(gap) - gap).sum() / count
    return metrics
