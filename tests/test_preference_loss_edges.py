"""preference_loss: NaN, infinities, empty sequences, views, bad bounds and inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from preferences import ALL, LOSSES, batch, device_of, run
from torch import Tensor

import fastalign as fa
from fastalign.losses import DPO, KTO, XPO, SimPO
from fastalign.ops.preference_loss import preference_loss


@pytest.mark.parametrize("name", ["all", "rpo, means", "xpo", "kto"])
@pytest.mark.parametrize("backend", ALL)
def test_nan_under_a_mask_does_not_leak(backend: str, name: str) -> None:
    b = batch([40, 17, 0, 9, 6, 6])
    b["mask"][-12:] = False  # a pair that is masked whole
    plain = run(backend, LOSSES[name], b)
    for fill in (math.nan, math.inf):
        dirty = dict(b)
        for key in ("logp", "ref_logp"):
            dirty[key] = b[key].masked_fill(~b["mask"], fill)
        for key, x in run(backend, LOSSES[name], dirty).items():
            assert torch.equal(x.nan_to_num(9.0), plain[key].nan_to_num(9.0)), key
    assert plain["loss"][-1] == 0.0 and plain["rewards/chosen"][-1].isnan()
    assert plain["gradient"][~b["mask"]].tolist() == [0.0] * int((~b["mask"]).sum())


@pytest.mark.parametrize("backend", ALL)
def test_nan_where_it_counts_stays_in_its_pair(backend: str) -> None:
    b = batch([4, 5, 6, 7])
    b["mask"][:] = True
    b["logp"][2] = math.nan
    found = run(backend, LOSSES["dpo"], b)
    assert found["loss"].isnan().tolist() == [True, False]
    assert found["gradient"].isnan().tolist() == [True] * 9 + [False] * 13


@pytest.mark.parametrize("size", [1e4, math.inf])
@pytest.mark.parametrize("backend", ALL)
def test_extreme_log_ratios(backend: str, size: float) -> None:
    """h = +-size: the loss is 0 and size, the slope of the chosen token 0 and -1; no NaN from the
    coefficients that are 0."""
    device = device_of(backend)
    logp = torch.tensor([-size, 0.0, 0.0, -size], device=device, requires_grad=True)
    with fa.backend(backend):
        losses, _ = preference_loss(
            DPO(1.0),
            logp,
            torch.tensor([0, 1, 2, 3, 4], device=device),
            ref_logp=torch.zeros(4, device=device),
        )
        (gradient,) = torch.autograd.grad(losses.sum(), logp)
    assert losses.tolist() == [size, 0.0]
    assert gradient.tolist() == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("backend", ALL)
def test_confident_pairs_keep_their_digits(backend: str) -> None:
    """h = 16: log(1 + e^-16) = 1.125351e-7 to float32's relative precision."""
    device = device_of(backend)
    with fa.backend(backend):
        losses, _ = preference_loss(
            DPO(1.0),
            torch.tensor([-4.0, -20.0], device=device),
            torch.tensor([0, 1, 2], device=device),
            ref_logp=torch.full((2,), -1.0, device=device),
        )
    assert losses.item() == pytest.approx(math.log1p(math.exp(-16.0)), rel=1e-6)


