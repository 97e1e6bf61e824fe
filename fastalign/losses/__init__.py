"""Losses as objects: frozen dataclasses whose call is their reference mathematics in plain PyTorch.

    loss(logp, entropy, **inputs) -> float32 loss of every token, the shape of logp (float64 for
    float64)

``logp`` holds the log-probabilities in nats of the tokens that were chosen, ``entropy`` the
entropies in nats of the distributions they were drawn from (None where the loss has no entropy
term). ``inputs`` are named tensors of the shape of ``logp``; they are constants, the gradient flows
to ``logp`` and ``entropy`` only (and to ``kl``, a token's exact KL, where a loss takes it).
``required`` and ``optional`` say which names an object takes. The caller sums or averages; so any
callable of this form is a loss. ``loss.statistics``, of the same form, gives tensors of one number
per token to average and log: ratios, clip fractions, weights.

A loss that couples the tokens of a sequence (GRPO's gspo) also takes ``cu_seqlens`` and returns one
value per sequence. So do the preference losses DPO, RPO, XPO and SimPO, of one value per pair of
sequences (chosen, rejected), and KTO. ``ValueLoss`` has its own form, ``loss(values, returns,
old_values)``.

``fastalign.ops.policy_loss``, and ``preference_loss`` for the preference losses, compute them and
their gradients by one fused kernel.
"""

from fastalign.losses.apa import APA
from fastalign.losses.awr import AWR, effective_sample_size
from fastalign.losses.grpo import GRPO
from fastalign.losses.mle import MLE
from fastalign.losses.ppo import PPO
from fastalign.losses.preference import DPO, KTO, RPO, XPO, SimPO
from fastalign.losses.rwr import RWR
from fastalign.losses.value import ValueLoss

__all__ = [
    "APA",
    "AWR",
    "DPO",
    "GRPO",
    "KTO",
    "MLE",
    "PPO",
    "RPO",
    "RWR",
    "SimPO",
    "ValueLoss",
    "XPO",
    "effective_sample_size",
]
