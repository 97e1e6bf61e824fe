"""The loop that all methods on a policy's own samples share: apa, awr, ppo, grpo.

One round:
  1. sample responses to some prompts and score them;                                 experience.py
  2. log-probs of the same tokens under the frozen pi_init, values under the critic;
  3. what each token learns from (advantages, returns, ...): the method's own part;
  4. a few epochs of packed updates on the method's loss.                             update.py

A method is a `Method`: its loss, its learning signal, what it needs. Each stands in a file of its
own name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import Policy, RewardEnsemble, load_tokenizer
from fastalign.models.reward import check_same_tokenizer
from fastalign.ops.kl_estimate import KINDS
from fastalign.ops.reduce_scores import STATISTICS
from fastalign.rollout import SamplingConfig
from fastalign.train import distributed, repeat
from fastalign.train.critic import PASSES, Critic
from fastalign.train.engine import make_engine, seed_draws
from fastalign.train.evaluate import Evaluation, Evaluations, evaluate
from fastalign.train.experience import Collector, Experience
from fastalign.train.guards import GuardConfig, Guards
from fastalign.train.head_diversity import warn_of_statistic
from fastalign.train.kl_control import make_controller
from fastalign.train.meter import Meter
from fastalign.train.optim import OptimConfig, Optimizer
from fastalign.train.prompts import choose_prompts, load_prompts
from fastalign.train.reward_source import RewardSource, make_gold, make_reward
from fastalign.train.run import Run, RunError, Stateful, at_least, begin
from fastalign.train.same_run import Inputs
from fastalign.train.setup import load_policy
from fastalign.train.update import Buffer, Learner, module_of

log = logging.getLogger("fastalign")

UNSET: Any = None
"""Default of a field whose value depends on another one."""


@dataclass
class OnlineConfig(OptimConfig):
    """What every method has that learns from its own samples."""

    output: str = "runs/online"
    """Folder of the run; the aligned policy is written to OUTPUT/model."""
    policy: str = "runs/sft/model"
    """pi_init: folder or hub id of the model to align."""
    reward: str = "runs/reward/model"
    """Folder of a reward ensemble, FILE.py:FUNCTION, or a sum: runs/reward/model,0.5*my.py:fn."""
    judge: str | None = None
    """Folder of a second reward ensemble, used in the evaluation only."""
    gold: str | None = None
    """What is measured of every response beside the reward, and never learned from: anything that
    --reward may be, or gold: the built-in task's, which is the default with its prompts."""
    statistic: str | None = None
    """Statistic of the reward ensemble, where it is not to be the one it was saved with."""
    coef: float | None = None
    """Coefficient of lcb and uwo, likewise."""
    prompts: str = "synthetic"
    """Prompts: JSONL(.gz), Parquet, a folder, a hub id (preference data will do), or synthetic."""
    lines: str | None = None
    """Use these records only, as a Python slice: 0:2000."""
    limit: int | None = None
    """Use at most this many prompts."""
    split: str | None = None
    """Split of a folder or data set that has more than one."""
    eval_prompts: str | None = None
    """Held-out prompts. By default: the built-in task's test split, or --prompts with --eval_split
    or --eval_lines."""
    eval_split: str | None = None
    """Split of the held-out prompts."""
    eval_lines: str | None = None
    """Held-out records, as a Python slice."""
    eval_limit: int = 64
    """How many held-out prompts to evaluate on."""
    eval_samples: int = 4
    """Responses to each of them."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How responses are drawn."""
    engine: str = "transformers"
    """What draws them: transformers, or vllm (a GPU, and the extra of that name)."""
    engine_memory: float = 0.3
    """Share of the GPU's memory that vllm takes."""
    guards: GuardConfig = field(default_factory=GuardConfig)
    """Alarms, and a budget of KL."""
    steps: int = 20
    """Rounds of sampling and updating."""
    prompts_per_step: int = 64
    """Prompts of a round."""
    samples_per_prompt: int = 4
    """Responses to each of them."""
    epochs: int = 2
    """Passes over a round's responses."""
    batch_tokens: int = 4096
    """Tokens (prompt and response) of one update."""
    micro_tokens: int = 8192
    """Tokens of one forward pass; an update of more tokens accumulates gradients."""
    kl_coef: float = 0.0
    """Weight of the KL penalty to pi_init (where adaptive: at the beginning); 0: none."""
    kl_kind: str = "k1"
    """Its estimator on a token: k1, k2 or k3."""
    kl_control: str = "fixed"
    """fixed, or adaptive: kl_coef follows the KL of a response towards kl_target."""
    kl_target: float | None = None
    """KL(pi || pi_init) of a response that the adaptive controller aims at, nats."""
    kl_horizon: int = 10000
    """Responses over which it moves kl_coef by its error."""
    lr: float = 1e-4
    """Peak learning rate (1e-4 suits small models; the papers' 125M to 6B models take 1e-6)."""
    schedule: str = "constant"
    """constant, cosine or linear."""
    checkpoint_every: int = 10
    """Steps between checkpoints."""
    checkpoint_updates: int = 0
    """Updates between checkpoints within a step; 0: none but where the run is stopped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "prompts_per_step", "samples_per_prompt", "epochs")
        at_least(self, 1, "batch_tokens", "micro_tokens", "eval_limit", "eval_samples")
        at_least(self, 0, "coef", "kl_coef", "checkpoint_updates")
        at_least(self, 1, "kl_horizon")
        one_of(self, "statistic", (None, *STATISTICS))
        one_of(self, "engine", ("transformers", "vllm"))
        if not 0 < self.engine_memory < 1:
            raise RunError(f"expected 0 < engine_memory < 1, got {self.engine_memory}")
        one_of(self, "kl_control", ("fixed", "adaptive"))
        one_of(self, "kl_kind", self.kl_kinds())
        adaptive = self.kl_control == "adaptive"
        if adaptive and self.kl_coef == 0:
            raise RunError(
                "--kl_control adaptive multiplies kl_coef, so it cannot leave kl_coef 0: give a "
                "--kl_coef > 0 to begin with"
            )
        if adaptive and not (self.kl_target or 0) > 0:
            raise RunError(
                f"--kl_control adaptive needs a --kl_target > 0, in nats of a response; got "
                f"{self.kl_target}"
            )
        if not adaptive and self.kl_target is not None:
            raise RunError("--kl_target is for --kl_control adaptive; the control is fixed")

    def kl_kinds(self) -> tuple[str, ...]:
        """The estimators this method can use."""
        return KINDS


def one_of(config: Any, name: str, known: tuple[Any, ...]) -> None:
    """Checks a field of a configuration that is a choice.

    Raises:
        RunError: it is none of `known`.
    """
    value = getattr(config, name)
    if value not in known:
        words = ", ".join(str(word) for word in known if word is not None)
        raise RunError(f"unknown {name} {value!r}: expected one of {words}")


@dataclass(frozen=True)
class Signal:
    """What a method makes of a round's experience."""

    tokens: dict[str, Tensor]
    """What each response token learns from, [N] each, by the names its loss has for them."""
    metrics: dict[str, float]
    kept: list[int]
    """The responses that are learned from."""


