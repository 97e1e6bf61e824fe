"""LoRA (2106.09685) by peft: W x + (alpha / rank) B A x, of which only A and B are trained.

The adapter sits inside the `transformers` model, which stays what it was to everybody else. Three
things follow from the base weights never changing:

  reference   the model without its adapter is pi_init: `without_adapter` shares the base weights
              and takes no memory of its own
  checkpoint  holds the trained tensors, and a fingerprint of the base they belong to
  result      the plain model with B A added to W, and the adapter alone in peft's form
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.errors import UserError

ADAPTER = "default"
ADAPTER_FOLDER = "adapter"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."  # of names in peft's files
SAVED = ("merged", "adapter")


@dataclass
class LoRAConfig:
    """Low-rank adapters instead of all weights."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    target_modules: str = "all-linear"
    """all-linear (every matrix but the head), or names, comma-separated: q_proj,v_proj."""
    save: str = "merged"
    """merged: a plain model, and the adapter alone in its folder `adapter`; adapter: that only."""

    def __post_init__(self) -> None:
        if not (self.rank >= 0 and self.alpha > 0 and 0 <= self.dropout < 1):
            raise UserError(
                "LoRA: expected rank >= 0, alpha > 0 and 0 <= dropout < 1, got "
                f"{self.rank}, {self.alpha} and {self.dropout}"
            )
        if self.save not in SAVED:
            raise UserError(f"LoRA: expected save of {', '.join(SAVED)}, got {self.save!r}")
        if self.rank == 0:
            for field in fields(self):
                value = getattr(self, field.name)
                if value != field.default:
                    raise UserError(f"LoRA: {field.name} {value} needs a rank; --lora.rank is 0")


def has_adapter(model: nn.Module) -> bool:
    """Whether `add_adapter` has been here."""
    return hasattr(model, "lora")


