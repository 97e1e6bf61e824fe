"""What preference training logs: means over a batch, from parts on several processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastalign import ops
from fastalign.data.packing import Packed
from fastalign.train import distributed
from fastalign.train.preference_data import Examples


@dataclass(frozen=True)
class Part:
    """What one forward pass reads: some examples in a pack, and what the loss takes of them."""

    chosen: list[int]
    packed: Packed
    bounds: Tensor
    """int64 [S + 1], where each response starts among the targets that count."""
    inputs: dict[str, Any]
    counts: bool = True
    """False for a pass that another process's share asks for, see `distributed`."""


class Means:
    """Means over a batch from the means over its parts."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, mean: Tensor, count: int) -> None:
        if count:
            self.sums[name] = self.sums.get(name, 0.0) + mean.double() * count
            self.counts[name] = self.counts.get(name, 0) + count

    def metrics(self) -> dict[str, float]:
        """Over all processes."""
        own = {name: (float(total), self.counts[name]) for name, total in self.sums.items()}
        shares = [share for (share,) in distributed.gather([own])]
        names = dict.fromkeys(name for share in shares for name in share)
        found = {name: [share[name] for share in shares if name in share] for name in names}
        return {
            name: sum(total for total, _ in parts) / sum(count for _, count in parts)
            for name, parts in found.items()
        }


def statistics(means: Means, out: ops.LossOutput, examples: Examples, part: Part) -> None:
    """Adds what people log of a part of a batch.

    Rewards and log-probs are means over examples (KTO: over the desirable, "chosen", and over the
    others). "drift/k1" and "drift/k3" are estimates of a KL in nats per token, but over responses
    that the policy did not sample: how far it has moved on the data. "entropy" in nats per token.
    """
    if not part.counts:
        return
    n_tokens = out.logp.numel()
    desirable = None
    if examples.per_example == 1:
        assert examples.flags is not None
        desirable = int(examples.flags[part.chosen].sum())
    for name, mean in out.metrics.items():
        if name.startswith(("rewards/", "logps/")):
            count = len(part.chosen)
            if desirable is not None:
                count = desirable if name.endswith("/chosen") else count - desirable
            means.add(name, mean, count)
    means.add("entropy", out.metrics["entropy"], n_tokens)
    for kind in ("k1", "k3"):
        if f"ref_{kind}" in out.metrics:
            means.add(f"drift/{kind}", out.metrics[f"ref_{kind}"], n_tokens)
