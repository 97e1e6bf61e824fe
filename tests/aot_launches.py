"""Example launches of every Triton kernel, for compilation without a GPU (tests/test_aot.py).

Each entry calls a launcher of kernels/*.py on small CPU tensors; nothing runs, the kernels and the
arguments they are given are only recorded. A new kernel needs a launch here that reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastalign.kernels.bradley_terry_loss import bradley_terry_loss_fwd
from fastalign.kernels.gae import gae_fwd
from fastalign.kernels.kl_estimate import kl_estimate_bwd, kl_estimate_fwd
from fastalign.kernels.lambda_returns import lambda_returns_fwd
from fastalign.kernels.policy_loss import policy_loss_fwd, policy_loss_terms_fwd
from fastalign.kernels.preference_loss import preference_loss_bwd, preference_loss_fwd
from fastalign.kernels.reduce_scores import dscores_fwd, reduce_scores_fwd
from fastalign.kernels.reward_heads import reward_heads_bwd, reward_heads_fwd
from fastalign.kernels.token_kl import kl_dlogits_fwd, kl_stats_fwd
from fastalign.kernels.token_logprobs import dlogits_fwd, row_stats_fwd
from fastalign.kernels.token_rewards import token_rewards_fwd
from fastalign.kernels.vtrace import vtrace_fwd
from fastalign.kernels.whiten import moments_fwd, whiten_bwd, whiten_by_fwd
from fastalign.losses import APA, AWR, DPO, GRPO, KTO, MLE, PPO, XPO, SimPO
from fastalign.losses.preference import PreferenceLoss
from fastalign.ops.policy_terms import Form, Tokens, form_of
from fastalign.ops.reduce_scores import statistic
from fastalign.ops.token_logprobs import temperature_tensor

Launch = Callable[[], object]


def row_kernels(
    dtype: torch.dtype, vocab: int, n: int = 4, softcap: float = 0.0, entropy: bool = True
) -> None:
    logits = torch.empty(n, vocab, dtype=dtype)
    targets = torch.zeros(n, dtype=torch.int64)
    temperature = torch.ones(n if entropy else 1)
    stats = row_stats_fwd(logits, targets, temperature, softcap, -100)
    g = torch.ones(n)
    e = g if entropy else None
    dlogits_fwd(logits, g, e, logits, targets, temperature, softcap, -100, *stats)


def kl_kernels(
    dtype: torch.dtype,
    ref_dtype: torch.dtype,
    vocab: int,
    softcap: float = 0.0,
    entropy: bool = True,
) -> None:
    logits = torch.empty(4, vocab, dtype=dtype)
    ref_logits = torch.empty(4, vocab, dtype=ref_dtype)
    targets = torch.zeros(4, dtype=torch.int64)
    temperature = torch.ones(4 if entropy else 1)
    settings = (targets, temperature, softcap, -100)
    logp, entropies, row_max, log_sum, kl, _, *ref = kl_stats_fwd(logits, ref_logits, *settings)
    g = torch.ones(4)
    stats = (logp, entropies, row_max, log_sum, kl, *ref)
    e = g if entropy else None
    kl_dlogits_fwd(logits, g, e, g, logits, ref_logits, *settings, *stats)


def scans(rows: int, steps: int, packed: bool = False, features: bool = False) -> None:
    """gae, lambda-returns, discounted returns and vtrace; ``features``: all that are optional."""
    shape = (rows * steps,) if packed else (rows, steps)
    rewards = torch.empty(shape, dtype=torch.bfloat16 if features else torch.float32)
    mask = torch.ones(shape, dtype=torch.bool) if features else None
    offsets = torch.arange(0, rows * steps + 1, steps, dtype=torch.int32) if packed else None
    bootstrap = torch.zeros(rows) if features else None
    rates = torch.ones(rows, 2) if features else None
    settings = (mask, offsets, bootstrap, rates)
    gae_fwd(rewards, rewards, 1.0, 0.95, *settings, statistics=features)
    lambda_returns_fwd(rewards, rewards, 1.0, 0.95, *settings)
    lambda_returns_fwd(rewards, None, 1.0, 1.0, *settings)
    vtrace_fwd(rewards, rewards, rewards.float(), 1.0, 0.95, 1.0, 1.0, 1.0, *settings)


def policy_loss(loss: object, n: int, features: str = "", start: int = 0) -> None:
    """``features``: letters m(ask), s(hares), c(ritic), e(ntropy), o(ld), r(eference)."""
    x = torch.zeros(n + start)[start:]
    form = form_of(loss) or Form()
    critic = x if "c" in features or loss is None else None
    tokens = Tokens(
        logp=None if loss is None else x,
        entropy=x if "e" in features else None,
        advantages=x,
        old_logp=x if "o" in features else None,
        ref_logp=x if "r" in features else None,
        weights=x if isinstance(loss, MLE) else None,
        log_ratio=x if "g" in features else None,
        values=critic,
        returns=critic,
        old_values=critic,
        mask=torch.ones(n, dtype=torch.bool) if "m" in features else None,
        scale=torch.ones(1) if "s" in features else None,
    )
    if critic is not None:
        form = form._replace(vf_coef=0.5, value_clip=0.2)
    policy_loss_fwd(form, tokens)
    if critic is None:
        policy_loss_terms_fwd(form, tokens)


def policy_loss_of_any_size() -> Iterator[Launch]:
    """50 sizes, alignments and coefficients of one loss with one set of features."""
    generator = torch.Generator().manual_seed(3)
    for i in range(50):
        n = int(torch.randint(1, 100_000, (), generator=generator))
        clip, kl_coef = (0.01 + torch.rand(2, generator=generator)).tolist()
        loss = PPO(clip, kl_coef=kl_coef, entropy_coef=0.1 * kl_coef)
        yield partial(policy_loss, loss, n, "meor", i % 4)


def reward_heads(
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    heads: int,
    width: int = 4096,
    index: bool = False,
    samples: int = 64,
) -> None:
    """All gradients, of the median, whose kernels hold the most."""
    median = statistic("median", 0.0, heads)
    hidden = torch.empty(samples, width, dtype=dtype)
    weight = torch.empty(heads, width, dtype=weight_dtype)
    bias = torch.empty(heads, dtype=weight_dtype)
    rows = torch.zeros(samples, dtype=torch.int64) if index else None
    out = reward_heads_fwd(hidden, weight, bias, rows, median)
    gradients = (torch.empty_like(hidden), torch.empty_like(weight), torch.empty(heads))
    reward_heads_bwd(*gradients, *out, hidden, weight, rows, out[0], median)


def reduce_scores(heads: int) -> None:
    scores = torch.empty(64, heads)
    minimum = statistic("min", 0.0, heads)
    reduced, std = reduce_scores_fwd(scores, minimum)
    dscores_fwd(None, reduced, std, scores, None, minimum)


def bradley_terry(heads: int, features: bool, pairs: int = 512) -> None:
    scores = torch.empty(pairs, heads, dtype=torch.bfloat16 if features else torch.float32)
    mask = torch.ones(pairs, heads, dtype=torch.int64) if features else None
    margin = torch.zeros(pairs, 1) if features else None
    bradley_terry_loss_fwd(scores, scores, margin, 0.0, mask, None, 0.1)


def preference(
    loss: PreferenceLoss, dtype: torch.dtype, masked: bool, pairs: int = 8, tokens: int = 5000
) -> None:
    form, logp = loss.form, torch.zeros(tokens, dtype=dtype)
    ref_logp = torch.zeros(tokens, dtype=dtype) if "ref_logp" in loss.required else None
    cu_seqlens = torch.zeros(2 * pairs + 1, dtype=torch.int64)
    mask = torch.ones(tokens, dtype=torch.bool) if masked else None
    flags = torch.ones(2 * pairs, dtype=torch.bool) if loss.flags_name else None
    z0 = torch.zeros(()) if "z0" in loss.required else None
    losses, slopes, _ = preference_loss_fwd(form, logp, ref_logp, cu_seqlens, mask, flags, z0)
    preference_loss_bwd(losses.mean().expand(len(losses)), slopes, cu_seqlens, mask, tokens)


NAMED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABS = {"V a multiple of 16": 128_256, "odd V": 50_257}


def kl_estimates(dtype: torch.dtype, kind: int, n: int = 5000, start: int = 0) -> None:
    logp = torch.empty(n + start, dtype=dtype)[start:]
    kl_estimate_fwd(logp, logp, kind)
    if kind > 0:
        kl_estimate_bwd(torch.empty(n), logp, logp, kind)


def whitening(dtype: torch.dtype, masked: bool, n: int = 5000, start: int = 0) -> None:
    x = torch.empty(n + start, dtype=dtype)[start:]
    mask = torch.ones(n + start, dtype=torch.bool)[start:] if masked else None
    moments = moments_fwd(x, mask)
    whiten_by_fwd(x, mask, moments, 1e-8, False)
    whiten_bwd(torch.empty(n), x, mask, moments, 1e-8, True)


def token_rewards(
    dtype: torch.dtype, kind: int, rows: int, steps: int, packed: bool = False, full: bool = False
) -> None:
    """``full``: a mask, a DPO model's log-probs and finished responses."""
    logp = torch.empty((rows * steps,) if packed else (rows, steps), dtype=dtype)
    offsets = torch.arange(0, rows * steps + 1, steps) if packed else None
    mask = torch.ones(logp.shape, dtype=torch.bool) if full else None
    finished = torch.ones(rows, dtype=torch.bool) if full else None
    inputs = (logp, logp, torch.zeros(rows), logp if full else None, finished, mask, offsets)
    token_rewards_fwd(*inputs, kind, 0.1, 10.0, 0.05, 0.05, 1.0)


