"""The loss head's ops inside torch.compile(fullgraph=True): as many graphs for 6 sizes as for 2.
And opcheck of those that only gradients reach.

Of each public op its own test file; linear_loss: tests/test_linear_loss_compile.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastalign import losses
from fastalign.ops import linear_kl, linear_logprobs, policy_loss, token_kl, token_logprobs
from fastalign.ops.linear_kl import linear_kl_backward
from fastalign.ops.linear_logprobs import linear_logprobs_backward
from fastalign.ops.token_kl import kl_dlogits_out_op, kl_stats
from fastalign.ops.token_logprobs import dlogits_out_op, row_stats

SIZES = (30, 31, 33, 40, 57, 64)
TEMPERATURES = (0.5, 0.6, 0.8, 1.0, 1.3, 0.5)
H, V = 16, 50
SLAB = 16 * V * 4
NAMES = ("advantages", "old_logp", "ref_logp")
Op = Callable[[Tensor, Tensor, Tensor, float], Tensor]

OPS: dict[str, tuple[Op, int, int]] = {
    "linear_logprobs": (
        lambda x, w, y, t: linear_logprobs(x, w, y, temperature=t).sum(),
        H,
        H,
    ),
    "linear_logprobs, slabs": (
        lambda x, w, y, t: linear_logprobs(
            x, w, y, temperature=t, workspace=SLAB, return_entropy=True
        )[1].sum(),
        H,
        H,
    ),
    "linear_kl": (
        lambda x, w, y, t: linear_kl(
            x, w, x.detach() + 0.1, w.detach(), temperature=t, mask=y > 0, workspace=2 * SLAB
        ).sum(),
        H,
        H,
    ),
    "token_logprobs": (lambda x, w, y, t: token_logprobs(x, y, temperature=t).sum(), V, H),
    "token_kl": (lambda x, w, y, t: token_kl(x, x.detach() + w[y], temperature=t).sum(), V, V),
    "policy_loss": (
        lambda x, w, y, t: policy_loss(
            losses.PPO(kl_coef=0.1), x[:, 0], {name: w[y, i] for i, name in enumerate(NAMES)}
        )[0],
        1,
        3,
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_sizes_and_temperatures_are_no_compilation_more(name: str) -> None:
    op, width, of_weight = OPS[name]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    weight = torch.randn(V, of_weight)
    compiled = torch.compile(
        lambda x, y, t: op(1.0 * x, weight, y, t), fullgraph=True, backend="aot_eager"
    )
    graphs = []
    for n, temperature in zip(SIZES, TEMPERATURES, strict=True):
        x, y = torch.randn(n, width, requires_grad=True), torch.randint(V, (n,))
        results = []
        for f in (compiled, lambda x, y, t: op(1.0 * x, weight, y, t)):
            value = f(x, y, temperature)
            results.append((value, *torch.autograd.grad(value, x)))
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)
        graphs.append(counters["unique_graphs"] - before)
    assert graphs == [1, 2, 2, 2, 2, 2]


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_gradients_in_place_pass_opcheck() -> None:
    x, r, y, g = numbers(5, 11), numbers(5, 11), torch.arange(5) - 1, numbers(5)
    settings = (y, torch.ones(1), 4.0, -1)
    known = row_stats(x, *settings)
    for e in (g, None):
        torch.library.opcheck(dlogits_out_op, (x.clone(), g, e, x, *settings, *known))
    stats = kl_stats(x, r, *settings)
    known_kl = [*stats[:5], *stats[6:]]
    torch.library.opcheck(kl_dlogits_out_op, (x.clone(), g, None, g, x, r, *settings, *known_kl))


@pytest.mark.parametrize("need", [[True, True, True], [True, False, False], [False, True, False]])
@pytest.mark.parametrize("known_rows", [True, False], ids=["rows known", "rows to be found"])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "slabs"])
def test_backward_ops_pass_opcheck(keep: bool, known_rows: bool, need: list[bool]) -> None:
    n, slab = 9, 4
    h, w, b = numbers(n, H), numbers(V, H), numbers(V)
    y, t, g = torch.arange(n) - 1, torch.ones(1), numbers(n)
    settings = (0.0, -1, torch.arange(1, n) if known_rows else None, slab)
    logits = numbers(n if keep else 0, V)
    known = row_stats(torch.nn.functional.linear(h, w, b), y, t, 0.0, -1)
    args = (g, g, h, w, y, b, t, *settings, False, logits, *known, need)
    torch.library.opcheck(linear_logprobs_backward, args)
    rh, rw = numbers(n, 7), numbers(V, 7)
    stats = numbers(n, 8)
    both = (stats, logits, logits.clone())
    torch.library.opcheck(
        linear_kl_backward, (g, h, w, b, rh, rw, None, y, t, *settings, *both, need)
    )
