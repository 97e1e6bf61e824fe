"""Critics: what each form reads, what its gradient reaches, what pre-training does and leaves."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import ensemble, llama, policy, rollouts, tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from fastalign.data.packing import held, pack, same_prompts
from fastalign.errors import UserError
from fastalign.models import Policy, RewardEnsemble
from fastalign.models.attention import packed_hidden
from fastalign.models.flops import forward_flops, training_flops
from fastalign.models.policy import ValueHead
from fastalign.models.reward import EnsembleConfig
from fastalign.rollout import Rollout
from fastalign.train.critic import (
    Critic,
    OwnCritic,
    TrunkCritic,
    explained_variance,
    make_critic,
    pretrain,
    values_of,
)
from fastalign.train.meter import Meter
from fastalign.train.run import RunError, Stopped

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("trunk", "separate", "reward")
ONE_PASS: dict[str, Any] = {"micro_tokens": 8192, "dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("models")
    policy().save(root / "sft", tokenizer())
    ensemble().save(root / "rm", tokenizer())
    return SimpleNamespace(sft=str(root / "sft"), rm=str(root / "rm"))


def make(folders: SimpleNamespace, kind: str, reward: str | None = None, **options: Any) -> Critic:
    config = SimpleNamespace(
        critic=kind,
        policy=folders.sft,
        reward=reward or folders.rm,
        activation_checkpointing=options.pop("activation_checkpointing", False),
    )
    torch.manual_seed(5)  # the heads that begin at random begin the same
    return make_critic(
        config, Policy.load(folders.sft, tokenizer(), **options), tokenizer(), torch.device("cpu")
    )


def packed(some: list[Rollout]) -> Any:
    return pack([r.prompt + r.completion for r in some], [len(r.prompt) for r in some])


def scramble(critic: Critic) -> None:
    """Value heads begin at 0: gives them something to say."""
    for head in [m for m in critic_modules(critic) if isinstance(m, ValueHead)]:
        nn.init.normal_(head.down.weight)


def critic_modules(critic: Critic) -> list[nn.Module]:
    if isinstance(critic, TrunkCritic):
        return list(critic.policy.modules())
    assert critic.module is not None
    return list(critic.module.modules())


# --- what they read -------------------------------------------------------------------------------


def test_the_trunk_critic_is_the_policy_s_value_head(folders: SimpleNamespace) -> None:
    critic = make(folders, "trunk", value_head=True)
    assert isinstance(critic, TrunkCritic) and critic.module is None
    scramble(critic)
    batch = packed(rollouts())
    hidden = critic.policy.response_hidden(batch)
    values = critic.values(batch)
    assert torch.equal(values, critic.policy.values(hidden)) and values.std() > 0
    assert torch.equal(critic.values(batch, hidden + 1), critic.policy.values(hidden + 1))
    assert torch.equal(critic.values_alone(batch), values)


def test_a_separate_critic_begins_on_the_trunk_of_pi_init(folders: SimpleNamespace) -> None:
    critic = make(folders, "separate")
    assert isinstance(critic, OwnCritic) and critic.module is critic
    loaded = Policy.load(folders.sft, tokenizer())
    batch, weights = packed(rollouts()), critic.trunk.state_dict()
    for name, weight in loaded.model.base_model.state_dict().items():
        assert torch.equal(weights.pop(name), weight)
    assert not weights and critic.max_length == 64
    assert critic.values(batch).abs().max() == 0.0  # the head begins at nothing
    scramble(critic)
    hidden = loaded.response_hidden(batch)
    assert torch.equal(critic.values(batch), critic.head(hidden))
    # Another policy's hidden states are not its own.
    assert torch.equal(critic.values(batch, hidden + 1), critic.values(batch))
    assert all(p.requires_grad for p in critic.parameters())


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_a_reward_critic_begins_as_the_score_of_what_there_is(
    folders: SimpleNamespace, weight: float
) -> None:
    """Of the whole response, and of the response so far at every state before its end."""
    reward = f"{weight}*{folders.rm},mine.py:f"
    critic = make(folders, "reward", reward)
    assert isinstance(critic, OwnCritic) and critic.max_length == 40
    some = rollouts()
    with torch.no_grad():
        scores = weight * RewardEnsemble.load(folders.rm).eval()(packed(some)).mean(1)
        batch = packed(some)
        ends = critic.head(packed_hidden(critic.trunk, batch)[batch.last_index])
        torch.testing.assert_close(ends, scores, rtol=1e-5, atol=1e-5)
        so_far = [r.prompt + r.completion[:n] for r in some for n in range(len(r.completion))]
        expected = weight * RewardEnsemble.load(folders.rm).eval()(pack(so_far)).mean(1)
        torch.testing.assert_close(critic.values(batch), expected, rtol=1e-5, atol=1e-5)
    assert scores.std() > 0.01 and all(p.requires_grad for p in critic.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(folders: SimpleNamespace, kind: str) -> None:
    """`values` reaches a trunk, `values_alone` all of an own critic and nothing of the policy."""
    critic = make(folders, kind, value_head=True)
    scramble(critic)
    critic.values(packed(rollouts())).square().sum().backward()
    everything = critic.policy if isinstance(critic, TrunkCritic) else critic.module
    assert everything is not None
    trunk = [p for n, p in everything.named_parameters() if "layers.0" in n]
    assert trunk and all(p.grad is not None and p.grad.abs().sum() > 0 for p in trunk)
    everything.zero_grad(set_to_none=True)
    critic.values_alone(packed(rollouts())).square().sum().backward()
    own = {id(p) for p in critic.trained()}
    touched = {id(p) for p in everything.parameters() if p.grad is not None}
    assert touched == own and len(own) == (
        4 if kind == "trunk" else len([*everything.parameters()])
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_tokens", [1, 20])
def test_values_do_not_depend_on_the_packs(
    folders: SimpleNamespace, kind: str, micro_tokens: int
) -> None:
    critic, some = make(folders, kind, value_head=True), rollouts()
    scramble(critic)
    values = values_of(critic, some, micro_tokens, "float32")
    assert values.dtype == torch.float32 and not values.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(values, critic.values(packed(some)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["separate", "reward"])
def test_activations_may_be_recomputed(folders: SimpleNamespace, kind: str) -> None:
    """With the same gradients; the layers are run again for them."""
    found: list[Tensor] = []
    runs: list[int] = []
    for again in (False, True):
        critic = make(folders, kind, activation_checkpointing=again)
        assert isinstance(critic, OwnCritic)
        scramble(critic)
        first = critic.trunk.layers[0].input_layernorm
        counted = first.register_forward_hook(lambda *_: runs.append(1))
        critic.values(packed(rollouts())).square().sum().backward()
        counted.remove()
        found.append(torch.cat([p.grad.flatten() for p in critic.trained()]))  # type: ignore[union-attr]
    assert torch.equal(*found) and len(runs) == 3


# --- pre-training ---------------------------------------------------------------------------------


def returns_of(some: list[Rollout]) -> Tensor:
    """A return that can be read off each prompt: the same number at every token of a response."""
    return torch.cat([torch.full((len(r.completion),), r.prompt[0] / 100) for r in some])


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_explains_returns(folders: SimpleNamespace, kind: str) -> None:
    critic, some = make(folders, kind, value_head=True), rollouts(3, 2)
    before = copy.deepcopy(critic_modules(critic)[0].state_dict())
    found = pretrain(
        critic, some, returns_of(some), steps=60, lr=1e-2, batch_tokens=30, seed=0, **ONE_PASS
    )
    # Three prompts: none is held out.
    assert found["value/explained_variance/after"] > 0.98
    assert found["value/explained_variance/before"] < 0.5
    assert found["value/pretrain_loss"] < 0.02
    values = values_of(critic, some, **ONE_PASS)
    assert explained_variance(values, returns_of(some)) == found["value/explained_variance/after"]
    changed = {
        name
        for name, tensor in critic_modules(critic)[0].state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    head_only = all(name.startswith("value_head") for name in changed)
    assert changed and head_only == (kind == "trunk")
    assert all(p.grad is None for p in critic_modules(critic)[0].parameters())


def test_pretraining_holds_every_fourth_prompt_out(folders: SimpleNamespace) -> None:
    """What it reports is of prompts it did not learn from: their returns cannot change it."""
    some = rollouts(8, 2)
    indices = torch.cat([torch.full((len(r.completion),), r.prompt_index) for r in some])
    held = indices % 4 == 3
    found = []
    for shift in (0.0, 5.0):
        critic = make(folders, "separate")
        returns = torch.where(held, shift + 3 * returns_of(some), returns_of(some))
        report = pretrain(
            critic, some, returns, steps=12, lr=1e-2, batch_tokens=60, seed=0, **ONE_PASS
        )
        values = values_of(critic, some, **ONE_PASS)
        of_held = explained_variance(values[held], returns[held])
        assert report["value/explained_variance/after"] == pytest.approx(of_held, abs=1e-6)
        found.append(values)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_counts_its_passes(folders: SimpleNamespace, kind: str) -> None:
    """Two updates on all responses, of which a trunk under a head is only read; and every response
    is looked at before and after."""
    critic, some = make(folders, kind, value_head=True), rollouts(3, 2)
    meter = Meter(torch.device("cpu"), torch.float32)
    options = ONE_PASS | {"batch_tokens": 999, "seed": 0, "meter": meter}
    pretrain(critic, some, returns_of(some), steps=2, lr=1e-2, **options)
    lengths = [len(r.prompt) + len(r.completion) for r in some]
    model = critic_modules(critic)[0]
    learned = forward_flops if kind == "trunk" else training_flops
    prompts = same_prompts(r.prompt for r in some) if critic.shares_prompts else None
    own, before = held([range(len(some))], lengths, prompts)
    expected = 2 * forward_flops(model, own, 0, before) + 2 * learned(model, own, 0, before)
    assert meter.totals["other"].flops == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["trunk", "separate"])
def test_pretraining_in_small_passes_is_the_same(folders: SimpleNamespace, kind: str) -> None:
    some, found = rollouts(4, 3), []
    for micro_tokens in (8192, 25):
        critic = make(folders, kind, value_head=True)
        scramble(critic)
        pretrain(
            critic,
            some,
            returns_of(some),
            steps=5,
            lr=1e-3,
            batch_tokens=70,
            micro_tokens=micro_tokens,
            dtype="float32",
            seed=0,
        )
        found.append(values_of(critic, some, **ONE_PASS))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_pretraining_repeats_itself_and_draws_nothing(folders: SimpleNamespace) -> None:
    some, found = rollouts(4, 2), []
    for seed in (0, 0, 1):
        critic = make(folders, "reward")
        before = torch.get_rng_state()
        pretrain(
            critic, some, returns_of(some), steps=7, lr=1e-3, batch_tokens=40, seed=seed, **ONE_PASS
        )
        assert torch.equal(torch.get_rng_state(), before)
        found.append(values_of(critic, some, **ONE_PASS))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_no_steps_leave_the_critic_as_it_is(folders: SimpleNamespace) -> None:
    critic, some = make(folders, "reward"), rollouts()
    before = values_of(critic, some, **ONE_PASS)
    found = pretrain(
        critic, some, returns_of(some), steps=0, lr=1e-2, batch_tokens=30, seed=0, **ONE_PASS
    )
    assert torch.equal(values_of(critic, some, **ONE_PASS), before)
    assert found["value/explained_variance/before"] == found["value/explained_variance/after"]


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(returns + 7, returns) == pytest.approx(1.0)  # a shift is no variance
    assert explained_variance(torch.zeros(4), returns) == 0.0
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert explained_variance(returns / 2, returns) == pytest.approx(0.75)
    assert math.isnan(explained_variance(returns, torch.ones(4)))


# --- what is refused ------------------------------------------------------------------------------


def test_what_is_no_critic(folders: SimpleNamespace) -> None:
    with pytest.raises(RunError, match="unknown critic 'twin': expected one of trunk, separate,"):
        make(folders, "twin")
    with pytest.raises(RunError, match="critic trunk: expected a policy with a value head"):
        make(folders, "trunk")
    with pytest.raises(RunError, match=r"--reward mine\.py:f has none; expected critic trunk or"):
        make(folders, "reward", "mine.py:f")


def test_an_encoder_that_sees_the_end_is_no_critic(
    folders: SimpleNamespace, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    bert = BertModel(
        BertConfig(**small, num_attention_heads=4, vocab_size=300), add_pooling_layer=False
    )
    RewardEnsemble(bert, EnsembleConfig(2)).save(tmp_path / "bert", tokenizer())
    with pytest.raises(UserError, match="reads later tokens too"):
        make(folders, "reward", str(tmp_path / "bert"))


def test_returns_that_do_not_match(folders: SimpleNamespace) -> None:
    critic, some = make(folders, "separate"), rollouts()
    n = sum(len(r.completion) for r in some)
    options: dict[str, Any] = {"steps": 1, "lr": 1e-3, "batch_tokens": 30, "seed": 0, **ONE_PASS}
    with pytest.raises(ValueError, match=rf"returns of the {n} response tokens, got \({n - 1},\)"):
        pretrain(critic, some, torch.zeros(n - 1), **options)
    with pytest.raises(Stopped, match="pre-training of the critic, update 1: loss nan"):
        pretrain(critic, some, torch.full((n,), math.nan), **options)
    assert bool(torch.isfinite(values_of(critic, some, **ONE_PASS)).all())


def test_the_small_models_differ() -> None:
    """Or the tests above could not tell whose states were read."""
    first, second = (llama(seed).model.embed_tokens.weight for seed in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("steps", [1, 7])
def test_as_many_updates_as_asked_for(
    folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Also where they end in the middle of a pass (one is of five updates)."""
    plain, rates = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    some = rollouts(3, 2)
    pretrain(
        make(folders, "separate"),
        some,
        returns_of(some),
        steps=steps,
        lr=1e-3,
        batch_tokens=15,
        seed=0,
        **ONE_PASS,
    )
    assert rates == pytest.approx([1e-4 * (i + 1) for i in range(steps)])  # the warm-up
