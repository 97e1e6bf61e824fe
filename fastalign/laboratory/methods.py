"""How each method is trained on a source: by the trainer's own functions and configurations.

All start from the same base, a folder that `Source.write` made. Online methods score their samples
by `--reward FILE.py:FUNCTION`; the others learn from samples of the base that the same function
labels, DPO from pairs labelled by Bradley-Terry. Rewards are neither scaled nor advantages
whitened, lam is 1 and no weight decays, so that each method's coefficient is a temperature in units
of the reward (rwr: in standard deviations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign import theory
from fastalign.commands import bestofn
from fastalign.data.condition import condition
from fastalign.laboratory import targets
from fastalign.laboratory.exact import Distribution, distribution
from fastalign.laboratory.source import PROMPT, Source, write_records
from fastalign.models import load_tokenizer
from fastalign.rollout import SamplingConfig
from fastalign.streams import stream
from fastalign.train import apa, awr, dpo, dt, grpo, mle, ppo, rwr, sft

GROUP = 128  # samples of a round to one of four copies of the prompt


@dataclass(frozen=True)
class Bench:
    """A source, its model in a folder, and how much to train."""

    source: Source
    folder: Path
    """Holds what `Source.write` wrote."""
    base: Tensor
    """[K^m] float64, of the model."""
    effort: float = 1.0
    """Samples and steps, as a multiple of each method's own."""

    @property
    def reward(self) -> str:
        return f"{self.folder / 'reward.py'}:letters"

    def count(self, n: int) -> int:
        return max(1, round(n * self.effort))

    def draw(self, n: int, seed: int, *names: str) -> Tensor:
        """[n] indices of strings of the base."""
        return torch.multinomial(self.base, n, True, generator=stream(seed, "laboratory", *names))

    # --- what configurations share ----------------------------------------------------------------

    def shared(self, output: Path, seed: int) -> dict[str, Any]:
        return {
            "output": str(output),
            "seed": seed,
            "device": "cpu",
            "dtype": "float32",
            "weight_decay": 0.0,
            "checkpoint_every": 1_000_000,
        }

    def online(self, output: Path, seed: int) -> dict[str, Any]:
        return self.shared(output, seed) | {
            "policy": str(self.folder / "model"),
            "reward": self.reward,
            "prompts": str(self.folder / "prompts.jsonl"),
            "eval_prompts": str(self.folder / "held-out.jsonl"),
            "eval_samples": 64,
            "sampling": SamplingConfig(max_new_tokens=self.source.m, batch_size=4096),
            "prompts_per_step": 4,
            "samples_per_prompt": GROUP,
            "batch_tokens": 256 * (self.source.m + 1),
            "schedule": "cosine",
        }

    def critic(self) -> dict[str, Any]:
        return {"lam": 1.0, "whiten": False, "scale_reward": False}

    def given(self, output: Path, seed: int) -> dict[str, Any]:
        """Of methods that learn from given strings: as many tokens as they have, no end."""
        return self.shared(output, seed) | {
            "model": str(self.folder / "model"),
            "max_length": 1 + self.source.m,
            "eval_every": 1_000_000,
        }

    def samples(self, n: int, seed: int) -> Path:
        """A file of n samples of the base."""
        path = self.folder / f"samples-{n}-{seed}.jsonl"
        if not path.exists():
            texts = self.source.text(self.draw(n, seed, "samples"))
            write_records(path, [{"prompt": PROMPT, "completion": text} for text in texts])
        return path

    def pairs(self, n: int, seed: int) -> Path:
        """A file of n pairs of samples of the base, the better one drawn by Bradley-Terry."""
        path = self.folder / f"pairs-{n}-{seed}.jsonl"
        if not path.exists():
            one, other = self.draw(2 * n, seed, "pairs").reshape(2, n)
            reward = self.source.reward
            chance = torch.sigmoid(reward[one] - reward[other])
            draw = torch.rand(
                n, dtype=torch.float64, generator=stream(seed, "laboratory", "labels")
            )
            won = draw < chance
            chosen, rejected = torch.where(won, one, other), torch.where(won, other, one)
            both = zip(self.source.text(chosen), self.source.text(rejected), strict=True)
            write_records(
                path, [{"prompt": PROMPT, "chosen": c, "rejected": r} for c, r in both if c != r]
            )
        return path


@dataclass(frozen=True)
class Method:
    """How one method is run, and what it is to become."""

    name: str
    settings: str
    """What decides where it ends, for people."""
    run: Callable[[Bench, Path, int], Distribution]
    """Trains into a folder with a seed; the policy that came out."""
    target: Callable[[Source, Tensor], Tensor]
    """Of a source and its model's distribution."""


# --- online ---------------------------------------------------------------------------------------

APA_LAMBDA, PPO_KL, GRPO_KL = 0.5, 0.8, 0.7
AWR_ROUNDS, AWR_BETA = 4, 6.0


def run_apa(bench: Bench, output: Path, seed: int) -> Distribution:
    config = apa.APAConfig(
        **bench.online(output, seed),
        **bench.critic(),
        lambda_=APA_LAMBDA,
        steps=bench.count(60),
        lr=2e-3,
    )
    return distribution(apa.train(config), bench.source)


def run_ppo(bench: Bench, output: Path, seed: int) -> Distribution:
    config = ppo.PPOConfig(
        **bench.online(output, seed),
        **bench.critic(),
        kl_coef=PPO_KL,
        clip_reward=0.0,
        value_clip=0.0,
        steps=bench.count(60),
        lr=2e-3,
    )
    return distribution(ppo.train(config), bench.source)