@pytest.mark.parametrize("backend", ALL)
def test_nothing_at_all(backend: str) -> None:
    device = device_of(backend)
    for sequences in (0, 4):
        logp = torch.empty(0, device=device, requires_grad=True)
        with fa.backend(backend):
            losses, found = preference_loss(
                DPO(),
                logp,
                torch.zeros(sequences + 1, dtype=torch.int32, device=device),
                ref_logp=logp.detach(),
            )
            (gradient,) = torch.autograd.grad(losses.sum(), logp)
        assert losses.tolist() == [0.0] * (sequences // 2) and gradient.shape == (0,)
        assert [len(x) for x in found.values()] == [sequences // 2] * 6


@pytest.mark.parametrize("offsets", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ALL)
def test_every_tensor_may_be_a_view(backend: str, offsets: torch.dtype) -> None:
    b = batch([300, 1000, 20, 7])
    b["cu_seqlens"] = b["cu_seqlens"].to(offsets)
    views = {k: torch.stack([x, x], -1)[..., 0] for k, x in b.items()}
    plain = run(backend, LOSSES["xpo"], b)
    for key, x in run(backend, LOSSES["xpo"], views).items():
        assert torch.equal(x, plain[key])


@pytest.mark.parametrize("backend", ALL)
def test_a_pair_does_not_depend_on_its_neighbours(backend: str) -> None:
    """And so neither on how a batch is cut into micro-batches."""
    b = batch([500, 1700, 900, 20])
    whole = run(backend, LOSSES["dpo"], b)
    tail = {k: x[2200:] if len(x.shape) and len(x) == 3120 else x for k, x in b.items()}
    tail["cu_seqlens"] = b["cu_seqlens"][2:] - 2200
    tail["weights"] = b["weights"][1:]
    part = run(backend, LOSSES["dpo"], tail)
    assert torch.equal(part["loss"], whole["loss"][1:])
    assert torch.equal(part["gradient"], whole["gradient"][2200:])


class Weighted(DPO):
    def __call__(self, *args: Any, **inputs: Any) -> Tensor:
        return 2.0 * super().__call__(*args, **inputs)


P, BOUNDS = torch.zeros(9), torch.tensor([0, 4, 9])
FLAGS = torch.tensor([True, False])


@pytest.mark.parametrize(
    "loss, args, kwargs, message",
    [
        (fa.losses.PPO(), (P, BOUNDS), {}, r"expected a preference loss .*, got PPO"),
        (Weighted(), (P, BOUNDS), {"ref_logp": P}, r"expected a preference loss .*, got Weighted"),
        (
            DPO(),
            (P, BOUNDS),
            {},
            r"expected ref_logp for DPO.*, missing: ref_logp, not taken: none",
        ),
        (
            DPO(),
            (P.to(torch.float8_e5m2), BOUNDS),
            {"ref_logp": P.to(torch.float8_e5m2)},
            r"expected logp of a floating dtype, got torch.float8_e5m2",
        ),
        (DPO(), (P, BOUNDS), {"ref_logp": P.long()}, r"expected ref_logp of .*, got torch.int64"),
        (SimPO(), (P, BOUNDS), {"ref_logp": P}, r"expected no inputs .*, not taken: ref_logp"),
        (DPO(), (P, BOUNDS), {"ref_logp": P, "z0": 0.0}, r"missing: none, not taken: z0"),
        (KTO(), (P, BOUNDS), {"ref_logp": P, "z0": 0.0}, r"missing: desirable"),
        (
            SimPO(),
            (P.long(), BOUNDS),
            {},
            r"logp \[N\] .*floating dtype, got shape \(9,\), torch.i",
        ),
        (SimPO(), (P.view(3, 3), BOUNDS), {}, r"logp \[N\] with cu_seqlens .*got shape \(3, 3\)"),
        (
            SimPO(),
            (P, BOUNDS.double()),
            {},
            r"int32 or int64 on cpu, got shape \(3,\), torch.float",
        ),
        (SimPO(), (P, torch.tensor([0, 9, 4])), {}, r"rise from 0 to N = 9, got \[0, 9, 4\]\.\.4"),
        (SimPO(), (P, torch.tensor([1, 4, 9])), {}, r"rise from 0 to N = 9, got \[1, 4, 9\]\.\.9"),
        (SimPO(), (P, torch.tensor([0, 4, 8])), {}, r"rise from 0 to N = 9, got \[0, 4, 8\]\.\.8"),
        (SimPO(), (P, torch.tensor([0, 2, 4, 9])), {}, r"\[2P \+ 1\], .*in turn, got 3 sequences"),
        (DPO(), (P, BOUNDS), {"ref_logp": P[:8]}, r"ref_logp like logp, \(9,\) on cpu, got \(8,\)"),
        (DPO(), (P, BOUNDS), {"ref_logp": P.to("meta")}, r"ref_logp like logp, .* on meta"),
        (SimPO(), (P, BOUNDS), {"mask": P[:8].bool()}, r"mask like logp, .*got \(8,\)"),
        (SimPO(), (P, BOUNDS), {"mask": P}, r"bool or integer mask, got torch.float32"),
        (
            KTO(),
            (P, BOUNDS),
            {"ref_logp": P, "z0": 0.0, "desirable": FLAGS[:1]},
            r"desirable \(2,\), bool or integer, got \(1,\) torch.bool",
        ),
        (
            XPO(),
            (P, BOUNDS),
            {"ref_logp": P, "chosen_is_ref": P[:1]},
            r"chosen_is_ref \(1,\), bool or integer, got \(1,\) torch.float32",
        ),
        (
            XPO(),
            (P, BOUNDS),
            {"ref_logp": P, "chosen_is_ref": FLAGS[:1].to("meta")},
            r"chosen_is_ref on cpu, got meta",
        ),
        (
            KTO(),
            (P, BOUNDS),
            {"ref_logp": P, "z0": P[:2], "desirable": FLAGS},
            r"z0 as a 0-d tensor, got shape \(2,\)",
        ),
    ],
)
def test_bad_input(loss: Any, args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match="^preference_loss: .*" + message):
        preference_loss(loss, *args, **kwargs)


@pytest.mark.parametrize(
    "bounds, bad",
    [
        ([0, 4, 3, 7, 9], [True, False]),  # falling inside the first pair
        ([1, 4, 5, 7, 9], [True, False]),
        ([0, 4, 5, 7, 8], [False, True]),
        ([0, 4, 5, 7, 10], [False, True]),
        ([-1, 4, 5, 7, 9], [True, False]),
    ],
)
def test_bounds_that_make_no_sense_are_nan_in_the_triton_kernel(
    bounds: list[int], bad: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host does not wait for a GPU to look at them; nothing is written beside the gradient."""
    from fastalign.kernels.preference_loss import preference_loss_bwd, preference_loss_fwd

    device = device_of("triton")
    logp, cu_seqlens = torch.zeros(9, device=device), torch.tensor(bounds, device=device)
    given = (logp, None, cu_seqlens, None)
    losses, slopes, _ = preference_loss_fwd(SimPO().form, *given, None, None)
    assert losses.isnan().tolist() == bad
    around, ones = torch.zeros(29, device=device), torch.ones(2, device=device)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda n, **_: around[10 : 10 + n])
        dlogp = preference_loss_bwd(ones, torch.ones_like(slopes), cu_seqlens, None, 9)
    assert dlogp.shape == (9,) and torch.equal(around[:10], torch.zeros_like(around[:10]))
    assert torch.equal(around[19:], torch.zeros_like(around[19:]))
    single, flags = torch.tensor(bounds[2:], device=device) - 5, torch.ones(2, device=device).bool()
    z0 = torch.zeros((), device=device)
    losses, *_ = preference_loss_fwd(KTO().form, logp[:4], logp[:4], single, None, flags, z0)
    assert losses.isnan().any() == (bounds[2] != 5 or bounds[4] != 9)
