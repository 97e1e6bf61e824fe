"""linear_loss averages as policy_loss on linear_logprobs does: reductions, sequences, exact KL."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import N, V, gradients, make, products, rows, segment_sum
from torch import Tensor

from fastalign import losses
from fastalign.losses import APA, AWR, GRPO, MLE, PPO, RWR
from fastalign.ops import linear_logprobs, linear_loss, policy_loss
from fastalign.testing import TOLERANCES

DOUBLE = TOLERANCES[torch.float64]
# Rows 0, 5, 10, ... are ignored: the sixth sequence has none left, the second never had any.
GROUPS = torch.tensor([0, 6, 6, 21, 25, 35, 36, 37])
COEFFICIENTS: dict[str, Any] = {"kl_coef": 0.1, "entropy_coef": 0.05}
CASES: list[tuple[Any, str | None]] = [
    *((GRPO(variant, clip=0.1, **COEFFICIENTS), None) for variant in losses.grpo.VARIANTS),
    (GRPO("gspo", clip=0.1), "sum"),
    (PPO(**COEFFICIENTS), None),
    (PPO(**COEFFICIENTS), "sequence_mean"),
    (GRPO("grpo"), "token_mean"),
    (MLE(), "sequence_mean"),
    (RWR(1.0), "sequence_mean"),
    (APA(0.5), "sequence_mean"),
    (AWR(0.7), "sum"),
]


def inputs_of(loss: Any, like: dict[str, Any]) -> dict[str, Tensor]:
    old = like["old_logp"].detach()
    known = {
        "advantages": like["advantages"],
        "old_logp": old,
        "ref_logp": old - 0.1,
        "weights": like["advantages"].exp(),
    }
    return {name: known[name] for name in loss.required if name in known}


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for i, (x, y) in enumerate(zip(got, want, strict=True)):
        floor = DOUBLE.grad_floor if i else DOUBLE.floor
        assert (x - y).abs().max() <= floor * max(1.0, y.abs().max().item())


@pytest.mark.parametrize("normalizer", [None, 7.5])
@pytest.mark.parametrize("slab", [None, 16, 5], ids=["1 slab", "3 slabs", "8 slabs"])
@pytest.mark.parametrize(("loss", "reduction"), CASES, ids=str)
def test_equals_policy_loss_on_linear_logprobs(
    loss: Any, reduction: str | None, slab: int | None, normalizer: float | None
) -> None:
    """Loss, gradients and statistics; some rows are ignored, one sequence wholly."""
    hidden, weight, targets, like = make(torch.float64)
    inputs = inputs_of(loss, like)
    options: dict[str, Any] = {"reduction": reduction, "normalizer": normalizer}
    out = linear_loss(
        hidden,
        weight,
        targets,
        loss,
        inputs,
        groups=GROUPS,
        workspace=rows(slab, torch.float64),
        **options,
    )
    logp, entropy = linear_logprobs(hidden, weight, targets, return_entropy=True)
    value, statistics = policy_loss(
        loss, logp, inputs, entropy=entropy, mask=targets != -100, cu_seqlens=GROUPS, **options
    )
    close(
        [out.loss, *gradients(out.loss, hidden, weight)],
        [value, *gradients(value, hidden, weight)],
    )
    shared = set(statistics) & set(out.metrics)
    assert "entropy" in shared
    close(*([x[name] for name in sorted(shared)] for x in (out.metrics, statistics)))


def test_sequence_mean_worked_by_hand() -> None:
    """Three tokens of equal logits, so logp = -log 3. Sequences of 2 rows (one ignored), 0 and 3:
    rows count 1, 1/3, 1/3, 1/3, and there are two sequences. The weights 2 | 1, 4, 4 make
    (2 + (1 + 4 + 4) / 3) / 2 = 2.5 log 3.
    """
    targets = torch.tensor([-100, 0, 1, 2, 0])
    weights = torch.tensor([9.0, 2.0, 1.0, 4.0, 4.0])
    out = linear_loss(
        torch.ones(5, 2),
        torch.ones(3, 2),
        targets,
        MLE(),
        {"weights": weights},
        groups=[0, 2, 2, 5],
        reduction="sequence_mean",
    )
    assert out.loss.item() == pytest.approx(2.5 * 1.0986122887, rel=1e-6)
    every = linear_loss(
        torch.ones(5, 2), torch.ones(3, 2), targets, MLE(), {"weights": weights}, reduction="sum"
    )
    assert every.loss.item() == pytest.approx(11.0 * 1.0986122887, rel=1e-6)


def test_sequence_means_take_three_products_in_any_slabs() -> None:
    """No slab need hold a whole sequence, as each row's share is known beforehand."""
    hidden, weight, targets, like = make()
    loss = GRPO()

    def run() -> None:
        out = linear_loss(
            hidden,
            weight,
            targets,
            loss,
            inputs_of(loss, like),
            groups=[0, 0, N],
            workspace=rows(11),
        )
        out.loss.backward()

    assert products(run) == 3 * 3  # 29 rows are kept: slabs of 11, 11 and 7


