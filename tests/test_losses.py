"""Loss objects: published batch, formulas and gradients, APA's fixed points, messages."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastalign.losses import APA, AWR, GRPO, MLE, PPO, RWR, ValueLoss, effective_sample_size
from fastalign.losses.grpo import VARIANTS
from fastalign.ops.gae import gae
from fastalign.ops.whiten import whiten
from fastalign.testing import TOLERANCES, assert_no_worse

DOUBLE = TOLERANCES[torch.float64]


def double(rows: list) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# One batch of two responses, of three and two tokens.
VALUES = double([[0.1, 0.2, 0.3], [0.0, -0.1, 0.0]])
REWARDS = double([[0, 0, 1], [0, -0.5, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
LOGP = double([[-1.0, -2.0, -0.5], [-0.7, -1.2, 0.0]])
REF_LOGP = double([[-1.1, -1.8, -0.6], [-0.9, -1.0, 0.0]])


def per_token(loss: Tensor) -> float:
    """The mean over kept tokens, to nine digits."""
    return round((loss * MASK).sum().item() / int(MASK.sum()), 9)


def test_published_batch() -> None:
    """Advantages by GAE, whitened over all six cells; each loss is the mean over five tokens."""
    advantages, returns = gae(REWARDS, VALUES, mask=MASK)
    advantages = whiten(advantages)
    apa = APA(lambda_=1.0)(LOGP, None, advantages=advantages, ref_logp=REF_LOGP)
    assert per_token(apa) == 1.008362829
    awr = AWR(beta=2.0)(LOGP, None, advantages=advantages)
    assert per_token(awr) == 1.313412361
    ppo = PPO(clip=0.2)(LOGP, None, advantages=advantages, old_logp=REF_LOGP)
    assert per_token(ppo) == -0.068723898
    value = ValueLoss()(VALUES + 0.1, returns)
    assert per_token(value) == 0.191679056


def test_apa_worked_by_hand() -> None:
    """A 2, ref -1.5, lambda 4. logp -1: e = -1 - .5 + 1.5 = 0; logp -3: e = -2, gradient -4."""
    logp = torch.tensor([-1.0, -3.0], requires_grad=True)
    inputs = {"advantages": torch.tensor([2.0, 2.0]), "ref_logp": torch.tensor([-1.5, -1.5])}
    loss = APA(lambda_=4.0)(logp, **inputs)
    assert loss.tolist() == [0.0, 4.0]
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.tolist() == [0.0, -4.0]


def test_apa_in_the_codes_form_has_the_coefficient_on_the_other_side() -> None:
    """A .5, ref -1.5, coefficient 10: e = -1 - 5 + 1.5 = -4.5, as lambda .1 has it."""
    logp, ref_logp, advantages = double([-1.0]), double([-1.5]), double([0.5])
    inputs = {"advantages": advantages, "ref_logp": ref_logp}
    repo, paper = APA(10.0, form="repo"), APA(0.1)
    for loss in (repo, paper):
        assert round(loss(logp, None, **inputs).item(), 12) == 20.25
        assert round(loss.statistics(logp, None, **inputs)["residual"].item(), 12) == -4.5


@pytest.mark.parametrize("beta, size", [(1.0, 2.475829), (0.5, 1.533166)])
def test_awr_of_standardised_rewards_is_reward_weighted(beta: float, size: float) -> None:
    """Rewards 1, 2, 3, 4: AWR's weights over their mean are RWR's; on logp = -1 the loss is w."""
    rewards = double([1, 2, 3, 4])
    z = (rewards - rewards.mean()) / rewards.std()
    w = AWR(beta, weight_cap=None).statistics(z, None, advantages=z)["weight"]
    assert round(effective_sample_size(w).item(), 6) == size
    assert (w / w.mean() - RWR(beta).weights(rewards)).abs().max() < 1e-12
    assert torch.equal(AWR(beta, weight_cap=None)(-torch.ones_like(z), None, advantages=z), w)
    assert torch.equal(RWR(beta)(-torch.ones_like(z), None, weights=w), w)


def test_awr_weights_are_capped_before_they_overflow() -> None:
    logp = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    advantages = torch.tensor([0.0, 3.0, 1e4])
    loss = AWR(beta=0.5, weight_cap=20.0)(logp, None, advantages=advantages)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert [round(x, 4) for x in loss.tolist()] == [1.0, 20.0, 20.0]
    assert torch.equal(gradient, -loss)
    found = AWR(beta=0.5, weight_cap=20.0).statistics(logp, None, advantages=advantages)
    assert found["clip_fraction"].tolist() == [0.0, 1.0, 1.0]


def test_effective_sample_size() -> None:
    """(1 + 3)^2 / (1 + 9) = 1.6; equal weights: their number, however large; none: 0."""
    assert round(effective_sample_size(double([1.0, 3.0, 0.0])).item(), 12) == 1.6
    assert effective_sample_size(torch.full((4, 2), 1e30)).item() == 8.0
    assert effective_sample_size(torch.zeros(3)).item() == 0.0
    assert effective_sample_size(torch.zeros(0)).item() == 0.0


def softmax_argmin(weights: Tensor, advantages: Tensor, ref: Tensor, loss: APA) -> Tensor:
    """The policy minimising sum_a weights(a) loss(a) on the simplex: Newton on softmax scores."""
    scores = ref.log()

    def objective(scores: Tensor) -> Tensor:
        logp = scores.log_softmax(0)
        return (weights * loss(logp, None, advantages=advantages, ref_logp=ref.log())).sum()

    for _ in range(60):
        scores = scores.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(scores), scores)
        hessian = torch.autograd.functional.hessian(objective, scores)
        # Scores matter up to a constant, so the Hessian has a null vector: the pseudo-inverse.
        scores = scores - torch.linalg.pinv(hessian, rtol=1e-12) @ gradient
    return scores.detach().softmax(0)


@pytest.mark.parametrize(
    "lambda_, normaliser, tilt, argmin, loss_at_argmin, loss_at_tilt",
    [
        (
            1.0,
            1.283628179,
            [0.784398762, 0.173138507, 0.042462731],
            [0.752316413, 0.195846172, 0.051837415],
            0.047773090,
            0.062345387,
        ),
        (
            10.0,
            1.003006837,
            [0.534646496, 0.290260893, 0.175092611],
            [0.534545488, 0.290293947, 0.175160565],
            0.000008962,
            0.000009014,
        ),
    ],
    ids=["lambda 1", "lambda 10"],
)
def test_apa_minimiser_and_fixed_point(
    lambda_: float,
    normaliser: float,
    tilt: list[float],
    argmin: list[float],
    loss_at_argmin: float,
    loss_at_tilt: float,
) -> None:
    """Three actions, pi_init = (.5, .3, .2), A = (.7, -.3, -1.3) of mean 0 under pi_init.

    With actions weighted by pi_init the minimiser on the simplex is not the tilt
    pi_init exp(A / lambda) / Z: the ignored log Z costs (log Z)^2 there. Weighted by the policy
    itself, again and again (on-policy), it converges to the tilt.
    """
    ref, advantages = double([0.5, 0.3, 0.2]), double([0.7, -0.3, -1.3])
    loss = APA(lambda_=lambda_)

    def value(policy: Tensor) -> float:
        per_action = loss(policy.log(), None, advantages=advantages, ref_logp=ref.log())
        return round((ref * per_action).sum().item(), 9)

    unnormalised = ref * torch.exp(advantages / lambda_)
    exact_tilt = unnormalised / unnormalised.sum()
    assert round(unnormalised.sum().item(), 9) == normaliser
    assert [round(p, 9) for p in exact_tilt.tolist()] == tilt
    assert value(exact_tilt) == loss_at_tilt

    off_policy = softmax_argmin(ref, advantages, ref, loss)
    assert [round(p, 9) for p in off_policy.tolist()] == argmin
    assert value(off_policy) == loss_at_argmin

    policy = ref
    for _ in range(60):
        policy = softmax_argmin(policy, advantages, ref, loss)
    assert [round(p, 9) for p in policy.tolist()] == tilt


def test_mle_worked_by_hand() -> None:
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    assert MLE()(logp).tolist() == [1.0, 2.0]
    loss = MLE()(logp, None, weights=torch.tensor([3.0, 0.0]))
    assert loss.tolist() == [3.0, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.tolist() == [-3.0, 0.0]


GRADCHECKED = [
    MLE(),
    APA(0.7),
    APA(0.7, form="repo"),
    AWR(1.3),
    PPO(dual_clip=2.0, kl_coef=0.3, kl_kind="k2", entropy_coef=0.1),
    *(GRPO(v, kl_coef=0.2, entropy_coef=0.1) for v in VARIANTS if v != "cispo"),
]


@pytest.mark.parametrize("loss", GRADCHECKED, ids=str)
def test_gradcheck(loss) -> None:
    """All but cispo, whose weight is a constant of the ratio it is made of."""
    tensors = torch.randn(5, 12, dtype=torch.float64)
    logp, entropy = tensors[0].requires_grad_(), tensors[1].requires_grad_()
    names = [name for name in (*loss.required, *loss.optional) if name != "cu_seqlens"]
    inputs = dict(zip(names, torch.randn(4, 12, dtype=torch.float64), strict=False))
    if "cu_seqlens" in loss.required:
        inputs["cu_seqlens"] = torch.tensor([0, 5, 5, 12])
    assert torch.autograd.gradcheck(
        lambda logp, entropy: loss(logp, entropy, **inputs), (logp, entropy)
    )


def test_value_loss_worked_by_hand() -> None:
    """R = 1, V_old = 0, c = .5. V = .2: .5 (.8)^2 = .32, gradient -.8. V = .9: clamp to .5, worse
    than V: .5 (.5)^2 = .125, gradient 0. V = -2: V is worse than its clamp -.5: 4.5, gradient -3.
    """
    values = double([0.2, 0.9, -2.0]).requires_grad_()
    returns, old_values = torch.ones(3), torch.zeros(3)
    loss = ValueLoss(clip=0.5)(values, returns, old_values)
    assert [round(x, 12) for x in loss.tolist()] == [0.32, 0.125, 4.5]
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    assert [round(x, 12) for x in gradient.tolist()] == [-0.8, 0.0, -3.0]
    found = ValueLoss(clip=0.5).statistics(values, returns, old_values)
    assert found["value_clip_fraction"].tolist() == [0.0, 1.0, 0.0]
    assert ValueLoss().statistics(values, returns) == {}
    plain = ValueLoss()(values, returns)
    assert [round(x, 12) for x in plain.tolist()] == [0.32, 0.005, 4.5]


LOSSES = [
    (MLE(), ("weights",)),
    (RWR(0.5), ("weights",)),
    (APA(lambda_=0.5), ("advantages", "ref_logp")),
    (AWR(beta=0.5), ("advantages",)),
    (PPO(kl_coef=0.1, entropy_coef=0.01), ("old_logp", "advantages", "ref_logp")),
    (GRPO("dapo", kl_coef=0.1), ("old_logp", "advantages", "ref_logp")),
    (GRPO("cispo"), ("old_logp", "advantages")),
    (GRPO(kl_coef=0.1, kl_kind="exact"), ("old_logp", "advantages", "kl")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss, names", LOSSES, ids=lambda x: type(x).__name__)
def test_low_precision_inputs_are_widened(loss, names: tuple, dtype: torch.dtype) -> None:
    """The loss is that of the rounded inputs in float32; gradients come in the input dtype."""
    logp, entropy, *inputs = torch.randn(5, 200).to(dtype)
    given = dict(zip(names, inputs, strict=False))
    wide = {name: x.double() for name, x in given.items()}
    narrow = {name: x.float() for name, x in given.items()}
    truth = loss(logp.double(), entropy.double(), **wide)
    eager = loss(logp.float(), entropy.float(), **narrow)
    leaf = logp.clone().requires_grad_()
    got = loss(leaf, entropy, **given)
    assert got.dtype == torch.float32 and got.shape == logp.shape
    assert_no_worse(got, eager, truth, torch.float32)
    (gradient,) = torch.autograd.grad(got.sum(), leaf)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("loss, names", LOSSES, ids=lambda x: type(x).__name__)
def test_inputs_are_constants_and_empty_is_fine(loss, names: tuple) -> None:
    logp = torch.randn(6, requires_grad=True)
    given = {name: torch.randn(6, requires_grad=True) for name in names}
    loss(logp, torch.zeros(6), **given).sum().backward()
    assert logp.grad is not None
    assert all((x.grad is None) == (name != "kl") for name, x in given.items())
    assert not any(x.requires_grad for x in loss.statistics(logp, None, **given).values())
    none = torch.empty(0, 4)
    assert loss(none, none, **dict.fromkeys(names, none)).shape == (0, 4)


@pytest.mark.parametrize("loss, names", LOSSES, ids=lambda x: type(x).__name__)
def test_compiles_without_a_graph_break(loss, names: tuple) -> None:
    logp, entropy, *inputs = torch.randn(5, 20)
    given = dict(zip(names, inputs, strict=False))
    compiled = torch.compile(loss.__call__, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logp, entropy, **given), loss(logp, entropy, **given))


def test_objects_are_frozen_comparable_and_say_what_they_take() -> None:
    assert PPO() == PPO(clip=0.2) != PPO(clip=0.3)
    assert len({APA(0.1), APA(0.1), APA(0.2)}) == 2
    assert MLE.required == () and MLE.optional == ("weights",)
    assert APA.required == ("advantages", "ref_logp")
    assert PPO().required == ("old_logp", "advantages")
    assert PPO(kl_coef=0.1).required == ("old_logp", "advantages", "ref_logp")
    assert PPO(kl_coef=0.1, kl_kind="exact").required == ("old_logp", "advantages", "kl")
    assert PPO(kl_kind="exact").required == ("old_logp", "advantages")
    with pytest.raises(dataclasses.FrozenInstanceError):
        APA(0.1).lambda_ = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: APA(0.0), "APA: expected lambda_ > 0 and finite, got APA"),
        (lambda: APA(math.nan), "APA: expected lambda_ > 0"),
        (lambda: APA(0.1, form="code"), "APA: expected form to be one of paper, repo, got APA"),
        (lambda: AWR(0.0), "AWR: expected beta > 0 and finite, got AWR"),
        (lambda: AWR(1.0, weight_cap=0.0), "AWR: expected weight_cap > 0 and finite, or None"),
        (lambda: PPO(clip=0.0), "PPO: expected clip > 0"),
        (lambda: PPO(dual_clip=1.0), "PPO: expected dual_clip > 1 and finite, or None"),
        (lambda: GRPO("gpro"), "GRPO: expected variant to be one of grpo, dr_grpo, dapo, cispo"),
        (lambda: GRPO(clip=-1.0), "GRPO: expected clip > 0"),
        (lambda: GRPO("cispo", dual_clip=3.0), "GRPO: expected no dual_clip for cispo"),
        (lambda: PPO(clip_high=-1.0), "PPO: expected clip_high > 0"),
        (lambda: PPO(kl_coef=-0.1), "PPO: expected kl_coef >= 0"),
        (lambda: PPO(kl_kind="k4"), "PPO: expected kl_kind to be one of k1, k2, k3, exact"),
        (lambda: PPO(entropy_coef=math.inf), "PPO: expected a finite entropy_coef"),
        (lambda: ValueLoss(clip=0.0), "ValueLoss: expected clip > 0 and finite, or None"),
    ],
)
def test_bad_parameters(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


L = torch.zeros(2, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: APA(0.1)(L, advantages=L), "APA: missing inputs: ref_logp"),
        (lambda: APA(0.1)(L), "APA: missing inputs: advantages, ref_logp"),
        (lambda: MLE()(L, wieghts=L), "MLE: unknown inputs: wieghts; it takes weights"),
        (
            lambda: PPO()(L, old_logp=L, advantages=torch.zeros(2)),
            r"PPO: expected advantages of the shape of logp, \(2, 3\), got \(2,\)",
        ),
        (
            lambda: PPO(kl_coef=0.1)(L, old_logp=L, advantages=L),
            "PPO: missing inputs: ref_logp",
        ),
        (
            lambda: PPO(entropy_coef=0.1)(L, old_logp=L, advantages=L),
            "PPO: missing inputs: entropy",
        ),
        (lambda: GRPO()(L, old_logp=L), "GRPO: missing inputs: advantages"),
        (
            lambda: GRPO("gspo")(L[0], old_logp=L[0], advantages=L[0]),
            r"GRPO: expected logp \[N\] and cu_seqlens \[S \+ 1\] for gspo, got logp \(3,\) and "
            r"cu_seqlens None",
        ),
        (
            lambda: GRPO("gspo")(
                L[0], old_logp=L[0], advantages=L[0, :1], cu_seqlens=torch.tensor([0, 1, 3])
            ),
            r"GRPO: expected advantages of the shape of logp, \(3,\), got \(1,\)",
        ),
        (lambda: ValueLoss(clip=0.2)(L, L), "ValueLoss: missing inputs: old_values"),
        (lambda: ValueLoss()(L, L[:1]), r"returns of the shape of values, \(2, 3\), got \(1, 3\)"),
    ],
)
def test_bad_inputs(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("loss, names", LOSSES, ids=lambda x: type(x).__name__)
def test_gpu_equals_cpu(loss, names: tuple) -> None:
    logp, entropy, *inputs = torch.randn(5, 1000)
    given = dict(zip(names, inputs, strict=False))
    truth = loss(logp.double(), entropy.double(), **{k: x.double() for k, x in given.items()})
    on_gpu = {name: x.cuda() for name, x in given.items()}
    got = loss(logp.cuda(), entropy.cuda(), **on_gpu).cpu()
    assert_no_worse(got, loss(logp, entropy, **given), truth, torch.float32)
