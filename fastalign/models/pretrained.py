"""Models and tokenizers from a folder, a hub id or `scratch:NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastalign.errors import UserError
from fastalign.models import lora, scratch

OWN = ("config.json", "tokenizer_config.json", "tokenizer.json", lora.CONFIG_FILE)
"""Files of a folder of a model or a tokenizer, at least one of them."""


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a local folder or hub id.

    Raises:
        UserError: none there, or it has no end-of-sequence token.
    """
    from transformers import AutoTokenizer

    check_folder(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer found at {source!r}: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer at {source!r} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, auto_class: Any) -> Any:
    """The fp32 weights of a local folder or hub id as a model of `auto_class`.

    A folder of a LoRA adapter gives its base model with the adapter merged into the weights.

    Raises:
        UserError: nothing there that loads, or not all weights of such a model.
    """
    from safetensors import SafetensorError

    check_folder(source)
    base = lora.base_of(source)
    if base is not None:
        try:
            model = load_model(base, auto_class)
        except UserError as error:
            raise UserError(f"the base of the adapter at {source!r}: {error}") from error
        return lora.merge_folder(model, source)
    try:
        model, info = auto_class.from_pretrained(
            source, attn_implementation="sdpa", dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no model loads from {source!r}: {_first_line(error)}") from error
    # A pooler is never run here, and not saved with an encoder.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{source!r} lacks weights that a {type(model).__name__} needs: {missing[0]}{more}"
        )
    return model


def make_model(source: str, tokenizer: Any, max_length: int, auto_class: Any) -> Any:
    """`load_model`, or `scratch:NAME` with a context of `max_length` tokens, for a tokenizer.

    Raises:
        UserError: nothing there that loads, or a vocabulary smaller than the tokenizer's.
    """
    if source.startswith("scratch:"):
        return scratch.build(source, tokenizer, max_length, auto_class)
    model = load_model(source, auto_class)
    if model.config.vocab_size < len(tokenizer):
        raise UserError(
            f"the model {source!r} has {model.config.vocab_size} embeddings, its tokenizer "
            f"{len(tokenizer)} tokens: they do not belong together"
        )
    return model


def context(model: Any) -> int:
    """Tokens that a `transformers` model can read."""
    return int(getattr(model.config, "max_position_embeddings", 1 << 30))


def check_folder(source: str) -> None:
    """Tells a path that is not there from a hub id, before a hub is asked for it.

    A path is what a hub id cannot be, or what lies in a folder that exists here.

    Raises:
        UserError: a path, and nothing there, or the folder of a run.
    """
    path = Path(source)
    if path.is_dir():
        inner = path / "model"
        if (inner / "config.json").is_file() and not any((path / name).exists() for name in OWN):
            raise UserError(f"{source} is the folder of a run; its model is {inner}")
        return
    is_path = source.count("/") > 1 or source.startswith((".", "/", "~"))
    if is_path or path.exists() or (path.parent != Path(".") and path.parent.is_dir()):
        raise UserError(f"no model folder at {source}")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
