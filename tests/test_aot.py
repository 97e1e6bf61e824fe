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


def test_no_atomics(report: dict[str, Any]) -> None:
    """Atomic adds finish in any order: results would differ from run to run."""
    assert [one for one in report["compiled"] if one["atomics"]] == []


def test_aligned_rows_load_16_bytes_at_once(report: dict[str, Any]) -> None:
    aligned = [one for one in report["compiled"] if "a multiple of 16" in one["launch"]]
    assert len(aligned) == 4 * len(ARCHS)
    assert {one["widest_load"] for one in aligned} == {4}


def test_one_compilation_for_all_numbers_of_tokens_and_temperatures(report: dict[str, Any]) -> None:
    assert report["one model"] == 1


def test_one_more_compilation_for_vocabularies_of_no_multiple_of_16(report: dict[str, Any]) -> None:
    assert report["any vocabulary"] == 2


def test_kl_compiles_once_for_aligned_rows_and_once_for_others(report: dict[str, Any]) -> None:
    assert report["kl of any shape"] == 2


def test_gae_compiles_once_per_feature_set(report: dict[str, Any]) -> None:
    assert report["gae of any shape"] == 6
