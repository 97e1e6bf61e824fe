"""Guards: each alarm with a step that sets it off and its neighbour that does not."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fastalign.rollout import Rollout
from fastalign.train.experience import Experience
from fastalign.train.guards import ALARMS, GuardConfig, Guards, by_prompt, distinct, repeats
from fastalign.train.run import RunError, Stopped

DIFFERENT = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [2, 4, 6, 8, 1], [9, 7, 5, 3, 1]]


def step_of(
    completions: list[list[int]] = DIFFERENT,
    rewards: list[float] | None = None,
    kl: list[float] | None = None,
    prompts: list[int] | None = None,
) -> Experience:
    """Responses, two to a prompt, with these rewards and these sums of logp - ref_logp."""
    n = len(completions)
    kl = [0.2, 0.3, 0.1, 0.4] if kl is None else kl
    owners = [i // 2 for i in range(n)] if prompts is None else prompts
    rollouts = [
        Rollout(p, [0], c, [0.0] * len(c), True) for p, c in zip(owners, completions, strict=True)
    ]
    sizes = torch.tensor([len(c) for c in completions])
    cu_seqlens = torch.cat([torch.zeros(1), sizes.cumsum(0)]).int()
    of_tokens = (torch.tensor(kl)[:n] / sizes).repeat_interleave(sizes)
    proxy = torch.arange(float(n)) if rewards is None else torch.tensor(rewards)
    logp, ref_logp = -1.0 + of_tokens, torch.full_like(of_tokens, -1.0)
    tokens = int(sizes.sum()) + n
    return Experience(rollouts, cu_seqlens, logp, ref_logp, proxy[:, None], proxy, None, tokens)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records]


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="fastalign")


def alarm_of(
    caplog: pytest.LogCaptureFixture,
    found: Experience,
    metrics: dict[str, float] | None = None,
    *,
    guards: Guards | None = None,
    **options: Any,
) -> list[str]:
    """What is told of this step, where the first one was an ordinary one."""
    guards = guards or Guards(GuardConfig(**options))
    guards.check(1, step_of(), {"entropy": 2.0, "sampling_gap": 1e-6})
    assert told(caplog) == []
    guards.check(2, found, {"entropy": 1.0, "sampling_gap": 1e-6} | (metrics or {}))
    return told(caplog)


LONG = [[*range(k, k + 16)] for k in (1, 21, 41, 61)]
CASES: dict[str, tuple[dict, dict, dict, dict]] = {
    # what sets it off, what does not: arguments of step_of, metrics
    "sampling_gap": ({}, {"sampling_gap": 0.06}, {}, {"sampling_gap": 0.04}),
    "negative_kl": (
        {"kl": [-0.9, -1.1, -1.0, -1.0]},
        {},
        {"kl": [-2.0, 1.8, -1.9, 1.7]},  # as far as chance goes
        {},
    ),
    "entropy": ({}, {"entropy": 0.39}, {}, {"entropy": 0.41}),
    "length": ({"completions": LONG}, {}, {"completions": [c[:15] for c in LONG]}, {}),
    "repeats": (
        {"completions": [[1, 2, 1, 2, 1, 2, 1, 2, 1], [3] * 9, [4] * 9, [*range(9)]]},
        {},
        {"completions": [[1, 2, 1, 2, 1, 2, 1, 2, 1], [*range(10, 19)], [*range(9)], [5] * 4]},
        {},
    ),
    "distinct": (
        {"completions": [DIFFERENT[0]] * 3 + [DIFFERENT[1]] * 3, "prompts": [0, 0, 0, 1, 1, 1]},
        {},
        {"completions": [DIFFERENT[0]] * 4, "prompts": [0, 0, 1, 1]},
        {},
    ),
    "reward_std": ({"rewards": [0.5] * 4}, {}, {"rewards": [0.5, 0.5, 0.5, 0.6]}, {}),
}
# Long enough for the case with six responses.
for case in CASES.values():
    for arguments in case[::2]:
        arguments.setdefault("kl", [0.2, 0.3, 0.1, 0.4, 0.2, 0.3])


def test_every_alarm_has_a_case() -> None:
    assert tuple(CASES) == ALARMS


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_and_none(name: str, caplog: pytest.LogCaptureFixture) -> None:
    loud, loud_metrics, quiet, quiet_metrics = CASES[name]
    assert alarm_of(caplog, step_of(**quiet), quiet_metrics) == []
    guards = Guards(GuardConfig())
    (line,) = alarm_of(caplog, step_of(**loud), loud_metrics, guards=guards)
    assert line.startswith("step 2: ") and "\n" not in line and guards.told == [name]
    # Once a run: neither again, nor after a checkpoint.
    guards.check(3, step_of(**loud), {"entropy": 1.0} | loud_metrics)
    resumed = Guards(GuardConfig())
    resumed.load_state_dict(guards.state_dict())
    resumed.check(4, step_of(**loud), {"entropy": 1.0} | loud_metrics)
    assert told(caplog) == [line]


@pytest.mark.parametrize("name", ALARMS)
@pytest.mark.parametrize("stop", ["{}", "all", "reward_std, {}"])
def test_an_alarm_may_end_the_run(name: str, stop: str, caplog: pytest.LogCaptureFixture) -> None:
    loud, metrics, quiet, quiet_metrics = CASES[name]
    guards = Guards(GuardConfig(stop=stop.format(name)))
    guards.check(1, step_of(), {"entropy": 2.0})
    guards.check(2, step_of(**quiet), {"entropy": 1.0} | quiet_metrics)
    with pytest.raises(Stopped, match=rf"^step 3: .* \(guards.stop names {name}\)$"):
        guards.check(3, step_of(**loud), {"entropy": 1.0} | metrics)
    assert told(caplog) == []


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_may_be_switched_off(name: str, caplog: pytest.LogCaptureFixture) -> None:
    loud, metrics, _, _ = CASES[name]
    off: dict[str, Any] = {name: 0}
    assert alarm_of(caplog, step_of(**loud), metrics, **off) == []


def test_other_alarms_end_no_run(caplog: pytest.LogCaptureFixture) -> None:
    loud, metrics, _, _ = CASES["entropy"]
    stop = ",".join(name for name in ALARMS if name != "entropy")
    (line,) = alarm_of(caplog, step_of(**loud), metrics, stop=stop)
    assert "entropy is 0.39 nats a token, 2 at first" in line


def test_both_ways_of_length(caplog: pytest.LogCaptureFixture) -> None:
    short = step_of([c[:2] for c in DIFFERENT])
    assert alarm_of(caplog, short) == []
    (line,) = alarm_of(caplog, step_of([c[:1] for c in DIFFERENT]))
    assert "1 tokens on average, 5 at first: the reward may pay for shortness" in line
    caplog.clear()
    (line,) = alarm_of(caplog, step_of(LONG))
    assert "16 tokens on average, 5 at first: the reward may pay for length" in line


@pytest.mark.parametrize(
    ("gap", "cause"),
    [
        (0.5, "the sampler's log-probs are not the policy's, see sampling_gap"),
        (0.001, "the log-probs are the policy's, so the responses are not drawn from them"),
        (None, "or the responses are not drawn from them (top-k, top-p, edited)"),
    ],
)
def test_negative_kl_says_what_it_comes_from(
    gap: float | None, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    guards = Guards(GuardConfig())
    metrics = {"entropy": 2.0} | ({} if gap is None else {"sampling_gap": gap})
    seen = guards.check(1, step_of(kl=[-0.9, -1.1, -1.0, -1.0]), metrics)
    line = told(caplog)[-1]
    # Mean -1; the deviation of the four is sqrt(0.02 / 3), its error half of that.
    assert seen["kl/k1_stderr"] == pytest.approx((0.02 / 3) ** 0.5 / 2, rel=1e-4)
    assert "comes out as -1 nats, 24.5 standard errors below 0" in line and line.count(cause) == 1


def test_kl_of_a_policy_at_pi_init_is_rounding(caplog: pytest.LogCaptureFixture) -> None:
    """-1e-4 in every response is many standard errors below 0, and nothing."""
    assert alarm_of(caplog, step_of(kl=[-1e-4, -1.1e-4, -1e-4, -1e-4])) == []
    (line,) = alarm_of(caplog, step_of(kl=[-0.02, -0.02, -0.02, -0.02]))
    assert "comes out as -0.02 nats" in line


@pytest.mark.parametrize(
    ("rewards", "expected", "line"),
    [
        ([0.7, 0.7, 0.7, 0.7], 1.0, "the rewards of all 4 responses are 0.7: there is nothing"),
        ([0.5, 0.5, 0.7, 0.7], 1.0, "the responses to each prompt all have the same reward: "),
        ([0.5, 0.5, 0.7, 0.8], 0.5, None),
        ([0.5, 0.500005, 0.7, 0.7], 1.0, "the responses to each prompt all have the same reward: "),
        ([0.5, 0.50002, 0.7, 0.7], 0.5, None),
        ([0.7, 0.700005, 0.7, 0.7], 1.0, "the rewards of all 4 responses are 0.7: there is"),
        ([0.1, 0.2, 0.1, 0.2], 0.0, None),
    ],
)
def test_rewards_without_spread(
    rewards: list[float], expected: float, line: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    seen = Guards(GuardConfig()).check(1, step_of(rewards=rewards), {})
    assert seen["reward/zero_std"] == expected
    assert [text[8 : 8 + len(line or "")] for text in told(caplog)] == ([line] if line else [])


def test_one_response_to_a_prompt(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing to compare within a prompt, so nothing is said of that."""
    seen = Guards(GuardConfig()).check(1, step_of(prompts=[0, 1, 2, 3]), {})
    assert set(seen) == {"repeats", "kl/k1_stderr"}
    only = step_of([[1, 2]], prompts=[0])
    assert Guards(GuardConfig(stop="all")).check(1, only, {}) == {"repeats": 0.0}
    assert told(caplog) == []


