"""policy_loss: three backends against float64, loss objects and autograd; compile, opcheck."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from policies import (
    ALL,
    CUDA,
    GSPO,
    KERNELS,
    LOSSES,
    OFFSETS,
    Batch,
    batch,
    call,
    compare,
    critic,
    device_of,
    inputs_of,
    run,
)
from torch import Tensor

import fastalign as fa
from fastalign.losses import APA, AWR, MLE, PPO, ValueLoss, effective_sample_size
from fastalign.ops.policy_loss import (
    _policy_loss,
    policy_loss,
    value_loss,
)
from fastalign.ops.policy_loss_terms import fused, policy_loss_terms, policy_loss_terms_op
from fastalign.ops.policy_terms import KINDS
from fastalign.testing import TOLERANCES, assert_no_worse

DOUBLE = TOLERANCES[torch.float64]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_against_float64(backend: str, name: str) -> None:
    compare(backend, call(LOSSES[name]), batch(1301))


@pytest.mark.parametrize("clip", [None, 0.3], ids=["plain", "clipped"])
@pytest.mark.parametrize("name", ["ppo all", "cispo", "mle"])
@pytest.mark.parametrize("backend", KERNELS)
def test_actor_critic_against_float64(backend: str, name: str, clip: float | None) -> None:
    mask = torch.rand(31, 37) < 0.7
    compare(
        backend, critic(LOSSES[name], clip, mask=mask, reduction="sequence_mean"), batch(31, 37)
    )


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("reduction", ["sequence_mean", "sum"])
@pytest.mark.parametrize("loss", [PPO(kl_coef=0.1), GSPO], ids=["ppo", "gspo"])
@pytest.mark.parametrize("backend", KERNELS)
def test_sequences_against_float64(backend: str, loss: Any, reduction: str, masked: bool) -> None:
    options: dict[str, Any] = {"reduction": reduction}
    mask = torch.rand(1302) < 0.6
    if masked:
        options["mask"] = mask[:-1]
    compare(backend, call(loss, cu_seqlens=torch.tensor(OFFSETS), **options), batch(1301))
    if masked:
        options["mask"] = mask.view(31, 42)
    compare(backend, call(loss, **options), batch(31, 42))


@pytest.mark.parametrize("shape", [(0,), (1,), (15,), (1024,), (1025,), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("backend", ALL)
def test_sizes(backend: str, shape: tuple[int, ...]) -> None:
    b, loss = batch(*shape), LOSSES["ppo all"]
    reduction = "sequence_mean" if len(shape) == 2 else "token_mean"
    compare(backend, critic(loss, 0.3, reduction=reduction), b)
    if 0 in shape:
        found = run(backend, critic(loss, 0.3, reduction=reduction), b)
        assert found["loss"] == 0.0 and found["dlogp"].shape == shape


def expected(loss: Any, b: Batch, mask: Tensor, reduction: str, offsets: Tensor) -> Tensor:
    """From the loss object alone: kept tokens packed, each sequence for itself."""
    bounds = torch.cat([torch.zeros(1), mask.cumsum(0)])[offsets].long()
    kept = {name: x[mask] for name, x in b.items()}
    inputs = inputs_of(loss, kept)
    if getattr(loss, "per_sequence", False):
        values = loss(kept["logp"], kept["entropy"], cu_seqlens=bounds, **inputs)
        return values.sum() / ((bounds.diff() > 0).sum() if reduction == "sequence_mean" else 1)
    values = loss(kept["logp"], kept["entropy"], **inputs)
    if reduction == "token_mean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    means = [values[a:z].mean() for a, z in zip(bounds, bounds[1:], strict=False) if z > a]
    return torch.stack(means).mean()


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum"])
@pytest.mark.parametrize("name", [*LOSSES, "gspo"])
def test_the_reference_is_the_loss_object_and_its_autograd(name: str, reduction: str) -> None:
    loss = LOSSES.get(name, GSPO)
    if name == "gspo" and reduction == "token_mean":
        pytest.raises(ValueError, call(loss, reduction=reduction), batch(4, 5)).match(
            "per sequence"
        )
        return
    b, offsets = batch(1301, dtype=torch.float64), torch.tensor(OFFSETS)
    mask = torch.rand(1301) < 0.6
    mask[:3] = False
    options = {"mask": mask, "cu_seqlens": offsets, "reduction": reduction}
    found = run("reference", call(loss, **options), b)
    leaves = {name: b[name].requires_grad_() for name in ("logp", "entropy")}
    true = expected(loss, b, mask, reduction, offsets)
    slopes = torch.autograd.grad(true, list(leaves.values()), allow_unused=True)
    assert abs(found["loss"].item() - true.item()) <= DOUBLE.floor * max(1.0, abs(true.item()))
    for leaf, slope in zip(leaves, slopes, strict=True):
        assert (slope is None or not slope.any()) == (f"d{leaf}" not in found)
        if f"d{leaf}" in found:
            worst = (found[f"d{leaf}"] - slope).abs().max() / slope.abs().max()
            assert worst <= DOUBLE.grad_floor


@pytest.mark.parametrize("name", [*LOSSES, "gspo"])
def test_statistics_are_the_loss_objects_means(name: str) -> None:
    loss, b = LOSSES.get(name, GSPO), batch(1301, dtype=torch.float64)
    offsets = torch.tensor(OFFSETS)
    found = run("reference", call(loss, cu_seqlens=offsets), b)
    rest = {"cu_seqlens": offsets} if name == "gspo" else {}
    own = loss.statistics(b["logp"], b["entropy"], **inputs_of(loss, b), **rest)
    own |= {"entropy": b["entropy"]}
    for other in ("ref", "old"):
        for kind in ("k1", "k2", "k3"):
            own[f"{other}_{kind}"] = fa.ops.kl_estimate(b["logp"], b[f"{other}_logp"], kind)
    if name == "awr free":
        del own["clip_fraction"]
    own.setdefault("ratio", torch.exp(b["logp"] - b["old_logp"]))
    for key, values in own.items():
        assert abs(found.pop(key).item() - values.mean().item()) <= 10 * DOUBLE.floor, key
    if "weight" in own:
        size = found.pop("effective_sample_size").item()
        assert round(size, 9) == round(effective_sample_size(own["weight"]).item(), 9)
    assert set(found) <= {"loss", "dlogp", "dentropy"}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", ALL)
def test_terms_per_token(backend: str, name: str) -> None:
    loss, b = LOSSES[name], batch(1301)
    if name == "mle":
        b["weights"] = b["advantages"]
    device = device_of(backend)

    def terms(b: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        given = inputs_of(loss, b) | {name: b[name] for name in loss.optional if name in b}
        return policy_loss_terms(loss, b["logp"], b["entropy"], given)

    with fa.backend(backend):
        kernel = terms({k: x.to(device) for k, x in b.items()})
    with fa.backend("reference"):
        eager = terms(b)
    wide = {k: x.double() for k, x in b.items()}
    leaves = [wide[k].requires_grad_() for k in ("logp", "entropy")]
    given = inputs_of(loss, wide) | {k: wide[k] for k in loss.optional if k in wide}
    values = loss(leaves[0], leaves[1], **given)
    slopes = torch.autograd.grad(values.sum(), leaves, allow_unused=True)
    truth = (values, slopes[0], slopes[1] if getattr(loss, "entropy_coef", 0.0) else None)
    for i, (got, plain, true) in enumerate(zip(kernel, eager, truth, strict=True)):
        assert (got is None) == (true is None)
        if got is not None and plain is not None and true is not None:
            assert_no_worse(got.cpu(), plain, true, torch.float32, grad=i > 0)


def test_what_is_fused() -> None:
    class Own(PPO):
        def __call__(self, logp: Tensor, entropy: Tensor | None = None, **inputs: Any) -> Tensor:
            return logp

    assert all(fused(loss) for loss in LOSSES.values())
    for other in (Own(), GSPO, ValueLoss(), lambda logp, entropy: logp):
        assert not fused(other)
        with pytest.raises(ValueError, match="policy_loss_terms: expected a fused per-token loss"):
            policy_loss_terms(other, torch.zeros(2), None, {})
    assert set(KINDS) == {"none", "mle", "apa", "awr", "clip", "cispo"}


@pytest.mark.parametrize("backend", ALL)
def test_published_batch(backend: str) -> None:
    """Two responses of three and two tokens, advantages whitened over all six cells."""
    advantages = torch.tensor([[0.981150, 0.878715, 0.770889], [-1.186573, -1.053864, -0.390317]])
    logp = torch.tensor([[-1.0, -2.0, -0.5], [-0.7, -1.2, 0.0]])
    ref = torch.tensor([[-1.1, -1.8, -0.6], [-0.9, -1.0, 0.0]])
    values = torch.tensor([[0.2, 0.3, 0.4], [0.1, 0.0, 0.1]])
    returns = torch.tensor([[0.92675, 0.965, 1.0], [-0.48, -0.5, 0.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    device = device_of(backend)
    b = {"advantages": advantages, "ref_logp": ref, "old_logp": ref}
    b = {name: x.to(device) for name, x in b.items()}
    cases: list[tuple[Any, float]] = [
        (APA(1.0), 1.008362829),
        (AWR(2.0), 1.313412361),
        (PPO(), -0.068723898),
    ]
    with fa.backend(backend):
        for loss, want in cases:
            inputs = {name: b[name] for name in loss.required}
            got, _ = policy_loss(loss, logp.to(device), inputs, mask=mask.to(device))
            assert abs(got.item() - want) < 2e-6
        got, _ = value_loss(
            ValueLoss(), values.to(device), returns.to(device), mask=mask.to(device)
        )
        assert abs(got.item() - 0.191679056) < 2e-7


@pytest.mark.parametrize("backend", ALL)
def test_views_and_narrow_dtypes(backend: str) -> None:
    """Any strides; bfloat16 and float16 are widened, gradients come in the leaf's dtype."""
    loss, device = LOSSES["ppo all"], device_of(backend)
    wide = {name: x.to(device) for name, x in batch(40, 26).items()}
    views = {name: x.t()[::2] for name, x in wide.items()}
    whole = {name: x.contiguous() for name, x in views.items()}
    with fa.backend(backend):
        got, statistics = critic(loss, 0.3)(views)
        same, _ = critic(loss, 0.3)(whole)
        assert torch.equal(got, same)
        for dtype in (torch.bfloat16, torch.float16):
            narrow = {name: x.to(dtype) for name, x in whole.items()}
            leaf = narrow["logp"].clone().requires_grad_()
            half, _ = critic(loss, 0.3)(narrow | {"logp": leaf})
            full, _ = critic(loss, 0.3)({name: x.float() for name, x in narrow.items()})
            half.backward()
            assert leaf.grad is not None
            assert torch.equal(half, full) and half.dtype == torch.float32
            assert leaf.grad.dtype == dtype
    assert not any(x.requires_grad for x in statistics.values())


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_in_every_run(backend: str) -> None:
    n = 100_000 if backend == "cpp" or CUDA else 5_000
    b, before = batch(n), torch.get_num_threads()
    f = critic(LOSSES["ppo all"], 0.3, mask=torch.rand(n) < 0.9)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(run(backend, f, b))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, results[0][name]) for name, x in other.items())


