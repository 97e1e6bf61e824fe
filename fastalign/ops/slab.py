"""The matrix products of the loss head, slab by slab: what linear_logprobs and linear_loss share.

    Z = H_slab W^T (+ bias)     ``slab_logits``, into a workspace that every slab reuses
    dH_slab = dZ W              ``HeadGradients.add``
    dW += dZ^T H_slab           ``HeadGradients.add``, accumulated in float32 whatever the operands

Rows whose target is ignored are dropped before the first product (``Rows``).
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastalign.backend import refuse_forward_mode
from fastalign.ops.token_logprobs import FLOAT_DTYPES, accumulation_dtype

# Stands for "no row is ignored" where an op wants an integer (32 bits, as -100): no target is this
# small.
IGNORE_NOTHING = -(1 << 31)
WIDENED_BYTES = 16 << 20
KEPT_BYTES = 512 << 20
_kept = threading.local()
T = TypeVar("T")


class Rows:
    """The rows that count. ``count`` needs one wait for the device, unless ``ignore_index`` is
    IGNORE_NOTHING or ``index``, the rows that count, is known."""

    def __init__(self, targets: Tensor, ignore_index: int, index: Tensor | None = None) -> None:
        self.total = targets.numel()
        self.index = index
        if index is None and ignore_index != IGNORE_NOTHING:
            index = (targets != ignore_index).nonzero()[:, 0]
            if index.numel() != self.total:
                self.index = index
        self.count = self.total if self.index is None else self.index.numel()

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop (counted among the kept ones) of x: a view when nothing was dropped."""
        return x[start:stop] if self.index is None else x[self.index[start:stop]]

    def take_temperature(self, temperature: Tensor, start: int, stop: int) -> Tensor:
        return temperature if temperature.numel() == 1 else self.take(temperature, start, stop)

    def scatter(self, x: Tensor) -> Tensor:
        """[count, ...] to [total, ...] with zeros at the dropped rows."""
        if self.index is None:
            return x
        return x.new_zeros(self.total, *x.shape[1:]).index_copy_(0, self.index, x)


def rows_ahead(targets: Tensor, ignore_index: int) -> tuple[int, Tensor | None, int]:
    """What is known of the rows before an op runs: how many it has to reckon with, which these are
    (None: all, or unknown), and the ``ignore_index`` that is left for the op to look for.

    torch.compile knows no values: all rows then, and the op drops some of them.
    """
    if torch.compiler.is_compiling() or type(targets) is not Tensor or targets.is_meta:
        return targets.numel(), None, ignore_index
    rows = Rows(targets, ignore_index)
    return rows.count, rows.index, IGNORE_NOTHING if rows.index is None else ignore_index


