"""linear_kl: against float64, every head feature, kept or recomputed logits, memory, products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.linear_kl import linear_kl, linear_kl_op, linear_kl_reference
from fastalign.ops.token_kl import token_kl
from fastalign.testing import assert_no_worse, peaked_head

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N, H, REF_H, V = 37, 24, 17, 203
MASK = torch.arange(N) % 5 != 0
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": dict(temperature=0.7),
    "temperature per token": dict(temperature=0.5 + torch.arange(N) / N),
    "biases": dict(bias=True),
    "soft-cap": dict(softcap=5.0),
    "all": dict(temperature=0.5 + torch.arange(N) / N, bias=True, softcap=5.0),
}
Model = tuple[Tensor, Tensor, Tensor]


def one_row(dtype: torch.dtype, ref_dtype: torch.dtype | None = None) -> int:
    """Bytes of both models' logits of one token."""
    return V * (dtype.itemsize + (ref_dtype or dtype).itemsize)


def make(dtype: torch.dtype, ref_dtype: torch.dtype | None = None) -> tuple[Model, Model]:
    """hidden, weight, bias of the policy and of a reference of another width."""
    models = []
    for seed, width, kind in ((0, H, dtype), (1, REF_H, ref_dtype or dtype)):
        hidden, weight, _ = peaked_head(N, width, V, dtype=kind, seed=seed)
        bias = torch.randn(V, generator=torch.Generator().manual_seed(seed)).to(kind)
        models.append((0.5 * hidden, weight, bias))
    return models[0], models[1]