@pytest.mark.parametrize("backend, n", [("reference", 10**6), ("cpp", 10**6), ("triton", 140_000)])
def test_sums_of_many_tokens_keep_their_digits(backend: str, n: int) -> None:
    """Added one after the other in float32, a million times 0.1 is off by a percent."""
    logp = torch.full((n,), -0.1, device=device_of(backend))
    with fa.backend(backend):
        loss, _ = policy_loss(MLE(), logp, {}, reduction="sum")
    assert abs(loss.item() / (0.1 * n) - 1.0) < 1e-6


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "cispo"] + ["gspo"])
def test_gradcheck(name: str) -> None:
    """All but cispo, whose weight is a constant of the ratio it is made of."""
    loss, b = LOSSES.get(name, GSPO), batch(3, 4, dtype=torch.float64)
    leaves = tuple(b[name].requires_grad_() for name in ("logp", "entropy", "values"))

    def f(logp: Tensor, entropy: Tensor, values: Tensor) -> Tensor:
        return critic(loss, 0.3)(b | {"logp": logp, "entropy": entropy, "values": values})[0]

    assert torch.autograd.gradcheck(f, leaves)


ISA_PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from policies import GSPO, LOSSES, batch, compare, critic
mask = torch.rand(31, 37) < 0.7
for loss in (*LOSSES.values(), GSPO):
    compare("cpp", critic(loss, 0.3, mask=mask, reduction="sequence_mean"), batch(31, 37))