def _captured(device: torch.device) -> bool:
    """Whether work on the device goes into a CUDA graph, to be replayed later."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _numbers(numbers: list[int], device: torch.device) -> Tensor:
    """int64 [n] on the device, without a wait."""
    if _captured(device):
        # A copy would be replayed from host memory that is something else's by then; a fill's
        # number is in the graph.
        out = torch.empty(len(numbers), dtype=torch.int64, device=device)
        for place, number in zip(out, numbers, strict=True):
            place.fill_(number)
        return out
    host = torch.tensor(numbers, dtype=torch.int64)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


class Groups:
    """Where groups begin among the kept rows, on the host and on the device of the rows.

    Args:
        bounds: cu_seqlens over all rows. When rows were dropped, finding the bounds among the rest
            makes the host wait for a CUDA device once more.
        device: of the rows.
        per_group: sequences in a row that make up one group.
    """

    def __init__(
        self, bounds: list[int], rows: Rows, device: torch.device, per_group: int = 1
    ) -> None:
        self.tensor = _numbers(bounds, device)
        self.bounds = bounds
        if rows.index is not None:
            self.tensor = torch.searchsorted(rows.index, self.tensor)
            self.bounds = self.tensor.tolist()
        self.per_group, self.bounds = per_group, self.bounds[::per_group]
        self.index: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def drop_empty(self) -> None:
        """Leaves the groups out that have no row; for groups of one sequence."""
        found = [group for group, length in enumerate(self.lengths) if length > 0]
        if len(found) == self.count:
            return
        self.bounds = [self.bounds[group] for group in found] + self.bounds[-1:]
        device = self.tensor.device
        self.tensor = _numbers(self.bounds, device)
        self.index = _numbers(found, device)

    def take(self, x: Tensor, first: int, last: int) -> Tensor:
        """Of x, one value for every group that was given, those of the groups first..last."""
        return x[first:last] if self.index is None else x[self.index[first:last]]

    def put(self, x: Tensor, values: Tensor, first: int, last: int) -> None:
        """The same part of x becomes ``values``."""
        if self.index is None:
            x[first:last] = values
        else:
            x.index_copy_(0, self.index[first:last], values)

    def cu_seqlens(self, first: int, last: int) -> Tensor:
        """The bounds of the sequences of groups first..last, counted from the first row of them."""
        part = self.tensor[first * self.per_group : last * self.per_group + 1]
        return part - part[0]

    def slabs(self, size: int) -> list[tuple[int, int]]:
        """Ranges of groups, each of at most ``size`` rows in all (or one group)."""
        cuts, first = [], 0
        for group in range(1, self.count + 1):
            if group == self.count or self.bounds[group + 1] - self.bounds[first] > size:
                cuts.append((first, group))
                first = group
        return cuts


_MADV_HUGEPAGE = 14
_PAGE = 4096
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def fresh(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty that asks the system for huge pages on a CPU.

    Large tensors come from the system anew each time, page by page as they are first written: for
    the weight's gradient that costs a quarter of the product that fills it, with pages of 4 KiB.
    """
    x = torch.empty(shape, dtype=dtype, device=device)
    size = x.numel() * x.element_size()
    if _libc is None or device.type != "cpu" or type(x) is not Tensor or size < WIDENED_BYTES:
        return x
    if not torch.compiler.is_compiling():
        start = -(-x.data_ptr() // _PAGE) * _PAGE
        length = (x.data_ptr() + size - start) // _PAGE * _PAGE
        # Advice: where the system does not take it, nothing is lost.
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return x


@contextmanager
def logits_workspace(rows: int, vocab: int, like: Tensor) -> Iterator[Tensor]:
    """[rows, vocab] numbers of any content in ``like``'s dtype and device.

    On a CPU each thread keeps its last workspace of up to KEPT_BYTES, because fresh memory comes
    page by page from the operating system.
    """
    # Fake tensors and other subclasses make workspaces of their own kind, not to be kept.
    if like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter):
        yield like.new_empty(rows, vocab)
        return
    need = rows * vocab * like.element_size()
    # Taken out while in use: a loss may call the loss head again.
    buffer, _kept.buffer = getattr(_kept, "buffer", None), None
    if buffer is None or buffer.numel() < need:
        with torch.inference_mode(False):
            buffer = fresh((need,), torch.uint8, like.device)
    yield buffer[:need].view(like.dtype).view(rows, vocab)
    if buffer.numel() <= KEPT_BYTES:
        _kept.buffer = buffer


def reserve(stack: ExitStack, rows: int, take: Callable[[int], T], fixed: bool = False) -> T:
    """take(rows), which enters workspaces into ``stack``; each time that a GPU is out of memory,
    again with half as many rows, unless their number is ``fixed``."""
    while True:
        try:
            return take(rows)
        except torch.OutOfMemoryError:
            if fixed or rows <= 1:
                raise
            stack.close()
        # Outside of the handler, which holds on to the failed attempt's memory.
        rows //= 2


def keep_if_room(kept: int, run: Callable[[int], T]) -> T:
    """run(kept), or run(0) where a GPU has no room for so many rows of logits."""
    try:
        return run(kept)
    except torch.OutOfMemoryError:
        if kept == 0:
            raise
    return run(0)


def filled(x: Tensor, rows: int) -> Tensor:
    """x [C, H] with rows of zeros behind it, up to ``rows``."""
    return x if len(x) == rows else torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))


