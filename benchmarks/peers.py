"""The rivals: other libraries' ways to do what the loss head does, each behind one signature.

    LOGITS       f(logits, targets) -> (logp, entropy or None)
    TOKENS       f(hidden, weight, targets) -> (logp, entropy or None)
    LIKELIHOOD   f(hidden, weight, targets) -> mean of -logp
    POLICY       f(hidden, weight, targets, inputs, sequences) -> PPO loss with KL, mean over tokens
    PREFERENCE   f(hidden, weight, targets, inputs, sequences) -> DPO loss, mean over pairs

logits [N, V], hidden [N, H], weight [V, H], targets [N] int64. ``inputs`` holds old_logp, ref_logp
and advantages [N], the advantage the same over each of the ``sequences`` equal parts of the rows.
In PREFERENCE sequences 2i and 2i + 1 are the chosen and the rejected one of pair i; there is no
reference model on either side. CLIP, KL_COEF and BETA are the settings of all.

``make`` imports the library. What is not installed is listed as absent with the missing name, what
raises is listed as failed. Settings are the libraries' own defaults unless the name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CLIP = 0.2
KL_COEF = 0.04
BETA = 0.1
Pair = tuple[Tensor, Tensor | None]


class Peer(NamedTuple):
    """One rival. ``entropy``: whether its second result is the entropy."""

    name: str
    package: str
    make: Callable[[], Callable[..., Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    entropy: bool = False


class Loaded(NamedTuple):
    peer: Peer
    function: Callable[..., Any]


def load(
    peers: Sequence[Peer], device: str, without: Sequence[str] = ()
) -> tuple[list[Loaded], dict[str, str]]:
    """The rivals that are here, and why the others are not."""
    here, absent = [], {}
    for peer in peers:
        if device not in peer.devices:
            absent[peer.name] = f"runs on {', '.join(peer.devices)} only"
        elif any(word.lower() in peer.name.lower() for word in without):
            absent[peer.name] = "left out by --without"
        else:
            try:
                here.append(Loaded(peer, peer.make()))
            except ModuleNotFoundError as error:
                absent[peer.name] = f"not installed: no module {error.name}"
    return here, absent


# ---- plain PyTorch ----


def softmax_gather(logits: Tensor, targets: Tensor) -> Pair:
    log_p = torch.log_softmax(logits.float(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], None


def logsumexp_gather(logits: Tensor, targets: Tensor) -> Pair:
    picked = logits.gather(-1, targets[:, None])[:, 0].float()
    return picked - torch.logsumexp(logits.float(), -1), None


def softmax_gather_entropy(logits: Tensor, targets: Tensor) -> Pair:
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def naive_logp(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
    return softmax_gather(hidden @ weight.t(), targets)


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
    """Also the truth, when given float64."""
    return softmax_gather_entropy(hidden @ weight.t(), targets)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.t()).float(), targets)


def chunked_checkpoint(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
    """512 tokens at a time, computed again in the backward pass, as verl's FusedLinearForPPO."""
    parts = [
        checkpoint(naive, h, weight, t, use_reentrant=False)
        for h, t in zip(hidden.split(512), targets.split(512), strict=True)
    ]
    logp, entropy = zip(*parts, strict=True)
    return torch.cat(logp), torch.cat(entropy)


def compiled(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: torch.compile(function, dynamic=False)


def torch_linear_cross_entropy(chunked: bool) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        if not hasattr(F, "linear_cross_entropy"):
            name = "torch.nn.functional.linear_cross_entropy"
            raise ModuleNotFoundError(f"no {name} in torch {torch.__version__}", name=name)
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)

    return make


# ---- TRL ----


def trl_selective(entropy: bool) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        if entropy:
            from trl.trainer.utils import selective_log_softmax_and_entropy

            return selective_log_softmax_and_entropy
        from trl.trainer.utils import selective_log_softmax

        return lambda logits, targets: (selective_log_softmax(logits, targets), None)

    return make


def trl_chunked(entropy: bool) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

        outputs = ("entropy",) if entropy else ()

        def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
            return ChunkedLogProbFunction.apply(
                hidden, weight, None, targets, 1.0, columns, None, 1.0, outputs
            )[:2]

        return run

    return make


# ---- Liger ----


def liger_scaled(entropy: bool) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction,
        )

        def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
            got = LigerFusedLinearScaledCrossEntropyFunction.apply(
                hidden, weight, targets, 1.0, -100, 1, entropy
            )
            return (-got[0], got[1]) if entropy else (-got, None)

        return run

    return make


def liger_selective() -> Callable[..., Any]:
    from liger_kernel.chunked_loss.fused_linear_ppo import (
        _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE,
        _ChunkedSelectiveLogProbFunction,
    )

    columns = _SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    run = _ChunkedSelectiveLogProbFunction.apply
    return lambda h, w, t: (run(h, w, t, None, 1.0, columns), None)


def liger_cross_entropy() -> Callable[..., Any]:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def run(logits: Tensor, targets: Tensor) -> Pair:
        # It writes the gradient over the logits, which autograd forbids for a leaf: hence the copy.
        own = logits.clone() if logits.requires_grad else logits
        return -liger_cross_entropy(own, targets, reduction="none"), None

    return run


def liger_linear(fp32: bool) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        accumulate = torch.float32 if fp32 else None
        return lambda h, w, t: liger_fused_linear_cross_entropy(h, w, t, accum_dtype=accumulate)

    return make


