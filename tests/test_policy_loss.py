"""policy_loss: three backends against float64 and autograd; reductions, masks, critic, messages."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.losses import APA, AWR, GRPO, MLE, PPO, ValueLoss, effective_sample_size
from fastalign.ops.policy_loss import (
    _policy_loss,
    actor_critic_loss,
    fused,
    policy_loss,
    policy_loss_terms,
    value_loss,
)
from fastalign.ops.policy_terms import KINDS
from fastalign.testing import TOLERANCES, assert_no_worse

CUDA = torch.cuda.is_available()
KERNELS = ["cpp", "triton"]
ALL = ["reference", *KERNELS]
DOUBLE = TOLERANCES[torch.float64]
LOSSES: dict[str, Any] = {
    "mle": MLE(),
    "apa": APA(0.7),
    "apa repo": APA(2.0, form="repo"),
    "awr": AWR(0.6, weight_cap=3.0),
    "awr free": AWR(0.6, weight_cap=None),
    "ppo": PPO(),
    "ppo all": PPO(0.3, 0.4, dual_clip=1.6, kl_coef=0.2, entropy_coef=0.1),
    "ppo no lower": PPO(clip=1.5, kl_coef=0.2, kl_kind="k1"),
    "dapo": GRPO("dapo", kl_coef=0.1, kl_kind="k2"),
    "cispo": GRPO("cispo", clip=0.3, clip_high=0.2, kl_coef=0.1, entropy_coef=-0.2),
}
GSPO = GRPO("gspo", clip=0.05, clip_high=0.08, kl_coef=0.1, entropy_coef=0.1)
OFFSETS = [0, 3, 3, 40, 1100, 1301]  # an empty sequence, one past a block of tokens
NAMES = ("logp", "entropy", "advantages", "old_logp", "ref_logp", "values", "returns", "old_values")
Batch = dict[str, Tensor]


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(len(NAMES), *shape, generator=generator)
    made = dict(zip(NAMES, noise, strict=True))
    made["logp"] = -2.0 * noise[0].abs()
    made["old_logp"] = made["logp"] + 0.4 * noise[3]
    made["ref_logp"] = made["logp"] + 0.8 * noise[4]
    made["old_values"] = made["values"] + 0.5 * noise[7]
    return {name: x.to(dtype) for name, x in made.items()}


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and CUDA else "cpu"


def inputs_of(loss: Any, b: Batch) -> dict[str, Any]:
    return {name: b[name] for name in loss.required if name != "cu_seqlens"}


def run(backend: str, f: Callable[[Batch], tuple[Tensor, dict]], b: Batch) -> dict[str, Tensor]:
    """loss, statistics and the gradients of logp, entropy and values of f on ``b``."""
    device = device_of(backend)
    given = {name: x.detach().clone().to(device) for name, x in b.items()}
    leaves = {name: given[name].requires_grad_() for name in ("logp", "entropy", "values")}
    with fa.backend(backend):
        loss, statistics = f(given)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {"loss": loss.detach()} | {k: x.detach() for k, x in statistics.items()}
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            found[f"d{name}"] = gradient
    return {name: x.cpu() for name, x in found.items()}


def compare(backend: str, f: Callable[[Batch], tuple[Tensor, dict]], b: Batch) -> None:
    kernel, eager = run(backend, f, b), run("reference", f, b)
    truth = run(
        "reference", f, {k: x.double() if x.is_floating_point() else x for k, x in b.items()}
    )
    assert set(kernel) == set(eager) == set(truth)
    for name, true in truth.items():
        grad = name in ("dlogp", "dentropy", "dvalues")
        assert_no_worse(kernel[name], eager[name], true, torch.float32, grad=grad)


def call(loss: Any, **options: Any) -> Callable[[Batch], tuple[Tensor, dict]]:
    """policy_loss on a batch; with an entropy and both other log-probs for the statistics."""

    def f(b: Batch) -> tuple[Tensor, dict]:
        others = {name: b[name] for name in ("old_logp", "ref_logp")}
        moved = {k: x.to(b["logp"].device) for k, x in options.items() if isinstance(x, Tensor)}
        return policy_loss(
            loss, b["logp"], inputs_of(loss, b) | others, entropy=b["entropy"], **options | moved
        )

    return f


def critic(loss: Any, clip: float | None, **options: Any) -> Callable[[Batch], tuple[Tensor, dict]]:
    def f(b: Batch) -> tuple[Tensor, dict]:
        moved = {k: x.to(b["logp"].device) for k, x in options.items() if isinstance(x, Tensor)}
        return actor_critic_loss(
            loss,
            b["logp"],
            inputs_of(loss, b),
            b["values"],
            b["returns"],
            old_values=b["old_values"],
            value_loss=ValueLoss(clip),
            vf_coef=0.3,
            entropy=b["entropy"],
            **options | moved,
        )

    return f


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
def test_reductions_worked_by_hand(backend: str) -> None:
    """MLE on -1, -2 | -3 | none | -4, -5, -6: losses 1..6, the last one masked: 15 of five tokens;
    sequence means 1.5, 3 and 4.5.
    """
    device = device_of(backend)
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], device=device)
    mask = torch.tensor([1, 1, 1, 1, 1, 0], device=device)
    offsets = torch.tensor([0, 2, 3, 3, 6], device=device)
    half = torch.tensor(0.5, device=device)
    cases = [
        ("token_mean", None, 3.0, [1 / 5] * 5),
        ("token_mean", 10, 1.5, [1 / 10] * 5),
        ("sequence_mean", None, 3.0, [1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6]),
        ("sequence_mean", 4.0, 2.25, [1 / 8, 1 / 8, 1 / 4, 1 / 8, 1 / 8]),
        ("sum", None, 15.0, [1.0] * 5),
        ("sum", half, 30.0, [2.0] * 5),
    ]
    for reduction, normalizer, want, slopes in cases:
        leaf = logp.clone().requires_grad_()
        with fa.backend(backend):
            loss, _ = policy_loss(
                MLE(),
                leaf,
                {},
                mask=mask,
                cu_seqlens=offsets.int(),
                reduction=reduction,
                normalizer=normalizer,
            )
            (3.0 * loss).backward()
        assert leaf.grad is not None
        assert loss.item() == pytest.approx(want, rel=1e-6)
        assert leaf.grad.tolist() == pytest.approx([-3.0 * x for x in slopes] + [0.0], rel=1e-6)


def test_the_losss_own_reduction_is_the_default() -> None:
    b = batch(7, 9)
    mask = torch.rand(7, 9) < 0.5
    for variant in ("grpo", "dr_grpo", "dapo"):
        loss = GRPO(variant)
        own, _ = policy_loss(loss, b["logp"], inputs_of(loss, b), mask=mask)
        named, _ = policy_loss(
            loss, b["logp"], inputs_of(loss, b), mask=mask, reduction=loss.reduction
        )
        assert torch.equal(own, named)
    mean, _ = policy_loss(PPO(), b["logp"], inputs_of(PPO(), b), reduction="token_mean")
    assert torch.equal(policy_loss(PPO(), b["logp"], inputs_of(PPO(), b))[0], mean)


@pytest.mark.parametrize("name", [*LOSSES, "gspo"])
@pytest.mark.parametrize("backend", ALL)
def test_masked_cells_do_not_leak(backend: str, name: str) -> None:
    loss, b = LOSSES.get(name, GSPO), batch(5, 300)
    mask = torch.rand(5, 300) < 0.5
    mask[2] = False
    clean = run(backend, critic(loss, 0.3, mask=mask), b)
    for poison in (math.nan, math.inf, -math.inf):
        poisoned = {name: x.masked_fill(~mask, poison) for name, x in b.items()}
        found = run(backend, critic(loss, 0.3, mask=mask), poisoned)
        for key, x in found.items():
            assert torch.equal(x, clean[key]), key
        assert found["dlogp"][~mask].abs().max() == found["dvalues"][~mask].abs().max() == 0.0
    none = run(backend, critic(loss, 0.3, mask=torch.zeros_like(mask)), b)
    assert all(x.isfinite().all() for x in none.values()) and none["loss"] == 0.0


@pytest.mark.parametrize("backend", ALL)
def test_nan_in_a_token_that_counts_is_seen(backend: str) -> None:
    for loss in (*LOSSES.values(), GSPO):
        b = batch(1, 60)
        b["logp"][0, 17] = math.nan
        assert run(backend, call(loss), b)["loss"].isnan()


@pytest.mark.parametrize("name", [*LOSSES, "gspo"])
@pytest.mark.parametrize("backend", ALL)
def test_nothing_overflows(backend: str, name: str) -> None:
    """Log-ratios and gaps of +-1e4 and +-30, advantages of both signs and 0."""
    loss = LOSSES.get(name, GSPO)
    far = torch.tensor([-1e4, -30.0, 0.0, 30.0, 1e4])
    grid = torch.cartesian_prod(far, far, torch.tensor([-1.0, 0.0, 1.0]))
    b = batch(75)
    b["logp"] = torch.full((75,), -2e4)
    b |= {"old_logp": -2e4 - grid[:, 0], "ref_logp": -2e4 - grid[:, 1], "advantages": grid[:, 2]}
    found = run(backend, call(loss, cu_seqlens=torch.arange(76)), b)
    assert all(x.isfinite().all() for x in found.values())
    compare(backend, call(loss, cu_seqlens=torch.arange(76)), b)


def test_weights_may_be_infinite_without_a_cap() -> None:
    for backend in ALL:
        b = batch(3)
        b["advantages"] = torch.tensor([0.0, 50.0, 1e4])
        found = run(backend, call(AWR(0.5, weight_cap=None)), b)
        assert found["loss"] == math.inf
        assert found["dlogp"].tolist() == [pytest.approx(-1 / 3), -math.inf, -math.inf]


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


def test_sums_of_a_million_tokens_keep_their_digits() -> None:
    """Added one after the other in float32, a million times 0.1 is off by a percent."""
    n = 1_000_000
    for backend in ("cpp", "reference"):
        with fa.backend(backend):
            loss, _ = policy_loss(MLE(), torch.full((n,), -0.1), {}, reduction="sum")
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
from test_policy_loss import GSPO, LOSSES, batch, compare, critic
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


@pytest.mark.parametrize("name", ["ppo all", "gspo", "awr"])
def test_compiles_whole_with_gradients(name: str) -> None:
    loss, b = LOSSES.get(name, GSPO), batch(40)
    offsets, mask = torch.tensor([0, 15, 40]), torch.rand(40) < 0.7
    f = critic(loss, 0.3, cu_seqlens=offsets, mask=mask, reduction="sequence_mean")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    plain, whole = (run("cpp", g, b) for g in (f, compiled))
    assert all(torch.equal(x, whole[name]) for name, x in plain.items())


def test_gspo_through_the_loss_head() -> None:
    """linear_loss with groups, one loss per group, is linear_logprobs and this op."""
    hidden, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8)
    targets, offsets = torch.randint(50, (30,)), torch.tensor([0, 12, 12, 30])
    logp, entropy = fa.ops.linear_logprobs(hidden, weight, targets, return_entropy=True)
    inputs = {"old_logp": logp.detach() + 0.05 * torch.randn(30), "advantages": torch.randn(30)}
    inputs["ref_logp"] = logp.detach() + 0.1 * torch.randn(30)
    one, _ = policy_loss(
        GSPO, logp, inputs, entropy=entropy, cu_seqlens=offsets, reduction="sum", normalizer=3
    )
    other = fa.ops.linear_loss(hidden, weight, targets, GSPO, inputs, groups=offsets)
    assert one.item() == pytest.approx(other.loss.item(), rel=1e-5)
    slopes = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (one, other.loss)]
    assert (slopes[0] - slopes[1]).abs().max() <= 1e-5 * slopes[1].abs().max()


X = torch.zeros(2, 3)
PPO_INPUTS = {"old_logp": X, "advantages": X}
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "loss": (
        lambda: policy_loss(ValueLoss(), X, {}),
        r"policy_loss: expected a policy loss object of fastalign.losses, got ValueLoss",
    ),
    "missing": (lambda: policy_loss(PPO(), X, {"old_logp": X}), "PPO: missing inputs: advantages"),
    "unknown": (lambda: policy_loss(MLE(), X, {"weight": X}), "MLE: unknown inputs: weight"),
    "shape": (
        lambda: policy_loss(PPO(), X, {"old_logp": X, "advantages": X[0]}),
        r"PPO: expected advantages of the shape of logp, \(2, 3\), got \(3,\)",
    ),
    "device": (
        lambda: policy_loss(PPO(), X, {"old_logp": X, "advantages": X.to("meta")}),
        "policy_loss: expected advantages on cpu, got meta",
    ),
    "logp dtype": (
        lambda: policy_loss(MLE(), X.long(), {}),
        r"expected logp \[N\] or \[B, T\] of a floating dtype, got shape \(2, 3\), torch.int64",
    ),
    "logp shape": (
        lambda: policy_loss(MLE(), X, {}, cu_seqlens=torch.tensor([0, 2])),
        r"expected logp \[N\] with cu_seqlens .* got shape \(2, 3\)",
    ),
    "entropy": (
        lambda: policy_loss(MLE(), X, {}, entropy=X[:1]),
        r"policy_loss: expected entropy like logp, \(2, 3\) on cpu, got \(1, 3\) on cpu",
    ),
    "no entropy": (
        lambda: policy_loss(PPO(entropy_coef=0.1), X, PPO_INPUTS),
        "policy_loss: missing entropy",
    ),
    "mask shape": (
        lambda: policy_loss(MLE(), X, {}, mask=torch.ones(2)),
        r"expected mask like logp, \(2, 3\) on cpu, got \(2,\)",
    ),
    "mask dtype": (lambda: policy_loss(MLE(), X, {}, mask=X), "bool or integer mask, got torch.fl"),
    "offsets end": (
        lambda: policy_loss(MLE(), X[0], {}, cu_seqlens=torch.tensor([0, 2])),
        r"cu_seqlens to rise from 0 to N = 3, got \[0, 2\]..2",
    ),
    "offsets fall": (
        lambda: policy_loss(MLE(), X[0], {}, cu_seqlens=torch.tensor([0, 2, 1, 3])),
        "cu_seqlens to rise from 0 to N = 3",
    ),
    "offsets dtype": (
        lambda: policy_loss(MLE(), X[0], {}, cu_seqlens=torch.tensor([0.0, 3.0])),
        r"cu_seqlens \[S \+ 1\] of int32 or int64 on cpu, got shape \(2,\), torch.float32",
    ),
    "no sequences": (
        lambda: policy_loss(MLE(), X[0], {}, reduction="sequence_mean"),
        r"expected cu_seqlens or \[B, T\] for sequence_mean",
    ),
    "gspo without sequences": (
        lambda: policy_loss(GSPO, X[0], {}, entropy=X[0]),
        r"policy_loss: expected cu_seqlens or logp \[B, T\] for GRPO",
    ),
    "reduction": (
        lambda: policy_loss(MLE(), X, {}, reduction="mean"),
        "reduction to be one of token_mean, sequence_mean, sum, got 'mean'",
    ),
    "normalizer": (
        lambda: policy_loss(MLE(), X, {}, normalizer=0),
        "normalizer > 0 and finite, got 0",
    ),
    "normalizer tensor": (
        lambda: policy_loss(MLE(), X, {}, normalizer=torch.ones(2)),
        r"0-d tensor without gradient, got shape \(2,\)",
    ),
    "values": (
        lambda: actor_critic_loss(MLE(), X, {}, X[0], X),
        r"actor_critic_loss: expected values like logp, \(2, 3\) on cpu, got \(3,\)",
    ),
    "returns": (
        lambda: value_loss(ValueLoss(), X, X[0]),
        r"value_loss: expected returns like values, \(2, 3\) on cpu, got \(3,\)",
    ),
    "old values": (
        lambda: value_loss(ValueLoss(0.2), X, X),
        "value_loss: missing old_values",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    f, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        f()