FULL = {"kl_coef": 0.1, "entropy_coef": 0.01}
LAUNCHES: dict[str, Launch] = {
    "policy loss, clipped, all features": lambda: policy_loss(
        PPO(dual_clip=3.0, kl_kind="k3", **FULL), 5000, "msceor"
    ),
    "policy loss, truncated": lambda: policy_loss(GRPO("cispo", kl_kind="k2", **FULL), 99, "eor"),
    "policy loss, gspo": lambda: policy_loss(GRPO("gspo"), 5000, "gso"),
    "policy loss, squared": lambda: policy_loss(APA(0.1), 5000, "r"),
    "policy loss, tilted": lambda: policy_loss(AWR(0.1), 5000, "ms"),
    "policy loss, weighted": lambda: policy_loss(MLE(), 5000),
    "value loss": lambda: policy_loss(None, 5000, "m"),
    **{
        f"rows {name}, {columns}, {rest}": partial(row_kernels, dtype, vocab, softcap=softcap)
        for name, dtype in NAMED.items()
        for columns, vocab in VOCABS.items()
        for rest, softcap in (("plain", 0.0), ("soft-cap", 30.0))
    },
    "rows fp16, no entropy": lambda: row_kernels(torch.float16, 32_000, entropy=False),
    **{
        f"kl {name} and {ref}, {columns}, {rest}": partial(
            kl_kernels, NAMED[name], NAMED[ref], vocab, softcap=softcap
        )
        for name, ref in (("bf16", "bf16"), ("fp32", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"))
        for columns, vocab in VOCABS.items()
        for rest, softcap in (("plain", 0.0), ("soft-cap", 30.0))
    },
    "kl fp16, no entropy": lambda: kl_kernels(torch.float16, torch.float16, 32_000, entropy=False),
    "scans": lambda: scans(64, 512),
    "scans packed, all features": lambda: scans(64, 512, packed=True, features=True),
    "scans, few long rows": lambda: scans(2, 100_000),
    "scans, few long rows, all features": lambda: scans(2, 100_000, features=True),
    "scans, few long rows, packed": lambda: scans(2, 100_000, packed=True),
    "scans, many short rows": lambda: scans(500, 60),
    "scans, many short rows, packed, all features": lambda: scans(500, 60, True, True),
    **{
        f"reward heads, {name}": partial(reward_heads, *dtypes, heads, index=heads != 16)
        for name, dtypes, heads in [
            ("bf16, 5", (torch.bfloat16, torch.bfloat16), 5),
            ("bf16, 16", (torch.bfloat16, torch.bfloat16), 16),
            ("bf16, 32", (torch.bfloat16, torch.bfloat16), 32),
            ("bf16, 64", (torch.bfloat16, torch.bfloat16), 64),
            ("bf16 and fp32, 16", (torch.bfloat16, torch.float32), 16),
            ("bf16 and fp32, 64", (torch.bfloat16, torch.float32), 64),
            ("fp32, 5", (torch.float32, torch.float32), 5),
            ("fp32, 32", (torch.float32, torch.float32), 32),
            ("fp32, 64", (torch.float32, torch.float32), 64),
            ("fp16, 64", (torch.float16, torch.float16), 64),
        ]
    },
    "reward heads, fp16, odd width": lambda: reward_heads(torch.float16, torch.float16, 5, 4095),
    "statistics of 5 heads": lambda: reduce_scores(5),
    "statistics of 64 heads": lambda: reduce_scores(64),
    **{
        f"preference loss, {name}": partial(preference, *settings)
        for name, settings in {
            "sigmoid": (DPO(), torch.float32, False),
            "sigmoid, all features": (XPO(), torch.bfloat16, True),
            "no reference": (SimPO(), torch.float32, True),
            "hinge": (DPO(variant="hinge"), torch.float16, True),
            "squared": (DPO(variant="ipo"), torch.bfloat16, False),
            "single": (KTO(), torch.float32, False),
            "single, all features": (KTO(), torch.bfloat16, True),
        }.items()
    },
    "bradley-terry, 1 head": lambda: bradley_terry(1, False),
    "bradley-terry, 5 heads, all features": lambda: bradley_terry(5, True),
    "bradley-terry, 64 heads, all features": lambda: bradley_terry(64, True),
    "bradley-terry, 16 heads, many pairs": lambda: bradley_terry(16, True, 5000),
    "kl estimate, k1": lambda: kl_estimates(torch.float32, 0),
    "kl estimate, bf16, k2": lambda: kl_estimates(torch.bfloat16, 1),
    "kl estimate, k3": lambda: kl_estimates(torch.float32, 2),
    "kl estimate, bf16, k3": lambda: kl_estimates(torch.bfloat16, 2),
    "whiten": lambda: whitening(torch.float32, False),
    "whiten, bf16, mask": lambda: whitening(torch.bfloat16, True),
    "token rewards, k1": lambda: token_rewards(torch.float32, 0, 256, 1024),
    "token rewards, k2, packed, all features": lambda: token_rewards(
        torch.bfloat16, 1, 256, 512, packed=True, full=True
    ),
    "token rewards, k3, few long rows, all features": lambda: token_rewards(
        torch.float32, 2, 2, 50_000, full=True
    ),
}


def rows_of_any_shape() -> Iterator[Launch]:
    """50 random shapes, 5 temperatures, slices that begin anywhere, a stride beyond 2^31: only
    dtype, soft-cap, entropy and rows that are multiples of 16 may matter."""
    generator = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for i in range(50):
        aligned = i % 2 == 0
        vocab = 16 * number(1, 300) if aligned else 16 * number(1, 300) + number(1, 16)
        batch, steps = number(1, 9), number(2, 40)
        far = 1 << 33 if i % 5 == 0 else steps * vocab
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        logits = torch.empty_strided(
            (batch, steps, vocab), (far, vocab, 1), dtype=dtype, device="meta"
        )
        logits = logits[:, 0] if i % 4 == 0 else logits[:, :-1]
        tokens = logits[..., 0].numel()
        temperature = (0.7, 1.0, torch.ones(1), torch.ones(tokens), 3)[i % 5]
        settings = (30.0 if i // 2 % 2 else 0.0, -100 + i % 3)
        yield partial(_rows, logits, tokens, temperature, settings, i // 4 % 2 == 0)


def _rows(
    logits: Tensor,
    tokens: int,
    temperature: float | Tensor,
    settings: tuple[float, int],
    entropy: bool,
) -> None:
    targets = torch.zeros(tokens + 1, dtype=torch.int64, device="meta")[1:]
    scale = temperature_tensor("rows", temperature, logits, targets.shape)
    row_stats_fwd(logits, targets, scale, *settings)
    # One row each of a [5, N] tensor: where they begin depends on N.
    numbers = torch.empty(5, tokens, device="meta")
    out = torch.empty(logits.shape, dtype=logits.dtype, device="meta")
    g, *stats = numbers
    dlogits_fwd(out, g, g if entropy else None, logits, targets, scale, *settings, *stats)


def kl_of_any_shape() -> Iterator[Launch]:
    """50 random shapes, 5 temperatures, slices of a batch beside dense references: only dtype,
    soft-cap, entropy and rows that are multiples of 16 may matter."""
    generator = torch.Generator().manual_seed(3)
    for i in range(50):
        batch, steps, sixteens = torch.randint(2, 40, (3,), generator=generator).tolist()
        vocab = 16 * sixteens + (0 if i % 2 == 0 else 1 + i % 15)
        dtype = (torch.float32, torch.bfloat16, torch.float16)[i % 3]
        logits = torch.empty(batch, steps, vocab, dtype=dtype, device="meta")[:, 1:]
        tokens = logits[..., 0].numel()
        temperature = (0.7, 1.0, torch.ones(1), torch.ones(tokens), 3)[i % 5]
        settings = (30.0 if i // 2 % 2 else 0.0, -100 + i % 3)
        yield partial(_kl_rows, logits, temperature, settings, i // 4 % 2 == 0)


def _kl_rows(
    logits: Tensor, temperature: float | Tensor, settings: tuple[float, int], entropy: bool
) -> None:
    n = logits[..., 0].numel()
    targets = torch.zeros(n + 1, dtype=torch.int64, device="meta")[1:]
    scale = temperature_tensor("rows", temperature, logits, targets.shape)
    ref_logits, out = logits.contiguous(), logits.contiguous()
    kl_stats_fwd(logits, ref_logits, targets, scale, *settings)
    g, *stats = torch.empty(8, n, device="meta")
    e = g if entropy else None
    kl_dlogits_fwd(out, g, e, g, logits, ref_logits, targets, scale, *settings, *stats)


def gae_of_any_shape() -> Iterator[Launch]:
    """50 random shapes: only packing and the kind of the shape (few long sequences, many, many
    short ones) may matter, six sets of flags; splitting adds a kernel to two of them."""
    generator = torch.Generator().manual_seed(2)
    kinds = [((1, 20), (5000, 5500)), ((129, 149), (300, 600)), ((129, 900), (1, 250))]
    for i in range(50):
        rows, steps = (int(torch.randint(*ends, (), generator=generator)) for ends in kinds[i % 3])
        yield partial(gae, rows, steps, i % 2 < 1)


def gae(rows: int, steps: int, packed: bool) -> None:
    rewards = torch.empty((rows * steps,) if packed else (rows, steps))
    offsets = torch.arange(0, rows * steps + 1, steps, dtype=torch.int32) if packed else None
    gae_fwd(rewards, rewards, 1.0, 0.95, None, offsets, None, None, statistics=True)


def heads_of_any_shape() -> Iterator[Launch]:
    """50 random numbers of samples, widths and heads up to 16: only whether the width is a multiple
    of 16 may matter. Five kernels (the products of both passes twice), one of which folds gradients
    of two dtypes."""
    generator = torch.Generator().manual_seed(4)
    for i in range(50):
        samples, heads, width = (
            int(torch.randint(2, most, (), generator=generator)) for most in (3000, 17, 3000)
        )
        width += -width % 16 if i % 3 == 0 else 0
        dtypes = (torch.bfloat16, torch.bfloat16)
        yield partial(reward_heads, *dtypes, heads, width, index=True, samples=samples)


def bradley_terry_of_any_shape() -> Iterator[Launch]:
    """50 random numbers of pairs, and of heads between two powers of two."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        pairs = int(torch.randint(1, 3000, (), generator=generator))
        heads = int(torch.randint(9, 17, (), generator=generator))
        yield partial(bradley_terry, heads, True, pairs)


def preference_loss_of_any_size() -> Iterator[Launch]:
    """50 random numbers of tokens and of pairs, 5 losses of one kind."""
    generator = torch.Generator().manual_seed(6)
    for i in range(50):
        tokens = int(torch.randint(1, 300_000, (), generator=generator))
        pairs = int(torch.randint(1, 40, (), generator=generator))
        loss = DPO(0.1 + i % 5, average=i % 2 == 0, label_smoothing=0.1 * (i % 3))
        yield partial(preference, loss, torch.float32, True, pairs, tokens)


def shaping_of_any_shape() -> Iterator[Launch]:
    """50 random sizes, alignments and splits of each of the three ops, with one set of features:
    two kernels of kl_estimate, five of whiten; those of token_rewards padded and packed, and their
    sums."""
    generator = torch.Generator().manual_seed(6)
    for i in range(50):
        n = int(torch.randint(1, 100_000, (), generator=generator))
        rows = int(torch.randint(1, 300, (), generator=generator))
        yield partial(kl_estimates, torch.bfloat16, 2, n, i % 4)
        yield partial(whitening, torch.bfloat16, True, n, i % 4)
        yield partial(token_rewards, torch.bfloat16, 2, rows, max(1, n // rows), i % 2 == 0, True)