def test_any_callable_per_row_has_its_sequence_mean() -> None:
    hidden, weight, targets, like = make(torch.float64)

    def likelihood(logp: Tensor, entropy: Tensor, scale: Tensor) -> Tensor:
        return -scale * logp

    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"groups": GROUPS, "reduction": "sequence_mean"}
    out = linear_loss(hidden, weight, targets, likelihood, {"scale": scale}, **options)
    plain = linear_loss(hidden, weight, targets, MLE(), **options)
    close(
        [out.loss, *gradients(out.loss, hidden, scale)],
        [3 * plain.loss, 3 * gradients(plain.loss, hidden)[0], plain.loss],
    )


def test_groups_without_rows_are_left_out_of_a_mean_over_groups() -> None:
    """Groups of 1, 0 (none given), 2 and 0 (all ignored) rows: (a - logp_1 + b - logp_2 - logp_3)
    / 2; the empty groups' inputs have gradient 0.
    """
    targets = torch.tensor([0, 1, 2, -100])
    offset = torch.tensor([1.0, 10.0, 2.0, 10.0], requires_grad=True)

    def nll(logp: Tensor, entropy: Tensor, offset: Tensor, cu_seqlens: Tensor) -> Tensor:
        return offset - segment_sum(logp, cu_seqlens)

    head = torch.ones(4, 2), torch.ones(3, 2), targets, nll
    with pytest.raises(ValueError, match="G = N = 4: nothing else tells whether input 'offset'"):
        linear_loss(*head, {"offset": offset}, groups=[0, 1, 1, 3, 4])
    offset = torch.tensor([1.0, 10.0, 2.0, 10.0, 10.0], requires_grad=True)
    for workspace in (None, 24):
        out = linear_loss(
            *head,
            {"offset": offset},
            groups=[0, 1, 1, 3, 4, 4],
            reduction="sequence_mean",
            workspace=workspace,
        )
        assert out.loss.item() == pytest.approx((3.0 + 3 * 1.0986122887) / 2, rel=1e-6)
        (slope,) = gradients(out.loss, offset)
        assert slope.tolist() == [0.5, 0.0, 0.5, 0.0, 0.0]
    every = linear_loss(*head, {"offset": offset}, groups=[0, 1, 1, 3, 4, 4])
    assert every.loss.item() == pytest.approx((33.0 + 3 * 1.0986122887) / 5, rel=1e-6)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_gspos_advantages_are_read_alike_in_every_slab(per: str) -> None:
    """A slab with as many sequences as rows (empty ones among them) changes nothing.

    Sequences of 2, 0, 1, 3, 0 and 0 rows: a slab of 2 rows holds the first two.
    """
    offsets = torch.tensor([0, 2, 2, 3, 6, 6, 6, 6])
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    hidden.requires_grad_()
    targets = torch.arange(6) % 5
    logp = linear_logprobs(hidden, weight, targets)
    inputs = {"old_logp": logp.detach() - 0.3 * torch.randn(6), "advantages": torch.randn(6)}
    if per == "sequence":
        inputs["advantages"] = torch.randn(7)
    inputs = {name: x.double() for name, x in inputs.items()}
    loss = GRPO("gspo", clip=0.2)
    value, _ = policy_loss(loss, logp, inputs, cu_seqlens=offsets)
    want = [value, *gradients(value, hidden)]
    for slab in (None, 3, 2):
        out = linear_loss(
            hidden,
            weight,
            targets,
            loss,
            inputs,
            groups=offsets,
            workspace=slab and slab * 5 * 8,
        )
        close([out.loss, *gradients(out.loss, hidden)], want)


