"""Group-relative policy optimisation and its relatives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses.inputs import constants, require, sequence_offsets, wide
from fastalign.losses.ratio import (
    Band,
    bounded,
    check_coefficients,
    is_clipped,
    kl_inputs,
    log_band,
    ratio,
    regularised,
)

# Of each variant: clip and clip_high unless they are given, and how its tokens are averaged.
VARIANTS = {
    "grpo": (0.2, 0.2, "sequence_mean"),
    "dr_grpo": (0.2, 0.2, "sum"),
    "dapo": (0.2, 0.28, "token_mean"),
    "cispo": (1.0, 4.0, "token_mean"),
    "gspo": (3e-4, 4e-4, "sequence_mean"),
}


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation: no critic, A from the rewards of a prompt's responses.

        ratio = exp(logp - old_logp)
        grpo, dr_grpo, dapo:  policy = -min(ratio A, clamp(ratio, 1 - clip, 1 + clip_high) A)
        cispo:                policy = -w A logp, constant w = clamp(ratio, 1 - clip, 1 + clip_high)
        gspo, per sequence:   s = exp(mean_t (logp_t - old_logp_t)),
                              policy = -min(s A, clamp(s, 1 - clip, 1 + clip_high) A)
        loss = policy + kl_coef * kl(logp, ref_logp) - entropy_coef * entropy

        dpolicy/dlogp = -ratio A where not clipped, else 0      grpo, dr_grpo, dapo
                        -w A                                    cispo: clipped tokens still learn
                        -s A / length where not clipped, else 0 gspo

    The first three differ in what stands around the token's loss: their advantages (dr_grpo does
    not divide by the group's standard deviation), their clip_high, and their averages, named by
    ``reduction``: grpo "sequence_mean" (each response weighs the same), dr_grpo "sum" (over a fixed
    normaliser: the number of responses times the length limit), dapo and cispo "token_mean", gspo
    "sequence_mean". ``clip`` and ``clip_high`` None mean the variant's own: .2, .2; dapo .2, .28;
    gspo 3e-4, 4e-4; cispo 1 (no lower bound), 4. KL, dual_clip and log-ratios above 20 are as in
    ``PPO``; dual_clip is not for cispo.

    gspo couples the tokens of a sequence: it takes ``cu_seqlens`` [S + 1] and returns one loss per
    sequence, [S], 0 for an empty one; there ``kl`` and ``entropy`` are means over the sequence's
    tokens, and ``advantages`` may be [S] (of [N] the sequence's mean counts). Where S = N each
    sequence must have one token, so that both readings agree: anything else is refused. The other
    variants return one loss per token.

    Inputs: ``old_logp``, ``advantages``; when kl_coef > 0 ``ref_logp``, or ``kl`` for kl_kind
    "exact"; ``cu_seqlens`` for gspo.

    Source: grpo: Shao et al., arXiv 2402.03300 (whose kl_coef is 0.04); dr_grpo: Liu et al.,
    2503.20783; dapo: Yu et al., 2503.14476; cispo: MiniMax-M1, 2506.13585; gspo: Zheng et al.,
    2507.18071.
    """

    variant: str = "grpo"
    clip: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    kl_coef: float = 0.0
    kl_kind: str = "k3"
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        require(self.variant in VARIANTS, self, f"variant to be one of {', '.join(VARIANTS)}")
        check_coefficients(
            self,
            self.clip,
            self.clip_high,
            self.dual_clip,
            self.kl_coef,
            self.kl_kind,
            self.entropy_coef,
        )
        require(self.dual_clip is None or self.variant != "cispo", self, "no dual_clip for cispo")

    @property
    def required(self) -> tuple[str, ...]:
        names = ("old_logp", "advantages", *kl_inputs(self))
        return names + (("cu_seqlens",) if self.per_sequence else ())

    @property
    def optional(self) -> tuple[str, ...]:
        return () if "ref_logp" in kl_inputs(self) else ("ref_logp",)

    @property
    def per_sequence(self) -> bool:
        """Whether the loss is one number per sequence."""
        return self.variant == "gspo"

    @property
    def reduction(self) -> str:
        """The average of the variant's paper."""
        return VARIANTS[self.variant][2]

    @property
    def band(self) -> Band:
        """The bounds of the log-ratio."""
        clip, clip_high, _ = VARIANTS[self.variant]
        return log_band(
            clip if self.clip is None else self.clip,
            clip_high if self.clip_high is None else self.clip_high,
            self.dual_clip,
        )

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        found, offsets = self._inputs(logp, inputs)
        logp = wide(logp)
        log_ratio, advantages = logp - found["old_logp"], found["advantages"]
        if offsets is not None:
            log_ratio = sequence_mean(log_ratio, offsets)
            if advantages.shape == logp.shape:
                advantages = sequence_mean(advantages, offsets)
        if self.variant == "cispo":
            weights = torch.exp(log_ratio.detach().clamp(self.band.lower, self.band.upper))
            policy = -weights * advantages * logp
        else:
            policy = -torch.exp(bounded(log_ratio, advantages, self.band)) * advantages
        if offsets is None:
            return regularised(self, policy, logp, found, entropy)
        terms = regularised(self, torch.zeros_like(logp), logp, found, entropy)
        empty = offsets.diff() == 0
        return policy.masked_fill(empty, 0.0) + sequence_mean(terms, offsets)

    def statistics(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Of every token: "ratio" (gspo: its sequence's); "clip_fraction", 1 where a bound moves
        it."""
        found, offsets = self._inputs(logp, inputs)
        log_ratio, advantages = wide(logp).detach() - found["old_logp"], found["advantages"]
        if offsets is not None:
            of_token = sequence_of_token(offsets, len(logp))
            log_ratio = sequence_mean(log_ratio, offsets)[of_token]
            if advantages.shape == logp.shape:
                advantages = sequence_mean(advantages, offsets)
            advantages = advantages[of_token]
        clipped = is_clipped(log_ratio, advantages, self.band)
        if self.variant == "cispo":
            outside = (log_ratio < self.band.lower) | (log_ratio > self.band.upper)
            clipped = outside.to(log_ratio.dtype)
        return {"ratio": ratio(log_ratio), "clip_fraction": clipped}

    def _inputs(
        self, logp: Tensor, inputs: dict[str, Tensor | None]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The constants of shape [N] (advantages: or [S]), and gspo's offsets."""
        if not self.per_sequence:
            return constants(self, logp, inputs, self.required, self.optional), None
        rest = dict(inputs)
        offsets = rest.pop("cu_seqlens", None)
        if offsets is None or offsets.dim() != 1 or logp.dim() != 1:
            got = None if offsets is None else tuple(offsets.shape)
            raise ValueError(
                f"GRPO: expected logp [N] and cu_seqlens [S + 1] for gspo, "
                f"got logp {tuple(logp.shape)} and cu_seqlens {got}"
            )
        offsets = sequence_offsets("GRPO", offsets, logp)
        names = tuple(name for name in self.required if name != "cu_seqlens")
        sequences = offsets.shape[0] - 1
        found = constants(self, logp, rest, names, self.optional, sequences)
        check_reading("GRPO", found["advantages"], logp, offsets)
        return found, offsets


def check_reading(op: str, advantages: Tensor, logp: Tensor, cu_seqlens: Tensor) -> None:
    """ValueError where advantages [S = N] could be one per token or one per sequence.

    With one token in every sequence the two readings agree. On other devices than the CPU, and
    while compiling, the check is one that does not wait: a device-side assertion.
    """
    if not advantages.shape == logp.shape == (cu_seqlens.shape[0] - 1,):
        return
    expected = (
        f"{op}: expected sequences of one token each where there are as many as tokens, S = N = "
        f"{len(logp)}: nothing else tells whether advantages are one per token or one per "
        "sequence; leave the empty sequences out"
    )
    single = (cu_seqlens.diff() == 1).all()
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        torch._assert_async(single, expected)
    elif not single:
        raise ValueError(f"{expected}; got lengths {cu_seqlens.diff().tolist()[:8]}")


def sequence_of_token(cu_seqlens: Tensor, n_tokens: int) -> Tensor:
    """[N] int64: the sequence that each packed token belongs to."""
    tokens = torch.arange(n_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens.to(torch.int64)[1:], tokens, right=True)


def sequence_mean(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N] to [S]: the mean over each sequence's tokens, 0 for an empty sequence."""
    # Adds in order, unlike index_add on CUDA: the same bits in every run.
    sums = torch.segment_reduce(x, "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)
    return sums / cu_seqlens.diff().clamp(min=1)
