"""Loss objects: published batch, formulas and gradients, APA's fixed points, overflow, messages."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastalign.losses import APA, MLE, PPO, ValueLoss
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


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2.0, 1.0, -2.0, -2.0),  # inside the band
        (2.0, 1.5, -2.6, 0.0),  # clipped at 1.3: no reason to raise it further
        (2.0, 0.5, -1.0, -1.0),  # below the band, but a good token: the minimum is unclipped
        (-2.0, 0.5, 1.6, 0.0),  # clipped at 0.8
        (-2.0, 1.5, 3.0, 3.0),  # above the band and a bad token: unclipped
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_ppo_cases(advantage: float, ratio: float, loss: float, slope: float) -> None:
    """clip .2 below and .3 above; loss = -min(ratio A, clamp(ratio) A), slope = dloss/dlogp."""
    old_logp = double([-1.0])
    logp = (old_logp + math.log(ratio)).requires_grad_()
    got = PPO(clip=0.2, clip_high=0.3)(
        logp, None, old_logp=old_logp, advantages=double([advantage])
    )
    (gradient,) = torch.autograd.grad(got.sum(), logp)
    assert round(got.item(), 9) == loss
    assert round(gradient.item(), 9) == slope


def test_ppo_equals_the_textbook_form() -> None:
    logp, old_logp, advantages, ref_logp, entropy = torch.randn(5, 400, dtype=torch.float64)
    logp.requires_grad_()
    entropy.requires_grad_()
    ratio = torch.exp(logp - old_logp)
    textbook = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    textbook = textbook + 0.1 * (torch.exp(ref_logp - logp) - 1 - (ref_logp - logp))
    textbook = textbook - 0.01 * entropy
    inputs = {"old_logp": old_logp, "advantages": advantages, "ref_logp": ref_logp}
    got = PPO(kl_coef=0.1, entropy_coef=0.01)(logp, entropy, **inputs)
    assert (got - textbook).abs().max().item() <= DOUBLE.floor
    for leaf in (logp, entropy):
        (one,) = torch.autograd.grad(got.sum(), leaf, retain_graph=True)
        (other,) = torch.autograd.grad(textbook.sum(), leaf, retain_graph=True)
        assert (one - other).abs().max().item() <= DOUBLE.grad_floor


@pytest.mark.parametrize("kind, want", [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_ppo_kl_kinds(kind: str, want: float) -> None:
    """logp - ref_logp = .5 and A = 0, so the loss is 2 kl."""
    inputs = {name: double([-1.0]) for name in ("old_logp", "ref_logp")}
    loss = PPO(kl_coef=2.0, kl_kind=kind)(double([-0.5]), advantages=double([0.0]), **inputs)
    assert round(loss.item(), 12) == round(2.0 * want, 12)


def test_ppo_takes_no_clip_at_all() -> None:
    """A clip of 1 or more leaves the ratio free below; a huge one leaves it free on both sides."""
    inputs = {"old_logp": double([-9.0, 0.0]), "advantages": double([1.0, -1.0])}
    loss = PPO(clip=1e6)(double([0.0, -9.0]), **inputs)
    assert [round(x, 9) for x in loss.tolist()] == [
        round(-math.exp(9.0), 9),
        round(math.exp(-9.0), 9),
    ]


def test_ppo_survives_a_ratio_that_overflows() -> None:
    """Log-ratios of +-1e4: clipped tokens have finite loss and gradient 0; a bad token whose ratio
    is infinite says so; nothing is NaN.
    """
    logp = torch.tensor([0.0, 0.0, 0.0, -1e4, -1e4], requires_grad=True)
    inputs = {
        "old_logp": torch.tensor([-1e4, -1e4, -1e4, 0.0, 0.0]),
        "advantages": torch.tensor([1.0, 0.0, -1.0, 1.0, -1.0]),
    }
    loss = PPO()(logp, **inputs)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert [round(x, 6) for x in loss.tolist()] == [-1.2, 0.0, math.inf, 0.0, 0.8]
    assert gradient.tolist() == [0.0, 0.0, math.inf, 0.0, 0.0]


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
    plain = ValueLoss()(values, returns)
    assert [round(x, 12) for x in plain.tolist()] == [0.32, 0.005, 4.5]


LOSSES = [
    (MLE(), ("weights",)),
    (APA(lambda_=0.5), ("advantages", "ref_logp")),
    (PPO(kl_coef=0.1, entropy_coef=0.01), ("old_logp", "advantages", "ref_logp")),
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
    assert logp.grad is not None and all(x.grad is None for x in given.values())
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
    with pytest.raises(dataclasses.FrozenInstanceError):
        APA(0.1).lambda_ = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: APA(0.0), "APA: expected lambda_ > 0 and finite, got APA"),
        (lambda: APA(math.nan), "APA: expected lambda_ > 0"),
        (lambda: PPO(clip=0.0), "PPO: expected clip > 0"),
        (lambda: PPO(clip_high=-1.0), "PPO: expected clip_high > 0"),
        (lambda: PPO(kl_coef=-0.1), "PPO: expected kl_coef >= 0"),
        (lambda: PPO(kl_kind="k4"), "PPO: expected kl_kind to be one of k1, k2, k3"),
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