class Method:
    """What tells one online method from another."""

    name = ""
    """Of the command."""
    value_head = False
    """Whether the policy is to have one."""
    critic_steps = 0
    """Updates of the critic before the first step."""
    vf_coef = 0.0
    """Weight of the value loss."""
    value_clip: float | None = None
    value_lr = 0.0
    """Peak learning rate of the critic."""

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of the loss beside the policy's, by the metric that shows them."""
        return {}

    def make_critic(self, policy: Policy, tokenizer: Any, device: torch.device) -> Critic | None:
        """Of the values that `signal` gets."""
        return None

    def pretrain(
        self, critic: Critic, rounds: list[Experience], kl_coef: float, meter: Meter
    ) -> dict[str, float]:
        """The critic learns from rounds of pi_init's responses, `critic_steps` updates."""
        raise NotImplementedError

    def signal(self, found: Experience, values: Tensor | None, kl_coef: float) -> Signal:
        """What each token learns from. `values` are the critic's, fp32 [N]."""
        raise NotImplementedError

    def loss(self, kl_coef: float) -> Any:
        """The policy's loss, an object of fastalign.losses."""
        raise NotImplementedError

    def of_update(
        self, rows: dict[str, list[Tensor]]
    ) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        """The signals of the responses of one update, as its loss takes them; and metrics."""
        return rows, {}

    def also(self, policy: Policy, step: int, update: int, meter: Meter) -> dict[str, Tensor]:
        """Adds the gradients of further terms of the loss and counts their passes; the terms, by
        their metrics' names."""
        return {}

    def prepare(self, tokenizer: Any, policy: Policy) -> None:
        """Before the first step: loads what the method needs of its own."""

    def inputs(self) -> dict[str, Any]:
        """What it reads of its own and does not change, for `Inputs`: a resumed run must have the
        same."""
        return {}

    def state(self) -> dict[str, Any]:
        """What it carries from round to round, for checkpoints: things with state_dict."""
        return {}