def add_adapter(model: Any, config: LoRAConfig) -> None:
    """Freezes a `transformers` model and gives it an adapter, which at first changes nothing.

    From then on its `state_dict` is what is trained and a fingerprint of what is not; loading one
    that belongs to other base weights is refused.

    Args:
        model: loaded from a folder or hub id.
        config: of rank 1 at least. A is drawn from torch's global random state, B is 0.

    Raises:
        UserError: peft is not installed; the model has random weights or is frozen; a module is
            not there; they hold the head or the embeddings, whose plain weights the loss head
            needs; or the rank is more than that of any of their matrices.
    """
    peft = _peft()
    if not model.name_or_path:
        raise UserError("LoRA adapts a trained model: expected a folder or hub id, got scratch:")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("LoRA: the model is frozen, there is nothing to train")
    names = config.target_modules
    check_targets(model, config)
    adapter = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names if names == "all-linear" else names.split(","),
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION",
    )
    try:
        peft.inject_adapter_in_model(adapter, model, ADAPTER)
    except ValueError as error:
        raise UserError(f"LoRA: {str(error).splitlines()[0]}") from error
    for whole in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(whole, peft.tuners.tuners_utils.BaseTunerLayer):
            raise UserError(f"LoRA: {names} holds embeddings or head, which cannot have adapters")
    model.lora = config
    frozen = (p for p in model.parameters() if not p.requires_grad)
    model.register_buffer("base_fingerprint", fingerprint(frozen))
    left_out = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def drop_base(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in left_out:
            state.pop(prefix + name, None)

    def check_base(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
        saved = state.get(f"{prefix}base_fingerprint")
        own = module.base_fingerprint
        if saved is not None and not torch.equal(saved.cpu(), own.cpu()):
            raise UserError(
                f"the checkpoint's adapter belongs to other base weights than {model.name_or_path}"
            )

    def not_missing(module: Any, keys: Any) -> None:
        wanted = [k for k in keys.missing_keys if not any(k.endswith(n) for n in left_out)]
        keys.missing_keys[:] = wanted

    model.register_state_dict_post_hook(drop_base)
    model.register_load_state_dict_pre_hook(check_base)
    model.register_load_state_dict_post_hook(not_missing)


def check_targets(model: Any, config: LoRAConfig) -> None:
    """UserError where a name of `target_modules` is nowhere in the model, or the rank is more than
    any of its matrices has; before peft makes tensors of that size."""
    modules = {name.rpartition(".")[2]: module for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    matrices = {
        name: module
        for name, module in modules.items()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and not isinstance(module, nn.Embedding)
        and module is not head
    }
    every = config.target_modules == "all-linear"
    wanted = [] if every else [n.rpartition(".")[2] for n in config.target_modules.split(",")]
    absent = [name for name in wanted if name not in modules]
    if absent:
        raise UserError(
            f"LoRA: {model.name_or_path} has no module {absent[0]!r}; its matrices are "
            f"{', '.join(sorted(matrices))}"
        )
    sizes = [min(m.weight.shape) for name, m in matrices.items() if every or name in wanted]
    if sizes and config.rank > max(sizes):
        raise UserError(
            f"LoRA: rank {config.rank} is more than that of the matrices it adapts, at most "
            f"{max(sizes)}"
        )


def fingerprint(tensors: Any) -> Tensor:
    """int64 [n]: of each tensor the sum of its bits read as integers, the same on every device."""
    sizes = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
    sums = [
        t.detach().contiguous().view(sizes[t.element_size()]).sum(dtype=torch.int64).cpu()
        for t in tensors
    ]
    return torch.stack(sums)


def without_adapter(model: Any) -> Any:
    """The base model: modules of its own, weights shared with `model`.

    Running it touches nothing of `model`, so both may run at the same time, in any mode, inside
    each other; before any training the two are the same function bit for bit.
    """
    from peft.tuners.lora import LoraLayer

    shared = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    base = copy.deepcopy(model, shared)  # tensors in the memo are taken as they are
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            base.set_submodule(name, module.get_base_layer())
    del base.lora, base.peft_config, base.base_fingerprint
    for hooks in (
        base._state_dict_hooks,
        base._load_state_dict_pre_hooks,
        base._load_state_dict_post_hooks,
    ):
        hooks.clear()
    return base


@torch.no_grad()
def merged_weights(
    model: Any, whole: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> dict[str, Tensor]:
    """The state dict of the plain model that `model` with its adapter is, to rounding.

    Args:
        model: with an adapter.
        whole: makes a plain tensor of one that is spread over processes, where that is the case.
    """
    from peft.tuners.lora import LoraLayer

    state: dict[str, Tensor] = {}
    for child, module in model.named_children():  # the model itself leaves its base out
        held = module.state_dict(prefix=f"{child}.")
        for name in [name for name in held if ".lora_" not in name]:
            state[name.replace(".base_layer.", ".")] = whole(held[name])
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            delta = whole(module.get_delta_weight(ADAPTER))  # type: ignore[attr-defined]
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight + delta.to(weight.dtype)
    return state


def save_model(model: Any, folder: Path) -> None:
    """A `transformers` model in its own form; one with an adapter as `LoRAConfig.save` says."""
    if not has_adapter(model):
        model.save_pretrained(folder)
        return
    if model.lora.save == "merged":
        without_adapter(model).save_pretrained(folder, state_dict=merged_weights(model))
        folder = folder / ADAPTER_FOLDER
    _save_adapter(model, folder)


def _save_adapter(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    own = {f"{PREFIX}{name}": t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = copy.copy(model.peft_config[ADAPTER])
    adapter.inference_mode = True
    adapter.save_pretrained(folder)


def merge_folder(model: Any, folder: str) -> Any:
    """The base `model` with the adapter saved in `folder` merged into its weights.

    Raises:
        UserError: the adapter's files do not load, or not into this model.
    """
    from safetensors import SafetensorError

    try:
        merged = _peft().PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        what = str(error).splitlines()[0]
        raise UserError(f"the adapter at {folder!r} does not load: {what}") from error
    # An adapter trained on top of this one has this folder as its base, not the base's.
    merged.name_or_path = merged.config._name_or_path = folder
    return merged.requires_grad_(True)


def base_of(folder: str) -> str | None:
    """Where the base model of an adapter folder is; None for a folder that is none.

    Raises:
        UserError: the adapter does not say.
    """
    import json

    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        source = json.loads(path.read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise UserError(f"the adapter at {folder!r} does not load: {error}") from error
    if not source:
        raise UserError(f"the adapter at {folder!r} does not name its base model")
    return str(source)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("LoRA needs peft: pip install 'fastalign[lora]'") from error
    return peft
