"""What is shipped: every package, the sources in the sdist, a stable ABI, and life without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import fastalign

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree as it comes out of version control: nothing compiled."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("fastalign", "kernels", "csrc"):
        built = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=built)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(code: str, folder: Path) -> str:
    # An editable installation's finder would offer its own fastalign._C to the copy.
    apart = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", apart + code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_the_extension_the_reference_runs_and_says_so_once(copy: Path) -> None:
    code = """
import warnings, torch
import fastalign as fa
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        logp = fa.ops.token_logprobs(torch.zeros(2, 8), torch.tensor([0, 7]))
        advantages, returns = fa.ops.gae(torch.ones(1, 2), torch.zeros(1, 2), lam=1.0)
try:
    with fa.backend("cpp"):
        fa.ops.token_logprobs(torch.zeros(2, 8), torch.tensor([0, 7]))
except RuntimeError as error:
    print("refused:", error)
print("from", fa.__file__)
print(*(w.message for w in said), sep="|")
print(logp.exp().tolist(), advantages.tolist())
"""
    refused, origin, said, numbers = run(code, copy).splitlines()
    assert origin == f"from {copy / 'fastalign' / '__init__.py'}"
    assert said.count("the C++ extension is not built") == 1 and "|" not in said
    assert "backend 'cpp' was asked for, but the C++ extension is not built" in refused
    assert numbers == "[0.125, 0.125] [[2.0, 1.0]]"


def test_every_folder_of_the_package_is_shipped() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    package = Path(fastalign.__file__).parent
    folders = {f"fastalign.{path.parent.name}" for path in package.glob("*/*.py")}
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == folders | {"fastalign"}


def test_source_distribution_holds_all_that_a_build_needs(copy: Path) -> None:
    run("from setuptools import build_meta; build_meta.build_sdist('dist')", copy)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    for path in (ROOT / "fastalign").rglob("*.py"):
        wanted.add(str(path.relative_to(ROOT)))
    for path in (ROOT / "kernels").glob("*.py"):
        wanted.add(f"fastalign/kernels/{path.name}")
    wanted |= {"fastalign/py.typed", "fastalign/_C.pyi", "LICENSE", "README.md", "setup.py"}
    assert wanted - held == set()
    assert not {name for name in held if name.startswith("tests/") or name.endswith(".so")}


def test_the_extension_uses_the_stable_abi_only() -> None:
    """One wheel serves torch >= 2.10: no symbol of at:: or c10:: may be asked for."""
    (library,) = (ROOT / "fastalign").glob("_C*.so")
    assert library.name == "_C.abi3.so"
    done = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    wanted = [line.split()[-1] for line in done.stdout.splitlines()]
    assert "aoti_torch_get_numel" in wanted
    assert [name for name in wanted if re.match(r"_ZN?K?(2at|3c10|5torch)", name)] == []
    limited = {
        "PyErr_Occurred",
        "PyErr_SetString",
        "PyEval_RestoreThread",
        "PyEval_SaveThread",
        "PyExc_RuntimeError",
        "PyExc_TypeError",
        "PyFloat_AsDouble",
        "PyLong_AsLongLong",
        "PyModule_Create2",
        "_Py_NoneStruct",
    }
    assert {name for name in wanted if re.match(r"_?Py", name)} == limited  # Python's stable ABI
