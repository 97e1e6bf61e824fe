"""The reward ensemble: one encoder, K linear heads, one statistic (2406.01013; UWO: 2310.02743).

r_k(x, y) = (w_k . h + b_k - center_k) / scale_k, where h is the encoder's last hidden state at the
last token of prompt + response. Bradley-Terry leaves every head an offset and a scale of its own;
`center` and `scale` (measured on training samples after training) remove them, so that a minimum
over heads does not just pick the head with the lowest offset.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign import ops
from fastalign.errors import UserError
from fastalign.models.attention import NAME, check_packed, packed_hidden, register
from fastalign.models.lora import save_model
from fastalign.models.pretrained import context, load_model, make_model
from fastalign.ops.reduce_scores import STATISTICS, reduce_scores
from fastalign.streams import stream

CONFIG_FILE = "reward_ensemble.json"
HEADS_FILE = "heads.safetensors"


@dataclass(frozen=True)
class EnsembleConfig:
    """What `reward_ensemble.json` holds."""

    n_heads: int = 5
    statistic: str = "mean"
    """mean, min (worst case, WCO), lcb = mean - coef*std, uwo = mean - coef*variance, median."""
    coef: float = 1.0
    """c of lcb and uwo; std and variance over the heads are the unbiased ones (ddof = 1)."""
    head_seed: int = 0
    """Head k starts from `stream(head_seed, "head", k)` of fastalign.streams."""
    head_init: float = 1.0
    """Each weight of a head starts as normal with standard deviation head_init / sqrt(width)."""

    def __post_init__(self) -> None:
        if self.n_heads < 1:
            raise UserError(f"RewardEnsemble: expected n_heads >= 1, got {self.n_heads}")
        if self.statistic not in STATISTICS:
            raise UserError(
                f"RewardEnsemble: expected a statistic of {', '.join(STATISTICS)}, "
                f"got {self.statistic!r}"
            )


class RewardEnsemble(nn.Module):
    """K reward heads on one `transformers` encoder or decoder trunk.

    Args:
        encoder: a `transformers` base model (no head of its own).
        config: number of heads, statistic, seeds.

    Raises:
        UserError: packed, the encoder gives other hidden states than one sequence at a time.
    """

    weight: nn.Parameter  # [K, H]
    bias: nn.Parameter  # [K]
    center: Tensor  # fp32 [K]
    scale: Tensor  # fp32 [K]

    def __init__(self, encoder: Any, config: EnsembleConfig) -> None:
        super().__init__()
        register()
        self.encoder = encoder
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # unused, and of random weights where loading made it
        encoder.set_attn_implementation(NAME)
        self.shares_prompts = check_packed(
            encoder,
            lambda packed: packed_hidden(encoder, packed),
            lambda ids: encoder(input_ids=ids).last_hidden_state,
        )
        """Whether it takes packs in which several sequences share a prompt."""
        self.config = config
        width = encoder.config.hidden_size
        rows = []
        for k in range(config.n_heads):
            generator = stream(config.head_seed, "head", k)
            rows.append(torch.randn(width, generator=generator) * config.head_init * width**-0.5)
        self.weight = nn.Parameter(torch.stack(rows))
        self.bias = nn.Parameter(torch.zeros(config.n_heads))
        self.register_buffer("center", torch.zeros(config.n_heads))
        self.register_buffer("scale", torch.ones(config.n_heads))

    @classmethod
    def create(
        cls, source: str, tokenizer: Any, config: EnsembleConfig, *, max_length: int = 512
    ) -> RewardEnsemble:
        """New heads on the encoder `source`: `scratch:NAME`, a folder (an SFT model's), a hub id.

        Raises:
            UserError: nothing there that loads, or a vocabulary smaller than the tokenizer's.
        """
        from transformers import AutoModel

        return cls(make_model(source, tokenizer, max_length, AutoModel), config)

    @classmethod
    def load(cls, folder: str) -> RewardEnsemble:
        """A saved ensemble.

        Raises:
            UserError: the folder is not one.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import AutoModel

        path = Path(folder) / CONFIG_FILE
        if not path.exists():
            raise UserError(f"no reward ensemble at {folder!r}: {CONFIG_FILE} is missing")
        try:
            config = EnsembleConfig(**json.loads(path.read_text()))
            heads = load_file(Path(folder) / HEADS_FILE)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise UserError(f"the reward ensemble at {folder!r} does not load: {error}") from error
        ensemble = cls(load_model(folder, AutoModel), config)
        missing, unexpected = ensemble.load_state_dict(heads, strict=False)
        wrong = [k for k in missing if not k.startswith("encoder.")] + list(unexpected)
        if wrong:
            raise UserError(f"{folder}/{HEADS_FILE} does not fit its config: {', '.join(wrong)}")
        return ensemble

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Encoder and tokenizer in the `transformers` form, heads and config beside them."""
        from safetensors.torch import save_file

        save_model(self.encoder, folder)
        tokenizer.save_pretrained(folder)
        heads = {
            n: getattr(self, n).detach().contiguous() for n in ("weight", "bias", "center", "scale")
        }
        save_file(heads, folder / HEADS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=2) + "\n")

    def forward(self, packed: Any) -> Tensor:
        """fp32 scores [S, K] of the S sequences of a pack, read at each one's last token."""
        hidden = packed_hidden(self.encoder, packed)
        raw = ops.reward_heads(hidden, self.weight, self.bias, index=packed.last_index)
        return (raw - self.center) / self.scale

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return context(self.encoder)

    def reduce(self, scores: Tensor) -> Tensor:
        """The ensemble's statistic: [S, K] -> [S]."""
        return reduce_scores(scores, self.config.statistic, self.config.coef)

    @torch.no_grad()
    def standardise(self, scores: Tensor) -> None:
        """Sets `center` and `scale`: each head gets mean 0, deviation 1 on `scores` [S, K].

        `scores` are the ensemble's own at its present center and scale.
        """
        mean, std = scores.mean(0), scores.std(0)
        self.center += mean * self.scale
        self.scale *= std.clamp_min(1e-6)


def check_same_tokenizer(
    policy: Any, other: Any, policy_name: str, other_name: str, role: str = "reward model"
) -> None:
    """Token ids go from the policy to another model as they are: both must mean the same by them.

    Args:
        role: what the other model is to the policy.

    Raises:
        UserError: the vocabularies differ; says how.
    """
    ours, theirs = policy.get_vocab(), other.get_vocab()
    if ours == theirs:
        return
    differ = sum(1 for token, i in ours.items() if theirs.get(token) != i)
    raise UserError(
        f"the policy {policy_name!r} and the {role} {other_name!r} have different "
        f"tokenizers ({len(ours)} and {len(theirs)} tokens, {differ} of the policy's differ): "
        f"train the {role} on the policy's tokenizer"
    )
