"""A tiny policy, responses to learn from, and one round of updates on them."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.models import Policy
from fastalign.models.attention import attention
from fastalign.rollout import Rollout
from fastalign.train.critic import TrunkCritic
from fastalign.train.experience import Experience
from fastalign.train.meter import Meter
from fastalign.train.optim import Optimizer
from fastalign.train.run import Run
from fastalign.train.update import Buffer, Learner

LENGTHS = [1, 5, 2, 3, 4, 2]


def tiny_policy(dropout=0.0):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=24,
            attention_dropout=dropout,
        )
    )
    return Policy(model, value_head=True)


def some_rollouts():
    """Six responses of one to five tokens to three prompts."""
    draw = torch.Generator().manual_seed(3)

    def tokens(n):
        return torch.randint(24, (n,), generator=draw).tolist()

    return [
        Rollout(i % 3, [5, 6, 7][: 1 + i % 3], tokens(n), [0.0] * n, True)
        for i, n in enumerate(LENGTHS)
    ]


def by_transformers(policy, rollouts, temperature):
    """Log-probs of the response tokens, each sequence alone, without dropout."""
    was_training = policy.training
    policy.eval()
    rows = []
    with torch.no_grad(), attention(policy.model, "eager"):
        for r in rollouts:
            logits = policy.model(input_ids=torch.tensor([r.prompt + r.completion])).logits[0]
            logp = (logits / temperature).log_softmax(-1)[len(r.prompt) - 1 : -1]
            rows.append(logp.gather(1, torch.tensor(r.completion)[:, None])[:, 0])
    policy.train(was_training)
    return torch.cat(rows)


def experience_of(rollouts, ref_logp):
    ends = torch.tensor([0] + [len(r.completion) for r in rollouts]).cumsum(0).int()
    scores = torch.zeros(len(rollouts), 1)
    tokens = sum(len(r.prompt) + len(r.completion) for r in rollouts)
    return Experience(rollouts, ends, ref_logp, ref_logp, scores, scores[:, 0], None, tokens)


def signals(**tokens):
    """Signals of tokens that the policy gave the log-probs of pi_init when it sampled them."""
    n = len(tokens["returns"])
    return {"old_logp": tokens["ref_logp"], "old_values": torch.zeros(n)} | tokens


def learner_of(policy, method):
    config = method.config
    optimizer = Optimizer(config, policy, 1, {"value_head": method.value_lr})
    critic = TrunkCritic(policy) if method.value_head else None
    return Learner(config, method, policy, critic, policy.frozen_copy(), optimizer)


def unread():
    """A meter that nobody reads."""
    return Meter(torch.device("cpu"), torch.float32)


def updated(learner, step, found, tokens, kl_coef=0.0, kept=None):
    """The means of one round's updates on all responses, or those `kept`."""
    buffer = Buffer(found, tokens, list(range(len(found.rollouts))) if kept is None else kept)
    learner.update(Run(learner.config, "run", 1), step, buffer, kl_coef)
    return buffer.means()
