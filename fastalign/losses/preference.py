"""Preference losses: DPO and its relatives on pairs of responses, KTO on single ones.

The responses of a batch are packed one behind another and cut by ``cu_seqlens`` [S + 1], the same
offsets that attention takes. A loss on pairs takes two sequences in a row, S = 2P of them: chosen,
rejected, chosen, rejected, ...; it returns one value per pair, [P]. KTO returns one per sequence,
[S]. ``linear_loss`` takes these offsets as its ``groups`` and keeps pairs together;
``preference_loss`` is all of it in one kernel.

    D(y) = sum_t (logp_t - ref_logp_t)      L(y) = sum_t logp_t = log pi(y)      |y| tokens

The objects choose coefficients of one formula, fastalign/losses/preference_terms.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fastalign.losses.inputs import constants, require, sequence_offsets, wide
from fastalign.losses.preference_terms import (
    PREFERENCE_KINDS,
    PreferenceForm,
    Responses,
    preference_statistics,
    preference_values,
    responses,
)


class PreferenceLoss(ABC):
    """What the loss objects of this file have in common: they differ in their ``form``."""

    required: tuple[str, ...] = ("ref_logp", "cu_seqlens")
    optional: tuple[str, ...] = ()
    per_sequence = True
    """The loss is not one number per token."""
    sequences_per_value = 2
    flags_name: str | None = None
    """The input of one bool per value."""

    @property
    @abstractmethod
    def form(self) -> PreferenceForm:
        """The coefficients of the formula."""

    def __call__(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> Tensor:
        found, flags, z0 = self._inputs(logp, inputs)
        return preference_values(self.form, found, flags, z0)

    def statistics(
        self, logp: Tensor, entropy: Tensor | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Of every pair, [P]: "rewards/chosen", "rewards/rejected", "rewards/margins",
        "rewards/accuracies" (1 where the chosen reward is the larger one), "logps/chosen",
        "logps/rejected" (with ``average``: means over tokens). KTO, of every sequence, [S]: without
        margins and accuracies, and NaN in the place of the other kind. NaN without tokens."""
        found, flags, _ = self._inputs(logp.detach(), inputs)
        return preference_statistics(self.form, found, flags)

    def check_extras(
        self, op: str, sequences: int, flags: Tensor | None, z0: Tensor | None
    ) -> None:
        """ValueError where flags [P] or [S], and z0, do not fit so many sequences."""
        per = self.sequences_per_value
        if sequences % per:
            raise ValueError(
                f"{op}: expected cu_seqlens [2P + 1], chosen and rejected in turn, "
                f"got {sequences} sequences"
            )
        want = (sequences // per,)
        if flags is not None and (flags.shape != want or flags.is_floating_point()):
            raise ValueError(
                f"{op}: expected {self.flags_name} {want}, bool or integer, "
                f"got {tuple(flags.shape)} {flags.dtype}"
            )
        if z0 is not None and z0.dim() != 0:
            raise ValueError(f"{op}: expected z0 as a 0-d tensor, got shape {tuple(z0.shape)}")

    def _inputs(
        self, logp: Tensor, inputs: dict[str, Tensor | None]
    ) -> tuple[Responses, Tensor | None, Tensor | None]:
        """The sums over sequences, the flags, and z0."""
        name = type(self).__name__
        missing = [key for key in self.required if inputs.get(key) is None]
        if missing:
            raise ValueError(f"{name}: missing inputs: {', '.join(missing)}")
        apart = ("cu_seqlens", "z0", self.flags_name)
        own = {key: inputs[key] for key in self.required if key in apart}
        per_token = tuple(key for key in self.required if key not in own)
        rest = {key: x for key, x in inputs.items() if key not in own}
        found = constants(self, logp, rest, per_token)
        offsets, z0 = own["cu_seqlens"], own.get("z0")
        if offsets is None or offsets.dim() != 1 or len(offsets) < 1 or logp.dim() != 1:
            got = None if offsets is None else tuple(offsets.shape)
            raise ValueError(
                f"{name}: expected logp [N] and cu_seqlens [S + 1], "
                f"got logp {tuple(logp.shape)} and cu_seqlens {got}"
            )
        flags = None if self.flags_name is None else own[self.flags_name]
        self.check_extras(name, offsets.shape[0] - 1, flags, z0)
        offsets = sequence_offsets(name, offsets, logp)
        return (
            responses(self.form, wide(logp), found.get("ref_logp"), offsets),
            None if flags is None else flags.to(torch.bool),
            None if z0 is None else z0.detach(),
        )


@dataclass(frozen=True)
class DPO(PreferenceLoss):
    r"""Direct preference optimisation, and the losses that differ from it by a coefficient.

        r(y) = beta (alpha log pi(y) - log ref(y)) + length_coef |y|,   h = r(chosen) - r(rejected)

        sigmoid   (1 - eps) softplus(-h) + eps softplus(h)                    dv/dh = eps - sigmoid(-h)
        robust    ((1 - eps) softplus(-h) - eps softplus(h)) / (1 - 2 eps)
        hinge     max(0, 1 - h)                                               -1 where h < 1, else 0
        ipo       ((h - 1/2) / beta)^2                                        2 (h - 1/2) / beta^2

        dv/dlogp_t = +-dv/dh alpha beta,  + for chosen, - for rejected; / |y| with average

    eps is ``label_smoothing``, the chance that a label is the wrong way round: with sigmoid the
    conservative loss (cDPO), with robust an unbiased estimate of the loss on clean labels. hinge is
    RSO's hinge-norm (its gamma is beta) and SLiC's on normalised likelihoods. ipo's paper leaves
    open whether log pi(y) is a sum over tokens or, with ``average``, a mean; its authors ran means.

    ``alpha`` is H-DPO's, 1 for DPO. Derivation: write the KL penalty as KL(pi || ref) = -H(pi) -
    E_pi[log ref] and weigh its entropy by alpha:

        max_pi  E_pi[r] + alpha beta H(pi) + beta E_pi[log ref]
        d/dpi(y):  r(y) - alpha beta (log pi(y) + 1) + beta log ref(y) - const = 0
        =>  r(y) = alpha beta log pi(y) - beta log ref(y) + const,   pi* ~ ref^(1/alpha) exp(r / (alpha beta))

    The constant cancels in r(chosen) - r(rejected): alpha multiplies the policy's log-probs and
    nothing else, with a plus sign. alpha < 1 sharpens pi*, alpha > 1 spreads it.

    ``length_coef`` is R-DPO's: a reward of r(y) - length_coef |y| in the objective adds length_coef
    |y| to the reward that the pairs are explained by, so that length is no reason to prefer.

    Inputs: ``ref_logp`` [N], ``cu_seqlens`` [2P + 1]. Returns [P].

    Source: Rafailov et al., arXiv 2305.18290; cDPO: Mitchell, "A note on DPO with noisy
    preferences" (2023); robust: Chowdhury et al., 2403.00409; hinge: Liu et al. (RSO), 2309.06657;
    ipo: Azar et al., 2310.12036; alpha: Omura et al. (H-DPO), 2411.07595; length_coef: Park et al.
    (R-DPO), 2403.19159.
    """  # noqa: E501

    beta: float = 0.1
    variant: str = "sigmoid"
    label_smoothing: float = 0.0
    average: bool = False
    alpha: float = 1.0
    length_coef: float = 0.0

    def __post_init__(self) -> None:
        variants = ("sigmoid", "robust", "hinge", "ipo")
        require(0.0 < self.beta < math.inf, self, "beta > 0 and finite")
        require(self.variant in variants, self, f"variant to be one of {', '.join(variants)}")
        require(0.0 <= self.label_smoothing < 0.5, self, "label_smoothing in [0, 0.5)")
        smooth = self.variant in ("sigmoid", "robust")
        require(smooth or self.label_smoothing == 0.0, self, f"no label_smoothing: {self.variant}")
        require(0.0 < self.alpha < math.inf, self, "alpha > 0 and finite")
        require(math.isfinite(self.length_coef), self, "a finite length_coef")

    @property
    def form(self) -> PreferenceForm:
        eps = self.label_smoothing
        kind, right, wrong = {
            "sigmoid": ("sigmoid", 1.0 - eps, eps),
            "robust": ("sigmoid", (1.0 - eps) / (1.0 - 2.0 * eps), -eps / (1.0 - 2.0 * eps)),
            "hinge": ("hinge", 1.0, 0.0),
            "ipo": ("square", 1.0 / self.beta**2, 0.0),
        }[self.variant]
        return PreferenceForm(
            PREFERENCE_KINDS.index(kind),
            self.average,
            gap=self.beta,
            extra=(self.alpha - 1.0) * self.beta,
            length=self.length_coef,
            right=right,
            wrong=wrong,
        )


@dataclass(frozen=True)
class RPO(PreferenceLoss):
    """Regularised preference optimisation: DPO plus the chosen response's own likelihood.

        sum    softplus(-h) - eta beta L(chosen)            h as DPO's
        mean   softplus(-h) - eta L(chosen) / |chosen|

    The published code has the sum (eta .005, beta .01 or .05), its second form the mean (eta .2,
    beta .5). The recipe of a DPO loss and eta times a supervised one is the mean form, too.

    Inputs: ``ref_logp`` [N], ``cu_seqlens`` [2P + 1]. Returns [P].

    Source: Liu et al., arXiv 2405.16436.
    """

    beta: float = 0.1
    eta: float = 0.005
    nll: str = "sum"

    def __post_init__(self) -> None:
        require(0.0 < self.beta < math.inf, self, "beta > 0 and finite")
        require(0.0 <= self.eta < math.inf, self, "eta >= 0 and finite")
        require(self.nll in ("sum", "mean"), self, "nll to be sum or mean")

    @property
    def form(self) -> PreferenceForm:
        summed = self.nll == "sum"
        return PreferenceForm(
            PREFERENCE_KINDS.index("sigmoid"),
            gap=self.beta,
            nll_sum=self.eta * self.beta if summed else 0.0,
            nll_mean=0.0 if summed else self.eta,
        )


@dataclass(frozen=True)
class XPO(PreferenceLoss):
    """Exploratory preference optimisation: online DPO plus optimism.

        softplus(-h) + alpha L(y_ref)                       h as DPO's

    Of each pair one response was sampled from the policy and one, y_ref, from the reference; to
    minimise its log-prob is to move probability away from what the reference would say.

    Inputs: ``ref_logp`` [N], ``cu_seqlens`` [2P + 1], ``chosen_is_ref`` [P] bool: whether y_ref is
    the chosen one. Returns [P].

    Source: Xie et al., arXiv 2405.21046.
    """

    beta: float = 0.1
    alpha: float = 1e-5

    required = ("ref_logp", "cu_seqlens", "chosen_is_ref")
    flags_name = "chosen_is_ref"

    def __post_init__(self) -> None:
        require(0.0 < self.beta < math.inf, self, "beta > 0 and finite")
        require(0.0 <= self.alpha < math.inf, self, "alpha >= 0 and finite")

    @property
    def form(self) -> PreferenceForm:
        kind = PREFERENCE_KINDS.index("sigmoid")
        return PreferenceForm(kind, gap=self.beta, optimism=self.alpha)


@dataclass(frozen=True)
class SimPO(PreferenceLoss):
    """Simple preference optimisation: mean log-probs, a target margin, no reference model.

        h = beta (L(chosen) / |chosen| - L(rejected) / |rejected|) - gamma
        (1 - eps) softplus(-h) + eps softplus(h)            eps: label_smoothing

    gamma is in the units of the reward; the paper tunes the ratio gamma / beta (0.3 to 1.6; beta 2
    to 10).

    Inputs: ``cu_seqlens`` [2P + 1]. Returns [P].

    Source: Meng et al., arXiv 2405.14734.
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0

    required = ("cu_seqlens",)

    def __post_init__(self) -> None:
        require(0.0 < self.beta < math.inf, self, "beta > 0 and finite")
        require(math.isfinite(self.gamma), self, "a finite gamma")
        require(0.0 <= self.label_smoothing < 0.5, self, "label_smoothing in [0, 0.5)")

    @property
    def form(self) -> PreferenceForm:
        return PreferenceForm(
            PREFERENCE_KINDS.index("sigmoid"),
            average=True,
            gap=self.beta,
            margin=self.gamma,
            right=1.0 - self.label_smoothing,
            wrong=self.label_smoothing,
        )


@dataclass(frozen=True)
class KTO(PreferenceLoss):
    """Kahneman-Tversky optimisation: single responses, each known to be desirable or not.

        x = beta (D(y) - z0)
        desirable_weight (1 - sigmoid(x))       for a desirable y
        undesirable_weight (1 - sigmoid(-x))    for another

    z0 >= 0 estimates KL(pi || ref) by responses that belong to other prompts; ``KTO.baseline``
    makes it of their log-probs. It is a constant, 0 is a valid choice. The paper wants
    desirable_weight n_desirable between 1 and 4/3 of undesirable_weight n_undesirable.

    Inputs: ``ref_logp`` [N], ``cu_seqlens`` [S + 1], ``desirable`` [S] bool, ``z0`` 0-d. Returns
    [S].

    Source: Ethayarajh et al., arXiv 2402.01306.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    required = ("ref_logp", "cu_seqlens", "desirable", "z0")
    sequences_per_value = 1
    flags_name = "desirable"

    def __post_init__(self) -> None:
        require(0.0 < self.beta < math.inf, self, "beta > 0 and finite")
        for weight in (self.desirable_weight, self.undesirable_weight):
            require(0.0 <= weight < math.inf, self, "weights >= 0 and finite")

    @property
    def form(self) -> PreferenceForm:
        return PreferenceForm(
            PREFERENCE_KINDS.index("kto"),
            gap=self.beta,
            right=self.desirable_weight,
            wrong=self.undesirable_weight,
        )

    @staticmethod
    def baseline(logp: Tensor, ref_logp: Tensor, sequences: int) -> Tensor:
        """z0 = max(0, mean over sequences of sum_t (logp_t - ref_logp_t)), 0-d, detached.

        Args:
            logp, ref_logp: [N], the tokens of responses under prompts that they do not answer
                (each under its neighbour's, for instance), without ignored ones.
            sequences: how many responses they are.
        """
        if logp.shape != ref_logp.shape or logp.dim() != 1 or sequences < 1:
            raise ValueError(
                "KTO.baseline: expected logp and ref_logp [N] of 1 sequence or more, got "
                f"{tuple(logp.shape)}, {tuple(ref_logp.shape)} and {sequences} sequences"
            )
        gap = wide(logp.detach()) - wide(ref_logp.detach())
        return (gap.sum() / sequences).clamp(min=0.0)
