"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 within its budget, without a GPU.

And the number of different compilations does not grow with the shapes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

HERE = Path(__file__).parent
ARCHS = ("sm_80", "sm_90", "sm_100")
# What one block may take without asking for more than the default.
SHARED_LIMIT = 48 * 1024
REGISTER_FILE = 65536
# Registers of a thread and bytes of shared memory of a program, the most over all launches. The row
# kernels': what keeps enough programs on a multiprocessor for its share of the memory's speed
# (kernels/token_logprobs.py). The others': what they take, and little more.
BUDGETS = {
    "_row_parts_kernel": (96, 16),
    "_row_stats_kernel": (48, 0),
    "_dlogits_kernel": (72, 0),
    "_kl_parts_kernel": (96, 32),
    "_kl_stats_kernel": (64, 0),
    "_kl_dlogits_kernel": (96, 4_096),  # 0 but for logits of two widths
    "_policy_loss_kernel": (96, 16),
    "_policy_loss_sum_kernel": (40, 256),
    "_scan_kernel": (144, 512),  # (128, 256) but for vtrace, whose scan has twice the numbers
    "_scan_chunk_kernel": (88, 256),
    "_statistics_kernel": (96, 32),
    "_reward_heads_kernel": (208, 40_960),
    "_reward_heads_bwd_kernel": (255, 24_576),
    "_dscores_kernel": (96, 1_024),
    "_fold_kernel": (48, 0),
    "_reduce_scores_kernel": (48, 1_024),
    "_bradley_terry_loss_kernel": (80, 1_024),
    "_preference_loss_kernel": (80, 16),
    "_preference_loss_backward_kernel": (48, 0),
}


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The compilation runs in a process of its own: here Triton may be in interpreter mode."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, HERE / "aot_compile.py", *ARCHS],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_compiled(report: dict[str, Any]) -> None:
    sources = (HERE.parent / "kernels").glob("*.py")
    named = {
        name
        for source in sources
        for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.MULTILINE)
    }
    for arch in ARCHS:
        reached = {c["kernel"] for c in report["compiled"] if c["arch"] == arch}
        assert reached == named


def test_no_spills_and_little_shared_memory(report: dict[str, Any]) -> None:
    for one in report["compiled"]:
        assert one["stack"] == 0, one
        assert one["local"] == 0, one
        assert one["shared"] <= SHARED_LIMIT, one
        # At least two blocks fit on a multiprocessor.
        assert one["registers"] * 32 * one["warps"] <= REGISTER_FILE // 2, one


@pytest.mark.parametrize("kernel", BUDGETS)
def test_kernels_keep_their_budget(report: dict[str, Any], kernel: str) -> None:
    registers, shared = BUDGETS[kernel]
    ours = [one for one in report["compiled"] if one["kernel"] == kernel]
    assert {one["arch"] for one in ours} == set(ARCHS)
    assert max(one["registers"] for one in ours) <= registers
    assert max(one["shared"] for one in ours) <= shared


def test_offsets_of_rows_have_64_bits(report: dict[str, Any]) -> None:
    """Rows times columns may exceed 2^31."""
    assert [one for one in report["compiled"] if one["narrow_offsets"]] == []


def test_no_atomics(report: dict[str, Any]) -> None:
    """Atomic adds finish in any order: results would differ from run to run."""
    assert [one for one in report["compiled"] if one["atomics"]] == []


def test_aligned_rows_load_16_bytes_at_once(report: dict[str, Any]) -> None:
    aligned = [
        one
        for one in report["compiled"]
        if "a multiple of 16" in one["launch"] and not one["kernel"].endswith("_stats_kernel")
    ]
    # Two kernels, of 3 dtypes and of 4 pairs of them, with soft-cap and without.
    assert len(aligned) == 2 * (3 + 4) * 2 * len(ARCHS)
    assert {one["widest_load"] for one in aligned} == {4}


def test_rows_compile_once_per_kernel_dtype_and_flags(report: dict[str, Any]) -> None:
    """Of 12 for parts (dtype, soft-cap, aligned rows), 6 for stats, 24 for dlogits (entropy)."""
    assert report["feature sets of rows"] == 42
    assert report["rows of any shape"] == 42


def test_kl_compiles_once_per_kernel_dtype_and_flags(report: dict[str, Any]) -> None:
    """As many as of rows: the same flags."""
    assert report["feature sets of kl"] == 42
    assert report["kl of any shape"] == 42


def test_gae_compiles_once_per_feature_set(report: dict[str, Any]) -> None:
    assert report["gae of any shape"] == 6 + 2 + 1


def test_policy_loss_compiles_once_per_feature_set(report: dict[str, Any]) -> None:
    """Sums and per-token values are two forms of one kernel; the third adds up the sums."""
    assert report["policy loss of any size"] == 3


def test_reward_heads_compile_once_for_aligned_widths_and_once_for_others(
    report: dict[str, Any],
) -> None:
    assert report["heads of any shape"] == 2 + 1 + 2 + 2


def test_bradley_terry_compiles_once(report: dict[str, Any]) -> None:
    assert report["bradley-terry of any shape"] == 1


def test_preference_loss_compiles_once_each_way(report: dict[str, Any]) -> None:
    assert report["preference loss of any size"] == 2


def test_reward_shaping_compiles_once_per_feature_set(report: dict[str, Any]) -> None:
    """kl_estimate both ways; whiten's five kernels; token_rewards padded and packed, its sum."""
    assert report["shaping of any shape"] == 2 + 5 + 2 + 1