def test_as_many_sequences_as_tokens() -> None:
    """One token each: both readings of gspo's advantages are the same. Else it is refused."""
    loss, numbers = GRPO("gspo", clip=0.2), torch.randn(2, 4)
    inputs = {"old_logp": numbers[0] - 0.1, "advantages": numbers[1]}
    single, mixed = torch.arange(5), torch.tensor([0, 1, 1, 3, 4])
    value, _ = policy_loss(loss, numbers[0], inputs, cu_seqlens=single)
    assert torch.equal(value, policy_loss(PPO(0.2, 4e-4), numbers[0], inputs)[0])
    message = "S = N = 4: nothing else tells whether advantages"
    with pytest.raises(ValueError, match=f"policy_loss: .*{message}"):
        policy_loss(loss, numbers[0], inputs, cu_seqlens=mixed)
    with pytest.raises(ValueError, match=f"GRPO: .*{message}"):
        loss(numbers[0], None, cu_seqlens=mixed, **inputs)
    compiled = torch.compile(loss.__call__, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(numbers[0], None, cu_seqlens=single, **inputs),
        loss(numbers[0], None, cu_seqlens=single, **inputs),
    )
    with pytest.raises(RuntimeError, match=message):
        compiled(numbers[0], None, cu_seqlens=mixed, **inputs)
    hidden, weight, targets = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    linear_loss(hidden, weight, targets, loss, inputs, groups=single)
    with pytest.raises(ValueError, match="linear_loss: .*G = N = 4"):
        linear_loss(hidden, weight, targets, loss, inputs, groups=mixed)
    # Rows of a batch are told from its cells by their shape.
    square = {"old_logp": numbers[:1].T - 0.1, "advantages": numbers[1]}
    value, _ = policy_loss(loss, numbers[:1].T, square)
    assert value == pytest.approx(policy_loss(PPO(0.2, 4e-4), numbers[0], inputs)[0].item())


def test_the_same_metrics_when_no_sequence_counts() -> None:
    hidden, weight, targets, like = make()
    for loss in (GRPO(), GRPO("gspo")):
        some, none = (
            linear_loss(hidden, weight, y, loss, inputs_of(loss, like), groups=GROUPS)
            for y in (targets, torch.full_like(targets, -100))
        )
        assert set(none.metrics) == set(some.metrics) and none.loss == 0
        none.loss.backward()


EXACT: list[Any] = [
    PPO(kl_coef=0.3, kl_kind="exact", entropy_coef=0.05),
    *(GRPO(v, clip=0.1, kl_coef=0.3, kl_kind="exact") for v in losses.grpo.VARIANTS),
]


