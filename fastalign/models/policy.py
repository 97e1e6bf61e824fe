"""The policy: a causal language model run packed, its head kept apart, and a value head.

The folder it saves loads with plain `AutoModelForCausalLM.from_pretrained`; the value head lies
beside it.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.errors import UserError
from fastalign.models import lora
from fastalign.models.attention import NAME, check_packed, packed_hidden, register
from fastalign.models.pretrained import context, make_model
from fastalign.models.reward import CONFIG_FILE as ENSEMBLE_FILE

VALUE_HEAD_FILE = "value_head.safetensors"


class ValueHead(nn.Module):
    """V(s) from the hidden state: H -> 2H -> 1 with ReLU, as in 2306.02231's code; starts at 0."""

    # As transformers' models name theirs: sharded, it is a unit of its own. It may be trained
    # where the trunk has no gradient.
    _no_split_modules = ("ValueHead",)

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * hidden_size)
        self.down = nn.Linear(2 * hidden_size, 1)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] -> fp32 [N]."""
        with torch.autocast(hidden.device.type, enabled=False):
            states = hidden.to(self.up.weight.dtype)
            return self.down(torch.relu(self.up(states))).squeeze(-1).float()


class Policy(nn.Module):
    """A causal language model, packed, with an optional value head on its trunk.

    Args:
        model: a `transformers` causal language model.
        value_head: whether to put a `ValueHead` on the last hidden state.

    Raises:
        UserError: packed, the model gives other logits than one sequence at a time; or its logits
            are not its head applied to its last hidden state (a scaled head, say), which the loss
            head could not reproduce.
    """

    def __init__(self, model: Any, value_head: bool = False) -> None:
        super().__init__()
        register()
        self.model = model
        model.set_attn_implementation(NAME)
        self.value_head = ValueHead(model.config.hidden_size) if value_head else None
        self.softcap = getattr(model.config, "final_logit_softcapping", None)
        self.shares_prompts = self._check_head()
        """Whether it takes packs in which several sequences share a prompt."""

    @classmethod
    def load(
        cls, source: str, tokenizer: Any, *, max_length: int = 512, value_head: bool = False
    ) -> Policy:
        """`scratch:NAME` (random weights by the current torch seed), a local folder or a hub id.

        Raises:
            UserError: nothing there that loads, a reward ensemble, or a vocabulary smaller than the
                tokenizer's.
        """
        from transformers import AutoModelForCausalLM

        if (Path(source) / ENSEMBLE_FILE).exists():
            raise UserError(
                f"{source} is a reward ensemble, which cannot write: expected a language model"
            )
        model = make_model(source, tokenizer, max_length, AutoModelForCausalLM)
        policy = cls(model, value_head)
        head_file = Path(source) / VALUE_HEAD_FILE
        if policy.value_head is not None and head_file.exists():
            from safetensors.torch import load_file

            policy.value_head.load_state_dict(load_file(head_file))
        return policy

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Weights and tokenizer in the `transformers` form, the value head beside them; what a
        LoRA adapter becomes is said at `LoRAConfig.save`."""
        from safetensors.torch import save_file

        lora.save_model(self.model, folder)
        tokenizer.save_pretrained(folder)
        if self.value_head is not None:
            tensors = {k: v.contiguous() for k, v in self.value_head.state_dict().items()}
            save_file(tensors, folder / VALUE_HEAD_FILE)

    def frozen_copy(self) -> Policy:
        """pi_init: the same language model, its own weights, no gradients, no value head.

        Of a policy with a LoRA adapter it is the base: the same weights without the adapter.
        """
        model = self.model
        twin = Policy(lora.without_adapter(model) if lora.has_adapter(model) else deepcopy(model))
        return twin.requires_grad_(False).eval()

    @property
    def head_weight(self) -> Tensor:
        """[V, H], in the dtype the loss head meets the hidden states in."""
        return self.model.get_output_embeddings().weight

    @property
    def head_bias(self) -> Tensor | None:
        return getattr(self.model.get_output_embeddings(), "bias", None)

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return context(self.model)

    def hidden(self, packed: Any) -> Tensor:
        """Last hidden states [N, H] of a pack."""
        return packed_hidden(self.model.base_model, packed)

    def values(self, hidden: Tensor) -> Tensor:
        """fp32 [N] from hidden states [N, H]."""
        if self.value_head is None:
            raise ValueError("Policy.values: this policy was made without a value head")
        return self.value_head(hidden)

    def response_hidden(self, packed: Any) -> Tensor:
        """Hidden states [M, H] where the next token counts (`packed.kept`), sequence by sequence;
        the last one of a shared prompt stands in it for every sequence."""
        return self.hidden(packed).index_select(0, packed.kept)

    def logprobs(
        self,
        packed: Any,
        *,
        temperature: float = 1.0,
        return_entropy: bool = False,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs (and entropies), fp32 [M], of the M targets of a pack that count, in order.

        `hidden`: the pack's `response_hidden`, where it is there already.
        """
        hidden = self.response_hidden(packed) if hidden is None else hidden
        weight, targets = self.head_weight.to(hidden.dtype), packed.response_targets
        options: dict[str, Any] = {
            "bias": self.head_bias,
            "temperature": temperature,
            "softcap": self.softcap,
            "ignore_index": None,  # nothing to drop is left
        }
        if return_entropy:
            return ops.linear_logprobs(hidden, weight, targets, return_entropy=True, **options)
        return ops.linear_logprobs(hidden, weight, targets, **options), None

    @torch.no_grad()
    def _check_head(self) -> bool:
        def ours(packed: Any) -> Tensor:
            logits = nn.functional.linear(self.hidden(packed), self.head_weight, self.head_bias)
            return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits

        return check_packed(self.model, ours, lambda ids: self.model(input_ids=ids).logits)
