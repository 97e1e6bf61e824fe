"""What linear_loss refuses, and the words it does it with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastalign as fa
from fastalign import losses
from fastalign.ops import linear_logprobs
from fastalign.ops.linear_loss import linear_loss

META = "meta"  # a device that is not the host's


def bad_cases() -> dict[str, tuple[dict[str, Any], str]]:
    learned = torch.ones((), requires_grad=True)
    return {
        "mean": (dict(loss=lambda p, h: p.mean()), r"per token, shape \(4,\), got \(\)"),
        "not a tensor": (dict(loss=lambda p, h: 1.0), "per token.*got float"),
        "closed over": (dict(loss=lambda p, h: p * learned), "requires grad.*not among inputs"),
        "input size": (dict(inputs={"a": torch.ones(3)}), r"'a'.*dimension 4.*\(3,\)"),
        "one value for all groups": (
            dict(loss=lambda p, h, cu_seqlens: p.sum(), groups=[0, 2, 4]),
            r"per group, shape \(2,\), got \(\)",
        ),
        "groups without a bound": (dict(groups=[]), r"groups \[G \+ 1\] with G >= 1, got 0 bounds"),
        "groups start": (dict(groups=[1, 4]), r"from 0 to N = 4, got \[1, 4\]..4"),
        "groups dtype": (dict(groups=torch.ones(3)), "groups as integer cu_seqlens"),
        "groups end": (dict(groups=torch.tensor([0, 3])), "from 0 to N = 4"),
        "groups fall": (dict(groups=torch.tensor([0, 3, 2, 4])), "from 0 to N = 4"),
        "cu_seqlens": (
            dict(groups=torch.tensor([0, 4]), inputs={"cu_seqlens": torch.ones(4)}),
            "no input named cu_seqlens",
        ),
        "no graph": (
            dict(loss=lambda p, h: -p.detach()),
            "a gradient in logp, entropy or an input",
        ),
        "integers": (dict(loss=lambda p, h: (p > 0).long()), "torch.int64 values without one"),
        "learned constant": (
            dict(loss=losses.MLE(), inputs={"weights": torch.ones(4, requires_grad=True)}),
            "MLE has no gradient in its inputs; weights requires grad",
        ),
        "learned normalizer": (dict(normalizer=learned), "normalizer has no gradient"),
        "reference dtype": (
            dict(ref_hidden=torch.zeros(4, 5).double(), ref_weight=torch.zeros(7, 5).double()),
            "float64 only beside float64",
        ),
        "reference shape": (
            dict(ref_hidden=torch.zeros(4, 3), ref_weight=torch.zeros(6, 3)),
            r"ref_weight \[7, H'\] on cpu, got \(4, 3\) and \(6, 3\)",
        ),
        "reference device": (
            dict(
                ref_hidden=torch.zeros(4, 3, device=META),
                ref_weight=torch.zeros(7, 3, device=META),
            ),
            "float ref_hidden on cpu .* on meta",
        ),
        "half a reference": (dict(ref_hidden=torch.zeros(4, 3)), "together, got one of them"),
        "kl twice": (
            dict(
                loss=lambda p, h, kl: kl,
                inputs={"kl": torch.ones(4)},
                ref_hidden=torch.zeros(4, 3),
                ref_weight=torch.zeros(7, 3),
            ),
            "no input named kl beside ref_hidden",
        ),
        "reference unused": (
            dict(loss=lambda p, h: -p, ref_hidden=torch.zeros(4, 3), ref_weight=torch.zeros(7, 3)),
            "takes kl or ref_logp",
        ),
        "hidden shape": (dict(hidden=torch.zeros(4)), r"hidden \[N, H\].*got \(4,\) and \(7, 5\)"),
        "hidden dtype": (
            dict(hidden=torch.zeros(4, 5).int(), weight=torch.zeros(7, 5).int()),
            "float hidden, got torch.int32",
        ),
        "weight": (dict(weight=torch.zeros(7, 6)), r"\(4, 5\) and \(7, 6\)"),
        "weight dtype": (
            dict(weight=torch.zeros(7, 5).bfloat16()),
            "weight like hidden .torch.float32 on cpu., got torch.bfloat16",
        ),
        "weight device": (dict(weight=torch.zeros(7, 5, device=META)), "on cpu., got .* on meta"),
        "bias shape": (dict(bias=torch.zeros(5)), r"bias of shape \(7,\), got \(5,\)"),
        "bias dtype": (dict(bias=torch.zeros(7).double()), "bias like hidden.*got torch.float64"),
        "targets shape": (dict(targets=torch.zeros(3).long()), r"shape \(4,\), .*got shape \(3,\)"),
        "targets dtype": (dict(targets=torch.zeros(4).int()), "int64, on cpu, got .* torch.int32"),
        "targets device": (
            dict(targets=torch.zeros(4, device=META).long()),
            "int64, on cpu, got .* on meta",
        ),
        "input device": (dict(inputs={"a": torch.ones(4, device=META)}), "'a' on cpu, got meta"),
        "temperature": (dict(temperature=0.0), "temperature > 0, got 0.0"),
        "temperature shape": (dict(temperature=torch.ones(3)), r"\(4,\), got shape \(3,\)"),
        "softcap": (dict(softcap=-1.0), "softcap > 0 or None, got -1.0"),
        "weight_grad shape": (
            dict(weight_grad=torch.zeros(5, 7)),
            r"\(7, 5\) on cpu, got.*\(5, 7\)",
        ),
        "weight_grad dtype": (
            dict(weight_grad=torch.zeros(7, 5).bfloat16()),
            "contiguous torch.float32 buffer .* got torch.bfloat16",
        ),
        "workspace": (dict(workspace=1), "workspace >= 28 bytes .one row of 7 logits., got 1"),
        "workspace of two models": (
            dict(
                loss=lambda p, h, kl: kl,
                ref_hidden=torch.zeros(4, 3),
                ref_weight=torch.zeros(7, 3),
                workspace=55,
            ),
            "workspace >= 56 bytes",
        ),
        "normalizer": (dict(normalizer=0), "normalizer > 0, got 0"),
        "normalizer shape": (dict(normalizer=torch.ones(4)), r"0-d tensor, got shape \(4,\)"),
    }


@pytest.mark.parametrize("name", bad_cases())
def test_bad_input_is_named(name: str) -> None:
    changed, message = bad_cases()[name]
    kwargs: dict[str, Any] = {
        "hidden": torch.zeros(4, 5, requires_grad=True),
        "weight": torch.zeros(7, 5),
        "targets": torch.zeros(4, dtype=torch.int64),
        "loss": lambda logp, entropy, **inputs: -logp,
        "inputs": {},
    }
    kwargs.update(changed)
    with pytest.raises(ValueError, match=f"linear_loss: .*{message}"):
        linear_loss(**kwargs)


def test_a_gradient_on_the_host_is_refused() -> None:
    """It would be waited for on every slab. A constant of one number goes along."""
    hidden, weight = torch.zeros(4, 5, device=META), torch.zeros(7, 5, device=META)

    def loss(logp: Tensor, entropy: Tensor, cost: Tensor) -> Tensor:
        return cost * logp

    targets = torch.zeros(4, dtype=torch.int64, device=META)
    for learned in (False, True):
        args: Any = (hidden, weight, targets, loss, {"cost": torch.ones((), requires_grad=learned)})
        if learned:
            with pytest.raises(ValueError, match="linear_loss: .*'cost' on meta, got cpu"):
                linear_loss(*args, ignore_index=None)
        else:
            assert linear_loss(*args, ignore_index=None).loss.device.type == META


TARGETS = torch.tensor([1, -100, 2, 3, 6, 0])
HEAD = (torch.ones(6, 5), torch.ones(7, 5))
ROW = 4 * 7


@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("wrong", [7, -1])
def test_debug_names_the_wrong_target(
    wrong: int, ignore_index: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its row among all rows, whatever was dropped and however they are cut."""
    targets = torch.where(TARGETS == 6, wrong, TARGETS)
    expected = r"\[0, 7\) or -100, " if ignore_index else r"\[0, 7\), "
    if ignore_index is None:
        targets[1] = 0
    monkeypatch.setenv("FASTALIGN_DEBUG", "1")
    settings: dict[str, Any] = {"ignore_index": ignore_index, "workspace": 2 * ROW}
    with pytest.raises(ValueError, match=f"linear_loss: .*{expected}got {wrong} in row 4"):
        linear_loss(*HEAD, targets, losses.MLE(), **settings)
    with pytest.raises(ValueError, match=f"linear_logprobs: .*{expected}got {wrong} in row 4"):
        linear_logprobs(*HEAD, targets, **settings)
    linear_loss(*HEAD, TARGETS.clamp(min=0), losses.MLE(), **settings)


@pytest.mark.parametrize("wrong", [7, -1, 1 << 40])
def test_a_wrong_target_is_never_a_number(wrong: int) -> None:
    targets = torch.where(TARGETS == 6, wrong, TARGETS)
    for backend, error in (("cpp", RuntimeError), ("reference", (RuntimeError, IndexError))):
        with fa.backend(backend), pytest.raises(error, match="index|expected targets"):
            linear_loss(*HEAD, targets, losses.MLE())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight, targets = (x.to(device) for x in (*HEAD, targets))
    hidden.requires_grad_()
    with fa.backend("triton"):
        out = linear_loss(hidden, weight, targets, losses.MLE())
    assert out.loss.isnan() and out.logp.isnan().tolist() == [False] * 4 + [True, False]
