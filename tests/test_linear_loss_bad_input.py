"""What linear_loss refuses, and the words it does it with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastalign import losses
from fastalign.ops.linear_loss import linear_loss


def bad_cases() -> dict[str, tuple[dict[str, Any], str]]:
    learned = torch.ones((), requires_grad=True)
    ratios = {"advantages": torch.ones(4), "old_logp": torch.zeros(4)}
    return {
        "mean": (dict(loss=lambda p, h: p.mean()), r"per token, shape \(4,\), got \(\)"),
        "not a tensor": (dict(loss=lambda p, h: 1.0), "per token.*got float"),
        "closed over": (dict(loss=lambda p, h: p * learned), "requires grad.*not among inputs"),
        "input size": (dict(inputs={"a": torch.ones(3)}), r"'a'.*dimension 4.*\(3,\)"),
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
        "sequences": (
            dict(loss=losses.GRPO("grpo"), inputs=ratios),
            "whose tokens count alike.*averages every sequence first",
        ),
        "sum": (dict(loss=losses.GRPO("dr_grpo"), inputs=ratios), "expected a normalizer with"),
        "learned normalizer": (dict(normalizer=learned), "normalizer has no gradient"),
        "reference dtype": (
            dict(ref_hidden=torch.zeros(4, 5).double(), ref_weight=torch.zeros(7, 5).double()),
            "float64 only beside float64",
        ),
        "weight": (dict(weight=torch.zeros(7, 6)), r"\(4, 5\) and \(7, 6\)"),
        "workspace": (dict(workspace=1), "workspace >= 28 bytes"),
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
