"""The preference losses by name, and which options go with which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastalign.losses import DPO, KTO, RPO, XPO, SimPO
from fastalign.losses.preference import PreferenceLoss
from fastalign.train.run import RunError


@dataclass(frozen=True)
class Variant:
    """A loss object, what the name fixes in it, and the options it takes."""

    make: type[PreferenceLoss]
    fixed: dict[str, Any]
    options: tuple[str, ...]
    needed: tuple[str, ...] = ()
    """Options without which the name would be another one's loss."""

    @property
    def has_reference(self) -> bool:
        return "ref_logp" in self.make.required


VARIANTS = {
    "sigmoid": Variant(DPO, {}, ("beta", "label_smoothing", "average")),
    "robust": Variant(
        DPO, {"variant": "robust"}, ("beta", "label_smoothing", "average"), ("label_smoothing",)
    ),
    "hinge": Variant(DPO, {"variant": "hinge"}, ("beta", "average")),
    "ipo": Variant(DPO, {"variant": "ipo"}, ("beta", "average")),
    "hdpo": Variant(DPO, {}, ("beta", "alpha", "label_smoothing", "average"), ("alpha",)),
    "rdpo": Variant(
        DPO, {}, ("beta", "length_coef", "label_smoothing", "average"), ("length_coef",)
    ),
    "rpo": Variant(RPO, {}, ("beta", "eta", "nll")),
    "xpo": Variant(XPO, {}, ("beta", "alpha")),
    "simpo": Variant(SimPO, {}, ("beta", "gamma", "label_smoothing")),
    "kto": Variant(KTO, {}, ("beta", "desirable_weight", "undesirable_weight", "kl_baseline")),
}
OPTIONS = {
    "beta": "the strength of the reward",
    "label_smoothing": "the chance that a label is the wrong way round",
    "average": "means over tokens in place of sums",
    "alpha": "the entropy's weight of hdpo, the optimism of xpo",
    "length_coef": "the price of length",
    "eta": "the weight of the chosen response's likelihood",
    "nll": "the form of the likelihood term",
    "gamma": "the target margin",
    "desirable_weight": "the weight of single desirable responses",
    "undesirable_weight": "the weight of single undesirable responses",
    "kl_baseline": "what single responses are compared with",
}


def preference_loss(name: str, given: dict[str, Any]) -> PreferenceLoss:
    """The loss object of a name.

    Args:
        name: one of VARIANTS.
        given: the options of OPTIONS; None where one was not given.

    Raises:
        RunError: an unknown name, or an option that this loss does not have or cannot do without.
        ValueError: a coefficient that the loss refuses.
    """
    if name not in VARIANTS:
        raise RunError(f"unknown loss {name!r}: expected one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    given = {option: value for option, value in given.items() if value is not None}
    for option in given:
        if option not in variant.options:
            owners = ", ".join(n for n, v in VARIANTS.items() if option in v.options)
            raise RunError(
                f"--{option} does not go with --loss {name}: it is {OPTIONS[option]}, which the "
                f"loss does not have; {name} takes {', '.join(variant.options)}, and {option} is "
                f"of {owners}"
            )
    for option in variant.needed:
        if option not in given:
            raise RunError(f"--loss {name} needs --{option}, {OPTIONS[option]}")
    given.pop("kl_baseline", None)  # the loop's
    return variant.make(**variant.fixed, **given)


def reference_mode(name: str, asked: str | None) -> str:
    """How the reference's log-probs come: precompute, live or none.

    Raises:
        RunError: an unknown word, or one that does not fit the loss.
    """
    modes = ("precompute", "live", "none")
    if asked is not None and asked not in modes:
        raise RunError(f"unknown reference {asked!r}: expected one of {', '.join(modes)}")
    if not VARIANTS[name].has_reference:
        if asked not in (None, "none"):
            raise RunError(
                f"--reference {asked} does not go with --loss {name}: its reward is the policy's "
                "own mean log-prob, there is no reference in it"
            )
        return "none"
    if asked == "none":
        raise RunError(
            f"--reference none does not go with --loss {name}: its reward is the distance from a "
            "reference; expected precompute or live"
        )
    return asked or "precompute"
