"""plan: the mode, the slab, products and bytes of each op, from a budget of bytes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from heads import V, gradients, likelihood, make, products
from torch import Tensor

from fastalign.ops import linear_kl, linear_logprobs, linear_loss
from fastalign.ops.plan import CPU_BESIDE, CPU_SLAB, GPU_BESIDE, default_workspace, plan
from fastalign.testing import assert_no_worse

PLAN = importlib.import_module("fastalign.ops.plan")


def test_it_says_what_it_chose() -> None:
    one = plan(16384, 4096, 128_256, workspace=1 << 30)
    assert (one.mode, one.slab, one.slabs, one.gemms) == ("single pass", 4096, 4, 3)
    assert one.flops == 3 * 2 * 16384 * 4096 * 128_256
    assert one.workspace == 4096 * 128_256 * 2 <= 1 << 30
    assert one.accumulator == 4 * 4096 * 128_256
    assert "single pass: 4 slab(s) of 4096 tokens, 3 GEMMs" in str(one)
    idle = plan(16384, 4096, 128_256, weight_grad=False, hidden_grad=False)
    assert (idle.mode, idle.gemms) == ("forward only", 1)
    groups = plan(16384, 4096, 128_256, longest_group=9000)
    assert (groups.mode, groups.gemms) == ("two stages", 4)


def test_the_accumulator_is_what_the_head_needs_beside_the_gradient() -> None:
    def bytes_of(**options: object) -> int:
        sizes = (16384, 4096, 128_256)
        return plan(*sizes, workspace=1 << 30, **options).accumulator  # type: ignore[arg-type]

    assert bytes_of() == bytes_of(op="linear_logprobs") == 4 * 4096 * 128_256
    assert bytes_of(own_accumulator=False) == 0
    assert bytes_of(weight_grad=False) == bytes_of(weight_grad=False, bias_grad=True) == 0
    assert bytes_of(dtype=torch.float32) == 0
    assert plan(4096, 4096, 128_256, workspace=1 << 30).accumulator == 0  # one slab


@pytest.mark.parametrize(
    ("needed", "single_pass", "kept"),
    [
        (dict(), 3, 3),
        (dict(weight_grad=False), 2, 2),
        (dict(hidden_grad=False), 2, 2),
        (dict(weight_grad=False, hidden_grad=False, bias_grad=True), 1, 1),
    ],
    ids=["all", "frozen head", "frozen body", "bias alone"],
)
def test_products_for_the_gradients_needed(
    needed: dict[str, bool], single_pass: int, kept: int
) -> None:
    loss = plan(64, 16, 500, **needed)  # type: ignore[arg-type]
    assert (loss.mode, loss.gemms) == ("single pass", single_pass)
    logp = plan(64, 16, 500, op="linear_logprobs", **needed)  # type: ignore[arg-type]
    assert (logp.mode, logp.gemms) == ("keep logits", kept)
    assert logp.flops == kept * 2 * 64 * 16 * 500


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", ["linear_logprobs", "linear_kl"])
def test_logits_are_kept_where_a_slab_of_gradients_fits_beside(op: str, device: str) -> None:
    """To the byte: room for all logits and the least slab, and one byte less."""
    tokens, vocab = 3000, 1000
    least = CPU_BESIDE if device == "cpu" else GPU_BESIDE
    width = 8 if op == "linear_kl" else None
    row = vocab * 4 * (1 if width is None else 2)

    def chosen(workspace: int) -> object:
        found = plan(
            tokens,
            16,
            vocab,
            op=op,
            dtype=torch.float32,
            device=device,
            reference_width=width,
            workspace=workspace,
        )
        assert found.workspace <= workspace
        return found.mode, found.slab, found.kept, found.workspace

    enough = tokens * row + least * vocab * 4
    again = min(CPU_SLAB, tokens) if device == "cpu" else tokens
    assert chosen(enough) == ("keep logits", least, tokens, enough)
    assert chosen(enough - 1) == ("recompute", again, 0, again * row)
    whole = CPU_SLAB if device == "cpu" else tokens
    most = tokens * row + whole * vocab * 4
    assert chosen(most) == chosen(2 * most) == ("keep logits", whole, tokens, most)


def test_few_tokens_need_as_few_rows_beside() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            found = plan(
                37,
                16,
                200,
                op="linear_logprobs",
                dtype=dtype,
                device=device,
                workspace=2 * 37 * 200 * dtype.itemsize,
            )
            assert (found.mode, found.slab, found.slabs) == ("keep logits", 37, 1)


def test_narrow_numbers_on_a_cpu_are_one_slab() -> None:
    """Over several slabs their products would be of widened operands."""
    for op in ("linear_loss", "linear_logprobs"):
        narrow = plan(5000, 768, 1000, op=op, dtype=torch.bfloat16, device="cpu")
        assert (narrow.slab, narrow.slabs, narrow.accumulator) == (5000, 1, 0)
        wide = plan(5000, 768, 1000, op=op, dtype=torch.float32, device="cpu")
        assert (wide.slab, wide.slabs) == (CPU_SLAB, 5)
    # Where a whole slab of gradients does not fit beside the logits, they are not kept.
    fits = int(1.9 * 5000 * 1000 * 2)
    short = plan(
        5000, 768, 1000, op="linear_logprobs", dtype=torch.bfloat16, device="cpu", workspace=fits
    )
    assert (short.mode, short.slabs) == ("recompute", 1)


def test_a_fixed_slab_does_not_follow_the_number_of_tokens() -> None:
    def fixed(tokens: int, device: str) -> tuple[str, int, int, int]:
        found = plan(
            tokens,
            16,
            1000,
            op="linear_logprobs",
            dtype=torch.float32,
            device=device,
            batch_invariant=True,
            workspace=4096 * 4000,
        )
        assert found.workspace <= 4096 * 4000
        return found.mode, found.slab, found.kept, found.workspace // 4000

    assert fixed(7, "cpu") == ("keep logits", CPU_SLAB, CPU_SLAB, 2 * CPU_SLAB)
    assert fixed(3 * CPU_SLAB, "cpu") == ("keep logits", CPU_SLAB, 3 * CPU_SLAB, 4096)
    assert fixed(3 * CPU_SLAB + 1, "cpu") == ("recompute", CPU_SLAB, 0, CPU_SLAB)
    assert fixed(7, "cuda") == fixed(5000, "cuda") == ("recompute", 4096, 0, 4096)


def test_a_fixed_slab_does_not_follow_the_longest_group() -> None:
    def fixed(longest: int, device: str) -> tuple[str, int]:
        options: Any = dict(dtype=torch.float32, device=device, workspace=5000 * 4000)
        found = plan(7000, 16, 1000, longest_group=longest, batch_invariant=True, **options)
        return found.mode, found.slab

    most = 5000 - 5000 % 128
    assert fixed(20, "cpu") == fixed(CPU_SLAB, "cpu") == ("single pass", CPU_SLAB)
    assert fixed(CPU_SLAB + 1, "cpu") == fixed(6000, "cpu") == ("two stages", CPU_SLAB)
    assert fixed(20, "cuda") == fixed(most, "cuda") == ("single pass", most)
    assert fixed(most + 1, "cuda") == fixed(6000, "cuda") == ("two stages", most)


def test_a_reference_model_is_counted_in_its_own_dtype_and_width() -> None:
    """bfloat16 beside float32: 6 bytes a logit, and products of H and of H'."""
    n, h, ref_h, v = 4096, 512, 256, 32_000
    for op, mode, again in (("linear_loss", "single pass", 1), ("linear_kl", "recompute", 2)):
        found = plan(
            n,
            h,
            v,
            op=op,
            reference_width=ref_h,
            reference_dtype=torch.float32,
            workspace=1024 * 6 * v,
        )
        assert (found.mode, found.slab, found.slabs) == (mode, 1024, 4)
        assert (found.gemms, found.workspace) == (2 * again + 2, 1024 * 6 * v)
        assert found.flops == 2 * n * v * (again * (h + ref_h) + 2 * h)
    kept = plan(n, h, v, op="linear_kl", reference_width=h, workspace=3 * n * 2 * v)
    assert (kept.mode, kept.gemms, kept.workspace) == ("keep logits", 4, 3 * n * 2 * v)
    idle = plan(n, h, v, op="linear_kl", reference_width=h, hidden_grad=False, weight_grad=False)
    assert (idle.mode, idle.gemms, idle.kept) == ("forward only", 2, 0)