@pytest.mark.parametrize("slab", [None, 16, 5], ids=["1 slab", "3 slabs", "8 slabs"])
@pytest.mark.parametrize("loss", EXACT, ids=str)
def test_exact_kl_against_plain_autograd(loss: Any, slab: int | None) -> None:
    """The policy's loss without a KL, and kl_coef times the reduced KL over all of the logits."""
    hidden, weight, targets, like = make(torch.float64)
    generator = torch.Generator().manual_seed(9)
    ref_weight = torch.randn(V, hidden.shape[1], generator=generator, dtype=torch.float64)
    names = ("old_logp", "advantages")
    inputs = {name: like[name].detach() for name in names}
    out = linear_loss(
        hidden,
        weight,
        targets,
        loss,
        inputs,
        groups=GROUPS,
        ref_hidden=hidden.detach(),
        ref_weight=ref_weight,
        workspace=rows(slab, torch.float64),
    )

    p = torch.log_softmax(hidden @ weight.T, -1)
    r = torch.log_softmax(hidden.detach() @ ref_weight.T, -1)
    kl = (p.exp() * (p - r)).sum(-1)
    logp = p.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    entropy = -(p.exp() * p).sum(-1)
    kept = targets != -100
    lengths = torch.stack([kept[a:b].sum() for a, b in zip(GROUPS, GROUPS[1:], strict=False)])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rest = {"cu_seqlens": bounds} if "cu_seqlens" in loss.required else {}
    values = loss(
        logp[kept],
        entropy[kept],
        **{name: x[kept] for name, x in inputs.items()},
        kl=torch.zeros(int(kept.sum()), dtype=torch.float64),
        **rest,
    )
    reduction = getattr(loss, "reduction", "token_mean")

    def reduced(x: Tensor) -> Tensor:
        if reduction == "token_mean":
            return x.mean()
        if reduction == "sum":
            return x.sum()
        means = [x[a:b].mean() for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
        return torch.stack(means).mean()

    policy = values.sum() / (lengths > 0).sum() if rest else reduced(values)
    want = policy + 0.3 * reduced(kl[kept])
    close(
        [out.loss, *gradients(out.loss, hidden, weight)],
        [want, *gradients(want, hidden, weight)],
    )
    assert out.metrics["kl"].item() == pytest.approx(kl[kept].mean().item(), rel=1e-12)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [
        (loss, reduction)
        for loss in EXACT
        for reduction in ("token_mean", "sequence_mean", "sum")
        if reduction != "token_mean" or "cu_seqlens" not in loss.required
    ],
    ids=str,
)
def test_exact_kl_of_policy_loss(loss: Any, reduction: str) -> None:
    """The input kl has a gradient: kl_coef times the token's share. What is masked has none."""
    numbers = torch.randn(4, 37, dtype=torch.float64)
    mask = torch.arange(37) % 5 > 0
    kl = numbers[3].abs().masked_fill(~mask, torch.nan).requires_grad_()
    inputs = {"old_logp": numbers[0] - 0.1 * numbers[1], "advantages": numbers[2]}
    options: dict[str, Any] = {
        "entropy": numbers[1],
        "mask": mask,
        "cu_seqlens": GROUPS,
        "reduction": reduction,
    }
    value, statistics = policy_loss(loss, numbers[0], inputs | {"kl": kl}, **options)
    nothing = torch.zeros_like(kl)
    plain, _ = policy_loss(loss, numbers[0], inputs | {"kl": nothing}, **options)
    (slope,) = gradients(value, kl)
    sequence = torch.searchsorted(GROUPS[1:], torch.arange(37), right=True)
    kept = mask.double()
    lengths = torch.stack([kept[a:b].sum() for a, b in zip(GROUPS, GROUPS[1:], strict=False)])
    share = {
        "token_mean": kept / kept.sum(),
        "sequence_mean": kept / lengths[sequence] / (lengths > 0).sum(),
        "sum": kept / (lengths[sequence] if "cu_seqlens" in loss.required else 1.0),
    }[reduction].nan_to_num()
    assert (slope - 0.3 * share).abs().max() <= DOUBLE.grad_floor
    penalty = (0.3 * share[mask] * kl.detach()[mask]).sum()
    assert (value - plain - penalty).abs() <= 10 * DOUBLE.floor
    assert statistics["kl"].item() == pytest.approx(kl[mask].mean().item())