def results(f: Any, tensors: list[Tensor]) -> list[Tensor]:
    """kl, and the gradients of a sum with another weight for each token."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    kl = f(*leaves)
    weights = torch.sin(torch.arange(1.0, 1.0 + len(kl), device=kl.device))
    return [kl.detach(), *torch.autograd.grad((kl * weights).sum(), leaves)]


def plain(settings: dict[str, Any], mask: Tensor, ref: list[Tensor]) -> Any:
    """linear_kl_reference as a function of the policy's tensors."""

    def f(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        t = torch.as_tensor(settings.get("temperature", 1.0), dtype=wide).reshape(-1)
        targets = torch.where(mask, 0, -100).to(h.device)
        ref_bias = None if b is None else ref[2]
        cap = settings.get("softcap", 0.0)
        return linear_kl_reference(
            h, w, ref[0], ref[1], targets, b, ref_bias, t.to(h.device), softcap=cap
        )

    return f


def compare(
    dtype: torch.dtype,
    features: dict[str, Any],
    workspace: int | None,
    ref_dtype: torch.dtype | None = None,
) -> None:
    policy, ref = make(dtype, ref_dtype)
    tensors = list(policy[: 3 if features.get("bias") else 2])
    settings = {k: v for k, v in features.items() if k != "bias"}

    def own(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        ref_bias = None if b is None else ref[2]
        kwargs = dict(bias=b, ref_bias=ref_bias, mask=MASK, workspace=workspace, **settings)
        return linear_kl(h, w, ref[0], ref[1], **kwargs)

    kernel = results(own, tensors)
    eager = results(plain(settings, MASK, list(ref)), tensors)
    wide = plain(settings, MASK, [x.double() for x in ref])
    truth = results(wide, [x.double() for x in tensors])
    for index, (got, rough, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, rough, true, dtype, grad=index >= 1)
    assert kernel[0].dtype == torch.float32 and kernel[0][MASK].min() > 0.0
    assert kernel[0][~MASK].abs().max() == kernel[1][~MASK].abs().max() == 0.0


@pytest.mark.parametrize("workspace_rows", [None, 16, 5], ids=["kept", "2 slabs", "6 slabs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_against_float64(
    features: dict[str, Any], dtype: torch.dtype, workspace_rows: int | None
) -> None:
    compare(dtype, features, workspace_rows and workspace_rows * one_row(dtype))


@pytest.mark.parametrize("workspace_rows", [None, 16], ids=["kept", "2 slabs"])
def test_a_reference_of_another_dtype(workspace_rows: int | None) -> None:
    for dtype, ref_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        workspace = workspace_rows and workspace_rows * one_row(dtype, ref_dtype)
        compare(dtype, FEATURES["all"], workspace, ref_dtype)


@pytest.mark.parametrize("workspace_rows", [None, 16], ids=["kept", "2 slabs"])
def test_triton_rows_in_the_slabs(workspace_rows: int | None) -> None:
    """With the Triton row kernels (interpreted without a GPU) the op still is the formula."""
    (h, w, _), (rh, rw, _) = make(torch.float32)
    workspace = workspace_rows and workspace_rows * one_row(torch.float32)
    device = "cuda" if CUDA else "cpu"
    ref = [rh.to(device), rw.to(device)]

    def own(x: Tensor, y: Tensor) -> Tensor:
        return linear_kl(x, y, *ref, mask=MASK.to(device), workspace=workspace)

    with fa.backend("triton"):
        kernel = results(own, [h.to(device), w.to(device)])
    with fa.backend("reference"):
        eager = results(own, [h.to(device), w.to(device)])
    truth = results(plain({}, MASK, [rh.double(), rw.double()]), [h.double(), w.double()])
    for index, (got, rough, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, rough, true, torch.float32, grad=index >= 1)


def test_it_is_token_kl_of_the_logits() -> None:
    (h, w, b), (rh, rw, rb) = make(torch.float32)
    got = linear_kl(h, w, rh, rw, bias=b, ref_bias=rb, temperature=0.8)
    want = token_kl(h @ w.t() + b, rh @ rw.t() + rb, temperature=0.8)
    assert_no_worse(got, want, want.double(), torch.float32)


@pytest.mark.parametrize("workspace_rows", [None, 16], ids=["kept", "2 slabs"])
def test_a_policy_that_is_its_reference_has_exactly_no_kl(workspace_rows: int | None) -> None:
    (h, w, _), _ = make(torch.float32)
    workspace = workspace_rows and workspace_rows * one_row(torch.float32)
    kl, dh, dw = results(lambda a, b: linear_kl(a, b, h, w, workspace=workspace), [h, w])
    assert kl.abs().max() == dh.abs().max() == dw.abs().max() == 0.0


def test_kept_and_recomputed_logits_give_the_same_bits() -> None:
    (h, w, b), (rh, rw, rb) = make(torch.float32)
    targets, t = torch.where(MASK, 0, -100), torch.ones(1)

    def with_slabs(keep: bool) -> list[Tensor]:
        return results(
            lambda x, y, z: linear_kl_op(
                x, y, z, rh, rw, rb, targets, t, 0.0, -100, None, N, N if keep else 0
            )[0],
            [h, w, b],
        )

    for kept, recomputed in zip(with_slabs(True), with_slabs(False), strict=True):
        assert torch.equal(kept, recomputed)


def test_backward_twice_through_kept_logits() -> None:
    """The kept logits must survive a backward pass with retain_graph."""
    (h, w, _), (rh, rw, _) = make(torch.float32)
    h.requires_grad_()
    kl = linear_kl(h, w, rh, rw).sum()
    first = torch.autograd.grad(kl, h, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(kl, h)[0])


def test_same_bits_again_and_independent_of_the_neighbours() -> None:
    (h, w, _), (rh, rw, _) = make(torch.float32)
    workspace = 16 * one_row(torch.float32)
    first = linear_kl(h, w, rh, rw, workspace=workspace)
    assert torch.equal(first, linear_kl(h, w, rh, rw, workspace=workspace))
    others = rh.clone()
    others[10:] = torch.randn(N - 10, REF_H)
    changed = linear_kl(h, w, others, rw, workspace=workspace)
    assert torch.equal(first[:10], changed[:10])
    assert not torch.equal(first[10:], changed[10:])


@pytest.mark.parametrize("dropped", ["all", "none of N = 0"])
def test_no_rows(dropped: str) -> None:
    (h, w, b), (rh, rw, _) = make(torch.float32)
    mask = torch.zeros(N, dtype=torch.bool)
    h[:], rh[:] = float("nan"), float("nan")
    if dropped != "all":
        h, rh, mask = h[:0], rh[:0], mask[:0]
    leaves = [h.requires_grad_(), w.requires_grad_(), b.requires_grad_()]
    kl = linear_kl(h, w, rh, rw, bias=b, mask=mask)
    for x in (kl, *torch.autograd.grad(kl.sum(), leaves)):
        assert x.abs().sum() == 0.0
    assert kl.shape == mask.shape


@pytest.mark.parametrize("workspace_rows", [None, 16], ids=["kept", "2 slabs"])
def test_dropped_rows_never_enter_a_product(workspace_rows: int | None) -> None:
    """NaN in either model's hidden state of a dropped row reaches neither output nor gradient."""
    (h, w, _), (rh, rw, _) = make(torch.float32)
    workspace = workspace_rows and workspace_rows * one_row(torch.float32)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return linear_kl(x, y, rh, rw, mask=MASK, workspace=workspace)

    clean = results(f, [h, w])
    h[~MASK], rh[~MASK] = float("nan"), float("inf")
    for a, b in zip(clean, results(f, [h, w]), strict=True):
        assert torch.equal(a, b)


def test_non_contiguous_input() -> None:
    (h, w, _), (rh, rw, _) = make(torch.float32)
    wide, ref_wide = (torch.stack((x, x), dim=2)[:, :, 0] for x in (h, rh))
    tall, ref_tall = (x.t().contiguous().t() for x in (w, rw))
    mask = torch.stack((MASK, MASK), dim=1)[:, 0]
    got = linear_kl(wide, tall, ref_wide, ref_tall, mask=mask)
    expected = linear_kl(h, w, rh, rw, mask=MASK)
    assert_no_worse(got, expected, expected.double(), torch.float32)


def test_autocast_is_followed() -> None:
    (h, w, _), (rh, rw, _) = make(torch.float32)
    w.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kl = linear_kl(h, w, rh, rw)
    kl.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32
    narrow = [x.bfloat16() for x in (h, w, rh, rw)]
    assert torch.equal(kl, linear_kl(*narrow))


def test_the_reference_model_gets_no_gradient() -> None:
    (h, w, _), ref = make(torch.float32)
    rh, rw, rb = (x.requires_grad_() for x in ref)
    assert not linear_kl(h, w, rh, rw, ref_bias=rb).requires_grad
    h.requires_grad_()
    linear_kl(h, w, rh, rw, ref_bias=rb).sum().backward()
    assert h.grad is not None and rh.grad is rw.grad is rb.grad is None


@pytest.mark.parametrize(
    ("hidden_grad", "weight_grad", "keep", "products"),
    [
        (False, False, False, 2 * 2),  # two slabs
        (True, False, True, 3),
        (True, True, True, 4),
        (True, False, False, 5 * 2),
        (True, True, False, 6 * 2),
    ],
)
def test_number_of_products(
    hidden_grad: bool, weight_grad: bool, keep: bool, products: int
) -> None:
    (h, w, _), (rh, rw, _) = make(torch.float32)
    h.requires_grad_(hidden_grad)
    w.requires_grad_(weight_grad)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kl = linear_kl(h, w, rh, rw, workspace=None if keep else 32 * one_row(torch.float32))
        if hidden_grad:
            kl.sum().backward()
    found = [e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm")]
    assert sum(found) == products


def test_no_logits_tensor_of_the_whole_batch() -> None:
    """Forward and backward in a workspace of 1 MiB: no allocation comes near N * V numbers.

    The logits would take 78 MiB per model, more than a thread keeps of its last workspace.
    """
    n, vocab, width = 4096, 5000, 8
    h, w, _ = peaked_head(n, width, vocab)
    rh, rw, _ = peaked_head(n, width, vocab, seed=1)
    h.requires_grad_()
    w.requires_grad_()

    def largest(workspace: int | None) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            linear_kl(h, w, rh, rw, workspace=workspace).sum().backward()
        return max(e.self_cpu_memory_usage for e in profile.events() or [])

    assert largest(1 << 20) <= 1 << 20
    assert largest(None) >= 4 * n * vocab  # so the test can fail


def test_opcheck() -> None:
    (h, w, b), (rh, rw, rb) = make(torch.float32)
    policy = [x.requires_grad_() for x in (h, w, b)]
    targets = torch.where(MASK, 0, -100)
    index = (targets != -100).nonzero()[:, 0]
    for known, keep in ((None, N), (None, 0), (index, index.numel())):
        args = (*policy, rh, rw, rb, targets, torch.ones(1), 0.0, -100, known, 16, keep)
        torch.library.opcheck(linear_kl_op, args)


@pytest.mark.parametrize("workspace_rows", [None, 16], ids=["kept", "2 slabs"])
def test_compiles_whole_with_gradients(workspace_rows: int | None) -> None:
    (h, w, _), (rh, rw, _) = make(torch.float32)
    workspace = workspace_rows and workspace_rows * one_row(torch.float32)

    def f(x: Tensor, y: Tensor) -> Tensor:
        return linear_kl(x * 1.0, y, rh, rw, mask=MASK, workspace=workspace)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(compiled, [h, w]), results(f, [h, w]), strict=True):
        assert torch.equal(a, b)


def test_gradcheck() -> None:
    h, w, _ = peaked_head(4, 3, 9, dtype=torch.float64)
    rh, rw, _ = peaked_head(4, 5, 9, dtype=torch.float64, seed=1)
    mask = torch.tensor([True, False, True, True])
    b = torch.randn(9, dtype=torch.float64)

    def f(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        settings: dict[str, Any] = dict(temperature=0.7, softcap=4.0, workspace=2 * 9 * 16)
        return linear_kl(x, y, rh, rw, bias=z, mask=mask, **settings)

    assert torch.autograd.gradcheck(f, (h.requires_grad_(), w.requires_grad_(), b.requires_grad_()))


def bad_cases() -> dict[str, tuple[dict[str, Any], str]]:
    return {
        "width": (dict(weight=torch.zeros(7, 3)), r"\(4, 5\) and \(7, 3\)"),
        "reference width": (
            dict(ref_weight=torch.zeros(7, 5)),
            r"reference: expected hidden \[N, H\].*\(4, 6\) and \(7, 5\)",
        ),
        "tokens": (dict(ref_hidden=torch.zeros(3, 6)), r"ref_hidden \[4, H'\].*got \(3, 6\)"),
        "vocabulary": (dict(ref_weight=torch.zeros(8, 6)), r"ref_weight \[7, H'\].*and \(8, 6\)"),
        "one float64": (
            dict(ref_hidden=torch.zeros(4, 6).double(), ref_weight=torch.zeros(7, 6).double()),
            "float ref_hidden.*got torch.float64 beside torch.float32",
        ),
        "reference bias": (dict(ref_bias=torch.zeros(6)), r"bias of shape \(7,\), got \(6,\)"),
        "mask": (dict(mask=torch.ones(4)), "mask of shape.*bool.*got.*float32"),
        "temperature": (dict(temperature=-1.0), "temperature > 0, got -1.0"),
        "softcap": (dict(softcap=0.0), "softcap > 0 or None, got 0.0"),
        "workspace": (dict(workspace=55), "workspace >= 56 bytes.*7 logits of both.*got 55"),
    }


@pytest.mark.parametrize("name", bad_cases())
def test_bad_input_is_named(name: str) -> None:
    changed, message = bad_cases()[name]
    kwargs: dict[str, Any] = {
        "hidden": torch.zeros(4, 5),
        "weight": torch.zeros(7, 5),
        "ref_hidden": torch.zeros(4, 6),
        "ref_weight": torch.zeros(7, 6),
    }
    kwargs.update(changed)
    with pytest.raises(ValueError, match=f"linear_kl: .*{message}"):
        linear_kl(**kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [None, 64 << 20], ids=["default", "64 MiB"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gpu_at_real_sizes(dtype: torch.dtype, workspace: int | None) -> None:
    h, w, _ = peaked_head(2048, 1024, 32_000, dtype=dtype, device="cuda")
    rh, rw, _ = peaked_head(2048, 512, 32_000, dtype=dtype, device="cuda", seed=1)
    mask = torch.arange(2048, device="cuda") % 3 != 0
    kernel = results(lambda a, b: linear_kl(a, b, rh, rw, mask=mask, workspace=workspace), [h, w])
    eager = results(plain({}, mask, [rh, rw]), [h, w])
    wide = plain({}, mask, [rh.double(), rw.double()])
    truth = results(wide, [h.double(), w.double()])
    for index, (got, rough, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert_no_worse(got, rough, true, dtype, grad=index >= 1)


@pytest.mark.gpu
def test_gpu_never_waits_when_nothing_is_dropped() -> None:
    h, w, _ = peaked_head(64, 32, 500, dtype=torch.bfloat16, device="cuda")
    rh, rw, _ = peaked_head(64, 16, 500, dtype=torch.bfloat16, device="cuda", seed=1)
    h.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_kl(h, w, rh, rw).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert h.grad is not None and h.grad.isfinite().all()
