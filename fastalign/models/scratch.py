"""`scratch:NAME`: Llama-form models from a config, so that everything runs without a download."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastalign.errors import UserError

# hidden size, layers, heads, feed-forward size; parameters counted with the vocabulary in brackets
SIZES: dict[str, tuple[int, int, int, int]] = {
    "1m": (192, 2, 6, 512),  # 1.3M [2k]
    "2m": (192, 4, 6, 512),  # 2.1M [2k]
    "3m": (256, 3, 4, 688),  # 2.9M [2k]
    "10m": (384, 5, 6, 1024),  # 10.4M [4k]
    "25m": (512, 6, 8, 1376),  # 25.1M [12k]
    "100m": (768, 12, 12, 2048),  # 101M [20k]
}


EMBEDDING_STD = 0.1


def size(spec: str) -> tuple[int, int, int, int]:
    """What `SIZES` says of `scratch:NAME`.

    Raises:
        UserError: an unknown size.
    """
    name = spec.removeprefix("scratch:")
    if name not in SIZES:
        raise UserError(f"unknown model {spec!r}: expected scratch: and one of {', '.join(SIZES)}")
    return SIZES[name]


def build(spec: str, tokenizer: Any, max_length: int, auto_class: Any) -> Any:
    """The model `scratch:NAME` with random weights drawn from torch's global random state.

    Matrices start with variance 1 / fan-in and the (tied) embeddings with standard deviation 0.1.
    The usual 0.02 everywhere is made for wide models: at these widths it delays by hundreds of
    steps the moment at which attention starts to read the prompt.

    Args:
        spec: scratch: and one of `SIZES`.
        tokenizer: gives vocabulary and special tokens.
        max_length: context in tokens.
        auto_class: `AutoModelForCausalLM`, or `AutoModel` for a trunk without head.

    Raises:
        UserError: an unknown size.
    """
    from transformers import LlamaConfig

    hidden, layers, heads, feed_forward = size(spec)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = auto_class.from_config(config, attn_implementation="sdpa")
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=EMBEDDING_STD)
    return model
