"""Token-level rewards: hand-worked responses, three backends against float64, masks, packed beside
padded, few long sequences, NaN and infinities, statistics."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign.ops.kl_estimate import KINDS, kl_estimate
from fastalign.ops.token_rewards import _token_rewards, token_rewards
from fastalign.testing import assert_no_worse

BACKENDS = ["reference", "cpp", "triton"]
KERNELS = ["cpp", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1),  # one token
    (7, 5),  # rows shorter than a register
    (3, 1025),  # one past a block, and past the run that C++ adds in float32
    (40, 501),  # several rows for each of two threads
    (2, 9001),  # Triton splits the rows in three chunks
]
# The second sequence is empty, the fourth has one token.
OFFSETS = [0, 700, 700, 1290, 1291, 1301]
Inputs = dict[str, Any]


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make(rows: int, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Inputs:
    """Log-probs of three models, scores, and a mask with holes and padding at both ends."""
    generator = torch.Generator().manual_seed(0)
    logp = -3.0 * torch.rand(shape, generator=generator)
    ref_logp, dpo_logp = (logp + 0.4 * torch.randn(2, *shape, generator=generator)).unbind()
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[..., -1] = False
    mask[..., :2] = False
    made = {
        "logp": logp.to(dtype),
        "ref_logp": ref_logp.to(dtype),
        "scores": 2.0 * torch.randn(rows, generator=generator),
        "dpo_logp": dpo_logp.to(dtype),
        "finished": torch.rand(rows, generator=generator) < 0.5,
        "mask": mask,
    }
    return {name: x.to(device) for name, x in made.items()}


PLAIN = {"kl_coef": 0.1}
FULL = {
    "kl_coef": 0.05,
    "clip_score": 1.5,
    "missing_eos_penalty": 0.75,
    "dpo_coef": 0.3,
    "clip_dpo": 0.1,
}


def shaped(inputs: Inputs, names: str, **settings: Any) -> list[Tensor]:
    given = {name: inputs[name] for name in names.split()}
    logp, ref_logp, scores = (given.pop(name) for name in ("logp", "ref_logp", "scores"))
    rewards, statistics = token_rewards(logp, ref_logp, scores, **given, **settings)
    return [rewards, statistics["kl"], statistics["sequence_kl"]]


def textbook(inputs: Inputs, names: str, kl_kind: str, settings: Inputs) -> list[Tensor]:
    """Row by row, in float32 and in other words than the reference's."""
    logp, ref = inputs["logp"].float(), inputs["ref_logp"].float()
    d = logp - ref
    kl = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1.0 + d}[kl_kind]
    bounds = inputs.get("cu_seqlens")
    if bounds is None:
        bounds = torch.arange(0, logp.numel() + 1, logp.shape[1])
    flat = kl.reshape(-1)
    kept = inputs["mask"].reshape(-1) if "mask" in names else torch.ones_like(flat).bool()
    rewards, sums = torch.zeros_like(flat), []
    for row, (a, z) in enumerate(zip(bounds.tolist(), bounds.tolist()[1:], strict=False)):
        here = (torch.arange(a, z, device=kept.device))[kept[a:z]]
        rewards[here] = -settings["kl_coef"] * flat[here]
        if "dpo_logp" in names:
            implied = (inputs["dpo_logp"].float() - ref).reshape(-1)[here] * settings["dpo_coef"]
            rewards[here] += implied.clamp(-settings["clip_dpo"], settings["clip_dpo"])
        if len(here) > 0:
            score = inputs["scores"][row].float()
            if "clip_score" in settings:
                score = score.clamp(-settings["clip_score"], settings["clip_score"])
            if "finished" in names and not inputs["finished"][row]:
                score = score - settings["missing_eos_penalty"]
            rewards[here[-1]] += score
        sums.append(flat[here].sum())
    sequence_kl = torch.stack(sums) if sums else flat.new_zeros(0)
    return [rewards.view(kl.shape), flat[kept].sum() / max(1, int(kept.sum())), sequence_kl]


LOGP = "logp ref_logp scores"
ALL = "logp ref_logp scores dpo_logp finished mask"


