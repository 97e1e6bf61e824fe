"""The C++ kernels by address, for ops that have checked their tensors.

torch's dispatcher takes longer for the arguments of a loss than the loss of some 10,000 tokens; a
function of ``fastalign._C`` (csrc/direct.h) takes the addresses of its tensors, and gives the bits
that the op of the same name in ``torch.ops.fastalign_cpp`` gives.

Tests: tests/test_direct.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fastalign.backend import PLAIN, plain

# The codes of dtypes, in the order of csrc/direct.h.
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.bool,
    torch.int32,
    torch.int64,
)
CODES = {dtype: code for code, dtype in enumerate(DTYPES)}


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel may take the addresses of the tensors: no tracer, and no dispatch mode
    (make_fx's, a counter of operations), must see an op, and none only stands for another, without
    memory of its own."""
    for other in others:
        if other is not None and type(other) not in PLAIN:
            return False
    return plain(x) and torch._C._len_torch_dispatch_stack() == 0


def dense(x: Tensor) -> Tensor:
    """``x`` with its elements side by side in memory, as they are (torch may put off a sign)."""
    if not x.is_contiguous():
        x = x.contiguous()
    return x.resolve_neg() if x.is_neg() else x


def address(x: Tensor | None) -> int:
    """0 for None."""
    return 0 if x is None else x.data_ptr()


class Statistics(Mapping[str, Tensor]):
    """Named statistics of a call: views of the one tensor that a kernel filled, made when they are
    asked for.

    Args:
        found: the kernel's statistics; an entry is ``found[row]``.
        rows: the row of each name.
        others: entries that are no row of it, or functions that make them.
    """

    def __init__(
        self,
        found: Tensor,
        rows: Mapping[str, int],
        others: Mapping[str, Tensor | Callable[[], Tensor]] | None = None,
    ) -> None:
        self._found, self._rows, self._others = found, rows, others or {}

    def __getitem__(self, name: str) -> Tensor:
        row = self._rows.get(name)
        if row is not None:
            return self._found[row]
        other = self._others[name]
        return other if isinstance(other, Tensor) else other()

    def __iter__(self) -> Iterator[str]:
        yield from self._rows
        yield from self._others

    def __len__(self) -> int:
        return len(self._rows) + len(self._others)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __or__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**other, **self}
