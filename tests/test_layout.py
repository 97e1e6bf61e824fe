"""The shape of the repository: the kernels link, one stem per op, what `import fastalign` costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Files in fastalign/ops that are part of other ops, not ops of their own.
PARTS = {"__init__", "plan", "slab", "linear_loss_call", "linear_loss_checks", "linear_loss_walk"}
PARTS |= {"policy_terms", "policy_reduce", "policy_loss_terms", "scan_inputs", "direct"}


def python(code: str, *flags: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=cwd, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr if flags else done.stdout


def test_kernels_is_a_link_without_init() -> None:
    """An __init__.py in kernels/ would make transformers take the folder for another package."""
    link = ROOT / "fastalign" / "kernels"
    assert link.is_symlink() and link.resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert sorted(path.name for path in link.glob("*.py"))


def test_transformers_works_beside_the_folder_kernels() -> None:
    """`python -c` puts the root, and with it kernels/, at the start of sys.path."""
    code = (
        "from transformers import GPT2Config, GPT2LMHeadModel\n"
        "GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))\n"
        "import fastalign.kernels.token_logprobs as k\n"
        "print(k.__name__)"
    )
    assert python(code).strip() == "fastalign.kernels.token_logprobs"


def test_import_is_light() -> None:
    heavy = "transformers triton matplotlib pyarrow datasets rich pandas jsonargparse yaml vllm"
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fastalign\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = set(python(code).split())
    assert "fastalign" in loaded
    assert loaded & set(heavy.split()) == set()


def test_import_takes_a_fifth_of_a_second_beside_torch() -> None:
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import fastalign\n"
        "print(time.process_time() - start)"
    )
    assert min(float(python(code)) for _ in range(3)) <= 0.2


def stems(folder: str, pattern: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob(pattern)}


def test_one_stem_per_op() -> None:
    """An op's hub names its kernels; tests, kernels and C++ bear the op's name."""
    ops = stems("fastalign/ops", "*.py") - PARTS
    assert {"token_logprobs", "linear_logprobs", "linear_loss", "gae"} <= ops
    tests = {stem.removeprefix("test_") for stem in stems("tests", "test_*.py")}
    assert ops - tests == set()
    assert stems("kernels", "*.py") - {"_device"} - PARTS <= ops
    assert stems("csrc", "*.cpp") - {"module"} <= ops


@pytest.mark.parametrize("folder", ["kernels", "csrc"])
def test_hubs_name_their_kernel_files(folder: str) -> None:
    for path in (ROOT / folder).glob("*"):
        if path.stem in ("module", "_device") or path.suffix not in (".py", ".cpp"):
            continue
        hub = (ROOT / "fastalign" / "ops" / f"{path.stem}.py").read_text()
        assert f"{folder}/{path.name}" in hub


def test_sizes_and_coefficients_are_never_compile_time_constants() -> None:
    """Each value of a constexpr is a compilation of its own; KIND and KL name formulas."""
    allowed = re.compile(r"(KIND|KL|BLOCK\w*|CHUNK\w*|HAS_\w+|PACKED|PER_ROW|SPLIT)$")
    for path in (ROOT / "kernels").glob("*.py"):
        names = re.findall(r"(\w+): tl\.constexpr", path.read_text())
        assert [name for name in names if not allowed.match(name)] == [], path.name


def test_version_is_the_packages() -> None:
    import fastalign

    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found is not None and fastalign.__version__ == found[1]