def train(config: OnlineConfig, method: Method) -> Path:
    """Aligns the policy and evaluates it before and after; the folder of the model."""
    device = begin(config)
    tokenizer = load_tokenizer(config.policy)
    reward = make_reward(config, tokenizer, device)
    judge = RewardEnsemble.load(config.judge).to(device).eval() if config.judge else None
    if judge is not None:
        check_same_tokenizer(
            tokenizer, load_tokenizer(str(config.judge)), config.policy, str(config.judge)
        )
    policy = load_policy(
        config, config.policy, tokenizer, device=device, value_head=method.value_head
    )
    reference = policy.frozen_copy()
    critic = method.make_critic(policy, tokenizer, device)
    gold = make_gold(config, tokenizer, device)
    readers = [m for m in (reward, judge, gold) if isinstance(m, RewardSource | RewardEnsemble)]
    context = min(m.max_length for m in (policy, *readers))
    room = context - config.sampling.max_new_tokens
    if room < 1:
        raise RunError(
            f"sampling.max_new_tokens {config.sampling.max_new_tokens} leaves no room for a prompt "
            f"in the {context} tokens that policy and reward models can read"
        )
    prompts, held_out = load_prompts(config, tokenizer, room)
    method.prepare(tokenizer, policy)
    engine = make_engine(config, policy, tokenizer)
    distributed.shard(policy, "hidden")
    if critic is not None and critic.module is not None:
        distributed.shard(critic.module, "values")
    collector = Collector(
        engine,
        reference,
        reward,
        tokenizer,
        config.sampling,
        config.micro_tokens,
        config.dtype,
        gold,
    )

    def judged() -> Evaluation:
        # Before and after draw from the same stream.
        seed_draws(config.seed, "evaluation")
        return evaluate(
            collector,
            policy,
            [p.prompt for p in held_out],
            [p.text for p in held_out],
            config.eval_samples,
            judge,
        )

    trained, critic_name = module_of(policy, critic)
    optimizer = Optimizer(config, trained, config.steps, {critic_name: method.value_lr})
    learner = Learner(config, method, policy, critic, reference, optimizer)
    controller = make_controller(
        config.kl_control, config.kl_coef, config.kl_target, config.kl_horizon
    )
    buffer, evaluations, guards = Buffer(), Evaluations(), Guards(config.guards)
    with Run(config, method.name, config.steps) as run:
        modules: dict[str, nn.Module] = {"policy": policy}
        if critic is not None and critic.module is not None:
            modules["critic"] = critic.module
        others = {"optimizer": optimizer, "controller": controller, "buffer": buffer}
        scorer = reward.entries if reward.ensemble is None else reward.ensemble
        inputs = Inputs(prompts=prompts, reference=reference, reward=scorer, **method.inputs())
        others |= {"evaluations": evaluations, "inputs": inputs, "guards": guards}
        others |= method.state()

        def collect(step: int) -> Experience:
            chosen = [prompts[i] for i in choose_prompts(len(prompts), config, step)]
            asked, texts = [p.prompt for p in chosen], [p.text for p in chosen]
            return collector.collect(asked, texts, config.samples_per_prompt, run.meter)

        start = run.restore(Stateful(modules, others))
        if evaluations.before is None:
            with run.meter.phase("evaluate"):
                evaluations.before = judged()
            run.log(0, "eval", evaluations.before.numbers)
            if reward.ensemble is not None:
                warn_of_statistic(evaluations.before.numbers, reward.ensemble.config.statistic)
            seed_draws(config.seed, "sampling")
            if critic is not None and method.critic_steps > 0:
                rounds, wanted = [collect(1)], method.critic_steps * config.batch_tokens / PASSES
                while sum(found.tokens for found in rounds) < wanted:
                    rounds.append(collect(1 + len(rounds)))
                with run.meter.phase("value"):
                    learned = method.pretrain(critic, rounds, controller.coef, run.meter)
                run.log(0, "critic", learned | run.meter.metrics())
        for step in range(start + 1, config.steps + 1):
            if guards.spent is not None:
                log.info("%s", guards.spent)
                break
            if buffer.found is None:
                found = collect(step)
                with run.meter.phase("value"):
                    values = None if critic is None else learner.values(found, run.meter)
                    signal = method.signal(found, values, controller.coef)
                buffer.fill(found, signal.tokens, signal.kept, signal.metrics | found.metrics())
            with run.meter.phase("update"):
                learner.update(run, step, buffer, controller.coef)
                optimizer.next_step()
            metrics = buffer.metrics | buffer.means()
            if config.kl_coef > 0:
                metrics["kl/coef"] = controller.coef
            controller.update(metrics["kl/k1"], buffer.n_responses)
            assert buffer.found is not None
            metrics |= guards.check(step, buffer.found, metrics)
            metrics |= run.meter.metrics()
            buffer.clear()
            run.log(step, "train", metrics)
            last = step == config.steps or guards.spent is not None
            if last:
                with run.meter.phase("evaluate"):
                    evaluations.after = judged()
                run.log(step, "eval", evaluations.after.numbers)
            run.end_step(step, last=last)
        if evaluations.after is None:  # the checkpoint is of the last step only now
            with run.meter.phase("evaluate"):
                evaluations.after = judged()
            run.log(run.step, "eval", evaluations.after.numbers)
        with run.saving_model() as folder:
            whole = distributed.unsharded(policy)
            if isinstance(whole, Policy):
                whole.save(folder, tokenizer)
        facts = {
            "method": method.name,
            **reward.describe(),
            "n_prompts": len(held_out),
            "n_samples": config.eval_samples,
            **repeat.facts(device),
            "seconds": {"total": run.meter.seconds()},
        }
        if run.is_main:
            evaluations.write(run.folder, facts)
    return run.folder / "model"
