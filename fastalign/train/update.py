"""The second half of a round of an online method: what was sampled, learned from.

A few epochs over the round's responses, each in its own order, cut into updates of `batch_tokens`
tokens and forward passes of `micro_tokens`. The loss is a mean over the whole update, whatever the
passes: its normalizer is known before the first of them.

A run can stop between two updates. The `Buffer` is the round so far: what was sampled, what each
token learns from, how many updates are done and the sums of their metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastalign import losses, ops
from fastalign.data.packing import Packed, Prompts, batches_of, held, token_budget_batches
from fastalign.losses.ratio import EXACT
from fastalign.models import Policy
from fastalign.models.flops import forward_flops, training_flops
from fastalign.streams import stream
from fastalign.train import distributed, experience
from fastalign.train.critic import Critic, values_of
from fastalign.train.experience import Experience
from fastalign.train.meter import Meter
from fastalign.train.optim import Optimizer
from fastalign.train.run import Run, autocast

if TYPE_CHECKING:
    from fastalign.train.online import Method, OnlineConfig

# Of what the loss head counts, all but these is of interest only where it is wrong.
NOT_LOGGED = ("entropy", "top1")


@dataclass
class Buffer:
    """A round between its sampling and its last update; empty between rounds."""

    found: Experience | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """What each response token learns from, [N] each."""
    kept: list[int] = field(default_factory=list)
    """The responses that are learned from."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the sampling."""
    epoch: int = 0
    position: int = 0
    """The next update: its epoch, its place in the epoch."""
    n_updates: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Of the metrics of the updates so far."""

    def fill(
        self,
        found: Experience,
        tokens: dict[str, Tensor],
        kept: list[int],
        metrics: dict[str, float],
    ) -> None:
        """What was sampled, before its first update."""
        self.found, self.tokens, self.kept, self.metrics = found, tokens, kept, metrics

    @property
    def n_responses(self) -> int:
        return 0 if self.found is None else len(self.found.rollouts)

    def means(self) -> dict[str, float]:
        """Of the updates' metrics."""
        return {name: value / self.n_updates for name, value in self.sums.items()}

    def add(self, numbers: dict[str, float]) -> None:
        """Takes in the metrics of one update."""
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.n_updates += 1

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def state_dict(self) -> dict[str, Any]:
        state = dict(vars(self))
        return state | {"found": None if self.found is None else self.found.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if state["found"] is not None:
            self.found = Experience.from_state(state["found"])


@dataclass
class Learner:
    """What an update moves, and by what."""

    config: OnlineConfig
    method: Method
    policy: Policy
    critic: Critic | None
    reference: Policy
    optimizer: Optimizer

    @property
    def device(self) -> torch.device:
        return self.policy.head_weight.device

    def prompts(self, found: Experience) -> Prompts | None:
        """Which responses share their prompt; None where policy or critic cannot."""
        critic = self.critic is None or self.critic.shares_prompts
        return found.prompts if critic and self.policy.shares_prompts else None

    def values(self, found: Experience, meter: Meter) -> Tensor:
        """fp32 [N]: the critic on the state before every response token."""
        config, critic = self.config, self.critic
        assert critic is not None
        self.policy.eval()
        model = self.policy if critic.module is None else critic.module
        prompts = found.prompts if critic.shares_prompts else None
        rows = range(len(found.rollouts))
        passes = batches_of(rows, found.lengths, config.micro_tokens, prompts)
        own, before = held(passes, found.lengths, prompts)
        meter.count(flops=forward_flops(model, own, 0, before))
        return values_of(critic, found.rollouts, config.micro_tokens, config.dtype)

    def backward(
        self,
        loss: Any,
        pack_: Packed,
        inputs: dict[str, Tensor],
        lengths: list[int],
        n_tokens: float,
        normalizer: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Adds the gradients of one pack's part of the loss of an update.

        Args:
            loss: the policy's.
            inputs: what the pack's response tokens learn from, [M] each, on the device.
            lengths: of its responses, tokens.
            n_tokens: response tokens of the whole update.
            normalizer: what the policy's loss is divided by.

        Returns:
            The pack's parts of the update's metrics, 0-d, and the tensors to look at where a loss
            is not finite. Nothing in here makes the host wait for the device.
        """
        config, method = self.config, self.method
        options: dict[str, Any] = {}
        if getattr(loss, "reduction", None) == "sequence_mean":
            options["groups"] = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        with autocast(self.device, config.dtype):
            hidden = self.policy.response_hidden(pack_)
            if exact_kl(loss):
                with torch.no_grad():
                    options["ref_hidden"] = self.reference.response_hidden(pack_)
                options["ref_weight"] = self.reference.head_weight.to(hidden.dtype)
                options["ref_bias"] = self.reference.head_bias
            out = ops.linear_loss(
                hidden,
                self.policy.head_weight.to(hidden.dtype),
                pack_.response_targets,
                loss,
                {name: inputs[name] for name in loss.required if name in inputs},
                bias=self.policy.head_bias,
                softcap=self.policy.softcap,
                temperature=config.sampling.temperature,
                ignore_index=None,
                normalizer=normalizer,
                **options,
            )
            values = None if self.critic is None else self.critic.values(pack_, hidden)
        total, share = out.loss, pack_.kept.numel() / n_tokens
        parts = {"loss/policy": out.loss.detach(), "entropy": out.entropy.sum() / n_tokens}
        seen = {**inputs, "hidden states": hidden, "logp": out.logp}
        if values is not None:
            value_loss = losses.ValueLoss(method.value_clip)
            old = inputs["old_values"] if method.value_clip else None
            critic = value_loss(values, inputs["returns"], old).sum() / n_tokens
            total = total + method.vf_coef * critic
            parts["loss/value"] = critic.detach()
            seen["values"] = values
        total.backward()
        parts["sampling_gap"] = (out.logp - inputs["old_logp"]).abs().sum() / n_tokens
        for name, mean in out.metrics.items():
            if name not in NOT_LOGGED:
                parts[f"policy/{name}"] = mean * share
        return parts, seen

    def update(self, run: Run, step: int, buffer: Buffer, kl_coef: float) -> None:
        """All that is left to do of the buffer's updates; their metrics go into the buffer.

        Raises:
            Interrupted: the run was asked to stop; a checkpoint holds the buffer.
            Stopped: a loss or gradient is not finite.
        """
        config, found = self.config, buffer.found
        assert found is not None
        tokens = {name: t.to(self.device) for name, t in buffer.tokens.items()}
        loss = self.method.loss(kl_coef)
        # Dropout stays off: log pi must be that of the policy which sampled and of pi_init's twin.
        self.policy.eval()
        lengths = [found.lengths[i] for i in buffer.kept]
        if buffer.n_updates == 0:
            run.meter.count(trained=sum(len(found.rollouts[i].completion) for i in buffer.kept))
            own, _ = held([range(len(found.rollouts))], found.lengths, found.prompts)
            buffer.metrics["tokens/repeated"] = found.tokens - sum(own)
        while buffer.epoch < config.epochs:
            order = stream(config.seed, "update", step, buffer.epoch)
            batches = token_budget_batches(lengths, config.batch_tokens, generator=order)
            while buffer.position < len(batches):
                batch = [buffer.kept[i] for i in batches[buffer.position]]
                buffer.add(self._one(run, step, buffer, found, batch, tokens, loss))
                buffer.position += 1
                last = buffer.epoch + 1 == config.epochs and buffer.position == len(batches)
                if not last:
                    run.end_update(step, buffer.n_updates, config.checkpoint_updates)
            buffer.epoch, buffer.position = buffer.epoch + 1, 0

    def _one(
        self,
        run: Run,
        step: int,
        buffer: Buffer,
        found: Experience,
        batch: list[int],
        tokens: dict[str, Tensor],
        loss: Any,
    ) -> dict[str, float]:
        """One update: its metrics."""
        config, method = self.config, self.method
        lengths = [len(found.rollouts[i].completion) for i in batch]
        n_tokens = sum(lengths)
        normalizer = normalizer_of(loss, lengths, config.sampling.max_new_tokens)
        rows = {name: [t[found.rows(i)] for i in batch] for name, t in tokens.items()}
        rows, more = method.of_update(rows)
        sums: dict[str, Tensor] = {}
        prompts = self.prompts(found)
        passes = distributed.passes(batch, found.lengths, config.micro_tokens, prompts)
        self._count(run.meter, *held(passes, found.lengths, prompts), n_tokens, loss)
        place = {i: k for k, i in enumerate(batch)}
        for micro in distributed.micros(
            self.policy, batch, found.lengths, config.micro_tokens, prompts
        ):
            pack_ = experience.packed([found.rollouts[i] for i in micro.rows], prompts is not None)
            pack_ = pack_.to(self.device)
            at = [place[i] for i in micro.rows]
            inputs = {name: torch.cat([parts[k] for k in at]) for name, parts in rows.items()}
            parts, seen = self.backward(
                loss,
                pack_,
                inputs,
                [lengths[k] for k in at],
                micro.divisor(n_tokens),
                micro.divisor(normalizer),
            )
            for name, part in parts.items():
                sums[name] = sums[name] + part if name in sums else part
        sums |= method.also(self.policy, step, buffer.n_updates, run.meter)
        together = distributed.total(torch.stack([part.double() for part in sums.values()]))
        sums = dict(zip(sums, together.unbind(), strict=True))
        total = sums["loss/policy"]
        for name, coef in method.weights.items():
            total = total + coef * sums[name]
        numbers = self.optimizer.update(run, step, total, seen)
        numbers |= dict(zip(sums, together.tolist(), strict=True)) | more
        numbers["loss"] = float(total)
        gap = numbers.pop("sampling_gap")
        if buffer.n_updates == 0:  # later it is no longer the policy that sampled
            buffer.metrics["sampling_gap"] = gap
        return numbers

    def _count(
        self, meter: Meter, own: list[int], before: list[int], n_tokens: int, loss: Any
    ) -> None:
        """What one update costs."""
        flops = training_flops(self.policy, own, n_tokens, before)
        if self.critic is not None and self.critic.module is not None:
            flops += training_flops(self.critic.module, own, 0, before)
        if exact_kl(loss):
            flops += forward_flops(self.reference, own, n_tokens, before)
        meter.count(flops=flops)


def exact_kl(loss: Any) -> bool:
    """Whether the loss takes the KL over the whole vocabulary, of the reference's hidden states."""
    return getattr(loss, "kl_kind", None) == EXACT and loss.kl_coef > 0


def normalizer_of(loss: Any, lengths: list[int], longest: int) -> float:
    """What the sum of a loss over responses of these lengths is divided by, for its reduction."""
    reduction = getattr(loss, "reduction", "token_mean")
    if reduction == "sequence_mean":
        return len(lengths)
    return len(lengths) * longest if reduction == "sum" else sum(lengths)


def module_of(policy: Policy, critic: Critic | None) -> tuple[nn.Module, str]:
    """All that is trained as one module, and the critic's name in it."""
    if critic is None or critic.module is None:
        return policy, "value_head"
    return nn.ModuleDict({"policy": policy, "critic": critic.module}), "critic"