def test_exact_kl_is_fused_and_takes_no_more_products() -> None:
    """Three of the policy's and the reference's logits; the kernel forms the rest of the loss."""
    hidden, weight, targets, like = make()
    loss = EXACT[0]
    inputs = {name: like[name].detach() for name in ("old_logp", "advantages")}

    def run() -> None:
        ref = {"ref_hidden": hidden.detach(), "ref_weight": weight.detach() + 0.1}
        linear_loss(hidden, weight, targets, loss, inputs, **ref).loss.backward()

    assert products(run) == 4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "sequences": ({"loss": GRPO()}, "expected groups, the sequences of a sequence_mean"),
    "reduction": ({"reduction": "mean"}, "one of token_mean, sequence_mean, sum, got 'mean'"),
    "token mean": (
        {"loss": GRPO("gspo"), "groups": [0, 4], "reduction": "token_mean"},
        "expected reduction sequence_mean or sum for a loss per group",
    ),
    "no reference": ({"loss": EXACT[0]}, "expected ref_hidden and ref_weight for the exact KL of"),
    "per row": (
        {"inputs": {"weights": torch.ones(2)}, "groups": [0, 2, 4]},
        r"'weights' with leading dimension 4, or 0-d, got shape \(2,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changed, message = BAD[name]
    numbers = {"old_logp": torch.zeros(4), "advantages": torch.zeros(4)}
    loss = changed.get("loss", MLE())
    given: dict[str, Any] = {"loss": loss, "inputs": numbers if "loss" in changed else {}}
    with pytest.raises(ValueError, match=f"linear_loss: .*{message}"):
        linear_loss(
            hidden=torch.zeros(4, 5),
            weight=torch.zeros(7, 5),
            targets=torch.zeros(4, dtype=torch.int64),
            **given | changed,
        )


def test_exact_kl_asks_for_the_kl() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="PPO: missing inputs: kl; linear_loss makes it"):
        policy_loss(EXACT[0], x, {"old_logp": x, "advantages": x}, entropy=x)
    with pytest.raises(ValueError, match="PPO: unknown inputs: kl; it takes"):
        given = dict.fromkeys(("old_logp", "advantages", "ref_logp", "kl"), x)
        policy_loss(PPO(kl_coef=0.1), x, given)


def test_a_module_takes_what_its_forward_takes() -> None:
    """torch.nn.Module.__call__ takes anything. A built-in function does not say what it takes."""

    class Weighted(torch.nn.Module):
        def forward(self, logp: Tensor, entropy: Tensor, advantages: Tensor) -> Tensor:
            return -advantages * logp

    class Penalised(torch.nn.Module):
        def forward(self, logp: Tensor, entropy: Tensor, kl: Tensor) -> Tensor:
            return kl - logp

    hidden, weight, targets = torch.randn(6, 3), torch.randn(5, 3), torch.arange(6) % 5
    given = {"advantages": torch.randn(6)}
    sequences: Any = dict(groups=[0, 2, 6], reduction="sequence_mean")
    shares = torch.tensor([0.25, 0.25, 0.125, 0.125, 0.125, 0.125])
    out = linear_loss(hidden, weight, targets, Weighted(), given, **sequences)
    want = -(shares * given["advantages"] * out.logp).sum().item()
    assert out.loss.item() == pytest.approx(want, rel=1e-5)
    out = linear_loss(
        hidden, weight, targets, Penalised(), ref_hidden=hidden + 1, ref_weight=weight
    )
    assert out.kl is not None
    assert out.loss.item() == pytest.approx((out.kl - out.logp).mean().item(), rel=1e-5)
    out = linear_loss(hidden, weight, targets, torch.add, **sequences)
    want = (shares * (out.logp + out.entropy)).sum().item()
    assert out.loss.item() == pytest.approx(want, rel=1e-5)
