"""Which implementation runs: the defaults, what forces another one, and no silent fallback."""

from __future__ import annotations

import threading

import pytest
import torch

import fastalign as fa
from fastalign.backend import CPP_BUILT, choose


def test_the_extension_is_built() -> None:
    """Everything below and every C++ test would be empty without it."""
    assert CPP_BUILT


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, "cpp"), (torch.bfloat16, "cpp"), (torch.float64, "reference")],
    ids=str,
)
def test_default_on_cpu(dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTALIGN_BACKEND", raising=False)
    assert choose("op", torch.zeros(1, dtype=dtype)) == expected


def test_context_managers_nest_and_end() -> None:
    x = torch.zeros(1)
    before = choose("op", x)
    with fa.backend("cpp"):
        with fa.backend("reference"):
            assert choose("op", x) == "reference"
        assert choose("op", x) == "cpp"
    assert choose("op", x) == before
    with pytest.raises(KeyError), fa.backend("reference"):
        raise KeyError
    assert choose("op", x) == before


def test_all_threads_follow() -> None:
    """The backward pass runs in threads of its own: it must not take another backend."""
    seen = []
    with fa.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choose("op", torch.zeros(1))))
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTALIGN_BACKEND", "reference")
    assert choose("op", torch.zeros(1)) == "reference"
    with fa.backend("cpp"):
        assert choose("op", torch.zeros(1)) == "cpp"
    monkeypatch.setenv("FASTALIGN_BACKEND", "fortran")
    with pytest.raises(ValueError, match="FASTALIGN_BACKEND.*reference, cpp, triton.*'fortran'"):
        choose("op", torch.zeros(1))


def test_an_unknown_name_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="fastalign.backend.*got 'cuda'"):
        fa.backend("cuda")


def test_float64_with_a_kernel_is_an_error_not_a_fallback() -> None:
    for name in ("cpp", "triton"):
        with fa.backend(name), pytest.raises(RuntimeError, match="op: .*float64 has only the ref"):
            choose("op", torch.zeros(1, dtype=torch.float64))


def test_triton_without_gpu_and_interpreter_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with fa.backend("triton"), pytest.raises(RuntimeError, match="need CUDA tensors, or TRITON_I"):
        choose("op", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with fa.backend("triton"):
        assert choose("op", torch.zeros(1)) == "triton"


def test_the_backends_really_are_different_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference made to fail, C++ and Triton still answer."""
    import importlib

    module = importlib.import_module("fastalign.ops.token_logprobs")

    def fail(*args: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(module, "row_stats_reference", fail)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets = torch.zeros(2, dtype=torch.int64)
    with fa.backend("cpp"):
        one = fa.ops.token_logprobs(torch.zeros(2, 4), targets)
    with fa.backend("triton"):
        two = fa.ops.token_logprobs(torch.zeros(2, 4, device=device), targets.to(device))
    assert torch.equal(one, two.cpu())
    with fa.backend("reference"), pytest.raises(AssertionError, match="the reference ran"):
        fa.ops.token_logprobs(torch.zeros(2, 4), targets)


@pytest.mark.gpu
def test_default_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTALIGN_BACKEND", raising=False)
    x = torch.zeros(1, device="cuda")
    assert choose("op", x) == "triton"
    assert choose("op", x.double()) == "reference"
    with fa.backend("cpp"), pytest.raises(RuntimeError, match="for CPU tensors, got a tensor on"):
        choose("op", x)
