"""Sampling from the policy: token ids in, token ids and their log-probs out, never text between."""

from fastalign.rollout.engine import Engine, Rollout, SamplingConfig
from fastalign.rollout.hf import TransformersEngine

__all__ = ["Engine", "Rollout", "SamplingConfig", "TransformersEngine"]
