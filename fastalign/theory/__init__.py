"""How good alignment can get at a given KL: tilting, best-of-n, the frontier, estimates of them.

Exact for small alphabets, estimated from samples for real models. Distributions are float64 tensors
[K], scalars are Python floats, KL is in nats. docs/theory.md has an example of each.
"""

from fastalign.theory.best_of_n import (
    best_of_n,
    best_of_n_kl_bound,
    best_of_n_kl_estimate,
    best_of_n_kl_of_ties,
    n_for_kl,
    win_rate,
)
from fastalign.theory.curve import best_of_n_curve
from fastalign.theory.divergence import kl_divergence, renyi_cross_entropy, scaled_cumulant
from fastalign.theory.frontier import Frontier, frontier
from fastalign.theory.memoryless import Memoryless, TypePolicy
from fastalign.theory.place import Placed, place
from fastalign.theory.policy import (
    Budget,
    Estimate,
    PolicyKL,
    SampledRegret,
    for_kl_budget,
    policy_kl,
    regret_from_samples,
)
from fastalign.theory.rate import rate
from fastalign.theory.tilt import (
    Regret,
    alpha_for_kl,
    alpha_for_reward,
    kl_to_tilt,
    regret,
    tilt,
)

__all__ = [
    "Budget",
    "Estimate",
    "Frontier",
    "Memoryless",
    "Placed",
    "PolicyKL",
    "Regret",
    "SampledRegret",
    "TypePolicy",
    "alpha_for_kl",
    "alpha_for_reward",
    "best_of_n",
    "best_of_n_curve",
    "best_of_n_kl_bound",
    "best_of_n_kl_estimate",
    "best_of_n_kl_of_ties",
    "for_kl_budget",
    "frontier",
    "kl_divergence",
    "kl_to_tilt",
    "n_for_kl",
    "place",
    "policy_kl",
    "rate",
    "regret",
    "regret_from_samples",
    "renyi_cross_entropy",
    "scaled_cumulant",
    "tilt",
    "win_rate",
]