def test_the_default_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLAN, "HOST_MEMORY", 64 << 30)
    assert default_workspace("cpu") == 1 << 30
    monkeypatch.setattr(PLAN, "HOST_MEMORY", 8 << 30)
    assert default_workspace("cpu") == 1 << 29
    small = plan(4096, 64, 100_000, dtype=torch.bfloat16, device="cpu")
    assert small.slab == (1 << 29) // 200_000 // 16 * 16
    monkeypatch.setattr(PLAN, "HOST_MEMORY", 1 << 20)  # less than a row: one row all the same
    assert plan(4096, 64, 100_000, dtype=torch.bfloat16, device="cpu").slab == 1


def test_what_cannot_be_planned_is_named() -> None:
    with pytest.raises(ValueError, match="plan: expected op.*linear_kl, got 'token_kl'"):
        plan(1, 2, 3, op="token_kl")
    with pytest.raises(ValueError, match="reference_width with linear_kl, got None"):
        plan(1, 2, 3, op="linear_kl")
    with pytest.raises(ValueError, match="linear_loss: .*>= 6 bytes.*3 logits., got 5"):
        plan(1, 2, 3, workspace=5)
    with pytest.raises(ValueError, match="linear_kl: .*>= 18 bytes.*of both models., got 17"):
        plan(
            1,
            2,
            3,
            op="linear_kl",
            reference_width=2,
            reference_dtype=torch.float32,
            workspace=17,
        )


BY_BIAS: dict[str, tuple[int, Callable[[list[Tensor]], Tensor]]] = {
    "linear_loss": (1, lambda x: linear_loss(x[0], x[1], x[2], likelihood, bias=x[3]).loss),
    "linear_logprobs": (1, lambda x: linear_logprobs(x[0], x[1], x[2], bias=x[3]).sum()),
    "linear_kl": (2, lambda x: linear_kl(x[0], x[1], x[0].detach() + 1, x[1], bias=x[3]).sum()),
}


@pytest.mark.parametrize("op", BY_BIAS)
def test_a_gradient_of_the_bias_alone_is_planned_and_costs_no_product(op: str) -> None:
    gemms, f = BY_BIAS[op]
    hidden, weight, targets, _ = make()
    bias = torch.linspace(-1, 1, V).requires_grad_()
    (want,) = gradients(f([hidden, weight, targets, bias]), bias)
    frozen = [hidden.detach(), weight.detach(), targets, bias]
    got: list[Tensor] = []
    assert products(lambda: got.extend(gradients(f(frozen), bias))) == gemms
    assert_no_worse(got[0], want, want.double(), torch.float32, grad=True)