def run_grpo(bench: Bench, output: Path, seed: int) -> Distribution:
    config = grpo.GRPOConfig(
        **bench.online(output, seed), kl_coef=GRPO_KL, steps=bench.count(60), lr=2e-3
    )
    return distribution(grpo.train(config), bench.source)


def run_awr(bench: Bench, output: Path, seed: int) -> Distribution:
    options = bench.online(output, seed) | {
        "samples_per_prompt": bench.count(2048),
        "batch_tokens": 512 * (bench.source.m + 1),
        "epochs": 4,
        "schedule": "linear",
    }
    config = awr.AWRConfig(
        **options, **bench.critic(), beta=AWR_BETA, weight_cap=0.0, steps=AWR_ROUNDS, lr=2e-3
    )
    return distribution(awr.train(config), bench.source)


# --- from given strings ---------------------------------------------------------------------------

DPO_BETA, RWR_BETA, RWR_CAP, MLE_KEEP, DT_REWARD, N = 1.0, 0.8, 20.0, 0.3, 3.0, 4


def run_dpo(bench: Bench, output: Path, seed: int) -> Distribution:
    config = dpo.DPOConfig(
        **bench.given(output, seed),
        data=str(bench.pairs(bench.count(24_000), seed)),
        beta=DPO_BETA,
        epochs=2,
        batch_tokens=512 * (bench.source.m + 1),
        lr=2e-3,
    )
    return distribution(dpo.train(config), bench.source)


def run_rwr(bench: Bench, output: Path, seed: int) -> Distribution:
    config = rwr.RWRConfig(
        **bench.given(output, seed),
        data=str(bench.samples(bench.count(20_000), seed)),
        reward=bench.reward,
        beta=RWR_BETA,
        weight_cap=RWR_CAP,
        epochs=4,
        batch_tokens=128 * (bench.source.m + 1),
        lr=3e-3,
    )
    return distribution(rwr.train(config), bench.source)


def run_mle(bench: Bench, output: Path, seed: int) -> Distribution:
    config = mle.MLEConfig(
        **bench.given(output, seed),
        data=str(bench.samples(bench.count(20_000), seed)),
        reward=bench.reward,
        keep=MLE_KEEP,
        epochs=30,
        batch_tokens=128 * (bench.source.m + 1),
        lr=5e-3,
    )
    return distribution(mle.train(config), bench.source)


def run_dt(bench: Bench, output: Path, seed: int) -> Distribution:
    options = bench.given(output, seed) | {"max_length": 32}
    config = dt.DTConfig(
        **options,
        data=str(bench.samples(bench.count(20_000), seed)),
        reward=bench.reward,
        epochs=4,
        batch_tokens=64 * (bench.source.m + 12),
        lr=4e-3,
    )
    folder = dt.train(config)
    tokenizer = load_tokenizer(str(folder))
    (asked,) = condition(
        [tokenizer(PROMPT)["input_ids"]], folder, tokenizer, reward=DT_REWARD, raw=True
    )
    return distribution(folder, bench.source, asked)


def run_bestofn(bench: Bench, output: Path, seed: int) -> Distribution:
    n_prompts = bench.count(8000)
    prompts = bench.folder / f"prompts-{n_prompts}.jsonl"
    write_records(prompts, [{"prompt": PROMPT}] * n_prompts)
    sampled = bestofn.run(
        bestofn.BestOfNConfig(
            output=str(output / "bestofn"),
            policy=str(bench.folder / "model"),
            reward=bench.reward,
            prompts=str(prompts),
            limit=None,
            n=N,
            sampling=SamplingConfig(max_new_tokens=bench.source.m, batch_size=8192),
            seed=seed,
            device="cpu",
            dtype="float32",
        )
    )
    config = sft.SFTConfig(
        **bench.given(output / "sft", seed),
        data=str(sampled / bestofn.SELECTED),
        epochs=8,
        batch_tokens=128 * (bench.source.m + 1),
        lr=3e-3,
    )
    return distribution(sft.train(config), bench.source)


METHODS = {
    method.name: method
    for method in (
        Method(
            "apa",
            f"lambda {APA_LAMBDA}",
            run_apa,
            lambda source, base: targets.apa(source, base, APA_LAMBDA),
        ),
        Method(
            "ppo",
            f"kl_coef {PPO_KL}",
            run_ppo,
            lambda source, base: targets.ppo(source, base, PPO_KL),
        ),
        Method(
            "dpo",
            f"beta {DPO_BETA}",
            run_dpo,
            lambda source, base: theory.tilt(base, source.reward, 1 / DPO_BETA),
        ),
        Method(
            "awr",
            f"{AWR_ROUNDS} rounds of beta {AWR_BETA}",
            run_awr,
            lambda source, base: theory.tilt(base, source.reward, AWR_ROUNDS / AWR_BETA),
        ),
        Method(
            "rwr",
            f"beta {RWR_BETA}",
            run_rwr,
            lambda source, base: targets.rwr(source, base, RWR_BETA, RWR_CAP),
        ),
        Method(
            "grpo",
            f"kl_coef {GRPO_KL} (k3)",
            run_grpo,
            lambda source, base: targets.grpo(source, base, GRPO_KL, GROUP),
        ),
        Method(
            "best of n",
            f"n {N}, then sft",
            run_bestofn,
            lambda source, base: theory.best_of_n(base, source.reward, N),
        ),
        Method(
            "mle",
            f"keep {MLE_KEEP}",
            run_mle,
            lambda source, base: targets.filtered(source, base, MLE_KEEP),
        ),
        Method(
            "dt",
            f"asked for {DT_REWARD}",
            run_dt,
            lambda source, base: targets.weighted(base, (source.reward == DT_REWARD).double()),
        ),
    )
}
