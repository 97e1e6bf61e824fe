"""Several reward models as one: scores, statistics, costs, and what does not go together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import rollouts, save_ensemble, tokenizer
from torch import Tensor

from fastalign.data.packing import pack
from fastalign.data.tokens import TokenizedCompletion
from fastalign.errors import UserError
from fastalign.models import RewardEnsemble
from fastalign.models.flops import forward_flops
from fastalign.models.full_ensemble import FullEnsemble
from fastalign.train.critic import make_critic
from fastalign.train.labels import Scorer
from fastalign.train.meter import Meter
from fastalign.train.reward_source import RewardSource, make_reward
from fastalign.train.run import RunError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models of one head, encoders of their own."""
    root = tmp_path_factory.mktemp("models")
    return [save_ensemble(root / f"model-{k}", seed=1 + k, heads=1) for k in range(3)]


def source(reward: str, **options: Any) -> RewardSource:
    given = {"statistic": None, "coef": None, "policy": "runs/sft/model", "dtype": "float32"}
    config = SimpleNamespace(reward=reward, micro_tokens=20, **given | options)
    return make_reward(config, tokenizer(), torch.device("cpu"))


@torch.no_grad()
def alone(folder: str) -> Tensor:
    """[S, K] scores of one model, one sequence at a time."""
    model = RewardEnsemble.load(folder).eval()
    return torch.cat([model(pack([r.prompt + r.completion])) for r in rollouts()])


@pytest.mark.parametrize("statistic", ["mean", "min", "median", "lcb", "uwo"])
def test_a_statistic_over_models(folders: list[str], statistic: str) -> None:
    scores = torch.cat([alone(folder) for folder in folders], 1)
    a, b, c = scores.double().unbind(1)
    mean = (a + b + c) / 3
    variance = ((a - mean) ** 2 + (b - mean) ** 2 + (c - mean) ** 2) / 2
    expected = {
        "mean": mean,
        "min": torch.minimum(a, torch.minimum(b, c)),
        "median": a + b + c - scores.double().amin(1) - scores.double().amax(1),
        "lcb": mean - 0.7 * variance.sqrt(),
        "uwo": mean - 0.7 * variance,
    }[statistic]
    reward = source("+".join(folders), statistic=statistic, coef=0.7)
    found = reward.score(rollouts(), ["p"] * 6, ["r"] * 6)
    torch.testing.assert_close(found.scores, scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-6)
    assert float(scores.std(1).mean()) > 0.1  # not three times the same


def test_heads_of_all_models_count_alike(folders: list[str], tmp_path: Path) -> None:
    many = save_ensemble(tmp_path / "many", seed=9, heads=3)
    found = source(f"2*{folders[0]}+{many}").score(rollouts(), ["p"] * 6, ["r"] * 6)
    scores = torch.cat([alone(folders[0]), alone(many)], 1)
    torch.testing.assert_close(found.total, 2 * scores.mean(1), rtol=1e-5, atol=1e-6)


def test_what_it_says_of_itself(folders: list[str]) -> None:
    reward = source("+".join(folders), statistic="uwo")
    assert reward.label == "uwo" and reward.max_length == 40
    models = [RewardEnsemble.load(folder) for folder in folders]
    heads = b"".join((Path(folder) / "heads.safetensors").read_bytes() for folder in folders)
    assert reward.describe()["reward"] == [
        {
            "name": "ensemble",
            "weight": 1.0,
            "path": "+".join(folders),
            "statistic": "uwo",
            "coef": 0.5,
            "n_heads": 3,
            "n_models": 3,
            "n_parameters": 3 * sum(p.numel() for p in models[0].parameters()),
            "sha256": hashlib.sha256(heads).hexdigest(),
        }
    ]
    assert reward.flops([5, 9]) == 3 * forward_flops(models[0], [5, 9], 2) > 0
    assert not any(p.requires_grad for p in reward.ensemble.parameters())  # type: ignore[union-attr]


def test_a_folder_with_a_plus_in_its_name(tmp_path: Path) -> None:
    folder = save_ensemble(tmp_path / "a+b", heads=2)
    found = source(folder).score(rollouts(), ["p"] * 6, ["r"] * 6)
    torch.testing.assert_close(found.scores, alone(folder), rtol=1e-5, atol=1e-6)


def test_what_does_not_go_together(folders: list[str], tmp_path: Path) -> None:
    other = save_ensemble(tmp_path / "other", heads=1, statistic="min")
    with pytest.raises(UserError, match=r"different statistics \(mean 0.5, min 0.5\): give"):
        source(f"{folders[0]}+{other}")
    both = source(f"{folders[0]}+{other}", statistic="mean", coef=0.0).ensemble
    assert isinstance(both, FullEnsemble) and both.config.statistic == "mean"
    with pytest.raises(UserError, match="no reward ensemble at '.*/none'"):
        source(f"{folders[0]}+{tmp_path / 'none'}")
    asked = SimpleNamespace(critic="reward", reward="+".join(folders), policy="runs/sft/model")
    with pytest.raises(RunError, match="one reward model, and --reward .* has 3 with an encoder"):
        make_critic(asked, None, tokenizer(), torch.device("cpu"))  # type: ignore[arg-type]


def test_labels_count_a_prompt_that_passes_share_once(folders: list[str]) -> None:
    """Four answers of two tokens to one prompt of eight, in one pass of a model and the next."""
    prompt = list(range(2, 10))
    examples = [TokenizedCompletion(prompt, [2 + i, 1], None) for i in range(4)]
    reward = source("+".join(folders[:2]), statistic="mean", coef=1.0)
    assert isinstance(reward.ensemble, FullEnsemble) and reward.shares_prompts
    for share, own, before in ((True, [10, 2, 2, 2], [0, 8, 8, 8]), (False, [10] * 4, [0] * 4)):
        reward.ensemble.shares_prompts = share
        meter = Meter(torch.device("cpu"), torch.float32)
        Scorer(reward, tokenizer()).label(examples, meter)
        one = forward_flops(reward.ensemble.members[0], own, 4, before)
        assert meter.totals["score"].flops == 2 * one
