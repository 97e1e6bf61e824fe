"""linear_loss over its slabs: products, row kernels, the loss and its gradient, one after another.

    single pass    Z = H_slab W^T; statistics; loss and its derivatives; Z <- dZ; dH, dW
    two stages     the statistics of all slabs; the loss of all rows at once; every Z again; dH, dW

With a reference model the slab's reference logits are made beside Z, in a workspace of their own.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.ops.linear_loss_call import (
    Derivatives,
    Loss,
    LossCall,
    Range,
    accepted,
    check_readings,
    means,
    reduced,
    sequences_per_value,
)
from fastalign.ops.plan import Plan, plan
from fastalign.ops.slab import (
    Groups,
    HeadGradients,
    Rows,
    filled,
    logits_workspace,
    reserve,
    slab_logits,
)
from fastalign.ops.token_kl import kl_dlogits_out, kl_stats
from fastalign.ops.token_logprobs import accumulation_dtype, dlogits_out, row_stats

STATS = ("logp", "entropy", "row_max", "log_sum")
KL_STATS = (*STATS, "kl", "ref_logp", "ref_row_max", "mean_gap")


@dataclass(frozen=True)
class Reference:
    """The frozen model of ``kl``: hidden [N, H'], weight [V, H'], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Call:
    """One call of linear_loss, apart from the tensors that autograd must see."""

    targets: Tensor
    temperature: Tensor
    softcap: float
    ignore_index: int
    loss: Loss
    inputs: dict[str, Any]
    learned: tuple[str, ...]
    normalizer: float | Tensor | None
    groups: list[int] | None
    reduction: str | None
    reference: Reference | None
    weight_grad: Tensor | None
    workspace: int | None
    batch_invariant: bool
    need: tuple[bool, bool, bool]
    """Gradients wanted: hidden, weight, bias."""
    metrics: dict[str, Tensor]
    """Filled by the run."""


