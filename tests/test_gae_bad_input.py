"""gae: what it refuses, and with which words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastalign.ops import gae

ROW, FLAT = torch.zeros(2, 3), torch.zeros(6)
OFFSETS = torch.tensor([0, 3, 6], dtype=torch.int64)
HUGE = torch.zeros(1).expand(2**31)


def test_offsets_are_checked_in_a_compiled_graph() -> None:
    """What they hold is known only when the graph runs."""

    def packed(x: Tensor, offsets: Tensor) -> Tensor:
        return gae(x, x, cu_seqlens=offsets)[0]

    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    right = torch.tensor([0, 2, 6])
    assert torch.equal(compiled(FLAT, right), packed(FLAT, right))
    for wrong in ([0, 3, 5], [0, 7, 6], [1, 3, 6], [0, 3, 2**32 + 6]):
        with pytest.raises(ValueError, match="gae: expected cu_seqlens to rise from 0 to N = 6"):
            compiled(FLAT, torch.tensor(wrong))


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((FLAT, FLAT), {}, r"gae: expected rewards \[B, T\] without cu_seqlens, got shape \(6,\)"),
        ((ROW, ROW), {"cu_seqlens": OFFSETS}, r"rewards \[N\] with cu_seqlens, got shape \(2, 3\)"),
        ((ROW, torch.zeros(3, 2)), {}, r"values of the shape of rewards, \(2, 3\), got \(3, 2\)"),
        ((ROW, ROW), {"mask": torch.ones(2, 2).bool()}, r"mask of the shape.*got \(2, 2\)"),
        ((ROW, ROW), {"mask": ROW}, "bool or integer mask, got torch.float32"),
        ((ROW.long(), ROW), {}, "rewards of a floating dtype, got torch.int64"),
        ((ROW, ROW), {"bootstrap": torch.zeros(3)}, r"bootstrap of shape \(2,\).*got \(3,\)"),
        ((ROW, ROW), {"lam": torch.zeros(2, 1)}, r"lam of shape \(2,\).*got \(2, 1\)"),
        ((ROW, ROW), {"gamma": 1.5}, r"gamma in \[0, 1\], got 1.5"),
        ((ROW, ROW), {"lam": float("nan")}, r"lam in \[0, 1\], got nan"),
        ((FLAT, FLAT), {"cu_seqlens": OFFSETS.float()}, "int32 or int64 cu_seqlens, got"),
        ((FLAT, FLAT), {"cu_seqlens": OFFSETS[None]}, r"cu_seqlens \[S \+ 1\], got shape \(1, 3\)"),
        ((FLAT, FLAT), {"cu_seqlens": OFFSETS[:2]}, "rise from 0 to N = 6, got 0 to 3$"),
        ((FLAT, FLAT), {"cu_seqlens": OFFSETS.flip(0)}, "got 6 to 0, falling in between"),
        ((FLAT, FLAT), {"cu_seqlens": OFFSETS + 2**32}, "got 4294967296 to 4294967302"),
        ((FLAT, FLAT), {"cu_seqlens": OFFSETS[:0]}, r"cu_seqlens \[S \+ 1\], got shape \(0,\)"),
        ((HUGE, HUGE), {"cu_seqlens": OFFSETS}, "at most 2147483647 packed tokens, got 2147483648"),
        ((ROW, ROW.to("meta")), {}, "values on the device of rewards, cpu, got meta"),
    ],
)
def test_bad_input(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gae(*args, **kwargs)
