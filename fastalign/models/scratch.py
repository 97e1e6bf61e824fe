"""`scratch:NAME`: Llama-form models built from a config, so that everything runs without a download."""

from __future__ import annotations

from typing import Any

# hidden size, layers, heads, feed-forward size; parameters are counted with the vocabulary in brackets.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "1m": (160, 3, 4, 432),  # 1.3M [2k]
    "3m": (256, 3, 4, 688),  # 2.9M [2k]
    "10m": (384, 5, 6, 1024),  # 10.4M [4k]
    "25m": (512, 6, 8, 1376),  # 25.1M [12k]
    "100m": (768, 12, 12, 2048),  # 101M [20k]
}


def scratch_config(spec: str, tokenizer: Any, max_length: int) -> Any:
    """The config of `scratch:NAME` for this tokenizer's vocabulary and a context of `max_length` tokens.

    Raises:
        ValueError: an unknown size.
    """
    from transformers import LlamaConfig

    name = spec.removeprefix("scratch:")
    if name not in SIZES:
        raise ValueError(f"unknown model {spec!r}: expected scratch: and one of {', '.join(SIZES)}")
    hidden, layers, heads, feed_forward = SIZES[name]
    return LlamaConfig(
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
