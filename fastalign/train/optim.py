"""AdamW, its schedule, and the guard that keeps a NaN from reaching the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.models import attention_kernels
from fastalign.models.lora import LoRAConfig
from fastalign.train import distributed
from fastalign.train.run import Run, RunConfig, RunError, Stopped, at_least, first_non_finite

SCHEDULES = ("constant", "cosine", "linear")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class OptimConfig(RunConfig):
    """What every command that updates weights has."""

    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: str = "cosine"
    """After the warm-up: cosine or linear to a tenth of the peak, or constant."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """On matrices only; biases, norms and other vectors are not decayed."""
    beta2: float = 0.95
    """AdamW's second beta; the first is 0.9."""
    grad_clip: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer and run the layer again for the gradients: less memory, a
    third more time."""
    attention: str = "auto"
    """sdpa, varlen (torch's FlashAttention on CUDA), flash2 (the package flash-attn), flash4
    (flash-attn-4), or auto: varlen in half precision on CUDA, sdpa elsewhere."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Low-rank adapters instead of all weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "lr", "warmup", "weight_decay", "beta2")
        if self.warmup > 1 or self.beta2 >= 1 or not self.grad_clip > 0:
            raise RunError(
                f"expected warmup <= 1, beta2 < 1 and grad_clip > 0, got {self.warmup}, "
                f"{self.beta2} and {self.grad_clip}"
            )
        attention_kernels.check(self.attention)
        if self.schedule not in SCHEDULES:
            raise RunError(
                f"unknown schedule {self.schedule!r}: expected one of {', '.join(SCHEDULES)}"
            )


class Optimizer:
    """AdamW over the trainable parameters of `module`, one `update` a step.

    Args:
        config: learning rate, schedule and the rest.
        module: what is trained.
        total: steps of the schedule.
        lrs: peak learning rates of direct children of `module` that are not to have `config.lr`.
    """

    def __init__(
        self,
        config: OptimConfig,
        module: nn.Module,
        total: int,
        lrs: dict[str, float] | None = None,
    ) -> None:
        self.config, self.module = config, module
        # Kept: between forward and backward a sharded module has others under these names.
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            lr = (lrs or {}).get(name.split(".")[0], config.lr)
            decay = config.weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
        self.adam = torch.optim.AdamW(
            [
                {"params": parameters, "lr": lr, "weight_decay": decay}
                for (lr, decay), parameters in groups.items()
            ],
            betas=(0.9, config.beta2),
            fused=True,
        )
        warmup = max(1, round(config.warmup * total))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            if config.schedule == "cosine":
                return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
            return 1.0 - 0.9 * done if config.schedule == "linear" else 1.0

        self.factor = factor
        self.peaks = [float(group["lr"]) for group in self.groups]
        self.done = 0  # steps of the schedule that are behind
        self._set_rates()

    def _set_rates(self) -> None:
        for group, peak in zip(self.groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(self.done)

    def update(
        self, run: Run, step: int, loss: Tensor, inputs: dict[str, Tensor]
    ) -> dict[str, float]:
        """One step from the gradients `backward` left; returns learning rate and gradient norm.

        Raises:
            Stopped: loss or gradient is not finite. The weights stay as they were; the message
                names the first tensor that is not finite, in the order weights, inputs, loss,
                gradients.
        """
        norm = distributed.whole(nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip))
        if not (math.isfinite(float(norm)) and math.isfinite(float(loss))):
            named = list(self.module.named_parameters())
            culprit = first_non_finite(
                [(f"weight {name}", distributed.local(p.detach())) for name, p in named]
                + [(f"input {name}", t.detach()) for name, t in inputs.items()]
                + [("the loss", loss.detach())]
                + [
                    (f"gradient of {name}", distributed.local(p.grad))
                    for name, p in named
                    if p.grad is not None
                ]
            )
            raise Stopped(
                f"step {step}: loss {float(loss):g}, gradient norm {float(norm):g}; first seen in "
                f"{culprit}. Stopped before the update; {run.last_checkpoint()}"
            )
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return {"lr": float(self.groups[0]["lr"]), "grad_norm": float(norm)}

    def next_step(self) -> None:
        """Moves the learning rate on; a step of policy training holds several updates."""
        self.done += 1
        self._set_rates()

    def _begun(self) -> dict[str, nn.Parameter]:
        """The parameters that AdamW has moved, by name."""
        return {n: p for n, p in self.named.items() if p in self.adam.state}

    def tensors(self) -> dict[str, Tensor]:
        """The moments, spread as the parameters are."""
        return {
            f"{moment}.{name}": self.adam.state[parameter][moment]
            for name, parameter in self._begun().items()
            for moment in MOMENTS
        }

    def state_dict(self) -> dict[str, Any]:
        """All but the moments, which are `tensors`."""
        steps = {n: float(self.adam.state[p]["step"]) for n, p in self._begun().items()}
        return {"steps": steps, "schedule": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The step of a checkpoint, and room for its moments; rates and decay are the
        configuration's, which a resumed run may have changed.

        Raises:
            RunError: the checkpoint's run trained other parameters.
        """
        other = sorted(state["steps"].keys() - self.named.keys())
        if other:
            raise RunError(f"the checkpoint is of a run that trained {other[0]}; this one does not")
        for name, step in state["steps"].items():
            parameter = self.named[name]
            self.adam.state[parameter] = {
                "step": torch.tensor(step, device=distributed.local(parameter).device),
                **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
            }
        self.done = state["schedule"]
        self._set_rates()

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.adam.param_groups