def test_the_figures() -> None:
    some = step_of([[1, 2, 1, 2, 1, 2], [1, 2, 3, 4], [1], [1]]).rollouts
    # 1212 2121 1212: two of three are new; 1234; too short.
    assert repeats(some) == pytest.approx((1 / 3 + 0) / 2)
    assert by_prompt(some) == [[0, 1], [2, 3]]
    assert distinct(some, by_prompt(some)) == pytest.approx((1.0 + 0.5) / 2)
    seen = Guards(GuardConfig()).check(1, step_of([[1, 2, 1, 2, 1, 2], [7], [1], [1]]), {})
    assert seen["repeats"] == pytest.approx(1 / 3) and seen["distinct"] == 0.75


def test_a_budget_of_kl_is_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    guards = Guards(GuardConfig(max_kl=0.5, stop="all"))
    guards.check(1, step_of(kl=[0.5, 0.4, 0.6, 0.5 - 1e-3]), {})
    assert guards.spent is None
    guards.check(2, step_of(kl=[0.5, 0.4, 0.6, 0.6]), {})
    assert guards.spent == (
        "step 2: KL(pi || pi_init) of a response is 0.525 nats, the budget 0.5 (guards.max_kl): "
        "the run ends here"
    )
    for budget, spent in ((0.5, guards.spent), (0.6, None), (None, None)):
        resumed = Guards(GuardConfig(max_kl=budget))
        resumed.load_state_dict(guards.state_dict())
        assert resumed.spent == spent and told(caplog) == []
    Guards(GuardConfig()).check(1, step_of(kl=[1e3, 2e3, 1e3, 2e3]), {})


def test_the_first_step_is_in_the_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    guards, resumed = Guards(GuardConfig()), Guards(GuardConfig())
    guards.check(1, step_of(), {"entropy": 2.0})
    resumed.load_state_dict(guards.state_dict())
    resumed.check(2, step_of(), {"entropy": 0.3})
    assert guards.told == [] and len(told(caplog)) == 1 and "2 at first" in told(caplog)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling_gap": -1.0}, "expected sampling_gap >= 0, got -1.0"),
        ({"entropy": float("nan")}, "expected entropy >= 0, got nan"),
        ({"length": 0.5}, "expected length >= 1, or 0 for no alarm, got 0.5"),
        ({"max_kl": 0.0}, "expected max_kl > 0, got 0.0"),
        ({"stop": "entropy,kl"}, "unknown alarm kl in stop; expected some of sampling_gap,"),
    ],
)
def test_options_that_make_no_sense(options: dict, message: str) -> None:
    with pytest.raises(RunError) as caught:
        GuardConfig(**options)
    assert message in str(caught.value)