def slab_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [C, V] = hidden [C, H] @ weight [V, H]^T (+ bias [V])."""
    if bias is None:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.addmm(bias, hidden, weight.t(), out=out)


class HeadGradients:
    """Collects dH, dW and dbias over the slabs. With one slab each is a single product in its own
    dtype.

    Args:
        slabs: how many ``add`` will bring.
        need: whether dH, dW and dbias are wanted.
        into: accumulation-dtype [V, H] that dW is added to, instead of being returned.
        unscaled: the dlogits are still to be scaled, so dW and dbias stay in accumulation dtype.
        share: factor of what is added to ``into``. A tensor makes the host wait for a CUDA device.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        slabs: int,
        need: tuple[bool, bool, bool],
        into: Tensor | None = None,
        unscaled: bool = False,
        share: float | Tensor = 1.0,
    ) -> None:
        self.weight = weight
        self.rows = rows
        self.into = into
        self.share = 1.0 if into is None else float(share)
        self.unscaled = unscaled
        wide = accumulation_dtype(weight.dtype)
        self.dhidden = self.dweight = self.dbias = None
        empty = rows.count == 0
        if need[0]:
            make = torch.empty if rows.index is None else torch.zeros
            self.dhidden = make(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        if into is not None:
            self.dweight = into
        elif need[1]:
            dtype = wide if slabs > 1 or unscaled else weight.dtype
            self.dweight = fresh(weight.shape, dtype, weight.device)
            if empty:
                self.dweight.zero_()
        if need[2] and bias is not None:
            self.dbias = torch.zeros(bias.shape, dtype=wide, device=bias.device)
        self.bias = bias
        self.first = into is None

    def add(self, dz: Tensor, hidden: Tensor, start: int, stop: int) -> None:
        """dz [C, V] and hidden [C, H] of the kept rows start..stop; rows beyond them are zero."""
        if self.dhidden is not None:
            own = len(dz) == stop - start
            if self.rows.index is None and own:
                torch.mm(dz, self.weight, out=self.dhidden[start:stop])
            else:
                part = torch.mm(dz, self.weight)[: stop - start]
                if self.rows.index is None:
                    self.dhidden[start:stop] = part
                else:
                    self.dhidden.index_copy_(0, self.rows.index[start:stop], part)
        if self.dweight is not None:
            self._add_weight(dz, hidden)
        if self.dbias is not None:
            # On a CPU a sum of narrow numbers first makes a float32 copy of them.
            columns = dz.shape[1] if dz.is_cuda or dz.dtype == self.dbias.dtype else _columns(dz)
            for out, part in zip(self.dbias.split(columns), dz.split(columns, dim=1), strict=True):
                out += part.sum(0, dtype=out.dtype)
        self.first = False

    def _add_weight(self, dz: Tensor, hidden: Tensor) -> None:
        out = self.dweight
        assert out is not None
        factors = {"beta": 0.0 if self.first else 1.0, "alpha": self.share}
        if out.dtype == dz.dtype:
            torch.addmm(out, dz.t(), hidden, **factors, out=out)
        elif out.is_cuda:
            # The operands stay narrow (tensor cores), the sum over slabs is float32.
            torch.addmm(out, dz.t(), hidden, out_dtype=out.dtype, **factors, out=out)
        else:
            # CPU products of narrow operands can only return narrow results, and rounding each
            # slab's part before adding it would bias the sum: widen the operands instead, some
            # columns at a time.
            wide = hidden.to(out.dtype)
            columns = _columns(dz)
            for rows, part in zip(out.split(columns), dz.split(columns, dim=1), strict=True):
                torch.addmm(rows, part.to(out.dtype).t(), wide, **factors, out=rows)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dH, dW and dbias in the dtypes of what they are gradients of."""
        dweight, dbias = None if self.into is not None else self.dweight, self.dbias
        if self.unscaled:
            return self.dhidden, dweight, dbias
        if dweight is not None:
            dweight = dweight.to(self.weight.dtype)
        if dbias is not None and self.bias is not None:
            dbias = dbias.to(self.bias.dtype)
        return self.dhidden, dweight, dbias


def _columns(dz: Tensor) -> int:
    """How many columns of dz take WIDENED_BYTES when they are float32."""
    return max(1, WIDENED_BYTES // (4 * max(1, len(dz))))


def check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError unless hidden [N, H], weight [V, H] and bias [V] fit, in one float dtype, on one
    device; NotImplementedError for tangents."""
    refuse_forward_mode(op, hidden, weight, bias)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: expected hidden [N, H] and weight [V, H], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1 or hidden.shape[1] < 1:
        raise ValueError(f"{op}: expected V >= 1 and H >= 1, got weight {tuple(weight.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            raise ValueError(
                f"{op}: expected {name} like hidden ({hidden.dtype} on {hidden.device}), "
                f"got {x.dtype} on {x.device}"
            )
    if hidden.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{op}: expected float hidden, got {hidden.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{op}: expected bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}"
        )


def check_softcap(op: str, softcap: float | None) -> float:
    """The soft-cap as the row kernels want it: 0 means none."""
    if softcap is None:
        return 0.0
    if not softcap > 0:
        raise ValueError(f"{op}: expected softcap > 0 or None, got {softcap}")
    return float(softcap)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtype of their operands, whatever autocast is on."""
    if not torch.amp.is_autocast_available(device.type):  # meta tensors
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def follow_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inside torch.autocast the head runs in autocast's dtype, as torch.nn.functional.linear
    does."""
    kind = hidden.device.type
    known = torch.amp.is_autocast_available(kind)  # not for meta tensors
    if not known or not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
