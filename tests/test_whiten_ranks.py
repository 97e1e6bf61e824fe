"""Whitening by the statistics of all ranks of a process group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastalign.ops import whiten
from fastalign.testing import assert_no_worse

RANK_PROGRAM = """
import sys
import torch
import torch.distributed as dist
from fastalign.ops import whiten
from fastalign.train.distributed import finish
from fastalign.train.moments import RunningMoments

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
group = dist.group.WORLD
given = torch.load(f"{folder}/given.pt")
results = {}
for name, cells, masks in given:
    x, mask = cells[rank], None if masks is None else masks[rank]
    results[name] = [whiten(x, mask, shift_mean=s, group=group) for s in (True, False)]
    kept = (x if mask is None else x[mask]).double()
    variance = kept.var() if kept.numel() > 1 else kept.sum() * 0.0
    mean = kept.mean() if kept.numel() else kept.sum()
    own = torch.stack([torch.tensor(kept.numel()).double(), mean, variance])
    results[f"{name}, statistics"] = whiten(x, mask, group=group, statistics=own)
moments = RunningMoments()
for name, cells, masks in given[:2]:
    moments.update(cells[rank], None if masks is None else masks[rank], group)
results["moments"] = moments.state_dict()
try:
    whiten(x.float().requires_grad_(), group=group)
except ValueError as error:
    results["error"] = str(error)
torch.save(results, f"{folder}/rank{rank}.pt")
finish()
"""


def test_two_ranks_are_one_process_on_all_cells(tmp_path: Path) -> None:
    """Unequal numbers of cells; one rank that keeps none; float64."""
    from fastalign.train.moments import RunningMoments

    first, second = torch.randn(3, 40), 5.0 + 9.0 * torch.randn(7, 11)
    mask = torch.rand(3, 40) < 0.5
    none = torch.zeros(7, 11, dtype=torch.bool)
    given = [
        ("plain", [first, second], None),
        ("one keeps none", [first, second], [mask, none]),
        ("bfloat16", [first.bfloat16(), second.bfloat16()], [mask, ~none]),
        ("float64", [first.double(), second.double()], None),
        ("nothing kept", [first, second], [mask & False, none]),
    ]
    torch.save(given, tmp_path / "given.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM, tmp_path, str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for name, cells, masks in given:
        x = torch.cat([c.flatten() for c in cells])
        kept = None if masks is None else torch.cat([m.flatten() for m in masks])
        for i, shift_mean in enumerate((True, False)):
            one = whiten(x, kept, shift_mean=shift_mean)
            both = torch.cat([result[name][i].flatten() for result in results])
            assert both.dtype == one.dtype
            truth = whiten(x.double(), kept, shift_mean=shift_mean)
            assert_no_worse(both, one, truth, one.dtype)
            if shift_mean:  # each rank gave the statistics of its own cells
                parts = [result[f"{name}, statistics"].flatten() for result in results]
                assert_no_worse(torch.cat(parts), one, truth, one.dtype)
    assert results[0]["moments"] == results[1]["moments"]  # to the last bit
    moments = RunningMoments()
    for x, kept in [(first, None), (second, None), (first, mask), (second, none)]:
        moments.update(x, kept)
    assert results[0]["moments"] == pytest.approx(moments.state_dict(), rel=1e-6)
    assert results[0]["moments"]["count"] == 197 + int(mask.sum())
    assert results[0]["error"] == "whiten: expected an x that requires no gradient with a group"
