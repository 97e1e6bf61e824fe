"""The losses of fastalign/ops/policy_terms.py and their slopes, token by token, in one launch.

What ``linear_loss`` calls on every slab where ``policy_loss`` would sum over all tokens: the value
v_i, dv_i/dlogp_i and dv_i/dH_i, without autograd.

C++: csrc/policy_loss.cpp. Triton: kernels/policy_loss.py. Tests: tests/test_policy_loss.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastalign.backend import choose, plain
from fastalign.losses.inputs import constants, wide
from fastalign.losses.ratio import exact_kl_coef
from fastalign.ops.policy_reduce import take_tokens
from fastalign.ops.policy_terms import Form, Tokens, form_of, terms_reference


def _terms(
    kind: int,
    kl: int,
    coefficients: list[float],
    logp: Tensor,
    entropy: Tensor | None,
    advantages: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> values, dlogp, dentropy: [N]; dentropy [0] where the loss does not use the entropy."""
    form = Form(kind, kl, *coefficients)
    x = Tokens(logp, entropy, advantages, old_logp, ref_logp, weights)
    which = choose("policy_loss", logp)
    none = logp.new_empty(0)
    if which == "triton":
        from fastalign.kernels.policy_loss import policy_loss_terms_fwd

        values, slope, entropy_slope = policy_loss_terms_fwd(form, x)
        return values, slope, none if entropy_slope is None else entropy_slope
    if which == "cpp":
        return torch.ops.fastalign_cpp.policy_loss_terms(*form[:8], *x[:6])
    terms = terms_reference(form, x)
    slope = torch.full_like(terms.policy, -form.entropy_coef) if form.entropy_coef else none
    return terms.policy, terms.slope, slope


policy_loss_terms_op = torch.library.custom_op(
    "fastalign::policy_loss_terms", _terms, mutates_args=()
)


@policy_loss_terms_op.register_fake
def _(
    kind: int,
    kl: int,
    coefficients: list[float],
    logp: Tensor,
    entropy: Tensor | None,
    advantages: Tensor | None,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    form = Form(kind, kl, *coefficients)
    values, slope = logp.new_empty(logp.shape), logp.new_empty(logp.shape)
    return values, slope, logp.new_empty(logp.shape if form.entropy_coef else (0,))


def fused(loss: object) -> bool:
    """Whether ``policy_loss_terms`` knows this loss: one of fastalign.losses, one value a token."""
    return form_of(loss) is not None and not getattr(loss, "per_sequence", False)


def policy_loss_terms(
    loss: Any, logp: Tensor, entropy: Tensor | None, inputs: Mapping[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss of every token and its derivatives by logp and entropy in one launch; no autograd.

    Args:
        loss: a loss object for which ``fused`` holds.
        logp: [N]; float32 (float64: the reference), narrower dtypes are widened.
        entropy: [N], or None where the loss has no entropy term.
        inputs: the loss's inputs by name, [N] each.

    Returns:
        values, dlogp: [N]; dentropy: [N], None where the loss does not use the entropy. (By an
        exact ``kl`` the derivative is its coefficient, ``exact_kl_coef``.)

    Raises:
        ValueError: a loss that is not fused, or inputs that do not fit it.
    """
    form = form_of(loss)
    if form is None or not fused(loss):
        raise ValueError(f"policy_loss_terms: expected a fused per-token loss, got {loss!r}")
    found = constants(loss, logp, inputs, loss.required, loss.optional)
    if not form.entropy_coef:
        entropy = None
    elif entropy is None:
        raise ValueError(f"{type(loss).__name__}: missing inputs: entropy (entropy_coef is not 0)")
    entropy = None if entropy is None else entropy.detach()
    x = Tokens(**take_tokens(wide(logp.detach()), entropy, found))
    call: Any = _terms if plain(logp) else policy_loss_terms_op
    values, slope, entropy_slope = call(form.kind, form.kl, list(form[2:]), *x[:6])
    kl_coef = exact_kl_coef(loss)
    if kl_coef:
        values = values + kl_coef * found["kl"].detach()
    return values, slope, entropy_slope if form.entropy_coef else None
