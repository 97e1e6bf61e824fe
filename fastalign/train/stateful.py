"""What a checkpoint holds of a run, and how it is put back: weights, optimizer, random states."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fastalign.train import checkpoint, distributed
from fastalign.train.folder import RunError


@runtime_checkable
class HasTensors(Protocol):
    """What holds tensors as large as the weights, beside its `state_dict`."""

    def tensors(self) -> dict[str, Tensor]:
        """Spread over the processes as they are; after `load_state_dict`, to be read into."""
        ...


class Stateful:
    """What a checkpoint holds: modules, an optimizer, and all else with state_dict."""

    def __init__(self, modules: dict[str, nn.Module], others: dict[str, Any]) -> None:
        self.modules = modules
        self.others = others

    def capture(self, step: int) -> checkpoint.Checkpoint:
        """Of all processes together: each one's part of the tensors, and its random state."""
        tensors = {
            f"{name}.{key}": tensor
            for name, module in self.modules.items()
            for key, tensor in _untied(module).items()
        }
        tensors |= self._of_others()
        state = {name: other.state_dict() for name, other in self.others.items()}
        states = distributed.gather([checkpoint.random_state()])
        state["random"] = [one for (one,) in states]
        return checkpoint.Checkpoint(step, tensors, state)

    def _of_others(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": tensor
            for name, other in self.others.items()
            if isinstance(other, HasTensors)
            for key, tensor in other.tensors().items()
        }

    def restore(self, saved: checkpoint.Saved) -> None:
        """
        Raises:
            RunError: the checkpoint is not of this run; the weights stay as they were.
        """
        self._check_shapes(saved.shapes())
        blank = {
            name: {key: torch.empty_like(tensor) for key, tensor in _untied(module).items()}
            for name, module in self.modules.items()
        }
        for name, other in self.others.items():
            other.load_state_dict(saved.state[name])
        of_modules = {f"{n}.{key}": t for n, own in blank.items() for key, t in own.items()}
        saved.read(of_modules | self._of_others())
        for name, module in self.modules.items():
            names = _names(module)
            module.load_state_dict({key: blank[name][first] for key, first in names.items()})
        states, rank = saved.state["random"], distributed.world().rank
        if rank < len(states):  # one that the run did not have keeps the state it began with
            checkpoint.set_random_state(states[rank])

    def _check_shapes(self, found: dict[str, tuple[int, ...]]) -> None:
        own = {
            f"{name}.{key}": tuple(tensor.shape)
            for name, module in self.modules.items()
            for key, tensor in _untied(module).items()
        }
        theirs = {key: shape for key, shape in found.items() if key.split(".")[0] in self.modules}
        for key in sorted(own.keys() | theirs.keys()):
            if own.get(key) != theirs.get(key):
                raise RunError(
                    f"the checkpoint is of another architecture: {key} is {theirs.get(key)} there, "
                    f"{own.get(key)} here"
                )


def _names(module: nn.Module) -> dict[str, str]:
    """Each name in the module's `state_dict`, with the first one of the same tensor."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {key: first.setdefault(id(tensor), key) for key, tensor in state.items()}


def _untied(module: nn.Module) -> dict[str, Tensor]:
    """The module's `state_dict`, tied weights by their first name only."""
    state = module.state_dict(keep_vars=True)
    return {key: state[key].detach() for key in dict.fromkeys(_names(module).values())}
