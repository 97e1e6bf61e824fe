"""Several processes on one machine, one per GPU: `torchrun --nproc-per-node N -m fastalign ...`.

Every process reads the same data and walks through the same steps. Of each batch it takes a share
of the sequences, of about as many tokens as the others'; what a loss is divided by is counted over
the whole batch, which every process knows, so that gradients only have to be summed. The weights
are sharded with FSDP2: each block is gathered when its turn comes, and the embeddings and the head
once a step, however many packs the step has.

With one process nothing in here does anything.
"""

from __future__ import annotations

import copy
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastalign.data.packing import Prompts, batches_of, held
from fastalign.errors import UserError

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class World:
    """Who this process is among how many."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0


def world() -> World:
    """Of the processes that talk to each other: one, before `start` and without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def launched() -> World:
    """What torchrun said in the environment, before the processes talk to each other."""
    return World(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def start(device: torch.device) -> torch.device:
    """Lets the processes that torchrun started meet; this process's own device."""
    if launched().size == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def finish(status: int = 0) -> None:
    """Parts again, at the end of a command; the process of one of several ends here.

    It ends without the interpreter's own teardown: gloo's threads live as long as anything holds a
    process group (a device mesh, cached somewhere), and one that lets go of a tensor of Python's
    during the teardown aborts the process (`terminate called without an active exception`) after
    all its work is done. One that failed does not wait for the others: torchrun ends them.
    """
    if dist.is_available() and dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def barrier() -> None:
    """Waits for all processes."""
    if world().size > 1:
        dist.barrier()


def total(parts: Tensor) -> Tensor:
    """The sum over the processes, in place, of numbers each counted on its own share."""
    if world().size > 1:
        dist.all_reduce(parts)
    return parts


def largest(number: int) -> int:
    """The largest over the processes."""
    if world().size == 1:
        return number
    on_gpu = dist.get_backend() == "nccl"
    held = torch.tensor(number, device=torch.cuda.current_device() if on_gpu else "cpu")
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def gather(items: list[T]) -> list[list[T]]:
    """Every process's list, by rank, in every process. The items are pickled."""
    size = world().size
    if size == 1:
        return [items]
    found: list[list[T]] = [[]] * size
    dist.all_gather_object(found, items)
    return found


def from_main(value: T) -> T:
    """The main process's value, in every process."""
    if world().size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T:
    """What the main process gets from `action`, in every process; only it acts.

    Raises:
        UserError, OSError: the main process's, in every process.
    """
    tried: tuple[Any, Any] = _tried(action) if world().is_main else (None, None)
    error, result = from_main(tried)
    if error is not None:
        raise error
    return result


def of_all(action: Callable[[], T]) -> list[T]:
    """What every process gets from `action`, by rank, in every process. The results are pickled.

    Raises:
        UserError, OSError: the first process's that has one, in every process: none waits for one
            that is gone, and the main process says what is wrong.
    """
    found = [one for (one,) in gather([_tried(action)])]
    for error, _ in found:
        if error is not None:
            raise error
    return [result for _, result in found]


def _tried(action: Callable[[], Any]) -> tuple[UserError | OSError | None, Any]:
    """What is wrong, and the result; one process alone raises at once."""
    try:
        return None, action()
    except (UserError, OSError) as wrong:
        if world().size == 1:
            raise
        return wrong, None


def split(action: Callable[[T], S], items: Sequence[T]) -> list[S]:
    """`action` of every item, each done by one process; the results, in every process. No sharded
    weights may be used. Errors are `of_all`'s."""
    here = world()
    found = of_all(lambda: [action(item) for item in items[here.rank :: here.size]])
    return [found[i % here.size][i // here.size] for i in range(len(items))]


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Who takes which sequences: the longest first, each to whoever has the fewest tokens so far.

    Returns:
        `size` lists of indices into `lengths`, each rising; the same in every process.
    """
    taken: list[list[int]] = [[] for _ in range(size)]
    tokens = [0] * size
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(size), key=lambda r: (tokens[r], r))
        taken[rank].append(i)
        tokens[rank] += lengths[i]
    return [sorted(rows) for rows in taken]


@dataclass(frozen=True)
class Micro:
    """One forward and backward pass of this process."""

    rows: list[int]
    """Which sequences; never empty."""
    counts: bool = True
    """False for a pass that is made only because another process has one more, and all must gather
    the weights as often."""

    def divisor(self, total: float) -> float:
        """What sums over this pass are divided by to be parts of a mean over `total`: infinity,
        where they do not count."""
        return total if self.counts else math.inf


def plan_micros(
    batch: Sequence[int],
    lengths: Sequence[int],
    budget: int,
    size: int,
    prompts: Prompts | None = None,
) -> list[list[Micro]]:
    """The passes of every process over one batch, as many for each of them.

    Sequences of one prompt stay together in one pass, unless they have more tokens than a pass or
    than a process's even share of the batch.

    Args:
        batch: the sequences of the step.
        lengths: tokens of each sequence there is, not only of the batch's.
        budget: most tokens of one pass.
        size: number of processes.
        prompts: of each sequence there is, where those of one prompt share it.
    """
    pieces = [[i] for i in batch]
    if prompts is not None:
        together = batches_of(batch, lengths, sum(lengths[i] for i in batch), prompts)
        room = min(budget, -(-sum(held(together, lengths, prompts)[0]) // size))
        of_prompt: dict[int, list[int]] = {}
        for i in batch:
            of_prompt.setdefault(prompts.ids[i], []).append(i)
        groups = of_prompt.values()
        pieces = [p for rows in groups for p in batches_of(rows, lengths, room, prompts)]
    place = {i: k for k, i in enumerate(batch)}
    plans = []
    for taken in shares([sum(held([piece], lengths, prompts)[0]) for piece in pieces], size):
        own = sorted((i for k in taken for i in pieces[k]), key=lambda i: place[i])
        plans.append([Micro(rows) for rows in batches_of(own, lengths, budget, prompts)])
    most = max(len(plan) for plan in plans)
    idle = Micro([min(batch, key=lambda i: lengths[i])], counts=False)
    return [plan + [idle] * (most - len(plan)) for plan in plans]


def passes(
    batch: Sequence[int], lengths: Sequence[int], budget: int, prompts: Prompts | None = None
) -> list[list[int]]:
    """The sequences of each pass that all processes together make over a batch, without those that
    do not count; arguments are those of `plan_micros`."""
    plans = plan_micros(batch, lengths, budget, world().size, prompts)
    return [micro.rows for plan in plans for micro in plan if micro.counts]


def micros(
    module: nn.Module,
    batch: Sequence[int],
    lengths: Sequence[int],
    budget: int,
    prompts: Prompts | None = None,
) -> Iterator[Micro]:
    """This process's passes over a batch, one after the other, each for a forward and a backward of
    `module`; the gradients of embeddings and head are summed over the processes after the last.

    Arguments are those of `plan_micros`. One process takes the sequences in the batch's order, but
    for those that share a prompt.
    """
    here = world()
    own = plan_micros(batch, lengths, budget, here.size, prompts)[here.rank]
    for k, micro in enumerate(own):
        last = k == len(own) - 1
        if here.size > 1 and is_sharded(module):
            module.set_requires_gradient_sync(last, recurse=False)  # type: ignore[operator]
            module.set_reshard_after_backward(last, recurse=False)  # type: ignore[operator]
        yield micro


def looks(lengths: Sequence[int], budget: int, prompts: Prompts | None = None) -> Iterator[Micro]:
    """This process's passes without gradients over all of some sequences, one after the other; what
    is not to count is only looked at. Arguments are those of `plan_micros`."""
    here = world()
    yield from plan_micros(range(len(lengths)), lengths, budget, here.size, prompts)[here.rank]


def is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def shard(module: nn.Module, *forwards: str) -> None:
    """Spreads the weights of `module` over the processes, in place; with one process, leaves it.

    Each transformer block is a unit of its own; the rest (embeddings, head, norms) is one more,
    which stays gathered from the forward to the backward pass, so that the loss head can read the
    weight in between.

    Args:
        module: holds a `transformers` model.
        forwards: names of its methods that run a forward pass, where that is not `forward`.
    """
    if world().size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    blanks = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters()
    }
    # In a list, so that it is no part of the module.
    module._unsharded = [copy.deepcopy(module, blanks)]  # type: ignore[assignment]
    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (world().size,))
    blocks: set[str] = set()
    for part in module.modules():
        blocks |= set(getattr(part, "_no_split_modules", None) or ())
    for part in list(module.modules()):
        if type(part).__name__ in blocks:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # Losses are parts of a sum over the processes, not means of each.
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
    # Hidden states are a view of the pack's one row. Nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    for name in forwards:
        register_fsdp_forward_method(module, name)


def let_go(module: nn.Module) -> None:
    """Ends what a pass without gradients leaves gathered, so that `parameters()` are the shards."""
    if is_sharded(module):
        module.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, on every process; a plain one as it is."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; a plain one as it is."""
    part = getattr(tensor, "to_local", None)
    return part() if part is not None else tensor


def unsharded(module: nn.Module) -> nn.Module | None:
    """The module with whole weights, on the CPU and to be saved, in the main process; None in the
    others. All processes must call. A module that is not sharded is what it is."""
    if not is_sharded(module):
        return module if world().is_main else None
    blank: nn.Module = module._unsharded[0]  # type: ignore[index, assignment, union-attr]
    weights: dict[int, Any] = {}
    pairs = zip(blank.named_parameters(), module.named_parameters(), strict=True)
    for (name, empty), (own_name, parameter) in pairs:
        assert name == own_name
        full = whole(parameter.detach())
        if world().is_main:
            weights[id(empty)] = nn.Parameter(full.cpu(), requires_grad=empty.requires_grad)
    if not world().is_main:
        return None
    found = copy.deepcopy(blank, weights).cpu()
    for buffer, own in zip(found.buffers(), module.buffers(), strict=True):
        buffer.copy_(own)
    return found
