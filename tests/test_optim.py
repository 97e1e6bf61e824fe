"""AdamW's learning rates, decay, clipping, its guard against NaN, and what a checkpoint holds."""

import math
import warnings

import pytest
import torch

from fastalign.train.optim import MOMENTS, OptimConfig, Optimizer
from fastalign.train.run import Run, RunError, Stopped, first_non_finite


def two_parts():
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"body": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 1)})


def test_learning_rates():
    """4 warm-up steps of 40, then a cosine to a tenth; the value head's rate; who is decayed."""
    module = two_parts()
    config = OptimConfig(lr=1.0, warmup=0.1, weight_decay=0.5, schedule="cosine")
    optimizer = Optimizer(config, module, 40, {"head": 3.0})
    run, loss = Run(config, "test", 40), torch.zeros(())
    seen, logged = [], []
    for step in range(1, 42):
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        seen.append([group["lr"] for group in optimizer.groups])
        logged.append(optimizer.update(run, step, loss, {})["lr"])
        optimizer.next_step()
    assert logged == [lrs[0] for lrs in seen]
    by_parameter = {id(p): i for i, group in enumerate(optimizer.groups) for p in group["params"]}
    assert len(by_parameter) == len(list(module.parameters()))
    for name, parameter in module.named_parameters():
        i = by_parameter[id(parameter)]
        peak = 3.0 if name.startswith("head") else 1.0
        rates = [lrs[i] / peak for lrs in seen]
        assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
        assert (rates[22], rates[40]) == pytest.approx((0.55, 0.1))
        assert optimizer.groups[i]["weight_decay"] == (0.5 if parameter.ndim >= 2 else 0.0)


@pytest.mark.parametrize(("schedule", "end"), [("linear", 0.1), ("constant", 1.0)])
def test_other_schedules(schedule, end):
    optimizer = Optimizer(OptimConfig(lr=2.0, warmup=0.0, schedule=schedule), two_parts(), 11)
    rates = []
    for _ in range(12):
        rates.append(optimizer.groups[0]["lr"] / 2.0)
        optimizer.next_step()
    assert rates[0] == rates[1] == 1.0  # one step of warm-up at least
    assert rates[6] == pytest.approx((1.0 + end) / 2) and rates[11] == pytest.approx(end)


@pytest.mark.parametrize(("size", "kept"), [(10.0, 0.5), (0.25, 0.25)])
def test_the_gradient_is_clipped_to_its_norm(size, kept):
    """After one step Adam's first moment is 0.1 of the gradient it was given."""
    module = two_parts()
    config = OptimConfig(grad_clip=0.5)
    optimizer = Optimizer(config, module, 10)
    n = sum(p.numel() for p in module.parameters())
    for p in module.parameters():
        p.grad = torch.full_like(p, size / math.sqrt(n))
    numbers = optimizer.update(Run(config, "test", 10), 1, torch.zeros(()), {})
    assert numbers["grad_norm"] == pytest.approx(size)  # what is logged is the norm before it
    moments = [optimizer.adam.state[p]["exp_avg"] for p in module.parameters()]
    found = torch.cat([m.flatten() for m in moments]).norm().item()
    assert found == pytest.approx(0.1 * kept, rel=1e-4)
    assert all(p.grad is None for p in module.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run():
    module = two_parts()
    config = OptimConfig()
    optimizer = Optimizer(config, module, 10)
    before = [p.clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(Stopped, match=r"step 7: .* gradient of body.weight \(first NaN among 12"):
        optimizer.update(Run(config, "test", 10), 7, torch.zeros(()), {"hidden": torch.ones(2)})
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


def test_the_first_tensor_that_is_not_finite_is_named():
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), float("inf")])
    assert first_non_finite([("a", good), ("b", None)]) is None
    assert first_non_finite([("a", good), ("b", bad), ("c", bad)]) == (
        "b (first NaN among 3 values)"
    )
    assert first_non_finite([("c", good / 0)]) == "c (first infinity among 3 values)"


def test_a_resumed_run_takes_the_rates_it_is_given():
    """The moments are the checkpoint's; learning rate and decay the new configuration's."""
    module = torch.nn.Linear(2, 2)
    config = OptimConfig(lr=1e-3, schedule="constant", warmup=0.0)
    before = Optimizer(config, module, 10)
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before.update(Run(config, "test", 10), 1, torch.zeros(()), {})
        for _ in range(4):
            before.next_step()
    config = OptimConfig(lr=1e-5, weight_decay=0.5, schedule="linear", warmup=0.0)
    after = Optimizer(config, module, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after.load_state_dict(before.state_dict())
        for name, moment in after.tensors().items():
            moment.copy_(before.tensors()[name])
        rates = [[group["lr"] for group in after.groups]]
        after.next_step()
        rates.append([group["lr"] for group in after.groups])
    # Steps 4 and 5 of 10, of which the first is warm-up: 3 and 4 ninths of the way to a tenth.
    assert rates[0] == pytest.approx([1e-5 * (1 - 0.9 * 3 / 9)] * 2)
    assert rates[1] == pytest.approx([1e-5 * (1 - 0.9 * 4 / 9)] * 2)
    assert [group["weight_decay"] for group in after.groups] == [0.5, 0.0]
    for p in module.parameters():
        assert torch.equal(after.adam.state[p]["exp_avg"], before.adam.state[p]["exp_avg"])
        assert after.adam.state[p]["step"] == 1
    assert set(after.tensors()) == {f"{m}.{p}" for m in MOMENTS for p in ("weight", "bias")}
    with pytest.raises(RunError, match="of a run that trained bias; this one does not"):
        saved = before.state_dict()
        module.bias.requires_grad_(False)
        Optimizer(config, module, 10).load_state_dict(saved)
