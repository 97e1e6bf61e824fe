"""linear_loss beside a reference model: the exact KL over the vocabulary, in the same pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import GROUPS, N, V, gradients, make, products, rows, segment_sum
from torch import Tensor

from fastalign import losses
from fastalign.ops import linear_loss
from fastalign.testing import assert_no_worse

H_REF = 16
SLABS = [None, 16, 5]


def reference_model(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(N, H_REF, generator=generator)
    weight = torch.randn(V, H_REF, generator=generator) / 2
    bias = torch.randn(V, generator=generator)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype)


def exact_kl(logp: Tensor, entropy: Tensor, kl: Tensor, advantages: Tensor) -> Tensor:
    return -advantages * logp - 0.01 * entropy + 0.1 * kl + 0.01 * kl**2


def by_autograd(
    leaves: list[Tensor],
    targets: Tensor,
    ref: tuple[Tensor, ...],
    advantages: Tensor,
    temperature: Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, kl and ref_logp with both models' whole logits."""

    def log_p(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = torch.nn.functional.linear(hidden, weight, bias)
        z = z.to(torch.float64 if z.dtype == torch.float64 else torch.float32)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return torch.log_softmax(z / temperature.to(z.dtype)[:, None], -1)

    kept = targets != -100
    p, r = log_p(*leaves)[kept], log_p(*ref)[kept]
    y = targets[kept][:, None]
    kl = (p.exp() * (p - r)).sum(-1)
    entropy = -(p.exp() * p).sum(-1)
    values = exact_kl(p.gather(1, y)[:, 0], entropy, kl, advantages[kept].to(p.dtype))
    return values.mean(), kl, r.gather(1, y)[:, 0]


@pytest.mark.parametrize("slab", SLABS, ids=["1 slab", "3 slabs", "8 slabs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_against_float64(softcap: float | None, dtype: torch.dtype, slab: int | None) -> None:
    hidden, weight, targets, inputs = make(dtype)
    advantages = inputs["advantages"]
    ref = reference_model(dtype)
    temperature = 0.5 + torch.arange(N) / N
    tensors = [hidden, weight, torch.linspace(-1, 1, V).to(dtype)]
    kept = targets != -100

    def whole(wide: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(wide).requires_grad_() for x in tensors]
        ref_wide = tuple(x.to(wide) for x in ref)
        loss, kl, ref_logp = by_autograd(
            leaves, targets, ref_wide, advantages, temperature, softcap
        )
        return [loss, kl.detach(), ref_logp, *gradients(loss, *leaves)]

    h, w, b = (x.detach().requires_grad_() for x in tensors)
    out = linear_loss(
        h,
        w,
        targets,
        exact_kl,
        {"advantages": advantages},
        bias=b,
        ref_hidden=ref[0],
        ref_weight=ref[1],
        ref_bias=ref[2],
        temperature=temperature,
        softcap=softcap,
        workspace=slab and 2 * slab * V * dtype.itemsize,
    )
    assert out.kl is not None and out.ref_logp is not None
    got = [out.loss, out.kl[kept], out.ref_logp[kept], *gradients(out.loss, h, w, b)]
    for i, (g, e, t) in enumerate(zip(got, whole(dtype), whole(torch.float64), strict=True)):
        assert_no_worse(g, e, t, dtype, grad=i > 2)
    assert not out.kl[~kept].any() and not out.ref_logp[~kept].any()
    assert out.metrics["kl"].item() == pytest.approx(out.kl[kept].mean().item(), rel=1e-5)
    gap = (out.logp - out.ref_logp)[kept].mean().item()
    assert out.metrics["ref_k1"].item() == pytest.approx(gap, rel=1e-4)


def test_the_gradient_of_a_model_against_itself_is_zero() -> None:
    hidden, weight, targets, _ = make()
    out = linear_loss(
        hidden, weight, targets, lambda logp, entropy, kl: kl, ref_hidden=hidden, ref_weight=weight
    )
    assert out.loss.item() == 0.0
    for gradient in gradients(out.loss, hidden, weight):
        assert gradient.abs().max() < 1e-7


def test_one_product_more_than_without() -> None:
    hidden, weight, targets, _ = make()
    ref_hidden, ref_weight, _ = reference_model(torch.float32)
    targets = targets.clamp(min=0)

    def step(loss: Any) -> None:
        linear_loss(
            hidden, weight, targets, loss, ref_hidden=ref_hidden, ref_weight=ref_weight
        ).loss.backward()

    assert products(lambda: step(lambda logp, entropy, kl: kl)) == 4


@pytest.mark.parametrize("slab", [None, 16, 7], ids=["1 slab", "slabs", "two stages"])
def test_groups_see_their_kl(slab: int | None) -> None:
    hidden, weight, targets, _ = make()
    ref_hidden, ref_weight, _ = reference_model(torch.float32)

    def per_group(logp: Tensor, entropy: Tensor, kl: Tensor, cu_seqlens: Tensor) -> Tensor:
        return segment_sum(kl, cu_seqlens) ** 2

    options: dict[str, Any] = dict(ref_hidden=ref_hidden, ref_weight=ref_weight)
    out = linear_loss(
        hidden,
        weight,
        targets,
        per_group,
        groups=GROUPS,
        workspace=slab and 2 * rows(slab),
        **options,
    )
    token = linear_loss(hidden, weight, targets, lambda logp, entropy, kl: kl, **options)
    assert token.kl is not None
    sums = segment_sum(token.kl, GROUPS)
    assert out.loss.item() == pytest.approx((sums**2).mean().item(), rel=1e-5)
    factors = torch.repeat_interleave(2 * sums / len(sums), GROUPS.diff())
    want = linear_loss(
        hidden,
        weight,
        targets,
        lambda logp, entropy, kl, factors: factors * kl,
        {"factors": factors},
        normalizer=1.0,
        **options,
    )
    for got, true in zip(
        gradients(out.loss, hidden, weight), gradients(want.loss, hidden, weight), strict=True
    ):
        assert_no_worse(got, true, true.double(), torch.float32, grad=True)


def test_a_loss_object_takes_ref_logp_from_the_reference() -> None:
    hidden, weight, targets, inputs = make()
    ref_hidden, ref_weight, ref_bias = reference_model(torch.float32)
    loss = losses.APA(lambda_=0.5)
    given = {"advantages": inputs["advantages"]}
    fused = linear_loss(
        hidden,
        weight,
        targets,
        loss,
        given,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        workspace=2 * rows(8),
    )
    apart = linear_loss(hidden, weight, targets, loss, given | {"ref_logp": fused.ref_logp})
    assert fused.loss.item() == pytest.approx(apart.loss.item(), rel=1e-6)
    for got, true in zip(
        gradients(fused.loss, hidden, weight), gradients(apart.loss, hidden, weight), strict=True
    ):
        assert_no_worse(got, true, true.double(), torch.float32, grad=True)


def bad_cases() -> dict[str, tuple[dict[str, Any], str]]:
    hidden, weight, _ = reference_model(torch.float32)
    kl = torch.zeros(N)
    return {
        "one of two": (dict(ref_weight=None), "ref_hidden and ref_weight together"),
        "tokens": (dict(ref_hidden=hidden[1:]), rf"ref_hidden \[{N}, H'\].*\({N - 1}, {H_REF}\)"),
        "vocabulary": (dict(ref_weight=weight[1:]), rf"ref_weight \[{V}, H'\].*\({V - 1},"),
        "width": (dict(ref_weight=weight[:, 1:]), r"reference\): expected hidden \[N, H\]"),
        "input too": (dict(inputs={"kl": kl}), "no input named kl beside ref_hidden"),
        "not taken": (dict(loss=lambda logp, entropy: -logp), "a loss that takes kl or ref_logp"),
        "workspace": (dict(workspace=rows(1)), f"workspace >= {2 * V * 4} bytes"),
    }


@pytest.mark.parametrize("name", bad_cases())
def test_bad_input_is_named(name: str) -> None:
    changed, message = bad_cases()[name]
    hidden, weight, targets, _ = make()
    ref_hidden, ref_weight, _ = reference_model(torch.float32)
    kwargs: dict[str, Any] = dict(
        loss=lambda logp, entropy, kl: kl, ref_hidden=ref_hidden, ref_weight=ref_weight
    )
    kwargs.update(changed)
    with pytest.raises(ValueError, match=f"linear_loss.*{message}"):
        linear_loss(hidden, weight, targets, **kwargs)


def test_a_masked_vocabulary_of_the_policy_costs_nothing() -> None:
    """Columns at -inf have no probability, whatever the reference says of them."""
    hidden, weight, targets, _ = make()
    bias = torch.zeros(V)
    bias[V // 2 :] = float("-inf")
    out = linear_loss(
        hidden,
        weight,
        targets.clamp(max=V // 2 - 1),
        lambda logp, entropy, kl: kl,
        bias=bias,
        ref_hidden=hidden,
        ref_weight=weight,
    )
    assert out.kl is not None and out.kl.isfinite().all()
    with torch.no_grad():
        logits = hidden @ weight.t()
        share = torch.logsumexp(logits[:, : V // 2], -1) - torch.logsumexp(logits, -1)
    kept = targets != -100
    torch.testing.assert_close(out.kl[kept], -share[kept], rtol=1e-4, atol=1e-5)
    for gradient in gradients(out.loss, hidden, weight):
        assert gradient.isfinite().all()


def test_autocast_is_followed_by_both_models() -> None:
    hidden, weight, targets, inputs = make()
    advantages = {"advantages": inputs["advantages"]}
    ref_hidden, ref_weight, ref_bias = reference_model(torch.float32)

    def run(kind: torch.dtype, *tensors: Tensor) -> Any:
        h, w, rh, rw, rb = (x.detach().to(kind) for x in tensors)
        reference: dict[str, Any] = dict(ref_hidden=rh, ref_weight=rw, ref_bias=rb)
        return linear_loss(h, w, targets, exact_kl, advantages, **reference)

    tensors = (hidden, weight, ref_hidden, ref_weight, ref_bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(torch.float32, *tensors)
    want, wide = run(torch.bfloat16, *tensors), run(torch.float32, *tensors)
    assert torch.equal(got.kl, want.kl) and torch.equal(got.ref_logp, want.ref_logp)
    assert not torch.equal(got.ref_logp, wide.ref_logp)