class Walk:
    """Walks the slabs and collects losses and gradients."""

    def __init__(self, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.call, self.hidden, self.weight, self.bias = call, hidden, weight, bias
        self.rows = Rows(call.targets, call.ignore_index)
        groups, given = None, 0
        if call.groups is not None:
            per = sequences_per_value(call.loss)
            groups = Groups(call.groups, self.rows, hidden.device, per)
            given = groups.count
            if call.reduction == "sequence_mean":
                groups.drop_empty()
        # Slabs hold whole groups where the loss is one number for each.
        per_group = groups is not None and accepted(call.loss, "cu_seqlens")
        self.groups = groups if per_group else None
        if self.groups is not None:
            check_readings(call.inputs, given, self.groups, self.rows)
        self.names = STATS if call.reference is None else KL_STATS
        wide = accumulation_dtype(hidden.dtype)
        self.stats = torch.empty(len(self.names), self.rows.count, dtype=wide, device=hidden.device)
        shares, own = reduced(call.reduction, self.rows, groups, per_group, self.stats)
        self.loss = LossCall(
            call.loss,
            call.inputs,
            call.learned,
            self.rows,
            self.groups,
            shares,
            own if call.normalizer is None else call.normalizer,
            any(call.need) or bool(call.learned),
            hidden.dtype == torch.float16,
            self.stats,
        )

    def run(self) -> None:
        with ExitStack() as stack:
            self._reserve(stack)
            if not self.cuts and (
                self.loss.fused or getattr(self.call.loss, "per_sequence", False)
            ):
                # No token counts: the metrics have the same names all the same.
                self.loss(0, 0, (0, 0), self._stats(0, 0))
            if self.plan.mode == "single pass":
                for (start, stop), unit in zip(self.cuts, self.units, strict=True):
                    z, r, h = self._forward(start, stop)
                    d = self.loss(start, stop, unit, self._stats(start, stop))
                    self._backward(z, r, h, d, start, stop)
            else:
                self._stages()
        stats = self._stats(0, self.rows.count)
        self.call.metrics.update(means(stats, self.loss.statistics, self.call.inputs, self.rows))

    def scattered(self, name: str) -> Tensor:
        """One statistic of all N rows, 0 where they were dropped."""
        return self.rows.scatter(self.stats[self.names.index(name)]).clone()

    def _reserve(self, stack: ExitStack) -> None:
        """Plans, cuts and takes the workspaces; with less memory than planned, smaller slabs."""
        self.plan = self._plan(self.call.workspace)
        row, vocab = self.plan.workspace // self.plan.slab, self.weight.shape[0]

        def take(rows: int) -> tuple[HeadGradients, Tensor, Tensor | None]:
            if rows < self.plan.slab:
                self.plan = self._plan(rows * row)
            self.cuts, self.units = self._cut()
            tallest = max((stop - start for start, stop in self.cuts), default=0)
            tallest = self.plan.slab if self.call.batch_invariant and tallest else tallest
            grads = HeadGradients(
                self.hidden,
                self.weight,
                self.bias,
                self.rows,
                len(self.cuts),
                self.call.need,
                into=self.call.weight_grad,
                unscaled=self.loss.unscaled,
                share=self.loss.share,
            )
            work = stack.enter_context(logits_workspace(tallest, vocab, self.hidden))
            if self.call.reference is None:
                return grads, work, None
            like = self.call.reference.hidden
            return grads, work, stack.enter_context(logits_workspace(tallest, vocab, like))

        fixed = self.call.batch_invariant
        self.grads, self.work, self.ref_work = reserve(stack, self.plan.slab, take, fixed)

    def _plan(self, budget: int | None) -> Plan:
        need_hidden, need_weight, need_bias = self.call.need
        reference = self.call.reference
        return plan(
            self.rows.count,
            self.hidden.shape[1],
            self.weight.shape[0],
            dtype=self.hidden.dtype,
            device=self.hidden.device,
            hidden_grad=need_hidden,
            weight_grad=need_weight,
            bias_grad=need_bias,
            own_accumulator=self.call.weight_grad is None,
            longest_group=None if self.groups is None else self.groups.longest,
            reference_width=None if reference is None else reference.hidden.shape[1],
            reference_dtype=None if reference is None else reference.hidden.dtype,
            workspace=budget,
            batch_invariant=self.call.batch_invariant,
        )

    def _cut(self) -> tuple[list[Range], list[Range]]:
        """Slabs as ranges of kept rows, and in a single pass the rows or groups of each."""
        size, count = self.plan.slab, self.rows.count
        if self.groups is not None and self.plan.mode == "single pass":
            units = self.groups.slabs(size)
            return [(self.groups.bounds[a], self.groups.bounds[b]) for a, b in units], units
        cuts = [(a, min(a + size, count)) for a in range(0, count, size)]
        return cuts, cuts

    def _stages(self) -> None:
        """The statistics of all slabs, the loss once, and for a gradient all logits again."""
        for start, stop in self.cuts:
            self._forward(start, stop)
        count = self.rows.count
        unit = (0, count if self.groups is None else self.groups.count)
        d = self.loss(0, count, unit, self._stats(0, count))
        if self.plan.mode == "two stages":
            for start, stop in self.cuts:
                z, r, h = self._logits(start, stop)
                self._backward(z, r, h, d.rows(start, stop), start, stop)

    def _stats(self, start: int, stop: int) -> dict[str, Tensor]:
        return dict(zip(self.names, self.stats[:, start:stop], strict=True))

    def _logits(self, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits of the kept rows start..stop, the reference's, and the hidden states; with
        ``batch_invariant`` always as many rows as the slab has, so that the products are of one
        shape."""
        rows = len(self.work) if self.call.batch_invariant else stop - start
        h = filled(self.rows.take(self.hidden, start, stop), rows)
        z = self.work[:rows]
        slab_logits(h, self.weight, self.bias, z)
        reference = self.call.reference
        if reference is None or self.ref_work is None:
            return z, None, h
        r = self.ref_work[:rows]
        ref_hidden = filled(self.rows.take(reference.hidden, start, stop), rows)
        slab_logits(ref_hidden, reference.weight, reference.bias, r)
        return z, r, h

    def _settings(self, start: int, stop: int) -> tuple[Tensor, Tensor, float, int]:
        targets = self.rows.take(self.call.targets, start, stop)
        temperature = self.rows.take_temperature(self.call.temperature, start, stop)
        return targets, temperature, self.call.softcap, self.call.ignore_index

    def _forward(self, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Logits and row statistics of the kept rows start..stop."""
        z, r, h = self._logits(start, stop)
        count, settings = stop - start, self._settings(start, stop)
        if r is None:
            stats = row_stats(z[:count], *settings)
        else:
            stats = kl_stats(z[:count], r[:count], *settings)
        for row, values in zip(self.stats, stats, strict=True):
            row[start:stop] = values
        return z, r, h

    def _backward(
        self, z: Tensor, r: Tensor | None, h: Tensor, d: Derivatives, start: int, stop: int
    ) -> None:
        """dlogits in place of the logits, then the two products."""
        rows, settings, stats = z[: stop - start], self._settings(start, stop), self.stats
        known = stats[:, start:stop]
        if r is None or d.kl is None:
            dlogits_out(rows, d.logp, d.entropy, rows, *settings, *known[:4])
        else:
            logp, entropy, row_max, log_sum, kl, _, ref_row_max, mean_gap = known
            kl_dlogits_out(
                rows,
                d.logp,
                d.entropy,
                d.kl,
                rows,
                r[: stop - start],
                *settings,
                logp,
                entropy,
                row_max,
                log_sum,
                kl,
                ref_row_max,
                mean_gap,
            )
        z[stop - start :] = 0.0
        self.grads.add(z, h, start, stop)