def liger_fused_grpo() -> Callable[..., Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=KL_COEF,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="bnpo",
        use_ref_model=True,
    )

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, inputs: dict[str, Tensor], sequences: int
    ) -> Tensor:
        def rows(x: Tensor) -> Tensor:
            return x.unflatten(0, (sequences, -1))

        return loss(
            rows(hidden),
            weight,
            rows(targets),
            torch.ones_like(rows(targets)),
            rows(inputs["advantages"])[:, 0].contiguous(),
            ref_per_token_logps=rows(inputs["ref_logp"]),
            old_per_token_logps=rows(inputs["old_logp"]),
        )[0]

    return run


def liger_triton_grpo() -> Callable[..., Any]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, inputs: dict[str, Tensor], sequences: int
    ) -> Tensor:
        def rows(x: Tensor) -> Tensor:
            return x.unflatten(0, (sequences, -1))

        # It wants one more position per sequence, which it does not read.
        logits = F.pad(rows(hidden), (0, 0, 0, 1)) @ weight.t()
        return triton_grpo_loss(
            logits,
            rows(inputs["old_logp"]),
            rows(inputs["ref_logp"]),
            rows(targets),
            rows(inputs["advantages"])[:, 0].contiguous(),
            temperature=1.0,
            beta=KL_COEF,
            eps_low=CLIP,
            eps_high=CLIP,
            loss_type="bnpo",
            reduce=True,
        )[0]

    return run


def liger_fused_dpo() -> Callable[..., Any]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def run(
        hidden: Tensor, weight: Tensor, targets: Tensor, inputs: dict[str, Tensor], sequences: int
    ) -> Tensor:
        def rows(x: Tensor) -> Tensor:  # all chosen, then all rejected
            return x.unflatten(0, (sequences // 2, 2, -1)).transpose(0, 1).flatten(0, 1)

        return loss(weight, rows(hidden), rows(targets))[0]

    return run


# ---- Cut Cross-Entropy and QuACK ----


def cce(**settings: Any) -> Callable[[], Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        from cut_cross_entropy import linear_cross_entropy

        return lambda h, w, t: linear_cross_entropy(h, w, t, **settings)

    return make


def cce_logp() -> Callable[..., Any]:
    from cut_cross_entropy import linear_cross_entropy

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Pair:
        nll = linear_cross_entropy(
            hidden, weight, targets, reduction="none", impl="cce", filter_eps=None
        )
        return -nll, None

    return run


def quack_linear() -> Callable[..., Any]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


def quack_cross_entropy() -> Callable[..., Any]:
    from quack.cross_entropy import cross_entropy

    return lambda z, t: (-cross_entropy(z, t, reduction="none"), None)


CUDA = ("cuda",)

LOGITS = [
    Peer("log_softmax + gather", "torch", lambda: softmax_gather),
    Peer("logsumexp, gather", "torch", lambda: logsumexp_gather),
    Peer("torch.compile of log_softmax", "torch", compiled(softmax_gather)),
    Peer("TRL selective_log_softmax", "trl", trl_selective(False)),
    Peer("Liger cross-entropy, of a copy", "liger-kernel", liger_cross_entropy, CUDA),
    Peer("QuACK cross-entropy", "quack-kernels", quack_cross_entropy, CUDA),
    Peer("log_softmax + entropy", "torch", lambda: softmax_gather_entropy, entropy=True),
    Peer(
        "torch.compile of log_softmax + entropy",
        "torch",
        compiled(softmax_gather_entropy),
        entropy=True,
    ),
    Peer("TRL selective_log_softmax_and_entropy", "trl", trl_selective(True), entropy=True),
]

TOKENS = [
    Peer("log_softmax + gather", "torch", lambda: naive_logp),
    Peer("torch.compile of log_softmax", "torch", compiled(naive_logp)),
    Peer("TRL chunked", "trl", trl_chunked(False)),
    Peer("Liger scaled cross-entropy", "liger-kernel", liger_scaled(False)),
    Peer("Liger chunked log-prob", "liger-kernel", liger_selective),
    Peer("CCE without filter", "cut-cross-entropy", cce_logp, CUDA),
    Peer("log_softmax + entropy", "torch", lambda: naive, entropy=True),
    Peer("torch.compile of log_softmax + entropy", "torch", compiled(naive), entropy=True),
    Peer("chunks of 512, checkpointed", "torch", lambda: chunked_checkpoint, entropy=True),
    Peer("TRL chunked, entropy", "trl", trl_chunked(True), entropy=True),
    Peer("Liger scaled cross-entropy, entropy", "liger-kernel", liger_scaled(True), entropy=True),
]

LIKELIHOOD = [
    Peer("F.cross_entropy(linear)", "torch", lambda: cross_entropy),
    Peer("torch.compile of F.cross_entropy(linear)", "torch", compiled(cross_entropy)),
    Peer("F.linear_cross_entropy", "torch", torch_linear_cross_entropy(False)),
    Peer("F.linear_cross_entropy, chunked", "torch", torch_linear_cross_entropy(True)),
    Peer("CCE torch_compile", "cut-cross-entropy", cce(impl="torch_compile")),
    Peer("CCE", "cut-cross-entropy", cce(impl="cce"), CUDA),
    Peer("CCE without filter", "cut-cross-entropy", cce(impl="cce", filter_eps=None), CUDA),
    Peer("Liger fused linear CE", "liger-kernel", liger_linear(False), CUDA),
    Peer("Liger fused linear CE, fp32 sum", "liger-kernel", liger_linear(True), CUDA),
    Peer("QuACK chunked linear CE", "quack-kernels", quack_linear, CUDA),
]

POLICY = [
    Peer("Liger fused linear GRPO", "liger-kernel", liger_fused_grpo),
    Peer("linear + Liger Triton GRPO", "liger-kernel", liger_triton_grpo, CUDA),
]

PREFERENCE = [Peer("Liger fused linear DPO", "liger-kernel", liger_fused_dpo)]