def compare(backend: str, inputs: Inputs, names: str, kl_kind: str, settings: Inputs) -> None:
    names += " cu_seqlens" if "cu_seqlens" in inputs else ""
    with fa.backend(backend):
        found = shaped(inputs, names, kl_kind=kl_kind, **settings)
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    truth = shaped(wide, names, kl_kind=kl_kind, **settings)
    eager = textbook(inputs, names, kl_kind, settings)
    for got, plain, true in zip(found, eager, truth, strict=True):
        assert got.dtype == torch.float32 and true.dtype == torch.float64
        assert_no_worse(got, plain, true, inputs["logp"].dtype)


@pytest.mark.parametrize("kl_kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_against_float64(
    backend: str, shape: tuple[int, int], dtype: torch.dtype, kl_kind: str
) -> None:
    inputs = make(shape[0], shape, dtype, device_of(backend))
    compare(backend, inputs, ALL, kl_kind, FULL)
    compare(backend, inputs, LOGP, kl_kind, PLAIN)


@pytest.mark.parametrize("kl_kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_against_float64(backend: str, dtype: torch.dtype, kl_kind: str) -> None:
    inputs = make(5, (1301,), dtype, device_of(backend))
    inputs["cu_seqlens"] = torch.tensor(OFFSETS, device=inputs["logp"].device)
    compare(backend, inputs, ALL, kl_kind, FULL)
    compare(backend, inputs, LOGP, kl_kind, PLAIN)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ppo_worked_by_hand(backend: str) -> None:
    """kl_coef .1, k1. Response 1 keeps tokens 1 and 2: -.1 * (-1 + 1.5) = -.05 and
    -.1 * (-2 + 1) + clip(3, 2.5) = 2.6. Response 2 was cut off: -.1 * (-1 + 1) + (-.4 - 1) = -1.4.
    KL: .5 - 1 = -.5 and 0; over three tokens -1/6.
    """
    device = device_of(backend)
    logp = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -9.0, -9.0]], device=device)
    ref = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -3.0, -3.0]], device=device)
    with fa.backend(backend):
        rewards, statistics = token_rewards(
            logp,
            ref,
            torch.tensor([3.0, -0.4], device=device),
            kl_coef=0.1,
            clip_score=2.5,
            finished=torch.tensor([1, 0], device=device),
            missing_eos_penalty=1.0,
            mask=torch.tensor([[1, 1, 0], [1, 0, 0]], device=device),
        )
    want = [[-0.05, 2.6, 0.0], [-1.4, 0.0, 0.0]]
    assert rewards.tolist() == [pytest.approx(row, rel=1e-6) for row in want]
    assert statistics["sequence_kl"].tolist() == [-0.5, 0.0]
    assert statistics["kl"].item() == pytest.approx(-1 / 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rto_worked_by_hand(backend: str) -> None:
    """dpo_coef .05 with bound .05, kl_coef .01, score 2: log(pi_dpo / pi_ref) = .5, -.2, 3 gives
    .025, -.01 and .15, held at .05; log(pi / pi_ref) = .3, -.1, .3 costs .003, -.001 and .003.
    Rewards .022, -.009, 2.047; and 1.997 where DPO's policy is pi_ref at the last token.
    """
    device = device_of(backend)
    ref = torch.tensor([-1.0, -2.0, -4.0], device=device)
    ref = ref.repeat(2)
    with fa.backend(backend):
        rewards, _ = token_rewards(
            ref + torch.tensor([0.3, -0.1, 0.3] * 2, device=device),
            ref,
            torch.tensor([2.0, 2.0], device=device),
            kl_coef=0.01,
            clip_score=10.0,
            dpo_logp=ref + torch.tensor([0.5, -0.2, 3.0, 0.5, -0.2, 0.0], device=device),
            dpo_coef=0.05,
            clip_dpo=0.05,
            cu_seqlens=torch.tensor([0, 3, 6], device=device),
        )
    assert rewards.tolist() == pytest.approx([0.022, -0.009, 2.047, 0.022, -0.009, 1.997], rel=1e-4)


def test_without_bounds_the_dpo_rewards_add_up_to_dpos() -> None:
    """RTO: beta sum log(pi_dpo / pi_ref) is the response's implicit reward."""
    ref, dpo = torch.randn(2, 4, 9, dtype=torch.float64)
    scores = torch.zeros(4, dtype=torch.float64)
    rewards, _ = token_rewards(ref, ref, scores, kl_coef=1.0, dpo_logp=dpo, dpo_coef=0.1)
    want = 0.1 * (dpo - ref).sum(1)
    assert_no_worse(rewards.sum(1), want, want, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_of_the_estimate_alone(backend: str) -> None:
    """Neither kl_coef nor scores are in them; sums per sequence, the mean over tokens."""
    inputs = make(9, (9, 67), torch.float32, device_of(backend))
    logp, ref, mask = inputs["logp"], inputs["ref_logp"], inputs["mask"]
    for kind in KINDS:
        with fa.backend(backend):
            _, statistics = token_rewards(
                logp, ref, inputs["scores"], kl_coef=7.0, kl_kind=kind, mask=mask
            )
        each = torch.where(mask, kl_estimate(logp.double(), ref.double(), kind), 0.0)
        assert statistics["sequence_kl"].tolist() == pytest.approx(each.sum(1).tolist(), rel=1e-4)
        assert statistics["kl"].item() == pytest.approx((each.sum() / mask.sum()).item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_padded(backend: str) -> None:
    device = device_of(backend)
    inputs = make(5, (5, 700), torch.float32, device)
    lengths = torch.tensor(OFFSETS, device=device).diff()
    mask = torch.arange(700, device=device) < lengths[:, None]
    names = "logp ref_logp dpo_logp".split()
    packed = inputs | {name: inputs[name][mask] for name in names}
    packed["cu_seqlens"] = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
    with fa.backend(backend):
        rows = shaped(inputs | {"mask": mask}, ALL, **FULL)
        flat = shaped(packed, "logp ref_logp scores dpo_logp finished cu_seqlens", **FULL)
    assert torch.equal(rows[0][mask], flat[0])
    assert rows[0][~mask].eq(0.0).all()
    assert rows[2].tolist() == pytest.approx(flat[2].tolist(), rel=1e-5)
    assert rows[1].item() == pytest.approx(flat[1].item(), rel=1e-5)


@pytest.mark.parametrize("tail", [0, 1, 5000, 9000, 9001])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_score_stands_on_the_last_kept_token(backend: str, tail: int) -> None:
    """Long rows, which Triton splits, with ``tail`` dropped tokens at the end of the first row."""
    device = device_of(backend)
    logp, mask = torch.zeros(2, 9001, device=device), torch.ones(2, 9001, device=device).bool()
    mask[0, 9001 - tail :] = False
    mask[:, ::2] &= False
    mask[0, : 2 if tail < 9000 else 0] = True
    scores = torch.tensor([5.0, 7.0], device=device)
    with fa.backend(backend):
        rewards, _ = token_rewards(logp, logp, scores, kl_coef=1.0, mask=mask)
    kept = mask[0].nonzero()
    where = {} if len(kept) == 0 else {int(kept[-1]): 5.0}
    assert {int(t): rewards[0, t].item() for t in rewards[0].nonzero()} == where
    assert {int(t): rewards[1, t].item() for t in rewards[1].nonzero()} == {8999: 7.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_masked_cells_does_not_leak(backend: str) -> None:
    inputs = make(3, (3, 1025), torch.float32, device_of(backend))
    inputs["mask"][1] = False  # nothing kept: its score counts nowhere
    results = []
    for fill in (0.0, math.nan, math.inf, -math.inf):
        dirty = dict(inputs)
        for name in ("logp", "ref_logp", "dpo_logp"):
            dirty[name] = inputs[name].masked_fill(~inputs["mask"], fill)
        dirty["scores"] = inputs["scores"].clone()
        dirty["scores"][1] = fill
        with fa.backend(backend):
            results.append(shaped(dirty, ALL, kl_kind="k3", **FULL))
        assert results[-1][0][~inputs["mask"]].eq(0.0).all()
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_what_counts_is_seen(backend: str) -> None:
    device = device_of(backend)
    logp = torch.zeros(2, 3, device=device)
    dirty = torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]], device=device)
    scores = torch.tensor([1.0, math.nan], device=device)
    with fa.backend(backend):
        rewards, statistics = token_rewards(dirty, logp, scores, kl_coef=0.1, clip_score=2.0)
        bounded, _ = token_rewards(
            logp, logp, scores, kl_coef=0.1, dpo_logp=dirty, clip_dpo=1.0, clip_score=2.0
        )
    for found in (rewards, bounded):
        assert found.isnan().tolist() == [[False, True, False], [False, False, True]]
    assert statistics["sequence_kl"].isnan().tolist() == [True, False]
    assert statistics["kl"].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    """Log-probs of -1e4 under either model; without a coefficient an infinite estimate is no
    reward."""
    device = device_of(backend)
    logp = torch.tensor([[0.0, -1e4, -1e4]], device=device)
    ref = torch.tensor([[-1e4, 0.0, -1e4]], device=device)
    scores = torch.tensor([-300.0], device=device)
    with fa.backend(backend):
        k1, _ = token_rewards(logp, ref, scores, kl_coef=0.5, clip_score=1.0)
        k3, found = token_rewards(logp, ref, scores, kl_coef=1.0, kl_kind="k3")
        none, _ = token_rewards(logp, ref, scores, kl_coef=0.0, kl_kind="k3")
    assert k1.tolist() == [[-5000.0, 5000.0, -1.0]]
    assert k3.tolist() == [[-9999.0, -math.inf, -300.0]]
    assert found["kl"].item() == found["sequence_kl"].item() == math.inf
    assert none.tolist() == [[0.0, 0.0, -300.0]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend: str, shape: tuple[int, int]) -> None:
    device = device_of(backend)
    logp, scores = torch.empty(shape, device=device), torch.ones(shape[0], device=device)
    offsets = torch.zeros(shape[0] + 1, dtype=torch.int64, device=device)
    for given, bounds in ((logp, None), (logp.reshape(-1)[:0], offsets)):
        with fa.backend(backend):
            rewards, statistics = token_rewards(
                given, given, scores, kl_coef=0.1, cu_seqlens=bounds
            )
        assert rewards.shape == given.shape
        assert statistics["sequence_kl"].tolist() == [0.0] * shape[0]
        assert statistics["kl"].item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_tensor_may_be_a_view(backend: str) -> None:
    inputs = make(20, (20, 30), torch.float32, device_of(backend))
    views = {name: x[::2, 1:27:3] if x.dim() == 2 else x[::2] for name, x in inputs.items()}
    views["ref_logp"] = views["ref_logp"].t().contiguous().t()
    results = []
    for given in (views, {name: x.contiguous() for name, x in views.items()}):
        with fa.backend(backend):
            results.append(shaped(given, ALL, **FULL))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert results[0][0].is_contiguous()


def test_mixed_dtypes_and_no_gradient() -> None:
    logp = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    third = torch.full((1, 2), 1.0) / 3.0
    rewards, _ = token_rewards(logp, third, torch.zeros(1).bfloat16(), kl_coef=1.0)
    assert rewards.dtype == torch.float32 and not rewards.requires_grad
    assert torch.equal(rewards, third)  # not rounded to bfloat16
    wide, _ = token_rewards(logp, third.double(), torch.zeros(1), kl_coef=1.0)
    assert wide.dtype == torch.float64


def test_cpp_gives_the_same_bits_with_any_number_of_threads() -> None:
    inputs = make(200, (200, 667), torch.float32, "cpu")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fa.backend("cpp"):
                results.append(shaped(inputs, ALL, kl_kind="k3", **FULL))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from test_token_rewards import ALL, DTYPES, FULL, KINDS, compare, make
for dtype in DTYPES:
    for kind in KINDS:
        compare("cpp", make(3, (3, 1025), dtype, "cpu"), ALL, kind, FULL)
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


def test_offsets_nobody_looked_at_are_cut_off() -> None:
    """On a GPU nobody does: what they mark outside of the tensors is neither read nor written."""
    from fastalign.kernels.token_rewards import token_rewards_fwd

    device = device_of("triton")
    logp, ref_logp = -torch.rand(2, 20, device=device)
    scores, numbers = torch.tensor([2.0, 3.0], device=device), (0, 0.1, 1e9, 0.0, 1e9, 0.0)

    def rewards(bounds: list[int]) -> Tensor:
        offsets = torch.tensor(bounds, device=device)
        return token_rewards_fwd(logp, ref_logp, scores, None, None, None, offsets, *numbers)[0]

    assert torch.equal(rewards([-3, 5, 24]), rewards([0, 5, 20]))


def test_opcheck_and_compile() -> None:
    x = make(5, (5, 9), torch.float32, "cpu")
    offsets, numbers = torch.tensor([0, 9, 9, 45]), (0.1, 1.0, 0.3, 0.1, 0.5)
    names = "logp ref_logp scores dpo_logp finished mask".split()
    full = (*(x[name] for name in names), None, "k3", *numbers)
    flat = tuple(x[name].reshape(-1) for name in ("logp", "ref_logp"))
    packed = (*flat, x["scores"][:3], None, None, None, offsets, "k1", *numbers)
    for args in (full, packed):
        torch.library.opcheck(_token_rewards, args)

    def rewards(logp: Tensor, offsets: Tensor | None) -> Tensor:
        ref, scores = x["ref_logp"].view_as(logp), x["scores"][: 5 if offsets is None else 3]
        found, statistics = token_rewards(logp, ref, scores, kl_coef=0.1, cu_seqlens=offsets)
        return found + statistics["kl"]

    compiled = torch.compile(rewards, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x["logp"], None), rewards(x["logp"], None))
    assert torch.equal(compiled(flat[0], offsets), rewards(flat[0], offsets))


