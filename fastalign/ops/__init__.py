"""The operations: each file holds one op's formula, reference, registration and public function."""

from fastalign.ops.bradley_terry_loss import bradley_terry_loss
from fastalign.ops.gae import gae
from fastalign.ops.kl_estimate import kl_estimate
from fastalign.ops.lambda_returns import discounted_returns, lambda_returns
from fastalign.ops.linear_kl import linear_kl
from fastalign.ops.linear_logprobs import linear_logprobs
from fastalign.ops.linear_loss import LossOutput, linear_loss
from fastalign.ops.plan import Plan, plan
from fastalign.ops.policy_loss import actor_critic_loss, policy_loss, value_loss
from fastalign.ops.preference_loss import preference_loss
from fastalign.ops.reduce_scores import reduce_scores
from fastalign.ops.reward_heads import reward_heads
from fastalign.ops.token_kl import token_kl
from fastalign.ops.token_logprobs import token_logprobs
from fastalign.ops.token_rewards import token_rewards
from fastalign.ops.vtrace import VTrace, vtrace
from fastalign.ops.whiten import whiten

__all__ = [
    "LossOutput",
    "Plan",
    "VTrace",
    "actor_critic_loss",
    "bradley_terry_loss",
    "discounted_returns",
    "gae",
    "kl_estimate",
    "lambda_returns",
    "linear_kl",
    "linear_logprobs",
    "linear_loss",
    "plan",
    "policy_loss",
    "preference_loss",
    "reduce_scores",
    "reward_heads",
    "token_kl",
    "token_logprobs",
    "token_rewards",
    "value_loss",
    "vtrace",
    "whiten",
]