print("passed")
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The processor here may take another one: the others run in processes told to use them."""
    done = subprocess.run(
        [sys.executable, "-c", ISA_PROGRAM, Path(__file__).parent],
        env=os.environ | {"FASTALIGN_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "passed\n", done.stderr


def test_the_op_passes_opcheck() -> None:
    b = batch(24)
    logp, entropy, values = (b[name].requires_grad_() for name in ("logp", "entropy", "values"))
    coefficients = [0.0, -0.2, 0.2, 20.0, 0.1, 0.01, 0.5, 0.2]
    others = (b["advantages"], b["old_logp"], b["ref_logp"], None, None)
    mask, scale = torch.arange(24) % 3 > 0, torch.rand(4)
    critic = (values, b["returns"], b["old_values"])
    clip = KINDS.index("clip")
    torch.library.opcheck(
        _policy_loss, (clip, 3, coefficients, logp, entropy, *others, *critic, mask, scale)
    )
    coefficients[4:] = [0.0] * 4
    nothing = [None] * 5
    torch.library.opcheck(
        _policy_loss, (KINDS.index("mle"), 0, coefficients, logp, None, *[None] * 5, *nothing)
    )
    torch.library.opcheck(
        _policy_loss, (0, 0, coefficients, None, None, *[None] * 5, *critic[:2], *[None] * 3)
    )


def test_the_op_per_token_passes_opcheck() -> None:
    b = batch(24)
    logp, entropy, *rest = (b[k] for k in ("logp", "entropy", "advantages", "old_logp", "ref_logp"))
    clip, coefficients = KINDS.index("clip"), [0.0, -0.2, 0.2, 20.0, 0.1, 0.01, 0.0, 0.0]
    torch.library.opcheck(policy_loss_terms_op, (clip, 3, coefficients, logp, entropy, *rest, None))
    plain = [None] * 5
    mle = KINDS.index("mle")
    torch.library.opcheck(policy_loss_terms_op, (mle, 0, [0.0] * 8, logp.double(), *plain))


@pytest.mark.parametrize("name", ["ppo all", "gspo", "awr"])
def test_compiles_whole_with_gradients(name: str) -> None:
    loss, b = LOSSES.get(name, GSPO), batch(40)
    offsets, mask = torch.tensor([0, 15, 40]), torch.rand(40) < 0.7
    f = critic(loss, 0.3, cu_seqlens=offsets, mask=mask, reduction="sequence_mean")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    plain, whole = (run("cpp", g, b) for g in (f, compiled))
    assert all(torch.equal(x, whole[name]) for name, x in plain.items())


def test_gspo_through_the_loss_head() -> None:
    """linear_loss with groups, one of them empty, is linear_logprobs and this op."""
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8)
    targets, offsets = torch.randint(50, (30,)), torch.tensor([0, 12, 12, 30])
    logp, entropy = fa.ops.linear_logprobs(hidden, weight, targets, return_entropy=True)
    inputs = {"old_logp": logp.detach() + 0.05 * torch.randn(30), "advantages": torch.randn(30)}
    inputs["ref_logp"] = logp.detach() + 0.1 * torch.randn(30)
    one, _ = policy_loss(GSPO, logp, inputs, entropy=entropy, cu_seqlens=offsets)
    other = fa.ops.linear_loss(hidden, weight, targets, GSPO, inputs, groups=offsets)
    assert one.item() == pytest.approx(other.loss.item(), rel=1e-5)
    slopes = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (one, other.loss)]
    assert (slopes[0] - slopes[1]).abs().max() <= 1e-5 * slopes[1].abs().max()


def test_second_derivatives_are_refused() -> None:
    logp = torch.full((4,), -1.0, requires_grad=True)
    inputs = {"advantages": torch.ones(4), "old_logp": torch.zeros(4)}
    loss, _ = fa.ops.policy_loss(fa.losses.PPO(), logp, inputs)
    (slope,) = torch.autograd.grad(loss.square(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