P = torch.zeros(2, 3)
S = torch.zeros(2)
N = torch.zeros(6)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((N, N, S), {}, r"logp \[B, T\], or \[N\] with cu_seqlens, got shape \(6,\)"),
        ((P, P, S), {"cu_seqlens": torch.tensor([0, 3, 6])}, r"logp \[N\] with cu_seqlens"),
        ((P.long(), P, S), {}, "of a floating dtype, got shape .*torch.int64"),
        ((P, P.long(), S), {}, "ref_logp of a floating dtype, got torch.int64"),
        ((P, P[:, :2], S), {}, r"ref_logp like logp, \(2, 3\) on cpu, got \(2, 2\)"),
        ((P, P.to("meta"), S), {}, r"ref_logp like logp, .* got \(2, 3\) on meta"),
        ((P, P, S), {"dpo_logp": N}, r"dpo_logp like logp, \(2, 3\) on cpu, got \(6,\)"),
        ((P, P, P[0]), {}, r"scores of shape \(2,\), one per sequence, on cpu, got \(3,\)"),
        ((P, P, S.long()), {}, "scores of a floating dtype, got torch.int64"),
        ((P, P, S), {"finished": S}, "finished of a bool or integer dtype, got torch.float32"),
        ((P, P, S), {"finished": S.bool().to("meta")}, r"finished .* got \(2,\) on meta"),
        ((P, P, S), {"mask": P}, "bool or integer mask, got torch.float32"),
        ((P, P, S), {"mask": P[:1].bool()}, r"mask like logp, \(2, 3\) on cpu, got \(1, 3\)"),
        ((N, N, S), {"cu_seqlens": torch.tensor([0, 4, 3])}, "rise from 0 to N = 6, got"),
        ((N, N, S), {"cu_seqlens": torch.tensor([0, 6])}, r"scores of shape \(1,\)"),
        ((P, P, S), {"kl_kind": "k4"}, "k1, k2, k3, got 'k4'"),
        ((P, P, S), {"kl_coef": -0.1}, "kl_coef >= 0, got -0.1"),
        ((P, P, S), {"clip_score": 0.0}, "clip_score > 0 or None, got 0.0"),
        ((P, P, S), {"clip_dpo": -1.0}, "clip_dpo > 0 or None, got -1.0"),
        ((P, P, S), {"missing_eos_penalty": 1.0}, "expected finished with a missing_eos_penalty"),
    ],
)
def test_bad_input(args: tuple[Tensor, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^token_rewards: .*{message}"):
        token_rewards(*args, **({"kl_coef": 0.1} | kwargs))
